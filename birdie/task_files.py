"""Tasks whose problems stand in a file: SQuAD V2 and story infilling."""

import collections
import dataclasses
import functools
import json
import os
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from birdie.objectives import NotEnough
from birdie.problems import Problem, Scores, Task
from common import files
from common.errors import UserError
from common.rngs import np_rng


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FileTask(Task):
  """A task with a fixed set of problems, for evaluation alone.

  Attributes:
    path: the file.
  """

  is_text: ClassVar[bool] = True
  is_trainable: ClassVar[bool] = False
  format: ClassVar[str]

  path: str = ""

  def __post_init__(self):
    super().__post_init__()
    if not self.path or not isinstance(self.path, str):
      self._refuse("path", f"a file ({self.format})")

  @functools.cached_property
  def items(self) -> list[Any]:
    """What the file holds."""
    raise NotImplementedError

  def _problem(self, item: Any) -> Problem:
    raise NotImplementedError

  def problem(self, rng: np.random.Generator, space: int):
    """One of the file's problems, any."""
    made = self._problem(self.items[rng.integers(len(self.items))])
    size = len(made.inputs) + len(made.labels)
    return made if size <= space else NotEnough(size, "space")

  def problems(
    self, seed: int, count: int, *, stream: str | None = None
  ) -> list[Problem]:
    """Problems of the file in an order of the seed; none twice."""
    rng = np_rng(seed, stream or self.name)
    order = rng.permutation(len(self.items))[:count]
    return [self._problem(self.items[i]) for i in order]


# -- SQuAD ---------------------------------------------------------------------

SQUAD_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Question:
  """A question on a context, and every answer that is right."""

  context: str
  question: str
  answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squad(_FileTask):
  """The answerable questions of a file in SQuAD's format (section 4.4, A.15).

  The prompt is the context, an empty line and the question, without examples;
  the answer is greedy and has at most 128 tokens. It counts when it holds one
  of the right answers verbatim (`contains_label`); beside that stand the F1 of
  its tokens and whether it is one of them, both without case, punctuation and
  articles, and with the best of the right answers.

  Attributes:
    path: a JSON file as of https://rajpurkar.github.io/SQuAD-explorer.
  """

  name: ClassVar[str] = "squad"
  metrics: ClassVar[tuple[str, ...]] = ("contains_label", "f1", "exact_match")
  length_bucket: ClassVar[int] = 96
  format: ClassVar[str] = "JSON in the format of SQuAD V2"

  @functools.cached_property
  def items(self) -> list[Question]:
    """Every question that has an answer."""
    found = read_squad(self.path)
    if not found:
      raise UserError(f"{self.path}: no question has an answer")
    return found

  def _problem(self, item: Question) -> Problem:
    inputs = self.prefix(self.text(f"{item.context}\n\n{item.question}"))
    labels = np.append(self.text(item.answers[0]), np.int32(self.vocab.eos))
    # The paper's curves are by the length of the context.
    facts = {"length": len(self.text(item.context)), "lookups": 1}
    return Problem(inputs, labels, facts, texts=item.answers)

  def max_new_tokens(self, problems: Sequence[Problem]) -> int:
    """128."""
    return SQUAD_TOKENS

  def score(self, answer: np.ndarray, problem: Problem) -> Scores:
    """See `score_text`."""
    return score_text(self.read(answer), problem.texts)

  def frequent(self, problem: Problem) -> Scores:
    """The answer that most of the other questions have."""
    for answer, count in self._answers:
      if count > 1 or answer not in problem.texts:
        return score_text(answer, problem.texts)
    return {}

  @functools.cached_property
  def _answers(self) -> list[tuple[str, int]]:
    return collections.Counter(q.answers[0] for q in self.items).most_common()

  def from_context(self, problem: Problem) -> Scores:
    """The context's beginning, as long as an answer may be."""
    count = min(problem.facts["length"], SQUAD_TOKENS)
    start = len(self.prefix())
    return self.score(problem.inputs[start : start + count], problem)


def score_text(answer: str, golds: Sequence[str]) -> Scores:
  """SQuAD's scores of an answer, with the best of the right ones."""
  words = _words(answer)
  return {
    "contains_label": float(any(gold in answer for gold in golds)),
    "f1": max(_f1(words, _words(gold)) for gold in golds),
    "exact_match": float(any(words == _words(gold) for gold in golds)),
  }


def _words(text: str) -> list[str]:
  """Without case, punctuation and articles."""
  text = text.lower().translate(str.maketrans("", "", string.punctuation))
  return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(given: list[str], wanted: list[str]) -> float:
  if not given or not wanted:
    return float(given == wanted)
  shared = collections.Counter(given) & collections.Counter(wanted)
  return 2 * sum(shared.values()) / (len(given) + len(wanted))


def read_squad(path: str) -> list[Question]:
  """The answerable questions of a file, in order.

  Raises:
    UserError: when it is missing, no JSON (with the line), or of another form
      (with the place).
  """
  content = _parse(path, _read(path))
  questions = []
  for i, article in enumerate(_get(path, content, "data", list)):
    where = f"data[{i}]"
    for j, paragraph in enumerate(
      _get(path, article, "paragraphs", list, where)
    ):
      place = f"{where}.paragraphs[{j}]"
      context = _get(path, paragraph, "context", str, place)
      for k, asked in enumerate(_get(path, paragraph, "qas", list, place)):
        one = f"{place}.qas[{k}]"
        question = _get(path, asked, "question", str, one)
        golds = [
          _get(path, gold, "text", str, f"{one}.answers[{n}]")
          for n, gold in enumerate(_get(path, asked, "answers", list, one))
        ]
        golds = list(dict.fromkeys(gold for gold in golds if gold.strip()))
        if golds and not asked.get("is_impossible", False):
          questions.append(Question(context, question, tuple(golds)))
  return questions


def _get(path: str, node: Any, key: str, kind: type, where: str = "") -> Any:
  value = node.get(key) if isinstance(node, dict) else None
  if not isinstance(value, kind):
    what = {list: "a list", str: "text"}[kind]
    raise UserError(
      f"{path}: {where or 'the file'} has no {key!r} that is {what}: need JSON "
      "in the format of SQuAD V2"
    )
  return value


# -- story infilling -----------------------------------------------------------

BLANK = "(blank)"
LETTERS = "ABCD"
QUESTION = "Which choice best fills in the missing entry?"


@dataclasses.dataclass(frozen=True)
class Story:
  """Events in order, one of them missing, and what might be missing."""

  events: tuple[str, ...]
  choices: tuple[str, ...]
  answer: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoryInfilling(_FileTask):
  """Four choices for the event that a story lacks (section 4.5, A.16).

  The choice with the highest log-likelihood a token is the answer. The data of
  the paper are not published; nor is more of the prompt than its end, so the
  lists above it are ours.

  Attributes:
    path: JSON lines: `events`, 3 to 7 texts of which one is "(blank)";
      `choices`, 4 texts; `answer`, 0 to 3 or "A" to "D".
  """

  name: ClassVar[str] = "story_infilling"
  metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
  format: ClassVar[str] = "JSON lines of events, choices and answer"

  @functools.cached_property
  def items(self) -> list[Story]:
    """Every line."""
    found = read_stories(self.path)
    if not found:
      raise UserError(f"{self.path}: no line holds a story")
    return found

  def _problem(self, item: Story) -> Problem:
    events = "".join(f"{i + 1}. {e}\n" for i, e in enumerate(item.events))
    listed = "".join(f"({x}) {c}\n" for x, c in zip(LETTERS, item.choices))
    inputs = self.prefix(self.text(f"{events}\n{listed}\n{QUESTION}"))
    choices = tuple(self.text(choice) for choice in item.choices)
    facts = {"length": len(inputs), "events": len(item.events), "lookups": 1}
    return Problem(inputs, choices[item.answer], facts, choices)

  def score(self, answer: np.ndarray, problem: Problem) -> Scores:
    """Whether it is the right choice."""
    return {"accuracy": float(np.array_equal(answer, problem.labels))}

  def frequent(self, problem: Problem) -> Scores:
    """The place that is right in most of the stories."""
    place = collections.Counter(s.answer for s in self.items).most_common(1)
    chosen = problem.choices[place[0][0]]
    return {"accuracy": float(np.array_equal(chosen, problem.labels))}

  def guess(self, problem: Problem) -> Scores:
    """Any choice."""
    return {"accuracy": 1 / len(problem.choices)}


def read_stories(path: str) -> list[Story]:
  """The stories of a file, one a line; empty lines are passed over.

  Raises:
    UserError: when it is missing; names the first line that is wrong.
  """
  stories = []
  for number, line in enumerate(_read(path).split("\n"), start=1):
    if line.strip():
      stories.append(
        _story(_parse(path, line, number), f"{path}, line {number}")
      )
  return stories


def _story(content: Any, where: str) -> Story:
  content = content if isinstance(content, dict) else {}

  def texts(key: str, holds: Callable[[int], bool], what: str):
    value = content.get(key)
    fits = isinstance(value, list) and holds(len(value))
    if not fits or not all(isinstance(v, str) and v.strip() for v in value):
      raise UserError(f"{where}: {key!r} must be {what}")
    return tuple(value)

  events = texts("events", lambda n: 3 <= n <= 7, "3 to 7 texts")
  if events.count(BLANK) != 1:
    raise UserError(f"{where}: one of 'events' must be {BLANK!r}, and only one")
  choices = texts("choices", lambda n: n == 4, "4 texts")
  if len(set(choices)) < 4:
    raise UserError(f"{where}: two of 'choices' are the same")
  answer = content.get("answer")
  if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
    answer = LETTERS.index(answer)
  is_index = isinstance(answer, int) and not isinstance(answer, bool)
  if not is_index or not 0 <= answer < 4:
    raise UserError(f"{where}: 'answer' must be 0 to 3, or 'A' to 'D'")
  return Story(events, choices, answer)


# -- files ---------------------------------------------------------------------


def _read(path: str) -> str:
  try:
    with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
      return file.read()
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from None
  except UnicodeDecodeError as error:
    line = error.object[: error.start].count(b"\n") + 1
    raise UserError(f"{path}, line {line}: not UTF-8") from None


def _parse(path: str, text: str, number: int | None = None) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    line = number or error.lineno
    raise UserError(f"{path}, line {line}: no JSON: {error.msg}") from None
  except files.JSON_ERRORS as error:
    place = path if number is None else f"{path}, line {number}"
    raise UserError(f"{place}: no JSON: {error}") from None
