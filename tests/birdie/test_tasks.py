"""What all tasks share: seeds, spaces, training rows, baselines."""

import dataclasses
import pickle

import numpy as np
import pytest

from birdie import data as data_lib
from birdie.data import BatchMaker, make_batch_maker
from birdie.data_report import data_report
from birdie.objectives import Example
from birdie.packing import Packer
from birdie.presets import make_configuration, make_mixture
from birdie.problems import (
  draw_sizes,
  majority,
  majority_answer,
  most,
  right_places,
  score_tokens,
)
from birdie.tasks import TASKS, make_task
from birdie.validation import make_eval_batches
from birdie.vocab import byte_vocabulary, extend
from common.data.text import TokenStore
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError
from common.rngs import np_rng
from configs.birdie import get_config

VOCAB = byte_vocabulary()
TOKENIZER = ByteTokenizer()
GENERATED = [name for name, task in TASKS.items() if task.is_trainable]
TRAINABLE = [name for name in GENERATED if name != "selective_copying"]
LENGTH = 512
EMPTY = TokenStore(np.zeros(0, np.uint16), np.zeros(1, np.int64))


def make(name, vocab=VOCAB, **settings):
  return make_task(name, settings, vocab, tokenizer=TOKENIZER)


def entry(name, **settings):
  return {"objective": name, **settings}


def mixture(*entries):
  return make_mixture(
    entries, VOCAB, sequence_length=LENGTH, encode=TOKENIZER.encode
  )


# -- every task ----------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("vocab", [VOCAB, extend(32_000)], ids=["256", "32k"])
def test_problems_are_functions_of_seed_and_number(name, vocab):
  task = make(name, vocab)
  first, again = (task.problems(0, 5) for _ in range(2))
  others = [*task.problems(1, 5), *task.problems(0, 5, stream="other")]
  for a, b in zip(first, again):
    np.testing.assert_array_equal(a.inputs, b.inputs)
    np.testing.assert_array_equal(a.labels, b.labels)
    assert a.facts == b.facts
  distinct = {p.inputs.tobytes() for p in (*first, *others)}
  assert len(distinct) == 15


@pytest.mark.parametrize("name", GENERATED)
def test_a_problem_is_well_formed_and_its_label_right(name):
  task = make(name)
  for problem in task.problems(0, 20):
    assert problem.inputs.dtype == problem.labels.dtype == np.int32
    assert len(problem.labels) >= 1
    assert max(problem.inputs.max(), problem.labels.max()) < VOCAB.size
    assert problem.facts["length"] == len(problem.inputs)
    assert problem.facts["lookups"] >= 1
    ends = [*np.flatnonzero(problem.labels == task.stop)]
    assert ends == ([len(problem.labels) - 1] if task.stop >= 0 else [])
    answer = problem.labels[: ends[0]] if ends else problem.labels
    assert task.score(answer, problem) == dict.fromkeys(task.metrics, 1.0)
    nothing = task.score(np.zeros(0, np.int32), problem)
    assert nothing == dict.fromkeys(task.metrics, 0.0)


@pytest.mark.parametrize("name", TRAINABLE)
def test_examples_fit_their_space(name):
  task = make(name)
  for i, space in enumerate([task.smallest, task.smallest + 9, LENGTH] * 10):
    made = task.example(np_rng(0, name, i), space)
    assert isinstance(made, Example)
    assert len(made.inputs) + len(made.labels) <= space
    assert made.used == 0


@pytest.mark.parametrize("name", GENERATED)
def test_a_paradigm_of_ones_own(name):
  first = make(name).problems(0, 1)[0]
  own = make(name, paradigm=(62, 63)).problems(0, 1)[0]
  assert own.inputs[:2].tolist() == [62, 63]
  np.testing.assert_array_equal(own.inputs[2:], first.inputs[1:])


def test_every_task_has_a_grid_that_can_be_made():
  for name in GENERATED:
    for key, values in TASKS[name].grid.items():
      for value in values:
        assert make(name, **{key: value}).problems(0, 1)


@pytest.mark.parametrize(
  ("name", "settings", "message"),
  [
    ("phone_bok", {}, "task 'phone_bok' is unknown; did you mean 'phone_book'"),
    ("induction", {"lenght": 3}, "unknown key 'lenght'; did you mean 'length'"),
    ("induction", {"decode": 1}, "unknown key 'decode'"),
    ("selective_copying", {"tokens": 1}, "unknown key 'tokens'"),
  ],
)
def test_unknown_names_are_one_line(name, settings, message):
  with pytest.raises(UserError, match=message) as error:
    make(name, **settings)
  assert "\n" not in str(error.value)


# -- sizes and baselines -------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 3, 7, 12, 99])
def test_the_most_that_holds(limit):
  expected = max([2, *(n for n in range(3, 13) if n <= limit)])
  assert most(3, 12, lambda n: n <= limit) == expected


def test_every_number_of_lookups_is_as_frequent_as_the_others():
  drawn = [
    draw_sizes(np_rng(0, "sizes", i), (2, 9), (1, 4), 100, lambda e, q: e + q)
    for i in range(2000)
  ]
  counts = np.bincount([q for _, q in drawn])[1:]
  assert len(counts) == 4
  # Each is 500 with a standard deviation of 19.
  np.testing.assert_allclose(counts, 500, atol=90)
  assert all(q <= e <= 9 for e, q in drawn)


@pytest.mark.parametrize(
  ("answer", "share", "exact"),
  [([5, 6, 7], 1, 1), ([5, 6, 7, 8], 1, 1), ([5, 7], 1 / 3, 0), ([], 0, 0)],
)
def test_tokens_are_compared_place_by_place(answer, share, exact):
  labels = np.array([5, 6, 7])
  answer = np.array(answer, int)
  assert score_tokens(answer, labels) == {
    "token_accuracy": pytest.approx(share), "exact_answer": exact,
  }  # fmt: skip
  assert right_places(answer, labels).shape == (3,)


def test_the_majority_is_taken_place_by_place():
  labels = [np.array(row) for row in ([1, 2, 9], [1, 3], [4, 3, 9], [1])]
  assert majority_answer(labels).tolist() == [1, 3, 9]
  assert majority_answer(labels, stop=9).tolist() == [1, 3]


def test_the_majority_is_of_problems_that_are_not_asked(monkeypatch):
  task = make("induction", alphabet=2)
  streams = []

  def problems(seed, count, *, stream=None):
    streams.append((seed, stream))
    return type(task).problems(task, seed, count, stream=stream)

  object.__setattr__(task, "problems", problems)
  assert len(majority(task, 7)) == 1
  assert streams == [(7, "induction/majority")]


# -- tasks in the mixture ------------------------------------------------------


def segments(arrays):
  """(prefix, labels) of every segment."""
  for row, ids in enumerate(arrays["segment_ids"]):
    for k in range(1, ids.max() + 1):
      here = {name: a[row][ids == k] for name, a in arrays.items()}
      n = int(here["prefix"].sum())
      assert here["tokens"][n] == VOCAB.gen
      assert here["prefix"][:n].all()
      np.testing.assert_array_equal(
        here["positions"], np.arange(len(ids[ids == k]))
      )
      np.testing.assert_array_equal(
        here["tokens"][n + 1 :], here["targets"][n:-1]
      )
      assert here["loss_weights"].tolist() == [0] * n + [1] * (
        len(here["tokens"]) - n
      )
      yield here["tokens"][:n], here["targets"][n:]


def no_text(i):
  raise AssertionError("a window was read")


@pytest.mark.parametrize("name", TRAINABLE)
def test_rows_of_a_task_obey_the_packing_rule_and_read_no_text(name):
  settings = {"entries": (2, 8)} if name == "phone_book" else {}
  made = mixture(entry(name, **settings))
  packer = Packer(made.configurations, rows=4, length=LENGTH, seed=0)
  arrays, stats = packer.pack_group(0, made.probs, no_text)
  found = list(segments(arrays))
  assert len(found) == stats.samples.sum() >= 4
  assert stats.text_tokens.sum() == 0
  assert stats.fill > 0.7
  assert len({tuple(prefix) for prefix, _ in found}) == len(found)
  assert packer.needs[0].text == 0


def test_tasks_and_text_stand_side_by_side():
  made = mixture(
    entry("copying", max_length=100),
    entry("associative_recall"),
    entry("phone_book_compact"),
  )
  packer = Packer(made.configurations, rows=4, length=LENGTH, seed=0)
  text = np.arange(64, 264, dtype=np.int32)
  arrays, stats = packer.pack_group(0, made.probs, lambda i: [text])
  assert len(list(segments(arrays))) == stats.samples.sum()
  assert (stats.samples > 0).all()
  assert stats.text_tokens[0] > 0
  assert not stats.text_tokens[1:].any()
  assert stats.fill > 0.9


def test_a_mixture_of_tasks_needs_no_text():
  made = mixture(entry("associative_recall"), entry("induction"))
  packer = Packer(made.configurations, rows=2, length=LENGTH, seed=0)
  maker = BatchMaker(EMPTY, packer, 2, 0, 2)
  batch = maker(0, made.probs)
  assert set(np.unique(batch["config_ids"])) - {-1} == {0, 1}
  again = pickle.loads(pickle.dumps(maker))(0, made.probs)  # as for workers
  np.testing.assert_array_equal(batch["tokens"], again["tokens"])
  assert "associative_recall" in data_report(maker, made.probs, VOCAB)


def test_held_out_problems_are_none_of_training():
  made = mixture(entry("phone_book_compact", entries=8, lookups=2))
  packer = Packer(made.configurations, rows=2, length=LENGTH, seed=0)
  training = {
    (*prefix, *labels)
    for group in range(4)
    for prefix, labels in segments(
      packer.pack_group(group, made.probs, no_text)[0]
    )
  }
  text = TokenStore(np.arange(64, 320, dtype=np.uint16), np.array([0, 256]))
  batches = make_eval_batches(
    text, made.configurations,
    length=LENGTH, rows_per_config=2, batch_size=2, seed=0,
  )  # fmt: skip
  held_out = {
    (*prefix, *labels)
    for batch in batches
    for prefix, labels in segments(batch)
  }
  assert len(held_out) > 10
  assert not held_out & training


def test_text_in_a_task_is_what_the_tokenizer_makes_of_it():
  (only,) = mixture(entry("phone_book", entries=4, lookups=1)).configurations
  made = only.make(np.zeros(0, np.int32), np_rng(0, "x"), LENGTH)
  assert TOKENIZER.decode(made.inputs).startswith("What is the phone number of")
  assert made.labels[-1] == VOCAB.eos


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (entry("phone_boo"), "objective 'phone_boo' is unknown; did you mean 'pho"),
    (entry("phone_book", entires=3), "unknown key 'entires'; did you mean 'en"),
    (entry("phone_book", entries=0), "'phone_book': phone_book: entries=0 mus"),
    (entry("induction", corruption_rate=0.1), "unknown key 'corruption_rate'"),
    (entry("induction", paradigm=900), "ids below 512"),
    (entry("squad", path="x"), "objective 'squad' is for evaluation only"),
    (entry("phone_book", entries=100), r"needs \d+ places, a row has 512"),
  ],
)  # fmt: skip
def test_entries_of_tasks_that_are_refused(wrong, message):
  with pytest.raises(UserError, match=message) as error:
    mixture(wrong)
  assert "\n" not in str(error.value)


def test_a_task_of_text_needs_a_tokenizer():
  with pytest.raises(UserError, match="phone_book needs a tokenizer"):
    make_configuration(entry("phone_book"), VOCAB)


@pytest.mark.parametrize(
  ("variant", "objective", "length"),
  [
    ("phonebook", "phone_book", 16384),
    ("phonebook_small", "phone_book_compact", 512),
  ],
)
def test_the_variants_train_on_phone_books_alone(variant, objective, length):
  config = get_config(variant)
  (only,) = data_lib.make_configurations(config, VOCAB, TOKENIZER.encode)
  assert only.objective == objective
  assert config.data.sequence_length == length
  assert not config.controller.enabled
  corpus = data_lib.Corpus(TOKENIZER, VOCAB, EMPTY, EMPTY)
  maker = make_batch_maker(config, corpus, [only])
  maker = dataclasses.replace(maker, rows=4, stop=4)
  _, stats = maker.with_stats(0, np.ones(1))
  assert stats.fill > 0.7
