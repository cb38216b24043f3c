"""How a program ends: exit statuses, one line instead of a traceback, SIGTERM.

  0    done
  1    failed, with a traceback; what storage refuses and a loss that is not
       finite are a line
  2    bad configuration or input, one line `error: ...`
  130  interrupted from the keyboard
  143  preempted: what is saved is whole, and the same command goes on

Nothing here imports jax.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from common.errors import Preempted, RunError, UserError
from common.files import storage_error
from common.logs import one_line, quiet_libraries

LINGER_SECONDS = 3.0


def call(function: Callable[[], Any]) -> int:
  """Calls `function` and returns the exit status that its end means."""
  quiet_libraries()
  try:
    with _quiet_threads():
      function()
  except UserError as error:
    return _say(2, f"error: {one_line(error)}")
  except RunError as error:
    return _say(1, f"error: {one_line(error)}")
  except Preempted as error:
    return _say(143, one_line(error))
  except KeyboardInterrupt as error:  # a run says what it has saved
    return _say(130, one_line(error) or "interrupted")
  except Exception as error:
    refused = [e for e in _chain(error) if storage_error(e)]
    # While everything is closed others follow, which know no place.
    placed = [e for e in refused if getattr(e, "filename", None)]
    if refused:
      return _say(1, f"error: {one_line((placed or refused)[-1])}")
    traceback.print_exc()
    return 1
  return 0


def _say(status: int, line: str) -> int:
  print(line, file=sys.stderr)
  return status


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
  """Makes SIGTERM raise `Preempted`, as Ctrl-C raises KeyboardInterrupt.

  So a process may be stopped while it reads data or compiles. The training
  loop, which saves first, has `common.hooks.PreemptionHook` in its place; among
  several processes jax takes the signal, and the loop asks it.
  """
  main = threading.current_thread() is threading.main_thread()
  if not main or _is_distributed():
    yield
    return

  def stop(*_: Any) -> None:
    raise Preempted("preempted: the same command goes on from what is saved")

  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _is_distributed() -> bool:
  if "jax" not in sys.modules:
    return False
  import jax

  return jax.distributed.is_initialized()


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
  """Keeps from the terminal what writers' threads say of a full disk, and
  tensorstore's of the event loop of a save or a restore that has failed.

  Both come to the main thread as an error, which ends in one line.
  """
  before = threading.excepthook, sys.unraisablehook
  signals = {KeyboardInterrupt: signal.SIGINT, Preempted: signal.SIGTERM}

  def in_thread(args: threading.ExceptHookArgs) -> None:
    if not any(map(storage_error, _chain(args.exc_value))):
      before[0](args)

  def stray(args: Any) -> None:
    if args.exc_type in signals:
      # It came where errors go nowhere, such as in a callback of the garbage
      # collector: again, when that is left.
      own = threading.main_thread().ident
      again = signal.pthread_kill, (own, signals[args.exc_type])
      threading.Timer(0.05, *again).start()
    elif str(args.exc_value) != "Event loop is closed":
      before[1](args)

  threading.excepthook, sys.unraisablehook = in_thread, stray
  try:
    yield
  finally:
    threading.excepthook, sys.unraisablehook = before


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  seen = set()
  while error is not None and id(error) not in seen:  # one may come twice
    seen.add(id(error))
    yield error
    error = error.__cause__ or error.__context__


def leave(status: int, *, at_once: bool = True) -> NoReturn:
  """Exits; a process that is cut short while jax is at work does so at once.

  Exit handlers would wait for other processes, which may be waiting in a
  collective for this one: gone without a word, it takes them along. And they
  would take the backend from under computations that a signal has left running.
  Only processes that leave together, having saved, say good-bye to each other.

  Args:
    status: of the exit.
    at_once: False where the interpreter is somebody else's.
  """
  together = status == 0 or (status == 143 and _is_distributed())
  if at_once and not together and "jax" in sys.modules:
    if status == 2:
      _linger()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def _linger() -> None:
  """Lets the other processes refuse what process 0 has refused.

  They die with it, for it coordinates them, and whoever started them would take
  that for a failure, which may be worth another try.
  """
  import jax

  if jax.distributed.is_initialized() and jax.process_index() == 0:
    time.sleep(LINGER_SECONDS)
