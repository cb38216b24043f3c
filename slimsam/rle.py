"""Run-length codes of masks, in COCO's format.

Runs go down the columns, zeros first: `[0, 1, 10, 3, ...]` is no zeros, 1 one,
10 zeros, 3 ones. A code is `{"size": [h, w], "counts": ...}` with the runs as
a list or as COCO's compressed text:

- a number is cut into groups of 5 bits, the lowest first; a character is
  48 + the group, + 32 if another group of the number follows;
- bit 16 of a number's last group is its sign;
- from the fourth number on (index 3), what stands there is the difference from
  the number two before.

Shapes:
  h: height, rows
  w: width, columns
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.errors import UserError

_FIRST, _GROUP, _SIGN, _MORE = 48, 31, 16, 32
# COCO's numbers have 32 bits: their differences fit 7 groups of 5.
_MOST_GROUPS, _LARGEST_RUN = 7, 2**32 - 1
# Polygons are drawn this many times larger. An odd number has no fine pixel
# that starts in the middle of a pixel, where many polygons have edges.
_FINE = 5
_FURTHEST = 10**6


def encode(mask: np.ndarray) -> dict[str, Any]:
  """The compressed code of a mask, as in SA-1B's and COCO's files.

  Args:
    mask: bool [h w].

  Returns:
    `{"size": [h, w], "counts": str}`.

  Raises:
    UserError: for an array that is no mask.
  """
  runs = encode_runs(mask)
  return {"size": list(np.shape(mask)), "counts": compress(runs)}


def encode_runs(mask: np.ndarray) -> list[int]:
  """The runs of a mask, zeros first, so that the first may be 0.

  Args:
    mask: bool [h w].

  Raises:
    UserError: for an array that is no mask.
  """
  mask = np.asarray(mask)
  if mask.ndim != 2 or mask.dtype != bool:
    raise UserError(
      f"a mask is bool [h w], not {mask.dtype} {list(mask.shape)}: threshold "
      "it, and give one at a time"
    )
  flat = mask.ravel(order="F")
  changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
  runs = np.diff(changes, prepend=0, append=flat.size).tolist()
  return [0, *runs] if flat[:1].any() else runs


def decode(rle: Mapping[str, Any]) -> np.ndarray:
  """The mask of a code.

  Args:
    rle: `size` and `counts`, the latter compressed (text or bytes) or a list
      of runs.

  Returns:
    Bool [h w].

  Raises:
    UserError: for a code that is damaged or is not of this size.
  """
  runs, h, w = _read(rle)
  mask = np.zeros((h, w), bool)
  starts, stops = _ones(runs)
  if starts.size:  # Most masks are small: the other columns stay as they are.
    first, last = starts[0] // h, (stops[-1] - 1) // h
    edges = np.column_stack([starts, stops]).ravel() - first * h
    lengths = np.diff(edges, prepend=0, append=(last + 1 - first) * h)
    flat = np.repeat(np.arange(lengths.size) % 2 == 1, lengths)
    mask[:, first : last + 1] = flat.reshape(-1, h).T
  return mask


def area(rle: Mapping[str, Any]) -> int:
  """The number of pixels in the mask of a code; see `decode`."""
  return int(_read(rle)[0][1::2].sum())


def bbox(rle: Mapping[str, Any]) -> list[int]:
  """The box around the mask of a code; see `decode`.

  Returns:
    `[x, y, width, height]` of the mask's pixels: a single pixel has width and
    height 1. All 0 for an empty mask.
  """
  runs, h, _ = _read(rle)
  starts, stops = _ones(runs)
  if not starts.size:
    return [0, 0, 0, 0]
  last = stops - 1
  left, right = starts[0] // h, last[-1] // h
  top, bottom = (starts % h).min(), (last % h).max()
  if (starts // h != last // h).any():  # from one column into the next
    top, bottom = 0, h - 1
  return [int(n) for n in (left, top, right - left + 1, bottom - top + 1)]


def compress(runs: Sequence[int]) -> str:
  """COCO's text for runs.

  Raises:
    UserError: for what is no run: a negative number, one of more than 32 bits
      or no integer.
  """
  numbers = _integers(runs)
  numbers[3:] = numbers[3:] - numbers[1:-2]
  # A number needs a group for its sign too: -16 to 15 fit the first.
  magnitudes = np.where(numbers < 0, ~numbers, numbers)
  limits = 1 << (5 * np.arange(1, _MOST_GROUPS) - 1)
  following = (magnitudes[:, None] >= limits).sum(1)  # [N]
  places = np.arange(_MOST_GROUPS)
  groups = (numbers[:, None] >> (5 * places)) & _GROUP  # [N groups]
  groups += _FIRST + _MORE * (places < following[:, None])
  used = groups[places <= following[:, None]]
  return used.astype(np.uint8).tobytes().decode("ascii")


def decompress(text: str | bytes) -> list[int]:
  """The runs in COCO's text.

  Raises:
    UserError: for a character that the format has not, a number that is cut
      off or too long, or a negative run.
  """
  return _decompress(text).tolist()


def polygons_to_mask(
  polygons: Sequence[Sequence[float]], h: int, w: int
) -> np.ndarray:
  """The mask of a COCO segmentation by polygons: what any of them covers.

  Pixel (x, y) is the square from (x, y) to (x + 1, y + 1), and is set if its
  middle is inside, to about a fifth of a pixel. Along edges that may differ by
  a pixel from pycocotools, which follows edges by rules of its own.

  Args:
    polygons: each `[x0, y0, x1, y1, ...]` in pixels; parts outside of the
      image are cut off. A part that a polygon surrounds twice is outside.
    h: the image's height.
    w: and its width.

  Returns:
    Bool [h w].

  Raises:
    UserError: for a polygon of fewer than three corners, an odd number of
      coordinates, or a coordinate that is no number or far away.
  """
  mask = np.zeros((h, w), bool)
  for polygon in polygons:
    corners = _corners(polygon)
    x0, y0 = np.clip(np.floor(corners.min(0)), 0, (w, h)).astype(int)
    x1, y1 = np.clip(np.ceil(corners.max(0)), 0, (w, h)).astype(int)
    if x0 < x1 and y0 < y1:
      inside = _draw(corners - (x0, y0), int(y1 - y0), int(x1 - x0))
      mask[y0:y1, x0:x1] |= inside
  return mask


def _draw(corners: np.ndarray, h: int, w: int) -> np.ndarray:
  """Draws larger, and takes the fine pixel in the middle of each."""
  from PIL import Image, ImageDraw

  image = Image.new("L", (w * _FINE, h * _FINE))
  # Pillow's pixel is a point and its edges are inside.
  points = np.rint(corners * _FINE - 0.5).astype(int)
  ImageDraw.Draw(image).polygon(points.ravel().tolist(), fill=1)
  return np.asarray(image)[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE] > 0


def _corners(polygon: Sequence[float]) -> np.ndarray:
  """Returns [N 2], x and y."""
  try:
    numbers = np.asarray(polygon, np.float64)
  except (TypeError, ValueError) as error:
    raise UserError(
      f"polygon {_short(polygon)}: give numbers x0, y0, x1, y1, ..."
    ) from error
  if numbers.ndim != 1 or numbers.size < 6 or numbers.size % 2:
    raise UserError(
      f"polygon {_short(polygon)}: give x and y of three corners or more in "
      "one flat list"
    )
  bad = numbers[~(np.abs(numbers) <= _FURTHEST)]
  if bad.size:
    raise UserError(
      f"polygon {_short(polygon)}: {bad[0]} is no coordinate in pixels: mend "
      "or remove the polygon"
    )
  return numbers.reshape(-1, 2)


def _read(rle: Mapping[str, Any]) -> tuple[np.ndarray, int, int]:
  """Returns runs that fill the mask, its height and width."""
  try:
    size, counts = rle["size"], rle["counts"]
  except (KeyError, IndexError, TypeError) as error:
    raise UserError(
      f"{_short(rle)} is no run-length code: give a dict of size and counts"
    ) from error
  try:
    h, w = (operator.index(n) for n in size)
  except (TypeError, ValueError):
    h = w = -1
  if min(h, w) < 0:
    raise UserError(
      f"size {_short(size)} of a run-length code: give [height, width]"
    )
  is_text = isinstance(counts, str | bytes)
  runs = _decompress(counts) if is_text else _integers(counts)
  if runs.sum() != h * w:
    raise UserError(
      f"run-length code {_short(counts)}: its runs sum to {runs.sum()}, but "
      f"the mask has {h} x {w} = {h * w} pixels: the code is damaged, or the "
      "size is another mask's"
    )
  return runs, h, w


def _decompress(text: str | bytes) -> np.ndarray:
  data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
  codes = np.frombuffer(data, np.uint8).astype(np.int64) - _FIRST
  wrong = np.flatnonzero((codes < 0) | (codes > _GROUP + _MORE))
  if wrong.size:
    raise UserError(
      f"run-length code {_short(text)}: {text[wrong[0]]!r} at {wrong[0]} is "
      "none of its characters, '0' to 'o'"
    )
  last = np.flatnonzero(codes < _MORE)  # the last group of each number
  if last.size < codes.size and codes[-1] >= _MORE:
    raise UserError(
      f"run-length code {_short(text)} ends in the middle of a number: it was "
      "cut off"
    )
  lengths = np.diff(last, prepend=-1)
  if (lengths > _MOST_GROUPS).any():
    raise UserError(
      f"run-length code {_short(text)}: number {lengths.argmax()} has more "
      "than 32 bits: the code is damaged"
    )
  starts = last + 1 - lengths
  places = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
  numbers = np.zeros(last.size, np.int64)
  if last.size:
    numbers = np.add.reduceat((codes & _GROUP) << places, starts)
  numbers -= ((codes[last] & _SIGN) > 0) * (1 << 5 * lengths)
  numbers[1::2] = np.cumsum(numbers[1::2])
  numbers[2::2] = np.cumsum(numbers[2::2])
  return _integers(numbers)


def _integers(runs: Any) -> np.ndarray:
  """Returns runs as a new int64 [N]."""
  try:
    numbers = np.asarray(runs)
  except ValueError:  # lists of unequal lengths
    numbers = np.asarray(None)
  if numbers.shape == (0,):  # which NumPy takes for floats
    return np.zeros(0, np.int64)
  if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
    raise UserError(
      f"runs {_short(runs)}: give integers below 2^32 in one flat list"
    )
  wrong = np.flatnonzero((numbers < 0) | (numbers > _LARGEST_RUN))
  if wrong.size:
    raise UserError(
      f"runs {_short(runs)}: number {wrong[0]} is {numbers[wrong[0]]}, but "
      "runs are from 0 to 2^32 - 1: the code is damaged"
    )
  return numbers.astype(np.int64)


def _ones(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns where the runs of ones start and stop, without empty runs."""
  stops = np.cumsum(runs)[1::2]
  lengths = runs[1::2]
  return (stops - lengths)[lengths > 0], stops[lengths > 0]


def _short(value: Any) -> str:
  """One line to know a value by."""
  text = " ".join(repr(value).split())
  return text if len(text) <= 40 else f"{text[:37]}..."
