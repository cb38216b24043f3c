"""The Gated SSM: recurrence and mixing of channels in one layer.

# b batch, t time, d width, n state

Source: "Birdie" (arXiv 2411.01030), sections 3.1, 3.4, A.3 and listing A.16.1.
A layer, with x normalized first:

    i = sigmoid(x W_i)   z = x W_z   o = gelu(x W_o)   f = sigmoid(x W_f + c)
    h_t = f_t h_(t-1) + i_t z_t;     y = x + (o h) W_out

In a bidirectional layer half of the channels run backwards, and their gate is
closed outside the prefix. Same parameters, work and state size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from birdie.model_parts import (
  Array,
  Context,
  LanguageModel,
  Projection,
  RMSNorm,
  recur,
)

# Logits of the forget gates at the start: f from 0.73 to 0.993. Around f = 0.5
# the initial memory would be a few tokens.
FORGET_LOGITS = (1.0, 5.0)


class GatedSSMLayer(nn.Module):
  """One layer.

  The state axis is kept as [2, n / 2], so that cutting it in halves moves
  nothing between the shards of the `model` axis.
  """

  width: int
  state: int
  bidirectional: bool
  forget_bias: str
  dtype: Any
  scan_impl: str
  seq_axis: str | None

  @nn.compact
  def __call__(
    self, x: Array, context: Context, h0: Array | None
  ) -> tuple[Array, Array | None]:
    """Args:
      x: [b t d].
      context: of every place.
      h0: [b 2 n/2] the state before the first token; None without one.

    Returns:
      [b t d], and the state after the last token, where there was one.
    """
    half, flat = (2, self.state // 2), self.seq_axis is None

    def project(name: str) -> Array:
      return Projection(half, self.dtype, flat=flat, name=name)(normed)

    normed = RMSNorm(self.dtype, name="norm")(x)
    logits = project("forget").astype(jnp.float32) + self._forget_logits(half)
    drive = jax.nn.sigmoid(project("input")) * project("drive")
    out_gate = jax.nn.gelu(project("output"))
    h, last = recur(
      drive.astype(jnp.float32),
      jax.nn.sigmoid(logits),
      context,
      h0,
      bidirectional=self.bidirectional,
      scan_impl=self.scan_impl,
      seq_axis=self.seq_axis,
    )
    out = Projection((self.width,), self.dtype, axes=2, flat=flat, name="out")
    return x + out(out_gate * h.astype(self.dtype)), last

  def _forget_logits(self, half: tuple[int, int]) -> Array:
    # Each half gets the whole range.
    spread = np.tile(np.linspace(*FORGET_LOGITS, half[1]), (2, 1))
    if self.forget_bias == "learned":
      bias = self.param("forget_bias", lambda key: jnp.float32(spread))
    elif self.forget_bias == "fixed":
      bias = jnp.float32(spread)
    else:
      bias = jnp.zeros(half, jnp.float32)
    return bias[None, None]


class GatedSSM(LanguageModel, kw_only=True):
  """The language model of Gated SSM layers.

  Attributes:
    state: n, even.
    forget_bias: offset of the forget gates: "learned", "fixed" or "none".
  """

  state: int
  forget_bias: str = "fixed"

  def _layer(self):
    return GatedSSMLayer, {
      "state": self.state,
      "forget_bias": self.forget_bias,
      "scan_impl": self.scan_impl,
    }

  def empty_state(self, batch: int, capacity: int = 0) -> Array:
    """Zeros [blocks, kinds, b, 2, n/2], float32, whatever the capacity."""
    del capacity
    shape = (self.blocks, len(self.kinds), batch, 2, self.state // 2)
    return jnp.zeros(shape, jnp.float32)
