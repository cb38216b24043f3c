"""What the launchers start: commands that the programs accept."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from common import flags
from common.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SHELL = sorted(LAUNCH.glob("*.sh"))
JOBSETS = sorted(LAUNCH.glob("*.yaml"))


@pytest.fixture
def check_command(resolve):
  """`(argv)`: refuses a `python -m PROJECT.main` that the program would."""

  def check(argv):
    flag, module, *flags = argv
    project, verb = module.split(".")
    assert (flag, verb) == ("-m", "main")
    assert (ROOT / project / "main.py").exists(), module
    resolve(project, flags)

  return check


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)  # where paths of configurations begin


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_shell_files_parse(file):
  subprocess.run(["bash", "-n", file], check=True)
  text = file.read_text()
  if file.name != "policy.sh":
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(file, os.X_OK)


@pytest.mark.parametrize(
  ("launcher", "project", "config"),
  [
    ("ssh", "birdie", "configs/birdie.py:paper"),
    ("ssh", "udim", "configs/udim.py:pacs"),
    ("slurm", "thor", "configs/thor.py:wmt16_en_de_big"),
    ("tpu_pod", "slimsam", "configs/slimsam.py:paper"),
  ],
)
def test_launchers_start_what_they_are_told(
  check_command, place, launcher, project, config
):
  assert getattr(place, launcher)(PROJECT=project, CONFIG=config) == 0
  (command,) = place.commands(1)
  assert command[:3] == ["-m", f"{project}.main", f"--config={config}"]
  assert "--config.seed=1" in command
  check_command(command)


def test_every_process_knows_the_others(check_command, place):
  assert place.ssh(WORKDIR="/shared/a b") == 0
  for number in (0, 1):
    (command,) = place.commands(number)
    check_command(command)
    assert "--workdir=/shared/a b" in command
    assert "--coordinator=a:8476" in command
    assert "--num_processes=2" in command
    assert f"--process_id={number}" in command


def test_others_are_found_by_jax_or_the_run_fails(place):
  assert place.slurm() == 0
  assert place.tpu_pod() == 0
  assert all("--distributed" in command for command in place.commands(1))


def test_slurm_process_0_listens_on_the_address_the_others_are_given(place):
  address, bind = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"
  assert place.slurm() == 0
  there = [f"{address}=node1:61447", f"{bind}=node1:61447"]
  assert place.log("variables.0") == place.log("variables.2") == there
  assert place.slurm(**{address: "ib1:9", bind: "[::]:9"}) == 0
  assert place.log("variables.0") == [f"{address}=ib1:9", f"{bind}=[::]:9"]


def test_slurm_where_a_node_is_its_own_loopback(place):
  """There the others would not reach it: jax is left to listen on all."""
  assert place.slurm(ADDRESS="127.0.1.1") == 0
  assert place.log("variables.0") == ["JAX_COORDINATOR_ADDRESS=node1:61447"]
  assert "node1 is a loopback address on node1" in place.output
  assert place.slurm(ADDRESS="127.0.1.1", SLURM_JOB_NUM_NODES="1") == 0
  assert len(place.log("variables.0")) == 2


def test_jax_would_take_the_same_port(monkeypatch):
  from jax._src.clusters.slurm_cluster import SlurmCluster

  monkeypatch.setenv("SLURM_JOB_ID", "7")
  monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
  assert SlurmCluster.get_coordinator_address(None, None) == "node1:61447"


def test_one_node_is_one_process(check_command, place):
  assert place.slurm("slurm.sh", 1) == 0
  (command,) = place.commands()
  check_command(command)
  assert "--distributed" not in command


@pytest.mark.parametrize(
  ("launcher", "platform"),
  [("ssh", "cuda"), ("slurm", "cuda"), ("tpu_pod", "tpu")],
)
def test_no_cpu_stands_in_for_what_a_launcher_is_for(place, launcher, platform):
  run = getattr(place, launcher)
  assert run() == 0
  assert place.log("platforms.1") == [f"JAX_PLATFORMS={platform}"]
  assert run(JAX_PLATFORMS="cpu") == 0
  assert place.log("platforms.1") == ["JAX_PLATFORMS=cpu"]


@pytest.mark.parametrize(
  ("launcher", "connection"), [("ssh", "ssh"), ("tpu_pod", "gcloud")]
)
def test_variables_reach_other_hosts_by_their_names(
  place, launcher, connection
):
  run = getattr(place, launcher)
  names = {"FORWARD": "NCCL_SOCKET_IFNAME XLA_FLAGS"}
  values = {"NCCL_SOCKET_IFNAME": "eth1", "XLA_FLAGS": "--a --b"}
  assert run(**names, **values) == 0
  (sent, *_) = [line for line in place.log(connection) if ".main" in line]
  assert r" NCCL_SOCKET_IFNAME=eth1 XLA_FLAGS=--a\ --b python -m " in sent
  assert run(**names, NCCL_SOCKET_IFNAME="eth1") == 2
  assert place.output == "error: FORWARD names XLA_FLAGS, which is not set\n"


def xpk(place, *flags, **variables):
  """The options with which a workload is made."""
  where = {"CLUSTER": "c", "IMAGE": "i", "WORKDIR": "gs://bucket/a"}
  assert place.run("xpk.sh", *flags, **where, **variables) == 0
  words = shlex.split(place.log("xpk")[-1])
  assert words[:2] == ["workload", "create"]
  return dict(word.split("=", 1) for word in words[2:])


def test_xpk_unpacks_data_first(place, tmp_path):
  """Run as xpk does it, in a shell of its own, with a disk's folder."""
  (tmp_path / "made").mkdir()
  (tmp_path / "made/tokens").write_text("1 2 3")
  tar = tmp_path / "a b.tar"
  command = ["tar", "--format=posix", "-cf", tar, "-C", tmp_path / "made", "."]
  subprocess.run(command, check=True)
  command = xpk(place, DATA=f"file://{tar}")["--command"]
  unpack, run = command.split("exec env")
  assert "python -m birdie.main" in run
  unpack = unpack.replace("/data", str(tmp_path / "data"))
  unpack = unpack.replace("python -c", f"{sys.executable} -c")
  subprocess.run(["bash", "-c", f"({unpack})"], check=True)
  assert (tmp_path / "data/tokens").read_text() == "1 2 3"
  lost = unpack.replace("b.tar", "c.tar")
  assert subprocess.run(["bash", "-c", f"({lost})"], check=False).returncode


def test_xpk(check_command, place):
  flags = ["--config.optim.betas=(0.9, 0.99)", "--config.seed=1"]
  given = xpk(place, *flags)
  start = "exec env JAX_PLATFORMS=tpu "
  assert given["--command"].startswith(start)
  python, *argv = shlex.split(given["--command"].removeprefix(start))
  assert python == "python"
  assert flags[0] in argv
  argv.remove(flags[0])  # it was there for its blanks
  check_command(argv)
  # It adds this one to 42 and 127-255; of Ctrl-C, 130, nobody there is capable.
  assert given["--restart-on-exit-codes"] == "1"


def expanded(container):
  values = {
    entry["name"]: entry.get("value", "0") for entry in container["env"]
  }
  return [
    re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word)
    for word in container["command"]
  ]


@pytest.mark.parametrize("file", JOBSETS, ids=lambda file: file.name)
def test_jobsets(check_command, file, jobset):
  document, settings, container = jobset(file)
  assert settings["parallelism"] == settings["completions"]
  assert settings["completionMode"] == "Indexed"
  pod = settings["template"]["spec"]
  volumes = {volume["name"] for volume in pod["volumes"]}
  for one in [*pod["containers"], *pod["initContainers"]]:
    assert {mount["name"] for mount in one["volumeMounts"]} <= volumes
  python, *argv = expanded(container)
  assert python == "python"
  check_command(argv)
  if "coordinator" in document["spec"]:
    (job,) = document["spec"]["replicatedJobs"]
    assert document["spec"]["coordinator"]["replicatedJob"] == job["name"]
    assert f"--num_processes={settings['parallelism']}" in argv
  else:
    assert "--distributed" in argv


@pytest.mark.parametrize(
  ("file", "platform", "resource"),
  [
    ("gke_gpu.yaml", "cuda", "nvidia.com/gpu"),
    ("gke_tpu.yaml", "tpu", "google.com/tpu"),
  ],
)
def test_no_cpu_stands_in_for_what_a_jobset_asks_for(
  jobset, file, platform, resource
):
  _, _, container = jobset(LAUNCH / file)
  (found,) = [e for e in container["env"] if e["name"] == "JAX_PLATFORMS"]
  assert found["value"] == platform  # `common.app` refuses to do without
  assert list(container["resources"]["limits"]) == [resource]


def test_the_image_finds_the_driver_that_kubernetes_mounts():
  text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
  (variables,) = re.findall(r"^ENV (.*)", text, re.M)
  assert dict(word.split("=") for word in variables.split()) == {
    "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64",
    "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
  }


TOML = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = TOML["project"]["optional-dependencies"]


def installed(file):
  """The extras that a file installs, the device's left out."""
  text = (LAUNCH / file).read_text()
  (names,) = re.findall(r"(?:EXTRAS=|\.\[tpu,)([a-z,]+)", text)
  return names.split(",")


def test_what_is_installed_are_extras_of_ours():
  assert installed("tpu_pod.sh") == installed("Dockerfile")
  assert set(installed("Dockerfile")) <= set(EXTRAS)
  text = (LAUNCH / "Dockerfile").read_text()
  assert '-e ".[$DEVICE,$EXTRAS]"' in text
  devices = set(re.findall(r"\bDEVICE=(\w+)", text))
  assert devices == {"tpu", "gpu"} <= set(EXTRAS)


def train_birdie(config, file):
  from common.data.tokenizers import make_tokenizer

  config.tokenizer.path = str(file)
  make_tokenizer(config.tokenizer)


def train_thor(config, file):
  from thor.vocabulary import Vocabulary

  Vocabulary(file.read_bytes())


def score_thor(config, file):
  from thor.scores import bleu

  bleu(["a"], ["a"])


def read_photographs(config, file):
  from slimsam.sources import make_source

  make_source(config.data.source, "train")


def read_teacher(config, file):
  from common.weights import read_weights

  read_weights(str(file))


@pytest.mark.parametrize(
  ("config", "first", "extra"),
  [
    ("birdie.py:paper", train_birdie, "tokenizers"),
    ("thor.py:paper", train_thor, "translation"),
    ("thor.py:paper", score_thor, "translation"),
    ("slimsam.py", read_photographs, "photographs"),
    ("slimsam.py:paper", read_teacher, "weights"),
  ],
)
def test_trainings_ask_for_no_extra_that_is_not_installed(
  tmp_path, monkeypatch, config, first, extra
):
  """What a machine says where only the extra is missing."""
  for requirement in EXTRAS[extra]:
    name = re.split("[>=]", requirement)[0].lower()
    module = {"scikit-image": "skimage", "scikit-learn": "sklearn"}
    monkeypatch.setitem(sys.modules, module.get(name, name), None)
  config, _ = flags.load_config_file(f"configs/{config}")
  (tmp_path / "a.safetensors").touch()
  with pytest.raises(UserError) as error:
    first(config, tmp_path / "a.safetensors")
  (named,) = re.findall(r"pip install -e '\.\[(\w+)\]'", str(error.value))
  assert named == extra
  assert named in installed("Dockerfile")


def readme_commands():
  blocks = re.findall(
    r"^```\n(.*?)^```", (LAUNCH / "README.md").read_text(), re.M | re.S
  )
  for line in "".join(blocks).replace("\\\n", " ").splitlines():
    line = line.split("  #")[0]
    if match := re.search(r"\bpython (-m \w+\.main .*)", line):
      yield shlex.split(match[1])


def test_the_page_knows_every_file_and_its_commands_work(check_command):
  text = (LAUNCH / "README.md").read_text()
  for file in LAUNCH.iterdir():
    assert file.name == "README.md" or f"`{file.name}`" in text, file.name
  modules = set(re.findall(r"python -m ([\w.]+)", text))
  for module in modules - {"PROJECT.main", "json.tool"}:
    assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
  commands = [c for c in readme_commands() if "PROJECT.main" not in c]
  assert commands
  for command in commands:
    check_command(command)
