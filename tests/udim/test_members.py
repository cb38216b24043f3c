"""UDIM on another member of the SAM family: that member, plus the term."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.optim import (
  asam,
  esam,
  fisher_sam,
  gam,
  gsam,
  look_sam,
  sagm,
  sam,
  sharpness_aware,
)
from udim import UdimConfig, udim, udim_grads, udim_passes

X64 = jax.enable_x64
# Compiles in half the time, and nothing here is large.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def falling(start):
  return optax.linear_schedule(start, 0.0, 10)


FAMILY = {
  "asam": functools.partial(asam, rho=0.7),
  "fisher": fisher_sam,
  "gsam": functools.partial(gsam, rho=falling(0.1), alpha=falling(0.4)),
  "sagm": functools.partial(sagm, rho=0.1, alpha=falling(0.05)),
  "gam": functools.partial(gam, rho=0.1, rho_prime=falling(0.2)),
  "esam": functools.partial(esam, rho=0.1, weight_fraction=0.5, seed=3),
}
NOTHING = optax.identity()
members = pytest.mark.parametrize("name", FAMILY)


def problem():
  rng = np.random.default_rng(0)
  params = {
    "hidden": rng.normal(size=(5, 4)),
    "head": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
  }
  batch = {
    "image": rng.normal(size=(1, 6, 5)),
    "label": rng.integers(3, size=(1, 6)),
  }
  return jax.tree.map(jnp.asarray, (params, batch))


def apply_fn(variables, images, *, train, rngs):
  del train, rngs
  params = variables["params"]
  features = jnp.tanh(images @ params["hidden"])
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  return features, logits, {}


def plain_gradient(batch):
  def loss(params):
    _, logits, _ = apply_fn(
      {"params": params}, batch["image"][0], train=True, rngs={}
    )
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"][0]
    ).mean()

  return jax.grad(loss)


def trained(tx, gradients, steps=4):
  """Parameters after steps; `gradients(params, count)` gives the gradient and
  the keywords of `update`."""

  @jit
  def step(params, state, count):
    grads, extra = gradients(params, count)
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  params, _ = problem()
  state = tx.init(params)
  for count in range(steps):
    params, state = step(params, state, jnp.int32(count))
  return params


@members
def test_without_the_term_it_is_that_member(name):
  make = FAMILY[name]
  base = optax.sgd(0.5, momentum=0.9)
  cfg = UdimConfig(lambda1=0.0)
  with X64(True):
    _, batch = problem()
    grad_fn = plain_gradient(batch)
    expected = trained(
      make(base), lambda params, _: (grad_fn(params), {"grad_fn": grad_fn})
    )
    passes_of = udim_passes(apply_fn, "head", cfg)

    def passes(params, count):
      found = passes_of(params, batch, None, count)
      return found.grads, found.fns

    transformed = trained(udim(base, cfg, member=make(NOTHING)), passes)
    grads_of = udim_grads(apply_fn, "head", cfg, member=make(NOTHING))
    by_hand = trained(
      optax.with_extra_args_support(base),
      lambda params, count: (grads_of(params, batch, None, count)[0], {}),
    )
    for found in (transformed, by_hand):
      chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-10)


@members
def test_the_term_is_added_to_what_the_member_makes(name):
  """With data that ascends the plain loss the term is the same for all."""
  with X64(True):
    params, batch = problem()

    def at(step, weight, member=None):
      cfg = UdimConfig(weight, data_grad="plain")
      grads_of = jit(udim_grads(apply_fn, "head", cfg, member=member))
      return grads_of(params, batch, None, step)[0]

    member = FAMILY[name](NOTHING)
    alone, sam_alone = at(3, 0.0, member), at(3, 0.0)
    both, sam_both = at(3, 0.5, member), at(3, 0.5)
    gap = functools.partial(jax.tree.map, jnp.subtract)
    chex.assert_trees_all_close(
      gap(both, alone), gap(sam_both, sam_alone), rtol=0, atol=1e-12
    )
    assert not np.allclose(alone["hidden"], sam_alone["hidden"], atol=1e-6)


def perturbed(data_grad, member, **settings):
  """The gradient of a step whose data ascends in a given way."""
  params, batch = problem()
  cfg = UdimConfig(data_grad=data_grad, rho_x=0.5, **settings)
  grads_of = udim_grads(apply_fn, "head", cfg, member=member)
  return grads_of(params, batch, None, 0)


def test_the_data_ascends_where_the_member_looks_first():
  """GAM's first point is SAM's, whatever it does from there."""
  with X64(True):
    of_gam = perturbed("fast", gam(NOTHING, rho=0.3))[1]["metrics"]
    of_sam = perturbed("fast", None, rho=0.3)[1]["metrics"]
    for name in ("pen", "gn", "sam_loss", "perturbation_rms"):
      assert float(of_gam[name]) == pytest.approx(float(of_sam[name]), 1e-12)


def test_the_exact_data_gradient_goes_along_the_ascent_given():
  with X64(True):
    still = optax.stateless(
      lambda grads, params: jax.tree.map(jnp.zeros_like, grads)
    )
    still = sharpness_aware(NOTHING, still)
    seen = [perturbed(how, still)[0] for how in ("plain", "exact", "fast")]
    chex.assert_trees_all_close(*seen, rtol=0, atol=1e-12)
    other = perturbed("exact", asam(NOTHING, 0.5))[0]
    assert not np.allclose(other["hidden"], seen[0]["hidden"], atol=1e-6)


def test_the_default_is_sam():
  params, batch = problem()
  rho = falling(0.2)
  default = udim_grads(apply_fn, "head", UdimConfig(rho=rho))
  given = udim_grads(
    apply_fn, "head", UdimConfig(rho=9.0), member=sam(NOTHING, rho)
  )
  chex.assert_trees_all_equal(
    *(jit(f)(params, batch, None, 5) for f in (default, given))
  )


def test_rho_is_what_perturbed_sam_has_of_its_own():
  with X64(True):
    mode, member = {"mode": "perturbed_sam"}, sam(NOTHING, 0.1)
    near, far = (perturbed("fast", member, rho=r, **mode) for r in (0.1, 2.0))
    assert float(near[1]["metrics"]["sam_loss"]) == pytest.approx(
      float(far[1]["metrics"]["sam_loss"]), rel=1e-12
    )
    assert not np.allclose(near[0]["hidden"], far[0]["hidden"], atol=1e-4)


def test_a_member_with_a_memory_needs_the_transform():
  """LookSAM's direction is kept from step to step, and it always looks."""
  with X64(True):
    _, batch = problem()
    cfg = UdimConfig(lambda1=0.0)
    passes_of = udim_passes(apply_fn, "head", cfg)
    grad_fn = plain_gradient(batch)

    def passes(params, count):
      found = passes_of(params, batch, None, count)
      return found.grads, found.fns

    found = trained(udim(optax.sgd(0.5), cfg, member=look_sam(NOTHING)), passes)
    expected = trained(
      sam(optax.sgd(0.5)),
      lambda params, _: (grad_fn(params), {"grad_fn": grad_fn}),
    )
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-10)
    grads_of = udim_grads(apply_fn, "head", cfg, member=look_sam(NOTHING))
    with pytest.raises(UserError, match="memory") as error:
      jax.eval_shape(grads_of, *problem(), None, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "make",
  [
    functools.partial(udim, NOTHING),
    functools.partial(udim_grads, apply_fn, "head"),
  ],
)
def test_quirks_are_those_of_sam(make):
  with pytest.raises(UserError, match="reference_quirks=True") as error:
    make(UdimConfig(reference_quirks=True), member=sam(NOTHING))
  assert "\n" not in str(error.value)
