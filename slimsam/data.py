"""Batches of images, with prompts and masks where there are some.

# b images, p prompts of each, g patches along a side

Row r of batch k is a function of (seed, k, r), whatever the number of processes
or workers: the data position is k.
"""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np

from common.data.loader import Batches, Loader, process_share, row_shares
from common.data.pipeline import batches
from common.errors import UserError
from slimsam import rle
from slimsam.preprocess import preprocess, resized_shape
from slimsam.sources import Annotation, Sample, Source

Example = dict[str, Any]
_JITTER, _MOST = 0.1, 20.0  # of boxes: standard deviation by side, and pixels


def rows_sharding(mesh: Any) -> Any:
  """Where batches go: rows over data and fsdp."""
  import jax

  from common.parallel import batch_sharding

  rows = batch_sharding(mesh).spec[0]
  return jax.sharding.NamedSharding(mesh, jax.P(rows))


class Numbered(Sequence):
  """A source whose samples come with their numbers."""

  def __init__(self, source: Source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> tuple[int, Sample]:  # type: ignore[override]
    return i, self._source[i]


@dataclasses.dataclass(frozen=True)
class ImageExample:
  """An image as the encoder takes it.

  Attributes:
    size: side of the padded image.
  """

  size: int

  def __call__(
    self, numbered: tuple[int, Sample], rng: np.random.Generator
  ) -> Example:
    """`images` float32 [size size 3], `ids` int32, the sample's number."""
    del rng
    number, sample = numbered
    return {
      "images": preprocess(sample.image, self.size),
      "ids": np.int32(number),
    }


@dataclasses.dataclass(frozen=True)
class Targets(Sequence):
  """Image embeddings in ArrayRecord files, by the numbers of their images.

  It may be sent to other processes, and threads may share it.

  Attributes:
    files: in their order.
    per_file: embeddings in each but the last.
    length: embeddings in all.
    shape: of one, (g, g, c).
    dtype: its name.
    remedy: what helps where a file is damaged.
  """

  files: tuple[str, ...]
  per_file: int
  length: int
  shape: tuple[int, ...]
  dtype: str
  remedy: str

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
    """[g g c].

    Raises:
      UserError: for a file that is damaged.
    """
    import jax.numpy as jnp

    if not 0 <= i < self.length:
      raise IndexError(f"embedding {i} of {self.length}")
    file, place = divmod(i, self.per_file)
    try:
      record = self._readers[file][place]
      found = np.frombuffer(record, jnp.dtype(self.dtype))
      return found.reshape(self.shape)
    except (RuntimeError, ValueError) as error:
      raise self._damaged(self.files[file]) from error

  def check(self) -> None:
    """Raises `UserError` for a file that is missing, or is not whole."""
    for i, (file, reader) in enumerate(zip(self.files, self._readers)):
      held = min(self.per_file, self.length - i * self.per_file)
      if len(reader) != held:
        raise self._damaged(file)

  @functools.cached_property
  def _readers(self) -> list[Any]:
    return [self._reader(file) for file in self.files]

  def _reader(self, file: str) -> Any:
    import grain

    try:
      return grain.sources.ArrayRecordDataSource([file])
    except (RuntimeError, ValueError) as error:
      raise self._damaged(file) from error

  def _damaged(self, file: str) -> UserError:
    return UserError(f"{file} is missing or damaged: {self.remedy}")


@dataclasses.dataclass(frozen=True)
class TargetExample:
  """An image, and what its embedding is to be.

  Attributes:
    size: side of the padded image.
    targets: by the image's number.
  """

  size: int
  targets: Sequence[np.ndarray]

  def __call__(
    self, numbered: tuple[int, Sample], rng: np.random.Generator
  ) -> Example:
    """What `ImageExample` makes, and `targets` [g g c]."""
    made = ImageExample(self.size)(numbered, rng)
    return made | {"targets": self.targets[numbered[0]]}


@dataclasses.dataclass(frozen=True)
class PromptedExample:
  """An image with prompts and masks to learn from.

  Attributes:
    size: side of the padded image.
    grid: g, of the encoder.
    prompts: p; where an image has more annotations they are drawn, where it
      has fewer the rest weighs nothing.
  """

  size: int
  grid: int
  prompts: int

  def __call__(
    self, numbered: tuple[int, Sample], rng: np.random.Generator
  ) -> Example:
    """What `ImageExample` makes, and prompts.

    `points` [p 2], a pixel drawn from each mask, and `boxes` [p 4] whose sides
    are off by a tenth of their length, 20 pixels at most, both in pixels of
    the padded image; `masks` [p 4g 4g], 0 or 1; `valid` [p], 0 where there is
    no annotation.
    """
    made = ImageExample(self.size)(numbered, rng)
    annotations = numbered[1].annotations
    chosen = rng.permutation(len(annotations))[: self.prompts]
    own = [self._prompt(annotations[i], rng) for i in chosen]
    side = 4 * self.grid
    empty = {
      "points": np.zeros(2, np.float32),
      "boxes": np.zeros(4, np.float32),
      "masks": np.zeros((side, side), np.float32),
      "valid": np.float32(0),
    }
    own += [empty] * (self.prompts - len(own))
    return made | {name: np.stack([one[name] for one in own]) for name in empty}

  def _prompt(
    self, annotation: Annotation, rng: np.random.Generator
  ) -> Example:
    mask = rle.decode(annotation.rle)
    rows, columns = mask.shape
    h, w = resized_shape(rows, columns, self.size)
    scale = np.array([w / columns, h / rows], np.float32)
    ys, xs = np.nonzero(mask)
    place = rng.integers(len(ys))
    x, y, wide, high = annotation.bbox
    corners = np.array([x, y, x + wide, y + high], np.float32)
    noise = rng.normal(0, _JITTER, 4) * np.array([wide, high] * 2)
    most = np.array([columns, rows] * 2) - 1
    corners = np.clip(corners + np.clip(noise, -_MOST, _MOST), 0, most)
    return {
      "points": np.array([xs[place], ys[place]], np.float32) * scale,
      "boxes": (corners * np.tile(scale, 2)).astype(np.float32),
      "masks": coarse(mask, 4 * self.grid),
      "valid": np.float32(1),
    }


def coarse(mask: np.ndarray, side: int) -> np.ndarray:
  """A mask at the size of the logits: cells that it covers at least half.

  Args:
    mask: bool [h w].
    side: 4g; the mask's longest side fills it, as the image's does.

  Returns:
    float32 [side side], 0 or 1.
  """
  from PIL import Image

  h, w = resized_shape(mask.shape[0], mask.shape[1], side)
  small = Image.fromarray(mask.astype(np.float32), mode="F")
  found = np.asarray(small.resize((w, h), Image.Resampling.BOX))
  made = np.zeros((side, side), np.float32)
  made[:h, :w] = found >= 0.5
  return made


def train_loader(
  source: Source,
  example: ImageExample | TargetExample | PromptedExample,
  *,
  rows: int,
  seed: int,
  sharding: Any = None,
  start: int = 0,
  prefetch: int = 2,
  workers: int = 0,
  threads: int = 0,
) -> Loader:
  """Training batches without end, shuffled anew each epoch.

  Args:
    source: of images; with masks where the example has prompts.
    example: what a row holds.
    rows: b, of the whole batch.
    seed: of order and draws.
    sharding: where batches go; see `rows_sharding`. NumPy arrays if None.
    start: the first batch.
    prefetch: batches made ahead.
    workers: processes that make batches; 0: one thread.
    threads: that decode the images of a batch.

  Raises:
    UserError: for a source without masks where prompts are asked for, and for
      rows that do not divide among the devices.
  """
  if isinstance(example, PromptedExample) and not source.labelled:
    raise UserError(
      "training on masks needs a source that has some: composite, sa1b, coco "
      "or tfds"
    )
  index, count = (0, 1) if sharding is None else process_share(sharding)
  return batches(
    Numbered(source),
    batch_size=rows,
    seed=seed,
    process_index=index,
    process_count=count,
    transform=example,
    start=start,
    num_threads=threads,
    sharding=sharding,
    prefetch=prefetch,
    workers=workers,
  )


@dataclasses.dataclass(frozen=True)
class InOrder:
  """Makes this process's rows of batch k of a source in its order.

  Attributes:
    source: of images.
    size: side of the padded image.
    rows: b, of the whole batch.
    count: images of the source.
    process_index, process_count: this process brings share `process_index`.
    threads: that decode the images of a batch.
  """

  source: Source
  size: int
  rows: int
  count: int
  process_index: int = 0
  process_count: int = 1
  threads: int = 0

  def __call__(self, k: int, arg: None = None) -> Example:
    """`images`, `ids`, and `weights` [b]: 0 where the source has ended."""
    del arg
    share = self.rows // self.process_count
    first = k * self.rows + self.process_index * share
    ids = np.arange(first, first + share, dtype=np.int32)
    # What pads the last batch is its first image.
    places = np.where(ids < self.count, ids, min(first, self.count - 1))
    with futures.ThreadPoolExecutor(max(self.threads, 1)) as pool:
      images = list(pool.map(self._image, places))
    return {
      "images": np.stack(images),
      "ids": ids,
      "weights": (ids < self.count).astype(np.float32),
    }

  def _image(self, i: int) -> np.ndarray:
    return preprocess(self.source[int(i)].image, self.size)


def image_batches(
  source: Source,
  size: int,
  *,
  rows: int,
  limit: int = 0,
  sharding: Any = None,
  threads: int = 0,
) -> Batches:
  """All images of a source once, in its order.

  Args:
    source: of images.
    size: side of the padded image.
    rows: b, of a batch over all processes.
    limit: images at most; 0: all.
    sharding: where batches go; see `rows_sharding`. NumPy arrays if None.
    threads: that decode the images of a batch.

  Returns:
    Batches of `images` float32 [b size size 3], `ids` int32 [b] and `weights`
    [b], 0 in rows that only fill the last batch.

  Raises:
    UserError: for rows that do not divide among the devices.
  """
  index, count, shards = row_shares(sharding)
  if rows < 1 or rows % shards:
    raise UserError(
      f"a batch of {rows} images does not divide among the {shards} shards of "
      "the mesh: choose a multiple"
    )
  total = min(limit or len(source), len(source))
  reader = InOrder(source, size, rows, total, index, count, threads)
  return Batches(reader, -(-total // rows), sharding)
