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
from common.logs import is_logged_to

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
  log was made, or another run is at work or about to be.

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
        _clear(path, before)
        if not had_folder:
          os.rmdir(path)  # refuses one that is not empty
    raise


def _clear(path: str, before: set[str]) -> None:
  """Removes log and lock, holding the lock, where there is nothing else."""

  def is_ours() -> bool:
    names = set(os.listdir(path))
    return names <= {LOG, LOCK} and not names & before

  if not is_ours():
    return
  try:
    lock = _locked(path)
  except BlockingIOError:
    return  # another run is at work
  except _NoLocks:
    lock = None
  with lock or contextlib.nullcontext():
    if is_ours() and not is_logged_to(path):
      for name in os.listdir(path):
        os.remove(os.path.join(path, name))


class _NoLocks(Exception):
  """A file system has none."""


def _locked(path: str) -> IO[bytes] | None:
  """The file of a folder's lock, which is held while it is open.

  Whoever removes the file holds it, so what is locked has to be there still.
  None on systems without such locks.

  Raises:
    BlockingIOError: another one holds it.
    _NoLocks: the file system has none.
  """
  try:
    import fcntl
  except ImportError:  # not on Windows
    return None
  place = os.path.join(path, LOCK)
  while True:
    os.makedirs(path, exist_ok=True)  # it may have been removed just now
    file = open(place, "wb")  # noqa: SIM115, held by the run
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.close()
      raise
    except OSError as error:
      file.close()
      raise _NoLocks(error.strerror) from error
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), os.stat(place)):
        return file
    file.close()


def take(folder: str | os.PathLike) -> IO[bytes] | None:
  """Holds a folder while the file is open; the system lets go of it even after
  kill -9. None where there are no such locks.

  Args:
    folder: made if missing; addresses are let alone.

  Raises:
    TakenError: when another process holds it.
  """
  path = os.fspath(folder)
  if "://" in path:
    return None
  for is_last in (False, True):
    try:
      return _locked(path)
    except BlockingIOError:
      if is_last:
        raise TakenError(
          f"a run is at work in {path}: wait for it or choose another --workdir"
        ) from None
      time.sleep(_GLANCE_SECONDS)
    except _NoLocks as error:
      log.warning(
        "%s is on a file system without locks (%s): nothing stops a second run "
        "there", path, error,
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
