"""The command that judges models on disk."""

import json

import pytest

from common.errors import UserError
from slimsam import evaluate
from slimsam.weights import save_model


@pytest.fixture(scope="module")
def models(tiny, draw, tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  for seed in (0, 1):
    save_model(folder / str(seed), draw(tiny, seed), tiny)
  return str(folder / "0"), str(folder / "1")


@pytest.fixture
def command(monkeypatch, capsys):
  def run(*arguments):
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    evaluate.main()
    return capsys.readouterr().out

  return run


def test_models_are_judged_by_truth_and_teacher(command, models):
  pytest.importorskip("skimage")
  flags = ("--data=composite", "--images=2", "--size=40", "--prompts=point,box")
  flags += ("--choices=single,oracle", f"--teacher={models[0]}")
  found = json.loads(command(*models, *flags, "--json"))
  assert list(found) == list(models)
  names = {
    "gt/point/single", "gt/point/oracle", "gt/box/single", "gt/box/oracle",
    "teacher/point/single", "teacher/box/single",
  }  # fmt: skip
  for own in found.values():
    assert set(own["miou"]) == names
    assert own["images"] == 2
    for one in own["miou"].values():
      low, high = one["interval"]
      assert 0 <= low <= one["mean"] <= high <= 1
  assert found[models[0]]["miou"]["teacher/box/single"]["mean"] == 1
  page = command(models[0], *flags)
  assert page.startswith(f"{models[0]}: 2 images")
  assert page.count("\n") == 3 + len(names)


def test_mistakes_are_one_line(command, models):
  for flags, message in (
    (("--data=coco",), "needs data.source.images_dir"),
    (("--data=sa1", "--path=x"), "did you mean 'sa1b'"),
    (("--data=composite", "--images=0"), "have no end"),
    (("--data=composite", "--images=-1"), "--images=-1 must be at least 0"),
    (("--data=composite", "--start=3"), "--start is not for --data=composite"),
    (("--data=coco", "--path=x"), "--path is not for --data=coco"),
    (("--data=sa1b", "--path=.", "--on_error=ignore"), "on_error='ignore'"),
  ):
    with pytest.raises(UserError, match=message) as error:
      command(models[0], *flags)
    assert "\n" not in str(error.value)
