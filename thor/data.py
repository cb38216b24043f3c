"""Batches of pairs: for training without end, for evaluation once.

# b rows, s source tokens, t target tokens

Training batch k is a function of the seed and of k, whatever the number of
processes and workers, so the data position is that one number. As in fairseq,
an epoch visits every pair once: each bucket is shuffled and cut into batches,
and the batches of all buckets are shuffled among each other. What is missing
in the last batch of a bucket are empty rows, nothing but padding.

    pairs = EncodedPairs.of(examples)
    buckets = make_buckets(4096, multiple=row_multiple(sharding))
    plan = bucket_pairs(pairs, buckets)
    with train_loader(plan, seed=0, sharding=sharding) as batches:
      batch = next(batches)
"""

import dataclasses
import functools
import logging
from typing import Any

import numpy as np

from common.data.loader import Batches, FetchPlan, Loader, row_shares
from common.errors import UserError
from common.rngs import name_hash
from thor.buckets import EOS, PAD, Batch, BucketedPairs

log = logging.getLogger(__name__)


def shift_right(target: Any, eos_id: int = EOS, *, pad_id: int = PAD) -> Any:
  """The decoder's input: EOS, then the target without its last token.

  As in fairseq it is padded where the target is: the EOS at the target's end
  moves to the beginning.

  Args:
    target: int [..., t], padded on the right; NumPy or JAX.
    eos_id: the first token.
    pad_id: what the target is padded with.

  Returns:
    [..., t], of the same kind.
  """
  xp = target.__array_namespace__()
  first = xp.full_like(target[..., :1], eos_id)
  shifted = xp.concat([first, target[..., :-1]], axis=-1)
  return xp.where(target == pad_id, target, shifted)


def row_multiple(sharding: Any = None, accum: int = 1) -> int:
  """What has to divide the rows of every batch.

  Args:
    sharding: where batches go, such as `common.parallel.batch_sharding(mesh)`.
    accum: micro-batches of a step; each of them is divided among the shards.
  """
  return row_shares(sharding)[2] * accum


@dataclasses.dataclass(frozen=True, eq=False)
class TrainReader:
  """Makes this process's rows of training batch k; picklable, for workers.

  Attributes:
    plan: which pair belongs to which bucket.
    seed: of the order.
    process_index, process_count: this process brings share `process_index`.
  """

  plan: BucketedPairs
  seed: int
  process_index: int = 0
  process_count: int = 1

  def __call__(self, k: int, arg: None = None) -> Batch:
    """`source`, `target` and `language`; see `BucketedPairs.batch`."""
    del arg
    epoch = k // self.plan.num_batches
    bucket, number = self.plan.locate(self._batch_order[k])
    members = self.plan.members[bucket]
    rows = self.plan.buckets.shapes[bucket].rows
    share = rows // self.process_count
    first = number * rows + self.process_index * share
    places = range(first, min(first + share, len(members)))
    order = self._orders[bucket]
    shuffled = [order[epoch * len(members) + place] for place in places]
    chosen = members[np.array(shuffled, np.int64)]
    return self.plan.batch(bucket, chosen, share)

  @functools.cached_property
  def _batch_order(self) -> Any:
    """Which batch of its epoch batch k is, if buckets come one by one."""
    return _shuffled(self.plan.num_batches, f"batches/{self.seed}")

  @functools.cached_property
  def _orders(self) -> list[Any]:
    """For each bucket, the place among its members, epoch after epoch."""
    return [
      _shuffled(len(own), f"pairs/{self.seed}/{bucket}") if len(own) else None
      for bucket, own in enumerate(self.plan.members)
    ]

  def __getstate__(self) -> dict[str, Any]:
    # The orders are made again where they are needed.
    fields = {field.name for field in dataclasses.fields(self)}
    return {k: v for k, v in self.__dict__.items() if k in fields}


def _shuffled(count: int, name: str) -> Any:
  """0 .. count - 1 in a new order each epoch, with random access."""
  import grain

  return grain.MapDataset.range(count).shuffle(seed=name_hash(name)).repeat()


def train_loader(
  plan: BucketedPairs,
  *,
  seed: int,
  sharding: Any = None,
  start: int = 0,
  prefetch: int = 2,
  workers: int = 0,
) -> Loader:
  """Training batches, without end; `plan.num_batches` are an epoch.

  A batch is `{"source": int32 [b, s], "target": int32 [b, t], "language":
  int32 [b]}`, padded on the right with `PAD`, and of the shape of one of the
  buckets. The position is k: `get_state` and `set_state`. Close it, or use it
  as a context manager.

  Args:
    plan: the pairs; see `bucket_pairs`.
    seed: of the order.
    sharding: where batches go, such as `common.parallel.batch_sharding(mesh)`;
      NumPy arrays if None.
    start: the first batch.
    prefetch: batches made ahead.
    workers: processes that make batches; 0: one thread.

  Raises:
    UserError: for rows that do not divide among the devices.
  """
  index, count = _shares_of(plan, sharding)
  log.info("%s", plan.summary())
  return Loader(
    FetchPlan(TrainReader(plan, seed, index, count)),
    start=start,
    sharding=sharding,
    prefetch=prefetch,
    workers=workers,
  )


def _shares_of(plan: BucketedPairs, sharding: Any) -> tuple[int, int]:
  index, count, shards = row_shares(sharding)
  for shape in plan.buckets.shapes:
    if shape.rows % shards:
      raise UserError(
        f"{shape.rows} rows of {shape.source_length} source and "
        f"{shape.target_length} target tokens do not divide among the {shards} "
        "shards of the mesh: make_buckets(..., multiple=row_multiple(sharding))"
      )
  return index, count


@dataclasses.dataclass(frozen=True, eq=False)
class EvalReader:
  """Makes this process's rows of evaluation batch k; picklable, for workers.

  Attributes:
    plan: which pair belongs to which bucket.
    process_index, process_count: this process brings share `process_index`.
  """

  plan: BucketedPairs
  process_index: int = 0
  process_count: int = 1

  def __call__(self, k: int, arg: None = None) -> Batch:
    """A training batch's arrays and `index` int32 [rows], -1 in empty rows."""
    del arg
    bucket, number = self.plan.locate(k)
    rows = self.plan.buckets.shapes[bucket].rows
    share = rows // self.process_count
    first = number * rows + self.process_index * share
    chosen = self._by_length[bucket][first : first + share]
    index = np.full(share, -1, np.int32)
    index[: len(chosen)] = chosen
    return self.plan.batch(bucket, chosen, share) | {"index": index}

  @functools.cached_property
  def _by_length(self) -> list[np.ndarray]:
    """Each bucket's members, short sources first, then short targets."""
    lengths = self.plan.pairs.lengths
    return [
      own[np.lexsort((lengths[own, 1], lengths[own, 0]))]
      for own in self.plan.members
    ]


def eval_batches(
  plan: BucketedPairs,
  *,
  sharding: Any = None,
  prefetch: int = 2,
  workers: int = 0,
) -> Batches:
  """Evaluation batches, in the order of length.

  A batch is a training batch's arrays and `index`, int32 [b]: the number of
  the row's pair, by which outputs are put back in order, and -1 in empty rows.

  Args: as for `train_loader`.

  Raises:
    UserError: for rows that do not divide among the devices.
  """
  index, count = _shares_of(plan, sharding)
  reader = EvalReader(plan, index, count)
  return Batches(reader, plan.num_batches, sharding, prefetch, workers)
