"""A folder holds one run, or one comparison of many.

Both write `config.json` and `report.md` at its top, so that either would
destroy what the other has left.
"""

import os
from collections.abc import Iterable

from common.errors import UserError

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
