"""THOR's objective against numbers worked out by hand, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from thor.losses import (
  cross_entropy_loss,
  log_probs,
  smoothed_cross_entropy,
  symmetric_kl,
  thor_loss,
)

PAD = 1


def of_probabilities(*values):
  return jnp.log(jnp.float32(values))


@pytest.mark.parametrize(
  ("first", "second", "expected"),
  [
    (of_probabilities(0.5, 0.5), of_probabilities(0.9, 0.1), 0.439444915),
    (
      of_probabilities(0.7, 0.2, 0.1),
      of_probabilities(0.1, 0.2, 0.7),
      1.167546089,
    ),
    (jnp.float32([1, 2, 3]), jnp.float32([3, 2, 1]), 1.150420765),
  ],
)
def test_the_divergence(first, second, expected):
  found = symmetric_kl(log_probs(first), log_probs(second))
  assert float(found) == pytest.approx(expected, rel=1e-6)
  again = symmetric_kl(log_probs(second), log_probs(first))
  assert float(again) == pytest.approx(expected, rel=1e-6)
  same = symmetric_kl(log_probs(first), log_probs(first))
  assert float(same) == 0


def test_label_smoothing_is_fairseqs():
  logits, target = jnp.float32([2, 1, 0, -1]), jnp.int32(0)
  plain = smoothed_cross_entropy(log_probs(logits), target, 0.0)
  smoothed = smoothed_cross_entropy(log_probs(logits), target, 0.1)
  assert float(plain) == pytest.approx(0.440189699, abs=1e-7)
  assert float(smoothed) == pytest.approx(0.640189699, abs=1e-7)


def test_one_token_of_three_words():
  logits1, logits2 = jnp.float32([[[2, 0, -1]]]), jnp.float32([[[1, 1, 0]]])
  loss, parts = thor_loss(
    logits1, logits2, jnp.int32([[0]]), pad_id=PAD, label_smoothing=0.1,
    alpha=5.0,
  )  # fmt: skip
  assert float(parts["ce1"].value()) == pytest.approx(0.419846020, abs=1e-6)
  assert float(parts["ce2"].value()) == pytest.approx(0.911994804, abs=1e-6)
  assert float(parts["skl"].value()) == pytest.approx(0.421475936, abs=1e-6)
  assert float(loss) == pytest.approx(3.439220505, abs=2e-6)


def batch(seed=0, shape=(3, 4), vocab=7):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(2, *shape, vocab))
  targets = rng.integers(2, vocab, size=shape)
  targets[0, 2:] = targets[2, 1:] = PAD
  return jnp.float32(logits[0]), jnp.float32(logits[1]), jnp.int32(targets)


def test_padding_adds_nothing_whatever_stands_there():
  logits1, logits2, targets = batch()
  loss, parts = thor_loss(logits1, logits2, targets, pad_id=PAD)
  padding = (targets == PAD)[..., None]
  spoilt = jnp.where(padding, jnp.nan, logits1)
  again, _ = thor_loss(spoilt, logits2, targets, pad_id=PAD)
  assert float(again) == float(loss)
  assert int(parts["skl"].count) == int(jnp.sum(targets != PAD)) == 7


def test_the_sum_is_over_tokens_counted_once():
  """CE1 + CE2 + alpha SKL for each token, from NumPy."""
  logits1, logits2, targets = batch()
  loss, _ = thor_loss(
    logits1, logits2, targets, pad_id=PAD, label_smoothing=0.2, alpha=3.0
  )
  total, count = 0.0, 0
  for one, two, target in zip(
    np.float64(logits1).reshape(-1, 7),
    np.float64(logits2).reshape(-1, 7),
    np.asarray(targets).ravel(),
  ):
    if target == PAD:
      continue
    lp1, lp2 = (x - np.log(np.exp(x).sum()) for x in (one, two))
    for lp in (lp1, lp2):
      spread = 0.2 / 6
      total += (1 - 0.2 - spread) * -lp[target] - spread * lp.sum()
    total += 3.0 * ((np.exp(lp1) - np.exp(lp2)) * (lp1 - lp2)).sum() / 2
    count += 1
  assert float(loss) == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("size", [500.0, 1e4])
def test_extreme_logits_stay_finite(size):
  """The authors' log of a softmax is infinite from a gap of about 103."""
  logits1 = jnp.float32([[[size, -size, 0.0]]])
  targets = jnp.int32([[2]])

  def loss(logits1, logits2):
    return thor_loss(logits1, logits2, targets, pad_id=PAD)[0]

  value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(logits1, -logits1)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(g)) for g in gradients)


def test_equal_passes_are_twice_the_cross_entropy():
  logits, _, targets = batch()
  loss, parts = thor_loss(logits, logits, targets, pad_id=PAD, alpha=5.0)
  single, _ = cross_entropy_loss(logits, targets, pad_id=PAD)
  assert float(loss) == pytest.approx(2 * float(single), rel=1e-6)
  assert float(parts["skl"].total) == 0


def test_gradients_flow_into_both_passes():
  logits1, logits2, targets = batch()

  def agreement(logits1, logits2):
    _, parts = thor_loss(logits1, logits2, targets, pad_id=PAD)
    return parts["skl"].total

  first, second = jax.grad(agreement, argnums=(0, 1))(logits1, logits2)
  assert float(jnp.abs(first).max()) > 0.01
  assert float(jnp.abs(second).max()) > 0.01


def test_bfloat16_logits_are_reduced_in_float32():
  logits1, logits2, targets = batch()
  narrow = [x.astype(jnp.bfloat16) for x in (logits1, logits2)]
  wide = [x.astype(jnp.float32) for x in narrow]
  found, expected = (
    thor_loss(*pair, targets, pad_id=PAD)[0] for pair in (narrow, wide)
  )
  assert found.dtype == jnp.float32
  assert float(found) == float(expected)


def test_a_batch_of_padding_is_no_loss():
  logits1, logits2, targets = batch()
  loss, _ = thor_loss(logits1, logits2, jnp.full_like(targets, PAD), pad_id=PAD)
  assert float(loss) == 0


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda a, b, t: (a, b[:2], t), r"\[3, 4, 7\] and \[2, 4, 7\]"),
    (lambda a, b, t: (a, b, t[:, :2]), r"targets of \[3, 2\]"),
  ],
)
def test_shapes_that_do_not_fit(change, message):
  with pytest.raises(UserError, match=message):
    thor_loss(*change(*batch()), pad_id=PAD)


def test_a_smoothing_of_one_is_refused():
  with pytest.raises(UserError, match=r"label_smoothing=1\.0"):
    cross_entropy_loss(batch()[0], batch()[2], pad_id=PAD, label_smoothing=1.0)
