"""linear_scan: every form against a NumPy loop in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from common.parallel import linear_scan
from common.parallel.scan import IMPLEMENTATIONS
from common.parallel.traffic import bytes_sent

FORMS = IMPLEMENTATIONS[1:]
forms = pytest.mark.parametrize("form", FORMS)
directions = pytest.mark.parametrize("reverse", [False, True])
# Forms associate float32 sums differently: a few roundings of numbers near 1.
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def inputs(batch=2, time=11, channels=3, seed=0):
  """Returns x, a, h0 and the weights of h and h_last in a loss."""
  rng = np.random.default_rng(seed)
  x, g = rng.standard_normal((2, batch, time, channels), np.float32)
  a = rng.uniform(0.0, 1.0, x.shape).astype(np.float32)
  h0, g_last = rng.standard_normal((2, batch, channels), np.float32)
  return x, a, h0, g, g_last


RESETS = {
  "none": None,
  "nowhere": [],
  "first": [0],
  "last": [10],
  "some": [0, 3, 4, 8],
  "everywhere": range(11),
}


def make_reset(where, batch=2, time=11):
  if where is None:
    return None
  reset = np.zeros((batch, time), bool)
  reset[0, list(where)] = True  # the other rows have none
  return reset


def value_and_grads(scan, x, a, h0, g, g_last):
  """Returns h, h_last and the gradients of sum(h g) + sum(h_last g_last)."""

  def loss(x, a, h0):
    h, last = scan(x, a, h0)
    return jnp.sum(h.astype(last.dtype) * g) + jnp.sum(last * g_last), (h, last)

  grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
  grads, values = grad(x, a, h0)
  return *values, *grads


@functools.partial(jax.jit, static_argnames=("form", "reverse", "mesh_axis"))
def run(form, x, a, h0, g, g_last, reverse=False, reset=None, mesh_axis=None):
  """`value_and_grads` of a form."""
  scan = functools.partial(
    linear_scan, reverse=reverse, reset=reset, mesh_axis=mesh_axis, impl=form,
    chunk=4,
  )  # fmt: skip
  return value_and_grads(scan, x, a, h0, g, g_last)


def check(oracle, form, arrays, **options):
  """Values and gradients against the loop in double; returns the latter."""
  h, last, *grads = run(form, *arrays, **options)
  expected = (
    *oracle.loop(*arrays[:3], **options),
    *oracle.gradients(*arrays, **options),
  )
  for got, wanted in zip((h, last, *grads), expected, strict=True):
    close(got, wanted)
  return grads


@functools.partial(jax.jit, static_argnames=("form", "reverse"))
def forward(form, x, a, h0, reverse=False, reset=None):
  return linear_scan(x, a, h0, reverse=reverse, reset=reset, impl=form, chunk=4)


# -- known answers -------------------------------------------------------------


@forms
def test_known_answer(form):
  x = jnp.array([1.0, 2.0, 3.0, 4.0])[None, :, None]
  a = jnp.array([0.5, 0.5, 0.0, 0.5])[None, :, None]
  zero = jnp.zeros((1, 1))
  h, last, dx, da, dh0 = run(form, x, a, zero, 1.0, 0.0)
  assert h.ravel().tolist() == [1.0, 2.5, 3.0, 5.5]
  assert last.tolist() == [[5.5]]
  assert dx.ravel().tolist() == [1.5, 1.0, 1.5, 1.0]
  assert da.ravel().tolist() == [0.0, 1.0, 3.75, 3.0]
  assert dh0.tolist() == [[0.75]]


# Two segments of three tokens, each with a prefix of two; gates 1/2, drive t+1.
PREFIX_ANSWERS = {
  "forward": (False, [1, 0, 0, 1, 0, 0], [1, 2.5, 4.25, 4, 7, 9.5]),
  "strict": (True, [0, 1, 1, 0, 1, 1], [2, 2, 3, 6.5, 5, 6]),
  "paper": (True, [0, 0, 1, 0, 0, 1], [2.75, 3.5, 3, 8, 8, 6]),
}


@forms
@pytest.mark.parametrize("case", PREFIX_ANSWERS)
def test_known_answer_of_a_bidirectional_prefix(case, form):
  reverse, reset, expected = PREFIX_ANSWERS[case]
  x = np.arange(1.0, 7.0, dtype=np.float32)[None, :, None]
  reset = np.array([reset], bool)
  a, zero = np.full_like(x, 0.5), x[:, 0] * 0
  h, _ = forward(form, x, a, zero, reverse=reverse, reset=reset)
  assert h.ravel().tolist() == expected


# -- against the definition ----------------------------------------------------


@forms
@directions
@pytest.mark.parametrize("where", RESETS.values(), ids=RESETS.keys())
def test_values_and_gradients_are_the_loops(oracle, where, reverse, form):
  reset = make_reset(where)
  _, da, _ = check(oracle, form, inputs(), reverse=reverse, reset=reset)
  if where is not None:
    assert not np.any(np.asarray(da)[reset])  # exactly 0


@forms
@pytest.mark.parametrize("time", [1, 3, 8])
def test_lengths_that_chunks_divide_or_not(oracle, time, form):
  check(oracle, form, inputs(time=time), reverse=time % 2 == 0)


@forms
@directions
def test_no_steps_hand_the_state_on(reverse, form):
  x, a, h0, g, g_last = inputs(time=0)
  h, last, dx, da, dh0 = run(form, x, a, h0, g, g_last, reverse=reverse)
  assert h.shape == dx.shape == da.shape == (2, 0, 3)
  np.testing.assert_array_equal(last, h0)
  np.testing.assert_array_equal(dh0, g_last)


@forms
@directions
def test_float64_and_finite_differences(oracle, reverse, form):
  options = {"reverse": reverse, "reset": make_reset([0, 2])}
  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    *primals, g, g_last = (np.float64(array) for array in inputs())
    steps = [rng.standard_normal(p.shape) for p in primals]

    def at(eps):
      moved = (p + eps * s for p, s in zip(primals, steps))
      h, last, *grads = run(form, *moved, g, g_last, **options)
      return np.sum(h * g) + np.sum(last * g_last), h, last, grads

    _, h, last, grads = jax.device_get(at(0.0))
    eps = 1e-6
    slope = (at(eps)[0] - at(-eps)[0]) / (2 * eps)
  expected = oracle.loop(*primals, **options)
  np.testing.assert_allclose(h, expected[0], rtol=1e-13, atol=1e-13)
  np.testing.assert_allclose(last, expected[1], rtol=1e-13, atol=1e-13)
  ours = sum(np.sum(g * s) for g, s in zip(grads, steps, strict=True))
  # Central differences: eps**2 by the third derivative, 1e-16 / eps rounding.
  np.testing.assert_allclose(ours, slope, rtol=1e-7)


def test_without_h0_the_state_starts_at_zero():
  x, a, h0, *_ = inputs()
  h, last = linear_scan(x, a)
  expected = linear_scan(x, a, 0 * h0)
  np.testing.assert_array_equal(h, expected[0])
  np.testing.assert_array_equal(last, expected[1])


def test_auto_is_sequential_on_a_cpu():
  x, a, h0, *_ = inputs()

  def program(impl):
    return jax.jit(lambda *v: linear_scan(*v, impl=impl)).lower(x, a, h0)

  assert program("auto").as_text() == program("sequential").as_text()
  assert program("auto").as_text() != program("associative").as_text()


@forms
@directions
def test_bfloat16_is_rounded_at_the_end(reverse, form):
  """The carry is float32: only the inputs and outputs are rounded."""
  x, a, h0, g, g_last = inputs(time=40)
  x, a = x.astype(jnp.bfloat16), (0.9 + 0.1 * a).astype(jnp.bfloat16)
  g = np.float32(g.astype(jnp.bfloat16))
  h, last, dx, da, dh0 = run(form, x, a, h0, g, g_last, reverse=reverse)
  assert [v.dtype for v in (h, dx, da)] == [jnp.bfloat16] * 3
  assert last.dtype == dh0.dtype == jnp.float32

  exact = run(
    "sequential",
    np.float32(x),
    np.float32(a),
    h0,
    g,
    g_last,
    reverse=reverse,
  )
  close(last, exact[1], rtol=1e-4, atol=1e-4)
  close(dh0, exact[4], rtol=1e-4, atol=1e-4)
  # 8 bits of mantissa: half a unit in the last place is at most 2**-8. The
  # gates' gradient is rounded twice: states are kept as they are returned.
  for got, expected, rounded in (
    (h, exact[0], 1), (dx, exact[2], 1), (da, exact[3], 2)
  ):  # fmt: skip
    np.testing.assert_allclose(
      np.float32(got), expected, rtol=rounded * 2.0**-8, atol=1e-4
    )


@forms
def test_drive_gates_and_h0_may_differ_in_dtype(form):
  x, a, h0, g, g_last = inputs()
  x, h0 = x.astype(jnp.bfloat16), h0.astype(jnp.bfloat16)
  dtypes = [str(array.dtype) for array in run(form, x, a, h0, g, g_last)]
  assert dtypes == ["bfloat16", "float32", "bfloat16", "float32", "bfloat16"]


# -- laws ----------------------------------------------------------------------


@directions
@pytest.mark.parametrize(
  ("form", "dtype"),
  [
    ("triton", "float32"),
    ("mosaic", "float32"),
    ("sequential", "bfloat16"),
  ],
)
def test_a_scan_splits_anywhere(form, dtype, reverse):
  x, a, h0, *_ = inputs()
  x, a = x.astype(dtype), a.astype(dtype)
  reset = make_reset(RESETS["some"])
  scan = functools.partial(forward, form, reverse=reverse)
  whole, whole_last = scan(x, a, h0, reset=reset)
  for split in (4, 7):
    parts = [slice(0, split), slice(split, None)]
    halves, state = {}, h0
    for i in (1, 0) if reverse else (0, 1):
      part = parts[i]
      halves[i], state = scan(
        x[:, part], a[:, part], state, reset=reset[:, part]
      )
    joined = np.concatenate([halves[0], halves[1]], axis=1)
    # bf16 may round to either neighbour after a float32 difference.
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
      np.float32(joined), np.float32(whole), rtol=4 * eps, atol=2e-6
    )
    close(state, whole_last)


@forms
def test_gates_of_zero_and_one_stay_finite(form):
  """Nothing is divided by a product of gates."""
  x = np.ones((1, 100, 2), np.float32)
  a = np.broadcast_to(np.array([0.0, 1.0], np.float32), x.shape)
  one = np.ones((1, 2), np.float32)
  h, last, dx, da, dh0 = run(form, x, a, one, 1.0, 0.0)
  np.testing.assert_array_equal(h[0, :, 0], np.ones(100))
  np.testing.assert_array_equal(h[0, :, 1], np.arange(2, 102))
  np.testing.assert_array_equal(last, [[1, 101]])
  np.testing.assert_array_equal(dx[0, :, 1], np.arange(100, 0, -1))
  np.testing.assert_array_equal(dh0, [[0, 100]])
  assert np.all(np.isfinite(da))


# -- inside other transformations ----------------------------------------------


@forms
def test_vmap_is_a_loop_over_examples(form):
  arrays = inputs()
  scales = np.float32([1.0, 0.5, 0.25])
  stacked = [np.stack([scale * v for scale in scales]) for v in arrays]
  mapped = jax.jit(jax.vmap(functools.partial(run, form)))(*stacked)
  for i in range(3):
    one = run(form, *(v[i] for v in stacked))
    for got, expected in zip(mapped, one, strict=True):
      close(got[i], expected)


@forms
def test_vmap_over_the_drive_alone(oracle, form):
  x, a, *_ = inputs()
  scan = functools.partial(linear_scan, impl=form, chunk=4)
  h, _ = jax.jit(jax.vmap(scan, in_axes=(0, None)))(np.stack([x, 2 * x]), a)
  close(h[1], 2 * h[0])
  close(h[0], oracle.loop(x, a, 0)[0])


@forms
def test_checkpointed_layers_in_a_scan(oracle, form):
  x, a, h0, g, _ = inputs()
  scales = np.float32([1.0, 0.5, 0.25])

  def loss(scan, scales, x):
    @jax.checkpoint
    def layer(x, scale):
      h, last = scan(scale * x, a, h0)
      return x + h, last

    out, lasts = jax.lax.scan(layer, x, scales)
    return jnp.sum(out * g) + jnp.sum(lasts)

  grad = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)
  ours = grad(functools.partial(linear_scan, impl=form, chunk=4), scales, x)
  for got, expected in zip(ours, grad(oracle.plain, scales, x), strict=True):
    # Three layers deep the states are about ten times as large.
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "mosaic"])
def test_rows_and_channels_shard_without_communication(make_mesh, form):
  arrays = inputs(batch=4, time=6, channels=4)
  reset = make_reset([1, 3], batch=4, time=6)
  expected = run(form, *arrays, reset=reset)
  mesh = make_mesh(data=2, model=2)
  cube = NamedSharding(mesh, jax.P("data", None, "model"))
  plane = NamedSharding(mesh, jax.P("data", "model"))
  placed = jax.device_put(arrays, (cube, cube, plane, cube, plane))
  reset = jax.device_put(reset, NamedSharding(mesh, jax.P("data")))
  compiled = run.lower(form, *placed, reset=reset).compile()
  assert not bytes_sent(compiled.as_text())
  for got, wanted in zip(compiled(*placed, reset=reset), expected, strict=True):
    close(got, wanted)


@pytest.mark.parametrize("form", ["sequential", "chunked", "associative"])
def test_inside_anothers_shard_map(make_mesh, form):
  """Gates that all shards share, too: their gradient is summed."""
  x, a, *rest = inputs(batch=4)
  arrays = x, np.broadcast_to(a[:1], x.shape), *rest
  rows = jax.P("data")
  h, last, dx, da, dh0 = run(form, *arrays)
  expected = h, last, dx, da.sum(axis=0, keepdims=True), dh0
  arrays = x, a[:1], *rest

  def local(x, a, h0, g, g_last):
    def loss(x, a, h0):
      h, last = linear_scan(
        x, jnp.broadcast_to(a, x.shape), h0, impl=form, chunk=4
      )
      return jnp.sum(h * g) + jnp.sum(last * g_last), (h, last)

    grads, values = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, a, h0)
    # The one of zeros is made inside.
    gates = jnp.broadcast_to(a, x.shape)
    zeros = linear_scan(x, gates)[0] - linear_scan(x, gates, 0 * h0)[0]
    return (*values, *grads), zeros

  with jax.set_mesh(make_mesh(data=2)):
    mapped = jax.shard_map(
      local,
      in_specs=(rows, jax.P(), rows, rows, rows),
      out_specs=((rows, rows, rows, jax.P(), rows), rows),
    )
    got, zeros = jax.jit(mapped)(*arrays)
  assert not np.any(zeros)
  for value, wanted in zip(got, expected, strict=True):
    close(value, wanted)


@pytest.mark.parametrize("form", ["triton", "mosaic"])
def test_a_kernel_inside_anothers_shard_map(make_mesh, form):
  x, a, h0, *_ = inputs(batch=4)
  rows = jax.P("data")
  expected = forward(form, x, a, h0)
  with jax.set_mesh(make_mesh(data=2)):
    got = jax.jit(
      jax.shard_map(
        lambda x, a, h0: linear_scan(x, a, h0, impl=form, chunk=4),
        in_specs=(rows,) * 3,
        out_specs=rows,
        check_vma=False,
      )
    )(x, a, h0)
  for value, wanted in zip(got, expected, strict=True):
    close(value, wanted)


def test_on_a_mesh_of_explicit_axes():
  x, a, *_ = inputs(batch=4, channels=4)
  expected = forward("sequential", x, a, np.zeros((4, 4), np.float32))
  mesh = jax.make_mesh(
    (2, 2), ("data", "model"), (AxisType.Explicit,) * 2,
    devices=jax.devices()[:4],
  )  # fmt: skip
  scan = jax.jit(lambda x, a: linear_scan(x, a, impl="sequential"))
  before = jnp.asarray(x), jnp.asarray(a)  # which knows no mesh
  with jax.set_mesh(mesh):
    placed = [jax.device_put(v, jax.P("data", None, "model")) for v in (x, a)]
    found = scan(*placed), scan(*before)
  for got in found:
    for value, wanted in zip(got, expected, strict=True):
      close(value, wanted)
