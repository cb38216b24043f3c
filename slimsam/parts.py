"""One training of a run of several: its folder, hooks and way back.

A run trains a teacher and then slims it in stages. Each of these has a folder
of its own below the run's, is resumed on its own, and leaves `model/` when it
has finished, which is what the next one begins with.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from common import hooks as hooks_lib
from common.checkpoint import checkpoint_steps, load_params
from common.metrics import read_metrics
from common.parallel import startup_report
from common.progress import ProgressBar
from common.report import ReportSpec, write_report
from common.state import TrainState
from common.step import StepChoice, StepFn
from common.train import Hook, train
from common.workdir import Workdir
from slimsam.run import FREE

log = logging.getLogger(__name__)
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Part:
  """One training.

  Attributes:
    name: of its folder.
    num_steps: updates.
    every: updates between two evaluations.
    best: the metric whose best checkpoint becomes the model; larger is better.
    mesh: devices.
    rows: images of a batch.
    create: makes the state of step 0, sharded.
    abstract: its shapes, dtypes and shardings.
    steps: see `common.train.train`.
    loader: of batches; closed at the end.
    evaluate: parameters -> scalars.
    learning_rate: step -> value.
    facts: for the report; all of them are pinned.
    report: what it shows.
    more: named hooks that follow evaluation; their state is saved.
  """

  name: str
  num_steps: int
  every: int
  best: str
  mesh: jax.sharding.Mesh
  rows: int
  create: Callable[[], TrainState]
  abstract: TrainState
  steps: StepFn | StepChoice
  loader: Any
  evaluate: Callable[[PyTree], Mapping[str, float]]
  learning_rate: Callable[[int], Any]
  facts: Mapping[str, Any]
  report: ReportSpec
  more: Callable[[hooks_lib.EvaluateHook], Mapping[str, Hook]] = (
    lambda evaluation: {}
  )


def fit(config: Any, folder: Any, part: Part) -> None:
  """Trains a part to its end, or on from where it was left.

  Args:
    config: of the run; see `configs/slimsam.py`.
    folder: the part's.
    part: what is trained.
  """
  with contextlib.ExitStack() as stack:
    loader = stack.enter_context(part.loader)
    work = stack.enter_context(
      Workdir(
        folder,
        config,
        free=FREE,
        facts=part.facts,
        pinned=tuple(part.facts),
        keep=config.checkpoint.keep,
        best=part.best,
        best_mode="max",
        tensorboard=config.log.tensorboard,
      )
    )
    if jax.process_index() == 0:
      part.report.save(work.path)
    progress = stack.enter_context(
      ProgressBar(part.num_steps, name=part.name, loss_key="train/loss")
    )
    hooks = _hooks(config, work, progress, part)
    stack.enter_context(hooks.preemption)
    state = work.resume(part.create, part.abstract, loader, hooks.host)
    log.info("%s", startup_report(part.mesh, state, global_batch=part.rows))
    progress.start(int(state.step))
    train(
      state,
      part.steps,
      loader,
      num_steps=part.num_steps,
      hooks=hooks.in_order,
      mesh=part.mesh,
    )
  if jax.process_index() == 0:
    write_report(folder)


def _hooks(
  config: Any, work: Workdir, progress: ProgressBar, part: Part
) -> hooks_lib.RunHooks:
  """Guard, log, evaluate, what follows, save, preempt, profile."""
  guard = hooks_lib.StopOnNonFinite()
  evaluation = hooks_lib.EvaluateHook(
    part.every, lambda state: part.evaluate(state.params), work.writer
  )

  def measured(step: int) -> Mapping[str, float]:
    due = step % part.every == 0 or step == part.num_steps
    return evaluation.latest if due else {}

  host: dict[str, Any] = {
    "log": hooks_lib.LogHook(
      config.log.every,
      work.writer,
      progress,
      examples_per_step=part.rows,
      unit="images",
      extra=lambda step: {
        "train/learning_rate": float(part.learning_rate(step))
      },
    ),
    "evaluation": evaluation,
    **part.more(evaluation),
  }
  checkpoint = hooks_lib.CheckpointHook(
    # What was measured can be chosen only where it was saved.
    lambda step: bool(measured(step)) or step % config.checkpoint.every == 0,
    work.checkpointer,
    host=host,
    guard=guard,
    metrics=measured,
  )
  preemption = hooks_lib.PreemptionHook(checkpoint)
  in_order = [guard, *host.values(), checkpoint, preemption]
  if config.profile.count:
    in_order.append(
      hooks_lib.ProfileHook(
        str(work.path / "profile"),
        start=config.profile.start,
        count=config.profile.count,
      )
    )
  return hooks_lib.RunHooks(in_order, host, preemption)


def best_params(folder: Any, metric: str) -> tuple[int, PyTree]:
  """The parameters of the checkpoint with the largest value of a metric.

  Args:
    folder: of a part that has finished.
    metric: see `Part.best`.

  Returns:
    (step, NumPy parameters).
  """
  checkpoints = os.path.join(folder, "checkpoints")
  values = {
    line["step"]: line[metric]
    for line in read_metrics(folder)
    if metric in line
  }
  kept = [step for step in checkpoint_steps(checkpoints) if step in values]
  best = max(kept, key=lambda step: (values[step], -step))
  return load_params(checkpoints, step=best)
