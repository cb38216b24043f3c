"""From text to packed batches: the corpus, and training data from it.

Everything after the token store is random access: batch k is a function of
the seed, of k and of the mixture in force at k. The data position is that one
number, so a run goes on from it with another number of processes or workers.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from birdie.mixture import Mixture, MixtureSchedule, normalized
from birdie.packing import KEYS, Need, Packer, PackStats
from birdie.presets import (
  Configuration,
  make_mixture,
  preset,
  with_shares,
)
from birdie.vocab import Vocabulary, byte_vocabulary, extend
from common.data.loader import FetchPlan, Loader, process_share
from common.data.sources import text_source
from common.data.text import TokenStore, build_splits, shuffled_windows
from common.data.tokenizers import ByteTokenizer, Tokenizer, make_tokenizer
from common.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

# With `mixture_change="schedule"` a change takes effect this many batches
# later. A constant, so that the run does not depend on how many workers and
# prefetched batches there are.
SCHEDULE_DELAY = 16


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Text as tokens, split by a hash of each document.

  Attributes:
    tokenizer: made the tokens.
    vocab: special tokens around them.
    train: what training reads.
    validation: held-out text.
  """

  tokenizer: Tokenizer
  vocab: Vocabulary
  train: TokenStore
  validation: TokenStore

  def facts(self) -> dict[str, Any]:
    """Sizes and a hash of the text, to be kept with a run."""
    stores = {"train": self.train, "validation": self.validation}
    prints = [self.tokenizer.fingerprint]
    prints += [store.fingerprint for store in stores.values()]
    text_hash = hashlib.blake2b("/".join(prints).encode(), digest_size=16)
    facts: dict[str, Any] = {"text_hash": text_hash.hexdigest()}
    for name, store in stores.items():
      facts[f"{name}_tokens"] = store.num_tokens
      facts[f"{name}_documents"] = store.num_documents
    return facts

  def summary(self) -> str:
    """The sizes in words."""
    return ", ".join(
      f"{store.num_tokens:,} tokens of {store.num_documents:,} documents {what}"
      for store, what in (
        (self.train, "to train on"), (self.validation, "held out"),
      )
    )  # fmt: skip


def make_corpus(config: Any, tokenizer: Tokenizer | None = None) -> Corpus:
  """Reads and tokenises the text that `config` names; documents end in EOS.

  Args:
    config: see `configs/birdie.py`.
    tokenizer: what `config.tokenizer` describes; made from it if None.

  Raises:
    UserError: for a source or tokenizer that is missing, without text, or with
      so few documents that none is left for training or validation.
  """
  tokenizer = tokenizer or make_tokenizer(config.tokenizer)
  vocab = make_vocabulary(tokenizer)
  stores = build_splits(
    text_source(config.data.source),
    tokenizer,
    cache_dir=config.data.cache_dir,
    end=vocab.eos,
  )
  found = sum(store.num_documents for store in stores.values())
  for split in ("train", "validation"):
    if not stores[split].num_documents:
      raise UserError(
        f"no document of {found} falls into the {split} split: give more "
        "(data.source.separator divides text files)"
      )
  return Corpus(tokenizer, vocab, stores["train"], stores["validation"])


def make_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
  """Special tokens that fit a tokenizer's ids."""
  if isinstance(tokenizer, ByteTokenizer):
    return byte_vocabulary()
  return extend(tokenizer.vocab_size)


def make_configurations(
  config: Any,
  vocab: Vocabulary,
  encode: Callable[[str], Iterable[int]] | None = None,
) -> tuple[Configuration, ...]:
  """The entries of `config.mixture`; their weights are the first mixture.

  Args:
    config: see `configs/birdie.py`.
    vocab: special tokens.
    encode: tokenizes paradigms that the user's own entries give as strings.

  Raises:
    UserError: for unknown names, or rows too short for all of them.
  """
  length = config.data.sequence_length
  if config.mixture.entries:
    made = make_mixture(
      config.mixture.entries, vocab, sequence_length=length, encode=encode
    )
  else:
    made = preset(
      config.mixture.preset,
      vocab,
      sequence_length=length,
      grid=config.mixture.grid,
      paradigm_append_prob=config.mixture.paradigm_append_prob,
    )
  probs = made.probs
  if config.mixture.shares:
    probs = with_shares(config.mixture.shares, made.configurations)
  return tuple(
    dataclasses.replace(entry, weight=float(p))
    for entry, p in zip(made.configurations, probs)
  )


@dataclasses.dataclass(frozen=True)
class BatchMaker:
  """Makes this process's rows of batch k; picklable, for workers.

  Attributes:
    store: the text.
    packer: configurations, G, T and the seed.
    rows: B, rows of the global batch; a multiple of G.
    start, stop: this process's rows; multiples of G.
  """

  store: TokenStore
  packer: Packer
  rows: int
  start: int
  stop: int

  def __post_init__(self):
    group = self.packer.rows
    for name, rows in (
      ("batch of", self.rows),
      ("process's batch of", self.stop - self.start),
    ):
      if group < 1 or rows % group:
        raise UserError(
          f"the {name} {rows} rows is not divisible by data.pack_rows={group}: "
          "choose a divisor"
        )

  def __call__(self, k: int, probs: np.ndarray) -> Batch:
    """Batch k under the mixture `probs` [K]: arrays [stop - start, T]."""
    return self.with_stats(k, probs)[0]

  def with_stats(self, k: int, probs: np.ndarray) -> tuple[Batch, PackStats]:
    """As a call, and what became of the draws."""
    probs = self.possible(probs)
    size = self.packer.rows
    first = k * (self.rows // size)
    packed = [
      self.packer.pack_group(first + j, probs, self._pieces)
      for j in range(self.start // size, self.stop // size)
    ]
    arrays = {
      key: np.concatenate([group[key] for group, _ in packed]) for key in KEYS
    }
    return arrays, sum((s for _, s in packed[1:]), packed[0][1])

  def possible(self, probs: np.ndarray) -> np.ndarray:
    """The mixture without configurations that this text is too short for.

    Raises:
      UserError: when none is left; it names the smallest need.
    """
    feasible = self._feasible
    kept = np.where(feasible, probs, 0)
    if not kept.any():
      needs = self.packer.needs
      wanted = [need for need, p in zip(needs, probs) if p > 0]
      raise UserError(too_short(wanted, self.longest, self.packer.length))
    return kept

  @property
  def longest(self) -> int:
    """Tokens in the longest piece that a window can hold."""
    lengths = np.diff(self.store.offsets)
    return min(int(lengths.max(initial=0)), self.packer.length)

  @functools.cached_property
  def _feasible(self) -> np.ndarray:
    feasible = np.array(
      [
        need.text <= self.longest and need.space <= self.packer.length
        for need in self.packer.needs
      ]
    )
    names = [
      c.name for c, ok in zip(self.packer.configurations, feasible) if not ok
    ]
    if names and feasible.any():
      log.warning(
        "never drawn, because they need more than pieces of %d tokens or rows "
        "of %d: %s",
        self.longest,
        self.packer.length,
        ", ".join(names),
      )
    return feasible

  @functools.cached_property
  def _windows(self) -> Any:
    return shuffled_windows(self.store, self.packer.length, self.packer.seed)

  def _pieces(self, i: int) -> Sequence[np.ndarray]:
    return self._windows[i]

  def __getstate__(self) -> dict[str, Any]:
    # The windows are built again where they are needed.
    return {k: v for k, v in self.__dict__.items() if k != "_windows"}


def too_short(needs: Sequence[Need], longest: int, length: int) -> str:
  """The line that says how long text and rows would have to be."""
  text, space = min(n.text for n in needs), min(n.space for n in needs)
  return (
    "no configuration of the mixture can be made: the shortest needs "
    f"{text} tokens of text and {space} places, the longest piece of text has "
    f"{longest} tokens and a row {length}: give longer documents, a larger "
    "data.sequence_length or shorter objectives"
  )


def process_rows(rows: int, sharding: Any = None) -> tuple[int, int]:
  """Which rows of a batch this process has to bring.

  Args:
    rows: B.
    sharding: of arrays [B, T]. Processes take equal slices in order if None.

  Raises:
    UserError: when rows do not divide among the processes.
  """
  if sharding is None:
    import jax

    index, count = jax.process_index(), jax.process_count()
  else:
    index, count = process_share(sharding)
  if rows % count:
    raise UserError(
      f"a batch of {rows} rows does not divide into {count} equal shares, one "
      "for each process: choose a multiple"
    )
  share = rows // count
  return index * share, (index + 1) * share


@dataclasses.dataclass(frozen=True)
class _Tagged:
  """Batches that say which version of the mixture they were drawn from."""

  maker: BatchMaker

  def __call__(self, k: int, mixture: Mixture) -> Batch:
    batch = self.maker(k, mixture.probs)
    rows = len(batch["tokens"])
    return batch | {"mixture_version": np.full(rows, mixture.version, np.int32)}


class TrainData:
  """Batches on the devices, drawn from a mixture that may change.

  Iterating never ends. Beside the packed arrays a batch has
  `mixture_version`, int32 [B]. Use as a context manager, or close it.

  Args:
    maker: makes the batches.
    probs: [K] the mixture of batch 0.
    sharding: where batches go.
    mixture_change: `regenerate`: a new mixture is in force from the very next
      batch, and what was prefetched is made again; `schedule`: from
      `SCHEDULE_DELAY` batches later, and nothing is thrown away.
    prefetch: batches made ahead.
    workers: processes that make them; 0: one thread.

  Raises:
    UserError: for a bad mixture, too short a text, or unknown settings.
  """

  def __init__(
    self,
    maker: BatchMaker,
    probs: np.ndarray,
    *,
    sharding: Any = None,
    mixture_change: str = "regenerate",
    prefetch: int = 2,
    workers: int = 0,
  ):
    if mixture_change not in ("regenerate", "schedule"):
      raise UserError(
        f"data.mixture_change={mixture_change!r}: choose 'regenerate' or "
        "'schedule'"
      )
    self._regenerate = mixture_change == "regenerate"
    if not self._regenerate and prefetch + workers >= SCHEDULE_DELAY:
      raise UserError(
        f"data.prefetch + data.workers is {prefetch + workers}: with "
        "data.mixture_change='schedule' at most "
        f"{SCHEDULE_DELAY - 1} batches may be under way"
      )
    self._schedule = MixtureSchedule(probs)
    maker.possible(self._schedule.latest.probs)
    self._loader = Loader(
      FetchPlan(_Tagged(maker), self._schedule_at),
      sharding=sharding,
      prefetch=prefetch,
      workers=workers,
    )

  def _schedule_at(self, step: int) -> Mixture:
    return self._schedule.at(step)

  def __iter__(self) -> "TrainData":
    return self

  def __next__(self) -> Any:
    return next(self._loader)

  @property
  def step(self) -> int:
    """Index of the batch that comes next."""
    return self._loader.get_state()["step"]

  @property
  def mixture(self) -> MixtureSchedule:
    """Which mixture is in force at which batch."""
    return self._schedule

  def change_mixture(self, probs: np.ndarray) -> int:
    """Puts a new mixture in force; returns its first batch.

    Raises:
      UserError: when `probs` [K] is no distribution.
    """
    step = self.step
    first = step if self._regenerate else step + SCHEDULE_DELAY
    self._schedule.change(probs, first, announced_at=step)
    if self._regenerate:
      self._loader.refresh()
    return first

  def get_state(self) -> dict[str, Any]:
    """The data position, JSON-able."""
    step = self.step
    return {"step": step, "mixture": self._schedule.get_state(step)}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position that `get_state` returned."""
    self._schedule.set_state(state["mixture"])
    self._loader.set_state({"step": state["step"]})

  def close(self) -> None:
    """Stops workers; may be called twice."""
    self._loader.close()

  def __enter__(self) -> "TrainData":
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()


def make_batch_maker(
  config: Any,
  corpus: Corpus,
  configurations: Sequence[Configuration],
  *,
  sharding: Any = None,
) -> BatchMaker:
  """Makes training's batches as `configs/birdie.py` describes them."""
  rows = config.data.batch_size
  start, stop = process_rows(rows, sharding)
  packer = Packer(
    tuple(configurations),
    rows=config.data.pack_rows,
    length=config.data.sequence_length,
    seed=config.seed,
  )
  return BatchMaker(corpus.train, packer, rows, start, stop)


def train_loader(
  config: Any,
  corpus: Corpus,
  configurations: Sequence[Configuration],
  *,
  sharding: Any = None,
) -> TrainData:
  """Training data as `configs/birdie.py` describes it.

  Args:
    config: the run's configuration.
    corpus: the text.
    configurations: the K entries of the mixture, with their weights.
    sharding: where batches go.

  Raises:
    UserError: for rows that do not divide, or text that is too short.
  """
  data = config.data
  return TrainData(
    make_batch_maker(config, corpus, configurations, sharding=sharding),
    first_mixture(configurations),
    sharding=sharding,
    mixture_change=data.mixture_change,
    prefetch=data.prefetch,
    workers=data.workers,
  )


def first_mixture(configurations: Sequence[Configuration]) -> np.ndarray:
  """The configurations' weights as probabilities, float32 [K]."""
  return normalized([c.weight for c in configurations])
