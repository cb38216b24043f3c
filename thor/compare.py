"""THOR beside its rivals, on the same text and seeds.

`python -m thor.compare --config=configs/thor.py:small --seeds=3` trains every
system with every seed, one after the other, and writes `report.md`. What has
finished is kept: the same command goes on where it was stopped, and more seeds
or systems are added to it. Several such commands with different systems may
share a folder at the same time.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

from common import app
from common.comparison import (
  Stored,
  check_one_process,
  check_settings,
  job_config,
  run_jobs,
)

log = logging.getLogger(__name__)
EXAMPLE = "python -m thor.compare --config=configs/thor.py:small --seeds=3"
# Without a seed, the ways to use a model have one score.
_DRAWN = ("dispatch_sentence", "dispatch_token", "dispatch_batch", "ensemble")


@dataclasses.dataclass(frozen=True)
class Job:
  """One training.

  Attributes:
    system: what it stands under in the table.
    config: the training's.
  """

  system: str
  seed: int
  config: Any

  @property
  def folder(self) -> str:
    """Where it lies in the comparison's folder."""
    return f"runs/{self.system}/seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Result(Stored):
  """What a finished training is remembered by.

  Attributes:
    steps: updates.
    scores: metrics of the last step, such as `test/bleu/de`.
    params: how many numbers the model has.
    train_flops: of an update's mean batch, by formula: see `thor.cost`.
    infer_flops: of a source token and a target token.
    seconds: of a step, the median.
    modes: by dispatch and metric, one value a seed of the draws.
  """

  system: str
  seed: int
  steps: int
  scores: dict[str, float]
  params: int
  train_flops: float
  infer_flops: float
  seconds: float
  modes: dict[str, dict[str, list[float]]]


def compare(config: Any, workdir: str) -> str:
  """Runs the comparison, or what is left of it, and writes its report.

  Args:
    config: see `configs/thor.py`.
    workdir: the comparison's folder.

  Returns:
    The path of the report.

  Raises:
    UserError: for unknown systems, and as training does.
  """
  from thor import train
  from thor.comparison import write_page

  check_one_process("thor.compare")
  jobs = make_jobs(config)
  for job in jobs:
    train.check(job.config)
  return run_jobs(
    config,
    workdir,
    jobs,
    free=_free("seed"),
    kept=_kept,
    run=run_job,
    describe=lambda result: f"BLEU {_bleu(result):.1f}",
    write_page=write_page,
  )


def _free(*more: str) -> tuple[str, ...]:
  """What may differ when a comparison goes on: nothing that makes scores."""
  from thor import train

  kept = [key for key in train.FREE if key != "translation"]
  return (*kept, "compare", *more)


def _bleu(result: Result) -> float:
  names = [n for n in result.scores if n.endswith("/bleu")]
  return result.scores[next(n for n in names if not n.startswith("copy_"))]


def make_jobs(config: Any) -> list[Job]:
  """All trainings, seed by seed.

  Raises:
    UserError: for no seed, no system or an unknown one.
  """
  cfg = config.compare
  least = {"seeds": 1, "first_seed": 0, "samples": 1, "mode_seeds": 1}
  names = check_settings(cfg, least)
  return [
    Job(name, seed, job_config(config, cfg.settings[name], seed))
    for seed in range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    for name in names
  ]


def _kept(folder: Any, job: Job) -> Result | None:
  """The result of a job that has finished with the same configuration."""
  from common import config as config_lib

  result = Result.load(folder / job.folder)
  if result is not None:
    config_lib.check_resume(folder / job.folder, job.config, free=_free())
  return result


def run_job(folder: Any, job: Job) -> Result:
  """Trains, scores the ways to use the model, and leaves `result.json`."""
  import jax

  from common.metrics import read_metrics
  from thor import train
  from thor.cost import forward_flops, train_flops
  from thor.model import num_params
  from thor.run import load_run

  path = folder / job.folder
  train.train_and_evaluate(job.config, path)
  run = load_run(path)
  lines = read_metrics(path)
  tokens = json.loads((path / "facts.json").read_text())["tokens_per_batch"]
  cost = train_flops(run.settings, passes=job.config.objective.passes)
  result = Result(
    system=job.system,
    seed=job.seed,
    steps=job.config.num_steps,
    scores=_last_scores(lines),
    params=num_params(run.settings),
    train_flops=cost.source * tokens[0] + cost.target * tokens[1],
    infer_flops=forward_flops(run.settings).total,
    seconds=_seconds(lines),
    modes=_modes(job.config, run) if job.system == "thor" else {},
  )
  result.save(path)
  if not job.config.compare.keep_checkpoints:
    (path / "checkpoints").rmtree()
  # Programs of other shapes would pile up.
  jax.clear_caches()
  return result


def _last_scores(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
  """The last value of everything that is no clock and no training metric."""
  made = {}
  for line in lines:
    for name, value in line.items():
      if "/" in name and not name.startswith(("train/", "speed/", "mode/")):
        made[name] = value
  return made


def _seconds(lines: Sequence[dict[str, Any]]) -> float:
  import statistics

  key = "speed/steps_per_second"
  return statistics.median([1 / line[key] for line in lines if line.get(key)])


def _modes(config: Any, run: Any) -> dict[str, dict[str, list[float]]]:
  """The scores of each way to use a model, over seeds of the draws."""
  from thor.sources import load_parallel
  from thor.translations import mode_scores

  splits = load_parallel(config.data.source).splits
  pairs = splits[next((n for n in splits if n.startswith("test")), "valid")]
  made: dict[str, dict[str, list[float]]] = {}
  for mode in config.translation.modes:
    is_drawn = mode.partition(":")[0] in _DRAWN
    for seed in range(config.compare.mode_seeds if is_drawn else 1):
      for metric, value in mode_scores(run, pairs, mode, seed).items():
        made.setdefault(mode, {}).setdefault(metric, []).append(value)
  return made


if __name__ == "__main__":
  app.run(
    compare,
    name="thor",
    description="Compares THOR with its rivals on the same text and seeds.",
    example=EXAMPLE,
    verb="compare",
    aliases={"seeds": "compare.seeds", "systems": "compare.systems"},
    needs=("routing",),
  )
