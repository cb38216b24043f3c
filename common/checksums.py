"""Hashes of a folder's files, by which damage is noticed before they are read.

Formats notice what makes them unreadable. A flipped bit of a weight is as good
a weight to them.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Iterator

from etils import epath

from common import files

FILE_NAME = "checksums.json"
_BLOCK = 1 << 22  # bytes read at once


def write(folder: epath.Path, *, but: tuple[str, ...] = ()) -> None:
  """Writes the hashes of all files of a folder into it.

  Args:
    folder: which.
    but: names of files that are still to change.
  """
  found = sorted(
    str(path.relative_to(folder))
    for path in _files(folder)
    if path.name not in (FILE_NAME, *but)
  )
  with concurrent.futures.ThreadPoolExecutor() as pool:
    hashes = pool.map(lambda name: _hash(folder / name), found)
    files.write_json(folder / FILE_NAME, dict(zip(found, hashes)))


def are_written(folder: epath.Path) -> bool:
  """Whether a folder has hashes."""
  return (folder / FILE_NAME).exists()


def check(
  folder: epath.Path, *, below: str = "", part: tuple[int, int] = (0, 1)
) -> None:
  """Raises where a file is not the one whose hash was written.

  A folder without hashes is taken as it is.

  Args:
    folder: which.
    below: only files of this folder in it.
    part: (i, n), for n readers of the same folder: reader i checks every n-th
      file.

  Raises:
    ValueError: names the file.
  """
  if not are_written(folder):
    return
  try:
    hashes = json.loads((folder / FILE_NAME).read_text())
    names = sorted(hashes)
  except (*files.JSON_ERRORS, TypeError) as error:
    raise ValueError(f"{FILE_NAME} is damaged") from error
  first, readers = part
  chosen = [name for name in names[first::readers] if name.startswith(below)]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = pool.map(lambda name: _hash(folder / name), chosen)
    for name, value in zip(chosen, found):
      if value != hashes[name]:
        problem = "is damaged" if value else "is missing"
        raise ValueError(f"{name} {problem}")


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def _hash(path: epath.Path) -> str:
  """Of the content; "" where there is none."""
  digest = hashlib.blake2b(digest_size=16)
  try:
    with path.open("rb") as file:
      while block := file.read(_BLOCK):
        digest.update(block)
  except FileNotFoundError:
    return ""
  return digest.hexdigest()
