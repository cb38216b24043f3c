r"""One run as one process and as several, and on from there with others.

    python benchmarks/processes.py --workdir=runs/processes

Every project trains a small run on eight devices of one process, on two
processes with four each and on four with two. Then the run of two processes is
taken up at its first checkpoint by one process with four devices, and by three
with four each. Batches are the same, so every logged loss has to be, but for
the order of sums: what differs by more than 1e-5 stands below the table, and
the status is 1. Differences are relative to the loss of one process, or to
1e-3 where that is less: sums of larger terms may come to almost nothing.
"""

import argparse
import math
import pathlib
import shutil
import sys

from faults import SUBJECTS
from faults_runs import Running, Subject

from common.logs import quiet_libraries
from common.metrics import read_metrics

# 24 rows are divided by 8, 4 and 12 devices.
ROWS = {
  "birdie": (
    "--config.data.batch_size=24", "--config.data.pack_rows=1",
    "--config.evaluation.batch_size=24",
  ),
  "udim": ("--config.data.images_per_domain=24",
           "--config.evaluation.batch_size=24"),
  "slimsam": (
    "--config.data.rows=24", "--config.teacher.rows=24",
    "--config.data.images=24",
  ),
  "thor": ("--config.data.row_multiple=24", "--config.data.token_budget=2048"),
}  # fmt: skip
STRAIGHT = ((1, 8), (2, 8), (4, 8))  # processes, devices
MOVED = ((1, 4), (3, 12))
LARGEST = 1e-5  # relative difference of a loss, from the order of sums
FLOOR = 1e-3  # of what it is relative to


def main() -> int:
  """Trains what is not there yet and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", default="runs/processes")
  parser.add_argument("--subjects", default=",".join(SUBJECTS))
  args = parser.parse_args()
  quiet_libraries()
  print(
    "| run | processes | devices | losses "
    f"| largest difference, relative to the loss or {FLOOR:g} |"
  )
  print("|---|---:|---:|---:|---:|")
  wrong = []
  for name in args.subjects.split(","):
    folder = pathlib.Path(args.workdir).absolute() / name
    folder.mkdir(parents=True, exist_ok=True)
    for processes, devices in STRAIGHT:
      _train(name, folder / f"{processes}x{devices}", processes, devices)
      wrong += _show(name, folder, f"{processes}x{devices}", processes, devices)
    for processes, devices in MOVED:
      moved = folder / f"moved{processes}x{devices}"
      if not moved.exists():
        _cut_short(folder / "2x8", moved)
      _train(name, moved, processes, devices)
      wrong += _show(
        f"{name}, from its first checkpoint",
        folder,
        moved.name,
        processes,
        devices,
      )
  for line in wrong:
    print(f"\n{line}")
  return int(bool(wrong))


def _train(
  name: str, folder: pathlib.Path, processes: int, devices: int
) -> None:
  """Trains to the end; what has ended says so at once."""
  arguments = (*SUBJECTS[name], *ROWS[name], "--config.checkpoint.keep=9")
  if name != "slimsam":  # which has epochs
    arguments += ("--config.num_steps=8",)
  with Running(
    Subject(name, arguments, processes), folder, devices=devices // processes
  ) as running:
    statuses = running.wait()
  if set(statuses) != {0}:
    sys.exit(f"{folder} ends with {statuses}: {running.last_line()}")


def _cut_short(source: pathlib.Path, target: pathlib.Path) -> None:
  """A run as it was at its first checkpoint."""
  shutil.copytree(source, target)
  for folder in target.rglob("checkpoints"):
    steps = sorted(int(step.name) for step in folder.iterdir())
    for step in steps[1:]:
      shutil.rmtree(folder / str(step))
  # SlimSAM's stages that have finished stay finished, but for the last.
  models = sorted(target.rglob("model/settings.json"))
  if models:
    shutil.rmtree(models[-1].parent)


def _show(
  title: str, folder: pathlib.Path, run: str, processes: int, devices: int
) -> list[str]:
  """Prints a row of the table and returns what is wrong with it."""
  difference, place, steps = _difference(folder / "1x8", folder / run)
  print(
    f"| {title} | {processes} | {devices} | {steps} | {difference:.1e} |",
    flush=True,
  )
  if difference <= LARGEST:
    return []
  return [f"{folder / run}: {place} differs by {difference:.1e}"]


def _difference(
  expected: pathlib.Path, found: pathlib.Path
) -> tuple[float, str, int]:
  """The largest relative difference of the losses, its place, and how many
  are finite in both. What is finite in one run alone differs by infinity.
  """
  largest, where, count = 0.0, "", 0
  for file in sorted(expected.rglob("metrics.jsonl")):
    place = file.relative_to(expected)
    ours, theirs = (_losses(base / place) for base in (expected, found))
    if ours.keys() != theirs.keys():
      sys.exit(f"{found} has logged other steps than {expected}")
    for (step, key), value in ours.items():
      error = _relative(value, theirs[step, key])
      if error > largest:
        largest, where = error, f"{key} at step {step} of {place}"
    count += sum(value is not None for value in ours.values())
  if not count:
    sys.exit(f"{expected} has logged no loss that is finite")
  return largest, where, count


def _relative(expected: float | None, found: float | None) -> float:
  if expected is None or found is None:  # not finite
    return 0.0 if expected is found else math.inf
  return abs(found - expected) / max(abs(expected), FLOOR)


def _losses(file: pathlib.Path) -> dict[tuple[int, str], float | None]:
  return {
    (line["step"], key): value
    for line in read_metrics(file)
    for key, value in line.items()
    if key in ("train/loss", "eval/loss", "valid/mse")
  }


if __name__ == "__main__":
  sys.exit(main())
