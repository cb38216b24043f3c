"""The mixture: how often each configuration is drawn, as versioned data.

Weights are data, not code: a batch is a function of the mixture that is in
force at its index, and the schedule of mixtures is saved with the data
position. So a change takes effect at one exact batch, in every process and in
every resumed run.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.errors import UserError

# float32 rounding of many small probabilities stays far below this.
_SUM_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """Probabilities in force from one batch on.

  Attributes:
    probs: float32 [K], one probability a configuration.
    version: 0 for the first mixture of a run, then 1, 2, ...
    effective_from: the first batch drawn from it.
    announced_at: the batch that came next when it was chosen.
  """

  probs: np.ndarray
  version: int = 0
  effective_from: int = 0
  announced_at: int = 0

  def __post_init__(self):
    probs = check_probs(self.probs)
    probs.setflags(write=False)
    object.__setattr__(self, "probs", probs)


class MixtureSchedule:
  """Which mixture is in force at which batch.

  Args:
    probs: [K] the mixture of batch 0.
  """

  def __init__(self, probs: Sequence[float] | np.ndarray):
    self._mixtures = [Mixture(np.asarray(probs))]

  @property
  def latest(self) -> Mixture:
    """The newest mixture, whether it is in force already or not."""
    return self._mixtures[-1]

  def at(self, step: int) -> Mixture:
    """The mixture that batch `step` is drawn from.

    Raises:
      ValueError: for a batch older than the restored schedule reaches.
    """
    for mixture in reversed(self._mixtures):
      if mixture.effective_from <= step:
        return mixture
    first = self._mixtures[0].effective_from
    raise ValueError(f"batch {step} is older than the schedule ({first})")

  def change(
    self,
    probs: Sequence[float] | np.ndarray,
    effective_from: int,
    *,
    announced_at: int | None = None,
  ) -> Mixture:
    """Puts a new mixture in force from batch `effective_from` on.

    A second change for the same batch replaces the first.

    Args:
      probs: [K].
      effective_from: its first batch.
      announced_at: the batch that comes next now; `effective_from` if None.

    Raises:
      UserError: when `probs` is no distribution over the K configurations.
      ValueError: when a later change has been made before.
    """
    latest = self.latest
    if effective_from < latest.effective_from:
      raise ValueError(
        f"a mixture from batch {effective_from} cannot follow the one from "
        f"batch {latest.effective_from}"
      )
    if np.shape(probs) != latest.probs.shape:
      raise UserError(
        f"the mixture has {np.size(probs)} probabilities for "
        f"{latest.probs.size} configurations: give one each"
      )
    if announced_at is None:
      announced_at = effective_from
    new = Mixture(
      np.asarray(probs), latest.version + 1, effective_from, announced_at
    )
    # One assignment: a loader's thread may be asking `at`.
    self._mixtures = [
      m for m in self._mixtures if m.effective_from < effective_from
    ] + [new]
    return new

  def in_force(self, stop: int) -> np.ndarray:
    """What was in force since the latest announcement, float32 [K].

    The mean over the batches up to `stop`; exactly the one mixture where
    there was only one, the one of batch `stop` where there were no batches.
    """
    first = self.latest.announced_at
    counts = collections.Counter(self.at(k) for k in range(first, stop))
    if len(counts) <= 1:
      return next(iter(counts), self.at(stop)).probs
    probs = np.stack([mixture.probs for mixture in counts])
    mean = np.average(probs, axis=0, weights=list(counts.values()))
    return np.asarray(mean, np.float32)

  def get_state(self, since: int = 0) -> dict[str, Any]:
    """JSON-able; every float exact (a float32 is a float64 is its repr).

    Args:
      since: mixtures that ended before this batch are left out, unless
        `in_force` needs them.
    """
    since = min(since, self.latest.announced_at)
    kept = [m for m in self._mixtures if m.effective_from > since]
    return {
      "mixtures": [
        {
          "probs": [float(p) for p in mixture.probs],
          "version": mixture.version,
          "effective_from": mixture.effective_from,
          "announced_at": mixture.announced_at,
        }
        for mixture in (self.at(since), *kept)
      ]
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Restores what `get_state` returned.

    Raises:
      ValueError: when the state is of another number of configurations.
    """
    mixtures = [
      Mixture(
        np.asarray(entry["probs"], np.float32),
        int(entry["version"]),
        int(entry["effective_from"]),
        int(entry.get("announced_at", entry["effective_from"])),
      )
      for entry in state["mixtures"]
    ]
    old, new = self.latest.probs.size, mixtures[-1].probs.size
    if old != new:
      raise ValueError(
        f"the saved mixture has {new} configurations, this run {old}"
      )
    self._mixtures = mixtures


def check_probs(probs: Sequence[float] | np.ndarray) -> np.ndarray:
  """Returns `probs` as a float32 copy [K].

  Raises:
    UserError: when they are not a distribution.
  """
  values = np.array(probs, np.float32)
  if values.ndim != 1 or not values.size:
    raise UserError(
      f"the mixture has shape {values.shape}: give one probability for each "
      "configuration"
    )
  if not np.isfinite(values).all():
    i = int(np.flatnonzero(~np.isfinite(values))[0])
    raise UserError(
      f"probability {i} of the mixture is {values[i]}: give finite numbers"
    )
  if values.min() < 0:
    i = int(values.argmin())
    raise UserError(
      f"probability {i} of the mixture is {values[i]:g}: none may be negative"
    )
  total = float(values.sum(dtype=np.float64))
  if total == 0:
    raise UserError(
      "all probabilities of the mixture are 0: give at least one "
      "configuration a positive probability"
    )
  if abs(total - 1) > _SUM_TOLERANCE:
    raise UserError(
      f"the probabilities of the mixture sum to {total:.6g}: they must sum to 1"
    )
  return values


def normalized(weights: Sequence[float] | np.ndarray) -> np.ndarray:
  """Weights divided by their sum, float32 [K].

  Raises:
    UserError: when a weight is negative or not finite, or all are 0.
  """
  values = np.asarray(weights, np.float64)
  total = values.sum()
  # Without a usable sum `check_probs` names what is wrong with the weights.
  usable = np.isfinite(total) and total > 0
  return check_probs(values / total if usable else values)


def class_uniform(classes: Sequence[int | str]) -> np.ndarray:
  """The same probability for every class, shared evenly inside it.

  Args:
    classes: the class of each configuration.

  Returns:
    float32 [K]: 1 / (number of classes) / (configurations in the class).
  """
  names, index, counts = np.unique(
    np.asarray(classes), return_inverse=True, return_counts=True
  )
  return normalized(1 / (len(names) * counts[index]))


def draw(probs: np.ndarray, u: float | np.ndarray) -> np.ndarray:
  """Configurations by inverse CDF.

  Args:
    probs: [K], at least one positive; need not sum to 1 exactly.
    u: uniform numbers in [0, 1).

  Returns:
    Indices shaped as `u`; one of probability 0 is never drawn.
  """
  cdf = np.cumsum(probs, dtype=np.float64)
  return np.searchsorted(cdf / cdf[-1], u, side="right")
