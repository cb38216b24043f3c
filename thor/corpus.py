"""The text of a run: pairs, vocabulary, ids, batches."""

import dataclasses
import math
import os
from typing import Any

import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from thor.buckets import (
  TOO_LONG,
  BucketedPairs,
  Buckets,
  EncodedPairs,
  bucket_pairs,
  make_buckets,
)
from thor.data import row_multiple
from thor.pairs import ParallelText
from thor.routing import Routing, expert_counts, hash_table
from thor.sources import load_parallel
from thor.vocabulary import KINDS, Vocabulary, vocabulary_for


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """A run's text.

  Attributes:
    parallel: sentence pairs.
    vocabulary: ids.
    train: the encoded training pairs.
    valid: those to be validated on.
  """

  parallel: ParallelText
  vocabulary: Vocabulary
  train: EncodedPairs
  valid: EncodedPairs

  def facts(self) -> dict[str, Any]:
    """What a run's report states of it."""
    return self.parallel.facts | self.vocabulary.facts()

  @property
  def languages(self) -> tuple[str, ...]:
    """Names of the numbers in `EncodedPairs.languages`."""
    return self.parallel.languages or ("",)

  @property
  def test_splits(self) -> tuple[str, ...]:
    """The names of the test sets; the validation set if there is none."""
    names = tuple(n for n in self.parallel.splits if n.startswith("test"))
    return names or ("valid",)

  def hash_table(self, routing: Routing, *, seed: int) -> np.ndarray | None:
    """Each word's expert where that is what routes, int32 [v]."""
    if routing.kind != "hash":
      return None
    size, start = self.vocabulary.size, self.vocabulary.eos
    counts = expert_counts([self.train.tokens], size, start)
    return hash_table(counts, routing.experts, kind=routing.table, seed=seed)


def make_corpus(config: Any, folder: str | os.PathLike[str]) -> Corpus:
  """Reads, and encodes what training needs.

  Args:
    config: see `configs/thor.py`.
    folder: the run's, which keeps the vocabulary.

  Raises:
    UserError: see `thor.sources.load_parallel`; also without a `valid` split.
  """
  parallel = load_parallel(config.data.source)
  if "valid" not in parallel.splits:
    raise UserError(
      "data.source.splits has no `valid`: name the pairs to validate on"
    )
  vocabulary = vocabulary_for(config.vocabulary, parallel, folder)
  train, valid = [
    encode_pairs(parallel.splits[split], vocabulary, parallel.languages)
    for split in ("train", "valid")
  ]
  return Corpus(parallel, vocabulary, train, valid)


def encode_pairs(
  pairs: Any, vocabulary: Vocabulary, languages: tuple[str, ...]
) -> EncodedPairs:
  """Sources with their targets' tags, and targets, as ids.

  Args:
    pairs: of `thor.pairs.Pair`.
    vocabulary: of both sides.
    languages: tags; () where pairs have none.
  """
  numbers = {language: i for i, language in enumerate(languages)}
  return EncodedPairs.of(
    (
      (vocabulary.encode(p.source, p.language), vocabulary.encode(p.target))
      for p in pairs
    ),
    [numbers.get(p.language, 0) for p in pairs],
  )


def check_text(config: Any) -> None:
  """Refuses settings of the text before any of it is read."""
  too_long, kind = config.data.too_long, config.vocabulary.kind
  if too_long not in TOO_LONG:
    raise UserError(
      f"data.too_long={too_long!r}{did_you_mean(str(too_long), TOO_LONG)}"
    )
  if kind not in KINDS:
    raise UserError(f"vocabulary.kind={kind!r}{did_you_mean(str(kind), KINDS)}")


def make_batch_shapes(
  config: Any, sharding: Any, *, rows: int = 1
) -> tuple[Buckets, Buckets]:
  """The shapes of batches of training and of validation.

  Args: as for `make_plans`.
  """
  cfg = config.data
  settings = {"lengths": cfg.lengths, "max_rows": cfg.max_rows or None}
  train = make_buckets(
    cfg.token_budget,
    multiple=_multiple(cfg, row_multiple(sharding, config.accum) * rows),
    **settings,
  )
  # Nothing is accumulated here; in all else the shapes are the same.
  valid = make_buckets(
    max(cfg.token_budget // config.accum, 1),
    multiple=_multiple(cfg, row_multiple(sharding) * rows),
    **settings,
  )
  return train, valid


def make_plans(
  config: Any, corpus: Corpus, sharding: Any, *, rows: int = 1
) -> tuple[BucketedPairs, BucketedPairs]:
  """The batches of training and of validation.

  Args:
    config: see `configs/thor.py`.
    corpus: the text.
    sharding: where batches go.
    rows: what has to divide the rows of every shard and micro-batch.

  Raises:
    UserError: see `thor.buckets`.
  """
  train, valid = make_batch_shapes(config, sharding, rows=rows)
  too_long = config.data.too_long
  return (
    bucket_pairs(corpus.train, train, too_long=too_long),
    bucket_pairs(corpus.valid, valid, too_long=too_long),
  )


def _multiple(cfg: Any, needed: int) -> int:
  """Rows that fit this mesh, and if possible other ones alike."""
  if cfg.row_multiple < 1:
    raise UserError(f"data.row_multiple={cfg.row_multiple} must be at least 1")
  return math.lcm(needed, cfg.row_multiple)
