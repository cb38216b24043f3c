"""`python -m birdie.generate`."""

import io
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie import continuations, decode, generate
from birdie import run as run_lib
from birdie.models import GatedSSM
from birdie.vocab import byte_vocabulary
from common import app
from common.data.tokenizers import ByteTokenizer

ROOT = pathlib.Path(__file__).parents[2]
EURO = "€".encode()


# -- text as it comes ----------------------------------------------------------


@pytest.mark.parametrize(
  ("data", "pieces"),
  [
    (b"", [""]),
    (b"ab", ["a", "b", ""]),
    (b"a" + EURO + b"b", ["a", "€", "b", ""]),
    # Half a character: shown once it is clear that no more comes.
    (b"a" + EURO[:2], ["a", "\N{REPLACEMENT CHARACTER}"]),
    (EURO[:2] + b"a", ["\N{REPLACEMENT CHARACTER}a", ""]),
  ],
)
def test_only_whole_characters_are_shown(data, pieces):
  tokenizer = ByteTokenizer()
  tokens = [tokenizer.offset + b for b in data]
  assert list(generate.decode_stream(tokenizer, iter(tokens))) == pieces


def test_special_tokens_are_not_shown():
  tokenizer, vocab = ByteTokenizer(), byte_vocabulary()
  tokens = [vocab.sep, *tokenizer.encode("a"), vocab.sentinels[0]]
  assert "".join(generate.decode_stream(tokenizer, tokens)) == "a"


def test_text_is_shown_before_the_next_token_is_made():
  def tokens():
    yield 64 + ord("a")
    raise AssertionError("asked for a second token first")

  assert next(generate.decode_stream(ByteTokenizer(), tokens())) == "a"


# -- the command ---------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
  vocab = byte_vocabulary()
  model = GatedSSM(vocab.size, width=8, state=8, layers=2)
  row = jnp.zeros((1, 4), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), row, row, row, row > 0)
  return run_lib.Run(
    config=None,
    model=model,
    params=params["params"],
    tokenizer=ByteTokenizer(),
    vocab=vocab,
    step=0,
  )


@pytest.fixture
def command(run, monkeypatch, capsys):
  """Runs the command on an untrained model: status, output, errors."""

  def load_run(run_dir, *, step=None):
    assert (run_dir, step) == ("folder", None)
    return run

  monkeypatch.setattr(run_lib, "load_run", load_run)

  def call(*arguments):
    argv = ["birdie.generate", "--run", "folder", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    status = app.call(generate.main)
    return status, *capsys.readouterr()

  return call


@pytest.mark.parametrize("prompt", ["", "The import", "für 5 €"])
def test_a_prompt_is_continued_by_the_model(command, run, prompt):
  status, out, _ = command("--prompt", prompt, "--max_tokens", "8", "--seed=4")
  assert status == 0
  announce = run.vocab.paradigms["prefix_language_modeling"]
  (tokens,) = decode.generate(
    run.model,
    run.params,
    [np.array([*announce, *run.tokenizer.encode(prompt)])],
    gen=run.vocab.gen,
    max_new_tokens=8,
    stop=run.vocab.eos,
    temperature=0.8,
    seed=4,
  )
  assert out == f"{prompt}{run.tokenizer.decode(tokens)}\n"


def test_the_same_seed_says_the_same(command):
  arguments = ("--prompt=x", "--max_tokens=8", "--top_k=40")
  first, again, other = (
    command(*arguments, f"--seed={seed}")[:2] for seed in (0, 0, 1)
  )
  assert first == again != other


def test_size_and_speed_are_told_at_the_end(command, run):
  status, _, err = command("--prompt=x", "--max_tokens=8", "--temperature=0")
  assert status == 0
  size = decode.state_bytes(run.model, 64)
  told = re.fullmatch(
    r"(\d+) tokens, ([\d,.]+) tokens/s; the state of a sequence takes "
    rf"{size} bytes\n",
    err,
  )
  assert told
  assert 1 <= int(told[1]) <= 8


class Words:
  """Drops the space before its first token, as SentencePiece does."""

  def decode(self, ids):
    return " ".join("abcdefghij"[i] for i in ids)


def test_the_space_before_a_continuation_is_kept():
  assert continuations.text_after(Words(), [0, 1], [2, 3]) == " c d"
  assert continuations.text_after(Words(), [], [2, 3]) == "c d"
  pieces = generate.decode_stream(Words(), iter([2, 3]), [0, 1])
  assert list(pieces) == [" c", " d", ""]


# -- where continuations stop --------------------------------------------------


@pytest.mark.parametrize(
  ("texts", "pieces", "shown"),
  [
    ((), ["a", "b"], ["a", "b"]),
    (("b",), ["ab", "c"], ["a"]),
    (("bcd",), ["ab", "c", "d", "e"], ["a"]),
    # What might have begun a stop is shown once it is clear that it does not.
    (("bcd",), ["ab", "c", "e"], ["a", "bce"]),
    (("bcd",), ["ab", "c"], ["a", "bc"]),
    (("aab",), ["a", "a", "a", "b"], ["a"]),
    # What is complete first counts, however the text comes.
    (("cd", "bcde"), ["ab", "cde"], ["a", "b"]),
    (("cd", "bcde"), ["ab", "c", "d", "e"], ["a", "b"]),
    (("cd", "bcd"), ["ab", "c", "d"], ["a"]),
    (("\n", "END"), ["E", "N", "\n"], ["EN"]),
  ],
  ids=str,
)
def test_text_stops(texts, pieces, shown):
  stops = continuations.Stops((), texts)
  made = list(stops.until(iter(pieces)))
  assert made == shown
  assert "".join(made) == stops.cut("".join(pieces))


def test_no_token_is_asked_for_behind_a_stop():
  def pieces():
    yield from ("a", "EN", "D")
    raise AssertionError("asked on")

  stops = continuations.Stops((), ("END",))
  assert list(stops.until(pieces())) == ["a"]


def test_a_text_of_one_token_is_a_stop_token(run):
  stops = continuations.Stops.of(run, ["\n", "END", "é"])
  assert stops.ids == (run.vocab.eos, *run.tokenizer.encode("\n"))
  assert stops.texts == ("\n", "END", "é")


def test_the_command_stops(command):
  arguments = ("--prompt=x", "--max_tokens=40", "--seed=1")
  _, whole, _ = command(*arguments)
  text = whole[1:-1]
  stop = next(c for c in text[5:] if c.isprintable() and c not in text[:5])
  pair = text[text.index(stop) : text.index(stop) + 2]
  for given in (stop, pair):
    status, out, _ = command(*arguments, f"--stop={given}", "--stop=NEVER")
    assert (status, out) == (0, f"x{text[: text.index(given)]}\n")


# -- prompts of a file and of the terminal -------------------------------------

PROMPTS = ["ab", "", "für 5 €", "x" * 300, "ab"]
GREEDY = ("--temperature=0", "--max_tokens=8")


@pytest.fixture(scope="module")
def answers(run):
  """Each prompt's greedy continuation, found by itself."""
  stops = continuations.Stops.of(run)
  found = {}
  for prompt in PROMPTS:
    tokens = continuations.prompt_tokens(run, prompt)
    ((made,),) = continuations.continue_all(
      run, [tokens], stops=stops, max_new_tokens=8
    )
    found[prompt] = made.text
  return found


@pytest.mark.parametrize("to_file", [False, True])
def test_a_files_prompts_are_answered_in_order(
  command, answers, tmp_path, to_file
):
  file, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
  text = "\ufeff" + "\n".join(PROMPTS).replace("ab\n", "ab\r\n") + "\n"
  file.write_bytes(text.encode())
  more = [f"--out={out}"] if to_file else []
  status, shown, err = command(
    f"--file={file}", "--batch_size=2", *GREEDY, *more
  )
  assert status == 0
  assert "tokens/s" in err
  lines = out.read_text() if to_file else shown
  assert [json.loads(line) for line in lines.splitlines()] == [
    {"prompt": prompt, "continuation": answers[prompt]} for prompt in PROMPTS
  ]


def test_answers_overwrite_no_file(command, tmp_path):
  for name in ("prompts.txt", "out.jsonl"):
    (tmp_path / name).write_text("a\n")
  out = tmp_path / "out.jsonl"
  status, _, err = command(f"--file={tmp_path}/prompts.txt", f"--out={out}")
  assert (status, err) == (
    2, f"error: --out={out} is there already: name a new one\n",
  )  # fmt: skip
  assert out.read_text() == "a\n"


def test_every_flag_with_a_default_says_so():
  for action in generate.make_parser()._actions:
    if action.default not in (None, "", [], False, "==SUPPRESS=="):
      assert f"({action.default})" in action.help, action.dest


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"a\nb\xff\n", "line 2 is not valid UTF-8, from its byte 2 on"),
    (b"\xc3", "line 1 is not valid UTF-8, from its byte 1 on"),
    (b"", "is empty: write one prompt a line"),
    (None, "No such file or directory"),
  ],
)
def test_a_file_that_cannot_be_read(command, tmp_path, content, message):
  file = tmp_path / "prompts.txt"
  if content is not None:
    file.write_bytes(content)
  status, out, err = command(f"--file={file}")
  assert (status, out) == (2, "")
  assert err.startswith(f"error: --file={file}")
  assert message in err
  assert err.count("\n") == 1


def test_a_session(command, answers, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.StringIO("ab\nfür 5 €\n\nab\n"))
  status, out, err = command("--interactive", *GREEDY)
  assert (status, out) == (0, f"{answers['ab']}\n{answers['für 5 €']}\n")
  assert "tokens/s" in err


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_end_of_a_session(command, answers, monkeypatch, end):
  """End of input, or Ctrl-C while it waits."""
  lines = iter(["ab"])

  def read(mark):
    assert mark == ""
    for line in lines:
      return line
    raise end

  monkeypatch.setattr("builtins.input", read)
  status, out, err = command("--interactive", *GREEDY)
  assert (status, out) == (0, f"{answers['ab']}\n")
  assert err.count("\n") == 1


def test_a_session_without_prompts_says_nothing(command, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.StringIO(""))
  assert command("--interactive") == (0, "", "")


def test_batches_have_draws_of_their_own(run):
  made = continuations.continue_all(
    run,
    [continuations.prompt_tokens(run, "ab")] * 4,
    stops=continuations.Stops.of(run),
    max_new_tokens=8,
    batch_size=2,
    settings={"temperature": 1.0},
  )
  texts = [answer.text for batch in made for answer in batch]
  assert len(set(texts)) == 4


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--max_tokens=0", "--max_tokens=0 must be at least 1"),
    ("--temperature=-1", "--temperature=-1.0 must be a number from 0"),
    ("--temperature=nan", "--temperature=nan must be a number from 0"),
    ("--seed=-1", "--seed=-1 must be from 0 to 2**63 - 1"),
    (f"--seed={2**63}", f"--seed={2**63} must be from 0 to 2**63 - 1"),
    ("--top_k=-1", "--top_k=-1 must be at least 0"),
    ("--top_p=0", "--top_p=0.0 must be in (0, 1]"),
    ("--prompt=\udcff", "--prompt is not valid UTF-8"),
    ("--stop=", "--stop is empty: leave it out"),
    ("--stop=\udcff", "--stop is not valid UTF-8"),
    ("--out=x", "--out=x goes with --file"),
    ("--batch_size=0", "--batch_size=0 must be at least 1"),
    ("--promt=x", "unknown flag '--promt'; did you mean '--prompt'?"),
  ],
)
def test_a_mistake_is_one_line(command, argument, message):
  status, out, err = command(argument)
  assert (status, out) == (2, "")
  assert err.startswith(f"error: {message}")
  assert err.count("\n") == 1


def _process(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "birdie.generate", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_a_missing_folder_is_one_line(tmp_path):
  done = _process("--run", str(tmp_path / "none"), "--prompt", "x")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith("error: ")
  assert str(tmp_path / "none") in done.stderr
  assert done.stderr.count("\n") == 1


def test_help_shows_an_example():
  done = _process("--help")
  assert (done.returncode, done.stderr) == (0, "")
  assert generate.EXAMPLE in done.stdout
