"""The published mixtures, and a user's own."""

import collections

import numpy as np
import pytest

from birdie.objectives import OBJECTIVES, Example
from birdie.presets import (
  PRESETS,
  make_configuration,
  make_mixture,
  preset,
  smallest_size,
)
from birdie.vocab import byte_vocabulary, extend
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError
from common.rngs import np_rng

VOCAB = byte_vocabulary()
TEXT = np_rng(0, "text").integers(64, 320, 2048).astype(np.int32)


def run(configuration, seed=0, space=2048, text=TEXT):
  fn = OBJECTIVES[configuration.objective]
  return fn(text, configuration.cfg, np_rng(seed, "run"), space)


def entry(objective="copying", **settings):
  return {"objective": objective, **settings}


# -- presets -------------------------------------------------------------------


def test_birdie_holds_the_papers_96_configurations():
  made = preset("birdie", VOCAB, sequence_length=2048)
  counts = collections.Counter(c.objective for c in made.configurations)
  assert counts == {
    "next_token_prediction": 1,
    "prefix_language_modeling": 1,
    "infilling": 36,
    "autoencoding": 18,
    "autoencoding_with_deshuffling": 18,
    "copying": 2,
    "deshuffling": 4,
    "selective_copying": 16,
  }
  assert made.dropped == ()
  assert all(c.cls == c.objective for c in made.configurations)
  controls = {
    (c.cfg.min_length, c.cfg.max_length, c.cfg.corruption_rate, c.cfg.mean_span)
    for c in made.configurations
    if c.objective == "infilling"
  }
  assert len(controls) == 36
  assert (1024, 2048, 0.05, 32.0) in controls


@pytest.mark.parametrize("name", ["birdie", "birdie_uniform"])
@pytest.mark.parametrize("grid", ["paper", "small"])
def test_classes_start_equal(name, grid):
  made = preset(name, VOCAB, sequence_length=2048, grid=grid)
  shares = collections.defaultdict(float)
  members = collections.defaultdict(set)
  for c, p in zip(made.configurations, made.probs):
    shares[c.cls] += float(p)
    members[c.cls].add(float(p))
  assert shares == pytest.approx(dict.fromkeys(OBJECTIVES, 1 / 8), abs=1e-6)
  assert all(len(values) == 1 for values in members.values())


@pytest.mark.parametrize("length", [64, 128, 256, 512, 1024, 2048])
def test_the_small_grid_fits_every_length(length):
  made = preset("birdie", VOCAB, sequence_length=length, grid="small")
  assert len(made.configurations) == 16
  assert {c.objective for c in made.configurations} == set(OBJECTIVES)
  assert made.dropped == ()
  for c in made.configurations:
    for seed in range(5):
      example = run(c, seed, space=length)
      assert isinstance(example, Example)
      assert len(example.inputs) + len(example.labels) <= length


def test_the_small_grid_scales():
  def buckets(length):
    made = preset("birdie", VOCAB, sequence_length=length, grid="small")
    return [
      (c.cfg.min_length, c.cfg.max_length)
      for c in made.configurations
      if c.cfg.max_length is not None
    ]

  expected = [(2 * low, 2 * high) for low, high in buckets(384)]
  assert buckets(768) == expected


@pytest.mark.parametrize("length", [128, 300, 512, 1024])
def test_what_does_not_fit_is_dropped_and_reported(length, caplog):
  whole = preset("birdie", VOCAB, sequence_length=2048)
  made = preset("birdie", VOCAB, sequence_length=length)
  names = [c.name for c in made.configurations]
  assert sorted([*names, *made.dropped]) == sorted(
    c.name for c in whole.configurations
  )
  for c in whole.configurations:
    assert (smallest_size(c) > length) == (c.name in made.dropped)
  assert len(made.dropped) > 0
  assert all(name in caplog.text for name in made.dropped)
  assert made.probs.shape == (len(names),)
  assert made.probs.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("vocab", [VOCAB, extend(32_000)])
def test_every_configuration_makes_examples(name, vocab):
  made = preset(name, vocab, sequence_length=2048)
  names = [c.name for c in made.configurations]
  assert len(set(names)) == len(names)
  for c in made.configurations:
    assert c.cfg.paradigm[0] in vocab.special_ids
    example = run(c)
    assert isinstance(example, Example)
    assert example.used >= c.cfg.min_length
    assert len(example.inputs) + len(example.labels) <= 2048


def denoisers(made):
  return [
    (c.cfg.mean_span, c.cfg.corruption_rate, c.cfg.paradigm, round(float(p), 6))
    for c, p in zip(made.configurations, made.probs)
    if c.objective == "infilling"
  ]


def test_ul2():
  made = preset("ul2", VOCAB, sequence_length=2048)
  assert denoisers(made) == [
    (3, 0.15, (6,), 0.2),
    (8, 0.15, (6,), 0.2),
    (3, 0.5, (7,), 0.1),
    (8, 0.5, (7,), 0.1),
    (64, 0.15, (7,), 0.1),
    (64, 0.5, (7,), 0.1),
  ]
  last = made.configurations[-1]
  assert last.objective == "prefix_language_modeling"
  assert made.probs[-1] == pytest.approx(0.2)
  assert [c.cls for c in made.configurations] == [*"rrxxxxs"]


def test_ul2_decoder():
  made = preset("ul2_decoder", VOCAB, sequence_length=2048)
  assert denoisers(made) == [(3, 0.15, (6,), 0.1), (32, 0.5, (7,), 0.1)]
  names = [c.objective for c in made.configurations[:2]]
  assert names == ["next_token_prediction", "prefix_language_modeling"]
  np.testing.assert_allclose(made.probs[:2], [0.6, 0.2], rtol=1e-6)


def test_ntp():
  made = preset("ntp", VOCAB, sequence_length=64)
  (only,) = made.configurations
  assert made.probs.tolist() == [1.0]
  np.testing.assert_array_equal(run(only, space=64).inputs, [4])
  np.testing.assert_array_equal(run(only, space=64).labels, TEXT[:63])


@pytest.mark.parametrize(
  ("name", "asked", "expected"),
  [
    ("birdie", 0.5, 0.5),
    ("birdie", 0.0, 0.0),
    ("ul2", 0.5, 0.0),  # UL2 prepends
    ("ul2_decoder", 0.5, 0.0),
  ],
)
def test_where_presets_put_the_paradigm(name, asked, expected):
  made = preset(name, VOCAB, sequence_length=512, paradigm_append_prob=asked)
  probs = {c.cfg.paradigm_append_prob for c in made.configurations}
  assert probs == {expected}


@pytest.mark.parametrize(
  ("name", "settings", "message"),
  [
    ("birdy", {}, "mixture.preset='birdy'; did you mean 'birdie'"),
    ("ul3", {}, "did you mean 'ul2'"),
    ("birdie", {"grid": "smal"}, "mixture.grid='smal'; did you mean 'small'"),
    ("birdie", {"sequence_length": 16}, "no configuration for rows of 16"),
  ],
)
def test_presets_that_cannot_be(name, settings, message):
  with pytest.raises(UserError, match=message):
    preset(name, VOCAB, **({"sequence_length": 512} | settings))


# -- a user's own entries ------------------------------------------------------


def share_of_labels(example):
  return len(example.labels) / example.used


def masked(example):
  return np.isin(example.inputs, VOCAB.sentinels).sum()


def ends_with(token):
  return lambda example: example.labels[-1] == token


@pytest.mark.parametrize(
  ("objective", "controls", "measure", "expected"),
  [
    ("prefix_language_modeling", {"prefix_frac": 0.1, "jitter": 0.0},
     share_of_labels, 0.9),
    ("prefix_language_modeling", {"prefix_frac": 0.9, "jitter": 0.0},
     share_of_labels, 0.1),
    ("prefix_language_modeling", {"prefix_frac": 0.9, "jitter": 0.0,
     "min_side": 100}, share_of_labels, 0.5),
    ("infilling", {"corruption_rate": 0.5, "mean_span": 4.0}, masked, 25),
    ("infilling", {"corruption_rate": 0.5, "mean_span": 10.0}, masked, 10),
    ("autoencoding", {"corruption_rate": 0.2, "mean_span": 4.0}, masked, 10),
    ("autoencoding_with_deshuffling",
     {"corruption_rate": 0.2, "mean_span": 8.0}, masked, 5),
    ("infilling", {"final_sentinel": False},
     lambda e: masked(e) - np.isin(e.labels, VOCAB.sentinels).sum(), 0),
    ("infilling", {"sentinel_position": "after"},
     lambda e: e.labels[0] in VOCAB.sentinels, False),
    ("deshuffling", {"shuffle_rate": 0.01, "paradigm_append_prob": 0.0},
     lambda e: np.sum(e.inputs[1:] != e.labels) <= 2, True),
    ("selective_copying", {"num_spans": 3},
     lambda e: np.sum(e.labels == VOCAB.sep), 2),
    ("selective_copying", {"min_span": 40, "max_span": 40},
     lambda e: len(e.labels), 41),
    ("selective_copying", {"order": "context_query",
     "paradigm_append_prob": 0.0}, lambda e: e.inputs[1], VOCAB.context),
    ("selective_copying", {"min_delimiter": 9, "max_delimiter": 9},
     lambda e: len(e.inputs) - e.used, 4 + 18),
    ("copying", {"paradigm": 63, "paradigm_append_prob": 1.0},
     lambda e: e.inputs[-1], 63),
    ("copying", {"paradigm": [62, 63], "paradigm_append_prob": 0.0},
     lambda e: e.inputs[:2].tolist(), [62, 63]),
    ("copying", {"paradigm": ()}, lambda e: len(e.inputs), 200),
  ],
)  # fmt: skip
def test_controls_of_an_entry_are_read(objective, controls, measure, expected):
  bucket = {"min_length": 200, "max_length": 200}
  made = make_configuration(entry(objective, **bucket, **controls), VOCAB)
  example = run(made)
  assert isinstance(example, Example)
  assert measure(example) == pytest.approx(expected)


def test_characters_of_an_entry_move_whole():
  made = make_configuration(
    entry("deshuffling", level="char", paradigm=()), VOCAB
  )
  tokenizer = ByteTokenizer()
  text = tokenizer.encode("模块是一个包含定义和语句的文件")
  assert "�" not in tokenizer.decode(run(made, text=text).inputs)


def test_an_entry_has_defaults():
  made = make_configuration(entry("infilling"), VOCAB)
  assert (made.name, made.cls, made.weight) == ("infilling", "infilling", 1.0)
  assert made.cfg.paradigm == VOCAB.paradigms["infilling"]
  named = make_configuration(
    entry("infilling", name="a", cls="b", weight=3), VOCAB
  )
  assert (named.name, named.cls, named.weight) == ("a", "b", 3.0)


def test_a_paradigm_may_be_text():
  encode = ByteTokenizer().encode
  made = make_configuration(
    entry("copying", paradigm="<|COPY|>", paradigm_append_prob=0.0),
    VOCAB,
    encode=encode,
  )
  example = run(made, space=108)
  np.testing.assert_array_equal(example.inputs[:8], encode("<|COPY|>"))
  np.testing.assert_array_equal(example.inputs[8:], example.labels)
  assert example.used == 50


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (entry("infiling"), "objective 'infiling' is unknown; did you mean 'infi"),
    ({"objectiv": "copying"}, "no key 'objective'; its keys: 'objectiv'"),
    ({}, "no key 'objective'; its keys: none"),
    (entry("squad"), "'squad' is for evaluation only"),
    (entry("infilling", corruption_rat=0.5), "did you mean 'corruption_rate'"),
    (entry("prefix_language_modeling", prefix_fraction=0.1),
     "unknown key 'prefix_fraction'; did you mean 'prefix_frac'"),
    (entry(wieght=2.0), "unknown key 'wieght'; did you mean 'weight'"),
    (entry(config_overrides={}), "'copying': unknown key 'config_overrides'"),
    (entry(name="a", mean_span=3.0), "entry 'a': unknown key 'mean_span'"),
    (entry(vocab=VOCAB), "unknown key 'vocab'"),
    (entry(weight=-1), "weight=-1 must be a number of at least 0"),
    (entry(weight=float("nan")), "weight=nan must be"),
    (entry(weight="2"), "weight='2' must be"),
    (entry("deshuffling", shuffle_rate=2.0), "entry 'deshuffling': objective: "
     "shuffle_rate=2.0 must be in"),
    (entry(paradigm="<|COPY|>"), "needs a tokenizer"),
    (entry(paradigm=512), "ids below 512"),
    (entry(paradigm=-1), "ids below 512"),
    (entry(paradigm=1.5), "must be an id, ids, or a string"),
    (entry("prefix_language_modeling", min_length=2, max_length=6),
     "'prefix_language_modeling': objective: max_length=6 must be at least 8"),
    (entry("selective_copying", num_spans=4, max_length=20),
     "max_length=20 must be at least 24"),
  ],
)  # fmt: skip
def test_entries_that_are_refused(wrong, message):
  with pytest.raises(UserError, match=message) as caught:
    make_configuration(wrong, VOCAB)
  assert "\n" not in str(caught.value)


def test_a_mixture_of_ones_own():
  made = make_mixture(
    [
      entry("copying", name="short", weight=3, max_length=32),
      entry("copying", name="long", weight=1, min_length=32),
    ],
    VOCAB,
    sequence_length=128,
  )
  assert [c.name for c in made.configurations] == ["short", "long"]
  np.testing.assert_allclose(made.probs, [0.75, 0.25])
  assert made.dropped == ()


@pytest.mark.parametrize(
  ("entries", "message"),
  [
    ([entry(), entry()], "2 entries are called 'copying'"),
    ([entry(min_length=64)], "'copying' needs 129 places, a row has 128"),
    ([entry(weight=0)], "all probabilities of the mixture are 0"),
    ([], "one probability for each configuration"),
  ],
)
def test_mixtures_that_are_refused(entries, message):
  with pytest.raises(UserError, match=message):
    make_mixture(entries, VOCAB, sequence_length=128)


@pytest.mark.parametrize(
  ("entries", "message"),
  [
    ("copying", "mixture.entries='copying' is one entry"),
    (entry("copying"), "is one entry and no tuple of them: write"),
    (("copying",), "mixture.entries: 'copying' is no entry"),
    ((entry("copying"), 3), "mixture.entries: 3 is no entry"),
    ((entry("phone_book_compact", entries=64),),
     "lower its entries or lookups or raise data.sequence_length"),
    ((entry("copying", min_length=500),), "lower its min_length or raise"),
  ],
)  # fmt: skip
def test_entries_that_make_no_mixture(entries, message, one_line):
  said = one_line(make_mixture, entries, VOCAB, sequence_length=64)
  assert message in said
