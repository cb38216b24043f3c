"""The layers of an encoder-decoder Transformer, as functions of their arrays.

# b batch, t time, s source time, d width, f hidden width, h heads, e head width

Training, scoring and decoding all run these. With `pre_norm` a sub-layer g is
x + g(norm(x)), and a norm follows the last layer; without it is norm(x + g(x)),
as in fairseq's and the authors' models. Initial values are fairseq's.
"""

import dataclasses
import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.nn import Array, Params, Uniform, plus
from common.rngs import hash_bits

ACTIVATIONS = {
  "relu": jax.nn.relu,
  "swish": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
POSITIONS = ("fairseq", "marian")
NEVER = -1e9  # a logit; finite, so that rows without any key have no NaN


class Site(enum.IntEnum):
  """Where a layer draws; each place has bits of its own."""

  EMBEDDING = 0
  ATTENTION = 1
  ATTENTION_WEIGHTS = 2
  CROSS_ATTENTION = 3
  CROSS_ATTENTION_WEIGHTS = 4
  FEED_FORWARD = 5
  HIDDEN = 6
  GATE = 7


@dataclasses.dataclass(frozen=True)
class Dropout:
  """Drops values.

  Attributes:
    key: of a layer and a pass; None drops nothing.
  """

  key: Array | None

  def __call__(self, x: Array, rate: float, site: Site) -> Array:
    """Returns x with a share `rate` 0 and the rest over 1 - rate."""
    keep = self.keep(x.shape, rate, site)
    return x if keep is None else x * keep.astype(x.dtype)

  def keep(
    self, shape: tuple[int, ...], rate: float, site: Site
  ) -> Array | None:
    """What is multiplied: 0 or 1 / (1 - rate). None for nothing."""
    if self.key is None or not rate:
      return None
    bits = hash_bits(self.key, shape, int(site))
    kept = bits >= jnp.uint32(round(rate * 2**32))
    return kept.astype(jnp.float32) / (1 - rate)


NO_DROPOUT = Dropout(None)


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
  site: Site = Site.ATTENTION_WEIGHTS,
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
    site: whose draw it is.

  Returns:
    [b t d].
  """
  query = (
    heads_of(params["query"], x) * params["query"]["kernel"].shape[-1] ** -0.5
  )
  key = heads_of(params["key"], memory)
  value = heads_of(params["value"], memory)
  logits = jnp.einsum(
    "bthe,bshe->bhts", query, key, preferred_element_type=jnp.float32
  )
  mask = jnp.broadcast_to(mask, logits.shape)
  weights = jax.nn.softmax(jnp.where(mask, logits, NEVER))
  weights = dropout(weights, rate, site).astype(x.dtype)
  mixed = jnp.einsum("bhts,bshe->bthe", weights, value)
  return joined(params["out"], mixed)


def sinusoids(length: int, width: int, *, kind: str) -> Any:
  """Position vectors: sines, then cosines.

      fairseq   frequencies 10000^(-i / (d/2 - 1)), the first position is 2
      marian    frequencies 10000^(-i / (d/2)), the first position is 0

  Args:
    length: t.
    width: d, even.
    kind: one of `POSITIONS`.

  Returns:
    float32 [t d], NumPy.
  """
  half = width // 2
  first, last = (2, half - 1) if kind == "fairseq" else (0, half)
  frequencies = 10_000.0 ** (-np.arange(half) / max(last, 1))
  places = first + np.arange(length)
  angles = places[:, None] * frequencies[None]
  table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  return table.astype(np.float32)


def attention_init(width: int, heads: int) -> dict:
  """Xavier, by 1 / sqrt(2) for query, key and value; their biases as torch's
  linear layers have them, the output's 0. See `drawn`.
  """
  bound = (6 / (2 * width)) ** 0.5
  shape, bias = (width, heads, width // heads), (heads, width // heads)
  made = {
    name: {
      "kernel": Uniform(shape, bound * 2**-0.5),
      "bias": Uniform(bias, width**-0.5),
    }
    for name in ("query", "key", "value")
  }
  out = Uniform((heads, width // heads, width), bound)
  return {**made, "out": {"kernel": out, "bias": jnp.zeros(width)}}


def feed_forward_init(
  width: int, hidden: int, experts: int | None = None
) -> dict:
  """As torch's linear layers; with `experts` that many. See `drawn`."""
  lead = () if experts is None else (experts,)
  inner, outer = width**-0.5, hidden**-0.5
  return {
    "up": {
      "kernel": Uniform((*lead, width, hidden), inner),
      "bias": Uniform((*lead, hidden), inner),
    },
    "down": {
      "kernel": Uniform((*lead, hidden, width), outer),
      "bias": Uniform((*lead, width), outer),
    },
  }
