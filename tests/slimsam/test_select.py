"""Selection: rounding, local and global, normalisation, ties, bounds."""

import numpy as np
import pytest

from common.errors import UserError
from slimsam.select import (
  NORMALIZATIONS,
  best,
  kept_width,
  normalized,
  select_bottlenecks,
  select_embedding,
)


@pytest.mark.parametrize(
  ("width", "ratio", "multiple", "kept"),
  [
    (768, 0.5, 12, 384), (768, 0.77, 12, 168), (3072, 0.5, 12, 1536),
    (3072, 0.77, 12, 696), (1280, 0.77, 16, 288), (5120, 0.77, 16, 1168),
    (1024, 0.5, 16, 512), (768, 0.0, 12, 768),
    # 1 - 0.9 is not 0.1 in binary: 76.8 and 100 all the same.
    (768, 0.9, 12, 72), (1000, 0.9, 1, 100), (10, 0.7, 1, 3),
  ],
)  # fmt: skip
def test_what_stays_is_rounded_down_twice(width, ratio, multiple, kept):
  assert kept_width(width, ratio, multiple) == kept


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan")])
def test_ratios_have_a_range(ratio):
  with pytest.raises(UserError, match="from 0 and below 1"):
    kept_width(768, ratio, 12)


def test_something_has_to_stay():
  with pytest.raises(UserError, match=r"leaves nothing of a width of 24"):
    kept_width(24, 0.9, 12)


def test_the_first_of_equals_stays():
  assert list(best(np.array([1.0, 2.0, 2.0, 1.0, 2.0]), 2)) == [1, 2]
  assert list(best(np.zeros(4), 3)) == [0, 1, 2]


def test_channels_of_the_embedding_are_ranked_one_by_one():
  scores = np.array([0, 9, 1, 8, 2, 7, 3, 6, 4, 5, 0, 1], float)
  assert list(select_embedding(scores, 0.5, 3)) == [1, 3, 5, 7, 8, 9]


def test_by_residue_what_stays_repeats_with_the_head_width():
  rng = np.random.default_rng(0)
  scores = rng.random(24)
  kept = select_embedding(scores, 0.5, 3, by_residue=True)
  assert len(kept) == 12
  residues = sorted(set(kept % 8))
  assert list(kept) == [8 * head + r for head in range(3) for r in residues]
  summed = scores.reshape(3, 8).sum(axis=0)
  assert residues == sorted(np.argsort(-summed)[:4])


def blocks(heads, depth, head_width, hidden, seed=0):
  rng = np.random.default_rng(seed)
  scores = {f"qkv/{i}": rng.random(head_width) for i in range(depth)}
  return scores | {
    f"mlp/{i}": rng.random(hidden) * (i + 1) for i in range(depth)
  }


def test_local_keeps_the_same_number_in_every_block():
  scores = blocks(12, 3, 64, 3072)
  keep = select_bottlenecks(scores, 0.77, 12)
  assert {len(keep[f"qkv/{i}"]) for i in range(3)} == {14}  # 168 / 12
  assert {len(keep[f"mlp/{i}"]) for i in range(3)} == {696}
  for name, units in keep.items():
    rest = np.setdiff1d(np.arange(len(scores[name])), units)
    assert scores[name][units].min() > scores[name][rest].max()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
  ("ratio", "qkv", "mlp"), [(0.5, 4608, 18_432), (0.77, 2112, 8478)]
)
def test_global_counts_are_those_of_vit_b(ratio, qkv, mlp, normalization):
  scores = blocks(12, 12, 64, 3072)
  keep = select_bottlenecks(
    scores, ratio, 12, scope="global", normalization=normalization
  )
  found = sum(12 * len(keep[f"qkv/{i}"]) for i in range(12))
  assert found == qkv
  hidden = [len(keep[f"mlp/{i}"]) for i in range(12)]
  assert mlp <= sum(hidden) <= mlp + 132
  assert all((3072 - own) % 12 == 0 for own in hidden)
  assert len(set(hidden)) > 1


def test_global_spares_the_last_of_those_below_the_threshold():
  low = np.array([5.0, 1.0, 6.0, 2.0, 7.0, 3.0])
  # Three of twelve go: the 1, the 2 and the 3 of the first block; only two of
  # them make a multiple of two heads.
  keep = select_bottlenecks(
    {"mlp/0": low / 7, "mlp/1": np.ones(6)}, 0.25, 2, scope="global",
    normalization="max",
  )  # fmt: skip
  assert list(keep["mlp/0"]) == [0, 2, 4, 5]
  assert list(keep["mlp/1"]) == list(range(6))


def test_every_block_keeps_its_least():
  scores = {"qkv/0": np.arange(8.0) + 1, "qkv/1": np.full(8, 0.0)}
  scores["qkv/1"][3] = 1.0
  plain = select_bottlenecks(
    scores, 0.5, 2, scope="global", normalization="sum"
  )
  assert [len(plain["qkv/0"]), len(plain["qkv/1"])] == [7, 1]
  keep = select_bottlenecks(
    scores, 0.5, 2, scope="global", normalization="sum", min_keep=3
  )
  assert [len(keep["qkv/0"]), len(keep["qkv/1"])] == [5, 3]
  assert list(keep["qkv/1"]) == [0, 1, 3]
  with pytest.raises(UserError, match=r"min_keep=5: 8 units stay in 2 blocks"):
    select_bottlenecks(scores, 0.5, 2, scope="global", min_keep=5)


def test_normalisations_are_those_of_the_paper():
  scores = np.array([1.0, 2.0, 5.0])
  expected = {
    "sum": [0.125, 0.25, 0.625],
    "mean": [0.375, 0.75, 1.875],
    "max": [0.2, 0.4, 1.0],
    "standard": [0.0, 0.25, 1.0],
    # The unbiased deviation is sqrt(13 / 3).
    "gaussian": np.array([-5, -2, 7]) / 3 / np.sqrt(13 / 3),
  }
  for name, values in expected.items():
    np.testing.assert_allclose(normalized(scores, name), values, rtol=1e-7)


def test_scores_that_are_all_alike_have_no_nan():
  for name in NORMALIZATIONS:
    assert np.isfinite(normalized(np.zeros(4), name)).all()


def test_unknown_names_are_refused():
  scores = {"qkv/0": np.ones(4)}
  with pytest.raises(UserError, match="did you mean 'global'"):
    select_bottlenecks(scores, 0.5, 2, scope="globl")
  with pytest.raises(UserError, match="did you mean 'gaussian'"):
    select_bottlenecks(scores, 0.5, 2, scope="global", normalization="gausian")
