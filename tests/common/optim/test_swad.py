"""SWAD: the valley by its definition on lists, and the state as arrays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.checkpoint import Checkpointer
from common.errors import UserError
from common.optim import swad
from common.parallel import make_mesh, shardings
from common.state import TrainState

PARAMS = {"kernel": jnp.zeros((8, 2)), "bias": jnp.zeros(())}
# Losses of a run with a valley: it starts with segment 2 (1.0, the smallest
# of three), the threshold is 1.3 * (1.0 + 1.2 + 1.1) / 3 = 1.43, and 6
# validations in a row are above it from segment 7 on.
VALLEY = [3, 2, 1.0, 1.2, 1.1, 1.5, 1.4, 1.6, 1.7, 1.8, 1.9, 2, 2.1]


def weights(step):
  """What training gives after a step: another tree each time."""
  return jax.tree.map(lambda x: x + jnp.sin(step) + step, PARAMS)


def segment_of(losses, lengths):
  """The steps of each validation: `lengths` repeated."""
  ends = np.cumsum([lengths[i % len(lengths)] for i in range(len(losses))])
  return [range(a, b) for a, b in zip([0, *ends[:-1]], ends)]


def train(averager, losses, lengths=(2, 1, 3)):
  """Runs over all segments; the state after each validation."""
  update, validate = jax.jit(averager.update), jax.jit(averager.validate)
  state, states = averager.init(PARAMS), []
  for loss, steps in zip(losses, segment_of(losses, lengths)):
    for step in steps:
      state = update(state, weights(step))
    state = validate(state, loss)
    states.append(state)
  return states


def definition(losses, n_converge, n_tolerance, ratio):
  """(start, end) of the paper's algorithm, in segments; None without any."""
  for start in range(len(losses) - n_converge + 1):
    window = losses[start : start + n_converge]
    if window[0] == min(window):
      break
  else:
    return None
  threshold = (1 + ratio) * np.mean(window)
  end = start - 1
  while end + 1 < len(losses) and (
    min(losses[end + 1 : end + 1 + n_tolerance]) <= threshold
  ):
    end += 1
  return start, end


def mean_over(losses, start, end, lengths=(2, 1, 3)):
  steps = [s for r in segment_of(losses, lengths)[start : end + 1] for s in r]
  trees = [weights(step) for step in steps]
  return jax.tree.map(
    lambda *xs: sum(np.float64(x) for x in xs) / len(xs), *trees
  )


def average(averager, state):
  return jax.jit(averager.average)(state, weights(100))


def close(actual, expected):
  chex.assert_trees_all_close(
    actual, jax.tree.map(np.float32, expected), rtol=1e-5
  )


def test_a_valley_by_hand():
  averager = swad()
  states = train(averager, VALLEY)
  assert [int(s.start) for s in states] == [-1] * 4 + [2] * 9
  # The end is known once six validations are: segment 2 at the 8th.
  assert [int(s.end) for s in states] == [-2] * 4 + [1] * 3 + [2, 3, 4, 5, 6, 6]
  assert [bool(s.is_over) for s in states] == [False] * 12 + [True]
  np.testing.assert_allclose(states[-1].threshold, 1.43, rtol=1e-6)
  close(average(averager, states[-1]), mean_over(VALLEY, 2, 6))


def test_what_comes_after_the_valley_changes_nothing():
  averager = swad()
  states = train(averager, [*VALLEY, 1.0, 0.5, 0.1, 3.0, float("nan")])
  close(average(averager, states[-1]), mean_over(VALLEY, 2, 6))


def test_a_run_that_ends_in_the_valley_leaves_out_its_bad_tail():
  averager = swad()
  losses = VALLEY[:9]  # the last two are above the threshold
  state = train(averager, losses)[-1]
  assert not bool(state.is_over)
  close(average(averager, state), mean_over(losses, 2, 6))


WINDOWS = [(3, 6), (3, 3), (1, 1), (5, 2), (2, 5), (1, 4)]


@pytest.mark.parametrize("windows", WINDOWS)
def test_is_the_definition_on_random_losses(windows):
  """Noisy valleys with ties, cut anywhere."""
  averager = swad(*windows, 0.13)
  kinds = set()
  for seed in range(12):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 20))
    depth = np.arange(size) - 6 + rng.integers(-2, 3, size)
    losses = list(1 + np.abs(depth) / 8)
    expected = definition(losses, *windows, 0.13)
    state = train(averager, losses)[-1]
    found = average(averager, state)
    if expected is None:
      last = len(losses) - 1
      close(found, mean_over(losses, last, last))
    else:
      close(found, mean_over(losses, *expected))
    kinds.add((expected is None, bool(state.is_over)))
  assert len(kinds) > 1


def test_without_a_valley_it_is_the_last_segment_or_the_weights():
  averager = swad()
  falling = [5, 4, 3, 2, 1]
  state = train(averager, falling)[-1]
  assert int(state.start) == -1
  close(average(averager, state), mean_over(falling, 4, 4))
  start = averager.init(PARAMS)
  close(average(averager, start), weights(100))
  close(average(averager, averager.update(start, weights(3))), weights(100))


def test_losses_that_are_not_finite_start_nothing_and_end_the_valley():
  averager = swad(1, 1, 0.3)
  nan = float("nan")
  states = train(averager, [nan, 1.0, 1.1, nan, 1.0])
  assert [int(s.start) for s in states] == [-1, 1, 1, 1, 1]
  assert bool(states[3].is_over)
  close(average(averager, states[-1]), mean_over([0] * 5, 1, 2))


def test_bfloat16_weights_are_averaged_in_float32():
  averager = swad(1, 1)
  state = averager.init({"w": jnp.zeros(3, jnp.bfloat16)})
  for i in range(300):  # in bfloat16 the mean would stand still
    state = averager.update(state, {"w": jnp.full(3, i % 2, jnp.bfloat16)})
  state = averager.validate(state, 1.0)
  found = averager.average(state, {"w": jnp.zeros(3, jnp.bfloat16)})
  assert state.valley["w"].dtype == jnp.float32
  assert found["w"].dtype == jnp.bfloat16
  np.testing.assert_allclose(state.valley["w"], 0.5, rtol=1e-6)


def test_the_state_is_arrays_that_shard_like_the_parameters_and_resume(
  tmp_path,
):
  averager = swad()
  mesh = make_mesh({"fsdp": 8})
  rules = [("kernel", jax.P("fsdp")), (".*", jax.P())]

  def create():
    tx = optax.sgd(0.1)
    return TrainState.create(PARAMS, tx, {"swad": averager.init(PARAMS)})

  where = shardings(jax.eval_shape(create), mesh, rules)
  state = jax.jit(create, out_shardings=where)()

  @jax.jit
  def run_segment(state, steps, loss):
    inner = state.extra["swad"]
    for i in range(2):
      inner = averager.update(inner, weights(steps[i]))
    return state.replace(
      step=state.step + 1, extra={"swad": averager.validate(inner, loss)}
    )

  def go_on(state, validations):
    for i in validations:
      steps = jnp.arange(2 * i, 2 * i + 2, dtype=jnp.float32)
      state = jax.device_put(run_segment(state, steps, VALLEY[i]), where)
    return state

  state = go_on(state, range(6))
  kernels = state.extra["swad"].segments[0]["kernel"]
  assert kernels.sharding.spec == jax.P("fsdp")
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(6, state, None)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    where,
  )
  resumed = go_on(checkpointer.restore(abstract, None), range(6, 13))
  checkpointer.close()
  unbroken = go_on(state, range(6, 13))
  chex.assert_trees_all_equal(resumed, unbroken)
  close(
    averager.average(resumed.extra["swad"], PARAMS),
    mean_over(VALLEY, 2, 6, (2,)),
  )


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ((0,), "n_converge=0 must be a whole number from 1"),
    ((3, 1.5), "n_tolerance=1.5 must be a whole number from 1"),
    ((3, 6, -0.1), "tolerance_ratio=-0.1 must be a number from 0"),
  ],
)
def test_what_makes_no_sense_is_refused(settings, message):
  with pytest.raises(UserError, match=message):
    swad(*settings)
