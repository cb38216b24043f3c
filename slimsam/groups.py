"""What has to be pruned together, as tables over the parameter tree.

# d width D, h heads, e width of a head, f hidden width F

    embedding   D, the same channels in every block because of the residual
    qkv/I       e of block I: the same dimensions of every head
    mlp/I       F of block I

A group lists the axes of parameters that have its size (SlimSAM, figure 2).
Adding a model means adding a table.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from common.errors import UserError
from slimsam.settings import EncoderSettings, SamSettings
from slimsam.torch_names import Path, leaf

PyTree = Any


class Member(NamedTuple):
  """An axis of a parameter.

  Attributes:
    path: of the parameter.
    axis: that has the group's size.
    matrices: how many weight matrices it holds, which count when units are
      compared; biases, norms and positions do not.
  """

  path: Path
  axis: int
  matrices: int = 0


class Group(NamedTuple):
  """Axes that are cut at the same places.

  Attributes:
    size: units, of which some are kept.
    members: see `Member`.
  """

  size: int
  members: tuple[Member, ...]


Groups = Mapping[str, Group]
_ENCODER = ("image_encoder",)


def encoder_groups(settings: SamSettings) -> dict[str, Group]:
  """The groups of an image encoder by name; see the module."""
  cfg = settings.encoder
  made = {"embedding": Group(cfg.width, tuple(_embedding(cfg)))}
  for i in range(cfg.depth):
    made[f"qkv/{i}"] = Group(cfg.head_width(i), _qkv(i))
    made[f"mlp/{i}"] = Group(cfg.mlp_widths[i], _mlp(i))
  return made


def of_kind(groups: Groups, kind: str) -> list[str]:
  """The names of the groups `kind/0`, `kind/1`, …, in the order of blocks."""
  found = [name for name in groups if name.partition("/")[0] == kind]
  return sorted(found, key=lambda name: int(name.partition("/")[2] or 0))


def _block(i: int) -> Path:
  return (*_ENCODER, "blocks", str(i))


def _embedding(cfg: EncoderSettings) -> list[Member]:
  made = [
    Member((*_ENCODER, "patch_embed", "kernel"), 3, matrices=1),
    Member((*_ENCODER, "patch_embed", "bias"), 0),
    Member((*_ENCODER, "pos_embed"), 3),
    Member((*_ENCODER, "neck", "conv1", "kernel"), 0, matrices=1),
  ]
  for i in range(cfg.depth):
    block = _block(i)
    for name in ("norm1", "norm2"):
      made += [Member((*block, name, part), 0) for part in ("scale", "bias")]
    made += [
      Member((*block, "attn", "qkv", "kernel"), 0, matrices=3),
      Member((*block, "attn", "proj", "kernel"), 2, matrices=1),
      Member((*block, "attn", "proj", "bias"), 0),
      Member((*block, "mlp", "lin1", "kernel"), 0, matrices=1),
      Member((*block, "mlp", "lin2", "kernel"), 1, matrices=1),
      Member((*block, "mlp", "lin2", "bias"), 0),
    ]
  return made


def _qkv(i: int) -> tuple[Member, ...]:
  attn = (*_block(i), "attn")
  return (
    Member((*attn, "qkv", "kernel"), 3, matrices=3),
    Member((*attn, "qkv", "bias"), 2),
    Member((*attn, "proj", "kernel"), 1, matrices=1),
    Member((*attn, "rel_pos_h"), 1),
    Member((*attn, "rel_pos_w"), 1),
  )


def _mlp(i: int) -> tuple[Member, ...]:
  mlp = (*_block(i), "mlp")
  return (
    Member((*mlp, "lin1", "kernel"), 1, matrices=1),
    Member((*mlp, "lin1", "bias"), 0),
    Member((*mlp, "lin2", "kernel"), 0, matrices=1),
  )


def check_groups(params: PyTree, groups: Groups) -> None:
  """Refuses a table that does not fit a tree.

  Raises:
    UserError: where a parameter is not there, an axis has another size than
      its group, or an axis belongs to two groups.
  """
  owner: dict[tuple[Path, int], str] = {}
  for name, group in groups.items():
    for member in group.members:
      shown = "/".join(member.path)
      try:
        shape = leaf(params, member.path).shape
      except (KeyError, IndexError):
        raise UserError(f"group {name}: there is no {shown}") from None
      if member.axis >= len(shape) or shape[member.axis] != group.size:
        raise UserError(
          f"group {name} has {group.size} units, but axis {member.axis} of "
          f"{shown} {shape} has not"
        )
      other = owner.setdefault((member.path, member.axis), name)
      if other != name:
        raise UserError(
          f"axis {member.axis} of {shown} belongs to {other} and to {name}"
        )


def check_keep(groups: Groups, keep: Mapping[str, Sequence[int]]) -> None:
  """Refuses units that are not there, or come twice.

  Args:
    groups: see `encoder_groups`.
    keep: by group the units that stay, in rising order.
  """
  for name, units in keep.items():
    if name not in groups:
      raise UserError(f"there is no group {name!r} to prune")
    size = groups[name].size
    if not len(units):
      raise UserError(f"group {name}: keep at least one unit of {size}")
    rising = all(a < b for a, b in itertools.pairwise(units))
    if not rising or units[0] < 0 or units[-1] >= size:
      raise UserError(
        f"group {name}: units are to be kept in rising order and from 0 to "
        f"{size - 1}"
      )


def with_leaves(tree: PyTree, changes: Mapping[Path, Any]) -> PyTree:
  """The tree with other leaves at some paths."""
  names = {"/".join(path): value for path, value in changes.items()}

  def swap(path: Any, old: Any) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return names.get(name, old)

  return jax.tree_util.tree_map_with_path(swap, tree)
