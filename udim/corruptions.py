"""Kinds of image corruption at five severities, in NumPy: eight to report,
three to choose hyper-parameters by.

Images are float [N, H, W, C] in [0, 1]. Lengths are fractions of the height, so
an 8 x 8 digit and a photograph suffer alike.
"""

from collections.abc import Callable

import numpy as np

from common.config import did_you_mean
from common.errors import UserError

SEVERITIES = (1, 2, 3, 4, 5)


def bilinear(
  images: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
  """Values between pixels; what lies outside is 0.

  Args:
    images: [N, H, W, C].
    rows: [N, H, W] (or broadcasting to it) where in the image each new pixel
      comes from.
    columns: the same across.

  Returns:
    [N, H, W, C].
  """
  count, height, width, _ = images.shape
  shape = (count, height, width)
  rows, columns = np.broadcast_to(rows, shape), np.broadcast_to(columns, shape)
  top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
  each = np.arange(count)[:, None, None]
  result = np.zeros(images.shape, images.dtype)
  for down in (0, 1):
    for right in (0, 1):
      i, j = top + down, left + right
      weight = (1 - np.abs(rows - i)) * (1 - np.abs(columns - j))
      inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
      pixels = images[each, i.clip(0, height - 1), j.clip(0, width - 1)]
      result += pixels * (weight * inside)[..., None].astype(images.dtype)
  return result


def rotate(images: np.ndarray, degrees: float) -> np.ndarray:
  """Images [N, H, W, C] turned counter-clockwise about their centre."""
  _, height, width, _ = images.shape
  y, x = np.mgrid[:height, :width].astype(float)
  y, x = y - (height - 1) / 2, x - (width - 1) / 2
  cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
  rows = cos * y + sin * x + (height - 1) / 2
  columns = cos * x - sin * y + (width - 1) / 2
  # So that turning by 90 degrees moves whole pixels.
  return bilinear(images, rows.round(9)[None], columns.round(9)[None])


def gauss(
  images: np.ndarray, scale: float, rng: np.random.Generator
) -> np.ndarray:
  """Adds noise of standard deviation `scale` to every value."""
  return images + rng.normal(0, scale, images.shape)


def impulse(
  images: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
  """Makes a share of the pixels black or white, by a fair coin."""
  draw = rng.random((*images.shape[:3], 1))
  return np.where(draw < share, (draw < share / 2).astype(float), images)


def blur(
  images: np.ndarray, sigma: float, rng: np.random.Generator
) -> np.ndarray:
  """Convolves with a Gaussian of `sigma` heights; outside is black."""
  del rng
  result = images
  for axis in (1, 2):
    distance = np.arange(images.shape[axis])
    distance = distance[:, None] - distance
    kernel = np.exp(-0.5 * (distance / (sigma * images.shape[1])) ** 2)
    # The weights of an endless row, so that light leaves at the border.
    kernel /= kernel[len(kernel) // 2].sum()
    result = np.moveaxis(np.moveaxis(result, axis, -1) @ kernel, -1, axis)
  return result


def contrast(
  images: np.ndarray, factor: float, rng: np.random.Generator
) -> np.ndarray:
  """Shrinks each image's distance from its mean by `factor`."""
  del rng
  mean = images.mean(axis=(1, 2, 3), keepdims=True)
  return mean + factor * (images - mean)


def brightness(
  images: np.ndarray, amount: float, rng: np.random.Generator
) -> np.ndarray:
  """Adds `amount` to every value."""
  del rng
  return images + amount


def inversion(
  images: np.ndarray, amount: float, rng: np.random.Generator
) -> np.ndarray:
  """Moves every value that far towards its negative; 1 is the negative."""
  del rng
  return (1 - amount) * images + amount * (1 - images)


def shift(
  images: np.ndarray, length: float, rng: np.random.Generator
) -> np.ndarray:
  """Moves each image by `length` heights in a direction of its own."""
  angle = rng.uniform(0, 2 * np.pi, (len(images), 1, 1))
  _, height, width, _ = images.shape
  y, x = np.mgrid[:height, :width].astype(float)
  far = length * height
  return bilinear(images, y - far * np.sin(angle), x - far * np.cos(angle))


def occlusion(
  images: np.ndarray, side: float, rng: np.random.Generator
) -> np.ndarray:
  """Blackens a square of `side` heights inside each image."""
  _, height, width, _ = images.shape
  size = max(1, round(side * height))
  top = rng.integers(0, height - size, (len(images), 1, 1), endpoint=True)
  left = rng.integers(
    0, max(width - size, 0), (len(images), 1, 1), endpoint=True
  )
  y, x = np.mgrid[:height, :width]
  covered = (y >= top) & (y < top + size) & (x >= left) & (x < left + size)
  return np.where(covered[..., None], 0, images)


def rotation(
  images: np.ndarray, degrees: float, rng: np.random.Generator
) -> np.ndarray:
  """Turns each image by `degrees`, one way or the other."""
  left = rng.random(len(images)) < 0.5
  result = rotate(images, -degrees)
  result[left] = rotate(images[left], degrees)
  return result


def gamma(
  images: np.ndarray, exponent: float, rng: np.random.Generator
) -> np.ndarray:
  """Raises every value to a power."""
  del rng
  return images**exponent


def zoom(
  images: np.ndarray, factor: float, rng: np.random.Generator
) -> np.ndarray:
  """Makes what is shown `factor` times as large, around the centre."""
  del rng
  _, height, width, _ = images.shape
  y, x = np.mgrid[:height, :width].astype(float)
  y, x = ((a - (n - 1) / 2) / factor for a, n in ((y, height), (x, width)))
  return bilinear(images, y[None] + (height - 1) / 2, x[None] + (width - 1) / 2)


Corruption = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]

# name -> (function, its strength at severities 1 to 5)
FAMILIES: dict[str, tuple[Corruption, tuple[float, ...]]] = {
  "gauss": (gauss, (0.1, 0.2, 0.3, 0.4, 0.5)),
  "impulse": (impulse, (0.05, 0.1, 0.15, 0.2, 0.3)),
  "blur": (blur, (0.07, 0.09, 0.11, 0.14, 0.18)),
  "contrast": (contrast, (0.75, 0.55, 0.4, 0.3, 0.2)),
  "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
  "inversion": (inversion, (0.15, 0.3, 0.6, 0.8, 1.0)),
  "shift": (shift, (0.05, 0.085, 0.125, 0.17, 0.21)),
  "occlusion": (occlusion, (0.125, 0.25, 0.375, 0.5, 0.625)),
}

# Kinds for choosing hyper-parameters, so that none of the others has to serve.
VALIDATION_FAMILIES: dict[str, tuple[Corruption, tuple[float, ...]]] = {
  "rotation": (rotation, (10, 20, 30, 40, 50)),
  "gamma": (gamma, (0.7, 0.5, 0.35, 0.25, 0.15)),
  "zoom": (zoom, (0.9, 0.8, 0.7, 0.6, 0.5)),
}


def corrupt(
  images: np.ndarray, family: str, severity: int, *, rng: np.random.Generator
) -> np.ndarray:
  """Corrupts images.

  Args:
    images: float [N, H, W, C] in [0, 1].
    family: one of `FAMILIES` or `VALIDATION_FAMILIES`.
    severity: 1 to 5.
    rng: draws noise, directions and places.

  Returns:
    float32 [N, H, W, C] in [0, 1].

  Raises:
    UserError: for an unknown family or severity.
  """
  known = FAMILIES | VALIDATION_FAMILIES
  if family not in known:
    raise UserError(
      f"corruption {family!r} is unknown{did_you_mean(family, known)}"
    )
  if severity not in SEVERITIES:
    raise UserError(f"severity {severity!r} of {family!r}: choose 1 to 5")
  function, strengths = known[family]
  result = function(images.astype(float), strengths[severity - 1], rng)
  return result.clip(0, 1).astype(np.float32)
