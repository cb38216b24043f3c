"""Mixtures beside each other: train, fine-tune on a task, answer it.

`python -m birdie.compare --config=configs/birdie.py:small --seeds=3` trains
every system with every seed on text, goes on from each on the same task, and
writes `report.md`: how many answers are right, by look-ups. What has finished
is kept: the same command goes on where it was stopped, and more seeds or
systems are added to it. Several such commands with different systems may share
a folder at the same time.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
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
EXAMPLE = "python -m birdie.compare --config=configs/birdie.py:small --seeds=3"
QUESTIONS = 1 << 21  # from here the seeds of the questions, the same for all


@dataclasses.dataclass(frozen=True)
class Job:
  """One training and the fine-tuning that follows.

  Attributes:
    system: what it stands under in the table.
    first: configuration of the training; None for a system without one.
    second: of the fine-tuning, without `init_from`.
  """

  system: str
  seed: int
  first: Any
  second: Any

  @property
  def folder(self) -> str:
    """Where it lies in the comparison's folder."""
    return f"runs/{self.system}/seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Result(Stored):
  """What a finished job is remembered by.

  Attributes:
    scores: the main metric of all answers, `answers`, and by look-ups,
      `answers/4`; last validation losses of the training, `eval_class/loss/…`.
    baselines: what answers of the right form from the prompt score, the same.
    params: how many numbers the model has.
    tokens: places of all batches of the training; 0 without one.
    curve: [step, share of target tokens right] while fine-tuning, on fresh
      problems.
    mixture: [step, {class: probability}], what a controller chose.
    foreseen: [predicted, realized] rewards by class, one pair an evaluation.
    seconds: of both trainings.
  """

  system: str
  seed: int
  scores: dict[str, float]
  baselines: dict[str, float]
  params: int
  tokens: int
  curve: list[list[float]]
  mixture: list[list[Any]]
  foreseen: dict[str, list[list[float]]]
  seconds: float


def compare(config: Any, workdir: str) -> str:
  """Runs the comparison, or what is left of it, and writes its report.

  Args:
    config: see `configs/birdie.py`.
    workdir: the comparison's folder.

  Returns:
    The path of the report.

  Raises:
    UserError: for unknown systems, and as training does.
  """
  from birdie.comparison import write_page

  check_one_process("birdie.compare")
  return run_jobs(
    config,
    workdir,
    make_jobs(config),
    free=_free("seed"),
    kept=_kept,
    run=run_job,
    describe=lambda result: f"{100 * result.scores['answers']:.1f} % right",
    write_page=write_page,
  )


def _free(*more: str) -> tuple[str, ...]:
  """What may differ when a comparison goes on: nothing that makes scores."""
  from birdie import train

  cheap = ("systems", "seeds", "first_seed", "settings", "keep_checkpoints")
  return (*train.FREE, *(f"compare.{key}" for key in cheap), *more)


def make_jobs(config: Any) -> list[Job]:
  """All jobs, seed by seed.

  Raises:
    UserError: for no seed, no system or an unknown one, or an impossible task.
  """
  cfg = config.compare
  least = {
    "seeds": 1, "first_seed": 0, "problems": 1, "questions": 0, "batch_size": 1,
  }  # fmt: skip
  names = check_settings(cfg, least)
  _check_task(config, names)
  jobs = []
  for seed in range(cfg.first_seed, cfg.first_seed + cfg.seeds):
    for name in names:
      first = job_config(config, cfg.settings[name], seed)
      second = finetuning(first)
      jobs.append(
        Job(name, seed, first if first.compare.train else None, second)
      )
  return jobs


def _check_task(config: Any, names: Sequence[str]) -> None:
  """Refuses what would fail after hours of training."""
  from birdie import train
  from birdie.data import make_vocabulary
  from common.data.tokenizers import make_tokenizer
  from common.errors import UserError

  if not config.compare.lookups:
    raise UserError("compare.lookups is empty: name at least one number")
  tokenizer = make_tokenizer(config.tokenizer)
  _check_keys(config.compare.finetune.task)
  make_tasks(config, make_vocabulary(tokenizer), tokenizer)
  for name in names:
    own = job_config(config, config.compare.settings[name], seed=0)
    try:
      train.make_setup(finetuning(own), tokenizer)
    except UserError as error:  # its keys are those of a training
      raise UserError(f"compare.finetune: {error}") from None


def _check_keys(task: Any) -> None:
  """Refuses settings that a task does not have, such as another's."""
  from birdie.problems import settings_of
  from birdie.tasks import TASKS
  from common.errors import UserError

  known = settings_of(TASKS[task.name]) if task.name in TASKS else task
  for key in task:
    if key not in ("name", *known):
      raise UserError(
        f"compare.finetune.task: {task.name!r} has no {key!r}: another task is "
        "set as a whole, in a config file of your own"
      )


def make_tasks(config: Any, vocab: Any, tokenizer: Any) -> dict[int, Any]:
  """The task that is asked for, by look-ups."""
  from birdie.tasks import make_task

  settings = dict(config.compare.finetune.task)
  name = settings.pop("name")
  return {
    lookups: make_task(
      name, settings | {"lookups": lookups}, vocab, tokenizer=tokenizer
    )
    for lookups in config.compare.lookups
  }


def finetuning(config: Any) -> Any:
  """The configuration of the training that follows another one."""
  made = config.copy_and_resolve_references()
  cfg = made.compare.finetune
  with made.unlocked():
    made.mixture.update({"entries": (_entry(cfg.task),), "shares": ""})
    made.controller.enabled = False
    made.controller.schedule = str(cfg.num_steps)
    made.num_steps = cfg.num_steps
    made.data.update(cfg.data)
    made.optim.update(cfg.optim)
    made.checkpoint.every = cfg.num_steps
  return made


def _entry(task: Mapping[str, Any]) -> dict[str, Any]:
  settings = dict(task)
  return {"objective": settings.pop("name"), **settings}


def _kept(folder: Any, job: Job) -> Result | None:
  """The result of a job that has finished with the same configuration."""
  from common import config as config_lib

  result = Result.load(folder / job.folder)
  if result is not None:
    config_lib.check_resume(
      folder / job.folder / "finetune", job.second, free=_free("init_from")
    )
  return result


def run_job(folder: Any, job: Job) -> Result:
  """Trains, fine-tunes, answers, and leaves `result.json`."""
  import jax

  from birdie import train
  from birdie.run import load_run
  from common.metrics import read_metrics

  path, start = folder / job.folder, time.monotonic()
  lines: list[dict[str, Any]] = []
  second = job.second.copy_and_resolve_references()
  if job.first is not None:
    train.train_and_evaluate(job.first, str(path / "train"))
    lines = read_metrics(path / "train")
    with second.unlocked():
      second.init_from = str(path / "train")
  train.train_and_evaluate(second, str(path / "finetune"))
  seconds = time.monotonic() - start
  run = load_run(path / "finetune")
  scores, baselines = answer(second, run)
  names = ("eval_class/loss/", "eval/loss")
  result = Result(
    system=job.system,
    seed=job.seed,
    scores=scores | _last(lines, names),
    baselines=baselines,
    params=sum(x.size for x in jax.tree.leaves(run.params)),
    tokens=_places(job.first),
    curve=[
      [line["step"], line["train/accuracy"]]
      for line in read_metrics(path / "finetune")
      if "train/accuracy" in line
    ],
    mixture=_mixtures(lines),
    foreseen=foreseen(lines),
    seconds=seconds,
  )
  result.save(path)
  if not second.compare.keep_checkpoints:
    for stage in ("train", "finetune"):
      if (path / stage / "checkpoints").exists():
        (path / stage / "checkpoints").rmtree()
  # Programs of other shapes would pile up.
  jax.clear_caches()
  return result


def answer(config: Any, run: Any) -> tuple[dict[str, float], dict[str, float]]:
  """The shares of answers right, and what the prompt alone gives.

  Args:
    config: of the fine-tuning.
    run: the model; see `birdie.run`.
  """
  from birdie import answering, evaluation

  cfg = config.compare
  scores: dict[str, float] = {}
  baselines: dict[str, float] = {}
  for lookups, task in make_tasks(config, run.vocab, run.tokenizer).items():
    records = evaluation.evaluate(
      task,
      lambda task, problems: answering.answer(
        run.model, run.params, task, problems, batch_size=cfg.batch_size
      ),
      problems=cfg.problems,
      seed=QUESTIONS + cfg.questions,
    )
    metric = task.metrics[0]
    found = evaluation.summary(records, task.metrics)["metrics"][metric]
    scores[f"answers/{lookups}"] = found["mean"]
    baselines[f"answers/{lookups}"] = found["context"]
  for made in (scores, baselines):
    made["answers"] = sum(made.values()) / len(cfg.lookups)
  return scores, baselines


def _last(
  lines: Sequence[Mapping[str, Any]], names: tuple[str, ...]
) -> dict[str, float]:
  return {
    name: value
    for line in lines
    for name, value in line.items()
    if name.startswith(names)
  }


def _places(config: Any) -> int:
  if config is None:
    return 0
  return config.num_steps * config.data.batch_size * config.data.sequence_length


def _mixtures(lines: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
  """What was chosen, by class, with the step."""
  made = []
  for line in lines:
    found = {
      name.removeprefix("mixture/"): value
      for name, value in line.items()
      if name.startswith("mixture/")
    }
    if found:
      made.append([line["step"], found])
  return made


def foreseen(
  lines: Sequence[Mapping[str, Any]],
) -> dict[str, list[list[float]]]:
  """By class the rewards that were predicted for a mixture and then earned.

  A line holds both: what the mixture before it has earned, and what had been
  predicted when it was chosen.
  """
  made: dict[str, list[list[float]]] = {}
  for line in lines:
    for name, earned in line.items():
      kind, _, cls = name.partition("/")
      if kind == "reward" and f"predicted/{cls}" in line:
        pair = [line[f"predicted/{cls}"], earned]
        made.setdefault(cls, []).append(pair)
  return made


if __name__ == "__main__":
  app.run(
    compare,
    name="birdie",
    description="Compares mixtures by what their models find again.",
    example=EXAMPLE,
    verb="compare",
    aliases={"seeds": "compare.seeds", "systems": "compare.systems"},
    needs=("mixture",),
  )
