"""Reward, settings, and the controller as a whole."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from birdie import controller
from birdie.controller import ControllerConfig
from birdie.mixture import class_uniform
from common.errors import UserError

CLASSES = (0, 0, 1, 2, 2, 2)
K = len(CLASSES)
NUM_STEPS = 1000
EARLY, LATE = 10, 900  # always and never exploring, under CFG
CFG = ControllerConfig(
  warmup_end=5,
  hidden=16,
  layers=2,
  lr=5e-3,
  fit_steps=60,
  num_candidates=256,
  min_prob=0.01,
  max_prob=0.9,
  explore_first=1.0,
  explore_start=0.0,
  explore_floor=0.0,
)


class TestReward:
  @pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
      (4.5, 4.2, 0.951797),
      (0.6, 0.5207, 0.953504),
      (1.0, 0.9, 0.700986),
      (4.5, 4.4, 0.036081),
      (3.0, 2.9, 0.080721),
      (2.5, 2.5, 0.0),
      (4.2, 4.5, -1.0),
      (2.0, 1.8, 1.0),
      (0.0, 0.0, 0.0),
    ],
  )
  def test_known_answers(self, old, new, wanted):
    value = controller.reward(jnp.float32(old), jnp.float32(new))
    # The third power of a small difference of float32 losses.
    assert value == pytest.approx(wanted, rel=3e-5, abs=1e-6)

  @pytest.mark.parametrize(
    ("loss", "drop"),
    [(0.1, 0.25), (0.5, 0.143), (1, 0.113), (2, 0.089), (4, 0.071)],
  )
  def test_reaches_1_at_a_relative_drop(self, loss, drop):
    below, above = (
      controller.reward(jnp.float32(loss), jnp.float32(loss * (1 - d)))
      for d in (drop - 0.001, drop + 0.001)
    )
    assert below < 1
    assert above == 1

  def test_falls_with_the_new_loss(self):
    new = jnp.linspace(2.75, 3.2, 40)
    values = controller.reward(jnp.full(40, 3.0), new)
    assert (np.diff(values) <= 0).all()
    inside = np.abs(values) < 1
    assert inside.sum() > 20
    assert (np.diff(values[inside]) < 0).all()

  @pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
      (math.nan, 1, 0),
      (1, math.nan, 0),
      (0, 3, 0),
      (math.inf, 1, 0),
      (1, math.inf, -1),
    ],
  )
  def test_is_a_number(self, old, new, wanted):
    assert controller.reward(jnp.float32(old), jnp.float32(new)) == wanted

  def test_class_example(self):
    classes = (0, 0, 1, 2)
    rewards = controller.reward(
      jnp.array([4.5, 0.6, 2.0, 3.0]), jnp.array([4.2, 0.5207, 2.2, 2.9])
    )
    by_class = controller.class_rewards(rewards, classes)
    np.testing.assert_allclose(by_class, [0.952650, -1, 0.080721], rtol=3e-5)
    total = rewards @ controller.class_weights(classes)
    assert total == pytest.approx(0.033371, abs=3e-5)
    assert total == pytest.approx(float(by_class.sum()), abs=1e-6)


class TestSchedules:
  @pytest.mark.parametrize(
    ("num_steps", "schedule", "wanted"),
    [
      (
        4500,
        "paper",
        (10, 50, 250, 500, 1000, 1500, 2000, 3000, 4000, 4500),
      ),
      (2000, "paper", (10, 50, 250, 500, 1000, 1500, 2000)),
      (30, "paper", (10, 30)),
      (12, "4", (4, 8, 12)),
      (10, "4", (4, 8, 10)),
      (10, "100", (10,)),
    ],
  )
  def test_eval_steps(self, num_steps, schedule, wanted):
    assert controller.eval_steps(num_steps, schedule) == wanted

  @pytest.mark.parametrize("schedule", ["0", "-5", "", "often", "1.5", "²"])
  def test_refuses_schedule(self, schedule):
    with pytest.raises(UserError, match=r"controller\.schedule="):
      controller.eval_steps(100, schedule)

  @pytest.mark.parametrize(
    ("step", "wanted"),
    [
      (0, 1.0),
      (49, 1.0),
      (50, 0.5),
      (100, 0.5),
      (200, 0.2 + 0.15 * (1 + math.sqrt(0.5))),
      (300, 0.35),
      (500, 0.2),
      (1000, 0.2),
    ],
  )
  def test_exploration(self, step, wanted):
    chance = controller.explore_probability(ControllerConfig(), step, 1000)
    assert chance == pytest.approx(wanted)


class TestSettings:
  @pytest.mark.parametrize(
    ("name", "value"),
    [
      ("proposal", "unifrom"),
      ("hidden", 0),
      ("hidden", 15),
      ("layers", 0),
      ("fit_steps", 0),
      ("num_candidates", 0),
      ("top_k", 0),
      ("top_k", 4096),
      ("lr", 0.0),
      ("lr", math.nan),
      ("weight_decay", -0.1),
      ("clip_norm", 0.0),
      ("noise", -0.1),
      ("noise", 1.0),
      ("warmup_end", -1),
      ("explore_start", 1.5),
      ("explore_floor", math.nan),
      ("min_prob", -0.1),
      ("min_prob", math.nan),
      ("max_prob", math.nan),
      ("max_prob", 1.5),
    ],
  )
  def test_refuses(self, name, value):
    with pytest.raises(UserError, match=rf"controller\.{name}=") as caught:
      ControllerConfig(**{name: value})
    assert "\n" not in str(caught.value)

  @pytest.mark.parametrize(
    ("low", "high"), [(0.2, 1.0), (0.0, 0.1), (0.12, 0.1)]
  )
  def test_refuses_bounds_no_mixture_keeps(self, low, high):
    cfg = dataclasses.replace(CFG, min_prob=low, max_prob=high)
    with pytest.raises(UserError, match=r"min_prob may be at most 0\.1667"):
      cfg.check(K)

  def test_bounds_count_allowed_configurations(self):
    cfg = dataclasses.replace(CFG, min_prob=0.15, max_prob=0.4)
    cfg.check(K)
    with pytest.raises(UserError, match="of 2 configurations"):
      init(cfg, probs=[0.5, 0.5, 0, 0, 0, 0])

  @pytest.mark.parametrize(
    ("probs", "message"),
    [
      ([0.0] * K, "all probabilities of the mixture are 0"),
      ([1.0] * (K - 1) + [-1.0], "none may be negative"),
      ([1.0] * (K - 1) + [math.nan], "finite"),
      ([0.5, 0.5], "2 probabilities for 6 configurations"),
    ],
  )
  def test_refuses_weights(self, probs, message):
    with pytest.raises(UserError, match=message) as caught:
      init(probs=probs)
    assert "\n" not in str(caught.value)

  def test_refuses_classes_with_gaps(self):
    with pytest.raises(ValueError, match=r"classes \[0, 2\]"):
      controller.init_state(CFG, jax.random.key(0), classes=(0, 2), capacity=1)


def init(cfg=CFG, *, capacity=12, probs=None):
  return controller.init_state(
    cfg,
    jax.random.key(0),
    classes=CLASSES,
    capacity=capacity,
    probs=probs,
  )


def update(state, losses, *, step=LATE, seed=1):
  return controller.update(
    CFG,
    state,
    np.asarray(losses, np.float32),
    step=step,
    num_steps=NUM_STEPS,
    key=jax.random.key(seed),
    classes=CLASSES,
  )


LOSSES = np.linspace(2, 3, K)


@pytest.fixture(scope="module")
def fresh():
  return init()


@pytest.fixture(scope="module")
def first(fresh):
  return update(fresh, LOSSES)


@pytest.fixture(scope="module")
def second(first):
  return update(first[0], 0.95 * LOSSES, seed=2)


def assert_mixture(probs):
  probs = np.asarray(probs)
  assert probs.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
  assert (probs >= np.float32(CFG.min_prob)).all()
  assert (probs <= np.float32(CFG.max_prob)).all()


class TestUpdate:
  def test_starts_class_uniform(self, fresh):
    np.testing.assert_array_equal(fresh.action, class_uniform(CLASSES))

  def test_starts_with_the_given_weights(self):
    state = init(probs=[2, 2, 1, 1, 1, 1])
    np.testing.assert_allclose(state.action, np.array([2, 2, 1, 1, 1, 1]) / 8)

  def test_without_history(self, fresh, first):
    state, probs, facts = first
    assert_mixture(probs)
    assert state.count == 0
    assert state.evaluations == 1
    chex.assert_trees_all_equal(state.params, fresh.params)
    for name in ("reward", "total_reward", "predicted", "expected", "fit_loss"):
      assert np.isnan(facts[name]).all()

  def test_history_row(self, first, second):
    """Losses before, the mixture then in force, the reward it earned."""
    state, probs, facts = second
    assert_mixture(probs)
    assert state.count == 1
    np.testing.assert_array_equal(state.losses[0], np.float32(LOSSES))
    np.testing.assert_array_equal(state.actions[0], first[1])
    wanted = controller.reward(jnp.float32(LOSSES), jnp.float32(0.95 * LOSSES))
    np.testing.assert_allclose(state.rewards[0], wanted, rtol=1e-4)
    np.testing.assert_array_equal(facts["reward"], state.rewards[0])
    np.testing.assert_allclose(
      facts["class_reward"],
      controller.class_rewards(wanted, CLASSES),
      rtol=1e-4,
    )
    assert facts["total_reward"] == pytest.approx(
      float(np.sum(facts["class_reward"])), rel=1e-5
    )
    assert facts["fit_loss"][1] < facts["fit_loss"][0]
    np.testing.assert_array_equal(state.action, probs)

  def test_expectation_is_compared_at_the_next_evaluation(self, second):
    state, _, facts = second
    _, _, later = update(state, 0.9 * LOSSES, seed=3)
    np.testing.assert_array_equal(later["predicted"], facts["expected"])
    assert later["predicted_total"] == facts["expected_total"]
    assert np.isfinite(later["predicted_class"]).all()
    assert later["predicted_total"] == pytest.approx(
      float(np.sum(later["predicted_class"])), rel=1e-4, abs=1e-6
    )

  def test_same_key_same_bits(self, first, second):
    again = update(first[0], 0.95 * LOSSES, seed=2)
    chex.assert_trees_all_equal(again, second)
    other = update(first[0], 0.95 * LOSSES, seed=3)
    assert not np.array_equal(other[1], second[1])

  def test_warm_up_keeps_the_mixture(self, fresh):
    state, probs, facts = update(fresh, LOSSES, step=CFG.warmup_end - 1)
    np.testing.assert_array_equal(probs, fresh.action)
    assert not facts["explored"]
    state, probs, _ = update(state, 0.95 * LOSSES, step=CFG.warmup_end - 1)
    np.testing.assert_array_equal(probs, fresh.action)
    assert state.count == 1  # it learns already

  def test_explored_action_is_the_one_in_force(self, second):
    """It is not ranked against candidates."""
    for seed in range(5):
      state, probs, facts = update(
        second[0], 0.9 * LOSSES, step=EARLY, seed=seed
      )
      assert facts["explored"]
      assert_mixture(probs)
      np.testing.assert_array_equal(state.action, probs)
      shares = np.sort(np.bincount(CLASSES, probs))
      assert shares[0] < 0.06  # it was not picked
      assert shares[1:].sum() > 0.94
    assert not second[2]["explored"]

  @pytest.mark.parametrize("step", [EARLY, LATE])
  def test_zero_stays_zero(self, step):
    state = init(probs=[1, 0, 1, 1, 0, 0])
    for i in range(3):
      state, probs, _ = update(state, (1 - 0.05 * i) * LOSSES, step=step)
      np.testing.assert_array_equal(probs[np.array([1, 4, 5])], 0)
      assert probs.sum() == pytest.approx(1, abs=1e-6)
      assert (probs[np.array([0, 2, 3])] >= np.float32(CFG.min_prob)).all()

  @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
  def test_bad_losses_do_no_harm(self, second, bad):
    state = second[0]
    one_bad = np.where(np.arange(K) == 1, bad, LOSSES)
    for losses in (np.full(K, bad), one_bad, LOSSES):
      state, probs, _ = update(state, losses)
      assert_mixture(probs)
      chex.assert_tree_all_finite(state)

  def test_full_history_drops_the_oldest(self):
    state = init(capacity=2)
    for i in range(4):
      state, _, _ = update(state, (1 - 0.02 * i) * LOSSES)
    assert state.count == 2
    np.testing.assert_allclose(
      state.losses, [0.98 * LOSSES, 0.96 * LOSSES], rtol=1e-6
    )

  def test_refuses_losses_of_another_number(self, fresh):
    with pytest.raises(ValueError, match=r"\(5,\); expected \(6,\)"):
      update(fresh, LOSSES[1:])

  def test_types_never_change(self, fresh, second):
    """Neither shapes nor weak types: one compilation, one checkpoint layout."""
    before, after = (
      jax.tree.map(jax.typeof, state) for state in (fresh, second[0])
    )
    assert before == after

  def test_saved_and_restored(self, second, tmp_path):
    state = second[0]
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / "state", state)
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(init))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(
      update(jax.tree.map(np.asarray, restored), 0.9 * LOSSES),
      update(state, 0.9 * LOSSES),
    )


def test_learns_a_bandit():
  """Losses fall by the probability of configuration 2, and by nothing else.

  It explores four times, then chooses. A controller with the reward's sign
  wrong moves away from 2.
  """
  best = 2
  state, losses, chosen = init(), LOSSES, []
  probs = np.asarray(state.action)
  for i in range(10):
    state, probs, _ = update(
      state, losses, step=EARLY if i < 5 else LATE, seed=i
    )
    losses = losses * (1 - 0.12 * float(probs[best]))
    chosen.append(float(probs[best]))
  assert np.mean(chosen[-3:]) > 0.7
