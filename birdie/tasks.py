"""Retrieval tasks with exact scores, generated from a seed.

The phone book is the paper's (section 4.3, A.9, figure 9): a question that
names some people, a list of "First Last: ddd-ddd-dddd", the question again.
The answer is their numbers in order, joined by ", ".
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from common.config import did_you_mean
from common.data.tokenizers import Tokenizer
from common.errors import UserError
from common.rngs import np_rng

LAYOUTS = (
  "question_context_question",
  "question_context",
  "context_question",
)
DIGITS = 10
CHANCE = 0.1  # of a digit guessed at random
_FIRST = (
  "Ada Alan Alice Amir Anna Ben Bella Boris Carl Chloe Clara Dan Dora Edith "
  "Elias Emma Eric Eva Felix Fiona Frank Gina Grace Hana Hugo Ida Igor Iris "
  "Ivan Jack Jana Joel Julia Karl Kate Lara Leo Lena Liam Lucy Luis Maja Marc "
  "Maria Max Mia Nadia Nils Nina Noah Olga Omar Oscar Paul Petra Rosa Ruth "
  "Sara Simon Sofia Tara Theo Tom Vera"
)
_LAST = (
  "Adler Baker Barton Becker Bell Blake Bond Carter Cole Cook Cruz Dale Dixon "
  "Doyle Ellis Evans Farmer Fisher Flynn Ford Fox Garcia Gill Grant Gray Hale "
  "Hall Hart Hayes Hill Holt Hunt Irwin Jones Keller King Knight Lane Larsen "
  "Lopez Lynch Mason Meyer Mills Moore Nash Nolan Olsen Owens Page Parker "
  "Perez Porter Quinn Reed Rossi Ryan Santos Silva Stone Tanaka Turner Vance "
  "Ward"
)
FIRST_NAMES = tuple(_FIRST.split())
LAST_NAMES = tuple(_LAST.split())
MOST_ENTRIES = len(FIRST_NAMES) * len(LAST_NAMES)


@dataclasses.dataclass(frozen=True)
class Task:
  """A prompt and the answer that is right."""

  prompt: str
  label: str


def phone_book(
  seed: int,
  index: int,
  *,
  entries: int,
  lookups: int,
  layout: str = "question_context_question",
) -> Task:
  """Book `index` of a seed.

  Names are unique in a book, numbers do not begin with 0 (the paper does not
  say how they were drawn; the ones it prints begin with 1 to 9).

  Args:
    seed: of the books.
    index: which one.
    entries: people in the book.
    lookups: people asked for.
    layout: one of `LAYOUTS`.

  Raises:
    UserError: for sizes that do not fit, or an unknown layout.
  """
  if not 1 <= lookups <= entries <= MOST_ENTRIES:
    raise UserError(
      f"phone book: lookups={lookups}, entries={entries}: need 1 <= lookups <= "
      f"entries <= {MOST_ENTRIES}"
    )
  if layout not in LAYOUTS:
    raise UserError(
      f"phone book: layout={layout!r}{did_you_mean(layout, LAYOUTS)}"
    )
  rng = np_rng(seed, "phone_book", index)
  people = [
    f"{FIRST_NAMES[i % len(FIRST_NAMES)]} {LAST_NAMES[i // len(FIRST_NAMES)]}"
    for i in rng.choice(MOST_ENTRIES, entries, replace=False)
  ]
  digits = rng.integers(0, 10, (entries, DIGITS))
  digits[:, 0] = rng.integers(1, 10, entries)
  numbers = [_written(row) for row in digits]
  asked = rng.choice(entries, lookups, replace=False)
  names = _listed([people[i] for i in asked])
  context = "Phonebook:\n" + "".join(
    f"{name}: {number}\n" for name, number in zip(people, numbers)
  )
  verb, plural = ("is", "") if lookups == 1 else ("are", "s")
  question = f"What {verb} the phone number{plural} of {names}?"
  prompt = {
    "question_context_question": (
      f"{question} Find them in the phonebook below.\n\n{context}\n{question} "
      "Find them in the phonebook above.\n"
    ),
    "question_context": (
      f"{question} Find them in the phonebook below.\n\n{context}"
    ),
    "context_question": (
      f"{context}\n{question} Find them in the phonebook above.\n"
    ),
  }[layout]
  return Task(prompt, ", ".join(numbers[i] for i in asked))


def _written(digits: np.ndarray) -> str:
  text = "".join(map(str, digits))
  return f"{text[:3]}-{text[3:6]}-{text[6:]}"


def _listed(names: Sequence[str]) -> str:
  if len(names) == 1:
    return names[0]
  return f"{', '.join(names[:-1])} and {names[-1]}"


def score_numbers(answer: str, label: str) -> tuple[float, float]:
  """How much of a label an answer has right.

  The answer is cut at commas; its numbers are compared with the label's place
  by place: a digit counts when it stands where the label has it. The paper
  does not say how it scored; this is for free generation.

  Returns:
    Share of the digits, and share of the numbers that are wholly right.
  """
  wanted = [_digits(part) for part in label.split(",")]
  given = [_digits(part) for part in answer.split(",")]
  given += [""] * (len(wanted) - len(given))
  right = [
    sum(a == b for a, b in zip(number, guess))
    for number, guess in zip(wanted, given)
  ]
  exact = [number == guess for number, guess in zip(wanted, given)]
  return sum(right) / (DIGITS * len(wanted)), sum(exact) / len(wanted)


def _digits(text: str) -> str:
  return re.sub(r"\D", "", text)


Generate = Callable[[list[np.ndarray], int], list[np.ndarray]]


class PhoneBooks:
  """Some books and the scores of their answers.

  Args:
    tokenizer: text to tokens and back.
    books: how many.
    entries: people in each.
    lookups: people asked for in each.
    seed: of the books.
    paradigm: tokens in front of every prompt.
    layout: one of `LAYOUTS`.

  Raises:
    UserError: for no books, or sizes that do not fit.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    *,
    books: int,
    entries: int,
    lookups: int,
    seed: int,
    paradigm: Sequence[int] = (),
    layout: str = "question_context_question",
  ):
    if books < 1:
      raise UserError(f"phone book: books={books} must be at least 1")
    self._tokenizer = tokenizer
    self.tasks = [
      phone_book(seed, i, entries=entries, lookups=lookups, layout=layout)
      for i in range(books)
    ]
    self.prompts = [
      np.concatenate([paradigm, tokenizer.encode(t.prompt)]).astype(np.int32)
      for t in self.tasks
    ]
    self.max_new_tokens = max(
      len(tokenizer.encode(t.label)) for t in self.tasks
    )

  def evaluate(self, generate: Generate) -> dict[str, float]:
    """Digit and exact-number accuracy over the books.

    Args:
      generate: `(prompts, max_new_tokens) -> continuations`.

    Returns:
      `digit_accuracy`, `exact_accuracy`, and `chance`, the digit accuracy of
      guesses.
    """
    answers = generate(self.prompts, self.max_new_tokens)
    scores = [
      score_numbers(self._tokenizer.decode(answer), task.label)
      for answer, task in zip(answers, self.tasks, strict=True)
    ]
    digit, exact = np.mean(scores, axis=0)
    return {
      "digit_accuracy": float(digit),
      "exact_accuracy": float(exact),
      "chance": CHANCE,
    }
