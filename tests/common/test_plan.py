"""What a step would take, without running it."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.metrics import Mean
from common.parallel import abstract_sharded, batch_sharding, make_mesh
from common.plan import Program, abstract_batch, make_plan, plan_table
from common.rngs import RngStreams
from common.state import TrainState
from common.step import make_train_step

RULES = [("kernel", jax.P("fsdp")), (".*", jax.P())]
ROOT = pathlib.Path(__file__).parents[2]


def loss_fn(params, batch, rngs):
  del rngs
  error = Mean.of((batch["x"] @ params["kernel"] - batch["y"][:, None]) ** 2)
  return error.total / error.count, {"loss": error}


def program(mesh, rows=16):
  tx = optax.adam(1e-3)
  return Program(
    name="step",
    step=make_train_step(loss_fn, tx, RngStreams(0)),
    state=abstract_sharded(
      lambda key: TrainState.create({"kernel": jnp.zeros((64, 32))}, tx),
      mesh,
      RULES,
      jax.random.key(0),
    ),
    batch=abstract_batch(
      batch_sharding(mesh),
      {"x": ((rows, 64), np.float32), "y": ((rows,), np.float32)},
    ),
    mesh=mesh,
  )


def test_a_plan_counts_what_a_device_has():
  plan = make_plan(program(make_mesh({"data": 2, "fsdp": 4})))
  kernel = 64 * 32 * 4
  assert plan.mesh == {"data": 2, "fsdp": 4, "model": 1, "seq": 1}
  assert plan.bytes["parameters"] == kernel / 4
  assert plan.bytes["optimizer"] == 2 * kernel / 4 + 4  # and its count
  assert plan.bytes["other state"] == 0
  assert plan.bytes["batch"] == 16 * 65 * 4 / 8
  assert plan.bytes["temporaries"] > 0
  # Forward and the kernel's gradient, two rows a device.
  assert plan.flops == 2 * 2 * 2 * 64 * 32
  # The kernel comes, and its gradient goes around.
  assert plan.sent["all-gather"] == kernel * 3 / 4
  table = plan_table([plan, plan])
  assert "Each of 8 devices, data=2, fsdp=4, model=1, seq=1" in table
  assert "\nparameters, MiB       0.002  0.002\n" in table


def test_rows_that_do_not_divide_are_refused(one_line):
  message = one_line(program, make_mesh({"data": 8}), rows=12)
  assert "'x' of shape (12, 64)" in message
  assert "data=8" in message


@pytest.mark.parametrize(
  ("flags", "status", "expected"),
  [
    (["--plan=4", "--config.mesh.fsdp=2"], 0, "Each of 4 devices, data=2"),
    (["--plan=0"], 2, "error: --plan=0: at least 1 device"),
  ],
)
def test_the_flag(flags, status, expected):
  command = [sys.executable, "-m", "birdie.main"]
  command += ["--config=configs/birdie.py:smoke", *flags]
  run = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert run.returncode == status
  assert (run.stdout + run.stderr).startswith(expected)
