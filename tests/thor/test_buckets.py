"""Pairs as flat arrays, and the shapes that a token budget gives."""

import pickle

import numpy as np
import pytest

from common.errors import UserError
from thor.buckets import (
  EOS,
  PAD,
  Bucket,
  EncodedPairs,
  bucket_pairs,
  make_buckets,
)


def test_pairs_come_back_as_they_were():
  examples = [([5, 6, EOS], [7, EOS]), ([EOS], [8, 9, 10, EOS])]
  pairs = EncodedPairs.of(iter(examples), [3, 4])
  assert len(pairs) == 2
  assert pairs.lengths.tolist() == [[3, 2], [1, 4]]
  assert pairs.num_tokens == 10
  assert pairs.languages.tolist() == [3, 4]
  for pair, example in zip(pairs, examples, strict=True):
    assert all(side.dtype == np.int32 for side in pair)
    assert [side.tolist() for side in pair] == list(example)
  copy = pickle.loads(pickle.dumps(pairs))
  for field in ("tokens", "offsets", "languages"):
    np.testing.assert_array_equal(getattr(copy, field), getattr(pairs, field))


def test_an_empty_corpus():
  pairs = EncodedPairs.of([])
  assert len(pairs) == pairs.num_tokens == 0
  assert pairs.lengths.shape == (0, 2)
  with pytest.raises(UserError, match=r"no pair to make batches of.*empty"):
    bucket_pairs(pairs, make_buckets(512))


@pytest.mark.parametrize(
  ("examples", "languages", "message"),
  [
    ([([5, EOS], [5])], None, r"pair 0: the target does not end with id 2"),
    ([([5], [5, EOS])], None, r"pair 0: the source does not end with id 2"),
    ([([EOS], [EOS]), ([], [EOS])], None, r"pair 1: the source is empty"),
    ([([EOS], [EOS]), ([4, EOS], [4, PAD, EOS])], None,
     r"pair 1: the target holds id 1, which stands for padding"),
    ([([EOS], [EOS])], [0, 1], r"1 pairs, but languages of shape \[2\]"),
    ([([EOS], [EOS])], [], r"1 pairs, but languages of shape \[0\]"),
  ],
)  # fmt: skip
def test_pairs_that_are_none_are_named(examples, languages, message):
  with pytest.raises(UserError, match=message) as caught:
    EncodedPairs.of(examples, languages)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("budget", "multiple", "max_rows", "rows"),
  [
    (4096, 1, None, [256, 128, 64, 32, 16]),
    (4000, 1, None, [250, 125, 62, 31, 15]),
    (4000, 8, None, [248, 120, 56, 24, 8]),
    (4000, 3, 100, [99, 99, 60, 30, 15]),
    (256, 1, 1, [1, 1, 1, 1, 1]),
  ],
)
def test_the_budget_gives_the_rows(budget, multiple, max_rows, rows):
  buckets = make_buckets(budget, multiple=multiple, max_rows=max_rows)
  assert [b.rows for b in buckets.shapes] == rows
  assert [b.source_length for b in buckets.shapes] == [16, 32, 64, 128, 256]
  for b in buckets.shapes:
    assert b.source_length == b.target_length
    assert b.rows * b.source_length <= budget


def test_the_longer_side_counts():
  shapes = make_buckets(64, lengths=[(4, 8), (16, 8)]).shapes
  assert shapes == (Bucket(4, 8, 8), Bucket(16, 8, 4))


@pytest.mark.parametrize(
  ("budget", "settings", "message"),
  [
    (255, {}, r"budget=255 is too small for the bucket of 256 source and 256 "
              r"target tokens: give at least 256"),
    (1024, {"multiple": 8}, r"of 256 .* give at least 2048, 8 rows"),
    (0, {}, r"budget=0 is too small for the bucket of 16"),
    (64, {"lengths": [8, 8]}, r"lengths=\[8, 8\]: give lengths that rise"),
    (64, {"lengths": [(8, 4), (4, 8)]}, r"give lengths that rise"),
    (64, {"lengths": []}, r"at least one"),
    (64, {"lengths": [0, 4]}, r"none below 1"),
    (4096, {"multiple": 8, "max_rows": 7}, r"max_rows=7.*multiples of 8"),
  ],
)  # fmt: skip
def test_shapes_that_cannot_be_are_refused(budget, settings, message):
  with pytest.raises(UserError, match=message) as caught:
    make_buckets(budget, **settings)
  assert "\n" not in str(caught.value)


def test_a_pair_goes_to_the_smallest_bucket_for_both_sides():
  buckets = make_buckets(128, lengths=(4, 8, (8, 16), 32))
  limits = [(b.source_length, b.target_length) for b in buckets.shapes]
  lengths = np.array([(s, t) for s in range(1, 40) for t in range(1, 40)])
  for (source, target), found in zip(lengths, buckets.assign(lengths)):
    fitting = [j for j, (s, t) in enumerate(limits) if source <= s]
    fitting = [j for j in fitting if target <= limits[j][1]]
    assert found == min(fitting, default=len(limits))
