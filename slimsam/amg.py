"""All masks of an image, from a grid of points.

    generator = AutomaticMaskGenerator(Predictor.load("sam_vit_b_01ec64.pth"))
    for record in generator.generate(image):
      record["segmentation"], record["predicted_iou"]

The image and crops of it are encoded. Each point of a grid gives several masks;
those stay that the model thinks good, that hardly change with the threshold
and that no crop cuts off. Of masks with nearly one box the best stays.

Reference:
  Kirillov et al., Segment Anything, 2023, section 5 and appendix B

Letters in shapes: h w of the image or a crop, b points at once, m masks of
each, s the side of the model's logits, k masks that are measured at once.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from common.nn import Array
from slimsam import rle
from slimsam.masks import (
  boxes_of,
  crop_boxes,
  fill_small,
  near_crop_edge,
  nms,
  point_grid,
)
from slimsam.model import Masks
from slimsam.predict import Frame, Predictor, chunks, enlarge
from slimsam.preprocess import resized_shape

OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
STABILITY_AT = ("original", "low_res")


class _Found(NamedTuple):
  """A mask; boxes and points are in pixels of the image."""

  rle: dict[str, Any]
  box: np.ndarray  # int [4], XYXY of the first and last pixel
  iou: float
  point: np.ndarray  # [2]
  stability: float
  crop: list[int]  # XYXY


@dataclasses.dataclass
class AutomaticMaskGenerator:
  """Finds everything in images.

  Names and defaults are those of `segment_anything`.

  Attributes:
    predictor: of the model; an image that it holds is forgotten.
    points_per_side: of the grid, or None where `point_grids` are given.
    points_per_batch: prompts at once; more is faster, and takes about 20 MB
      each. It changes no result.
    pred_iou_thresh: masks whose predicted IoU is above it stay; 0: all.
    stability_score_thresh: masks at least so stable stay; 0: all.
    stability_score_offset: how far the threshold is moved, up and down, to
      see how stable a mask is.
    box_nms_thresh: of two masks of a crop whose boxes have a larger IoU the
      one of lower predicted IoU goes.
    crop_n_layers: layers of crops beside the image, layer i with 2^i x 2^i.
    crop_nms_thresh: as `box_nms_thresh`, between crops; the mask of the larger
      crop goes.
    crop_overlap_ratio: by which crops of layer 1 overlap, of the image's
      shorter side.
    crop_n_points_downscale_factor: layer i has points_per_side / factor^i
      points a side.
    point_grids: of each layer the points, [n 2] in parts of the crop.
    min_mask_region_area: holes and islands with fewer pixels go; 0: none.
    output_mode: what `segmentation` is, one of `OUTPUT_MODES`.
    stability_at: "original", the image's size, or "low_res": the model's
      logits, so that unstable masks need not be enlarged. That differs a
      little.
  """

  predictor: Predictor
  points_per_side: int | None = 32
  points_per_batch: int = 64
  pred_iou_thresh: float = 0.88
  stability_score_thresh: float = 0.95
  stability_score_offset: float = 1.0
  box_nms_thresh: float = 0.7
  crop_n_layers: int = 0
  crop_nms_thresh: float = 0.7
  crop_overlap_ratio: float = 512 / 1500
  crop_n_points_downscale_factor: int = 1
  point_grids: Sequence[Any] | None = None
  min_mask_region_area: int = 0
  output_mode: str = "binary_mask"
  stability_at: str = "original"

  def __post_init__(self) -> None:
    for name, known in (
      ("output_mode", OUTPUT_MODES),
      ("stability_at", STABILITY_AT),
    ):
      value = getattr(self, name)
      if value not in known:
        raise UserError(f"{name}={value!r}{did_you_mean(str(value), known)}")
    least = {
      "points_per_batch": 1, "crop_n_layers": 0,
      "crop_n_points_downscale_factor": 1, "min_mask_region_area": 0,
      "stability_score_offset": 0,
    }  # fmt: skip
    for name, number in least.items():
      if not getattr(self, name) >= number:
        raise UserError(
          f"{name}={getattr(self, name)} must be at least {number}"
        )
    self._grids = _grids(self)
    most = max(map(len, self._grids))
    self._batch = min(self.points_per_batch, most)

  def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
    """All masks of an image.

    Args:
      image: uint8 [h w 3], RGB.

    Returns:
      A record for each mask, `segment_anything`'s:
      segmentation: bool [h w], or its code as of `slimsam.rle`.
      area: in pixels.
      bbox: [x, y, width, height] from the mask's first pixel to its last, so
        that a single pixel has width 0.
      predicted_iou: what the model thinks of it.
      point_coords: [[x, y]], the point that gave it.
      stability_score: area above the higher threshold by that above the lower.
      crop_box: [x, y, width, height] of the crop that gave it.

    Raises:
      UserError: for another array, or one too small for the crops.
    """
    image = np.asarray(image)
    if image.ndim != 3:
      raise UserError(f"an image is uint8 [h w 3], not {list(image.shape)}")
    h, w = image.shape[:2]
    crops, layers = crop_boxes(
      h, w, self.crop_n_layers, self.crop_overlap_ratio
    )
    found: list[_Found] = []
    for crop, layer in zip(crops, layers):
      found += self._in_crop(image, crop, self._grids[layer])
    self.predictor.reset_image()
    if len(crops) > 1:
      scores = [1 / _area(one.crop) for one in found]
      found = _distinct(found, scores, self.crop_nms_thresh)
    if self.min_mask_region_area > 0:
      threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
      found = _cleaned(found, self.min_mask_region_area, threshold)
    return [self._record(one) for one in found]

  def _in_crop(
    self, image: np.ndarray, crop: list[int], grid: np.ndarray
  ) -> list[_Found]:
    x0, y0, x1, y1 = crop
    self.predictor.set_image(image[y0:y1, x0:x1])
    found: list[_Found] = []
    for points, made in self._decoded(grid * (x1 - x0, y1 - y0)):
      found += self._chosen(points, made, crop, image.shape[:2])
    return _distinct(found, [one.iou for one in found], self.box_nms_thresh)

  def _decoded(self, points: np.ndarray) -> Iterator[tuple[np.ndarray, Masks]]:
    """Points and their masks, all batches of one shape.

    The device works on the next batch while the host looks at one.
    """
    ahead: tuple[np.ndarray, Masks] | None = None
    labels = np.ones((self._batch, 1), np.int32)
    for start in range(0, len(points), self._batch):
      own = points[start : start + self._batch]
      extra = self._batch - len(own)
      filled = np.concatenate([own, np.repeat(own[-1:], extra, axis=0)])
      made = self.predictor.decode(filled[:, None], labels)
      if ahead is not None:
        yield ahead
      ahead = own, made
    if ahead is not None:
      yield ahead

  def _chosen(
    self,
    points: np.ndarray,
    made: Masks,
    crop: list[int],
    shape: tuple[int, ...],
  ) -> list[_Found]:
    """The masks of a batch that stay."""
    ious = np.asarray(made.iou)[: len(points)]  # without what fills the batch
    kept = np.ones(ious.shape, bool)
    if self.pred_iou_thresh > 0:
      kept = ious > self.pred_iou_thresh
    stabilities = None
    if self.stability_at == "low_res":
      side = crop[3] - crop[1], crop[2] - crop[0]
      stabilities = self._low_res_stability(made.logits, side)[: len(points)]
      kept &= self._is_stable(stabilities)
    found: list[_Found] = []
    h, w = shape[:2]
    places = np.flatnonzero(kept)
    for part in chunks(len(places), self.predictor.frame, self._batch):
      own = np.unique(part)
      measured = _measure(
        made.logits,
        places[part],
        self.predictor.frame,
        self.stability_score_offset,
      )
      ratios = _ratio(np.asarray(measured.areas))[: len(own)]
      if stabilities is not None:
        ratios = stabilities.ravel()[places[own]]
      boxes = np.asarray(measured.boxes)[: len(own)] + np.tile(crop[:2], 2)
      stays = self._is_stable(ratios)
      stays &= ~near_crop_edge(boxes, crop, [0, 0, w, h])
      if not stays.any():
        continue  # the masks need not leave the device
      masks = np.asarray(measured.masks)
      for i in np.flatnonzero(stays):
        place = places[own[i]]
        found.append(
          _Found(
            rle=_pasted(masks[i], crop, h, w),
            box=boxes[i],
            iou=float(ious.ravel()[place]),
            point=points[place // ious.shape[1]] + crop[:2],
            stability=float(ratios[i]),
            crop=crop,
          )
        )
    return found

  def _is_stable(self, stabilities: np.ndarray) -> np.ndarray:
    if self.stability_score_thresh <= 0:
      return np.ones(stabilities.shape, bool)
    return stabilities >= self.stability_score_thresh

  def _low_res_stability(
    self, logits: Array, original: tuple[int, int]
  ) -> np.ndarray:
    """Stability [b m] at the model's size, where the image is."""
    size = self.predictor.settings.encoder.image_size
    side = logits.shape[-1]
    starts = np.arange(side) * (size / side)
    rows, columns = (starts < n for n in resized_shape(*original, size))
    areas = _areas(
      logits.reshape(-1, side, side),
      np.outer(rows, columns),
      self.stability_score_offset,
    )
    return _ratio(np.asarray(areas)).reshape(logits.shape[:2])

  def _record(self, one: _Found) -> dict[str, Any]:
    segmentation: Any = one.rle
    if self.output_mode == "binary_mask":
      segmentation = rle.decode(one.rle)
    elif self.output_mode == "uncompressed_rle":
      runs = rle.decompress(one.rle["counts"])
      segmentation = {"size": one.rle["size"], "counts": runs}
    return {
      "segmentation": segmentation,
      "area": rle.area(one.rle),
      "bbox": xywh(one.box),
      "predicted_iou": one.iou,
      "point_coords": [one.point.tolist()],
      "stability_score": one.stability,
      "crop_box": xywh(one.crop),
    }


def xywh(box: Any) -> list[int]:
  """XYXY as [x, y, width, height], the differences of its corners."""
  x0, y0, x1, y1 = (int(n) for n in box)
  return [x0, y0, x1 - x0, y1 - y0]


def _grids(cfg: AutomaticMaskGenerator) -> list[np.ndarray]:
  """The points of each layer, [n 2] in parts of the crop."""
  if (cfg.points_per_side is None) == (cfg.point_grids is None):
    raise UserError(
      "give either points_per_side or point_grids, and None for the other"
    )
  layers = cfg.crop_n_layers + 1
  if cfg.points_per_side is not None:
    factor = cfg.crop_n_points_downscale_factor
    counts = [int(cfg.points_per_side / factor**i) for i in range(layers)]
    if min(counts) < 1:
      raise UserError(
        f"points_per_side={cfg.points_per_side} leaves layers of crops "
        f"{counts} points a side: each needs 1 or more"
      )
    return [point_grid(count) for count in counts]
  grids = [np.asarray(grid, np.float64) for grid in cfg.point_grids or ()]
  if len(grids) != layers:
    raise UserError(
      f"{len(grids)} point_grids for an image and {layers - 1} layers of "
      f"crops: give {layers}"
    )
  for i, grid in enumerate(grids):
    if grid.ndim != 2 or grid.shape[1] != 2 or not len(grid):
      raise UserError(
        f"point_grids[{i}] {list(grid.shape)} must be [n 2], n at least 1"
      )
    if not ((grid >= 0) & (grid <= 1)).all():
      raise UserError(f"point_grids[{i}] must hold numbers from 0 to 1")
  return grids


class _Measured(NamedTuple):
  """Masks in the size of the image, and what was measured of them.

  Attributes:
    masks: bool [k w' h']: columns are contiguous, as run-length codes want.
    areas: int32 [k 2], above the higher and the lower threshold.
    boxes: int32 [k 4], XYXY of the first and last pixel; 0 for empty masks.
  """

  masks: Array
  areas: Array
  boxes: Array


@jax.jit
def _measure(
  logits: Array, places: Array, frame: Frame, offset: float
) -> _Measured:
  """Measures some of the masks [b m s s], by their place among all."""
  flat = logits.reshape(-1, *logits.shape[2:])
  full = enlarge(flat[places], frame)
  rows, columns = (
    jnp.arange(length) < side
    for length, side in zip(full.shape[1:], frame.sides)
  )
  masks = full > 0
  x0, x1 = _ends(masks.any(1))
  y0, y1 = _ends(masks.any(2))
  return _Measured(
    jnp.swapaxes(masks, 1, 2),
    _areas(full, rows[:, None] & columns[None], offset),
    jnp.stack([x0, y0, x1, y1], axis=-1),
  )


@jax.jit
def _areas(logits: Array, inside: Array, offset: float) -> Array:
  """[k y x] -> int32 [k 2], counted where `inside` [y x]."""
  return jnp.stack(
    [
      jnp.sum((logits > limit) & inside[None], axis=(1, 2), dtype=jnp.int32)
      for limit in (offset, -offset)
    ],
    axis=-1,
  )


def _ends(present: Array) -> tuple[Array, Array]:
  """The first and last True of each row of [k n], and 0 where none is."""
  last = present.shape[1] - 1 - jnp.argmax(present[:, ::-1], axis=1)
  return jnp.argmax(present, axis=1), jnp.where(present.any(1), last, 0)


def _ratio(areas: np.ndarray) -> np.ndarray:
  """Stability [k] of areas [k 2]; see `slimsam.masks.stability`."""
  return areas[:, 0] / np.maximum(areas[:, 1], 1)


def _pasted(
  mask: np.ndarray, crop: list[int], h: int, w: int
) -> dict[str, Any]:
  """The code, in the image, of a crop's mask bool [w' h']."""
  x0, y0, x1, y1 = crop
  full = np.zeros((w, h), bool)
  full[x0:x1, y0:y1] = mask[: x1 - x0, : y1 - y0]
  return rle.encode(full.T)


def _area(box: list[int]) -> int:
  return (box[2] - box[0]) * (box[3] - box[1])


def _distinct(
  found: list[_Found], scores: list[float], threshold: float
) -> list[_Found]:
  """One of those with nearly the same box, by falling score."""
  boxes = np.array([one.box for one in found]).reshape(-1, 4)
  return [found[i] for i in nms(boxes, np.array(scores), threshold)]


def _cleaned(
  found: list[_Found], area: float, threshold: float
) -> list[_Found]:
  """Without small holes and islands; of doubles, those unchanged stay."""
  made, scores = [], []
  for one in found:
    mask, has_filled = fill_small(rle.decode(one.rle), area, "holes")
    mask, has_removed = fill_small(mask, area, "islands")
    changed = has_filled or has_removed
    if changed:
      one = one._replace(rle=rle.encode(mask), box=boxes_of(mask))
    made.append(one)
    scores.append(float(not changed))
  return _distinct(made, scores, threshold)
