"""Packing: examples of all objectives side by side in rows of equal length.

A segment of n prefix and m target tokens takes n + m places (paper, appendix
A.3.1; `GEN` stands between prefix and labels and predicts the first label):

    tokens     inputs, GEN, labels[:-1]
    targets    0 * n, labels                 loss_weights  0 * n, 1 * m
    prefix     True * n, False * m           positions     0 .. n + m - 1
    segment_ids  1, 2, ... in each row; padding is 0 everywhere

Rows are filled in groups. A group is a function of its number, the seed and
the mixture: no state passes from one group to the next.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from birdie.mixture import draw
from birdie.objectives import Example, NotEnough
from birdie.presets import Configuration, smallest_size
from birdie.problems import Task
from common.errors import UserError
from common.rngs import np_rng

Pieces = Callable[[int], Sequence[np.ndarray]]

KEYS = {
  "tokens": np.int32,
  "targets": np.int32,
  "loss_weights": np.float32,
  "prefix": np.bool_,
  "segment_ids": np.int32,
  "positions": np.int32,
  "config_ids": np.int32,
}

# Windows that a group may read for each of its rows: rare long documents must
# not turn one draw into a search of the whole text.
_WINDOWS_PER_ROW = 64
# Draws that found no text, after which a group ends as it is.
_MAX_MISSES = 64
_BLOCK = 64
_NO_TEXT = np.zeros(0, np.int32)


class Rows:
  """Rows being filled.

  Args:
    rows: how many.
    length: places in each.
    gen: the token between prefix and labels.
  """

  def __init__(self, rows: int, length: int, *, gen: int):
    self.arrays = {
      name: np.zeros((rows, length), dtype) for name, dtype in KEYS.items()
    }
    self.arrays["config_ids"].fill(-1)
    self.free = [length] * rows
    self._length = length
    self._segments = [0] * rows
    self._gen = gen
    self._count = np.arange(length, dtype=np.int32)

  def place(self, row: int, example: Example, config_id: int) -> None:
    """Appends an example to a row, as the module's docstring lays out.

    Raises:
      ValueError: when it has no labels or does not fit.
    """
    n, m = len(example.inputs), len(example.labels)
    if m < 1:
      raise ValueError("an example needs at least one label")
    if n + m > self.free[row]:
      raise ValueError(f"{n} + {m} tokens do not fit {self.free[row]} places")
    start = self._length - self.free[row]
    middle, stop = start + n, start + n + m
    self._segments[row] += 1
    arrays = self.arrays
    tokens = arrays["tokens"][row]
    tokens[start:middle] = example.inputs
    tokens[middle] = self._gen
    tokens[middle + 1 : stop] = example.labels[:-1]
    arrays["targets"][row, middle:stop] = example.labels
    arrays["loss_weights"][row, middle:stop] = 1
    arrays["prefix"][row, start:middle] = True
    arrays["segment_ids"][row, start:stop] = self._segments[row]
    arrays["positions"][row, start:stop] = self._count[: n + m]
    arrays["config_ids"][row, start:stop] = config_id
    self.free[row] -= n + m

  def tightest(self, size: int) -> int | None:
    """The row with the least free space that still holds `size`."""
    fits = [(free, row) for row, free in enumerate(self.free) if free >= size]
    return min(fits)[1] if fits else None

  def roomiest(self) -> int:
    """The row with the most free space."""
    return max(range(len(self.free)), key=self.free.__getitem__)


class TextPool:
  """The text of one group: pieces of documents, in order.

  Windows are read when they are needed; what a sample leaves of a piece stays
  in its place for later samples of the group.

  Args:
    pieces: the pieces of window i.
    start: the group's first window.
    limit: how many windows it may read.
    shortest: pieces below this length serve nobody and are let go.
  """

  def __init__(self, pieces: Pieces, start: int, limit: int, shortest: int):
    self._pieces = pieces
    self._next, self._end = start, start + limit
    self._shortest = shortest
    self._pool: list[np.ndarray] = []

  def __getitem__(self, i: int) -> np.ndarray:
    return self._pool[i]

  def find(self, need: int, start: int = 0) -> int | None:
    """The first piece from `start` on with `need` tokens; None at the end."""
    i = start
    while True:
      while i < len(self._pool):
        if len(self._pool[i]) >= need:
          return i
        i += 1
      if self._next >= self._end:
        return None
      self._pool.extend(
        p for p in self._pieces(self._next) if len(p) >= self._shortest
      )
      self._next += 1

  def take(self, i: int, used: int) -> np.ndarray:
    """Removes the first `used` tokens of piece i; returns them."""
    piece = self._pool[i]
    if len(piece) - used >= self._shortest:
      self._pool[i] = piece[used:]
    else:
      del self._pool[i]
    return piece[:used]

  def give_back(self, piece: np.ndarray) -> None:
    """Puts text that was not used after all in front."""
    if len(piece) >= self._shortest:
      self._pool.insert(0, piece)


@dataclasses.dataclass
class PackStats:
  """What became of the draws; every array is int64 [K].

  Attributes:
    slots: places in all rows.
    drawn: draws from the mixture, before anything is placed.
    placed: of these, samples that are in a row.
    dropped: of these, samples that fitted no row or found no text; the text
      of the former serves others.
    filled: further samples, drawn to fill what space was left.
    prefix_tokens, target_tokens: n and m, summed over samples in rows.
    text_tokens: text that they consumed.
  """

  slots: int
  drawn: np.ndarray
  placed: np.ndarray
  dropped: np.ndarray
  filled: np.ndarray
  prefix_tokens: np.ndarray
  target_tokens: np.ndarray
  text_tokens: np.ndarray

  @classmethod
  def zeros(cls, num_configs: int) -> "PackStats":
    """Nothing drawn yet."""
    return cls(0, *(np.zeros(num_configs, np.int64) for _ in range(7)))

  def __add__(self, other: "PackStats") -> "PackStats":
    return PackStats(
      **{
        field.name: getattr(self, field.name) + getattr(other, field.name)
        for field in dataclasses.fields(self)
      }
    )

  @property
  def samples(self) -> np.ndarray:
    """int64 [K]: samples in rows."""
    return self.placed + self.filled

  @property
  def tokens(self) -> np.ndarray:
    """int64 [K]: places that their segments take."""
    return self.prefix_tokens + self.target_tokens

  @property
  def fill(self) -> float:
    """Share of places that hold a token."""
    return float(self.tokens.sum() / max(self.slots, 1))


@dataclasses.dataclass(frozen=True)
class Need:
  """The least that a configuration needs.

  Attributes:
    space: places of its shortest sample.
    text: tokens of text for it; 0 where it takes none.
  """

  space: int
  text: int


def smallest_need(configuration: Configuration) -> Need:
  """Asks the objective itself, with no space and with no text."""
  space = smallest_size(configuration)
  if isinstance(configuration.cfg, Task):
    return Need(space=space, text=0)
  no_text = configuration.make(_NO_TEXT, np_rng(0, "needs"), 1 << 20)
  if isinstance(no_text, Example):
    raise ValueError(f"{configuration.name} makes a sample of nothing")
  return Need(space=space, text=no_text.needed)


@dataclasses.dataclass(frozen=True)
class Packer:
  """Packs groups of rows; each is a pure function of its number.

  1. Configurations are drawn from the mixture, and their samples made as if
     each had a row to itself, until they would take up all places.
  2. What is too much is dropped at random. The rest are placed longest first,
     each in the tightest row that holds it. One that fits nowhere is made
     again, of the same text, for the roomiest row; where its configuration
     cannot be that short it is dropped.
  3. What is left free is filled with further draws among the configurations
     that can be short enough, first those that the group has too little of.

  So long configurations do not lose at the ends of rows, and only the fill
  departs from the mixture; `PackStats` counts it.

  Attributes:
    configurations: the K entries of the mixture.
    rows: G, rows in a group.
    length: T, places in a row.
    seed: the run's seed.
    stream: name of the random stream, so that evaluation has its own.
    min_fill: smaller gaps are left as padding: what fits them is always the
      same few configurations. T / 12 if None.
    max_windows: how many windows a group may read; 64 * G if None.
  """

  configurations: Sequence[Configuration]
  rows: int
  length: int
  seed: int
  stream: str = "train"
  min_fill: int | None = None
  max_windows: int | None = None

  @functools.cached_property
  def needs(self) -> list[Need]:
    """The least that each configuration needs."""
    return [smallest_need(c) for c in self.configurations]

  def pack_group(
    self, group: int, probs: np.ndarray, pieces: Pieces
  ) -> tuple[dict[str, np.ndarray], PackStats]:
    """Packs group number `group`.

    Args:
      group: its text starts at window `group * rows`.
      probs: [K] the mixture.
      pieces: window index -> pieces of documents; without end.

    Returns:
      Arrays [G, T] under `KEYS`, and what became of the draws.

    Raises:
      UserError: when none of the windows that it may read holds text long
        enough for any configuration that was drawn.
    """
    work = _Group(self, group, probs, pieces)
    homeless = work.place(work.draw_samples())
    work.squeeze(homeless)
    work.fill(self.length // 12 if self.min_fill is None else self.min_fill)
    if not work.stats.samples.any():
      if work.smallest_miss is None:
        raise UserError(
          f"no problem of the mixture's tasks fits a row of {self.length} "
          "places: choose smaller problems or a larger data.sequence_length"
        )
      raise UserError(
        f"no piece of text has {work.smallest_miss} tokens, the least that "
        "any configuration of the mixture needs: give longer documents or "
        "shorter objectives"
      )
    return work.rows.arrays, work.stats


class Seekable:
  """`np_rng(seed, name, *counters)` for many counters, much cheaper.

  One generator is moved to where the stream of the counters starts; what an
  earlier call returned is the same generator and no longer of use.
  """

  def __init__(self, seed: int, name: str):
    self._rng = np_rng(seed, name)
    self._state = self._rng.bit_generator.state

  def __call__(self, *counters: int) -> np.random.Generator:
    """The generator at the start of the counters' stream."""
    self._state["state"]["counter"][1 : 1 + len(counters)] = counters
    self._rng.bit_generator.state = self._state
    return self._rng


@dataclasses.dataclass
class _Sample:
  config: int
  example: Example
  text: np.ndarray

  @property
  def size(self) -> int:
    return len(self.example.inputs) + len(self.example.labels)


class _Group:
  """The three phases on shared rows, text and counts."""

  def __init__(
    self, packer: Packer, group: int, probs: np.ndarray, pieces: Pieces
  ):
    self.packer = packer
    self.probs = np.asarray(probs, np.float64)
    gen = packer.configurations[0].cfg.vocab.gen
    self.rows = Rows(packer.rows, packer.length, gen=gen)
    self.pool = TextPool(
      pieces,
      start=group * packer.rows,
      limit=packer.max_windows or _WINDOWS_PER_ROW * packer.rows,
      shortest=min((n.text for n in packer.needs if n.text), default=1),
    )
    self.stats = PackStats.zeros(len(packer.configurations))
    self.stats.slots = packer.rows * packer.length
    self.smallest_miss: int | None = None
    self._group = group
    self._choices = np_rng(packer.seed, f"{packer.stream}/choices", group)
    self._examples = Seekable(packer.seed, f"{packer.stream}/examples")
    self._made = 0

  def draw_samples(self) -> list[_Sample]:
    """Phase 1."""
    samples, size, misses = [], 0, 0
    # Draws are made in blocks; what is left of the last one is not used.
    block = iter(())
    while size < self.stats.slots and misses < _MAX_MISSES:
      config = next(block, None)
      if config is None:
        block = iter(draw(self.probs, self._choices.random(_BLOCK)).tolist())
        config = next(block)
      self.stats.drawn[config] += 1
      sample = self._make(config, self.packer.length)
      if sample is None:
        self.stats.dropped[config] += 1
        misses += 1
      else:
        samples.append(sample)
        size += sample.size
    return samples

  def place(self, samples: list[_Sample]) -> list[_Sample]:
    """Phase 2; returns the samples that fit nowhere.

    The draws are more than the rows hold. Chance says which of them go, for
    the last one tends to be long, and the ones that would find no row short.
    """
    size = sum(s.size for s in samples)
    order = self._choices.permutation(len(samples)).tolist()
    while size > self.stats.slots:
      sample = samples[order.pop()]
      self._drop(sample)
      size -= sample.size
    kept = [samples[i] for i in sorted(order)]
    homeless = []
    for sample in sorted(kept, key=lambda s: s.size, reverse=True):
      row = self.rows.tightest(sample.size)
      if row is None:
        homeless.append(sample)
      else:
        self._put(row, sample, self.stats.placed)
    return homeless

  def squeeze(self, homeless: list[_Sample]) -> None:
    """Phase 2, continued: makes them again, as short as the rows want."""
    for sample in homeless:
      row = self.rows.roomiest()
      made = self._run(sample.config, sample.text, self.rows.free[row])
      if isinstance(made, NotEnough):
        self._drop(sample)
      else:
        self.pool.give_back(sample.text[made.used :])
        sample = _Sample(sample.config, made, sample.text[: made.used])
        self._put(row, sample, self.stats.placed)

  def fill(self, min_fill: int) -> None:
    """Phase 3."""
    least = np.array([need.space for need in self.packer.needs])
    for row in range(self.packer.rows):
      fits = self.probs > 0
      while (space := self.rows.free[row]) >= max(min_fill, 1):
        fits &= least <= space
        if not fits.any():
          break
        config = int(draw(self._missing(fits), self._choices.random()))
        sample = self._make(config, space)
        if sample is None:
          fits[config] = False
        else:
          self._put(row, sample, self.stats.filled)

  def _missing(self, fits: np.ndarray) -> np.ndarray:
    """Weights of what the group has too little of, among what fits."""
    samples = self.stats.samples
    missing = self.probs * (samples.sum() + 1) - samples
    missing = np.where(fits, np.maximum(missing, 0), 0)
    return missing if missing.any() else np.where(fits, self.probs, 0)

  def _make(self, config: int, space: int) -> _Sample | None:
    """A sample of the pool's first text that serves; None if none does."""
    need = self.packer.needs[config].text
    if not need:
      made = self._run(config, _NO_TEXT, space)
      is_made = isinstance(made, Example)
      return _Sample(config, made, _NO_TEXT) if is_made else None
    i = self.pool.find(need)
    while i is not None:
      made = self._run(config, self.pool[i], space)
      if isinstance(made, Example):
        return _Sample(config, made, self.pool.take(i, made.used))
      if made.what == "space":
        return None
      # An objective may also refuse a text that is long enough, because of
      # what it says; then others of that length may serve.
      if made.needed > len(self.pool[i]) + 1:
        need = made.needed
      i = self.pool.find(need, i + 1)
    self.smallest_miss = min(self.smallest_miss or need, need)
    return None

  def _run(
    self, config: int, text: np.ndarray, space: int
  ) -> Example | NotEnough:
    self._made += 1
    rng = self._examples(self._group, self._made)
    return self.packer.configurations[config].make(text, rng, space)

  def _drop(self, sample: _Sample) -> None:
    self.stats.dropped[sample.config] += 1
    self.pool.give_back(sample.text)

  def _put(self, row: int, sample: _Sample, count: np.ndarray) -> None:
    config, example = sample.config, sample.example
    self.rows.place(row, example, config)
    count[config] += 1
    self.stats.prefix_tokens[config] += len(example.inputs)
    self.stats.target_tokens[config] += len(example.labels)
    self.stats.text_tokens[config] += example.used
