"""Eight simulated CPU devices, strict broadcasting, parsed flags."""

import importlib.metadata
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

# Tests compile far more than they compute. XLA reads this as jax starts, here
# and in the processes that tests start; what it does not know ends it.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
  ]
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from common.errors import UserError

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def _flags_are_parsed():
  """Libraries that read absl flags outside `app.run` need this."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
  """Where runs have the same shapes one compiles, and the others read."""
  settings = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
    "jax_persistent_cache_min_compile_time_secs": 0,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def one_line():
  """`(function, *arguments)`: calls it, and returns the one line in which it
  refuses what it was given.
  """

  def call(function, *arguments, **settings) -> str:
    with pytest.raises(UserError) as caught:
      function(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message

  return call


@pytest.fixture(scope="session")
def run_processes():
  """`(arguments, processes, devices=4)`: `python -m ARGUMENTS` as several
  processes of one run, on devices that are dealt out to them.
  """

  def run(
    arguments: Sequence[str], processes: int, *, devices: int = 4
  ) -> None:
    address, commands = _free_address(), []
    for i in range(processes):
      place = [f"--coordinator={address}", f"--process_id={i}"]
      place.append(f"--num_processes={processes}")
      commands.append(["-m", *arguments, *(place if processes > 1 else [])])
    _run_together(commands, devices=devices // processes)

  return run


@pytest.fixture(scope="session")
def run_script_twice():
  """`(script)`: runs it in two processes of two devices each; its arguments
  are those of `jax.distributed.initialize`, the address and the number.
  """

  def run(script: str) -> None:
    address = _free_address()
    _run_together([["-c", script, address, str(i)] for i in (0, 1)], devices=2)

  return run


def _free_address() -> str:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"


def _run_together(commands: Sequence[Sequence[str]], *, devices: int) -> None:
  """Runs Python at the same time with these arguments, each on CPU devices of
  its own; fails with what the first broken one printed.
  """
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
  }
  started = [
    subprocess.Popen(
      [sys.executable, *arguments],
      cwd=pathlib.Path(__file__).parents[1],
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for arguments in commands
  ]
  try:
    errors = [process.communicate(timeout=600)[1] for process in started]
  finally:
    for process in started:
      process.kill()
  for process, text in zip(started, errors, strict=True):
    assert process.returncode == 0, text[-3000:]
