"""Inter-domain mixup: who is mixed with whom, how much, and the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from udim.objectives import make_objective

KEY = jax.random.key(0)
close = functools.partial(np.testing.assert_allclose, rtol=1e-12)


def steps(kernel, batch, keys, alpha):
  """A step of a linear model for each key: its outcome, with the images that
  the model got, [s, n, ...], in the place of batch statistics.
  """
  objective = make_objective("mixup", {"alpha": alpha})
  domains = len(batch["label"])

  def tell(kernel, images, key):
    del key
    rows = images.reshape(-1, domains, images.shape[-1])
    return images, images @ kernel, jnp.swapaxes(rows, 0, 1)

  step = functools.partial(objective.loss, tell, kernel, batch, memory={})
  return jax.jit(jax.vmap(lambda key: step(key=key, step=0)))(keys)


def test_the_domains_are_paired_in_a_circle():
  """Images that tell their domain and their place."""
  s, n, draws = 4, 6, 40
  domain = np.broadcast_to(np.eye(s)[:, None], (s, n, s))
  place = np.broadcast_to(np.eye(n), (s, n, n))
  images = jnp.float32(np.concatenate([domain, place], -1))
  batch = {"image": images, "label": jnp.zeros((s, n), jnp.int32)}
  outcome = steps(jnp.eye(s + n), batch, jax.random.split(KEY, draws), 5.0)
  got = np.asarray(outcome.batch_stats)
  close(got[..., s:], np.broadcast_to(place, (draws, s, n, n)), rtol=1e-6)
  shares = got[:, :, 0, :s]  # [draw, domain, share of each domain]
  same = np.broadcast_to(shares[:, :, None], (draws, s, n, s))
  np.testing.assert_array_equal(got[..., :s], same)
  assert shares.min() >= 0
  close(shares.sum(-1), np.ones((draws, s)), rtol=1e-6)
  circles = set()
  for others in np.where(np.eye(s), 0, shares):
    assert np.count_nonzero(others) == s
    circle = [0]
    while (following := int(others[circle[-1]].argmax())) not in circle:
      circle.append(following)
    assert following == 0
    assert len(circle) == s
    circles.add(tuple(circle))
  assert len(circles) == 6  # all of them
  # A share for each pair and step.
  assert len(np.unique(shares[:, np.arange(s), np.arange(s)])) == draws * s


def cross_entropy(logits, target):
  return np.log(np.exp(logits).sum()) - target @ logits


@pytest.mark.parametrize(("s", "soft"), [(1, False), (2, True), (3, False)])
def test_the_loss_is_the_mixed_loss_of_mixed_images(s, soft):
  n, p, k = 6, 4, 3
  rng = np.random.default_rng(0)
  kernel, clean = rng.normal(size=(p, k)), rng.normal(size=(s, n, p))
  labels = rng.integers(k, size=(s, n), dtype=np.int32)
  if soft:
    labels = rng.dirichlet(np.ones(k), size=(s, n))
  with jax.enable_x64(True):
    batch = {"image": jnp.asarray(clean), "label": jnp.asarray(labels)}
    outcome = steps(kernel, batch, KEY[None], alpha=0.5)
    outcome = jax.tree.map(lambda x: np.asarray(x)[0], outcome)
  images = outcome.batch_stats
  targets = labels if soft else np.eye(k)[labels]
  expected, shares = [], set()
  for e, i in np.ndindex(s, n):
    # The partner and the share that explain the mixed image.
    for other in np.ndindex(1, n) if s == 1 else ((f, i) for f in range(s)):
      along, moved = (x[e, i] - clean[other] for x in (clean, images))
      share = moved @ along / max(along @ along, 1e-30)
      if np.allclose(moved, share * along, rtol=0, atol=1e-12):
        break
    else:
      raise AssertionError(f"image {i} of domain {e} is no mixture")
    assert 0 <= share <= 1
    logits = images[e, i] @ kernel
    expected.append(
      share * cross_entropy(logits, targets[e, i])
      + (1 - share) * cross_entropy(logits, targets[other])
    )
    if share < 1 - 1e-9:  # no partner of its own
      shares.add(round(share, 9))
  assert len(shares) == s  # one for each domain
  assert set(outcome.metrics) == {"loss"}
  assert outcome.loss == outcome.metrics["loss"]
  close(outcome.loss, np.mean(expected), rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.2, 5.0])
def test_shares_are_drawn_from_a_beta_distribution(alpha):
  images = jnp.stack([jnp.ones((1, 1)), jnp.zeros((1, 1))])
  batch = {"image": images, "label": jnp.zeros((2, 1), jnp.int32)}
  outcome = steps(jnp.ones((1, 2)), batch, jax.random.split(KEY, 4000), alpha)
  shares = np.asarray(outcome.batch_stats)[:, 0]
  # Three standard errors of 4000 draws, or more.
  close(shares.mean(), 0.5, atol=0.025)
  close(shares.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.1)
