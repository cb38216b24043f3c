"""The generator against loops over one point and one mask at a time."""

import collections
import functools
import math
import types

import jax
import numpy as np
import pytest

from common.errors import UserError
from slimsam import predict, rle
from slimsam.amg import AutomaticMaskGenerator
from slimsam.masks import fill_small, stability
from slimsam.model import Sam
from slimsam.predict import Predictor
from slimsam.preprocess import preprocess, scale_points, upscale

H, W = 50, 72
LENIENT = {
  "points_per_side": 4, "points_per_batch": 6, "pred_iou_thresh": 0.05,
  "stability_score_thresh": 0.5, "box_nms_thresh": 0.75,
  "crop_nms_thresh": 0.4, "crop_overlap_ratio": 0.6,
  "crop_n_points_downscale_factor": 2,
}  # fmt: skip
CASES = {
  "image": {},
  "crops": {"crop_n_layers": 1},
  "regions": {"crop_n_layers": 1, "min_mask_region_area": 7},
}
# What masks fall to in each case; else it would test little.
FALLS = {
  "image": {"iou", "doubles"},
  "crops": {"iou", "stability", "edge", "doubles", "crops"},
  "regions": {
    "iou", "stability", "edge", "doubles", "crops", "changed", "regions",
  },
}  # fmt: skip


@pytest.fixture(scope="module")
def params(tiny, draw):
  """A random model whose masks are a few blobs.

  Logits are the product of two channels with each mask's two numbers. The
  first channel is made constant, so that the first number is a threshold.
  """
  params = draw(tiny)
  own = params["mask_decoder"]
  own["upscale"]["conv2"]["kernel"][..., 0] = 0
  own["upscale"]["conv2"]["bias"][0] = 1
  for head in own["hyper"].values():
    head["2"]["kernel"] *= [0, 120]
    head["2"]["bias"][:] = [-42, 200]
  return params


@pytest.fixture(scope="module")
def predictor(params, tiny):
  return Predictor(params, tiny)


@pytest.fixture(scope="module")
def image():
  return np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def encode(sam, params, inputs):
  return sam.apply({"params": params}, inputs[None], method=sam.encode)


@functools.partial(jax.jit, static_argnums=0)
def decode(sam, params, embedding, point):
  labels = np.ones((1, 1, 1), np.int32)
  made = sam.apply(
    {"params": params}, embedding, point[None, None, None], labels,
    method=sam.decode,
  )  # fmt: skip
  return made.logits[0, 0], made.iou[0, 0]


@pytest.fixture(scope="module")
def answer(params, tiny):
  """`(crop)`: a function from a point to full logits and scores of 3 masks."""
  sam, size = Sam(tiny), tiny.encoder.image_size

  def of(crop):
    embedding = encode(sam, params, preprocess(crop, size))

    @functools.cache
    def at(x, y):
      point = scale_points([x, y], crop.shape[:2], size)
      logits, iou = decode(sam, params, embedding, point)
      full = upscale(logits, size, crop.shape[:2])
      return np.asarray(full), np.asarray(iou).tolist()

    return at

  return of


def slow_crops(cfg):
  """Layer and XYXY of each crop."""
  found = [(0, 0, 0, W, H)]
  for layer in range(1, cfg.crop_n_layers + 1):
    n = 2**layer
    overlap = int(cfg.crop_overlap_ratio * min(H, W) * 2 / n)
    wide = math.ceil((overlap * (n - 1) + W) / n)
    high = math.ceil((overlap * (n - 1) + H) / n)
    for i in range(n):
      for j in range(n):
        x, y = (wide - overlap) * i, (high - overlap) * j
        found.append((layer, x, y, min(x + wide, W), min(y + high, H)))
  return found


def slow_box(mask):
  rows, columns = np.nonzero(mask)
  if not len(rows):
    return (0, 0, 0, 0)
  return columns.min(), rows.min(), columns.max(), rows.max()


def is_cut_off(box, crop):
  """Whether a side is within 20 pixels of the crop's and not of the image's."""
  return any(
    abs(side - of_crop) <= 20 < abs(side - of_image)
    for side, of_crop, of_image in zip(box, crop, (0, 0, W, H))
  )


def slow_nms(found, score, threshold):
  def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])

  kept = []
  for one in sorted(found, key=lambda one: -score(one)):
    for other in kept:
      a, b = one.box, other.box
      wide = min(a[2], b[2]) - max(a[0], b[0])
      high = min(a[3], b[3]) - max(a[1], b[1])
      inter = max(wide, 0) * max(high, 0)
      union = area(a) + area(b) - inter
      if union and inter / union > threshold:
        break
    else:
      kept.append(one)
  return kept


def slow_in_crop(cfg, crop, layer, at, seen):
  x0, y0, x1, y1 = crop
  n, found = int(cfg.points_per_side / 2**layer), []
  for j, i, m in np.ndindex(n, n, 3):
    x, y = (i + 0.5) / n * (x1 - x0), (j + 0.5) / n * (y1 - y0)
    logits, iou = at(x, y)
    if not iou[m] > cfg.pred_iou_thresh:
      seen["iou"] += 1
      continue
    large = np.sum(logits[m] > -1)
    ratio = np.sum(logits[m] > 1) / large if large else 0
    if ratio < cfg.stability_score_thresh:
      seen["stability"] += 1
      continue
    mask = np.zeros((H, W), bool)
    mask[y0:y1, x0:x1] = logits[m] > 0
    box = slow_box(mask)
    if is_cut_off(box, crop):
      seen["edge"] += 1
      continue
    found.append(
      types.SimpleNamespace(
        mask=mask, box=box, iou=iou[m], stability=ratio, crop=crop,
        point=(x + x0, y + y0),
      )
    )  # fmt: skip
  kept = slow_nms(found, lambda one: one.iou, cfg.box_nms_thresh)
  seen["doubles"] += len(found) - len(kept)
  return kept


def slow_generate(cfg, answer, image):
  """Masks, and how many were seen and fell to what."""
  found, seen = [], collections.Counter()
  for layer, *crop in slow_crops(cfg):
    x0, y0, x1, y1 = crop
    at = answer(image[y0:y1, x0:x1])
    found += slow_in_crop(cfg, crop, layer, at, seen)
  if cfg.crop_n_layers:

    def score(one):
      x0, y0, x1, y1 = one.crop
      return 1 / ((x1 - x0) * (y1 - y0))

    kept = slow_nms(found, score, cfg.crop_nms_thresh)
    seen["crops"] += len(found) - len(kept)
    found = kept
  if cfg.min_mask_region_area:
    for one in found:
      before = one.mask
      for mode in ("holes", "islands"):
        one.mask, _ = fill_small(one.mask, cfg.min_mask_region_area, mode)
      one.box = slow_box(one.mask)
      one.changed = bool((one.mask != before).any())
      seen["changed"] += one.changed
    threshold = max(cfg.box_nms_thresh, cfg.crop_nms_thresh)
    kept = slow_nms(found, lambda one: not one.changed, threshold)
    seen["regions"] += len(found) - len(kept)
    found = kept
  return found, seen


def xywh(box):
  return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loops(predictor, answer, image, case):
  generator = AutomaticMaskGenerator(predictor, **LENIENT | CASES[case])
  expected, seen = slow_generate(generator, answer, image)
  records = generator.generate(image)
  assert {name for name in seen if seen[name]} == FALLS[case]
  assert len(records) == len(expected) > 2
  for found, one in zip(records, expected):
    np.testing.assert_array_equal(found["segmentation"], one.mask)
    assert found["area"] == one.mask.sum()
    assert found["bbox"] == xywh(one.box)
    assert found["predicted_iou"] == pytest.approx(one.iou, abs=1e-5)
    np.testing.assert_allclose(found["point_coords"], [one.point])
    assert found["stability_score"] == pytest.approx(one.stability)
    assert found["crop_box"] == xywh(one.crop)
  assert len({tuple(r["crop_box"]) for r in records}) > (case != "image")
  assert not predictor.is_image_set


def test_output_modes_are_the_same_masks(predictor, image):
  masks, runs, codes = (
    [
      record["segmentation"]
      for record in AutomaticMaskGenerator(
        predictor, **LENIENT, output_mode=mode
      ).generate(image)
    ]
    for mode in ("binary_mask", "uncompressed_rle", "coco_rle")
  )
  assert len(masks) > 2
  for mask, run, code in zip(masks, runs, codes, strict=True):
    assert mask.dtype == bool
    assert isinstance(run["counts"], list)
    assert isinstance(code["counts"], str)
    assert run["size"] == code["size"] == [H, W]
    for found in (run, code):
      np.testing.assert_array_equal(rle.decode(found), mask)


@pytest.mark.parametrize("stability_at", ["original", "low_res"])
def test_small_parts_change_nothing(
  predictor, image, monkeypatch, stability_at
):
  generator = AutomaticMaskGenerator(
    predictor, **LENIENT, output_mode="coco_rle", stability_at=stability_at
  )
  expected = generator.generate(image)
  assert len(expected) > 2
  monkeypatch.setattr(predict, "_PIXELS", 2 * 64 * 128)
  assert generator.generate(image) == expected


def test_stability_at_low_resolution(predictor, image):
  """Of an image of 50 x 72 in a square of 40, whose logits are 20 x 20, the
  upper 14 rows are the image.
  """
  open_to_all = LENIENT | {"box_nms_thresh": 1.0, "stability_score_thresh": 0}
  every = AutomaticMaskGenerator(
    predictor, **open_to_all, stability_at="low_res"
  ).generate(image)
  least = float(np.median([record["stability_score"] for record in every]))
  some = AutomaticMaskGenerator(
    predictor,
    **open_to_all | {"stability_score_thresh": least},
    stability_at="low_res",
  ).generate(image)
  predictor.set_image(image)
  for record in every:
    made = predictor.decode([record["point_coords"]], np.ones((1, 1), int))
    ratios = stability(np.asarray(made.logits)[0, :, :14])
    m = np.abs(np.asarray(made.iou)[0] - record["predicted_iou"]).argmin()
    assert record["stability_score"] == pytest.approx(ratios[m], abs=1e-6)
  points = [r["point_coords"] for r in every if r["stability_score"] >= least]
  assert [record["point_coords"] for record in some] == points
  assert 2 < len(some) < len(every)


def test_own_points(predictor, image):
  """The grid given as points is the grid."""
  grid = [[(i + 0.5) / 4, (j + 0.5) / 4] for j in range(4) for i in range(4)]
  found = [
    AutomaticMaskGenerator(
      predictor, **LENIENT | own, output_mode="coco_rle"
    ).generate(image)
    for own in ({}, {"points_per_side": None, "point_grids": [grid]})
  ]
  assert found[0] == found[1]
  assert len(found[0]) > 2


def test_nothing_may_be_found(predictor, image):
  generator = AutomaticMaskGenerator(
    predictor, **LENIENT | CASES["regions"] | {"pred_iou_thresh": 1e9}
  )
  assert generator.generate(image) == []


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    ({"output_mode": "coco_rel"}, "output_mode='coco_rel'; did you mean "
     "'coco_rle'"),
    ({"stability_at": "low"}, "stability_at='low'"),
    ({"points_per_batch": 0}, "points_per_batch=0 must be at least 1"),
    ({"points_per_side": 0}, "points_per_side=0 leaves layers of crops [0]"),
    ({"points_per_side": 3, "crop_n_layers": 2,
      "crop_n_points_downscale_factor": 2}, "[3, 1, 0] points a side"),
    ({"points_per_side": None}, "either points_per_side or point_grids"),
    ({"point_grids": [[[0, 0]]]}, "either points_per_side or point_grids"),
    ({"points_per_side": None, "point_grids": [[[0, 0]]], "crop_n_layers": 1},
     "1 point_grids for an image and 1 layers of crops: give 2"),
    ({"points_per_side": None, "point_grids": [[0, 0]]}, "point_grids[0] [2]"),
    ({"points_per_side": None, "point_grids": [[[0, 9]]]}, "from 0 to 1"),
    ({"min_mask_region_area": -1}, "min_mask_region_area=-1"),
    ({"stability_score_offset": math.nan}, "stability_score_offset=nan"),
  ],
)  # fmt: skip
def test_bad_settings(predictor, arguments, text):
  with pytest.raises(UserError) as caught:
    AutomaticMaskGenerator(predictor, **arguments)
  assert text in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("image", "text"),
  [
    (np.zeros((5, 5), np.uint8), "not [5, 5]"),
    (np.zeros((5, 5, 3)), "an image is uint8"),
    (np.zeros((0, 5, 3), np.uint8), "0 x 5"),
  ],
)
def test_bad_images(predictor, image, text):
  with pytest.raises(UserError) as caught:
    AutomaticMaskGenerator(predictor, **LENIENT).generate(image)
  assert text in str(caught.value)
