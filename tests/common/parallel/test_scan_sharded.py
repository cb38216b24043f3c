"""The recurrence along time that a mesh shares, against the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from common.parallel import linear_scan
from common.parallel.scan import IMPLEMENTATIONS
from common.parallel.traffic import bytes_sent

FORMS = IMPLEMENTATIONS[1:]
ONE = np.ones((2, 6, 3), np.float32)
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def inputs(batch=2, time=24, channels=3):
  """Returns x, a, h0 and the weights of h and h_last in a loss."""
  rng = np.random.default_rng(0)
  x, g = rng.standard_normal((2, batch, time, channels), np.float32)
  a = rng.uniform(0.0, 1.0, x.shape).astype(np.float32)
  h0, g_last = rng.standard_normal((2, batch, channels), np.float32)
  return x, a, h0, g, g_last


@functools.partial(
  jax.jit, static_argnames=("form", "reverse", "mesh_axis", "log_gates")
)
def run(
  form, x, a, h0, g, g_last, reset=None, reverse=False, mesh_axis=None,
  log_gates=False,
):  # fmt: skip
  """h, h_last and the gradients of their weighted sum."""

  def loss(x, a, h0):
    h, last = linear_scan(
      x, a, h0, reset=reset, reverse=reverse, mesh_axis=mesh_axis,
      log_gates=log_gates, impl=form, chunk=4,
    )  # fmt: skip
    return jnp.sum(h.astype(last.dtype) * g) + jnp.sum(last * g_last), (h, last)

  grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
  grads, values = grad(x, a, h0)
  return *values, *grads


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
  ("form", "shards"),
  [
    ("sequential", 1),
    ("sequential", 2),
    ("sequential", 4),
    ("sequential", 8),
    ("associative", 8),
    ("chunked", 2),
    ("triton", 4),
    ("mosaic", 4),
  ],
)
def test_sharded_in_time_is_unsharded(make_mesh, form, shards, reverse):
  arrays = inputs()
  # Inside a shard, at the start of one and at the end of one.
  reset = np.zeros((2, 24), bool)
  reset[0, [4, 9, 12, 17]] = True
  expected = run("sequential", *arrays, reverse=reverse, reset=reset)
  with jax.set_mesh(make_mesh(seq=shards)):
    got = run(form, *arrays, reverse=reverse, reset=reset, mesh_axis="seq")
  for value, wanted in zip(got, expected, strict=True):
    close(value, wanted)
  assert not np.any(np.asarray(got[3])[reset])


def test_sharded_in_time_and_rows_under_other_transformations(make_mesh):
  x, a, _, g, _ = inputs(batch=4, time=16)

  def loss(x, a, mesh_axis=None):
    @jax.checkpoint
    def layer(x, _):
      run = functools.partial(linear_scan, reverse=True, mesh_axis=mesh_axis)
      return x + jax.vmap(run)(x[None], a[None])[0][0], None

    out, _ = jax.lax.scan(layer, x, length=2)
    return jnp.sum(out * g)

  expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, a)
  mesh = make_mesh(data=2, seq=4)
  with jax.set_mesh(mesh):
    place = NamedSharding(mesh, jax.P("data", "seq"))
    x, a = jax.device_put((x, a), place)
    grad = jax.grad(functools.partial(loss, mesh_axis="seq"), argnums=(0, 1))
    got = jax.jit(grad)(x, a)
  for value, wanted in zip(got, expected, strict=True):
    assert value.sharding.is_equivalent_to(place, 3)
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)


def test_heads_and_logarithms_along_a_mesh(make_mesh):
  x, a, *rest = inputs(channels=6)
  log_a = np.log(a[..., :2] + 1e-3)
  reset = np.arange(48).reshape(2, 24) % 7 == 2
  expected = run("sequential", x, log_a, *rest, reset, log_gates=True)
  with jax.set_mesh(make_mesh(seq=4)):
    got = run(
      "sequential", x, log_a, *rest, reset, log_gates=True, mesh_axis="seq"
    )
  for value, wanted in zip(got, expected, strict=True):
    close(value, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_shards_exchange_states_and_decays_only(make_mesh, form):
  """A state and a decay a shard, and the cotangent's state."""
  mesh = make_mesh(seq=4)
  time = NamedSharding(mesh, jax.P(None, "seq"))
  whole = NamedSharding(mesh, jax.P())
  placed = jax.device_put(inputs(), (time, time, whole, time, whole))
  with jax.set_mesh(mesh):
    compiled = run.lower(form, *placed, mesh_axis="seq").compile()
  batch, channels, shards = 2, 3, 4
  assert bytes_sent(compiled.as_text()) == {
    "all-gather": 4 * 3 * batch * channels * (shards - 1)
  }


def test_sharded_bfloat16(make_mesh):
  x, a, h0, g, g_last = inputs(time=16)
  arrays = x.astype(jnp.bfloat16), a.astype(jnp.bfloat16), h0, g, g_last
  expected = run("sequential", *arrays)
  with jax.set_mesh(make_mesh(seq=4)):
    got = run("sequential", *arrays, mesh_axis="seq")
  for value, wanted in zip(got, expected, strict=True):
    assert value.dtype == wanted.dtype
    # A float32 difference may round to the other bf16 neighbour.
    np.testing.assert_allclose(
      np.float32(value), np.float32(wanted), rtol=2.0**-7, atol=1e-4
    )


def test_there_is_no_second_derivative_along_a_mesh(make_mesh):
  x, a, *_ = inputs()

  def slope(x):
    return jnp.sum(jax.grad(
      lambda x: jnp.sum(linear_scan(x, a, mesh_axis="seq")[0] ** 2)
    )(x))  # fmt: skip

  said = pytest.raises(ValueError, match="mesh_axis='seq' has no second")
  with jax.set_mesh(make_mesh(seq=4)), said:
    jax.grad(slope)(x)


def test_errors_of_the_mesh_axis(make_mesh):
  with jax.set_mesh(make_mesh(data=2, seq=4)):
    with pytest.raises(ValueError, match=r"'time' is not.*'data', 'seq'"):
      linear_scan(ONE, ONE, mesh_axis="time")
    with pytest.raises(ValueError, match=r"\(2, 6, 3\).* 6 steps .* 4 shards"):
      linear_scan(ONE, ONE, mesh_axis="seq")
