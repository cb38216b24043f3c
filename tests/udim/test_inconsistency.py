"""The head's statistics: known answers, definitions, and exact accumulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from udim import (
  Moments,
  accumulated_gradient,
  head_inconsistency,
  head_moments,
  moments_inconsistency,
  per_sample_moments,
)

X64 = jax.enable_x64


def fixture():
  """Features of both halves and a head, in closed form."""
  row, column = np.arange(4.0)[:, None], np.arange(3.0)[None, :]
  return (
    np.sin(0.7 * row + 0.3 * column) + 0.5,
    np.cos(0.5 * row - 0.2 * column) + 0.2,
    0.3 * np.sin(1 + 0.4 * row[:3] + 0.9 * column),
    0.1 * np.arange(3.0),
    (3 * np.arange(4) + 1) % 3,
  )


def random_halves(n=12, d=5, k=4, seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(n, d)),
    rng.normal(size=(n, d)),
    rng.normal(size=(d, k)),
    rng.normal(size=k),
    rng.integers(k, size=n),
  )


def as_arrays(values):
  return tuple(jnp.asarray(value) for value in values)


def softmax(logits):
  exp = np.exp(logits - logits.max(-1, keepdims=True))
  return exp / exp.sum(-1, keepdims=True)


def by_definition(source, perturbed, weight, bias, labels):
  """NumPy, a gradient for each sample; the variances' distance to their
  midpoint, as the authors have it.
  """
  targets = np.eye(len(bias))[labels] if labels.ndim == 1 else labels
  grads = []
  for features in (source, perturbed):
    delta = softmax(features @ weight + bias) - targets
    of_weight = features[:, :, None] * delta[:, None, :]
    grads.append((of_weight.reshape(len(delta), -1), delta))
  joined = [np.concatenate(g, axis=1) for g in grads]
  mean = joined[0].mean(axis=0)
  variances = [np.mean((g - mean) ** 2, axis=0) for g in joined]
  middle = sum(variances) / 2
  pen = np.mean([np.mean((v - middle) ** 2) for v in variances])
  gn = sum(np.mean(np.sum(g**2, axis=1)) / g.shape[1] for g in grads[1])
  return {"pen": pen, "gn": gn, "ilc": pen + gn}


def test_the_fixture():
  expected = {
    "pen": 6.220605445540443e-05,
    "gn": 0.3952770667967709,
    "ilc": 0.3953392728512263,
  }
  with X64(True):
    found = head_inconsistency(*as_arrays(fixture()))
    for name, value in expected.items():
      # pen is a mean of squares of differences: relative, a few ulps.
      assert float(found[name]) == pytest.approx(value, rel=1e-14, abs=0)
  source, perturbed, weight, bias, labels = fixture()
  losses = [
    -np.log(softmax(h @ weight + bias)[np.arange(4), labels]).mean()
    for h in (source, perturbed)
  ]
  np.testing.assert_allclose(losses, [0.9783442772, 0.9958239869], atol=6e-11)


def test_the_variance_is_centred_on_the_sources_mean():
  with X64(True):
    h0, h1, *head = as_arrays(fixture())
    source, own = head_moments(h0, *head), head_moments(h1, *head)
    # Its own mean in the place of the source's makes both variances central.
    centred = [jax.tree.map(lambda a, b: b - a**2, *m) for m in (source, own)]
    zero = jax.tree.map(jnp.zeros_like, source.m1)
    wrong = moments_inconsistency(*(Moments(zero, v) for v in centred))
    assert float(wrong["pen"]) == pytest.approx(2.467e-06, rel=1e-3)


LABELS = {
  "hard": lambda labels, k: labels,
  "soft": lambda labels, k: softmax(np.cos(np.arange(len(labels) * k))
                                    .reshape(-1, k)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_closed_form_is_the_definition(kind, smoothing):
  *halves, bias, labels = random_halves()
  labels = LABELS[kind](labels, len(bias))
  targets = np.eye(len(bias))[labels] if kind == "hard" else labels
  targets = (1 - smoothing) * targets + smoothing / len(bias)
  expected = by_definition(*halves, bias, targets)
  with X64(True):
    arrays = as_arrays((*halves, bias, labels))
    found = head_inconsistency(*arrays, label_smoothing=smoothing)
    for name, value in expected.items():
      assert float(found[name]) == pytest.approx(value, rel=1e-12)


def per_sample_loss(smoothing):
  def loss(params, example):
    features, label = example
    logits = features @ params["kernel"] + params["bias"]
    if jnp.issubdtype(label.dtype, jnp.integer):
      label = jax.nn.one_hot(label, logits.shape[0])
    return optax.softmax_cross_entropy(
      logits, optax.smooth_labels(label, smoothing)
    )

  return loss


@pytest.mark.parametrize(
  ("kind", "smoothing", "chunk"),
  [("hard", 0.0, None), ("hard", 0.1, 3), ("soft", 0.0, 1)],
)
def test_closed_form_is_the_gradient_by_sample(kind, smoothing, chunk):
  """Values and gradients, with respect to features and head alike."""

  def closed(h0, h1, weight, bias, labels):
    return head_inconsistency(
      h0, h1, weight, bias, labels, label_smoothing=smoothing
    )

  def generic(h0, h1, weight, bias, labels):
    head = {"kernel": weight, "bias": bias}
    loss = per_sample_loss(smoothing)
    terms = moments_inconsistency(
      *(
        per_sample_moments(loss, head, (h, labels), chunk=chunk)
        for h in (h0, h1)
      )
    )
    return terms | {"ilc": terms["pen"] + terms["gn"]}

  with X64(True):
    *arrays, labels = random_halves()
    arguments = as_arrays((*arrays, LABELS[kind](labels, 4)))

    @functools.partial(jax.jit, static_argnums=0)
    def both(fn, *arguments):
      gradient = jax.grad(lambda *a: fn(*a)["ilc"], argnums=(0, 1, 2, 3))
      return fn(*arguments), gradient(*arguments)

    found = [jax.tree.leaves(both(fn, *arguments)) for fn in (closed, generic)]
    for one, other in zip(*found):
      np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_equal_halves_have_no_distance_at_all():
  h, _, *head = as_arrays(random_halves())

  def pen(h0, h1):
    return head_inconsistency(h0, h1, *head)["pen"]

  values = jax.jit(jax.value_and_grad(pen, argnums=(0, 1)))(h, h)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(values))


def test_bfloat16_is_summed_in_float32():
  arrays = random_halves(n=64)
  narrow = [jnp.asarray(a, jnp.bfloat16) for a in arrays[:4]]
  wide = [a.astype(jnp.float32) for a in narrow]
  found, expected = (
    head_inconsistency(*a, jnp.asarray(arrays[4])) for a in (narrow, wide)
  )
  for name, value in expected.items():
    assert found[name].dtype == jnp.float32
    assert float(found[name]) == float(value)


def network(seed=0):
  """A network that ends in a head, images and labels."""
  rng = np.random.default_rng(seed)
  params = {
    "hidden": {"kernel": rng.normal(size=(6, 5))},
    "head": {"kernel": rng.normal(size=(5, 4)), "bias": rng.normal(size=4)},
  }
  images, twins = rng.normal(size=(2, 12, 6))
  labels = rng.integers(4, size=12)
  return jax.tree.map(jnp.asarray, (params, (images, twins, labels)))


def features(params, images):
  return jnp.tanh(images @ params["hidden"]["kernel"])


def statistics(params, batch):
  images, twins, labels = batch
  head = params["head"]["kernel"], params["head"]["bias"]
  return tuple(
    head_moments(features(params, x), *head, labels) for x in (images, twins)
  )


def objective(statistics):
  terms = moments_inconsistency(*statistics)
  return terms["pen"] + terms["gn"], terms


@pytest.mark.parametrize("count", [1, 3])
def test_micro_batches_accumulate_exactly(count):
  with X64(True):
    params, batch = network()
    whole = jax.grad(lambda p: objective(statistics(p, batch)), has_aux=True)
    expected, terms = jax.jit(whole)(params)
    batches = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    accumulated = functools.partial(
      accumulated_gradient, statistics, objective=objective
    )
    found_terms, found = jax.jit(accumulated)(params, batches)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
      (terms, expected),
      (found_terms, found),
    )


def test_the_inconsistency_of_micro_batches_is_another():
  with X64(True):
    params, batch = network()
    _, whole = objective(statistics(params, batch))
    halves = [jax.tree.map(lambda x, at=at: x[at::2], batch) for at in (0, 1)]
    parts = [objective(statistics(params, half))[1]["pen"] for half in halves]
    assert abs(sum(parts) / 2 / whole["pen"] - 1) > 0.05


def test_a_subset_of_parameters_is_chosen_by_path():
  with X64(True):
    params, (images, twins, labels) = network()

    def loss(params, example):
      image, label = example
      head = params["head"]
      logits = features(params, image) @ head["kernel"] + head["bias"]
      return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    found = [
      per_sample_moments(
        loss, params, (x, labels), keep=lambda path: path.startswith("head/")
      )
      for x in (images, twins)
    ]
    expected = statistics(params, (images, twins, labels))
    assert found[0].m1["hidden"] == {"kernel": None}
    for one, other in zip(found, expected):
      for mine, closed in zip(one, other):
        for name in ("kernel", "bias"):
          np.testing.assert_allclose(
            mine["head"][name], closed[name], rtol=0, atol=1e-12
          )
    terms, closed = (moments_inconsistency(*m) for m in (found, expected))
    assert float(terms["pen"]) == pytest.approx(float(closed["pen"]), rel=1e-9)
    everything = per_sample_moments(loss, params, (images, labels))
    assert everything.m2["hidden"]["kernel"].shape == (6, 5)


def test_mistakes_are_one_line():
  h0, h1, weight, bias, labels = as_arrays(random_halves())
  head = {"kernel": weight, "bias": bias}
  loss = per_sample_loss(0.0)
  cases = [
    (
      lambda: head_inconsistency(h0[:, :3], h1, weight, bias, labels),
      "[12, 3]",
    ),
    (lambda: head_moments(h0, weight, bias[:2], labels), "bias [2]"),
    (lambda: head_moments(h0, weight, bias, h0), "12, 5"),
    (lambda: per_sample_moments(loss, head, (h0, labels), chunk=5), "chunk=5"),
    (
      lambda: per_sample_moments(
        loss, head, (h0, labels), keep=lambda path: path == "heads"
      ),
      "`keep`",
    ),
  ]
  for call, words in cases:
    with pytest.raises(UserError) as error:
      call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
