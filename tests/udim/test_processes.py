"""Two real processes make the run and the comparison that one makes."""

import json

import chex
import numpy as np
import pytest

from common.checkpoint import load_params
from udim.results import Result

OPTIONS = [
  "--config.num_steps=6", "--config.evaluation.every=2", "--config.log.every=2",
  "--config.data.source.corruptions=('blur',)",
  "--config.compare.algorithms=udim", "--config.compare.seeds=1",
  "--config.compare.landscape_images=64",
  "--config.methods.udim.warm_up_percent=50",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(run_processes, tmp_path_factory):
  """`(workdir, variant, processes)`: four devices, dealt out to them."""
  cache = tmp_path_factory.mktemp("xla")

  def run(workdir, variant, processes):
    run_processes(
      [
        "udim.main", f"--config=configs/udim.py:{variant}",
        f"--workdir={workdir}", f"--config.compile_cache={cache}", *OPTIONS,
      ],
      processes,
    )  # fmt: skip

  return run


def metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {
    (line["step"], name): value
    for line in map(json.loads, lines)
    for name, value in line.items()
    if "/" in name and not name.startswith("speed/")
  }


def test_a_training(run, tmp_path):
  run(tmp_path / "one", "train,smoke", 1)
  run(tmp_path / "two", "train,smoke", 2)
  ours, theirs = metrics(tmp_path / "one"), metrics(tmp_path / "two")
  assert ours.keys() == theirs.keys()
  for key, value in ours.items():
    # Sums in another order; an accuracy moves by whole images.
    atol = 0.01 if "accuracy" in key[1] else 1e-5
    rtol = 1e-5 if key[1].endswith("/loss") else 1e-4
    np.testing.assert_allclose(
      theirs[key], value, rtol=rtol, atol=atol, err_msg=str(key)
    )
  one, two = (load_params(tmp_path / w / "checkpoints") for w in ("one", "two"))
  assert one[0] == two[0]
  chex.assert_trees_all_close(one[1], two[1], atol=2e-4, rtol=0)


def test_a_comparison(run, tmp_path):
  run(tmp_path, "smoke", 2)
  result = Result.load(tmp_path / "runs/udim/clean/seed0")
  assert len(result.landscape["gap_target"]) == 4
  assert "| udim |" in (tmp_path / "report.md").read_text()
