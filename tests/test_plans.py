"""Published settings on 8, 64 and 256 devices, and the table that tells so."""

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
  page = (ROOT / "launch/README.md").read_text().splitlines()
  for row in rows:
    assert math.prod(row["mesh"].values()) == devices
    held = dict(row["bytes"])
    assert held.pop("temporaries") > 0
    assert row["flops"] > 1e9
    assert sum(row["sent"].values()) > 0
    (line,) = [
      line
      for line in page
      if line.startswith(f"| `{row['config']}` ") and f"| {devices} |" in line
    ]
    for size in held.values():
      assert f"| {size / 2**20:,.1f} |" in line
