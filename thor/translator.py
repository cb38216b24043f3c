"""Lines of text in, lines of text out.

# b sentences, s source time

Lines are read in windows. Each is sorted by length and cut into batches of few
static shapes, the longest first, so that only its last batch has empty rows.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from thor.buckets import LENGTHS
from thor.data import row_multiple
from thor.decode import Search, beam_search, sample
from thor.dispatch import Prepared
from thor.vocabulary import Vocabulary

log = logging.getLogger(__name__)

TOO_LONG = ("error", "split", "cut")
_WINDOW = 8  # batches that a window's tokens would fill


class Translation(NamedTuple):
  """A line's translation.

  Attributes:
    text: the best.
    n_best: as many as were asked for, from the best on, with their scores.
      Where there are fewer the rest is empty, with a score of -inf.
  """

  text: str
  n_best: list[tuple[str, float]]


_EMPTY = ("", 0.0)  # what a blank line is translated to
_NONE = ("", -math.inf)


class _Part(NamedTuple):
  """What of a line is translated at once: all of it, or a piece."""

  line: int
  ids: np.ndarray


class Translator:
  """Translates lines with a model.

  Args:
    prepared: a model and how it is used; see `thor.dispatch.prepare`.
    vocabulary: its.
    search: how to search; `n_best` translations of each line.
    lengths: of sources, tag and end included, that batches are padded to.
    token_budget: of a batch, padding included.
    sharding: over whose devices the rows are cut, such as
      `common.parallel.batch_sharding(mesh)`; None: one device.
    too_long: what becomes of a line that is longer than the last of `lengths`:
      `error`; `split`: pieces of it, cut at blanks, are translated one by one;
      `cut`: what is too long is left out.
    sampling: what `thor.decode.sample` takes besides, `seed` among it: draws
      instead of searching.
    window: tokens that are read before any is translated; None: 8 batches.

  Attributes:
    counts: lines that were `split` or `cut`, pieces of text that were
      `unknown` to the vocabulary.

  Raises:
    UserError: for settings without a meaning.
  """

  def __init__(
    self,
    prepared: Prepared,
    vocabulary: Vocabulary,
    search: Search,
    *,
    lengths: Sequence[int] = LENGTHS,
    token_budget: int = 4096,
    sharding: Any = None,
    too_long: str = "error",
    sampling: Mapping[str, Any] | None = None,
    window: int | None = None,
  ):
    if too_long not in TOO_LONG:
      raise UserError(
        f"too_long={too_long!r}{did_you_mean(str(too_long), TOO_LONG)}"
      )
    if token_budget < 1:
      raise UserError(f"token_budget={token_budget} must be at least 1")
    if not lengths or min(lengths) < 3:
      raise UserError(
        f"lengths={list(lengths)}: give at least one, and none below 3: a tag, "
        "a token and the end"
      )
    if prepared.settings.vocab_size < vocabulary.size:
      raise UserError(
        f"a vocabulary of {vocabulary.size} ids does not go with a model of "
        f"{prepared.settings.vocab_size}"
      )
    self._multiple = row_multiple(sharding)
    if sharding is not None:
      same = jax.sharding.NamedSharding(sharding.mesh, jax.P())
      prepared = jax.device_put(prepared, same)
    self._prepared = prepared
    self._vocabulary = vocabulary
    self._search = search
    self._lengths = sorted(set(lengths))
    self._budget = token_budget
    self._sharding = sharding
    self._too_long = too_long
    self._sampling = sampling
    self._window = _WINDOW * token_budget if window is None else window
    self.counts: Counter[str] = Counter()

  def translate(
    self,
    texts: Iterable[str],
    languages: str | Iterable[str] = "",
    *,
    is_ready: Callable[[], bool] = lambda: True,
  ) -> Iterator[Translation]:
    """Translates lines, in their order.

    Args:
      texts: lines; one without text stays so.
      languages: what to translate into, for all lines or for each; "" where
        the vocabulary has no tags.
      is_ready: whether the next line need not be waited for; where it must be,
        what was read so far is translated before.

    Yields:
      One for each line, those of a window together.

    Raises:
      UserError: names the line: too long, of an unknown language, no Unicode;
        also if there are fewer languages than lines, or more.
    """
    window: list[list[_Part]] = []
    tokens, line = 0, 0
    for line, text, language in _with_languages(texts, languages):
      window.append(self._parts(line, text, language))
      tokens += sum(len(part.ids) for part in window[-1])
      if tokens >= self._window or not is_ready():
        yield from self._translated(window)
        window, tokens = [], 0
    yield from self._translated(window)
    if self.counts:
      shown = ", ".join(f"{n:,} {what}" for what, n in self.counts.items())
      log.warning("of %d lines: %s", line, shown)

  def _parts(self, line: int, text: str, language: str) -> list[_Part]:
    """A line's ids; none of a blank one."""
    if not text.strip():
      return []
    most = self._lengths[-1]
    ids = self._ids(line, text, language)
    self._count("unknown", int(np.sum(ids == self._vocabulary.unk)), line)
    if len(ids) <= most:
      return [_Part(line, ids)]
    if self._too_long == "error":
      raise UserError(
        f"line {line} has {len(ids)} tokens, and the most is {most}: shorten "
        "it, or choose too_long=split or cut"
      )
    self._count(self._too_long, 1, line)
    if self._too_long == "cut":
      return [_Part(line, np.append(ids[: most - 1], ids[-1]))]
    return [
      _Part(line, piece) for piece in self._pieces(line, text, language, ids)
    ]

  def _ids(self, line: int, text: str, language: str) -> np.ndarray:
    if self._vocabulary.languages and not language:
      known = ", ".join(self._vocabulary.languages)
      raise UserError(f"line {line} has no language: choose one of {known}")
    try:
      return self._vocabulary.encode(text, language)
    except UserError as error:
      raise UserError(f"line {line}: {error}") from error

  def _pieces(
    self, line: int, text: str, language: str, ids: np.ndarray
  ) -> Iterator[np.ndarray]:
    """Halves of a text, at the blank nearest to the middle, until they fit."""
    if len(ids) <= self._lengths[-1]:
      yield ids
      return
    middle = len(text) // 2
    blanks = [i for i in range(1, len(text) - 1) if text[i].isspace()]
    place = min(blanks, key=lambda i: abs(i - middle), default=middle)
    if not place:
      raise UserError(
        f"line {line}: one character alone has {len(ids)} tokens, and the most "
        f"is {self._lengths[-1]}"
      )
    for half in (text[:place].strip(), text[place:].strip()):
      if half:
        own = self._ids(line, half, language)
        yield from self._pieces(line, half, language, own)

  def _count(self, what: str, number: int, line: int) -> None:
    if number and not self.counts[what]:
      text = {
        "unknown": "holds text that the vocabulary does not know",
        "split": "is too long and translated in pieces",
        "cut": "is too long, and its end is left out",
      }[what]
      log.warning("line %d %s (said once, counted)", line, text)
    if number:
      self.counts[what] += number

  def _translated(self, window: list[list[_Part]]) -> Iterator[Translation]:
    """Translates a window's lines, in their order."""
    parts = [part for own in window for part in own]
    order = sorted(range(len(parts)), key=lambda i: -len(parts[i].ids))
    made: dict[int, list[tuple[str, float]]] = {}
    while order:
      length = next(n for n in self._lengths if n >= len(parts[order[0]].ids))
      rows = self._rows(length, len(order))
      chosen, order = order[:rows], order[rows:]
      batch = np.full((rows, length), self._prepared.settings.pad_id, np.int32)
      for row, i in zip(batch, chosen):
        row[: len(parts[i].ids)] = parts[i].ids
      made.update(zip(chosen, self._decoded(batch, len(chosen))))
    place = 0
    for own in window:
      found = [made[place + i] for i in range(len(own))]
      place += len(own)
      n_best = _joined(found) if found else self._padded([_EMPTY])
      if n_best[0] == _NONE:
        raise UserError(
          f"line {own[0].line} has no translation: the model's probabilities "
          "are no numbers; take another checkpoint"
        )
      yield Translation(n_best[0][0], n_best)

  def _rows(self, length: int, left: int) -> int:
    """Rows of a batch: as the budget says; for fewer lines a power of 4 times
    what the devices need, so that few shapes compile.
    """
    most = max(self._budget // length // self._multiple, 1) * self._multiple
    rows = self._multiple
    while rows < min(left, most):
      rows *= 4
    return min(rows, most)

  def _decoded(
    self, batch: np.ndarray, count: int
  ) -> list[list[tuple[str, float]]]:
    """Texts and scores of a batch's first rows."""
    source = batch
    if self._sharding is not None:
      source = jax.device_put(batch, self._sharding)
    if self._sampling is None:
      found = beam_search(self._prepared, source, self._search)
    else:
      found = sample(
        self._prepared, source, self._search,
        n=self._search.n_best, **self._sampling,
      )  # fmt: skip
    tokens, scores, lengths = map(
      np.asarray, (found.tokens, found.scores, found.lengths)
    )
    return [
      self._padded(
        [
          (self._vocabulary.decode(tokens[i, j]), float(scores[i, j]))
          for j in range(tokens.shape[1])
          if lengths[i, j]
        ]
      )
      for i in range(count)
    ]

  def _padded(self, found: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """As many as were asked for."""
    return found + [_NONE] * (self._search.n_best - len(found))


def _with_languages(
  texts: Iterable[str], languages: str | Iterable[str]
) -> Iterator[tuple[int, str, str]]:
  """(number, line, language)."""
  if isinstance(languages, str):
    for i, text in enumerate(texts, 1):
      yield i, text, languages
    return
  try:
    for i, (text, own) in enumerate(zip(texts, languages, strict=True), 1):
      yield i, text, own
  except ValueError as error:
    if "zip()" not in str(error):
      raise
    raise UserError(
      "as many languages as lines are needed: give one for each"
    ) from error


def _joined(parts: list[list[tuple[str, float]]]) -> list[tuple[str, float]]:
  """Of a line in pieces the translations of each rank, with mean scores; none
  where a piece has none.
  """
  return [
    _NONE
    if _NONE in rank
    else (
      " ".join(text for text, _ in rank),
      sum(score for _, score in rank) / len(rank),
    )
    for rank in zip(*parts, strict=True)
  ]
