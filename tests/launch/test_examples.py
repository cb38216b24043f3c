"""Examples name a number of devices: meshes fit it, and batches the meshes."""

import math
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest

from common.errors import UserError
from common.parallel.mesh import AXES, mesh_shape

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def check_birdie(config, shape, processes):
  from birdie.train import check_batch, check_counts

  check_counts(config)
  check_batch(config, jax.sharding.AbstractMesh(shape, AXES))
  # Which part of the rows each device has, in the order of processes.
  parts = np.arange(math.prod(shape)) // math.prod(shape[2:])
  (held,) = {len(set(own)) for own in parts.reshape(processes, -1)}
  rows = config.data.batch_size * held // math.prod(shape[:2])
  if rows % config.data.pack_rows:
    raise UserError(
      f"{rows} rows of a process, and data.pack_rows={config.data.pack_rows}"
    )


def check_thor(config, shape, processes):
  from thor.train import check

  assert (math.prod(shape), processes) == (jax.device_count(), 1)
  check(config)


CHECKS = {"birdie": check_birdie, "thor": check_thor}


def check_fit(project, config, devices, processes):
  """Refuses what the program would refuse on so many devices."""
  shape = mesh_shape(config.mesh.to_dict(), devices)
  CHECKS[project](config, shape, processes)


def header(file):
  """The first example in a script's head: (variables, options, flags)."""
  text = (LAUNCH / file).read_text()
  (block,) = re.findall(r"\A#!.*\n(?:# ?\S.*\n)+#\n((?:#   .*\n)+)#\n", text)
  words = shlex.split(re.sub(r"\\?\n?#   ", " ", block))
  script = words.index(f"launch/{file}")
  pairs = [w.split("=", 1) for w in words[:script] if w != "sbatch"]
  options = {k.removeprefix("--"): v for k, v in pairs if k[0] == "-"}
  variables = {k: v for k, v in pairs if k[0] != "-"}
  return variables, options, words[script + 1 :]


def of_slurm(file, variables, options):
  """The script's own options hold where the example names no others."""
  text = (LAUNCH / file).read_text()
  own = re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", text, re.M)
  options = dict(own) | options
  nodes = int(options["nodes"])
  processes = nodes * int(options.get("ntasks-per-node", 1))
  return nodes * int(options["gpus-per-node"]), processes


def of_ssh(file, variables, options):
  text = (LAUNCH / file).read_text()
  (each,) = re.findall(r"here (\d+) a\s+(?:# )?host", text)
  hosts = len(variables["HOSTS"].split())
  return hosts * int(each), hosts


def of_tpus(name):
  def count(file, variables, options):
    (chips,) = re.findall(r"^v5litepod-(\d+)$", variables[name])
    return int(chips), int(chips) // 4

  return count


@pytest.mark.parametrize(
  ("file", "count", "expected"),
  [
    ("slurm.sh", of_slurm, (8, 1)),
    ("slurm_nodes.sh", of_slurm, (32, 32)),
    ("ssh.sh", of_ssh, (8, 2)),
    ("tpu_pod.sh", of_tpus("ACCELERATOR"), (16, 4)),
    ("xpk.sh", of_tpus("TPU_TYPE"), (16, 4)),
  ],
)
def test_the_example_in_a_scripts_head(resolve, file, count, expected):
  variables, options, flags = header(file)
  devices, processes = count(file, variables, options)
  assert (devices, processes) == expected
  project = variables.get("PROJECT", "birdie")
  config = variables.get("CONFIG", f"configs/{project}.py")
  config = resolve(project, [f"--config={config}", *flags])
  check_fit(project, config, devices, processes)


@pytest.mark.parametrize("file", ["gke_gpu.yaml", "gke_tpu.yaml"])
def test_jobsets(resolve, jobset, file):
  _, settings, container = jobset(LAUNCH / file)
  values = {e["name"]: e.get("value", "0") for e in container["env"]}
  command = [
    re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word)
    for word in container["command"]
  ]
  (each,) = map(int, container["resources"]["limits"].values())
  processes = settings["parallelism"]
  project = values["PROJECT"]
  assert command[:3] == ["python", "-m", f"{project}.main"]
  config = resolve(project, command[3:])
  check_fit(project, config, processes * each, processes)


def test_the_pages_commands(resolve):
  text = (LAUNCH / "README.md").read_text().replace("\\\n", " ")
  found = []
  for mpi, project, line in re.findall(
    r"^(mpirun -n \d+ )?python -m (\w+)\.main (.*)", text, re.M
  ):
    flags = shlex.split(line)
    plans = [int(f[7:]) for f in flags if f.startswith("--plan=")]
    if mpi or plans:
      processes = int(mpi.split()[2]) if mpi else 1
      devices = plans[0] if plans else processes
      check_fit(project, resolve(project, flags), devices, processes)
      found.append((devices, processes))
  assert found == [(16, 16), (16, 1)]


PAPER = "--config=configs/birdie.py:paper"
SMALL = "--config=configs/birdie.py"
FSDP = "--config.mesh.fsdp="


@pytest.mark.parametrize(
  ("flags", "devices", "processes", "message"),
  [
    ([SMALL, f"{FSDP}8"], 64, 1, "batch_size=8 is not divisible by the 64"),
    ([SMALL], 16, 16, "batch_size=8 is not divisible by the 16"),
    ([SMALL, "--config.data.batch_size=16"], 8, 8, "data.pack_rows=4"),
    ([PAPER, f"{FSDP}16"], 16, 4, "batch_size=520 is not divisible by the 16"),
    ([PAPER, f"{FSDP}8"], 32, 32, "batch_size=520 is not divisible by the 32"),
    ([PAPER, f"{FSDP}16"], 8, 1, "does not fit the 8 devices"),
  ],
)
def test_what_does_not_come_out_even_is_seen(
  resolve, flags, devices, processes, message
):
  with pytest.raises(UserError, match=message):
    check_fit("birdie", resolve("birdie", flags), devices, processes)
