"""The embedded benchmark keeps its splits apart and writes clean sentences."""

import re
import sys

import babel
import pytest

from common.errors import UserError
from thor import cldr
from thor.cldr import LANGUAGES, composed_text, core_names

SMALL = {"rows": 400, "test_rows": 50, "names": 40}
# Languages whose locale data lack some plural forms of some units.
GAPS = ("it", "tr", "sv")
SPLITS = ("train", "valid", "test", "test_names", "test_long")


@pytest.fixture(scope="module")
def text():
  return composed_text(SMALL)


def english(text, split):
  return {pair.source for pair in text.splits[split]}


def test_splits_and_sizes(text):
  assert tuple(text.splits) == SPLITS
  for split, pairs in text.splits.items():
    rows = SMALL["rows" if split == "train" else "test_rows"]
    assert len(pairs) == rows * len(LANGUAGES)
    assert len(english(text, split)) == rows
    assert text.facts[f"{split}_pairs"] == len(pairs)


def test_at_least_eight_languages_for_each_sentence(text):
  assert len(set(text.languages)) >= 8
  count = len(text.languages)
  for pairs in text.splits.values():
    for start in range(0, len(pairs), count):
      row = pairs[start : start + count]
      assert tuple(pair.language for pair in row) == text.languages
      assert len({pair.source for pair in row}) == 1


def test_a_seed_determines_all(text):
  again = composed_text(dict(SMALL, seed=0))
  assert again.fingerprint == text.fingerprint
  for split in SPLITS:
    assert list(again.splits[split]) == list(text.splits[split])
  other = composed_text(dict(SMALL, seed=1))
  assert other.fingerprint != text.fingerprint
  for split in SPLITS:
    assert english(other, split) != english(text, split)


@pytest.mark.skipif(babel.__version__ != "2.18.0", reason="other locale data")
def test_the_text_of_babel_2_18_is_this_one(text):
  """Numbers measured on it stay comparable; a new hash is a new benchmark."""
  assert text.fingerprint == "20da4f0ccf17359a113df579342e7833"


def test_babels_version_is_part_of_the_fingerprint(text, monkeypatch):
  monkeypatch.setattr(babel, "__version__", "0")
  other = composed_text(SMALL)
  assert list(other.splits["test"]) == list(text.splits["test"])
  assert other.fingerprint != text.fingerprint
  assert other.facts["babel"] == "0"


def test_an_english_sentence_is_in_one_split_only(text):
  seen = set()
  for split in SPLITS:
    sentences = {sentence.casefold() for sentence in english(text, split)}
    assert not seen & sentences, split
    seen |= sentences


def held_out_columns(config):
  """Tag -> held-out names in that language, case folded."""
  pools = core_names(config).held_out.values()
  names = [name for pool in pools for name in pool]
  tags = ("en", *(config.get("languages") or LANGUAGES))
  columns = [{part.casefold() for part in column} for column in zip(*names)]
  return dict(zip(tags, columns, strict=True))


@pytest.mark.parametrize(
  ("languages", "names"),
  # Japanese writes no spaces: names stand inside other words there.
  [((), 40), (GAPS, 40), (("ja", "ru", "ar"), 40), (("ja",), 60)],
)
def test_held_out_names_occur_in_test_names_only(languages, names):
  config = dict(SMALL, languages=languages, names=names)
  columns = held_out_columns(config)
  splits = composed_text(config).splits
  assert len(columns["en"]) >= 10
  for split in SPLITS:
    for source, target, tag in splits[split]:
      for language, sentence in (("en", source), (tag, target)):
        folded = sentence.casefold()
        found = [name for name in columns[language] if name in folded]
        assert bool(found) == (split == "test_names"), (split, sentence, found)


@pytest.mark.parametrize("languages", [(), ("ja",)])
def test_no_name_contains_a_held_out_one(languages):
  config = dict(SMALL, names=0, languages=languages)
  columns = held_out_columns(config)
  for pool in core_names(config).known.values():
    for name in pool:
      for tag, part in zip(columns, name, strict=True):
        found = [held for held in columns[tag] if held in part.casefold()]
        assert not found, (tag, part, found)


def test_nothing_held_out_makes_no_split_of_names():
  text = composed_text(dict(SMALL, held_out=0))
  assert tuple(text.splits) == tuple(s for s in SPLITS if s != "test_names")
  assert text.facts["names_held_out"] == 0


@pytest.mark.parametrize("languages", [(), GAPS, ("ja", "ru", "ar", "pl")])
def test_sentences_hold_no_raw_ids_and_no_odd_spaces(languages):
  text = composed_text(dict(SMALL, rows=1500, languages=languages))
  raw = re.compile(
    r"\b(length|mass|duration|volume|area|temperature|angle|speed|energy|power"
    r"|graphics)-[a-z]|[{}\u00a0\u202f]|^\s|\s$|^$"
  )
  for split, pairs in text.splits.items():
    for pair in pairs:
      for sentence in (pair.source, pair.target):
        assert not raw.search(sentence), (split, sentence)


def test_raw_units_are_redrawn_and_counted():
  assert composed_text(dict(SMALL, languages=GAPS)).facts["redrawn_raw_unit"]


@pytest.mark.parametrize(
  ("tag", "number", "unit", "wanted"),
  [
    ("en", 1, "day", "in 1 day"),
    ("de", 59, "month", "in 59 Monaten"),
    ("fr", -60, "second", "il y a 60 secondes"),
    ("cs", -2, "year", "před 2 lety"),
    ("fi", 3, "week", "3 viikon päästä"),
    ("tr", 24, "hour", "24 saat sonra"),
  ],
)
def test_relative_times_keep_their_unit(tag, number, unit, wanted):
  """However many: 24 hours are no day, 59 months no years."""
  assert cldr._Writer(tag).relative(number, unit) == wanted


@pytest.mark.parametrize("unit", cldr._SECONDS)
def test_relative_times_keep_their_number(unit):
  for number in range(1, 61):
    assert str(number) in cldr._Writer("en").relative(number, unit)


def test_babel_is_optional(monkeypatch):
  monkeypatch.setitem(sys.modules, "babel", None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[translation\]'"):
    composed_text(SMALL)


def longest_list(sentence, names):
  """How many of the names a sentence lists."""
  bare = re.split(r" – | \(", sentence)[0].rpartition(": ")[2]
  parts = re.split(r", (?:and |or )?| and | or ", bare)
  return sum(part in names for part in parts)


def test_lists_are_longer_in_test_long_than_in_train(text):
  pools = core_names(SMALL).known.values()
  # Names with a comma, "and" or "or" would not count as one.
  names = {name[0] for pool in pools for name in pool}
  odd = [name for name in names if re.search(r" (and|or) ", name)]

  def lengths(split):
    return [
      longest_list(sentence, names)
      for sentence in english(text, split)
      if not any(name in sentence for name in odd)
    ]

  assert max(lengths("train")) == 3
  assert min(lengths("test_long")) == 4
  assert max(lengths("test_long")) == 6


def test_valid_and_test_use_names_that_train_has_seen():
  # So few sentences that train does not use all names.
  config = {"rows": 30, "test_rows": 10, "names": 40, "languages": ("de",)}
  text, pools = composed_text(config), core_names(config).known.values()
  train = "\n".join(english(text, "train"))
  unseen = [n[0] for pool in pools for n in pool if n[0] not in train]
  assert len(unseen) > 20
  for split in ("valid", "test", "test_long"):
    for sentence in english(text, split):
      assert not any(name in sentence for name in unseen), sentence


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"languages": ("de", "qqq")}, r"data\.source\.languages.*'qqq'"),
    ({"languages": ("de_XYZ_1",)}, r"data\.source\.languages.*'de_XYZ_1'"),
    ({"languages": ("d e",)}, r"data\.source\.languages.*'d e'"),
    ({"languages": ("de", "de")}, r"data\.source\.languages.*'de' twice"),
    ({"languages": ("de", "en")}, r"data\.source\.languages holds 'en'"),
    ({"rows": 0}, r"data\.source\.rows=0"),
    ({"test_rows": 0}, r"data\.source\.test_rows=0"),
    ({"names": 3}, r"data\.source\.names=3"),
    ({"held_out": 0.9}, r"data\.source\.held_out=0\.9"),
    ({"rows": 1}, r"data\.source\.rows"),
  ],
)
def test_bad_settings_are_refused_in_one_line(config, message):
  with pytest.raises(UserError, match=message) as caught:
    composed_text(SMALL | config)
  assert "\n" not in str(caught.value)
