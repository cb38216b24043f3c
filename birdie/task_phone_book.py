"""Multi-phone-number retrieval: as published, and in few tokens.

The paper's (section 4.3, A.9, figure 9) is text: a question that names some
people, a list of "First Last: ddd-ddd-dddd", the question again. The answer is
their numbers in order, joined by ", ".
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from birdie.objectives import NotEnough
from birdie.problems import Problem, Range, Scores, Task, draw_sizes, letters
from common.config import did_you_mean
from common.errors import UserError
from common.rngs import np_rng

LAYOUTS = (
  "question_context_question",
  "question_context",
  "context_question",
)
METRICS = ("digit_accuracy", "exact_accuracy")
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
class Book:
  """A prompt and the answer that is right, as text."""

  prompt: str
  label: str


def phone_book(
  seed: int,
  index: int,
  *,
  entries: int,
  lookups: int,
  layout: str = "question_context_question",
) -> Book:
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
  return _draw_book(np_rng(seed, "phone_book", index), entries, lookups, layout)


def _draw_book(
  rng: np.random.Generator, entries: int, lookups: int, layout: str
) -> Book:
  people = [
    f"{FIRST_NAMES[i % len(FIRST_NAMES)]} {LAST_NAMES[i // len(FIRST_NAMES)]}"
    for i in rng.choice(MOST_ENTRIES, entries, replace=False)
  ]
  digits = rng.integers(0, 10, (entries, DIGITS))
  digits[:, 0] = rng.integers(1, 10, entries)
  numbers = [_written(row) for row in digits]
  asked = rng.choice(entries, lookups, replace=False)
  return _write_book(people, numbers, asked, layout)


def _write_book(
  people: Sequence[str],
  numbers: Sequence[str],
  asked: Sequence[int] | np.ndarray,
  layout: str,
) -> Book:
  names = _listed([people[i] for i in asked])
  context = "Phonebook:\n" + "".join(
    f"{name}: {number}\n" for name, number in zip(people, numbers)
  )
  verb, plural = ("is", "") if len(asked) == 1 else ("are", "s")
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
  return Book(prompt, ", ".join(numbers[i] for i in asked))


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhoneBook(Task):
  """Published phone books, with their numbers in order, then EOS.

  Attributes:
    entries: people in a book.
    lookups: people asked for.
    layout: one of `LAYOUTS`.
  """

  name: ClassVar[str] = "phone_book"
  metrics: ClassVar[tuple[str, ...]] = METRICS
  is_text: ClassVar[bool] = True
  grid: ClassVar = {"entries": (8, 16, 32), "lookups": (1, 2, 4)}

  entries: Range = (8, 32)
  lookups: Range = (1, 4)
  layout: str = LAYOUTS[0]

  def __post_init__(self):
    super().__post_init__()
    self._check_range("entries", 1, MOST_ENTRIES)
    self._check_range("lookups", 1, MOST_ENTRIES)
    self._check_at_most("lookups", "entries")
    self._check_choice("layout", LAYOUTS)

  def problem(self, rng: np.random.Generator, space: int):
    """See `Task`; text may be longer in tokens than `_size` expects."""
    sizes = draw_sizes(rng, self.entries, self.lookups, space, self._size)
    if isinstance(sizes, NotEnough):
      return sizes
    inputs, labels = self._tokens(_draw_book(rng, *sizes, self.layout))
    if len(inputs) + len(labels) > space:
      return NotEnough(len(inputs) + len(labels), "space")
    facts = {"length": len(inputs), "entries": sizes[0], "lookups": sizes[1]}
    return Problem(inputs, labels, facts)

  def _tokens(self, book: Book) -> tuple[np.ndarray, np.ndarray]:
    answer = np.append(self.text(book.label), np.int32(self.vocab.eos))
    return self.prefix(self.text(book.prompt)), answer

  @functools.cached_property
  def smallest(self) -> int:
    """See `Task`."""
    return self._size(self.entries[0], self.lookups[0])

  def _size(self, entries: int, lookups: int) -> int:
    """Places of a book whose people have the longest names.

    A bound where tokens are bytes; where they are words, it is one as long as
    the pieces of a text have no more tokens together than each alone.
    """
    one, two, entry, lookup = self._costs
    if lookups == 1:
      return one + (entries - 1) * entry
    return two + (entries - 2) * entry + (lookups - 2) * lookup

  @functools.cached_property
  def _costs(self) -> tuple[int, int, int, int]:
    """Sizes with one entry, with two look-ups, and of one more of each."""

    def size(entries: int, lookups: int) -> int:
      name = " ".join(
        max(names, key=lambda name: len(self.text(name)))
        for names in (FIRST_NAMES, LAST_NAMES)
      )
      number = _written(np.full(DIGITS, 8))
      book = _write_book(
        [name] * entries, [number] * entries, range(lookups), self.layout
      )
      return sum(map(len, self._tokens(book)))

    two = size(2, 2)
    entry = size(3, 2) - two
    return size(1, 1), two, entry, size(3, 3) - two - entry

  def score(self, answer: np.ndarray, problem: Problem) -> Scores:
    """See `score_numbers`."""
    found = score_numbers(self.read(answer), self.read(problem.labels))
    return dict(zip(METRICS, found))

  def guess(self, problem: Problem) -> Scores:
    """Ten digits at random for each number."""
    return dict(zip(METRICS, (CHANCE, CHANCE**DIGITS)))

  def from_context(self, problem: Problem) -> Scores:
    """Any number of the book; first digits are equal once in nine."""
    digits = (1 / 9 + CHANCE * (DIGITS - 1)) / DIGITS
    exact = CHANCE ** (DIGITS - 1) / 9
    return _one_of(problem.facts["entries"], digits, exact)


def _one_of(entries: int, digits: float, exact: float) -> Scores:
  """Scores of any entry, where another agrees by chance as much as told."""
  scores = (1 / entries + (1 - 1 / entries) * p for p in (digits, exact))
  return dict(zip(METRICS, scores))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompactPhoneBook(Task):
  """Phone books without words: an entry is a name's ids and digits.

      START name .. CONTEXT (name digits) .. END name ..     labels: digits ..

  Names, of `name_tokens` text tokens each, and digits share no token. The
  layout leaves out one of the questions, as in the published books. All digits
  may be 0, and no token ends the answer.

  Attributes:
    entries: people in a book.
    lookups: people asked for.
    digits: of a number, 4 to 10.
    name_tokens: of a name.
    layout: one of `LAYOUTS`.
  """

  name: ClassVar[str] = "phone_book_compact"
  metrics: ClassVar[tuple[str, ...]] = METRICS
  grid: ClassVar = {"entries": (8, 16, 32), "lookups": (1, 2, 4)}

  entries: Range = (8, 32)
  lookups: Range = (1, 4)
  digits: int = 4
  name_tokens: int = 1
  layout: str = LAYOUTS[0]

  def __post_init__(self):
    super().__post_init__()
    self._check_count("digits", 4, DIGITS)
    self._check_count("name_tokens", 1, 4)
    self._check_range("entries", 1, len(self._syllables) ** self.name_tokens)
    self._check_range("lookups", 1, self.entries[1])
    self._check_at_most("lookups", "entries")
    self._check_choice("layout", LAYOUTS)

  @property
  def _syllables(self) -> np.ndarray:
    return letters(self.vocab, len(self.vocab.text))[10:]

  def problem(self, rng: np.random.Generator, space: int):
    """See `Task`."""
    sizes = draw_sizes(rng, self.entries, self.lookups, space, self._size)
    if isinstance(sizes, NotEnough):
      return sizes
    entries, lookups = sizes
    base = len(self._syllables)
    chosen = rng.choice(base**self.name_tokens, entries, replace=False)
    places = base ** np.arange(self.name_tokens)
    names = self._syllables[chosen[:, None] // places % base]
    drawn = rng.integers(0, 10, (entries, self.digits))
    numbers = letters(self.vocab, 10)[drawn]
    asked = rng.choice(entries, lookups, replace=False)
    question = names[asked].reshape(-1)
    book = np.concatenate([names, numbers], axis=1).reshape(-1)
    parts = [[self.vocab.context], book]
    if self.layout.startswith("question"):
      parts = [[self.vocab.start], question, *parts]
    if self.layout.endswith("question"):
      parts = [*parts, [self.vocab.end], question]
    inputs = self.prefix(*parts)
    facts = {"length": len(inputs), "entries": entries, "lookups": lookups}
    return Problem(inputs, numbers[asked].reshape(-1), facts)

  def _size(self, entries: int, lookups: int) -> int:
    question = 1 + lookups * self.name_tokens
    return (
      len(self.prefix())
      + self.layout.count("question") * question
      + 1
      + entries * (self.name_tokens + self.digits)
      + lookups * self.digits
    )

  @functools.cached_property
  def smallest(self) -> int:
    """See `Task`."""
    return self._size(self.entries[0], self.lookups[0])

  def score(self, answer: np.ndarray, problem: Problem) -> Scores:
    """Shares of the digits and of the numbers that are right."""
    labels = problem.labels
    given = np.full(len(labels), -1)
    given[: len(answer)] = answer[: len(labels)]
    right = (given == labels).reshape(-1, self.digits)
    return dict(zip(METRICS, (float(right.mean()), float(right.all(1).mean()))))

  def guess(self, problem: Problem) -> Scores:
    """Any digits."""
    return dict(zip(METRICS, (CHANCE, CHANCE**self.digits)))

  def from_context(self, problem: Problem) -> Scores:
    """Any number of the book."""
    return _one_of(problem.facts["entries"], CHANCE, CHANCE**self.digits)
