"""What comparisons of several ways to train share: settings, results, claims.

A comparison runs each way, a *system*, with each seed, one *job* in a folder of
its own, and makes a page of what the jobs have left.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

RESULT = "result.json"  # of a job that has finished
_TIMES = "*="
T = TypeVar("T")


class Scored(Protocol):
  """A result of a job."""

  @property
  def system(self) -> str:
    """What it stands under in the table."""
    ...

  @property
  def seed(self) -> int:
    """Of the job."""
    ...

  @property
  def scores(self) -> Mapping[str, float]:
    """By metric."""
    ...


R = TypeVar("R", bound=Scored)


@dataclasses.dataclass(frozen=True)
class Claim:
  """That a system is better than another.

  Attributes:
    text: of the table.
    system: what is claimed to be better.
    reference: than this.
  """

  text: str
  system: str
  reference: str


def job_config(config: Any, settings: Sequence[str], seed: int) -> Any:
  """The configuration of one job, as one would give it to the project's main.

  Args:
    config: of the comparison.
    settings: `key=value`, and `key*=number` for a multiple.
    seed: of the job.
  """
  from common.config import flatten
  from common.flags import override

  made = config.copy_and_resolve_references()
  for entry in settings:
    if _TIMES in entry:
      key, _, factor = entry.partition(_TIMES)
      value = str(round(flatten(made)[key] * float(factor)))
    else:
      key, _, value = entry.partition("=")
    made = override(made, key, [f"--config.{key}={value}"])
  with made.unlocked():
    made.seed = seed
  return made


def check_settings(cfg: Any, least: Mapping[str, int]) -> list[str]:
  """The names of the systems that are to be run.

  Args:
    cfg: `config.compare`: `systems`, names between commas; `settings` of every
      system there is; `baseline`, one of them, where there is such a thing; and
      numbers.
    least: the smallest value of each number.

  Raises:
    UserError: for no system or an unknown one, and for a number below.
  """
  from common.config import did_you_mean
  from common.errors import UserError

  for key, lowest in least.items():
    if cfg[key] < lowest:
      raise UserError(f"compare.{key}={cfg[key]} must be at least {lowest}")
  names = system_names(cfg.systems)
  if not names:
    raise UserError("compare.systems is empty: name at least one")
  if "baseline" in cfg and cfg.baseline not in cfg.settings:
    hint = did_you_mean(cfg.baseline, cfg.settings)
    raise UserError(f"compare.baseline={cfg.baseline!r}{hint}")
  for name in names:
    if name not in cfg.settings:
      hint = did_you_mean(name, cfg.settings)
      raise UserError(f"compare.systems: {name!r}{hint}")
  return names


def system_names(systems: str) -> list[str]:
  """Names between commas."""
  return [name.strip() for name in systems.split(",") if name.strip()]


def save_result(folder: Any, content: Mapping[str, Any]) -> None:
  """Writes a job's result into its folder, whole or not at all."""
  from common import files

  text = json.dumps(content, indent=1, allow_nan=False)
  files.replace(folder / RESULT, text + "\n")


def load_result(folder: Any, make: Callable[[dict[str, Any]], T]) -> T | None:
  """Reads a job's result; None if it has not finished.

  Args:
    folder: the job's.
    make: content -> result.

  Raises:
    UserError: when it is damaged.
  """
  from common.errors import UserError

  path = folder / RESULT
  if not path.exists():
    return None
  try:
    return make(json.loads(path.read_text()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path} is damaged ({error}): delete it, and the run is done again"
    ) from None


def by_system(
  results: Sequence[Scored], metric: str
) -> dict[str, dict[int, float]]:
  """System -> seed -> value."""
  made: dict[str, dict[int, float]] = {}
  for result in results:
    if metric in result.scores:
      made.setdefault(result.system, {})[result.seed] = result.scores[metric]
  return made


def grouped(results: Sequence[R]) -> Iterator[tuple[str, list[R]]]:
  """The results of each system, in the order in which systems appear."""
  for system in dict.fromkeys(result.system for result in results):
    yield system, [r for r in results if r.system == system]
