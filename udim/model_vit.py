"""The Vision Transformer, as timm and transformers have it.

# b rows, h height, w width, c channels, p patch, t tokens, d width,
# n heads, e width of a head, k classes

Source: Dosovitskiy et al. 2021 (arXiv 2010.11929): patches, a class token,
learned positions, pre-normalization, exact GELU. Features are the class token
after the last normalization.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.errors import UserError
from udim.model_parts import classify, place_rows

Array = jax.Array

# timm and transformers call it truncated: at 100 standard deviations.
_NORMAL = nn.initializers.normal(0.02)
_EPSILON = 1e-6  # timm's; transformers' 1e-12 moves no logit by 1e-5


class _Layer(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  heads: int
  dropout: float
  train: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, None]:
    """[b t d] -> [b t d], with the None that a scan asks for."""
    width = x.shape[-1]
    y = self._norm("norm1")(x)
    y = self._dense((3, self.heads, width // self.heads), "qkv")(y)
    y = jax.nn.dot_product_attention(y[:, :, 0], y[:, :, 1], y[:, :, 2])
    y = self._dense(width, "proj", axis=(-2, -1))(y)  # [b t n e] -> [b t d]
    x = x + self._drop(y)
    y = self._norm("norm2")(x)
    y = nn.gelu(self._dense(4 * width, "up")(y), approximate=False)
    y = self._dense(width, "down")(self._drop(y))
    return place_rows(x + self._drop(y)), None

  def _norm(self, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
      _EPSILON, dtype=self.dtype, use_fast_variance=False, name=name
    )

  def _dense(self, features, name: str, *, axis=-1) -> nn.DenseGeneral:
    return nn.DenseGeneral(
      features, axis, dtype=self.dtype, kernel_init=_NORMAL, name=name
    )

  def _drop(self, x: Array) -> Array:
    return nn.Dropout(self.dropout, deterministic=not self.train)(x)


class ViT(nn.Module):
  """A Vision Transformer. Images are of one size, that of the positions.

  Attributes:
    num_classes: k.
    width: d.
    depth: number of layers.
    heads: n, a divisor of d.
    patch: p, a divisor of the height and the width.
    dropout: of the features.
    block_dropout: of the embeddings and, in each layer, after the attention,
      inside the MLP and after it.
    dtype: of the computation. Parameters, features and logits are float32.
    remat: recompute a layer in the backward pass.
  """

  num_classes: int
  width: int = 384
  depth: int = 12
  heads: int = 6
  patch: int = 16
  dropout: float = 0.0
  block_dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
    """Images [b h w c] -> features [b d] and logits [b k], float32.

    Raises:
      UserError: where patches do not tile the image.
    """
    height, width = x.shape[1:3]
    if height % self.patch or width % self.patch:
      raise UserError(
        f"images of {height} x {width} pixels do not divide into patches of "
        f"{self.patch} x {self.patch}: choose another image size"
      )
    x = place_rows(self._embed(x.astype(self.dtype)))
    x = nn.Dropout(self.block_dropout, deterministic=not train)(x)
    layer = nn.remat(_Layer, prevent_cse=False) if self.remat else _Layer
    layers = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      length=self.depth,
    )
    x, _ = layers(
      heads=self.heads,
      dropout=self.block_dropout,
      train=train,
      dtype=self.dtype,
      name="layers",
    )(x)
    x = nn.LayerNorm(_EPSILON, use_fast_variance=False, name="norm")(
      x[:, 0].astype(jnp.float32)
    )
    return classify(
      x,
      num_classes=self.num_classes,
      dropout=self.dropout,
      train=train,
      kernel_init=_NORMAL,
      bias_init=nn.initializers.zeros,
    )

  def _embed(self, x: Array) -> Array:
    """[b h w c] -> [b 1+hw/pp d]: the class token, then the patches by row."""
    size = (self.patch, self.patch)
    x = nn.Conv(
      self.width,
      size,
      strides=size,
      padding="VALID",
      dtype=self.dtype,
      kernel_init=_NORMAL,
      name="patch",
    )(x)
    x = x.reshape(x.shape[0], -1, self.width)
    token = self.param("class_token", _NORMAL, (1, 1, self.width))
    token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
    x = jnp.concatenate([token, x], axis=1)
    positions = self.param("positions", _NORMAL, (1, *x.shape[1:]))
    return x + positions.astype(x.dtype)
