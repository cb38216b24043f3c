"""The layers of an encoder-decoder Transformer, as functions of their arrays.

# b batch, t time, s source time, d width, f hidden width, h heads, e head width

Training, scoring and decoding all run these. With `pre_norm` a sub-layer g is
x + g(norm(x)), and a norm follows the last layer; without it is norm(x + g(x)),
as in fairseq's and the authors' models. Initial values are fairseq's.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = Mapping[str, Any]

ACTIVATIONS = {
  "relu": jax.nn.relu,
  "swish": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
POSITIONS = ("fairseq", "marian")
_EPSILON = 1e-5  # of the norms
_NEVER = -1e9  # a logit; finite, so that rows without any key have no NaN


@dataclasses.dataclass(frozen=True)
class Dropout:
  """Drops values, each call site with a key of its own.

  Attributes:
    key: of a layer and a pass; None drops nothing.
  """

  key: Array | None

  def __call__(self, x: Array, rate: float, site: int) -> Array:
    """Returns x with a share `rate` 0 and the rest over 1 - rate."""
    keep = self.keep(x.shape, rate, site)
    return x if keep is None else x * keep.astype(x.dtype)

  def keep(
    self, shape: tuple[int, ...], rate: float, site: int
  ) -> Array | None:
    """What a layer is multiplied by; None for nothing."""
    if self.key is None or not rate:
      return None
    key = jax.random.fold_in(self.key, site)
    return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


NO_DROPOUT = Dropout(None)


def dense(params: Params, x: Array) -> Array:
  """[... d] -> [... f]."""
  return plus(x @ params["kernel"], params["bias"])


def plus(x: Array, bias: Array) -> Array:
  """Adds to the last axes of x."""
  return x + bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)


def norm(params: Params, x: Array) -> Array:
  """Layer normalization over the last axis, in float32."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
  scaled = centred * jax.lax.rsqrt(variance + _EPSILON)
  scale = params["scale"].reshape((1,) * (x.ndim - 1) + (-1,))
  return plus(scaled * scale, params["bias"]).astype(x.dtype)


def heads_of(params: Params, x: Array) -> Array:
  """[b t d] -> [b t h e]."""
  return plus(jnp.einsum("btd,dhe->bthe", x, params["kernel"]), params["bias"])


def joined(params: Params, x: Array) -> Array:
  """[b t h e] -> [b t d]."""
  return plus(jnp.einsum("bthe,hed->btd", x, params["kernel"]), params["bias"])


def attention(
  params: Params,
  x: Array,
  memory: Array,
  mask: Array,
  *,
  dropout: Dropout = NO_DROPOUT,
  rate: float = 0.0,
) -> Array:
  """Scaled dot-product attention.

  Args:
    params: `query`, `key`, `value`, `out`.
    x: [b t d], what asks.
    memory: [b s d], what is looked at.
    mask: bool, broadcasts to [b h t s]; True where a key may be seen. Where
      none may be, all are, alike.
    dropout: of the weights.
    rate: its rate.

  Returns:
    [b t d].
  """
  query = (
    heads_of(params["query"], x) * params["query"]["kernel"].shape[-1] ** -0.5
  )
  key = heads_of(params["key"], memory)
  value = heads_of(params["value"], memory)
  logits = jnp.einsum("bthe,bshe->bhts", query, key).astype(jnp.float32)
  mask = jnp.broadcast_to(mask, logits.shape)
  weights = jax.nn.softmax(jnp.where(mask, logits, _NEVER))
  weights = dropout(weights, rate, 0).astype(x.dtype)
  mixed = jnp.einsum("bhts,bshe->bthe", weights, value)
  return joined(params["out"], mixed)


def sinusoids(length: int, width: int, *, kind: str, start: int = 0) -> Any:
  """Position vectors: sines, then cosines.

      fairseq   frequencies 10000^(-i / (d/2 - 1)), the first position is 2
      marian    frequencies 10000^(-i / (d/2)), the first position is 0

  Args:
    length: t.
    width: d, even.
    kind: one of `POSITIONS`.
    start: how many positions precede.

  Returns:
    float32 [t d], NumPy.
  """
  half = width // 2
  first, last = (2, half - 1) if kind == "fairseq" else (0, half)
  frequencies = 10_000.0 ** (-np.arange(half) / max(last, 1))
  places = first + start + np.arange(length)
  angles = places[:, None] * frequencies[None]
  table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  return table.astype(np.float32)


def init_attention(key: Array, width: int, heads: int) -> dict:
  """Xavier, by 1 / sqrt(2) for query, key and value; their biases as torch's
  linear layers have them, the output's 0.
  """
  parts = jax.random.split(key, 7)
  bound = (6 / (2 * width)) ** 0.5
  shape, bias = (width, heads, width // heads), (heads, width // heads)
  made = {
    name: {
      "kernel": uniform(parts[2 * i], shape, bound * 2**-0.5),
      "bias": uniform(parts[2 * i + 1], bias, width**-0.5),
    }
    for i, name in enumerate(("query", "key", "value"))
  }
  out = uniform(parts[6], (heads, width // heads, width), bound)
  return {**made, "out": {"kernel": out, "bias": jnp.zeros(width)}}


def init_feed_forward(
  key: Array, width: int, hidden: int, experts: int | None = None
) -> dict:
  """As torch's linear layers; with `experts` that many, each drawn alone."""
  parts = jax.random.split(key, 4)
  lead = () if experts is None else (experts,)
  inner, outer = width**-0.5, hidden**-0.5
  return {
    "up": {
      "kernel": uniform(parts[0], (*lead, width, hidden), inner),
      "bias": uniform(parts[1], (*lead, hidden), inner),
    },
    "down": {
      "kernel": uniform(parts[2], (*lead, hidden, width), outer),
      "bias": uniform(parts[3], (*lead, width), outer),
    },
  }


def init_norm(width: int) -> dict:
  """The identity's scale and offset."""
  return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def uniform(key: Array, shape: tuple[int, ...], bound: float) -> Array:
  """Uniform in (-bound, bound)."""
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
