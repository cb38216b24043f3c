"""Scores are sacrebleu's own, to the last bit."""

import logging
import math
import os
import sys
import warnings

import pytest
import sacrebleu
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from common.errors import UserError
from thor.scores import (
  Score,
  all_scores,
  bleu,
  by_language,
  chrf,
  copy_baseline,
  exact_match,
  paired_bootstrap,
  tokenizer_for,
)

REFERENCES = [
  "Deutschland, Frankreich und Italien",
  "am 3. Mai 2021 um 14:05 Uhr",
  "in 3 Tagen",
  "Schweizer Franken oder Euro",
  "vor 12 Jahren, sagt man in Österreich.",
  "die Insel Man und die Färöer",
] * 5
GOOD = [line.replace("und", "oder") for line in REFERENCES]
BAD = [" ".join(reversed(line.split())) for line in REFERENCES]
CHINESE = ["中国和法国", "三天后,在德国"], ["中国与法国", "三天后,在意大利"]


@pytest.mark.parametrize("hypotheses", [GOOD, BAD, REFERENCES])
@pytest.mark.parametrize("tokenize", ["13a", "intl", "char", "none", "zh"])
def test_bleu_is_sacrebleus(hypotheses, tokenize):
  metric = BLEU(tokenize=tokenize)
  expected = metric.corpus_score(hypotheses, [REFERENCES]).score
  found = bleu(hypotheses, REFERENCES, tokenize=tokenize)
  assert found.value == expected
  assert found.signature == str(metric.get_signature())
  assert f"tok:{tokenize}|" in found.signature


@pytest.mark.parametrize(("word_order", "name"), [(0, "chrF2"), (2, "chrF2++")])
def test_chrf_is_sacrebleus(word_order, name):
  expected = sacrebleu.corpus_chrf(GOOD, [REFERENCES], word_order=word_order)
  found = chrf(GOOD, REFERENCES, word_order=word_order)
  assert found.value == expected.score
  assert found.name == expected.name == name
  assert f"nw:{word_order}|" in found.signature


def test_scores_of_the_references_themselves():
  for score in all_scores(REFERENCES, REFERENCES).values():
    assert score.value == pytest.approx(100, abs=1e-9)


def test_a_score_reads_as_one_line():
  line = str(Score(24.68, "nrefs:1|tok:13a", "BLEU"))
  assert line == "BLEU 24.7 (nrefs:1|tok:13a)"


def test_bleu_of_tokenised_text_says_so():
  assert bleu(GOOD, REFERENCES).name == "BLEU"
  assert bleu(GOOD, REFERENCES, tokenize="none").name == "tokenised BLEU"
  results = paired_bootstrap(
    {"a": GOOD}, REFERENCES, baseline="a", samples=2, tokenize="none"
  )
  assert results["a"]["bleu"].score.name == "tokenised BLEU"


@pytest.mark.parametrize(
  ("hypotheses", "value"),
  [
    (["a", "b", "c", "d"], 100), (["a ", " b", "c", "x"], 75),
    (["A", "b.", "", "d"], 25),
  ],
)  # fmt: skip
def test_exact_match(hypotheses, value):
  assert exact_match(hypotheses, ["a", "b", "c", "d"]).value == value


@pytest.mark.parametrize(
  ("language", "tokenizer"),
  [
    ("de", "13a"), ("zh", "zh"), ("zh_Hant", "zh"), ("zh-CN", "zh"),
    ("ZH", "zh"), ("ja", "char"), ("th", "char"), ("ko", "13a"), ("", "13a"),
  ],
)  # fmt: skip
def test_the_language_chooses_the_tokenizer(language, tokenizer):
  assert tokenizer_for(language) == tokenizer
  assert tokenizer in BLEU.TOKENIZERS


def test_languages_are_scored_apart():
  hypotheses, references = CHINESE
  both = by_language(
    [GOOD[0], hypotheses[0], *GOOD[1:], hypotheses[1]],
    [REFERENCES[0], references[0], *REFERENCES[1:], references[1]],
    ["de", "zh", *["de"] * (len(GOOD) - 1), "zh"],
  )
  assert list(both) == ["de", "zh"]
  assert both["de"] == all_scores(GOOD, REFERENCES, language="de")
  assert both["zh"] == all_scores(*CHINESE, language="zh")
  zh = BLEU(tokenize="zh").corpus_score(hypotheses, [references]).score
  assert both["zh"]["bleu"].value == zh
  # Without spaces 13a finds no word of these.
  assert zh > bleu(*CHINESE).value


def test_the_copy_baseline_takes_the_source_for_a_translation():
  sources = ["Germany, France and Italy", "in 3 days", "Euro"]
  references = ["Deutschland, Frankreich und Italien", "in 3 Tagen", "Euro"]
  found = copy_baseline(sources, references)
  assert found == all_scores(sources, references)
  expected = sacrebleu.corpus_chrf(sources, [references]).score
  assert found["chrf"].value == expected
  assert found["exact_match"].value == pytest.approx(100 / 3)


SYSTEMS = {"good": GOOD, "bad": BAD, "best": REFERENCES}


def test_the_bootstrap_is_sacrebleus(monkeypatch):
  results = paired_bootstrap(
    SYSTEMS, REFERENCES, baseline="bad", samples=50, seed=7
  )
  monkeypatch.setenv("SACREBLEU_SEED", "7")
  signatures, expected = PairedTest(
    [("bad", BAD), ("good", GOOD), ("best", REFERENCES)],
    {"BLEU": BLEU(), "chrF": CHRF()},
    [REFERENCES],
    test_type="bs",
    n_samples=50,
  )()
  assert list(results) == expected["System"] == ["bad", "good", "best"]
  for key, label in (("bleu", "BLEU"), ("chrf", "chrF2")):
    for i, name in enumerate(results):
      found, theirs = results[name][key], expected[label][i]
      assert found.score.value == theirs.score
      assert found.score.name == label
      assert found.score.signature == str(signatures[label])
      assert (found.mean, found.half_width) == (theirs.mean, theirs.ci)
      if i:
        assert found.p_value == theirs.p_value
    assert math.isnan(results["bad"][key].p_value)
    assert "bs:50" in results["bad"][key].score.signature
    assert "seed:7" in results["bad"][key].score.signature


def test_the_bootstrap_repeats_itself_by_seed(monkeypatch):
  monkeypatch.setenv("SACREBLEU_SEED", "none")

  def run(seed):
    results = paired_bootstrap(
      {"bad": BAD, "good": GOOD[:1] + BAD[1:]},
      REFERENCES, baseline="bad", samples=30, seed=seed,
    )  # fmt: skip
    return [(r.mean, r.half_width) for r in results["good"].values()]

  assert run(1) == run(1) != run(2)
  assert os.environ["SACREBLEU_SEED"] == "none"
  monkeypatch.delenv("SACREBLEU_SEED")
  run(1)
  assert "SACREBLEU_SEED" not in os.environ


def test_a_system_that_equals_the_baseline_is_not_different():
  """Sacrebleu gives 1 / (samples + 1), as to the surest difference."""
  results = paired_bootstrap(
    {"a": GOOD, "b": list(GOOD), "c": REFERENCES},
    REFERENCES, baseline="a", samples=20,
  )  # fmt: skip
  assert [r.p_value for r in results["b"].values()] == [1, 1]
  assert all(r.p_value < 0.5 for r in results["c"].values())


LINES = ["Das ist es ."] * 120  # sacrebleu warns of these


def test_nothing_of_sacrebleu_reaches_the_terminal(capfd, caplog):
  caplog.set_level(logging.DEBUG)
  BLEU().corpus_score(LINES, [LINES])
  assert "forgot to detokenize" in caplog.text  # it would
  caplog.clear()
  capfd.readouterr()
  with warnings.catch_warnings(action="error"):
    all_scores(LINES, LINES, language="ja")
    paired_bootstrap({"a": LINES}, LINES, baseline="a", samples=3)
  assert caplog.text == ""
  assert capfd.readouterr() == ("", "")
  assert not logging.getLogger("sacrebleu").disabled


@pytest.mark.parametrize(
  ("score", "message"),
  [
    (lambda: bleu(["a"], ["a", "b"]), "1 translations, but 2 references"),
    (lambda: chrf(["a", "b"], ["a"]), "2 translations, but 1 references"),
    (lambda: exact_match([], []), "no translations to score"),
    (lambda: bleu([], []), "no translations to score"),
    (lambda: copy_baseline(["a"], []), "1 sources, but 0 references"),
    (lambda: by_language(["a"], ["a"], []), "1 references, but 0 languages"),
    (lambda: bleu(["a"], ["a"], tokenize="13"), "'13'.*did you mean '13a'"),
    (
      lambda: paired_bootstrap({"a": ["x"]}, ["x"], baseline="b"),
      "baseline='b' is no system; known: a",
    ),
    (
      lambda: paired_bootstrap({"a": ["x"]}, ["x", "y"], baseline="a"),
      "1 translations of 'a', but 2 references",
    ),
    (
      lambda: paired_bootstrap({"a": ["x"]}, ["x"], baseline="a", seed=0),
      "seed=0: give 1 or more",
    ),
    (
      lambda: paired_bootstrap({"a": ["x"]}, ["x"], baseline="a", samples=0),
      "samples=0: give 1 or more",
    ),
  ],
)
def test_bad_input_is_one_line(score, message):
  with pytest.raises(UserError, match=message) as caught:
    score()
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [bleu, chrf])
def test_without_sacrebleu_one_line_says_what_to_install(monkeypatch, call):
  monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
  with pytest.raises(UserError) as caught:
    call(["a"], ["a"])
  assert str(caught.value) == (
    "BLEU and chrF need sacrebleu: pip install -e '.[translation]'"
  )


def test_a_tokenizer_that_needs_more_says_what(monkeypatch):
  from sacrebleu.tokenizers import tokenizer_ja_mecab

  monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", None)
  with pytest.raises(UserError, match=r"pip install 'sacrebleu\[ja\]'$"):
    bleu(["a"], ["a"], tokenize="ja-mecab")
