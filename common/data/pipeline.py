"""Supervised batches: examples in a shuffled order, row by row.

    data = batches(source, batch_size=128, seed=0, transform=decode)

Row r of global batch k is example `k * B + r` of the shuffled epochs, whatever
the number of processes, threads or workers. The position is k.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from common.data.loader import Loader
from common.errors import UserError
from common.rngs import name_hash, np_rng

Example = Mapping[str, Any]
Transform = Callable[[Any, np.random.Generator], Example]


@dataclasses.dataclass(frozen=True)
class BatchReader:
  """Makes this process's rows of batch k; picklable if its parts are.

  Attributes:
    source: examples with random access.
    batch_size: B, rows of the global batch.
    seed: of the order and of transforms.
    process_index, process_count: this process brings share `process_index`.
    transform: (example, rng) -> dict; see `batches`.
    shuffle: a new order each epoch; the source's own order if False.
    num_threads: threads that make the rows of a batch; 0: none.
  """

  source: Sequence[Any]
  batch_size: int
  seed: int
  process_index: int = 0
  process_count: int = 1
  transform: Transform | None = None
  shuffle: bool = True
  num_threads: int = 0

  def __post_init__(self):
    if self.batch_size < 1 or self.batch_size % self.process_count:
      raise UserError(
        f"a batch of {self.batch_size} is not divisible by "
        f"{self.process_count} processes: choose a multiple"
      )
    if not 0 <= self.process_index < self.process_count:
      raise ValueError(f"process {self.process_index} of {self.process_count}")
    if not len(self.source):
      raise UserError("the data set is empty")

  def __call__(self, k: int, arg: None = None) -> dict[str, np.ndarray]:
    """Arrays [B / process_count, ...] of batch k."""
    del arg
    share = self.batch_size // self.process_count
    first = k * self.batch_size + self.process_index * share
    rows = list(self._map(self._example, range(first, first + share)))
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

  def _example(self, i: int) -> Example:
    """Example i, counted over all epochs."""
    example = self.source[self._order[i]]
    if self.transform is None:
      return example
    return self.transform(example, np_rng(self.seed, "transform", i))

  @functools.cached_property
  def _order(self) -> Any:
    """The index into the source of example i."""
    import grain

    order = grain.MapDataset.range(len(self.source))
    if self.shuffle:
      order = order.shuffle(seed=name_hash(f"examples/{self.seed}"))
    return order.repeat()

  @functools.cached_property
  def _map(self) -> Callable:
    if not self.num_threads:
      return map
    return futures.ThreadPoolExecutor(self.num_threads).map

  def __getstate__(self) -> dict[str, Any]:
    # Order and threads are made again where they are needed.
    fields = {field.name for field in dataclasses.fields(self)}
    return {k: v for k, v in self.__dict__.items() if k in fields}


def batches(
  source: Sequence[Any],
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  transform: Transform | None = None,
  shuffle: bool = True,
  start: int = 0,
  num_threads: int = 0,
  sharding: Any = None,
  prefetch: int = 2,
  workers: int = 0,
) -> Loader:
  """Batches of a data set, shuffled globally each epoch, without end.

  Args:
    source: examples with `len` and random access: dicts of arrays of equal
      shapes, or anything that `transform` makes such dicts from.
    batch_size: B, rows of the global batch; a batch may span two epochs.
    seed: of the order and of transforms.
    process_index: which of the equal shares of rows this process brings.
    process_count: how many shares there are; `common.data.loader.process_share`
      gives both for a mesh.
    transform: (example, rng) -> dict; `rng` is a function of the seed and the
      example's number, so augmentation is the same on every resume.
    shuffle: a new order each epoch; the source's own order if False.
    start: the first batch.
    num_threads: threads that make the rows of a batch. Worth it only where
      `transform` releases the interpreter, as image decoders do.
    sharding: where batches go; NumPy arrays if None.
    prefetch: batches made ahead.
    workers: processes that make batches; 0: one thread.

  Raises:
    UserError: for an empty source, or a batch that does not divide.
  """
  reader = BatchReader(
    source=source,
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
    transform=transform,
    shuffle=shuffle,
    num_threads=num_threads,
  )
  return Loader(
    reader,
    start=start,
    sharding=sharding,
    prefetch=prefetch,
    workers=workers,
  )
