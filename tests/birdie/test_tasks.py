"""Phone books: their text, their answers, their scores."""

import re

import numpy as np
import pytest

from birdie import tasks
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError

LINE = re.compile(r"^([A-Z][a-z]+ [A-Z][a-z]+): (\d{3}-\d{3}-\d{4})$", re.M)


def book(layout="question_context_question", **sizes):
  sizes = {"entries": 8, "lookups": 3} | sizes
  return tasks.phone_book(0, 0, layout=layout, **sizes)


@pytest.mark.parametrize("layout", tasks.LAYOUTS)
def test_the_answer_is_in_the_book(layout):
  task = book(layout)
  entries = dict(LINE.findall(task.prompt))
  assert len(entries) == 8
  question = re.search(r"numbers of (.+?)\?", task.prompt)[1]
  names = re.split(r", | and ", question)
  assert task.label == ", ".join(entries[name] for name in names)


@pytest.mark.parametrize(
  ("layout", "first", "last"),
  [
    ("question_context_question", "What are", "phonebook above.\n"),
    ("question_context", "What are", "\n"),
    ("context_question", "Phonebook:\n", "phonebook above.\n"),
  ],
)
def test_layouts(layout, first, last):
  prompt = book(layout).prompt
  assert prompt.startswith(first)
  assert prompt.endswith(last)
  assert prompt.count("What are") == {"question_context_question": 2}.get(
    layout, 1
  )


def test_one_lookup_is_asked_for_in_the_singular():
  assert "What is the phone number of " in book(lookups=1).prompt


def test_names_are_unique_and_numbers_begin_with_1_to_9():
  task = tasks.phone_book(3, 5, entries=tasks.MOST_ENTRIES, lookups=1)
  entries = LINE.findall(task.prompt)
  assert len({name for name, _ in entries}) == tasks.MOST_ENTRIES
  assert {number[0] for _, number in entries} == set("123456789")


def test_books_are_functions_of_seed_and_index():
  assert book() == book()
  others = [
    tasks.phone_book(seed, i, entries=8, lookups=3)
    for seed, i in [(0, 1), (1, 0)]
  ]
  assert len({task.prompt for task in (book(), *others)}) == 3


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"lookups": 9}, "lookups=9, entries=8"),
    ({"lookups": 0}, "lookups=0"),
    ({"entries": 10**6}, "entries=1000000"),
    ({"layout": "question"}, "layout='question'"),
  ],
)
def test_refusals(sizes, message):
  with pytest.raises(UserError, match=message):
    book(**sizes)


LABEL = "123-456-7890, 987-654-3210"


@pytest.mark.parametrize(
  ("answer", "digits", "exact"),
  [
    (LABEL, 1, 1),
    ("123-456-7890", 0.5, 0.5),
    ("123-456-7891, 987-654-3210", 0.95, 0.5),
    ("1234567890,9876543210", 1, 1),
    ("987-654-3210, 123-456-7890", 0.2, 0),  # the order counts
    ("", 0, 0),
    ("12, 987-654-3210", 0.6, 0.5),
    (LABEL + ", 111-111-1111", 1, 1),
  ],
)
def test_scores(answer, digits, exact):
  assert tasks.score_numbers(answer, LABEL) == pytest.approx((digits, exact))


def test_a_guess_earns_what_chance_says():
  rng = np.random.default_rng(0)
  guesses = ["".join(map(str, rng.integers(0, 10, 10))) for _ in range(4000)]
  digits = [tasks.score_numbers(g, "123-456-7890")[0] for g in guesses]
  # 40,000 digits: the standard error is 0.0015.
  assert np.mean(digits) == pytest.approx(tasks.CHANCE, abs=0.006)


def test_books_are_answered_and_scored_together():
  tokenizer = ByteTokenizer()
  books = tasks.PhoneBooks(
    tokenizer, books=4, entries=4, lookups=1, seed=0, paradigm=(5,)
  )
  assert all(prompt[0] == 5 for prompt in books.prompts)
  assert books.max_new_tokens == 12
  right = [tokenizer.encode(task.label) for task in books.tasks]

  def half(prompts, max_new_tokens):
    assert len(prompts) == 4
    return [*right[:2], *(tokenizer.encode("no")[:max_new_tokens],) * 2]

  assert books.evaluate(half) == {
    "digit_accuracy": 0.5, "exact_accuracy": 0.5, "chance": 0.1,
  }  # fmt: skip


def test_no_books_are_refused():
  with pytest.raises(UserError, match="books=0"):
    tasks.PhoneBooks(ByteTokenizer(), books=0, entries=4, lookups=1, seed=0)
