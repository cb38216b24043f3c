"""Pairs of token ids, and the few static shapes that batches of them have.

# b rows, s source tokens, t target tokens, n pairs

A pair goes to the smallest bucket that both its sides fit into, a batch holds
pairs of one bucket, and a bucket's rows follow from a budget of tokens. So the
step compiles once a bucket, and little is computed on padding.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Sequence

import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from thor.vocabulary import EOS, PAD

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

LENGTHS = (16, 32, 64, 128, 256)
SIDES = ("source", "target")
TOO_LONG = {"error": "refused", "skip": "skipped", "cut": "cut"}


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPairs:
  """Pairs of token ids in flat arrays; picklable, for workers.

  Attributes:
    tokens: int32, pair after pair, its source and then its target.
    offsets: int64 [2 n + 1], where each side begins, and the end.
    languages: int32 [n], a number for each pair's language.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  languages: np.ndarray

  @classmethod
  def of(
    cls,
    examples: Iterable[tuple[Sequence[int] | np.ndarray, ...]],
    languages: Sequence[int] | np.ndarray | None = None,
  ) -> "EncodedPairs":
    """Collects pairs.

    Args:
      examples: (source, target) ids, each ending with `EOS`, without a token
        for the beginning. To translate, give `[EOS]` as target.
      languages: [n], a number for each pair; all 0 if None.

    Raises:
      UserError: for a side that is empty, does not end with `EOS` or holds
        `PAD`, and for another number of languages than of pairs.
    """
    data, lengths = bytearray(), [0]
    for source, target in examples:
      for side in (source, target):
        ids = np.asarray(side, np.int32)
        data += ids.tobytes()
        lengths.append(ids.size)
    tokens = np.frombuffer(data, np.int32)
    offsets = np.cumsum(lengths, dtype=np.int64)
    _check_sides(tokens, offsets)
    count = len(offsets) // 2
    numbers = np.zeros(count, np.int32)
    if languages is not None:
      numbers = np.asarray(languages, np.int32)
    if numbers.shape != (count,):
      raise UserError(
        f"{count} pairs, but languages of shape {list(numbers.shape)}: give "
        "one number a pair"
      )
    return cls(tokens, offsets, numbers)

  def __len__(self) -> int:
    return len(self.languages)

  def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and target ids of pair i, int32 [s] and [t]."""
    if not 0 <= i < len(self):
      raise IndexError(f"pair {i} of {len(self)}")
    first, middle, stop = self.offsets[2 * i : 2 * i + 3]
    return self.tokens[first:middle], self.tokens[middle:stop]

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each source and target, EOS included, int64 [n, 2]."""
    return np.diff(self.offsets).reshape(-1, 2)

  @property
  def num_tokens(self) -> int:
    """Tokens of both sides."""
    return len(self.tokens)


def _check_sides(tokens: np.ndarray, offsets: np.ndarray) -> None:
  def refuse(side: int, text: str) -> None:
    raise UserError(f"pair {side // 2}: the {SIDES[side % 2]} {text}")

  empty = np.flatnonzero(np.diff(offsets) == 0)
  if len(empty):
    refuse(int(empty[0]), f"is empty: end it with id {EOS} (EOS)")
  unended = np.flatnonzero(tokens[offsets[1:] - 1] != EOS)
  if len(unended):
    refuse(int(unended[0]), f"does not end with id {EOS} (EOS): append it")
  padding = np.flatnonzero(tokens == PAD)
  if len(padding):
    side = int(np.searchsorted(offsets, padding[0], side="right")) - 1
    refuse(side, f"holds id {PAD}, which stands for padding: remove it")


@dataclasses.dataclass(frozen=True)
class Bucket:
  """The shape of a batch.

  Attributes:
    source_length: s.
    target_length: t.
    rows: b, of the global batch.
  """

  source_length: int
  target_length: int
  rows: int


@dataclasses.dataclass(frozen=True)
class Buckets:
  """The shapes of batches, the shortest first; see `make_buckets`.

  Attributes:
    shapes: neither length decreases from one to the next.
  """

  shapes: tuple[Bucket, ...]

  def assign(self, lengths: np.ndarray) -> np.ndarray:
    """The smallest bucket for each pair.

    Args:
      lengths: int [n, 2], of sources and targets.

    Returns:
      int [n]; the number of buckets for a pair that fits into none.
    """
    limits = np.array([(b.source_length, b.target_length) for b in self.shapes])
    found = [np.searchsorted(limits[:, i], lengths[:, i]) for i in (0, 1)]
    return np.maximum(*found)


def make_buckets(
  token_budget: int,
  *,
  lengths: Sequence[int | Sequence[int]] = LENGTHS,
  multiple: int = 1,
  max_rows: int | None = None,
) -> Buckets:
  """Chooses how many rows batches of each length have.

      rows = floor(budget / max(s, t)), down to a multiple

  Args:
    token_budget: tokens of the longer side that a global batch may hold,
      padding included; fairseq's `--max-tokens` times its micro-batches and
      devices.
    lengths: the longest source and target of each bucket, rising: one number
      for both, or (source, target).
    multiple: what divides the rows; see `thor.data.row_multiple`.
    max_rows: no batch has more rows.

  Raises:
    UserError: for lengths that do not rise, or a budget too small for them.
  """
  limits = [
    (side, side) if isinstance(side, int) else tuple(side) for side in lengths
  ]
  rising = all(
    a[0] <= b[0] and a[1] <= b[1] and a != b
    for a, b in itertools.pairwise(limits)
  )
  if not limits or not rising or min(limits[0]) < 1:
    raise UserError(
      f"data.lengths={list(lengths)}: give lengths that rise, at least one and "
      "none below 1"
    )
  if max_rows is not None and max_rows < multiple:
    raise UserError(
      f"data.max_rows={max_rows}: rows come in multiples of {multiple} (shards "
      "of the mesh and micro-batches): give that or more"
    )
  shapes = []
  for source, target in limits:
    rows = token_budget // max(source, target)
    rows = rows if max_rows is None else min(rows, max_rows)
    rows = rows // multiple * multiple
    if rows < 1:
      raise UserError(
        f"data.token_budget={token_budget} is too small for the bucket of "
        f"{source} source and {target} target tokens: give at least "
        f"{multiple * max(source, target)}, {multiple} rows for shards of the "
        "mesh and micro-batches, or shorter data.lengths"
      )
    shapes.append(Bucket(source, target, rows))
  return Buckets(tuple(shapes))


@dataclasses.dataclass(frozen=True, eq=False)
class BucketedPairs:
  """Which pair belongs to which bucket; made by `bucket_pairs`.

  Attributes:
    pairs: all of them.
    buckets: the shapes of batches.
    members: for each bucket the numbers of its pairs, int64, rising.
    long_pairs: the numbers of the pairs that are too long for all buckets.
    too_long: what became of them, `skip` or `cut`.
  """

  pairs: EncodedPairs
  buckets: Buckets
  members: tuple[np.ndarray, ...]
  long_pairs: np.ndarray
  too_long: str

  @functools.cached_property
  def batch_counts(self) -> np.ndarray:
    """Batches an epoch of each bucket, int64."""
    shapes = zip(self.members, self.buckets.shapes)
    return np.array([-(-len(own) // shape.rows) for own, shape in shapes])

  @property
  def num_pairs(self) -> int:
    """Pairs an epoch."""
    return sum(map(len, self.members))

  @property
  def num_batches(self) -> int:
    """Batches an epoch."""
    return int(self.batch_counts.sum())

  def locate(self, number: int) -> tuple[int, int]:
    """A batch's bucket and its number there, if buckets come one by one."""
    ends = np.cumsum(self.batch_counts)
    bucket = int(np.searchsorted(ends, number, side="right"))
    return bucket, number - int(ends[bucket] - self.batch_counts[bucket])

  @property
  def num_tokens(self) -> tuple[int, int]:
    """Tokens an epoch, of sources and targets, without padding."""
    lengths, total = self.pairs.lengths, np.zeros(2, np.int64)
    for own, shape in zip(self.members, self.buckets.shapes):
      limits = np.array([[shape.source_length, shape.target_length]])
      total += np.minimum(lengths[own], limits).sum(axis=0)
    return int(total[0]), int(total[1])

  @property
  def fill_rate(self) -> tuple[float, float]:
    """The share of tokens that are no padding, of sources and targets."""
    places = np.zeros(2, np.int64)
    for count, shape in zip(self.batch_counts, self.buckets.shapes):
      limits = np.array([shape.source_length, shape.target_length])
      places += count * shape.rows * limits
    source, target = np.array(self.num_tokens) / places
    return float(source), float(target)

  def summary(self) -> str:
    """One line for the terminal."""
    used = int(np.count_nonzero(self.batch_counts))
    tokens, rates = self.num_tokens, self.fill_rate
    line = (
      f"{self.num_pairs:,} pairs in {used} of {len(self.members)} buckets, "
      f"{self.num_batches:,} batches an epoch; {tokens[0]:,} source and "
      f"{tokens[1]:,} target tokens fill {rates[0]:.1%} and {rates[1]:.1%}"
    )
    if not len(self.long_pairs):
      return line
    return (
      f"{line}; {len(self.long_pairs):,} too long: {TOO_LONG[self.too_long]}"
    )

  def batch(self, bucket: int, chosen: np.ndarray, rows: int) -> Batch:
    """The rows of a batch.

    Args:
      bucket: whose shape it has.
      chosen: the numbers of its pairs; empty rows follow them.
      rows: of the batch, or of the process's share of it.

    Returns:
      `source` int32 [rows, s], `target` int32 [rows, t], and `language` int32
      [rows], 0 in empty rows.
    """
    shape = self.buckets.shapes[bucket]
    language = np.zeros(rows, np.int32)
    language[: len(chosen)] = self.pairs.languages[chosen]
    return {
      "source": self._padded(0, chosen, rows, shape.source_length),
      "target": self._padded(1, chosen, rows, shape.target_length),
      "language": language,
    }

  def _padded(
    self, side: int, chosen: np.ndarray, rows: int, length: int
  ) -> np.ndarray:
    first = self.pairs.offsets[2 * chosen + side]
    lengths = self.pairs.offsets[2 * chosen + side + 1] - first
    place = np.arange(length)
    taken = place < lengths[:, None]
    made = np.full((rows, length), PAD, np.int32)
    tokens = self.pairs.tokens[(first[:, None] + place)[taken]]
    made[: len(chosen)][taken] = tokens
    made[np.flatnonzero(lengths > length), -1] = EOS
    return made


def bucket_pairs(
  pairs: EncodedPairs, buckets: Buckets, *, too_long: str = "error"
) -> BucketedPairs:
  """Puts every pair into the smallest bucket that both its sides fit into.

  Args:
    pairs: all of them.
    buckets: the shapes of batches.
    too_long: what becomes of a pair that fits into none: `error`; `skip`: it
      is left out; `cut`: what is too long of it is cut off, and EOS put at the
      end. A warning counts them and names the first.

  Raises:
    UserError: for an unknown `too_long`, a pair that is too long if that is an
      error, and if no pair is left.
  """
  if too_long not in TOO_LONG:
    raise UserError(
      f"data.too_long={too_long!r} is unknown{did_you_mean(too_long, TOO_LONG)}"
    )
  lengths = pairs.lengths
  last = len(buckets.shapes) - 1
  assigned = buckets.assign(lengths)
  over = np.flatnonzero(assigned > last)
  if len(over):
    text = _too_long_text(lengths, over, buckets.shapes[last])
    if too_long == "error":
      raise UserError(
        f"{text}: set data.too_long='skip' or 'cut', or longer data.lengths"
      )
    log.warning("%s: %s", text, TOO_LONG[too_long])
    if too_long == "cut":
      assigned = np.minimum(assigned, last)
  members = tuple(np.flatnonzero(assigned == j) for j in range(last + 1))
  if not any(map(len, members)):
    raise UserError(
      "there is no pair to make batches of: the data is empty, or all of it "
      "was skipped as too long"
    )
  return BucketedPairs(pairs, buckets, members, over, too_long)


def _too_long_text(lengths: np.ndarray, over: np.ndarray, most: Bucket) -> str:
  first = int(over[0])
  source, target = map(int, lengths[first])
  return (
    f"{len(over):,} of {len(lengths):,} pairs have more than "
    f"{most.source_length} source or {most.target_length} target tokens, the "
    f"first is pair {first} with {source} and {target}"
  )
