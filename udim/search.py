"""Random search over hyper-parameters, and who chooses among the draws.

DomainBed's protocol (Gulrajani & Lopez-Paz, ICLR 2021, section 3.3): every
algorithm is drawn as often, draw 0 is the configuration, and each selection
method chooses among draws as it chooses among the steps of one. With tuning
seeds the choice is made once for all runs that are reported, on runs that are
not, and without draw 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from common.rngs import np_rng
from udim.algorithms import split_name

KINDS: Mapping[str, Callable[..., Any]] = {
  "log": lambda rng, low, high: float(
    math.exp(rng.uniform(math.log(low), math.log(high)))
  ),
  "uniform": lambda rng, low, high: float(rng.uniform(low, high)),
  "choice": lambda rng, *values: values[rng.integers(len(values))],
}


def draw_settings(config: Any, algorithm: str, draw: int) -> dict[str, Any]:
  """Settings of a draw, by key of the configuration.

  A function of `search.seed`, the algorithm and the number of the draw alone;
  `+swad` draws what the algorithm does.

  Args:
    config: `search.shared`, `search.spaces`, `search.seed`.
    algorithm: its name.
    draw: from 0, which is no change.

  Raises:
    UserError: for a range that is none.
  """
  if draw == 0:
    return {}
  name, _ = split_name(algorithm)
  space = [(key, *rest) for key, *rest in config.search.shared]
  space += [
    (f"methods.{name}.{key}", *rest)
    for key, *rest in config.search.spaces.get(name, ())
  ]
  rng = np_rng(config.search.seed, f"search/{name}", draw)
  return {key: _draw(rng, key, rest) for key, *rest in space}


def _draw(rng: np.random.Generator, key: str, range_: Sequence[Any]) -> Any:
  kind, *values = range_
  if kind not in KINDS:
    raise UserError(
      f"search: {key} has the range {tuple(range_)!r}; the first of it must be "
      f"one of {', '.join(KINDS)}"
    )
  if kind == "choice":
    holds = bool(values)
  else:
    least = 0 if kind == "log" else -math.inf
    holds = len(values) == 2 and least < values[0] <= values[1]
  if not holds:
    raise UserError(
      f"search: {key} has the range {tuple(range_)!r}; give "
      "('log', low, high) with 0 < low, ('uniform', low, high) or "
      "('choice', …)"
    )
  return KINDS[kind](rng, *values)
