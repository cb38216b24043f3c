"""Hawk is its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie.model_hawk import (
  MAX_SLOPE,
  RING,
  HawkLayer,
  bounded_sqrt,
  lambda_of,
  rg_lru,
  ring_lambda,
)
from birdie.model_parts import make_context

# A prefix of 5 and a target of 4; a prefix of 3 and a target of 3; padding.
SEGMENTS = np.repeat([1, 2, 0], [9, 6, 2])
PREFIX = np.repeat([1, 0, 1, 0], [5, 4, 3, 5]) > 0
POSITIONS = np.concatenate([np.arange(9), np.arange(6), [0, 0]])
WIDTH, STATE, HIDDEN = 6, 8, 10


def test_known_answers_of_the_unit():
  lambda_ = lambda_of(jnp.log(jnp.full(1, 0.9)))
  np.testing.assert_allclose(lambda_, [-2.197225], rtol=1e-6)
  half, u = jnp.full((1, 1, 1), 0.5), jnp.full((1, 1, 1), 2.0)
  a, drive = rg_lru(u, half, half, lambda_)
  np.testing.assert_allclose(a, 0.6561 * np.ones((1, 1, 1)), rtol=1e-6)
  np.testing.assert_allclose(drive, 0.754674 * np.ones((1, 1, 1)), rtol=1e-6)
  _, first = rg_lru(u, half, half, lambda_, jnp.ones((1, 1, 1), bool))
  np.testing.assert_array_equal(first, np.ones((1, 1, 1)))


def test_lambda_starts_on_the_ring():
  lambda_ = np.asarray(ring_lambda(jax.random.key(0), (4096,)), np.float64)
  rho = 1 / (1 + np.exp(lambda_))  # sigmoid(-Lambda), a ** (1/8) at r = 1
  assert RING[0] < rho.min()
  assert rho.max() < RING[1]
  # Uniform on the area: the square is uniform.
  share = (rho**2 - RING[0] ** 2) / (RING[1] ** 2 - RING[0] ** 2)
  np.testing.assert_allclose(
    np.quantile(share, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03
  )


def test_the_square_root_has_a_bounded_slope():
  slope = jax.vmap(jax.grad(bounded_sqrt))
  x = jnp.array([0.0, 1e-7, 2.5e-7, 1e-4, 0.25, 1.0])
  np.testing.assert_array_equal(bounded_sqrt(x), jnp.sqrt(x))
  expected = [MAX_SLOPE] * 3 + [50, 1, 0.5]
  np.testing.assert_allclose(slope(x), expected, rtol=1e-6)
  assert slope(x)[0] == MAX_SLOPE  # exactly


def test_no_cancellation_near_one():
  """1 - a^2 to seven digits, where a rounds to 1 - 6e-8."""
  lambda_ = lambda_of(jnp.float32(-1e-8))[None]
  one = jnp.ones((1, 1, 1))
  _, drive = rg_lru(one, one, one, lambda_)
  np.testing.assert_allclose(drive, np.sqrt(16e-8) * np.ones((1, 1, 1)), 1e-4)


@pytest.mark.parametrize("gamma", ["keep", "one"])
@pytest.mark.parametrize(
  ("bidirectional", "mode", "blocks"),
  [(False, "strict", 1), (True, "strict", 4), (True, "paper", 1)],
)
def test_a_layer_is_its_equations(bidirectional, mode, blocks, gamma):
  """Against a loop in float64, written from sections 2.1 and A.16.2."""
  layer = HawkLayer(
    width=WIDTH,
    state=STATE,
    mlp_width=HIDDEN,
    gate_blocks=blocks,
    reset_gamma=gamma,
    out_variance=1.0,
    bidirectional=bidirectional,
    dtype=jnp.float32,
    scan_impl="auto",
    seq_axis=None,
  )
  places = (jnp.asarray(a)[None] for a in (SEGMENTS, POSITIONS, PREFIX))
  context = make_context(*places, mode=mode, decoding=False)
  rng = np.random.default_rng(1)
  x = rng.normal(size=(1, len(SEGMENTS), WIDTH)).astype(np.float32)
  params = jax.jit(layer.init)(jax.random.key(0), x, context, None)
  # Biases start at zero and the convolution small: not here.
  params = jax.tree.map(
    lambda p: jnp.asarray(p + 0.3 * rng.normal(size=p.shape), jnp.float32),
    params,
  )
  y, state = jax.jit(layer.apply)(params, x, context, None)
  assert state is None
  expected = _layer_loop(
    jax.tree.map(lambda p: np.asarray(p, np.float64), params["params"]),
    x[0].astype(np.float64),
    bidirectional=bidirectional,
    paper=mode == "paper",
    gamma_one=gamma == "one",
  )
  # float32 against float64, values of order 10.
  np.testing.assert_allclose(y[0], expected, rtol=1e-4, atol=1e-4)


def _sigmoid(v):
  return 1 / (1 + np.exp(-v))


def _gelu(v):
  inner = np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)
  return 0.5 * v * (1 + np.tanh(inner))


def _norm(params, x):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * params["scale"]


def _gate(params, u):
  kernel = params["kernel"]
  if kernel.shape == (2, STATE // 2, 2, STATE // 2):
    y = u @ kernel.reshape(STATE, STATE)
  else:
    matrices = kernel.reshape(-1, *kernel.shape[2:])
    parts = np.split(u, len(matrices), axis=-1)
    y = np.concatenate([p @ m for p, m in zip(parts, matrices)], axis=-1)
  return _sigmoid(y + params["bias"].reshape(-1))


def _layer_loop(params, x, *, bidirectional, paper, gamma_one):
  length, half = len(x), STATE // 2
  same = np.append(SEGMENTS[1:] == SEGMENTS[:-1], False)  # t and t + 1
  n = _norm(params["norm"], x)
  side = _gelu(n @ params["side"]["kernel"].reshape(WIDTH, STATE))
  inner = n @ params["input"]["kernel"].reshape(WIDTH, STATE)
  taps = params["conv"]["kernel"].reshape(4, STATE)
  u = np.tile(params["conv"]["bias"].reshape(-1), (length, 1))
  for t in range(length):
    for back in range(4):
      if t >= back and SEGMENTS[t] == SEGMENTS[t - back]:
        u[t] += taps[back] * inner[t - back]
  r, i = _gate(params["recurrence_gate"], u), _gate(params["input_gate"], u)
  a = _sigmoid(-params["lambda"].reshape(-1)) ** (8 * r)
  starts = np.insert(~same[:-1], 0, True)
  ends = ~same | ~PREFIX
  if not paper:
    ends |= np.append(~PREFIX[1:], True)
  resets = np.repeat(starts[:, None], STATE, 1)
  if bidirectional:
    resets[:, half:] = ends[:, None]
  scale = np.sqrt(1 - a**2)
  b = np.where(resets & gamma_one, 1, scale) * i * u
  a = np.where(resets, 0, a)
  h = b.copy()
  ahead = slice(0, half) if bidirectional else slice(0, STATE)
  for t in range(1, length):
    h[t, ahead] += a[t, ahead] * h[t - 1, ahead]
  if bidirectional:
    for t in reversed(range(length - 1)):
      h[t, half:] += a[t, half:] * h[t + 1, half:]
  x = x + (side * h) @ params["out"]["kernel"].reshape(STATE, WIDTH)
  n, mlp = _norm(params["mlp_norm"], x), params["mlp"]
  inner = _gelu(n @ mlp["gate"]["kernel"]) * (n @ mlp["up"]["kernel"])
  return x + inner @ mlp["down"]["kernel"]
