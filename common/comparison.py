"""What comparisons of several ways to train share: settings, results, claims.

A comparison runs each way, a *system*, with each seed, one *job* in a folder of
its own, and makes a page of what the jobs have left.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

log = logging.getLogger(__name__)
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
J = TypeVar("J")


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


class Stored:
  """A dataclass of plain values that is kept in a job's folder."""

  def save(self, folder: Any) -> None:
    """Writes the file, whole or not at all."""
    save_result(folder, dataclasses.asdict(self))  # type: ignore

  @classmethod
  def load(cls, folder: Any) -> Self | None:
    """Reads the file; None if the job has not finished.

    Raises:
      UserError: when it is damaged.
    """
    return load_result(folder, lambda content: cls(**content))


def check_one_process(verb: str) -> None:
  """Refuses `jax.distributed` for a comparison.

  Raises:
    UserError: where there are several processes.
  """
  import jax

  from common.errors import UserError

  if jax.process_count() > 1:
    raise UserError(
      f"{verb} runs in one process: start several with different --systems and "
      "the same --workdir"
    )


def run_jobs(
  config: Any,
  workdir: str,
  jobs: Sequence[J],
  *,
  free: Sequence[str],
  kept: Callable[[Any, J], R | None],
  run: Callable[[Any, J], R],
  describe: Callable[[R], str],
  write_page: Callable[[Any, Any], str],
) -> str:
  """Runs what is left of a comparison; the page is written after every job.

  Args:
    config: of the comparison.
    workdir: its folder.
    jobs: all of them.
    free: keys that may differ from a folder that holds results.
    kept: (folder, job) -> its result, None if it has not finished.
    run: (folder, job) -> the result of a job, which it leaves in its folder.
    describe: of a result, for the log.
    write_page: (folder, config) -> the page's path.

  Returns:
    The page's path.

  Raises:
    UserError: for a folder of another comparison or of a run, and as the jobs
      do.
  """
  from etils import epath

  from common import config as config_lib
  from common.places import check_holds_no_run

  folder = epath.Path(workdir)
  check_holds_no_run(folder)
  if any(folder.glob(f"runs/*/*/{RESULT}")):
    config_lib.check_resume(folder, config, free=free)
  folder.mkdir(parents=True, exist_ok=True)
  config_lib.save_config(folder, config)
  path = ""
  for number, job in enumerate(jobs, 1):
    start = time.monotonic()
    result = kept(folder, job)
    took = "done before"
    if result is None:
      result = run(folder, job)
      took = f"{time.monotonic() - start:.0f} s"
    log.info(
      "[%d/%d] seed %d  %s: %s, %s",
      number, len(jobs), result.seed, result.system, describe(result), took,
    )  # fmt: skip
    path = write_page(folder, config)
  log.info("report: %s", path)
  return path


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


def claims_table(
  claims: Sequence[Claim],
  values: Mapping[str, Mapping[int, float]],
  *,
  unit: str,
  scale: float = 100,
) -> str:
  """Tests the claims of which both sides were run, seed by seed.

  Args:
    claims: of the comparison.
    values: system -> seed -> value, as of `by_system`.
    unit: what a difference is in, for the header.
    scale: of what is shown; see `common.statistics.format_interval`.

  Returns:
    A table in markdown; "" where nothing can be tested.
  """
  import math

  from common import statistics
  from common.report import markdown_table

  tested = [
    (claim, statistics.paired(*statistics.align(values[a], values[b])))
    for claim in claims
    if (a := claim.system) in values
    and (b := claim.reference) in values
    and set(values[a]) & set(values[b])
  ]
  if not tested:
    return ""
  judged = statistics.verdicts([found for _, found in tested])
  rows = [
    (
      claim.text,
      statistics.format_interval(found, scale=scale, signed=True),
      f"{found.wins} of {found.count}",
      "–" if math.isnan(p) else f"{p:.2g}",
      verdict,
    )
    for (claim, found), (p, verdict) in zip(tested, judged)
  ]
  header = ("claim", unit, "seeds won", "p (Holm)", "verdict")
  return markdown_table(header, rows)


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
