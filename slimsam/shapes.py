"""Random shapes with slightly soft edges."""

from collections.abc import Callable
from typing import Any

import numpy as np

# Shapes are drawn this many times larger, so that edges are a pixel wide.
_FINE = 4
# Smallest and largest radius, in sides of the picture.
_RADII = (0.1, 0.4)
_CORNERS = 48


def ellipse(random: np.random.Generator) -> np.ndarray:
  """Corners [N 2] of an ellipse of radius 1 and less, turned at random."""
  angles = _angles(_CORNERS)
  narrow = random.uniform(0.35, 1)
  x, y = np.cos(angles), narrow * np.sin(angles)
  turn = random.uniform(0, np.pi)
  return np.stack(
    [
      x * np.cos(turn) - y * np.sin(turn),
      x * np.sin(turn) + y * np.cos(turn),
    ],
    1,
  )


def polygon(random: np.random.Generator) -> np.ndarray:
  """Corners [N 2] of a polygon, often a hollow one, of radius 0.4 to 1."""
  count = int(random.integers(3, 9))
  # Corners keep their order, however far each is moved.
  moved = random.uniform(0, 0.6, count) * 2 * np.pi / count
  angles = _angles(count) + moved + random.uniform(0, 2 * np.pi)
  return _polar(angles, random.uniform(0.4, 1, count))


def blob(random: np.random.Generator) -> np.ndarray:
  """Corners [N 2] of a rounded shape: a circle with a few waves."""
  angles = _angles(_CORNERS)
  waves = np.arange(2, 6)[:, None]
  sizes = random.uniform(0, 0.35, waves.shape) / (waves - 1)
  phases = random.uniform(0, 2 * np.pi, waves.shape)
  radii = 1 + (sizes * np.cos(waves * angles + phases)).sum(0)
  return _polar(angles, radii / radii.max())


_OUTLINES: tuple[Callable[[np.random.Generator], np.ndarray], ...] = (
  ellipse,
  polygon,
  blob,
)


def draw(random: np.random.Generator, size: int) -> tuple[tuple[int, int], Any]:
  """Draws a shape of random kind, place and size.

  Args:
    random: the generator to draw from.
    size: side of the picture, in pixels. The shape's middle is in the picture;
      what is outside is cut off.

  Returns:
    (x, y) of the top left pixel, and a grey Pillow image with how much of each
    pixel the shape covers, in 255.
  """
  outline = _OUTLINES[random.integers(len(_OUTLINES))](random)
  radius = size * np.exp(random.uniform(*np.log(_RADII)))
  corners = random.uniform(0, size, (1, 2)) + radius * outline
  low = np.floor(corners.min(0)).astype(int).clip(0, size - 1)
  high = np.ceil(corners.max(0)).astype(int).clip(low + 1, size)
  return (int(low[0]), int(low[1])), _coverage(corners - low, high - low)


def _coverage(corners: np.ndarray, size: np.ndarray) -> Any:
  from PIL import Image, ImageDraw

  width, height = (size * _FINE).tolist()
  fine = Image.new("L", (width, height))
  # A pixel's middle is half a pixel from its corner.
  points = corners * _FINE - 0.5
  ImageDraw.Draw(fine).polygon(points.ravel().tolist(), fill=255)
  return fine.reduce(_FINE)


def _angles(count: int) -> np.ndarray:
  return np.arange(count) * (2 * np.pi / count)


def _polar(angles: np.ndarray, radii: np.ndarray) -> np.ndarray:
  return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
