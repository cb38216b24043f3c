"""Disks that refuse to be written, by mounts over a run's folder."""

import contextlib
import errno
import functools
import os
import pathlib
import shutil
import subprocess
import threading
from collections.abc import Iterator

FULL = os.strerror(errno.ENOSPC)
MEGABYTES = 64  # of a disk of a run's own
FILLER = "filler"
CHUNKS = (2**16, 2**9)  # bytes; a disk that is nearly full takes small ones
BREATH = 0.02  # seconds, after which what was freed is filled again


class Impossible(Exception):
  """There is no right to mount here."""


@functools.cache
def _check_right(parent: pathlib.Path) -> None:
  place = parent / "mount"
  place.mkdir(exist_ok=True)
  try:
    if not _mount("-t", "tmpfs", "tmpfs", str(place)):
      raise Impossible
    release(place)
  finally:
    place.rmdir()


def _mount(*arguments: str) -> bool:
  try:
    found = subprocess.run(
      ["mount", *arguments], capture_output=True, check=False
    )
  except OSError:  # no such program
    return False
  return found.returncode == 0


def release(folder: pathlib.Path) -> None:
  """Takes away what is mounted over a folder."""
  while _is_mounted(folder):
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _is_mounted(folder: pathlib.Path) -> bool:
  # `os.path.ismount` sees no folder that is mounted over itself.
  mounts = pathlib.Path("/proc/self/mounts")
  lines = mounts.read_text().splitlines() if mounts.exists() else []
  name = str(folder).replace("\\", "\\134").replace(" ", "\\040")
  return name in [line.split(" ")[1] for line in lines]


@contextlib.contextmanager
def read_only(folder: pathlib.Path) -> Iterator[None]:
  """Nothing can be written to a folder.

  Raises:
    Impossible: without the right to mount.
  """
  _check_right(folder.parent)
  # Ready before it is mounted: nobody is to open a file in between.
  ready = folder.with_suffix(".ready")
  ready.mkdir(exist_ok=True)
  try:
    for arguments in (
      ("--bind", folder, ready),
      ("-o", "remount,ro,bind", ready),
      ("--bind", ready, folder),
    ):
      if not _mount(*map(str, arguments)):
        raise Impossible
    yield
  finally:
    release(folder)
    release(ready)
    ready.rmdir()


@contextlib.contextmanager
def own_disk(folder: pathlib.Path) -> Iterator[None]:
  """A folder, made if missing, is on a small disk of its own.

  Raises:
    Impossible: without the right to mount.
  """
  _check_right(folder.parent)
  below = folder.with_suffix(".below")
  shutil.rmtree(below, ignore_errors=True)
  if folder.exists():
    folder.rename(below)
  folder.mkdir()
  try:
    if not _mount("-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs",
                  str(folder)):  # fmt: skip
      raise Impossible
    if below.exists():
      shutil.copytree(below, folder, dirs_exist_ok=True)
      shutil.rmtree(below)
    try:
      yield
    finally:
      shutil.copytree(folder, below)
  finally:
    release(folder)
    if below.exists():
      folder.rmdir()
      below.rename(folder)


@contextlib.contextmanager
def full_disk(folder: pathlib.Path) -> Iterator[None]:
  """The disk of a folder is full, whatever its users remove from it."""
  ended = threading.Event()
  file = folder / FILLER
  _fill(file)

  def again() -> None:
    while not ended.wait(BREATH):
      _fill(file)

  thread = threading.Thread(target=again)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    file.unlink()


def _fill(path: pathlib.Path) -> None:
  with open(path, "ab", buffering=0) as file:
    for size in CHUNKS:
      with contextlib.suppress(OSError):
        while file.write(bytes(size)):
          pass
