"""Which mixtures are proposed, chosen, explored; their bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie import controller, proposals

CLASSES = (0, 0, 1, 2, 2, 2)
K = len(CLASSES)
ALL = jnp.ones(K, bool)
SOME = jnp.array([True, False, False, True, True, False])


def propose(kind, *, classes=CLASSES, allowed=ALL, count=2048, seed=0):
  k = len(classes)
  return np.asarray(
    proposals.propose(
      jax.random.key(seed),
      jnp.full(k, 1 / k),
      allowed=allowed,
      classes=classes,
      kind=kind,
      count=count,
    )
  )


class TestProposals:
  @pytest.mark.parametrize("kind", proposals.PROPOSALS)
  @pytest.mark.parametrize("allowed", [ALL, SOME], ids=["all", "some"])
  def test_candidates_are_mixtures(self, kind, allowed):
    candidates = propose(kind, allowed=allowed, count=501)
    assert candidates.shape == (501, K)
    assert (candidates >= 0).all()
    np.testing.assert_allclose(candidates.sum(1), 1, atol=1e-6)
    assert (candidates[:, ~np.asarray(allowed)] == 0).all()
    assert len(np.unique(candidates, axis=0)) == 501

  def test_only_mixed_reaches_peaked_mixtures(self):
    """With 96 configurations a class at 60 % is out of uniform's reach."""
    classes = tuple(i // 12 for i in range(96))
    members = np.eye(8)[list(classes)]
    highest = {
      kind: (
        propose(kind, classes=classes, allowed=jnp.ones(96, bool)) @ members
      ).max()
      for kind in proposals.PROPOSALS
    }
    assert highest["uniform"] < 0.25
    assert highest["mixed"] > 0.8

  def test_uniform_is_normalized_uniform_numbers(self):
    """Every entry has mean 1 / k; the largest is far below a Dirichlet's."""
    candidates = propose("uniform")
    np.testing.assert_allclose(candidates.mean(0), 1 / K, rtol=0.05)
    assert candidates.max() < 0.75

  @pytest.mark.parametrize("best", range(K))
  def test_choice_concentrates_on_what_is_predicted_best(self, best):
    """A stub predictor: the total is the probability of one configuration."""
    candidates = jnp.asarray(propose("mixed"))
    weights = jnp.asarray(controller.class_weights(CLASSES))
    predicted = jnp.zeros_like(candidates).at[:, best].set(candidates[:, best])
    action = np.asarray(
      proposals.choose(candidates, predicted, weights=weights, top_k=8)
    )
    assert action[best] > 0.9
    assert action.sum() == pytest.approx(1, abs=1e-6)

  def test_choice_is_the_mean_of_the_best(self):
    candidates = jnp.eye(4)
    predicted = jnp.array([[0, 1.0], [3, 0], [0, 5], [0, 2]])
    weights = jnp.array([1.0, 0.5])  # totals .5, 3, 2.5, 1
    action = proposals.choose(candidates, predicted, weights=weights, top_k=2)
    np.testing.assert_array_equal(action, [0, 0.5, 0.5, 0])

  def test_exploration_picks_one_or_two_classes(self):
    seen = set()
    explore = jax.jit(lambda key: proposals.explore(key, ALL, classes=CLASSES))
    for seed in range(40):
      action = np.asarray(explore(jax.random.key(seed)))
      assert action.sum() == pytest.approx(1, abs=1e-6)
      assert (action > 0).all()
      shares = np.bincount(CLASSES, action)
      # A class that was not picked has its part of 5 %.
      others = [
        s for s in shares if np.isclose(s, 0.05) or np.isclose(s, 0.025)
      ]
      seen.add((3 - len(others), int(shares.argmax())))
    assert {number for number, _ in seen} == {1, 2}
    assert {largest for _, largest in seen} == {0, 1, 2}

  def test_exploration_keeps_to_what_is_allowed(self):
    explore = jax.jit(lambda key: proposals.explore(key, SOME, classes=CLASSES))
    for seed in range(20):
      action = np.asarray(explore(jax.random.key(seed)))
      assert (action[~np.asarray(SOME)] == 0).all()
      assert action.sum() == pytest.approx(1, abs=1e-6)

  def test_exploration_of_a_single_class(self):
    action = proposals.explore(
      jax.random.key(0), jnp.ones(3, bool), classes=(0, 0, 0)
    )
    assert action.sum() == pytest.approx(1, abs=1e-6)


class TestBounds:
  @pytest.mark.parametrize(
    ("probs", "low", "high", "wanted"),
    [
      ([0.97, 0.01, 0.01, 0.01], 0.05, 1.0, [0.85, 0.05, 0.05, 0.05]),
      ([0.7, 0.2, 0.1], 0.0, 0.5, [0.5, 0.3, 0.2]),
      ([0.7, 0.2, 0.1], 0.0, 1.0, [0.7, 0.2, 0.1]),
      ([1.0, 0.0], 0.5, 0.5, [0.5, 0.5]),
      ([1.0, 0.0, 0.0, 0.0], 0.1, 0.4, [0.4, 0.2, 0.2, 0.2]),
    ],
  )
  def test_known_answers(self, probs, low, high, wanted):
    k = len(probs)
    bounded = proposals.apply_bounds(
      jnp.array(probs), jnp.full(k, low), jnp.full(k, high)
    )
    np.testing.assert_allclose(bounded, wanted, atol=1e-6)

  @pytest.mark.parametrize("k", [2, 7, 96])
  def test_keeps_bounds_exactly(self, k):
    low, high = jnp.full(k, 0.3 / k), jnp.full(k, 3 / k)
    bound = jax.jit(proposals.apply_bounds)
    for seed in range(20):
      probs = jax.random.dirichlet(jax.random.key(seed), jnp.full(k, 0.1))
      bounded = np.asarray(bound(probs, low, high))
      assert (bounded >= low).all()
      assert (bounded <= high).all()
      assert np.sum(bounded, dtype=np.float64) == pytest.approx(1, abs=1e-6)
