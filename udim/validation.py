"""What happens to a run's state when it is evaluated."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from common.metrics import MetricWriter
from common.optim.averaging import Swad
from common.state import TrainState
from common.train import StepInfo, is_due
from udim.algorithms import Algorithm, averaged, keep_schedule
from udim.scores import Evaluator, of_role, summary

PyTree = Any
Evaluate = Callable[[PyTree, PyTree], dict[str, float]]


def first_best(params: PyTree, opt_state: PyTree, batch_stats: PyTree):
  """The best state of a warm-up before any was evaluated."""
  return {
    "params": params,
    "opt_state": opt_state,
    "batch_stats": batch_stats,
    "accuracy": jnp.float32(-jnp.inf),
  }


class EvaluationHook:
  """Evaluates a run, and does what follows from the sources' held-out images.

  - In a warm-up the best state so far is kept in `extra["best"]` (parameters,
    optimizer, running statistics), and the main phase starts from it.
  - SWAD gets its validation losses. Its average is what the run is for: it
    takes the parameters' place at the end, and the targets are evaluated once,
    on it.

  The targets are measured for the record; nothing here depends on them.

  Args:
    every: steps between evaluations; the end of a warm-up counts as well.
    num_steps: the run's length.
    algorithm: what trains.
    averager: SWAD, or None.
    evaluator: scores.
    writer: where lines go.
  """

  def __init__(
    self,
    every: int,
    num_steps: int,
    *,
    algorithm: Algorithm,
    averager: Swad | None,
    evaluator: Evaluator,
    writer: MetricWriter,
  ):
    self._algorithm = algorithm
    self._averager = averager
    self._evaluator = evaluator
    self._writer = writer
    self._num_steps = num_steps
    self._latest: tuple[int, dict[str, float]] = (-1, {})
    start = algorithm.start_step
    self.every = lambda step: (
      is_due(every, step, last=step == num_steps) or 0 < step == start
    )
    self._sources = [
      name for name in evaluator.names if of_role({name: 0}, "source_holdout")
    ]
    if averager is not None:
      self._validate = jax.jit(averager.validate)
      self._average = jax.jit(averager.average)

  def __call__(self, info: StepInfo) -> TrainState:
    state = info.state
    params, stats, names = state.params, state.extra["batch_stats"], None
    if self._averager is not None:
      state, params, stats, names = self._averaged(info)
    lines = summary(self._evaluator(params, stats, names))
    if info.step <= self._algorithm.start_step and self._algorithm.takes_best:
      state = self._remember(state, lines["val/accuracy"])
      if info.step == self._algorithm.start_step:
        state, lines["warm_up/accuracy"] = self._recall(state)
        if self._averager is not None:  # of the path that was left
          state = _without_averages(state, self._averager)
    self._latest = (info.step, lines)
    self._writer.write(info.step, lines)
    return state

  def _averaged(self, info: StepInfo):
    """SWAD's state told of a validation, and what is to be evaluated."""
    state, names = info.state, self._sources
    now = averaged(state.params, state.extra["batch_stats"])
    scores = summary(self._evaluator(now["params"], now["batch_stats"], names))
    swad = self._validate(state.extra["swad"], scores["val/loss"])
    state = dataclasses.replace(state, extra={**state.extra, "swad": swad})
    if info.step == self._num_steps:
      now, names = self._average(swad, now), None
      extra = {**state.extra, "batch_stats": now["batch_stats"]}
      state = dataclasses.replace(state, params=now["params"], extra=extra)
    return state, now["params"], now["batch_stats"], names

  def _remember(self, state: TrainState, accuracy: float) -> TrainState:
    """The first of the best states is kept."""
    if accuracy <= float(state.extra["best"]["accuracy"]):
      return state
    kept = {
      "params": state.params,
      "opt_state": state.opt_state,
      "batch_stats": state.extra["batch_stats"],
    }
    # Copies: the next step takes the buffers of the state.
    kept = jax.tree.map(jnp.copy, kept)
    old = state.extra["best"]["accuracy"]
    kept["accuracy"] = jax.device_put(jnp.float32(accuracy), old.sharding)
    return dataclasses.replace(state, extra={**state.extra, "best": kept})

  def _recall(self, state: TrainState) -> tuple[TrainState, float]:
    """The best state of the warm-up, on the run's clock."""
    best = state.extra["best"]
    found = jax.tree.map(
      jnp.copy, {name: best[name] for name in best if name != "accuracy"}
    )
    state = dataclasses.replace(
      state,
      params=found["params"],
      opt_state=keep_schedule(found["opt_state"], state.opt_state),
      extra={**state.extra, "batch_stats": found["batch_stats"]},
    )
    return state, float(best["accuracy"])

  def measured_at(self, step: int) -> dict[str, float]:
    """What was measured at `step`; empty if it was not evaluated."""
    latest, lines = self._latest
    return lines if latest == step else {}

  def get_state(self) -> dict[str, Any]:
    return {"step": self._latest[0], "lines": self._latest[1]}

  def set_state(self, state: dict[str, Any]) -> None:
    self._latest = int(state["step"]), dict(state["lines"])


def _without_averages(state: TrainState, averager: Swad) -> TrainState:
  """The state with an averager that has seen nothing."""
  now = averaged(state.params, state.extra["batch_stats"])
  fresh = jax.tree.map(
    lambda new, old: jax.device_put(new, old.sharding),
    averager.init(now),
    state.extra["swad"],
  )
  return dataclasses.replace(state, extra={**state.extra, "swad": fresh})
