"""`python -m birdie.evaluate`, the answers it scores, and log-likelihoods."""

import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from birdie import data as data_lib
from birdie import decode, evaluate, evaluation
from birdie import run as run_lib
from birdie.answering import answer
from birdie.models import GatedSSM
from birdie.scoring import bucket_size, log_likelihoods
from birdie.tasks import make_task
from birdie.vocab import byte_vocabulary
from common import app
from common.data.text import TokenStore
from common.data.tokenizers import ByteTokenizer
from configs.birdie import get_config

ROOT = pathlib.Path(__file__).parents[2]
VOCAB = byte_vocabulary()
TOKENIZER = ByteTokenizer()
WIDTH = 192
STORY = {
  "events": ["He woke.", "(blank)", "He left."],
  "choices": ["He ate.", "He flew.", "It rained.", "No."],
  "answer": "C",
}


@pytest.fixture(scope="module")
def run():
  """An untrained model."""
  config = get_config("smoke")
  config.data.sequence_length = 64
  config.mixture.entries = (
    {"objective": "copying", "max_length": 20},
    {"objective": "induction", "length": 20},
  )
  model = GatedSSM(VOCAB.size, width=8, state=8, layers=2)
  row = jnp.zeros((1, 4), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), row, row, row, row > 0)
  return run_lib.Run(
    config=config,
    model=model,
    params=params["params"],
    tokenizer=TOKENIZER,
    vocab=VOCAB,
    step=7,
  )


@pytest.fixture(scope="module")
def corpus():
  tokens = np.random.default_rng(0).integers(64, 320, 4000).astype(np.uint16)
  store = TokenStore(tokens, np.arange(0, 4001, 1000))
  return data_lib.Corpus(TOKENIZER, VOCAB, store, store)


@pytest.fixture
def command(run, corpus, monkeypatch, capsys, tmp_path):
  """Runs the command on the model: status, output, errors."""
  facts = {"text_hash": corpus.facts()["text_hash"]}
  (tmp_path / "facts.json").write_text(json.dumps(facts))
  monkeypatch.setattr(run_lib, "load_run", lambda folder, *, step=None: run)
  monkeypatch.setattr(data_lib, "make_corpus", lambda config, tokenizer: corpus)

  def call(*arguments):
    argv = ["birdie.evaluate", "--run", str(tmp_path), *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", argv)
    status = app.call(evaluate.main)
    return status, *capsys.readouterr()

  return call


# -- log-likelihoods -----------------------------------------------------------


@jax.jit
def _logits(params, tokens, prefix):
  model = GatedSSM(VOCAB.size, width=8, state=8, layers=2)
  ones = jnp.ones_like(tokens)
  places = jnp.arange(tokens.shape[1])[None]
  return model.apply({"params": params}, tokens, ones, places, prefix)


def one_alone(params, prompt, continuation):
  """float64: the sum of log p, with nothing padded but the row's end."""
  tokens = np.concatenate([prompt, [VOCAB.gen], continuation[:-1]])
  row = np.zeros((1, WIDTH), np.int32)
  row[0, : len(tokens)] = tokens
  logits = np.asarray(
    _logits(params, row, np.arange(WIDTH)[None] < len(prompt)), np.float64
  )[0, len(prompt) : len(tokens)]
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return logs[np.arange(len(continuation)), continuation].sum()


def test_log_likelihoods_are_those_of_each_alone(run):
  """Empty prompts too, and more than a batch, in any order of lengths."""
  rng = np.random.default_rng(0)
  sizes = [(0, 1), (70, 5), (3, 9), (12, 2), (60, 30)]
  prompts, continuations = (
    [rng.integers(64, 320, size[i]).astype(np.int32) for size in sizes]
    for i in (0, 1)
  )
  sums, lengths = log_likelihoods(
    run.model, run.params, prompts, continuations, gen=VOCAB.gen, batch_size=2
  )
  assert lengths.tolist() == [m for _, m in sizes]
  expected = [
    one_alone(run.params, *pair) for pair in zip(prompts, continuations)
  ]
  # float32 against float64, sums of up to 30 terms of about 6.
  np.testing.assert_allclose(sums, expected, rtol=1e-5)


def test_an_empty_continuation_is_refused(run):
  nothing = [np.zeros(0, np.int32)]
  with pytest.raises(ValueError, match="at least one label"):
    log_likelihoods(run.model, run.params, nothing, nothing, gen=VOCAB.gen)


def test_few_sizes_hold_all_lengths():
  sizes = [bucket_size(n) for n in range(20_000)]
  assert all(size > n for n, size in enumerate(sizes))
  assert all(size % 64 == 0 for size in sizes)
  assert sizes == sorted(sizes)
  assert all(size <= max(n + 64, 1.13 * n) for n, size in enumerate(sizes))
  assert len(set(sizes)) < 52


# -- answers -------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_each_alone(run, batch_size):
  """Padded sizes, fillers and batches change no answer."""
  task = make_task("copying_random", {"length": (4, 90)}, VOCAB)
  problems = task.problems(0, 5)
  found = answer(run.model, run.params, task, problems, batch_size=batch_size)
  limit = max(len(p.labels) for p in problems)
  alone = decode.generate(
    run.model,
    run.params,
    [p.inputs for p in problems],
    gen=VOCAB.gen,
    max_new_tokens=limit,
  )
  for a, b in zip(found, alone, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_choice_is_the_likeliest_a_token(run, tmp_path):
  path = tmp_path / "stories.jsonl"
  path.write_text(json.dumps(STORY))
  task = make_task(
    "story_infilling", {"path": str(path)}, VOCAB, tokenizer=TOKENIZER
  )
  problems = task.problems(0, 1)
  (found,) = answer(run.model, run.params, task, problems, batch_size=3)
  means = [
    one_alone(run.params, problems[0].inputs, choice) / len(choice)
    for choice in problems[0].choices
  ]
  assert np.diff(np.sort(means))[-1] > 1e-3
  best = problems[0].choices[int(np.argmax(means))]
  np.testing.assert_array_equal(found, best)


# -- scores beside baselines ---------------------------------------------------


def test_a_perfect_answer_and_none():
  task = make_task("phone_book_compact", {"lookups": (1, 2)}, VOCAB)

  def perfect(task, problems):
    return [p.labels for p in problems]

  def silent(task, problems):
    return [np.zeros(0, np.int32)] * len(problems)

  for answers, share in ((perfect, 1.0), (silent, 0.0)):
    records = evaluation.evaluate(task, answers, problems=20, seed=0)
    row = evaluation.summary(records, task.metrics)
    assert row["problems"] == 20
    digits = row["metrics"]["digit_accuracy"]
    assert digits["mean"] == share
    # Wilson's: 1 / (1 + n / z^2) is what twenty of twenty leave open.
    assert digits["high"] - digits["low"] == pytest.approx(0.1611, abs=1e-4)
    assert digits["guess"] == pytest.approx(0.1)
    assert 0 < digits["majority"] < 0.3
    assert 0.1 < digits["context"] < 0.25


def test_rows_by_lookups_and_by_length_share_out_the_problems():
  task = make_task("copying_random", {"length": (1, 9)}, VOCAB)
  rng = np.random.default_rng(0)

  def half(task, problems):
    return [p.labels if rng.random() < 0.5 else p.labels[:0] for p in problems]

  records = evaluation.evaluate(task, half, problems=60, seed=0)
  for rows in (
    evaluation.by_lookups(records, task.metrics),
    evaluation.by_length(records, task.metrics, 0),
    evaluation.by_length(records, task.metrics, 4),
  ):
    assert sum(row["problems"] for row in rows) == 60
    means = [row["metrics"]["exact_answer"]["mean"] for row in rows]
    counts = [row["problems"] for row in rows]
    assert np.average(means, weights=counts) == pytest.approx(
      np.mean([r.scores["exact_answer"] for r in records])
    )
  labels = [r["label"] for r in evaluation.by_lookups(records, task.metrics)]
  assert labels == [str(n) for n in range(1, 10)]
  labels = [r["label"] for r in evaluation.by_length(records, task.metrics, 0)]
  assert labels == ["2-3", "4-7", "8-15"]
  scores = [r.scores["exact_answer"] for r in records]
  row = evaluation.summary(records, task.metrics)["metrics"]["exact_answer"]
  wilson = stats.binomtest(int(sum(scores)), 60).proportion_ci(method="wilson")
  assert (row["low"], row["high"]) == pytest.approx(tuple(wilson))


def test_one_problem_has_a_wide_interval_and_free_text_no_guess(tmp_path):
  path = tmp_path / "squad.json"
  question = {"question": "Who?", "answers": [{"text": "dog"}]}
  path.write_text(
    json.dumps(
      {"data": [{"paragraphs": [{"context": "A dog.", "qas": [question]}]}]}
    )
  )
  task = make_task("squad", {"path": str(path)}, VOCAB, tokenizer=TOKENIZER)
  records = evaluation.evaluate(
    task, lambda t, p: [TOKENIZER.encode("The dog.")], problems=9, seed=0
  )
  row = evaluation.summary(records, task.metrics)["metrics"]["f1"]
  assert row == {
    "mean": 1.0, "low": pytest.approx(0.2065, abs=1e-4), "high": 1.0,
    "guess": None, "majority": None, "context": 1.0,
  }  # fmt: skip


# -- the command ---------------------------------------------------------------

SMALL = ("--tasks=induction", "--set=induction.length=4,70", "--problems=3")


def test_a_page_shows_each_metric_beside_its_baselines(command):
  status, out, err = command(*SMALL)
  assert status == 0
  assert [line[:31] for line in err.splitlines()] == [
    "[1/2] induction length=4: token", "[2/2] induction length=70: toke",
  ]  # fmt: skip
  lines = out.splitlines()
  assert "step 7" in lines[0]
  head = next(line for line in lines if line.startswith("induction: token_acc"))
  assert head.split()[-4:] == ["model", "guess", "majority", "context"]
  assert any(line.startswith("  length 4-7 ") for line in lines)
  assert any(line.startswith("  length 64-127 ") for line in lines)
  row = next(line for line in lines if line.startswith("  all"))
  assert row.split()[1] == "6"
  assert "6.2" in row.split()  # 1 of 16


def test_json_and_a_plot(command, tmp_path):
  plot = tmp_path / "plot.png"
  status, out, _ = command(*SMALL, "--json", "--plot", plot, "--objectives")
  assert status == 0
  found = json.loads(out)
  assert found["step"] == 7
  task = found["tasks"]["induction"]
  assert [c["settings"] for c in task["cells"]] == [
    {"length": 4},
    {"length": 70},
  ]
  assert [c["length"] for c in task["cells"]] == [7, 73]
  assert [c["problems"] for c in task["cells"]] == [3, 3]
  assert task["all"]["metrics"]["token_accuracy"]["guess"] == 1 / 16
  assert plot.read_bytes().startswith(b"\x89PNG")
  losses = found["objectives"]
  assert list(losses) == ["copying", "induction"]
  # An untrained model: about log 512 nats.
  assert all(
    4 < row["loss"] < 9 and row["tokens"] > 0 for row in losses.values()
  )


def test_a_plot_shows_the_prompts_share_too(monkeypatch, tmp_path):
  from common import plots

  styles = []

  def keep(figure):
    lines = [line for axes in figure.axes for line in axes.lines]
    styles.extend(line.get_linestyle() for line in lines)
    return b""

  monkeypatch.setattr(plots, "png", keep)
  one = {"mean": 0.5, "low": 0.4, "high": 0.6, "guess": 0.1, "context": 0.2}
  row = {"lookups": 2.0, "length": 40.0, "metrics": {"share": one}}
  task = {"metrics": ["share"], "by_lookups": [row], "by_length": [row]}
  evaluate._plot(str(tmp_path / "a.png"), {"a": task})
  assert (styles.count("--"), styles.count(":")) == (2, 2)


def test_settings_take_the_place_of_the_grid():
  grids = evaluate.make_grids(
    ["phone_book", "induction", "squad"],
    ["phone_book.lookups=1,2-4", "phone_book.layout=question_context"],
    ["x.json"],
  )
  assert grids["phone_book"] == {
    "lookups": (1, (2, 4)), "layout": ("question_context",),
  }  # fmt: skip
  assert set(grids["induction"]) == {"length"}
  assert grids["squad"] == {"path": ("x.json",)}


def test_selective_copying_asks_of_held_out_text(run, corpus):
  cells = evaluate.make_cells(
    run, corpus, "selective_copying", {"spans": (1, 2), "length": (64,)}
  )
  assert [settings["spans"] for settings, _ in cells] == [1, 2]
  text = bytes(corpus.validation.tokens)
  for _, task in cells:
    problem = task.problems(0, 1)[0]
    context = problem.inputs[-64:].astype(np.uint16)
    assert bytes(context) in text


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--tasks=phone_bok"], "--tasks=phone_bok; did you mean 'phone_book'?"),
    (["--tasks="], "--tasks='' names no task"),
    (["--problems=0"], "--problems=0 must be at least 1"),
    (["--batch_size=0"], "--batch_size=0 must be at least 1"),
    (["--set=phone_book.entires=3"], "--set phone_book.entires=3: unknown key"),
    (["--set=induction.length=3"], "'induction' is not evaluated"),
    (["--set=phone_book"], "--set phone_book: need TASK.SETTING=VALUES"),
    (["--set=phone_book.entries=0"], "phone_book: entries=0 must be in 1 to"),
    (["--tasks=squad"], "squad needs its file: add --data FILE"),
    (["--tasks=squad", "--data=none.json"], "none.json: No such file"),
    (["--data=x.json"], "--data x.json: no task takes a file"),
    (["--tasks=squad,story_infilling", "--data=x"], "write squad=x"),
    (["--plot=x.pdf"], "--plot='x.pdf' must end in .png"),
    (["--plot=none/x.png"], "there is no folder 'none'"),
    (["--objectives", "--plot=x.png"], "--plot shows tasks"),
    (["--taks=x"], "unknown flag '--taks'; did you mean '--tasks'"),
  ],
)
def test_a_mistake_is_one_line(command, arguments, message):
  status, out, err = command(*arguments)
  assert (status, out) == (2, "")
  assert message in err
  assert err.startswith("error: ")
  assert err.count("\n") == 1


def test_another_text_is_refused(command, tmp_path):
  (tmp_path / "facts.json").write_text('{"text_hash": "other"}')
  status, out, err = command("--objectives")
  assert (status, out) == (2, "")
  assert "its text is not the one it was trained with" in err


def _process(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "birdie.evaluate", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_help_is_quick_and_shows_an_example():
  start = time.perf_counter()
  done = _process("--help")
  assert time.perf_counter() - start < 1.5
  assert (done.returncode, done.stderr) == (0, "")
  assert evaluate.EXAMPLE in done.stdout


def test_a_missing_folder_and_another_method_are_one_line(tmp_path):
  done = _process("--run", str(tmp_path / "none"))
  assert (done.returncode, done.stdout) == (2, "")
  assert str(tmp_path / "none") in done.stderr
  assert done.stderr.count("\n") == 1
  (tmp_path / "config.json").write_text('{"routing": {}}')
  done = _process("--run", str(tmp_path))
  assert done.returncode == 2
  assert "holds a run of another method" in done.stderr
  assert done.stderr.count("\n") == 1
