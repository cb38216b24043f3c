"""Ways to slim one teacher beside each other, over several seeds.

`python -m slimsam.compare --config=configs/slimsam.py:small --seeds=3` trains a
teacher for every seed, slims it by every system, judges all on images that no
checkpoint was chosen by, and writes `report.md`. What has finished is kept: the
same command goes on where it was stopped, and more seeds or systems are added
to it. Several such commands may share a folder at the same time: what one is
at, the others wait for.
"""

import contextlib
import copy
import dataclasses
import logging
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from common import app
from common.comparison import (
  RESULT,
  Stored,
  check_one_process,
  check_settings,
  job_config,
)

log = logging.getLogger(__name__)
EXAMPLE = "python -m slimsam.compare --config=configs/slimsam.py:small"
TEACHER = "teacher"  # what a seed's teacher stands under
MAIN = "miou/gt/point/single"
MSE = "mse"
# What may differ when a comparison goes on: nothing that makes scores.
_FREE = ("seed", "compare.systems", "compare.seeds", "compare.first_seed",
         "compare.baseline", "compare.pictures", "compare.settings",
         "compare.keep_checkpoints")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
  """One teacher, or one way to slim it.

  Attributes:
    system: what it stands under in the table.
    config: its run's.
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
  """What a finished job is remembered by.

  Attributes:
    ratio: the share of every width that was to be pruned.
    steps: updates of all its trainings.
    seconds: that they took.
    widths: of the image encoder: [embedding, qkv of each block, mlp].
    params: of the image encoder.
    macs_conv_linear, macs_true: of an image; see `slimsam.cost`.
    scores: on the test images: mean IoU from 0 to 1 by
      `miou/TRUTH/PROMPT/CHOICE`, and `mse` of the image embedding against the
      teacher's.
    pruned: by stage, the same right after pruning.
  """

  system: str
  seed: int
  ratio: float
  steps: int
  seconds: float
  widths: list[list[int]]
  params: int
  macs_conv_linear: int
  macs_true: int
  scores: dict[str, float]
  pruned: dict[str, dict[str, float]]


def compare(config: Any, workdir: str) -> str:
  """Runs the comparison, or what is left of it, and writes its report.

  Args:
    config: see `configs/slimsam.py`.
    workdir: the comparison's folder.

  Returns:
    The path of the report.

  Raises:
    UserError: for unknown systems, for too few test images, and as training
      does.
  """

  from common import config as config_lib
  from common.places import check_holds_no_run
  from slimsam.checks import check_local
  from slimsam.comparison import draw_curve, draw_masks, write_page
  from slimsam.run import BEGUN, FREE

  check_one_process("slimsam.compare")
  check_local(workdir)
  folder = pathlib.Path(workdir)
  check_holds_no_run(folder, (*BEGUN, "*/metrics.jsonl"))
  jobs = make_jobs(config, folder)
  if any(folder.glob(f"runs/*/*/{RESULT}")):
    free = (*(key for key in FREE if key != "compare"), *_FREE)
    config_lib.check_resume(folder, config, free=free)
  check(config, jobs)
  held_out(config, 0)
  with held(folder):
    config_lib.save_config(folder, config)
  for number, job in enumerate(jobs, 1):
    start = time.monotonic()
    with held(folder / job.folder):
      result = _kept(folder, job)
      was_there = result is not None
      result = result or run_job(folder, job, config)
    took = f"{time.monotonic() - start:.0f} s"
    log.info(
      "[%d/%d] seed %d  %s: mean IoU by a point %.1f %%, %s",
      number, len(jobs), job.seed, job.system, 100 * result.scores[MAIN],
      "done before" if was_there else took,
    )  # fmt: skip
    with held(folder):
      write_page(folder, config)
  with held(folder):
    draw_curve(folder, config)
    draw_masks(folder, config)
    path = write_page(folder, config)
  log.info("report: %s", path)
  return path


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
  """The folder is this process's inside the context; waits for others.

  The system lets go of it even after kill -9. Where there are no such locks,
  nothing is waited for.
  """
  folder.mkdir(parents=True, exist_ok=True)
  try:
    import fcntl
  except ImportError:  # not on Windows
    yield
    return
  with open(folder / ".lock", "wb") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log.info("waiting for another process that is at work in %s", folder)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
      log.debug("no locks in %s", folder)
    yield


def make_jobs(config: Any, folder: pathlib.Path) -> list[Job]:
  """All jobs, seed by seed, each seed's teacher first.

  Args:
    config: see `configs/slimsam.py`.
    folder: the comparison's.

  Raises:
    UserError: for no seed, no system or an unknown one.
  """
  cfg = config.compare
  least = {"seeds": 1, "first_seed": 0, "test_images": 1, "pictures": 0}
  names = check_settings(cfg, least)
  jobs = []
  for seed in range(cfg.first_seed, cfg.first_seed + cfg.seeds):
    teacher = Job(TEACHER, seed, _job_config(config, (), seed))
    path = config.teacher.path or str(folder / teacher.folder / "teacher/model")
    jobs.append(teacher)
    for name in names:
      settings = (*cfg.settings[name], f"teacher.path={path}")
      jobs.append(Job(name, seed, _job_config(config, settings, seed)))
  return jobs


def _job_config(config: Any, settings: Sequence[str], seed: int) -> Any:
  """Of one job; all seeds have the same images."""
  made = job_config(config, settings, seed)
  with made.unlocked():
    made.export = ("native",)  # not every system has another form
    del made.compare  # which may change while a job is half done
  return made


def check(config: Any, jobs: Sequence[Job]) -> None:
  """Refuses what can be refused before anything is trained.

  Args:
    config: of the comparison.
    jobs: its.

  Raises:
    UserError: as training does, and for a ratio that leaves nothing.
  """
  from common.errors import UserError
  from slimsam import train
  from slimsam.select import kept_width

  cfg = config.teacher
  widths = () if cfg.path else (cfg.width, cfg.mlp_width)
  for job in jobs:
    try:
      train.check(job.config)
      for width in widths:
        kept_width(width, job.config.prune.ratio, cfg.heads)
    except UserError as error:
      raise UserError(f"{job.system}: {error}") from None


def held_out(config: Any, count: int) -> list[Any]:
  """Images that no checkpoint was chosen by: validation images from where
  evaluation ends.

  Args:
    config: of the comparison.
    count: so many of them.

  Raises:
    UserError: where there are not as many as the comparison asks for.
  """
  from common.errors import UserError
  from slimsam.sources import make_source

  source = make_source(config.data.source, "valid")
  start, wanted = config.evaluation.images, config.compare.test_images
  if not start or start + wanted > len(source):
    raise UserError(
      f"compare.test_images={wanted}: of {len(source)} validation images the "
      f"first {start or len(source)} choose checkpoints; give fewer to "
      "evaluation.images, or more by data.source.valid"
    )
  return [source[start + i] for i in range(min(count, wanted))]


def _kept(folder: pathlib.Path, job: Job) -> Result | None:
  """The result of a job that has finished with the same configuration."""
  from common import config as config_lib
  from slimsam.run import FREE

  result = Result.load(folder / job.folder)
  if result is not None:
    # The folder may have been moved since.
    free = (*FREE, "teacher.path")
    config_lib.check_resume(folder / job.folder, job.config, free=free)
  return result


def run_job(folder: pathlib.Path, job: Job, config: Any) -> Result:
  """Trains, judges, and leaves `result.json`.

  Args:
    folder: the comparison's.
    job: what to run.
    config: of the comparison.
  """
  import shutil

  import jax

  from common.tree import count_params
  from slimsam import train
  from slimsam.cost import encoder_macs
  from slimsam.run import Run

  path = folder / job.folder
  run = Run(job.config, path)
  original = model = train.original_model(run)
  names = ["teacher"]
  if job.system != TEACHER:
    model = train.train_stages(run, train.check(job.config))
    names = list(job.config.distill.stages)
  measure = _test(run, original, config)
  scores = measure(model.encoder, model.settings)
  if job.system == TEACHER:  # which agrees with itself
    scores = {k: v for k, v in scores.items() if k.startswith("miou/gt/")}
  cfg, ends = model.settings.encoder, [_end(path / name) for name in names]
  macs = encoder_macs(cfg)
  result = Result(
    system=job.system,
    seed=job.seed,
    ratio=0.0 if job.system == TEACHER else job.config.prune.ratio,
    steps=sum(step for step, _ in ends),
    seconds=sum(seconds for _, seconds in ends),
    widths=[[cfg.width], list(cfg.qkv_widths), list(cfg.mlp_widths)],
    params=count_params(model.encoder),
    macs_conv_linear=macs.conv_linear,
    macs_true=macs.true,
    scores=scores,
    pruned={} if job.system == TEACHER else _pruned(run, original, measure),
  )
  result.save(path)
  if not config.compare.keep_checkpoints:
    for name in names:
      shutil.rmtree(path / name / "checkpoints", ignore_errors=True)
    shutil.rmtree(path / "targets", ignore_errors=True)
  # Programs of other shapes would pile up.
  jax.clear_caches()
  return result


def _test(run: Any, original: Any, config: Any) -> Any:
  """Judges image encoders as `run.measure` does, on the test images."""
  test = copy.copy(run)
  test.valid = held_out(config, config.compare.test_images)
  test.config = copy.deepcopy(run.config)
  test.config.evaluation.update(
    {"images": 0, "prompts": ("point", "box"), "choices": ("single", "oracle")}
  )
  judge = test.measure(original)

  def measure(encoder: Any, settings: Any) -> dict[str, float]:
    scores = judge(encoder, settings)
    return scores | {MSE: scores.pop("valid/mse")}

  return measure


def _end(folder: pathlib.Path) -> tuple[int, float]:
  """Updates and seconds of a training; none where there was none."""
  from common.metrics import read_metrics

  lines = read_metrics(folder) if folder.exists() else []
  return (lines[-1]["step"], lines[-1]["time_run"]) if lines else (0, 0.0)


def _pruned(run: Any, original: Any, measure: Any) -> dict[str, Any]:
  """The scores of each stage's model before it was trained."""
  from common import files
  from slimsam import keep, train
  from slimsam.prune import prune_model
  from slimsam.run import Model

  cfg, model, made = run.config.prune, original, {}
  for name in run.config.distill.stages:
    params, settings = prune_model(
      model.params,
      model.settings,
      files.read_json(run.folder / name / keep.FILE),
      rel_pos=cfg.rel_pos,
      fold_scale=cfg.fold_scale,
    )
    made[name] = measure(params["image_encoder"], settings)
    model = Model.load(run.folder / name / train.MODEL)
  return made


if __name__ == "__main__":
  app.run(
    compare,
    name="slimsam",
    description="Compares ways to slim one teacher, over several seeds.",
    example=EXAMPLE,
    verb="compare",
    aliases={"seeds": "compare.seeds", "systems": "compare.systems"},
    needs=("teacher", "prune"),
  )
