"""Files of images: where their bytes are, and in which order they come."""

import logging
import os
import pathlib
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.data.folders import FOLLOW_LINKS, Inside, walk
from common.data.images import read_image
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
    except (OSError, MemoryError) as error:
      reason = getattr(error, "strerror", None) or "it is too large"
      raise UserError(f"{self.name}: cannot be read: {reason}") from error
    if len(data) != self.size:
      raise UserError(
        f"{self.name}: {self.size - len(data)} of its {self.size} bytes are "
        "gone: the file has changed since the start; start again"
      )
    return data

  def image(self, max_pixels: int = 0, *, upright: bool = True) -> np.ndarray:
    """The bytes as an image, uint8 [h w 3].

    Args:
      max_pixels: larger images are refused; 0: as `read_image` does by itself.
      upright: turned as EXIF says.

    Raises:
      UserError: as `read` and `common.data.images.read_image`.
    """
    return read_image(
      self.read(),
      name=self.name,
      max_pixels=max_pixels or None,
      key="data.source.max_pixels",
      upright=upright,
    )


def files_below(root: str, *, follow_links: bool = False) -> Iterator[Place]:
  """Yields the files in a folder and below it.

  Names that begin with a dot do not count.

  Args:
    root: the folder.
    follow_links: also those that lead out of it.

  Raises:
    UserError: for a folder that cannot be read, and for links as
      `common.data.folders.walk` says.
  """

  def refuse(error: OSError) -> None:
    raise UserError(
      f"{error.filename}: {error.strerror}: data.source names this folder"
    ) from error

  fence = inside(root, follow_links)
  for folder, names in walk(
    root, fence, wanted=lambda name: True, refuse=refuse
  ):
    for name in names:
      yield whole_file(os.path.join(folder, name))


def inside(root: str, follow_links: bool) -> Inside:
  """What the links in a source's folder must not leave."""
  return Inside(root, follow_links=follow_links, remedy=FOLLOW_LINKS)


def whole_file(path: str) -> Place:
  """The place of a file; raises `UserError` if there is none."""
  try:
    status = os.stat(path)
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror}") from error
  if not stat.S_ISREG(status.st_mode):
    raise UserError(f"{path}: no file but a device or a pipe: remove it")
  return Place(path, path, 0, status.st_size)


def tar_members(path: str) -> Iterator[Place]:
  """Yields the files in a tar; it reads their headers alone.

  Raises:
    UserError: for what is no tar, a compressed one, or one that is cut off; for
      links and what else is no file, and for names that lead out of it.
  """
  try:
    size, end = os.path.getsize(path), 0
    with tarfile.open(path, "r:") as archive:
      for member in archive:
        name = f"{path}:{member.name}"
        start, stop = member.offset_data, member.offset_data + member.size
        if not end <= member.offset <= start <= stop <= size:
          raise tarfile.ReadError(f"{member.name!r:.80} is not inside of it")
        end = start
        if member.isdir():
          continue
        _check_member(member, name)
        if os.path.basename(member.name)[0] != ".":
          yield Place(name, path, member.offset_data, member.size)
      _check_end(path, archive.offset)
  except (tarfile.TarError, EOFError, RecursionError) as error:
    raise UserError(
      f"{path}: {error}: give an uncompressed tar, and fetch it again if it is "
      "one"
    ) from error
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _check_member(member: tarfile.TarInfo, name: str) -> None:
  """Refuses what is no plain file; nothing is ever unpacked all the same."""
  parts = pathlib.PurePosixPath(member.name)
  if parts.is_absolute() or ".." in parts.parts or not parts.name:
    raise UserError(f"{name}: leads out of the tar: pack it with plain names")
  if not member.isfile() or member.issparse():
    raise UserError(
      f"{name}: no file but a link, a device or a file with holes: pack the "
      "files themselves, with tar --dereference --hard-dereference"
    )


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


def natural_order(name: str) -> tuple[list[Any], str]:
  """A key that sorts numbers by value: sa_2 comes before sa_10."""
  parts: list[Any] = re.split(r"([0-9]+)", name)
  # By length, then by digits: Python takes no numbers of thousands of digits.
  digits = [part.lstrip("0") for part in parts[1::2]]
  parts[1::2] = [(len(own), own) for own in digits]
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
