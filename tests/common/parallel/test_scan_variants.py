"""What else the recurrence takes: heads, logarithms, complex numbers, steps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.parallel import (
  linear_scan,
  linear_scan_step,
  make_mesh,
  scan_triton,
)
from common.parallel.scan import IMPLEMENTATIONS
from common.parallel.scan_kernel import Kernel

FORMS = IMPLEMENTATIONS[1:]
forms = pytest.mark.parametrize("form", FORMS)
close = functools.partial(np.testing.assert_allclose, rtol=3e-5, atol=3e-5)
NAMES = ("h", "h_last", "dx", "da", "dh0")


@functools.partial(
  jax.jit, static_argnames=("form", "reverse", "log_gates", "given")
)
def run(form, x, a, h0, g, g_last, reset, reverse, log_gates, given=True):
  """h, h_last and the gradients of their weighted sum."""

  def loss(x, a, h0):
    h, last = linear_scan(
      x, a, h0 if given else None, reverse=reverse, reset=reset,
      log_gates=log_gates, impl=form, chunk=4,
    )  # fmt: skip
    total = jnp.sum(h.astype(last.dtype) * g) + jnp.sum(last * g_last)
    return jnp.real(total), (h, last)

  grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
  grads, values = grad(x, a, h0)
  return *values, *grads


def draw(batch=2, time=9, channels=6, gates=None, complex_=False, seed=0):
  rng = np.random.default_rng(seed)
  shape = (batch, time, channels)

  def normal(shape):
    value = rng.standard_normal((*shape, 2), np.float32)
    return value.view(np.complex64)[..., 0] if complex_ else value[..., 0]

  x, g, h0, g_last = map(normal, (shape, shape, *[(batch, channels)] * 2))
  a = rng.uniform(0.2, 1, (batch, time, gates or channels)).astype(np.float32)
  if complex_:
    a = (a * np.exp(1j * rng.uniform(-3, 3, a.shape))).astype(np.complex64)
  reset = rng.uniform(size=(batch, time)) < 0.3
  return x, a, h0, g, g_last, reset


def check(oracle, form, arrays, tolerance=3e-5, **options):
  x, a, h0, g, g_last, reset = arrays
  got = run(form, *arrays, **options)
  options = {"reset": reset, **options}
  expected = (
    *oracle.loop(x, a, h0, **options),
    *oracle.gradients(x, a, h0, g, g_last, **options),
  )
  for name, value, wanted in zip(NAMES, got, expected, strict=True):
    if np.iscomplexobj(wanted) and not np.iscomplexobj(value):
      wanted = wanted.real
    np.testing.assert_allclose(
      value, wanted, rtol=tolerance, atol=tolerance, err_msg=name
    )


@forms
@pytest.mark.parametrize("reverse", [False, True])
def test_one_gate_of_each_head(oracle, form, reverse):
  arrays = draw(gates=2)
  check(oracle, form, arrays, reverse=reverse, log_gates=False)


@forms
@pytest.mark.parametrize(("reverse", "gates"), [(False, None), (True, 3)])
def test_logarithms_of_gates(oracle, form, reverse, gates):
  x, a, *rest = draw(gates=gates)
  with np.errstate(divide="ignore"):
    log_a = np.log(np.where(a < 0.3, 0, a))  # some gates are 0
  assert np.isneginf(log_a).any()
  check(oracle, form, (x, log_a, *rest), reverse=reverse, log_gates=True)


@forms
@pytest.mark.parametrize(
  ("reverse", "log_gates"), [(False, False), (True, False), (False, True)]
)
def test_complex_numbers(oracle, form, reverse, log_gates):
  """The gates of an LRU turn."""
  x, a, *rest = draw(complex_=True)
  a = np.log(a) if log_gates else a
  check(oracle, form, (x, a, *rest), reverse=reverse, log_gates=log_gates)


def test_a_real_gate_of_a_complex_drive(oracle):
  x, _, *rest = draw(complex_=True)
  a = draw()[1]
  check(oracle, "sequential", (x, a, *rest), reverse=False, log_gates=False)


# Of each length every form once; what else there is, is varied with it.
LENGTHS = [
  (form, time, *kind)
  for time, kinds in {
    0: [("float32", False, None)],
    1: [("float32", True, True), ("bfloat16", False, None)],
    2: [("float32", True, None)],
    7: [("bfloat16", True, True)],
    128: [("float32", False, True)],
    1000: [("float32", True, True), ("bfloat16", False, None)],
    65536: [("float32", False, True)],
  }.items()
  for kind, form in itertools.product(kinds, FORMS)
]


@pytest.mark.parametrize(
  ("form", "time", "dtype", "reverse", "with_reset"), LENGTHS
)
def test_every_length(oracle, form, time, dtype, reverse, with_reset):
  channels = 1 if time > 1000 else 3
  x, a, h0, g, g_last, reset = draw(1, time, channels, seed=time)
  x, a = x.astype(dtype), (0.9 + 0.1 * a).astype(dtype)
  g = g.astype(dtype).astype(np.float32)
  reset = reset & (np.arange(time) % 50 == 3) if with_reset else None
  given, h0 = bool(time % 2), h0 * (time % 2)
  arrays = x, a, h0, g, g_last
  got = run(form, *arrays, reset, reverse, False, given=given)
  options = {"reset": reset, "reverse": reverse}
  expected = (
    *oracle.loop(x, a, h0, **options),
    *oracle.gradients(*arrays, **options),
  )
  eps = float(jnp.finfo(dtype).eps)
  for name, value, wanted in zip(NAMES, got, expected, strict=True):
    if not given and name == "dh0":
      wanted = np.zeros_like(wanted)
    # States are remembered as they are returned, in 16 bits.
    value = np.asarray(value, np.float32)
    np.testing.assert_allclose(
      value, wanted, rtol=max(2e-4, 2 * eps), atol=max(2e-4, eps / 4),
      err_msg=name,
    )  # fmt: skip


@forms
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_go_where_the_loop_takes_them(form, bad):
  """On to the next reset in their own row and channel, and nowhere else."""
  x = np.ones((2, 12, 3), np.float32)
  a = np.full_like(x, 0.5)
  x[1, 4, 2] = bad
  reset = np.zeros((2, 12), bool)
  reset[1, 7] = True
  options = {"impl": form, "chunk": 4}
  h, last = jax.jit(functools.partial(linear_scan, **options))(
    x, a, reset=reset
  )
  is_bad = ~np.isfinite(np.asarray(h))
  # A gate of 0 is no cure: 0 times NaN or inf is NaN, as in the loop.
  expected, state = np.zeros_like(is_bad), np.zeros((2, 3))
  with np.errstate(invalid="ignore"):
    for t in range(12):
      gate = np.where(reset[:, t, None], 0, a[:, t])
      state = gate * state + x[:, t]
      expected[:, t] = ~np.isfinite(state)
  np.testing.assert_array_equal(is_bad, expected)
  assert is_bad.any()
  assert np.isfinite(last[0]).all()


def test_gates_whose_product_overflows_leave_nothing_of_nothing():
  """1e20 to the power of 6 is no float32; a state of 0 stays 0."""
  x = jnp.zeros((1, 12, 2))
  a = jnp.full_like(x, 1e20)
  found = [linear_scan(x, a)[0]]
  kernel = Kernel("", "forward", False, False, False, interpret=True)
  numbers = [(array,) for array in (x, a, x[:, 0])]
  for (plane,) in scan_triton.run(
    kernel, numbers, None, ("float32",) * 2, parts=2
  ):
    found.append(plane)
  with jax.set_mesh(make_mesh({"seq": -1, "data": 2})):
    found += jax.jit(lambda x, a: linear_scan(x, a, mesh_axis="seq"))(x, a)
  for value in found:
    assert not np.any(value)


@forms
def test_long_products_underflow_to_nothing(form):
  """0.01 to the power of 300 is no float32; the states are."""
  x = np.ones((1, 300, 2), np.float32)
  a = np.full_like(x, 0.01)
  h, last = jax.jit(functools.partial(linear_scan, impl=form, chunk=4))(x, a)
  close(h[0, 2:], np.full((298, 2), 1.010101))
  close(last, [[1.010101, 1.010101]])


@pytest.mark.parametrize("log_gates", [False, True])
def test_steps_are_the_scan(log_gates):
  x, a, h0, *_, reset = draw(gates=2)
  a = np.log(a) if log_gates else a
  h, last = linear_scan(x, a, h0, reset=reset, log_gates=log_gates)
  step = jax.jit(functools.partial(linear_scan_step, log_gates=log_gates))
  state = jnp.asarray(h0)
  for t in range(x.shape[1]):
    state = step(x[:, t], a[:, t], state, reset=reset[:, t])
    close(state, h[:, t])
  close(state, last)
  with pytest.raises(ValueError, match=r"x has shape \(2, 9, 6\).*\[B, N\]"):
    linear_scan_step(x, a, h0)
  with pytest.raises(ValueError, match=r"a has shape \(2, 4\).*\(2, 6\), or"):
    linear_scan_step(x[:, 0], x[:, 0, :4], h0)
  with pytest.raises(ValueError, match=r"h has shape \(2, 9, 6\)"):
    linear_scan_step(x[:, 0], a[:, 0], x)


# -- second derivatives --------------------------------------------------------


def curvature(scan, x, a, h0, g, v):
  """The gradient of <gradient, v>, as a Hessian times a vector is found."""

  def loss(x, a, h0):
    h, last = scan(x, a, h0)
    return jnp.sum(jnp.tanh(h) * g) + jnp.sum(last**3)

  def slope(*primals):
    grads = jax.grad(loss, argnums=(0, 1, 2))(*primals)
    return sum(jnp.sum(own * by) for own, by in zip(grads, v))

  return jax.grad(slope, argnums=(0, 1, 2))(x, a, h0)


@pytest.mark.parametrize(
  "form", ["sequential", "associative", "triton", "mosaic"]
)
def test_second_derivatives(oracle, form):
  x, a, h0, g, _, reset = draw(time=7)
  v = x[::-1], a[:, ::-1], -h0
  scan = functools.partial(linear_scan, reset=reset, impl=form, chunk=4)
  plain = functools.partial(oracle.plain, reset=reset)
  got, expected = (
    jax.jit(functools.partial(curvature, own))(x, a, h0, g, v)
    for own in (scan, plain)
  )
  for value, wanted in zip(got, expected, strict=True):
    close(value, wanted, rtol=1e-4, atol=1e-4)


def test_second_derivatives_of_16_bits_are_those_of_32():
  """Bits have no derivative; what goes through loops as bits has one."""
  x, a, h0, g, _, reset = draw(time=7)
  v = x[::-1], a[:, ::-1], -h0
  scan = functools.partial(linear_scan, reset=reset, impl="sequential")

  def rounded(x, a, h0):
    h, last = scan(x.astype(jnp.bfloat16), a.astype(jnp.bfloat16), h0)
    return h.astype(jnp.float32), last

  got, expected = (
    jax.jit(functools.partial(curvature, own))(x, a, h0, g, v)
    for own in (rounded, scan)
  )
  for value, wanted in zip(got, expected, strict=True):
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(value, wanted, atol=0.05 * scale)


def test_forms_without_a_second_derivative_say_so():
  x, a, h0, g, *_ = draw()
  v = x, a, h0
  scan = functools.partial(linear_scan, impl="chunked")
  with pytest.raises(ValueError, match=r"'chunked' has no second.*'sequent"):
    curvature(scan, x, a, h0, g, v)
