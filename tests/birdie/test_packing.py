import dataclasses

import numpy as np
import pytest

from birdie.mixture import class_uniform
from birdie.objectives import Example
from birdie.packing import KEYS, Packer, PackStats, Rows, Seekable, TextPool
from birdie.presets import make_configuration
from birdie.vocab import byte_vocabulary
from common.errors import UserError
from common.rngs import np_rng

VOCAB = byte_vocabulary()
CORRUPTION = {"corruption_rate": 0.85, "mean_span": 4.0}


def entry(objective, name=None, **settings):
  cfg = {"min_length": 16, "max_length": 256} | settings
  entry = {"objective": objective, "name": name or objective, **cfg}
  return make_configuration(entry, VOCAB)


# The five objectives of the reference's benchmark.
FIVE = (
  entry("next_token_prediction"),
  entry("copying"),
  entry("prefix_language_modeling", prefix_frac=0.5),
  entry("autoencoding", **CORRUPTION),
  entry("infilling", **CORRUPTION),
)
FIVE_RATES = np.float32([0.3, 0.2, 0.2, 0.2, 0.1])


def documents(length, lengths=(700,), seed=0):
  """Windows of random bytes, without end: pieces as long as `lengths` say."""

  def pieces(i):
    rng = np_rng(seed, "text", i)
    text = rng.integers(64, 320, length, dtype=np.uint16)
    cuts = np.cumsum([lengths[i % len(lengths)]] * length)
    return [p for p in np.split(text, cuts[cuts < length]) if len(p)]

  return pieces


def example(n, m, start=64):
  return Example(
    inputs=np.arange(start, start + n, dtype=np.int32),
    labels=np.arange(start + n, start + n + m, dtype=np.int32),
    used=n + m,
  )


def test_the_papers_illustration():
  rows = Rows(1, 8, gen=1)
  rows.place(0, Example(np.array([4, 5, 6]), np.array([7, 8, 9]), 6), 3)
  expected = {
    "tokens": [4, 5, 6, 1, 7, 8, 0, 0],
    "targets": [0, 0, 0, 7, 8, 9, 0, 0],
    "loss_weights": [0, 0, 0, 1, 1, 1, 0, 0],
    "prefix": [1, 1, 1, 0, 0, 0, 0, 0],
    "segment_ids": [1, 1, 1, 1, 1, 1, 0, 0],
    "positions": [0, 1, 2, 3, 4, 5, 0, 0],
    "config_ids": [3, 3, 3, 3, 3, 3, -1, -1],
  }
  assert set(rows.arrays) == set(expected) == set(KEYS)
  for name, values in expected.items():
    np.testing.assert_array_equal(rows.arrays[name][0], values, err_msg=name)
    assert rows.arrays[name].dtype == KEYS[name]


def test_segments_lie_side_by_side_and_positions_restart():
  rows = Rows(2, 9, gen=1)
  rows.place(1, example(0, 3), 0)
  rows.place(1, example(2, 1), 5)
  arrays = {name: value[1].tolist() for name, value in rows.arrays.items()}
  assert arrays["tokens"] == [1, 64, 65, 64, 65, 1, 0, 0, 0]
  assert arrays["targets"] == [64, 65, 66, 0, 0, 66, 0, 0, 0]
  assert arrays["segment_ids"] == [1, 1, 1, 2, 2, 2, 0, 0, 0]
  assert arrays["positions"] == [0, 1, 2, 0, 1, 2, 0, 0, 0]
  assert arrays["config_ids"] == [0, 0, 0, 5, 5, 5, -1, -1, -1]
  assert rows.free == [9, 3]
  assert not rows.arrays["tokens"][0].any()


def test_what_does_not_fit_exactly_is_refused():
  rows = Rows(1, 6, gen=1)
  with pytest.raises(ValueError, match="do not fit"):
    rows.place(0, example(3, 4), 0)
  with pytest.raises(ValueError, match="at least one label"):
    rows.place(0, example(3, 0), 0)
  rows.place(0, example(3, 3), 0)
  assert rows.free == [0]


def test_tightest_and_roomiest_row():
  rows = Rows(3, 10, gen=1)
  rows.place(0, example(2, 2), 0)
  rows.place(2, example(4, 4), 0)
  assert rows.tightest(1) == 2
  assert rows.tightest(3) == 0
  assert rows.tightest(7) == 1
  assert rows.tightest(11) is None
  assert rows.roomiest() == 1


def test_text_stays_in_order_and_leftovers_stay():
  windows = {7: [np.arange(5), np.arange(10, 12)], 8: [np.arange(20, 30)]}
  pool = TextPool(windows.__getitem__, start=7, limit=2, shortest=3)
  assert pool.find(3) == 0
  np.testing.assert_array_equal(pool.take(0, 2), [0, 1])
  i = pool.find(4)  # the leftover has 3; the piece of 2 has gone
  np.testing.assert_array_equal(pool.take(i, 8), np.arange(20, 28))
  assert pool.find(4) is None
  np.testing.assert_array_equal(pool[pool.find(3)], [2, 3, 4])
  pool.give_back(np.arange(4))
  assert pool.find(4) == 0


def test_a_generator_moved_is_the_generator_made():
  seekable = Seekable(3, "stream")
  for counters in [(1, 2), (5, 0), (1, 2), (0, 2**40)]:
    moved, made = seekable(*counters), np_rng(3, "stream", *counters)
    np.testing.assert_array_equal(moved.random(5), made.random(5))
    assert moved.integers(9) == made.integers(9)


def check_laws(arrays, length):
  """Every law of the layout, for every row."""
  live = arrays["segment_ids"] > 0
  weights, prefix = arrays["loss_weights"], arrays["prefix"]
  assert set(np.unique(weights)) <= {0, 1}
  np.testing.assert_array_equal(live, prefix | (weights == 1))
  assert not (prefix & (weights == 1)).any()
  for name in ("tokens", "targets", "positions"):
    assert not arrays[name][~live].any()
  np.testing.assert_array_equal(arrays["config_ids"] == -1, ~live)
  assert not arrays["targets"][weights == 0].any()
  for row in range(len(live)):
    segments = arrays["segment_ids"][row]
    count = segments.max()
    used = int(live[row].sum())
    assert live[row, :used].all()  # padding at the end only
    np.testing.assert_array_equal(
      np.unique(segments[:used]), np.arange(1, count + 1)
    )
    assert (np.diff(segments[:used]) >= 0).all()
    for k in range(1, count + 1):
      check_segment({n: a[row, segments == k] for n, a in arrays.items()})


def check_segment(segment):
  size = len(segment["tokens"])
  n = int(segment["prefix"].sum())
  assert segment["prefix"][:n].all()
  assert n < size
  np.testing.assert_array_equal(segment["positions"], np.arange(size))
  assert segment["tokens"][n] == VOCAB.gen
  np.testing.assert_array_equal(
    segment["tokens"][n + 1 :], segment["targets"][n:-1]
  )
  assert len(np.unique(segment["config_ids"])) == 1


@pytest.mark.parametrize("length", [64, 300, 1024])
@pytest.mark.parametrize("lengths", [(700,), (40, 200)])
def test_every_row_obeys_the_layout(length, lengths):
  packer = Packer(FIVE, rows=4, length=length, seed=1)
  arrays, stats = packer.pack_group(3, FIVE_RATES, documents(length, lengths))
  check_laws(arrays, length)
  assert int((arrays["segment_ids"] > 0).sum()) == stats.tokens.sum()
  assert int(arrays["loss_weights"].sum()) == stats.target_tokens.sum()
  assert int(arrays["segment_ids"].max(1).sum()) == stats.samples.sum()
  for config in range(len(FIVE)):
    tokens = (arrays["config_ids"] == config).sum()
    assert tokens == stats.tokens[config]
  np.testing.assert_array_equal(stats.drawn, stats.placed + stats.dropped)


def test_a_group_is_a_function_of_its_number_and_the_mixture():
  """The reference's batches differ between runs of one seed (its process id
  and its clock are in the seeds), and its objectives corrupt alike on every
  call (they seed themselves anew)."""
  pieces = documents(256)
  packer = Packer(FIVE, rows=4, length=256, seed=1)
  again = dataclasses.replace(packer)

  def tokens(packer, group, probs=FIVE_RATES):
    return packer.pack_group(group, probs, pieces)[0]["tokens"]

  tokens(packer, 0)
  first = tokens(packer, 5)
  np.testing.assert_array_equal(first, tokens(again, 5))
  assert (first != tokens(packer, 6)).any()
  assert (first != tokens(packer, 5, FIVE_RATES[::-1])).any()
  for other in ({"seed": 2}, {"stream": "eval"}):
    assert (first != tokens(dataclasses.replace(packer, **other), 5)).any()


def test_samples_of_one_text_are_corrupted_differently():
  text = np.arange(64, 164)
  packer = Packer(
    (entry("infilling", min_length=100, max_length=100),),
    rows=8,
    length=256,
    seed=0,
  )
  arrays, stats = packer.pack_group(0, np.ones(1), lambda i: [text])
  assert stats.samples[0] >= 8
  starts = np.argwhere(arrays["positions"] == 0)
  prefixes = {
    tuple(arrays["tokens"][row, i : i + 60])
    for row, i in starts
    if arrays["segment_ids"][row, i] > 0
  }
  assert len(prefixes) == stats.samples[0]


def total(packer, groups, probs, pieces):
  stats = [packer.pack_group(g, probs, pieces)[1] for g in range(groups)]
  return sum(stats, PackStats.zeros(len(probs)))


def test_rows_of_the_five_objectives_are_full():
  entries = tuple(
    dataclasses.replace(
      e, cfg=dataclasses.replace(e.cfg, min_length=64, max_length=1024)
    )
    for e in FIVE
  )
  packer = Packer(entries, rows=8, length=1024, seed=0)
  stats = total(packer, 40, FIVE_RATES, documents(1024, (1024,)))
  assert stats.fill >= 0.95
  assert stats.dropped.sum() < 0.12 * stats.drawn.sum()
  # The share of samples is the mixture's, that of tokens is not.
  np.testing.assert_allclose(
    stats.samples / stats.samples.sum(), FIVE_RATES, atol=0.05
  )
  share = stats.tokens / stats.tokens.sum()
  assert np.abs(share - FIVE_RATES).max() > 0.05


@pytest.mark.parametrize(
  "probs", [FIVE_RATES, class_uniform(range(5)), np.eye(5)[3]]
)
def test_draws_follow_the_mixture(probs):
  packer = Packer(FIVE, rows=8, length=512, seed=0)
  drawn = total(packer, 120, probs, documents(512, (512,))).drawn
  expected = drawn.sum() * probs
  assert not drawn[expected == 0].any()
  kept = expected > 0
  chi_square = np.sum((drawn - expected)[kept] ** 2 / expected[kept])
  assert drawn.sum() > 1500
  assert chi_square < 23.5  # upper 1e-4 quantile, 4 degrees of freedom


def test_long_configurations_do_not_lose_at_the_ends_of_rows():
  """Rows that are filled one after the other penalise long samples: they
  rarely fit what is left."""
  entries = (
    entry("copying", "short", min_length=16, max_length=32),
    entry("copying", "long", min_length=100, max_length=200),
  )
  packer = Packer(entries, rows=8, length=512, seed=0)
  stats = total(packer, 60, np.float32([0.5, 0.5]), documents(512, (512,)))
  share = stats.placed / stats.placed.sum()
  np.testing.assert_allclose(share, 0.5, atol=0.03)


def test_a_failing_objective_at_the_end_of_a_row_is_no_error():
  """The reference's run dies with status=fail there."""
  entries = (
    entry("prefix_language_modeling", min_length=60, max_length=100),
    entry("selective_copying", min_length=120, max_length=200),
  )
  packer = Packer(entries, rows=4, length=256, seed=0, min_fill=1)
  stats = total(packer, 20, np.float32([0.5, 0.5]), documents(256, (61, 256)))
  assert stats.samples.all()
  assert stats.dropped.any()
  assert stats.fill > 0.6


def test_text_that_nobody_can_use_ends_in_one_line():
  packer = Packer(FIVE, rows=4, length=256, seed=0)
  for lengths in ((3,), (15,)):
    with pytest.raises(UserError, match="16 tokens") as error:
      packer.pack_group(0, FIVE_RATES, documents(256, lengths))
    assert "\n" not in str(error.value)


def test_a_configuration_that_finds_no_text_leaves_the_rows_to_others():
  entries = (
    entry("copying"),
    entry("copying", "long", min_length=100, max_length=110),
  )
  packer = Packer(entries, rows=2, length=256, seed=0)
  stats = packer.pack_group(0, np.float32([0.5, 0.5]), documents(256, (90,)))[1]
  assert stats.samples[1] == 0
  assert stats.dropped[1] == stats.drawn[1] > 0
  assert stats.fill > 0.9


def test_no_text_is_used_twice_in_a_group():
  text = np.arange(64, 64 + 4096)

  def pieces(i):
    return [text[i * 256 : (i + 1) * 256]]

  packer = Packer((entry("next_token_prediction"),), 4, 256, seed=0)
  arrays, stats = packer.pack_group(0, np.ones(1), pieces)
  labels = arrays["targets"][arrays["loss_weights"] > 0]
  assert len(np.unique(labels)) == len(labels) == stats.text_tokens.sum()
