"""Intervals and tests against textbook numbers and SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from common.errors import UserError
from common.statistics import (
  Interval,
  align,
  format_interval,
  holm,
  interval,
  paired,
  shares,
  verdicts,
)

# Student's t, two-sided, from the printed tables.
T_TABLE = [
  (2, 0.95, 12.7062),
  (3, 0.95, 4.3027),
  (8, 0.95, 2.3646),
  (8, 0.90, 1.8946),
  (8, 0.99, 3.4995),
  (31, 0.95, 2.0423),
]


@pytest.mark.parametrize(("count", "level", "factor"), T_TABLE)
def test_the_factor_is_students(count, level, factor):
  values = np.arange(count, dtype=float)
  found = interval(values, level)
  # The variance of 0, 1, ..., n-1 is n (n + 1) / 12.
  error = math.sqrt((count + 1) / 12)
  assert found.mean == pytest.approx((count - 1) / 2)
  assert found.half_width == pytest.approx(factor * error, rel=1e-4)
  assert found.count == count


def test_intervals_are_scipys():
  values = np.random.default_rng(0).normal(3, 2, 9)
  found = interval(values)
  low, high = stats.t.interval(0.95, 8, values.mean(), stats.sem(values))
  assert found.mean - found.half_width == pytest.approx(low)
  assert found.mean + found.half_width == pytest.approx(high)


def test_intervals_cover_as_often_as_they_say():
  draws = np.random.default_rng(0).normal(5, 3, (2000, 4))
  covered = [
    abs(found.mean - 5) < found.half_width for found in map(interval, draws)
  ]
  # Its standard deviation is 0.005; 1.96 for the factor would cover 0.86.
  assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
  ("values", "mean", "half_width"),
  [
    ([0.5], 0.5, math.nan),
    ([2, 2, 2], 2, 0),
    ([1, math.nan], math.nan, math.nan),
    ([1, math.inf], math.inf, math.nan),
  ],
)
def test_intervals_of_little(values, mean, half_width):
  found = interval(values)
  np.testing.assert_equal(
    (found.mean, found.half_width, found.count), (mean, half_width, len(values))
  )


def test_pairs_by_hand():
  # Differences 1, 2, 3, 2: mean 2, variance 2/3, error sqrt(1/6), t = 4.899.
  found = paired([11, 22, 33, 42], [10, 20, 30, 40])
  assert found.mean == 2
  assert found.half_width == pytest.approx(3.1824 / math.sqrt(6), rel=1e-4)
  assert (found.count, found.wins) == (4, 4)
  # Three degrees of freedom have a closed form; t / sqrt(3) = sqrt(8).
  p_value = 1 - 2 / math.pi * (math.atan(8**0.5) + 8**0.5 / 9)
  assert found.p_value == pytest.approx(p_value)


def test_pairs_are_scipys():
  rng = np.random.default_rng(1)
  reference = rng.normal(60, 5, 8)
  values = reference + rng.normal(0.5, 1, 8)
  found = paired(values, reference)
  expected = stats.ttest_rel(values, reference)
  low, high = expected.confidence_interval(0.95)
  assert found.p_value == pytest.approx(expected.pvalue)
  assert found.mean - found.half_width == pytest.approx(low)
  assert found.mean + found.half_width == pytest.approx(high)
  assert found.wins == np.sum(values > reference)


def test_what_a_seed_does_to_both_cancels():
  seeds = np.random.default_rng(2).normal(0, 10, 8)
  own = np.linspace(-0.1, 0.1, 8)
  found = paired(seeds + 1 + own, seeds)
  assert found.half_width < 0.1 < 5 < interval(seeds).half_width
  assert found.mean == pytest.approx(1)


def test_pairs_the_other_way_round_lose():
  one, other = [3.0, 1.0, 2.0], [1.0, 1.0, 3.0]
  first, second = paired(one, other), paired(other, one)
  assert first.mean == -second.mean
  assert first.p_value == second.p_value
  assert (first.wins, second.wins) == (1, 1)  # a tie is no win


@pytest.mark.parametrize(
  ("values", "reference", "p_value", "wins"),
  [
    ([1.0], [0.5], math.nan, 1),
    ([1.0, 2.0], [1.0, 2.0], 1.0, 0),
    ([1.5, 2.5], [1.0, 2.0], 0.0, 2),
    ([1.5, 2.5], [2.0, 3.0], 0.0, 0),
  ],
)
def test_pairs_without_spread(values, reference, p_value, wins):
  found = paired(values, reference)
  np.testing.assert_equal((found.p_value, found.wins), (p_value, wins))


def test_p_values_are_uniform_when_nothing_differs():
  draws = np.random.default_rng(3).normal(0, 1, (2000, 2, 5))
  p_values = [paired(*pair).p_value for pair in draws]
  assert np.mean(np.less(p_values, 0.05)) == pytest.approx(0.05, abs=0.015)


def test_align():
  first = {3: 0.3, 1: 0.1, 2: 0.2}
  second = {0: 9.0, 1: 1.0, 3: 3.0}
  found = align(first, second)
  np.testing.assert_array_equal(found, [[0.3, 0.1], [3.0, 1.0]])
  assert all(side.dtype == np.float64 for side in found)


HOLM = [
  ([], []),
  ([0.03], [0.03]),
  # 4 x .005, then 3 x .01, then 2 x .03, then .04 raised to the one before.
  ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
  ([0.4, 0.6, 0.5], [1.0, 1.0, 1.0]),
  ([0.02, 0.02], [0.04, 0.04]),
  ([0.01, math.nan, 0.04], [0.02, math.nan, 0.04]),
]


@pytest.mark.parametrize(("p_values", "adjusted"), HOLM)
def test_holm(p_values, adjusted):
  np.testing.assert_allclose(holm(p_values), adjusted, rtol=1e-12)


def test_holm_lies_between_the_claim_alone_and_bonferroni():
  p_values = np.random.default_rng(4).uniform(0, 0.2, 10)
  found = holm(p_values)
  assert np.all((found >= p_values) & (found <= np.minimum(10 * p_values, 1)))
  assert np.all(np.diff(found[np.argsort(p_values)]) >= 0)


@pytest.mark.parametrize(
  ("found", "options", "text"),
  [
    (Interval(0.61349, 0.0123, 8), {}, "61.3 ± 1.2"),
    (Interval(0.61349, 0.0123, 8), {"digits": 2}, "61.35 ± 1.23"),
    (Interval(0.61349, math.nan, 1), {}, "61.3 ± –"),
    (Interval(math.nan, math.nan, 2), {}, "–"),
    (Interval(0.0274, 0.0082, 8), {"signed": True}, "+2.7 ± 0.8"),
    (Interval(-0.0274, 0.0082, 8), {"signed": True}, "-2.7 ± 0.8"),
    (Interval(-0.0001, 0.0, 8), {}, "0.0 ± 0.0"),
    (Interval(-0.0001, 0.0, 8), {"signed": True}, "+0.0 ± 0.0"),
    (Interval(12.5, 0.25, 8), {"scale": 1, "digits": 2}, "12.50 ± 0.25"),
  ],
)
def test_format_interval(found, options, text):
  assert format_interval(found, **options) == text


def test_a_difference_is_an_interval():
  found = paired([0.63, 0.65, 0.62], [0.60, 0.61, 0.60])
  assert format_interval(found, signed=True) == "+3.0 ± 2.5"


MISTAKES = [
  (lambda: interval([]), r"\[0\]"),
  (lambda: interval(np.zeros((2, 3))), r"\[2, 3\]"),
  (lambda: interval([1, 2], 95), "level=95"),
  (lambda: paired([1, 2], [1, 2], 0), "level=0"),
  (lambda: paired([1, 2], [1]), "2 values .* 1"),
  (lambda: align({0: 1.0}, {1: 1.0, 2: 1.0}), "0 against 1, 2"),
  (lambda: align({}, {1: 1.0}), "none against 1"),
  (lambda: holm([0.1, 1.5]), "1.5"),
]


@pytest.mark.parametrize(("call", "words"), MISTAKES)
def test_mistakes_are_one_line(call, words):
  with pytest.raises(UserError, match=words) as info:
    call()
  assert "\n" not in str(info.value)


def test_verdicts_are_those_of_the_family():
  """Corrected together: what holds alone may not hold among others."""
  sure, doubtful = paired([3.0, 3.1, 2.9], [0] * 3), paired([1, 3, 2], [0] * 3)
  worse = paired([0] * 3, [3.0, 3.1, 2.9])
  lone = paired([1.0], [0.0])
  assert doubtful.p_value > 0.05
  words = [word for _, word in verdicts([sure, doubtful, worse, lone])]
  assert words == [
    "holds", "not shown", "the opposite holds", "one seed: no test",
  ]  # fmt: skip
  many = verdicts([paired([1.0, 1.5, 1.25], [0] * 3)] * 9)
  assert verdicts([paired([1.0, 1.5, 1.25], [0] * 3)])[0][1] == "holds"
  assert {word for _, word in many} == {"not shown"}


@pytest.mark.parametrize(
  ("right", "count"), [(0, 4), (1, 4), (4, 4), (0, 1), (12, 60)]
)
def test_shares_of_right_answers_have_wilsons_interval(right, count):
  found = shares([1.0] * right + [0.0] * (count - right))
  wilson = stats.binomtest(right, count).proportion_ci(method="wilson")
  assert found.mean == right / count
  assert (found.low, found.high) == pytest.approx(tuple(wilson))
  assert found.low < found.high


def test_means_of_shares_stay_within_their_range():
  values = [0.9, 1.0, 0.95, 0.4]
  found, free = shares(values), interval(values)
  assert found.low == pytest.approx(free.mean - free.half_width)
  assert free.mean + free.half_width > 1 == found.high
  # Equal ones say nothing of their spread.
  assert shares([0.5] * 4).low == shares([0.0, 1.0, 0.0, 1.0]).low
