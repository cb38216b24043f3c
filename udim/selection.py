"""Which model of a run is reported, by whom it may be chosen.

DomainBed's ways (Gulrajani & Lopez-Paz, ICLR 2021, section 3.2), always all:

    source   the highest mean accuracy on the sources' held-out images;
    oracle   the same on the targets' held-out images, which a user would not
             have;
    last     the end of training, no choice.

The first of equals is taken. Reported is the accuracy on the targets' larger
parts, which none of them reads.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.errors import UserError
from udim.scores import of_role

Line = Mapping[str, Any]  # scalars of one evaluation, and `step`
View = Callable[[Line], Mapping[str, float]]
METHODS = ("source", "oracle", "last")


@dataclasses.dataclass(frozen=True)
class Selected:
  """One chosen model and what is reported of it.

  Attributes:
    step: updates done.
    criterion: what it was chosen by; at the end of training, as by source.
    source: mean accuracy on the sources' held-out images.
    tuning: the same with the validation domains, where there are such.
    target: mean over the target domains.
    reference: mean over held-out images like the sources', None without any.
    domains: accuracy by target domain.
  """

  step: int
  criterion: float
  source: float
  tuning: float
  target: float
  reference: float | None
  domains: dict[str, float]


def source_view(line: Line) -> dict[str, float]:
  """All that selection by source may see of an evaluation."""
  return of_role(line, "source_holdout/accuracy")


def oracle_view(line: Line) -> dict[str, float]:
  """All that the oracle may see."""
  return of_role(line, "target_holdout/accuracy")


def select(lines: Sequence[Line]) -> dict[str, Selected]:
  """Chooses among a run's evaluations.

  Args:
    lines: of `metrics.jsonl`, in order; those without target accuracies are
      left out.

  Returns:
    A model for each of `METHODS`; no oracle where no target has a held-out
    part.

  Raises:
    UserError: when nothing was evaluated on targets.
  """
  lines = [line for line in lines if of_role(line, "target_main/accuracy")]
  if not lines:
    raise UserError("the run has no evaluation on its target domains yet")
  views = {"source": source_view, "oracle": oracle_view, "last": source_view}
  if not oracle_view(lines[0]):
    del views["oracle"]
  selected = {}
  for method, view in views.items():
    number = len(lines) - 1 if method == "last" else best(lines, view)
    selected[method] = _describe(lines[number], view)
  return selected


def has_targets(lines: Sequence[Line]) -> bool:
  """Whether targets were evaluated at all."""
  return any(of_role(line, "target_main/accuracy") for line in lines)


def best(lines: Sequence[Line], view: View) -> int:
  """The first evaluation with the highest mean of what `view` shows."""
  means = [_mean(view(line)) for line in lines]
  return max(range(len(means)), key=lambda i: (means[i], -i))


def _describe(line: Line, view: View) -> Selected:
  domains = of_role(line, "target_main/accuracy")
  return Selected(
    step=int(line["step"]),
    criterion=_mean(view(line)),
    source=_mean(source_view(line)),
    tuning=line["tuning/accuracy"],
    target=_mean(domains),
    reference=line.get("reference/accuracy"),
    domains=domains,
  )


def _mean(values: Mapping[str, float]) -> float:
  return math.fsum(values.values()) / len(values)
