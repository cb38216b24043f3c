"""Scores of files and of runs, and what is refused before they are read."""

import json
import sys
import types
from unittest import mock

import numpy as np
import pytest
import sacrebleu
from ml_collections import ConfigDict

from common import app
from thor import evaluate, scores, sources, translations
from thor import run as run_module
from thor.pairs import Pair, Pairs, ParallelText

REFERENCES = [
  "Der Zug kommt in drei Tagen in Finnland an.",
  "Peru, Tonga und die Schweiz liegen nicht am selben Meer.",
  "Am Montag sind es noch zwei Wochen.",
  "Wer zuletzt lacht, lacht am besten.",
]
OURS = [
  "Der Zug kommt in drei Tagen nach Finnland.",
  REFERENCES[1],
  "Am Montag sind es zwei Wochen.",
  "Wer zuletzt lacht, lacht gut.",
]
THEIRS = [
  "Ein Zug kommt nach Finnland in drei Tagen.",
  "Peru, Tonga und Schweiz liegen am selben Meer.",
  REFERENCES[2],
  "Zuletzt lacht der Beste.",
]


@pytest.fixture
def command(monkeypatch, capsys):
  """`(*arguments)`: status, output, errors."""

  def call(*arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    status = app.call(evaluate.main)
    out, err = capsys.readouterr()
    return status, out, err

  return call


def cells(out, label):
  """The numbers of the rows with this label, in their order."""
  rows = [line.split() for line in out.splitlines()]
  return [
    [float(cell) for cell in row[1:]]
    for row in rows
    if row[:1] == [label] and len(row) == 4
  ]


# -- files ---------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
  """Paths of the references and of two systems."""
  texts = {"ref": REFERENCES, "ours": OURS, "theirs": THEIRS}
  for name, lines in texts.items():
    (tmp_path / name).write_text("\n".join(lines) + "\n")
  return [str(tmp_path / name) for name in texts]


def test_a_file_has_the_scores_that_sacrebleu_gives_it(command, files):
  reference, ours, _ = files
  arguments = ("--references", reference, "--hypotheses", ours)
  status, out, err = command(*arguments, "--json")
  assert (status, err) == (0, "")
  found = json.loads(out)
  table = found["systems"][ours]["all"]
  bleu = sacrebleu.corpus_bleu(OURS, [REFERENCES])
  chrf = sacrebleu.corpus_chrf(OURS, [REFERENCES])
  assert table["bleu"]["value"] == bleu.score
  assert table["chrf"]["value"] == chrf.score
  assert table["exact_match"]["value"] == 25
  assert "tok:13a" in table["bleu"]["signature"]
  assert found["bootstrap"] == {}
  _, page, _ = command(*arguments)
  (row,) = cells(page, "all")
  np.testing.assert_allclose(row, [bleu.score, chrf.score, 25], atol=0.05)
  assert f"signature  {table['bleu']['signature']}" in page


@pytest.mark.parametrize(
  ("flags", "label", "tokenize"),
  [
    (("--language", "zh"), "zh", "zh"),
    (("--language", "ja"), "ja", "char"),
    (("--tokenize", "intl"), "all", "intl"),
    (("--language", "ja", "--tokenize", "13a"), "ja", "13a"),
  ],
)
def test_the_language_chooses_the_tokenizer(
  command, files, flags, label, tokenize
):
  reference, *both = files
  arguments = ("--references", reference, "--hypotheses", *both, *flags)
  found = json.loads(command(*arguments, "--samples=20", "--json")[1])
  score = found["systems"][both[0]][label]["bleu"]
  assert f"tok:{tokenize}|" in score["signature"]
  expected = sacrebleu.corpus_bleu(OURS, [REFERENCES], tokenize=tokenize)
  assert score["value"] == expected.score
  test = found["bootstrap"][label]
  assert test["tokenize"] == tokenize
  assert f"tok:{tokenize}|" in test["systems"][both[1]]["bleu"]["signature"]


def test_files_are_compared_with_the_first(command, files):
  reference, ours, theirs = files
  arguments = ("--references", reference, "--samples=50")
  arguments += ("--hypotheses", theirs, ours)
  expected = scores.paired_bootstrap(
    {theirs: THEIRS, ours: OURS}, REFERENCES, baseline=theirs, samples=50
  )
  tests = json.loads(command(*arguments, "--json")[1])["bootstrap"]
  found = tests["all"]["systems"]
  assert list(found) == [theirs, ours]
  for metric in ("bleu", "chrf"):
    one = expected[ours][metric]
    assert found[theirs][metric]["p"] is None
    assert found[ours][metric] == {
      "mean": one.mean, "half_width": one.half_width, "p": one.p_value,
      "signature": one.score.signature,
    }  # fmt: skip
  _, page, _ = command(*arguments)
  assert f"bootstrap against {theirs}: all, tokenizer 13a\n" in page
  one = expected[ours]["chrf"]
  row = f"chrf {one.mean:.1f} ± {one.half_width:.1f} (p = {one.p_value:.3g})"
  assert row in page
  assert page.count("(p = ") == 2


def test_unequal_numbers_of_lines_are_told(command, files, tmp_path):
  short = tmp_path / "short"
  short.write_text("\n".join(OURS[:3]))
  status, out, err = command(
    "--references", files[0], "--hypotheses", files[1], short
  )
  assert (status, out) == (2, "")
  assert f"{short} has 3 lines, but {files[0]} 4: give one" in err


# -- runs ----------------------------------------------------------------------

LINES = {
  "de": ("Monday", "Montag", "Am Montag kommt der Zug nach Peru."),
  "fr": ("Peru", "Pérou", "Le train arrive lundi au Pérou."),
  "ja": ("Tonga", "トンガ", "列車は月曜日にトンガに着きます。"),
  "th": ("Chad", "ชาด", "รถไฟมาถึงชาดวันจันทร์"),
}


def text_of(*languages, train="one"):
  """A data set; its last test sentence equals its source."""

  def pairs(tag):
    source, word, sentence = LINES[tag]
    return [Pair(source, word, tag), Pair(source * 2, sentence, tag),
            Pair(sentence, sentence, tag)]  # fmt: skip

  tests = [pair for tag in languages for pair in pairs(tag)]
  splits = {
    "train": Pairs.of([Pair(train, "eins", languages[0])]),
    "test": Pairs.of(tests),
    "test_names": Pairs.of(tests[::3]),
  }
  return ParallelText.of("a text", splits, languages, {})


@pytest.fixture
def world(monkeypatch):
  """Runs whose data, translations and facts a test may change.

  `texts` and `facts` are by folder. Run `best` repeats the references, and the
  others lose each sentence's last character. `calls` are those of
  `load_run` and `translate_pairs`.
  """
  world = types.SimpleNamespace(texts={}, facts={}, calls=[])

  def load_run(folder, *, step=None, average=1):
    world.calls.append((folder, step, average))
    text = world.texts.setdefault(folder, text_of("de", "fr"))
    facts = {"text_hash": text.facts["text_hash"]}
    config = ConfigDict(
      {"data": {"source": {"kind": folder}}, "translation": {"beam": 4}}
    ).lock()
    return types.SimpleNamespace(
      name=folder, config=config, facts=world.facts.get(folder, facts)
    )

  def translate_pairs(run, pairs, *, dispatch="", seed=None):
    world.calls.append((dispatch, seed, run.config.translation.beam))
    stop = None if run.name == "best" else -1
    return [pair.target[:stop] for pair in pairs]

  def load_parallel(cfg):
    return world.texts[cfg.kind]

  for module, function in ((run_module, load_run), (sources, load_parallel),
                           (translations, translate_pairs)):  # fmt: skip
    real = getattr(module, function.__name__)
    # It refuses calls that the real one would.
    stub = mock.create_autospec(real, side_effect=function)
    monkeypatch.setattr(module, function.__name__, stub)
  return world


def test_a_run_has_a_row_for_each_language_and_their_mean(command, world):
  status, out, err = command("a", "--json")
  assert (status, err) == (0, "")
  found = json.loads(out)["systems"]
  pairs = list(text_of("de", "fr").splits["test"])
  expected_texts = {
    "a": [pair.target[:-1] for pair in pairs],
    "copying the source": [pair.source for pair in pairs],
  }
  assert list(found) == list(expected_texts)
  for name, texts in expected_texts.items():
    assert list(found[name]) == ["de", "fr"]
    for i, tag in enumerate(("de", "fr")):
      own = slice(3 * i, 3 * i + 3)
      expected = scores.all_scores(
        texts[own], [p.target for p in pairs[own]], language=tag
      )
      values = {m: one["value"] for m, one in found[name][tag].items()}
      assert values == {m: one.value for m, one in expected.items()}
  assert found["copying the source"]["de"]["exact_match"]["value"] > 30
  _, page, _ = command("a")
  assert "copying the source     BLEU   chrF  exact\n" in page
  for i, name in enumerate(found):
    values = [
      [found[name][tag][m]["value"] for m in evaluate.METRICS]
      for tag in ("de", "fr")
    ]
    rows = [cells(page, label)[i] for label in ("de", "fr", "mean")]
    expected = [*values, np.mean(values, axis=0)]
    np.testing.assert_allclose(rows, expected, atol=0.05)  # printed so
  assert "bootstrap" not in page


def test_a_run_is_used_as_it_was_trained_to_be(command, world):
  command("a")
  assert world.calls == [("a", None, 1), ("", None, 4)]


def test_flags_say_otherwise(command, world):
  command("a", "--dispatch=fixed:1", "--seed=0", "--beam=1", "--average=2",
          "--step=8")  # fmt: skip
  assert world.calls == [("a", 8, 2), ("fixed:1", 0, 1)]


def test_the_split_is_the_first_test_set_or_the_one_that_is_named(
  command, world
):
  names = command("a", "--split=test_names")
  first = command("a")
  assert names[0] == first[0] == 0
  # The names are in no source.
  assert cells(names[1], "mean")[1][2] == 0
  assert cells(first[1], "mean")[1][2] > 30
  assert command("a", "--split=test") == first


def test_an_unknown_split_names_the_known_ones(command, world):
  status, _, err = command("a", "--split=tests")
  assert status == 2
  assert err == "error: --split='tests': a has train, test, test_names\n"


def test_data_that_changed_since_the_training_are_refused(command, world):
  """Even if the test set is still the same."""
  then = text_of("de", "fr", train="other").facts["text_hash"]
  world.facts["a"] = {"text_hash": then}
  status, out, err = command("a")
  assert (status, out) == (2, "")
  assert err.startswith("error: a: its data are not those it was trained with")
  assert then in err
  assert text_of("de", "fr").facts["text_hash"] in err
  assert err.count("\n") == 1
  assert len(world.calls) == 1  # nothing is translated


def test_runs_need_one_test_set_but_not_one_training_text(command, world):
  world.texts["b"] = text_of("de", "fr", train="other")
  world.texts["c"] = text_of("fr", "de")
  assert command("a", "b", "--samples=2")[0] == 0
  status, _, err = command("a", "b", "c")
  assert status == 2
  assert "c was trained with other data than a: its test differs" in err
  assert err.count("\n") == 1


@pytest.mark.parametrize(
  ("languages", "parts"),
  [
    (("de", "fr"), {"all": "13a"}),
    (("de",), {"de": "13a"}),
    (("ja", "th"), {"all": "char"}),
    (("de", "ja", "fr"), {"de": "13a", "ja": "char", "fr": "13a"}),
  ],
)
def test_the_bootstrap_of_runs_has_a_tokenizer_that_fits(
  command, world, languages, parts
):
  text = text_of(*languages)
  world.texts |= {"a": text, "best": text}
  arguments = ("a", "best", "--samples=20")
  tests = json.loads(command(*arguments, "--json")[1])["bootstrap"]
  assert {name: test["tokenize"] for name, test in tests.items()} == parts
  _, page, _ = command(*arguments)
  for part, tokenize in parts.items():
    pairs = [p for p in text.splits["test"] if part in ("all", p.language)]
    references = [pair.target for pair in pairs]
    expected = scores.paired_bootstrap(
      {"a": [r[:-1] for r in references], "best": references},
      references, baseline="a", samples=20, tokenize=tokenize,
    )  # fmt: skip
    one, found = expected["best"]["bleu"], tests[part]["systems"]["best"]
    assert found["bleu"]["p"] == one.p_value
    assert found["bleu"]["mean"] == one.mean
    mean = tests[part]["systems"]["a"]["bleu"]["mean"]
    assert mean == expected["a"]["bleu"].mean < 100
    assert f"against a: {part}, tokenizer {tokenize}\n" in page


# -- mistakes ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    ("", "give runs' folders, or --references and --hypotheses"),
    ("--hypotheses b", "give runs' folders, or --references"),
    ("a --references b", "give runs' folders, or --references"),
    ("--references b", "--references needs --hypotheses"),
    ("--references b --hypotheses c --split test", "--split goes with runs"),
    ("--references b --hypotheses c --dispatch x", "--dispatch goes with"),
    ("--references b --hypotheses c --seed 0", "--seed goes with runs"),
    ("--references b --hypotheses c --beam 4", "--beam goes with runs"),
    ("--references b --hypotheses c --average 1", "--average goes with runs"),
    ("--references b --hypotheses c --step 1", "--step goes with runs"),
    ("a --hypotheses b", "--hypotheses goes with --references, not runs"),
    ("a --language de", "--language goes with --references, not runs"),
    ("a --tokenize 13a", "--tokenize goes with --references, not runs"),
    ("a --beam=-1", "--beam=-1 must be at least 1"),
    ("a --beam 0", "--beam=0 must be at least 1"),
    ("a --average 0", "--average=0 must be at least 1"),
    ("a --samples 0", "--samples=0 must be at least 1"),
    ("a b a/", "a and a/ are the same: give it once"),
    ("--references b --hypotheses c x ./c", "c and ./c are the same"),
    ("--references b --hypotheses c b", "b and b are the same"),
    ("a --splt test", "unknown flag '--splt'; did you mean '--split'?"),
  ],
)
def test_mistakes_have_one_line_before_anything_is_read(
  command, world, arguments, text
):
  """None of these files is there."""
  status, out, err = command(*arguments.split())
  assert (status, out) == (2, "")
  assert err.startswith("error: ")
  assert text in err
  assert err.count("\n") == 1
  assert world.calls == []


@pytest.mark.parametrize(
  ("flags", "text"),
  [
    (("--tokenize=13b",), "tokenize='13b' is no tokenizer of sacrebleu"),
    (("--hypotheses", "/no/such"), "/no/such: cannot be read"),
  ],
)
def test_files_that_cannot_be_scored_have_one_line(command, files, flags, text):
  status, out, err = command(
    "--references", files[0], "--hypotheses", files[1], *flags
  )
  assert (status, out) == (2, "")
  assert text in err
  assert err.count("\n") == 1
