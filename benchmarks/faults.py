r"""Random faults, and whether the run that was hit is the one that was not.

    python benchmarks/faults.py --trials=200 --seed=0 --workdir=runs/faults

Every trial trains a small run of one project, as one process or several, and
hits it a few times at random moments: kill -9, SIGTERM, a stopped process, a
clock that jumps, damaged checkpoints, a folder that cannot be written, a second
run in the same folder, a dead worker. After each hit the same command starts
again. In the end every logged number and every parameter has to be the one of
the run that nothing has hit, bit for bit: a batch that was lost or repeated
shows in both. What a process says and with which status it ends is checked as
well. `damage` is a kill and then a damaged file.

Trials are drawn from the seed and their number. What has finished stands in
`results.jsonl`; the same command goes on where it was stopped.
"""

import argparse
import collections
import json
import pathlib
import random
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np
from faults_hits import KINDS, Running, Subject, Trial, Wrong

from common.checkpoint import checkpoint_steps, load_params
from common.errors import UserError
from common.logs import quiet_libraries
from common.metrics import CLOCKS, read_metrics

OFTEN = (
  "--config.checkpoint.every=2", "--config.checkpoint.keep=3",
  "--config.log.every=1",
)  # fmt: skip
SUBJECTS = {
  "birdie": (
    "birdie.main", "--config=configs/birdie.py:smoke",
    "--config.data.sequence_length=64", "--config.num_steps=24", *OFTEN,
  ),
  "udim": (
    "udim.main", "--config=configs/udim.py:train,smoke",
    "--config.num_steps=24", *OFTEN,
  ),
  "slimsam": (
    "slimsam.main", "--config=configs/slimsam.py:smoke", *OFTEN,
  ),
  "thor": (
    "thor.main", "--config=configs/thor.py:smoke",
    "--config.num_steps=24", "--config.data.source.rows=60",
    "--config.data.source.test_rows=2", "--config.data.source.names=10",
    "--config.vocabulary.size=256", "--config.translation.modes=()",
    "--config.data.token_budget=512", "--config.data.lengths=(64,)",
    "--config.evaluation.every=8", *OFTEN,
  ),
}  # fmt: skip


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
  args = parser.parse_args()
  quiet_libraries()
  workdir = pathlib.Path(args.workdir).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
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
    record = _trial(workdir, subjects, args, number)
    done[number] = record
    with open(results, "a") as file:
      file.write(json.dumps(record) + "\n")
    print(f"trial {number}: {record}", flush=True)
  print(f"\nSeed {args.seed}, trials 0 to {args.trials - 1}.\n")
  print(table([done[number] for number in range(args.trials)]))
  return int(any(record["wrong"] for record in done.values()))


def _read(path: pathlib.Path) -> dict[int, dict[str, Any]]:
  if not path.exists():
    return {}
  records = map(json.loads, path.read_text().splitlines())
  return {record["trial"]: record for record in records}


def _trial(
  workdir: pathlib.Path, subjects: list[Subject], args: Any, number: int
) -> dict[str, Any]:
  """Hits a run, lets it end, and compares it with the one nothing has hit."""
  rng = random.Random(f"{args.seed}/{number}")
  subject = subjects[number % len(subjects)]
  straight, seconds = _straight(workdir, subject)
  folder = workdir / f"trial{number}"
  shutil.rmtree(folder, ignore_errors=True)
  trial = Trial(subject, folder, seconds, rng)
  hits, wrong = [], ""
  try:
    for _ in range(args.hits):
      (kind,) = rng.choices(
        list(KINDS), [weight for _, weight in KINDS.values()]
      )
      what = KINDS[kind][0](trial)
      if what:
        hits.append([kind, what])
    _finish(subject, folder)
    wrong = difference(straight, folder)
  except (Wrong, UserError, subprocess.TimeoutExpired) as error:
    wrong = f"{type(error).__name__}: {error}"
  if not wrong:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".err").unlink()
  return {
    "trial": number, "subject": subject.name, "hits": hits, "wrong": wrong,
  }  # fmt: skip


def _straight(
  workdir: pathlib.Path, subject: Subject
) -> tuple[pathlib.Path, float]:
  """The run that nothing hits, and how long it takes with programs compiled."""
  folder = workdir / subject.name.replace(" ", "_")
  note = workdir / f"{folder.name}.json"
  if not note.exists():
    for _ in range(2):
      shutil.rmtree(folder, ignore_errors=True)
      start = time.monotonic()
      _finish(subject, folder)
      seconds = time.monotonic() - start
    note.write_text(json.dumps(seconds))
  return folder, json.loads(note.read_text())


def _finish(subject: Subject, folder: pathlib.Path) -> None:
  """Runs the command to its end."""
  with Running(subject, folder) as running:
    statuses = running.wait()
  if set(statuses) != {0}:
    raise Wrong(f"the run ends with {statuses}: {running.last_line()}")


def difference(straight: pathlib.Path, folder: pathlib.Path) -> str:
  """The first thing in which two finished runs differ, "" for none."""
  for file in sorted(straight.rglob("metrics.jsonl")):
    place = file.relative_to(straight)
    ours, theirs = (_logged(base / place) for base in (straight, folder))
    if ours != theirs:
      index = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b),
        min(len(ours), len(theirs)),
      )
      return f"{place}, line {index + 1}"
    _, expected = load_params(file.parent / "checkpoints")
    _, found = load_params(folder / place.parent / "checkpoints")
    if not _equal(expected, found):
      return f"parameters of {place.parent}"
    steps = [checkpoint_steps(base / place.parent / "checkpoints")[-1]
             for base in (straight, folder)]  # fmt: skip
    if steps[0] != steps[1]:
      return f"last steps {steps} of {place.parent}"
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


def _equal(a: Any, b: Any) -> bool:
  if isinstance(a, dict):
    return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
  return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def table(records: list[dict[str, Any]]) -> str:
  """Hits by kind and subject, and what went wrong."""
  counts = collections.Counter(
    (record["subject"], kind)
    for record in records
    for kind, _ in record["hits"]
  )
  subjects = list(dict.fromkeys(record["subject"] for record in records))
  rows = [["run x processes", "trials", *KINDS, "equal in the end"]]
  for subject in subjects:
    own = [record for record in records if record["subject"] == subject]
    equal = sum(not record["wrong"] for record in own)
    rows.append(
      [subject, str(len(own))]
      + [str(counts[subject, kind]) for kind in KINDS]
      + [f"{equal} of {len(own)}"]
    )
  sums = (str(sum(counts[s, kind] for s in subjects)) for kind in KINDS)
  equal = sum(not record["wrong"] for record in records)
  rows.append(["all", str(len(records)), *sums, f"{equal} of {len(records)}"])
  lines = ["| " + " | ".join(row) + " |" for row in rows]
  lines.insert(1, "|" + "---|" * len(rows[0]))
  wrong = [
    f"trial {record['trial']}, {record['subject']}: {record['wrong']}"
    for record in records
    if record["wrong"]
  ]
  return "\n".join([*lines, "", *wrong])


if __name__ == "__main__":
  sys.exit(main())
