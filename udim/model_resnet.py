"""ResNets as torchvision has them, and WideResNet-28.

# b rows, h height, w width, c channels, d features, k classes

Sources: He et al. 2016 (arXiv 1512.03385) with the stride of a bottleneck in
its 3x3 convolution ("v1.5"); Zagoruyko and Komodakis 2016 (arXiv 1605.07146).
Images are [b h w c]. Names of parameters are torchvision's with `_` for the
inner dots: `layer1.0.downsample.0.weight` is `layer1_0/downsample/kernel`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from udim.model_parts import BatchNorm, classify, convolve

Array = jax.Array


class _Block(nn.Module):
  """A residual block of a ResNet: basic, or with a bottleneck.

  Attributes:
    width: channels of its 3x3 convolution.
    bottleneck: 1x1, 3x3, 1x1 with four times the width, not 3x3, 3x3.
    stride: of the (first) 3x3 convolution.
    use_batch: see `BatchNorm`.
    dtype: of the computation.
  """

  width: int
  bottleneck: bool
  stride: int
  use_batch: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[b h w c] -> [b h/stride w/stride width or 4 width]."""
    if self.bottleneck:
      plan = ((self.width, 1), (self.width, 3), (4 * self.width, 1))
      strided = 2
    else:
      plan = ((self.width, 3), (self.width, 3))
      strided = 1
    y = x
    for i, (features, size) in enumerate(plan, 1):
      stride = self.stride if i == strided else 1
      y = convolve(
        y, features, size, stride=stride, dtype=self.dtype, name=f"conv{i}"
      )
      y = BatchNorm(self.use_batch, self.dtype, name=f"bn{i}")(y)
      if i < len(plan):
        y = nn.relu(y)
    if y.shape != x.shape:
      x = convolve(
        x,
        y.shape[-1],
        1,
        stride=self.stride,
        dtype=self.dtype,
        name="downsample",
      )
      x = BatchNorm(self.use_batch, self.dtype, name="downsample_bn")(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """A ResNet with features from the mean over the last map.

  Attributes:
    num_classes: k.
    stages: blocks of each stage.
    bottleneck: the kind of block; d is 512, or 2048 with bottlenecks.
    width: channels of the stem and the first stage.
    dropout: of the features; 0.5 in DomainBed.
    batch_norm: "frozen" (running statistics in training too, never updated) or
      "update" (the batch's in training, running ones follow).
    dtype: of the computation. Parameters, normalization, features and logits
      are float32.
    remat: recompute a block in the backward pass.
  """

  num_classes: int
  stages: tuple[int, ...] = (2, 2, 2, 2)
  bottleneck: bool = False
  width: int = 64
  dropout: float = 0.0
  batch_norm: str = "frozen"
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
    """Images [b h w c] -> features [b d] and logits [b k], float32."""
    use_batch = train and self.batch_norm == "update"
    block = nn.remat(_Block) if self.remat else _Block
    x = convolve(x, self.width, 7, stride=2, dtype=self.dtype, name="stem")
    x = nn.relu(BatchNorm(use_batch, self.dtype, name="stem_bn")(x))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, blocks in enumerate(self.stages):
      for i in range(blocks):
        x = block(
          width=self.width * 2**stage,
          bottleneck=self.bottleneck,
          stride=2 if stage and not i else 1,
          use_batch=use_batch,
          dtype=self.dtype,
          name=f"layer{stage + 1}_{i}",
        )(x)
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return classify(
      x, num_classes=self.num_classes, dropout=self.dropout, train=train
    )


class _WideBlock(nn.Module):
  """Pre-activation: normalize, relu, convolve, twice, with dropout between.

  Where the shape changes, the shortcut reads the first activation.
  """

  width: int
  stride: int
  dropout: float
  train: bool
  use_batch: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[b h w c] -> [b h/stride w/stride width]."""
    y = nn.relu(BatchNorm(self.use_batch, self.dtype, name="bn1")(x))
    if x.shape[-1] != self.width or self.stride > 1:
      x = convolve(
        y,
        self.width,
        1,
        stride=self.stride,
        dtype=self.dtype,
        name="downsample",
      )
    y = convolve(
      y, self.width, 3, stride=self.stride, dtype=self.dtype, name="conv1"
    )
    y = nn.relu(BatchNorm(self.use_batch, self.dtype, name="bn2")(y))
    y = nn.Dropout(self.dropout, deterministic=not self.train)(y)
    return x + convolve(y, self.width, 3, dtype=self.dtype, name="conv2")


class WideResNet(nn.Module):
  """WideResNet of depth 6 n + 4: WRN-28-k with n = 4 blocks a group.

  Attributes:
    num_classes: k.
    widen: width over that of a plain ResNet; d is 64 times it.
    blocks: of each of the three groups.
    dropout: of the features.
    block_dropout: between the convolutions of a block; 0.3 in the paper.
    batch_norm: as in `ResNet`.
    dtype: as in `ResNet`.
    remat: as in `ResNet`.
  """

  num_classes: int
  widen: int = 10
  blocks: int = 4
  dropout: float = 0.0
  block_dropout: float = 0.0
  batch_norm: str = "frozen"
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
    """Images [b h w c] -> features [b d] and logits [b k], float32."""
    use_batch = train and self.batch_norm == "update"
    block = nn.remat(_WideBlock) if self.remat else _WideBlock
    x = convolve(x, 16, 3, dtype=self.dtype, name="stem")
    for group in range(3):
      for i in range(self.blocks):
        x = block(
          width=16 * self.widen * 2**group,
          stride=2 if group and not i else 1,
          dropout=self.block_dropout,
          train=train,
          use_batch=use_batch,
          dtype=self.dtype,
          name=f"layer{group + 1}_{i}",
        )(x)
    x = nn.relu(BatchNorm(use_batch, self.dtype, name="bn")(x))
    # Apart: in bfloat16 on a CPU, XLA of jax 0.11 makes NaN of it otherwise.
    x = jax.lax.optimization_barrier(x)
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return classify(
      x,
      num_classes=self.num_classes,
      dropout=self.dropout,
      train=train,
      bias_init=nn.initializers.zeros,
    )
