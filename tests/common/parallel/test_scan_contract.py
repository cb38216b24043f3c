"""linear_scan: what it keeps, what it needs, what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.parallel import linear_scan
from common.parallel.scan import IMPLEMENTATIONS

FORMS = IMPLEMENTATIONS[1:]
forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (2, 0, 3)])
def test_of_nothing_there_is_nothing(form, shape):
  x = jnp.ones(shape)

  def loss(x, a):
    h, last = linear_scan(x, a, impl=form, chunk=4)
    return jnp.sum(h) + jnp.sum(last), (h, last)

  grads, (h, last) = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, x)
  assert h.shape == grads[0].shape == grads[1].shape == shape
  assert last.shape == (shape[0], shape[2])
  assert not np.any(last)


@forms
def test_the_same_call_compiles_once(form):
  x = jnp.full((2, 5, 3), 0.5)
  scan = functools.partial(linear_scan, impl=form, chunk=4)
  grad = jax.grad(lambda x: jnp.sum(scan(x, x)[0]))
  grad(x)
  compiled = []

  def listen(event, duration, **_):
    if event.endswith("backend_compile_duration"):
      compiled.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    grad(x)
    assert not compiled
    jax.jit(lambda x: x + 17)(x)
    assert compiled  # else nobody listens
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


# -- memory --------------------------------------------------------------------


def residual_shapes(form, time, dtype="float32"):
  x = jnp.zeros((2, time, 3), dtype)
  _, pullback = jax.vjp(
    lambda x, a, h0: linear_scan(x, a, h0, **form)[0], x, x, x[:, 0]
  )
  return sorted(
    (leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pullback)
  )


def test_chunked_saves_its_inputs_and_the_chunk_boundaries():
  form = {"impl": "chunked", "chunk": 16}
  boundaries = ((4, 2, 3), "float32")
  for dtype in ("float32", "bfloat16"):
    whole = ((2, 64, 3), dtype)
    assert residual_shapes(form, 64, dtype) == sorted(
      [whole, whole, boundaries]
    )


def test_sequential_saves_the_gates_and_the_states():
  whole = ((2, 64, 3), "float32")
  assert residual_shapes({"impl": "sequential"}, 64) == [
    ((2, 3), "float32"),
    whole,
    whole,
  ]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_sequential_loop_needs_no_temporaries(reverse):
  x = jax.ShapeDtypeStruct((2, 512, 64), jnp.float32)
  reset = jax.ShapeDtypeStruct((2, 512), bool)

  def run(x, a, g, reset):
    h, pullback = jax.vjp(
      lambda x, a: linear_scan(
        x, a, reverse=reverse, reset=reset, impl="sequential"
      )[0],
      x,
      a,
    )
    return h, pullback(g)

  compiled = jax.jit(run).lower(x, x, x, reset).compile()
  array = 2 * 512 * 64 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * array


@pytest.mark.parametrize("impl", ["sequential", "chunked"])
def test_16_bits_are_never_converted_as_a_whole(impl):
  """On a CPU a loop that slices them would do so at every step."""
  x = jax.ShapeDtypeStruct((2, 512, 64), jnp.bfloat16)
  reset = jax.ShapeDtypeStruct((2, 512), bool)

  def run(x, a, g, reset):
    h, pullback = jax.vjp(
      lambda x, a: linear_scan(x, a, reset=reset, impl=impl, chunk=128)[0], x, a
    )
    return h, pullback(g)

  text = jax.jit(run).lower(x, x, x, reset).compile().as_text()
  assert "u16[2,512,64]" in text or "u16[4,2,128,64]" in text
  assert "f32[2,512,64]" not in text
  assert "f32[2,128,64]" not in text


# -- errors --------------------------------------------------------------------

ONE = np.ones((2, 6, 3), np.float32)
ERRORS = {
  "impl": ((ONE, ONE), {"impl": "parallel"}, ValueError, r"impl='parallel'"),
  "pallas": (
    (ONE, ONE),
    {"impl": "pallas"},
    ValueError,
    r"impl='pallas'.*auto.*sequential.*associative.*chunked.*triton.*mosaic",
  ),
  "chunk": (
    (ONE, ONE),
    {"impl": "chunked", "chunk": 0},
    ValueError,
    r"chunk=0",
  ),
  "x rank": (
    (ONE[0], ONE[0]),
    {},
    ValueError,
    r"x has shape \(6, 3\).*\[B, T, N\]",
  ),
  "a shape": (
    (ONE, ONE[:, :1]),
    {},
    ValueError,
    r"a has .*\(2, 1, 3\).*6, 3\)",
  ),
  "heads": (
    (ONE, ONE[..., :2]),
    {},
    ValueError,
    r"a has shape \(2, 6, 2\).*\(2, 6\) and a divisor of 3",
  ),
  "h0 shape": ((ONE, ONE, ONE), {}, ValueError, r"h0 has .*must be \(2, 3\)"),
  "reset shape": (
    (ONE, ONE),
    {"reset": np.zeros((6, 2), bool)},
    ValueError,
    r"reset has shape \(6, 2\).*\(2, 6\)",
  ),
  "x dtype": ((np.int32(ONE), ONE), {}, TypeError, r"x is int32"),
  "a dtype": ((ONE, ONE > 0), {}, TypeError, r"a is bool"),
  "h0 dtype": ((ONE, ONE, np.int32(ONE[:, 0])), {}, TypeError, r"h0 is int32"),
  "complex gates": ((ONE, 1j * ONE), {}, TypeError, r"a is complex.*x float32"),
  "float16": (
    (np.float16(ONE), ONE),
    {"impl": "mosaic"},
    TypeError,
    r"x is float16, which impl='mosaic'",
  ),
  "reset dtype": (
    (ONE, ONE),
    {"reset": ONE[:, :, 0]},
    TypeError,
    r"reset is float32.*bool",
  ),
  "no mesh": (
    (ONE, ONE),
    {"mesh_axis": "seq"},
    ValueError,
    r"mesh_axis='seq' is not.*set_mesh",
  ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
  args, options, kind, message = ERRORS[case]
  with pytest.raises(kind, match=message) as error:
    linear_scan(*args, **options)
  assert "\n" not in str(error.value)
