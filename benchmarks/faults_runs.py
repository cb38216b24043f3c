"""The processes of a run, from outside; see `faults.py` and `processes.py`."""

import dataclasses
import os
import pathlib
import random
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATIENCE = 600.0  # seconds in which processes have to end by themselves
PEER_TIMEOUT = 30  # seconds of silence after which a process is given up


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

  def kill(self) -> None:
    """Ends all of them at once."""
    for process in self.processes:
      process.kill()

  def __enter__(self) -> "Running":
    return self

  def __exit__(self, *_: object) -> None:
    """Leaves nothing behind."""
    self.kill()
    self.wait()

  @property
  def has_joined(self) -> bool:
    """Whether its devices are known: a start says so, and what it goes on with,
    once its processes have found each other.
    """
    return any(line.startswith("devices  ") for line in self.lines())

  def steps(self) -> int:
    """How many steps it has logged."""
    return sum(line.startswith("step ") for line in self.lines())

  def lines(self) -> list[str]:
    """What they have written, and whatever else has since then."""
    return lines_from(self.said, self.from_here)

  def last_line(self) -> str:
    """The last one, "" for none."""
    return (self.lines() or [""])[-1]


def lines_from(file: pathlib.Path, offset: int) -> list[str]:
  """Lines of a file, from a place in it."""
  with open(file, "rb") as said:
    said.seek(offset)
    return said.read().decode(errors="replace").strip().splitlines()


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
