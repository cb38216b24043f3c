"""Two real processes make one run, the same as one process makes."""

import json
import shutil

import chex
import numpy as np
import pytest

from common.checkpoint import load_params

OPTIONS = [
  "--config.num_steps=6", "--config.data.sequence_length=64",
  "--config.controller.schedule=2", "--config.controller.warmup_end=2",
  "--config.controller.fit_steps=3", "--config.retrieval.every=3",
  "--config.checkpoint.every=3", "--config.log.every=1",
  # Exploration does not depend on the last bits of the losses; a choice by
  # rank may.
  "--config.controller.explore_first=1.0",
  "--config.controller.explore_start=1.0",
  "--config.controller.explore_floor=1.0",
]  # fmt: skip
TIME = ["--config.mesh.data=1", "--config.mesh.seq=-1",
        "--config.model.seq_axis=seq"]  # fmt: skip


@pytest.fixture(scope="module")
def run(run_processes, tmp_path_factory):
  """`(workdir, processes, options=(), devices=4)`: trains."""
  cache = tmp_path_factory.mktemp("cache")

  def run(workdir, processes, options=(), *, devices=4):
    run_processes(
      [
        "birdie.main", "--config=configs/birdie.py:smoke",
        f"--workdir={workdir}", f"--config.data.cache_dir={cache}/tokens",
        f"--config.compile_cache={cache}/xla", *OPTIONS, *options,
      ],
      processes,
      devices=devices,
    )  # fmt: skip

  return run


@pytest.fixture(scope="module")
def one(run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("one")
  run(workdir, 1)
  return workdir


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("two")
  run(workdir, 2)
  return workdir


def metrics(workdir):
  """(step, name) -> value, of all that does not depend on the clock."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {
    (line["step"], name): value
    for line in map(json.loads, lines)
    for name, value in line.items()
    if "/" in name and not name.startswith("speed/")
  }


def assert_same_run(expected, found):
  """Losses and mixtures, and what follows from them.

  Sums are taken in another order, so losses differ by rounding; rewards are
  third powers of small differences of losses.
  """
  ours, theirs = metrics(expected), metrics(found)
  assert ours.keys() == theirs.keys()
  for key, value in ours.items():
    kind = key[1].partition("/")[0]
    if kind in ("mixture", "mixture_config"):
      assert theirs[key] == value, key
    elif kind in ("eval", "eval_class", "eval_config", "train"):
      np.testing.assert_allclose(
        theirs[key], value, rtol=1e-5, atol=1e-6, err_msg=str(key)
      )
    elif kind == "reward":
      np.testing.assert_allclose(theirs[key], value, atol=1e-3)
  (_, params), (_, others) = (
    load_params(folder / "checkpoints") for folder in (expected, found)
  )
  # Adam divides by the root of small second moments: rounding grows there.
  chex.assert_trees_all_close(params, others, rtol=1e-3, atol=1e-5)


def test_two_processes_are_one(one, two):
  assert_same_run(one, two)


def test_time_may_span_processes(run, one, tmp_path):
  """Both processes then bring the same rows, in training and evaluation."""
  run(tmp_path, 2, TIME)
  assert_same_run(one, tmp_path)


def test_one_process_goes_on_where_two_stopped(run, one, two, tmp_path):
  """The data position is one number, whoever goes on from it."""
  moved = tmp_path / "moved"
  shutil.copytree(two, moved)
  shutil.rmtree(moved / "checkpoints" / "6")
  run(moved, 1)
  assert_same_run(one, moved)


def test_eight_devices_are_four(run, one, tmp_path):
  """On a mesh of rows, parameters and channels."""
  options = [f"--config.mesh.{axis}=2" for axis in ("fsdp", "model")]
  run(tmp_path, 1, options, devices=8)
  assert_same_run(one, tmp_path)
