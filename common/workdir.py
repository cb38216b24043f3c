"""A run's folder: its configuration, metrics, facts and checkpoints."""

import contextlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath

from common import config as config_lib
from common import files
from common.checkpoint import Checkpointer, Stateful
from common.errors import RunError, UserError
from common.metrics import FILE_NAME as METRICS
from common.metrics import MetricWriter
from common.parallel import check_same
from common.places import check_holds_no_comparison, take
from common.report import FILE_NAME as REPORT
from common.state import TrainState

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 30.0  # with a save, after an error of this process
SEEN_SECONDS = 60.0  # in which a network's folder shows what others write
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Workdir:
  """Opens a run's folder for a configuration: a new run, or the same again.

  Args:
    path: the folder; made if missing. It is this process's until it is closed:
      a second run at the same time is refused (not behind an address), and so
      is a comparison's folder.
    config: the resolved configuration. A folder whose checkpoints or metrics
      come from another one is refused, with the keys that differ. Where there
      are none, nothing is lost, and the new one takes its place.
    free: keys that may change on resume (logging, number of workers, ...).
    facts: what the report should state besides configuration and versions.
      Facts named in `pinned` must not change either.
    pinned: such facts, for example the hash of the training text.
    keep: how many of the newest checkpoints stay.
    best: a metric whose best checkpoint stays as well.
    best_mode: whether that is its "min" or its "max".
    tensorboard: also write TensorBoard events.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    config: Any,
    *,
    free: tuple[str, ...] = (),
    facts: Mapping[str, Any] | None = None,
    pinned: tuple[str, ...] = (),
    keep: int = 2,
    best: str | None = None,
    best_mode: str = "min",
    tensorboard: bool = False,
  ):
    self.path = epath.Path(path)
    self._num_steps = config.get("num_steps")
    check_holds_no_comparison(self.path)
    self.path.mkdir(parents=True, exist_ok=True)
    is_writer = jax.process_index() == 0
    with contextlib.ExitStack() as undo:
      self._lock = take(self.path) if is_writer else None
      undo.callback(self._unlock)
      check_shared(self.path)
      facts = _with_versions(facts or {})
      check_same(
        repr((_fixed(config, free), [facts[name] for name in pinned])).encode(),
        "configurations or data",
      )
      self.checkpointer = Checkpointer(
        self.path / "checkpoints",
        keep=keep,
        best=best,
        best_mode=best_mode,
        before_save=lambda: self.writer.flush(),
      )
      undo.callback(self.checkpointer.close)
      if self.checkpointer.steps or self._has_lines():
        self._check_resume(config, free, facts, pinned)
        facts["started"] = self._saved_facts().get("started", facts["started"])
      if is_writer:
        self._describe(config, facts)
      undo.pop_all()
    self.writer = MetricWriter(
      self.path, tensorboard=tensorboard, is_writer=is_writer
    )

  def __enter__(self) -> "Workdir":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self.close(patience=None if kind is None else PATIENCE_SECONDS)
    if kind is KeyboardInterrupt:
      raise KeyboardInterrupt(self._what_stays()) from None

  def _what_stays(self) -> str:
    """What an interrupted run goes on from."""
    if not self.checkpointer.steps:
      return "interrupted before the first checkpoint"
    return (
      f"interrupted: step {self.checkpointer.steps[-1]} is saved, and the same "
      "command goes on"
    )

  def _has_lines(self) -> bool:
    metrics = self.path / METRICS
    return metrics.exists() and metrics.stat().length > 0

  def _check_resume(self, config, free, facts, pinned) -> None:
    if not (self.path / config_lib.FILE_NAME).exists():
      raise UserError(
        f"{self.path} holds a run but no {config_lib.FILE_NAME}: "
        "restore it or choose another --workdir"
      )
    config_lib.check_resume(self.path, config, free=free)
    self._check_facts(facts, pinned)

  def _describe(self, config, facts) -> None:
    # The first files: making a folder need not have asked the bucket.
    with files.bucket_errors(self.path):
      config_lib.save_config(self.path, config)
      files.write_json(self.path / "facts.json", dict(sorted(facts.items())))

  def _unlock(self) -> None:
    if self._lock is not None:
      self._lock.close()

  def _saved_facts(self) -> dict[str, Any]:
    """What the folder says of its run; {} where nothing does."""
    file = self.path / "facts.json"
    if not file.exists():
      return {}
    try:
      return json.loads(file.read_text())
    except files.JSON_ERRORS:  # never half-written by us: somebody's edit
      raise UserError(f"{file} is not JSON; delete it to go on") from None

  def _check_facts(self, facts: Mapping[str, Any], pinned: tuple[str, ...]):
    saved = self._saved_facts()
    for name in pinned:
      if name in saved and saved[name] != facts[name]:
        raise UserError(
          f"{name} is {facts[name]}, but the run in {self.path} was made with "
          f"{saved[name]}: restore it or choose another --workdir"
        )

  def resume(
    self,
    create: Callable[[], TrainState],
    abstract: TrainState,
    data: Stateful | None,
    host: Mapping[str, Stateful],
  ) -> TrainState:
    """Returns the newest saved state, or a new one.

    Metric lines from after that state belong to a future that will be lived
    again: they are dropped.

    Args:
      create: makes the state of step 0, sharded.
      abstract: its shapes, dtypes and shardings.
      data: gets the saved position.
      host: get their saved states.
    """
    state = self.checkpointer.restore(abstract, data, host)
    step = 0 if state is None else int(state.step)
    if jax.process_index() == 0:
      self.writer.truncate(step)
    if state is None:
      return create()
    if step == self._num_steps:
      page = self.path / REPORT
      log.info("%s has finished; its report is %s", self.path, page)
    else:
      log.info("resumed %s at step %d", self.path, step)
    return state

  def close(self, *, patience: float | None = None) -> None:
    """Waits for the checkpoints to be written and closes the files.

    Args:
      patience: see `Checkpointer.close`.
    """
    try:
      self.checkpointer.close(patience=patience)
    finally:
      self.writer.close()
      self._unlock()


def _fixed(config: Any, free: tuple[str, ...]) -> list[tuple[str, Any]]:
  """The settings that may not change."""
  return sorted(
    (key, value)
    for key, value in config_lib.flatten(config).items()
    if not config_lib.is_free(key, free)
  )


def check_shared(path: epath.Path) -> None:
  """Refuses a folder that processes of a run do not share.

  Each writes its part of the arrays. Folders of the same name on several
  machines would hold a part of them each, and no checkpoint.

  Raises:
    UserError, RunError: on every process; also where process 0 cannot write.
  """
  if jax.process_count() == 1:
    return
  from jax.experimental import multihost_utils

  number = np.frombuffer(os.urandom(8), np.uint32)
  token = multihost_utils.broadcast_one_to_all(number).tobytes().hex()
  file = path / f".shared-{token}"
  error = None
  if jax.process_index() == 0:
    try:
      with files.bucket_errors(path):
        if "://" not in os.fspath(path):  # which process 0 holds
          for old in path.glob(".shared-*"):  # of a start that was killed
            old.unlink()
        file.write_text("")
    except (UserError, RunError, OSError) as reason:
      error = reason
  # 0, or the exit status.
  status = 0 if error is None else 2 if isinstance(error, UserError) else 1
  status = multihost_utils.broadcast_one_to_all(np.array(status))
  if status:
    kind = UserError if status == 2 else RunError
    raise error or kind(f"process 0 cannot write to {os.fspath(path)!r}")
  end = time.monotonic() + SEEN_SECONDS
  while not (seen := file.exists()) and time.monotonic() < end:
    time.sleep(0.1)
  found = multihost_utils.process_allgather(np.array(seen))
  if jax.process_index() == 0:
    file.unlink()
  if not np.all(found):
    blind = ", ".join(str(i) for i in np.flatnonzero(~found))
    raise UserError(
      f"--workdir {os.fspath(path)!r} is not one folder for all: processes "
      f"{blind} do not see what process 0 writes there; choose one that all "
      "hosts share"
    )


def _with_versions(facts: Mapping[str, Any]) -> dict[str, Any]:
  device = jax.devices()[0]
  return {
    "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    "command": " ".join(sys.argv),
    "python": platform.python_version(),
    "versions": {name: metadata.version(name) for name in PACKAGES},
    "devices": f"{jax.device_count()} x {device.device_kind}",
    "processes": jax.process_count(),
    **facts,
  }
