"""Attention: against a loop, in all its forms, without the whole logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from common.errors import UserError
from slimsam.attention import TEXTBOOK, How, attend, fitted

FORMS = [
  How(), TEXTBOOK, How(fold=True, chunks=2), How(fold=False, chunks=6),
  How(kernel="interpret"),
]  # fmt: skip


def case(grid, window, heads=2, width=5, seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  rows = 2 * (window or grid) - 1
  return (
    draw(2, grid, grid, 3, heads, width),
    (draw(rows, width), draw(rows, width)),
    draw(3, heads, width),
  )


def loop(qkv, tables, bias, window):
  """One query after the other, by what attends to what."""
  images, grid, _, _, heads, width = qkv.shape
  side = window or grid
  whole = -(-grid // side) * side
  padded = np.broadcast_to(bias, (images, whole, whole, *bias.shape)).copy()
  padded[:, :grid, :grid] = qkv
  out = np.zeros((images, grid, grid, heads, width))
  for b, y, x, h in np.ndindex(images, grid, grid, heads):
    top, left = y // side * side, x // side * side
    q = padded[b, y, x, 0, h].astype(np.float64)
    logits, values = [], []
    for i, j in np.ndindex(side, side):
      k, v = padded[b, top + i, left + j, 1:, h].astype(np.float64)
      by_row = q @ tables[0][(y - top) - i + side - 1]
      by_column = q @ tables[1][(x - left) - j + side - 1]
      logits.append(q @ k * width**-0.5 + by_row + by_column)
      values.append(v)
    weights = np.exp(logits - np.max(logits))
    out[b, y, x, h] = weights @ np.array(values) / weights.sum()
  return out


@pytest.mark.parametrize("how", FORMS, ids=str)
@pytest.mark.parametrize(
  ("grid", "window", "width"),
  [(6, 0, 5), (6, 3, 5), (6, 4, 8), (6, 8, 5), (6, 0, 8)],
  ids=str,
)
def test_every_form_is_the_loop(grid, window, width, how):
  """Windows that fit, that need padding, and one larger than the image; what
  pads them is seen.
  """
  qkv, tables, bias = case(grid, window, width=width)
  found = jax.jit(functools.partial(attend, window=window, how=how))(
    qkv, tables, bias
  )
  expected = loop(qkv, tables, bias, window)
  np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("window", [0, 4])
def test_gradients_are_equal(window):
  qkv, tables, bias = case(6, window)

  def loss(qkv, tables, bias, how):
    return jnp.sum(jnp.sin(attend(qkv, tables, bias, window, how)))

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
  expected = grad(qkv, tables, bias, TEXTBOOK)
  for how in (How(), How(chunks=3), How(kernel="interpret")):
    found = grad(qkv, tables, bias, how)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
      np.testing.assert_allclose(a, b, atol=2e-5)
  assert np.any(expected[2]) == bool(window)  # only padding shows the biases


def largest(jaxpr):
  """Elements of the largest array that a program names, loops included."""
  found = 0
  for equation in jaxpr.eqns:
    sizes = [var.aval.size for var in equation.outvars]
    inner = jaxprs_in_params(equation.params)
    found = max([found, *sizes, *(largest(own) for own in inner)])
  return found


@pytest.mark.parametrize("backward", [False, True])
def test_chunks_never_hold_all_logits(backward):
  """16 x 16 patches, 4 heads: the logits would be 2^18 numbers."""
  qkv, tables, bias = case(16, 0, heads=4)

  def numbers(chunks):
    def run(qkv):
      out = attend(qkv[:1], tables, bias, 0, How(chunks=chunks))
      return jnp.sum(jnp.sin(out))

    made = jax.make_jaxpr(jax.grad(run) if backward else run)(qkv)
    return largest(made.jaxpr)

  assert numbers(1) == 2**18
  assert numbers(16) < 2**18 / 4


def test_chunks_are_chosen_by_size():
  """What is not told is divided into parts of 256 queries at most."""
  qkv, tables, bias = case(24, 0)  # 576 queries
  jaxpr = str(jax.make_jaxpr(lambda q: attend(q, tables, bias, 0, How()))(qkv))
  assert "length=3" in jaxpr
  small, tables, bias = case(6, 0)
  jaxpr = str(
    jax.make_jaxpr(lambda q: attend(q, tables, bias, 0, How()))(small)
  )
  assert "scan" not in jaxpr


def test_chunks_divide_the_rows():
  qkv, tables, bias = case(6, 0)
  with pytest.raises(UserError, match="chunks=4 must divide the 6 rows"):
    attend(qkv, tables, bias, 0, How(chunks=4))


def test_tables_of_another_length_are_resized():
  """Linearly, with half-pixel centres: as torch's interpolate does."""
  table = np.arange(5.0, dtype=np.float32)[:, None]
  np.testing.assert_array_equal(fitted(table, 3), table)
  found = np.asarray(fitted(jnp.asarray(table), 5))[:, 0]
  place = np.clip((np.arange(9) + 0.5) * 5 / 9 - 0.5, 0, 4)
  np.testing.assert_allclose(found, place, atol=1e-6)
  found = np.asarray(fitted(jnp.asarray(table), 2))[:, 0]
  place = (np.arange(3) + 0.5) * 5 / 3 - 0.5
  np.testing.assert_allclose(found, place, atol=1e-6)
