"""The controller's hook: evaluate, reward, choose, publish."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from birdie import controller
from birdie.presets import Configuration
from birdie.validation import Evaluator, Scores
from common.metrics import MetricWriter
from common.parallel import check_same, from_host, on_device, to_host
from common.rngs import fold_name
from common.state import TrainState
from common.train import StepInfo

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """Which configuration belongs to which class, with their names."""

  names: tuple[str, ...]
  classes: tuple[int, ...]
  class_names: tuple[str, ...]

  @classmethod
  def of(cls, configurations: Sequence[Configuration]) -> "Curriculum":
    """Classes are numbered in order of their first configuration."""
    class_names = tuple(dict.fromkeys(c.cls for c in configurations))
    return cls(
      names=tuple(c.name for c in configurations),
      classes=tuple(class_names.index(c.cls) for c in configurations),
      class_names=class_names,
    )

  def by_class(self, values: np.ndarray, *, mean: bool) -> dict[str, float]:
    """Sums or averages [K] values over each class."""
    sums = np.bincount(self.classes, values, len(self.class_names))
    if mean:
      sums = sums / np.bincount(self.classes, minlength=len(self.class_names))
    return dict(zip(self.class_names, map(float, sums)))


class EvaluationHook:
  """Writes validation loss and accuracy: the whole, by class and by
  configuration. What a fixed mixture uses in the controller's place.

  Args:
    steps: the steps to evaluate at.
    evaluator: see `birdie.validation`.
    curriculum: names.
    writer: where the lines go.
  """

  def __init__(
    self,
    steps: Sequence[int],
    evaluator: Evaluator,
    curriculum: Curriculum,
    writer: MetricWriter,
  ):
    self.every = frozenset(steps).__contains__
    self._latest: tuple[int, dict[str, float]] = (-1, {})
    self._evaluator = evaluator
    self._curriculum = curriculum
    self._writer = writer

  def __call__(self, info: StepInfo) -> TrainState | None:
    scores = self._evaluator(info.state.params)
    lines = scores.summary(self._curriculum.names)
    for title, values in (
      ("loss", scores.losses),
      ("accuracy", scores.accuracies),
    ):
      for name, value in self._curriculum.by_class(values, mean=True).items():
        lines[f"eval_class/{title}/{name}"] = value
    self._latest = (info.step, lines)
    state, more = self.react(info, scores)
    self._writer.write(info.step, lines | more)
    return state

  def react(
    self, info: StepInfo, scores: Scores
  ) -> tuple[TrainState | None, dict[str, float]]:
    """What follows from the scores: nothing, for a fixed mixture."""
    del info, scores
    return None, {}

  def measured_at(self, step: int) -> dict[str, float]:
    """What was measured at `step`; empty if it was not evaluated."""
    latest, lines = self._latest
    return lines if latest == step else {}

  def get_state(self) -> dict[str, Any]:
    return {"step": self._latest[0], "lines": self._latest[1]}

  def set_state(self, state: dict[str, Any]) -> None:
    self._latest = int(state["step"]), dict(state["lines"])


class CurriculumHook(EvaluationHook):
  """Birdie's loop (paper, section 3.3): after each evaluation the change of
  every configuration's loss becomes a reward for the mixture that was in
  force, the reward model learns from it, and the best predicted mixture is
  in force from here on.

  The controller's arrays live in `TrainState.extra["controller"]`; its
  arithmetic runs on the host's CPU in float32, so that every process and
  every resumed run gets the same bits.

  Args:
    cfg: the controller's settings.
    num_steps: the run's length, for the exploration schedule.
    seed: the run's seed.
    **evaluation: as `EvaluationHook`.
  """

  def __init__(
    self,
    cfg: controller.ControllerConfig,
    *,
    num_steps: int,
    seed: int,
    **evaluation: Any,
  ):
    super().__init__(**evaluation)
    self._cfg = cfg
    self._num_steps = num_steps
    self._seed = seed

  def react(
    self, info: StepInfo, scores: Scores
  ) -> tuple[TrainState, dict[str, float]]:
    data: Any = info.data  # a `birdie.data.TrainData`
    old = info.state.extra["controller"]
    arrays = to_host(old)
    with on_device(jax.local_devices(backend="cpu")[0]):
      key = fold_name(jax.random.key(self._seed), "controller")
      used = data.mixture.in_force(info.step)
      if not np.array_equal(used, arrays.action):
        # What was predicted is of a mixture that was not in force throughout.
        unknown = np.full_like(arrays.predicted, np.nan)
        arrays = dataclasses.replace(arrays, action=used, predicted=unknown)
      new, probs, decision = controller.update(
        self._cfg,
        arrays,
        np.asarray(scores.losses, np.float32),
        step=info.step,
        num_steps=self._num_steps,
        key=jax.random.fold_in(key, info.step),
        classes=self._curriculum.classes,
      )
      new = to_host(new)
    probs = agree(np.asarray(probs, np.float32), new, info.step)
    first = data.change_mixture(probs)
    state = dataclasses.replace(
      info.state,
      extra={**info.state.extra, "controller": from_host(new, old)},
    )
    lines = self._describe(probs, decision)
    lines["controller/mixture_version"] = float(data.mixture.latest.version)
    lines["controller/effective_from"] = float(first)
    return state, lines

  def _describe(self, probs: np.ndarray, decision: Any) -> dict[str, float]:
    """Scalars about a decision; what is not known yet is left out."""
    lines = {
      f"mixture/{name}": value
      for name, value in self._curriculum.by_class(probs, mean=False).items()
    }
    for i, name in enumerate(self._curriculum.names):
      lines[f"mixture_config/{name}"] = float(probs[i])
    rewards, predicted = (
      np.asarray(decision[name]) for name in ("reward", "predicted")
    )
    if np.isfinite(rewards).all():
      by_class = self._curriculum.by_class(rewards, mean=True)
      lines["controller/reward"] = sum(by_class.values())
      lines |= {f"reward/{name}": value for name, value in by_class.items()}
    if np.isfinite(predicted).all():
      by_class = self._curriculum.by_class(predicted, mean=True)
      lines["controller/predicted"] = sum(by_class.values())
      lines |= {f"predicted/{name}": value for name, value in by_class.items()}
    lines["controller/explored"] = float(decision["explored"])
    first, last = np.asarray(decision["fit_loss"])
    if np.isfinite(last):
      lines["controller/fit_loss_first"] = float(first)
      lines["controller/fit_loss_last"] = float(last)
    return lines


def agree(probs: np.ndarray, state: Any, step: int) -> np.ndarray:
  """Process 0's mixture on every process, once all have come to the same.

  Every process computes it from the same arrays and the same key. A hash of
  that mixture and of the controller's arrays is compared, so that they can
  never part unseen.

  Args:
    probs: [K] this process's mixture.
    state: this process's controller, after the decision.
    step: of the run, for the error.

  Raises:
    RunError: when processes have come to different results.
  """
  if jax.process_count() == 1:
    return probs
  arrays = [probs, *map(np.asarray, jax.tree.leaves(state))]
  content = b"".join(array.tobytes() for array in arrays)
  check_same(content, f"controllers after step {step}")
  return np.asarray(multihost_utils.broadcast_one_to_all(probs))
