"""Files of images: where their bytes are, and in which order they come."""

import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from common.errors import UserError

log = logging.getLogger(__name__)

# Names that a message shows of those it counts.
_SHOWN = 5


class Place(NamedTuple):
  """Bytes in a file.

  Attributes:
    name: what errors call it.
    file: path of the file.
    offset: of the first byte.
    size: in bytes.
  """

  name: str
  file: str
  offset: int
  size: int

  def read(self) -> bytes:
    """The bytes.

    Raises:
      UserError: if the file is gone or shorter than it was.
    """
    try:
      with open(self.file, "rb") as file:
        file.seek(self.offset)
        data = file.read(self.size)
    except OSError as error:
      raise UserError(
        f"{self.name}: cannot be read: {error.strerror}"
      ) from error
    if len(data) != self.size:
      raise UserError(
        f"{self.name}: {self.size - len(data)} of its {self.size} bytes are "
        "gone: the file has changed since the start; start again"
      )
    return data


def files_below(root: str) -> Iterator[Place]:
  """Yields the files in a folder and below it.

  Names that begin with a dot do not count.

  Raises:
    UserError: for a folder that cannot be read.
  """

  def refuse(error: OSError) -> None:
    raise UserError(
      f"{error.filename}: {error.strerror}: data.source names this folder"
    ) from error

  for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
    below[:] = [name for name in below if name[0] != "."]
    for name in names:
      if name[0] != ".":
        yield whole_file(os.path.join(folder, name))


def whole_file(path: str) -> Place:
  """The place of a file; raises `UserError` if it cannot be found."""
  try:
    return Place(path, path, 0, os.path.getsize(path))
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def tar_members(path: str) -> Iterator[Place]:
  """Yields the files in a tar; it reads their headers alone.

  Raises:
    UserError: for what is no tar, a compressed one, or one that is cut off.
  """
  try:
    with tarfile.open(path, "r:") as archive:
      for member in archive:
        if member.isfile() and os.path.basename(member.name)[0] != ".":
          name = f"{path}:{member.name}"
          yield Place(name, path, member.offset_data, member.size)
      _check_end(path, archive.offset)
  except (tarfile.TarError, EOFError) as error:
    raise UserError(
      f"{path}: {error}: give an uncompressed tar, and fetch it again if it is "
      "one"
    ) from error
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _check_end(path: str, offset: int) -> None:
  """Raises `tarfile.ReadError` unless a tar ends here, with zeros.

  A header that is cut off or damaged ends the iteration without an error.
  """
  with open(path, "rb") as file:
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
  if block != bytes(tarfile.BLOCKSIZE):
    raise tarfile.ReadError(f"no file and no end of the tar at byte {offset}")


def stem(place: Place) -> str:
  """The file's name without folders and ending."""
  return os.path.splitext(os.path.basename(place.name))[0]


def natural_order(name: str) -> tuple[list[str | int], str]:
  """A key that sorts numbers by value: sa_2 comes before sa_10."""
  parts: list[str | int] = list(re.split(r"(\d+)", name))
  parts[1::2] = map(int, parts[1::2])
  return parts, name  # The parts of 01 and 1 are equal.


def chosen(count: int, start: int, limit: int, *, place: str) -> range:
  """Which of a source's images are used.

  Args:
    count: of images.
    start: the first one used.
    limit: how many are used; 0: all that follow.
    place: what holds them, for messages.

  Raises:
    UserError: for negative numbers, and for a start behind the last image.
  """
  if start < 0 or limit < 0:
    raise UserError(
      f"data.source.start={start} and limit={limit}: give numbers from 0"
    )
  if start >= count:
    raise UserError(
      f"data.source.start={start}, but {place} holds {count} images"
    )
  if limit > count - start:
    log.warning(
      "%s: data.source.limit=%d, but there are %d images from number %d on: "
      "all of these are used",
      place, limit, count - start, start,
    )  # fmt: skip
  return range(start, min(count, start + limit) if limit else count)


def some(names: Sequence[str]) -> str:
  """The first few names, and how many more there are."""
  more = f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else ""
  return f"{', '.join(names[:_SHOWN])}{more}"
