"""Which form of the recurrence `impl="auto"` takes.

`scan_choice.json` holds, for platforms and dtypes where it was measured, the
form that trains fastest at some shapes; `benchmarks/linear_scan.py --write`
makes it. The nearest shape decides. Where nothing was measured, a CPU runs
the loop and everything else `jax.lax.associative_scan`.
"""

import functools
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TABLE = pathlib.Path(__file__).with_name("scan_choice.json")


class Measured(NamedTuple):
  """The fastest form at one shape.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    dtype: of the drive.
    rows: B N, how many recurrences there are.
    steps: T.
    impl: the form.
  """

  platform: str
  dtype: str
  rows: int
  steps: int
  impl: str


@functools.cache
def table() -> tuple[Measured, ...]:
  """What was measured."""
  return tuple(Measured(**row) for row in json.loads(TABLE.read_text()))


def choose(shape: tuple[int, int, int], dtype: Any) -> str:
  """The form for a drive of this shape and dtype on the default platform."""
  return nearest(jax.default_backend(), shape, str(jnp.dtype(dtype)), table())


def nearest(
  platform: str,
  shape: tuple[int, int, int],
  dtype: str,
  measured: tuple[Measured, ...],
) -> str:
  """The form that was fastest at the nearest shape.

  Args:
    platform: "cpu", "gpu" or "tpu".
    shape: [B, T, N].
    dtype: of the drive; where there is no row of it, those of float32 serve,
      but for complex numbers, and for float16 on a TPU.
    measured: see `table`.
  """
  batch, steps, channels = shape
  own = [row for row in measured if row.platform == platform]
  rows = [row for row in own if row.dtype == dtype]
  apart = dtype.startswith("complex") or (platform, dtype) == ("tpu", "float16")
  if not rows and not apart:
    rows = [row for row in own if row.dtype == "float32"]
  if not rows:
    return "sequential" if platform == "cpu" else "associative"

  def distance(row: Measured) -> float:
    wide = math.log2(max(batch * channels, 1) / row.rows)
    return math.hypot(wide, math.log2(steps / row.steps))

  return min(rows, key=distance).impl
