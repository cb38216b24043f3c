"""Products by expert: every form against single tokens, with gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from common.parallel import experts, experts_grouped, make_mesh
from common.parallel.experts import Placement

E, D, F = 5, 6, 24
FORMS = {
  "blocks": experts_grouped.BLOCKS,
  "megablox": experts_grouped.make_megablox(interpret=True),
  "ragged_dot": None,
}
LOADS = {
  "any": np.random.default_rng(2).integers(E, size=300),
  "one_expert": np.full(300, 3),
  "two_of_five": np.arange(300) % 2 * 4,
}


def stack(seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    "up": {"kernel": draw(E, D, F), "bias": draw(E, F)},
    "down": {"kernel": draw(E, F, D), "bias": draw(E, D)},
  }


def tokens(count):
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.normal(size=(count, D)), jnp.float32)


def by_token(stack, x, ids):
  """Each token for itself."""

  def of_one(row, k):
    one = jax.tree.map(lambda leaf: leaf[k], stack)
    hidden = jnp.tanh(row @ one["up"]["kernel"] + one["up"]["bias"])
    return hidden @ one["down"]["kernel"] + one["down"]["bias"]

  return jax.vmap(of_one)(x, jnp.asarray(ids))


def by_expert(form):
  """A form, as a function like `by_token`."""
  return functools.partial(
    experts_grouped.feed_forward_by_expert, activation=jnp.tanh, form=form
  )


@functools.cache
def value_and_gradients(call):
  """`(stack, x, ids) -> ((loss, out), gradients)`, compiled once a shape."""

  def loss(stack, x, ids):
    out = call(stack, x, ids)
    return jnp.sum(jnp.sin(out)), out

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


OF_FORMS = {
  name: value_and_gradients(by_expert(f)) for name, f in FORMS.items()
}


@pytest.mark.parametrize("load", LOADS)
def test_values_and_gradients_are_those_of_single_tokens(load):
  ids = LOADS[load]
  inputs = stack(), tokens(len(ids)), ids
  expected = value_and_gradients(by_token)(*inputs)
  for form in OF_FORMS.values():
    found = form(*inputs)
    # Sums of up to 300 float32 products in another order.
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_token_fills_no_block():
  ids = jnp.array([2])
  expected = by_token(stack(), tokens(1), ids)
  for form in FORMS.values():
    found = by_expert(form)(stack(), tokens(1), ids)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_have_gradients():
  ids = LOADS["any"][:12]

  def steepness(call, stack, x):
    _, grads = value_and_gradients(call)(stack, x, ids)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads))

  found, expected = (
    jax.jit(jax.grad(functools.partial(steepness, call), argnums=(0, 1)))(
      stack(), tokens(12)
    )
    for call in (by_expert(FORMS["blocks"]), by_token)
  )
  # Entries are up to 1e3: sums of squares.
  chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("form", ["blocks", "megablox"])
def test_half_precision_stays_and_sums_in_float32(form):
  ids = LOADS["two_of_five"]
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (stack(), tokens(300)))
  found = OF_FORMS[form](*half, ids)
  whole = jax.tree.map(lambda a: a.astype(jnp.float32), half)
  expected = value_and_gradients(by_token)(*whole, ids)
  for mine, theirs in zip(
    jax.tree.leaves(found[1]), jax.tree.leaves(expected[1])
  ):
    assert mine.dtype == jnp.bfloat16
    error = jnp.linalg.norm(mine.astype(jnp.float32) - theirs)
    # 8 bits of mantissa; a sum of 150 rows in them would lose 10 %.
    assert error < 0.03 * jnp.linalg.norm(theirs)


@pytest.mark.parametrize(
  ("rows", "count", "expected"),
  [(8192, 64, 32), (8192, 4, 256), (2048, 64, 16), (2048, 4, 128), (1, 4, 16)],
)
def test_blocks_are_large_where_experts_have_many_rows(rows, count, expected):
  """A kernel's gradient is read and written once for each block."""
  assert experts_grouped._block_rows(rows, count, 16, 256) == expected


@pytest.mark.parametrize(
  ("platform", "sizes", "axes", "expected"),
  [
    ("cpu", {"fsdp": 8}, ("data", "fsdp"), "blocks"),
    ("gpu", {"fsdp": 8}, ("data", "fsdp"), "ragged_dot"),
    ("tpu", {"fsdp": 8}, ("data", "fsdp"), "megablox"),
    ("tpu", None, None, "megablox"),
    # The compiler would have to cut a kernel, which it cannot.
    ("tpu", {"fsdp": 8}, None, "ragged_dot"),
    ("tpu", {"fsdp": 4, "model": 2}, ("data", "fsdp"), "ragged_dot"),
  ],
)
def test_each_platform_has_its_form(
  monkeypatch, platform, sizes, axes, expected
):
  forms = {
    experts_grouped.BLOCKS: "blocks",
    experts_grouped.MEGABLOX: "megablox",
    None: "ragged_dot",
  }
  if sizes is None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert forms[experts_grouped.form_for(axes)] == expected
    return
  with jax.set_mesh(make_mesh(sizes)):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert forms[experts_grouped.form_for(axes)] == expected


WIDTHS = [(6, 24), (128, 256), (200, 640)]


@pytest.mark.parametrize(("width", "hidden"), WIDTHS)
def test_the_form_of_the_tpu_can_be_compiled_for_it(width, hidden):
  shapes = {
    "up": {"kernel": (E, width, hidden), "bias": (E, hidden)},
    "down": {"kernel": (E, hidden, width), "bias": (E, width)},
  }
  stack = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda s: type(s) is tuple)

  run = value_and_gradients(by_expert(experts_grouped.MEGABLOX))
  traced = run.trace(stack, jnp.zeros((50, width)), jnp.zeros(50, int))
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "tpu_custom_call" in text


@pytest.mark.parametrize(
  "sizes", [{"fsdp": 8}, {"data": 4, "fsdp": 2}], ids=str
)
def test_the_form_of_the_tpu_on_shards(monkeypatch, sizes):
  placement = Placement("fsdp", ("data", "fsdp"))
  cut = {
    "up": {"kernel": jax.P(None, None, "fsdp"), "bias": jax.P(None, "fsdp")},
    "down": {"kernel": jax.P(None, "fsdp"), "bias": jax.P()},
  }
  ids = jnp.asarray(LOADS["any"][:48])

  call = functools.partial(
    experts.grouped, activation=jnp.tanh, placement=placement
  )
  expected = value_and_gradients(by_token)(stack(), tokens(48), ids)
  mesh = make_mesh(sizes)
  with jax.set_mesh(mesh):
    placed = jax.device_put(
      (stack(), tokens(48)),
      (
        jax.tree.map(lambda spec: NamedSharding(mesh, spec), cut),
        NamedSharding(mesh, jax.P(("data", "fsdp"))),
      ),
    )
    monkeypatch.setattr(experts, "form_for", lambda axes: FORMS["megablox"])
    found = value_and_gradients(call)(*placed, ids)
    compiled = experts_grouped.MEGABLOX
    monkeypatch.setattr(experts, "form_for", lambda axes: compiled)
    value_and_gradients.cache_clear()
    traced = value_and_gradients(call).trace(*placed, ids)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
  assert "tpu_custom_call" in text
