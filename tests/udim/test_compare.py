"""Comparisons: which runs, resuming, and the page."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.experimental import multihost_utils

from common.config import save_config
from common.errors import UserError
from configs.udim import get_config
from udim import compare as compare_lib
from udim.compare import Runner, compare, tune
from udim.jobs import (
  base_of,
  check_compare,
  chosen_draws,
  job_config,
  make_jobs,
  overrides_of,
  split_labels,
  tuned_algorithms,
)
from udim.results import Result
from udim.search import draw_settings
from udim.selection import Selected
from udim.tables import Comparison, domain_groups

ROOT = pathlib.Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("compile_once")


def make_config(algorithms="erm,sam", **settings):
  config = get_config("smoke")
  config.num_steps = 4
  config.evaluation.every = 2
  config.log.every = 1
  config.data.source.corruptions = ("blur", "shift")
  config.compare.algorithms = algorithms
  config.compare.landscape_images = 64
  config.compare.update(settings)
  return config


def test_labels_are_algorithms_or_variants():
  config = get_config()
  assert overrides_of(config, "sam") == [("algorithm", "sam")]
  assert overrides_of(config, "udim_pen") == [
    ("algorithm", "udim"), ("methods.udim.terms", "('pen',)")
  ]  # fmt: skip
  assert base_of(config, "udim_pen") == base_of(config, "udim+swad") == "udim"
  with pytest.raises(UserError, match=r"'udim_penn'; did you mean 'udim_pen'"):
    overrides_of(config, "udim_penn")


@pytest.mark.parametrize(
  ("text", "message"),
  [(" , ", "is empty"), ("erm,sam,erm", "names 'erm' twice")],
)
def test_lists_that_say_nothing(text, message):
  with pytest.raises(UserError, match=message):
    split_labels(text)


def test_every_variant_of_the_configuration_makes_a_training():
  config = get_config()
  for label in config.compare.variants:
    changed = job_config(config, label, 3, {})
    assert changed.algorithm == "udim"
    assert changed != job_config(config, "udim", 3, {})


def test_jobs_go_seed_by_seed_and_move_everything_random():
  config = make_config("erm,udim")
  jobs = make_jobs(config, ["erm", "udim"], [5, 6], [0])
  assert [(j.seed, j.label) for j in jobs] == [
    (5, "erm"), (5, "udim"), (6, "erm"), (6, "udim")
  ]  # fmt: skip
  for job in jobs:
    seeds = (
      job.config.seed, job.config.trial_seed, job.config.data.source.seed
    )  # fmt: skip
    assert seeds == (job.seed,) * 3
    assert job.config.mode == "train"
    assert job.run == job.config.run == "clean"
  assert len({job.folder for job in jobs}) == 4


def test_leave_one_out_is_a_run_for_each_domain():
  config = get_config("digits_rot,smoke")
  jobs = make_jobs(config, ["erm"], [0], [0])
  assert [job.run for job in jobs] == ["0", "15", "30", "45", "60", "75"]


def test_variants_take_the_draw_of_their_algorithm():
  config = make_config("udim,udim_still,erm")
  config.search.update({"draws": 3, "tuning_seeds": 1})
  labels = ["udim", "udim_still", "erm"]
  assert tuned_algorithms(config, labels) == ["udim"]
  tuned, still, erm = make_jobs(config, labels, [0], {"udim": 2})
  assert (tuned.draw, still.draw, erm.draw) == (2, 2, 0)
  own = tuned.config.methods.udim
  other = still.config.methods.udim
  assert own.lambda1 == other.lambda1 != config.methods.udim.lambda1
  assert (own.rho_x > 0, other.rho_x) == (True, 0.0)


@pytest.mark.parametrize(
  ("section", "key", "value", "message"),
  [
    ("compare", "seeds", 0, "compare.seeds=0 must be at least 1"),
    ("compare", "algorithms", "emr", "'emr'; did you mean 'erm'"),
    ("compare", "references", "emr", "'emr'; did you mean 'erm'"),
    ("search", "draws", 0, "search.draws=0"),
  ],
)
def test_comparisons_of_nothing(section, key, value, message):
  config = make_config()
  config[section][key] = value
  with pytest.raises(UserError, match=message):
    check_compare(config)


def test_tuning_on_reported_seeds_is_refused():
  config = make_config(seeds=3, first_seed=0)
  config.search.update({"draws": 2, "tuning_seeds": 2, "first_tuning_seed": 2})
  with pytest.raises(UserError, match="would use the reported seed 2"):
    check_compare(config)


def results_of(folder):
  return {
    path.parent.relative_to(folder): path.stat().st_mtime_ns
    for path in folder.glob("runs/**/result.json")
  }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("compare")
  compare(make_config("erm,udim", seeds=2), str(folder))
  return folder


def test_the_page(finished):
  page = (finished / "report.md").read_text()
  for heading in (
    "## Models chosen by the sources' held-out images",
    "## Models chosen by the targets' held-out images (oracle)",
    "## Models at the end of training",
    "## What holds", "## By domain", "## Cost", "## Flatness", "## Figures",
    "## Settings",
  ):  # fmt: skip
    assert heading in page
  assert "UDIM is better than ERM" in page
  assert "SAM is better" not in page  # was not run
  for name in (finished / "plots").glob("*.png"):
    assert f"plots/{name.name}" in page
  rows = [line for line in page.splitlines() if line.startswith("| udim |")]
  assert all(" ± " in row for row in rows[:4])


def test_its_numbers_are_those_of_the_runs(finished):
  targets = []
  for seed in (0, 1):
    folder = finished / f"runs/udim/clean/seed{seed}"
    result = Result.load(folder)
    lines = [
      json.loads(line)
      for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    last = [line for line in lines if "target/accuracy" in line][-1]
    assert result.selected["last"].target == last["target/accuracy"]
    assert set(result.selected["last"].domains) == {"blur_3", "shift_3"}
    assert len(result.landscape["gap_target"]) == 4
    assert not (folder / "checkpoints").exists()
    targets.append(result.selected["source"].target)
  table = Comparison(("udim",), (), tuple(
    Result.load(finished / f"runs/udim/clean/seed{s}") for s in (0, 1)
  ))  # fmt: skip
  assert list(table.scores("udim", "source").values()) == targets


def test_what_has_finished_is_not_done_again(finished, monkeypatch):
  before = results_of(finished)
  page = (finished / "report.md").read_text()

  def run(*args, **kwargs):
    raise AssertionError("nothing is left to do")

  with monkeypatch.context() as patched:
    patched.setattr(Runner, "_run", run)
    compare(make_config("erm,udim", seeds=2), str(finished))
  assert results_of(finished) == before
  assert (finished / "report.md").read_text() == page


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch):
  config = make_config("erm,sam", seeds=1, landscape=False)
  real, done = Runner._run, []

  def run(self, job, **kwargs):
    if done:
      raise KeyboardInterrupt
    done.append(job.label)
    return real(self, job, **kwargs)

  with monkeypatch.context() as patched:
    patched.setattr(Runner, "_run", run)
    with pytest.raises(KeyboardInterrupt):
      compare(config, str(tmp_path))
  first = results_of(tmp_path)
  assert len(first) == 1
  config.compare.algorithms = "erm,sam,mixup"  # more is added
  compare(config, str(tmp_path))
  after = results_of(tmp_path)
  assert len(after) == 3
  assert first.items() <= after.items()
  page = (tmp_path / "report.md").read_text()
  assert "one seed: no test" in page
  assert "## Flatness" not in page


def test_another_configuration_is_refused(finished):
  config = make_config("erm,udim", seeds=2)
  config.optim.lr = 1.0
  with pytest.raises(UserError, match=r"optim\.lr: 0\.002 -> 1\.0"):
    compare(config, str(finished))


@pytest.mark.parametrize(
  ("section", "key", "value", "message"),
  [
    ("model", "pretrained", "no.pth", r"model\.pretrained='no\.pth': no such"),
    ("source", "kind", "folder", r"data\.source\.path"),
  ],
)
def test_a_start_that_fails_takes_no_folder(
  tmp_path, section, key, value, message
):
  folder = tmp_path / "mine"
  config = make_config("erm", seeds=1, landscape=False)
  part = config.data.source if section == "source" else config[section]
  part[key] = value
  with pytest.raises(UserError, match=message):
    compare(config, str(folder))
  assert not folder.exists()
  # Nor does one that was stopped before its first run was done.
  folder.mkdir()
  save_config(folder, config)
  compare(make_config("erm", seeds=1, landscape=False), str(folder))
  assert len(results_of(folder)) == 1


def test_a_variant_with_another_meaning_is_refused(tmp_path):
  config = make_config("udim_pen", seeds=1, landscape=False)
  compare(config, str(tmp_path))
  config.compare.variants.udim_pen = ("algorithm=udim",)
  with pytest.raises(UserError, match=r"methods\.udim\.terms"):
    compare(config, str(tmp_path))


def test_tuning_chooses_and_says_so(tmp_path):
  config = make_config("sam,erm", seeds=1, landscape=False)
  config.search.update({"draws": 2, "tuning_seeds": 1})
  compare(config, str(tmp_path))
  chosen = json.loads((tmp_path / "chosen.json").read_text())
  assert set(chosen) == {"sam"}
  scores = [d["tuning_accuracy"] for d in chosen["sam"]["draws"]]
  # The configuration's own settings, draw 0, do not take part.
  draw = chosen["sam"]["chosen"]
  assert draw == 1 + scores.index(max(scores))
  folders = {str(path) for path in results_of(tmp_path)}
  assert f"runs/sam/clean/seed0-draw{draw}" in folders
  assert "runs/erm/clean/seed0" in folders
  assert len(folders) == 4


@pytest.mark.parametrize("process", [0, 1])
def test_process_0_writes_the_choice_and_all_wait_for_it(
  process, tmp_path, monkeypatch
):
  file, waited = tmp_path / "chosen.json", []

  class Finished(Runner):
    def __call__(self, jobs, **_):
      best = {"source": Selected(1, 0.5, 0.5, 0.5, 0.5, None, {})}
      return [
        Result(job.label, job.run, job.seed, job.draw, {}, best, {}, {})
        for job in jobs
      ]

  def wait(what):
    waited.append((what, file.exists()))

  monkeypatch.setattr(jax, "process_index", lambda: process)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "sync_global_devices", wait)
  config = make_config("sam")
  config.search.update({"draws": 2, "tuning_seeds": 1})
  assert tune(config, ["sam"], Finished(tmp_path)) == {"sam": 1}
  assert waited == [("draws chosen", process == 0)]
  assert [*tmp_path.iterdir()] == [file][process:]


def test_the_choice_of_another_comparison(tmp_path):
  config = make_config("sam", seeds=1, landscape=False)
  config.search.update({"draws": 4, "tuning_seeds": 1})
  settings = draw_settings(config, "sam", 3)
  page = {"sam": {"chosen": 3, "draws": [{"draw": 3, "settings": settings}]}}
  path = tmp_path / "chosen.json"
  path.write_text(json.dumps(page))
  config.search.chosen = str(path)
  assert chosen_draws(config) == {"sam": 3}
  compare(config, str(tmp_path / "run"))
  assert [str(p) for p in results_of(tmp_path / "run")] == [
    "runs/sam/clean/seed0-draw3"
  ]
  config.search.seed = 1
  with pytest.raises(UserError, match="draw 3 of 'sam' is another one here"):
    chosen_draws(config)
  path.write_text("{}x")
  with pytest.raises(UserError, match=r"is no chosen\.json"):
    chosen_draws(config)
  path.unlink()
  with pytest.raises(UserError, match="No such file"):
    chosen_draws(config)


def test_every_run_chooses_among_its_own_draws(tmp_path):
  config = make_config("sam", seeds=1, landscape=False)
  config.search.update({"draws": 2})
  compare(config, str(tmp_path))
  results = [Result.load(tmp_path / path) for path in results_of(tmp_path)]
  assert sorted(r.draw for r in results) == [0, 1]
  best = max(results, key=lambda r: (r.selected["source"].criterion, -r.draw))
  page = (tmp_path / "report.md").read_text()
  assert f"{100 * best.selected['source'].target:.1f} ± –" in page


def test_a_draw_that_diverges_counts_as_far_as_it_came(tmp_path):
  config = make_config("sam", seeds=1, landscape=False)
  config.search.shared = (("optim.lr", "choice", 1e30),)
  config.search.draws = 2
  config.evaluation.every = 1
  compare(config, str(tmp_path))
  results = {
    result.draw: result
    for result in map(Result.load, (tmp_path / p for p in results_of(tmp_path)))
  }
  assert results[0].stopped == ""
  assert "step 2" in results[1].stopped or "step 1" in results[1].stopped
  assert "diverged" not in (tmp_path / "report.md").read_text()
  # Started again, it is not tried again.
  compare(config, str(tmp_path))


@pytest.mark.parametrize("label", ["sam", "erm+swad"])
def test_one_that_diverges_before_it_is_evaluated_stops_nothing(
  label, tmp_path
):
  config = make_config("erm,udim_zero", seeds=2, landscape=False)
  config.compare.variants.udim_zero = (f"algorithm={label}", "optim.lr=1e30")
  config.evaluation.every = 4
  compare(config, str(tmp_path))
  result = Result.load(tmp_path / "runs/udim_zero/clean/seed0")
  assert result.selected == {}
  assert result.stopped.startswith("step ")
  page = (tmp_path / "report.md").read_text()
  assert "| udim_zero | – | – |" in page


def test_algorithms_that_compare_domains_are_left_out_of_a_single_one(caplog):
  config = make_config("erm,coral")
  jobs = make_jobs(config, ["erm", "coral"], [0], [0])
  assert [job.label for job in jobs] == ["erm"]
  assert "coral compares source domains: left out" in caplog.text
  config = get_config("digits_rot,smoke")
  jobs = make_jobs(config, ["erm", "coral"], [0], [0])
  assert len(jobs) == 12


def test_corruptions_are_grouped_by_kind():
  assert domain_groups(["blur_1", "blur_5", "photo", "my_set"]) == {
    "blur": ["blur_1", "blur_5"], "photo": ["photo"], "my_set": ["my_set"]
  }  # fmt: skip


def test_help_is_quick_and_shows_the_short_flags():
  command = [sys.executable, "-X", "importtime", "-m", "udim.compare", "-h"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0
  for text in ("--seeds", "--algorithms", compare_lib.EXAMPLE):
    assert text in done.stdout
  assert " jax\n" not in done.stderr


def test_as_a_process(tmp_path):
  command = [
    sys.executable, "-m", "udim.compare", "--config=configs/udim.py:smoke",
    "--seeds=1", "--algorithms=erm,udim", f"--workdir={tmp_path}",
    "--config.num_steps=4", "--config.evaluation.every=2",
    "--config.data.source.corruptions=('blur',)",
    "--config.compare.landscape=false",
  ]  # fmt: skip
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  lines = [x for x in done.stderr.splitlines() if x.startswith("[")]
  assert [line.split()[0] for line in lines] == ["[1/2]", "[2/2]"]
  assert done.stderr.strip().endswith("report.md")
