"""Processes that call a function, each behind a pipe of its own.

Nobody else holds the other end of a pipe, so one that ends says that its
process has died, even in the middle of an answer. A queue that processes share,
as the one of `concurrent.futures`, would wait for the rest of it for ever.
"""

import atexit
import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent import futures
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler as _Pickler
from typing import Any

from common.errors import RunError


class Workers:
  """Calls `function(*arguments)` in other processes.

  They live until `stop`, until this process ends or until the program does.
  Ctrl-C and SIGTERM, which may reach a whole group, are left to this process.

  Args:
    function: sent once to each process; has to be picklable, as arguments and
      results do.
    count: of processes, at least 1.
  """

  def __init__(self, function: Callable, count: int):
    self._function = function
    self._stopping = False
    self._error: Exception | None = None
    self._tasks: queue.SimpleQueue = queue.SimpleQueue()
    self._threads = [
      threading.Thread(target=self._serve, args=_start(), daemon=True)
      for _ in range(count)
    ]
    for thread in self._threads:
      thread.start()
    # Before multiprocessing ends its processes by a signal they do not heed.
    atexit.register(self.stop)

  def submit(self, *arguments: Any) -> futures.Future:
    """Begins a call; cancelling the result spares what is not begun.

    What the function raises has its traceback as a note. Where a process has
    died, that call's result and all later ones are a `RunError`.
    """
    result: futures.Future = futures.Future()
    self._tasks.put((result, arguments))
    return result

  def stop(self) -> None:
    """Waits for what is being computed and leaves the rest."""
    atexit.unregister(self.stop)
    self._stopping = True
    for _ in self._threads:
      self._tasks.put(None)
    for thread in self._threads:
      if thread is not threading.current_thread():
        thread.join()

  def _serve(
    self, process: multiprocessing.process.BaseProcess, pipe: Connection
  ) -> None:
    """Hands tasks to one process, until there are none."""
    self._send_function(pipe)
    while (task := self._tasks.get()) is not None:
      result, arguments = task
      if self._stopping:
        result.cancel()
      settle(result, self._call, pipe, arguments)
      # Nothing of a result may stay alive while the thread waits.
      task = result = arguments = None
    pipe.close()
    process.join()

  def _send_function(self, pipe: Connection) -> None:
    try:
      pipe.send(self._function)
    except OSError:
      self._error = _died()
    except Exception as error:  # it cannot be pickled
      self._error = error

  def _call(self, pipe: Connection, arguments: tuple[Any, ...]) -> Any:
    if self._error is not None:
      raise self._error
    try:
      pipe.send(arguments)
      succeeded, value = pipe.recv()
    except (EOFError, OSError) as error:
      self._error = _died()
      raise self._error from error
    if succeeded:
      return value
    raise value


def settle(result: futures.Future, function: Callable, *arguments: Any) -> None:
  """Gives a result, unless it was cancelled, what a call returns or raises."""
  if not result.set_running_or_notify_cancel():
    return
  try:
    result.set_result(function(*arguments))
  except BaseException as error:
    result.set_exception(error)


def _died() -> RunError:
  return RunError(
    "a process that makes batches has died (killed, or out of memory): start "
    "again, perhaps with fewer data.workers; what is saved is whole"
  )


def _start() -> tuple[multiprocessing.process.BaseProcess, Connection]:
  # Spawned: a fork of a process that runs threads, as JAX does, may hang.
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  process = context.Process(target=_work, args=(theirs,), daemon=True)
  process.start()
  theirs.close()
  return process, ours


def _work(pipe: Connection) -> None:
  """What a process does: answers, until the pipe ends."""
  for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, signal.SIG_IGN)
  # A worker must not take an accelerator, not even by accident. The variable
  # is too late where the main module has imported jax.
  os.environ["JAX_PLATFORMS"] = "cpu"
  if "jax" in sys.modules:
    sys.modules["jax"].config.update("jax_platforms", "cpu")
  # Who asks has stopped, or was killed.
  with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
    sent, function = pipe.recv_bytes(), None
    while True:
      task = pipe.recv_bytes()
      try:
        if function is None:
          function, sent = _Pickler.loads(sent), b""
        answer = _Pickler.dumps((True, function(*_Pickler.loads(task))))
      except Exception as error:
        error.add_note(f"in a worker:\n{traceback.format_exc()}")
        answer = _Pickler.dumps((False, _portable(error)))
      pipe.send_bytes(answer)
      task = answer = b""


def _portable(error: Exception) -> Exception:
  """An error, or what stands for one that cannot be sent."""
  try:
    _Pickler.loads(_Pickler.dumps(error))
  except Exception:
    sent = RuntimeError(f"{type(error).__name__}: {error}")
    for note in error.__notes__:
      sent.add_note(note)
    return sent
  return error
