"""What a step costs: compiled FLOPs in units of one gradient."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.extend.core import jaxpr_as_fun

from udim import UdimConfig, udim, udim_grads, udim_passes

BATCH = {
  "image": jax.ShapeDtypeStruct((1, 64, 32, 32, 3), np.float32),
  "label": jax.ShapeDtypeStruct((1, 64), np.int32),
}
PARAMS = jax.tree.map(
  lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
  {
    "layers": [(3, 3, 3, 32), (3, 3, 32, 64)],
    "head": {"kernel": (64, 10), "bias": (10,)},
  },
  is_leaf=lambda x: isinstance(x, tuple),
)
KEY = jax.eval_shape(lambda: jax.random.key(0))
STEP = jax.ShapeDtypeStruct((), np.int32)


def apply_fn(variables, images, *, train, rngs):
  """Two convolutions, 32 and 64 channels, and a linear head.

  Channels drop out behind the first: below its first dropout a pass that is
  repeated is merged by the compiler, whatever we do.
  """
  del train
  params, hidden = variables["params"], images
  keep = jax.random.bernoulli(rngs["dropout"], 0.5, (len(images), 1, 1, 32))
  for i, kernel in enumerate(params["layers"]):
    hidden = jax.lax.conv_general_dilated(
      hidden, kernel, (1, 1), "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    hidden = jax.nn.relu(hidden)
    hidden = hidden * 2 * keep if i == 0 else hidden
  features = hidden.mean(axis=(1, 2))
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  return features, logits, {}


def flops(fn, *shapes):
  return jax.jit(fn).lower(*shapes).compile().cost_analysis()["flops"]


@functools.cache
def one_gradient():
  def loss(params, batch, key):
    logits = apply_fn(
      {"params": params}, batch["image"][0], train=True, rngs={"dropout": key}
    )[1]
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"][0]
    ).mean()

  return flops(jax.grad(loss), PARAMS, BATCH, KEY)


# Gradients, as the docstring of udim.transform states them, and the gates.
GATES = [
  ({"lambda1": 0.0}, 2.0, 2.02),
  ({}, 3.68, 3.7),
  ({"start_step": 5}, 3.68, 3.7),
  ({"share_dropout": False}, 4.02, 4.1),
  ({"detach_source": True}, 3.02, 3.05),
  ({"data_grad": "plain"}, 3.68, 3.7),
  ({"data_grad": "exact"}, 5.05, 5.45),
  ({"data_grad": "exact", "every": 2}, 5.02, 5.45),
]


# The same where the host decides whether the term is due: no branch.
DUE_GATES = [
  ({"start_step": 5}, False, 2.0, 2.02),
  ({"every": 2}, True, 3.68, 3.7),
  ({"data_grad": "exact", "every": 2}, False, 2.0, 2.02),
  ({"data_grad": "exact", "every": 2}, True, 5.05, 5.45),
]
# The term of half the images; all of its passes are of half the size.
HALF_GATES = [
  ({}, 3.02, 3.05),
  ({"detach_source": True}, 2.68, 2.72),
  ({"data_grad": "exact"}, 3.84, 3.9),
]


@pytest.mark.parametrize(("settings", "expected", "gate"), GATES)
def test_gradients_of_a_step(settings, expected, gate):
  grads_of = udim_grads(apply_fn, "head", UdimConfig(**settings))
  ratio = flops(grads_of, PARAMS, BATCH, KEY, STEP) / one_gradient()
  assert ratio <= gate
  assert ratio == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("settings", "due", "expected", "gate"), DUE_GATES)
def test_gradients_of_a_step_without_a_branch(settings, due, expected, gate):
  grads_of = functools.partial(
    udim_grads(apply_fn, "head", UdimConfig(**settings)), due=due
  )
  ratio = flops(grads_of, PARAMS, BATCH, KEY, STEP) / one_gradient()
  assert ratio <= gate
  assert ratio == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("settings", "expected", "gate"), HALF_GATES)
def test_gradients_of_half_the_images(settings, expected, gate):
  cfg = UdimConfig(**settings, term_images=32)
  grads_of = udim_grads(apply_fn, "head", cfg)
  ratio = flops(grads_of, PARAMS, BATCH, KEY, STEP) / one_gradient()
  assert ratio <= gate
  assert ratio == pytest.approx(expected, rel=0.03)


def test_the_transform_costs_as_much():
  cfg = UdimConfig()
  tx, passes_of = udim(optax.sgd(0.1), cfg), udim_passes(apply_fn, "head", cfg)

  def step(params, state, batch, key):
    passes = passes_of(params, batch, key, state.count)
    updates, state = tx.update(passes.grads, state, params, **passes.fns)
    return optax.apply_updates(params, updates), state

  state = jax.eval_shape(tx.init, PARAMS)
  assert flops(step, PARAMS, state, BATCH, KEY) <= 3.7 * one_gradient()


def test_before_its_start_a_step_costs_what_sam_does():
  cfg = UdimConfig(start_step=5)
  grads_of = udim_grads(apply_fn, "head", cfg)
  jaxpr = jax.make_jaxpr(grads_of)(PARAMS, BATCH, KEY, STEP)
  [branch] = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
  without, with_term = (
    flops(jaxpr_as_fun(b), *b.in_avals) for b in branch.params["branches"]
  )
  # XLA counts the dearer of two branches.
  outside = flops(grads_of, PARAMS, BATCH, KEY, STEP) - with_term
  assert without == pytest.approx(one_gradient(), rel=0.01)
  assert outside + without <= 2.02 * one_gradient()
