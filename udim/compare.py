"""Algorithms side by side, on the same seeds, with what may be said of them.

`python -m udim.compare --config=configs/udim.py:digits_c --seeds=8` trains
every algorithm on every run of the protocol and every seed, one after the
other, and writes `report.md`. What has finished is kept: the same command goes
on where it was stopped, and more seeds or algorithms are added to it.
"""

import collections
import contextlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from common import app

log = logging.getLogger(__name__)
EXAMPLE = "python -m udim.compare --config=configs/udim.py:digits_c --seeds=8"
KEPT_PROGRAMS = 32  # those used last; others are compiled again
# What a comparison's folder may be started again with.
_FREE = ("mode", "algorithm", "run", "seed", "trial_seed")


def compare(config: Any, workdir: str) -> str:
  """Runs the comparison, or what is left of it, and writes its report.

  Args:
    config: see `configs/udim.py`.
    workdir: the comparison's folder.

  Returns:
    The path of the report.

  Raises:
    UserError: for unknown algorithms, and as training does.
  """
  import jax
  from etils import epath

  from common import config as config_lib
  from common.places import check_holds_no_run
  from udim import jobs as jobs_lib
  from udim.tables import write_comparison
  from udim.train import FREE

  jobs_lib.check_compare(config)
  folder = epath.Path(workdir)
  check_holds_no_run(folder)
  labels = jobs_lib.split_labels(config.compare.algorithms)
  # A start that failed took nothing: only results make a folder's settings law.
  if any(folder.glob("runs/*/*/*/result.json")):
    config_lib.check_resume(folder, config, free=(*FREE, *_FREE))
  _try(config, labels)
  is_writer = jax.process_index() == 0
  if is_writer:
    folder.mkdir(parents=True, exist_ok=True)
    config_lib.save_config(folder, config)
  runner = Runner(folder)
  draws: Any = range(config.search.draws)
  if config.search.chosen:
    draws = jobs_lib.chosen_draws(config)
    for name in jobs_lib.tuned_algorithms(config, labels):
      if name not in draws:
        log.warning(
          "%s is not in %s: it runs with the configuration's settings, beside "
          "others that were tuned", name, config.search.chosen,
        )  # fmt: skip
  elif config.search.tuning_seeds:
    draws = tune(config, labels, runner)
  seeds = jobs_lib.seeds_of(config.compare.first_seed, config.compare.seeds)
  jobs = jobs_lib.make_jobs(config, labels, seeds, draws)
  results, path = [], ""
  for seed in seeds:
    results += runner(
      [job for job in jobs if job.seed == seed],
      of=len(jobs), done=len(results), landscape=config.compare.landscape,
    )  # fmt: skip
    if is_writer:
      path = write_comparison(folder, config, results)
  log.info("report: %s", path)
  return path


def _try(config: Any, labels: Sequence[str]) -> None:
  """Builds the first run, so that what is missing is told before a folder is
  taken.
  """
  from udim import jobs as jobs_lib
  from udim.train import make_setup

  jobs = jobs_lib.make_jobs(config, labels, [config.compare.first_seed], [0])
  if jobs:
    first = jobs[0].config
    make_setup(first, jobs_lib.load_shared(first.data.source))


def tune(
  config: Any, labels: Sequence[str], runner: "Runner"
) -> dict[str, int]:
  """The draw of each algorithm that does best on the tuning seeds.

  The configuration's own settings are not among them: they may have been
  chosen by anything.

  Writes `chosen.json`: the accuracies of all draws and what was chosen. Process
  0 writes, and all return when it is there.
  """
  import jax

  from common import files
  from common.parallel import wait_for_all
  from udim import jobs as jobs_lib
  from udim.results import best_draw, draw_scores

  names = jobs_lib.tuned_algorithms(config, labels)
  seeds = jobs_lib.seeds_of(
    config.search.first_tuning_seed, config.search.tuning_seeds
  )
  draws = range(1, config.search.draws + 1)
  jobs = jobs_lib.make_jobs(config, names, seeds, draws)
  results = runner(jobs, of=len(jobs), landscape=False)
  chosen, page = {}, {}
  for name in names:
    own = [result for result in results if result.label == name]
    chosen[name] = best_draw(own)
    page[name] = {"chosen": chosen[name], "draws": draw_scores(own)}
    log.info("%s: draw %d of %d", name, chosen[name], config.search.draws)
  if jax.process_index() == 0:
    files.replace(
      runner.folder / "chosen.json", json.dumps(page, indent=1) + "\n"
    )
  wait_for_all("draws chosen")
  return chosen


class Runner:
  """Does jobs that have not been done, one line each.

  Args:
    folder: of the comparison.
  """

  def __init__(self, folder: Any):
    self.folder = folder
    self._steps: collections.OrderedDict[str, Any] = collections.OrderedDict()
    self._costs: dict[str, dict[str, float]] = {}

  def __call__(
    self,
    jobs: Sequence[Any],
    *,
    of: int,
    done: int = 0,
    landscape: bool,
  ) -> list[Any]:
    """Their results, in order.

    Args:
      jobs: see `udim.jobs.make_jobs`.
      of: how many there are in all, for the lines.
      done: how many came before.
      landscape: measure sharpness as well.
    """
    results = []
    for number, job in enumerate(jobs, start=done + 1):
      start = time.monotonic()
      result = self._kept(job)
      if result is None:
        with _quietly():
          result = self._run(job, landscape=landscape)
        took = f"{time.monotonic() - start:.1f} s"
      else:
        took = "done before"
      log.info("%s", _line(number, of, job, result, took))
      results.append(result)
    return results

  def _kept(self, job: Any) -> Any:
    """The result of a job that has finished with the same configuration."""
    from common import config as config_lib
    from udim.results import Result
    from udim.train import FREE

    folder = self.folder / job.folder
    result = Result.load(folder)
    if result is not None:
      config_lib.check_resume(folder, job.config, free=FREE)
    return result

  def _run(self, job: Any, *, landscape: bool) -> Any:
    import jax
    import numpy as np

    from common.hooks import NonFiniteError
    from common.metrics import read_metrics
    from common.parallel import wait_for_all
    from udim import measure
    from udim.jobs import load_shared
    from udim.results import Result
    from udim.selection import has_targets, select
    from udim.train import make_setup, train_and_evaluate

    setup = make_setup(job.config, load_shared(job.config.data.source))
    key, steps = self._steps_of(job, setup)
    folder = self.folder / job.folder
    state, stopped = None, ""
    try:
      state = train_and_evaluate(
        job.config, str(folder), setup=setup, steps=steps, quiet=True
      )
    except NonFiniteError as error:  # some draw of a search will diverge
      stopped = str(error)
    if key not in self._costs:
      self._costs[key] = measure.cost_of(job.config, setup, steps)
    numbers, images = {}, {}
    if landscape and state is not None:
      numbers, images = measure.landscape_of(job.config, setup, state)
    if jax.process_index() == 0:
      lines = read_metrics(folder)
      chosen = select(lines) if has_targets(lines) or not stopped else {}
      seconds = measure.seconds_per_step(lines)
      if images:
        with (folder / "images.npz").open("wb") as file:
          np.savez(file, **images)  # type: ignore[arg-type]
      Result(
        job.label, job.run, job.seed, job.draw, job.settings, chosen,
        self._costs[key] | {"seconds": seconds}, numbers, stopped,
      ).save(folder)  # fmt: skip
      if not job.config.compare.keep_checkpoints:
        (folder / "checkpoints").rmtree()
    wait_for_all(f"result of {job.folder}")
    return Result.load(folder)

  def _steps_of(self, job: Any, setup: Any) -> tuple[str, Any]:
    """The compiled steps, which runs of other seeds share."""
    from common.config import to_json
    from udim.algorithms import make_steps

    config = job.config.copy_and_resolve_references()
    with config.unlocked():
      config.seed = config.trial_seed = config.data.source.seed = 0
      config.run = str(len(setup.run.sources))
    key = to_json(config)
    if key not in self._steps:
      self._steps[key] = make_steps(setup.algorithm, setup.averager)
    self._steps.move_to_end(key)
    while len(self._steps) > KEPT_PROGRAMS:
      self._steps.popitem(last=False)
    return key, self._steps[key]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
  """Keeps the lines of a single training from the terminal and the log."""
  loggers = [logging.getLogger(name) for name in ("common", "udim.train")]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.WARNING)
  try:
    yield
  finally:
    for logger, level in zip(loggers, levels):
      logger.setLevel(level)


def _line(number: int, of: int, job: Any, result: Any, took: str) -> str:
  width = len(str(of))
  name = f"{job.label}{f' draw {job.draw}' if job.draw else ''}"
  if "source" not in result.selected:
    return (
      f"[{number:{width}}/{of}] seed {job.seed}  {name:16s} {job.run}: {took}, "
      f"diverged before it was evaluated: {result.stopped}"
    )
  chosen = result.selected["source"]
  return (
    f"[{number:{width}}/{of}] seed {job.seed}  {name:16s} {job.run}: target "
    f"{100 * chosen.target:.1f} %, source {100 * chosen.source:.1f} %, {took}"
    f"{', diverged' if result.stopped else ''}"
  )


if __name__ == "__main__":
  app.run(
    compare,
    name="udim",
    description="Compares algorithms on the same data and seeds.",
    example=EXAMPLE,
    verb="compare",
    aliases={"seeds": "compare.seeds", "algorithms": "compare.algorithms"},
    needs=("algorithm",),
  )
