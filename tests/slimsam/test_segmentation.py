"""The mask loss: against a loop, known answers, extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam.segmentation import (
  dice_loss,
  focal_loss,
  mask_iou,
  prompt_loss,
)


def loop(logits, target):
  """Focal and dice of one mask, pixel by pixel."""
  focal = both = ours = theirs = 0.0
  for z, t in zip(logits.ravel().astype(float), target.ravel()):
    p = 1 / (1 + np.exp(-z))
    right, weight = (p, 0.25) if t else (1 - p, 0.75)
    focal += -weight * (1 - right) ** 2 * np.log(right)
    both, ours, theirs = both + p * t, ours + p, theirs + t
  return focal / logits.size, 1 - (2 * both + 1) / (ours + theirs + 1)


@pytest.fixture
def case():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (2, 3, 4, 6, 5)).astype(np.float32)
  targets = (rng.random((2, 3, 6, 5)) > 0.6).astype(np.float32)
  return logits, targets


def test_focal_and_dice_are_what_a_loop_finds(case):
  logits, targets = case
  focal, dice = (
    focal_loss(logits[:, :, 0], targets),
    dice_loss(logits[:, :, 0], targets),
  )
  for i in range(2):
    for j in range(3):
      expected = loop(logits[i, j, 0], targets[i, j])
      np.testing.assert_allclose((focal[i, j], dice[i, j]), expected, rtol=1e-5)


def test_the_best_mask_counts_and_all_learn_their_iou(case):
  logits, targets = case
  iou = np.full((2, 3, 4), 0.5, np.float32)
  found = prompt_loss(logits, iou, targets)
  for i in range(2):
    for j in range(3):
      losses = [loop(one, targets[i, j]) for one in logits[i, j]]
      best = min(20 * focal + dice for focal, dice in losses)
      true = [
        np.sum((one > 0) & (targets[i, j] > 0))
        / np.sum((one > 0) | (targets[i, j] > 0))
        for one in logits[i, j]
      ]
      error = np.mean([(0.5 - t) ** 2 for t in true])
      np.testing.assert_allclose(found[i, j], best + error, rtol=1e-5)


def test_known_answers():
  empty, full = jnp.zeros((1, 2, 2)), jnp.ones((1, 2, 2))
  sure = 100.0
  assert mask_iou(-full, empty)[0] == 1  # both are empty
  assert mask_iou(full, empty)[0] == 0
  assert dice_loss(-sure * full, empty)[0] == pytest.approx(0, abs=1e-6)
  assert dice_loss(sure * full, full)[0] == pytest.approx(0, abs=1e-6)
  # p = 1/2 everywhere: 1/4 (1/2)^2 ln 2.
  assert focal_loss(empty, full)[0] == pytest.approx(0.0625 * np.log(2))


@pytest.mark.parametrize("size", [80.0, 1e4])
def test_extreme_logits_have_gradients(size):
  target = jnp.asarray([[[0.0, 1.0], [1.0, 0.0]]])

  def loss(logits):
    return jnp.sum(focal_loss(logits, target) + dice_loss(logits, target))

  for sign in (1, -1):
    value, grad = jax.value_and_grad(loss)(sign * size * (2 * target - 1))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
