"""The baselines' losses: one device equals eight."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common.parallel import make_mesh
from udim.objectives import OBJECTIVES, make_objective

S = 3


def problem(seed=0):
  """Three domains of 16 images, a layer and a head of 8 classes."""
  rng = np.random.default_rng(seed)
  params = {
    "hidden": rng.normal(size=(12, 16)) / 4,
    "head": {"kernel": rng.normal(size=(16, 8)) / 4, "bias": np.zeros(8)},
  }
  batch = {
    "image": rng.normal(size=(S, 16, 12)).astype(np.float32),
    "label": rng.integers(8, size=(S, 16), dtype=np.int32),
  }
  return jax.tree.map(np.float32, params), batch


def forward(params, images, key):
  del key
  features = jnp.tanh(images @ params["hidden"])
  head = params["head"]
  return features, features @ head["kernel"] + head["bias"][None], {}


def gradient_of(name):
  """The objective with its penalty in force, and its compiled gradient."""
  always = {"anneal_steps": 0} if "anneal_steps" in OBJECTIVES[name] else {}
  objective = make_objective(name, always)

  @jax.jit
  def gradient(params, batch, memory):
    def loss(params):
      outcome = objective.loss(
        forward, params, batch, key=jax.random.key(0), step=3, memory=memory
      )
      return outcome.loss, outcome

    return jax.grad(loss, has_aux=True)(params)

  return objective, gradient


SPECS = {
  "replicated": {"hidden": P(), "head": {"kernel": P(), "bias": P()}},
  "fsdp": {
    "hidden": P(None, "data"),
    "head": {"kernel": P("data"), "bias": P("data")},
  },
}
CASES = [*[(name, "replicated") for name in OBJECTIVES], ("fishr", "fsdp")]


@pytest.mark.parametrize(("name", "specs"), CASES)
def test_one_device_equals_eight(name, specs):
  params, batch = problem()
  objective, gradient = gradient_of(name)
  memory = objective.init(S, params)
  one = gradient(params, batch, memory)
  mesh = make_mesh({"data": 8})
  place = functools.partial(NamedSharding, mesh)
  with jax.set_mesh(mesh):
    params = jax.device_put(params, jax.tree.map(place, SPECS[specs]))
    batch = jax.device_put(batch, place(P(None, "data")))
    memory = jax.device_put(memory, place(P()))
    program = gradient.lower(params, batch, memory).compile()
    eight = program(params, batch, memory)
  # Sums over images in another order; the weight of fishr is 1000.
  chex.assert_trees_all_close(one, eight, rtol=1e-4, atol=1e-5)
  for leaf in jax.tree.leaves(eight[1].memory):
    assert leaf.sharding.is_fully_replicated
  if specs == "replicated":  # n is sharded and stays where it is
    for collective in ("all-gather", "all-to-all", "collective-permute"):
      assert collective not in program.as_text()
