"""How a run can be hit; see `faults.py`."""

import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from faults_mounts import FULL, full_disk, own_disk, read_only
from faults_runs import PATIENCE, Running, Subject, lines_from

from common.checkpoint import checkpoint_steps, load_params
from common.errors import UserError
from common.metrics import read_metrics

EARLY = 0.1  # share of hits while a run starts
LATEST = 4  # steps before the end, from which on a signal may be too late
LONGEST_PAUSE = 0.5  # seconds between a step and the hit
TICK = 0.02
# Runs a module whose wall clock jumps once. That of Python: what C++ asks for
# the time, such as the heartbeats of processes, knows nothing of it.
JUMPING_CLOCK = """
import runpy, sys, time
real, start = time.time, time.monotonic()
time.time = lambda: real() + {jump} * (time.monotonic() - start > {moment})
time.time_ns = lambda: int(time.time() * 1e9)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Wrong(Exception):
  """A fault did what it must not do."""


@dataclasses.dataclass(frozen=True)
class Straight:
  """The run that nothing has hit.

  Attributes:
    folder: of the run.
    seconds: that it took, with its programs compiled.
    joined: seconds after which its processes had found each other.
    steps: that it has logged.
  """

  folder: pathlib.Path
  seconds: float
  joined: float
  steps: int


def trainings(folder: pathlib.Path) -> list[pathlib.Path]:
  """Where in a finished run its trainings are: at least one.

  Raises:
    Wrong: for none, and for one without lines or without checkpoints, to which
      anything would be equal.
  """
  files = sorted(folder.rglob("metrics.jsonl"))
  if not files:
    raise Wrong(f"{folder} is no run: no metrics.jsonl in it")
  for file in files:
    if not read_metrics(file):
      raise Wrong(f"{file} is empty")
    checkpoints = file.parent / "checkpoints"
    if not checkpoints.exists() or not checkpoint_steps(checkpoints):
      raise Wrong(f"{file.parent} has no checkpoints")
  return [file.parent.relative_to(folder) for file in files]


@dataclasses.dataclass(frozen=True)
class Damage:
  """A checkpoint that was damaged.

  Attributes:
    place: the checkpoint's folder, which is another one once it has changed.
    changed: when it had, in nanoseconds.
    offset: in what the run says, from where on it has to say so.
    is_read: whether the next start reads it, and would read something else.
  """

  place: pathlib.Path
  changed: int
  offset: int
  is_read: bool

  @property
  def is_there(self) -> bool:
    """Whether the checkpoint has not been replaced or removed."""
    place = self.place
    return place.exists() and place.stat().st_mtime_ns == self.changed


@dataclasses.dataclass
class Trial:
  """One run, and what happens to it.

  Attributes:
    subject: what runs.
    folder: of the run.
    straight: the same without a hit.
    rng: of everything drawn.
    damages: of checkpoints, so far.
  """

  subject: Subject
  folder: pathlib.Path
  straight: Straight
  rng: random.Random
  damages: list[Damage] = dataclasses.field(default_factory=list)

  def begin(self, wrapper: str = "", *more: str) -> Running:
    """Starts the command, and waits until a random moment of the run.

    Some moments are before the first step. Of the others, in what is left of
    the run, more are early than late, for the next hits need one that has not
    ended. Machines may be busy, so steps are counted, not seconds.
    """
    running = Running(self.subject, self.folder, wrapper, more)
    steps, pause = 0, self.rng.uniform(0, self.straight.joined)
    if self.rng.random() > EARLY:
      left = self.straight.steps - self.saved()
      steps = round(self.rng.random() ** 2 * left)
      pause = self.rng.uniform(0, LONGEST_PAUSE)
      # Processes wait minutes for one that has never come.
      while running.is_alive and not running.has_joined:
        time.sleep(TICK)
    while running.is_alive and running.steps() < steps:
      time.sleep(TICK)
    until = time.monotonic() + pause
    while running.is_alive and time.monotonic() < until:
      time.sleep(TICK)
    return running

  def saved(self) -> int:
    """Steps of all trainings that a start goes on from."""
    found = map(checkpoint_steps, self.folder.rglob("checkpoints"))
    return sum(steps[-1] for steps in found if steps)

  def is_finished(self) -> bool:
    """Whether the last checkpoints of all trainings are there."""
    straight = self.straight.folder
    trainings(straight)  # Nothing would be all of nothing.
    return all(
      self.has_ended(self.folder / place.relative_to(straight))
      for place in straight.rglob("checkpoints")
    )

  def has_ended(self, checkpoints: pathlib.Path) -> bool:
    """Whether the last checkpoint of a training is there."""
    place = checkpoints.relative_to(self.folder)
    last = checkpoint_steps(self.straight.folder / place)[-1:]
    return checkpoints.exists() and checkpoint_steps(checkpoints)[-1:] == last

  def check_said(self) -> None:
    """What was damaged and had to be read has been reported, in the end."""
    for damage in self.damages:
      wanted = f"checkpoint {damage.place.name} cannot be read"
      said = lines_from(self.folder.with_suffix(".err"), damage.offset)
      if damage.is_read and not any(wanted in line for line in said):
        raise Wrong(f"nobody said: {wanted}")

  # Each hits once and returns what it did, "" where the run had ended before.

  def kill(self) -> str:
    """SIGKILL to one process; the others have to end by themselves, but for
    those that have not met yet: for minutes they wait, and launchers end them.
    """
    with self.begin() as running:
      if not running.is_alive:
        return self._ended(running)
      victim = running.one(self.rng)
      have_met = running.has_joined
      victim.kill()
      if not have_met:
        running.kill()
      statuses = running.wait()
      if statuses.count(0) == len(statuses):
        return ""
      self._check_survivors(running, victim)
      return f"statuses {statuses}"

  def term(self) -> str:
    """SIGTERM to one process; all save one step and end with 143."""
    left = self.straight.steps - self.saved()
    with self.begin() as running:
      if not running.is_alive:
        return self._ended(running)
      victim = running.one(self.rng)
      have_met = running.has_joined
      left -= running.steps()
      victim.terminate()
      if not have_met:
        victim.wait(PATIENCE)
        running.kill()
      statuses = running.wait()
      # Before Python has read what it is to do with it, the signal kills; and
      # what ends in the same moment has ended.
      allowed = {143, -signal.SIGTERM, 0}
      if self.subject.processes > 1 and not have_met:
        if victim.returncode not in allowed:
          raise Wrong(f"SIGTERM: status {victim.returncode} before a meeting")
      elif set(statuses) - allowed:
        raise Wrong(f"SIGTERM: statuses {statuses}: {running.last_line()}")
      elif 0 in statuses and left > LATEST:
        raise Wrong(f"SIGTERM: statuses {statuses}, with {left} steps to go")
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
      statuses = running.wait()
      self._check_survivors(running, still)
      return f"statuses {statuses}"

  def clock(self) -> str:
    """The wall clock jumps by up to a year, forward or back: nothing happens,
    or a save is given up.
    """
    wrapper = JUMPING_CLOCK.format(
      jump=self.rng.uniform(-3e7, 3e7),
      moment=self.rng.uniform(0, self.straight.seconds),
    )
    with self.begin(wrapper) as running:
      statuses = running.wait()
      if set(statuses) == {0}:
        return "went on"
      return self._said(running, statuses, "clock has jumped")

  def damage(self) -> str:
    """A checkpoint's file loses a bit, its end, or itself, where there is
    another checkpoint to go on from; see `check_said`. Those of trainings that
    have ended, such as SlimSAM's first stages, nobody would read again.
    """
    hit = self.kill()
    files = [
      path
      for folder in sorted(self.folder.rglob("checkpoints"))
      if len(checkpoint_steps(folder)) > 1
      and not self.has_ended(folder)
      and not any(d.is_there and d.place.parent == folder for d in self.damages)
      for path in sorted(folder.glob("[0-9]*/**/*"))
      if path.is_file() and "tmp" not in path.relative_to(folder).parts[0]
    ]
    if not hit or not files:
      return ""
    path = self.rng.choice(files)
    place = path
    while place.parent.name != "checkpoints":
      place = place.parent
    before = _content(place)
    how = self._break(path)
    # A start has shardings of its own and does without those of the file.
    matters = path.name != "_sharding" and not equal(before, _content(place))
    self.damages.append(
      Damage(
        place,
        place.stat().st_mtime_ns,
        self.folder.with_suffix(".err").stat().st_size,
        matters and self._goes_on(place),
      )
    )
    return f"{how} of {path.relative_to(self.folder)}"

  def _break(self, path: pathlib.Path) -> str:
    data = bytearray(path.read_bytes())
    how = self.rng.choice(("bit", "end", "all")) if data else "all"
    if how == "all":
      path.unlink()
    elif how == "end":
      path.write_bytes(data[: self.rng.randrange(len(data))])
    else:
      data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
      path.write_bytes(data)
    return how

  def _goes_on(self, place: pathlib.Path) -> bool:
    """Whether the next start reads a checkpoint: the newest, unless the
    training has left its model and nobody goes on with it.
    """
    newest = checkpoint_steps(place.parent)[-1:] == [int(place.name)]
    return newest and not (place.parents[1] / "model/settings.json").exists()

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
        said = "\n".join(second.lines())
      if not running.is_alive:
        return self._ended(running)
      if 2 not in statuses or "a run is at work in" not in said:
        raise Wrong(f"a second run: statuses {statuses}: {said}")
      return self._ended(running) or "refused"

  def read_only(self) -> str:
    """The folder cannot be written any more: one line, status 1."""
    with self.begin() as running:
      if not running.is_alive or not self._has_begun():
        return self._ended(running)
      with read_only(self.folder):
        statuses = running.wait()
      if set(statuses) == {0}:
        return ""
      return self._said(running, statuses, "Read-only file system")

  def full(self) -> str:
    """The disk is full from a moment on: one line, status 1, or the end."""
    with own_disk(self.folder), self.begin() as running:
      if not running.is_alive:
        return self._ended(running)
      with full_disk(self.folder):
        statuses = running.wait()
      if set(statuses) == {0}:
        if not self.is_finished():
          raise Wrong("a full disk: status 0 of a run that goes on")
        return "went on"
      return self._said(running, statuses, FULL)

  def _has_begun(self) -> bool:
    return any(self.folder.rglob("metrics.jsonl"))

  def _check_survivors(
    self, running: Running, victim: subprocess.Popen
  ) -> None:
    """Who has lost a peer fails: neither done, nor preempted, nor refused, for
    launchers would not try again.
    """
    for process in running.processes:
      status = process.returncode
      if process is victim or status not in (0, 2, 128 + signal.SIGTERM):
        continue
      if status != 0 or not self.is_finished():
        raise Wrong(f"a survivor's status {status}: {running.last_line()}")

  def _said(self, running: Running, statuses: list[int], what: str) -> str:
    """The one line that says it, with status 1; a start may refuse a folder
    that cannot be written, with status 2.
    """
    lines = running.lines()
    found = [line for line in lines if line.startswith("error: ")]
    right = [line for line in found if what in line]
    status = 1
    if any("cannot write to workdir" in line for line in right):
      status = 2
    traced = any(line.startswith("Traceback") for line in lines)
    alone = self.subject.processes == 1
    if not right or status not in statuses or (alone and traced):
      raise Wrong(
        f"{what!r} expected, statuses {statuses}: {running.last_line()}"
      )
    return right[0]

  def _ended(self, running: Running) -> str:
    """Nothing was hit: the run has to end well, or be told why not."""
    statuses = running.wait()
    if set(statuses) != {0}:
      raise Wrong(f"statuses {statuses}: {running.last_line()}")
    return ""


def _content(place: pathlib.Path) -> list[Any]:
  """What a run goes on from: a checkpoint's arrays, and the rest as bytes;
  None for what cannot be read. Not all files of a checkpoint matter.
  """
  found: list[Any] = []
  for item in ("params", "state"):
    try:
      _, tree = load_params(place.parent, step=int(place.name), item=item)
    except UserError:
      tree = None
    found.append(tree)
  for item in ("data", "host"):
    file = place / item / "metadata"
    found.append(file.read_bytes() if file.exists() else None)
  return found


def equal(a: Any, b: Any) -> bool:
  """Whether two trees, or lists of trees, are the same bit for bit."""
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
  if isinstance(a, list) and isinstance(b, list):
    return len(a) == len(b) and all(map(equal, a, b))
  if a is None or b is None:
    return a is b
  a, b = np.asarray(a), np.asarray(b)
  return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


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


KINDS: dict[str, tuple[Callable[[Trial], str], int]] = {  # with their weights
  "kill": (Trial.kill, 10),
  "term": (Trial.term, 3),
  "damage": (Trial.damage, 3),
  "stop": (Trial.stop, 1),
  "clock": (Trial.clock, 1),
  "worker": (Trial.worker, 1),
  "twin": (Trial.twin, 1),
  "read_only": (Trial.read_only, 1),
  "full": (Trial.full, 1),
}
