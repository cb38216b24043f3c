"""A term of some of the images: which, what it equals, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from udim import UdimConfig, udim_grads, udim_passes

X64 = jax.enable_x64
# Compiles in half the time, and nothing here is large.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def problem():
  """Two domains of 12 images, in NumPy's float64."""
  rng = np.random.default_rng(0)
  params = {
    "hidden": rng.normal(size=(5, 4)),
    "head": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
  }
  batch = {
    "image": rng.normal(size=(2, 12, 5)),
    "label": rng.integers(3, size=(2, 12)),
  }
  return jax.tree.map(jnp.asarray, (params, batch))


def part(batch, stride):
  """Every so-many-th image of each domain."""
  return jax.tree.map(lambda x: x[:, ::stride], batch)


def apply_fn(variables, images, *, train, rngs):
  del train
  params = variables["params"]
  features = jnp.tanh(images @ params["hidden"])
  if "dropout" in rngs:
    keep = jax.random.bernoulli(rngs["dropout"], 0.5, features.shape)
    features = jnp.where(keep, features * 2, 0)
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  return features, logits, {}


def term_at(params, batch, *, accum=1, **settings):
  """Gradient and metrics of the term, its data gradient included."""
  cfg = UdimConfig(rho_x=0.5, **settings)
  passes_of = udim_passes(apply_fn, "head", cfg, accum=accum)

  @jit
  def term(params, batch):
    passes = passes_of(params, batch, None, 0)
    eps = jax.tree.map(lambda p: 0.1 * jnp.cos(7 * p), params)
    ascended = jax.tree.map(jnp.add, params, eps)
    if cfg.data_grad == "fast":
      data_grad = passes.second_pass(ascended)[1]
    else:
      data_grad = passes.data_grad_fn(params, eps)
    return passes.inconsistency_grad_fn(params, data_grad)

  return term(params, batch)


def assert_close(found, expected, atol=1e-12):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
    found,
    expected,
  )


CASES = [
  ({"data_grad": "fast"}, 6, 1),
  ({"data_grad": "exact"}, 4, 1),
  ({"data_grad": "plain"}, 2, 1),
  ({"data_grad": "fast", "normalise": "batch"}, 6, 1),
  ({"data_grad": "exact", "detach_source": True}, 6, 1),
  ({"data_grad": "fast", "mode": "perturbed_loss"}, 3, 1),
  ({"data_grad": "fast", "share_dropout": False}, 6, 1),
  ({"data_grad": "fast"}, 6, 3),
  ({"data_grad": "exact", "normalise": "sign"}, 4, 2),
]


@pytest.mark.parametrize(("settings", "count", "accum"), CASES)
def test_it_is_the_term_of_those_images_alone(settings, count, accum):
  with X64(True):
    params, batch = problem()
    found = term_at(params, batch, term_images=count, accum=accum, **settings)
    expected = term_at(params, part(batch, 12 // count), **settings)
    assert_close(found, expected)


def test_the_rest_of_the_step_uses_all_images():
  with X64(True):
    params, batch = problem()
    small = part(batch, 2)
    runs = {}
    for name, weight, count in (("sam", 0.0, 0), ("part", 2.0, 6)):
      cfg = UdimConfig(
        lambda1=weight, rho_x=0.5, data_grad="plain", term_images=count
      )
      runs[name] = jit(udim_grads(apply_fn, "head", cfg))(
        params, batch, None, 0
      )
    term, metrics = term_at(params, small, data_grad="plain")
    assert_close(
      runs["part"][0],
      jax.tree.map(lambda g, t: g + 2 * t, runs["sam"][0], term),
    )
    found = runs["part"][1]["metrics"]
    for name in ("loss", "sam_loss", "grad_norm"):
      assert_close(found[name], runs["sam"][1]["metrics"][name])
    for name, value in metrics.items():
      assert_close(found[name], value)


def test_all_images_may_be_named():
  with X64(True):
    params, batch = problem()
    assert_close(
      term_at(params, batch, term_images=12), term_at(params, batch), atol=0
    )


@pytest.mark.parametrize("accum", [1, 2])
def test_unmoved_images_under_one_mask_have_no_penalty(accum):
  cfg = UdimConfig(rho_x=0.0, term_images=4)
  grads_of = jax.jit(udim_grads(apply_fn, "head", cfg, accum=accum))
  params, batch = problem()
  _, aux = grads_of(params, batch, jax.random.key(0), 0)
  assert float(aux["metrics"]["pen"]) == 0
  assert float(aux["metrics"]["gn"]) > 0


@pytest.mark.parametrize(
  ("count", "accum", "words"),
  [
    (5, 1, ["term_images=5", "12 images", "0 for all"]),
    (24, 1, ["term_images=24", "12 images"]),
    (3, 2, ["accum=2", "term_images=3", "multiple"]),
    (6, 5, ["accum=5", "12 images"]),
  ],
)
def test_mistakes_are_one_line(count, accum, words):
  cfg = UdimConfig(term_images=count)
  grads_of = udim_grads(apply_fn, "head", cfg, accum=accum)
  with pytest.raises(UserError) as error:
    jax.eval_shape(grads_of, *problem(), None, 0)
  assert all(word in str(error.value) for word in words)
  assert "\n" not in str(error.value)
