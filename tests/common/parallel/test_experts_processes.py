"""Each form on two real processes, against the same without a mesh."""

SCRIPT = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import chex
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from common.parallel import experts, make_mesh
from common.parallel.mesh import to_host

E, D, F = 4, 6, 16
rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
stack = {
  "up": {"kernel": draw(E, D, F), "bias": draw(E, F)},
  "down": {"kernel": draw(E, F, D), "bias": draw(E, D)},
}
x = draw(32, D)
even = np.asarray(experts.balanced_ids(jax.random.key(0), 4, 8, E)).reshape(-1)
free = rng.integers(E, size=32)
hidden = {
  "up": {"kernel": jax.P(None, None, "fsdp"), "bias": jax.P(None, "fsdp")},
  "down": {"kernel": jax.P(None, "fsdp"), "bias": jax.P()},
}
whole = {part: {name: jax.P("fsdp") for name in stack[part]} for part in stack}
forms = {
  "selected": (
    lambda s, x, p: experts.selected(s, x, jnp.int32(3), placement=p), hidden
  ),
  "grouped": (
    lambda s, x, p: experts.grouped(s, x, jnp.asarray(free), placement=p),
    hidden,
  ),
  "balanced": (
    lambda s, x, p: experts.balanced(s, x, jnp.asarray(even), placement=p),
    whole,
  ),
  "capacity": (
    lambda s, x, p: experts.capacity(
      s, x.reshape(4, 8, D), jnp.asarray(free).reshape(4, 8),
      slots=2, placement=p,
    )[0],
    whole,
  ),
}
mesh = make_mesh({"data": 2, "fsdp": 2})
placement = experts.Placement("fsdp", ("data", "fsdp"))
rows = NamedSharding(mesh, jax.P(("data", "fsdp")))
put = lambda value, place: jax.make_array_from_callback(
  value.shape, place, lambda index: value[index]
)
for name, (form, cut) in forms.items():
  def run(stack, x, placement):
    def loss(stack, x):
      out = form(stack, x, placement)
      return jnp.sum(jnp.sin(out)), out
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(stack, x)
  places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cut)
  expected = jax.jit(lambda s, x: run(s, x, None))(stack, x)
  with jax.set_mesh(mesh):
    found = jax.jit(lambda s, x: run(s, x, placement))(
      jax.tree.map(put, stack, places), put(x, rows)
    )
  # Sums of 32 float32 rows in another order.
  chex.assert_trees_all_close(
    to_host(found), jax.device_get(expected), rtol=1e-4, atol=1e-4
  )
"""


def test_two_processes_get_what_one_device_gets(run_script_twice):
  run_script_twice(SCRIPT)
