"""The launchers in a place without a cluster.

`ssh`, `srun`, `gcloud` and their like are stand-ins that run on this machine
what they are given, and so is `python`, which ends as a test has planned.
"""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from common import app
from common.config import from_json

ROOT = pathlib.Path(__file__).parents[2]

# Writes down its arguments and does what PLAN_<number of the process> says, one
# word an attempt: `hang` until a signal comes, or a status to end with, as in
# `1:2` once two others hang, as in `143:late` after a while.
PYTHON = r"""#!/usr/bin/env bash
number=${SLURM_PROCID:-${WORKER:-0}}
for flag in "$@"; do
  [[ $flag != --process_id=* ]] || number=${flag#*=}
done
env | grep ^JAX_COORDINATOR | sort >"$LOGS/variables.$number"
env | grep ^JAX_PLATFORMS >"$LOGS/platforms.$number"
printf '%q ' "$@" >>"$LOGS/python.$number"
echo >>"$LOGS/python.$number"
plan=PLAN_$number
read -ra plan <<<"${!plan:-0}"
attempt=$(wc -l <"$LOGS/python.$number")
act=${plan[attempt - 1]:-0}
trap 'echo TERM >>"$LOGS/signals"; exit 143' TERM
if [[ $act == hang ]]; then
  echo >>"$LOGS/hangs"
  while true; do sleep 0.02; done
fi
if [[ $act == *:late ]]; then
  for _ in {1..15}; do sleep 0.02; done
elif [[ $act == *:* ]]; then
  until (($(wc -l 2>/dev/null <"$LOGS/hangs") == ${act#*:})); do
    sleep 0.02
  done
fi
exit "${act%:*}"
"""

SSH = r"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do
  [[ $1 != -o ]] || shift
  shift
done
echo "$*" >>"$LOGS/ssh"
if [[ -e $LOGS/down.$1 ]]; then
  rm "$LOGS/down.$1"
  exit 255
fi
cd / && exec bash -c "${*:2}"
"""

# As srun does (seen with version 22.05): TERM for the other tasks of one that
# fails, and the highest status of all.
SRUN = r"""#!{python}
import os, signal, subprocess, sys, time
flags = [a for a in sys.argv[1:] if a.startswith("--")]
first = next(i for i, a in enumerate(sys.argv[1:], 1) if a[:2] != "--")
tasks = [
  subprocess.Popen(
    sys.argv[first:],
    env=os.environ | {{"SLURM_PROCID": str(i)}},
    start_new_session=True,
  )
  for i in range(int(os.environ.get("TASKS", 1)))
]
while any(task.poll() is None for task in tasks):
  time.sleep(0.01)
  if any(task.poll() for task in tasks) and "--kill-on-bad-exit=1" in flags:
    for task in tasks:
      if task.poll() is None:
        os.killpg(task.pid, signal.SIGTERM)
        task.wait()
codes = [task.returncode for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

# A slice of two workers; STATES are what its requests meet, one a line.
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >>"$LOGS/gcloud"
case "$*" in
  *queued-resources\ list*)
    head -n 1 "$LOGS/states"
    sed -i 1d "$LOGS/states"
    ;;
  *queued-resources\ describe*) echo "no more quota" ;;
  *"--command=set -e"*) ;;
  *tpu-vm\ ssh*)
    command=${*: -1}
    for number in 0 1; do
      mkdir -p "$LOGS/worker$number"
      (cd "$HOME" && WORKER=$number HOME=$LOGS/worker$number \
        bash -c "${command#--command=}") &
      workers[number]=$!
    done
    for number in 0 1; do
      wait "${workers[number]}" || status=${status:-$?}
    done
    exit "${status:-0}"
    ;;
esac
"""

LOGGED = r"""#!/usr/bin/env bash
printf '%q ' "$@" >>"$LOGS/$(basename "$0")"
echo >>"$LOGS/$(basename "$0")"
"""

# What a host's name stands for.
GETENT = r"""#!/usr/bin/env bash
echo "${ADDRESS:-10.0.0.1}  STREAM $2"
"""

SQUEUE = r"""#!/usr/bin/env bash
echo "${STATE:-RUNNING}"
"""


@dataclasses.dataclass
class Place:
  """A copy of the launchers, and the stand-ins before all else on the path."""

  folder: pathlib.Path
  started: list[subprocess.Popen] = dataclasses.field(default_factory=list)

  @property
  def logs(self):
    return self.folder / "logs"

  def log(self, name):
    file = self.logs / name
    return file.read_text().splitlines() if file.exists() else []

  def commands(self, number=0):
    """The flags of each start of a process."""
    return [shlex.split(line) for line in self.log(f"python.{number}")]

  def start(self, file, *arguments, **variables):
    environment = {
      "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
      "HOME": str(self.folder),
      "TMPDIR": str(self.folder),
      "LOGS": str(self.logs),
      "PAUSE": "0",
      "POLL": "0.05",
      "GRACE": "0.1",
      **variables,
    }
    process = subprocess.Popen(
      ["bash", self.folder / "tetrad/launch" / file, *arguments],
      cwd=self.folder / "tetrad",
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )
    self.started.append(process)
    return process

  def run(self, file, *arguments, **variables):
    return self.end(self.start(file, *arguments, **variables))

  def end(self, process):
    """Its exit status; what it printed is kept in `output`."""
    self.output, _ = process.communicate(timeout=30)
    return process.returncode

  def start_ssh(self, **variables):
    return self.start("ssh.sh", "--config.seed=1", HOSTS="a b", **variables)

  def ssh(self, **variables):
    return self.end(self.start_ssh(**variables))

  def start_tpu_pod(self, states=("ACTIVE",) * 9, **variables):
    (self.logs / "states").write_text("".join(f"{s}\n" for s in states))
    where = {"ZONE": "us-central1-a", "WORKDIR": "gs://bucket/a"}
    return self.start("tpu_pod.sh", "--config.seed=1", **where, **variables)

  def tpu_pod(self, *states, **variables):
    return self.end(self.start_tpu_pod(*states, **variables))

  def slurm(self, file="slurm_nodes.sh", tasks=3, **variables):
    told = {
      "SLURM_JOB_ID": "7",
      "SLURM_JOB_NUM_NODES": "2",
      "SLURM_SUBMIT_DIR": str(self.folder / "tetrad"),
      "SLURMD_NODENAME": "node1",
      "TASKS": str(tasks),
    }
    return self.run(file, "--config.seed=1", **told | variables)


@pytest.fixture
def place(tmp_path):
  shutil.copytree(ROOT / "launch", tmp_path / "tetrad/launch")
  (tmp_path / "logs").mkdir()
  (tmp_path / "bin").mkdir()
  stand_ins = {
    "python": PYTHON,
    "ssh": SSH,
    "srun": SRUN.format(python=sys.executable),
    "gcloud": GCLOUD,
    "squeue": SQUEUE,
    "getent": GETENT,
    "scontrol": LOGGED,
    "git": LOGGED,
    "xpk": LOGGED,
  }
  for name, text in stand_ins.items():
    (tmp_path / "bin" / name).write_text(text)
    (tmp_path / "bin" / name).chmod(0o755)
  place = Place(tmp_path)
  yield place
  for process in place.started:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(params=["ssh", "slurm", "tpu_pod"])
def launch(request, place):
  """`(**variables)`: runs a launcher of several processes; its status."""
  return getattr(place, request.param)


@pytest.fixture
def jobset():
  """`(file)`: the document, its one job's settings, the main container."""

  def read(file):
    (document,) = yaml.safe_load_all(file.read_text())
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert document["kind"] == "JobSet"
    (job,) = document["spec"]["replicatedJobs"]
    settings = job["template"]["spec"]
    (container,) = settings["template"]["spec"]["containers"]
    return document, settings, container

  return read


@pytest.fixture
def resolve(monkeypatch, capsys):
  """`(project, flags)`: the configuration that a command line comes to."""
  monkeypatch.chdir(ROOT)

  def read(project, flags):
    with pytest.raises(SystemExit) as end:
      app.run(
        lambda config, workdir: None,
        name=project,
        description="",
        example="",
        argv=[*flags, "--print_config"],
        programs=lambda config: [],
      )
    assert end.value.code == 0
    return from_json(capsys.readouterr().out)

  return read
