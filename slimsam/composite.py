"""Pictures made of photographs: with exact masks, or crops without.

Picture i is a function of a seed and of i alone. A composite is a crop of one
photograph with objects on it: ellipses, polygons and rounded blobs, filled
with one colour or with a crop of another photograph. Later objects cover
earlier ones; masks hold what remains to be seen.
"""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from slimsam import rle, shapes
from slimsam.sources import Annotation, Sample, Source, fingerprint_of

# Objects of which fewer pixels are to be seen have no annotation.
MIN_AREA = 20
MIN_SIZE = 16
# A pixel is the object's where the object has this much of its colour, in 255.
_HALF = 128
# Photographs are kept as many times larger than a picture, and decoded ones
# up to so many bytes.
_LARGER, _MOST_BYTES = 4, 2**28
# Share of objects that show a photograph.
_TEXTURED = 0.6


class Photographs:
  """Photographs of a source, decoded once and scaled down.

  Args:
    source: of photographs.
    side: the shorter one's length at most, in pixels.
  """

  def __init__(self, source: Source, side: int):
    self.source, self.side = source, side
    self._kept: dict[int, Any] = {}
    self._bytes = 0
    self._lock = threading.Lock()

  def __getstate__(self) -> tuple[Source, int]:
    return self.source, self.side  # Another process decodes its own.

  def __setstate__(self, state: tuple[Source, int]) -> None:
    self.__init__(*state)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> Any:
    """Photograph i, a Pillow image."""
    image = self._kept.get(i)
    if image is None:
      image = self._decode(i)
      self._keep(i, image)
    return image

  def _decode(self, i: int) -> Any:
    from PIL import Image

    image = Image.fromarray(self.source[i].image)
    scale = self.side / min(image.size)
    if scale >= 1:
      return image
    width, height = (max(1, round(n * scale)) for n in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)

  def _keep(self, i: int, image: Any) -> None:
    size = 3 * image.width * image.height
    with self._lock:
      if i in self._kept:
        return
      while self._kept and self._bytes + size > _MOST_BYTES:
        oldest = self._kept.pop(next(iter(self._kept)))
        self._bytes -= 3 * oldest.width * oldest.height
      self._kept[i] = image
      self._bytes += size


class Layer(NamedTuple):
  """One object.

  Attributes:
    corner: (x, y) of its top left pixel in the picture.
    alpha: a grey Pillow image [h w]: how much of the object is to be seen, in
      255.
    fill: its colours, a Pillow image of the same size.
  """

  corner: tuple[int, int]
  alpha: Any
  fill: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Composite(Source):
  """Composited pictures; see `composite`."""

  photographs: Photographs
  length: int
  size: int
  seed: tuple[int, ...]
  objects: tuple[int, int]
  labelled = True

  def __len__(self) -> int:
    return self.length

  def read(self, i: int) -> Sample:
    """Sample i."""
    random = np.random.default_rng([*self.seed, i])
    background = int(random.integers(len(self.photographs)))
    size = (self.size, self.size)
    canvas = crop(random, self.photographs[background], size)
    low, high = self.objects
    count = int(random.integers(low, high + 1))
    layers = [self._layer(random, background) for _ in range(count)]
    image, masks = paint(canvas, layers)
    annotations = tuple(
      _annotation(random, mask, number)
      for number, mask in enumerate(masks)
      if np.count_nonzero(mask) >= MIN_AREA
    )
    return Sample(f"composite_{i}", image, annotations)

  def _layer(self, random: np.random.Generator, background: int) -> Layer:
    from PIL import Image

    while True:  # An object that is large enough, where nothing covers it.
      corner, alpha = shapes.draw(random, self.size)
      if np.count_nonzero(np.asarray(alpha) >= _HALF) >= MIN_AREA:
        break
    if random.random() < _TEXTURED:
      other = int(random.integers(len(self.photographs) - 1))
      photograph = self.photographs[other + (other >= background)]
      return Layer(corner, alpha, crop(random, photograph, alpha.size))
    color = tuple(random.integers(256, size=3).tolist())
    return Layer(corner, alpha, Image.new("RGB", alpha.size, color))

  @property
  def fingerprint(self) -> str:
    """Changes with the photographs and with every setting."""
    settings = (self.length, self.size, self.seed, self.objects)
    photographs = self.photographs.source.fingerprint
    return fingerprint_of("composite", photographs, *settings)


@dataclasses.dataclass(frozen=True, eq=False)
class Crops(Source):
  """Random crops; see `crops`."""

  photographs: Photographs
  length: int
  size: int
  seed: tuple[int, ...]
  labelled = False

  def __len__(self) -> int:
    return self.length

  def read(self, i: int) -> Sample:
    """Sample i."""
    random = np.random.default_rng([*self.seed, i])
    photograph = self.photographs[int(random.integers(len(self.photographs)))]
    image = crop(random, photograph, (self.size, self.size))
    return Sample(f"crop_{i}", np.array(image), ())

  @property
  def fingerprint(self) -> str:
    """Changes with the photographs and with every setting."""
    settings = (self.length, self.size, self.seed)
    return fingerprint_of(
      "crops", self.photographs.source.fingerprint, settings
    )


def composite(
  source: Source,
  length: int,
  size: int,
  seed: int | Sequence[int],
  objects: Sequence[int] = (1, 4),
) -> Composite:
  """Pictures of objects on photographs, with exact masks.

  Args:
    source: at least two photographs. An object never shows the one that it is
      pasted on.
    length: how many pictures.
    size: their side in pixels.
    seed: picture i is a function of `seed` and i, whatever the length.
    objects: fewest and most in a picture; those of which less than `MIN_AREA`
      pixels are to be seen have no annotation. The last one always has one.

  Returns:
    Samples whose annotations have a mask of what is to be seen of the object,
    the box around it, and as point one of its pixels, away from its border
    where it is thick enough.

  Raises:
    UserError: for settings that make no picture.
  """
  settings = _check(source, length, size, seed)
  if len(source) < 2:
    raise UserError(
      "composites need at least two photographs, but data.source.photographs "
      "holds 1: name more"
    )
  low_high = tuple(objects)
  if len(low_high) != 2 or not 1 <= low_high[0] <= low_high[1]:
    raise UserError(
      f"data.source.objects={objects!r}: give the fewest and the most objects "
      "of a picture, such as (1, 4)"
    )
  photographs = Photographs(source, _LARGER * size)
  return Composite(photographs, length, size, settings, low_high)


def crops(
  source: Source, length: int, size: int, seed: int | Sequence[int]
) -> Crops:
  """Random square crops of photographs, scaled and flipped, without masks.

  Args:
    source: the photographs.
    length: how many crops.
    size: their side in pixels.
    seed: crop i is a function of `seed` and i, whatever the length.

  Raises:
    UserError: for settings that make no picture.
  """
  settings = _check(source, length, size, seed)
  return Crops(Photographs(source, _LARGER * size), length, size, settings)


def _check(
  source: Source, length: int, size: int, seed: int | Sequence[int]
) -> tuple[int, ...]:
  """Returns the seed as a tuple."""
  if not len(source):
    raise UserError("data.source.photographs holds no image: name some")
  if length < 1:
    raise UserError(f"data.source.length={length}: give a number from 1")
  if size < MIN_SIZE:
    raise UserError(f"data.source.size={size}: give {MIN_SIZE} pixels or more")
  seeds = (seed,) if isinstance(seed, int) else tuple(seed)
  if min(seeds) < 0:
    raise UserError(f"data.source.seed={seed}: give a number from 0")
  return seeds


def crop(
  random: np.random.Generator, photograph: Any, size: tuple[int, int]
) -> Any:
  """A random part of a photograph, scaled to a size and perhaps flipped.

  Args:
    random: the generator to draw from.
    photograph: a Pillow image.
    size: (width, height) of the result. The part has its shape, is not scaled
      up if the photograph is large enough, and has a quarter of its largest
      possible side or more.

  Returns:
    A Pillow image.
  """
  from PIL import Image

  width, height = photograph.size
  largest = min(width / size[0], height / size[1])
  scale = random.uniform(max(largest / 4, min(largest, 1)), largest)
  w, h = min(scale * size[0], width), min(scale * size[1], height)
  x, y = random.uniform(0, width - w), random.uniform(0, height - h)
  box = (x, y, min(x + w, width), min(y + h, height))
  part = photograph.resize(size, Image.Resampling.BILINEAR, box)
  if random.random() < 0.5:
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return part


def paint(
  canvas: Any, layers: Sequence[Layer]
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Pastes objects one over the other.

  Args:
    canvas: a Pillow image [H W], painted over.
    layers: the first is the lowest.

  Returns:
    The image uint8 [H W 3], and for each layer bool [H W]: where it has half
    of the colour or more, and no later layer has.
  """
  masks = []
  for corner, alpha, fill in layers:
    canvas.paste(fill, corner, alpha)
    mask = np.zeros((canvas.height, canvas.width), bool)
    x, y = corner
    mask[y : y + alpha.height, x : x + alpha.width] = np.asarray(alpha) >= _HALF
    for lower in masks:
      lower &= ~mask
    masks.append(mask)
  return np.array(canvas), masks


def _annotation(
  random: np.random.Generator, mask: np.ndarray, number: int
) -> Annotation:
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  (y0, y1), (x0, x1) = rows[[0, -1]].tolist(), columns[[0, -1]].tolist()
  box = (float(x0), float(y0), float(x1 - x0 + 1), float(y1 - y0 + 1))
  return Annotation(rle.encode(mask), box, inner_point(random, mask), number)


def inner_point(
  random: np.random.Generator, mask: np.ndarray
) -> tuple[float, float]:
  """A random pixel (x, y) of a mask.

  It is two pixels inside where there is such a pixel, otherwise one, otherwise
  anywhere in the mask.
  """
  inside = mask
  for _ in range(2):
    smaller = np.zeros_like(mask)
    smaller[1:-1, 1:-1] = (
      inside[1:-1, 1:-1]
      & inside[:-2, 1:-1]
      & inside[2:, 1:-1]
      & inside[1:-1, :-2]
      & inside[1:-1, 2:]
    )
    if not smaller.any():
      break
    inside = smaller
  pixels = np.flatnonzero(inside)
  y, x = divmod(int(pixels[random.integers(pixels.size)]), mask.shape[1])
  return float(x), float(y)
