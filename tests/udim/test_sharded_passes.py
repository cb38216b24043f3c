"""One device equals eight, however the parameters lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common.parallel import make_mesh
from udim import UdimConfig, udim, udim_grads


def problem(seed=0):
  """Two domains of 16 images, a layer and a head of 8 classes."""
  rng = np.random.default_rng(seed)
  params = {
    "hidden": rng.normal(size=(12, 16)) / 4,
    "head": {"kernel": rng.normal(size=(16, 8)) / 4, "bias": np.zeros(8)},
  }
  batch = {
    "image": rng.normal(size=(2, 16, 12)).astype(np.float32),
    "label": rng.integers(8, size=(2, 16), dtype=np.int32),
  }
  return jax.tree.map(np.float32, params), batch


def apply_fn(variables, images, *, train, rngs):
  del train
  params = variables["params"]
  features = jnp.tanh(images @ params["hidden"])
  if "dropout" in rngs:
    keep = jax.random.bernoulli(rngs["dropout"], 0.5, features.shape)
    features = jnp.where(keep, features * 2, 0)
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  return features, logits, {}


SPECS = {
  "replicated": {"hidden": P(), "head": {"kernel": P(), "bias": P()}},
  "fsdp": {
    "hidden": P(None, "data"),
    "head": {"kernel": P("data"), "bias": P("data")},
  },
}


def placed(specs, params, batch):
  place = functools.partial(NamedSharding, make_mesh({"data": 8}))
  params = jax.device_put(params, jax.tree.map(place, SPECS[specs]))
  return params, jax.device_put(batch, place(P(None, "data")))


CASES = [
  ("fsdp", {}, 1),
  ("replicated", {"normalise": "batch", "data_grad": "exact"}, 1),
  ("fsdp", {"every": 2, "domain_reduce": "mean"}, 2),
  ("fsdp", {"term_images": 8, "data_grad": "exact"}, 1),
  ("replicated", {"term_images": 4}, 2),  # not all devices have one
]


@pytest.mark.parametrize(("specs", "settings", "accum"), CASES)
def test_one_device_equals_eight(specs, settings, accum):
  grads_of = jax.jit(
    udim_grads(apply_fn, "head", UdimConfig(**settings), accum=accum)
  )
  arguments = jax.random.key(0), jnp.int32(0)
  one = grads_of(*problem(), *arguments)
  eight = grads_of(*placed(specs, *problem()), *arguments)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight)):
    # Sums over images in another order; gradients are of order 1.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("term_images", [0, 8])
def test_no_image_changes_its_device(term_images):
  """Domains are merged behind n, which is sharded, and the term takes images
  of every shard: nothing is gathered."""
  cfg = UdimConfig(term_images=term_images)
  grads_of = jax.jit(udim_grads(apply_fn, "head", cfg))
  arguments = placed("replicated", *problem())
  text = grads_of.lower(*arguments, None, 0).compile().as_text()
  assert "all-reduce" in text
  for collective in ("all-gather", "all-to-all", "collective-permute"):
    assert collective not in text


@pytest.mark.parametrize("specs", SPECS)
def test_the_ascent_has_radius_rho(specs):
  params, _ = placed(specs, *problem())
  rho = 0.05
  tx = udim(optax.identity(), UdimConfig(lambda1=0.0, rho=rho))

  def no_term(params, data_grad):
    names = ("pen", "gn", "perturbation_rms")
    return params, dict.fromkeys(names, jnp.zeros(()))

  @jax.jit
  def ascent(params):
    grads = jax.tree.map(lambda p: 1e-3 * jnp.cos(7 * p), params)
    updates, _ = tx.update(
      grads,
      tx.init(params),
      params,
      grad_fn=lambda at: (jax.tree.map(jnp.subtract, at, params), 0.0),
      inconsistency_grad_fn=no_term,
    )
    return updates

  leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(ascent(params))]
  length = np.linalg.norm(np.concatenate(leaves).astype(float))
  assert length == pytest.approx(rho, abs=1e-6)
