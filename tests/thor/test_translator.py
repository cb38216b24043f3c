"""Lines in, lines out: in order, none lost, in few shapes."""

import logging
import math
import types

import numpy as np
import pytest

from common.errors import UserError
from common.parallel import batch_sharding, make_mesh
from thor import translator
from thor.decode import Search
from thor.dispatch import Dispatch, prepare
from thor.translator import Translation, Translator
from thor.vocabulary import EOS, PAD

TEXT = "a cab can back a bad bag and bake a cake in a dark cabin"
WORDS = TEXT.split()
PLACES = ((0, 3), (2, 9), (5, 1), (1, 5))  # first word, words
LINES = [" ".join(WORDS[i : i + n]) for i, n in PLACES]
SEARCH = Search(beam=2, n_best=2, max_ratio=0, max_extra=4)


@pytest.fixture(scope="module")
def run(cab_run):
  return cab_run


@pytest.fixture(scope="module")
def vocabulary(cab_vocabulary):
  return cab_vocabulary


@pytest.fixture(scope="module")
def prepared(run):
  return prepare(run.params, run.settings, Dispatch("fixed", 1))


@pytest.fixture
def make(prepared, vocabulary):
  def made(search=SEARCH, **more):
    more = {"lengths": (8, 24), "token_budget": 32} | more
    return Translator(prepared, vocabulary, search, **more)

  return made


@pytest.fixture
def shapes(monkeypatch):
  """Those of the batches that are decoded."""
  seen = []
  real = translator.beam_search

  def record(prepared, source, search):
    seen.append(source.shape)
    return real(prepared, source, search)

  monkeypatch.setattr(translator, "beam_search", record)
  return seen


def close(made, expected):
  assert made.text == expected.text
  assert [t for t, _ in made.n_best] == [t for t, _ in expected.n_best]
  np.testing.assert_allclose(
    [s for _, s in made.n_best], [s for _, s in expected.n_best], rtol=1e-4
  )


def test_lines_keep_their_order_and_translate_as_they_do_alone(make):
  lines = [*LINES, "", *LINES[::-1], "  "]
  together = list(make().translate(lines, "de"))
  assert len(together) == len(lines)
  blank = Translation("", [("", 0.0), ("", -math.inf)])
  assert together[4] == together[-1] == blank
  for line, made in zip(lines, together):
    if line.strip():
      close(made, next(make().translate([line], "de")))
      assert len(made.n_best) == 2
      assert made.text == made.n_best[0][0]
  assert len({made.text for made in together}) >= 3


def test_each_line_may_have_a_language_of_its_own(make):
  german, finnish = [list(make().translate(LINES, tag)) for tag in ("de", "fi")]
  mixed = list(make().translate(LINES, ["de", "fi", "de", "fi"]))
  for i, made in enumerate(mixed):
    close(made, (german, finnish)[i % 2][i])
  assert german != finnish


def test_blank_lines_do_not_reach_the_model(make, monkeypatch):
  monkeypatch.setattr(translator, "beam_search", None)
  assert [made.text for made in make().translate(["", " "], "de")] == ["", ""]
  assert list(make().translate([], "de")) == []


def test_a_window_comes_before_the_next_is_read(make):
  def lines():
    yield from LINES[:2]
    raise AssertionError("read on")

  made = make(window=1).translate(lines(), "de")
  next(made)
  next(made)
  with pytest.raises(AssertionError, match="read on"):
    next(made)


def test_what_is_there_is_translated_before_a_line_is_waited_for(make, shapes):
  read = []

  def lines():
    for line in LINES:
      read.append(line)
      yield line

  def is_ready():
    return len(read) != 2

  made = make(window=10_000).translate(lines(), "de", is_ready=is_ready)
  next(made)
  next(made)
  assert read == LINES[:2]
  assert len(list(made)) == 2


def found(texts, scores):
  """What a search would find, in a vocabulary of letters."""
  return lambda *_: types.SimpleNamespace(
    tokens=np.array([[list(map(ord, text)) for text in texts]]),
    scores=np.array([scores]),
    lengths=np.array([[n > -math.inf for n in scores]]),
  )


class Letters:
  """A vocabulary in which letters are their code points."""

  size, unk, languages = 256, 0, ()

  def encode(self, text, language):
    return np.array([*map(ord, text), EOS])

  def decode(self, ids):
    return "".join(map(chr, ids))


@pytest.fixture
def spells(monkeypatch):
  """`(found, line, **more)`: its translation when that is what is found."""

  def call(search, line, **more):
    monkeypatch.setattr(translator, "beam_search", search)
    settings = types.SimpleNamespace(vocab_size=256, pad_id=PAD)
    prepared = types.SimpleNamespace(settings=settings)
    made = Translator(prepared, Letters(), Search(beam=3, n_best=3), **more)
    (one,) = made.translate([line])
    return one.n_best

  return call


def test_translations_that_are_missing_are_empty(spells):
  search = found(["ab", "cd", "  "], [-1.0, -2.0, -math.inf])
  rest = [("", -math.inf)]
  assert spells(search, "x") == [("ab", -1.0), ("cd", -2.0), *rest]
  assert spells(search, " ") == [("", 0.0), *rest, *rest]


def test_a_line_in_pieces_has_the_ranks_that_all_pieces_have(spells):
  answers = iter(
    [
      found(["ab", "cd", "ef"], [-1.0, -2.0, -3.0])(),
      found(["gh", "ij", "  "], [-2.0, -3.0, -math.inf])(),
    ]
  )
  made = spells(
    lambda *_: next(answers), "xxx yyy",
    lengths=(5,), token_budget=5, too_long="split",
  )  # fmt: skip
  assert made == [("ab gh", -1.5), ("cd ij", -2.5), ("", -math.inf)]


def test_a_model_that_finds_nothing_is_no_empty_translation(spells):
  with pytest.raises(UserError, match=r"line 1 has no translation: .* numbers"):
    spells(found(["  "] * 3, [-math.inf] * 3), "x")


def test_batches_have_few_shapes_and_full_rows(make, shapes):
  lines = LINES * 5
  list(make(window=10_000).translate(lines, "de"))
  # 24 tokens: 1 row; 8 tokens: 4.
  assert set(shapes) <= {(1, 24), (4, 8), (1, 8)}
  count = sum(rows for rows, _ in shapes)
  assert len(lines) <= count < len(lines) + 4


def test_devices_share_the_rows(make, shapes):
  sharding = batch_sharding(make_mesh({"data": 4, "fsdp": 2}))
  made = list(make(sharding=sharding).translate(LINES, "de"))
  assert all(rows % 8 == 0 for rows, _ in shapes)
  for one, other in zip(made, make().translate(LINES, "de"), strict=True):
    close(one, other)


# -- lines that do not fit -----------------------------------------------------

LONG = " ".join(WORDS)


def test_a_line_that_is_too_long_is_refused_by_its_number(make):
  with pytest.raises(UserError, match=r"line 3 has \d+ tokens, and the most"):
    list(make(lengths=(8, 16)).translate([*LINES[::2], LONG], "de"))


def test_a_long_line_is_cut_and_counted(make, vocabulary, caplog):
  made = make(lengths=(8, 16), too_long="cut")
  with caplog.at_level(logging.WARNING, logger="thor.translator"):
    (first, _, _) = made.translate([LONG, LINES[0], LONG], "de")
  assert made.counts == {"cut": 2}
  assert [r.getMessage() for r in caplog.records] == [
    "line 1 is too long, and its end is left out (said once, counted)",
    "of 3 lines: 2 cut",
  ]
  ids = vocabulary.encode(LONG, "de")
  kept = np.append(ids[:15], ids[-1])
  source = np.full((2, 16), PAD, np.int32)
  source[0, : len(kept)] = kept
  (expected,) = made._decoded(source, 1)
  close(first, Translation(expected[0][0], expected))


def test_a_long_line_is_translated_in_pieces(make, vocabulary):
  made = make(lengths=(8, 16), too_long="split")
  first, second = made.translate([LONG, LINES[0]], "de")
  assert made.counts == {"split": 1}
  close(second, next(make().translate([LINES[0]], "de")))
  pieces = list(made._pieces(1, LONG, "de", vocabulary.encode(LONG, "de")))
  texts = [vocabulary.decode(ids) for ids in pieces]
  assert " ".join(texts) == LONG
  assert all(len(ids) <= 16 for ids in pieces)
  parts = list(make().translate(texts, "de"))
  assert first.text == " ".join(part.text for part in parts)
  np.testing.assert_allclose(
    first.n_best[1][1], np.mean([p.n_best[1][1] for p in parts]), rtol=1e-4
  )


def test_a_word_without_blanks_is_cut_in_its_middle(make):
  made = make(lengths=(8, 16), too_long="split")
  (one,) = made.translate(["cab" * 20], "de")
  assert made.counts == {"split": 1}
  assert one.text.count(" ") >= 3


def test_unknown_text_is_counted_and_said_once(make, caplog):
  made = make()
  with caplog.at_level(logging.WARNING, logger="thor.translator"):
    list(made.translate(["a €", "a", "€ a €"], "de"))
  assert made.counts == {"unknown": 3}
  assert len(caplog.records) == 2
  assert caplog.records[0].getMessage().startswith("line 1 holds text")


@pytest.mark.parametrize(
  ("texts", "languages", "text"),
  [
    (["a", "b"], ["de"], "as many languages as lines"),
    (["a"], ["de", "fi"], "as many languages as lines"),
    (["a", "b"], ["de", "dee"], "line 2: .*'dee'; did you mean 'de'"),
    (["a"], "", "line 1 has no language: choose one of de, fi"),
    (["a", "\ud800"], "de", "line 2: no Unicode"),
  ],
)
def test_lines_that_cannot_be_translated_are_named(
  make, texts, languages, text
):
  with pytest.raises(UserError, match=text):
    list(make().translate(texts, languages))


@pytest.mark.parametrize(
  ("more", "text"),
  [
    ({"too_long": "splt"}, "too_long='splt'; did you mean 'split'"),
    ({"token_budget": 0}, "token_budget=0 must be"),
    ({"lengths": (2, 8)}, r"lengths=\[2, 8\]"),
  ],
)
def test_settings_without_a_meaning_are_refused(make, more, text):
  with pytest.raises(UserError, match=text):
    make(**more)
