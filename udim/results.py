"""What a finished run of a comparison is remembered by: `result.json`."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from common.comparison import load_result, save_result
from udim.selection import Selected


@dataclasses.dataclass(frozen=True)
class Result:
  """One finished run.

  Attributes:
    label: what it stands under in the table.
    run: the protocol's run: a left-out domain, or sources.
    seed: of the run.
    draw: of the random search.
    settings: what the label and the draw changed in the configuration.
    selected: by method: source, oracle, last; empty if the run diverged before
      its targets were evaluated.
    cost: `flops` and `seconds` of a mean step, `temporaries` in bytes.
    landscape: sharpness, by name; empty if not asked for.
    stopped: why the training ended before its time, "" if it did not. What
      was measured until then counts.

  What is not finite is None on the disk, and from there on.
  """

  label: str
  run: str
  seed: int
  draw: int
  settings: dict[str, Any]
  selected: dict[str, Selected]
  cost: dict[str, float | None]
  landscape: dict[str, Any]
  stopped: str = ""

  def save(self, folder: Any) -> None:
    """Writes the file, whole or not at all."""
    save_result(folder, _finite(dataclasses.asdict(self)))

  @classmethod
  def load(cls, folder: Any) -> "Result | None":
    """Reads the file; None if the run has not finished.

    Raises:
      UserError: when it is damaged.
    """

    def make(content: dict[str, Any]) -> "Result":
      selected = {k: Selected(**v) for k, v in content["selected"].items()}
      return cls(**content | {"selected": selected})

    return load_result(folder, make)


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  is_bad = isinstance(value, float) and not math.isfinite(value)
  return None if is_bad else value


def choose_draws(results: Iterable[Result], method: str) -> list[Result]:
  """One result for each label, run and seed: the best of its draws.

  The first of equals.
  """
  found: dict[tuple[str, str, int], Result] = {}
  for result in results:
    if method not in result.selected:
      continue
    key = (result.label, result.run, result.seed)
    rival = found.get(key)
    if rival is None or (
      result.selected[method].criterion > rival.selected[method].criterion
    ):
      found[key] = result
  return list(found.values())


def draw_scores(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Settings and mean tuning accuracy of each draw, over seeds and runs.

  That accuracy is of the sources' held-out images alone, and of their changed
  copies where the data set has such.

  Args:
    results: of one label, all draws on the same seeds and runs.
  """
  draws: dict[int, list[Result]] = {}
  for result in results:
    draws.setdefault(result.draw, []).append(result)
  return [
    {
      "draw": draw,
      "settings": own[0].settings,
      # One that diverged before it was evaluated is no choice.
      "tuning_accuracy": float(
        np.mean(
          [
            r.selected["source"].tuning if "source" in r.selected else 0.0
            for r in own
          ]
        )
      ),
    }
    for draw, own in sorted(draws.items())
  ]


def best_draw(results: Sequence[Result]) -> int:
  """The first of the draws with the best mean tuning accuracy."""
  scores = draw_scores(results)
  return max(scores, key=lambda one: one["tuning_accuracy"])["draw"]


def by_seed(results: Iterable[Result], method: str) -> dict[int, float]:
  """Mean target accuracy over runs, by seed; seeds with all runs alone."""
  values: dict[int, dict[str, float]] = {}
  for result in results:
    values.setdefault(result.seed, {})[result.run] = result.selected[
      method
    ].target
  most = max(map(len, values.values()), default=0)
  return {
    seed: float(np.mean(list(runs.values())))
    for seed, runs in sorted(values.items())
    if len(runs) == most
  }


def by_domain(
  results: Iterable[Result], method: str
) -> dict[str, dict[int, float]]:
  """Accuracy by target domain and seed, means over the runs that have it."""
  values: dict[str, dict[int, list[float]]] = {}
  for result in results:
    for domain, accuracy in result.selected[method].domains.items():
      seeds = values.setdefault(domain, {})
      seeds.setdefault(result.seed, []).append(accuracy)
  return {
    domain: {seed: float(np.mean(v)) for seed, v in seeds.items()}
    for domain, seeds in values.items()
  }
