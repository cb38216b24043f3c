"""Ascents: the perturbations of the table, in NumPy, and inside optax."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from common.errors import UserError
from common.optim import (
  asam_ascent,
  fisher_ascent,
  sagm_ascent,
  sam_ascent,
  sharpness_aware,
)
from common.optim.ascent import random_part, state_after
from common.tree import global_norm

# The definitions, on flat float64 vectors: (g, w) -> e.
T = 1e-12
DEFINITIONS = {
  "sam": lambda g, w: 0.1 * g / (np.linalg.norm(g) + T),
  "asam": lambda g, w: (
    0.2 * (abs(w) + 0.03) ** 2 * g / (np.linalg.norm((abs(w) + 0.03) * g) + T)
  ),
  "fisher": lambda g, w: (
    0.3 * (g / (1 + 2 * g**2)) / (np.sqrt(np.sum(g**2 / (1 + 2 * g**2))) + T)
  ),
  "sagm": lambda g, w: (0.1 / (np.linalg.norm(g) + T) - 0.02) * g,
}
ASCENTS = {
  "sam": (sam_ascent, {"rho": 0.1}),
  "asam": (asam_ascent, {"rho": 0.2, "eta": 0.03}),
  "fisher": (fisher_ascent, {"rho": 0.3, "eta": 2.0}),
  "sagm": (sagm_ascent, {"rho": 0.1, "alpha": 0.02}),
}
names = pytest.mark.parametrize("name", ASCENTS)


def make(name, **changed):
  ascent, settings = ASCENTS[name]
  return ascent(**(settings | changed))


def tree(seed, dtype=np.float64):
  rng = np.random.default_rng(seed)
  return {
    "a": {"kernel": rng.normal(size=(4, 5)).astype(dtype)},
    "b": rng.normal(size=7).astype(dtype),
    "scalar": rng.normal(size=()).astype(dtype),
  }


def perturb(ascent, grads, params):
  return ascent.update(grads, ascent.init(params), params)[0]


@names
def test_is_the_definition(name):
  with jax.enable_x64(True):
    grads, params = tree(0), tree(1)
    epsilon = perturb(make(name), grads, params)
    expected = DEFINITIONS[name](
      ravel_pytree(grads)[0], ravel_pytree(params)[0]
    )
    np.testing.assert_allclose(ravel_pytree(epsilon)[0], expected, rtol=1e-12)
    chex.assert_trees_all_equal_shapes_and_dtypes(epsilon, grads)


def test_known_answers():
  with jax.enable_x64(True):
    grads, params = jnp.array([2.0, 12, -27]), jnp.array([3.0, 2, -1])
    np.testing.assert_allclose(
      perturb(asam_ascent(0.1, 0.01), grads, params),
      [0.04910519, 0.13138258, -0.07463988],
      atol=5e-9,  # the digits that are given
    )
    np.testing.assert_allclose(
      perturb(sam_ascent(0.1), grads, params),
      grads * 0.1 / 29.614186,
      rtol=1e-8,
    )


@pytest.mark.parametrize(
  ("name", "setting"), [(n, s) for n, (_, kw) in ASCENTS.items() for s in kw]
)
def test_every_setting_may_be_a_schedule_of_the_count(name, setting):
  value = ASCENTS[name][1][setting]
  ascent = make(name, **{setting: lambda count: value * (1 + count)})
  grads, params = tree(0, np.float32), tree(1, np.float32)
  state = ascent.init(params)
  for count in range(3):
    epsilon, state = jax.jit(ascent.update)(grads, state, params)
    expected = perturb(
      make(name, **{setting: value * (1 + count)}), grads, params
    )
    chex.assert_trees_all_close(epsilon, expected, rtol=1e-5)


@names
def test_a_zero_gradient_moves_nothing(name):
  grads = jax.tree.map(jnp.zeros_like, tree(0, np.float32))
  epsilon = perturb(make(name), grads, tree(1, np.float32))
  chex.assert_trees_all_equal(epsilon, grads)


def test_bfloat16_keeps_the_radius():
  """A norm in bfloat16 would be wrong by far more than a rounding: it has 8
  bits, and a sum of a million small squares stands still."""
  rng = np.random.default_rng(0)
  grads = jnp.asarray(rng.normal(size=2**20) * 1e-3, jnp.bfloat16)
  epsilon = perturb(sam_ascent(0.05), grads, grads)
  assert epsilon.dtype == jnp.bfloat16
  # Each number is rounded by up to 2^-9, in both directions.
  np.testing.assert_allclose(global_norm(epsilon), 0.05, rtol=1e-4)


@pytest.mark.parametrize(
  ("name", "opaque"), list(itertools.product(ASCENTS, (True, False)))
)
def test_inside_optax_sam_it_equals_ours(name, opaque):
  """Their SAM descends to perturb and then changes the sign."""

  def loss(params):
    return sum(jnp.sum(jnp.cos(leaf * 2)) for leaf in jax.tree.leaves(params))

  grad = jax.grad(loss)
  theirs = optax.contrib.sam(
    optax.adam(0.01),
    optax.chain(make(name), optax.scale(-1)),
    opaque_mode=opaque,
  )
  ours = sharpness_aware(optax.adam(0.01), make(name))
  start = jax.tree.map(jnp.asarray, tree(3, np.float32))
  state_theirs, state = theirs.init(start), ours.init(start)

  @jax.jit
  def their_step(params, state):
    for _ in range(1 if opaque else 2):
      updates, state = theirs.update(
        grad(params), state, params, grad_fn=lambda p, i: grad(p)
      )
      params = optax.apply_updates(params, updates)
    return params, state

  @jax.jit
  def our_step(params, state):
    updates, state = ours.update(grad(params), state, params, grad_fn=grad)
    return optax.apply_updates(params, updates), state

  params, params_theirs = start, start
  for _ in range(5):
    params_theirs, state_theirs = their_step(params_theirs, state_theirs)
    params, state = our_step(params, state)
  # Transparent mode adds and takes away the perturbation: float32 rounding.
  chex.assert_trees_all_close(params, params_theirs, atol=1e-6)


def test_a_schedule_goes_on_inside_optax_sam():
  ascent = sam_ascent(lambda count: 0.1 * (1 + count))
  tx = optax.contrib.sam(
    optax.sgd(1.0),
    optax.chain(ascent, optax.scale(-1)),
    opaque_mode=True,
    reset_state=False,
  )
  params = jnp.array([2.0])
  state = tx.init(params)
  seen = []
  for _ in range(3):
    updates, state = tx.update(
      params, state, params, grad_fn=lambda p, i: p - params
    )
    seen.append(-float(updates[0]))
  np.testing.assert_allclose(seen, [0.1, 0.2, 0.3], rtol=1e-5)


def test_a_random_part_keeps_the_expectation():
  part = random_part(0.25, seed=3)
  numbers = {"a": jnp.ones(40_000), "b": jnp.ones((100, 100))}
  state = part.init(numbers)
  first, state = part.update(numbers, state)
  second, _ = part.update(numbers, state)
  again, _ = part.update(numbers, part.init(numbers))
  chex.assert_trees_all_equal(first, again)
  for leaf in jax.tree.leaves(first):
    assert set(np.unique(leaf)) == {0.0, 4.0}
    # Five standard deviations of the smaller leaf's mean, sqrt(3 / 10_000).
    np.testing.assert_allclose(jnp.mean(leaf), 1.0, atol=5 * 0.0174)
  assert not np.array_equal(first["a"], second["a"])
  assert not np.array_equal(first["a"][:10_000], first["b"].reshape(-1))


@pytest.mark.parametrize(
  "ascent",
  [
    sam_ascent(lambda count: 0.1 * (1 + count)),
    optax.chain(sam_ascent(0.1), random_part(0.5)),
    optax.chain(optax.contrib.normalize(), optax.scale(0.1)),
    optax.scale_by_schedule(lambda count: 0.1 * count),
  ],
)
def test_a_state_may_begin_at_any_update(ascent):
  params = jnp.arange(1.0, 5)
  state = ascent.init(params)
  for _ in range(3):
    _, state = ascent.update(params, state, params)
  begun = state_after(ascent, params, 3)
  chex.assert_trees_all_equal_shapes_and_dtypes(begun, state)
  chex.assert_trees_all_equal(begun, state)


def test_a_state_with_a_memory_may_not():
  with pytest.raises(UserError, match=r"this one has .*trace") as error:
    state_after(optax.trace(0.9), jnp.ones(2), 3)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: sam_ascent(-0.1), "rho=-0.1 must be a number from 0"),
    (lambda: sam_ascent(float("nan")), "rho=nan must be a number from 0"),
    (lambda: asam_ascent(0.5, -1), "eta=-1 must be a number from 0"),
    (lambda: fisher_ascent(0.5, -1), "eta=-1 must be a number from 0"),
    (lambda: sagm_ascent(0.5, -1), "alpha=-1 must be a number from 0"),
    (lambda: random_part(0.0), "fraction=0.0 must be above 0"),
    (
      lambda: perturb(asam_ascent(), jnp.ones(2), None),
      "scales with the weights: give it params",
    ),
  ],
)
def test_what_makes_no_sense_is_refused(call, message):
  with pytest.raises(UserError, match=message):
    call()
