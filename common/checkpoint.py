"""Checkpoints that survive anything: a composite of four items over Orbax.

    checkpoints/<step>/params    the parameters alone
    checkpoints/<step>/state     step, optimizer state, extra
    checkpoints/<step>/data      the data position, JSON
    checkpoints/<step>/host      what hooks keep on the host, JSON
    checkpoints/<step>/checksums.json    hashes of all these files

A step's folder gets its name by one rename, after everything is written: a
process killed at any instant leaves a `*.orbax-checkpoint-tmp` folder, which
nobody reads and the next run removes.
"""

import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from common import checksums, files
from common.checkpoint_orbax import (
  Manager,
  StorageErrors,
  array_handler,
  plain,
  restore_args,
  with_keys,
)
from common.errors import UserError
from common.parallel import wait_for_all
from common.state import TrainState

PyTree = Any
_STEP_METADATA = "_CHECKPOINT_METADATA"  # gets the time after all else
_GLANCE_SECONDS = 0.02
_asked = itertools.count(1)  # see `Checkpointer.reached_preemption`
log = logging.getLogger(__name__)


class Stateful(Protocol):
  """Has a small JSON-able state: a data iterator, a hook."""

  def get_state(self) -> Any: ...

  def set_state(self, state: Any) -> None: ...


class Checkpointer:
  """Saves and restores whole runs.

  Args:
    directory: where; made absolute (Orbax loses relative paths in its writer
      thread), created if missing. `gs://` paths are taken as they are.
    keep: how many of the newest steps stay.
    best: also keep the step with the best value of this metric.
    best_mode: "min" or "max".
    before_save: called before every save; what a run writes beside its
      checkpoints must not be behind them.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep: int = 2,
    best: str | None = None,
    best_mode: str = "min",
    before_save: Callable[[], None] = lambda: None,
  ):
    if keep < 1:
      raise UserError(f"checkpoint keep={keep}: keep at least 1")
    if best_mode not in ("min", "max"):
      raise UserError(f"checkpoint best_mode={best_mode!r}: use min or max")
    self.directory = _absolute(directory)
    self._best = best
    self._saving: int | None = None
    self._is_told = False  # that a save has failed
    self._before_save = before_save
    kept: list[policies.PreservationPolicy] = [policies.LatestN(n=keep)]
    ranked = None
    if best is not None:
      ranked = lambda metrics: metrics[best]  # noqa: E731
      kept.append(
        policies.BestN(
          get_metric_fn=ranked,
          reverse=best_mode == "min",
          n=1,
          keep_checkpoints_without_metrics=False,
        )
      )
      _hide_damaged_metrics(self.directory)
    self._manager = Manager(
      self.directory,
      item_handlers={
        "params": array_handler(),
        "state": array_handler(),
        "data": ocp.JsonCheckpointHandler(),
        "host": ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        best_fn=ranked,  # makes Orbax write the metrics down
        best_mode=best_mode,
        cleanup_tmp_directories=True,
        async_options=ocp.options.AsyncOptions(
          post_finalization_callback=self._write_checksums
        ),
      ),
    )

  @property
  def steps(self) -> list[int]:
    """The steps that are there, oldest first."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    state: TrainState,
    data: Stateful | None,
    host: Mapping[str, Stateful] | None = None,
    *,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts saving; the write goes on in the background.

    Args:
      step: the checkpoint's name; must be new.
      state: the state; its buffers may be donated as soon as this returns.
      data: the iterator whose next batch is the first one not yet used.
      host: named host-side objects, such as hooks.
      metrics: values to rank checkpoints by.

    Raises:
      UserError: when the step exists.
      OSError: when the disk is full, now or in an earlier background write.
    """
    if step in self.steps:
      raise UserError(
        f"checkpoint {step} exists in {self.directory} and is never "
        "overwritten: choose another workdir"
      )
    self._before_save()
    rest = {
      "step": state.step,
      "opt_state": state.opt_state,
      "extra": state.extra,
    }
    items = ocp.args.Composite(
      params=ocp.args.PyTreeSave(plain(state.params)),
      state=ocp.args.PyTreeSave(plain(rest)),
      data=ocp.args.JsonSave({} if data is None else data.get_state()),
      host=ocp.args.JsonSave(
        {name: obj.get_state() for name, obj in (host or {}).items()}
      ),
    )
    ranked = None
    if self._best is not None and metrics and self._best in metrics:
      ranked = {self._best: float(metrics[self._best])}
    with self._readable_errors():
      self._finish()  # it still reads `_saving`
      self._saving = step
      self._manager.save(step, args=items, metrics=ranked)

  def _write_checksums(self) -> None:
    """Called when all files of a step are written and have no name yet, so that
    no checkpoint is without.
    """
    if jax.process_index() != 0:
      return
    folder = epath.Path(self.directory)
    named = [
      path
      for path in folder.iterdir()
      if path.name.partition(".")[0] == str(self._saving)
    ]
    # On object stores a folder has its name from the beginning.
    (own,) = [path for path in named if path.name != str(self._saving)] or named
    checksums.write(own, but=(_STEP_METADATA,))

  def restore(
    self,
    abstract_state: TrainState,
    data: Stateful | None,
    host: Mapping[str, Stateful] | None = None,
  ) -> TrainState | None:
    """Restores the newest readable checkpoint.

    A checkpoint that cannot be read is reported, and the one before it is
    taken; once that one has been read, the broken one is moved to the folder
    `checkpoints.unreadable`, so that its step can be saved anew.

    Args:
      abstract_state: `ShapeDtypeStruct`s with the shardings to restore to;
        they need not be those of the run that saved.
      data: gets the saved position.
      host: get their saved states.

    Returns:
      The state, or None when there is no checkpoint at all.

    Raises:
      UserError: when there are checkpoints and none can be read.
    """
    failures: dict[int, Exception] = {}
    for step in reversed(self.steps):
      read, error = None, None
      try:
        self._check(step)
        read = self._read(step, abstract_state)
      except Exception as reason:  # whatever a broken file makes a reader raise
        error = reason
      if not _everywhere(read is not None):
        error = error or ValueError("another process cannot read it")
        failures[step] = error
        log.warning(
          "checkpoint %d cannot be read (%s); trying the one before it",
          step,
          _first_line(error),
        )
        continue
      assert read is not None
      state, position, saved = read
      self._set_aside(failures)
      if data is not None:
        data.set_state(position)
      for name, obj in (host or {}).items():
        if name in saved:
          obj.set_state(saved[name])
      return state
    if failures:
      step, error = next(iter(failures.items()))
      raise UserError(
        f"none of the checkpoints {sorted(failures)} in {self.directory} can "
        "be read: restore one, or choose another --workdir to start anew; "
        f"step {step}: {_first_line(error)}"
      )
    return None

  def _check(self, step: int) -> None:
    """Raises where a file of a step is damaged; the processes share the work.

    Before anything is read together: where one process fails in the middle of
    that, the others wait for it.
    """
    folder = epath.Path(self.directory) / str(step)
    if not checksums.are_written(folder) and jax.process_index() == 0:
      log.warning("checkpoint %d has no hashes, by which to see damage", step)
    error = None
    try:
      checksums.check(
        folder,
        part=(jax.process_index(), jax.process_count()),
      )
    except Exception as reason:
      error = reason
    if not _everywhere(error is None):
      raise error or ValueError("another process has found damage")

  def _read(self, step: int, abstract: TrainState):
    rest = {
      "step": abstract.step,
      "opt_state": abstract.opt_state,
      "extra": abstract.extra,
    }
    read = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=restore_args(abstract.params),
        state=restore_args(rest),
        data=ocp.args.JsonRestore(),
        host=ocp.args.JsonRestore(),
      ),
    )
    state = TrainState(
      params=with_keys(read["params"], abstract.params),
      **with_keys(read["state"], rest),
    )
    if int(state.step) != step:
      raise ValueError(f"folder {step} holds the state of step {state.step}")
    return state, read["data"], read["host"]

  def _set_aside(self, failures: Mapping[int, Exception]) -> None:
    for step in failures:
      if jax.process_index() == 0:
        broken = epath.Path(self.directory) / str(step)
        aside = epath.Path(f"{self.directory}.unreadable") / str(step)
        aside.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists():
          aside.rmtree()
        broken.rename(aside)
        log.warning("moved the broken checkpoint %d to %s", step, aside)
    if failures:
      wait_for_all("checkpoints set aside")
      self._manager.reload()

  @staticmethod
  def reached_preemption() -> bool:
    """Whether the cluster has announced that it will stop this job.

    Every process asks once a step; all get the same answer at the same step.
    jax answers yes at one number, the next that none has asked with. Steps
    begin anew with every training, so these are counted for the process.
    """
    return (
      jax.process_count() > 1
      and multihost_utils.reached_preemption_sync_point(next(_asked))
    )

  def wait(self) -> None:
    """Returns once everything that was saved is on the disk."""
    with self._readable_errors():
      self._finish()

  def close(self, *, patience: float | None = None) -> None:
    """Waits, then releases the writer threads.

    Args:
      patience: seconds after which a save that takes several processes is given
        up, where one of them may be gone; None waits for it.
    """
    with self._readable_errors():
      if self._finish(patience):
        self._manager.close()
      else:
        log.warning("the save of step %s is given up", self._saving)

  def _finish(self, patience: float | None = None) -> bool:
    """Waits for what is being saved, whether all is.

    Of several processes one whose writer has failed hears of it when the others
    have come to the same point, for which theirs wait in vain.
    """
    if jax.process_count() > 1:
      end = math.inf if patience is None else time.monotonic() + patience
      while self._manager.is_saving_in_progress():
        if self._manager.failure is not None:
          if self._is_told:
            return False
          self._is_told = True
          raise self._manager.failure
        if time.monotonic() > end:
          return False
        time.sleep(_GLANCE_SECONDS)
    self._manager.wait_until_finished()
    return True

  def _readable_errors(self):
    return StorageErrors(self.directory)


def _hide_damaged_metrics(directory: str) -> None:
  """Takes from Orbax the metrics that it could not read: it would before any
  checkpoint is looked at. That of a checkpoint without them counts as damaged.
  """
  if jax.process_index() == 0:
    for step in _steps_in(directory):
      file = epath.Path(directory) / str(step) / "metrics" / "metrics"
      if not file.exists():
        continue
      try:
        checksums.check(file.parents[1], below="metrics/")
        json.loads(file.read_text())
      except files.JSON_ERRORS as error:
        log.warning("checkpoint %d: its metrics are damaged (%s)", step, error)
        file.rename(file.with_name("damaged"))
  wait_for_all("metrics looked at")


def _everywhere(holds: bool) -> bool:
  """Whether something holds on every process."""
  if jax.process_count() == 1:
    return holds
  return bool(np.all(multihost_utils.process_allgather(np.array(holds))))


def checkpoint_steps(directory: str | os.PathLike) -> list[int]:
  """The steps in a `checkpoints` folder, oldest first.

  Raises:
    UserError: when there is no such folder.
  """
  path = _absolute(directory)
  if not epath.Path(path).exists():
    raise UserError(f"no checkpoints in {path}: {_why_none(path)}")
  return _steps_in(path)


def _steps_in(path: str) -> list[int]:
  if not epath.Path(path).exists():
    return []
  return sorted(ocp.utils.checkpoint_steps(path))


def _why_none(path: str) -> str:
  """A comparison removes them when a job, of one or more runs, is done."""
  run = epath.Path(path).parent
  if any((folder / "result.json").exists() for folder in (run, run.parent)):
    return "a comparison keeps them with --config.compare.keep_checkpoints=true"
  return "train first"


def load_params(
  directory: str | os.PathLike,
  abstract_params: PyTree | None = None,
  *,
  step: int | None = None,
  item: str = "params",
) -> tuple[int, PyTree]:
  """Reads the parameters of a run, and nothing else.

  Args:
    directory: a `checkpoints` folder.
    abstract_params: shapes and shardings to read into; NumPy arrays if None.
    step: which checkpoint; the newest readable one if None.
    item: "params", or "state" for the rest of the arrays, in plain dicts.

  Returns:
    `(step, params)`.

  Raises:
    UserError: when the folder or the step is missing or unreadable.
  """
  path = _absolute(directory)
  steps = checkpoint_steps(directory)[::-1]
  if step is not None and step not in steps:
    raise UserError(f"no checkpoint {step} in {path}: there are {steps[::-1]}")
  reasons = []
  for candidate in steps if step is None else [step]:
    folder = epath.Path(path) / str(candidate)
    try:
      checksums.check(folder, below=f"{item}/")
      return candidate, _read_params(folder / item, abstract_params)
    except Exception as error:  # whatever a broken file makes a reader raise
      reasons.append(f"step {candidate}: {_first_line(error)}")
      log.warning("cannot read the %s of %s", item, reasons[-1])
  found = "; ".join(reasons) or "the folder is empty"
  raise UserError(f"no readable checkpoint in {path}: {found}")


def _read_params(path: epath.Path, abstract: PyTree | None) -> PyTree:
  with ocp.PyTreeCheckpointer() as reader:
    if abstract is None:
      tree = reader.metadata(path).item_metadata.tree
      args = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
      )
      return reader.restore(path, restore_args=args)
    args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return reader.restore(path, item=abstract, restore_args=args)


def _absolute(directory: str | os.PathLike) -> str:
  text = os.fspath(directory)
  return text if "://" in text else os.path.abspath(text)


def _first_line(error: BaseException) -> str:
  text = str(error).strip() or type(error).__name__
  # What follows is the address of a method.
  return text.splitlines()[0].partition(" See full TensorStore details")[0][
    :200
  ]
