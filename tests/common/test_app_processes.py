"""Processes of a run: how they find each other, and how they end."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from common import addresses, app

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict({"name": "toy", "compile_cache": ""})
"""

MAIN = """
import sys
from common import app

def main(config, workdir):
  import jax
  print(jax.process_count(), workdir, flush=True)
  if config.name == "die":
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("both have printed")
    if jax.process_index() == 0:
      raise RuntimeError("boom")
  if config.name == "refuse":
    import time
    from common.errors import UserError
    time.sleep(jax.process_index())
    raise UserError("refused")
  if config.name == "dropped":
    class Dies:
      def __del__(self):
        raise KeyboardInterrupt  # which Python only prints
    Dies()
  if config.name != "toy":
    import time
    end = time.monotonic() + 60
    while time.monotonic() < end:  # a signal may reach another thread of jax,
      time.sleep(0.1)  # which would not wake one long sleep

app.run(main, name="toy", description="A toy.", example="python -m toy.main")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """A working directory with `configs/toy.py` and nothing else."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs/toy.py").write_text(CONFIG)
  return tmp_path


@pytest.fixture
def run(capsys):
  """`(*flags)`: the exit status of a toy's run, and what it said of errors."""

  def call(*flags):
    with pytest.raises(SystemExit) as end:
      app.run(
        lambda config, workdir: None,
        name="toy",
        description="A toy.",
        example="python -m toy.main",
        argv=["--config=configs/toy.py", *flags],
      )
    return end.value.code, capsys.readouterr().err

  return call


SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "127.0.0.1",
  "SLURM_NTASKS": "2",
  "SLURM_STEP_NUM_TASKS": "2",
  "SLURM_PROCID": "0",
  "SLURM_LOCALID": "0",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
OPEN_MPI_4 = {
  **OPEN_MPI,
  "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://127.0.0.1:34911",
}


@pytest.fixture
def joined(monkeypatch):
  """The calls of `jax.distributed.initialize`, which does nothing; whoever is
  to be met is there.
  """
  calls = []
  monkeypatch.setattr(app, "meet", lambda *named: None)
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **named: calls.append(named)
  )
  return calls


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({}, False),
    (SLURM, True),
    ({"SLURM_NTASKS": "4"}, False),  # a batch script outside of srun
    ({"SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_STEP_NUM_TASKS": ""}, False),
    (OPEN_MPI_4, True),
    ({**OPEN_MPI_4, "OMPI_COMM_WORLD_SIZE": "1"}, False),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
  ],
)
@pytest.mark.parametrize("flag", [None, "--distributed", "--no-distributed"])
def test_when_processes_join(
  run, joined, monkeypatch, environment, expected, flag
):
  monkeypatch.setattr(os, "environ", dict(environment))
  assert run(*([flag] if flag else [])) == (0, "")
  wanted = {None: expected, "--distributed": True, "--no-distributed": False}
  # jax is told nothing: it finds out the rest from the same variables.
  assert joined == ([{}] if wanted[flag] else [])


def test_open_mpi_5_has_to_be_told_where_process_0_is(run, joined, monkeypatch):
  monkeypatch.setattr(os, "environ", dict(OPEN_MPI))
  status, error = run()
  assert (status, joined) == (2, [])
  assert "-x JAX_COORDINATOR_ADDRESS=HOST:PORT" in error
  # A SLURM step of one daemon a node, as mpirun makes it, does not count.
  told = {**SLURM, **OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "h:9"}
  monkeypatch.setattr(os, "environ", told)
  assert run() == (0, "")
  assert joined == [
    {
      "coordinator_address": "h:9",
      "num_processes": 2,
      "process_id": 1,
      "local_device_ids": [1],
      "cluster_detection_method": "deactivate",
      "coordinator_bind_address": None,
    }
  ]


FIRST = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
GIVEN = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9"}
HERE = {"coordinator_bind_address": "127.0.0.1:9"}


@pytest.mark.parametrize(
  "environment", [SLURM, {**OPEN_MPI, **FIRST}, {**OPEN_MPI_4, **FIRST}]
)
def test_process_0_listens_where_it_was_told_to(
  run, joined, monkeypatch, environment
):
  told = {**environment, **GIVEN}
  monkeypatch.setattr(os, "environ", told)
  assert run() == (0, "")
  assert joined[0]["coordinator_bind_address"] == "127.0.0.1:9"
  told["JAX_COORDINATOR_ADDRESS"] = "203.0.113.7:9"  # no machine has it
  status, error = run()
  assert (status, len(joined), error.count("\n")) == (2, 1, 1)
  assert error.startswith("error: JAX_COORDINATOR_ADDRESS=203.0.113.7:9 is no ")


@pytest.mark.parametrize(
  ("environment", "told"),
  [
    ({**SLURM, **GIVEN, "SLURM_STEP_NUM_NODES": "2"}, HERE),
    ({**SLURM, **GIVEN, "SLURM_PROCID": "1"}, {}),
    ({**OPEN_MPI_4, **FIRST, **GIVEN}, HERE),
    ({**SLURM, **OPEN_MPI_4, **GIVEN}, {}),  # Open MPI counts: process 1
    (GIVEN, HERE),  # jax alone knows which process this is
    ({**SLURM, **GIVEN, "JAX_COORDINATOR_BIND_ADDRESS": "[::]:9"}, {}),
  ],
)
def test_what_jax_is_told_where_it_finds_out_the_rest(
  run, joined, monkeypatch, environment, told
):
  monkeypatch.setattr(os, "environ", environment)
  assert run() == (0, "")
  assert joined == [told]


def test_who_listens_on_the_port_elsewhere_is_no_matter(
  run, joined, monkeypatch
):
  monkeypatch.setattr(app, "meet", addresses.meet)
  monkeypatch.setattr(addresses, "_TAKEN_SECONDS", -1)
  with socket.create_server(("127.0.0.2", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    told = {**OPEN_MPI, **FIRST, "JAX_COORDINATOR_ADDRESS": address}
    monkeypatch.setattr(os, "environ", told)
    assert run() == (0, "")
  assert joined[0]["coordinator_bind_address"] == address


@pytest.mark.parametrize(
  "name", ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"]
)
def test_a_number_of_processes_alone_is_one_line(
  run, joined, monkeypatch, name
):
  told = {**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "h:9"}
  del told[name]
  monkeypatch.setattr(os, "environ", told)
  assert run("--no-distributed") == (0, "")
  status, error = run()
  assert (status, joined, error.count("\n")) == (2, [], 1)
  assert f"without a number in {name}: " in error


def test_a_coordinator_on_the_command_line_is_all_jax_hears(
  run, joined, monkeypatch
):
  monkeypatch.setattr(os, "environ", dict(SLURM))
  place = ["--coordinator=h:9", "--num_processes=2", "--process_id=1"]
  assert run(*place) == (0, "")
  assert joined == [
    {
      "coordinator_address": "h:9",
      "num_processes": 2,
      "process_id": 1,
      "cluster_detection_method": "deactivate",
      "coordinator_bind_address": None,
    }
  ]


@pytest.mark.parametrize(
  ("environment", "name"),
  [
    ({}, None),
    ({"SLURM_NTASKS": "4"}, None),  # a batch script outside of srun
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
    (SLURM, "SLURM_STEP_NUM_TASKS"),
    (OPEN_MPI, "OMPI_COMM_WORLD_SIZE"),
    (OPEN_MPI_4, "OMPI_COMM_WORLD_SIZE"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
  ],
)
def test_a_verb_of_one_process_does_not_repeat_its_work(
  monkeypatch, capsys, environment, name
):
  monkeypatch.setattr(os, "environ", dict(environment))
  calls = []

  def verb(*arguments):
    monkeypatch.setattr(sys, "argv", ["verb", *arguments])
    monkeypatch.setattr(app, "leave", lambda status: calls.append(status))
    app.run_alone(lambda: calls.append("worked"))

  verb()
  error = capsys.readouterr().err
  if name is None:
    assert (calls, error) == (["worked", 0], "")
    return
  assert calls == [2]
  assert error.startswith(
    f"error: this program runs as one process, and {name}={environment[name]!r}"
  )
  assert f"`env -u {name}`" in error
  verb("--help")
  assert calls == [2, "worked", 0]


VERBS = [
  file
  for project in ("birdie", "slimsam", "thor", "udim")
  for file in sorted((ROOT / project).glob("*.py"))
  if "__main__" in file.read_text()
]


@pytest.mark.parametrize(
  "file", VERBS, ids=lambda file: f"{file.parent.name}.{file.stem}"
)
def test_every_verb_joins_the_others_or_is_alone(file):
  text = file.read_text()
  joins = file.stem in ("main", "compare")
  assert ("app.run(" in text, "app.run_alone(main)" in text) == (
    joins, not joins
  )  # fmt: skip


@pytest.mark.parametrize("environment", [{}, OPEN_MPI_4])
def test_the_patience_with_peers_can_be_set(
  run, joined, monkeypatch, environment
):
  monkeypatch.setattr(os, "environ", dict(environment))
  place = ["--coordinator=h:9", "--num_processes=2", "--process_id=1"]
  assert run("--peer_timeout=7", *([] if environment else place)) == (0, "")
  assert joined[0]["heartbeat_timeout_seconds"] == 7
  status, error = run("--peer_timeout=0")
  assert (status, error) == (2, "error: --peer_timeout=0: at least 1 second\n")


def test_processes_that_nobody_names_are_refused(run, monkeypatch):
  def initialize():
    raise ValueError("Number of processes must be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  status, error = run("--distributed")
  assert status == 2
  assert "Number of processes must be defined" in error
  assert "--coordinator, --num_processes and --process_id" in error


@pytest.mark.parametrize(
  ("number", "status", "error"),
  [
    (0, 2, "error: port {port} of coordinator {address} is taken here"),
    (1, 1, "error: coordinator {address} does not answer"),
  ],
)
@pytest.mark.parametrize("told_by", ["flags", "mpirun"])
def test_who_cannot_be_met_is_one_line(
  run, joined, monkeypatch, number, status, error, told_by
):
  monkeypatch.setattr(app, "meet", addresses.meet)
  monkeypatch.setattr(addresses, "_TAKEN_SECONDS", -1)
  monkeypatch.setattr(addresses, "_ABSENT_SECONDS", -1)
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    address = f"127.0.0.1:{port}"
    if number == 1:
      server.close()
    arguments, told = [], {}
    if told_by == "flags":
      arguments = [f"--coordinator={address}", "--num_processes=2"]
      arguments.append(f"--process_id={number}")
    else:
      told = {**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": address}
      told["OMPI_COMM_WORLD_RANK"] = str(number)
    monkeypatch.setattr(os, "environ", told)
    found, said = run(*arguments)
  assert (found, joined) == (status, [])
  assert said.startswith(error.format(port=port, address=address))
  assert said.count("\n") == 1


def start(folder, *arguments, **variables):
  (folder / "toy_main.py").write_text(MAIN)
  root = os.path.dirname(os.path.dirname(app.__file__))
  environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
  environment |= variables
  return subprocess.Popen(
    [sys.executable, "-P", "toy_main.py", *arguments],
    cwd=folder,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@contextlib.contextmanager
def killing(*processes):
  """Leaves no process behind, however the block ends."""
  try:
    yield
  finally:
    for process in processes:
      process.kill()
      process.wait()
      process.stdout.close()
      process.stderr.close()


@pytest.mark.parametrize(
  ("number", "status", "line"),
  [
    (signal.SIGINT, 130, "interrupted\n"),
    (
      signal.SIGTERM, 143,
      "preempted: the same command goes on from what is saved\n",
    ),
  ],
)  # fmt: skip
def test_a_signal_to_a_process_is_one_line(folder, number, status, line):
  process = start(folder, "--config=configs/toy.py", "--config.name=sleep")
  assert process.stdout.readline() == f"1 {folder}/runs/toy\n"
  process.send_signal(number)
  with killing(process):
    _, err = process.communicate(timeout=30)
  assert (process.returncode, err) == (status, line)


def test_ctrl_c_in_a_destructor_counts(folder):
  process = start(folder, "--config=configs/toy.py", "--config.name=dropped")
  with killing(process):
    _, err = process.communicate(timeout=30)
  assert (process.returncode, err) == (130, "interrupted\n")


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def test_processes_of_srun_and_of_mpirun_find_each_other(folder):
  # Each has started one of the two, and both say where process 0 is.
  port = {"JAX_COORDINATOR_PORT": str(free_port())}
  arguments = ["--config=configs/toy.py", "--config.name=refuse"]
  processes = [
    start(folder, *arguments, **variables, **port)
    for variables in (SLURM, OPEN_MPI_4)
  ]
  with killing(*processes):
    results = [process.communicate(timeout=50) for process in processes]
  assert all(out.startswith("2 ") for out, _ in results)
  # Process 1, which refuses a second later, has not died of the loss of 0.
  assert [process.returncode for process in processes] == [2, 2]
  assert all("error: refused\n" in err for _, err in results)


def start_two(folder, *arguments):
  address = f"127.0.0.1:{free_port()}"
  return [
    start(
      folder,
      "--config=configs/toy.py",
      *arguments,
      f"--coordinator={address}",
      "--num_processes=2",
      f"--process_id={i}",
    )
    for i in range(2)
  ]


def test_a_process_that_fails_does_not_leave_the_others_waiting(folder):
  processes = start_two(folder, "--config.name=die")
  began = time.monotonic()
  with killing(*processes):
    results = [process.communicate(timeout=50) for process in processes]
  assert time.monotonic() - began < 45  # the second sleeps for 60
  assert all(out.startswith("2 ") for out, _ in results)
  assert processes[0].returncode == 1
  assert results[0][1].count("RuntimeError: boom") == 1
  assert processes[1].returncode != 0


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_is_gone_or_stands_still_ends_the_others(
  folder, victim, number
):
  processes = start_two(folder, "--config.name=sleep", "--peer_timeout=2")
  began = time.monotonic()
  with killing(*processes):
    for process in processes:
      assert process.stdout.readline().startswith("2 ")
    processes[victim].send_signal(number)
    other = processes[1 - victim]
    other.communicate(timeout=40)
  assert time.monotonic() - began < 40  # they sleep for 60
  assert other.returncode not in (0, 2, 143)  # launchers try again
