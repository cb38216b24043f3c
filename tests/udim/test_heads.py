"""Heads and losses of any kind: gradients by sample inside a UDIM step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from common.errors import UserError
from common.parallel import make_mesh
from udim import UdimConfig, udim, udim_grads, udim_passes

X64 = jax.enable_x64
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def data(*, domains=2, labels="classes"):
  """Parameters of a network with a linear head and one of two layers, and a
  batch of 6 images a domain.
  """
  rng = np.random.default_rng(3)
  params = {
    "hidden": 0.5 * rng.normal(size=(5, 4)),
    "head": {
      "kernel": rng.normal(size=(4, 3)), "bias": 0.1 * rng.normal(size=3)
    },
    "deep": {"first": rng.normal(size=(4, 4)), "last": rng.normal(size=4)},
  }  # fmt: skip
  batch = {
    "image": rng.normal(size=(domains, 6, 5)),
    "label": rng.integers(3, size=(domains, 6))
    if labels == "classes"
    else rng.normal(size=(domains, 6)),
  }
  return jax.tree.map(jnp.asarray, (params, batch))


def features_of(params, images):
  return jnp.tanh(images @ params["hidden"])


def apply_fn(variables, images, *, train, rngs):
  del train, rngs
  params = variables["params"]
  features = features_of(params, images)
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  return features, logits, {}


def cross_entropy(head, features, label):
  logits = features @ head["kernel"] + head["bias"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def squared_error(head, features, target):
  """A head of two layers, for regression."""
  hidden = jnp.sin(features @ head["first"])
  return jnp.square(hidden @ head["last"] - target)


@pytest.mark.parametrize(
  ("accum", "chunk", "settings"),
  [
    (1, None, {}),
    (1, 2, {}),
    (1, 3, {"data_grad": "exact", "detach_source": True}),
    (1, 3, {"mode": "perturbed_loss", "term_images": 3}),
    (2, None, {"data_grad": "plain", "domain_reduce": "mean"}),
    (2, 1, {}),
  ],
)
def test_stated_as_a_loss_the_linear_head_gives_the_same(
  accum, chunk, settings
):
  cfg = UdimConfig(rho_x=0.5, lambda1=2.0, **settings)
  grads_of = functools.partial(udim_grads, apply_fn, "head", cfg, accum=accum)
  with X64(True):
    params, batch = data()
    closed = jit(grads_of())(params, batch, None, 0)
    by_sample = jit(grads_of(head_loss=cross_entropy, chunk=chunk))(
      params, batch, None, 0
    )
  chex.assert_trees_all_close(by_sample, closed, rtol=0, atol=1e-12)
  assert float(closed[1]["metrics"]["term_grad_norm"]) > 0.01


def inconsistency(params, images, perturbed, targets):
  """pen + gn of the head of two layers, from the definition."""

  def by_sample(images):
    grads = jax.vmap(jax.grad(squared_error), (None, 0, 0))(
      params["deep"], features_of(params, images), targets
    )
    return [leaf.reshape(len(images), -1) for leaf in jax.tree.leaves(grads)]

  arrays, twins = by_sample(images), by_sample(perturbed)
  gradients = jnp.concatenate(arrays, axis=1)
  mean = gradients.mean(0)[None]
  distance = jnp.square(gradients - mean).mean(0) - jnp.square(
    jnp.concatenate(twins, axis=1) - mean
  ).mean(0)
  norms = sum(jnp.square(twin).mean() for twin in twins)
  return jnp.square(distance).mean() / 4 + norms


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_deep_head_and_a_regression(chunk):
  """The added term against the definition, sample by sample."""
  cfg = UdimConfig(rho_x=0.5, data_grad="plain")
  passes_of = udim_passes(
    apply_fn, "deep", cfg, head_loss=squared_error, chunk=chunk
  )

  def loss(params, images, targets):
    features = features_of(params, images)
    losses = jax.vmap(squared_error, (None, 0, 0))(
      params["deep"], features, targets
    )
    return losses.mean()

  @jit
  def found(params, batch):
    passes = passes_of(params, batch, None, 0)
    data_grad = passes.data_grad_fn(params, None)
    term, metrics = passes.inconsistency_grad_fn(params, data_grad)
    return passes.grads, passes.aux["metrics"]["loss"], term, metrics

  @jit
  def expected(params, images, targets):
    value, grads = jax.value_and_grad(loss)(params, images, targets)
    upward = jax.grad(loss, argnums=1)(params, images, targets)
    length = jnp.linalg.norm(upward, axis=1, keepdims=True)
    perturbed = images + 0.5 * upward / length
    return (
      grads,
      value,
      jax.value_and_grad(inconsistency)(params, images, perturbed, targets),
    )

  with X64(True):
    params, batch = data(domains=1, labels="targets")
    grads, value, term, metrics = found(params, batch)
    images, targets = batch["image"][0], batch["label"][0]
    their_grads, their_value, (ilc, gradient) = expected(
      params, images, targets
    )
  assert float(value) == pytest.approx(float(their_value), abs=1e-12)
  assert float(metrics["ilc"]) == pytest.approx(float(ilc), rel=1e-9)
  chex.assert_trees_all_close(
    (grads, term), (their_grads, gradient), rtol=1e-8, atol=1e-12
  )


def test_one_device_and_eight():
  """Moments by sample of a batch that is sharded along its images."""
  cfg = UdimConfig(rho_x=0.5)
  grads_of = jax.jit(
    udim_grads(apply_fn, "deep", cfg, head_loss=squared_error, chunk=4)
  )
  params, batch = data(labels="targets")
  batch = jax.tree.map(
    lambda x: jnp.tile(x, (1, 4, *[1] * (x.ndim - 2))), batch
  )
  alone = grads_of(params, batch, None, 0)
  rows = NamedSharding(make_mesh({"data": 8}), jax.P(None, "data"))
  sharded = grads_of(params, jax.device_put(batch, rows), None, 0)
  chex.assert_trees_all_close(sharded, alone, rtol=1e-5, atol=1e-6)


def test_it_learns_in_a_loop():
  """A regression with a deep head, as a user would write it."""
  cfg = UdimConfig(rho=0.01, rho_x=0.1, lambda1=1e-3)
  tx = udim(optax.adam(2e-2), cfg)
  passes_of = udim_passes(apply_fn, "deep", cfg, head_loss=squared_error)

  @jax.jit
  def step(params, state, batch):
    passes = passes_of(params, batch, None, state.count)
    updates, state = tx.update(passes.grads, state, params, **passes.fns)
    return optax.apply_updates(params, updates), state

  params, batch = data(labels="targets")
  state, losses = tx.init(params), []
  for _ in range(100):
    params, state = step(params, state, batch)
    losses.append(float(state.metrics["loss"]))
  assert losses[-1] < losses[0] / 4


def call(**settings):
  params, batch = data()
  smoothing = {"label_smoothing": settings.pop("label_smoothing", 0.0)}
  path = settings.pop("path", "head")
  grads_of = udim_grads(apply_fn, path, UdimConfig(**smoothing), **settings)
  return grads_of(params, batch, None, 0)


@pytest.mark.parametrize(
  ("settings", "match"),
  [
    ({"chunk": 2}, "chunk=2 is for a head_loss"),
    (
      {"head_loss": cross_entropy, "label_smoothing": 0.1},
      "smooth the labels in head_loss",
    ),
    ({"head_loss": cross_entropy, "chunk": 4}, "chunk=4 does not divide"),
    ({"head_loss": cross_entropy, "path": "haed"}, "'haed' has no parameters"),
    ({"path": "deep"}, "'deep' has no kernel and bias"),
    (
      {"head_loss": lambda head, features, label: features},
      r"head_loss gives \[4\] for one sample",
    ),
  ],
)
def test_mistakes_are_one_line(settings, match):
  with pytest.raises(UserError, match=match):
    call(**settings)
