"""Phone books: their text, their answers, their scores."""

import re

import numpy as np
import pytest

from birdie import task_phone_book as tasks
from birdie.problems import NotEnough, majority_answer
from birdie.tasks import make_task
from birdie.vocab import byte_vocabulary, extend
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError
from common.rngs import np_rng

VOCAB = byte_vocabulary()
TOKENIZER = ByteTokenizer()
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


def published(**settings):
  return make_task("phone_book", settings, VOCAB, tokenizer=TOKENIZER)


def compact(vocab=VOCAB, **settings):
  return make_task("phone_book_compact", settings, vocab)


# -- the published books as a task ---------------------------------------------


def test_a_task_makes_the_published_books():
  task = published(entries=8, lookups=3)
  for i, problem in enumerate(task.problems(3, 4)):
    expected = tasks.phone_book(3, i, entries=8, lookups=3)
    assert problem.inputs[0] == VOCAB.paradigms["prefix_language_modeling"][0]
    assert TOKENIZER.decode(problem.inputs[1:]) == expected.prompt
    assert problem.labels[-1] == VOCAB.eos == task.stop
    assert TOKENIZER.decode(problem.labels[:-1]) == expected.label
    assert problem.facts == {
      "length": len(problem.inputs), "entries": 8, "lookups": 3,
    }  # fmt: skip
    assert task.score(problem.labels[:-1], problem) == {
      "digit_accuracy": 1, "exact_accuracy": 1,
    }  # fmt: skip


def test_sizes_are_drawn_from_their_ranges():
  problems = published(entries=(4, 6), lookups=(1, 3)).problems(0, 100)
  drawn = {(p.facts["entries"], p.facts["lookups"]) for p in problems}
  assert drawn == {(e, q) for e in (4, 5, 6) for q in (1, 2, 3)}


@pytest.mark.parametrize("layout", tasks.LAYOUTS)
@pytest.mark.parametrize("make", [published, compact])
def test_problems_fit_every_space_from_the_smallest_on(make, layout):
  task = make(entries=(2, 60), lookups=(1, 12), layout=layout)
  seen = set()
  for i, space in enumerate([task.smallest, task.smallest + 40, 900, 4000] * 8):
    example = task.example(np_rng(0, "space", i), space)
    assert len(example.inputs) + len(example.labels) <= space
    assert example.used == 0
    seen.add(len(example.inputs))
  assert len(seen) > 8
  short = task.example(np_rng(0, "space"), task.smallest - 1)
  assert short == NotEnough(task.smallest, "space")


def test_tokens_may_be_words():
  """Sizes are bounds then, too."""

  def encode(text):
    return [len(piece) for piece in re.findall(r"\w+|\W", text)]

  settings = {"entries": (2, 60), "lookups": (1, 12)}
  task = tasks.PhoneBook(vocab=extend(1000), encode=encode, **settings)
  for i, space in enumerate([task.smallest, 200, 300, 600] * 8):
    example = task.example(np_rng(0, "words", i), space)
    assert len(example.inputs) + len(example.labels) <= space


def test_a_guess_earns_what_chance_says():
  task = published()
  problem = task.problems(0, 1)[0]
  rng = np.random.default_rng(0)
  guesses = ["".join(map(str, rng.integers(0, 10, 10))) for _ in range(4000)]
  digits = [tasks.score_numbers(g, "123-456-7890")[0] for g in guesses]
  # 40,000 digits: the standard error is 0.0015.
  assert np.mean(digits) == pytest.approx(tasks.CHANCE, abs=0.006)
  assert task.guess(problem)["digit_accuracy"] == tasks.CHANCE


@pytest.mark.parametrize("make", [published, compact])
def test_an_answer_from_the_book_earns_what_is_told(make):
  """The numbers of a problem asked for each of all people, in turn."""
  task = make(entries=3, lookups=3)
  rng = np.random.default_rng(0)
  found = []
  for problem in task.problems(0, 300):
    text = problem.labels
    if task.is_text:
      numbers = TOKENIZER.decode(text).split(", ")
      drawn = ", ".join(numbers[i] for i in rng.integers(0, 3, 3))
      answer = TOKENIZER.encode(drawn)
    else:
      answer = text.reshape(3, -1)[rng.integers(0, 3, 3)].reshape(-1)
    found.append(list(task.score(answer, problem).values()))
  expected = task.from_context(task.problems(0, 1)[0])
  # 900 numbers: the standard error is at most 0.016.
  np.testing.assert_allclose(
    np.mean(found, axis=0), list(expected.values()), atol=0.06
  )


# -- compact books -------------------------------------------------------------


def parts(task, problem):
  """First question, {name: number}, last question, as tuples of tokens."""
  tokens = problem.inputs[1:].tolist()
  names, digits = task.name_tokens, task.digits
  first = []
  if task.layout.startswith("question"):
    assert tokens.pop(0) == VOCAB.start
    first = tokens[: tokens.index(VOCAB.context)]
    tokens = tokens[len(first) :]
  assert tokens.pop(0) == VOCAB.context
  last = []
  if task.layout.endswith("question"):
    end = tokens.index(VOCAB.end)
    tokens, last = tokens[:end], tokens[end + 1 :]
  rows = np.array(tokens).reshape(-1, names + digits).tolist()
  book = {tuple(row[:names]): row[names:] for row in rows}
  assert len(book) == len(rows) == problem.facts["entries"]
  return first, book, last


@pytest.mark.parametrize("layout", tasks.LAYOUTS)
@pytest.mark.parametrize(("name_tokens", "digits"), [(1, 4), (2, 10)])
def test_the_numbers_of_the_names_are_the_label(layout, name_tokens, digits):
  task = compact(
    layout=layout, name_tokens=name_tokens, digits=digits, lookups=(1, 8)
  )
  for problem in task.problems(0, 20):
    first, book, last = parts(task, problem)
    asked = first or last
    assert not (first and last) or first == last
    names = np.array(asked).reshape(-1, name_tokens).tolist()
    assert len(names) == problem.facts["lookups"]
    expected = [digit for name in names for digit in book[tuple(name)]]
    assert problem.labels.tolist() == expected
    assert set(expected) & {t for name in book for t in name} == set()


@pytest.mark.parametrize(
  ("answer", "digits", "exact"),
  [
    ([1, 2, 3, 4, 5, 6, 7, 8], 1, 1),
    ([1, 2, 3, 4, 5, 6, 7, 9, 9], 7 / 8, 0.5),
    ([1, 2, 3, 4], 0.5, 0.5),
    ([5, 6, 7, 8, 1, 2, 3, 4], 0, 0),
    ([], 0, 0),
  ],
)
def test_digits_are_compared_place_by_place(answer, digits, exact):
  task = compact(entries=4, lookups=2)
  problem = task.problems(0, 1)[0]
  problem.labels[:] = range(1, 9)
  assert task.score(np.array(answer, int), problem) == {
    "digit_accuracy": digits, "exact_accuracy": exact,
  }  # fmt: skip


def test_books_of_every_vocabulary():
  vocab = extend(32_000)
  problem = compact(vocab, entries=800, lookups=32).problems(0, 1)[0]
  assert len(problem.labels) == 4 * 32
  assert problem.labels.max() < 32_000


@pytest.mark.parametrize(
  ("make", "settings", "message"),
  [
    (published, {"entries": 0}, r"^phone_book: entries=0 must be in 1 to 4096"),
    (
      published,
      {"entries": (8, 4)},
      r"entries=\(8, 4\) must be the least and the most: 8",
    ),
    (published, {"entries": (1, 2, 3)}, "a number, or the least and the most"),
    (published, {"entries": 2.5}, "entries=2.5 must be a number"),
    (published, {"lookups": 9, "entries": 8}, "lookups=9 must be at most entr"),
    (published, {"layout": "question"}, "layout='question' must be one of"),
    (published, {"people": 3}, "phone_book: unknown key 'people'"),
    (compact, {"entries": 300}, "entries=300 must be in 1 to 246"),
    (compact, {"digits": 3}, "digits=3 must be a number from 4 to 10"),
    (compact, {"lookups": True}, "lookups=True must be a number"),
  ],
)
def test_settings_that_are_refused(make, settings, message):
  with pytest.raises(UserError, match=message) as error:
    make(**settings)
  assert "\n" not in str(error.value)


def test_text_needs_a_tokenizer():
  with pytest.raises(UserError, match="phone_book needs a tokenizer"):
    make_task("phone_book", {}, VOCAB)


def test_the_majority_writes_a_number():
  """Hyphens and commas are learnt from the labels alone; digits are chance."""
  task = published(entries=8, lookups=2)
  problems = task.problems(0, 200)
  answer = majority_answer([p.labels for p in problems[:100]], task.stop)
  assert re.fullmatch(
    r"\d{3}-\d{3}-\d{4}, \d{3}-\d{3}-\d{4}", TOKENIZER.decode(answer)
  )
  digits = [task.score(answer, p)["digit_accuracy"] for p in problems[100:]]
  # 2,000 digits: the standard error is 0.007.
  assert np.mean(digits) == pytest.approx(0.1, abs=0.03)
