"""What the classifiers share: normalization, the head, where rows lie.

# b rows, h height, w width, c channels, d features, k classes
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType

Array = jax.Array

ROW_AXES = ("data", "fsdp")  # mesh axes that a batch is cut along
# Kaiming et al. 2015, by the number of outputs, as torchvision's ResNets.
HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# torch.nn.Linear's: uniform within 1 / sqrt(d).
TORCH_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class BatchNorm(nn.Module):
  """Batch normalization over all axes but the last, as torch computes it.

  Statistics are those of the whole batch, however it is sharded, in float32.
  `mean` and `var` of the collection `batch_stats` follow them,

      running = 0.9 running + 0.1 batch,

  where the running variance takes the unbiased estimate n / (n - 1) var and
  the normalization the biased one, as torch.nn.BatchNorm2d (and unlike
  flax.linen.BatchNorm, whose running variance is biased too). Where
  `batch_stats` is not mutable they are left alone.

  Attributes:
    use_batch: normalize with the batch's statistics, not the running ones.
    dtype: of the result.
    momentum: weight of the old running value.
    epsilon: added to the variance.
  """

  use_batch: bool
  dtype: Any = jnp.float32
  momentum: float = 0.9
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = (x.shape[-1],)
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    scale = self.param("scale", ones, channels)
    bias = self.param("bias", zeros, channels)
    running = [
      self.variable("batch_stats", name, fill, channels, jnp.float32)
      for name, fill in (("mean", jnp.zeros), ("var", jnp.ones))
    ]
    x = x.astype(jnp.float32)
    if self.use_batch:
      axes = tuple(range(x.ndim - 1))
      mean, var = jnp.mean(x, axes), jnp.var(x, axes)
      if self.is_mutable_collection("batch_stats") and not (
        self.is_initializing()
      ):
        n = math.prod(x.shape[:-1])
        unbiased = var * (n / max(n - 1, 1))
        for variable, new in zip(running, (mean, unbiased)):
          old = variable.value
          variable.value = self.momentum * old + (1 - self.momentum) * new
    else:
      mean, var = (variable.value for variable in running)
    factor = scale * jax.lax.rsqrt(var + self.epsilon)
    rows = (1,) * (x.ndim - 1)
    y = (x - mean.reshape(*rows, -1)) * factor.reshape(*rows, -1)
    return (y + bias.reshape(*rows, -1)).astype(self.dtype)


def convolve(
  x: Array,
  features: int,
  size: int,
  *,
  stride: int = 1,
  dtype: Any = jnp.float32,
  name: str,
) -> Array:
  """A square convolution without bias, padded alike on all sides.

  Not "SAME", which at stride 2 pads one side more than the other. Call it in
  a module.

  Args:
    x: [b h w c].
    features: channels of the result.
    size: height and width of the kernel.
    stride: in both directions.
    dtype: of the computation.
    name: of the parameters.
  """
  layer = nn.Conv(
    features,
    (size, size),
    strides=stride,
    padding=size // 2,
    use_bias=False,
    dtype=dtype,
    kernel_init=HE_FAN_OUT,
    name=name,
  )
  return place_rows(layer(x))


def uniform_bias(features: int) -> nn.initializers.Initializer:
  """torch.nn.Linear's bias: uniform within 1 / sqrt(features)."""
  limit = features**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return init


def classify(
  x: Array,
  *,
  num_classes: int,
  dropout: float,
  train: bool,
  kernel_init: nn.initializers.Initializer = TORCH_LINEAR,
  bias_init: nn.initializers.Initializer | None = None,
) -> tuple[Array, Array]:
  """Dropout and the linear head `head`, in float32; call it in a module.

  Args:
    x: [b d].
    num_classes: k.
    dropout: the part of the features that training drops.
    train: whether to drop.
    kernel_init: of the head.
    bias_init: of the head; None is torch.nn.Linear's.

  Returns:
    The features as the head reads them [b d], and logits [b k].
  """
  x = x.astype(jnp.float32)
  features = nn.Dropout(dropout, deterministic=not train)(x)
  logits = nn.Dense(
    num_classes,
    precision=jax.lax.Precision.HIGHEST,
    kernel_init=kernel_init,
    bias_init=bias_init or uniform_bias(x.shape[-1]),
    name="head",
  )(features)
  return features, logits


def place_rows(x: Array) -> Array:
  """Cuts the rows of `x` over the current mesh and leaves the rest open.

  Left alone, the compiler follows the parameters: where those are cut over
  `fsdp`, every device of that axis would compute the whole batch. A batch
  that the devices do not divide (a single image, say) stays as it is, and so
  do rows that `jax.shard_map` already cut.
  """
  mesh = jax.sharding.get_abstract_mesh()
  types = dict(zip(mesh.axis_names, mesh.axis_types))
  axes = tuple(a for a in ROW_AXES if types.get(a) == AxisType.Auto)
  if not axes or x.shape[0] % math.prod(mesh.shape[name] for name in axes):
    return x
  rest = (jax.P.UNCONSTRAINED,) * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(x, jax.P(axes, *rest))
