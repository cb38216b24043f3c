"""What a handful of seeds says: intervals, paired differences, families.

Seeds are few, so the factor is Student's and not 1.96; and all methods run on
the same seeds, so they are compared seed by seed: what a seed does to all of
them cancels. The text of a table is made here too.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy import stats

from common.errors import UserError

LEVEL = 0.05  # of a claim that holds, after correction
Key = TypeVar("Key", bound=Hashable)
Values = Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean and what is known of it.

  Attributes:
    mean: of the values.
    half_width: the interval is mean ± half_width; NaN for a single value.
    count: values.
  """

  mean: float
  half_width: float
  count: int


@dataclasses.dataclass(frozen=True)
class Difference(Interval):
  """The interval of paired differences.

  Attributes:
    p_value: of the two-sided paired t-test; NaN for a single pair, 1 where all
      pairs are equal.
    wins: pairs whose difference is positive.
  """

  p_value: float
  wins: int


def interval(values: Values, level: float = 0.95) -> Interval:
  """The t-interval of the mean: m ± t_{n-1} s / sqrt(n).

  Args:
    values: [n], independent draws such as accuracies by seed. A NaN among
      them makes the mean NaN.
    level: the coverage, between 0 and 1.

  Raises:
    UserError: without values, or for a level out of range.
  """
  values = _vector(values)
  if not 0 < level < 1:
    raise UserError(f"level={level} must be between 0 and 1, such as 0.95")
  count = len(values)
  factor = stats.t.ppf((1 + level) / 2, count - 1)  # NaN for one value
  mean, error = _mean_and_error(values)
  return Interval(mean, float(factor * error), count)


@dataclasses.dataclass(frozen=True)
class Shares:
  """A mean of shares and the interval around it, both from 0 to 1."""

  mean: float
  low: float
  high: float


def shares(values: Values, level: float = 0.95) -> Shares:
  """The mean of shares, such as of answers that are right or wrong.

  Values that are all 0 or 1, or all the same, get Wilson's interval, which is
  as wide as so many draws leave it even where all are right or none is; others
  get the t-interval, as far as it lies within 0 to 1.

      (p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

  Args:
    values: [n], from 0 to 1, independent.
    level: the coverage, between 0 and 1.

  Raises:
    UserError: without values, or for a level out of range.

  References:
    Wilson, Probable Inference, the Law of Succession, and Statistical
    Inference, 1927
  """
  values, found = _vector(values), interval(values, level)
  mean, half = found.mean, found.half_width
  if np.isin(values, (0, 1)).all() or np.ptp(values) == 0:
    # z^2 / n
    ratio = float(stats.norm.ppf((1 + level) / 2)) ** 2 / found.count
    half = math.sqrt(ratio * mean * (1 - mean) + ratio**2 / 4) / (1 + ratio)
    mean = (mean + ratio / 2) / (1 + ratio)
  # Rounding leaves the mean of 0 or 1 out.
  low = min(max(mean - half, 0.0), found.mean)
  return Shares(found.mean, low, max(min(mean + half, 1.0), found.mean))


def paired(
  values: Values, reference: Values, level: float = 0.95
) -> Difference:
  """The t-interval of `values - reference`, and its t-test.

  Args:
    values: [n], one a seed.
    reference: [n], of the same seeds in the same order; see `align`.
    level: the coverage, between 0 and 1.

  Raises:
    UserError: without values, for a level out of range, or if the two differ
      in length.
  """
  values, reference = _vector(values), _vector(reference)
  if len(values) != len(reference):
    raise UserError(
      f"{len(values)} values cannot be paired with {len(reference)}: take "
      "the seeds that both have (align)"
    )
  differences = values - reference
  found = interval(differences, level)
  _, error = _mean_and_error(differences)
  p_value = math.nan
  if found.mean == error == 0:
    p_value = 1.0
  elif found.count > 1:
    with np.errstate(divide="ignore"):  # equal differences: infinitely sure
      t = abs(np.float64(found.mean) / error)
    p_value = float(2 * stats.t.sf(t, found.count - 1))
  return Difference(
    found.mean,
    found.half_width,
    found.count,
    p_value=p_value,
    wins=int(np.sum(differences > 0)),
  )


def align(
  first: Mapping[Key, float], second: Mapping[Key, float]
) -> tuple[np.ndarray, np.ndarray]:
  """The values of the keys (seeds) that both have, in the order of the first.

  Returns:
    Two float64 arrays, [n].

  Raises:
    UserError: if they have no key in common.
  """
  common = [key for key in first if key in second]
  if not common:
    raise UserError(
      f"no seed in common: {_listing(first)} against {_listing(second)}; run "
      "both with the same seeds"
    )
  chosen = [[side[key] for key in common] for side in (first, second)]
  return np.array(chosen[0], np.float64), np.array(chosen[1], np.float64)


def holm(p_values: Values) -> np.ndarray:
  """p-values of a family of claims, so that any false one is as unlikely.

      p'_(i) = min(1, max_{j <= i} (m - j + 1) p_(j))      in rising order

  Args:
    p_values: [n]. A NaN stays NaN and counts for nothing: without a test
      there was no chance of a false claim.

  Returns:
    [n], adjusted, in the order given: below 0.05 holds at 5 % for all of them
    together.

  Raises:
    UserError: for values outside 0 to 1.

  References:
    Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979
  """
  adjusted = np.array(p_values, np.float64)
  tested = np.flatnonzero(~np.isnan(adjusted))
  values = adjusted[tested]
  if np.any((values < 0) | (values > 1)):
    raise UserError(f"p-values must be from 0 to 1, got {values.tolist()}")
  order = np.argsort(values, kind="stable")
  weighted = np.arange(len(values), 0, -1) * values[order]
  adjusted[tested[order]] = np.minimum(np.maximum.accumulate(weighted), 1)
  return adjusted


def verdicts(found: Sequence[Difference]) -> list[tuple[float, str]]:
  """Of a family of claims that differences are positive: p by Holm, and what
  it says at `LEVEL`.
  """
  adjusted = holm([one.p_value for one in found])
  made = []
  for one, p in zip(found, adjusted.tolist()):
    if math.isnan(p):
      verdict = "one seed: no test"
    elif p >= LEVEL:
      verdict = "not shown"
    else:
      verdict = "holds" if one.mean > 0 else "the opposite holds"
    made.append((p, verdict))
  return made


def format_interval(
  found: Interval,
  *,
  digits: int = 1,
  scale: float = 100.0,
  signed: bool = False,
) -> str:
  """Such as "61.3 ± 1.2"; "61.3 ± –" without an interval, "–" without a mean.

  Args:
    found: what to write.
    digits: after the point.
    scale: what one is written as; 100 for shares in percent.
    signed: a plus before what is not negative, for differences.
  """

  def text(value: float, sign: str = "") -> str:
    return f"{scale * value:{sign}z.{digits}f}" if np.isfinite(value) else "–"

  mean = text(found.mean, "+" if signed else "")
  return mean if mean == "–" else f"{mean} ± {text(found.half_width)}"


def _vector(values: Values) -> np.ndarray:
  array = np.asarray(values, np.float64)
  if array.ndim != 1 or not array.size:
    raise UserError(
      f"values of shape {list(array.shape)}: need one a seed, at least one"
    )
  return array


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
  """The mean and its standard error, NaN for one value."""
  with np.errstate(invalid="ignore"):  # infinities among them
    error = (
      values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.nan
    )
  return float(values.mean()), float(error)


def _listing(known: Mapping) -> str:
  return ", ".join(map(str, known)) or "none"
