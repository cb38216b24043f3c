"""Reads what `torch.save` wrote, without torch and without running anything.

Since version 1.6 such a file is a zip: `data.pkl`, a pickle in which a tensor
is a call with the number of its storage, and `data/N`, the storages' bytes. Of
a pickle only these calls are understood.
"""

import collections
import io
import pickle
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_STORAGES: dict[str, Any] = {
  "DoubleStorage": np.float64, "FloatStorage": np.float32,
  "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
  "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class _Kind(NamedTuple):
  """A class of storages."""

  dtype: Any


def is_archive(path: str) -> bool:
  """Whether a file is of torch 1.6 or later."""
  return zipfile.is_zipfile(path)


def read(path: str) -> Any:
  """What was saved, with NumPy arrays for tensors.

  Raises:
    pickle.UnpicklingError: for a pickle with anything but tensors, dicts,
      lists and plain values.
    zipfile.BadZipFile, OSError, LookupError, ValueError: for broken files.
  """
  with zipfile.ZipFile(path) as archive:
    places = [n for n in archive.namelist() if n.endswith("/data.pkl")]
    if len(places) != 1:
      raise pickle.UnpicklingError("there is no data.pkl")
    folder = places[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
      raise pickle.UnpicklingError("its bytes are in big-endian order")
    content = io.BytesIO(archive.read(places[0]))
    return _Reader(content, archive, f"{folder}data/").load()


class _Reader(pickle.Unpickler):
  def __init__(self, content: Any, archive: zipfile.ZipFile, folder: str):
    super().__init__(content, encoding="utf-8")
    self._archive, self._folder = archive, folder
    self._storages: dict[str, np.ndarray] = {}

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in _STORAGES:
      return _Kind(_STORAGES[name])
    known = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("torch._utils", "_rebuild_tensor_v2"): _tensor,
      ("torch._utils", "_rebuild_parameter"): _parameter,
    }.get((module, name))
    if known is None:
      raise pickle.UnpicklingError(f"it holds a {module}.{name}")
    return known

  def persistent_load(self, pid: Any) -> np.ndarray:
    kind, storage, key, _, count = pid
    if kind != "storage" or not isinstance(storage, _Kind):
      raise pickle.UnpicklingError(f"it holds a {kind}")
    if key not in self._storages:
      data = self._archive.read(f"{self._folder}{key}")
      self._storages[key] = np.frombuffer(data, storage.dtype, count)
    return self._storages[key]


def _tensor(
  storage: np.ndarray, offset: int, size: Any, stride: Any, *rest: Any
) -> np.ndarray:
  """A view of a storage; strides count elements."""
  del rest
  size, stride = tuple(size), tuple(stride)
  last = offset + sum((n - 1) * step for n, step in zip(size, stride))
  inside = min((offset, *size, *stride)) >= 0 and last < len(storage)
  if 0 not in size and not inside:
    raise pickle.UnpicklingError("a tensor is larger than its storage")
  if 0 in size:
    return np.empty(size, storage.dtype)
  bytes_of = [step * storage.itemsize for step in stride]
  return np.lib.stride_tricks.as_strided(
    storage[offset:], size, bytes_of, writeable=False
  )


def _parameter(data: np.ndarray, *rest: Any) -> np.ndarray:
  del rest
  return data
