"""The programs of a training, for `--plan`."""

from collections.abc import Iterator
from typing import Any

from birdie.packing import KEYS
from birdie.train import make_setup, make_step
from common.data.tokenizers import make_tokenizer
from common.plan import Program, abstract_batch


def programs(config: Any) -> Iterator[Program]:
  """The train step; see `configs/birdie.py`. No text is read."""
  setup = make_setup(config, make_tokenizer(config.tokenizer))
  shape = (config.data.batch_size, config.data.sequence_length)
  batch = {name: (shape, dtype) for name, dtype in KEYS.items()}
  yield Program(
    name="step",
    step=make_step(config, setup),
    state=setup.abstract,
    batch=abstract_batch(setup.sharding, batch),
    mesh=setup.mesh,
  )
