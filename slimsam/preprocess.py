"""Images, prompts and masks between their own size and the model's.

SAM sees a square: the image is scaled until its longest side fills it, and the
rest, on the right and below, is the mean colour. Prompts go the same way, and
masks go it back.

Letters in shapes: h w of the original image, s of the logits' grid.

References:
  Kirillov et al., Segment Anything, 2023 (arXiv 2304.02643)
  `segment_anything/utils/transforms.py` and `modeling/sam.py` of its authors
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError

# Of ImageNet's colours, red, green and blue in 0..255.
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)

# Background, foreground, padding, and a point to be left out.
LABELS = (0, 1, -1, -10)
_ON_IMAGE = (0, 1)  # labels of points that have a place


def resized_shape(h: int, w: int, size: int) -> tuple[int, int]:
  """Height and width after the longest side was scaled to `size`.

  Each is rounded half up, and at least 1.
  """
  if min(h, w, size) < 1:
    raise UserError(
      f"an image of {h} rows and {w} columns for size {size}: each must be at "
      "least 1"
    )
  scale = size / max(h, w)
  return max(int(h * scale + 0.5), 1), max(int(w * scale + 0.5), 1)


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
  """The model's input for an image: scaled, normalised, padded.

  Args:
    image: uint8 [h w 3], red, green, blue.
    size: of the model's square, 1024 for SAM.

  Returns:
    float32 [size size 3]. The padding is zero, so the mean colour.

  Raises:
    UserError: for another array.
  """
  from PIL import Image

  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise UserError(
      f"an image is uint8 [height width 3], not {image.dtype} "
      f"{list(image.shape)}: read it with common.data.images.read_image"
    )
  h, w = resized_shape(image.shape[0], image.shape[1], size)
  # Pillow antialiases and rounds to uint8, as the authors' code does.
  resized = Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)
  made = np.zeros((size, size, 3), np.float32)
  made[:h, :w] = (np.asarray(resized, np.float32) - MEAN) / STD
  return made


def scale_points(
  points: jax.typing.ArrayLike, original: tuple[int, int], size: int
) -> jax.Array:
  """Points of the original image in the model's square.

  Args:
    points: [... 2], x and y in pixels.
    original: height and width of the image.
    size: of the model's square.

  Returns:
    float32 [... 2]. The two factors differ a little: both sides of the
    resized image are whole numbers.
  """
  h, w = original
  new_h, new_w = resized_shape(h, w, size)
  points = jnp.asarray(points, jnp.float32)
  x, y = points[..., 0], points[..., 1]
  return jnp.stack([x * (new_w / w), y * (new_h / h)], axis=-1)


def scale_boxes(
  boxes: jax.typing.ArrayLike, original: tuple[int, int], size: int
) -> jax.Array:
  """Boxes of the original image in the model's square.

  Args:
    boxes: [... 4], left, top, right, bottom in pixels.
    original: height and width of the image.
    size: of the model's square.

  Returns:
    float32 [... 4].
  """
  boxes = jnp.asarray(boxes, jnp.float32)
  corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
  return scale_points(corners, original, size).reshape(boxes.shape)


@functools.partial(jax.jit, static_argnames=("image_size", "original"))
def upscale(
  logits: jax.typing.ArrayLike, image_size: int, original: tuple[int, int]
) -> jax.Array:
  """Mask logits in the size of the original image.

  They are interpolated to the model's square, cropped to the part that the
  image fills, and interpolated to the original; bilinear, pixels being squares
  with their values in the middle, without antialiasing. All of this is linear
  and apart for rows and columns: one matrix for each. The square itself is
  never made.

  Args:
    logits: [... s s]. A mask is where the result is above 0.
    image_size: of the model's square; static.
    original: height and width of the image; static, so that each new pair
      compiles.

  Returns:
    float32 [... h w].
  """
  logits = jnp.asarray(logits, jnp.float32)
  s = logits.shape[-1]
  rows, columns = (
    jnp.asarray(upscaling(s, image_size, resized, side))
    for resized, side in zip(resized_shape(*original, image_size), original)
  )
  highest = jax.lax.Precision.HIGHEST
  wide = jnp.einsum("...st,wt->...sw", logits, columns, precision=highest)
  return jnp.einsum("...sw,hs->...hw", wide, rows, precision=highest)


def upscaling(s: int, image_size: int, resized: int, side: int) -> np.ndarray:
  """The matrix [side s] of `upscale` along one axis."""
  square = _interpolate(np.eye(s), image_size)
  return _interpolate(square[:resized], side).astype(np.float32)


def _interpolate(rows: np.ndarray, count: int) -> np.ndarray:
  """`count` rows, linear between those in [n ...], the ends going on."""
  n = len(rows)
  place = np.clip((np.arange(count) + 0.5) * (n / count) - 0.5, 0, n - 1)
  low = place.astype(np.int64)
  high = np.minimum(low + 1, n - 1)
  part = (place - low)[:, None]
  return rows[low] * (1 - part) + rows[high] * part


def check_points(
  points: Any, labels: Any, original: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Points and labels as arrays, if a model can answer them.

  Args:
    points: [... n 2] finite numbers, x from 0 to w and y from 0 to h, in
      pixels of the original image.
    labels: [... n], 1 for the object, 0 for the background, -1 for padding,
      -10 for a point to be left out; the last two may be anywhere.
    original: height and width of the image.

  Returns:
    float32 [... n 2] and int32 [... n].

  Raises:
    UserError: for anything else, with the first point that is wrong.
  """
  points = _numbers("points", points, 2, "x and y")
  labels = _array("labels", labels)
  if labels.shape != points.shape[:-1]:
    raise UserError(
      f"points {list(points.shape)} need labels {list(points.shape[:-1])}, one "
      f"each, not {list(labels.shape)}"
    )
  known = np.isin(labels, LABELS)
  if not known.all():
    where = _first(~known)
    raise UserError(
      f"labels[{_at(where)}] is {labels[where]:g}: a label is 1 for the "
      "object, 0 for the background, -1 for padding, -10 for none"
    )
  placed = np.isin(labels, _ON_IMAGE)
  _check_inside("points", points, placed & _outside(points, original), original)
  return points.astype(np.float32), labels.astype(np.int32)


def check_boxes(boxes: Any, original: tuple[int, int]) -> np.ndarray:
  """Boxes as an array, if a model can answer them.

  Args:
    boxes: [... 4] finite numbers, left, top, right and bottom in pixels of the
      original image; x from 0 to w and y from 0 to h.
    original: height and width of the image.

  Returns:
    float32 [... 4].

  Raises:
    UserError: for anything else, with the first box that is wrong.
  """
  boxes = _numbers("boxes", boxes, 4, "left, top, right and bottom")
  corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
  outside = np.any(_outside(corners, original), axis=-1)
  _check_inside("boxes", boxes, outside, original)
  turned = (corners[..., 0, :] > corners[..., 1, :]).any(axis=-1)
  if turned.any():
    where = _first(turned)
    raise UserError(
      f"boxes[{_at(where)}] is {_shown(boxes[where])}, whose right or bottom "
      "comes before its left or top: a box is left, top, right, bottom, not "
      "left, top, width, height"
    )
  return boxes.astype(np.float32)


def _numbers(name: str, values: Any, last: int, what: str) -> np.ndarray:
  """Finite float64 [... last], at least one row of them."""
  array = _array(name, values)
  if array.ndim < 2 or array.shape[-1] != last:
    raise UserError(
      f"{name} {list(array.shape)} must be [... n {last}]: {what} of each"
    )
  if not array.size:
    raise UserError(
      f"{name} {list(array.shape)} hold none: give at least one, or leave "
      f"{name} out"
    )
  wrong = ~np.isfinite(array).all(axis=-1)
  if wrong.any():
    where = _first(wrong)
    raise UserError(
      f"{name}[{_at(where)}] is {_shown(array[where])}: give finite numbers"
    )
  return array


def _array(name: str, values: Any) -> np.ndarray:
  """An array of real numbers, as float64."""
  try:
    array = np.asarray(values)
  except ValueError as error:
    raise UserError(f"{name} are no array: {error}") from error
  if array.dtype.kind not in "biuf":
    raise UserError(f"{name} are {array.dtype}: give numbers")
  return array.astype(np.float64)


def _outside(points: np.ndarray, original: tuple[int, int]) -> np.ndarray:
  h, w = original
  x, y = points[..., 0], points[..., 1]
  return (x < 0) | (x > w) | (y < 0) | (y > h)


def _check_inside(
  name: str, values: np.ndarray, outside: Any, original: tuple[int, int]
) -> None:
  if outside.any():
    where = _first(outside)
    h, w = original
    raise UserError(
      f"{name}[{_at(where)}] is {_shown(values[where])}, outside the image, "
      f"which is {w} wide and {h} high: give x, y in its own pixels"
    )


def _first(wrong: Any) -> tuple[int, ...]:
  return tuple(int(i) for i in np.argwhere(wrong)[0])


def _at(where: tuple[int, ...]) -> str:
  return ", ".join(map(str, where))


def _shown(numbers: np.ndarray) -> str:
  return f"({', '.join(f'{x:.10g}' for x in numbers)})"
