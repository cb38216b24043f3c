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
from typing import Any, NamedTuple

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
  tile = _Tile(
    grid=grid,
    side=side,
    width=width,
    rows=max(min(blocks.queries // columns, pl.next_power_of_2(side)), 1),
    columns=columns,
    key_rows=max(blocks.keys // columns, 1),
    wide=max(pl.next_power_of_2(width), 16),
  )
  return pl.pallas_call(
    functools.partial(_kernel, tile),
    grid=(tile.windows**2 * tile.parts, heads, b),
    out_shape=jax.ShapeDtypeStruct((b, grid, grid, heads, width), qkv.dtype),
    compiler_params=plgpu.CompilerParams(
      num_warps=blocks.warps, num_stages=blocks.stages
    ),
    interpret=interpret,
    name="windowed_attention",
  )(qkv, by_row, by_column, bias)


class _Tile(NamedTuple):
  """The sizes of a program's arrays: powers of two, and what of them is used.

  Attributes:
    grid, side, width: g, s and e.
    rows: of queries.
    columns: c, of queries and of keys.
    key_rows: of keys in a step.
    wide: of a head.
  """

  grid: int
  side: int
  width: int
  rows: int
  columns: int
  key_rows: int
  wide: int

  @property
  def windows(self) -> int:
    """Along a side of the image."""
    return -(-self.grid // self.side)

  @property
  def parts(self) -> int:
    """Of a window's queries."""
    return -(-self.side // self.rows)

  @property
  def queries(self) -> int:
    """Of a program."""
    return self.rows * self.columns


class _Place(NamedTuple):
  """Which part of which window of which head.

  Attributes:
    image, head: numbers.
    top, left: of the window, in patches.
    first: row of queries, in the window.
    zero: 0, that nobody knows: starts that are known would be checked against
      shapes that a power of two may exceed.
  """

  image: Array
  head: Array
  top: Array
  left: Array
  first: Array
  zero: Array

  @classmethod
  def of_program(cls, tile: _Tile) -> "_Place":
    number, head, image = (pl.program_id(axis) for axis in range(3))
    window, part = number // tile.parts, number % tile.parts
    top, left = window // tile.windows, window % tile.windows
    return cls(
      image, head, top * tile.side, left * tile.side, part * tile.rows, part * 0
    )

  def patches(self, tile: _Tile, first: Array, count: int) -> Array:
    """Which of some rows of the window are patches of the image, [n c]."""
    down, across = first + jnp.arange(count), jnp.arange(tile.columns)
    down = (down < tile.side) & (self.top + down < tile.grid)
    across = (across < tile.side) & (self.left + across < tile.grid)
    return down[:, None] & across[None]

  def rows(self, tile: _Tile, first: Array, count: int) -> tuple[Any, Any]:
    """Where some rows of the window are in the image."""
    return (
      pl.ds(self.top + first, count),
      pl.ds(self.left, tile.columns),
    )


def _kernel(tile: _Tile, qkv, by_row, by_column, bias, out):
  place = _Place.of_program(tile)
  asked = place.patches(tile, place.first, tile.rows)
  at = place.rows(tile, place.first, tile.rows)
  channels = jnp.arange(tile.wide) < tile.width
  q = _load_heads(tile, place, qkv, 0, at, asked).reshape(
    tile.queries, tile.wide
  )
  of_columns = _load_columns(tile, place, by_column, at, asked)
  pads = [
    plgpu.load(
      bias.at[place.zero + i, place.head, pl.ds(place.zero, tile.wide)],
      mask=channels,
      other=0,
    )
    for i in (1, 2)
  ]

  def keys(which: int, first: Array) -> Array:
    """Keys (1) or values (2) of a step."""
    seen = place.patches(tile, first, tile.key_rows)
    rows = place.rows(tile, first, tile.key_rows)
    found = _load_heads(tile, place, qkv, which, rows, seen)
    if tile.grid % tile.side:
      pad = pads[which - 1][None, None]
      found = jnp.where(seen[:, :, None], found, pad)
    return found.reshape(-1, tile.wide)

  def step(i: Array, carry: tuple) -> tuple:
    most, total, mixed = carry
    first = i * tile.key_rows
    logits = _dot(q, keys(1, first).T) * (tile.width**-0.5 * _LOG2E)
    of_rows = _load_rows(tile, place, by_row, first, at, asked)
    if tile.key_rows == 1:
      logits = logits + of_columns + of_rows
    else:
      places = of_rows[:, :, None] + of_columns[:, None, :]
      logits = logits + places.reshape(logits.shape)
    above = jnp.maximum(most, jnp.max(logits, axis=1))
    weights, shrink = jnp.exp2(logits - above[:, None]), jnp.exp2(most - above)
    more = _dot(weights.astype(q.dtype), keys(2, first))
    total = total * shrink + jnp.sum(weights, axis=1)
    return above, total, mixed * shrink[:, None] + more

  start = (
    jnp.full((tile.queries,), _NEVER, jnp.float32),
    jnp.zeros((tile.queries,), jnp.float32),
    jnp.zeros((tile.queries, tile.wide), jnp.float32),
  )
  steps = -(-tile.side // tile.key_rows)
  _, total, mixed = jax.lax.fori_loop(0, steps, step, start)
  mixed = (mixed / total[:, None]).astype(out.dtype)
  plgpu.store(
    out.at[place.image, *at, place.head, pl.ds(place.zero, tile.wide)],
    mixed.reshape(tile.rows, tile.columns, tile.wide),
    mask=asked[:, :, None] & channels[None, None],
  )


def _load_heads(
  tile: _Tile, place: _Place, qkv, which: int, at: tuple, mask: Array
) -> Array:
  """Queries (0), keys (1) or values (2) of some rows, [n c wide]."""
  channels = jnp.arange(tile.wide) < tile.width
  return plgpu.load(
    qkv.at[
      place.image, *at, place.zero + which, place.head,
      pl.ds(place.zero, tile.wide),
    ],
    mask=mask[:, :, None] & channels[None, None],
    other=0,
  )  # fmt: skip


def _load_columns(
  tile: _Tile, place: _Place, by_column, at: tuple, mask: Array
) -> Array:
  """What each query adds to the keys of each column, [queries c]."""
  present = jnp.arange(tile.columns) < tile.side
  found = plgpu.load(
    by_column.at[place.image, place.head, *at, pl.ds(place.zero, tile.columns)],
    mask=mask[:, :, None] & present[None, None],
    other=0,
  ).reshape(tile.queries, tile.columns)
  return jnp.where(present[None], found.astype(jnp.float32) * _LOG2E, _NEVER)


def _load_rows(
  tile: _Tile, place: _Place, by_row, first: Array, at: tuple, mask: Array
) -> Array:
  """What each query adds to the keys of each row of a step, [queries n]."""
  present = first + jnp.arange(tile.key_rows) < tile.side
  found = plgpu.load(
    by_row.at[place.image, place.head, pl.ds(first, tile.key_rows), *at],
    mask=mask[None] & present[:, None, None],
    other=0,
  ).reshape(tile.key_rows, tile.queries)
  found = found.astype(jnp.float32) * _LOG2E
  return jnp.where(present[:, None], found, _NEVER).T


def _dot(x: Array, y: Array) -> Array:
  highest = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jnp.dot(x, y, precision=highest, preferred_element_type=jnp.float32)
