"""The kernel for GPUs: its blocks, devices, and when it is taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.parallel import make_mesh
from slimsam import attention, attention_triton
from slimsam.attention import TEXTBOOK, How, attend
from slimsam.attention_triton import Blocks

pytest.importorskip("jax.experimental.pallas.triton")
# Jax 0.11 announces that it will go.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
KERNEL = How(kernel="interpret")
CUDA = jax.sharding.AbstractMesh(
  (), (), (),
  abstract_device=jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
  ),
)  # fmt: skip


def case(grid, window, images=1, heads=2, width=5):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  rows = 2 * (window or grid) - 1
  return (
    draw(images, grid, grid, 3, heads, width),
    (draw(rows, width), draw(rows, width)),
    draw(3, heads, width),
  )


@pytest.mark.parametrize(
  "blocks",
  [Blocks(queries=16, keys=16), Blocks(queries=256, keys=16),
   Blocks(queries=32, keys=64), Blocks(queries=16, keys=1024)],
  ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
  ("grid", "window", "width"), [(18, 0, 16), (10, 7, 14)], ids=str
)
def test_blocks_change_nothing(grid, window, width, blocks, monkeypatch):
  """Rows of queries and of keys that do not divide a window; widths that are
  powers of two, and others.
  """
  given = case(grid, window, width=width)
  expected = attend(*given, window, TEXTBOOK)
  fused = functools.partial(attention_triton.fused, blocks=blocks)
  monkeypatch.setattr(attention_triton, "fused", fused)
  found = jax.jit(functools.partial(attend, window=window, how=KERNEL))(*given)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_large_logits_do_not_overflow():
  qkv, tables, bias = case(6, 4)
  found = attend(100 * qkv, tables, bias, 4, KERNEL)
  expected = attend(100 * qkv, tables, bias, 4, TEXTBOOK)
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-3)


def test_halves_stay_halves():
  """In bfloat16 the softmax is float32 all the same."""
  given = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), case(6, 0))
  found = attend(*given, 0, KERNEL)
  assert found.dtype == jnp.bfloat16
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), given)
  expected = attend(*wide, 0, TEXTBOOK)
  np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.03)


@pytest.mark.parametrize("images", [4, 3])
def test_each_device_has_its_own_images_and_heads(images):
  """Nothing is gathered, unless images do not divide among the devices."""
  given = case(6, 4, images=images)
  run = jax.jit(functools.partial(attend, window=4, how=KERNEL))
  expected = run(*given)
  mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
  spec = jax.P(("data", "fsdp") if images == 4 else None)
  spec = jax.P(*spec, None, None, None, "model")
  with jax.set_mesh(mesh):
    qkv = jax.device_put(given[0], jax.NamedSharding(mesh, spec))
    program = run.lower(qkv, *given[1:]).compile()
    assert "all-gather" not in program.as_text()
    np.testing.assert_allclose(program(qkv, *given[1:]), expected, atol=1e-6)


@pytest.mark.parametrize(
  ("platform", "dtype", "taken"),
  [("cuda", jnp.bfloat16, True), ("cuda", jnp.float32, False),
   ("cpu", jnp.bfloat16, False), ("tpu", jnp.bfloat16, False)],
)  # fmt: skip
@pytest.mark.parametrize("window", [0, 14])
def test_it_is_taken_in_16_bits_on_gpus(platform, dtype, taken, window):
  """Lowered for the platform, on a machine that has no such device."""

  def loss(qkv, tables, bias):
    return jnp.sum(attend(qkv, tables, bias, window, How()) ** 2)

  shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
  table = shape((27 if window else 39, 64))
  with jax.sharding.use_abstract_mesh(CUDA):
    traced = jax.jit(jax.value_and_grad(loss)).trace(
      shape((1, 20, 20, 3, 2, 64)), (table, table), shape((3, 2, 64))
    )
    text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("windowed_attention" in text) == taken


def test_without_it_there_is_the_plain_form(monkeypatch):
  monkeypatch.setattr(attention, "_has_triton", lambda: False)
  given = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), case(6, 0))
  with jax.sharding.use_abstract_mesh(CUDA):
    traced = jax.jit(lambda *args: attend(*args, 0, How())).trace(*given)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "windowed_attention" not in text


def test_kernels_are_named():
  with pytest.raises(UserError, match=r"kernel='tritn'.*triton"):
    How(kernel="tritn")
