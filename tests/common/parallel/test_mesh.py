"""Meshes: sizes, batch shardings, and what the start-up report says."""

import jax
import jax.numpy as jnp
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding

from common.errors import UserError
from common.parallel import (
  batch_sharding,
  bytes_per_device,
  gather_texts,
  local_mesh,
  make_mesh,
  replicated,
  startup_report,
)
from common.parallel.mesh import mesh_shape

SIZES = [
  (None, (8, 1, 1, 1)),
  ({}, (8, 1, 1, 1)),
  ({"data": -1}, (8, 1, 1, 1)),
  ({"data": 8}, (8, 1, 1, 1)),
  ({"data": -1, "fsdp": 2, "model": 2}, (2, 2, 2, 1)),
  ({"seq": 4, "data": 2}, (2, 1, 1, 4)),
  ({"model": -1}, (1, 1, 8, 1)),
  ({"data": 8, "model": -1}, (8, 1, 1, 1)),
]


@pytest.mark.parametrize(("sizes", "shape"), SIZES)
def test_a_mesh_has_all_axes_in_order(sizes, shape):
  mesh = make_mesh(sizes)
  assert mesh.axis_names == ("data", "fsdp", "model", "seq")
  assert mesh.devices.shape == shape
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_how_other_numbers_of_devices_would_be_laid_out():
  assert mesh_shape({"data": -1, "fsdp": 8, "model": 4}, 64) == (2, 8, 4, 1)
  with pytest.raises(UserError, match="does not fit the 12 devices"):
    mesh_shape({"data": -1, "fsdp": 8}, 12)


def test_the_local_mesh_has_the_devices_of_this_process():
  mesh = local_mesh()
  assert mesh.shape == {"data": 8, "fsdp": 1, "model": 1, "seq": 1}
  assert list(mesh.devices.flat) == jax.local_devices()


def test_one_process_has_the_texts_already():
  assert gather_texts(["one", ""]) == ["one", ""]


MISFITS = [
  ({"data": 3}, r"data=3, .* 8 devices"),
  ({"data": 16}, r"data=16, .* 8 devices"),
  ({"data": 4}, r"data=4, .* 8 devices"),
  ({"data": -1, "model": 3}, r"data=-1, .*model=3, .* 8 devices"),
  ({"data": -1, "model": 16}, r"model=16, .* 8 devices"),
  ({"data": -1, "fsdp": -1}, r"data=-1, fsdp=-1, .*-1 for at most one"),
  ({"data": 0}, r"data=0, .*positive"),
  ({"data": -2}, r"data=-2, .*positive"),
  ({"data": 4, "tensor": 2}, r"'tensor' is not one of .*'data'.*'seq'"),
]


@pytest.mark.parametrize(("sizes", "message"), MISFITS)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
  with pytest.raises(UserError, match=message) as error:
    make_mesh(sizes)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("seq", "shard"), [(False, (2, 12, 3)), (True, (2, 6, 3))]
)
def test_batches_split_by_row_and_time_if_asked(seq, shard):
  mesh = make_mesh({"data": 2, "fsdp": 2, "seq": 2})
  batch = jax.device_put(jnp.zeros((8, 12, 3)), batch_sharding(mesh, seq=seq))
  assert {s.data.shape for s in batch.addressable_shards} == {shard}


def test_replicated_is_whole_everywhere():
  mesh = make_mesh()
  array = jax.device_put(jnp.zeros((3, 5)), replicated(mesh))
  assert {s.data.shape for s in array.addressable_shards} == {(3, 5)}


@struct.dataclass
class State:
  params: dict
  moments: dict
  key: jax.Array


def make_state(mesh):
  split = NamedSharding(mesh, jax.P("fsdp"))
  kernel = jax.device_put(jnp.zeros((8, 4)), split)
  half = jax.device_put(jnp.zeros((8, 4), jnp.bfloat16), split)
  bias = jax.device_put(jnp.zeros(4), replicated(mesh))
  return State(
    params={"kernel": kernel, "bias": bias},
    moments={"kernel": half},
    key=jax.device_put(jax.random.key(0), replicated(mesh)),
  )


def test_bytes_on_one_device():
  mesh = make_mesh({"data": 4, "fsdp": 2})
  # Half of 32 float32, half of 32 bfloat16, 4 float32, two words of a key.
  assert bytes_per_device(make_state(mesh)) == 64 + 32 + 16 + 8


def test_startup_report_says_what_is_about_to_run():
  mesh = make_mesh({"data": 4, "fsdp": 2})
  state = make_state(mesh)
  assert startup_report(mesh, state, global_batch=32, data="text a").startswith(
    "data        text a\nprocesses"
  )
  lines = startup_report(mesh, state, global_batch=32).splitlines()
  said = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
  assert said["processes"] == "1"
  assert said["devices"].startswith("8 (")
  assert said["mesh"] == "data=4, fsdp=2, model=1, seq=1"
  assert said["batch"] == "32 rows, 4 a shard"
  assert said["parameters"] == "36"
  assert said["state"] == "0.00 MiB a device"
