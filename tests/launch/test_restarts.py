"""What the launchers do when a run has ended, by its exit status."""

import os
import pathlib
import signal
import socket
import subprocess
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
JOBSETS = sorted(LAUNCH.glob("*.yaml"))
# Whether a run that ended so goes on; what a signal has ended (134, 137) and
# what has failed (1, 255) is tried again a few times.
AGAIN = {
  0: False, 1: True, 2: False, 130: False, 134: True, 137: True, 143: True,
  255: True,
}  # fmt: skip


def shell(text, **variables):
  done = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", f"source {LAUNCH}/policy.sh; {text}"],
    env=os.environ | {"PAUSE": "0"} | variables,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def decisions(statuses, seconds="0"):
  """Asks about each status after each number of seconds."""
  return (
    f"for status in {statuses}; do for seconds in {seconds}; do"
    '  again "$status" "$seconds" 2>/dev/null && echo yes || echo no;'
    "done; done"
  )


def test_which_statuses_go_on():
  answers = shell(decisions(" ".join(map(str, AGAIN))), RESTARTS="9")
  assert answers == ["yes" if again else "no" for again in AGAIN.values()]


@pytest.mark.parametrize("file", JOBSETS, ids=lambda file: file.name)
def test_jobsets_go_on_after_the_same_statuses(file, jobset):
  document, settings, container = jobset(file)
  policy = document["spec"]["failurePolicy"]
  (refused,) = policy["rules"]
  assert refused["action"] == "FailJobSet"
  assert refused["onJobFailureReasons"] == ["PodFailurePolicy"]
  assert settings["template"]["spec"]["restartPolicy"] == "Never"
  actions = {}
  for rule in settings["podFailurePolicy"]["rules"]:
    if codes := rule.get("onExitCodes"):
      assert codes["containerName"] == container["name"]
      assert codes["operator"] == "In"
      actions |= dict.fromkeys(codes["values"], rule["action"])
  for status, again in AGAIN.items():
    if status == 0:
      continue
    if status == 143:
      assert actions[status] == "Ignore"
    elif again:  # the job fails, and the JobSet starts all of it again
      assert status not in actions
      assert settings["backoffLimit"] == 0
      assert policy["maxRestarts"] > 0
    else:
      assert actions[status] == "FailJob"


@pytest.mark.parametrize(
  ("seconds", "expected"),
  [
    ("0 0 0 0", "yes yes yes no"),
    ("0 0 0 3600 0 0 0", "yes yes yes yes yes yes no"),
  ],
)
def test_failures_in_a_row_are_counted(seconds, expected):
  assert shell(decisions("1", seconds)) == expected.split()


def test_a_run_that_is_stopped_at_every_start_does_not_spin():
  waits = 'pause() { echo "$1"; }'  # rather than sleep
  ends = "again 143 5; again 143 299; again 143 300; again 143 0; again 1 0"
  # A run of five minutes goes on at once; failures are counted for themselves.
  assert shell(f"{waits}; {ends}", PAUSE="20") == ["20", "40", "0", "20", "20"]
  many = "for _ in {1..40}; do again 143 0; done"
  assert shell(f"{waits}; {many}", PAUSE="20")[-1] == "300"


@pytest.mark.parametrize(
  ("statuses", "expected"),
  [
    ("", "0"),
    ("0 0", "0"),
    ("0 143", "143"),
    ("143 134", "134"),
    ("134 143 1", "134"),
    ("134 2", "2"),
    ("143 130", "130"),
  ],
)
def test_one_status_for_all_processes(statuses, expected):
  assert shell(f"cause {statuses}") == [expected]


@pytest.mark.parametrize(
  ("first", "second", "attempts", "status"),
  [
    ("2", "134:late", 1, 2),  # one refuses, and the other loses it
    ("130", "0", 1, 130),
    ("134:late 0", "1:late 0", 2, 0),
    ("1 1 1 1 1", "0", 4, 1),
  ],
)
def test_failures(place, launch, first, second, attempts, status):
  assert launch(PLAN_0=first, PLAN_1=second) == status
  assert len(place.commands(0)) == attempts


@pytest.mark.parametrize("launcher", ["ssh", "tpu_pod"])
def test_a_stop_after_saving_goes_on(place, launcher):
  stops = "143 " * 5 + "0"  # more than failures may be
  assert getattr(place, launcher)(PLAN_0=stops, PLAN_1=stops) == 0
  assert len(place.commands(0)) == 6
  assert len({tuple(command) for command in place.commands(0)}) == 1


def test_ssh_ends_the_processes_that_wait_for_one_that_failed(place):
  assert place.ssh(PLAN_0="hang 0", PLAN_1="1:1 0") == 0
  assert [len(place.commands(number)) for number in (0, 1)] == [2, 2]
  assert not list(place.folder.rglob("*.pid"))


def test_ssh_starts_again_when_a_host_was_away(place):
  (place.logs / "down.b").touch()
  assert place.ssh(PLAN_0="hang 0") == 0
  assert [len(place.commands(number)) for number in (0, 1)] == [2, 1]
  assert "status 255: restart 1 of 3" in place.output


def wait_for(file, *, lines=1):
  deadline = time.monotonic() + 20
  while not file.exists() or file.read_text().count("\n") < lines:
    assert time.monotonic() < deadline, file
    time.sleep(0.02)


@pytest.mark.parametrize(
  ("number", "status"),
  [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)],
)
@pytest.mark.parametrize("launcher", ["ssh", "tpu_pod"])
def test_a_launcher_that_is_stopped_has_the_run_save(
  place, launcher, number, status
):
  plan = {"PLAN_0": "hang", "PLAN_1": "hang"}
  process = getattr(place, f"start_{launcher}")(**plan)
  wait_for(place.logs / "hangs", lines=2)
  process.send_signal(number)
  output, _ = process.communicate(timeout=20)
  assert process.returncode == status, output
  assert place.log("signals") == ["TERM", "TERM"]
  assert len(place.commands()) == 1


def pid_file(place):
  name = f"{socket.gethostname()}-run.pid"
  return place.folder / ".cache/tetrad/workers" / name


def test_a_worker_ends_what_a_lost_launcher_has_left(place):
  module = ["python", "-m", "birdie.main"]
  left = place.start("worker.sh", "run", *module, PLAN_0="hang 0")
  wait_for(place.logs / "hangs")
  wait_for(pid_file(place))
  assert place.run("worker.sh", "run", *module, PLAN_0="hang 0") == 0
  output, _ = left.communicate(timeout=20)
  assert left.returncode == 137
  assert output.endswith("worker run: exit status 137\n")


def test_what_a_worker_kills_nobody_else_may_name(place):
  file = pid_file(place)
  file.parent.mkdir(parents=True, mode=0o777)
  worker = place.start(
    "worker.sh", "run", "python", "-m", "x.main", PLAN_0="hang"
  )
  wait_for(file)
  assert file.parent.stat().st_mode & 0o777 == 0o700
  pid, began = file.read_text().split()
  # A number that came again is another process's: a command like ours or not.
  file.write_text(f"{pid} {int(began) - 1}\n")
  assert place.run("worker.sh", "run", "--signal", "KILL") == 0
  assert worker.poll() is None
  file.write_text(f"{pid} {began}\n")
  assert place.run("worker.sh", "run", "--signal", "KILL") == 0
  worker.communicate(timeout=20)
  assert worker.returncode == 137
  assert not file.exists()


def test_a_worker_writes_through_no_link(place):
  folder = pid_file(place).parent
  folder.parent.mkdir(parents=True)
  folder.symlink_to(place.logs)
  assert place.run("worker.sh", "run", "python", "-m", "x.main") == 2
  assert place.output == f"error: {folder} is a link, or not yours: remove it\n"
  assert not place.commands()


def test_a_task_that_refuses_counts_before_those_it_ends(place):
  # srun itself would return 143, and the job go on for ever.
  assert place.slurm(PLAN_0="hang", PLAN_1="2:2", PLAN_2="hang") == 2
  assert place.log("signals") == ["TERM", "TERM"]
  assert len(place.commands(1)) == 1
  assert not place.log("scontrol")


@pytest.mark.parametrize(
  ("file", "tasks"), [("slurm.sh", 1), ("slurm_nodes.sh", 3)]
)
def test_slurm_requeues_what_was_stopped(place, file, tasks):
  plan = {f"PLAN_{number}": "143:late" for number in range(tasks)}
  plan["PLAN_0"] = "143"
  assert place.slurm(file, tasks, **plan) == 143
  assert place.log("scontrol") == ["requeue 7 "]
  assert not place.log("signals")  # all had time to save
  # After scancel the job does not run, and must not come back.
  assert place.slurm(file, tasks, STATE="COMPLETING", PLAN_0="0 143") == 143
  assert place.log("scontrol") == ["requeue 7 "]
  assert not list((place.folder / "tetrad").glob(".statuses*"))


@pytest.mark.parametrize("file", ["slurm.sh", "slurm_nodes.sh"])
def test_slurm_tells_the_run_before_its_time_is_up(file):
  text = (LAUNCH / file).read_text()
  options = dict(
    line.removeprefix("#SBATCH --").partition("=")[::2]
    for line in text.splitlines()
    if line.startswith("#SBATCH")
  )
  # To the steps: with `B:` this script alone would hear of it.
  assert options["signal"] == "TERM@300"
  assert "requeue" in options
  assert options["open-mode"] == "append"


def test_a_slice_that_is_taken_away_is_asked_for_again(place):
  states = ["", "WAITING_FOR_RESOURCES", "ACTIVE"]
  states += ["SUSPENDING", "SUSPENDED", "", "ACTIVE"]
  plan = {"PLAN_0": "143 0", "PLAN_1": "143 0"}
  assert place.tpu_pod(states, DATA="gs://bucket/data.tar", **plan) == 0
  asked = [
    line.split()[3]
    for line in place.log("gcloud")
    if "queued-resources" in line and " list " not in line
  ]
  assert asked == ["create", "delete", "create"]
  assert len(place.commands(0)) == 2
  copies = [line for line in place.log("gcloud") if " scp " in line]
  assert len(copies) == 2
  assert all(
    "gs://bucket/data.tar" in line
    for line in place.log("gcloud")
    if "storage cat" in line
  )
  assert len(place.log("git")) == 3  # which commit, and that one twice


def test_a_request_that_fails_says_why_and_is_not_made_for_ever(place):
  assert place.tpu_pod(["FAILED"] * 9) == 1
  assert place.output.count("tetrad: FAILED: no more quota\n") == 4
  assert "status 1 after 3 restarts: giving up" in place.output
  assert not place.commands(0)


@pytest.mark.parametrize("delete", ["", "yes"])
@pytest.mark.parametrize("status", [0, 2])
def test_a_slice_is_deleted_or_its_costs_are_named(place, status, delete):
  plan = {"PLAN_0": str(status), "PLAN_1": str(status)}
  assert place.tpu_pod(DELETE=delete, **plan) == status
  deleted = any("resources delete" in line for line in place.log("gcloud"))
  told = "tetrad stays, and costs, until: gcloud" in place.output
  assert (deleted, told) == (bool(delete), not delete)


def test_flags_for_gcloud(place):
  flags = {"CREATE_FLAGS": "--network=n --data-disk=d", "SSH_FLAGS": "--iap"}
  assert place.tpu_pod(["", "ACTIVE"], **flags) == 0
  (made,) = [line for line in place.log("gcloud") if " create " in line]
  assert made.endswith("--spot --network=n --data-disk=d")
  reached = [line for line in place.log("gcloud") if " tpu-vm " in line]
  assert len(reached) == 3
  assert all(" --iap" in line for line in reached)
