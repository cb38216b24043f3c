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

import einops
import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
IMPLEMENTATIONS = ("auto", "einsum", "xla", "cudnn")
# Chunks that are written out, each with the keys it needs alone; more would
# take long to compile.
_UNROLLED = 16


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
  chunk: int = 0,
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
    impl: "einsum" (products as a CPU likes them), "xla" or "cudnn" (those of
      `jax.nn.dot_product_attention`; the latter is a GPU's, 16-bit), or "auto":
      the best of the platform.
    chunk: queries at a time; the mask is [b 1 chunk s]. 0: 128 on a CPU, else
      1024.
    seq_axis: mesh axis that time is cut along: keys and values are gathered.

  Returns:
    [b t h e]
  """
  options = {"ahead": ahead, "impl": impl, "chunk": chunk}
  if seq_axis is not None:
    return _across(seq_axis, options, (query, queries), (key, value, keys))
  form = _form(impl, query)
  on_cpu = jax.default_backend() == "cpu"
  chunk = chunk or (128 if on_cpu else 1024)
  length = query.shape[1]
  parts = -(-length // chunk)
  # Chunks are computed again in the backward pass, so that the scores of one
  # are all that is ever held.
  one = jax.checkpoint(functools.partial(_attend_chunk, ahead=ahead, form=form))
  if parts == 1:
    return one((query, queries), (key, value, keys))
  same = query.shape[1] == key.shape[1]
  if not ahead and same and parts <= _UNROLLED:
    # Row by row a key is never behind its query: later ones need no work.
    out = [
      one(
        _between((query, queries), start, start + chunk),
        _between((key, value, keys), 0, start + chunk),
      )
      for start in range(0, length, chunk)
    ]
    return jnp.concatenate(out, axis=1)
  cut = functools.partial(_cut, parts=parts, size=chunk)
  out = jax.lax.map(
    lambda part: one(part, (key, value, keys)),
    jax.tree.map(cut, (query, queries)),
  )
  return _joined(out)[:, :length]


def _attend_chunk(
  asking: tuple[Array, Visible],
  asked: tuple[Array, Array, Visible],
  *,
  ahead: bool,
  form: Callable[..., Array],
) -> Array:
  query, queries = asking
  key, value, keys = asked

  def pair(compare, a: Array, b: Array) -> Array:
    return compare(a[:, :, None], b[:, None, :])

  sees = pair(jnp.greater_equal, queries.positions, keys.positions)
  if ahead:
    sees |= pair(jnp.logical_and, queries.prefix, keys.prefix)
  sees &= pair(jnp.equal, queries.segments, keys.segments)
  return form(query, key, value, sees[:, None])


def _form(impl: str, query: Array) -> Callable[..., Array]:
  """(query, key, value, mask [b 1 t s]) -> [b t h e]."""
  if impl == "auto":
    size = query.shape[-1]
    fits = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = fits and size <= 128 and size % 8 == 0
    platform = jax.default_backend()
    impl = "cudnn" if fits and platform == "gpu" else "xla"
    impl = "einsum" if platform == "cpu" else impl
  if impl == "einsum":
    return _einsums
  library: Any = jax.nn.dot_product_attention
  return lambda query, key, value, mask: library(
    query, key, value, mask=mask, implementation=impl
  )


def _einsums(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """Heads in front: XLA's products on a CPU want batch dimensions there."""
  batch, length, heads, size = query.shape
  groups = key.shape[2]
  query = query.reshape(batch, length, groups, heads // groups, size)
  scaled = einops.rearrange(query, "b t g r e -> b g r t e") * size**-0.5
  key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
  scores = jnp.einsum(
    "bgrte,bgse->bgrts", scaled, key, preferred_element_type=jnp.float32
  )
  scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  out = jnp.einsum("bgrts,bgse->bgrte", weights, value)
  return einops.rearrange(out, "b g r t e -> b t (g r) e")


def _between(tree: Any, start: int, stop: int) -> Any:
  """Places of every array [b t ...]."""
  return jax.tree.map(lambda x: x[:, start:stop], tree)


def _cut(x: Array, *, parts: int, size: int) -> Array:
  """[b t ...] -> [parts b size ...], zeros behind the last."""
  pad = [(0, 0), (0, parts * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, pad).reshape(x.shape[0], parts, size, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _joined(x: Array) -> Array:
  """[parts b size ...] -> [b t ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _across(axis: str, options: dict[str, Any], asking: Any, asked: Any):
  """Every shard's queries on all keys, gathered along time."""
  time = jax.P(None, axis)

  @functools.partial(
    jax.shard_map, in_specs=time, out_specs=time, axis_names={axis}
  )
  def local(asking, asked):
    gather = functools.partial(
      jax.lax.all_gather, axis_name=axis, axis=1, tiled=True
    )
    query, queries = asking
    key, value, keys = jax.tree.map(gather, asked)
    return attend(query, key, value, queries, keys, **options)

  return local(asking, asked)
