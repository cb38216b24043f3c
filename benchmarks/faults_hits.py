"""How a run can be hit; see `faults.py`."""

import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from common.checkpoint import checkpoint_steps

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATIENCE = 600.0  # seconds in which processes have to end by themselves
PEER_TIMEOUT = 30  # seconds of silence after which a process is given up
# Runs a module whose wall clock jumps once, at a random moment, by up to a
# year, forward or back.
JUMPING_CLOCK = """
import random, runpy, sys, time
real, start = time.time, time.monotonic()
moment, jump = random.uniform(0, 10), random.uniform(-3e7, 3e7)
time.time = lambda: real() + jump * (time.monotonic() - start > moment)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is hit.

  Attributes:
    name: of the project, with the number of processes.
    arguments: of Python, without the folder.
    processes: that make the run.
  """

  name: str
  arguments: tuple[str, ...]
  processes: int


class Running:
  """The processes of a run.

  Args:
    subject: what runs.
    folder: the run's. What the processes say is in the file beside it.
    wrapper: a program that runs the module it is given, in Python's place.
    more: arguments.
    devices: of each process.
  """

  def __init__(
    self,
    subject: Subject,
    folder: pathlib.Path,
    wrapper: str = "",
    more: tuple[str, ...] = (),
    devices: int = 2,
  ):
    self.said = folder.with_suffix(".err")
    address = _free_address()
    with open(self.said, "ab") as err:
      self.from_here = err.tell()
      self.processes = [
        subprocess.Popen(
          [
            sys.executable,
            *(["-c", wrapper] if wrapper else ["-m"]),
            *subject.arguments,
            *more,
            f"--workdir={folder}",
            *_place(address, i, subject.processes),
          ],
          cwd=ROOT,
          env=os.environ
          | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
          stdout=subprocess.DEVNULL,
          stderr=err,
        )
        for i in range(subject.processes)
      ]

  @property
  def is_alive(self) -> bool:
    """Whether none of them has ended."""
    return all(process.poll() is None for process in self.processes)

  def one(self, rng: random.Random) -> subprocess.Popen:
    """Any of them."""
    return rng.choice(self.processes)

  def wait(self) -> list[int]:
    """All statuses; raises where a process goes on and on."""
    until = time.monotonic() + PATIENCE
    for process in self.processes:
      process.wait(max(until - time.monotonic(), 0.01))
    return [process.returncode for process in self.processes]

  def __enter__(self) -> "Running":
    return self

  def __exit__(self, *_: object) -> None:
    """Leaves nothing behind."""
    for process in self.processes:
      process.kill()
      process.wait()

  def last_line(self) -> str:
    """The last line that one of them has written, "" for none."""
    with open(self.said, "rb") as err:
      err.seek(self.from_here)
      lines = err.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _place(address: str, number: int, count: int) -> list[str]:
  if count == 1:
    return []
  return [
    f"--coordinator={address}",
    f"--process_id={number}",
    f"--num_processes={count}",
    f"--peer_timeout={PEER_TIMEOUT}",
  ]


def _free_address() -> str:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"


class Wrong(Exception):
  """A fault did what it must not do."""


@dataclasses.dataclass
class Trial:
  """One run, and what happens to it.

  Attributes:
    subject: what runs.
    folder: of the run.
    seconds: that an undisturbed run takes.
    rng: of everything drawn.
  """

  subject: Subject
  folder: pathlib.Path
  seconds: float
  rng: random.Random

  def begin(self, wrapper: str = "", *more: str) -> Running:
    """Starts the command, and waits until a random moment of the run."""
    running = Running(self.subject, self.folder, wrapper, more)
    until = time.monotonic() + self.rng.uniform(0, self.seconds)
    while running.is_alive and time.monotonic() < until:
      time.sleep(0.005)
    return running

  # Each hits once and returns what it did, "" where the run had ended before.

  def kill(self) -> str:
    """SIGKILL to one process; the others have to end by themselves."""
    with self.begin() as running:
      if not running.is_alive:
        return self._ended(running)
      running.one(self.rng).kill()
      statuses = running.wait()
      if statuses.count(0) == len(statuses):
        return ""
      return f"statuses {statuses}"

  def term(self) -> str:
    """SIGTERM to one process; all save one step and end with 143."""
    with self.begin() as running:
      if not running.is_alive:
        return self._ended(running)
      running.one(self.rng).terminate()
      statuses = running.wait()
      # Before Python has read what it is to do with it, the signal kills; and
      # what ends in the same moment has ended.
      allowed = {143, -signal.SIGTERM, 0}
      lost = set(statuses) - allowed
      if self.subject.processes > 1 and -signal.SIGTERM in statuses:
        lost = set()  # the others have lost a peer that had not joined yet
      if lost:
        raise Wrong(f"SIGTERM: statuses {statuses}: {running.last_line()}")
      return f"statuses {statuses}"

  def stop(self) -> str:
    """A process stands still; the others give it up after a while."""
    with self.begin() as running:
      if not running.is_alive:
        return self._ended(running)
      still = running.one(self.rng)
      still.send_signal(signal.SIGSTOP)
      if self.subject.processes == 1:
        time.sleep(self.rng.uniform(0, 2))
        still.send_signal(signal.SIGCONT)
        return self._ended(running) or "went on"
      for process in running.processes:
        if process is not still:
          process.wait(PATIENCE)
      still.kill()
      return f"statuses {running.wait()}"

  def clock(self) -> str:
    """The wall clock jumps: nothing happens, or a save is given up."""
    with self.begin(JUMPING_CLOCK) as running:
      statuses = running.wait()
      line = running.last_line()
      if set(statuses) == {0}:
        return "went on"
      if "clock has jumped" not in line:
        raise Wrong(f"a clock that jumps: statuses {statuses}: {line}")
      return line

  def damage(self) -> str:
    """A checkpoint's file loses a bit, its end, or itself, where there is
    another checkpoint to go on from.
    """
    hit = self.kill()
    files = [
      path
      for folder in sorted(self.folder.rglob("checkpoints"))
      if len(checkpoint_steps(folder)) > 1
      for path in sorted(folder.glob("*/**/*"))
      if path.is_file()
    ]
    if not hit or not files:
      return ""
    path = self.rng.choice(files)
    data = bytearray(path.read_bytes())
    how = self.rng.choice(("bit", "end", "all")) if data else "all"
    if how == "all":
      path.unlink()
    elif how == "end":
      path.write_bytes(data[: self.rng.randrange(len(data))])
    else:
      data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
      path.write_bytes(data)
    return f"{how} of {path.relative_to(self.folder)}"

  def worker(self) -> str:
    """A process that makes batches dies: an error, and no wait."""
    with self.begin("", "--config.data.workers=1") as running:
      parent = running.one(self.rng)
      children = _children(parent.pid)
      if not running.is_alive or not children:
        return self._ended(running)
      os.kill(self.rng.choice(children), signal.SIGKILL)
      statuses = running.wait()
      if set(statuses) == {0}:  # all its batches were there
        return ""
      line = running.last_line()
      if 1 not in statuses or not line:
        raise Wrong(f"a dead worker: statuses {statuses}: {line}")
      return line

  def twin(self) -> str:
    """The same command again while it runs: refused, and nothing else."""
    with self.begin() as running:
      if not running.is_alive or not self._has_begun():
        return self._ended(running)
      with Running(self.subject, self.folder) as second:
        statuses = second.wait()
      if not running.is_alive:
        return self._ended(running)
      if 2 not in statuses:
        raise Wrong(f"a second run: statuses {statuses}")
      return self._ended(running) or "refused"

  def read_only(self) -> str:
    """The folder cannot be written any more: one line, status 1."""
    with self.begin() as running, _read_only(self.folder) as mounted:
      if not mounted or not running.is_alive:
        return self._ended(running)
      statuses = running.wait()
      line = running.last_line()
      if set(statuses) == {0}:
        return ""
      if 1 not in statuses or not line.startswith("error: "):
        raise Wrong(f"a read-only folder: statuses {statuses}: {line}")
      return line

  def _has_begun(self) -> bool:
    return any(self.folder.rglob("metrics.jsonl"))

  def _ended(self, running: Running) -> str:
    """Nothing was hit: the run has to end well, or be told why not."""
    statuses = running.wait()
    if set(statuses) != {0}:
      raise Wrong(f"statuses {statuses}: {running.last_line()}")
    return ""


def _children(process: int) -> list[int]:
  """Processes that a process has started."""
  try:
    tasks = list(pathlib.Path(f"/proc/{process}/task").iterdir())
    return [
      int(child)
      for task in tasks
      for child in (task / "children").read_text().split()
    ]
  except OSError:
    return []


@contextlib.contextmanager
def _read_only(folder: pathlib.Path) -> Iterator[bool]:
  """Whether the folder could be made read-only, which takes a mount."""
  made = 0
  try:
    if any(folder.rglob("metrics.jsonl")):
      for options in (["--bind"], ["-o", "remount,ro,bind"]):
        command = ["mount", *options, str(folder), str(folder)]
        found = subprocess.run(command, capture_output=True, check=False)
        if found.returncode:
          break
        made += 1
    yield made == 2
  finally:
    if made:
      subprocess.run(["umount", str(folder)], check=True)


KINDS: dict[str, tuple[Callable[[Trial], str], int]] = {  # with their weights
  "kill": (Trial.kill, 10),
  "term": (Trial.term, 3),
  "damage": (Trial.damage, 3),
  "stop": (Trial.stop, 1),
  "clock": (Trial.clock, 1),
  "worker": (Trial.worker, 1),
  "twin": (Trial.twin, 1),
  "read_only": (Trial.read_only, 1),
}
