"""Trees of arrays by path: names, masks, norms, sizes."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from common.errors import UserError

PyTree = Any


def names(tree: PyTree) -> PyTree:
  """The same tree with each leaf's path, such as `layers/mlp/kernel`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"),
    tree,
  )


def mask(
  tree: PyTree, patterns: Sequence[str], *, must_match: str | None = None
) -> PyTree:
  """True where one of the regexes is found in the leaf's path.

  Args:
    tree: any tree.
    patterns: regexes.
    must_match: a setting's name; a pattern that matches nothing is then
      refused in that name.

  Raises:
    UserError: as said, and for what is no regex.
  """
  paths = names(tree)
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(f"{pattern!r} is no regex: {error}") from None
  if must_match is not None:
    flat = jax.tree.leaves(paths)
    for pattern in patterns:
      if not any(re.search(pattern, path) for path in flat):
        raise UserError(
          f"{must_match}: {pattern!r} matches no parameter; there are for "
          f"example {', '.join(flat[:3])}"
        )
  return jax.tree.map(
    lambda path: any(re.search(p, path) for p in patterns), paths
  )


def global_norm(tree: PyTree) -> jax.Array:
  """The l2 norm over all leaves, summed in float32 whatever their dtype."""
  squares = [
    jnp.sum(jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))))
    for leaf in jax.tree.leaves(tree)
  ]
  return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def count_params(tree: PyTree) -> int:
  """Number of elements."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_of(tree: PyTree) -> int:
  """Bytes of all leaves, unsharded."""
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def partition(
  tree: PyTree, keep: Callable[[str], bool]
) -> tuple[PyTree, PyTree]:
  """Splits a tree by its leaves' paths.

  Returns:
    `(kept, rest)`, both of the tree's structure, with None where the other
    has the leaf. None is no leaf, so each half can be mapped and
    differentiated as it is.
  """
  chosen = jax.tree.map(keep, names(tree))
  kept = jax.tree.map(lambda k, x: x if k else None, chosen, tree)
  rest = jax.tree.map(lambda k, x: None if k else x, chosen, tree)
  return kept, rest


def combine(first: PyTree, second: PyTree) -> PyTree:
  """The inverse of `partition`."""
  return jax.tree.map(
    lambda a, b: b if a is None else a,
    first,
    second,
    is_leaf=lambda leaf: leaf is None,
  )
