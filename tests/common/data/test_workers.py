import os
import signal
import sys
import threading

import pytest

from common.data.workers import Workers
from common.errors import RunError

# Workers import it by its name, which they cannot do with a test's module.
CALLS = """
import gc
import os
import signal
import struct
from multiprocessing.connection import Connection


def add(a, b):
  return a + b


def pid():
  return os.getpid()


def dies():
  os._exit(3)


def dies_while_it_answers():
  # Four bytes say how long an answer is.
  (pipe,) = [x for x in gc.get_objects() if isinstance(x, Connection)]
  os.write(pipe.fileno(), struct.pack("!i", 1000) + b"the first half")
  os.kill(os.getpid(), signal.SIGKILL)


def ends_early():
  raise EOFError("the file is cut off")


def answers_a_lock():
  import threading

  return threading.Lock()


class Odd(Exception):
  def __init__(self, code, reason):
    super().__init__(f"{reason} ({code})")


def fails_oddly():
  raise Odd(7, "no such page")


class OfOneProcess:
  def __init__(self):
    self.home = os.getpid()

  def __call__(self):
    return "called"

  def __setstate__(self, state):
    raise ImportError("not installed here")
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
  folder = tmp_path_factory.mktemp("calls")
  (folder / "calls_for_test.py").write_text(CALLS)
  sys.path.insert(0, str(folder))
  import calls_for_test

  yield calls_for_test
  sys.path.remove(str(folder))
  del sys.modules["calls_for_test"]


@pytest.fixture
def start():
  """`(function, count=1)`: workers, that are stopped in the end."""
  started = []

  def make(function, count=1):
    started.append(Workers(function, count))
    return started[-1]

  yield make
  for workers in started:
    workers.stop()


def test_calls_are_answered_in_other_processes(calls, start):
  workers = start(calls.add, 2)
  results = [workers.submit(i, 10) for i in range(5)]
  assert [result.result() for result in results] == [10, 11, 12, 13, 14]
  assert start(calls.pid).submit().result() != os.getpid()


@pytest.mark.parametrize("death", ["dies", "dies_while_it_answers"])
def test_a_death_is_one_line_whenever_it_comes(calls, start, death):
  workers = start(getattr(calls, death))
  results = [workers.submit() for _ in range(2)]
  for result in (*results, workers.submit()):
    with pytest.raises(RunError, match=r"has died .* start again"):
      result.result(timeout=60)


def test_an_error_comes_with_its_traceback_and_the_next_call_is_served(
  calls, start
):
  workers = start(calls.add)
  with pytest.raises(TypeError) as caught:
    workers.submit(1, "2").result()
  (note,) = caught.value.__notes__
  assert "in a worker" in note
  assert "calls_for_test.py" in note
  assert workers.submit(1, 2).result() == 3


def test_an_end_of_file_in_a_function_is_no_death(calls, start):
  with pytest.raises(EOFError, match="cut off"):
    start(calls.ends_early).submit().result()


@pytest.mark.parametrize(
  ("function", "error", "says"),
  [
    ("answers_a_lock", TypeError, "pickle"),
    ("fails_oddly", RuntimeError, r"Odd: no such page \(7\)"),
  ],
)
def test_what_cannot_be_sent_back_is_an_error(
  calls, start, function, error, says
):
  with pytest.raises(error, match=says):
    start(getattr(calls, function)).submit().result()


def test_a_function_that_cannot_be_sent_is_an_error(start):
  with pytest.raises(Exception, match="pickle"):
    start(lambda: None).submit().result()


def test_a_function_that_cannot_be_read_is_an_error(calls, start):
  with pytest.raises(ImportError, match="not installed here"):
    start(calls.OfOneProcess()).submit().result()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_of_a_group_are_left_to_the_parent(calls, start, name):
  """A run that is to save and leave goes on with its workers till then."""
  workers = start(calls.pid)
  worker = workers.submit().result()
  os.kill(worker, getattr(signal, name))
  assert workers.submit().result() == worker


def test_stopping_leaves_what_is_not_begun(calls):
  workers, before = Workers(calls.add, 1), threading.active_count()
  results = [workers.submit(i, 0) for i in range(50)]
  results[0].result()
  workers.stop()
  workers.stop()
  assert all(result.done() for result in results)
  assert results[-1].cancelled()
  assert threading.active_count() == before - 1
