"""What a task is: problems with exact scores, and what it takes to be better.

A task is a frozen set of settings. It makes problems, each a pure function of
a generator and the space it may take, and scores the tokens of an answer. So
one task serves three ends: evaluation, baselines, and training, where it is an
entry of the mixture (`Task.example`).
"""

import bisect
import dataclasses
import functools
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from birdie.objectives import Example, NotEnough
from birdie.vocab import Vocabulary
from common.errors import UserError
from common.rngs import np_rng

Range = tuple[int, int]  # both ends included; a user may give one number
Scores = dict[str, float]
ENDLESS = 1 << 40  # space, where nothing limits it
# Problems that say which answer is the most frequent.
MAJORITY_PROBLEMS = 256


@dataclasses.dataclass(frozen=True)
class Problem:
  """A prompt and the answer that is right.

  Attributes:
    inputs: int32 [n], the prefix, with the tokens that announce it.
    labels: int32 [m], m >= 1; where a token ends the answer it is the last.
    facts: what results are sorted by: `length` (n), `lookups` and the like.
    choices: int32 arrays, where one of several answers is chosen; `labels` is
      the right one.
    texts: every text that is right, where more than one may be.
  """

  inputs: np.ndarray
  labels: np.ndarray
  facts: Mapping[str, int]
  choices: tuple[np.ndarray, ...] = ()
  texts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """Settings that make and score problems; the subclasses add theirs.

  Attributes:
    vocab: special tokens.
    encode: text to tokens; for tasks of text.
    decode: tokens to text.
    paradigm: tokens in front of every prompt; prefix-LM's if None.

  Raises:
    UserError: for a setting that makes no sense.
  """

  name: ClassVar[str]
  metrics: ClassVar[tuple[str, ...]]  # shares; the first is the main one
  is_text: ClassVar[bool] = False  # needs a tokenizer
  is_trainable: ClassVar[bool] = True
  grid: ClassVar[Mapping[str, tuple]] = {}  # evaluated where nothing is asked
  length_bucket: ClassVar[int] = 0  # width of results by length; 0: octaves

  vocab: Vocabulary
  encode: Callable[[str], Any] | None = None
  decode: Callable[[Iterable[int]], str] | None = None
  paradigm: tuple[int, ...] | None = None

  def __post_init__(self):
    if self.is_text and self.encode is None:
      raise UserError(f"{self.name} needs a tokenizer")

  # -- what a task has to bring ------------------------------------------------

  def problem(
    self, rng: np.random.Generator, space: int
  ) -> Problem | NotEnough:
    """A problem that takes at most `space` places, n + m."""
    raise NotImplementedError

  @functools.cached_property
  def smallest(self) -> int:
    """Places in which a problem can always be made."""
    raise NotImplementedError

  def score(self, answer: np.ndarray, problem: Problem) -> Scores:
    """The metrics of an answer, tokens without the one that ends it."""
    raise NotImplementedError

  def guess(self, problem: Problem) -> Scores:
    """What is expected of an answer drawn from all that might be one."""
    return {}

  def frequent(self, problem: Problem) -> Scores:
    """What the most frequent answer scores, where nothing is trained on."""
    return {}

  def from_context(self, problem: Problem) -> Scores:
    """The same of an answer of the right form drawn from the context."""
    return {}

  # -- what every task has -----------------------------------------------------

  @property
  def stop(self) -> int:
    """The token that ends an answer; -1 where its length is known."""
    return self.vocab.eos if self.is_text else -1

  def max_new_tokens(self, problems: Sequence[Problem]) -> int:
    """Tokens that any answer may take."""
    return max(len(problem.labels) for problem in problems)

  def problems(
    self, seed: int, count: int, *, stream: str | None = None
  ) -> list[Problem]:
    """Problems 0 to `count` - 1 of a seed; each a function of its number.

    Args:
      seed: of the problems.
      count: how many.
      stream: other streams, other problems; the task's name if None.

    Raises:
      UserError: when one cannot be made.
    """
    made = []
    for i in range(count):
      rng = np_rng(seed, stream or self.name, i)
      problem = self.problem(rng, ENDLESS)
      if isinstance(problem, NotEnough):
        raise UserError(
          f"{self.name}: problem {i} needs {problem.needed} tokens of "
          f"{problem.what}: give more, or smaller problems"
        )
      made.append(problem)
    return made

  def example(
    self, rng: np.random.Generator, space: int
  ) -> Example | NotEnough:
    """A problem as an example to train on; it takes no text."""
    if space < self.smallest:
      return NotEnough(self.smallest, "space")
    made = self.problem(rng, space)
    if isinstance(made, NotEnough):
      return made
    return Example(made.inputs, made.labels, 0)

  def prefix(self, *parts: Iterable[int]) -> np.ndarray:
    """The parts of a prompt behind the paradigm, int32 [n]."""
    return np.concatenate(
      [np.asarray(part, np.int32) for part in (self._announcement, *parts)]
    )

  def text(self, text: str) -> np.ndarray:
    """Tokens of a text, int32 [n]."""
    assert self.encode is not None  # `is_text` has asked for it
    return np.asarray(self.encode(text), np.int32)

  def read(self, tokens: np.ndarray) -> str:
    """The text of tokens."""
    if self.decode is None:
      raise ValueError(f"{self.name} was made without a tokenizer's decode")
    return self.decode(tokens)

  @property
  def _announcement(self) -> tuple[int, ...]:
    if self.paradigm is None:
      return self.vocab.paradigms["prefix_language_modeling"]
    return self.paradigm

  # -- checks ------------------------------------------------------------------

  def _refuse(self, name: str, what: str) -> None:
    value = getattr(self, name)
    if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1]:
      value = value[0]
    raise UserError(f"{self.name}: {name}={value!r} must be {what}")

  def _check_range(self, name: str, least: int, most: int) -> None:
    """Makes a pair of a number; refuses what lies outside [least, most]."""
    value = getattr(self, name)
    pair = (value, value) if _is_count(value) else value
    fits = isinstance(pair, list | tuple) and len(pair) == 2
    if not (fits and all(_is_count(v) for v in pair)):
      self._refuse(name, "a number, or the least and the most")
    low, high = pair
    if low > high:
      self._refuse(name, f"the least and the most: {low} is above {high}")
    if not least <= low <= high <= most:
      self._refuse(name, f"in {least} to {most}")
    object.__setattr__(self, name, (low, high))

  def _check_count(self, name: str, least: int, most: int) -> None:
    value = getattr(self, name)
    if not (_is_count(value) and least <= value <= most):
      self._refuse(name, f"a number from {least} to {most}")

  def _check_choice(self, name: str, known: Sequence[str]) -> None:
    if getattr(self, name) not in known:
      self._refuse(name, f"one of {', '.join(known)}")

  def _check_at_most(self, name: str, other: str) -> None:
    """That the least of one setting is no more than the least of another."""
    limit = getattr(self, other)[0]
    if getattr(self, name)[0] > limit:
      self._refuse(name, f"at most {other}={limit}")


def settings_of(task: type[Task]) -> tuple[str, ...]:
  """The names of what a user may set."""
  given = ("vocab", "encode", "decode")
  return tuple(
    field.name
    for field in dataclasses.fields(task)
    if field.name not in given and field.metadata.get("is_setting", True)
  )


def _is_count(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


# -- sizes ---------------------------------------------------------------------


def most(low: int, high: int, holds: Callable[[int], bool]) -> int:
  """The largest n in [low, high] that holds, low - 1 if none does.

  `holds` must not become true again once it is false.
  """
  span = range(low, high + 1)
  return low - 1 + bisect.bisect_left(span, True, key=lambda n: not holds(n))


def draw_size(
  rng: np.random.Generator,
  bounds: Range,
  space: int,
  size: Callable[[int], int],
) -> int | NotEnough:
  """Draws a number uniformly from `bounds`, as far as size(n) fits."""
  high = most(*bounds, lambda n: size(n) <= space)
  if high < bounds[0]:
    return NotEnough(size(bounds[0]), "space")
  return int(rng.integers(bounds[0], high + 1))


def draw_sizes(
  rng: np.random.Generator,
  entries: Range,
  lookups: Range | None,
  space: int,
  size: Callable[[int, int], int],
) -> tuple[int, int] | NotEnough:
  """Draws how many entries there are and how many of them are asked for.

  Look-ups first, so that each number of them is as frequent as the others;
  then entries, at least as many. A small space shortens both ranges.

  Args:
    rng: randomness.
    entries: least and most entries.
    lookups: least and most look-ups; as many as entries if None.
    space: places there are.
    size: places of a problem, by entries and look-ups; never falls.
  """
  if lookups is None:
    n = draw_size(rng, entries, space, lambda n: size(n, n))
    return n if isinstance(n, NotEnough) else (n, n)
  asked = (lookups[0], min(lookups[1], entries[1]))
  q = draw_size(rng, asked, space, lambda q: size(max(entries[0], q), q))
  if isinstance(q, NotEnough):
    return q
  rest = (max(entries[0], q), entries[1])
  n = draw_size(rng, rest, space, lambda n: size(n, q))
  return n if isinstance(n, NotEnough) else (n, q)


def letters(vocab: Vocabulary, count: int) -> np.ndarray:
  """The ids of `count` text tokens, int32.

  Where tokens are bytes, digits and letters come first: a model that has been
  trained on text knows them, and all that it never saw looks the same to it.
  """
  ids = np.array(vocab.text, np.int32)
  if vocab.byte_offset is not None:
    printable = string.digits + string.ascii_letters + string.punctuation
    first = printable.encode()
    order = [*first, *(byte for byte in range(256) if byte not in first)]
    ids = np.array(order, np.int32) + vocab.byte_offset
  return ids[:count]


# -- scores and baselines ------------------------------------------------------

TOKEN_METRICS = ("token_accuracy", "exact_answer")


def right_places(answer: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Where an answer has a label's token, bool [m]; what is missing is wrong."""
  right = np.zeros(len(labels), bool)
  given = answer[: len(labels)]
  right[: len(given)] = given == labels[: len(given)]
  return right


def score_tokens(answer: np.ndarray, labels: np.ndarray) -> Scores:
  """Share of the tokens that are right, and whether all of them are."""
  right = right_places(answer, labels)
  return dict(zip(TOKEN_METRICS, (float(right.mean()), float(right.all()))))


def each_right(chance: float, count: int) -> Scores:
  """What is expected when each of `count` tokens is right by chance."""
  return dict(zip(TOKEN_METRICS, (chance, chance**count)))


def majority_answer(labels: Sequence[np.ndarray], stop: int = -1) -> np.ndarray:
  """The most frequent token at each place, up to the one that ends answers.

  Args:
    labels: int arrays of any lengths; a place counts those that reach it.
    stop: ends an answer; -1: nothing does.
  """
  answer = []
  for place in range(max(map(len, labels))):
    here = [int(row[place]) for row in labels if len(row) > place]
    token = int(np.bincount(here).argmax())
    if token == stop:
      break
    answer.append(token)
  return np.array(answer, np.int32)


def majority(task: Task, seed: int) -> np.ndarray | None:
  """The answer that is most frequent in training, or None without training.

  Args:
    task: makes the problems that training would see.
    seed: of the problems to be answered; these come from a stream apart.
  """
  if not task.is_trainable:
    return None
  seen = task.problems(seed, MAJORITY_PROBLEMS, stream=f"{task.name}/majority")
  return majority_answer([problem.labels for problem in seen], task.stop)
