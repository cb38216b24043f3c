"""Published settings on 8, 64 and 256 devices, and the table that tells so."""

import itertools
import json
import math
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("devices", [8, 64, 256])
def test_all_projects_fit_and_the_table_says_how(devices):
  """Bytes of the state are exact; temporaries are this compiler's."""
  command = [sys.executable, "benchmarks/plans.py", f"--devices={devices}"]
  found = subprocess.run(
    [*command, "--match=paper"],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  rows = [json.loads(line) for line in found.stdout.splitlines()]
  projects = {row["config"].partition(".")[0] for row in rows}
  assert projects == {"birdie", "udim", "slimsam", "thor"}
  table = page_table()
  for row in rows:
    assert math.prod(row["mesh"].values()) == devices
    line = table[row["config"], devices]
    held = dict(row["bytes"])
    assert held.pop("temporaries") > 0
    for what, size in held.items():
      assert line[what] == f"{size / 2**20:,.1f}", (row["config"], what)
    for what, value in (
      ("GFLOPs", row["flops"] / 1e9),
      ("sent", sum(row["sent"].values()) / 2**20),
    ):
      told = float(line[what].replace(",", ""))
      assert told == pytest.approx(value, rel=0.01), (row["config"], what)


def page_table():
  """{(configuration, devices): {column: cell}} of the page."""
  lines = (ROOT / "launch/README.md").read_text().splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith("| run |"))
  header, _, *rest = ([c.strip() for c in line.strip("|").split("|")]
                      for line in lines[start:])  # fmt: skip
  rows = itertools.takewhile(lambda cells: len(cells) == len(header), rest)
  made = [dict(zip(header, cells)) for cells in rows]
  return {(row["run"].split("`")[1], int(row["devices"])): row for row in made}
