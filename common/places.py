"""What a folder is taken for: one run, or one comparison of many, or nothing.

Runs and comparisons both write `config.json` and `report.md` at its top, so
that either would destroy what the other has left. A run holds its folder while
it is at work.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from typing import IO

from common.errors import TakenError, UserError
from common.logs import FILE_NAME as LOG

log = logging.getLogger(__name__)
LOCK = ".lock"
_GLANCE_SECONDS = 0.1  # longer than `is_taken` holds what it looks at

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
  log was made, or another run is at work.

  Args:
    folder: may be missing; addresses are let alone.
  """
  path = os.path.abspath(os.path.expanduser(folder))
  had_folder = os.path.isdir(path)
  before = set(os.listdir(path)) if had_folder else set()
  try:
    yield
  except TakenError:
    raise
  except UserError:
    if "://" not in folder:
      with contextlib.suppress(OSError):
        names = set(os.listdir(path))
        if names <= {LOG, LOCK} and not names & before:
          for name in names:
            os.remove(os.path.join(path, name))
        if not had_folder:
          os.rmdir(path)  # refuses one that is not empty
    raise


def take(folder: str | os.PathLike) -> IO[bytes] | None:
  """Holds a folder while the file is open; the system lets go of it even after
  kill -9. None where there are no such locks.

  Args:
    folder: exists; addresses are let alone.

  Raises:
    TakenError: when another process holds it.
  """
  try:
    import fcntl
  except ImportError:  # not on Windows
    return None
  path = os.fspath(folder)
  if "://" in path:
    return None
  file = open(os.path.join(path, LOCK), "wb")  # noqa: SIM115, held by the run
  for is_last in (False, True):
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return file
    except BlockingIOError:
      if is_last:
        file.close()
        raise TakenError(
          f"a run is at work in {path}: wait for it or choose another --workdir"
        ) from None
      time.sleep(_GLANCE_SECONDS)
    except OSError as error:
      file.close()
      log.warning(
        "%s is on a file system without locks (%s): nothing stops a second run "
        "there", path, error.strerror,
      )  # fmt: skip
      return None
  return None


@contextlib.contextmanager
def taken(folder: str | os.PathLike) -> Iterator[None]:
  """Holds a folder in process 0, and makes it if missing; see `take`."""
  import jax

  if jax.process_index() > 0:
    yield
    return
  os.makedirs(folder, exist_ok=True)
  with take(folder) or contextlib.nullcontext():
    yield


def is_taken(folder: str | os.PathLike) -> bool:
  """Whether a run is at work in a folder, as far as locks can tell."""
  try:
    import fcntl

    with open(os.path.join(folder, LOCK), "rb") as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except (ImportError, OSError):  # nobody has been there, or no locks
    return False
  return False
