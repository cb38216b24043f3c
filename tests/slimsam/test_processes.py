"""Two real processes of four devices make the run that one with eight makes."""

import json

import jax
import numpy as np
import pytest

from configs.slimsam import get_config
from slimsam import weights
from slimsam.train import train_and_evaluate

# Adam would make whole steps of gradients that are nothing but rounding.
OPTIONS = {
  "compile_cache": "", "export": ("native",), "log.every": 1,
  "teacher.depth": 1, "teacher.global_blocks": (), "teacher.prompts": 1,
  "teacher.num_steps": 2, "teacher.every": 2, "teacher.optim.name": "sgd",
  "teacher.optim.lr": 0.05, "teacher.optim.schedule": "constant",
  "teacher.optim.warmup_steps": 0, "data.source.length": 16,
  "data.source.valid.length": 2, "evaluation.images": 2,
  "evaluation.prompts": ("point",), "evaluation.choices": ("single",),
  "distill.stages": ("one_step",), "distill.epochs": 1,
  "distill.optim.name": "sgd", "distill.optim.lr": 0.1,
}  # fmt: skip
# Each process holds a half of what the rules cut, and of each batch.
MESH = {"mesh.data": 1, "mesh.fsdp": 8}
TRAININGS = ("teacher", "one_step")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """This process, with whole parameters on each device."""
  folder = tmp_path_factory.mktemp("one")
  config = get_config("smoke")
  config.update_from_flattened_dict(OPTIONS)
  train_and_evaluate(config, folder)
  return folder


@pytest.fixture(scope="module")
def two(run_processes, tmp_path_factory):
  folder = tmp_path_factory.mktemp("two")
  options = [f"--config.{k}={v}" for k, v in (OPTIONS | MESH).items()]
  run_processes(
    [
      "slimsam.main", "--config=configs/slimsam.py:smoke",
      f"--workdir={folder}", *options,
    ],
    2,
    devices=8,
  )  # fmt: skip
  return folder


def lines_of(folder, training):
  """What was measured, line by line, but for the clock."""
  text = (folder / training / "metrics.jsonl").read_text()
  return [
    {
      name: value
      for name, value in json.loads(line).items()
      if not name.startswith(("time", "speed/"))
    }
    for line in text.splitlines()
  ]


@pytest.mark.parametrize("training", TRAININGS)
def test_metrics_are_the_same(one, two, training):
  """Of each update: the same images, prompts and steps. Written once."""
  ours, theirs = lines_of(one, training), lines_of(two, training)
  assert [list(line) for line in theirs] == [list(line) for line in ours]
  assert {line["step"] for line in ours} == {1, 2}
  for line, other in zip(ours, theirs):
    for name, value in line.items():
      # A pixel at the threshold may fall on either side.
      atol = 0.01 if "iou" in name else 1e-6
      np.testing.assert_allclose(
        other[name], value, rtol=1e-5, atol=atol, err_msg=name
      )


def test_the_same_units_stay(one, two):
  ours, theirs = [
    json.loads((folder / "one_step" / "keep.json").read_text())
    for folder in (one, two)
  ]
  assert ours == theirs
  assert {name: len(units) for name, units in ours.items()} == {
    "embedding": 8, "qkv/0": 4, "mlp/0": 16
  }  # fmt: skip


def test_models_are_the_same(one, two):
  """The teacher, the slimmed one, and what the run leaves."""
  for name in (*[f"{training}/model" for training in TRAININGS], "model"):
    (ours, settings), (theirs, found) = [
      weights.load_model(folder / name) for folder in (one, two)
    ]
    assert settings == found

    def same(path, leaf, other):
      scale = np.abs(leaf).max()
      np.testing.assert_allclose(
        other, leaf, rtol=0, atol=1e-5 * scale, err_msg=str(path)
      )

    jax.tree_util.tree_map_with_path(same, ours, theirs)
    assert settings.encoder.width == (16 if name == "teacher/model" else 8)


APART = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from common import workdir
from common.errors import UserError
from configs.slimsam import get_config
from slimsam.train import train_and_evaluate

workdir.SEEN_SECONDS = 1.0
config = get_config("smoke")
config.teacher.path = "FOLDER/teacher"
config.distill.cache_targets = True
try:
  train_and_evaluate(config, f"FOLDER/host{sys.argv[2]}")
except UserError as error:
  assert "is not one folder for all: processes 1 do not" in str(error), error
else:
  raise AssertionError("was not refused")
"""


def test_folders_that_are_not_shared_are_refused_before_anything_is_made(
  run_script_twice, tmp_path
):
  """Kept targets, of which process 0 writes those that all read, come before
  the first training.
  """
  run_script_twice(APART.replace("FOLDER", str(tmp_path)))
  assert {file.name for file in tmp_path.rglob("*")} <= {"host0", ".lock"}


def test_one_process_writes(one, two):
  """The files of a run, and nothing beside them."""

  def names(folder):
    found = (file.relative_to(folder) for file in folder.rglob("*"))
    return {
      str(name)
      for name in found
      if "checkpoints" not in name.parts[:-1] and name.name != "run.log"
    }

  assert names(two) == names(one)
  lines = (two / "run.log").read_text().splitlines()
  assert sum("report: " in line for line in lines) == 1
