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
  asam_ascent,
  fisher_ascent,
  fisher_sam,
  gsam,
  gsam_combine,
  sagm,
  sagm_ascent,
  sagm_combine,
  sam_ascent,
)
from udim import UdimConfig, udim, udim_grads, udim_passes

X64 = jax.enable_x64
# Compiles in half the time, and nothing here is large.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def falling(start):
  return optax.linear_schedule(start, 0.0, 10)


# name -> the member, and what makes UDIM's steps its own.
FAMILY = {
  "asam": (functools.partial(asam, rho=0.7), {"ascent": asam_ascent(0.7)}),
  "fisher": (fisher_sam, {"ascent": fisher_ascent()}),
  "gsam": (
    functools.partial(gsam, rho=falling(0.1), alpha=falling(0.4)),
    {
      "ascent": sam_ascent(falling(0.1)),
      "combine": gsam_combine(falling(0.4)),
    },
  ),
  "sagm": (
    functools.partial(sagm, rho=0.1, alpha=falling(0.05)),
    {
      "ascent": sagm_ascent(0.1, falling(0.05)),
      "combine": sagm_combine(),
    },
  ),
}
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
  member, keywords = FAMILY[name]
  base = optax.sgd(0.5, momentum=0.9)
  cfg = UdimConfig(lambda1=0.0)
  with X64(True):
    _, batch = problem()
    grad_fn = plain_gradient(batch)
    expected = trained(
      member(base), lambda params, _: (grad_fn(params), {"grad_fn": grad_fn})
    )
    passes_of = udim_passes(apply_fn, "head", cfg)

    def passes(params, count):
      found = passes_of(params, batch, None, count)
      return found.grads, found.fns

    transformed = trained(udim(base, cfg, **keywords), passes)
    grads_of = udim_grads(apply_fn, "head", cfg, **keywords)
    by_hand = trained(
      optax.with_extra_args_support(base),
      lambda params, count: (grads_of(params, batch, None, count)[0], {}),
    )
    for found in (transformed, by_hand):
      chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-10)


@members
def test_the_term_is_added_to_what_the_member_makes(name):
  """With data that ascends the plain loss the term is the same for all."""
  _, keywords = FAMILY[name]
  with X64(True):
    params, batch = problem()

    def at(step, weight, **keywords):
      cfg = UdimConfig(weight, data_grad="plain")
      grads_of = jit(udim_grads(apply_fn, "head", cfg, **keywords))
      return grads_of(params, batch, None, step)[0]

    alone, sam_alone = at(3, 0.0, **keywords), at(3, 0.0)
    both, sam_both = at(3, 0.5, **keywords), at(3, 0.5)
    gap = functools.partial(jax.tree.map, jnp.subtract)
    chex.assert_trees_all_close(
      gap(both, alone), gap(sam_both, sam_alone), rtol=0, atol=1e-12
    )
    assert not np.allclose(alone["hidden"], sam_alone["hidden"], atol=1e-6)


def test_the_exact_data_gradient_goes_along_the_ascent_given():
  with X64(True):
    params, batch = problem()

    def step(data_grad, **keywords):
      cfg = UdimConfig(data_grad=data_grad, rho=0.3, rho_x=0.5)
      return udim_grads(apply_fn, "head", cfg, **keywords)(
        params, batch, None, 0
      )[0]

    nothing = optax.stateless(
      lambda grads, params: jax.tree.map(jnp.zeros_like, grads)
    )
    seen = [step(how, ascent=nothing) for how in ("plain", "exact", "fast")]
    chex.assert_trees_all_close(*seen, rtol=0, atol=1e-12)
    other = step("exact", ascent=asam_ascent(0.5))
    assert not np.allclose(other["hidden"], seen[0]["hidden"], atol=1e-6)


def test_the_default_is_sam():
  params, batch = problem()
  rho = falling(0.2)
  default = udim_grads(apply_fn, "head", UdimConfig(rho=rho))
  given = udim_grads(
    apply_fn, "head", UdimConfig(rho=9.0), ascent=sam_ascent(rho)
  )
  chex.assert_trees_all_equal(
    *(jit(f)(params, batch, None, 5) for f in (default, given))
  )


def test_an_ascent_with_a_memory_needs_the_transform():
  """Momentum of the ascent: eps of the second step has the first in it."""
  with X64(True):
    params, _ = problem()
    ascent = optax.chain(optax.trace(0.5), optax.scale(0.1))
    tx = udim(optax.identity(), UdimConfig(lambda1=0.0), ascent=ascent)
    gradient = functools.partial(jax.tree.map, lambda p: p)  # of |w|^2 / 2
    fns = {
      "grad_fn": lambda p: (gradient(p), jnp.zeros(())),
      "inconsistency_grad_fn": lambda p, d: (
        p,
        dict.fromkeys(("pen", "gn", "perturbation_rms"), jnp.zeros(())),
      ),
    }
    state = tx.init(params)
    for factor in (1.0, 1.5):
      updates, state = tx.update(params, state, params, **fns)
      expected = jax.tree.map(lambda p, f=factor: p + 0.1 * f * p, params)
      chex.assert_trees_all_close(updates, expected, rtol=1e-12)
    grads_of = udim_grads(apply_fn, "head", UdimConfig(), ascent=ascent)
    with pytest.raises(UserError, match="trace") as error:
      jax.eval_shape(grads_of, *problem(), None, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "make",
  [
    functools.partial(udim, optax.identity()),
    functools.partial(udim_grads, apply_fn, "head"),
  ],
)
def test_quirks_are_those_of_sam(make):
  with pytest.raises(UserError, match="reference_quirks=True") as error:
    make(UdimConfig(reference_quirks=True), ascent=sam_ascent())
  assert "\n" not in str(error.value)
