"""Experts: each form against a loop over tokens, on one device and on more."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from common.errors import UserError
from common.parallel import experts, make_mesh
from common.parallel.experts import Placement
from common.parallel.traffic import bytes_sent

E, D, F = 8, 6, 16
MESHES = ({"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "fsdp": 2})
PLACEMENT = Placement("fsdp", ("data", "fsdp"))
CUT_HIDDEN = {
  "up": {"kernel": jax.P(None, None, "fsdp"), "bias": jax.P(None, "fsdp")},
  "down": {"kernel": jax.P(None, "fsdp"), "bias": jax.P()},
}
CUT_EXPERTS = {
  part: {"kernel": jax.P("fsdp"), "bias": jax.P("fsdp")}
  for part in ("up", "down")
}


def stack(count=E, seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    "up": {"kernel": draw(count, D, F), "bias": draw(count, F)},
    "down": {"kernel": draw(count, F, D), "bias": draw(count, D)},
  }


def tokens(*shape, seed=1):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(*shape, D)), jnp.float32)


def by_token(stack, x, ids):
  """[n d], one token after the other, in float64."""
  stack = jax.tree.map(np.float64, stack)
  rows = []
  for row, k in zip(np.float64(x), np.asarray(ids)):
    hidden = row @ stack["up"]["kernel"][k] + stack["up"]["bias"][k]
    hidden = np.maximum(hidden, 0)
    rows.append(hidden @ stack["down"]["kernel"][k] + stack["down"]["bias"][k])
  return np.stack(rows)


def random_ids(*shape, seed=2):
  return jnp.asarray(np.random.default_rng(seed).integers(E, size=shape))


def even_ids(rows=8, length=16):
  ids = experts.balanced_ids(jax.random.key(0), rows, length, E)
  return ids.reshape(-1)


def test_selected_is_that_expert():
  chosen = jax.jit(experts.selected)
  x = tokens(3, 4)
  for k in range(E):
    expected = by_token(stack(), x.reshape(-1, D), np.full(12, k))
    found = chosen(stack(), x, jnp.int32(k)).reshape(-1, D)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  assert chosen._cache_size() == 1


def test_grouped_takes_any_loads():
  for ids in (random_ids(50), jnp.full(50, 3), jnp.arange(50) % 2 * 7):
    found = jax.jit(experts.grouped)(stack(), tokens(50), ids)
    expected = by_token(stack(), tokens(50), ids)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_balanced_takes_equal_loads():
  ids = even_ids()
  assert np.bincount(ids).tolist() == [16] * E
  found = jax.jit(experts.balanced)(stack(), tokens(128), ids)
  expected = by_token(stack(), tokens(128), ids)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_balanced_draws_are_uniform_and_even_in_every_row():
  ids = np.asarray(experts.balanced_ids(jax.random.key(1), 400, 13, E))
  assert ids.shape == (400, 16)  # rounded up
  assert all(np.bincount(row).tolist() == [2] * E for row in ids)
  counts = np.bincount(ids[:, 0], minlength=E)
  assert np.all(np.abs(counts - 50) < 5 * np.sqrt(50))


@pytest.mark.parametrize(
  ("count", "factor", "expected"), [(8, 1.25, 3), (8, 1.0, 2), (1, 0.1, 1)]
)
def test_room(count, factor, expected):
  assert experts.capacity_of(count, 4, factor) == expected


def test_what_has_no_room_gets_nothing():
  """By position, in each group for itself; masked tokens take no room."""
  ids = jnp.int32([[0, 0, 0, 1], [0, 0, 2, 0]])
  mask = jnp.asarray([[True] * 4, [False, True, True, True]])
  x = tokens(2, 4)
  out, has_room = experts.capacity(stack(), x, ids, slots=2, mask=mask)
  assert has_room.tolist() == [
    [True, True, False, True], [False, True, True, True]
  ]  # fmt: skip
  expected = by_token(stack(), x.reshape(-1, D), ids.reshape(-1))
  expected = np.where(has_room.reshape(-1, 1), expected, 0)
  np.testing.assert_allclose(out.reshape(-1, D), expected, atol=1e-4)


def test_the_mean_of_outputs_is_not_the_output_of_the_mean():
  x = tokens(5)
  every = [by_token(stack(), x, np.full(5, k)) for k in range(E)]
  found = experts.averaged(stack(), x)
  np.testing.assert_allclose(found, np.mean(every, axis=0), atol=1e-4)
  mean = experts.mean_expert(stack())
  single = experts.selected(mean, x, jnp.int32(0))
  expected = by_token(mean, x, np.zeros(5, int))
  np.testing.assert_allclose(single, expected, atol=1e-4)
  assert not np.allclose(single, found, atol=0.1)


def forms():
  """name -> (form of (stack, x), x, where the stack lies)."""
  even, free = even_ids(), random_ids(128)
  return {
    "selected": (
      lambda s, x, p: experts.selected(s, x, jnp.int32(5), placement=p),
      tokens(16, 4), CUT_HIDDEN,
    ),
    "grouped": (
      lambda s, x, p: experts.grouped(s, x, free, placement=p),
      tokens(128), CUT_HIDDEN,
    ),
    "balanced": (
      lambda s, x, p: experts.balanced(s, x, even, placement=p),
      tokens(128), CUT_EXPERTS,
    ),
    "capacity": (
      lambda s, x, p: experts.capacity(
        s, x, free.reshape(8, 16), slots=3, placement=p
      )[0],
      tokens(8, 16), CUT_EXPERTS,
    ),
  }  # fmt: skip


def value_and_gradients(form, placement, s, x):
  def loss(s, x):
    out = form(s, x, placement)
    return jnp.sum(jnp.sin(out)), out

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(s, x)


@functools.cache
def unsharded(name):
  form, x, _ = forms()[name]
  run = jax.jit(functools.partial(value_and_gradients, form, None))
  return run(stack(), x)


def sent(name, data, p):
  """Bytes that a device sends, forward and with gradients, by the formulas.

  Of a loss: float32, 128 tokens, 4 bytes each for the loss and for an id.
  """
  n, r = 128 // 8, (p - 1) / p
  one, stack_bytes = 4 * (2 * D * F + F), 4 * E * (2 * D * F + F)
  loss, bias = 2 * 4 * 7 / 8, 4 * D
  add_up = 2 * (data - 1) / data / p  # what the other batch axes do
  match name:
    case "selected":
      forward = {"all-gather": one * r}
      back = {"reduce-scatter": one * r}
      # The bias of the output is on all devices.
      other = add_up * one + 2 * bias * (r + (data - 1) / data)
    case "grouped":
      tokens, ids = 4 * n * D * (p - 1), 4 * n * (p - 1)
      forward = {"all-gather": tokens + ids, "reduce-scatter": tokens}
      back = {"all-gather": tokens, "reduce-scatter": tokens}
      biases = 2 * E * bias * (r + (data - 1) / data)
      other = add_up * stack_bytes + biases
    case _:
      # Three slots for each of 16 tokens and 8 experts.
      rows = E * 3 if name == "capacity" else n
      forward = back = {"all-to-all": 2 * 4 * rows * D * r}
      other = add_up * (stack_bytes + E * bias)
  both = {
    kind: forward.get(kind, 0) + back.get(kind, 0) for kind in forward | back
  }
  return forward, both | {"all-reduce": other + loss}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(
  "name", ["selected", "grouped", "balanced", "capacity"]
)
def test_sharded_values_gradients_and_traffic(name, sizes):
  form, x, cut = forms()[name]
  mesh = make_mesh(sizes)
  placed = jax.device_put(
    stack(), jax.tree.map(functools.partial(NamedSharding, mesh), cut)
  )
  rows = NamedSharding(mesh, jax.P(("data", "fsdp")))
  with jax.set_mesh(mesh):
    arguments = (placed, jax.device_put(x, rows))
    program, forward = (
      jax.jit(call).lower(*arguments).compile()
      for call in (
        functools.partial(value_and_gradients, form, PLACEMENT),
        functools.partial(form, p=PLACEMENT),
      )
    )
    found = program(*arguments)
  chex.assert_trees_all_close(found, unsharded(name), rtol=1e-4, atol=1e-4)
  traffic = sent(name, sizes.get("data", 1), sizes["fsdp"])
  for compiled, formula in zip((forward, program), traffic):
    text = compiled.as_text()
    chex.assert_trees_all_close(bytes_sent(text), formula, atol=1)
    gathered = re.findall(r"= \w+\[([\d,]+)\][^=]*all-gather\(", text)
    assert not [shape for shape in gathered if shape.startswith(f"{E},")]


@pytest.mark.parametrize("name", ["selected", "grouped"])
def test_half_precision_on_a_mesh(name):
  """Sums between devices in bfloat16, next to an axis that takes no part."""
  form, x, _ = forms()[name]
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (stack(), x))
  with jax.set_mesh(make_mesh({"fsdp": 4, "model": 2})):
    run = jax.jit(functools.partial(value_and_gradients, form, PLACEMENT))
    (_, out), (gradient, _) = run(*half)
  (_, expected), (wanted, _) = unsharded(name)
  for found, like in ((out, expected), *zip(
    jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True
  )):  # fmt: skip
    error = np.linalg.norm(np.float32(found) - like) / np.linalg.norm(like)
    assert error < 0.1


def test_one_program_for_all_experts_on_a_mesh():
  """Of three experts, which eight devices need not divide."""
  x = tokens(16)
  with jax.set_mesh(make_mesh({"fsdp": 8})):
    chosen = jax.jit(functools.partial(experts.selected, placement=PLACEMENT))
    for k in range(3):
      expected = by_token(stack(3), x, np.full(16, k))
      found = chosen(stack(3), x, jnp.int32(k))
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert chosen._cache_size() == 1


def with_hidden(width):
  """A stack of that many hidden units."""
  up, down = stack()["up"], stack()["down"]
  return {
    "up": jax.tree.map(lambda leaf: leaf[..., :width], up),
    "down": {**down, "kernel": down["kernel"][:, :width]},
  }


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda p: experts.balanced(
        stack(4), tokens(64), random_ids(64), placement=p
      ),
      "4 experts do not divide among the 8 devices along mesh.fsdp",
    ),
    (
      lambda p: experts.capacity(
        stack(4), tokens(8, 8), random_ids(8, 8), slots=2, placement=p
      ),
      "4 experts do not divide among the 8 devices along mesh.fsdp",
    ),
    (
      lambda p: experts.selected(
        with_hidden(12), tokens(8), jnp.int32(0), placement=p
      ),
      "12 hidden units do not divide among the 8 devices",
    ),
    (
      lambda p: experts.grouped(
        with_hidden(12), tokens(8), random_ids(8), placement=p
      ),
      "12 hidden units do not divide among the 8 devices",
    ),
    (
      lambda p: experts.balanced(stack(), tokens(10), random_ids(10)),
      "10 tokens do not divide among 8",
    ),
  ],
)
def test_what_does_not_divide_is_one_line(call, message):
  with (
    jax.set_mesh(make_mesh({"fsdp": 8})),
    pytest.raises(UserError, match=message) as caught,
  ):
    call(PLACEMENT)
  assert "\n" not in str(caught.value)
