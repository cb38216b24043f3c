"""Metrics carry sum and count; lines of JSON hold what they came to."""

import json
import logging
import math
import operator
import os
import time
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from etils import epath

from common import files
from common.errors import UserError
from common.parallel import by_device
from common.rngs import mix_bits

log = logging.getLogger(__name__)
PyTree = Any
FILE_NAME = "metrics.jsonl"
CLOCKS = ("step", "time", "time_run")  # what every line starts with
SYNC_SECONDS = 1.0
# Object stores cannot append: every writing there is one of the whole file.
UPLOAD_SECONDS = 30.0


@flax.struct.dataclass
class Mean:
  """A mean that can be added to another: a total and a count.

  Means of means are wrong with masks, packing and uneven shards.
  """

  total: jax.Array
  count: jax.Array

  @classmethod
  def of(cls, values: jax.Array, weights: jax.Array | None = None) -> "Mean":
    """The mean of `values`, weighted by `weights` of the same shape.

    Sums are float32. A value of weight 0 may be anything, NaN too.
    """
    values = jnp.asarray(values, jnp.float32)
    if weights is None:
      return cls(jnp.sum(values), jnp.float32(values.size))
    weights = jnp.asarray(weights, jnp.float32)
    # where: 0 * nan at a masked place must not spoil the sum.
    weighted = jnp.where(weights == 0, 0.0, values * weights)
    return cls(jnp.sum(weighted), jnp.sum(weights))

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.count + other.count)

  def value(self) -> jax.Array:
    """The mean; NaN when nothing was counted."""
    empty = self.count == 0
    return jnp.where(
      empty, jnp.nan, self.total / jnp.where(empty, 1.0, self.count)
    )


@flax.struct.dataclass
class Digest:
  """A hash of what each device has computed for itself; no line shows it.

  `common.hooks.SameEverywhere` compares them: values that went through a sum
  over devices are equal on all of these, whatever they were made of.

  Attributes:
    bits: uint32 [devices].
  """

  bits: jax.Array

  @classmethod
  def of(cls, *values: jax.Array) -> "Digest":
    """The digest of replicated integers or bits, of less than 2^32 numbers."""
    words = [jnp.ravel(value).astype(jnp.uint32) for value in values]
    word = jnp.concatenate(words)
    place = jnp.arange(word.size, dtype=jnp.uint32)
    mixed = mix_bits(mix_bits(word) ^ mix_bits(place + 1))
    return cls(by_device(jnp.sum(mixed, dtype=jnp.uint32)))


def merge(first: PyTree, second: PyTree) -> PyTree:
  """Adds two equal trees of `Mean`s, such as two steps' metrics."""
  return jax.tree.map(operator.add, first, second)


class MetricWriter:
  """Writes scalars as lines of JSON, and to TensorBoard if asked.

  A line is handed to the system when it is written, so that a killed process
  loses none, and to the disk at most once a second, so that a machine that
  goes down loses little and slow disks do not slow the training. A line that
  was torn all the same gets closed before the next is written. A bucket's file
  gets its lines every half minute, and with `flush`.

  Args:
    workdir: the run's folder; `metrics.jsonl` is appended to.
    tensorboard: also write event files (extra `tensorboard`).
    is_writer: only one process of a run writes.

  Raises:
    UserError: when TensorBoard is asked for and not installed.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    tensorboard: bool = False,
    is_writer: bool = True,
  ):
    self._path = epath.Path(workdir) / FILE_NAME
    self._is_writer = is_writer
    self._before = 0.0  # seconds of the run before this process
    self._start = time.monotonic()
    self._synced = -math.inf
    self._is_checked = False  # that the file ends with a whole line
    self._whole: bytes | None = None  # a bucket's file, as it is to be
    self._is_behind = False  # the bucket's file lacks lines
    self._board: Any = None
    self._make_board: Any = None
    if is_writer:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      if tensorboard:
        self._make_board = _board_maker(self._path.parent)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes one line: step, unix time, seconds of the run, scalars.

    What is not finite becomes null: JSON knows no NaN.

    Args:
      step: updates done.
      scalars: anything `float` takes.

    Raises:
      ValueError: for a scalar that is called like a clock, such as "step".
    """
    if not self._is_writer:
      return
    values = {name: float(value) for name, value in scalars.items()}
    if taken := values.keys() & set(CLOCKS):
      raise ValueError(f"metric names {sorted(taken)} are taken")
    line: dict[str, float | None] = {
      "step": int(step),
      "time": round(time.time(), 3),
      "time_run": round(self._before + time.monotonic() - self._start, 3),
    }
    for name, value in values.items():
      line[name] = value if math.isfinite(value) else None
    self._append(json.dumps(line, allow_nan=False) + "\n")
    if self._make_board is not None:
      self._board, self._make_board = self._make_board(0), None
    if self._board is not None:
      for name, value in values.items():
        if math.isfinite(value):  # it would warn about each
          self._board.add_scalar(name, value, int(step))

  def _append(self, text: str) -> None:
    if "://" in os.fspath(self._path):
      if self._whole is None:
        old = self._path.read_bytes() if self._path.exists() else b""
        self._whole = _closed(old)
      self._whole += text.encode()
      self._is_behind = True
      if time.monotonic() - self._synced >= UPLOAD_SECONDS:
        self.flush()
      return
    with (
      files.refusals_of(self._path),
      open(self._path, "ab+") as file,
    ):
      if not self._is_checked:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        text = "\n" + text if file.read(1) not in (b"", b"\n") else text
        self._is_checked = True
      file.write(text.encode())
      file.flush()
      now = time.monotonic()
      if now - self._synced >= SYNC_SECONDS:
        os.fsync(file.fileno())
        self._synced = now

  def flush(self) -> None:
    """Gives a bucket the lines that it lacks; call it before a checkpoint, for
    a killed run goes on from there.
    """
    if self._is_behind and self._whole is not None:
      self._path.write_bytes(self._whole)
      self._synced, self._is_behind = time.monotonic(), False

  def truncate(self, step: int) -> None:
    """Goes back to `step`: drops the lines of later steps and torn lines.

    Call it before a resumed run writes. The clock of the run goes on from the
    last line kept. A process killed here leaves the old file or the new one.
    """
    if not self._is_writer:
      return
    if self._make_board is not None:
      # TensorBoard then hides what the run that was killed wrote after `step`.
      self._board, self._make_board = self._make_board(step + 1), None
    if not self._path.exists():
      return
    self._whole, self._is_behind = None, False
    kept = [line for line in read_metrics(self._path) if line["step"] <= step]
    self._before = kept[-1]["time_run"] if kept else 0.0
    self._start = time.monotonic()
    files.replace(self._path, "".join(json.dumps(line) + "\n" for line in kept))

  def close(self) -> None:
    """Gives away the last lines and closes the event file; writing after it is
    an error there.
    """
    self.flush()
    if self._board is not None:
      self._board.close()


def _closed(content: bytes) -> bytes:
  return content if content.endswith(b"\n") or not content else content + b"\n"


def _board_maker(workdir: epath.Path) -> Any:
  """Checks now; the events' file is made once the first step is known."""
  try:
    import tensorboardX
  except ImportError:
    raise UserError(
      "TensorBoard events need tensorboardX: pip install -e '.[tensorboard]'"
    ) from None
  folder = os.fspath(workdir / "tensorboard")
  return lambda step: tensorboardX.SummaryWriter(folder, purge_step=step)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads metric lines, without those that a kill has torn.

  Args:
    path: the file or the run's folder.

  Raises:
    UserError: when there is no such file.
  """
  path = epath.Path(path)
  if path.is_dir():
    path = path / FILE_NAME
  if not path.exists():
    raise UserError(f"no metrics in {path}: has the run logged anything yet?")
  lines = []
  text = path.read_bytes().decode(errors="replace")
  for number, line in enumerate(text.splitlines(), start=1):
    try:
      lines.append(json.loads(line))
    except files.JSON_ERRORS:
      log.warning("%s: line %d is torn and left out", path, number)
  return lines
