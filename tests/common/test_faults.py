"""Processes that train, what hits them, and how they go on.

The model is twelve numbers that devices share, `w <- w - 0.1 (w - batch)`:
every batch that is lost or repeated shows in them. `benchmarks/faults.py`
does the same at random to the real projects.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from common.checkpoint import checkpoint_steps, load_params

CONFIG = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict({
    "num_steps": 12, "nan_at": 0, "slow_from": 1000, "compile_cache": "",
    "seed": 0,
  })
"""

MAIN = """
import contextlib, time
from common import app


def main(config, workdir):
  import jax, jax.numpy as jnp, numpy as np, optax
  from common import hooks
  from common.metrics import Mean
  from common.parallel import (
    abstract_sharded, batch_sharding, init_sharded, make_mesh)
  from common.progress import ProgressBar
  from common.rngs import RngStreams
  from common.state import TrainState
  from common.step import make_train_step
  from common import workdir as workdir_lib
  from common.train import train
  from common.workdir import Workdir
  workdir_lib.SEEN_SECONDS = 1.0

  mesh = make_mesh()

  class Numbers:
    # Batches of 12 rows, 10 times their number, dealt out to the processes.
    step = 0

    def __iter__(self):
      return self

    def __next__(self):
      self.step += 1
      if self.step > config.slow_from:
        time.sleep(0.2)
      rows = np.full((12 // jax.process_count(), 1), 10 * self.step, np.float32)
      if self.step == config.nan_at and jax.process_index() == 1:
        rows[0] = np.nan
      return jax.make_array_from_process_local_data(batch_sharding(mesh), rows)

    def get_state(self):
      return {"step": self.step}

    def set_state(self, state):
      self.step = state["step"]

  def loss_fn(params, batch, rngs):
    losses = jnp.sum(jnp.square(params["w"][None] - batch) / 2, axis=1)
    return jnp.mean(losses), {"loss": Mean.of(losses)}

  tx = optax.sgd(0.1)
  make = lambda key: TrainState.create({"w": jnp.zeros(12)}, tx)
  rules = ((r"(^|/)w$", jax.P("data")),)
  key, data = jax.random.key(0), Numbers()
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(Workdir(
      workdir, config, free=("num_steps", "nan_at", "slow_from"), keep=3))
    bar = stack.enter_context(ProgressBar(config.num_steps))
    guard = hooks.StopOnNonFinite()
    host = {"log": hooks.LogHook(1, folder.writer, bar, examples_per_step=12)}
    save = hooks.CheckpointHook(
      4, folder.checkpointer, host=host, guard=guard)
    preemption = stack.enter_context(hooks.PreemptionHook(save))
    state = folder.resume(
      lambda: init_sharded(make, mesh, rules, key),
      abstract_sharded(make, mesh, rules, key), data, host)
    train(
      state, make_train_step(loss_fn, tx, RngStreams(0)), data,
      num_steps=config.num_steps, mesh=mesh,
      hooks=[guard, *host.values(), save, preemption])


app.run(main, name="toy", description="A toy.", example="python toy.py")
"""


@dataclasses.dataclass
class Toy:
  """A run's folder, and the command that fills it."""

  base: pathlib.Path

  @property
  def folder(self) -> pathlib.Path:
    return self.base / "run"

  def start(
    self, *flags: str, processes: int = 2, more: tuple[str, ...] = ("",) * 4
  ) -> list[subprocess.Popen]:
    """`more` is a flag of each process's own."""
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{probe.getsockname()[1]}"
    joined = [f"--coordinator={address}", f"--num_processes={processes}"]
    return [
      subprocess.Popen(
        [
          sys.executable, "-P", "toy.py", "--config=toy_config.py",
          f"--workdir={self.folder}", *flags,
          *([*joined, f"--process_id={i}"] if processes > 1 else []),
          *filter(None, [more[i]]),
        ],
        cwd=self.base,
        env=os.environ | {
          "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
          "JAX_PLATFORMS": "cpu",
          "JAX_NUM_CPU_DEVICES": str(max(4 // processes, 1)),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
      )
      for i in range(processes)
    ]  # fmt: skip

  def ends(self, *flags: str, processes: int = 2) -> tuple[list[int], str]:
    """Statuses, and what the processes said."""
    return finish(self.start(*flags, processes=processes))

  def lines(self) -> list[dict]:
    path = self.folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]

  def started(self, step: int) -> list[subprocess.Popen]:
    """Two processes that have logged that step and are slow from there."""
    processes = self.start(
      f"--config.slow_from={step - 1}",
      "--config.num_steps=500",
      "--peer_timeout=5",
    )
    end = time.monotonic() + 60
    while not any(line["step"] >= step for line in self.lines()):
      if any(process.poll() for process in processes) or time.monotonic() > end:
        pytest.fail(finish(processes)[1])
      time.sleep(0.02)
    return processes

  def assert_straight(self, steps: int) -> None:
    """The run has seen every batch once, in order."""
    found = self.lines()
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    w = np.zeros((), np.float32)
    for step in range(1, steps + 1):
      loss = 12 * (w - 10 * step) ** 2 / 2
      np.testing.assert_allclose(found[step - 1]["train/loss"], loss, rtol=1e-5)
      w = w - np.float32(0.1) * (w - 10 * step)
    last, params = load_params(self.folder / "checkpoints")
    assert last == steps
    np.testing.assert_allclose(params["w"], [w] * 12, rtol=1e-5)


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], str]:
  try:
    said = [process.communicate(timeout=60)[1] for process in processes]
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  return [process.returncode for process in processes], "".join(said)


def make_toy(base: pathlib.Path) -> Toy:
  (base / "toy.py").write_text(MAIN)
  (base / "toy_config.py").write_text(CONFIG)
  return Toy(base)


@pytest.fixture
def toy(tmp_path):
  return make_toy(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run that has saved steps 4 and 8."""
  made = make_toy(tmp_path_factory.mktemp("finished"))
  assert made.ends("--config.num_steps=8")[0] == [0, 0]
  return made


def test_sigterm_to_one_saves_the_same_step_everywhere(toy):
  processes = toy.started(6)
  processes[1].terminate()  # not the one that writes
  statuses, said = finish(processes)
  assert statuses == [143, 143]
  saved = re.findall(r"preempted: saved step (\d+)", said)
  assert len(saved) == 2
  assert len(set(saved)) == 1
  assert checkpoint_steps(toy.folder / "checkpoints")[-1] == int(saved[0])
  # One process goes on where two have stopped.
  steps = int(saved[0]) + 2
  assert toy.ends(f"--config.num_steps={steps}", processes=1)[0] == [0]
  toy.assert_straight(steps)


def test_four_processes_then_three_then_one_are_one_run(toy):
  assert toy.ends("--config.num_steps=6", processes=4)[0] == [0] * 4
  assert toy.ends("--config.num_steps=9", processes=3)[0] == [0] * 3
  assert toy.ends(processes=1)[0] == [0]
  toy.assert_straight(12)


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_one_takes_the_others_along_and_loses_nothing(toy, victim):
  processes = toy.started(6)
  processes[victim].kill()
  statuses, _ = finish(processes)
  assert statuses[victim] == -signal.SIGKILL
  assert statuses[1 - victim] not in (0, 2, 143)  # launchers try again
  assert toy.ends()[0] == [0, 0]
  toy.assert_straight(12)


@pytest.mark.parametrize("harm", ["cut", "bit", "gone"])
def test_all_go_back_together_from_a_broken_checkpoint(toy, finished, harm):
  shutil.copytree(finished.folder, toy.folder)
  # What process 1 alone has written, and reads: its half of `w`.
  own = toy.folder / "checkpoints/8/params/ocdbt.process_1/d"
  file = max(own.iterdir(), key=lambda path: path.stat().st_size)
  data = bytearray(file.read_bytes())
  if harm == "gone":
    file.unlink()
  elif harm == "cut":
    file.write_bytes(data[: len(data) // 2])
  else:
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
  statuses, said = toy.ends()
  assert statuses == [0, 0]
  assert said.count("checkpoint 8 cannot be read") == 2
  assert file.name in said
  toy.assert_straight(12)


def test_a_loss_that_is_not_finite_ends_all_and_is_never_saved(toy):
  statuses, said = toy.ends("--config.nan_at=7")  # a row of one process
  assert statuses == [1, 1]
  assert said.count("error: step 7: loss is nan") == 2
  assert checkpoint_steps(toy.folder / "checkpoints") == [4]
  assert toy.ends(processes=1)[0] == [0]
  toy.assert_straight(12)


def test_folders_that_are_not_shared_are_refused(toy):
  more = tuple(f"--workdir={toy.base}/host{i}" for i in range(2))
  statuses, said = finish(toy.start("--config.seed=0", more=more))
  assert statuses == [2, 2]
  assert said.count("is not one folder for all: processes 1 do not see") == 2
