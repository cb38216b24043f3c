"""Eight devices equal one, however experts are chosen and parameters lie."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.parallel import batch_sharding, init_sharded, make_mesh, shardings
from thor.data import shift_right
from thor.losses import cross_entropy_loss
from thor.model import Transformer, init_params, rules_of
from thor.routing import Routing, hash_table, train_routes
from thor.settings import PATTERNS, Settings

PAD, V, E, F, D = 1, 16, 8, 32, 16
LAYERS = (1, 1)
ROUTINGS = {
  "thor": Routing(experts=E),
  "thor by token": Routing(experts=E, level="token"),
  "thor by sentence": Routing(experts=E, level="sentence"),
  "random_switch": Routing("random_switch", experts=E, groups=8),
  "switch": Routing("switch", experts=E, groups=8),
  "hash": Routing("hash", experts=E, capacity=0.0),
}
MESHES = {
  "fsdp=8": {"fsdp": 8},
  "data=4": {"data": 4, "fsdp": 2},
  "data=2": {"data": 2, "fsdp": 4},
  "model=2": {"data": 2, "fsdp": 2, "model": 2},
}


def settings_of(routing):
  return Settings(
    V, width=D, hidden=F, heads=4, encoder_layers=1, decoder_layers=1,
    pattern=PATTERNS["all"], dropout=0.1, **routing.model_settings(),
  )  # fmt: skip


def params_of(settings, seed=0):
  rng = np.random.default_rng(seed)
  init = functools.partial(init_params, settings)
  shapes = jax.eval_shape(init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: (rng.normal(size=leaf.shape) / 3).astype(leaf.dtype), shapes
  )


def batch(rows=64):
  rng = np.random.default_rng(1)

  def side(width):
    tokens = rng.integers(2, V, (rows, width))
    lengths = rng.integers(1, width + 1, rows)
    return np.where(np.arange(width) < lengths[:, None], tokens, PAD)

  return {
    "source": side(6).astype(np.int32),
    "target": side(5).astype(np.int32),
  }


TABLE = hash_table(np.ones(V, int), E, kind="balanced", seed=0)


def step(routing, params, batch, key):
  """The loss, its gradient, what the layers report, and the routes."""
  source, target = batch["source"], batch["target"]
  given = shift_right(target)
  (routes,) = train_routes(
    routing, LAYERS, key, source=source, target=given, passes=1,
    table=jnp.asarray(TABLE),
  )  # fmt: skip

  def loss(params):
    logits, aux = Transformer(settings_of(routing)).apply(
      {"params": params}, source, given, routes, key=key
    )
    value, _ = cross_entropy_loss(logits, target, pad_id=PAD)
    return value + 0.01 * jnp.sum(aux["balance"]), aux

  return jax.value_and_grad(loss, has_aux=True)(params), routes


@functools.cache
def compiled(name, mesh=None):
  """What a step makes, and its program's text; on `mesh` or one device."""
  routing = ROUTINGS[name]
  settings = settings_of(routing)
  params, rows, key = params_of(settings), batch(), jax.random.key(3)
  program = jax.jit(functools.partial(step, routing))
  if mesh is None:
    return jax.device_get(program(params, rows, key)), ""
  mesh = make_mesh(MESHES[mesh])
  placed = shardings(params, mesh, rules_of(settings))
  params = jax.device_put(params, placed)
  rows = jax.device_put(rows, batch_sharding(mesh))
  with jax.set_mesh(mesh):
    made = program.lower(params, rows, key).compile()
    return jax.device_get(made(params, rows, key)), made.as_text()


CASES = [
  *(("thor", mesh) for mesh in MESHES),
  # The others where all axes have devices.
  *((name, "model=2") for name in ("thor by token", "switch", "hash")),
  ("thor by token", "fsdp=8"),
  ("thor by sentence", "data=2"),
  ("random_switch", "data=4"),
]


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_eight_devices_are_one(name, mesh):
  (value, grads), routes = compiled(name)[0]
  found, text = compiled(name, mesh)
  # The draws bit by bit; sums over 400 tokens in another order.
  chex.assert_trees_all_equal(found[1], routes)
  chex.assert_trees_all_close(found[0][0], value, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(found[0][1], grads, rtol=1e-4, atol=1e-5)
  # No program fetches a stack of experts.
  assert not gathered_stacks(text)


def gathered_stacks(text):
  """All-gathers whose result is a kernel of every expert, of all layers too."""
  shapes = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
  sides = [tuple(map(int, shape.split(","))) for shape in shapes]
  return [s for s in sides if {s, s[1:]} & {(E, D, F), (E, F, D)}]


def test_a_thor_step_gathers_one_expert():
  """And scatters its gradient, rather than adding whole ones up."""
  _, text = compiled("thor", "fsdp=8")
  assert re.search(r"\[16,32\]\S* all-gather\(", text)
  assert re.search(r"\[32,16\]\S* all-gather\(", text)
  assert "reduce-scatter" in text


def test_indexing_a_stack_cut_along_its_experts_would_be_found():
  """What the test above looks for is what such a program has."""
  mesh = make_mesh({"fsdp": 8})
  place = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
  stack = jax.device_put(np.ones((E, D, F), np.float32), place)
  take = jax.jit(
    lambda stack, i: jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
  )
  text = take.lower(stack, 0).compile().as_text()
  assert gathered_stacks(text)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("mesh", ["data=2", "model=2"])
def test_the_rules_place_every_parameter(name, mesh):
  """Each device has its share of a stack; along experts where tokens travel."""
  routing = ROUTINGS[name]
  settings = settings_of(routing)
  mesh = make_mesh(MESHES[mesh])
  shapes = jax.eval_shape(
    functools.partial(init_params, settings), jax.random.key(0)
  )
  placed = shardings(shapes, mesh, rules_of(settings))
  devices = mesh.shape["fsdp"]
  for side in ("encoder", "decoder"):
    stack = shapes[side]["layers"]["layer_0"]["experts"]
    own = placed[side]["layers"]["layer_0"]["experts"]
    shard = jax.tree.map(lambda s, p: p.shard_shape(s.shape), stack, own)
    by_room = routing.kind in ("switch", "random_switch")
    cut_experts = by_room or routing.level != "batch"
    if cut_experts:
      assert shard["up"]["kernel"] == (1, E // devices, D, F)
      assert shard["down"]["bias"] == (1, E // devices, D)
    else:
      assert shard["up"]["kernel"] == (1, E, D, F // devices)
      assert shard["up"]["bias"] == (1, E, F // devices)
      assert shard["down"]["kernel"] == (1, E, F // devices, D)
      assert shard["down"]["bias"] == (1, E, D)


def test_parameters_begin_where_they_belong():
  settings = settings_of(ROUTINGS["thor"])
  mesh = make_mesh(MESHES["data=2"])
  shapes = jax.eval_shape(
    functools.partial(init_params, settings), jax.random.key(0)
  )

  def init(key):
    del key  # drawing takes long to compile
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)

  made = init_sharded(init, mesh, rules_of(settings), jax.random.key(0))
  kernel = made["encoder"]["layers"]["layer_0"]["experts"]["up"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (1, E, D, F // 4)
  assert made["embedding"].sharding.shard_shape((V, D)) == (V, D // 4)


def test_every_device_needs_all_experts_of_its_sentences():
  """32 rows divide among 8 experts, 4 rows on each of 8 devices do not."""
  routing, rows = ROUTINGS["thor by sentence"], batch(32)
  draw = functools.partial(
    train_routes, routing, LAYERS, jax.random.key(0),
    source=rows["source"], target=rows["target"], passes=1,
  )  # fmt: skip
  jax.eval_shape(draw)
  with (
    jax.set_mesh(make_mesh({"fsdp": 8})),
    pytest.raises(UserError, match=r"32 rows.*8 experts on each of 8 devices"),
  ):
    jax.eval_shape(draw)


def test_groups_that_do_not_divide_among_the_devices():
  routing = Routing("switch", experts=E, groups=4)
  arguments = params_of(settings_of(routing)), batch(), jax.random.key(0)
  with (
    jax.set_mesh(make_mesh({"fsdp": 8})),
    pytest.raises(UserError, match=r"groups=4 does not divide among the 8"),
  ):
    jax.eval_shape(functools.partial(step, routing), *arguments)


def test_a_hidden_width_that_does_not_divide():
  settings = Settings(
    V, width=D, hidden=20, heads=4, encoder_layers=1, decoder_layers=1,
    pattern=PATTERNS["all"], **ROUTINGS["thor"].model_settings(),
  )  # fmt: skip
  with pytest.raises(UserError, match="not divisible by the 8 devices"):
    shardings(params_of(settings), make_mesh({"fsdp": 8}), rules_of(settings))
