"""Leakage and isolation on the very batches of training and of validation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie.data import BatchMaker
from birdie.models import GatedSSM
from birdie.packing import KEYS, Packer
from birdie.presets import preset
from birdie.validation import make_eval_batches
from birdie.vocab import byte_vocabulary
from common.data.text import TokenStore

LENGTH = 96
VOCAB = byte_vocabulary()
PRESET = preset("birdie", VOCAB, sequence_length=LENGTH, grid="small")
INPUTS = ("tokens", "segment_ids", "positions", "prefix")


def text():
  rng = np.random.default_rng(0)
  lengths = rng.integers(60, 300, 40)
  tokens = rng.integers(64, 320, lengths.sum()).astype(np.uint16)
  return TokenStore(tokens, np.concatenate([[0], np.cumsum(lengths)]))


def training_rows():
  packer = Packer(PRESET.configurations, rows=4, length=LENGTH, seed=0)
  return BatchMaker(text(), packer, 4, 0, 4)(0, PRESET.probs)


def validation_rows():
  batches = make_eval_batches(
    text(), PRESET.configurations, length=LENGTH, rows_per_config=1,
    batch_size=len(PRESET.configurations), seed=0,
  )  # fmt: skip
  # One row each of next-token prediction, infilling, copying, and so on.
  return {key: batches[0][key][::5] for key in KEYS}


@pytest.fixture(scope="module", params=[training_rows, validation_rows])
def rows(request):
  batch = request.param()
  assert (batch["segment_ids"].max(axis=1) >= 1).all()
  assert batch["prefix"].any()
  return batch


@pytest.fixture(scope="module")
def run():
  model = GatedSSM(VOCAB.size, width=8, state=8, layers=2)
  row = jnp.zeros((1, 4), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), row, row, row, row > 0)

  @jax.jit
  def apply(*inputs):
    return model.apply(params, *inputs)

  return lambda batch: np.asarray(apply(*(batch[key] for key in INPUTS)))


def test_no_position_sees_more_than_it_may(rows, run):
  """Oracle 3: every token is changed in turn, and outputs are compared bit
  for bit: behind the prefix only later ones may move, inside it all of the
  prefix and the target, in other segments none.
  """
  for row in range(len(rows["tokens"])):
    one = {key: np.repeat(rows[key][row][None], LENGTH, 0) for key in INPUTS}
    before = run(one)
    one["tokens"] = one["tokens"] + np.eye(LENGTH, dtype=np.int32)
    moved = (run(one) != before).any(-1).T  # [output, changed token]
    segments, prefix = rows["segment_ids"][row], rows["prefix"][row]
    q, k = np.mgrid[:LENGTH, :LENGTH]
    may = (segments[q] == segments[k]) & ((k <= q) | (prefix[q] & prefix[k]))
    assert not (moved & ~may).any()
    inside = prefix & (segments > 0)
    later = (segments[q] == segments[k]) & (k > q) & inside[q] & inside[k]
    assert (moved & later).any() == later.any()


def test_a_label_never_helps_to_predict_itself(rows, run):
  """Label j stands in the input behind the logits that predict it."""
  for row in range(len(rows["tokens"])):
    weights = rows["loss_weights"][row] > 0
    same = rows["segment_ids"][row][1:] == rows["segment_ids"][row][:-1]
    follows = weights[1:] & weights[:-1] & same
    tokens, targets = rows["tokens"][row], rows["targets"][row]
    np.testing.assert_array_equal(tokens[1:][follows], targets[:-1][follows])
    begins = weights & ~np.concatenate([[False], follows])
    assert (tokens[begins] == VOCAB.gen).all()


def test_a_packed_sample_is_the_sample_alone(rows, run):
  """Oracle 4."""
  together = run(rows)
  for row in range(len(rows["tokens"])):
    for segment in range(1, rows["segment_ids"][row].max() + 1):
      (places,) = np.nonzero(rows["segment_ids"][row] == segment)
      alone = {key: np.zeros_like(rows[key]) for key in INPUTS}
      for key in INPUTS:
        alone[key][0, : len(places)] = rows[key][row, places]
      alone["segment_ids"][0, : len(places)] = 1
      chex.assert_trees_all_close(
        run(alone)[0, : len(places)], together[row, places], atol=1e-5
      )


def test_the_prefix_depends_on_nothing_behind_it(rows, run):
  """Oracle 5: GEN and labels may be anything."""
  changed = dict(rows)
  behind = ~rows["prefix"] & (rows["segment_ids"] > 0)
  changed["tokens"] = np.where(behind, 200, rows["tokens"])
  prefix = rows["prefix"]
  np.testing.assert_array_equal(run(changed)[prefix], run(rows)[prefix])
