"""The step: weighted accumulation, norms, donation, one compilation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.metrics import Mean
from common.rngs import RngStreams, np_rng
from common.state import TrainState
from common.step import make_train_step


def loss_fn(params, batch, rngs):
  del rngs
  error = jnp.square(batch["x"] @ params["w"] - batch["y"])
  weights = batch["weights"]
  loss = jnp.sum(error * weights) / jnp.maximum(jnp.sum(weights), 1e-9)
  return loss, {"loss": Mean.of(error, weights)}


def make_batch(weights):
  rng = np.random.default_rng(0)
  rows = len(weights)
  return {
    "x": rng.normal(size=(rows, 3)).astype(np.float32),
    "y": rng.normal(size=rows).astype(np.float32),
    "weights": np.asarray(weights, np.float32),
  }


def make_state(tx):
  return TrainState.create({"w": jnp.arange(3.0)}, tx)


@pytest.mark.parametrize("accum", [2, 4])
def test_accumulation_weights_by_tokens_not_by_micro_batch(accum):
  """Uneven weights: the mean of micro-batch means would be wrong."""
  tx = optax.sgd(0.1)
  batch = make_batch([1, 0, 0, 0, 5, 1, 0, 9])
  whole, m1 = make_train_step(loss_fn, tx, RngStreams(0))(make_state(tx), batch)
  parts, m2 = make_train_step(loss_fn, tx, RngStreams(0), accum=accum)(
    make_state(tx), batch
  )
  chex.assert_trees_all_close(whole.params, parts.params, rtol=1e-6)
  chex.assert_trees_all_close(m1, m2, rtol=1e-6)


@pytest.mark.parametrize("accum", [1, 2])
def test_the_loss_sees_what_else_the_step_is_given(accum):
  """As arguments: another teacher compiles nothing, and is not saved."""

  def follow(params, batch, rngs, teacher):
    moved = {"w": params["w"] - teacher["w"]}
    return loss_fn(moved, batch, rngs)

  tx = optax.sgd(0.1)
  step = make_train_step(follow, tx, RngStreams(0), accum=accum)
  batch = make_batch([1, 2])
  zero, one = ({"w": jnp.full(3, value)} for value in (0.0, 1.0))
  plain, _ = make_train_step(loss_fn, tx, RngStreams(0))(make_state(tx), batch)
  same, _ = step(make_state(tx), batch, zero)
  other, _ = step(make_state(tx), batch, one)
  chex.assert_trees_all_close(same.params, plain.params, rtol=1e-6)
  assert not np.allclose(other.params["w"], plain.params["w"])
  assert step._cache_size() == 1


def test_a_batch_without_targets_moves_nothing():
  tx = optax.sgd(0.1)
  state, metrics = make_train_step(loss_fn, tx, RngStreams(0))(
    make_state(tx), make_batch([0, 0])
  )
  np.testing.assert_array_equal(state.params["w"], np.arange(3.0))
  assert float(metrics["loss"].count) == 0


def test_indivisible_batches_are_refused():
  tx = optax.sgd(0.1)
  step = make_train_step(loss_fn, tx, RngStreams(0), accum=3)
  with pytest.raises(ValueError, match=r"accum=3 does not divide .* 4 rows"):
    step(make_state(tx), make_batch([1, 1, 1, 1]))


def test_norms_are_those_before_clipping():
  tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
  batch = make_batch([1, 1])
  state = make_state(tx)
  grads = jax.grad(lambda p: loss_fn(p, batch, {})[0])(state.params)
  _, metrics = make_train_step(loss_fn, tx, RngStreams(0))(state, batch)
  np.testing.assert_allclose(
    metrics["grad_norm"].total, np.linalg.norm(grads["w"]), rtol=1e-6
  )
  np.testing.assert_allclose(metrics["update_norm"].total, 1e-3, rtol=1e-5)


def test_the_state_is_donated_and_the_step_compiles_once():
  tx = optax.adam(0.1)
  traces = []

  def counted(params, batch, rngs):
    traces.append(1)
    return loss_fn(params, batch, rngs)

  step = make_train_step(counted, tx, RngStreams(0))
  first = jax.device_put(make_state(tx), jax.devices()[0])
  state = first
  for weight in (1, 2, 3):
    batch = jax.device_put(make_batch([weight, 1]), jax.devices()[0])
    state, _ = step(state, batch)
  assert len(traces) == 1
  assert first.params["w"].is_deleted()


def test_streams_are_functions_of_seed_name_and_step():
  streams = RngStreams(3, ("a", "b"))
  data = lambda key: tuple(np.asarray(jax.random.key_data(key)))  # noqa: E731
  keys = {data(streams(step)[n]) for step in range(5) for n in "ab"}
  assert len(keys) == 10
  traced = jax.jit(lambda s: jax.random.key_data(streams(s)["a"]))(4)
  np.testing.assert_array_equal(traced, jax.random.key_data(streams(4)["a"]))


def test_host_streams_do_not_overlap():
  draws = {
    np_rng(seed, name, *counters).integers(2**62)
    for seed in (0, 1)
    for name in ("x", "y")
    for counters in ((), (0,), (0, 1), (1, 0), (1, 1, 5))
  }
  # () and (0,) are the same counter, all others differ.
  assert len(draws) == 4 * 4
  with pytest.raises(ValueError, match="at most 3 counters"):
    np_rng(0, "x", 1, 2, 3, 4)
