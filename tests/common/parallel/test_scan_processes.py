"""The recurrence along time that two real processes share."""

SCRIPT = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import chex
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from common.parallel import linear_scan, make_mesh
from common.parallel.mesh import to_host

rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
x, g, h0 = draw(2, 24, 3), draw(2, 24, 3), draw(2, 3)
a = rng.uniform(0.2, 1, x.shape).astype(np.float32)
reset = rng.uniform(size=(2, 24)) < 0.2
mesh = make_mesh({"seq": 4})
place = NamedSharding(mesh, jax.P(None, "seq"))
put = lambda value, place: jax.make_array_from_callback(
  value.shape, place, lambda index: value[index]
)
for reverse in (False, True):
  def run(x, a, h0, reset, mesh_axis=None):
    def loss(x, a, h0):
      h, last = linear_scan(
        x, a, h0, reset=reset, reverse=reverse, mesh_axis=mesh_axis
      )
      return jnp.sum(jnp.sin(h) * g) + jnp.sum(last), (h, last)
    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, a, h0)
  expected = jax.jit(run)(x, a, h0, reset)
  with jax.set_mesh(mesh):
    found = jax.jit(lambda *arrays: run(*arrays, mesh_axis="seq"))(
      put(x, place), put(a, place), put(h0, NamedSharding(mesh, jax.P())),
      put(reset, place),
    )
  chex.assert_trees_all_close(
    to_host(found), jax.device_get(expected), rtol=1e-5, atol=1e-5
  )
"""


def test_two_processes_get_what_one_device_gets(run_script_twice):
  run_script_twice(SCRIPT)
