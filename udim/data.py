"""Batches of domains: for training in blocks, for evaluation with weights.

Training batch k holds n images of each source domain, drawn with replacement as
DomainBed draws them. It is a function of the seed and of k, whatever the number
of processes, workers or threads, so the data position is that one number.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.data.loader import Batches, FetchPlan, Loader, row_shares
from common.errors import UserError
from common.rngs import np_rng
from udim.augment import Transform
from udim.domains import Domain

Batch = dict[str, np.ndarray]


def train_sharding(mesh: Any) -> Any:
  """Where training batches go: [S, n, ...] with n over data and fsdp."""
  import jax

  from common.parallel import batch_sharding

  rows = batch_sharding(mesh).spec[0]
  return jax.sharding.NamedSharding(mesh, jax.P(None, rows))


def train_loader(
  domains: Sequence[Domain],
  *,
  rows: int,
  seed: int,
  transform: Transform,
  sharding: Any = None,
  start: int = 0,
  prefetch: int = 2,
  workers: int = 0,
  threads: int = 0,
) -> Loader:
  """Domain-blocked training batches, without end.

  A batch is `{"image": float32 [S, n, H, W, C], "label": int32 [S, n]}`. The
  position is k: `get_state` and `set_state`. Close it, or use it as a context
  manager.

  Args:
    domains: the S source domains.
    rows: n, images of each domain in a batch.
    seed: of draws and augmentation.
    transform: makes network inputs.
    sharding: where batches go, such as `train_sharding(mesh)`; NumPy arrays
      if None.
    start: the first batch.
    prefetch: batches made ahead.
    workers: processes that make batches; 0: one thread.
    threads: grain's, that decode and augment the images of a batch, in each
      worker. Worth it for image files, whose decoders release the interpreter.

  Raises:
    UserError: for no domain, or n that does not divide among the devices.
  """
  if not domains:
    raise UserError("there is no source domain to train on: name one")
  index, count, shards = row_shares(sharding, 1)
  if rows < 1 or rows % shards:
    raise UserError(
      f"{rows} images of each domain in a batch do not divide among the "
      f"{shards} shards of the mesh: choose a multiple"
    )
  share = rows // count
  reader = TrainReader(
    transform=transform,
    threads=threads,
    domains=tuple(domains),
    rows=rows,
    seed=seed,
    start=index * share,
    stop=(index + 1) * share,
  )
  return Loader(
    FetchPlan(reader),
    start=start,
    sharding=sharding,
    prefetch=prefetch,
    workers=workers,
  )


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Reads images in grain's threads; picklable, for workers.

  Attributes:
    transform: makes network inputs.
    threads: that decode the images of a batch; 0: none.
  """

  transform: Transform
  threads: int

  def _map(self, fn: Callable, places: Sequence[Any]) -> list[Any]:
    """`fn` of each, in their order."""
    if not self.threads:
      return list(map(fn, places))
    import grain

    options = grain.ReadOptions(
      num_threads=self.threads, prefetch_buffer_size=2 * self.threads
    )
    dataset = grain.MapDataset.source(places).map(fn)
    return list(dataset.to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class TrainReader(_Reader):
  """Makes training batch k.

  Attributes:
    domains: S source domains.
    rows: n, images of each domain in a batch.
    seed: of draws and augmentation.
    start, stop: this process's share of the n images. Elsewhere its batch is
      zero: the array has the global shape, and nobody reads more than a share.
  """

  domains: tuple[Domain, ...]
  rows: int
  seed: int
  start: int
  stop: int

  def __call__(self, k: int, arg: None = None) -> Batch:
    """`image` float32 [S, n, H, W, C] and `label` int32 [S, n]."""
    del arg
    keys = [
      np_rng(self.seed, "train/keys", k, s).integers(
        len(domain), size=self.rows
      )
      for s, domain in enumerate(self.domains)
    ]
    own = [drawn[self.start : self.stop] for drawn in keys]
    read = self._read_arrays(own)
    images, labels = self._read_each(k, own) if read is None else read
    return {"image": self._place(images), "label": self._place(labels)}

  def _read_arrays(
    self, keys: list[np.ndarray]
  ) -> tuple[np.ndarray, np.ndarray] | None:
    """All rows at once, where nothing is drawn and arrays hold them."""
    if self.transform.augment != "none":
      return None
    images, labels = [], []
    for domain, drawn in zip(self.domains, keys):
      arrays = domain.arrays(drawn)
      if arrays is None:
        return None
      images.append(self.transform.evaluate_all(arrays[0]))
      labels.append(arrays[1])
    return _stack(images), np.asarray(labels, np.int32)

  def _read_each(
    self, k: int, keys: list[np.ndarray]
  ) -> tuple[np.ndarray, np.ndarray]:
    places = [
      (s, self.start + i, int(key))
      for s, drawn in enumerate(keys)
      for i, key in enumerate(drawn)
    ]
    rows = self._map(functools.partial(self._row, k), places)
    images = _stack([image for image, _ in rows])
    shape = (len(keys), len(keys[0]))
    labels = np.asarray([label for _, label in rows], np.int32)
    return images.reshape(*shape, *images.shape[1:]), labels.reshape(shape)

  def _row(self, k: int, place: tuple[int, int, int]) -> tuple[Any, int]:
    s, row, key = place
    example = self.domains[s][key]
    # Every place of a batch draws from a stream of its own.
    rng = np_rng(self.seed, "train/augment", k, s, row)
    return self.transform.train(example["image"], rng), example["label"]

  def _place(self, own: np.ndarray) -> np.ndarray:
    """[S, stop - start, ...] at its place in [S, n, ...]."""
    if own.shape[1] == self.rows:
      return own
    rows = np.zeros((own.shape[0], self.rows, *own.shape[2:]), own.dtype)
    rows[:, self.start : self.stop] = own
    return rows


def _stack(images: Sequence[np.ndarray]) -> np.ndarray:
  shapes = sorted({image.shape for image in images})
  if len(shapes) > 1:
    raise UserError(
      f"images of shapes {list(shapes[0])} and {list(shapes[-1])} make no "
      "batch: set data.image_size to bring them to one size"
    )
  return np.stack(images)


@dataclasses.dataclass(frozen=True)
class EvalReader(_Reader):
  """Makes evaluation batch k.

  Attributes:
    domain: what is evaluated.
    rows: B, rows of the global batch.
    start, stop: this process's rows of it.
  """

  domain: Domain
  rows: int
  start: int
  stop: int

  def __call__(self, k: int, arg: None = None) -> Batch:
    """`image` float32 [b, H, W, C], `label` int32 and `weight` float32 [b].

    b = stop - start. The weight is 1, and 0 for what follows the last image.
    """
    del arg
    first = k * self.rows + self.start
    keys = np.arange(first, first + self.stop - self.start)
    keys = keys[keys < len(self.domain)]
    count = self.stop - self.start
    images = np.zeros((count, *self.image_shape), np.float32)
    labels = np.zeros(count, np.int32)
    if len(keys):
      images[: len(keys)], labels[: len(keys)] = self._read(keys)
    weights = np.arange(count) < len(keys)
    return {
      "image": images, "label": labels, "weight": weights.astype(np.float32)
    }  # fmt: skip

  def _read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    arrays = self.domain.arrays(keys)
    if arrays is not None:
      return self.transform.evaluate_all(arrays[0]), arrays[1]
    rows = self._map(self._row, keys.tolist())
    labels = np.asarray([label for _, label in rows], np.int32)
    return _stack([image for image, _ in rows]), labels

  def _row(self, key: int) -> tuple[np.ndarray, int]:
    example = self.domain[key]
    return self.transform.evaluate(example["image"]), example["label"]

  @functools.cached_property
  def image_shape(self) -> tuple[int, ...]:
    """Of one image; a process may have nothing but padding."""
    return self._row(0)[0].shape

  @property
  def batch_bytes(self) -> int:
    """Of a batch's images, as this process brings them."""
    return 4 * (self.stop - self.start) * math.prod(self.image_shape)


def eval_batches(
  domain: Domain,
  *,
  batch_size: int,
  transform: Transform,
  sharding: Any = None,
  prefetch: int = 2,
  workers: int = 0,
  threads: int = 0,
) -> Batches:
  """Evaluation batches of a domain or a part of one.

  A batch is `{"image": float32 [B, H, W, C], "label": int32 [B], "weight":
  float32 [B]}`.

  Args:
    domain: what is evaluated.
    batch_size: B; rounded up to what divides among the devices.
    transform: makes network inputs; nothing is augmented.
    sharding: where batches go, such as `common.parallel.batch_sharding(mesh)`;
      NumPy arrays if None.
    prefetch: batches made ahead.
    workers: processes that make batches; 0: one thread.
    threads: grain's, that decode the images of a batch, in each worker.

  Raises:
    UserError: for a batch size below 1, or an empty part.
  """
  if batch_size < 1:
    raise UserError(f"evaluation.batch_size={batch_size}: give 1 or more")
  if not len(domain):
    raise UserError(
      f"this part of domain {domain.name!r} holds no image to evaluate: choose "
      "another data.holdout"
    )
  index, count, shards = row_shares(sharding)
  rows = -(-batch_size // shards) * shards
  share = rows // count
  reader = EvalReader(
    transform=transform,
    threads=threads,
    domain=domain,
    rows=rows,
    start=index * share,
    stop=(index + 1) * share,
  )
  count = -(-len(domain) // rows)
  return Batches(reader, count, sharding, prefetch, workers)
