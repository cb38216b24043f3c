"""What the benchmarks call equal, without running them."""

import importlib
import json
import pathlib
import random
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def load(monkeypatch):
  """`(name)`: a benchmark's module."""
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  return importlib.import_module


def write_run(folder, losses=(1.0,), steps=(4,)):
  folder.mkdir(parents=True)
  lines = [
    json.dumps({"step": i, "time": 0.0, "time_run": 0.0, "train/loss": loss})
    for i, loss in enumerate(losses, start=1)
  ]
  (folder / "metrics.jsonl").write_text("".join(f"{own}\n" for own in lines))
  for step in steps:
    (folder / f"checkpoints/{step}").mkdir(parents=True)
  return folder


def make_trial(hits, folder, straight):
  facts = hits.Straight(straight, 1.0, 1.0, 1)
  return hits.Trial(None, folder, facts, random.Random(0))


@pytest.mark.parametrize(
  "run", [None, {"losses": ()}, {"steps": ()}], ids=["gone", "empty", "unsaved"]
)
def test_nothing_is_equal_to_a_run_that_is_not_there(load, tmp_path, run):
  hits, faults = load("faults_hits"), load("faults")
  straight = tmp_path / "straight"
  if run is not None:
    write_run(straight, **run)
  found = write_run(tmp_path / "trial", **(run or {}))
  with pytest.raises(hits.Wrong):
    faults.difference(straight, found)
  with pytest.raises(hits.Wrong):
    make_trial(hits, found, straight).is_finished()


def test_a_run_that_is_there_is_compared(load, tmp_path):
  hits, faults = load("faults_hits"), load("faults")
  straight = write_run(tmp_path / "straight")
  same = write_run(tmp_path / "same")
  other = write_run(tmp_path / "other", losses=(2.0,), steps=(2,))
  assert make_trial(hits, same, straight).is_finished()
  assert not make_trial(hits, other, straight).is_finished()
  assert faults.difference(straight, other) == "metrics.jsonl, line 1"


@pytest.fixture
def straight(load, tmp_path, monkeypatch):
  """`(commit, *answers)`: the note on the run that nothing hits, and how often
  it ran; an answer is what a process says as it fails, None for none.
  """
  faults, ran = load("faults"), []
  subject = faults.Subject("toy x 1", (), 1)
  monkeypatch.setattr(faults, "Running", lambda *_: Said(ran, tmp_path))

  class Said:
    is_alive, has_joined = False, True

    def __init__(self, ran, workdir):
      ran.append(workdir)
      self.answer = Said.answers.pop(0) if Said.answers else None
      write_run(workdir / "toy_x_1")

    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

    def wait(self):
      return [0 if self.answer is None else 1]

    def steps(self):
      return 1

    def lines(self):
      return [self.answer or "", "the last line"]

    def last_line(self):
      return self.lines()[-1]

  def call(commit, *answers):
    ran.clear()
    Said.answers = list(answers)
    faults._straight(tmp_path, subject, commit)
    return json.loads((tmp_path / "toy_x_1.json").read_text()), len(ran)

  return call


LATE = (
  "jax.errors.JaxRuntimeError: UNKNOWN: Gloo context initialization failed: "
  "DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cpu:gloo/0,1/1"
)


def test_a_peer_that_is_late_is_tried_again_and_noted(load, straight):
  assert straight("a", LATE, LATE)[0]["compile_tries"] == 3
  with pytest.raises(load("faults").Late):
    straight("b", LATE, LATE, LATE)


@pytest.mark.parametrize("answer", ["", "Gloo all-reduce failed: closed"])
def test_what_else_fails_without_a_hit_is_wrong(load, straight, answer):
  with pytest.raises(load("faults_hits").Wrong, match="the last line"):
    straight("a", answer)


def test_the_run_that_nothing_hits_is_kept_while_it_is_whole(
  straight, tmp_path
):
  assert straight("a")[1] == 2  # one compiles, and one is kept
  assert straight("a")[1] == 0
  assert straight("b")[1] == 2
  (tmp_path / "toy_x_1/metrics.jsonl").unlink()  # and its note is left
  assert straight("b")[1] == 2


def test_two_changed_trees_have_two_names(load, tmp_path, monkeypatch):
  monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
  commit_of = load("faults").commit_of

  def git(*arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(
      ["git", *identity, *arguments],
      cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip

  assert commit_of(tmp_path) == "unknown"
  git("init")
  file = tmp_path / "a.py"
  file.write_text("1")
  git("add", ".")
  git("commit", "-m", "first")
  (tmp_path / "notes.txt").write_text("what runs leave")
  names = [commit_of(tmp_path)]
  for content in ("2", "3"):
    file.write_text(content)
    names.append(commit_of(tmp_path))
  (tmp_path / "new.py").write_text("4")
  names.append(commit_of(tmp_path))
  assert len(set(names)) == 4
  assert [name.startswith(f"{names[0]}-dirty-") for name in names] == [
    False, True, True, True,
  ]  # fmt: skip
  git("checkout", "a.py")
  (tmp_path / "new.py").unlink()
  assert commit_of(tmp_path) == names[0]


def test_losses_of_other_processes_differ_by_their_share(load, tmp_path):
  processes = load("processes")
  one = write_run(tmp_path / "1x8", losses=(2.0, 1e-4, None))
  same = write_run(tmp_path / "2x8", losses=(2.0, 1e-4, None))
  near = write_run(tmp_path / "4x8", losses=(2.5, 1e-4, None))
  lost = write_run(tmp_path / "moved", losses=(2.0, None, None))
  assert processes._difference(one, same) == (0.0, "", 2)
  assert processes._difference(one, near)[:2] == (
    0.25, "train/loss at step 1 of metrics.jsonl",
  )  # fmt: skip
  assert processes._difference(one, lost)[0] == float("inf")
  # Below the floor, which the page names, losses count as they are.
  assert processes._relative(1e-4, 2e-4) == pytest.approx(0.1)
  assert "1e-3" in processes.__doc__


def test_runs_without_a_finite_loss_are_not_equal(load, tmp_path):
  processes = load("processes")
  runs = [write_run(tmp_path / name, losses=(None,)) for name in ("a", "b")]
  with pytest.raises(SystemExit, match="no loss that is finite"):
    processes._difference(*runs)
