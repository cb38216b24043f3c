"""What happens between two steps: logs, evaluation, checkpoints, profiles,
the stop on a loss that is not finite, and preemption.
"""

import collections
import dataclasses
import hashlib
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from common.checkpoint import Checkpointer, Stateful
from common.errors import Preempted, RunError
from common.metrics import Digest, Mean, MetricWriter, merge
from common.parallel import check_same
from common.progress import ProgressBar
from common.state import TrainState
from common.train import Every, Hook, StepInfo, is_due

log = logging.getLogger(__name__)


class NonFiniteError(RunError):
  """Training met a value that is not finite; no checkpoint holds it."""


class LogHook:
  """Averages metrics over `interval` steps and writes them down.

  Sums and counts are added up, so that a mean over steps is a mean over
  tokens. That is done once an interval, on the host: scalars wait there until
  then, and no program runs between two steps. The open interval is host state:
  a resumed run logs what the straight one logs.

  Args:
    interval: steps between two lines.
    writer: where the lines go, under `train/`.
    progress: the terminal's bar or plain lines.
    examples_per_step: for the rate, such as tokens in the global batch.
    unit: what these are.
    extra: further scalars for each line, such as the learning rate, from the
      step.
  """

  every = 1

  def __init__(
    self,
    interval: int,
    writer: MetricWriter,
    progress: ProgressBar,
    *,
    examples_per_step: int,
    unit: str = "tokens",
    extra: Callable[[int], Mapping[str, float]] = lambda step: {},
  ):
    self._interval = interval
    self._writer = writer
    self._progress = progress
    self._examples = examples_per_step
    self._rate = f"speed/{unit}_per_second"
    self._extra = extra
    self._sums: dict[str, Mean] = {}
    self._pending: list[dict[str, Mean]] = []
    self._since: tuple[float, int | None] = (time.monotonic(), None)

  def __call__(self, info: StepInfo) -> None:
    self._pending.append(
      {k: m for k, m in info.metrics.items() if isinstance(m, Mean)}
    )
    if not is_due(self._interval, info.step, last=info.last):
      return
    # Zero counts (an objective that no sample had) stay out of the line.
    values = {
      f"train/{name}": float(mean.total) / float(mean.count)
      for name, mean in self._add_up().items()
      if mean.count > 0
    }
    self._sums = {}
    start, first = self._since
    self._since = (time.monotonic(), info.step)
    seconds = self._since[0] - start
    if first is not None and seconds > 0:
      steps = (info.step - first) / seconds
      values["speed/steps_per_second"] = steps
      values[self._rate] = steps * self._examples
    values.update(self._extra(info.step))
    self._writer.write(info.step, values)
    self._progress.update(info.step, values)

  def _add_up(self) -> dict[str, Mean]:
    """The sums of the open interval, float32 as on the device."""
    for metrics in jax.device_get(self._pending):
      self._sums = merge(self._sums, metrics) if self._sums else metrics
    self._pending = []
    return self._sums

  def get_state(self) -> dict[str, list[float]]:
    return {
      name: [float(mean.total), float(mean.count)]
      for name, mean in self._add_up().items()
    }

  def set_state(self, state: Mapping[str, Sequence[float]]) -> None:
    self._pending = []
    self._sums = {
      name: Mean(*map(np.float32, sums))  # type: ignore[arg-type]
      for name, sums in state.items()
    }


class EvaluateHook:
  """Calls `evaluate(state)` and writes what it returns.

  Args:
    every: when.
    evaluate: returns scalars.
    writer: where they go, under their own names.
  """

  def __init__(
    self,
    every: Every,
    evaluate: Callable[[TrainState], Mapping[str, float]],
    writer: MetricWriter,
  ):
    self.every = every
    self.latest: dict[str, float] = {}
    self._evaluate = evaluate
    self._writer = writer

  def __call__(self, info: StepInfo) -> None:
    self.latest = dict(self._evaluate(info.state))
    self._writer.write(info.step, self.latest)

  def get_state(self) -> dict[str, float]:
    return self.latest

  def set_state(self, state: Mapping[str, float]) -> None:
    self.latest = dict(state)


class StopOnNonFinite:
  """Raises when the loss or a norm is not finite: names step, metrics, batch.

  Looks at a step `lag` steps later, when its numbers are there anyway, so that
  the host never waits for the device; `flush` looks at all of them, and
  `CheckpointHook` calls it before it saves. This also bounds how far the host
  runs ahead.

  Args:
    watched: these metrics, where the step has them; whatever else goes wrong
      reaches the parameters' norm.
    lag: in steps.
  """

  every = 1

  def __init__(
    self,
    watched: Sequence[str] = ("loss", "grad_norm", "update_norm", "param_norm"),
    *,
    lag: int = 2,
  ):
    self._watched = tuple(watched)
    self._lag = lag
    self._pending: collections.deque = collections.deque()

  def __call__(self, info: StepInfo) -> None:
    metrics = info.metrics
    totals = [metrics[name].total for name in self._watched if name in metrics]
    for total in totals:
      total.copy_to_host_async()
    self._pending.append((totals, info.step, metrics, info.batch))
    while len(self._pending) > (0 if info.last else self._lag):
      self._check(*self._pending.popleft())

  def flush(self) -> None:
    """Checks every step seen so far."""
    while self._pending:
      self._check(*self._pending.popleft())

  def _check(self, totals, step: int, metrics, batch) -> None:
    if np.isfinite(jax.device_get(totals)).all():
      return
    found = [name for name in self._watched if name in metrics]
    values = dict(zip(found, map(float, jax.device_get(totals))))
    names = ", ".join(
      f"{name} is {value}"
      for name, value in values.items()
      if not np.isfinite(value)
    )
    raise NonFiniteError(
      f"step {step}: {names}; batch {fingerprint(batch)}; the checkpoints "
      "hold no state after the one before this step: try a lower optim.lr, or "
      "optim.clip_norm"
    )


def fingerprint(batch: Any) -> str:
  """A hash of this process's part of a batch, the same on every run."""
  digest = hashlib.blake2b(digest_size=8)
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    digest.update(jax.tree_util.keystr(path).encode())
    shards = (
      {str(s.index): s.data for s in leaf.addressable_shards}
      if isinstance(leaf, jax.Array)
      else {"": leaf}
    )
    for index in sorted(shards):
      digest.update(np.ascontiguousarray(shards[index]).tobytes())
  return digest.hexdigest()


class SameEverywhere:
  """Stops a run whose devices or processes no longer compute the same.

  Every step's `Digest`s are kept, and once an interval each process hashes
  those of its own devices, of all steps since, and compares. `CheckpointHook`
  calls `flush` before it saves: what each computes for itself, such as which
  experts a step draws, can never part unseen, and no parted state is saved.

  Args:
    interval: steps between two comparisons.
    what: these are, in the plural, for the error.
  """

  every = 1

  def __init__(self, interval: int, what: str):
    self._interval = interval
    self._what = what
    self._pending: list[list[list[jax.Array]]] = []  # [steps, digests, devices]
    self._step = 0  # the last one of these

  def __call__(self, info: StepInfo) -> None:
    self._step = info.step
    self._pending.append(
      [
        [shard.data for shard in digest.bits.addressable_shards]
        for digest in info.metrics.values()
        if isinstance(digest, Digest)
      ]
    )
    if is_due(self._interval, info.step, last=info.last):
      self.flush()

  def flush(self) -> None:
    """Compares the steps since the last time; all processes call it."""
    if not self._pending:
      return
    steps = jax.device_get(self._pending)
    self._pending = []
    first = self._step - len(steps) + 1
    what = f"{self._what} of steps {first} to {self._step}"
    # One value each, unless this process's own devices differ.
    values = [np.unique(devices) for digests in steps for devices in digests]
    check_same(b"".join(value.tobytes() for value in values), what)
    if any(value.size > 1 for value in values):
      raise RunError(f"devices of a process differ in their {what}")


class CheckpointHook:
  """Saves the state, the data position and the hooks' host state.

  Args:
    every: when; the last step counts as well.
    checkpointer: where.
    host: named objects to save with it.
    guard: asked first, so that no bad state is ever saved.
    same: asked next, so that no state is on which devices have parted.
    metrics: step -> values to rank that step's checkpoint by; empty where
      nothing was measured at it.
  """

  def __init__(
    self,
    every: Every,
    checkpointer: Checkpointer,
    *,
    host: Mapping[str, Stateful],
    guard: StopOnNonFinite | None = None,
    same: SameEverywhere | None = None,
    metrics: Callable[[int], Mapping[str, float]] = lambda step: {},
  ):
    self.every = every
    self.checkpointer = checkpointer
    self._host = host
    self._guard = guard
    self._same = same
    self._metrics = metrics
    self._saved: int | None = None

  def __call__(self, info: StepInfo) -> None:
    if info.step == self._saved:
      return
    if self._guard is not None:
      self._guard.flush()
    if self._same is not None:
      self._same.flush()
    self.checkpointer.save(
      info.step,
      info.state,
      info.data,  # type: ignore[arg-type]
      self._host,
      metrics=self._metrics(info.step),
    )
    self._saved = info.step


class PreemptionHook:
  """Saves and leaves when the machine is about to be taken away.

  One process: SIGTERM sets a flag, looked at after every step. Several: the
  coordination service tells all of them at the same step. Use as a context
  manager, so that the earlier signal handler comes back.
  """

  every = 1

  def __init__(self, checkpoint: CheckpointHook):
    self._checkpoint = checkpoint
    self._flag = False
    self._previous: Any = None

  def __enter__(self) -> "PreemptionHook":
    if jax.process_count() == 1:
      self._previous = signal.signal(signal.SIGTERM, self._on_signal)
    return self

  def __exit__(self, *_) -> None:
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

  def _on_signal(self, *_) -> None:
    self._flag = True

  def __call__(self, info: StepInfo) -> None:
    checkpointer = self._checkpoint.checkpointer
    if not (self._flag or checkpointer.reached_preemption()):
      return
    self._checkpoint(info)
    checkpointer.wait()
    raise Preempted(f"preempted: saved step {info.step}")


class ProfileHook:
  """Traces `count` steps after step `start` for TensorBoard or Perfetto."""

  every = 1

  def __init__(self, directory: str, *, start: int, count: int):
    self._directory = directory
    self._start = start
    self._stop = start + count
    self._tracing = False

  def __call__(self, info: StepInfo) -> None:
    if info.step == self._start and not info.last:
      jax.block_until_ready(info.state.step)
      jax.profiler.start_trace(self._directory)
      self._tracing = True
    elif self._tracing and (info.step >= self._stop or info.last):
      jax.block_until_ready(info.state.step)
      jax.profiler.stop_trace()
      self._tracing = False
      log.info("profile of steps up to %d: %s", info.step, self._directory)


@dataclasses.dataclass(frozen=True)
class RunHooks:
  """A run's hooks.

  Attributes:
    in_order: all of them, as the loop calls them.
    host: those whose state is saved, by name.
    preemption: to be entered while the loop runs.
  """

  in_order: Sequence[Hook]
  host: Mapping[str, Any]
  preemption: PreemptionHook
