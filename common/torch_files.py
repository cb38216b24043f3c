"""Reads what `torch.save` wrote, without torch and without running anything.

Since version 1.6 such a file is a zip: `data.pkl`, a program of Python's pickle
in which a tensor is a call with the number of its storage, and `data/N`, the
storages' bytes. Python would run that program. Here it is only taken apart:
the few instructions that plain tensors need build dicts, lists and arrays, and
the first one that asks for anything else ends it.
"""

import os
import pickletools
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from common.archives import check_entries

_STORAGES: dict[str, Any] = {
  "DoubleStorage": np.float64, "FloatStorage": np.float32,
  "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
  "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
# The only calls that are understood.
_CALLS = {
  ("collections", "OrderedDict"): "dict",
  ("torch._utils", "_rebuild_tensor_v2"): "tensor",
  ("torch._utils", "_rebuild_parameter"): "parameter",
}
# Instructions that put down what stands beside them, a constant, or something
# empty; how many values a short tuple takes.
_VALUES = {
  "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
  "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING",
  "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
TOO_MANY = "its tensors have far more numbers than the file has bytes"


class _Kind(NamedTuple):
  """A class of storages."""

  dtype: Any


class _Call(NamedTuple):
  """One of `_CALLS`."""

  name: str


def most_numbers(path: str) -> int:
  """How many numbers the tensors of a file may have together.

  They may share a storage, as tied weights do, and repeat it; but a small file
  must not fill the memory.
  """
  return 4 * os.path.getsize(path)


def is_archive(path: str) -> bool:
  """Whether a file is of torch 1.6 or later."""
  return zipfile.is_zipfile(path)


def read(path: str) -> Any:
  """What was saved, with NumPy arrays for tensors.

  Raises:
    ValueError: for anything but tensors, dicts, lists and plain values, and
      for tensors that are larger than their file.
    zipfile.BadZipFile, OSError, LookupError, TypeError, RuntimeError: for
      broken files.
  """
  with zipfile.ZipFile(path) as archive:
    check_entries(archive, os.path.getsize(path), compressed=False)
    names = archive.namelist()
    places = [n for n in names if n.endswith("/data.pkl")]
    if len(places) != 1:
      raise ValueError("there is no data.pkl")
    folder = places[0].removesuffix("data.pkl")
    strange = [name for name in names if not name.startswith(folder)]
    if strange:
      raise ValueError(f"its entry {strange[0]!r:.80} is outside of {folder}")
    order = f"{folder}byteorder"
    if order in names and archive.read(order) != b"little":
      raise ValueError("its bytes are in big-endian order")
    content = archive.read(places[0])
    return _Reader(archive, f"{folder}data/", most_numbers(path)).run(content)


class _Reader:
  """Builds what the instructions of `data.pkl` describe.

  Args:
    archive: with the storages.
    folder: where they are in it.
    most: numbers that all tensors may have together.
  """

  def __init__(self, archive: zipfile.ZipFile, folder: str, most: int):
    self._archive, self._folder, self._left = archive, folder, most
    self._stack: list[Any] = []
    self._marks: list[int] = []
    self._memo: dict[int, Any] = {}
    self._storages: dict[str, np.ndarray] = {}

  def run(self, content: bytes) -> Any:
    """What is there at the end."""
    for instruction, argument, _ in pickletools.genops(content):
      self._do(instruction.name, argument)
    return self._stack.pop()

  def _do(self, name: str, argument: Any) -> None:
    if name in ("PROTO", "FRAME", "STOP"):
      return
    if name in ("PUT", "BINPUT", "LONG_BINPUT"):
      self._memo[argument] = self._stack[-1]
    elif name == "MEMOIZE":
      self._memo[len(self._memo)] = self._stack[-1]
    elif name == "MARK":
      self._marks.append(len(self._stack))
    elif name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS", "BUILD"):
      self._change(name)
    else:
      self._stack.append(self._made(name, argument))

  def _made(self, name: str, argument: Any) -> Any:
    """The value that an instruction puts down."""
    if name in _VALUES:
      return argument
    if name in _CONSTANTS:
      return _CONSTANTS[name]
    if name in _EMPTY:
      return _EMPTY[name]()
    if name in ("BINGET", "LONG_BINGET", "GET"):
      return self._memo[argument]
    if name in _TUPLES:
      return tuple(self._top(_TUPLES[name]))
    if name == "TUPLE":
      return tuple(self._since_mark())
    if name == "GLOBAL":
      return _known(*argument.split(" ", 1))
    if name == "STACK_GLOBAL":
      return _known(*self._top(2))
    if name == "BINPERSID":
      return self._storage(self._stack.pop())
    if name == "REDUCE":
      return self._called(*self._top(2))
    raise ValueError(f"it holds the instruction {name}")

  def _top(self, count: int) -> list[Any]:
    return [self._stack.pop() for _ in range(count)][::-1]

  def _since_mark(self) -> list[Any]:
    mark = self._marks.pop()
    values = self._stack[mark:]
    del self._stack[mark:]
    return values

  def _change(self, name: str) -> None:
    """Puts values into the dict or the list below them."""
    several = name in ("SETITEMS", "APPENDS")
    count = 2 if name == "SETITEM" else 1
    values = self._since_mark() if several else self._top(count)
    target = self._stack[-1]
    if name == "BUILD" and type(target) is dict:
      return  # attributes of an OrderedDict, such as a state dict's _metadata
    if name.startswith("SETITEM") and type(target) is dict:
      target.update(_pairs(values[::2], values[1::2]))
    elif name.startswith("APPEND") and type(target) is list:
      target.extend(values)
    else:
      raise ValueError(f"it holds a {name} of a {type(target).__name__}")

  def _called(self, call: Any, arguments: Any) -> Any:
    if not isinstance(call, _Call) or not isinstance(arguments, tuple):
      raise ValueError("it calls what is no function")
    if call.name == "dict":
      pairs = list(*arguments)
      return _pairs([key for key, _ in pairs], [own for _, own in pairs])
    if call.name == "parameter":
      return arguments[0]
    made = _tensor(*arguments)
    self._left -= made.size
    if self._left < 0:
      raise ValueError(TOO_MANY)
    return made

  def _storage(self, pid: Any) -> np.ndarray:
    kind, storage, key, _, count = pid
    is_storage = kind == "storage" and isinstance(storage, _Kind)
    if not is_storage or not isinstance(key, str):
      raise ValueError("it refers to what is no storage")
    if key not in self._storages:
      data = self._archive.read(f"{self._folder}{key}")
      self._storages[key] = np.frombuffer(data, storage.dtype, count)
    return self._storages[key]


def _pairs(keys: Sequence[Any], values: Sequence[Any]) -> dict[Any, Any]:
  """A dict; tuples in tuples, as keys, could take forever to hash."""
  if not all(isinstance(key, str | int) for key in keys):
    raise ValueError("a key is neither text nor number")
  return dict(zip(keys, values))


def _known(module: Any, name: Any) -> _Kind | _Call:
  """What a name of the program stands for; raises for all but a few."""
  if not isinstance(module, str) or not isinstance(name, str):
    raise ValueError("a name is no text")
  if module == "torch" and name in _STORAGES:
    return _Kind(_STORAGES[name])
  if (module, name) in _CALLS:
    return _Call(_CALLS[module, name])
  raise ValueError(f"it holds a {f'{module}.{name}':.80}")


def _tensor(
  storage: np.ndarray, offset: int, size: Any, stride: Any, *rest: Any
) -> np.ndarray:
  """A view of a storage; strides count elements."""
  del rest
  size, stride = tuple(size), tuple(stride)
  if not all(type(n) is int and n >> 63 == 0 for n in (offset, *size, *stride)):
    raise ValueError("a tensor has no size")
  last = offset + sum((n - 1) * step for n, step in zip(size, stride))
  if 0 not in size and last >= len(storage):
    raise ValueError("a tensor is larger than its storage")
  if 0 in size:
    return np.empty(size, storage.dtype)
  bytes_of = [step * storage.itemsize for step in stride]
  return np.lib.stride_tricks.as_strided(
    storage[offset:], size, bytes_of, writeable=False
  )
