"""Counts and places of spans, and the search for delimiters."""

import collections

import pytest

from birdie import corruption
from common.data.tokenizers import ByteTokenizer
from common.rngs import np_rng


@pytest.mark.parametrize(
  ("n", "rate", "span", "expected"),
  [
    (512, 0.15, 3, (77, 26)),
    (1024, 0.5, 32, (512, 16)),
    (2048, 0.15, 8, (307, 38)),
    (128, 0.05, 32, (6, 1)),
    (256, 0.5, 3, (128, 43)),
    (2, 0.01, 3, (1, 1)),
    (10, 0.99, 1, (9, 1)),
    (50, 1.0, 3, (50, 1)),
  ],
)
def test_noise_counts(n, rate, span, expected):
  assert corruption.noise_counts(n, rate, span) == expected


def test_parts_are_uniform():
  rng = np_rng(0, "test")
  draws = [tuple(corruption.random_parts(6, 3, rng)) for _ in range(4000)]
  counts = collections.Counter(draws)
  assert all(sum(parts) == 6 and min(parts) > 0 for parts in counts)
  assert len(counts) == 10
  # 400 expected of each; 5 standard deviations.
  assert all(abs(count - 400) < 5 * 19 for count in counts.values())


def test_spans_are_disjoint_and_alternate_with_text():
  rng = np_rng(0, "test")
  for _ in range(50):
    starts, lengths = corruption.random_spans(60, 25, 7, rng)
    ends = starts + lengths
    assert starts[0] > 0
    assert ends[-1] == 60
    assert (starts[1:] > ends[:-1]).all()
    assert lengths.sum() == 25


@pytest.mark.parametrize(
  ("text", "start", "end", "alone"),
  [
    ("..a123456b......", "a", "b", True),
    ("..a123456b..b...", "a", "b", False),  # 1..b and 1..b..b
    ("..a123456b......b", "a", "b", True),  # the second is too far off
    ("..a1b23456b.....", "a", "b", True),  # a span of one is too short
    ("a12a3456b.......", "a", "b", False),
    ("a12a3456b.......", "2a", "b", True),
    ("a12345b..a67890b", "a", "b", False),
    ("a12345bb.a67890b", "a", "bb", True),
  ],
)
def test_stands_alone(text, start, end, alone):
  encode = ByteTokenizer().encode
  found = corruption.stands_alone(
    encode(text), encode(start), encode(end), shortest=4, longest=10
  )
  assert found == alone
