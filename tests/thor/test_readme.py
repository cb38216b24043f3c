"""The page's code runs as printed, and its commands are understood."""

import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "thor" / "README.md"
COMMANDS = [
  shlex.split(line, comments=True)
  for page in (PAGE, ROOT / "README.md")
  for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)
  for line in block.replace("\\\n", " ").splitlines()
  if re.match(r"python -m thor\.(main|compare) ", line)
]


def test_every_block_runs_after_those_before_it():
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  names = {"__name__": "page"}
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), names)
  assert len(blocks) == 2
  assert np.isfinite(names["loss"])
  assert names["logits"].shape == (2, 6, 100)
  for one, other in zip(*map(jax.tree.leaves, (names["first"],
                                               names["second"]))):  # fmt: skip
    assert (one != other).all()  # pairs that are distinct


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_key_of_a_command_is_known(command):
  done = subprocess.run(
    [sys.executable, *command[1:], "--print_config"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def test_there_are_commands():
  assert len(COMMANDS) >= 5
