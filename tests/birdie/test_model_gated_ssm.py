"""The Gated SSM is its equations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie.model_gated_ssm import FORGET_LOGITS, GatedSSM, GatedSSMLayer
from birdie.model_parts import make_context
from birdie.models import init_params

# A prefix of 5 and a target of 4; no prefix; a prefix of 3 and a target of 3;
# a prefix alone; padding.
SEGMENTS = np.repeat([1, 2, 3, 4, 0], [9, 4, 6, 2, 2])
PREFIX = np.repeat([1, 0, 1, 0, 1, 0], [5, 8, 3, 3, 2, 2]) > 0
POSITIONS = np.concatenate([np.arange(n) for n in (9, 4, 6, 2)] + [[0, 0]])
VOCAB = 32
MODEL = GatedSSM(VOCAB, width=8, state=8, layers=2)


@functools.partial(jax.jit, static_argnums=0)
def init(model):
  return init_params(model, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens):
  shape = (len(tokens), len(SEGMENTS))
  rows = (
    jnp.broadcast_to(a[None], shape) for a in (SEGMENTS, POSITIONS, PREFIX)
  )
  return model.apply({"params": params}, tokens, *rows)


@pytest.mark.parametrize(
  ("bidirectional", "mode"),
  [(False, "strict"), (True, "strict"), (True, "paper")],
)
def test_a_layer_is_its_equations(bidirectional, mode):
  """Against a loop in float64, written from section 3.4 and listing A.16.1."""
  layer = GatedSSMLayer(
    width=6,
    state=8,
    bidirectional=bidirectional,
    forget_bias="fixed",
    dtype=jnp.float32,
    scan_impl="auto",
    seq_axis=None,
  )
  segments, prefix = SEGMENTS[None], PREFIX[None]
  rng = np.random.default_rng(1)
  x = rng.normal(size=(*segments.shape, 6)).astype(np.float32)
  h0 = np.zeros((1, 2, 4), np.float32)
  context = make_context(
    jnp.asarray(segments), jnp.asarray(POSITIONS)[None], jnp.asarray(prefix),
    mode=mode, decoding=False,
  )  # fmt: skip
  arguments = (x, context, h0)
  params = jax.jit(layer.init)(jax.random.key(0), *arguments)
  params["params"]["norm"]["scale"] = jnp.linspace(0.5, 1.5, 6)
  y, last = jax.jit(layer.apply)(params, *arguments)
  expected, expected_last = _layer_loop(
    jax.tree.map(lambda p: np.asarray(p, np.float64), params["params"]),
    x[0],
    segments[0],
    prefix[0],
    bidirectional=bidirectional,
    mode=mode,
  )
  # float32 against float64, values of order 1.
  np.testing.assert_allclose(y[0], expected, atol=1e-5)
  np.testing.assert_allclose(last[0].reshape(-1), expected_last, atol=1e-5)


def _layer_loop(params, x, segments, prefix, *, bidirectional, mode):
  def sigmoid(v):
    return 1 / (1 + np.exp(-v))

  def gelu(v):
    inner = np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)
    return 0.5 * v * (1 + np.tanh(inner))

  def project(name):
    return n @ params[name]["kernel"].reshape(6, 8)

  x = x.astype(np.float64)
  n = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
  n = n * params["norm"]["scale"]
  f = sigmoid(project("forget") + np.tile(np.linspace(1, 5, 4), 2))
  b = sigmoid(project("input")) * project("drive")
  h, length = np.zeros_like(b), len(x)
  ahead = slice(0, 4) if bidirectional else slice(0, 8)
  for t in range(length):
    h[t, ahead] = b[t, ahead]
    if t and segments[t] == segments[t - 1]:
      h[t, ahead] += f[t, ahead] * h[t - 1, ahead]
  last = h[-1].copy()
  for t in reversed(range(length)) if bidirectional else ():
    h[t, 4:] = b[t, 4:]
    sees = t + 1 < length and segments[t] == segments[t + 1] and prefix[t]
    if sees and (mode == "paper" or prefix[t + 1]):
      h[t, 4:] += f[t, 4:] * h[t + 1, 4:]
  mixed = (gelu(project("output")) * h) @ params["out"]["kernel"].reshape(8, 6)
  return x + mixed, last


def test_a_learned_forget_bias_starts_as_the_fixed_one():
  tokens = np.random.default_rng(0).integers(0, VOCAB, (1, len(SEGMENTS)))
  params, learned = init(MODEL), MODEL.clone(forget_bias="learned")
  start = jax.tree.map(lambda p: p, params)
  for name in ("bidirectional", "causal"):
    bias = init(learned)["layers"][name]["forget_bias"]
    np.testing.assert_allclose(bias[0], [[1, 7 / 3, 11 / 3, 5]] * 2, rtol=1e-6)
    start["layers"][name]["forget_bias"] = bias
  chex.assert_trees_all_close(
    apply(learned, start, tokens), apply(MODEL, params, tokens), atol=1e-6
  )


def test_a_forget_bias_lengthens_the_memory():
  gates = jax.nn.sigmoid(np.linspace(*FORGET_LOGITS, 4))
  np.testing.assert_allclose(
    gates[jnp.array([0, -1])], [0.731, 0.993], atol=1e-3
  )

  @functools.partial(jax.jit, static_argnums=0)
  def last(model, params, tokens):
    ones = jnp.ones_like(tokens)
    places = jnp.arange(tokens.shape[1])[None]
    return model.apply({"params": params}, tokens, ones, places, ones == 0)[
      0, -1
    ]

  tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 23))
  other = (tokens + (np.arange(23) == 0)[None]) % VOCAB
  moved = {}
  for option in ("fixed", "none"):
    model = MODEL.clone(forget_bias=option)
    a, b = (last(model, init(model), t) for t in (tokens, other))
    moved[option] = float(jnp.abs(a - b).max())
  assert moved["fixed"] > 10 * moved["none"]
