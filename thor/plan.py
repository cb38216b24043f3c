"""The programs of a training, for `--plan`."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from common.plan import Program, abstract_batch
from thor.corpus import make_batch_shapes
from thor.train import check, make_routing, make_setup, make_step


def programs(config: Any) -> Iterator[Program]:
  """The train step on the longest sentences; see `configs/thor.py`.

  No text is read. Each bucket of lengths has a program of its own, and the last
  one needs the most.
  """
  check(config)
  routing, size = make_routing(config), config.vocabulary.size
  table = np.zeros(size, np.int32) if routing.kind == "hash" else None
  setup = make_setup(config, vocab_size=size, table=table)
  buckets, _ = make_batch_shapes(
    config, setup.sharding, rows=routing.row_multiple
  )
  shape = buckets.shapes[-1]
  batch = {
    "source": ((shape.rows, shape.source_length), np.int32),
    "target": ((shape.rows, shape.target_length), np.int32),
    "language": ((shape.rows,), np.int32),
  }
  yield Program(
    name=f"{shape.rows} x {shape.source_length} + {shape.target_length}",
    step=make_step(config, setup),
    state=setup.abstract,
    batch=abstract_batch(setup.sharding, batch),
    mesh=setup.mesh,
  )
