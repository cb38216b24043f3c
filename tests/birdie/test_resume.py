"""A run killed at any moment and started again equals the straight one."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from common.checkpoint import load_params
from configs.birdie import get_config

ROOT = pathlib.Path(__file__).parents[2]
# What depends on the clock, not on the run.
CLOCK = ("time", "seconds", "speed/")


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  config = get_config("smoke")
  config.num_steps = 6
  config.data.sequence_length = 64
  config.data.cache_dir = str(tmp_path_factory.mktemp("tokens"))
  config.compile_cache = ""
  config.controller.schedule = "2"
  config.controller.warmup_end = 2
  config.controller.num_candidates = 32
  config.controller.fit_steps = 3
  config.retrieval.every = 3
  config.checkpoint.every = 2
  config.checkpoint.keep = 9
  config.log.every = 4
  return config


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
  from birdie.train import train_and_evaluate

  workdir = tmp_path_factory.mktemp("straight")
  train_and_evaluate(config, str(workdir))
  return workdir


def metrics(workdir):
  """Every line but what the clock wrote, by step."""
  lines = {}
  for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().split("\n"):
    if line:
      values = json.loads(line)
      kept = {k: v for k, v in values.items() if not k.startswith(CLOCK)}
      lines.setdefault(kept.pop("step"), {}).update(kept)
  return lines


def read_state(workdir, step):
  """Step, optimizer and controller, as arrays."""
  folder = workdir / "checkpoints" / str(step) / "state"
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(folder).item_metadata.tree
    plain = ocp.RestoreArgs(restore_type=np.ndarray)
    return reader.restore(
      folder, restore_args=jax.tree.map(lambda _: plain, tree)
    )


def assert_same_run(a, b):
  step_a, params_a = load_params(a / "checkpoints")
  step_b, params_b = load_params(b / "checkpoints")
  assert step_a == step_b
  chex.assert_trees_all_equal(params_a, params_b)
  states = read_state(a, step_a), read_state(b, step_b)
  assert "controller" in states[0]["extra"]
  chex.assert_trees_all_equal(*states)
  for item in ("data", "host"):
    read = [
      (w / "checkpoints" / str(step_a) / item / "metadata").read_text()
      for w in (a, b)
    ]
    assert json.loads(read[0]) == json.loads(read[1])
  assert metrics(a) == metrics(b)


class Stopped(BaseException):
  """Ends a run between two steps, past everything that handles errors."""


def stop_and_go_on(config, workdir, step, monkeypatch):
  """Ends a run after a step, and starts it again."""
  from birdie import train as train_lib

  real_train = train_lib.train

  def stop(info):
    raise Stopped

  stop.every = {step}.__contains__

  def train(*args, hooks, **kwargs):
    return real_train(*args, hooks=[*hooks, stop], **kwargs)

  monkeypatch.setattr(train_lib, "train", train)
  with pytest.raises(Stopped):
    train_lib.train_and_evaluate(config, str(workdir))
  monkeypatch.setattr(train_lib, "train", real_train)
  train_lib.train_and_evaluate(config, str(workdir))


@pytest.mark.parametrize("step", [1, 3, 4])
def test_stopped_after_any_step(config, straight, tmp_path, step, monkeypatch):
  stop_and_go_on(config, tmp_path, step, monkeypatch)
  assert_same_run(straight, tmp_path)


def test_hawk_goes_on_from_the_middle_of_its_history(
  config, tmp_path, monkeypatch
):
  from birdie.train import train_and_evaluate

  changed = config.copy_and_resolve_references()
  changed.model.name = "hawk"
  train_and_evaluate(changed, str(tmp_path / "straight"))
  stop_and_go_on(changed, tmp_path / "stopped", 3, monkeypatch)
  assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_finished_run_changes_nothing(config, straight):
  from birdie.train import train_and_evaluate

  before = metrics(straight)
  train_and_evaluate(config, str(straight))
  assert metrics(straight) == before


@pytest.mark.parametrize("workers", [2])
def test_workers_change_nothing(config, straight, tmp_path, workers):
  from birdie.train import train_and_evaluate

  changed = config.copy_and_resolve_references()
  changed.data.workers = workers
  changed.num_steps = config.num_steps
  train_and_evaluate(changed, str(tmp_path))
  assert_same_run(straight, tmp_path)


# Runs `birdie.main` and kills it inside its third evaluation.
DIES_EVALUATING = """
import os, runpy, signal, sys
from birdie.validation import Evaluator
real, calls = Evaluator.__call__, []
def dies(self, params):
  calls.append(1)
  if len(calls) == 3:
    self._sums(params, self._batches[0]).block_until_ready()
    os.kill(os.getpid(), signal.SIGKILL)
  return real(self, params)
Evaluator.__call__ = dies
sys.argv[0] = "birdie.main"
runpy.run_module("birdie.main", run_name="__main__", alter_sys=True)
"""


def start(workdir, cache, *options, program=("-m", "birdie.main")):
  command = [
    sys.executable, *program, "--config=configs/birdie.py:smoke",
    f"--workdir={workdir}", "--config.checkpoint.every=1",
    f"--config.compile_cache={cache}/xla",
    f"--config.data.cache_dir={cache}/tokens",
    "--config.data.sequence_length=64", "--config.num_steps=36", *options,
  ]  # fmt: skip
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(run):
  _, errors = run.communicate(timeout=300)
  assert run.returncode == 0, errors


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
  """A run by command, and the caches it has filled."""
  folder = tmp_path_factory.mktemp("commanded")
  finish(start(folder / "run", folder))
  return folder


def wait_until(condition, run):
  deadline = time.monotonic() + 120
  while not condition():
    assert run.poll() is None, run.communicate()[1]
    assert time.monotonic() < deadline
    time.sleep(0.001)


def kill(run):
  run.send_signal(signal.SIGKILL)
  run.communicate()
  assert run.returncode == -signal.SIGKILL


def test_kill_minus_nine(commanded, tmp_path):
  """A second run of the command, killed at a random moment, in the middle of
  a save, and inside an evaluation.
  """
  killed = tmp_path / "killed"
  options = ["--config.data.workers=2"]
  moments = random.Random(0)

  def unfinished():
    return set(killed.glob("checkpoints/*.orbax-checkpoint-tmp"))

  run = start(killed, commanded, *options)
  wait_until((killed / "metrics.jsonl").exists, run)
  time.sleep(moments.uniform(0, 0.3))
  kill(run)

  left_behind = unfinished()
  run = start(killed, commanded, *options)
  wait_until(lambda: unfinished() - left_behind, run)
  kill(run)

  run = start(killed, commanded, *options, program=("-c", DIES_EVALUATING))
  run.communicate(timeout=300)
  assert run.returncode == -signal.SIGKILL

  finish(start(killed, commanded, *options))
  assert_same_run(commanded / "run", killed)


def test_an_interrupt_is_one_line(commanded, tmp_path):
  run = start(tmp_path / "run", commanded)
  seen = tmp_path / "run" / "metrics.jsonl"
  while not seen.exists() and run.poll() is None:
    time.sleep(0.01)
  run.send_signal(signal.SIGINT)
  _, errors = run.communicate(timeout=120)
  assert run.returncode == 130
  assert re.fullmatch(
    r"interrupted: step \d+ is saved, and the same command goes on"
    "|interrupted before the first checkpoint",
    errors.splitlines()[-1],
  )
  assert "Traceback" not in errors


def test_a_full_disk_is_one_line(commanded, tmp_path):
  """On a file system of 600 kB, which the fourth step's save exceeds."""
  small = tmp_path / "small"
  small.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip("needs the right to mount a file system")
  try:
    run = start(small / "run", commanded)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1
    assert (
      "No space left on device while saving a checkpoint"
      in errors.splitlines()[-1]
    )
    assert "Traceback" not in errors
  finally:
    subprocess.run(["umount", str(small)], check=True)
