"""Meshes with the axes data, fsdp, model and seq, and what stands on them."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from common.errors import RunError, UserError

AXES = ("data", "fsdp", "model", "seq")


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
  """Makes a mesh over all devices.

  Args:
    sizes: devices along each of `AXES`; a missing axis has 1, and at most one
      may be -1: it takes what the others leave.

  Returns:
    A mesh whose axes are all there, of type Auto: the compiler places what
    nothing constrains.

  Raises:
    UserError: for an unknown axis or sizes that do not fit the devices.
  """
  return jax.make_mesh(
    mesh_shape(sizes, jax.device_count()),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def mesh_shape(sizes: Mapping[str, int] | None, count: int) -> tuple[int, ...]:
  """The devices along each of `AXES`; see `make_mesh`.

  Args:
    sizes: as `make_mesh` takes them.
    count: of all devices.

  Raises:
    UserError: as `make_mesh` does.
  """
  sizes = dict(sizes or {"data": -1})
  unknown = [name for name in sizes if name not in AXES]
  if unknown:
    raise UserError(f"mesh axis {unknown[0]!r} is not one of {AXES}")
  wanted = [int(sizes.get(name, 1)) for name in AXES]
  shown = ", ".join(f"{n}={s}" for n, s in zip(AXES, wanted))
  if any(size == 0 or size < -1 for size in wanted) or wanted.count(-1) > 1:
    raise UserError(
      f"mesh {shown}: give positive sizes, and -1 for at most one axis"
    )
  rest = math.prod(size for size in wanted if size > 0)
  if -1 in wanted and count % rest == 0:
    wanted[wanted.index(-1)] = count // rest
  if math.prod(wanted) != count:
    raise UserError(
      f"mesh {shown} does not fit the {count} devices: the sizes must multiply "
      f"to {count}, or -1 must stand for one axis and the others divide it"
    )
  return tuple(wanted)


def batch_sharding(mesh: Mesh, *, seq: bool = False) -> NamedSharding:
  """Batches [B, T, ...]: rows over data and fsdp, time over seq if asked."""
  return NamedSharding(mesh, jax.P(("data", "fsdp"), "seq" if seq else None))


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
  """Places `x` on the current mesh, one entry a dimension.

  Left alone, the compiler follows the parameters: it cuts the width over
  `fsdp`, and every device of that axis computes the whole batch. Axes that the
  mesh lacks count as None, and without a mesh nothing happens.
  """
  names = jax.sharding.get_abstract_mesh().axis_names
  if not names:
    return x

  def known(entry):
    if isinstance(entry, tuple):
      return tuple(name for name in entry if name in names)
    return entry if entry in names else None

  spec = jax.P(*map(known, axes))
  return jax.lax.with_sharding_constraint(x, spec)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, jax.P())


def startup_report(
  mesh: Mesh, state: Any, *, global_batch: int, data: str = ""
) -> str:
  """Says what is about to run, in a few lines.

  Args:
    mesh: the mesh.
    state: a tree of arrays (or abstract ones with shardings) that may have
      `params`, such as a `TrainState`.
    global_batch: rows of a batch over all processes.
    data: what is trained on, in a line; "" leaves it out.
  """
  device = mesh.devices.flat[0]
  params = getattr(state, "params", state)
  shape = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
  parameters = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  return "\n".join(
    [
      *([f"data        {data}"] if data else []),
      f"processes   {jax.process_count()}",
      f"devices     {jax.device_count()} ({device.device_kind})",
      f"mesh        {shape}",
      f"batch       {global_batch} rows, {global_batch / shards:g} a shard",
      f"parameters  {parameters:,}",
      f"state       {bytes_per_device(state) / 2**20:.2f} MiB a device",
    ]
  )


def bytes_per_device(tree: Any) -> int:
  """Bytes that one device holds of a tree of sharded arrays."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape)
    total += math.prod(shape) * leaf.dtype.itemsize
  return total


def on_device(device: jax.Device) -> Any:
  """A context in which jit runs on one device of this process.

  Inside `jax.set_mesh` of a larger mesh, jit would run on all of that.
  """
  return jax.set_mesh(_mesh_of([device]))


def local_mesh() -> Mesh:
  """The devices of this process, all along `data`.

  For work that processes divide among themselves, such as translating a test
  set: no device waits for one of another process.
  """
  return _mesh_of(jax.local_devices())


def _mesh_of(devices: Sequence[jax.Device]) -> Mesh:
  shape = (len(devices), *(1,) * (len(AXES) - 1))
  return Mesh(
    np.array(devices).reshape(shape),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def from_host(tree: Any, like: Any) -> Any:
  """Puts equal NumPy arrays of all processes where the arrays of `like` are.

  `jax.device_put` would compare them between processes, and find that NaN
  differs from NaN.
  """

  def place(value: np.ndarray, array: jax.Array) -> jax.Array:
    return jax.make_array_from_callback(
      array.shape, array.sharding, lambda index: value[index]
    )

  return jax.tree.map(place, tree, like)


def by_device(value: jax.Array) -> jax.Array:
  """Each device's own copy of what is replicated, [devices, ...].

  What devices compute each for itself should be equal; here it can be looked
  at, for nothing is sent. Without a mesh there is one.
  """
  names = jax.sharding.get_abstract_mesh().axis_names
  if not names:
    return value[None]
  return jax.shard_map(
    lambda own: own[None], in_specs=jax.P(), out_specs=jax.P(names)
  )(value)


def to_host(tree: Any) -> Any:
  """NumPy copies on every process, of arrays that may be spread over all."""

  def fetch(array: Any) -> np.ndarray:
    # Gathering would join what each process has of its own.
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
      return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))

  return jax.tree.map(fetch, tree)


def check_same(content: bytes, what: str) -> None:
  """Raises where a process has something else than the others.

  Args:
    content: of this process; a hash of it is compared.
    what: it is, in the plural, for the error.

  Raises:
    RunError: on every process, with all hashes.
  """
  if jax.process_count() == 1:
    return
  from jax.experimental import multihost_utils

  digest = hashlib.blake2b(content, digest_size=8).digest()
  mine = np.frombuffer(digest, np.int32)
  found = np.asarray(multihost_utils.process_allgather(mine))
  if (found != mine).any():
    hashes = ", ".join(row.tobytes().hex() for row in found)
    raise RunError(f"processes differ in their {what}; the hashes are {hashes}")


def wait_for_all(what: str) -> None:
  """Returns when every process has come here.

  Args:
    what: has been done, for errors.
  """
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)


def gather_texts(texts: Sequence[str]) -> list[str]:
  """Puts together what processes have dealt out among themselves.

  Args:
    texts: of process i of n, those at the places i, i + n, i + 2 n, …

  Returns:
    All of them in their order, on every process.
  """
  if jax.process_count() == 1:
    return list(texts)
  from jax.experimental import multihost_utils

  mine = np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(len(mine), np.int32))
  padded = np.zeros(int(np.max(sizes)), np.uint8)
  padded[: len(mine)] = mine
  rows = np.asarray(multihost_utils.process_allgather(padded))
  parts = [
    json.loads(row[: int(size)].tobytes()) for row, size in zip(rows, sizes)
  ]
  whole = [""] * sum(map(len, parts))
  for i, part in enumerate(parts):
    whole[i :: len(parts)] = part
  return whole
