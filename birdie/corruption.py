"""What the objectives do to text, on plain arrays.

Exact counts of span corruption follow T5 (arXiv 1910.10683): n tokens at rate
r and mean span mu are cut into `noise_counts(n, r, mu)` masked tokens and
spans, and the text alternates between kept and masked stretches.
"""

import dataclasses

import numpy as np


def noise_counts(n: int, rate: float, mean_span: float) -> tuple[int, int]:
  """How many of n tokens are masked, in how many spans.

  T5's rule, with ties rounded to even; a rate of 1 masks all, in one span.
  Neither count ever falls as n grows.
  """
  if rate >= 1:
    return n, 1
  noise = min(max(round(n * rate), 1), n - 1)
  spans = min(max(round(noise / mean_span), 1), n - noise)
  return noise, spans


def random_parts(
  total: int, count: int, rng: np.random.Generator
) -> np.ndarray:
  """`total` as a sum of `count` positive parts, all sums equally likely.

  Returns:
    int64 [count].
  """
  edges = np.empty(count + 1, np.int64)
  edges[0], edges[-1] = -1, total - 1
  cuts = rng.choice(total - 1, count - 1, replace=False, shuffle=False)
  cuts.sort()
  edges[1:-1] = cuts
  return edges[1:] - edges[:-1]


def random_spans(
  n: int, noise: int, spans: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Where masked spans begin and how long they are.

  Kept and masked stretches alternate and the first one is kept, so the last
  one is masked.

  Returns:
    starts and lengths, int64 [spans].
  """
  lengths = random_parts(noise, spans, rng)
  if noise == n:
    return np.zeros(1, np.int64), lengths
  gaps = random_parts(n - noise, spans, rng)
  return gaps.cumsum() + lengths.cumsum() - lengths, lengths


@dataclasses.dataclass(frozen=True)
class Masked:
  """A text with masked spans.

  Attributes:
    inputs: int32, the text, each span replaced by its sentinel.
    heads: where the sentinels stand in `inputs`.
    masked: int32, the tokens of all spans, one span after the other.
    lengths: of the spans.
  """

  inputs: np.ndarray
  heads: np.ndarray
  masked: np.ndarray
  lengths: np.ndarray


def mask_spans(
  text: np.ndarray,
  starts: np.ndarray,
  lengths: np.ndarray,
  sentinels: np.ndarray,
) -> Masked:
  """Replaces each span of a text by its sentinel.

  Args:
    text: int32 [n].
    starts: [k], where the spans begin, in rising order; disjoint.
    lengths: [k], each positive.
    sentinels: int32 [k].
  """
  before = lengths.cumsum() - lengths
  places = (starts - before).repeat(lengths)
  places += np.arange(len(places))
  marked = text.copy()
  marked[starts] = sentinels
  keep = np.ones(len(text), bool)
  keep[places] = False
  keep[starts] = True
  heads = starts - before + np.arange(len(starts))
  return Masked(marked[keep], heads, text[places], lengths)


def span_labels(
  made: Masked, sentinels: np.ndarray, *, before: bool
) -> np.ndarray:
  """The masked spans, each with its sentinel.

  Args:
    made: spans that are masked, k of them.
    sentinels: int32 [k], or [k + 1] where one more ends the labels.
    before: whether a sentinel stands before its span, or behind it.
  """
  k = len(made.lengths)
  labels = np.empty(len(made.masked) + len(sentinels), np.int32)
  index = np.arange(k)
  ends = made.lengths.cumsum()
  heads = index + (ends - made.lengths if before else ends)
  is_text = np.ones(len(labels), bool)
  is_text[heads] = False
  is_text[len(made.masked) + k :] = False
  labels[is_text] = made.masked
  labels[heads] = sentinels[:k]
  labels[len(made.masked) + k :] = sentinels[k:]
  return labels


def fragment_starts(heads: np.ndarray) -> np.ndarray:
  """Where the fragments that `heads` cut begin; no fragment is empty."""
  return heads if len(heads) and heads[0] == 0 else np.append(0, heads)


def reorder_fragments(
  values: np.ndarray, starts: np.ndarray, order: np.ndarray
) -> np.ndarray:
  """Fragments of an array in another order.

  Args:
    values: [n].
    starts: [f], where the fragments begin; the first is 0.
    order: [f], which fragment comes first, second, ...
  """
  lengths = np.append(starts[1:], len(values)) - starts
  lengths = lengths[order]
  index = (starts[order] - lengths.cumsum() + lengths).repeat(lengths)
  index += np.arange(len(values))
  return values[index]


def permute_some(
  values: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
  """Permutes floor(share * n) values among themselves; the rest stay."""
  places = rng.choice(len(values), int(share * len(values)), replace=False)
  permuted = values.copy()
  permuted[np.sort(places)] = values[places]
  return permuted


def place_disjoint(
  n: int, widths: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Where stretches of these widths begin among n places, in random gaps."""
  slack = n - int(widths.sum())
  gaps = np.sort(rng.integers(0, slack + 1, len(widths)))
  return gaps + widths.cumsum() - widths


def stands_alone(
  text: np.ndarray,
  start: np.ndarray,
  end: np.ndarray,
  *,
  shortest: int,
  longest: int,
) -> bool:
  """Whether one span alone stands between two delimiters.

  The text holds one such span at least. Spans count whose length is between
  `shortest` and `longest`, both included.
  """
  places = (text[: len(text) - len(start)] == start[0]).nonzero()[0]
  begins = _narrow(text, places, start)
  gaps = np.arange(shortest, longest + 1)
  stops = (begins[:, None] + (len(start) + gaps)).ravel()
  stops = stops[stops <= len(text) - len(end)]
  return len(_narrow(text, stops, end)) == 1


def _narrow(
  text: np.ndarray, places: np.ndarray, pattern: np.ndarray
) -> np.ndarray:
  """The places where the pattern stands, if it stands at one at least."""
  for i, token in enumerate(pattern):
    # What is left is the one place that was known before.
    if len(places) == 1:
      break
    places = places[text[places + i] == token]
  return places
