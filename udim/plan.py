"""The programs of a training, for `--plan`."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from common.plan import Program, abstract_batch
from udim.algorithms import make_steps
from udim.data import train_sharding
from udim.train import make_setup


def programs(config: Any) -> Iterator[Program]:
  """A step with all of its passes, and one without, where there are both.

  The names of the images are read, which say how many classes and domains
  there are, and one image.

  Args:
    config: see `configs/udim.py`.
  """
  setup = make_setup(config)
  choice = make_steps(setup.algorithm, setup.averager)
  places = (len(setup.run.sources), config.data.images_per_domain)
  batch = abstract_batch(
    train_sharding(setup.mesh),
    {
      "image": ((*places, *setup.image_shape), np.float32),
      "label": (places, np.int32),
    },
  )
  due = [setup.algorithm.is_due(step) for step in range(config.num_steps)]
  for is_due, name in ((True, "all passes"), (False, "one pass")):
    if is_due in due:
      yield Program(
        name=name,
        step=choice.choose(due.index(is_due)),
        state=setup.abstract,
        batch=batch,
        mesh=setup.mesh,
      )
