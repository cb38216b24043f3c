"""NumPy's `.npy` and `.npz`: headers are checked before they are believed.

A header names a type and a shape, and a reader makes room for them at once. So
both are compared with the bytes that are there. Objects, which would be run,
are never read.
"""

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from common.archives import check_entries

# What broken files make the readers of this module raise.
ERRORS = (
  OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_READERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}
_NUMBERS = "biuf"


class _Head(NamedTuple):
  """What the header of an array says."""

  shape: tuple[int, ...]
  dtype: np.dtype


class Entry:
  """An array in an archive, read where `np.asarray` asks for it.

  Attributes:
    shape, dtype: as its header says.
  """

  def __init__(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo):
    self._archive, self._entry = archive, entry
    with archive.open(entry) as stream:
      self.shape, self.dtype = _read_head(stream, entry.file_size)

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    del copy  # there is nothing that a view could be of
    with self._archive.open(self._entry) as stream:
      array = np.lib.format.read_array(stream, allow_pickle=False)
    return array if dtype is None else array.astype(dtype, copy=False)


@contextlib.contextmanager
def open_npz(
  file: str | os.PathLike[str] | IO[bytes],
) -> Iterator[dict[str, Any]]:
  """The arrays of an `.npz` by name, as `Entry`s, while it is open.

  Args:
    file: a path or an open binary file.

  Raises:
    One of `ERRORS`, here or where an entry is read.
  """
  with zipfile.ZipFile(file) as archive:
    stream: Any = archive.fp
    check_entries(archive, stream.seek(0, os.SEEK_END))
    yield {
      entry.filename.removesuffix(".npy"): Entry(archive, entry)
      for entry in archive.infolist()
    }


def map_npy(path: str | os.PathLike[str]) -> np.ndarray:
  """The array of an `.npy`, mapped.

  Raises:
    One of `ERRORS`.
  """
  with open(path, "rb") as stream:
    _read_head(stream, os.fstat(stream.fileno()).st_size)
  return np.load(path, mmap_mode="r", allow_pickle=False)


def _read_head(stream: IO[bytes], size: int) -> _Head:
  """Reads a header; `size` is that of header and values together.

  Raises:
    ValueError: for a header that is broken, or names objects, text, or more
      values than there are.
  """
  read = _READERS.get(np.lib.format.read_magic(stream))
  if read is None:
    raise ValueError("its header is of another version than 1 and 2")
  try:
    shape, _, dtype = read(stream)
  except Exception as error:  # It is Python's syntax, read by Python's parser.
    raise ValueError("its header is broken") from error
  if dtype.kind not in _NUMBERS:
    raise ValueError(f"its type is {dtype!s:.40}, and only numbers are read")
  claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
  if min(shape, default=0) < 0 or claimed > held:
    raise ValueError(
      f"its header claims {claimed:,} bytes of values, and there are {held:,}"
    )
  return _Head(shape, dtype)
