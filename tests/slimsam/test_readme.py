"""The page's code runs as printed, and its commands are understood."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "slimsam" / "README.md"
COMMANDS = [
  shlex.split(line, comments=True)
  for block in re.findall(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL)
  for line in block.replace("\\\n", " ").splitlines()
  if line.startswith("python -m ")
]
# Those that a configuration is given to, and the others.
RUNS, VERBS = (
  [own for own in COMMANDS if is_run == any("--config" in a for a in own)]
  for is_run in (True, False)
)


def test_every_block_runs_after_those_before_it():
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  names = {"__name__": "page"}
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), names)
  assert len(blocks) == 2
  assert names["masks"].shape == (3, 48, 64)
  assert names["masks"].dtype == np.bool_
  assert names["scores"].shape == (3,)
  cfg = names["small_settings"].encoder
  assert (cfg.width, cfg.mlp_widths) == (24, (96, 40))


@pytest.mark.parametrize("command", VERBS, ids=" ".join)
def test_every_flag_is_known(command):
  module = importlib.import_module(command[2])
  module.make_parser().parse_args(command[3:])


@pytest.mark.parametrize("command", RUNS, ids=" ".join)
def test_every_key_of_a_command_is_known(command):
  done = subprocess.run(
    [sys.executable, *command[1:], "--print_config"],
    capture_output=True, text=True, cwd=ROOT, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
