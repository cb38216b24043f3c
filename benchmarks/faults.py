r"""Random faults, and whether the run that was hit is the one that was not.

    python benchmarks/faults.py --trials=200 --seed=0 --workdir=runs/faults

Every trial trains a small run of one project, as one process or several, and
hits it a few times at random moments: kill -9, SIGTERM, a stopped process, a
clock that jumps, damaged checkpoints, a folder that cannot be written, a full
disk, a second run in the same folder, a dead worker. After each hit the same
command starts again. In the end every logged number and every parameter has to
be the one of the run that nothing has hit, bit for bit: a batch that was lost
or repeated shows in both. What a process says and with which status it ends is
checked as well. `damage` is a kill and then a damaged file. `read_only` and
`full` take the right to mount; where it is missing, the page says so.

Left to tests is what takes other data or another model: a loss that is not
finite (tests/common/test_faults.py) and a truncated shard
(tests/common/data/test_sources.py). Only Python's wall clock jumps.

Trials are drawn from the seed and their number. What has finished stands in
`results.jsonl`; the same command goes on where it was stopped, and other ones
are refused in that folder, but for more trials.
"""

import argparse
import collections
import hashlib
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time
from typing import Any

from faults_hits import KINDS, Straight, Trial, Wrong, equal, trainings
from faults_mounts import Impossible, release
from faults_runs import ROOT, Running, Subject

from common.checkpoint import checkpoint_steps, load_params
from common.errors import UserError
from common.files import read_json, write_json
from common.logs import quiet_libraries
from common.metrics import CLOCKS, read_metrics

IMPOSSIBLE = "not possible here"
# What a process says that has waited for another one for too long.
LATE = re.compile(r"Gloo .*failed.*\btimed out", re.IGNORECASE)
TRIES = 3
OFTEN = (
  "--config.checkpoint.every=2", "--config.checkpoint.keep=3",
  "--config.log.every=1",
)  # fmt: skip
SUBJECTS = {  # a few checkpoints and evaluations, and little to compile
  "birdie": (
    "birdie.main", "--config=configs/birdie.py:smoke",
    "--config.data.sequence_length=64", "--config.num_steps=24",
    "--config.model.layers=2", "--config.retrieval.every=24",
    "--config.controller.schedule=8", *OFTEN,
  ),
  "udim": (
    "udim.main", "--config=configs/udim.py:train,smoke",
    "--config.num_steps=24", *OFTEN,
  ),
  "slimsam": (
    "slimsam.main", "--config=configs/slimsam.py:smoke",
    "--config.teacher.num_steps=8", "--config.teacher.every=8",
    "--config.data.images=16", "--config.distill.epochs=2",
    "--config.evaluation.images=2", "--config.evaluation.prompts=('point',)",
    "--config.evaluation.choices=('single',)", "--config.export=('native',)",
    *OFTEN,
  ),
  "thor": (
    "thor.main", "--config=configs/thor.py:smoke",
    "--config.num_steps=24", "--config.data.source.languages=('de',)",
    "--config.data.source.rows=60", "--config.data.source.test_rows=2",
    "--config.data.source.names=10", "--config.vocabulary.size=256",
    "--config.model.encoder_layers=1", "--config.model.decoder_layers=1",
    "--config.model.expert_layers=all", "--config.translation.modes=()",
    "--config.translation.rows=1", "--config.translation.max_extra=1",
    "--config.data.token_budget=512", "--config.data.lengths=(64,)",
    "--config.evaluation.every=12", *OFTEN,
  ),
}  # fmt: skip


class Late(Wrong):
  """A process has waited for another one for too long."""


def main() -> int:
  """Runs the trials that are not there yet and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--trials", type=int, default=200)
  add("--hits", type=int, default=3, help="of a trial, at most")
  add("--seed", type=int, default=0)
  add("--workdir", default="runs/faults")
  add("--subjects", default=",".join(SUBJECTS))
  add("--processes", default="1,2", help="of a run")
  add("--kinds", default=",".join(KINDS), help="of hits")
  args = parser.parse_args()
  _check_names(args)
  quiet_libraries()
  workdir = pathlib.Path(args.workdir).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  _check_settings(workdir / "settings.json", args)
  commit = commit_of(ROOT)
  subjects = [
    Subject(f"{name} x {count}", SUBJECTS[name], int(count))
    for count in args.processes.split(",")
    for name in args.subjects.split(",")
  ]
  results = workdir / "results.jsonl"
  done = _read(results)
  for number in range(args.trials):
    if number in done:
      continue
    record = _trial(workdir, subjects, args, number, commit)
    done[number] = record
    with open(results, "a") as file:
      file.write(json.dumps(record) + "\n")
    print(f"trial {number}: {record}", flush=True)
  records = [done[number] for number in range(args.trials)]
  print(f"\nSeed {args.seed}, trials 0 to {args.trials - 1}.\n")
  print(table(records))
  return int(any(record["wrong"] for record in records))


def _check_names(args: Any) -> None:
  for name, known in (("subjects", SUBJECTS), ("kinds", KINDS)):
    unknown = set(getattr(args, name).split(",")) - set(known)
    if unknown:
      sys.exit(
        f"error: --{name}: {', '.join(sorted(unknown))}; there are "
        + ", ".join(known)
      )


def _check_settings(file: pathlib.Path, args: Any) -> None:
  """Trials in a folder are those of one seed and one set of runs."""
  names = ("seed", "hits", "subjects", "processes", "kinds")
  ours = {name: getattr(args, name) for name in names}
  if not file.exists():
    write_json(file, ours)
  for name, value in read_json(file).items():
    if value != ours[name]:
      sys.exit(
        f"error: --{name}={ours[name]}, but the trials in {file.parent} have "
        f"--{name}={value}: choose another --workdir"
      )


def commit_of(root: pathlib.Path) -> str:
  """What is tested: a commit, and a hash of what has changed since.

  Files that git does not know count where they are Python.
  """
  try:
    commit = _git(root, "describe", "--always", "--exclude=*").decode().strip()
    changes = _git(root, "diff", "HEAD", "--binary")
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "*.py")
    for name in sorted(filter(None, new.decode().split("\0"))):
      changes += f"\n{name}\n".encode() + (root / name).read_bytes()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  if not changes:
    return commit
  return f"{commit}-dirty-{hashlib.sha256(changes).hexdigest()[:8]}"


def _git(root: pathlib.Path, *arguments: str) -> bytes:
  return subprocess.run(
    ["git", *arguments], cwd=root, capture_output=True, check=True
  ).stdout


def _read(path: pathlib.Path) -> dict[int, dict[str, Any]]:
  if not path.exists():
    return {}
  records = map(json.loads, path.read_text().splitlines())
  return {record["trial"]: record for record in records}


def _trial(
  workdir: pathlib.Path,
  subjects: list[Subject],
  args: Any,
  number: int,
  commit: str,
) -> dict[str, Any]:
  """Hits a run, lets it end, and compares it with the one nothing has hit."""
  rng = random.Random(f"{args.seed}/{number}")
  subject = subjects[number % len(subjects)]
  straight = _straight(workdir, subject, commit)
  folder = workdir / f"trial{number}"
  _clear(folder)
  start = time.monotonic()
  trial = Trial(subject, folder, straight, rng)
  hits, wrong, kind = [], "", ""
  try:
    for _ in range(args.hits):
      if trial.is_finished():
        break
      kinds = args.kinds.split(",")
      (kind,) = rng.choices(kinds, [KINDS[kind][1] for kind in kinds])
      try:
        what = KINDS[kind][0](trial)
      except Impossible:
        what = IMPOSSIBLE
      if what:
        hits.append([kind, what])
    kind = "the end"
    _finish(subject, folder)
    trial.check_said()
    wrong = difference(straight.folder, folder)
  except (Wrong, UserError, subprocess.TimeoutExpired) as error:
    wrong = f"{type(error).__name__}: {error}"
    wrong += f" (at {kind}, after {len(hits)} hits)"
  if not wrong:
    _clear(folder)
  return {
    "trial": number, "subject": subject.name, "hits": hits, "wrong": wrong,
    "seconds": round(time.monotonic() - start, 1), "commit": commit,
  }  # fmt: skip


def _clear(folder: pathlib.Path) -> None:
  """Removes a run and what it has said."""
  if folder.exists():
    release(folder)
  shutil.rmtree(folder, ignore_errors=True)
  folder.with_suffix(".err").unlink(missing_ok=True)


def _straight(workdir: pathlib.Path, subject: Subject, commit: str) -> Straight:
  """The run of this commit that nothing hits, with its programs compiled."""
  folder = workdir / subject.name.replace(" ", "_")
  note = folder.with_suffix(".json")
  if not _is_kept(folder, note, commit):
    tries = _compile(subject, folder)
    _clear(folder)
    start = time.monotonic()
    joined, steps = _finish(subject, folder)
    seconds = time.monotonic() - start
    facts = {"seconds": seconds, "joined": joined, "steps": steps}
    write_json(note, {"commit": commit, "compile_tries": tries, **facts})
  facts = read_json(note)
  return Straight(folder, facts["seconds"], facts["joined"], facts["steps"])


def _is_kept(folder: pathlib.Path, note: pathlib.Path, commit: str) -> bool:
  """Whether a commit's run that nothing has hit is there, with its facts."""
  if not note.exists() or read_json(note)["commit"] != commit:
    return False
  try:
    trainings(folder)
  except Wrong:
    return False
  return True


def _compile(subject: Subject, folder: pathlib.Path) -> int:
  """Runs the command until all its programs are in the cache.

  Processes of a CPU wait for each other for 30 seconds (Gloo), which is less
  than the compilations of one may be behind those of another. Whatever else
  goes wrong in a run that nothing hits is raised.

  Returns:
    How often it ran.
  """
  tries = 0
  while True:
    _clear(folder)
    tries += 1
    try:
      _finish(subject, folder)
      return tries
    except Late:
      if tries == TRIES:
        raise


def _finish(subject: Subject, folder: pathlib.Path) -> tuple[float, int]:
  """Runs the command to its end.

  Returns:
    Seconds until the processes had found each other, and how many steps were
    logged.
  """
  start = time.monotonic()
  with Running(subject, folder) as running:
    while running.is_alive and not running.has_joined:
      time.sleep(0.05)
    joined = time.monotonic() - start
    statuses = running.wait()
    steps = running.steps()
  if set(statuses) != {0}:
    kind = Late if any(map(LATE.search, running.lines())) else Wrong
    raise kind(f"the run ends with {statuses}: {running.last_line()}")
  return joined, steps


def difference(straight: pathlib.Path, folder: pathlib.Path) -> str:
  """The first thing in which two finished runs differ, "" for none.

  Raises:
    Wrong: where there is nothing to compare with; see `trainings`.
  """
  for place in trainings(straight):
    ours, theirs = (
      _logged(base / place / "metrics.jsonl") for base in (straight, folder)
    )
    if ours != theirs:
      index = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b),
        min(len(ours), len(theirs)),
      )
      return f"{place / 'metrics.jsonl'}, line {index + 1}"
    _, expected = load_params(straight / place / "checkpoints")
    _, found = load_params(folder / place / "checkpoints")
    if not equal(expected, found):
      return f"parameters of {place}"
    steps = [checkpoint_steps(base / place / "checkpoints")[-1]
             for base in (straight, folder)]  # fmt: skip
    if steps[0] != steps[1]:
      return f"last steps {steps} of {place}"
  return ""


def _logged(file: pathlib.Path) -> list[dict[str, Any]]:
  """All that does not depend on a clock."""
  return [
    {
      key: value
      for key, value in line.items()
      if key not in CLOCKS[1:] and not key.startswith("speed/")
    }
    for line in read_metrics(file)
  ]


def table(records: list[dict[str, Any]]) -> str:
  """Hits by kind and subject, what could not be done, and what went wrong."""
  counts = collections.Counter(
    (record["subject"], kind)
    for record in records
    for kind, what in record["hits"]
    if what != IMPOSSIBLE
  )
  subjects = list(dict.fromkeys(record["subject"] for record in records))
  kinds = [kind for kind in KINDS if any(counts[s, kind] for s in subjects)]
  rows = [["run x processes", "trials", *kinds, "equal in the end"]]
  for subject in subjects:
    own = [record for record in records if record["subject"] == subject]
    equal = sum(not record["wrong"] for record in own)
    rows.append(
      [subject, str(len(own))]
      + [str(counts[subject, kind]) for kind in kinds]
      + [f"{equal} of {len(own)}"]
    )
  sums = (str(sum(counts[s, kind] for s in subjects)) for kind in kinds)
  equal = sum(not record["wrong"] for record in records)
  rows.append(["all", str(len(records)), *sums, f"{equal} of {len(records)}"])
  lines = ["| " + " | ".join(row) + " |" for row in rows]
  lines.insert(1, "|" + "---|" * len(rows[0]))
  return "\n".join([*lines, "", *_remarks(records)])


def _remarks(records: list[dict[str, Any]]) -> list[str]:
  commits = collections.Counter(record["commit"] for record in records)
  impossible = {
    kind
    for record in records
    for kind, what in record["hits"]
    if what == IMPOSSIBLE
  }
  return [
    "Commits: "
    + ", ".join(f"{commit} ({n} trials)" for commit, n in commits.items()),
    *(f"{kind}: {IMPOSSIBLE}, for want of the right to mount"
      for kind in sorted(impossible)),
    *(f"trial {record['trial']}, {record['subject']}: {record['wrong']}"
      for record in records if record["wrong"]),
  ]  # fmt: skip


if __name__ == "__main__":
  sys.exit(main())
