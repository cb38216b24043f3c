"""Recall and copying in tokens without meaning."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from birdie import objectives
from birdie.controls import ObjectiveConfig
from birdie.objectives import NotEnough
from birdie.problems import (
  TOKEN_METRICS,
  Problem,
  Range,
  Scores,
  Task,
  draw_size,
  draw_sizes,
  each_right,
  letters,
  right_places,
  score_tokens,
)

LONGEST = 1 << 20
ORDERS = ("context_query", "query_context")
# Of the power law that says how soon a key is asked for again.
POWER = 0.01


class _Tokens(Task):
  """A task whose answer is scored token by token."""

  metrics: ClassVar[tuple[str, ...]] = TOKEN_METRICS

  def score(self, answer: np.ndarray, problem: Problem) -> Scores:
    """See `score_tokens`."""
    return score_tokens(answer, problem.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall(_Tokens):
  """Multi-query associative recall (Zoology, arXiv 2312.04927).

      (key value) .. SEP key ..        labels: the values of the keys asked for

  Keys come from one half of the text ids, values from the other, each at most
  once. As published, key i is asked for at one of P places, drawn
  without replacement with probability ~ a g^(a - 1) for place g: early pairs
  tend to be asked for early. It departs from the published form where a prefix
  and an answer ask for it: there, queries are scattered over a causal sequence
  whose every query predicts its own value, with as many places for them as the
  length leaves; here all queries stand in the prefix, in the order of their
  places, and the values follow in one go. So the query may also come first,
  and fewer keys than there are may be asked for.

  Attributes:
    pairs: P.
    lookups: keys asked for; all of them if None.
    order: one of `ORDERS`.
    key_alphabet, value_alphabet: how many different ones there are; as many as
      the halves hold if None. Where tokens are bytes, small ones are made of
      what is frequent in text.
  """

  name: ClassVar[str] = "associative_recall"
  grid: ClassVar = {"pairs": (4, 8, 16, 32)}

  pairs: Range = (4, 32)
  lookups: Range | None = None
  order: str = ORDERS[0]
  key_alphabet: int | None = None
  value_alphabet: int | None = None

  def __post_init__(self):
    super().__post_init__()
    for name in ("key_alphabet", "value_alphabet"):
      if getattr(self, name) is not None:
        self._check_count(name, 1, len(self.vocab.text) // 2)
    self._check_range("pairs", 1, min(map(len, self._alphabets)))
    if self.lookups is not None:
      self._check_range("lookups", 1, self.pairs[1])
      self._check_at_most("lookups", "pairs")
    self._check_choice("order", ORDERS)

  @functools.cached_property
  def _alphabets(self) -> tuple[np.ndarray, np.ndarray]:
    """Of keys, and of values, which begin where the keys end."""
    half = len(self.vocab.text) // 2
    ids = letters(self.vocab, len(self.vocab.text))
    keys, values = self.key_alphabet or half, self.value_alphabet or half
    return ids[:keys], ids[keys:][:values]

  def problem(self, rng: np.random.Generator, space: int):
    """See `Task`."""
    sizes = draw_sizes(rng, self.pairs, self.lookups, space, self._size)
    if isinstance(sizes, NotEnough):
      return sizes
    pairs, lookups = sizes
    keys, values = (
      rng.choice(alphabet, pairs, replace=False) for alphabet in self._alphabets
    )
    law = POWER * np.arange(1, pairs + 1) ** (POWER - 1)
    places = rng.choice(pairs, pairs, replace=False, p=law / law.sum())
    asked = np.argsort(places)[:lookups]
    parts = [np.stack([keys, values], 1).reshape(-1), [self.vocab.sep]]
    parts.append(keys[asked])
    if self.order == "query_context":
      parts.reverse()
    inputs = self.prefix(*parts)
    facts = {"length": len(inputs), "pairs": pairs, "lookups": lookups}
    return Problem(inputs, values[asked], facts)

  def _size(self, pairs: int, lookups: int) -> int:
    return len(self.prefix()) + 2 * pairs + 1 + 2 * lookups

  @functools.cached_property
  def smallest(self) -> int:
    """See `Task`."""
    return self._size(self.pairs[0], (self.lookups or self.pairs)[0])

  def guess(self, problem: Problem) -> Scores:
    """Any value."""
    return each_right(1 / len(self._alphabets[1]), problem.facts["lookups"])

  def from_context(self, problem: Problem) -> Scores:
    """Any value that stands there."""
    return each_right(1 / problem.facts["pairs"], problem.facts["lookups"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
  """The paper's selective copying (A.5); the objective of that name makes it.

  Attributes:
    spans: how many are asked for.
    length: of the context.
    min_span, max_span: lengths of spans.
    min_delimiter, max_delimiter: lengths of what stands around them.
    order: one of `ORDERS`.
    tokens: int [t], text that contexts are cut from; random tokens if None.
  """

  name: ClassVar[str] = "selective_copying"
  metrics: ClassVar[tuple[str, ...]] = ("token_accuracy", "span_accuracy")
  # The objective is what one trains with.
  grid: ClassVar = {"spans": (1, 2, 4), "length": (128, 256)}

  spans: Range = (1, 4)
  length: Range = (128, 256)
  min_span: int = 4
  max_span: int = 32
  min_delimiter: int = 1
  max_delimiter: int = 8
  order: str = "query_context"
  tokens: np.ndarray | None = dataclasses.field(
    default=None, compare=False, repr=False, metadata={"is_setting": False}
  )

  def __post_init__(self):
    super().__post_init__()
    for low, high in (
      ("min_span", "max_span"),
      ("min_delimiter", "max_delimiter"),
    ):
      self._check_count(low, 1, LONGEST)
      self._check_count(high, getattr(self, low), LONGEST)
    self._check_range("spans", 1, LONGEST)
    self._check_range("length", self.spans[1] * self._least, LONGEST)
    self._check_choice("order", ORDERS)

  @property
  def stop(self) -> int:
    """DONE stands behind the last span."""
    return self.vocab.done

  @property
  def _announcement(self) -> tuple[int, ...]:
    if self.paradigm is None:
      return self.vocab.paradigms["selective_copying"]
    return self.paradigm

  def problem(self, rng: np.random.Generator, space: int):
    """See `Task`; where no span stands alone another context is drawn."""
    sizes = draw_sizes(rng, self.length, self.spans, space, self._size)
    if isinstance(sizes, NotEnough):
      return sizes
    length, spans = sizes
    cfg = ObjectiveConfig(
      vocab=self.vocab,
      paradigm=self._announcement,
      paradigm_append_prob=0.0,
      min_length=length,
      max_length=length,
      num_spans=spans,
      min_span=self.min_span,
      max_span=self.max_span,
      min_delimiter=self.min_delimiter,
      max_delimiter=self.max_delimiter,
      order=self.order,
    )
    made = NotEnough(length, "text")
    for _ in range(objectives.MAX_ATTEMPTS):
      text = self._context(rng, length)
      made = objectives.selective_copying(text, cfg, rng, space)
      if not isinstance(made, NotEnough):
        facts = {"length": len(made.inputs), "lookups": spans}
        return Problem(made.inputs, made.labels, facts)
    return made

  @property
  def _least(self) -> int:
    return self.min_span + 2 * self.min_delimiter

  def _size(self, length: int, spans: int) -> int:
    marks = len(self._announcement) + 1 + 3 * spans
    return marks + length + spans * self._least

  @functools.cached_property
  def smallest(self) -> int:
    """See `Task`."""
    return self._size(self.length[0], self.spans[0])

  def _context(self, rng: np.random.Generator, length: int) -> np.ndarray:
    if self.tokens is None:
      return rng.choice(letters(self.vocab, len(self.vocab.text)), length)
    start = rng.integers(max(len(self.tokens) - length, 0) + 1)
    return np.asarray(self.tokens[start : start + length], np.int32)

  def score(self, answer: np.ndarray, problem: Problem) -> Scores:
    """Shares of the tokens, separators too, and of the spans."""
    wanted = problem.labels[:-1]
    spans = self._split(wanted)
    given = self._split(answer) + [()] * len(spans)
    right = sum(a == b for a, b in zip(spans, given))
    tokens = float(right_places(answer, wanted).mean())
    return {"token_accuracy": tokens, "span_accuracy": right / len(spans)}

  def _split(self, tokens: np.ndarray) -> list[tuple[int, ...]]:
    parts = np.split(tokens, np.flatnonzero(tokens == self.vocab.sep))
    return [tuple(p[p != self.vocab.sep].tolist()) for p in parts]

  def guess(self, problem: Problem) -> Scores:
    """Any text token or a separator, for each token."""
    chance = 1 / (len(self.vocab.text) + 1)
    spans = self._split(problem.labels[:-1])
    exact = float(np.mean([chance ** len(span) for span in spans]))
    return {"token_accuracy": chance, "span_accuracy": exact}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaSelectiveCopying(_Tokens):
  """Mamba's selective copying (arXiv 2312.00752, section 4.1.1).

  Data tokens lie scattered in noise, one token again and again; they are the
  labels, in order.

  Attributes:
    data: how many, 16 as published.
    length: of data and noise; 4096 as published.
    alphabet: different data tokens; 16 with the noise as published.
  """

  name: ClassVar[str] = "selective_copying_mamba"
  grid: ClassVar = {"length": (64, 128, 256)}

  data: Range = (16, 16)
  length: Range = (64, 256)
  alphabet: int = 15

  def __post_init__(self):
    super().__post_init__()
    self._check_range("length", 1, LONGEST)
    self._check_range("data", 1, LONGEST)
    self._check_at_most("data", "length")
    self._check_count("alphabet", 1, len(self.vocab.text) - 1)

  def problem(self, rng: np.random.Generator, space: int):
    """See `Task`."""
    sizes = draw_sizes(rng, self.length, self.data, space, self._size)
    if isinstance(sizes, NotEnough):
      return sizes
    length, data = sizes
    noise, *alphabet = letters(self.vocab, self.alphabet + 1)
    labels = rng.choice(np.array(alphabet, np.int32), data)
    context = np.full(length, noise)
    context[np.sort(rng.choice(length, data, replace=False))] = labels
    inputs = self.prefix(context)
    return Problem(inputs, labels, {"length": len(inputs), "lookups": data})

  def _size(self, length: int, data: int) -> int:
    return len(self.prefix()) + length + data

  @functools.cached_property
  def smallest(self) -> int:
    """See `Task`."""
    return self._size(self.length[0], self.data[0])

  def guess(self, problem: Problem) -> Scores:
    """Any data tokens."""
    return each_right(1 / self.alphabet, problem.facts["lookups"])

  def from_context(self, problem: Problem) -> Scores:
    """At each place any of the data tokens that stand there."""
    return _drawn_from(problem.labels, problem.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomCopying(_Tokens):
  """A random string again.

  Attributes:
    length: of the string.
    alphabet: different tokens.
  """

  name: ClassVar[str] = "copying_random"
  grid: ClassVar = {"length": (16, 32, 64, 128)}

  length: Range = (16, 64)
  alphabet: int = 64

  def __post_init__(self):
    super().__post_init__()
    self._check_range("length", 1, LONGEST)
    self._check_count("alphabet", 1, len(self.vocab.text))

  def problem(self, rng: np.random.Generator, space: int):
    """See `Task`."""
    n = draw_size(rng, self.length, space, self._size)
    if isinstance(n, NotEnough):
      return n
    labels = rng.choice(letters(self.vocab, self.alphabet), n)
    inputs = self.prefix(labels)
    return Problem(inputs, labels, {"length": len(inputs), "lookups": n})

  def _size(self, n: int) -> int:
    return len(self.prefix()) + 2 * n

  @functools.cached_property
  def smallest(self) -> int:
    """See `Task`."""
    return self._size(self.length[0])

  def guess(self, problem: Problem) -> Scores:
    """Any tokens."""
    return each_right(1 / self.alphabet, problem.facts["lookups"])

  def from_context(self, problem: Problem) -> Scores:
    """At each place any token of the string."""
    return _drawn_from(problem.labels, problem.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(_Tokens):
  """The token that followed the special one where it first stood.

      a b SEP c d e SEP        label: c

  Attributes:
    length: tokens beside the two special ones.
    alphabet: different tokens.
  """

  name: ClassVar[str] = "induction"
  grid: ClassVar = {"length": (32, 64, 128, 256)}

  length: Range = (32, 128)
  alphabet: int = 16

  def __post_init__(self):
    super().__post_init__()
    self._check_range("length", 1, LONGEST)
    self._check_count("alphabet", 1, len(self.vocab.text))

  def problem(self, rng: np.random.Generator, space: int):
    """See `Task`."""
    n = draw_size(rng, self.length, space, self._size)
    if isinstance(n, NotEnough):
      return n
    text = rng.choice(letters(self.vocab, self.alphabet), n)
    i = int(rng.integers(n))
    special = [self.vocab.sep]
    inputs = self.prefix(text[:i], special, text[i:], special)
    facts = {"length": len(inputs), "lookups": 1}
    return Problem(inputs, text[i : i + 1], facts)

  def _size(self, n: int) -> int:
    return len(self.prefix()) + n + 3

  @functools.cached_property
  def smallest(self) -> int:
    """See `Task`."""
    return self._size(self.length[0])

  def guess(self, problem: Problem) -> Scores:
    """Any token."""
    return each_right(1 / self.alphabet, 1)

  def from_context(self, problem: Problem) -> Scores:
    """Any token that stands there."""
    special = (*self._announcement, self.vocab.sep)
    text = problem.inputs[~np.isin(problem.inputs, special)]
    return _drawn_from(problem.labels, text)


def _drawn_from(labels: np.ndarray, tokens: np.ndarray) -> Scores:
  """What is expected of one of `tokens` drawn at random for each label."""
  shares = np.mean(labels[:, None] == tokens[None], axis=1)
  return dict(zip(TOKEN_METRICS, (float(shares.mean()), float(shares.prod()))))
