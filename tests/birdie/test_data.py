import functools
import json
import time

import jax
import numpy as np
import pytest

from birdie.data import (
  SCHEDULE_DELAY,
  BatchMaker,
  TrainData,
  first_mixture,
  make_configurations,
  make_corpus,
  make_vocabulary,
  process_rows,
  train_loader,
)
from birdie.data_report import data_report
from birdie.packing import KEYS, Packer
from birdie.presets import make_configuration
from birdie.validation import eval_batches, make_eval_batches
from birdie.vocab import byte_vocabulary
from common.data.text import TokenStore
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError
from common.parallel import batch_sharding, make_mesh
from common.rngs import np_rng
from configs.birdie import get_config

VOCAB = byte_vocabulary()
LENGTH, ROWS, GROUP = 64, 8, 2


def entry(objective, name=None, **settings):
  cfg = {"min_length": 8, "max_length": 40} | settings
  entry = {"objective": objective, "name": name or objective, **cfg}
  return make_configuration(entry, VOCAB)


ENTRIES = (
  entry("next_token_prediction"),
  entry("copying", max_length=24),
  entry("infilling"),
)
PROBS = np.float32([0.25, 0.5, 0.25])


@functools.cache
def text(seed=0, documents=60, size=90):
  tokens = np_rng(seed, "text").integers(64, 320, documents * size)
  offsets = np.arange(0, documents * size + 1, size)
  return TokenStore(tokens.astype(np.uint16), offsets)


def make_maker(start=0, stop=ROWS, **changes):
  settings = {"rows": GROUP, "length": LENGTH, "seed": 0} | changes
  return BatchMaker(text(), Packer(ENTRIES, **settings), ROWS, start, stop)


def assert_equal(a, b):
  assert set(a) == set(b) == set(KEYS)
  for key in a:
    np.testing.assert_array_equal(np.asarray(a[key]), np.asarray(b[key]), key)


def expected(k, probs=PROBS):
  return make_maker()(k, probs)


def untagged(batch):
  """Without what only batches of a `TrainData` have."""
  return {key: batch[key] for key in set(batch) - {"mixture_version"}}


@pytest.fixture
def open_data():
  opened = []

  def make(probs=PROBS, **settings):
    opened.append(TrainData(make_maker(), probs, **settings))
    return opened[-1]

  yield make
  for data in opened:
    data.close()


def test_a_batch_has_the_promised_arrays():
  batch = expected(0)
  assert {k: v.dtype for k, v in batch.items()} == {
    k: np.dtype(v) for k, v in KEYS.items()
  }
  assert all(v.shape == (ROWS, LENGTH) for v in batch.values())


def test_batches_differ_and_repeat():
  """The reference's batches differ from run to run of the same seed."""
  assert (expected(0)["tokens"] != expected(1)["tokens"]).any()
  assert_equal(expected(5), expected(5))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_make_the_same_global_batch(processes):
  share = ROWS // processes
  parts = [
    make_maker(p * share, (p + 1) * share)(3, PROBS) for p in range(processes)
  ]
  whole = {k: np.concatenate([part[k] for part in parts]) for k in KEYS}
  assert_equal(whole, expected(3))


@pytest.mark.parametrize("rows", [(0, 3), (0, 1)])
def test_groups_that_do_not_divide_the_rows_are_refused(rows):
  with pytest.raises(UserError, match="pack_rows=2"):
    make_maker(*rows)
  with pytest.raises(UserError, match="pack_rows=3"):
    make_maker(rows=3)


@pytest.mark.parametrize(
  ("mesh", "rows"), [({"data": 8}, 16), ({"data": 2, "seq": 4}, 8)]
)
def test_one_process_brings_all_rows(mesh, rows):
  sharding = batch_sharding(make_mesh(mesh), seq="seq" in mesh)
  assert process_rows(rows, sharding) == (0, rows)
  assert process_rows(rows) == (0, rows)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batch_k_is_the_same_however_it_is_reached(open_data, workers):
  data = open_data(workers=workers)
  for k in range(3):
    assert_equal(untagged(next(data)), expected(k))
  state = json.loads(json.dumps(data.get_state()))
  assert state["step"] == 3
  assert_equal(untagged(next(data)), expected(3))
  data.set_state({"step": 7, "mixture": state["mixture"]})
  assert_equal(untagged(next(data)), expected(7))
  data.set_state(state)
  assert_equal(untagged(next(data)), expected(3))


@pytest.mark.parametrize(
  ("mode", "workers"), [("regenerate", 0), ("regenerate", 1), ("schedule", 0)]
)
def test_a_new_mixture_is_in_force_from_the_announced_batch(
  open_data, mode, workers
):
  """In the reference a change waits behind whatever is in its queues."""
  new = np.float32([0, 0, 1])
  data = open_data(mixture_change=mode, prefetch=2, workers=workers)
  next(data)
  next(data)
  first = data.change_mixture(new)
  assert first == (2 if mode == "regenerate" else 2 + SCHEDULE_DELAY)
  for k in range(2, first + 2):
    probs = new if k >= first else PROBS
    batch = next(data)
    assert_equal(untagged(batch), expected(k, probs))
    assert (batch["mixture_version"] == int(k >= first)).all()
    configs = set(np.unique(batch["config_ids"])) - {-1}
    assert (configs == {2}) == (k >= first)
    assert data.mixture.at(k).version == int(k >= first)


@pytest.mark.parametrize("mode", ["regenerate", "schedule"])
def test_a_resumed_run_knows_the_mixtures(open_data, mode):
  """The reference can save neither mixture nor position."""
  data = open_data(mixture_change=mode)
  for _ in range(3):
    next(data)
  data.change_mixture(np.float32([0, 1, 0]))
  next(data)
  state = json.loads(json.dumps(data.get_state()))
  resumed = open_data(np.float32([1, 0, 0]), mixture_change=mode)
  resumed.set_state(state)
  for _ in range(SCHEDULE_DELAY + 2):
    a, b = next(data), next(resumed)
    assert_equal(untagged(a), untagged(b))
    np.testing.assert_array_equal(a["mixture_version"], b["mixture_version"])
  mixtures = (d.mixture.in_force(d.step) for d in (data, resumed))
  np.testing.assert_array_equal(*mixtures)


def test_what_was_in_force_is_weighted_by_its_batches(open_data):
  """A reward belongs to the mixtures that made it, also while one waits."""
  old, new = np.float32([0, 1, 0]), np.float32([0, 0, 1])
  data = open_data(old, mixture_change="schedule")
  data.change_mixture(new)
  np.testing.assert_array_equal(data.mixture.in_force(SCHEDULE_DELAY), old)
  np.testing.assert_allclose(
    data.mixture.in_force(4 * SCHEDULE_DELAY), [0, 0.25, 0.75]
  )
  now = open_data(old)
  now.change_mixture(new)
  np.testing.assert_array_equal(now.mixture.in_force(9), new)


def test_no_batch_is_lost_when_the_consumer_is_slow(open_data):
  """The reference drops batches when a full queue times out."""
  data = open_data(prefetch=1)
  for k in range(6):
    time.sleep(0.02)
    assert_equal(untagged(next(data)), expected(k))


def test_batches_go_to_the_devices(open_data):
  sharding = batch_sharding(make_mesh({"data": 8}))
  batch = next(open_data(sharding=sharding))
  assert isinstance(batch["tokens"], jax.Array)
  assert batch["tokens"].sharding == sharding
  assert_equal(untagged(batch), expected(0))


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"mixture_change": "soon"}, "'regenerate' or 'schedule'"),
    ({"mixture_change": "schedule", "prefetch": 16}, "at most 15"),
    ({"probs": np.zeros(3)}, "all probabilities"),
  ],
)
def test_bad_settings_are_refused_in_one_line(open_data, settings, words):
  with pytest.raises(UserError, match=words) as error:
    open_data(**settings)
  assert "\n" not in str(error.value)


def test_a_bad_new_mixture_is_refused_and_changes_nothing(open_data):
  data = open_data()
  for bad in ([0, 0, 0], [np.nan, 1, 0], [-1, 1, 1], [1, 1, 1], [1, 0]):
    with pytest.raises(UserError):
      data.change_mixture(np.array(bad))
  assert_equal(untagged(next(data)), expected(0))


def test_text_too_short_for_every_configuration_is_one_line():
  """The reference's earlier versions hung for ever, its later ones die."""
  maker = BatchMaker(
    text(documents=30, size=7),
    Packer(ENTRIES, rows=GROUP, length=LENGTH, seed=0),
    ROWS,
    0,
    ROWS,
  )
  with pytest.raises(UserError, match=r"8 tokens.*7 tokens") as error:
    TrainData(maker, PROBS)
  assert "\n" not in str(error.value)


def test_text_too_short_for_one_configuration_leaves_the_others():
  entries = (*ENTRIES[:2], entry("infilling", min_length=120, max_length=130))
  maker = BatchMaker(
    text(), Packer(entries, rows=GROUP, length=LENGTH, seed=0), ROWS, 0, ROWS
  )
  batch = maker(0, PROBS)
  assert set(np.unique(batch["config_ids"])) - {-1} == {0, 1}
  with pytest.raises(UserError, match="longest piece"):
    maker(0, np.float32([0, 0, 1]))


def make_eval(**changes):
  settings = {
    "length": LENGTH, "rows_per_config": 3, "batch_size": 4, "seed": 0,
  } | changes  # fmt: skip
  return make_eval_batches(text(seed=1), ENTRIES, **settings)


def test_evaluation_is_fixed_and_has_trainings_format():
  """The reference lays validation labels against the inputs from position 0,
  without GEN, with attention everywhere and no segments."""
  batches = make_eval()
  assert len(batches) == 3  # 3 configurations * 3 rows = 4 + 4 + 1
  for a, b in zip(batches, make_eval()):
    assert_equal(a, b)
  whole = {k: np.concatenate([b[k] for b in batches]) for k in KEYS}
  assert whole["tokens"].shape == (12, LENGTH)
  for i in range(3):
    rows = whole["config_ids"][3 * i : 3 * i + 3]
    assert set(np.unique(rows)) - {-1} == {i}
    assert (rows == i).any(axis=1).all()
  assert (whole["config_ids"][9:] == -1).all()
  assert not whole["segment_ids"][9:].any()
  first = (whole["loss_weights"] > 0) & (
    np.roll(whole["prefix"], 1, axis=1) | (whole["positions"] == 0)
  )
  assert (whole["tokens"][first] == VOCAB.gen).all()
  assert not (whole["prefix"] & (whole["loss_weights"] > 0)).any()


def test_evaluation_draws_from_a_stream_of_its_own():
  rows = make_eval()[0]["tokens"]
  assert (rows != make_eval(seed=1)[0]["tokens"]).any()
  packer = Packer(ENTRIES, rows=3, length=LENGTH, seed=0)
  maker = BatchMaker(text(seed=1), packer, 3, 0, 3)
  assert (rows[:3] != maker(0, np.eye(3)[0])["tokens"]).any()


def test_evaluation_text_is_held_out():
  def windows(tokens):
    return {tuple(tokens[i : i + 8]) for i in range(len(tokens) - 7)}

  train = windows(text().tokens.tolist())
  held_out = windows(text(seed=1).tokens.tolist())
  ntp = [
    row[seg == 1][1:]
    for batch in make_eval()
    for row, seg, config in zip(
      batch["targets"], batch["segment_ids"], batch["config_ids"]
    )
    if config[0] == 0
  ]
  assert ntp
  for labels in ntp:
    found = windows(labels[labels > 0].tolist())
    assert found
    assert found <= held_out
    assert not found & train


def test_processes_take_their_rows_of_evaluation():
  whole = make_eval()
  parts = [make_eval(rows=(0, 2)), make_eval(rows=(2, 4))]
  for batch, first, second in zip(whole, *parts):
    joined = {k: np.concatenate([first[k], second[k]]) for k in KEYS}
    assert_equal(joined, batch)


def test_held_out_text_too_short_names_the_configuration():
  entries = (
    *ENTRIES,
    entry("copying", "long copies", min_length=99, max_length=99),
  )
  with pytest.raises(UserError, match=r"long copies.*99 tokens") as error:
    make_eval_batches(
      text(), entries,
      length=LENGTH, rows_per_config=1, batch_size=4, seed=0,
    )  # fmt: skip
  assert "\n" not in str(error.value)


def test_the_report_tells_samples_from_tokens():
  lines = data_report(make_maker(), PROBS, VOCAB, batches=8).splitlines()
  header, rows = lines[0].split("  "), lines[1:4]
  names = [h.strip() for h in header if h.strip()]
  table = {
    row.split()[0]: dict(zip(names[1:], row.split()[1:])) for row in rows
  }
  assert list(table) == [e.name for e in ENTRIES]

  def percent(name, column):
    return float(table[name][column].rstrip("%"))

  maker = make_maker()
  stats = [maker.with_stats(k, PROBS)[1] for k in range(8)]
  stats = sum(stats[1:], stats[0])
  for column, counts in (("samples", stats.samples), ("tokens", stats.tokens)):
    shares = [percent(name, column) for name in table]
    np.testing.assert_allclose(shares, 100 * counts / counts.sum(), atol=0.06)
  differences = [
    abs(percent(n, "samples") - percent(n, "tokens")) for n in table
  ]
  assert max(differences) > 2
  assert percent("next_token_prediction", "hidden") == 100
  assert percent("copying", "hidden") == 0
  assert abs(percent("infilling", "hidden") - 15) < 4
  assert "fill " in lines[4]


def test_a_report_shows_no_share_of_nothing():
  never = np.array([1, 0, 0], np.float32)
  lines = data_report(make_maker(), never, VOCAB, batches=1).splitlines()
  hidden = [line.split()[-2] for line in lines[1:4]]
  assert hidden[1:] == ["–", "–"]
  assert hidden[0] != "–"


def test_a_report_says_how_fast():
  lines = data_report(make_maker(), PROBS, VOCAB, batches=1).splitlines()
  assert "tokens/s" in lines[4]


@pytest.fixture
def config(tmp_path):
  words = "the quick brown fox jumps over the lazy dog and runs away again "
  documents = [f"{i} {words * 8}" for i in range(80)]
  (tmp_path / "text.txt").write_text("\n--\n".join(documents))
  config = get_config("smoke")
  config.data.source.update(
    {"kind": "text", "path": str(tmp_path / "text.txt"), "separator": "--"}
  )
  config.data.cache_dir = str(tmp_path / "cache")
  return config


def test_a_configuration_becomes_data(config):
  corpus = make_corpus(config)
  facts = corpus.facts()
  assert facts["train_documents"] + facts["validation_documents"] <= 80
  assert facts == make_corpus(config).facts()
  entries = make_configurations(config, corpus.vocab)
  assert sum(e.weight for e in entries) == pytest.approx(1, abs=1e-6)
  shape = (config.data.batch_size, config.data.sequence_length)
  with train_loader(config, corpus, entries) as data:
    batch = next(data)
    assert batch["tokens"].shape == shape
    np.testing.assert_array_equal(
      data.mixture.at(0).probs, first_mixture(entries)
    )
  batches = eval_batches(config, corpus, entries)
  seen = set().union(*(np.unique(b["config_ids"]) for b in batches))
  assert seen - {-1} == set(range(len(entries)))
  assert len(batches) == -(-len(entries) // config.evaluation.batch_size)


def test_fixed_mixtures_keep_their_published_weights(config):
  config.mixture.preset = "ul2"
  entries = make_configurations(config, VOCAB)
  np.testing.assert_allclose(
    sorted(first_mixture(entries)), [0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2]
  )


def test_a_batch_that_pack_rows_does_not_divide_is_refused(config):
  config.data.pack_rows = 3
  corpus = make_corpus(config)
  entries = make_configurations(config, corpus.vocab)
  with pytest.raises(UserError, match="pack_rows=3"):
    train_loader(config, corpus, entries)


def test_the_vocabulary_goes_with_the_tokenizer():
  assert make_vocabulary(ByteTokenizer()) == VOCAB

  class Other:
    vocab_size = 1000

  assert min(make_vocabulary(Other()).special_ids) == 1000


def test_entries_of_the_users_own_take_the_presets_place(config):
  """As written in birdie/README.md."""
  config.data.sequence_length = 512
  config.mixture.entries = (
    {"objective": "next_token_prediction", "weight": 2.0},
    {"objective": "copying", "name": "long copies", "min_length": 128},
    {"objective": "infilling", "corruption_rate": 0.3, "paradigm": "<|FILL|>"},
  )
  made = make_configurations(config, VOCAB, ByteTokenizer().encode)
  assert [c.name for c in made] == [
    "next_token_prediction", "long copies", "infilling",
  ]  # fmt: skip
  np.testing.assert_allclose([c.weight for c in made], [0.5, 0.25, 0.25])
  assert made[1].cfg.min_length == 128
  assert made[2].cfg.paradigm == tuple(64 + b for b in b"<|FILL|>")


def test_the_report_of_a_configuration(config, capsys, tmp_path):
  from birdie.main import main

  config.mode = "data_report"
  config.data.cache_dir = ""
  main(config, str(tmp_path))
  assert "next_token_prediction" in capsys.readouterr().out
  config.mode = "report"
  with pytest.raises(UserError, match="mode='report'; did you mean"):
    main(config, str(tmp_path))
