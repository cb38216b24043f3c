"""A tiny SAM with random parameters, none of them zero."""

import jax
import numpy as np
import pytest

from slimsam.init import abstract_params
from slimsam.settings import DecoderSettings, uniform

TINY = uniform(
  width=24, depth=3, heads=2, mlp_width=40, image_size=40, patch=8, window=3,
  global_blocks=(1,), out=16,
  decoder=DecoderSettings(
    heads=2, mlp_width=24, depth=2, iou_width=16, mask_channels=8
  ),
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny():
  """Its sizes."""
  return TINY


@pytest.fixture(scope="session")
def draw():
  """`(settings, seed=0, dtype=float32)`: a tree of parameters."""

  def draw(settings, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def leaf(path, like):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      if "norm" in name:
        centre = 1.0 if name.endswith("scale") else 0.0
        return rng.normal(centre, 0.1, like.shape).astype(dtype)
      if name.endswith("kernel"):
        fan_in = like.size / like.shape[-1]
        return rng.normal(0, fan_in**-0.5, like.shape).astype(dtype)
      scale = 0.1 if name.endswith("bias") else 0.5
      return rng.normal(0, scale, like.shape).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(settings))

  return draw


@pytest.fixture(scope="session")
def images_of():
  """`(settings, count=2, seed=0)`: float32 images."""

  def make(settings, count=2, seed=0):
    size = settings.encoder.image_size
    rng = np.random.default_rng(100 + seed)
    return rng.normal(size=(count, size, size, 3)).astype(np.float32)

  return make
