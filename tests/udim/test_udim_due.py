"""Which steps have the term: decided by the program, or by the host."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from udim import UdimConfig, udim, udim_grads, udim_passes

KEY = jax.random.key(0)
# Compiles in half the time, and nothing here is large.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def problem():
  rng = np.random.default_rng(0)
  params = {
    "hidden": rng.normal(size=(5, 4)),
    "head": {"kernel": rng.normal(size=(4, 3)), "bias": np.zeros(3)},
  }
  batch = {
    "image": rng.normal(size=(2, 4, 5)).astype(np.float32),
    "label": rng.integers(3, size=(2, 4), dtype=np.int32),
  }
  return jax.tree.map(jnp.float32, params), batch


def apply_fn(variables, images, *, train, rngs):
  del train, rngs
  params = variables["params"]
  features = jnp.tanh(images @ params["hidden"])
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  return features, logits, {}


def make_step(cfg, base=None):
  """`(params, state, due) -> (params, state)` of the transform."""
  tx = udim(base or optax.sgd(0.1, momentum=0.9), cfg)
  passes_of = udim_passes(apply_fn, "head", cfg)
  _, batch = problem()

  def step(params, state, due=None):
    passes = passes_of(params, batch, KEY, state.count)
    updates, state = tx.update(
      passes.grads, state, params, due=due, **passes.fns
    )
    return optax.apply_updates(params, updates), state

  return tx, step


SETTINGS = [
  {},
  {"start_step": 3, "every": 2},
  {"start_step": 17},
  {"every": 5, "lambda1": 0.3},
  {"lambda1": 0.0, "every": 2},
  {"lambda1": optax.linear_schedule(0.0, 1.0, 4, transition_begin=6)},
  {"lambda1": lambda step: jnp.where(step % 3 == 1, 0.5, 0.0), "every": 2},
  {"lambda1": optax.cosine_decay_schedule(1.0, 20), "start_step": 2},
  {"lambda1": lambda step: 0.0, "reference_quirks": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_host_agrees_with_the_program(settings):
  cfg = UdimConfig(**settings)
  params, batch = problem()
  grads_of = udim_grads(apply_fn, "head", cfg)
  active = jit(
    lambda steps: jax.lax.map(
      lambda step: grads_of(params, batch, KEY, step)[1]["metrics"]["active"],
      steps,
    )
  )(jnp.arange(30))
  due = [cfg.is_due(step) for step in range(30)]
  assert all(type(d) is bool for d in due)
  np.testing.assert_array_equal(active, due)


@pytest.mark.parametrize(
  "settings",
  [
    {"start_step": 3, "every": 2},
    {"start_step": 3, "every": 2, "data_grad": "exact", "term_images": 2},
    {"lambda1": optax.linear_schedule(0.0, 1.0, 4, transition_begin=6)},
  ],
)
def test_what_is_given_equals_the_branch(settings):
  cfg = UdimConfig(**settings)
  tx, step = make_step(cfg)
  step = jit(step, static_argnames="due")
  params, _ = problem()
  decided = branched = params, tx.init(params)
  for i in range(12):
    decided = step(*decided, due=cfg.is_due(i))
    branched = step(*branched)
    # Two programs, whose sums may run in another order.
    chex.assert_trees_all_close(decided, branched, rtol=1e-6, atol=1e-6)
  assert int(decided[1].count) == 12


def test_the_gradients_take_it_too():
  params, batch = problem()
  cfg = UdimConfig(start_step=3)
  grads_of = jit(udim_grads(apply_fn, "head", cfg), static_argnames="due")
  for step in (2, 3):
    decided = grads_of(params, batch, KEY, step, due=cfg.is_due(step))
    branched = grads_of(params, batch, KEY, step)
    chex.assert_trees_all_close(decided, branched, rtol=1e-6, atol=1e-6)
    assert float(decided[1]["metrics"]["active"]) == (step == 3)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_branch_is_there_only_for_the_count(settings):
  cfg = UdimConfig(**settings)
  tx, step = make_step(cfg)
  params, _ = problem()
  state = tx.init(params)
  for due in (True, False):
    jaxpr = jax.make_jaxpr(functools.partial(step, due=due))(params, state)
    assert "cond[" not in str(jaxpr)
  is_open = callable(cfg.lambda1) or (
    cfg.lambda1 != 0 and (cfg.start_step, cfg.every) != (0, 1)
  )
  jaxpr = jax.make_jaxpr(step)(params, state)
  assert ("cond[" in str(jaxpr)) == is_open


def test_a_weight_of_0_has_no_term_whatever_the_host_says():
  tx, step = make_step(UdimConfig(lambda1=0.0))
  params, _ = problem()
  _, state = jit(step, static_argnames="due")(params, tx.init(params), due=True)
  assert float(state.metrics["active"]) == 0


def test_the_base_sees_the_loss_but_no_due():
  seen = []

  def update(updates, state, params, **extra):
    del params
    seen.append(sorted(extra))
    return updates, state

  base = optax.GradientTransformationExtraArgs(optax.identity().init, update)
  tx, step = make_step(UdimConfig(), base)
  params, _ = problem()
  jax.eval_shape(functools.partial(step, due=True), params, tx.init(params))
  assert seen == [["value"]]


def test_a_traced_due_is_refused():
  tx, step = make_step(UdimConfig(every=2))
  params, batch = problem()
  grads_of = udim_grads(apply_fn, "head", UdimConfig())
  calls = [
    lambda: jax.jit(step)(params, tx.init(params), due=True),
    lambda: grads_of(params, batch, None, 0, due=1),
  ]
  for call in calls:
    with pytest.raises(UserError, match="static_argnames") as error:
      call()
    assert "\n" not in str(error.value)
