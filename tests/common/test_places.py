"""A folder holds a run or a comparison: neither overwrites the other."""

import contextlib
import errno
import fcntl
import importlib
import pathlib
import shutil

import pytest
from ml_collections import ConfigDict

from common.comparison import run_jobs
from common.errors import UserError
from common.logs import is_logged_to, logging_to
from common.places import (
  check_holds_no_comparison,
  check_holds_no_run,
  is_taken,
  take,
  taken,
  taken_when_used,
)
from common.workdir import Workdir

RUNS = ("metrics.jsonl", "checkpoints/4/state")
COMPARISONS = (
  "runs/ntp/seed0/train/config.json",
  "runs/erm/targets=a/seed0/result.json",
)


def fill(folder, name, text="old"):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  (folder / "config.json").write_text("kept")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_no_place_for_a_comparison(tmp_path, name, one_line):
  fill(tmp_path, name)
  said = one_line(
    run_jobs, ConfigDict({"seed": 0}), str(tmp_path), [], free=(),
    kept=None, run=None, describe=None, write_page=None,
  )  # fmt: skip
  assert "holds a run" in said
  assert "choose another --workdir" in said
  assert (tmp_path / "config.json").read_text() == "kept"


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_is_no_place_for_a_run(tmp_path, name, one_line):
  fill(tmp_path, name)
  said = one_line(Workdir, tmp_path, ConfigDict({"seed": 0}))
  assert "holds a comparison" in said
  assert (tmp_path / "config.json").read_text() == "kept"


@pytest.mark.parametrize("project", ["birdie", "slimsam", "thor", "udim"])
@pytest.mark.parametrize("name", RUNS)
def test_every_project_refuses(project, name, tmp_path, one_line):
  fill(tmp_path, name)
  file = pathlib.Path(f"configs/{project}.py")
  variant = {"udim": "smoke", "slimsam": "smoke"}.get(project, "small")
  module = importlib.import_module(f"configs.{file.stem}")
  config = module.get_config(variant)
  compare = importlib.import_module(f"{project}.compare").compare
  assert "holds a run" in one_line(compare, config, str(tmp_path))
  assert (tmp_path / "config.json").read_text() == "kept"


@pytest.mark.parametrize("name", RUNS)
def test_what_slimsam_leaves_is_a_run(tmp_path, name, one_line):
  """Each of its trainings has a folder below the run's."""
  from configs.slimsam import get_config
  from slimsam.compare import compare

  fill(tmp_path, f"teacher/{name}")
  said = one_line(compare, get_config("smoke"), str(tmp_path))
  assert "holds a run" in said


def test_what_is_empty_or_new_is_nobodys(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "metrics.jsonl").write_text("")
  (tmp_path / "runs").mkdir()
  for folder in (tmp_path, tmp_path / "new"):
    check_holds_no_run(folder)
    check_holds_no_comparison(folder)


@pytest.mark.parametrize(
  ("before", "made", "after"),
  [
    (None, ["run.log"], None),
    (None, [], None),
    (None, ["run.log", "config.json"], ["config.json", "run.log"]),
    ([], ["run.log"], []),
    (["notes"], ["run.log"], ["notes", "run.log"]),
    (["run.log"], [], ["run.log"]),
    (None, [".lock", "run.log"], None),
    ([".lock"], [], [".lock"]),
  ],
)
def test_a_start_that_is_refused_leaves_no_log(
  tmp_path, before, made, after, one_line
):
  folder = tmp_path / "run"
  if before is not None:
    folder.mkdir()
    for name in before:
      (folder / name).touch()

  def start():
    with taken_when_used(str(folder)):
      folder.mkdir(exist_ok=True)
      for name in made:
        (folder / name).touch()
      raise UserError("no")

  one_line(start)
  found = sorted(p.name for p in folder.iterdir()) if folder.exists() else None
  assert found == after


@pytest.mark.parametrize("had_folder", [False, True])
@pytest.mark.parametrize("is_at_work", [False, True])
def test_a_start_that_is_refused_leaves_a_run_that_has_begun_meanwhile(
  tmp_path, had_folder, is_at_work, one_line
):
  folder = tmp_path / "run"
  if had_folder:
    folder.mkdir()
  with contextlib.ExitStack() as run:

    def start():
      with taken_when_used(str(folder)):
        folder.mkdir(exist_ok=True)
        run.enter_context(logging_to(str(folder), own=set()))
        if is_at_work:
          run.enter_context(taken(folder))
        raise UserError("no")

    one_line(start)
    assert is_taken(folder) == is_at_work
    assert (folder / "run.log").exists()
    with taken(folder) if not is_at_work else contextlib.nullcontext():
      assert "a run is at work" in one_line(take, folder)


def test_a_lock_that_was_removed_is_none(tmp_path, one_line, monkeypatch):
  """A start that is refused removes folder and lock between open and lock."""
  folder, lock = tmp_path / "run", fcntl.flock
  removed = []

  def remove_first(file, how):
    if not removed:
      removed.append(folder)
      shutil.rmtree(folder)
    lock(file, how)

  monkeypatch.setattr(fcntl, "flock", remove_first)
  with taken(folder):
    assert removed
    assert "a run is at work" in one_line(take, folder)


def test_a_log_needs_no_folder(tmp_path):
  with logging_to(str(tmp_path / "run"), own=set()):
    assert is_logged_to(str(tmp_path / "run"))
  assert not is_logged_to(str(tmp_path / "run"))


def test_one_run_at_a_time_holds_a_folder(tmp_path, one_line):
  folder = tmp_path / "run"
  assert not is_taken(folder)

  def start():
    with taken(folder):
      raise AssertionError("two runs")

  with taken(folder):
    assert is_taken(folder)
    assert f"a run is at work in {folder}" in one_line(start)
  assert not is_taken(folder)
  with taken(folder):
    pass


def test_a_file_system_without_locks_is_a_warning(
  tmp_path, monkeypatch, caplog
):
  def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr("fcntl.flock", refuse)
  for _ in range(2):
    with taken(tmp_path):
      assert not is_taken(tmp_path)
  for line in caplog.messages:
    assert "(No locks available): nothing stops a second run" in line
  assert len(caplog.messages) == 2


def test_a_start_that_goes_well_leaves_its_folder(tmp_path):
  with taken_when_used(str(tmp_path / "run")):
    (tmp_path / "run").mkdir()
  assert (tmp_path / "run").is_dir()
