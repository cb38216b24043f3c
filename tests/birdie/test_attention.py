"""Attention: its equation, its mask, positions, chunks, its memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie.attention import Visible, attend, rotated
from common.parallel import make_mesh

# A prefix of 3 and a target of 2; a target alone; a prefix alone; padding.
SEGMENTS = np.array([1, 1, 1, 1, 1, 2, 2, 3, 3, 0, 0, 0])
PREFIX = np.array([1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0]) > 0
POSITIONS = np.array([0, 1, 2, 3, 4, 0, 1, 0, 1, 0, 0, 0])
ROWS, LENGTH, HEADS, KEYS, SIZE = 2, len(SEGMENTS), 4, 2, 6


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(0)
  made = [
    rng.normal(size=(ROWS, LENGTH, heads, SIZE)).astype(np.float32)
    for heads in (HEADS, KEYS, KEYS)
  ]
  places = [np.tile(a, (ROWS, 1)) for a in (SEGMENTS, POSITIONS, PREFIX)]
  return *made, Visible(*map(jnp.asarray, places))


@functools.partial(
  jax.jit, static_argnames=("ahead", "chunk", "impl", "seq_axis")
)
def run(query, key, value, places, **options):
  def total(query, key, value):
    out = attend(query, key, value, places, places, **options)
    return jnp.sum(out**2), out

  return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(query, key, value)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_equation(inputs, ahead):
  """Softmax over those that a query sees, in a loop; section A.4."""
  query, key, value, _ = inputs
  (_, found), _ = run(*inputs, ahead=ahead, chunk=64)
  for t in range(LENGTH - 3):  # padding is nobody's concern
    sees = [
      s
      for s in range(LENGTH)
      if SEGMENTS[s] == SEGMENTS[t]
      and (s <= t or (ahead and PREFIX[s] and PREFIX[t]))
    ]
    for head in range(HEADS):
      k, v = (x[0, sees, head // (HEADS // KEYS)] for x in (key, value))
      scores = k @ query[0, t, head] / np.sqrt(SIZE)
      weights = np.exp(scores - scores.max())
      expected = weights @ v / weights.sum()
      np.testing.assert_allclose(found[0, t, head], expected, atol=1e-5)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
  ("chunk", "impl"),
  [(1, "einsum"), (5, "einsum"), (5, "xla"), (6, "einsum"), (12, "xla")],
)
def test_chunks_and_forms_change_no_number(inputs, ahead, chunk, impl):
  """Where the row ends with padding, its queries are nobody's concern."""
  query, *rest, places = inputs
  (_, found), slopes = run(
    query[:, :9], *(x[:, :9] for x in rest), jax.tree.map(_shortened, places),
    ahead=ahead, chunk=chunk, impl=impl,
  )  # fmt: skip
  (_, expected), whole = run(
    query[:, :9], *(x[:, :9] for x in rest), jax.tree.map(_shortened, places),
    ahead=ahead, chunk=64, impl="xla",
  )  # fmt: skip
  chex.assert_trees_all_close(
    (found, slopes), (expected, whole), atol=1e-5, rtol=1e-5
  )


def _shortened(x):
  return x[:, :9]


def test_a_causal_chunk_needs_no_later_keys():
  """Its products are with as many keys as queries before and in it."""

  def flops(ahead):
    heads = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)
    place = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 64), bool)
    lowered = run.lower(
      heads, heads, heads, Visible(place, place, mask), ahead=ahead, chunk=8
    )
    # The loop's body is counted once: one of eight chunks.
    return lowered.compile().cost_analysis()["flops"] * (8 if ahead else 1)

  # 1 + 2 + ... + 8 eighths of 8 x 8.
  assert flops(False) < 0.65 * flops(True)


def test_shards_of_time_change_no_number(inputs):
  mesh = make_mesh({"data": 2, "seq": 4})
  with jax.set_mesh(mesh):
    found = run(*inputs, ahead=True, chunk=2, seq_axis="seq")
  chex.assert_trees_all_close(
    jax.device_get(found),
    jax.device_get(run(*inputs, ahead=True, chunk=64)),
    atol=1e-5,
    rtol=1e-5,
  )


def test_memory_does_not_grow_with_the_square():
  def bytes_of(length):
    heads = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)
    place = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, length), bool)
    places = Visible(place, place, mask)
    lowered = run.lower(heads, heads, heads, places, ahead=True, chunk=128)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert bytes_of(2048) < 2.5 * bytes_of(1024)


def test_rotary_positions_are_relative():
  rng = np.random.default_rng(0)
  query, key = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

  def score(q, k):
    turned = (
      rotated(jnp.array([[at]]), 8, base=100.0)(jnp.asarray(x))
      for at, x in ((q, query), (k, key))
    )
    return float(jnp.sum(jnp.multiply(*turned)))

  assert score(5, 3) == pytest.approx(score(12, 10), abs=1e-5)
  assert abs(score(5, 3) - score(5, 4)) > 1e-3
  assert score(7, 7) == pytest.approx(float(np.sum(query * key)), abs=1e-5)


def test_rotary_known_answers():
  """Pair (x_0, x_2) turns by t, pair (x_1, x_3) by t / base ** (1/2)."""
  x = jnp.array([1.0, 1.0, 0.0, 0.0])[None, None, None]
  turned = rotated(jnp.array([[2]]), 4, base=100.0)(x)[0, 0, 0]
  expected = [np.cos(2), np.cos(0.2), np.sin(2), np.sin(0.2)]
  np.testing.assert_allclose(turned, expected, atol=1e-6)
