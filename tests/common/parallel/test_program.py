"""What runs how often in a program, and its FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.parallel.program import flops, lines
from common.parallel.traffic import bytes_sent

TEXT = """
%twice (a: f32[8]) -> f32[8] {
  %s = f32[8]{0} all-gather(%a), replica_groups={{0,1}}, dimensions={0}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = f32[8]{0} call(%x), to_apply=%twice
  %d = f32[8]{0} call(%c), to_apply=%twice
}

%condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %b = f32[8] conditional(%i, %w, %w), branch_computations={%twice, %twice}
}
"""


def test_lines_count_as_often_as_they_run():
  times = {line.text.split()[0]: line.times for line in lines(TEXT) if line[0]}
  assert times["%w"] == 1
  assert times["%c"] == 5
  assert times["%s"] == 5 * 2 + 2
  assert bytes_sent(TEXT) == {"all-gather": 12 * 8 * 4 / 2}


def compiled(function, *shapes):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(function).lower(*arrays).compile().as_text()


def test_layers_in_a_loop_count_each():
  """Forward, and backward with the products that are made again."""

  def loss(weights, x):
    def layer(x, w):
      return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
    return jnp.sum(x**2)

  product = 2 * 16 * 32 * 32
  shapes = (7, 32, 32), (16, 32)
  assert flops(compiled(loss, *shapes)) == 7 * product
  assert flops(compiled(jax.grad(loss), *shapes)) == 7 * 4 * product


def test_batches_of_products_and_convolutions():
  text = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
                  (3, 4, 5), (3, 5, 6))  # fmt: skip
  assert flops(text) == 2 * 3 * 4 * 5 * 6

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  text = compiled(convolve, (2, 8, 8, 3), (3, 3, 3, 16))
  assert flops(text) == 2 * (2 * 6 * 6 * 16) * (3 * 3 * 3)


def test_a_product_without_sizes_is_no_guess():
  with pytest.raises(ValueError, match=r"no sizes in '%a = f32\[4\]"):
    flops("%a = f32[4]{0} dot(%b, %c), lhs_contracting_dims={0}")


def test_what_only_looks_like_a_product():
  assert flops("%dot = f32[4]{0} add(%b, %c)") == 0
  assert np.isscalar(flops(""))
