"""Geometry of masks and boxes on the host, in NumPy.

Boxes are XYXY in pixels. Those around masks name the first and the last pixel,
both inside; crops end before their last number, as slices do.

Reference:
  Kirillov et al., Segment Anything, 2023, appendix B (automatic masks)

Shapes:
  h: height, rows
  w: width, columns
  n: boxes
"""

import itertools
import math

import numpy as np
from scipy import ndimage

from common.errors import UserError

_NEIGHBOURS = np.ones((3, 3), bool)  # pixels that touch at a corner connect


def point_grid(n: int) -> np.ndarray:
  """Points in the middles of n x n equal cells.

  Args:
    n: points a side.

  Returns:
    Float64 [n*n 2], x and y between 0 and 1; x changes fastest.

  Raises:
    UserError: for n below 1.
  """
  if n < 1:
    raise UserError(f"a grid of {n} points a side: give 1 or more")
  middles = (np.arange(n) + 0.5) / n
  x, y = np.meshgrid(middles, middles)
  return np.stack([x.ravel(), y.ravel()], axis=1)


def crop_boxes(
  h: int, w: int, layers: int, overlap_ratio: float = 512 / 1500
) -> tuple[list[list[int]], list[int]]:
  """The image itself and overlapping crops of it.

  Layer i has 2^i x 2^i crops, which overlap by `overlap_ratio` of the image's
  shorter side on layer 1, and by half as much on each layer further.

  Args:
    h: the image's height.
    w: and its width.
    layers: of crops, beside the image.
    overlap_ratio: from 0 up to 1.

  Returns:
    XYXY of each crop and its layer. The image comes first, as layer 0; in a
    layer y changes fastest.

  Raises:
    UserError: for numbers out of range, or an image too small for so many.
  """
  if min(h, w) < 1 or layers < 0 or not 0 <= overlap_ratio < 1:
    raise UserError(
      f"{layers} layers of crops that overlap by {overlap_ratio} in an image "
      f"of {h} x {w}: give 0 or more layers, 0 <= overlap < 1 and 1 or more "
      "pixels"
    )
  boxes, indices = [[0, 0, w, h]], [0]
  for layer in range(1, layers + 1):
    count = 2**layer
    overlap = int(overlap_ratio * min(h, w) * 2 / count)
    columns = _spans(w, count, overlap)
    rows = _spans(h, count, overlap)
    if max(columns[-1][0] - w, rows[-1][0] - h) >= 0:
      raise UserError(
        f"an image of {h} x {w} pixels has no room for {layers} layers of "
        f"crops: ask for {layer - 1}"
      )
    for (x0, x1), (y0, y1) in itertools.product(columns, rows):
      boxes.append([x0, y0, x1, y1])
      indices.append(layer)
  return boxes, indices


def _spans(side: int, count: int, overlap: int) -> list[tuple[int, int]]:
  length = math.ceil((overlap * (count - 1) + side) / count)
  starts = [(length - overlap) * k for k in range(count)]
  return [(start, min(start + length, side)) for start in starts]


def boxes_of(masks: np.ndarray) -> np.ndarray:
  """Boxes around masks.

  Args:
    masks: bool [... h w].

  Returns:
    Int64 [... 4], XYXY of the first and the last set pixel, so that x1 - x0
    is the width less 1. All 0 for an empty mask, as for pixel (0, 0) alone.
  """
  *_, h, w = masks.shape
  columns = np.asarray(masks.any(-2))  # [... w]
  rows = np.asarray(masks.any(-1))  # [... h]
  boxes = np.stack(
    [
      columns.argmax(-1),
      rows.argmax(-1),
      w - 1 - columns[..., ::-1].argmax(-1),
      h - 1 - rows[..., ::-1].argmax(-1),
    ],
    axis=-1,
  )
  return boxes * columns.any(-1, keepdims=True)


def near_crop_edge(
  boxes: np.ndarray,
  crop_box: np.ndarray | list[int],
  image_box: np.ndarray | list[int],
  tolerance: float = 20.0,
) -> np.ndarray:
  """Whether boxes are at an edge of the crop that is none of the image.

  Such a mask is likely cut off; a neighbouring crop shows more of it.

  Args:
    boxes: [n 4], XYXY in the image's pixels, not the crop's.
    crop_box: [4].
    image_box: [4].
    tolerance: the distance in pixels up to which a side is near.

  Returns:
    Bool [n].
  """
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
  at_crop = np.abs(boxes - np.asarray(crop_box, np.float64)) <= tolerance
  at_image = np.abs(boxes - np.asarray(image_box, np.float64)) <= tolerance
  return np.asarray((at_crop & ~at_image).any(-1))


def stability(
  logits: np.ndarray, offset: float = 1.0, threshold: float = 0.0
) -> np.ndarray:
  """How little masks change when the threshold does.

  Args:
    logits: [... h w].
    offset: how far to move the threshold, up and down.
    threshold: where masks are cut.

  Returns:
    Float64 [...], the area above threshold + offset over that above threshold
    - offset: from 0 to 1, and 1 is stable. 0 for a mask that is empty even at
    the lower one, where the ratio is 0/0: nothing is there to keep.
  """
  small = np.count_nonzero(logits > threshold + offset, axis=(-2, -1))
  large = np.count_nonzero(logits > threshold - offset, axis=(-2, -1))
  return np.asarray(small / np.maximum(large, 1), np.float64)


def nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
  """Greedy non-maximum suppression: the best box drops those too like it.

  As torchvision's, in float64: an area is (x1-x0) (y1-y0), so a box of zero
  area, such as one around a column of single pixels, neither drops another
  nor is dropped.

  Args:
    boxes: [n 4], XYXY.
    scores: [n].
    threshold: boxes are dropped whose IoU with a better one is larger.

  Returns:
    Int64, the indices of the boxes that stay, by falling score; of equal
    scores the first comes first.

  Raises:
    UserError: for unequal numbers of boxes and scores, or a score NaN.
  """
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
  scores = np.asarray(scores, np.float64)
  if scores.shape != (len(boxes),) or np.isnan(scores).any():
    raise UserError(
      f"{len(boxes)} boxes and scores {list(scores.shape)}, of which "
      f"{np.isnan(scores).sum()} NaN: give one number for each box"
    )
  left = np.argsort(-scores, kind="stable")
  kept = []
  while left.size:
    best, left = left[0], left[1:]
    kept.append(best)
    left = left[_box_iou(boxes[best], boxes[left]) <= threshold]
  return np.asarray(kept, np.int64)


def _box_iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
  """IoU of [4] with [n 4]; 0 where both areas are."""
  sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(
    box[:2], others[:, :2]
  )
  inter = np.maximum(sides, 0).prod(-1)
  area, areas = (box[2:] - box[:2]).prod(), (others[:, 2:] - others[:, :2])
  union = area + areas.prod(-1) - inter
  return np.divide(inter, union, out=np.zeros_like(inter), where=union != 0)


def fill_small(
  mask: np.ndarray, area: float, mode: str
) -> tuple[np.ndarray, bool]:
  """Fills a mask's small holes, or removes its small islands.

  Pixels that touch at a corner are connected, those of holes too. What is
  around the mask counts as a hole like any other. If all islands are small
  the largest stays, the first of several in reading order.

  Args:
    mask: bool [h w].
    area: in pixels; what has fewer is small.
    mode: "holes" or "islands".

  Returns:
    The mask, and whether a pixel of it changed.

  Raises:
    UserError: for another mode.
  """
  if mode not in ("holes", "islands"):
    raise UserError(f"mode={mode!r}: choose 'holes' or 'islands'")
  holes = mode == "holes"
  regions, count = ndimage.label(mask != holes, structure=_NEIGHBOURS)
  sizes = np.bincount(regions.ravel(), minlength=count + 1)[1:]
  is_small = sizes < area
  if not holes and is_small.all() and count:
    is_small[sizes.argmax()] = False
  if not is_small.any():
    return mask, False
  # Region 0 is what was not labelled.
  return mask ^ np.append(False, is_small)[regions], True


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Intersection over union of masks; 1 if both are empty.

  Args:
    a: bool [... h w].
    b: bool [... h w].

  Returns:
    Float64 [...].

  Raises:
    UserError: for masks of different sizes.
  """
  if a.shape[-2:] != b.shape[-2:]:
    raise UserError(
      f"masks of {list(a.shape[-2:])} and {list(b.shape[-2:])} pixels: bring "
      "them to one size"
    )
  inter = np.count_nonzero(a & b, axis=(-2, -1))
  union = np.count_nonzero(a | b, axis=(-2, -1))
  return np.where(union == 0, 1.0, inter / np.maximum(union, 1))


def centre(mask: np.ndarray) -> tuple[int, int]:
  """The pixel of a mask that is furthest from its border.

  The image's edge is a border too. Of several the first in reading order.

  Args:
    mask: bool [h w].

  Returns:
    x and y in pixels.

  Raises:
    UserError: for an empty mask.
  """
  if not mask.any():
    raise UserError("an empty mask has no centre: leave it out")
  x0, y0, x1, y1 = boxes_of(mask)
  inside = mask[y0 : y1 + 1, x0 : x1 + 1]
  # Beyond its box the mask is empty, as is the padding.
  distances = np.asarray(ndimage.distance_transform_edt(np.pad(inside, 1)))
  y, x = divmod(int(distances.argmax()), distances.shape[1])
  return int(x0) + x - 1, int(y0) + y - 1
