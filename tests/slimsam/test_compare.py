"""Comparisons: jobs, resumed, added to, shared, written down, judged."""

import contextlib
import json
import pathlib
import threading

import numpy as np
import pytest

from common.config import save_config
from common.parallel import to_host
from configs.slimsam import get_config
from slimsam import compare as compare_lib
from slimsam import comparison, train
from slimsam.compare import Result, check, compare, held, held_out, make_jobs
from slimsam.select import kept_width

HERE = pathlib.Path("folder")


def config_of(systems="alternate, one_step", seeds=3, **changes):
  config = get_config("smoke")
  config.compare.update({"systems": systems, "seeds": seeds, **changes})
  return config


def scores_of(value):
  names = ("gt/point/single", "gt/box/single", "gt/point/oracle",
           "teacher/point/single", "teacher/box/single")  # fmt: skip
  return {f"miou/{name}": value for name in names} | {"mse": 0.1 - value / 10}


# What the jobs below reach, in tenths of a percent for each seed.
QUALITY = {
  "teacher": (900, 910, 920), "alternate": (700, 710, 720),
  "one_step": (600, 611, 621), "ratio_80": (500, 500, 530),
  "one_step_80": (520, 480, 500), "magnitude": (700, 710, 720),
  "global": (650, 662, 670),
}  # fmt: skip


@contextlib.contextmanager
def faked():
  """Jobs that know what they reach; which of them ran."""
  ran = []

  def run_job(folder, job, config):
    ran.append((job.system, job.seed))
    path = folder / job.folder
    value = QUALITY[job.system][job.seed] / 1000
    scores, pruned = scores_of(value), {"step_1": scores_of(value / 2)}
    if job.system == "teacher":
      scores, pruned = {k: v for k, v in scores.items() if "gt" in k}, {}
    ratio = job.config.prune.ratio
    left = round(100 * (1 - ratio))
    result = Result(
      job.system, job.seed, ratio, 40, 90.0, [[left], [8, 12], [16]],
      1000 * left, 20_000 * left, 30_000 * left, scores, pruned,
    )  # fmt: skip
    save_config(path, job.config)
    result.save(path)
    return result

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compare_lib, "run_job", run_job)
    patch.setattr(comparison, "draw_masks", lambda *_: None)
    yield ran


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A comparison that has finished."""
  folder = tmp_path_factory.mktemp("compared")
  systems = ", ".join(name for name in QUALITY if name != "teacher")
  with faked():
    compare(config_of(systems), str(folder))
  return folder


@pytest.fixture
def page(folder):
  return (folder / "report.md").read_text()


def rows_of(page, heading):
  section = page[page.index(heading) :].partition("\n## ")[0]
  lines = [line for line in section.splitlines() if line.startswith("| ")]
  return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_every_system_of_a_seed_slims_the_same_teacher():
  jobs = make_jobs(config_of(seeds=2), HERE)
  assert [(job.system, job.seed) for job in jobs] == [
    ("teacher", 0), ("alternate", 0), ("one_step", 0),
    ("teacher", 1), ("alternate", 1), ("one_step", 1),
  ]  # fmt: skip
  for job in jobs:
    own = f"folder/runs/teacher/seed{job.seed}/teacher/model"
    assert job.config.teacher.path == ("" if job.system == "teacher" else own)
    assert job.config.seed == job.seed
    assert "compare" not in job.config  # what may change when it goes on
  given = config_of(seeds=1)
  given.teacher.path = "sam.pth"
  assert {job.config.teacher.path for job in make_jobs(given, HERE)} == {
    "sam.pth"
  }


@pytest.fixture(scope="module")
def small():
  """The comparison that is meant to be run, and its jobs with one seed."""
  config = get_config("small")
  config.compare.seeds = 1
  return config, make_jobs(config, HERE)


def test_systems_differ_as_they_say(small):
  config, made = small
  jobs = {job.system: job.config for job in made}
  assert set(jobs) == {"teacher", *config.compare.settings}
  alternate = jobs["alternate"]
  one_step = jobs["one_step"]
  assert one_step.distill.stages == ("one_step",)
  assert one_step.distill.epochs == 2 * alternate.distill.epochs
  assert jobs["one_step_80"].prune.ratio == 0.8
  # As the variants of the configuration do.
  for name in ("paper", "reference"):
    variant = get_config(f"small,{name}")
    assert jobs[name].distill == variant.distill
    assert jobs[name].prune == variant.prune


def test_every_ratio_leaves_something(small):
  config, jobs = small
  check(config, jobs)
  ratios = sorted({job.config.prune.ratio for job in jobs})
  assert ratios == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
  widths = [kept_width(48, ratio, 4) for ratio in ratios]
  assert widths == [32, 28, 24, 16, 12, 8, 4]


def test_tests_are_on_images_that_chose_nothing():
  """Smoke: checkpoints are chosen by images 0 to 5, four others test."""
  found = held_out(config_of(), 9)
  assert [sample.name for sample in found] == [
    f"composite_{i}" for i in (6, 7, 8, 9)
  ]


def test_the_page_has_scores_and_work(page):
  rows = rows_of(page, "## Test images")
  assert [row[0] for row in rows[1:]] == [
    "`teacher`", "`alternate`", "`one_step`", "`ratio_80`", "`one_step_80`",
    "`magnitude`", "`global`",
  ]  # fmt: skip
  # 70, 71, 72 % : a t-interval of 4.303 / sqrt(3).
  assert rows[2][1:5] == ["71.0 ± 2.5"] * 4
  assert rows[2][6:] == [
    "0.0290 ± 0.0025", "–", "3", "50,000", "1.00", "1.50", "1.5",
  ]  # fmt: skip
  assert rows[3][7] == "-9.9 ± 0.1"
  assert rows[1][4:8] == ["–"] * 4  # a teacher is not compared with itself


def test_claims_are_paired_tests(page):
  rows = rows_of(page, "## What holds")
  by_truth, by_error = rows[1:5], rows[11:15]
  assert [(row[1], row[3], row[5]) for row in by_truth] == [
    ("`alternate`, `one_step`", "3 of 3", "holds"),
    ("`ratio_80`, `one_step_80`", "2 of 3", "not shown"),
    ("`alternate`, `magnitude`", "0 of 3", "not shown"),
    ("`global`, `alternate`", "0 of 3", "the opposite holds"),
  ]
  assert by_truth[0][2] == "+9.9 ± 0.1"
  # Less error is better, and the difference keeps its sign.
  assert by_error[0][2:4] == ["-0.0099 ± 0.0001", "3 of 3"]
  assert by_error[0][5] == "holds"
  # p of a t-test with 2 degrees of freedom, times as many claims are as sure.
  t = np.mean([0.1, 0.099, 0.099]) / (np.std([0.1, 0.099, 0.099], ddof=1))
  p = 1 - 1 / np.sqrt(1 + 2 / (3 * t**2))
  assert by_truth[0][4] == f"{4 * p:.2g}"


def test_ratios_are_drawn_and_written_down(folder, page):
  rows = rows_of(page, "## Ratios")
  assert [row[:5] for row in rows[1:4]] == [
    ["teacher", "–", "50", "8–12", "16"],
    ["alternate", "50 %", "50", "8–12", "16"],
    ["alternate", "80 %", "20", "8–12", "16"],
  ]
  # Systems of one ratio are no curve.
  assert [row[0] for row in rows[4:]] == ["one_step", "one_step"]
  assert "![Mean IoU against work](plots/macs.png)" in page
  png = (folder / "plots" / "macs.png").read_bytes()
  assert png.startswith(b"\x89PNG")


def test_the_page_says_what_pruning_alone_leaves(page):
  rows = rows_of(page, "## Right after pruning")
  assert rows[1][:3] == ["`alternate`", "step_1", "35.5 ± 1.2"]
  assert "`teacher`" not in [row[0] for row in rows]


@pytest.fixture
def ran():
  with faked() as ran:
    yield ran


def test_what_has_finished_is_kept_and_added_to(ran, tmp_path):
  compare(config_of("one_step", seeds=1), str(tmp_path))
  # The folder may move: the teacher's path is another then.
  moved = tmp_path.rename(tmp_path.with_name("moved"))
  compare(config_of("one_step, global", seeds=2), str(moved))
  assert ran == [
    ("teacher", 0), ("one_step", 0),
    ("global", 0), ("teacher", 1), ("one_step", 1), ("global", 1),
  ]  # fmt: skip
  # What another command made is on this one's page.
  compare(config_of("alternate", seeds=1), str(moved))
  rows = rows_of((moved / "report.md").read_text(), "## Test images")
  assert [(row[0], row[8]) for row in rows[1:]] == [
    ("`teacher`", "2"), ("`alternate`", "1"), ("`global`", "2"),
    ("`one_step`", "2"),
  ]  # fmt: skip


@pytest.mark.parametrize("key", ["prune.ratio", "compare.test_images"])
def test_another_configuration_is_refused(folder, key, one_line):
  config = config_of("alternate", seeds=1)
  section, _, name = key.partition(".")
  config[section][name] = {"ratio": 0.25, "test_images": 3}[name]
  assert f"{key}: " in one_line(compare, config, str(folder))


def test_a_system_with_other_settings_is_refused(folder, one_line):
  config = config_of("ratio_80", seeds=1)
  config.compare.settings.ratio_80 = ("prune.ratio=0.75",)
  message = one_line(compare, config, str(folder))
  assert "runs/ratio_80/seed0" in message
  assert "prune.ratio: 0.8 -> 0.75" in message


def test_two_commands_share_a_folder(tmp_path):
  """What one is at, the other waits for; it sees the end of it."""
  seen, inside = [], threading.Event()

  def second():
    inside.wait()
    with held(tmp_path):
      seen.append("second")

  thread = threading.Thread(target=second)
  thread.start()
  with held(tmp_path):
    inside.set()
    thread.join(0.2)
    seen.append("first")
  thread.join()
  assert seen == ["first", "second"]


def test_a_damaged_result_says_what_to_do(tmp_path, one_line):
  (tmp_path / "result.json").write_text("{")
  assert "delete it" in one_line(Result.load, tmp_path)


MISTAKES = [
  ({"systems": "one_step, alternat"}, "did you mean 'alternate'"),
  ({"systems": " , "}, "name at least one"),
  ({"seeds": 0}, "compare.seeds=0 must be at least 1"),
  ({"test_images": 0}, "compare.test_images=0 must be at least 1"),
  ({"baseline": "nosuch"}, "compare.baseline='nosuch'"),
  ({"test_images": 5}, "of 10 validation images the first 6 choose"),
  ({"systems": "ratio_90"}, "ratio_90: ratio=0.9 leaves nothing of a width"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes(changes, message, tmp_path, one_line):
  """Before anything is trained, or written."""
  assert message in one_line(compare, config_of(**changes), str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_images_that_all_choose_leave_none_to_test_on(one_line):
  config = config_of()
  config.evaluation.images = 0
  assert "the first 10 choose checkpoints" in one_line(held_out, config, 0)


@pytest.fixture
def real(tmp_path, monkeypatch):
  """A teacher and a student whose trainings change nothing."""
  made = {}

  def fit(config, folder, part):
    made[folder] = to_host(part.create().params)
    (folder / "checkpoints").mkdir(parents=True)
    line = {"step": part.num_steps, "time_run": 30.0,
            part.best: 0.5}  # fmt: skip
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")

  monkeypatch.setattr(train, "fit", fit)
  monkeypatch.setattr(train, "best_params", lambda path, _: (0, made[path]))
  config = config_of("magnitude", seeds=1, test_images=2, pictures=1)
  config.teacher.update({"depth": 1, "global_blocks": (0,)})
  config.evaluation.update({"images": 1, "prompts": ("point", "box")})
  compare(config, str(tmp_path))
  return tmp_path


def test_a_comparison_from_end_to_end(real):
  teacher, student = (
    Result.load(real / f"runs/{name}/seed0")
    for name in ("teacher", "magnitude")
  )
  assert teacher.widths == [[16], [16], [32]]
  assert set(teacher.scores) == {
    f"miou/gt/{name}"
    for name in ("point/single", "point/oracle", "box/single", "box/oracle")
  }
  assert (student.widths, student.ratio) == ([[8], [8], [16]], 0.5)
  assert student.params < teacher.params
  assert student.macs_true < teacher.macs_true
  # Two stages of three epochs, two updates each.
  assert (student.steps, student.seconds) == (12, 60.0)
  # What training has not changed is what pruning left.
  assert list(student.pruned) == ["step_1", "step_2"]
  assert student.pruned["step_2"] == student.scores
  assert student.pruned["step_1"]["mse"] != student.scores["mse"]
  assert student.scores["mse"] > 0
  assert not list(real.glob("runs/*/*/*/checkpoints"))
  page = (real / "report.md").read_text()
  assert "![Masks side by side](plots/masks.png)" in page
  assert (real / "plots" / "masks.png").exists()
