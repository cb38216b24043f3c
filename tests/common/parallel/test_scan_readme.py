"""Every block of code of common/parallel/README.md runs, in its order."""

import pathlib
import re

import jax
import numpy as np

from common.parallel import linear_scan, scan

README = pathlib.Path(scan.__file__).with_name("README.md")


def test_its_code_runs():
  text = README.read_text()
  blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  assert len(blocks) == 3
  names = {}
  exec(blocks[0], names)
  np.testing.assert_allclose(names["h"][0, -1], 1.9375)
  exec(blocks[1], names)
  _, last = linear_scan(names["x"], names["a"], names["h0"])
  np.testing.assert_allclose(names["state"], last, rtol=1e-5)
  _, last = linear_scan(names["x"], names["a"])
  exec(blocks[2], names)
  np.testing.assert_allclose(names["last"], last, rtol=1e-5)
  assert names["h"].sharding.spec == jax.P(None, "seq")
