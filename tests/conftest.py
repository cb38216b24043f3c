"""Eight simulated CPU devices, strict broadcasting, parsed flags."""

import jax
import pytest
from absl import flags

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def _flags_are_parsed():
  """Libraries that read absl flags outside `app.run` need this."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
