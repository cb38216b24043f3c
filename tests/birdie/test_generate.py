"""`python -m birdie.generate`."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie import decode, generate
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
    command(*arguments, f"--seed={seed}") for seed in (0, 0, 1)
  )
  assert first == again != other


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--max_tokens=0", "--max_tokens=0 must be at least 1"),
    ("--temperature=-1", "--temperature=-1.0 must be a number from 0"),
    ("--temperature=nan", "--temperature=nan must be a number from 0"),
    ("--top_k=-1", "--top_k=-1 must be at least 0"),
    ("--top_p=0", "--top_p=0.0 must be in (0, 1]"),
    ("--prompt=\udcff", "--prompt is not valid UTF-8"),
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
