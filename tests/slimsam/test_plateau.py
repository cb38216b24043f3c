"""The plateau rule: counts, thresholds, resume, and what it scales."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.state import TrainState
from common.train import StepInfo
from slimsam.plateau import HalveOnPlateau, scale_by_factor


def make_state():
  tx = optax.chain(optax.sgd(0.5), scale_by_factor())
  return tx, TrainState.create({"w": jnp.ones(2)}, tx)


def make_hook(patience, values):
  """It measures these, one after the other."""
  values = iter(values)
  return HalveOnPlateau(1, lambda _: next(values), patience=patience)


def run(hook, count, state):
  """The factor after each measurement."""
  factors = []
  for step in range(1, count + 1):
    info = StepInfo(step, state, {}, iter(()))
    state = hook(info) or state
    factors.append(float(state.opt_state[-1].factor))
  return factors, state


# The authors bear 3 in step 1 and 4 in step 2; the paper says 4 epochs.
CASES = [
  (3, [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0.5, 0.5]),
  (1, [1, 2, 1, 1, 1, 1, 1], [1, 1, 1, 0.5, 0.5, 0.25, 0.25]),
  (1, [1, None, 0.5, None, 3, 2, 2], [1, 1, 1, 1, 1, 1, 0.5]),
  # A ten-thousandth is no gain, and less counts as none.
  (0, [1, 1.00005, 1.0002], [1, 0.5, 0.5]),
  (0, [-1, -0.5, -0.5], [1, 1, 0.5]),
]


@pytest.mark.parametrize(("patience", "values", "factors"), CASES)
def test_the_rate_is_halved_after_so_many(patience, values, factors):
  _, state = make_state()
  hook = make_hook(patience, values)
  assert run(hook, len(values), state)[0] == factors
  assert hook.halved == round(-np.log2(factors[-1]))


def test_a_resumed_run_counts_on():
  values = [1, 2, 1, 1, 3, 1, 1, 1]
  _, state = make_state()
  straight = run(make_hook(1, values), len(values), state)
  for cut in range(len(values)):
    first, second = make_hook(1, values[:cut]), make_hook(1, values[cut:])
    _, state = make_state()
    before, state = run(first, cut, state)
    second.set_state(first.get_state())
    after, _ = run(second, len(values) - cut, state)
    assert before + after == straight[0]


def test_updates_are_scaled():
  tx, state = make_state()
  _, state = run(make_hook(0, [1, 1]), 2, state)
  updates, _ = jax.jit(tx.update)({"w": jnp.ones(2)}, state.opt_state)
  np.testing.assert_allclose(updates["w"], -0.25)
