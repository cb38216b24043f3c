"""Attention within segments, causal but for the prefix, in chunks of queries.

# b batch, t queries, s keys, h heads, g heads of keys, e size of one

A query sees a key of its segment that is not behind it, or that is in the
prefix where it is in the prefix itself (section A.4). `dot_product_attention`
has no name for that, so it gets a mask; of one chunk of queries at a time, for
a whole mask [t s] would grow with the square of the length.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
IMPLEMENTATIONS = ("auto", "xla", "cudnn")


@flax.struct.dataclass
class Visible:
  """What decides who sees whom: segment ids, positions, prefix; each [b t]."""

  segments: Array
  positions: Array
  prefix: Array


def rotated(
  positions: Array, size: int, *, base: float
) -> Callable[[Array], Array]:
  """Rotary positions ("RoFormer", arXiv 2104.09864), the halves of e paired.

  Args:
    positions: int [b t].
    size: e, even.
    base: of the wavelengths.

  Returns:
    A function of [b t h e].
  """
  rates = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
  angles = positions.astype(jnp.float32)[..., None] * rates[None, None]
  sin, cos = (f(angles)[:, :, None] for f in (jnp.sin, jnp.cos))

  def turn(x: Array) -> Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)

  return turn


def attend(
  query: Array,
  key: Array,
  value: Array,
  queries: Visible,
  keys: Visible,
  *,
  ahead: bool,
  impl: str = "auto",
  chunk: int = 512,
  seq_axis: str | None = None,
) -> Array:
  """Softmax attention of what may see each other.

  Args:
    query: [b t h e].
    key: [b s g e], g divides h.
    value: the same.
    queries: of the queries.
    keys: of the keys.
    ahead: whether a prefix sees all of itself.
    impl: "xla", "cudnn" (a GPU's, 16-bit), or "auto": the latter where it can.
    chunk: queries at a time; the mask is [b 1 chunk s].
    seq_axis: mesh axis that time is cut along: keys and values are gathered.

  Returns:
    [b t h e]
  """
  if seq_axis is not None:
    return _across(
      query, key, value, queries, keys, ahead, impl, chunk, seq_axis
    )
  length = query.shape[1]
  one = functools.partial(
    _attend_chunk, key=key, value=value, keys=keys, ahead=ahead,
    impl=_resolved(impl, query),
  )  # fmt: skip
  if length <= chunk:
    return one((query, queries))
  parts = -(-length // chunk)
  cut = functools.partial(_cut, parts=parts, size=chunk)
  # Chunks are computed again in the backward pass, so that the scores of one
  # are all that is ever held.
  out = jax.lax.map(jax.checkpoint(one), jax.tree.map(cut, (query, queries)))
  return _joined(out)[:, :length]


def _attend_chunk(
  chunk: tuple[Array, Visible], *, key, value, keys, ahead: bool, impl: Any
) -> Array:
  query, queries = chunk

  def pair(compare, a: Array, b: Array) -> Array:
    return compare(a[:, :, None], b[:, None, :])

  sees = pair(jnp.greater_equal, queries.positions, keys.positions)
  if ahead:
    sees |= pair(jnp.logical_and, queries.prefix, keys.prefix)
  sees &= pair(jnp.equal, queries.segments, keys.segments)
  return jax.nn.dot_product_attention(
    query, key, value, mask=sees[:, None], implementation=impl
  )


def _resolved(impl: str, query: Array) -> Any:
  if impl != "auto":
    return impl
  fits = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128
  fits = fits and query.shape[-1] % 8 == 0
  return "cudnn" if fits and jax.default_backend() == "gpu" else "xla"


def _cut(x: Array, *, parts: int, size: int) -> Array:
  """[b t ...] -> [parts b size ...], zeros behind the last."""
  pad = [(0, 0), (0, parts * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, pad).reshape(x.shape[0], parts, size, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _joined(x: Array) -> Array:
  """[parts b size ...] -> [b t ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _across(query, key, value, queries, keys, ahead, impl, chunk, axis):
  """Every shard's queries on all keys, gathered along time."""
  time = jax.P(None, axis)

  @functools.partial(
    jax.shard_map, in_specs=time, out_specs=time, axis_names={axis}
  )
  def local(query, key, value, queries, keys):
    gather = functools.partial(
      jax.lax.all_gather, axis_name=axis, axis=1, tiled=True
    )
    key, value, keys = jax.tree.map(gather, (key, value, keys))
    return attend(
      query, key, value, queries, keys, ahead=ahead, impl=impl, chunk=chunk
    )

  return local(query, key, value, queries, keys)
