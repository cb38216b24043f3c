"""The page's code runs as printed."""

import pathlib
import re

import jax
import numpy as np

PAGE = pathlib.Path(__file__).parents[2] / "udim" / "README.md"


def test_every_block_runs_after_those_before_it(capsys):
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  assert len(blocks) == 3
  names = {"__name__": "page"}
  losses = []
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), names)
    loss = names["loss_fn"](names["params"], names["images"], names["labels"])
    losses.append(float(loss))
  # Before, after four steps of SAM, after four more of UDIM.
  assert losses[0] > losses[1] > losses[2]
  assert all(
    np.isfinite(leaf).all() for leaf in jax.tree.leaves(names["params"])
  )
  assert "'active': 1.0" in capsys.readouterr().out
