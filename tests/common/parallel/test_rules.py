"""Sharding rules: first match, refusals, and whole states created sharded."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import struct
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from common.parallel import init_sharded, make_mesh, shardings
from common.parallel.rules import match, path_name

RULES = [
  (r"embed/table$", P("model", "fsdp")),
  (r"(up|gate)/kernel$", P("fsdp", "model")),
  (r"kernel$", P("model", "fsdp")),
  (r"bias$", P("model")),
  (r"scale$", P()),
]


@struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  key: jax.Array


OPTIMIZER = optax.adam(1e-3)


def init(key):
  params = {
    "embed": {"table": jax.random.normal(key, (16, 8))},
    "mlp": {
      "up": {"kernel": jax.random.normal(key, (8, 32)), "bias": jnp.zeros(32)},
      "down": {"kernel": jax.random.normal(key, (32, 8))},
    },
    "norm": {"scale": jnp.ones(8)},
  }
  return State(jnp.zeros((), int), params, OPTIMIZER.init(params), key)


SPECS = {
  "embed": {"table": P("model", "fsdp")},
  "mlp": {
    "up": {"kernel": P("fsdp", "model"), "bias": P("model")},
    "down": {"kernel": P("model", "fsdp")},
  },
  "norm": {"scale": P()},
}


@pytest.fixture(scope="module")
def mesh():
  return make_mesh({"data": 2, "fsdp": 2, "model": 2})


@pytest.mark.parametrize(
  ("path", "spec"),
  [
    ("params/mlp/up/kernel", P("fsdp", "model")),  # two match: the first wins
    ("params/mlp/down/kernel", P("model", "fsdp")),
    ("opt_state/0/mu/mlp/gate/kernel", P("fsdp", "model")),
    ("bias", P("model")),
    ("kernel/other", None),
  ],
)
def test_the_first_match_wins(path, spec):
  assert match(path, RULES) == spec


def test_order_matters():
  assert match("mlp/up/kernel", RULES[::-1]) == P("model", "fsdp")


def test_paths_go_through_dataclasses_tuples_and_dicts():
  shapes = jax.eval_shape(init, jax.random.key(0))
  leaves, _ = jax.tree_util.tree_flatten_with_path(shapes)
  names = {path_name(path) for path, _ in leaves}
  assert {"step", "params/embed/table", "opt_state/0/nu/norm/scale"} <= names


def test_moments_get_the_sharding_of_their_parameters(mesh):
  shapes = jax.eval_shape(init, jax.random.key(0))
  placed = shardings(shapes, mesh, RULES)
  adam = placed.opt_state[0]
  for tree in (placed.params, adam.mu, adam.nu):
    assert jax.tree.map(lambda sharding: sharding.spec, tree) == SPECS
  for scalar in (placed.step, adam.count, placed.key):
    assert scalar.spec == P()
  leaves = jax.tree.leaves(placed)
  assert all(leaf.mesh == mesh for leaf in leaves)


def test_a_state_is_created_where_it_belongs(mesh):
  key = jax.random.key(0)
  state = init_sharded(init, mesh, RULES, key)
  # Nothing that a rule splits is whole on any device, moments included.
  for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
    for array, spec in zip(
      jax.tree.leaves(tree), jax.tree.leaves(SPECS), strict=True
    ):
      parts = math.prod(2 for axis in spec if axis)
      sizes = {shard.data.size for shard in array.addressable_shards}
      assert sizes == {array.size // parts}
  expected = init(key)
  assert jnp.array_equal(state.key, expected.key)
  jax.tree.map(
    lambda got, wanted: jnp.allclose(got, wanted) or pytest.fail("differs"),
    (state.params, state.opt_state),
    (expected.params, expected.opt_state),
  )


def test_the_program_that_creates_a_state_holds_no_whole_array(mesh):
  """Each device writes its own part only: shapes in the compiled program."""

  def zeros(key):
    return {"up": {"kernel": jnp.zeros((4096, 64)) + jax.random.uniform(key)}}

  placed = shardings(jax.eval_shape(zeros, jax.random.key(0)), mesh, RULES)
  with jax.set_mesh(mesh):
    jitted = jax.jit(zeros, out_shardings=placed)
    memory = jitted.lower(jax.random.key(0)).compile().memory_analysis()
  assert memory.output_size_in_bytes <= 4096 * 64 * 4 // 4 + 64
  assert memory.temp_size_in_bytes < 4096


def test_an_updated_state_keeps_its_sharding(mesh):
  state = init_sharded(init, mesh, RULES, jax.random.key(0))
  placed = shardings(state, mesh, RULES)

  def update(state):
    updates, opt_state = OPTIMIZER.update(
      state.params, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    return state.replace(params=params, opt_state=opt_state)

  state = jax.jit(update, out_shardings=placed, donate_argnums=0)(state)
  for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed)):
    assert array.sharding.is_equivalent_to(sharding, array.ndim)


REFUSED = {
  "unmatched": (
    "mlp/weird",
    (8, 8),
    r"no sharding rule matches 'mlp/weird' of shape \(8, 8\)",
  ),
  "spec too long": (
    "mlp/up/kernel",
    (8,),
    r"2 dimensions, but 'mlp/up/kernel' has shape \(8,\)",
  ),
  "not divisible": (
    "mlp/up/kernel",
    (8, 7),
    r"dimension 1 of 'mlp/up/kernel', shape \(8, 7\).* 2 devices .* model",
  ),
  "not divisible by two axes": (
    "both",
    (6, 8),
    r"dimension 0 of 'both', shape \(6, 8\).* 4 devices .* fsdp\+model",
  ),
  "absent axis": ("absent", (8,), r"'absent' names 'tensor', .*'data'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_leaf(case, mesh):
  path, shape, message = REFUSED[case]
  tree = jax.ShapeDtypeStruct(shape, jnp.float32)
  for name in reversed(path.split("/")):
    tree = {name: tree}
  rules = [
    *RULES,
    (r"both$", P(("fsdp", "model"))),
    (r"absent$", P("tensor")),
  ]
  with pytest.raises(UserError, match=message) as error:
    shardings(tree, mesh, rules)
  assert "\n" not in str(error.value)


def test_scalars_need_no_rule(mesh):
  placed = shardings({"count": jax.ShapeDtypeStruct((), int)}, mesh, [])
  assert placed["count"].spec == P()
