"""Attention with relative positions as one kernel, for GPUs.

# b images, g patches along a side, s the side of a window (g: all of it), c the
# next power of two, h heads, e width of a head

A program has some rows of one window's queries of one head, and goes through
the window's keys a row of patches at a time: the logits of a step are q·k, plus
a number for each query (its position against the keys' row) and a number for
each query and column, which serves all rows. Softmax is taken as the keys come
(FlashAttention, arXiv 2205.14135), so that no logits reach memory; queries,
keys and values are read where the layer before left them, and what pads a
window is never written anywhere.

Its gradient is that of the plain form, computed anew.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

Array = jax.Array
_LOG2E = math.log2(math.e)
_NEVER = -1e30  # a logit of what is not there; finite, so that no NaN comes


class Blocks(NamedTuple):
  """What a program works on.

  Attributes:
    queries: at most so many at once.
    keys: at most so many, in whole rows, and one row at least.
    warps: of 32 threads.
    stages: of the loads that run ahead.
  """

  queries: int = 64
  keys: int = 64
  warps: int = 4
  stages: int = 3


def fused(
  qkv: Array,
  by_row: Array,
  by_column: Array,
  bias: Array,
  side: int,
  *,
  blocks: Blocks | None = None,
  interpret: bool = False,
) -> Array:
  """Attention within windows.

  Args:
    qkv: [b g g 3 h e], queries, keys and values.
    by_row: [b h s g g], of each query what is added for keys of each row.
    by_column: [b h g g s], for keys of each column.
    bias: [3 h e], of what pads windows.
    side: s.
    blocks: see `Blocks`.
    interpret: run it as plain operations, on any platform.

  Returns:
    [b g g h e].
  """
  b, grid, _, _, heads, width = qkv.shape
  blocks = blocks or Blocks()
  columns = max(pl.next_power_of_2(side), 16)
  rows = max(min(blocks.queries // columns, pl.next_power_of_2(side)), 1)
  key_rows = max(blocks.keys // columns, 1)
  windows = -(-grid // side)
  body = functools.partial(
    _kernel,
    grid=grid,
    side=side,
    width=width,
    rows=rows,
    columns=columns,
    key_rows=key_rows,
    wide=max(pl.next_power_of_2(width), 16),
  )
  return pl.pallas_call(
    body,
    grid=(windows * windows * -(-side // rows), heads, b),
    out_shape=jax.ShapeDtypeStruct((b, grid, grid, heads, width), qkv.dtype),
    compiler_params=plgpu.CompilerParams(
      num_warps=blocks.warps, num_stages=blocks.stages
    ),
    interpret=interpret,
    name="windowed_attention",
  )(qkv, by_row, by_column, bias)


def _kernel(
  qkv,
  by_row,
  by_column,
  bias,
  out,
  *,
  grid: int,
  side: int,
  width: int,
  rows: int,
  columns: int,
  key_rows: int,
  wide: int,
):
  part, head, image = (pl.program_id(axis) for axis in range(3))
  parts, windows = -(-side // rows), -(-grid // side)
  window, part = part // parts, part % parts
  top, left = window // windows * side, window % windows * side
  zero = part * 0  # starts that are known would be checked against the shape
  channels = jnp.arange(wide) < width
  across = jnp.arange(columns)
  across = (across < side) & (left + across < grid)

  def patches(first: Array, count: int) -> Array:
    """Which of some rows of the window are patches of the image."""
    down = first + jnp.arange(count)
    down = (down < side) & (top + down < grid)
    return down[:, None] & across[None]

  asked = patches(part * rows, rows)
  asked_at = (pl.ds(top + part * rows, rows), pl.ds(left, columns))
  q = plgpu.load(
    qkv.at[image, *asked_at, zero, head, pl.ds(zero, wide)],
    mask=asked[:, :, None] & channels[None, None],
    other=0,
  ).reshape(rows * columns, wide)
  present = jnp.arange(columns) < side
  of_columns = plgpu.load(
    by_column.at[image, head, *asked_at, pl.ds(zero, columns)],
    mask=asked[:, :, None] & present[None, None],
    other=0,
  ).reshape(rows * columns, columns)
  of_columns = jnp.where(
    present[None], of_columns.astype(jnp.float32) * _LOG2E, _NEVER
  )
  pads = [
    plgpu.load(
      bias.at[zero + i, head, pl.ds(zero, wide)], mask=channels, other=0
    )
    for i in (1, 2)
  ]

  def step(i: Array, carry: tuple) -> tuple:
    most, total, mixed = carry
    first = i * key_rows
    seen = patches(first, key_rows)

    def keys(which: int) -> Array:
      found = plgpu.load(
        qkv.at[
          image, pl.ds(top + first, key_rows), pl.ds(left, columns),
          zero + which, head, pl.ds(zero, wide),
        ],
        mask=seen[:, :, None] & channels[None, None],
        other=0,
      )  # fmt: skip
      if grid % side:
        pad = pads[which - 1][None, None]
        found = jnp.where(seen[:, :, None], found, pad)
      return found.reshape(key_rows * columns, wide)

    down = first + jnp.arange(key_rows) < side
    of_rows = plgpu.load(
      by_row.at[image, head, pl.ds(first, key_rows), *asked_at],
      mask=asked[None] & down[:, None, None],
      other=0,
    ).reshape(key_rows, rows * columns)
    of_rows = jnp.where(
      down[:, None], of_rows.astype(jnp.float32) * _LOG2E, _NEVER
    ).T
    logits = _dot(q, keys(1).T) * (width**-0.5 * _LOG2E)
    if key_rows == 1:
      logits = logits + of_columns + of_rows
    else:
      places = of_rows[:, :, None] + of_columns[:, None, :]
      logits = logits + places.reshape(logits.shape)
    above = jnp.maximum(most, jnp.max(logits, axis=1))
    weights = jnp.exp2(logits - above[:, None])
    shrink = jnp.exp2(most - above)
    total = total * shrink + jnp.sum(weights, axis=1)
    mixed = mixed * shrink[:, None] + _dot(weights.astype(q.dtype), keys(2))
    return above, total, mixed

  count = rows * columns
  most, total, mixed = jax.lax.fori_loop(
    0,
    -(-side // key_rows),
    step,
    (
      jnp.full((count,), _NEVER, jnp.float32),
      jnp.zeros((count,), jnp.float32),
      jnp.zeros((count, wide), jnp.float32),
    ),
  )
  del most
  mixed = (mixed / total[:, None]).astype(out.dtype)
  plgpu.store(
    out.at[image, *asked_at, head, pl.ds(zero, wide)],
    mixed.reshape(rows, columns, wide),
    mask=asked[:, :, None] & channels[None, None],
  )


def _dot(x: Array, y: Array) -> Array:
  highest = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jnp.dot(x, y, precision=highest, preferred_element_type=jnp.float32)
