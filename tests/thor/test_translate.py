"""The command: flags before the run's settings, streams, one-line errors."""

import io
import os
import pathlib
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest

from common import app
from common.errors import UserError
from thor import run as run_module
from thor import translate, translator
from thor.decode import Search
from thor.dispatch import Dispatch, prepare
from thor.pairs import Pair
from thor.translations import translate_pairs
from thor.translator import Translator
from thor.vocabulary import EOS, PAD

ROOT = pathlib.Path(__file__).parents[2]
TEXT = "a cab can back a bad bag and bake a cake in a dark cabin"
WORDS = TEXT.split()
PLACES = ((0, 3), (2, 9), (5, 1), (1, 5))  # first word, words
LINES = [" ".join(WORDS[i : i + n]) for i, n in PLACES]
LONG = TEXT


@pytest.fixture(scope="module")
def run(cab_run):
  return cab_run


@pytest.fixture(scope="module")
def vocabulary(cab_vocabulary):
  return cab_vocabulary


@pytest.fixture
def command(run, monkeypatch, capfdbinary):
  """`(arguments, stdin="")`: status, output, errors; input is text, bytes or
  a descriptor.
  """

  def load_run(folder, *, step=None, average=1):
    assert (folder, step, average) == ("folder", None, 1)
    return run

  def call(*arguments, stdin=""):
    argv = ["translate", "folder", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    if isinstance(stdin, int):
      file = open(stdin)  # noqa: SIM115, the test's
    else:
      data = stdin.encode() if isinstance(stdin, str) else stdin
      file = io.TextIOWrapper(io.BytesIO(data))
    with file:
      monkeypatch.setattr(sys, "stdin", file)
      status = app.call(translate.main)
    out, err = capfdbinary.readouterr()
    return status, out.decode(), err.decode()

  monkeypatch.setattr(run_module, "load_run", load_run)
  return call


@pytest.fixture
def echo(monkeypatch):
  """Sentences translate to the number of their ids; the batches so far."""
  seen = []

  def decode(prepared, source, search, **sampling):
    del prepared, sampling
    seen.append(source)
    shape = (len(source), search.n_best)
    tokens = np.full((*shape, 2), EOS, np.int32)
    tokens[..., 0] = 7 + np.sum(source != PAD, axis=1)[:, None]
    return types.SimpleNamespace(
      tokens=tokens, scores=np.zeros(shape), lengths=np.full(shape, 2)
    )

  monkeypatch.setattr(translator, "beam_search", decode)
  monkeypatch.setattr(translator, "sample", decode)
  return seen


@pytest.fixture
def settings(monkeypatch):
  """What the command makes its translator of."""
  seen = {}

  class Recorder(Translator):
    def __init__(self, prepared, vocabulary, search, **more):
      seen.update(more, search=search, prepared=prepared)
      super().__init__(prepared, vocabulary, search, **more)

  monkeypatch.setattr(translator, "Translator", Recorder)
  return seen


def test_a_runs_command_gives_what_was_scored(run, command):
  lines = [*LINES, LONG * 2]
  pairs = [Pair(line, "", "de") for line in lines]
  expected = translate_pairs(run, pairs)
  _, out, _ = command("--language=de", stdin="\n".join(lines))
  assert out.splitlines() == expected


def same(one, other):
  assert (one.name, one.settings) == (other.name, other.settings)
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
  np.testing.assert_array_equal(
    jax.random.key_data(one.key), jax.random.key_data(other.key)
  )


def test_what_no_flag_says_is_the_runs(run, command, settings, echo):
  command("a", "--language=de")
  assert settings["search"] == Search(
    beam=2, length_penalty=0.6, penalty="gnmt", max_ratio=0.0, max_extra=4
  )
  assert (settings["lengths"], settings["token_budget"]) == ([8, 24], 64)
  same(
    settings["prepared"],
    prepare(run.params, run.settings, Dispatch("fixed", 1), seed=3),
  )


def test_flags_come_before_the_run(run, command, settings, echo):
  command(
    "a", "--language=de", "--beam=3", "--length_penalty=0", "--max_ratio=2",
    "--max_extra=0", "--penalty=fairseq", "--seed=0", "--batch_tokens=48",
    "--dispatch=", "--n_best=3",
  )  # fmt: skip
  assert settings["search"] == Search(
    beam=3, length_penalty=0, max_ratio=2, max_extra=0, n_best=3
  )
  assert settings["token_budget"] == 48
  same(
    settings["prepared"],
    prepare(run.params, run.settings, Dispatch("dispatch_sentence"), seed=0),
  )


def test_text_files_and_standard_input_give_the_same(command, tmp_path):
  (tmp_path / "in.txt").write_text("\n".join(LINES) + "\n")
  status, piped, err = command("--language=de", stdin="\n".join(LINES))
  assert (status, err) == (0, "")
  assert len(piped.splitlines()) == len(LINES)
  assert command("--language=de", "\n".join(LINES))[1] == piped
  out = tmp_path / "out.txt"
  status, shown, _ = command(
    "--language=de", f"--input={tmp_path / 'in.txt'}", f"--output={out}"
  )
  assert (status, shown) == (0, "")
  assert out.read_text() == piped


def test_each_line_has_as_many_lines_as_were_asked_for(command, echo):
  text = f"\n{LINES[0]}\n\n"
  _, out, _ = command("--language=de", "--n_best=2", stdin=text)
  lines = out.split("\n")
  assert [bool(line) for line in lines] == [False] * 2 + [True] * 2 + [
    False
  ] * 3
  _, out, _ = command("--language=de", "--n_best=2", "--scores", stdin="\n")
  assert out == "0.0000\t\n-inf\t\n"


def test_several_translations_come_with_their_scores(command):
  _, out, _ = command(LINES[0], "--language=de", "--n_best=2", "--scores")
  scores = [float(line.split("\t")[0]) for line in out.splitlines()]
  assert len(scores) == 2
  assert scores[0] >= scores[1]


def test_samples_follow_the_seed(command):
  def drawn(seed):
    flags = ("--sample", f"--seed={seed}", "--temperature=2", "--top_k=9")
    return command(LINES[1], "--language=de", *flags)[1]

  assert drawn(1) == drawn(1) != drawn(2**32 - 1)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_files_and_pipes_are_read_alike(
  command, tmp_path, vocabulary, echo, ends
):
  """A byte order mark goes away, and only line feeds end a line."""
  lines = ["a", "b\x0cc\u2028d", "", "e"]
  data = b"\xef\xbb\xbf" + ends.join(lines).encode()
  (tmp_path / "in.txt").write_bytes(data)
  outs = [
    command("--language=de", stdin=data)[1],
    command("--language=de", f"--input={tmp_path / 'in.txt'}")[1],
  ]
  assert outs[0] == outs[1]
  assert outs[0].count("\n") == 4
  rows = [row for batch in echo for row in np.asarray(batch)]
  ids = {tuple(row[row != PAD]) for row in rows}
  expected = {tuple(vocabulary.encode(line, "de")) for line in lines if line}
  assert ids - {()} == expected


def test_a_pipe_that_waits_has_its_lines_translated(command, echo, monkeypatch):
  """As of `tail -f`: the writer goes on when it sees what it has written."""
  out_of, into = os.pipe()
  decode, answers = translator.beam_search, []

  def answer(*arguments):
    answers.append(decode(*arguments))
    if len(answers) < 3:
      os.write(into, b" cab\nbad bag")
    elif len(answers) == 3:
      os.close(into)
    return answers[-1]

  monkeypatch.setattr(translator, "beam_search", answer)
  os.write(into, b"a\nb\nbake a")
  # Nothing would ever come if the command waited for the end.
  alarm = threading.Timer(30, os.close, [into])
  alarm.start()
  status, out, _ = command("--language=de", stdin=out_of)
  alarm.cancel()
  assert status == 0
  assert [int(np.sum(np.any(b != PAD, axis=1))) for b in echo] == [2, 1, 1, 1]
  assert out.count("\n") == 5


def test_lines_that_are_there_wait_for_none(command, echo, tmp_path):
  """As of `cat`: many lines fill batches."""
  file = tmp_path / "in.txt"
  file.write_text("a\n" * 40)
  command("--language=de", stdin=os.open(file, os.O_RDONLY))
  assert [len(batch) for batch in echo] == [8] * 5


def test_lines_that_trickle_wait_no_longer_together(monkeypatch):
  out_of, into = os.pipe()
  clock = [0.0]

  with open(out_of, "rb") as file:
    lines = translate._Lines(file, "x")
    monkeypatch.setattr(translate.time, "monotonic", lambda: clock[0])

    def wait(files, _, __, patience):
      """A line comes every 0.04 s."""
      clock[0] += min(patience, 0.04)
      if patience < 0.04:
        return [], [], []
      os.write(into, b"a\n")
      return files, [], []

    monkeypatch.setattr(translate.select, "select", wait)
    for _ in range(2):
      ready = 0
      while ready < 5 and lines.is_ready():
        ready += 1
        next(iter(lines))
      assert ready == 2
  os.close(into)


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    (("a", "--language=dr"), "error: --language=dr: the run translates into "
     "de, fi"),
    (("a",), "error: --language is missing: the run translates into de, fi"),
    (("a", "--language=de", "--dispatch=gate"), "dispatch='gate'"),
    (("a", "--language=de", "--beam=0"), "beam=0 must be"),
    (("a", "--language=de", "--penalty=x"), "penalty='x'"),
    (("a", "--top_k=3"), "go with --sample"),
    (("a", "--sample", "--beam=8"), "--beam=8 does not go with --sample"),
    (("a", "--seed=-1"), "--seed=-1 must be from 0 to 4294967295"),
    (("a", "--seed=4294967296"), "--seed=4294967296 must be from 0"),
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
  status, _, err = command("--language=de", f"--input={file}")
  assert status == 2
  assert f"error: {file}:2: byte 1" in err
  status, _, err = command("--language=de", stdin=b"a\n\xff\n")
  assert status == 2
  assert "error: standard input:2: byte 1" in err


def test_an_input_that_breaks_is_named():
  class Broken(io.BytesIO):
    def read1(self, size):
      raise OSError(5, "Input/output error")

  with pytest.raises(UserError, match=r"standard input: .* Input/output error"):
    list(translate._Lines(Broken(), "standard input"))


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
def many(lines, language, is_ready):
  while True:
    yield types.SimpleNamespace(n_best=[("text", 0.0)])
stub = types.SimpleNamespace(translate=many, languages=())
translate._translator = lambda args: (stub, stub)
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
