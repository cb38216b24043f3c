"""Orbax as checkpoints use it: its manager, its errors, arrays and keys."""

import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from common import files
from common.errors import RunError

PyTree = Any
_SHARED_BYTES = 2**20  # of an array and replica, from which all of them write


class Manager(ocp.CheckpointManager):
  """Leaves it to others to ask whether the job will be stopped, and tells of a
  writer that fails before the other processes know.

  Attributes:
    failure: of a writer; None while there was none.
  """

  failure: BaseException | None = None

  def _wait_for_checkpointers(self) -> None:
    try:
      super()._wait_for_checkpointers()
    except BaseException as error:
      self.failure = error
      raise

  def reached_preemption(self, step: int) -> bool:
    """Never, as far as Orbax is told; see `Checkpointer`."""
    del step
    return False


class StorageErrors:
  """A context that turns what storage refuses a writer into one OSError, and
  what it does not answer into one RunError.
  """

  def __init__(self, directory: str):
    self._directory = directory

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    code = None if error is None else files.storage_error(error)
    if code is not None:
      raise OSError(
        code,
        f"{os.strerror(code)} while saving a checkpoint; mend it and start "
        "again: the checkpoints already there are whole",
        self._directory,
      ) from error
    if isinstance(error, TimeoutError):
      raise RunError(
        f"a checkpoint in {self._directory} was not saved in time: storage "
        "does not answer, or the clock has jumped; start again: the "
        "checkpoints already there are whole"
      ) from error
    return False


def array_handler() -> ocp.PyTreeCheckpointHandler:
  """Writes arrays; each device its share, but for the small ones.

  Sharing compiles a program for every shape and device, which takes longer
  than to write what it divides.
  """
  handlers = ocp.type_handlers
  arrays = handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_SHARED_BYTES
  )
  registry = handlers.create_type_handler_registry(
    *(
      (kind, arrays if kind is jax.Array else handlers.get_type_handler(kind))
      for kind in handlers.supported_types()
    )
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def plain(tree: PyTree) -> PyTree:
  """The tree with numbers in place of PRNG keys, which Orbax would forget."""
  return jax.tree.map(
    lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree
  )


def _is_key(leaf: Any) -> bool:
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _plain_shapes(abstract: PyTree) -> PyTree:
  """As `plain`, of shapes."""

  def shape(leaf: Any) -> Any:
    if not _is_key(leaf):
      return leaf
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

  return jax.tree.map(shape, abstract)


def with_keys(tree: PyTree, abstract: PyTree) -> PyTree:
  """The reverse of `plain`, for a tree like `abstract`."""

  def key(like: Any, leaf: Any) -> Any:
    if not _is_key(like):
      return leaf
    found: list[Any] = []
    jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), like)
    return jax.random.wrap_key_data(leaf, impl=found[0])

  return jax.tree.map(key, abstract, tree)


def restore_args(abstract: PyTree) -> ocp.args.PyTreeRestore:
  """Where to restore to, from shapes; keys come back as numbers."""
  shapes = _plain_shapes(abstract)
  return ocp.args.PyTreeRestore(
    shapes, ocp.checkpoint_utils.construct_restore_args(shapes)
  )
