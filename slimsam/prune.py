"""Pruning as pure functions of a parameter tree.

    keep = {"embedding": [0, 2, …], "qkv/0": […], "mlp/0": […], …}
    params, settings = prune_model(params, settings, keep)

A head that loses dimensions has another scale, e^-1/2. With `fold_scale` the
queries and the relative positions make up for it, so that pruning is the same
as zeroing; Segment Anything's pruners leave the change in.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from common.nn import Array
from slimsam.groups import (
  Groups,
  check_groups,
  check_keep,
  encoder_groups,
  of_kind,
  with_leaves,
)
from slimsam.settings import SamSettings
from slimsam.torch_names import Path, leaf

PyTree = Any
Keep = Mapping[str, Sequence[int]]
REL_POS = ("slice", "zero")


def prune_model(
  params: PyTree,
  settings: SamSettings,
  keep: Keep,
  *,
  rel_pos: str = "slice",
  fold_scale: bool = True,
) -> tuple[PyTree, SamSettings]:
  """A smaller model.

  Args:
    params: of a SAM.
    settings: its.
    keep: by group the units that stay, in rising order; groups that are not
      named stay whole. See `slimsam.groups`.
    rel_pos: `slice` the tables of relative positions, or set all of them to
      `zero` as the authors' code does.
    fold_scale: see the module.

  Returns:
    Parameters that share no array with those given, and their settings.

  Raises:
    UserError: for units that are not there.
  """
  groups = encoder_groups(settings)
  pruned = prune_params(params, groups, keep)
  if fold_scale:
    pruned = _folded(pruned, groups, keep)
  if rel_pos == "zero":
    pruned = _without_positions(pruned, groups)
  elif rel_pos not in REL_POS:
    raise UserError(f"rel_pos={rel_pos!r}{did_you_mean(rel_pos, REL_POS)}")
  return pruned, pruned_settings(settings, keep)


def prune_params(params: PyTree, spec: Groups, keep: Keep) -> PyTree:
  """Takes what is kept along each axis of each group, and nothing else.

  Args:
    params: a tree.
    spec: what belongs together; see `slimsam.groups`.
    keep: by group the units that stay, in rising order.

  Returns:
    A tree that shares no array with the one given.

  Raises:
    UserError: where the three do not go together.
  """
  check_groups(params, spec)
  check_keep(spec, keep)
  changes: dict[Path, Any] = {}
  for name, units in keep.items():
    index = np.asarray(units, np.int32)
    for path, axis, _ in spec[name].members:
      array = changes.get(path, leaf(params, path))
      changes[path] = jnp.take(array, index, axis=axis)
  copied = _copied(params)
  return with_leaves(copied, changes)


def mask_params(params: PyTree, spec: Groups, keep: Keep) -> PyTree:
  """Sets what is not kept to zero, in place of taking it away.

  For `qkv` and `mlp` the model then computes what the pruned one does, with
  the scale folded. For `embedding` it does not: norms see the zeros.

  Args: as for `prune_params`.
  """
  check_groups(params, spec)
  check_keep(spec, keep)
  changes: dict[Path, Any] = {}
  for name, units in keep.items():
    kept = np.zeros(spec[name].size, bool)
    kept[np.asarray(units)] = True
    for path, axis, _ in spec[name].members:
      array = changes.get(path, leaf(params, path))
      shape = [1] * array.ndim
      shape[axis] = len(kept)
      changes[path] = jnp.where(kept.reshape(shape), array, 0)
  return with_leaves(_copied(params), changes)


def expand(
  params: PyTree, settings: SamSettings, keep: Keep
) -> tuple[PyTree, SamSettings]:
  """The reverse of `prune_model` with folded scales: zeros where units were.

  Args:
    params: of the pruned model.
    settings: of the model before it was pruned.
    keep: what was kept.

  Returns:
    Parameters of the sizes before.
  """
  groups = encoder_groups(settings)
  check_keep(groups, keep)
  small = encoder_groups(pruned_settings(settings, keep))
  check_groups(params, small)
  params = _folded(params, groups, keep, back=True)
  changes: dict[Path, Any] = {}
  for name, units in keep.items():
    index = np.asarray(units, np.int32)
    for path, axis, _ in groups[name].members:
      array = jnp.asarray(changes.get(path, leaf(params, path)))
      shape = list(array.shape)
      shape[axis] = groups[name].size
      place = (slice(None),) * axis + (index,)
      changes[path] = jnp.zeros(shape, array.dtype).at[place].set(array)
  return with_leaves(_copied(params), changes), settings


def pruned_settings(settings: SamSettings, keep: Keep) -> SamSettings:
  """The sizes of what is left."""
  cfg = settings.encoder
  qkv, mlp = list(cfg.qkv_widths), list(cfg.mlp_widths)
  width = cfg.width
  for name, units in keep.items():
    kind, _, block = name.partition("/")
    if kind == "embedding":
      width = len(units)
    elif kind == "qkv":
      qkv[int(block)] = cfg.heads * len(units)
    else:
      mlp[int(block)] = len(units)
  return settings.with_widths(width, qkv, mlp)


def _folded(
  params: PyTree, groups: Groups, keep: Keep, *, back: bool = False
) -> PyTree:
  """Keeps the logits' scale where heads become narrower (`back`: wider)."""
  changes: dict[Path, Array] = {}
  for name in of_kind(groups, "qkv"):
    if name not in keep:
      continue
    ratio = math.sqrt(len(keep[name]) / groups[name].size)
    ratio = 1 / ratio if back else ratio
    for path, _, matrices in groups[name].members:
      array = leaf(params, path)
      if path[-1] in ("rel_pos_h", "rel_pos_w"):
        changes[path] = array / ratio
      elif path[-2] == "qkv":
        # The first of the three is the query.
        factor = jnp.asarray([ratio, 1.0, 1.0], array.dtype)
        shape = (1, 3, 1, 1) if matrices else (3, 1, 1)
        changes[path] = array * factor.reshape(shape)
  return with_leaves(params, changes)


def _without_positions(params: PyTree, groups: Groups) -> PyTree:
  """Sets all tables of relative positions to zero."""
  changes: dict[Path, Any] = {}
  for name in of_kind(groups, "qkv"):
    for path, _, _ in groups[name].members:
      if path[-1] in ("rel_pos_h", "rel_pos_w"):
        changes[path] = jnp.zeros_like(leaf(params, path))
  return with_leaves(params, changes)


def _copied(params: PyTree) -> PyTree:
  """Own arrays: a state that is donated must not take another's with it."""
  import jax

  return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
