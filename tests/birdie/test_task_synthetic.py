"""Recall and copying: what is asked, what is right, what chance earns."""

import numpy as np
import pytest

from birdie.problems import letters
from birdie.tasks import make_task
from birdie.vocab import byte_vocabulary, extend
from common.errors import UserError

VOCAB = byte_vocabulary()


def make(name, **settings):
  return make_task(name, settings, VOCAB)


def between(tokens, mark):
  """What stands before and behind the one mark."""
  (place,) = np.flatnonzero(tokens == mark)
  return tokens[:place], tokens[place + 1 :]


# -- associative recall --------------------------------------------------------


@pytest.mark.parametrize("order", ["context_query", "query_context"])
@pytest.mark.parametrize("lookups", [None, (1, 4)])
def test_values_of_the_keys_are_the_labels_in_the_order_of_the_keys(
  order, lookups
):
  task = make("associative_recall", order=order, lookups=lookups)
  for problem in task.problems(0, 20):
    context, asked = between(problem.inputs[1:], VOCAB.sep)
    if order == "query_context":
      context, asked = asked, context
    pairs = dict(context.reshape(-1, 2).tolist())
    assert len(pairs) == problem.facts["pairs"]
    assert len(set(asked.tolist())) == len(asked) == problem.facts["lookups"]
    assert problem.labels.tolist() == [pairs[key] for key in asked.tolist()]
    half = VOCAB.text[128]
    assert max(pairs) < half <= min(pairs.values())


def test_all_pairs_are_asked_for_unless_told_otherwise():
  facts = [p.facts for p in make("associative_recall").problems(0, 20)]
  assert all(f["pairs"] == f["lookups"] for f in facts)


def test_early_pairs_tend_to_be_asked_for_early():
  """Key 0 draws its place first, so from the whole power law."""
  task = make("associative_recall", pairs=8)
  law = 0.01 * np.arange(1, 9) ** (0.01 - 1)
  counts = np.zeros(8)
  for problem in task.problems(0, 3000):
    context, asked = between(problem.inputs[1:], VOCAB.sep)
    counts[asked.tolist().index(context[0])] += 1
  # The standard error of a share is at most 0.009.
  np.testing.assert_allclose(counts / 3000, law / law.sum(), atol=0.04)


# -- selective copying ---------------------------------------------------------


def test_mambas_data_stand_in_the_noise_in_order():
  task = make("selective_copying_mamba", length=(20, 40), data=(4, 16))
  noise, *alphabet = letters(VOCAB, 16).tolist()
  for problem in task.problems(0, 30):
    context = problem.inputs[1:]
    assert 20 <= len(context) <= 40
    np.testing.assert_array_equal(context[context != noise], problem.labels)
    assert len(problem.labels) == problem.facts["lookups"]
    assert set(problem.labels.tolist()) <= set(alphabet)


@pytest.mark.parametrize("tokens", [None, np.arange(64, 320).repeat(9)])
def test_the_papers_spans_stand_between_their_delimiters(tokens):
  rng = np.random.default_rng(0)
  if tokens is not None:
    tokens = rng.permutation(tokens).astype(np.uint16)
  task = make_task("selective_copying", {"spans": (1, 3)}, VOCAB, tokens=tokens)
  for problem in task.problems(0, 20):
    assert problem.inputs[0] == VOCAB.paradigms["selective_copying"][0]
    queries, context = between(problem.inputs[1:], VOCAB.context)
    text = context.tolist()
    assert tokens is None or bytes(context.astype(np.uint16)) in bytes(tokens)
    assert problem.labels[-1] == VOCAB.done == task.stop
    starts = [*np.flatnonzero(queries == VOCAB.start), len(queries)]
    assert len(starts) - 1 == problem.facts["lookups"]
    answers = " ".join(map(str, problem.labels[:-1])).split(f" {VOCAB.sep} ")
    for begin, stop, answer in zip(starts, starts[1:], answers):
      query = queries[begin + 1 : stop].tolist()
      end = query.index(VOCAB.end)
      span = [int(token) for token in answer.split()]
      whole = query[:end] + span + query[end + 1 :]
      assert any(text[i : i + len(whole)] == whole for i in range(len(text)))


@pytest.mark.parametrize(
  ("answer", "tokens", "spans"),
  [
    ([70, 71, 3, 72], 1, 1),
    ([70, 71, 3, 73], 3 / 4, 0.5),
    ([70, 3, 72], 1 / 4, 0.5),  # places have moved, the second span is right
    ([72, 3, 70, 71], 0, 0),
    ([70, 71], 0.5, 0.5),
    ([], 0, 0),
  ],
)
def test_spans_are_scored_in_their_order(answer, tokens, spans):
  task = make("selective_copying")
  problem = task.problems(0, 1)[0]
  object.__setattr__(problem, "labels", np.array([70, 71, 3, 72, VOCAB.done]))
  assert task.score(np.array(answer, int), problem) == {
    "token_accuracy": tokens, "span_accuracy": spans,
  }  # fmt: skip


def test_a_text_too_short_is_one_line():
  task = make_task(
    "selective_copying", {}, VOCAB, tokens=np.full(50, 70, np.uint16)
  )
  with pytest.raises(UserError, match=r"problem 0 needs .* tokens of text"):
    task.problems(0, 1)


# -- copying and induction -----------------------------------------------------


def test_a_string_is_copied():
  for problem in make("copying_random", length=(3, 9)).problems(0, 20):
    np.testing.assert_array_equal(problem.inputs[1:], problem.labels)
    assert 3 <= len(problem.labels) <= 9


def test_induction_asks_for_what_followed_the_special_token():
  for problem in make("induction", length=(1, 9)).problems(0, 40):
    tokens = problem.inputs[1:].tolist()
    assert tokens.count(VOCAB.sep) == 2
    assert tokens[-1] == VOCAB.sep
    assert problem.labels.tolist() == [tokens[tokens.index(VOCAB.sep) + 1]]
    assert 1 <= len(tokens) - 2 <= 9


def test_letters_are_printable_where_tokens_are_bytes():
  ids = letters(VOCAB, 94) - VOCAB.byte_offset
  assert bytes(ids[:62].tolist()).isalnum()
  assert sorted(ids) == [*range(33, 127)]
  assert sorted(letters(VOCAB, 256)) == [*VOCAB.text]
  assert letters(extend(1000), 3).tolist() == [0, 1, 2]


# -- baselines against simulation ----------------------------------------------


def alphabet_of(task):
  return letters(VOCAB, task.alphabet + 1)[-task.alphabet :]


@pytest.mark.parametrize(
  ("name", "settings", "alphabet"),
  [
    ("associative_recall", {"pairs": 2}, lambda t: t._alphabets[1]),
    ("selective_copying_mamba", {"alphabet": 3, "data": 2}, alphabet_of),
    (
      "copying_random", {"alphabet": 3, "length": 2},
      lambda t: letters(VOCAB, 3),
    ),
    ("induction", {"alphabet": 4}, lambda t: letters(VOCAB, 4)),
  ],
)  # fmt: skip
def test_a_guess_earns_what_is_told(name, settings, alphabet):
  task = make(name, **settings)
  rng = np.random.default_rng(0)
  problems = task.problems(0, 2000)
  found = [
    list(task.score(rng.choice(alphabet(task), len(p.labels)), p).values())
    for p in problems
  ]
  # The standard error is at most 0.011.
  np.testing.assert_allclose(
    np.mean(found, axis=0), list(task.guess(problems[0]).values()), atol=0.04
  )


@pytest.mark.parametrize(
  ("name", "settings"),
  [
    ("associative_recall", {"pairs": 3}),
    ("selective_copying_mamba", {"alphabet": 3, "data": 3}),
    ("copying_random", {"alphabet": 3, "length": 3}),
    ("induction", {"alphabet": 4, "length": 5}),
  ],
)
def test_an_answer_from_the_context_earns_what_is_told(name, settings):
  task = make(name, **settings)
  rng = np.random.default_rng(0)
  found, told = [], []
  for problem in task.problems(0, 2000):
    context = problem.labels
    if name == "induction":
      context = problem.inputs[1:][problem.inputs[1:] != VOCAB.sep]
    answer = rng.choice(context, len(problem.labels))
    found.append(list(task.score(answer, problem).values()))
    told.append(list(task.from_context(problem).values()))
  np.testing.assert_allclose(
    np.mean(found, axis=0), np.mean(told, axis=0), atol=0.04
  )


@pytest.mark.parametrize(
  ("name", "settings", "message"),
  [
    ("associative_recall", {"pairs": 129}, "pairs=129 must be in 1 to 128"),
    ("associative_recall", {"pairs": 4, "lookups": 5}, "lookups=5 must be in"),
    ("associative_recall", {"order": "up"}, "order='up' must be one of cont"),
    ("selective_copying", {"spans": 4, "length": 20}, "length=20 must be in"),
    ("selective_copying", {"max_span": 3}, "max_span=3 must be a number from"),
    ("selective_copying_mamba", {"length": 9}, r"data=16 must be at most leng"),
    ("selective_copying_mamba", {"alphabet": 256}, "alphabet=256 must be"),
    ("copying_random", {"length": 0}, "length=0 must be in"),
    ("induction", {"alphabet": 0}, "alphabet=0 must be a number from 1 to"),
  ],
)
def test_settings_that_are_refused(name, settings, message):
  with pytest.raises(UserError, match=f"^{name}: {message}") as error:
    make(name, **settings)
  assert "\n" not in str(error.value)
