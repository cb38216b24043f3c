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
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
IMPLEMENTATIONS = ("auto", "einsum", "xla")
_PARTS = 4  # of a causal row, each with the keys it needs alone
_SUMS = jax.checkpoint_policies.save_only_these_names("attention")


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
    impl: "einsum" (products as a CPU likes them), "xla" (those of
      `jax.nn.dot_product_attention`), or "auto": the former on a CPU, the
      latter elsewhere, and on a GPU cuDNN's where it can, in 16 bits.
    chunk: queries at a time; the mask is [b 1 chunk s]. 0: 128 on a CPU, else
      1024.
    seq_axis: mesh axis that time is cut along: keys and values are gathered.

  Returns:
    [b t h e]
  """
  options = {"ahead": ahead, "impl": impl, "chunk": chunk}
  if seq_axis is not None:
    return _across(seq_axis, options, (query, queries), (key, value, keys))
  chunk = chunk or (128 if jax.default_backend() == "cpu" else 1024)
  length, total = query.shape[1], key.shape[1]
  form = _form(impl, query, min(chunk, length), total)
  asking, asked = (query, queries), (key, value, keys)
  if length <= chunk:
    return form(asking, asked, ahead=ahead)
  if ahead or length != total:
    return _in_chunks(form, chunk, asking, asked, ahead)
  # Row by row a key is never behind its query, so a part of the row needs no
  # keys behind it: with four parts 5/8 of the work.
  size = -(-length // (_PARTS * chunk)) * chunk
  out = []
  for start in range(0, length, size):
    stop = min(start + size, length)
    own, past = _between(asking, start, stop), _between(asked, 0, stop)
    out.append(_in_chunks(form, chunk, own, past, ahead))
  return jnp.concatenate(out, axis=1)


def _in_chunks(form, chunk: int, asking: Any, asked: Any, ahead: bool) -> Array:
  """Some queries after the others.

  A chunk is computed again in the backward pass, but for `_weighted`'s sums, so
  that the scores of one are all that is ever held.
  """
  length = asking[0].shape[1]
  cut = functools.partial(_cut, parts=-(-length // chunk), size=chunk)
  one = jax.checkpoint(functools.partial(form, ahead=ahead), policy=_SUMS)
  out = jax.lax.map(lambda part: one(part, asked), jax.tree.map(cut, asking))
  return _joined(out)[:, :length]


def _mask(queries: Visible, keys: Visible, ahead: bool) -> Array:
  """Who sees whom, bool [b t s]."""

  def pair(compare, a: Array, b: Array) -> Array:
    return compare(a[:, :, None], b[:, None, :])

  sees = pair(jnp.greater_equal, queries.positions, keys.positions)
  if ahead:
    sees |= pair(jnp.logical_and, queries.prefix, keys.prefix)
  return sees & pair(jnp.equal, queries.segments, keys.segments)


def _form(impl: str, query: Array, length: int, total: int) -> Callable:
  """((query, its places), (key, value, their places), ahead=) -> [b t h e].

  Args:
    impl: see `attend`.
    query: [b t h e].
    length: queries at a time.
    total: keys.
  """
  library: str | None = "xla"
  if impl == "auto":
    platform, size = jax.default_backend(), query.shape[-1]
    # What cuDNN can do: 16 bits, heads of few sizes, even lengths.
    fits = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = fits and size <= 128 and size % 8 == 0
    fits = fits and query.shape[1] % length == length % 2 == total % 2 == 0
    library = "cudnn" if fits and platform == "gpu" else "xla"
    impl = "einsum" if platform == "cpu" else library
  if impl == "einsum":
    return _einsums

  def run(asking, asked, *, ahead: bool) -> Array:
    attention: Any = jax.nn.dot_product_attention
    (query, queries), (key, value, keys) = asking, asked
    mask = _mask(queries, keys, ahead)[:, None]
    return attention(query, key, value, mask=mask, implementation=library)

  return run


def _einsums(asking, asked, *, ahead: bool) -> Array:
  """As a CPU likes it: one batch dimension, in front."""
  (query, queries), (key, value, keys) = asking, asked
  groups = key.shape[2]
  scaled = query * query.shape[-1] ** -0.5
  scaled = einops.rearrange(scaled, "b t (g r) e -> (b g) (r t) e", g=groups)
  key, value = (
    einops.rearrange(x, "b s g e -> (b g) s e") for x in (key, value)
  )
  out = _weighted(ahead, scaled, key, value, queries, keys)
  out = einops.rearrange(
    out, "(b g) (r t) e -> b t (g r) e", g=groups, t=query.shape[1]
  )
  return out.astype(value.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(
  ahead: bool,
  query: Array,
  key: Array,
  value: Array,
  queries: Visible,
  keys: Visible,
) -> Array:
  """softmax(query key^T) value, among those that see each other.

  Of the scores nothing is kept but the logs of their sums, from which the
  backward pass makes the weights again ("FlashAttention", arXiv 2205.14135).

  Args:
    ahead: see `attend`.
    query: [n q e], scaled; n is b g, and q the queries of all heads of a group.
    key: [n s e].
    value: the same.
    queries: of the queries, [b t].
    keys: of the keys, [b s].

  Returns:
    [n q e] float32.
  """
  return _weigh(ahead, query, key, value, queries, keys)[0]


def _product(form: str, a: Array, b: Array) -> Array:
  return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _scores(ahead, query, key, queries, keys) -> Array:
  """[n q s] float32, lowest where nothing is seen."""
  scores = _product("nqe,nse->nqs", query, key)
  sees = _mask(queries, keys, ahead)
  batch, *places = sees.shape
  by_row = scores.reshape(batch, -1, *places)
  lowest = jnp.finfo(jnp.float32).min
  return jnp.where(sees[:, None], by_row, lowest).reshape(scores.shape)


def _weigh(ahead, query, key, value, queries, keys) -> tuple[Array, Array]:
  scores = _scores(ahead, query, key, queries, keys)
  top = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weights = weights.astype(value.dtype)
  out = _product("nqs,nse->nqe", weights, value)
  return out / total, top + jnp.log(total)


def _weigh_forward(ahead, query, key, value, queries, keys):
  out, log_total = (
    checkpoint_name(kept, "attention")
    for kept in _weigh(ahead, query, key, value, queries, keys)
  )
  return out, (query, key, value, queries, keys, out, log_total)


def _weigh_backward(ahead, kept, g):
  query, key, value, queries, keys, out, log_total = kept
  weights = jnp.exp(_scores(ahead, query, key, queries, keys) - log_total)
  low = g.astype(value.dtype)
  slopes = _product("nqe,nse->nqs", low, value)
  slopes = weights * (slopes - jnp.sum(g * out, axis=-1, keepdims=True))
  weights, slopes = (x.astype(value.dtype) for x in (weights, slopes))
  back = (
    _product("nqs,nse->nqe", slopes, key),
    # Sums over queries are faster with the keys last.
    jnp.swapaxes(_product("nqe,nqs->nes", query, slopes), 1, 2),
    jnp.swapaxes(_product("nqe,nqs->nes", low, weights), 1, 2),
  )
  return *(x.astype(value.dtype) for x in back), None, None


_weighted.defvjp(_weigh_forward, _weigh_backward)


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
