"""Lines in, lines out: in order, none lost, in few shapes."""

import functools
import io
import logging
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import app
from common.errors import UserError
from common.parallel import batch_sharding, make_mesh
from thor import run as run_module
from thor import translate, translator
from thor.decode import Search
from thor.dispatch import Dispatch, prepare
from thor.model import init_params
from thor.routing import Routing
from thor.settings import Settings
from thor.translator import Translation, Translator
from thor.vocabulary import EOS, PAD, train_vocabulary

ROOT = pathlib.Path(__file__).parents[2]
TEXT = "a cab can back a bad bag and bake a cake in a dark cabin"
WORDS = TEXT.split()
PLACES = ((0, 3), (2, 9), (5, 1), (1, 5))  # first word, words
LINES = [" ".join(WORDS[i : i + n]) for i, n in PLACES]
SEARCH = Search(beam=2, n_best=2, max_ratio=0, max_extra=4)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp("spm") / "a.model"
  return train_vocabulary([*LINES, *WORDS], 26, path, languages=("de", "fi"))


@pytest.fixture(scope="module")
def run(vocabulary):
  """A run with random parameters."""
  routing = Routing("thor", axis="")
  settings = Settings(
    vocabulary.size, width=16, hidden=12, heads=2, encoder_layers=1,
    decoder_layers=1, logits_bias=True, **routing.model_settings(),
  )  # fmt: skip
  rng = np.random.default_rng(0)
  make = functools.partial(init_params, settings)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32),
    jax.eval_shape(make, jax.random.key(0)),
  )
  # Words, not tags.
  bias = np.where(np.arange(vocabulary.size) < 6, -9, 0).astype(np.float32)
  bias[EOS] = 0
  params["logits_bias"] = jnp.asarray(bias)
  params["embedding"] = 2 * params["embedding"]
  return types.SimpleNamespace(
    config=None, vocabulary=vocabulary, settings=settings, routing=routing,
    params=params, table=None, step=7,
  )  # fmt: skip


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
  assert together[4] == together[-1] == Translation("", [("", 0.0)])
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
  source = np.full((1, 16), PAD, np.int32)
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


# -- the command ---------------------------------------------------------------


@pytest.fixture
def command(run, monkeypatch, capfdbinary):
  """`(arguments, stdin="")`: status, output, errors."""

  def load_run(folder, *, step=None, average=1):
    assert (folder, step, average) == ("folder", None, 1)
    return run

  def call(*arguments, stdin=""):
    argv = ["translate", "folder", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    file = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    monkeypatch.setattr(sys, "stdin", file)
    status = app.call(translate.main)
    out, err = capfdbinary.readouterr()
    return status, out.decode(), err.decode()

  monkeypatch.setattr(run_module, "load_run", load_run)
  return call


SMALL = ("--batch_tokens=64", "--beam=2", "--max_ratio=0", "--max_extra=4")


def test_text_files_and_standard_input_give_the_same(command, tmp_path):
  (tmp_path / "in.txt").write_text("\n".join(LINES) + "\n")
  flags = ("--language=de", *SMALL)
  status, piped, err = command(*flags, stdin="\n".join(LINES))
  assert (status, err) == (0, "")
  assert len(piped.splitlines()) == len(LINES)
  assert command(*flags, "\n".join(LINES))[1] == piped
  out = tmp_path / "out.txt"
  status, shown, _ = command(
    *flags, f"--input={tmp_path / 'in.txt'}", f"--output={out}"
  )
  assert (status, shown) == (0, "")
  assert out.read_text() == piped


def test_blank_lines_stay(command):
  _, out, _ = command("--language=de", *SMALL, stdin=f"\n{LINES[0]}\n\n")
  lines = out.split("\n")
  assert [bool(line) for line in lines] == [False, True, False, False]


def test_several_translations_come_with_their_scores(command):
  _, out, _ = command(
    LINES[0], "--language=de", *SMALL, "--n_best=2", "--scores"
  )
  scores = [float(line.split("\t")[0]) for line in out.splitlines()]
  assert len(scores) == 2
  assert scores[0] >= scores[1]


def test_samples_follow_the_seed(command):
  def drawn(seed):
    flags = ("--sample", f"--seed={seed}", "--temperature=2", "--top_k=9")
    dispatch = "--dispatch=fixed:0"
    return command(LINES[1], "--language=de", *SMALL, *flags, dispatch)[1]

  assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    (("a", "--language=dr"), "error: --language=dr: the run translates into "
     "de, fi"),
    (("a",), "error: --language is missing: the run translates into de, fi"),
    (("a", "--language=de", "--dispatch=gate"), "dispatch='gate'"),
    (("a", "--language=de", "--beam=0"), "beam=0 must be"),
    (("a", "--language=de", "--penalty=x"), "penalty='x'"),
    (("a", "--language=de", "--top_k=3"), "go with --sample"),
    (("a", "--sample", "--top_p=0"), "--top_p=0.0 must be in"),
    (("a", "--sample", "--temperature=0"), "--temperature=0.0 must be"),
    (("a", "--input=x"), "a text or --input, not both"),
    (("--input=x", "--output=x"), "would overwrite"),
    (("--input=/no/such", "--language=de"), "/no/such: cannot be read"),
    (("a", "--language=de", "--output=/no/such/a"), "cannot be written"),
    (("a", "--batch_tokens=0"), "--batch_tokens=0 must be"),
    (("a", "--langage=de"), "did you mean '--language'"),
  ],
)  # fmt: skip
def test_mistakes_have_one_line(command, arguments, text):
  status, out, err = command(*arguments)
  assert (status, out) == (2, "")
  assert text in err
  assert err.count("\n") == 1


def test_bytes_that_are_no_text_are_named(command, tmp_path):
  file = tmp_path / "in.txt"
  file.write_bytes(b"a\n\xff\n")
  status, _, err = command("--language=de", *SMALL, f"--input={file}")
  assert status == 2
  assert f"{file}:2" in err


def python(script, *arguments):
  return subprocess.run(
    [sys.executable, *script, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_help_comes_without_jax():
  script = (
    "import sys; sys.argv[1:] = ['--help']\n"
    "from thor import translate\n"
    "try: translate.main()\n"
    "finally: assert 'jax' not in sys.modules"
  )
  done = python(["-c", script])
  assert done.returncode == 0
  assert "--length_penalty" in done.stdout
  assert translate.EXAMPLE in done.stdout


def test_a_reader_that_leaves_ends_it_quietly():
  script = """
import sys, types
from common import app
from thor import translate
from thor.translator import Translation
def many(lines, language):
  while True:
    yield Translation("text", [("text", 0.0)])
stub = types.SimpleNamespace(translate=many, languages=())
translate._translator = lambda args, search: (stub, stub)
sys.argv[1:] = ["folder", "a"]
app.leave(app.call(translate.main))
"""
  with subprocess.Popen(
    [sys.executable, "-c", script],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "text\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
