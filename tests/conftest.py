"""Eight simulated CPU devices, strict broadcasting, parsed flags."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

import jax
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

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
def run_processes():
  """Runs a command of the workspace as several processes of one run."""
  return _run_processes


def _run_processes(
  arguments: Sequence[str], processes: int, *, devices: int = 4
) -> None:
  """`python -m ARGUMENTS`, on devices that are dealt out to the processes.

  Fails with what the first broken one printed.
  """
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
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
        [sys.executable, "-m", *arguments, *(place if processes > 1 else [])],
        cwd=pathlib.Path(__file__).parents[1],
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
