"""Two real processes and eight devices make the run that one device makes."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest

from common import tree
from common.checkpoint import load_params

OPTIONS = [
  "--config.num_steps=4", "--config.data.token_budget=512",
  "--config.data.lengths=(64,)", "--config.data.source.rows=60",
  "--config.data.source.test_rows=2", "--config.data.source.names=10",
  "--config.vocabulary.size=256", "--config.translation.max_ratio=0.0",
  "--config.translation.modes=()", "--config.evaluation.every=4",
  "--config.checkpoint.every=2", "--config.log.every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(run_processes, tmp_path_factory):
  cache = tmp_path_factory.mktemp("cache")

  def run(workdir, processes, options=(), *, devices=4):
    run_processes(
      [
        "thor.main", "--config=configs/thor.py:smoke",
        f"--workdir={workdir}", f"--config.compile_cache={cache}",
        *OPTIONS, *options,
      ],
      processes,
      devices=devices,
    )  # fmt: skip

  return run


@pytest.fixture(scope="module")
def one(run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("one")
  run(workdir, 1, devices=1)
  return workdir


def metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {
    (line["step"], name): value
    for line in map(json.loads, lines)
    for name, value in line.items()
    if "/" in name and not name.startswith("speed/")
  }


def assert_same_run(expected, found):
  """Equal draws, and losses but for the order of sums."""
  ours, theirs = metrics(expected), metrics(found)
  assert ours.keys() == theirs.keys()
  for (step, name), value in ours.items():
    if name.startswith(("train/experts/", "train/same")):
      assert theirs[step, name] == value, name
    elif name.startswith(("train/", "eval")):
      # Norms of gradients and small differences of passes are less exact.
      rtol = 1e-5 if name.endswith(("/loss", "/ce1", "/ce2")) else 2e-4
      np.testing.assert_allclose(
        theirs[step, name], value, rtol=rtol, atol=1e-5, err_msg=name
      )
  (_, params), (_, others) = [
    load_params(folder / "checkpoints") for folder in (expected, found)
  ]
  # A softmax does not see its keys' biases: their gradients are rounding alone,
  # and Adam makes whole steps of them.
  kept = [tree.mask(own, [r"attention/key/bias$"]) for own in (params, others)]
  params, others = [
    jax.tree.map(lambda leaf, out: leaf * (not out), own, mask)
    for own, mask in zip((params, others), kept)
  ]
  # Elsewhere it divides by the root of small second moments: rounding grows.
  chex.assert_trees_all_close(params, others, rtol=1e-3, atol=2e-4)


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("two")
  run(workdir, 2, ["--config.mesh.fsdp=2"])
  return workdir


def test_two_processes_are_one(one, two):
  assert_same_run(one, two)


def test_one_process_goes_on_where_two_stopped(run, one, two, tmp_path):
  """The data position is one number, and draws are functions of the step."""
  moved = tmp_path / "moved"
  shutil.copytree(two, moved)
  shutil.rmtree(moved / "checkpoints" / "4")
  run(moved, 1, devices=1)
  assert "at step 2" in (moved / "run.log").read_text()
  assert_same_run(one, moved)


def test_eight_devices_are_one(run, one, tmp_path):
  """Rows, experts' hidden units and heads are cut."""
  options = ["--config.mesh.fsdp=2", "--config.mesh.model=2"]
  run(tmp_path, 1, options, devices=8)
  assert_same_run(one, tmp_path)
