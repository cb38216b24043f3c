"""Sharding rules: the first regex that matches a leaf's path says where."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.errors import UserError

PyTree = Any
Rules = Sequence[tuple[str, PartitionSpec]]


def path_name(path: Any) -> str:
  """`layers/mlp/kernel` for a key path of `jax.tree_util`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def match(path: str, rules: Rules) -> PartitionSpec | None:
  """The spec of the first rule whose regex is found in `path`, or None."""
  for pattern, spec in rules:
    if re.search(pattern, path):
      return spec
  return None


def shardings(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
  """A `NamedSharding` for every leaf.

  Works on parameters and on a whole `TrainState` alike: an optimizer's
  moments end in their parameter's path, so the same rule finds them. Scalars
  are replicated.

  Args:
    tree: arrays or `ShapeDtypeStruct`s.
    mesh: where.
    rules: `(regex, PartitionSpec)`, first match wins.

  Raises:
    UserError: for a leaf that no rule matches, a spec longer than the leaf's
      rank or with an axis that the mesh lacks, or a dimension that its mesh
      axes do not divide.
  """

  def place(path, leaf) -> NamedSharding:
    if not leaf.shape:
      return NamedSharding(mesh, PartitionSpec())
    name = path_name(path)
    spec = match(name, rules)
    if spec is None:
      raise UserError(
        f"no sharding rule matches {name!r} of shape {leaf.shape}: add one"
      )
    _check(name, leaf.shape, spec, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, tree)


def _check(
  name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> None:
  if len(spec) > len(shape):
    raise UserError(
      f"the sharding rule {spec} has {len(spec)} dimensions, but {name!r} has "
      f"shape {shape}"
    )
  for dim, (size, entry) in enumerate(zip(shape, spec)):
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    absent = [axis for axis in axes if axis not in mesh.shape]
    if absent:
      raise UserError(
        f"the sharding rule {spec} of {name!r} names {absent[0]!r}, but the "
        f"mesh has the axes {tuple(mesh.shape)}"
      )
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if size % shards:
      raise UserError(
        f"dimension {dim} of {name!r}, shape {shape}, is not divisible by the "
        f"{shards} devices along mesh axis {'+'.join(axes)}: change the size "
        "or the mesh"
      )


def abstract_sharded(
  init_fn: Callable[[jax.Array], PyTree],
  mesh: Mesh,
  rules: Rules,
  key: jax.Array,
) -> PyTree:
  """What `init_sharded` would make: shapes, dtypes and shardings."""
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(init_fn, key)
    placed = shardings(shapes, mesh, rules)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    placed,
  )


def init_sharded(
  init_fn: Callable[[jax.Array], PyTree],
  mesh: Mesh,
  rules: Rules,
  key: jax.Array,
) -> PyTree:
  """Runs `init_fn(key)` so that every leaf is created where it belongs.

  Nothing is ever whole on one device: shapes first, then shardings, then one
  jit with `out_shardings`.
  """
  abstract = abstract_sharded(init_fn, mesh, rules, key)
  placed = jax.tree.map(lambda x: x.sharding, abstract)
  with jax.set_mesh(mesh):
    return jax.jit(init_fn, out_shardings=placed)(key)
