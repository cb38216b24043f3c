"""Weights of other frameworks: read from files, and taken one by one."""

import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from common import numpy_files, torch_files
from common.errors import UserError
from common.logs import one_line

Weights = Mapping[str, np.ndarray]

_SAFETENSORS = "pip install -e '.[weights]'"
_TORCH = "pip install -e '.[parity]'"
_TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_WRAPPERS = ("state_dict", "model")  # keys under which checkpoints keep weights


def read_weights(path: str) -> dict[str, np.ndarray]:
  """The tensors of a file by name, on the host.

  Of a checkpoint that keeps them under `state_dict` or `model`, those; the
  prefix `module.` that torch's DataParallel adds is dropped. Nothing in a
  file is executed, and torch is needed for files before its 1.6 alone.

  Raises:
    UserError: for a missing or unreadable file, a suffix that says neither
      format, something else than tensors, or a missing library.
  """
  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise UserError(f"{path}: no such file of weights")
  if path.endswith(".safetensors"):
    weights = _read_safetensors(path)
  elif path.endswith(_TORCH_SUFFIXES):
    weights = _read_torch(path)
  else:
    raise UserError(
      f"{path}: weights are read from .safetensors, "
      f"{', '.join(_TORCH_SUFFIXES)}; rename the file to what it is"
    )
  return {name.removeprefix("module."): w for name, w in weights.items()}


# Its own table for NumPy lacks bfloat16.
_DTYPES: dict[str, Any] = {
  "F64": np.float64, "F32": np.float32, "F16": np.float16,
  "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
  "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32,
  "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
  try:
    from safetensors import SafetensorError, deserialize  # type: ignore
  except ImportError as error:
    raise UserError(f"{path} needs safetensors: {_SAFETENSORS}") from error
  try:
    found = deserialize(pathlib.Path(path).read_bytes())
  except SafetensorError as error:
    raise UserError(
      f"{path} is no safetensors file ({one_line(error)}): fetch it again"
    ) from error
  weights = {}
  for name, tensor in sorted(found, key=lambda pair: pair[0]):
    if tensor["dtype"] not in _DTYPES:
      raise UserError(
        f"{path}: {name!r} has dtype {tensor['dtype']}, which is not read "
        f"here; known: {', '.join(_DTYPES)}"
      )
    array = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])
    weights[name] = array.reshape(tensor["shape"])
  return weights


def _read_torch(path: str) -> dict[str, np.ndarray]:
  loaded = _loaded(path)
  for key in _WRAPPERS:
    if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
      loaded = loaded[key]
  if not isinstance(loaded, dict) or not all(
    isinstance(value, np.ndarray) for value in loaded.values()
  ):
    raise UserError(
      f"{path} holds something else than tensors by name: save the model's "
      "state_dict alone"
    )
  return {
    str(name): np.ascontiguousarray(value, np.float32)
    for name, value in loaded.items()
  }


def _loaded(path: str) -> Any:
  """What a file of torch holds, with arrays for tensors."""
  try:
    if torch_files.is_archive(path):
      return torch_files.read(path)
    return _by_torch(path)
  except UserError:
    raise
  except (
    zipfile.BadZipFile, LookupError, EOFError, RuntimeError, OSError,
    ValueError, TypeError, AttributeError, MemoryError,
  ) as error:  # fmt: skip
    raise UserError(
      f"{path} holds no plain tensors that can be read without running it "
      f"({one_line(error)}): save the model's state_dict alone"
    ) from error


def _by_torch(path: str) -> Any:
  """Reads a file from before torch 1.6."""
  try:
    import torch  # type: ignore
  except ImportError as error:
    raise UserError(
      f"{path} is broken, or of torch 1.5 or earlier and needs torch: {_TORCH}"
    ) from error

  left = torch_files.most_numbers(path)

  def plain(value: Any) -> Any:
    nonlocal left
    if isinstance(value, dict):
      return {key: plain(own) for key, own in value.items()}
    if isinstance(value, torch.Tensor):
      left -= value.numel()
      if left < 0:
        raise ValueError(torch_files.TOO_MANY)
      return value.detach().to(torch.float32).numpy()
    return value

  try:
    return plain(torch.load(path, map_location="cpu", weights_only=True))
  except Exception as error:  # torch's readers raise all kinds.
    raise ValueError(str(error)) from error


def check_safetensors(what: str) -> None:
  """Raises `UserError` in the name of `what` where safetensors is missing."""
  try:
    import safetensors.numpy  # noqa: F401
  except ImportError as error:
    raise UserError(f"{what} needs safetensors: {_SAFETENSORS}") from error


def write_safetensors(file: Any, weights: Weights) -> None:
  """Writes a file as transformers does.

  Raises:
    UserError: where safetensors is missing.
  """
  check_safetensors(str(file))
  import safetensors.numpy

  arrays = {name: np.ascontiguousarray(w) for name, w in weights.items()}
  data = safetensors.numpy.save(arrays, metadata={"format": "pt"})
  # Not by its own writer, whose files nobody else may read.
  pathlib.Path(file).write_bytes(data)


def write_arrays(file: Any, tree: Any) -> None:
  """Writes a tree as an .npz that NumPy alone can read.

  Args:
    file: its path.
    tree: of arrays; each is stored as float32 under its path, such as
      `encoder/norm/scale`.
  """
  import jax

  from common.tree import names

  paths, leaves = jax.tree.leaves(names(tree)), jax.tree.leaves(tree)
  arrays: dict[str, Any] = {
    name: np.asarray(leaf, np.float32) for name, leaf in zip(paths, leaves)
  }
  np.savez(file, **arrays)


def read_arrays(file: Any, like: Any, *, remedy: str) -> Any:
  """Reads what `write_arrays` wrote.

  Args:
    file: its path.
    like: a tree of arrays, or of their shapes.
    remedy: what helps where something is wrong.

  Returns:
    `like` with NumPy arrays.

  Raises:
    UserError: for a file that is missing or broken, and for arrays that are
      missing, unknown, or of another shape.
  """
  import jax

  from common.tree import names

  try:
    with numpy_files.open_npz(file) as arrays:
      tensors = Tensors(
        arrays, str(file), remedy=remedy, hint=lambda _: f"; {remedy}"
      )
      tree = jax.tree.map(
        lambda name, leaf: tensors.take(name, leaf.shape), names(like), like
      )
  except UserError:
    raise
  except numpy_files.ERRORS as error:
    raise UserError(
      f"{file} is not readable ({one_line(error)}): {remedy}"
    ) from error
  tensors.finish()
  return tree


class Tensors:
  """Weights that are taken one by one, so that the rest can be named.

  Args:
    weights: by name.
    source: what error messages call them.
    remedy: what helps where some are missing, or too many.
    hint: what a message adds of a name whose shape is another.
  """

  def __init__(
    self,
    weights: Weights,
    source: str,
    *,
    remedy: str,
    hint: Callable[[str], str] = lambda name: "",
  ):
    self.source = source
    self._remedy = remedy
    self._hint = hint
    self._left = dict(weights)
    self._missing: list[str] = []

  def shape(self, name: str) -> tuple[int, ...] | None:
    """The shape of what is left under a name, or None."""
    return self._left[name].shape if name in self._left else None

  def drop(self, *names: str) -> None:
    """Counts some names as known."""
    for name in names:
      self._left.pop(name, None)

  def take(self, name: str, shape: Sequence[int]) -> np.ndarray:
    """The float32 array of a name, which must have that shape."""
    shape = tuple(shape)
    if name not in self._left:
      self._missing.append(name)
      return np.zeros(shape, np.float32)
    value = self._left.pop(name)
    if value.shape != shape:
      raise UserError(
        f"{self.source}: {name!r} has shape {value.shape}, but the model "
        f"takes {shape}{self._hint(name)}"
      )
    return np.asarray(value, np.float32)

  def finish(self) -> None:
    """Raises `UserError` for what is missing or left over."""
    for names, what in (
      (self._missing, "lacks"),
      (list(self._left), "has weights that the model has no place for:"),
    ):
      if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        shown = ", ".join(map(repr, names[:3]))
        raise UserError(f"{self.source} {what} {shown}{more}; {self._remedy}")
