"""Two real processes make one run, the same as one process makes."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import chex
import numpy as np
import pytest

from common.checkpoint import load_params

ROOT = pathlib.Path(__file__).parents[2]
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


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def run(workdir, cache, processes, options=(), *, devices=4):
  """Trains on devices that are dealt out to the processes."""
  command = [
    sys.executable, "-m", "birdie.main", "--config=configs/birdie.py:smoke",
    f"--workdir={workdir}", f"--config.data.cache_dir={cache}/tokens",
    f"--config.compile_cache={cache}/xla", *OPTIONS, *options,
  ]  # fmt: skip
  port = free_port()
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices // processes),
  }
  started = []
  for i in range(processes):
    place = [f"--coordinator=127.0.0.1:{port}", f"--process_id={i}"]
    place.append(f"--num_processes={processes}")
    started.append(
      subprocess.Popen(
        [*command, *(place if processes > 1 else [])],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  try:
    errors = [process.communicate(timeout=600)[1] for process in started]
  finally:
    for process in started:
      process.kill()
  for process, text in zip(started, errors, strict=True):
    assert process.returncode == 0, text[-3000:]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one(cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("one")
  run(workdir, cache, 1)
  return workdir


@pytest.fixture(scope="module")
def two(cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("two")
  run(workdir, cache, 2)
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


def test_time_may_span_processes(one, cache, tmp_path):
  """Both processes then bring the same rows, in training and evaluation."""
  run(tmp_path, cache, 2, TIME)
  assert_same_run(one, tmp_path)


def test_one_process_goes_on_where_two_stopped(one, two, cache, tmp_path):
  """The data position is one number, whoever goes on from it."""
  moved = tmp_path / "moved"
  shutil.copytree(two, moved)
  shutil.rmtree(moved / "checkpoints" / "6")
  run(moved, cache, 1)
  assert_same_run(one, moved)


def test_eight_devices_are_one(one, cache, tmp_path):
  """On a mesh of rows, parameters and channels, and on a single device."""
  for devices, mesh in [(1, []), (8, ["fsdp", "model"])]:
    workdir = tmp_path / str(devices)
    options = [f"--config.mesh.{axis}=2" for axis in mesh]
    run(workdir, cache, 1, options, devices=devices)
    assert_same_run(one, workdir)
