"""The eight objectives: pure functions from text to (prefix, labels).

    fn(tokens, cfg, rng, space) -> Example(inputs, labels, used) | NotEnough

`tokens` is the text at hand, integers [n]; `space` the places left in a row.
The objective draws how much of the text it takes, within the length bucket of
`cfg`, the text and the space (an example takes len(inputs) + len(labels)
places); what it leaves is the caller's. All randomness comes from `rng`.

Sources: the paper's sections 3.1, A.2 and A.5 to A.7 (arXiv 2411.01030).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from birdie import corruption
from birdie.controls import ObjectiveConfig
from common.errors import UserError

# Draws of selective copying until each span stands alone in its delimiters.
MAX_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Example:
  """One training example.

  Attributes:
    inputs: int32 [n], the prefix: read in both directions, no loss.
    labels: int32 [m], m >= 1: generated, all the loss.
    used: tokens of the text that were consumed.
  """

  inputs: np.ndarray
  labels: np.ndarray
  used: int


@dataclasses.dataclass(frozen=True)
class NotEnough:
  """The objective cannot be made of what is there.

  Attributes:
    needed: the least that would do.
    what: "space" (places) or "text" (tokens).
  """

  needed: int
  what: str


Result = Example | NotEnough
Objective = Callable[
  [np.ndarray, ObjectiveConfig, np.random.Generator, int], Result
]


# -- lengths -------------------------------------------------------------------


def _bounds(
  available: int,
  cfg: ObjectiveConfig,
  space: int,
  size: Callable[[int], int],
  least: int = 1,
) -> tuple[int, int] | NotEnough:
  """Text lengths n in the bucket with size(n) <= space; `size` never falls."""
  low = max(cfg.min_length, least)
  if cfg.max_length is not None and cfg.max_length < low:
    raise UserError(
      f"objective: max_length={cfg.max_length} must be at least {low}, the "
      "text that its other settings need"
    )
  if size(low) > space:
    return NotEnough(size(low), "space")
  if available < low:
    return NotEnough(low, "text")
  high = min(available, cfg.max_length or available)
  if size(high) > space:
    high = _largest(low, high, lambda n: size(n) <= space)
  return low, high


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
  """The largest n in [low, high) that holds; `low` does, `high` does not."""
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if holds(middle) else (low, middle)
  return low


def _draw_length(
  available: int,
  cfg: ObjectiveConfig,
  rng: np.random.Generator,
  space: int,
  size: Callable[[int], int],
  least: int = 1,
) -> int | NotEnough:
  """Draws a text length between its `_bounds`."""
  bounds = _bounds(available, cfg, space, size, least)
  if isinstance(bounds, NotEnough):
    return bounds
  if cfg.max_length is None:
    return bounds[1]
  return int(rng.integers(bounds[0], bounds[1] + 1))


def _announce(
  inputs: np.ndarray, cfg: ObjectiveConfig, rng: np.random.Generator
) -> np.ndarray:
  """The prefix with its paradigm tokens (paper, A.7)."""
  if not cfg.paradigm:
    return inputs
  paradigm = np.asarray(cfg.paradigm, np.int32)
  append = rng.random() < cfg.paradigm_append_prob
  return np.concatenate([inputs, paradigm] if append else [paradigm, inputs])


# -- span corruption -----------------------------------------------------------


def _noise_counts(n: int, cfg: ObjectiveConfig) -> tuple[int, int]:
  """Masked tokens and spans, with one sentinel kept for the end."""
  noise, spans = corruption.noise_counts(n, cfg.corruption_rate, cfg.mean_span)
  return noise, min(spans, len(cfg.vocab.sentinels) - 1)


def _mask(
  text: np.ndarray, cfg: ObjectiveConfig, rng: np.random.Generator
) -> corruption.Masked:
  noise, spans = _noise_counts(len(text), cfg)
  starts, lengths = corruption.random_spans(len(text), noise, spans, rng)
  sentinels = np.asarray(cfg.vocab.sentinels[:spans], np.int32)
  return corruption.mask_spans(text, starts, lengths, sentinels)


def infilling(tokens, cfg, rng, space) -> Result:
  """Masked spans are the labels, each with its sentinel (paper, A.2)."""
  before = cfg.sentinel_position == "before"
  final = int(cfg.final_sentinel and before)

  def size(n: int) -> int:
    return n + 2 * _noise_counts(n, cfg)[1] + len(cfg.paradigm) + final

  n = _draw_length(len(tokens), cfg, rng, space, size, least=2)
  if isinstance(n, NotEnough):
    return n
  made = _mask(tokens[:n].astype(np.int32), cfg, rng)
  sentinels = cfg.vocab.sentinels[: len(made.lengths) + final]
  labels = corruption.span_labels(
    made, np.asarray(sentinels, np.int32), before=before
  )
  return Example(_announce(made.inputs, cfg, rng), labels, n)


def _autoencode(tokens, cfg, rng, space, *, shuffle: bool) -> Result:
  def size(n: int) -> int:
    noise, spans = _noise_counts(n, cfg)
    return len(cfg.paradigm) + 2 * n - noise + spans

  n = _draw_length(len(tokens), cfg, rng, space, size, least=2)
  if isinstance(n, NotEnough):
    return n
  text = tokens[:n].astype(np.int32)
  made = _mask(text, cfg, rng)
  inputs = made.inputs
  if shuffle:
    # A sentinel stays at the head of the fragment that follows it.
    starts = corruption.fragment_starts(made.heads)
    order = rng.permutation(len(starts))
    inputs = corruption.reorder_fragments(inputs, starts, order)
  return Example(_announce(inputs, cfg, rng), text, n)


def autoencoding(tokens, cfg, rng, space) -> Result:
  """The text from a corrupted copy (paper, A.2)."""
  return _autoencode(tokens, cfg, rng, space, shuffle=False)


def autoencoding_with_deshuffling(tokens, cfg, rng, space) -> Result:
  """As `autoencoding`, the fragments between spans in random order."""
  return _autoencode(tokens, cfg, rng, space, shuffle=True)


# -- the others ----------------------------------------------------------------


def next_token_prediction(tokens, cfg, rng, space) -> Result:
  """All text is label; the prefix holds at most the paradigm."""
  n = _draw_length(
    len(tokens), cfg, rng, space, lambda n: n + len(cfg.paradigm)
  )
  if isinstance(n, NotEnough):
    return n
  inputs = np.asarray(cfg.paradigm, np.int32)
  return Example(inputs, tokens[:n].astype(np.int32), n)


def prefix_language_modeling(tokens, cfg, rng, space) -> Result:
  """The text is cut in two: the first part is the prefix."""
  n = _draw_length(
    len(tokens),
    cfg,
    rng,
    space,
    lambda n: n + len(cfg.paradigm),
    least=2 * cfg.min_side,
  )
  if isinstance(n, NotEnough):
    return n
  share = cfg.prefix_frac + cfg.jitter * rng.uniform(-1, 1)
  split = min(max(round(share * n), cfg.min_side), n - cfg.min_side)
  text = tokens[:n].astype(np.int32)
  return Example(_announce(text[:split], cfg, rng), text[split:], n)


def copying(tokens, cfg, rng, space) -> Result:
  """The prefix again."""
  n = _draw_length(
    len(tokens), cfg, rng, space, lambda n: 2 * n + len(cfg.paradigm)
  )
  if isinstance(n, NotEnough):
    return n
  text = tokens[:n].astype(np.int32)
  return Example(_announce(text, cfg, rng), text, n)


def deshuffling(tokens, cfg, rng, space) -> Result:
  """The text from a copy with floor(p n) positions permuted."""
  n = _draw_length(
    len(tokens), cfg, rng, space, lambda n: 2 * n + len(cfg.paradigm), least=2
  )
  if isinstance(n, NotEnough):
    return n
  text = tokens[:n].astype(np.int32)
  if cfg.level == "token":
    inputs = corruption.permute_some(text, cfg.shuffle_rate, rng)
  else:
    # UTF-8: every byte 10xxxxxx belongs to the character before it.
    continues = ((text - cfg.vocab.byte_offset) & 0xC0) == 0x80
    starts = corruption.fragment_starts(np.flatnonzero(~continues))
    order = np.arange(len(starts))
    order = corruption.permute_some(order, cfg.shuffle_rate, rng)
    inputs = corruption.reorder_fragments(text, starts, order)
  return Example(_announce(inputs, cfg, rng), text, n)


# -- selective copying ---------------------------------------------------------


def selective_copying(tokens, cfg, rng, space) -> Result:
  """The spans of a context that stand between given delimiters (A.5).

  Spans with their delimiters do not overlap, and queries come in random order.
  Where a pair of delimiters also encloses another stretch that could be a span,
  everything is drawn again, each time with longer delimiters at the least; a
  text in which that never succeeds counts as not enough text.
  """
  least = cfg.num_spans * (cfg.min_span + 2 * cfg.min_delimiter)
  # Paradigm; CONTEXT; per span START, END, and SEP or DONE.
  overhead = len(cfg.paradigm) + 1 + 3 * cfg.num_spans
  bounds = _bounds(
    len(tokens), cfg, space, lambda n: n + overhead + least, least
  )
  if isinstance(bounds, NotEnough):
    return bounds
  for attempt in range(MAX_ATTEMPTS):
    lift = attempt / (MAX_ATTEMPTS - 1)
    n, edges = _draw_edges(len(tokens), cfg, rng, space - overhead, lift)
    text = tokens[:n].astype(np.int32)
    if all(_stands_alone(text, edge, cfg) for edge in edges.tolist()):
      edges = edges[rng.permutation(cfg.num_spans)]
      inputs, labels = ask(text, edges, cfg)
      return Example(_announce(inputs, cfg, rng), labels, n)
  return NotEnough(len(tokens) + 1, "text")


def _draw_edges(
  available: int,
  cfg: ObjectiveConfig,
  rng: np.random.Generator,
  room: int,
  lift: float,
) -> tuple[int, np.ndarray]:
  """Draws a context's length and where spans and delimiters stand in it.

  Args:
    available: tokens of text.
    cfg: the controls.
    rng: randomness.
    room: places for context, delimiters and spans; the least fits.
    lift: see `_draw_widths`.

  Returns:
    n, and int64 [num_spans, 4] as `ask` takes it.
  """
  most = min(available, cfg.max_length or available)
  # w tokens are asked for beside a context of at least max(w, min_length).
  fits = room // 2 if room >= 2 * cfg.min_length else room - cfg.min_length
  widths = _draw_widths(cfg, rng, lift, min(most, fits))
  asked = int(widths.sum())
  low, high = max(cfg.min_length, asked), min(most, room - asked)
  n = high if cfg.max_length is None else int(rng.integers(low, high + 1))
  places = corruption.place_disjoint(n, widths.sum(0), rng)
  return n, np.concatenate([places[None], widths]).cumsum(0).T


def _draw_widths(
  cfg: ObjectiveConfig, rng: np.random.Generator, lift: float, limit: int
) -> np.ndarray:
  """Lengths of start delimiters, spans and end delimiters, [3, num_spans].

  Args:
    cfg: the controls.
    rng: randomness.
    lift: moves the shortest delimiter, from 0 (as configured) to 1 (longest).
    limit: of the sum; what is drawn beyond the least shrinks to keep it.
  """
  low, high = cfg.min_delimiter, cfg.max_delimiter
  lifted = low + int(lift * (high - low))
  shape = (3, cfg.num_spans)
  widths = rng.integers(lifted, high + 1, shape)
  widths[1] = rng.integers(cfg.min_span, cfg.max_span + 1, cfg.num_spans)
  if widths.sum() <= limit:
    return widths
  least = np.full(shape, low)
  least[1] = cfg.min_span
  more = widths - least
  return least + more * (limit - int(least.sum())) // int(more.sum())


def _stands_alone(
  text: np.ndarray, edge: list[int], cfg: ObjectiveConfig
) -> bool:
  start, span, stop, end = edge
  return corruption.stands_alone(
    text,
    text[start:span],
    text[stop:end],
    shortest=cfg.min_span,
    longest=cfg.max_span,
  )


def ask(
  text: np.ndarray, edges: np.ndarray, cfg: ObjectiveConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Queries, context and answers of selective copying.

  Args:
    text: int32 [n], the context.
    edges: [num_spans, 4], where a start delimiter begins, its span, the end
      delimiter, and where that ends.
    cfg: the controls.

  Returns:
    inputs without paradigm, and labels; int32.
  """
  vocab = cfg.vocab
  queries: list[np.ndarray | list[int]] = []
  answers: list[np.ndarray | list[int]] = []
  for start, span, stop, end in edges.tolist():
    queries += [[vocab.start], text[start:span], [vocab.end], text[stop:end]]
    answers += [text[span:stop], [vocab.sep]]
  answers[-1] = [vocab.done]
  context: list[np.ndarray | list[int]] = [[vocab.context], text]
  asks_first = cfg.order == "query_context"
  parts = queries + context if asks_first else context + queries
  inputs = np.concatenate(parts, dtype=np.int32)
  return inputs, np.concatenate(answers, dtype=np.int32)


OBJECTIVES: dict[str, Objective] = {
  fn.__name__: fn
  for fn in (
    next_token_prediction,
    prefix_language_modeling,
    infilling,
    autoencoding,
    autoencoding_with_deshuffling,
    copying,
    deshuffling,
    selective_copying,
  )
}
