"""The host decides which updates take the second gradient: `due`."""

import doctest
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
  second_pass,
)

INPUTS = np.random.default_rng(0).normal(size=(256, 32)).astype(np.float32)
PERIODIC = {
  "look_sam": (functools.partial(look_sam, k=3), 3),
  "sam": (functools.partial(sam, every=2), 2),
  "gam": (functools.partial(gam, every=4), 4),
  "esam": (functools.partial(esam, every=2), 2),
}
members = pytest.mark.parametrize("name", PERIODIC)


def make_params():
  rng = np.random.default_rng(1)
  shapes = {"hidden": (32, 64), "head": (64, 16)}
  return {
    name: jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)
    for name, shape in shapes.items()
  }


def loss(params):
  return jnp.mean((jnp.tanh(INPUTS @ params["hidden"]) @ params["head"]) ** 2)


def make_step(tx):
  """`(params, state, due) -> (params, state)`, not compiled."""

  def step(params, state, due=None):
    grad_fn = jax.grad(loss)
    updates, state = tx.update(
      grad_fn(params), state, params, grad_fn=grad_fn, due=due
    )
    return optax.apply_updates(params, updates), state

  return step


@members
def test_what_is_given_equals_the_branch(name):
  member, period = PERIODIC[name]
  tx = member(optax.sgd(0.1, momentum=0.9))
  step = jax.jit(make_step(tx), static_argnames="due")
  decided = branched = make_params(), tx.init(make_params())
  for i in range(12):
    decided = step(*decided, due=i % period == 0)
    branched = step(*branched)
    # Two programs, whose sums may run in another order.
    chex.assert_trees_all_close(decided, branched, rtol=1e-6, atol=1e-6)


@members
def test_a_branch_is_there_only_for_the_count(name):
  tx = PERIODIC[name][0](optax.adam(0.01))
  params = make_params()
  for due, has_branch in ((None, True), (True, False), (False, False)):
    jaxpr = jax.make_jaxpr(functools.partial(make_step(tx), due=due))(
      params, tx.init(params)
    )
    assert ("cond[" in str(jaxpr)) == has_branch


@functools.cache
def flops(make, due=None):
  tx = optax.with_extra_args_support(make(optax.sgd(0.1)))
  step = jax.jit(make_step(tx), static_argnames="due")
  params = make_params()
  compiled = step.lower(params, tx.init(params), due=due).compile()
  return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(
  ("member", "due", "gradients"),
  [
    (look_sam, True, 2.02),
    (look_sam, False, 1.02),
    (functools.partial(sam, every=2), True, 2.02),
    (functools.partial(sam, every=2), False, 1.02),
    (sam, False, 1.02),  # without a period too
    *((member, None, 2.02) for member in (sam, asam, fisher_sam, gsam, sagm)),
    (gam, None, 4.04),
  ],
)
def test_compiled_flops(member, due, gradients):
  assert flops(member, due) <= gradients * flops(lambda base: base)


def test_the_base_sees_no_due():
  seen = []

  def update(updates, state, params, **extra):
    del params
    seen.append(sorted(extra))
    return updates, state

  base = optax.GradientTransformationExtraArgs(optax.identity().init, update)
  tx = optax.chain(sam(base), optax.scale(-1.0))
  params = make_params()
  grads = jax.grad(loss)(params)
  tx.update(
    grads, tx.init(params), params, grad_fn=jax.grad(loss), due=True, value=1.0
  )
  assert seen == [["grad_fn", "value"]]


@pytest.mark.parametrize("due", [1, jnp.array(True), "yes"])
def test_what_is_no_bool_is_refused(due):
  with pytest.raises(UserError, match="due must be True, False or None"):
    make_step(sam(optax.sgd(0.1)))(
      make_params(), sam(optax.sgd(0.1)).init(make_params()), due
    )


def test_a_traced_due_is_refused():
  tx = sam(optax.sgd(0.1), every=2)
  params = make_params()
  with pytest.raises(UserError, match="static_argnames") as error:
    jax.jit(make_step(tx))(params, tx.init(params), due=True)
  assert "\n" not in str(error.value)


def test_a_bool_of_numpy_will_do():
  tx = sam(optax.sgd(0.1), every=2)
  step = jax.jit(make_step(tx), static_argnames="due")
  params = make_params()
  expected = step(params, tx.init(params), due=False)
  found = step(params, tx.init(params), due=np.int64(3) % 2 == 0)
  chex.assert_trees_all_equal(found, expected)


def test_the_example_in_the_docstring_runs():
  runner = doctest.DocTestRunner()
  [example] = doctest.DocTestFinder(recurse=False).find(second_pass, "module")
  assert runner.run(example) == (0, len(example.examples))
