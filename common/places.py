"""What a folder is taken for: one run, or one comparison of many, or nothing.

Runs and comparisons both write `config.json` and `report.md` at its top, so
that either would destroy what the other has left.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator

from common.errors import UserError
from common.logs import FILE_NAME as LOG

_RUN = ("checkpoints/*", "metrics.jsonl")
_COMPARISON = ("runs/*/seed*/*", "runs/*/*/seed*/*")


def check_holds_no_run(
  folder: str | os.PathLike, more: Iterable[str] = ()
) -> None:
  """Refuses a run's folder for a comparison.

  Args:
    folder: may be missing.
    more: patterns of what else only a run leaves.

  Raises:
    UserError: when it holds a run.
  """
  if _holds(folder, (*_RUN, *more)):
    raise UserError(
      f"--workdir={os.fspath(folder)!r} holds a run, which a comparison would "
      "overwrite: choose another --workdir"
    )


def check_holds_no_comparison(folder: str | os.PathLike) -> None:
  """Refuses a comparison's folder for a run.

  Args:
    folder: may be missing.

  Raises:
    UserError: when it holds jobs of a comparison.
  """
  if _holds(folder, _COMPARISON):
    raise UserError(
      f"--workdir={os.fspath(folder)!r} holds a comparison, whose report a run "
      "would overwrite: choose another --workdir"
    )


def _holds(folder: str | os.PathLike, patterns: Iterable[str]) -> bool:
  """Whether anything but empty files matches."""
  from etils import epath

  path = epath.Path(folder)
  return any(
    found.is_dir() or found.stat().length > 0
    for pattern in patterns
    for found in path.glob(pattern)
  )


@contextlib.contextmanager
def taken_when_used(folder: str) -> Iterator[None]:
  """Leaves no log, and no folder, of a start that is refused.

  What was there before stays, and so does a folder in which anything but the
  log was made.

  Args:
    folder: may be missing; addresses are let alone.
  """
  path = os.path.abspath(os.path.expanduser(folder))
  had_folder = os.path.exists(path)
  had_log = os.path.exists(os.path.join(path, LOG))
  try:
    yield
  except UserError:
    if not had_log and "://" not in folder:
      with contextlib.suppress(OSError):
        if os.listdir(path) == [LOG]:
          os.remove(os.path.join(path, LOG))
        if not had_folder:
          os.rmdir(path)  # refuses one that is not empty
    raise
