"""The Transformer: rotary positions, grouped queries, a prefix-LM mask.

# b batch, t time, s time of keys, d width, h heads, g heads of keys, e of one

    x <- x + attention(norm(x));  x <- x + mlp(norm(x))

Source: "Birdie" (arXiv 2411.01030), sections 3.4, A.4 and A.8: pre-norm, RoPE
with base 250,000, gated MLP of 8/3 of the width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from birdie.attention import Visible, attend, rotated
from birdie.model_parts import (
  Array,
  Context,
  GatedMLP,
  LanguageModel,
  Projection,
  PyTree,
  RMSNorm,
)


class TransformerLayer(nn.Module):
  """Attention and its MLP."""

  width: int
  heads: int
  kv_heads: int
  mlp_width: int
  rope_base: float
  attention_impl: str
  attention_chunk: int
  bidirectional: bool
  dtype: Any
  seq_axis: str | None

  @nn.compact
  def __call__(
    self, x: Array, context: Context, cache: PyTree
  ) -> tuple[Array, PyTree]:
    """Args:
      x: [b t d].
      context: of every place.
      cache: `key` and `value` [b s g e] of the tokens before, each where its
        position says; None without one.

    Returns:
      [b t d], and the keys and values of these tokens, [b t g e], where there
      is a cache.
    """
    size, flat = self.width // self.heads, self.seq_axis is None

    def project(heads: int, name: str) -> Array:
      features = (heads, size)
      return Projection(features, self.dtype, flat=flat, name=name)(normed)

    normed = RMSNorm(self.dtype, name="norm")(x)
    turn = rotated(context.positions, size, base=self.rope_base)
    query = turn(project(self.heads, "query"))
    key = turn(project(self.kv_heads, "key"))
    value = project(self.kv_heads, "value")
    mixed = self._attention(query, key, value, context, cache)
    x += Projection(
      (self.width,), self.dtype, axes=2, flat=flat, name="attention_out"
    )(mixed)
    normed = RMSNorm(self.dtype, name="mlp_norm")(x)
    x += GatedMLP(self.mlp_width, self.dtype, flat, name="mlp")(normed)
    return x, cache and {"key": key, "value": value}

  def _attention(self, query, key, value, context: Context, cache):
    if cache is None:
      places = Visible(context.segments, context.positions, context.prefix)
      return attend(
        query,
        key,
        value,
        places,
        places,
        ahead=self.bidirectional,
        impl=self.attention_impl,
        chunk=self.attention_chunk,
        seq_axis=self.seq_axis,
      )
    merged = {
      name: _written(cache[name], new, context)
      for name, new in (("key", key), ("value", value))
    }
    # Among the cached, a token sees those up to its own position, a token of
    # the prefix those up to the prefix's end.
    prefix = context.prefix & context.kept
    last = jnp.max(
      jnp.where(prefix, context.positions, -1), axis=1, keepdims=True
    )
    limit = context.positions
    if self.bidirectional:
      limit = jnp.where(prefix, last, limit)
    shape = merged["key"].shape[:2]
    places = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    ones, never = jnp.ones(shape, jnp.int32), jnp.zeros(shape, bool)
    return attend(
      query,
      merged["key"],
      merged["value"],
      Visible(jnp.ones_like(limit), limit, jnp.zeros_like(prefix)),
      Visible(ones, places, never),
      ahead=True,  # a limit may lie behind its query
      impl=self.attention_impl,
      chunk=self.attention_chunk,
    )


def _written(cache: Array, new: Array, context: Context) -> Array:
  """[b s g e] with [b t g e] at their positions, padding left out."""
  places = jnp.where(context.kept, context.positions, cache.shape[1])
  rows = jnp.arange(cache.shape[0])[:, None]
  return cache.at[rows, places].set(new.astype(cache.dtype), mode="drop")


class Transformer(LanguageModel, kw_only=True):
  """The language model of attention and MLPs.

  `prefix_mode` makes no difference to it: its mask is the strict one.

  Attributes:
    heads: h, divides the width.
    kv_heads: g, divides h.
    mlp_width: of the hidden layer.
    rope_base: of the rotary positions.
    attention_impl: see `birdie.attention.attend`.
    attention_chunk: the same.
  """

  heads: int
  kv_heads: int
  mlp_width: int
  rope_base: float = 250_000.0
  attention_impl: str = "auto"
  attention_chunk: int = 0

  def _layer(self):
    return TransformerLayer, {
      "heads": self.heads,
      "kv_heads": self.kv_heads,
      "mlp_width": self.mlp_width,
      "rope_base": self.rope_base,
      "attention_impl": self.attention_impl,
      "attention_chunk": self.attention_chunk,
    }

  def empty_state(self, batch: int, capacity: int = 0) -> dict[str, Array]:
    """Zeros: `key` and `value` [blocks, kinds, b, capacity, g, e]."""
    shape = (
      self.blocks,
      len(self.kinds),
      batch,
      capacity,
      self.kv_heads,
      self.width // self.heads,
    )
    return {name: jnp.zeros(shape, self.dtype) for name in ("key", "value")}

  def room(self, state: PyTree) -> int:
    """How many tokens there is place for."""
    return state["key"].shape[3]

  def _kept(self, state, new, context: Context):
    # The layers return their own tokens alone: a cache that went through the
    # scan over layers would be copied at every step.
    write = jax.vmap(jax.vmap(_written, (0, 0, None)), (0, 0, None))
    return jax.tree.map(
      lambda old, fresh: write(old, fresh, context), state, new
    )
