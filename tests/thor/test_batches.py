"""Laws of epochs and batches of pairs."""

import logging
import pickle

import jax
import numpy as np
import pytest

from common.errors import UserError
from common.parallel import batch_sharding, make_mesh
from thor.buckets import (
  EOS,
  PAD,
  Bucket,
  EncodedPairs,
  bucket_pairs,
  make_buckets,
)
from thor.data import (
  EvalReader,
  TrainReader,
  eval_batches,
  row_multiple,
  shift_right,
  train_loader,
)

LENGTHS = (4, 8, (8, 16), 32)


def make_pairs(count=101, seed=0, longest=32):
  """Pair i has ids of i alone on both sides, language i mod 5."""
  rng = np.random.default_rng(seed)
  examples = []
  for i in range(count):
    sides = [[10 + i] * rng.integers(0, longest) for _ in range(2)]
    examples.append(tuple(np.array([*s, EOS], np.int32) for s in sides))
  return EncodedPairs.of(examples, np.arange(count) % 5)


def make_plan(count=101, budget=128, multiple=1, **settings):
  buckets = make_buckets(budget, lengths=LENGTHS, multiple=multiple)
  return bucket_pairs(make_pairs(count), buckets, **settings)


def take(loader, count):
  with loader:
    return [next(loader) for _ in range(count)]


def shape_of(batch):
  rows, source = batch["source"].shape
  assert batch["target"].shape[0] == rows
  assert batch["language"].shape == (rows,)
  return Bucket(source, batch["target"].shape[1], rows)


def rows_of(batch):
  """(source, target, language) of each row that is not empty, as tuples."""
  rows = []
  for source, target, language in zip(
    *(np.asarray(batch[key]) for key in ("source", "target", "language"))
  ):
    if (source == PAD).all():
      assert (target == PAD).all()
      assert language == 0
      continue
    sides = []
    for side in (source, target):
      length = side.tolist().index(EOS) + 1
      assert (side[length:] == PAD).all()
      sides.append(tuple(side[:length].tolist()))
    rows.append((*sides, int(language)))
  return rows


def every_pair(pairs):
  return [
    (*(tuple(side.tolist()) for side in pairs[i]), int(pairs.languages[i]))
    for i in range(len(pairs))
  ]


def together(batches):
  """Which pairs share a batch."""
  return {frozenset(rows_of(batch)) for batch in batches}


def assert_equal(a, b):
  for one, other in zip(a, b, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(
        np.asarray(one[key]), np.asarray(other[key])
      )


@pytest.mark.parametrize("xp", [np, jax.numpy])
def test_the_decoder_begins_with_eos(xp):
  """fairseq moves the EOS from the target's end to its beginning."""
  target = xp.asarray(
    [[5, 6, 7, EOS], [5, EOS, PAD, PAD], [EOS, PAD, PAD, PAD], [PAD] * 4],
    xp.int32,
  )
  shifted = shift_right(target)
  assert type(shifted) is type(target)
  assert shifted.dtype == xp.int32
  assert shifted.tolist() == [
    [EOS, 5, 6, 7], [EOS, 5, PAD, PAD], [EOS, PAD, PAD, PAD], [PAD] * 4,
  ]  # fmt: skip
  assert jax.jit(shift_right)(target).tolist() == shifted.tolist()
  assert shift_right(target, 9)[:3, 0].tolist() == [9] * 3


@pytest.mark.parametrize("count", [1, 2, 33, 101, 300])
def test_an_epoch_visits_every_pair_once(count):
  plan = make_plan(count)
  epochs = []
  batches = take(train_loader(plan, seed=3), 3 * plan.num_batches)
  for epoch in range(3):
    own = batches[epoch * plan.num_batches :][: plan.num_batches]
    seen = [row for batch in own for row in rows_of(batch)]
    assert sorted(seen) == sorted(every_pair(plan.pairs))
    epochs.append(seen)
  if count > 100:
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_have_few_shapes_and_keep_the_budget():
  plan = make_plan(300, budget=120, multiple=3)
  shapes = {}
  for batch in take(train_loader(plan, seed=0), plan.num_batches):
    assert all(array.dtype == np.int32 for array in batch.values())
    shape = shape_of(batch)
    shapes[shape] = shapes.get(shape, 0) + 1
    assert shape.rows * max(shape.source_length, shape.target_length) <= 120
    assert shape.rows % 3 == 0
  counts = dict(zip(plan.buckets.shapes, plan.batch_counts.tolist()))
  assert shapes == {s: count for s, count in counts.items() if count}


def test_only_the_last_batch_of_a_bucket_has_empty_rows():
  plan = make_plan(300)
  missing = {shape: [] for shape in plan.buckets.shapes}
  for batch in take(train_loader(plan, seed=0), plan.num_batches):
    shape = shape_of(batch)
    missing[shape].append(shape.rows - len(rows_of(batch)))
  for shape, members in zip(plan.buckets.shapes, plan.members):
    assert sum(empty > 0 for empty in missing[shape]) <= 1
    assert sum(missing[shape]) == -len(members) % shape.rows


def test_both_pairs_and_batches_are_shuffled():
  plan = make_plan(300)
  batches = take(train_loader(plan, seed=0), 2 * plan.num_batches)
  shapes = [shape_of(batch) for batch in batches]
  half = len(shapes) // 2
  assert shapes[:half] != sorted(shapes[:half], key=lambda b: b.target_length)
  assert shapes[:half] != shapes[half:]
  assert together(batches[:half]) != together(batches[half:])


def test_seed_and_number_make_the_batch():
  plan = make_plan()
  every = take(train_loader(plan, seed=0), 40)
  assert_equal(every, take(train_loader(plan, seed=0), 40))
  assert_equal(every[31:], take(train_loader(plan, seed=0, start=31), 9))
  other = take(train_loader(plan, seed=1), 40)
  assert [*map(shape_of, every)] != [*map(shape_of, other)]
  epoch = slice(plan.num_batches)  # not the same batches in another order
  assert together(every[epoch]) != together(other[epoch])


def test_the_position_is_one_number():
  plan = make_plan()
  loader = train_loader(plan, seed=0)
  straight = [next(loader) for _ in range(2 * plan.num_batches)]
  assert loader.get_state() == {"step": len(straight)}
  loader.set_state({"step": 5})
  assert_equal(straight[5:], take(loader, len(straight) - 5))


def test_workers_change_nothing():
  plan = make_plan()
  alone = take(train_loader(plan, seed=0), 12)
  assert_equal(alone, take(train_loader(plan, seed=0, workers=2), 12))


def test_a_reader_that_was_used_can_be_sent():
  reader = TrainReader(make_plan(), 0)
  expected = [reader(k) for k in range(30)]
  copy = pickle.loads(pickle.dumps(reader))
  assert_equal(expected, [copy(k) for k in range(30)])


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_processes_are_the_batch(processes):
  plan = make_plan(budget=256, multiple=4)
  readers = [
    (TrainReader(plan, 0), lambda i: TrainReader(plan, 0, i, processes)),
    (EvalReader(plan), lambda i: EvalReader(plan, i, processes)),
  ]
  for whole, share in readers:
    shares = [share(i) for i in range(processes)]
    for k in range(plan.num_batches):
      made = [reader(k) for reader in shares]
      together = {
        key: np.concatenate([part[key] for part in made]) for key in made[0]
      }
      assert_equal([whole(k)], [together])


def test_fill_rate_against_counting():
  plan = make_plan(300)
  batches = take(train_loader(plan, seed=0), plan.num_batches)
  for side, key in enumerate(("source", "target")):
    tokens = sum(int((batch[key] != PAD).sum()) for batch in batches)
    assert plan.num_tokens[side] == tokens == plan.pairs.lengths[:, side].sum()
    places = sum(batch[key].size for batch in batches)
    assert plan.fill_rate[side] == pytest.approx(tokens / places)


def test_fill_rate_by_hand_and_the_line_that_says_it(caplog):
  caplog.set_level(logging.INFO)
  pairs = EncodedPairs.of([([9, EOS], [9, 9, EOS]), ([EOS], [9, EOS])] * 3)
  plan = bucket_pairs(pairs, make_buckets(16, lengths=(4, 8)))
  assert plan.batch_counts.tolist() == [2, 0]  # of 4 rows
  assert plan.fill_rate == (9 / 32, 15 / 32)
  train_loader(plan, seed=0).close()
  assert caplog.messages == [plan.summary()]
  assert plan.summary() == (
    "6 pairs in 1 of 2 buckets, 2 batches an epoch; 9 source and 15 target "
    "tokens fill 28.1% and 46.9%"
  )


LONG = [
  ([5, EOS], [5, EOS]),
  ([6] * 9 + [EOS], [6, 7, EOS]),
  ([8, EOS], [8] * 20 + [EOS]),
  ([7] * 7 + [EOS], [7] * 7 + [EOS]),
]


def long_plan(too_long, **settings):
  buckets = make_buckets(32, lengths=(4, 8), **settings)
  return bucket_pairs(EncodedPairs.of(LONG), buckets, too_long=too_long)


TOO_LONG = (
  "2 of 4 pairs have more than 8 source or 8 target tokens, the first is pair "
  "1 with 10 and 3: "
)


def test_pairs_that_are_too_long_are_an_error():
  with pytest.raises(UserError) as caught:
    long_plan("error")
  assert str(caught.value) == (
    TOO_LONG + "set data.too_long='skip' or 'cut', or longer data.lengths"
  )
  with pytest.raises(UserError, match=r"'skp' is unknown; did you mean 'skip'"):
    long_plan("skp")


def test_pairs_that_are_too_long_are_skipped(caplog):
  plan = long_plan("skip")
  assert caplog.messages == [TOO_LONG + "skipped"]
  assert plan.summary().endswith("; 2 too long: skipped")
  assert plan.long_pairs.tolist() == [1, 2]
  assert plan.num_pairs == 2
  for batches in (
    take(train_loader(plan, seed=0), plan.num_batches), eval_batches(plan),
  ):  # fmt: skip
    seen = [row[:2] for batch in batches for row in rows_of(batch)]
    kept = [LONG[0], LONG[3]]
    assert sorted(seen) == sorted((tuple(s), tuple(t)) for s, t in kept)


def test_pairs_that_are_too_long_are_cut(caplog):
  plan = long_plan("cut")
  assert caplog.messages == [TOO_LONG + "cut"]
  assert plan.summary().endswith("; 2 too long: cut")
  assert plan.num_pairs == 4
  (short, long) = eval_batches(plan)
  assert rows_of(short) == [((5, EOS), (5, EOS), 0)]
  assert rows_of(long) == [
    ((8, EOS), (*[8] * 7, EOS), 0),
    ((*[7] * 7, EOS), (*[7] * 7, EOS), 0),
    ((*[6] * 7, EOS), (6, 7, EOS), 0),
  ]
  assert long["index"].tolist() == [2, 3, 1, -1]
  assert plan.num_tokens == (2 + 2 + 8 + 8, 2 + 8 + 8 + 3)


def test_skipping_all_is_an_error():
  buckets = make_buckets(32, lengths=(1,))
  with pytest.raises(UserError, match="all of it was skipped as too long"):
    bucket_pairs(EncodedPairs.of(LONG), buckets, too_long="skip")


@pytest.mark.parametrize("count", [1, 33, 300])
def test_evaluation_sees_every_pair_once_and_in_order_of_length(count):
  plan = make_plan(count)
  made = eval_batches(plan)
  batches = list(made)
  assert len(made) == len(batches) == plan.num_batches
  outputs, lengths = {}, []
  for batch in batches:
    index = batch["index"]
    assert index.dtype == np.int32
    assert ((index < 0) == (batch["source"] == PAD).all(axis=1)).all()
    own = rows_of(batch)
    assert (index[len(own) :] == -1).all()
    outputs |= dict(zip(index.tolist(), own))
    lengths.append([len(row[0]) for row in own])
    assert lengths[-1] == sorted(lengths[-1])
  assert [outputs[i] for i in range(count)] == every_pair(plan.pairs)
  widths = [batch["target"].shape[1] for batch in batches]
  assert widths == sorted(widths)
  assert_equal(batches, made)  # as often as needed


@pytest.mark.parametrize(
  "axes", [{"data": 8}, {"data": 2, "fsdp": 2, "seq": 2}]
)
def test_batches_lie_on_the_mesh(axes):
  mesh = make_mesh(axes)
  sharding = batch_sharding(mesh)
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  assert row_multiple(sharding) == shards
  assert row_multiple(sharding, accum=3) == 3 * shards
  plan = make_plan(budget=512, multiple=row_multiple(sharding))
  placed = take(train_loader(plan, seed=0, sharding=sharding), 5)
  assert_equal(take(train_loader(plan, seed=0), 5), placed)
  for batch in [*placed, *eval_batches(plan, sharding=sharding)]:
    for array in batch.values():
      assert array.sharding.is_equivalent_to(sharding, array.ndim)
      own = array.addressable_shards[0].data
      assert own.shape == (array.shape[0] // shards, *array.shape[1:])
  assert_equal(eval_batches(plan), eval_batches(plan, sharding=sharding))


def test_rows_that_do_not_fit_the_mesh_are_refused():
  sharding = batch_sharding(make_mesh({"data": 8}))
  plan = make_plan(budget=128, multiple=4)
  for make in (eval_batches, lambda *a, **kw: train_loader(*a, seed=0, **kw)):
    with pytest.raises(UserError, match=r"4 rows of 32.*the 8 shards"):
      make(plan, sharding=sharding)


def test_a_bucket_compiles_once():
  plan = make_plan(300)
  traced = []

  @jax.jit
  def step(batch):
    traced.append(shape_of(batch))
    return sum(array.sum() for array in batch.values())

  for batch in take(train_loader(plan, seed=0), 2 * plan.num_batches):
    assert int(step(batch)) == sum(int(a.sum()) for a in batch.values())
  assert len(traced) == len(set(traced)) == len(LENGTHS)


# Each of two processes checks its shards against the whole batch, which it
# makes on its own.
TWO = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from common.parallel import batch_sharding, make_mesh
from thor.buckets import EncodedPairs, bucket_pairs, make_buckets
from thor.data import eval_batches, row_multiple, train_loader

rng = np.random.default_rng(0)
pairs = EncodedPairs.of(
  [[[7] * n + [2] for n in rng.integers(0, 16, 2)] for _ in range(99)],
  range(99),
)
sharding = batch_sharding(make_mesh({"data": 2, "fsdp": 2}))
buckets = make_buckets(
  128, lengths=(4, 8, 16), multiple=row_multiple(sharding)
)
plan = bucket_pairs(pairs, buckets)
assert plan.num_batches > 5
with (
  train_loader(plan, seed=0, sharding=sharding) as ours,
  train_loader(plan, seed=0) as whole,
):
  made = [(next(ours), next(whole)) for _ in range(2 * plan.num_batches)]
made += zip(eval_batches(plan, sharding=sharding), eval_batches(plan))
for placed, expected in made:
  for key, array in placed.items():
    assert array.shape == expected[key].shape, array.shape
    assert len(array.addressable_shards) == 2
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, expected[key][shard.index])
"""


def test_two_processes_make_one_batch(run_script_twice):
  run_script_twice(TWO)
