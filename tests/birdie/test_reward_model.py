"""The reward model against a NumPy loop, and what it must be able to do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie import reward_model

K, HIDDEN, LAYERS, CAPACITY = 5, 8, 3, 6
STEPS = 60
init = jax.jit(
  reward_model.init, static_argnames=("num_configs", "hidden", "layers")
)
run = jax.jit(reward_model.run)
score = jax.jit(reward_model.score)
error = jax.jit(reward_model.error)


@pytest.fixture(scope="module")
def params():
  return init(jax.random.key(0), num_configs=K, hidden=HIDDEN, layers=LAYERS)


@pytest.fixture(scope="module")
def rows():
  return jax.random.uniform(jax.random.key(1), (CAPACITY, 2 * K))


def run_numpy(params, rows):
  """The equations of the module, row by row in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x, scale):
    halves = x.reshape(2, -1)
    rms = np.sqrt((halves**2).mean(1, keepdims=True) + 1e-8)
    return (halves / rms).reshape(-1) * scale

  def sigmoid(x):
    return 1 / (1 + np.exp(-x))

  x = [0.1 * norm(np.asarray(r, np.float64), p["norm"]) @ p["in"] for r in rows]
  for i in range(LAYERS):
    block = {name: value[i] for name, value in p["blocks"].items()}
    h, last_gate = np.zeros(2 * HIDDEN), np.zeros(2 * HIDDEN)
    for t in range(len(x)):
      normed = norm(x[t], block["norm"])
      gate = sigmoid(normed @ block["gate"])
      u, gate_in, gate_out = np.split(normed @ block["drive"], 3)
      h = last_gate * h + u * sigmoid(gate_in) * (1 - gate)
      x[t] = x[t] + (h * sigmoid(gate_out)) @ block["out"]
      last_gate = gate
  return np.stack([norm(v, p["out_norm"]) @ p["out"] for v in x])


def test_equals_the_equations(params, rows):
  _, predictions = run(params, rows, jnp.int32(CAPACITY))
  # float32 against float64, through 3 blocks.
  np.testing.assert_allclose(
    predictions, run_numpy(params, rows), atol=2e-5, rtol=2e-5
  )


def test_losses_and_actions_are_normalized_apart():
  """The scale of one half says nothing about the other."""
  x = jnp.arange(1.0, 7.0)
  scaled = jnp.concatenate([1000 * x[:3], x[3:]])
  normed = reward_model.split_norm(x, jnp.ones(6))
  np.testing.assert_allclose(
    reward_model.split_norm(scaled, jnp.ones(6)), normed, rtol=1e-6
  )
  for half in (normed[:3], normed[3:]):
    assert np.mean(np.square(half)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("count", [0, 1, 4, CAPACITY - 1])
def test_forked_scores_equal_whole_runs(params, rows, count):
  """O(T + M) scoring against running the history anew for each candidate."""
  losses = jnp.linspace(1, 2, K)
  candidates = jax.random.dirichlet(jax.random.key(2), jnp.ones(K), (7,))
  state, _ = run(params, rows, jnp.int32(count))
  scores = score(params, state, losses, candidates)
  for candidate, wanted in zip(candidates, scores):
    row = jnp.concatenate([losses, candidate])
    whole = rows.at[count].set(row)
    _, predictions = run(params, whole, jnp.int32(count + 1))
    # Same sums in another order.
    np.testing.assert_allclose(predictions[count], wanted, atol=1e-5, rtol=1e-5)


def test_no_history_is_the_empty_state(params, rows):
  state, _ = run(params, rows, jnp.int32(0))
  chex.assert_trees_all_equal(state, reward_model.empty_state(params))


def test_padding_rows_change_nothing(params, rows):
  count = jnp.int32(3)
  targets = jnp.ones((CAPACITY, K))
  changed = rows.at[3:].set(100.0)
  state, predictions = run(params, rows, count)
  other_state, other = run(params, changed, count)
  chex.assert_trees_all_equal(state, other_state)
  np.testing.assert_array_equal(predictions[:3], other[:3])
  assert error(params, rows, targets, count) == error(
    params, changed, targets.at[3:].set(-9.0), count
  )


def test_error_is_the_mean_over_real_rows(params, rows):
  targets = jnp.ones((CAPACITY, K))
  _, predictions = run(params, rows, jnp.int32(2))
  wanted = np.mean(np.square(predictions[:2] - 1))
  value = error(params, rows, targets, jnp.int32(2))
  assert value == pytest.approx(wanted, rel=1e-5)
  assert error(params, rows, targets, jnp.int32(0)) == 0


def test_predictions_depend_on_the_candidate(params, rows):
  """The reference reads a padding row: 0 for every candidate."""
  state, _ = run(params, rows, jnp.int32(4))
  losses = jnp.linspace(1, 2, K)
  candidates = jax.random.dirichlet(jax.random.key(2), jnp.ones(K), (16,))
  scores = np.asarray(score(params, state, losses, candidates))
  assert len(np.unique(scores, axis=0)) == 16
  assert (scores.std(axis=0) > 1e-4).all()

  def total(candidate):
    return score(params, state, losses, candidate[None]).sum()

  gradient = np.asarray(jax.jit(jax.grad(total))(candidates[0]))
  assert (np.abs(gradient) > 1e-4).all()


def test_history_changes_the_prediction(params, rows):
  candidate, losses = jnp.full((1, K), 1 / K), jnp.ones(K)
  predictions = [
    np.asarray(
      score(
        params,
        run(params, rows, jnp.int32(count))[0],
        losses,
        candidate,
      )
    )
    for count in (0, 1, 2)
  ]
  assert np.abs(predictions[0] - predictions[1]).max() > 1e-4
  assert np.abs(predictions[1] - predictions[2]).max() > 1e-4


@pytest.mark.parametrize(
  ("count", "rate"), [(0, 5e-7), (50, 2.5025e-4), (100, 5e-4), (200, 5e-7)]
)
def test_learning_rate_is_triangular(count, rate):
  """5e-7 to 5e-4 in 100 steps and back; the first update is -rate * sign."""
  optimizer = reward_model.make_optimizer(
    lr=5e-4, weight_decay=0.0, clip_norm=1.0, cycle=200
  )
  params = {"w": jnp.ones(3)}
  state = optimizer.init(params)
  state = jax.tree.map(
    lambda x: jnp.full_like(x, count) if x.dtype == jnp.int32 else x, state
  )
  # Moments as after many steps of the same gradient: its sign is the update.
  state = jax.tree.map(
    lambda x: jnp.full_like(x, 0.5) if x.dtype == jnp.float32 else x, state
  )
  zero = {"w": jnp.zeros(3)}
  updates, _ = optimizer.update(zero, state, params)
  # m / sqrt(v) with what the moments decay to, bias-corrected.
  n = count + 1
  m, v = 0.5 * 0.9 / (1 - 0.9**n), 0.5 * 0.999 / (1 - 0.999**n)
  np.testing.assert_allclose(updates["w"], -rate * m / np.sqrt(v), rtol=1e-3)


@pytest.fixture(scope="module")
def fit(params, rows):
  optimizer = reward_model.make_optimizer(
    lr=3e-3, weight_decay=0.1, clip_norm=1.0, cycle=STEPS
  )

  @jax.jit
  def fit(targets, key, noise):
    return reward_model.fit(
      optimizer,
      params,
      optimizer.init(params),
      rows,
      targets,
      jnp.int32(4),
      key,
      steps=STEPS,
      noise=noise,
    )

  return fit


@pytest.fixture(scope="module")
def targets(rows):
  return jnp.sin(3 * rows[:, :K])


def test_fit_lowers_the_error(fit, targets, params, rows):
  fitted, _, errors = fit(targets, jax.random.key(3), 0.02)
  assert errors[1] < 0.1 * errors[0]
  for model, value in zip((params, fitted), errors):
    measured = error(model, rows, targets, jnp.int32(4))
    assert value == pytest.approx(float(measured), rel=1e-4)


def test_fit_ignores_padding_rows(fit, targets):
  key = jax.random.key(3)
  plain, _, _ = fit(targets, key, 0.02)
  padded, _, _ = fit(targets.at[4:].set(50.0), key, 0.02)
  chex.assert_trees_all_equal(plain, padded)


def test_fit_is_a_function_of_its_key(fit, targets):
  first = fit(targets, jax.random.key(3), 0.02)
  chex.assert_trees_all_equal(first, fit(targets, jax.random.key(3), 0.02))
  other = fit(targets, jax.random.key(4), 0.02)
  assert not np.array_equal(first[0]["in"], other[0]["in"])


def test_without_noise_the_key_has_no_effect(fit, targets):
  silent = [fit(targets, jax.random.key(i), 0.0)[0] for i in range(2)]
  chex.assert_trees_all_equal(*silent)
