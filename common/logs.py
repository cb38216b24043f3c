"""Where a run's log lines go."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from common.errors import Preempted, RunError, TakenError, UserError

log = logging.getLogger(__name__)
FILE_NAME = "run.log"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def one_line(error: BaseException) -> str:
  """Returns an error's text without line breaks.

  Names of files come from anybody, and a terminal obeys control characters.
  """
  return _CONTROL.sub("\ufffd", " ".join(str(error).split()))


def _is_fatal(record: logging.LogRecord) -> bool:
  return record.levelno >= logging.CRITICAL


def quiet_libraries() -> None:
  """Keeps what Orbax, TFDS and gcsfs log from the terminal.

  They raise their errors as well, and those are said in our own lines. A line
  that cannot be logged, as on a full disk, is lost without a traceback.
  """
  for name in ("absl", "gcsfs"):
    logging.getLogger(name).addFilter(_is_fatal)
  logging.raiseExceptions = False


class _FileHandler(logging.FileHandler):
  """Keeps others from removing the file; see `is_logged_to`."""

  def _open(self) -> Any:
    stream = super()._open()
    with contextlib.suppress(ImportError, OSError):  # no locks here
      import fcntl

      fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return stream


def is_logged_to(workdir: str) -> bool:
  """Whether a process writes a folder's `run.log`, as far as locks can tell."""
  try:
    import fcntl

    with open(os.path.join(workdir, FILE_NAME), "rb") as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except (ImportError, OSError):  # there is none, or no locks
    return False
  return False


@contextlib.contextmanager
def logging_to(
  workdir: str, *, own: set[str], to_file: bool = True
) -> Iterator[None]:
  """Logs to the terminal and, in process 0, to the run's `run.log`.

  Args:
    workdir: where `run.log` goes, unless it is an address.
    own: packages whose INFO lines count; of all others, warnings do.
    to_file: False where the file is another run's.
  """
  import jax

  first = jax.process_index() == 0
  handlers: list[logging.Handler] = [logging.StreamHandler()]
  handlers[0].setLevel(logging.INFO if first else logging.WARNING)
  handlers[0].setFormatter(logging.Formatter("%(message)s"))
  if first and to_file and "://" not in workdir:
    os.makedirs(workdir, exist_ok=True)  # a refused start may have removed it
    handlers.append(_FileHandler(os.path.join(workdir, FILE_NAME)))
    handlers[1].setFormatter(
      logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
  root = logging.getLogger()
  level = root.level
  root.setLevel(logging.INFO)
  for handler in handlers:
    handler.addFilter(
      lambda record: (
        record.levelno >= logging.WARNING or record.name.split(".")[0] in own
      )
    )
    root.addHandler(handler)
  try:
    yield
  except BaseException as error:
    expected = isinstance(
      error, UserError | RunError | Preempted | KeyboardInterrupt
    )
    record = log.makeRecord(
      log.name,
      logging.WARNING if expected else logging.ERROR,
      __file__,
      0,
      f"the run ends: {type(error).__name__}: {one_line(error)}",
      (),
      None if expected else sys.exc_info(),
    )
    for handler in handlers[1:]:  # the terminal gets it from `call`
      if not isinstance(error, TakenError):  # another run's log
        handler.handle(record)
    raise
  finally:
    root.setLevel(level)
    for handler in handlers:
      root.removeHandler(handler)
      handler.close()
