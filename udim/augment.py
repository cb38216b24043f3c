"""From stored images to what a network reads: augmentation, size, scale.

The augmentation of training images is DomainBed's, on Pillow as there: a random
crop of 70 to 100 % of the area at 224 x 224, a flip, colour jitter, now and
then grey; then ImageNet's mean and standard deviation. Evaluation resizes and
normalises. Every draw comes from a generator that the caller gives.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.errors import UserError

AUGMENTATIONS = ("none", "domainbed", "crop_flip")
# name -> (mean, standard deviation) of each channel, for values in [0, 1]
STATISTICS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
  "none": ((0.0,), (1.0,)),
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
# DomainBed's `ColorJitter(0.3, 0.3, 0.3, 0.3)` and `RandomGrayscale()`.
JITTER, GREY = 0.3, 0.1
CROP_SCALE, CROP_RATIO = (0.7, 1.0), (3 / 4, 4 / 3)


def normalize(images: np.ndarray, statistics: str) -> np.ndarray:
  """Images [..., W, C], bytes or floats in [0, 1], as normalised float32.

  Raises:
    UserError: for another number of channels than the statistics have.
  """
  mean, deviation = _statistics(statistics)
  if len(mean) not in (1, images.shape[-1]):
    raise UserError(
      f"data.statistics={statistics!r} is for {len(mean)} channels, but the "
      f"images have {images.shape[-1]}: set data.statistics='none'"
    )
  values = images.astype(np.float32, order="C")
  if images.dtype == np.uint8:
    values /= 255
  if statistics != "none":
    # Rows of pixels at once: NumPy is slow along an axis as short as C.
    rows = values.reshape(*values.shape[:-2], -1)
    rows -= np.tile(mean, values.shape[-2])
    rows /= np.tile(deviation, values.shape[-2])
  return values


def denormalize(images: np.ndarray, statistics: str) -> np.ndarray:
  """The values in [0, 1] that `normalize` made float32 [..., C] from."""
  mean, deviation = _statistics(statistics)
  return images * deviation + mean


def _statistics(name: str) -> tuple[np.ndarray, np.ndarray]:
  mean, deviation = STATISTICS[name]
  return np.asarray(mean, np.float32), np.asarray(deviation, np.float32)


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """An image [H, W, C] of bytes or floats at `size` x `size`, bilinear.

  Pillow's filter widens where it shrinks, as torchvision's `Resize` does on
  Pillow images.
  """
  if image.shape[:2] == (size, size):
    return image
  from PIL import Image

  def one(pixels: np.ndarray) -> np.ndarray:
    made = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(made.resize((size, size), Image.Resampling.BILINEAR))

  if image.dtype == np.uint8 and image.shape[-1] == 3:
    return one(image)
  return np.stack([one(channel) for channel in np.moveaxis(image, -1, 0)], -1)


def crop_box(
  height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """Draws torchvision's `RandomResizedCrop`: (top, left, height, width).

  Ten tries to fit a box of random area and shape; then the largest central one
  of a permitted shape.
  """
  for _ in range(10):
    area = height * width * rng.uniform(*CROP_SCALE)
    shape = math.exp(rng.uniform(*np.log(CROP_RATIO)))
    w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(0, height - h, endpoint=True))
      left = int(rng.integers(0, width - w, endpoint=True))
      return top, left, h, w
  low, high = CROP_RATIO
  h, w = height, width
  if width / height < low:
    h = round(width / low)
  elif width / height > high:
    w = round(height * high)
  return (height - h) // 2, (width - w) // 2, h, w


def shift_hue(image: Any, amount: float) -> Any:
  """A Pillow image with its hue turned by `amount` of a circle."""
  from PIL import Image

  hue, saturation, value = image.convert("HSV").split()
  hue = hue.point([(i + int(amount * 255)) % 256 for i in range(256)])
  return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def color_jitter(image: Any, rng: np.random.Generator) -> Any:
  """Brightness, contrast, saturation and hue in a random order."""
  from PIL import ImageEnhance

  factors = rng.uniform(1 - JITTER, 1 + JITTER, 3)
  hue = rng.uniform(-JITTER, JITTER)
  enhancers = (
    ImageEnhance.Brightness,
    ImageEnhance.Contrast,
    ImageEnhance.Color,
  )
  for i in rng.permutation(4):
    if i == 3:
      image = shift_hue(image, hue)
    else:
      image = enhancers[i](image).enhance(factors[i])
  return image


def domainbed(
  image: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
  """DomainBed's augmentation of uint8 [H, W, 3]; returns [size, size, 3]."""
  if image.dtype != np.uint8 or image.shape[-1] != 3:
    raise UserError(
      f"data.augment='domainbed' needs colour images of bytes, not "
      f"{image.dtype} {list(image.shape)}: set data.augment='none'"
    )
  from PIL import Image, ImageOps

  top, left, height, width = crop_box(image.shape[0], image.shape[1], rng)
  crop = image[top : top + height, left : left + width]
  made = Image.fromarray(resize(crop, size))
  if rng.random() < 0.5:
    made = ImageOps.mirror(made)
  made = color_jitter(made, rng)
  if rng.random() < GREY:
    made = made.convert("L").convert("RGB")
  return np.asarray(made)


def crop_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The usual one for CIFAR: pad by an eighth, crop back, flip half of them."""
  height, width, _ = image.shape
  pad = height // 8
  padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
  top, left = rng.integers(0, 2 * pad, 2, endpoint=True)
  crop = padded[top : top + height, left : left + width]
  return crop[:, ::-1] if rng.random() < 0.5 else crop


@dataclasses.dataclass(frozen=True)
class Transform:
  """Makes stored images into network inputs.

  Attributes:
    size: S, of the square images it returns; 0 keeps theirs.
    augment: one of `AUGMENTATIONS`, of training images.
    statistics: one of `STATISTICS`.

  Raises:
    UserError: for unknown names or a negative size.
  """

  size: int = 0
  augment: str = "none"
  statistics: str = "none"

  def __post_init__(self):
    for key, value, known in (
      ("augment", self.augment, AUGMENTATIONS),
      ("statistics", self.statistics, tuple(STATISTICS)),
    ):
      if value not in known:
        raise UserError(f"data.{key}={value!r}: choose {', '.join(known)}")
    if self.size < 0:
      raise UserError(f"data.image_size={self.size}: give 0 or more")
    if self.augment == "domainbed" and not self.size:
      raise UserError("data.augment='domainbed' needs data.image_size")

  def train(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A training image: [H, W, C] to float32 [S, S, C]."""
    if self.augment == "domainbed":
      image = domainbed(image, self.size, rng)
    elif self.augment == "crop_flip":
      image = crop_flip(image, rng)
    return self.evaluate(image)

  def evaluate(self, image: np.ndarray) -> np.ndarray:
    """An image without augmentation: [H, W, C] to float32 [S, S, C]."""
    if self.size:
      image = resize(image, self.size)
    return normalize(image, self.statistics)

  def evaluate_all(self, images: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] of one size to float32 [N, S, S, C]."""
    if self.size and images.shape[1:3] != (self.size, self.size):
      images = np.stack([resize(image, self.size) for image in images])
    return normalize(images, self.statistics)


def make_transform(cfg: Any) -> Transform:
  """The transform that a config describes.

  Args:
    cfg: `image_size` (0: as stored), `augment` (none, domainbed, crop_flip),
      `statistics` (none, imagenet, cifar10).

  Raises:
    UserError: for unknown names.
  """
  return Transform(
    size=cfg.image_size, augment=cfg.augment, statistics=cfg.statistics
  )
