"""The recurrence's kernels: blocks, lowering, sharding, when they are taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from common.parallel import linear_scan, scan_mosaic, scan_triton
from common.parallel.scan_choice import Measured, choose, nearest, table
from common.parallel.scan_dispatch import IMPLEMENTATIONS
from common.parallel.scan_kernel import Kernel

# Jax 0.11 announces that it will go.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
CUDA = jax.sharding.AbstractMesh(
  (), (), (),
  abstract_device=jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
  ),
)  # fmt: skip
PLATFORMS = {"triton": "cuda", "mosaic": "tpu"}
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def draw(batch, time, channels, seed=0):
  rng = np.random.default_rng(seed)
  x, g = rng.standard_normal((2, batch, time, channels), np.float32)
  a = rng.uniform(0.3, 1, x.shape).astype(np.float32)
  h0, g_last = rng.standard_normal((2, batch, channels), np.float32)
  return x, a, h0, g, g_last, rng.uniform(size=(batch, time)) < 0.1


def check(oracle, run, shape, reverse):
  """A kernel's three tasks, called as they are, against the loop."""
  x, a, h0, g, g_last, reset = draw(*shape)
  options = {"reverse": reverse, "reset": reset}

  def call(task, *arrays):
    kernel = Kernel("", task, reverse, False, True, interpret=True)
    count = {"forward": 2, "backward": 3, "reduce": 2}[task]

    @jax.jit
    def call(*arrays):
      numbers = [(array,) for array in arrays]
      return run(kernel, numbers, reset, ("float32",) * count)

    return [plane for (plane,) in call(*arrays)]

  h, last = call("forward", x, a, h0)
  wanted, wanted_last = oracle.loop(x, a, h0, **options)
  close(h, wanted)
  close(last, wanted_last)
  found = call("backward", a, h, h0, g, g_last)
  expected = oracle.gradients(x, a, h0, g, g_last, **options)
  for value, own in zip(found, expected, strict=True):
    close(value, own)
  state, decay = call("reduce", x, a)
  close(state, oracle.loop(x, a, 0 * h0, **options)[1])
  close(decay, oracle.loop(0 * x, a, 0 * h0 + 1, **options)[1])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
  ("shape", "blocks", "parts"),
  [
    ((2, 37, 5), scan_triton.Blocks(channels=4, steps=4), 1),
    ((1, 37, 5), scan_triton.Blocks(channels=8, steps=2), 3),
    ((1, 40, 3), scan_triton.Blocks(channels=2, steps=5), 4),
  ],
)
def test_blocks_and_parts_of_triton(oracle, shape, blocks, parts, reverse):
  """Channels and steps that nothing divides; time in parts."""
  run = functools.partial(scan_triton.run, blocks=blocks, parts=parts)
  check(oracle, run, shape, reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 100, 5), (1, 33, 130)])
def test_blocks_of_mosaic(oracle, shape, reverse):
  blocks = scan_mosaic.Blocks(steps=32, channels=128)
  run = functools.partial(scan_mosaic.run, blocks=blocks)
  check(oracle, run, shape, reverse)


def test_time_is_divided_where_a_card_would_be_idle():
  assert scan_triton.parts_of(8, 4096, 2048, scan_triton.Blocks()) == 1
  assert scan_triton.parts_of(1, 65536, 512, scan_triton.Blocks()) == 32
  assert scan_triton.parts_of(1, 2048, 512, scan_triton.Blocks()) == 4
  assert scan_triton.parts_of(1, 100, 512, scan_triton.Blocks()) == 1


@pytest.mark.parametrize("impl", PLATFORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_lowered_for_its_platform(impl, dtype, reverse):
  """On a machine that has no such device."""

  def loss(x, a, h0, reset):
    h, last = linear_scan(
      x, a, h0, reset=reset, reverse=reverse, impl=impl, log_gates=True
    )
    return jnp.sum(h.real.astype(jnp.float32) ** 2) + jnp.sum(last.real)

  carry = jnp.promote_types(dtype, jnp.float32)
  batch, time, channels = (2, 4096, 2048) if reverse else (1, 1300, 200)
  x = jax.ShapeDtypeStruct((batch, time, channels), dtype)
  h0 = jax.ShapeDtypeStruct((batch, channels), carry)
  reset = jax.ShapeDtypeStruct((batch, time), bool)
  with jax.sharding.use_abstract_mesh(CUDA):
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, h0, reset)
    platform = PLATFORMS[impl]
    text = traced.lower(lowering_platforms=(platform,)).as_text()
  for task in ("forward", "backward"):
    assert f"linear_scan_{task}" in text


# -- which form "auto" takes ---------------------------------------------------

ROWS = (
  Measured("cpu", "float32", 4096, 4096, "sequential"),
  Measured("gpu", "float32", 512, 1024, "associative"),
  Measured("gpu", "float32", 16384, 4096, "triton"),
  Measured("gpu", "bfloat16", 16384, 4096, "chunked"),
  Measured("tpu", "float32", 16384, 4096, "mosaic"),
)


@pytest.mark.parametrize(
  ("platform", "shape", "dtype", "expected"),
  [
    ("cpu", (1, 7, 3), "bfloat16", "sequential"),
    ("gpu", (8, 4096, 2048), "float32", "triton"),
    ("gpu", (1, 500, 512), "float32", "associative"),
    ("gpu", (8, 4096, 2048), "bfloat16", "chunked"),
    ("gpu", (8, 4096, 2048), "float16", "triton"),  # as float32
    ("gpu", (8, 4096, 2048), "complex64", "associative"),  # not measured
    ("tpu", (8, 4096, 2048), "bfloat16", "mosaic"),
    ("tpu", (8, 4096, 2048), "float16", "associative"),  # it cannot be read
    ("metal", (8, 4096, 2048), "float32", "associative"),
    ("cpu", (8, 4096, 2048), "complex64", "sequential"),
    ("gpu", (0, 1, 0), "float32", "associative"),
  ],
)
def test_the_nearest_measurement_decides(platform, shape, dtype, expected):
  assert nearest(platform, shape, dtype, ROWS) == expected


def test_the_table_names_forms():
  assert choose((2, 11, 3), jnp.float32) == "sequential"
  assert table()
  for row in table():
    assert row.impl in IMPLEMENTATIONS[1:]
    assert row.platform in ("cpu", "gpu", "tpu")
    assert min(row.rows, row.steps) > 0
  places = [row[:4] for row in table()]
  assert len(set(places)) == len(places)


@pytest.mark.parametrize("reverse", [False, True])
def test_mosaic_on_a_simulated_tpu(oracle, reverse):
  """Two blocks of time; what is read beyond its end is NaN there."""
  x, a, h0, g, g_last, reset = draw(1, 40, 3)
  options = {"reverse": reverse, "reset": reset}
  params = pltpu.InterpretParams(uninitialized_memory="nan")
  h, last = oracle.loop(x, a, h0, **options)
  for task, arrays, expected in (
    ("forward", (x, a, h0), (h, last)),
    (
      "backward",
      (a, np.float32(h), h0, g, g_last),
      oracle.gradients(x, a, h0, g, g_last, **options),
    ),
  ):
    kernel = Kernel("", task, reverse, False, True, interpret=params)
    found = scan_mosaic.run(
      kernel, [(array,) for array in arrays], reset,
      ("float32",) * len(expected), blocks=scan_mosaic.Blocks(steps=32),
    )  # fmt: skip
    for (value,), wanted in zip(found, expected, strict=True):
      close(value, wanted)
