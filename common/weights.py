"""Weights of other frameworks: read from files, and taken one by one."""

import os
import pickle
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from common.errors import UserError

Weights = Mapping[str, np.ndarray]

_SAFETENSORS = "pip install 'tetrad-jax[weights]'"
_TORCH = "pip install 'tetrad-jax[parity]'"
_TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_WRAPPERS = ("state_dict", "model")  # keys under which checkpoints keep weights


def read_weights(path: str) -> dict[str, np.ndarray]:
  """The tensors of a file by name, on the host.

  Of a checkpoint that keeps them under `state_dict` or `model`, those; the
  prefix `module.` that torch's DataParallel adds is dropped. Nothing in a
  file is executed (`weights_only=True`).

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


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
  try:
    from safetensors import SafetensorError  # type: ignore
    from safetensors.numpy import load_file  # type: ignore
  except ImportError as error:
    raise UserError(f"{path} needs safetensors: {_SAFETENSORS}") from error
  try:
    return load_file(path)
  except SafetensorError as error:
    raise UserError(f"{path} is no safetensors file: {error}") from error


def _read_torch(path: str) -> dict[str, np.ndarray]:
  try:
    import torch  # type: ignore
  except ImportError as error:
    raise UserError(f"{path} needs torch: {_TORCH}") from error
  try:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
  except (pickle.UnpicklingError, LookupError, EOFError, RuntimeError) as error:
    raise UserError(
      f"{path} holds no plain tensors that torch reads with weights_only=True:"
      " save the model's state_dict alone"
    ) from error
  for key in _WRAPPERS:
    if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
      loaded = loaded[key]
  if not isinstance(loaded, dict) or not all(
    isinstance(value, torch.Tensor) for value in loaded.values()
  ):
    raise UserError(
      f"{path} holds something else than tensors by name: save the model's "
      "state_dict alone"
    )
  return {
    str(name): value.detach().to(torch.float32).numpy()
    for name, value in loaded.items()
  }


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
