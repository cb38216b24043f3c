"""Folders of data, walked without leaving them.

A link may stand for any file of the machine, and a folder that somebody else
has made may hold links. What is named is read wherever it leads. What is only
found in a folder, or by a pattern, has to lie there: a private file would
otherwise be trained on and passed on with the model.
"""

import collections
import os
from collections.abc import Callable, Iterator

from common.errors import UserError

# What helps where a configuration names the data.
FOLLOW_LINKS = "set data.source.follow_links=True"

# One folder behind several links is usual; many times as many are a trap.
_MOST_VISITS = 100


class Inside:
  """Refuses links that lead out of a folder.

  Args:
    root: the folder, which may be a link itself.
    follow_links: whether links out of it are followed after all.
    remedy: what messages say helps besides a copy.
  """

  def __init__(
    self,
    root: str,
    *,
    follow_links: bool = False,
    remedy: str = "give inside=Inside(folder, follow_links=True)",
  ):
    self._root, self._follow, self._remedy = root, follow_links, remedy
    self._real = os.path.realpath(root)
    self._good: set[str] = set()  # folders

  def check(self, path: str) -> str:
    """Returns where a path leads, all links followed.

    Raises:
      UserError: where that is outside.
    """
    real = os.path.realpath(path)
    top = os.path.join(self._real, "")
    if not self._follow and not os.path.join(real, "").startswith(top):
      raise UserError(
        f"{path} leads out of {self._root}, to {real}: put a copy in its "
        f"place, or {self._remedy}"
      )
    return real

  def check_file(self, path: str) -> None:
    """As `check`; of many files in a folder the folder is looked at once."""
    folder = os.path.dirname(path)
    if folder not in self._good:
      self.check(folder)
      self._good.add(folder)
    if os.path.islink(path):
      self.check(path)


def walk(
  top: str,
  inside: Inside,
  *,
  wanted: Callable[[str], bool],
  refuse: Callable[[OSError], None],
  recursive: bool = True,
) -> Iterator[tuple[str, list[str]]]:
  """Yields each folder with the names of its files.

  Names that begin with a dot do not count.

  Args:
    top: where to begin.
    inside: what must not be left.
    wanted: tells by the name which files count.
    refuse: raises for a folder that cannot be read.
    recursive: also the folders below.

  Raises:
    UserError: for links out of the folder, and for those that lead back.
  """
  visits: collections.Counter[str] = collections.Counter()
  # Folders with where they really are, and those that they were reached by.
  left: list[tuple[str, str, tuple[str, ...]]] = [(top, inside.check(top), ())]
  while left:
    folder, real, above = left.pop()
    visits[real] += 1
    if real in above or visits[real] > _MOST_VISITS:
      raise UserError(
        f"{folder}: links lead back to {real} again and again: remove them"
      )
    try:
      with os.scandir(folder) as found:
        entries = [e for e in found if e.name[0] != "."]
    except OSError as error:
      refuse(error)
      raise
    names = []
    for entry in entries:
      if entry.is_dir():
        if recursive:
          known = os.path.join(real, entry.name)
          place = inside.check(entry.path) if entry.is_symlink() else known
          left.append((entry.path, place, (*above, real)))
      elif wanted(entry.name):
        if entry.is_symlink():
          inside.check(entry.path)
        names.append(entry.name)
    yield folder, names
