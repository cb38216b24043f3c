"""Hawk: the real-gated linear recurrent unit (RG-LRU) and a gated MLP.

# b batch, t time, d width, n state, m half of it, k blocks of a gate, i of one

Sources: "Griffin" (arXiv 2402.19427), section 2; "Birdie" (arXiv 2411.01030),
sections 2.1, 3.1 and listing A.16.2. A layer, with x normalized first:

    s = gelu(x W_s);  u = conv(x W_u), four taps
    r = sigmoid(u W_r + b_r);  i = sigmoid(u W_i + b_i)
    log a = -8 r softplus(Lambda)
    h_t = a_t h_(t-1) + sqrt(1 - a_t^2) i_t u_t;  x <- x + (s h) W_out
    x <- x + mlp(norm(x))

A bidirectional layer runs half of the channels of h backwards; the convolution
stays causal. Its taps do not reach over the start of a segment.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from birdie.model_parts import (
  Array,
  Context,
  GatedMLP,
  LanguageModel,
  Projection,
  PyTree,
  RMSNorm,
  fan_in,
  recur,
)

TAPS = 4
STEEPNESS = 8.0  # c of the paper
RING = (0.9, 0.999)  # of a at the start, for r = 1/8
MAX_SLOPE = 1000.0  # of the square root


@jax.custom_vjp
def bounded_sqrt(x: Array) -> Array:
  """sqrt(x) with a derivative of at most `MAX_SLOPE`, which it has at 0.

  Without the bound Hawk cannot be trained (section 2.1).
  """
  return jnp.sqrt(x)


def _sqrt_forward(x: Array) -> tuple[Array, Array]:
  return jnp.sqrt(x), x


def _sqrt_backward(x: Array, g: Array) -> tuple[Array]:
  least = 1 / (4 * MAX_SLOPE**2)
  return (g * 0.5 * jax.lax.rsqrt(jnp.maximum(x, least)),)


bounded_sqrt.defvjp(_sqrt_forward, _sqrt_backward)


def ring_lambda(key: Array, shape: tuple[int, ...]) -> Array:
  """Lambda for which a^(1/8) at r = 1 is uniform on the ring's area."""
  low, high = RING
  square = jax.random.uniform(key, shape) * (high**2 - low**2) + low**2
  return lambda_of(0.5 * jnp.log(square + 1e-8))


def lambda_of(log_rho: Array) -> Array:
  """Lambda with softplus(Lambda) = -log rho, so that a = rho^(8 r)."""
  return jnp.log(jnp.expm1(-log_rho))


def rg_lru(
  u: Array,
  recurrence_gate: Array,
  input_gate: Array,
  lambda_: Array,
  resets: Array | None = None,
) -> tuple[Array, Array]:
  """Gate and drive of the recurrence (equations of section 2.1), float32.

  Args:
    u: [b t ...] what the convolution made.
    recurrence_gate: r, of u's shape, in (0, 1).
    input_gate: i, the same.
    lambda_: of u's last axes.
    resets: bool, broadcasts against u: where the recurrence starts anew, and
      the drive is not scaled by sqrt(1 - a^2); nowhere if None.

  Returns:
    a and sqrt(1 - a^2) i u, of u's shape.
  """
  u, r, i = (v.astype(jnp.float32) for v in (u, recurrence_gate, input_gate))
  decay = jax.nn.softplus(lambda_.astype(jnp.float32))
  log_a = -STEEPNESS * r * decay[(None,) * (u.ndim - decay.ndim)]
  # 1 - a^2, without the cancellation near a = 1.
  scale = bounded_sqrt(-jnp.expm1(2 * log_a))
  if resets is not None:
    scale = jnp.where(resets, 1.0, scale)
  return jnp.exp(log_a), scale * i * u


class _Gate(nn.Module):
  """sigmoid(u W + b): dense, or each block of channels by itself.

  With one block W is [2 m 2 m]; k blocks lie within the halves, [2 k/2 i i].
  """

  blocks: int
  dtype: Any

  @nn.compact
  def __call__(self, u: Array) -> Array:
    half = u.shape[-2:]
    if self.blocks == 1:
      shape, size = (*half, *half), half[0] * half[1]
      form = "bthm,hmgn->btgn"
    else:
      size = half[0] * half[1] // self.blocks
      shape = (2, self.blocks // 2, size, size)
      form = "bthki,hkij->bthkj"
    kernel = self.param("kernel", fan_in(size), shape).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, half)
    inner = u.reshape(*u.shape[:3], *shape[1 : 3 if self.blocks > 1 else 2])
    y = checkpoint_name(jnp.einsum(form, inner, kernel), "gate")
    y = y.reshape(u.shape)
    return jax.nn.sigmoid(y.astype(jnp.float32) + bias[None, None])


class _Conv(nn.Module):
  """A causal convolution of every channel by itself, within segments."""

  dtype: Any

  @nn.compact
  def __call__(
    self, u: Array, context: Context, last: Array | None
  ) -> tuple[Array, Array | None]:
    """U [b t 2 m], and `last` [b 3 2 m], what stood before it, or None."""
    half = u.shape[-2:]
    kernel = self.param("kernel", fan_in(TAPS, 0.01), (TAPS, *half))
    bias = self.param("bias", nn.initializers.zeros, half)
    kernel = kernel.astype(self.dtype)[:, None, None]
    y = u * kernel[0] + bias.astype(self.dtype)[None, None]
    if last is None:
      for back in range(1, TAPS):
        here = _delayed(context.segments, back) == context.segments
        past = jnp.where(here[:, :, None, None], _delayed(u, back), 0)
        y += past * kernel[back]
      return y, None
    whole = jnp.concatenate([last.astype(u.dtype), u], axis=1)
    for back in range(1, TAPS):
      start = TAPS - 1 - back
      y += whole[:, start : start + u.shape[1]] * kernel[back]
    # The last three that are no padding, which stands behind them.
    count = jnp.sum(context.kept, axis=1)[:, None] + jnp.arange(TAPS - 1)[None]
    kept = jnp.take_along_axis(whole, count[:, :, None, None], axis=1)
    return y, kept.astype(jnp.float32)


def _delayed(x: Array, steps: int) -> Array:
  """x[:, t - steps], zeros at the start."""
  pad = [(0, 0), (steps, 0)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, pad)[:, : x.shape[1]]


class HawkLayer(nn.Module):
  """A recurrent layer and its MLP; the state axis is [2, n / 2]."""

  width: int
  state: int
  mlp_width: int
  gate_blocks: int
  reset_gamma: str
  out_variance: float
  bidirectional: bool
  dtype: Any
  scan_impl: str
  seq_axis: str | None

  @nn.compact
  def __call__(
    self, x: Array, context: Context, state: PyTree
  ) -> tuple[Array, PyTree]:
    """Args:
      x: [b t d].
      context: of every place.
      state: `recurrence` [b 2 n/2] and `conv` [b 3 2 n/2], or None.

    Returns:
      [b t d], and the state after the last token, where there was one.
    """
    half, flat = (2, self.state // 2), self.seq_axis is None
    normed = RMSNorm(self.dtype, name="norm")(x)

    def project(name: str) -> Array:
      return Projection(half, self.dtype, flat=flat, name=name)(normed)

    side = jax.nn.gelu(project("side"))
    u, conv = _Conv(self.dtype, name="conv")(
      project("input"), context, state and state["conv"]
    )
    h, last = self._recurrence(u, context, state and state["recurrence"])
    x += Projection(
      (self.width,),
      self.dtype,
      axes=2,
      flat=flat,
      variance=self.out_variance,
      name="out",
    )(side * h.astype(self.dtype))
    normed = RMSNorm(self.dtype, name="mlp_norm")(x)
    x += GatedMLP(
      self.mlp_width, self.dtype, flat, self.out_variance, name="mlp"
    )(normed)
    return x, state and {"conv": conv, "recurrence": last}

  def _recurrence(self, u: Array, context: Context, h0: Array | None):
    resets = None
    if self.reset_gamma == "one":
      second = context.backward if self.bidirectional else context.forward
      resets = jnp.stack([context.forward, second], axis=2)[..., None]
    lambda_ = self.param("lambda", ring_lambda, u.shape[-2:])
    gate, drive = rg_lru(
      u,
      _Gate(self.gate_blocks, self.dtype, name="recurrence_gate")(u),
      _Gate(self.gate_blocks, self.dtype, name="input_gate")(u),
      lambda_,
      resets,
    )
    return recur(
      drive,
      gate,
      context,
      h0,
      bidirectional=self.bidirectional,
      scan_impl=self.scan_impl,
      seq_axis=self.seq_axis,
    )


class Hawk(LanguageModel, kw_only=True):
  """The language model of Hawk's layers.

  Attributes:
    state: n, even.
    mlp_width: of the hidden layer.
    gate_blocks: 1: dense gates; k, even: block-diagonal ones.
    reset_gamma: the factor of the drive where a segment starts: "keep" is
      sqrt(1 - a^2) as everywhere (Birdie), "one" is 1 (recurrentgemma).
  """

  state: int
  mlp_width: int
  gate_blocks: int = 1
  reset_gamma: str = "keep"

  def _layer(self):
    return HawkLayer, {
      "state": self.state,
      "mlp_width": self.mlp_width,
      "gate_blocks": self.gate_blocks,
      "reset_gamma": self.reset_gamma,
      "out_variance": 2 / self.layers,
      "scan_impl": self.scan_impl,
    }

  def empty_state(self, batch: int, capacity: int = 0) -> dict[str, Array]:
    """Zeros, float32, whatever the capacity: `recurrence` [blocks, kinds, b, 2,
    n/2] and `conv` [blocks, kinds, b, 3, 2, n/2].
    """
    del capacity
    lead, half = (self.blocks, len(self.kinds), batch), (2, self.state // 2)
    return {
      "conv": jnp.zeros((*lead, TAPS - 1, *half), jnp.float32),
      "recurrence": jnp.zeros((*lead, *half), jnp.float32),
    }
