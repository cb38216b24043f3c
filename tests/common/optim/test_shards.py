"""ESAM on shards, and steps that ask nothing of the host."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.optim import esam, gam, gsam, look_sam, sagm, sam
from common.parallel import make_mesh
from common.tree import global_norm

RHO = 0.1


def make_params():
  rng = np.random.default_rng(1)
  shapes = {"body": (8, 16), "head": (16, 8)}
  return {
    name: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for name, shape in shapes.items()
  }


def images(count):
  rng = np.random.default_rng(5)
  return rng.normal(size=(count, 8)).astype(np.float32)


def losses(params, x):
  """Of each row."""
  predicted = jnp.tanh(x @ params["body"]) @ params["head"]
  return jnp.mean(jnp.sin(predicted) + predicted**2, axis=1)


def test_esam_on_each_shard_chooses_from_its_own():
  """Four rows a shard, of which the one whose loss grows most is looked at."""
  params = make_params()
  x = images(32)
  tx = esam(optax.identity(), RHO, 1.0, 0.25, axis_name="data")

  def local(params, x):
    def grad_fn(p, chosen=slice(None)):
      return jax.grad(lambda p: losses(p, x[chosen]).mean())(p)

    grads = grad_fn(jax.lax.pcast(params, "data", to="varying"))
    return tx.update(
      grads, tx.init(params), params, grad_fn=grad_fn,
      losses_fn=lambda p: losses(p, x),
    )  # fmt: skip

  mesh = make_mesh({"data": 8})
  updates, _ = jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P()
    )
  )(params, x)
  each = []
  for rows in np.split(x, 8):
    grads = jax.grad(lambda p, rows=rows: losses(p, rows).mean())(params)
    scale = RHO / global_norm(grads)
    there = jax.tree.map(lambda p, g, s=scale: p + s * g, params, grads)
    worst = np.argmax(losses(there, rows) - losses(params, rows))
    row = rows[worst : worst + 1]
    each.append(jax.grad(lambda p, row=row: losses(p, row).mean())(there))
  expected = jax.tree.map(lambda *g: sum(g) / 8, *each)
  chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("member", [sam, gsam, sagm, gam, look_sam, esam])
def test_a_step_needs_no_host(member):
  tx = member(optax.adam(0.1))

  @jax.jit
  def one(params, state, x):
    grad_fn = jax.grad(lambda params: losses(params, x).mean())
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  params = make_params()
  arguments = jax.device_put((params, tx.init(params), images(8)))
  one(*arguments)
  with jax.transfer_guard("disallow"):
    one(*arguments)
