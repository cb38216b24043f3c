"""The reward model: a small Gated SSM over the history of a run.

# t evaluations, k configurations, d hidden, n = 2 d state, l blocks

Each evaluation is a row: the losses before it and the mixture then in force,
[2k]. The output is the predicted reward of each configuration, [k]. Paper,
sections 3.3 and A.1.5, with the block of the authors' first code: the state
decays with the *previous* row's gate,

    h_t = g_(t-1) h_(t-1) + u_t,   y_t = x_t + W_o (h_t * sigmoid(o_t))

Plain functions on a dict of arrays; blocks are stacked along their first
axis. `run` reads a history, `step` one more row behind it: so the history is
read once, and its state is then forked for every candidate.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from common.parallel.scan import linear_scan

Params = dict[str, Any]
State = tuple[jax.Array, jax.Array]  # h and the last row's gate, each [l, n]

INPUT_SCALE = 0.1
_LOWEST_RATE = 1e-3  # of the peak: 5e-7 for 5e-4


def init(
  key: jax.Array, *, num_configs: int, hidden: int, layers: int
) -> Params:
  """Random parameters of variance 1 / fan-in; `hidden` must be even."""
  keys = iter(jax.random.split(key, 5))

  def kernel(*shape: int) -> jax.Array:
    return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

  return {
    "norm": jnp.ones(2 * num_configs),
    "in": kernel(2 * num_configs, hidden),
    "blocks": {
      "norm": jnp.ones((layers, hidden)),
      "gate": kernel(layers, hidden, 2 * hidden),
      "drive": kernel(layers, hidden, 6 * hidden),
      "out": kernel(layers, 2 * hidden, hidden),
    },
    "out_norm": jnp.ones(hidden),
    "out": kernel(hidden, num_configs),
  }


def empty_state(params: Params) -> State:
  """The state before any row."""
  zeros = jnp.zeros(params["blocks"]["out"].shape[:2])
  return zeros, zeros


def split_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
  """RMSNorm of each half by itself: losses and probabilities differ in size."""
  halves = x.reshape(2, -1)
  rms = jnp.sqrt(jnp.mean(halves**2, axis=1, keepdims=True) + 1e-8)
  return (halves / rms).reshape(-1) * scale


def _read(params: Params, row: jax.Array) -> jax.Array:
  """[2k] -> [d]."""
  return INPUT_SCALE * split_norm(row, params["norm"]) @ params["in"]


def _gates(
  block: Params, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What a block makes of a row [d]: input u, gate g, output gate, each [n]."""
  normed = split_norm(x, block["norm"])
  drive, gate_in, gate_out = jnp.split(normed @ block["drive"], 3)
  gate = jax.nn.sigmoid(normed @ block["gate"])
  drive = drive * jax.nn.sigmoid(gate_in) * (1 - gate)
  return drive, gate, jax.nn.sigmoid(gate_out)


def _predict(params: Params, x: jax.Array) -> jax.Array:
  """[d] -> [k]."""
  return split_norm(x, params["out_norm"]) @ params["out"]


def step(
  params: Params, state: State, row: jax.Array
) -> tuple[State, jax.Array]:
  """Reads a row [2k]; returns the state behind it and the prediction [k]."""

  def body(x, block_and_state):
    block, (h, last_gate) = block_and_state
    drive, gate, gate_out = _gates(block, x)
    h = last_gate * h + drive
    return x + (h * gate_out) @ block["out"], (h, gate)

  x, new = jax.lax.scan(body, _read(params, row), (params["blocks"], state))
  return new, _predict(params, x)


def run(
  params: Params, rows: jax.Array, count: jax.Array
) -> tuple[State, jax.Array]:
  """Reads the first `count` rows of [t, 2k], block by block.

  Returns:
    The state behind them, and predictions [t, k]; those of rows from `count`
    on mean nothing.
  """
  last = jnp.maximum(count - 1, 0)

  def body(x, block):
    drive, gate, gate_out = jax.vmap(functools.partial(_gates, block))(x)
    previous = jnp.concatenate([jnp.zeros_like(gate[:1]), gate[:-1]])
    # Not "auto": that follows the default backend, and this runs on the CPU.
    h, _ = linear_scan(drive[None], previous[None], impl="sequential")
    state = jax.tree.map(
      lambda values: jnp.where(count > 0, values[last], 0.0), (h[0], gate)
    )
    return x + (h[0] * gate_out) @ block["out"], state

  x = jax.vmap(functools.partial(_read, params))(rows)
  x, state = jax.lax.scan(body, x, params["blocks"])
  return state, jax.vmap(functools.partial(_predict, params))(x)


def score(
  params: Params, state: State, losses: jax.Array, candidates: jax.Array
) -> jax.Array:
  """Predicted rewards of candidates, [m, k], in O(m) after the history.

  Args:
    params: the parameters.
    state: behind the history, from `run`.
    losses: [k], the current ones.
    candidates: [m, k], mixtures.
  """

  def one(candidate):
    return step(params, state, jnp.concatenate([losses, candidate]))[1]

  return jax.vmap(one)(candidates)


def make_optimizer(
  *, lr: float, weight_decay: float, clip_norm: float, cycle: int
) -> optax.GradientTransformation:
  """AdamW whose learning rate rises to `lr` and falls again in every cycle."""

  def triangle(count):
    place = (count % cycle) / cycle
    height = 1 - jnp.abs(2 * place - 1)
    return lr * (_LOWEST_RATE + (1 - _LOWEST_RATE) * height)

  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(triangle, weight_decay=weight_decay),
  )


def error(
  params: Params, rows: jax.Array, targets: jax.Array, count: jax.Array
) -> jax.Array:
  """Mean squared error over the first `count` rows; 0 if there are none."""
  _, predictions = run(params, rows, count)
  real = (jnp.arange(rows.shape[0]) < count)[:, None]
  squares = jnp.where(real, predictions - targets, 0.0) ** 2
  return jnp.sum(squares) / jnp.maximum(count * targets.shape[1], 1)


def fit(
  optimizer: optax.GradientTransformation,
  params: Params,
  opt_state: optax.OptState,
  rows: jax.Array,
  targets: jax.Array,
  count: jax.Array,
  key: jax.Array,
  *,
  steps: int,
  noise: float,
) -> tuple[Params, optax.OptState, jax.Array]:
  """Takes `steps` optimization steps on the first `count` rows.

  In each of them inputs and targets are multiplied by independent uniform
  numbers within `noise` of 1.

  Args:
    optimizer: from `make_optimizer`.
    params: the parameters.
    opt_state: the optimizer's.
    rows: [t, 2k].
    targets: [t, k], rewards.
    count: how many of the rows are filled.
    key: of the noise.
    steps: how many.
    noise: see above.

  Returns:
    `(params, opt_state, errors)`: the errors without noise, before and after,
    [2].
  """

  def jitter(key, values):
    factors = jax.random.uniform(
      key, values.shape, minval=1 - noise, maxval=1 + noise
    )
    return values * factors

  def body(i, carry):
    params, opt_state = carry
    of_rows, of_targets = jax.random.split(jax.random.fold_in(key, i))
    grads = jax.grad(error)(
      params, jitter(of_rows, rows), jitter(of_targets, targets), count
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  before = error(params, rows, targets, count)
  params, opt_state = jax.lax.fori_loop(0, steps, body, (params, opt_state))
  after = error(params, rows, targets, count)
  return params, opt_state, jnp.stack([before, after])
