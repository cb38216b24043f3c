import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from slimsam import composite as module
from slimsam import rle, shapes
from slimsam.composite import Layer, composite, crops, inner_point, paint
from slimsam.photographs import Images
from slimsam.sources import Sample, Source, fingerprint_of

# Far apart, so that a pixel's colour says what it shows.
COLORS = ((255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 255))


class Flat(Source):
  """Photographs of one colour each."""

  labelled = False

  def __init__(self, colors=COLORS, size=(90, 70)):
    self.colors, self.size = colors, size
    self.decoded = 0

  def __len__(self):
    return len(self.colors)

  @property
  def fingerprint(self):
    return fingerprint_of(self.colors, self.size)

  def read(self, i):
    self.decoded += 1
    image = np.broadcast_to(np.uint8(self.colors[i]), (*self.size, 3))
    return Sample(f"flat_{i}", image.copy(), ())


class Ramp(Source):
  """A photograph whose colour is the place: (x, y, 0)."""

  labelled = False
  fingerprint = "ramp"

  def __len__(self):
    return 1

  def read(self, i):
    y, x = np.mgrid[:200, :240].astype(np.uint8)
    return Sample("ramp", np.stack([x, y, 0 * x], -1), ())


def distance(image, color):
  difference = image.astype(float) - np.asarray(color, float)
  return np.sqrt((difference**2).sum(-1))


def nearest(image, colors):
  return np.argmin([distance(image, color) for color in colors], 0)


def masks(sample):
  return [rle.decode(a.rle) for a in sample.annotations]


def near(mask, reach):
  """Pixels with one of `mask` at most `reach` rows and columns away."""
  padded = np.pad(mask, reach)
  side = 2 * reach + 1
  return np.lib.stride_tricks.sliding_window_view(padded, (side, side)).any(
    (2, 3)
  )


@pytest.mark.parametrize("size", [32, 64, 100])
def test_a_mask_is_where_the_object_has_most_of_the_colour(size, monkeypatch):
  """One object, two colours: every pixel is nearer to one of them."""
  monkeypatch.setattr(module, "_TEXTURED", 1)
  for i in range(40):
    source = composite(Flat(), i + 1, size, 7, objects=(1, 1))
    sample = source[i]
    (mask,) = masks(sample)
    shown = {tuple(c) for c in sample.image.reshape(-1, 3).tolist()}
    object_, ground = _two(shown.intersection(COLORS), sample, mask)
    np.testing.assert_array_equal(
      nearest(sample.image, [ground, object_]) == 1, mask
    )


def _two(pure, sample, mask):
  """Colours of the object and of what it lies on; both are there pure."""
  assert len(pure) == 2
  first, second = pure
  inside = (sample.image[mask] == first).all(-1).mean()
  return (first, second) if inside > 0.4 else (second, first)


@pytest.mark.parametrize("seed", range(8))
def test_masks_hold_what_is_to_be_seen(seed):
  """Against a painter who goes from pixel to pixel."""
  random, size = np.random.default_rng(seed), 24
  layers = []
  for color in COLORS:
    corner, alpha = shapes.draw(random, size)
    layers.append(Layer(corner, alpha, Image.new("RGB", alpha.size, color)))
  image, found = paint(Image.new("RGB", (size, size)), layers)
  shown = np.zeros((size, size, 3))
  numbers = np.full((size, size), -1)
  for k, ((left, top), alpha, _) in enumerate(layers):
    for y, row in enumerate(np.asarray(alpha), top):
      for x, value in enumerate(row / 255, left):
        shown[y, x] = value * np.array(COLORS[k]) + (1 - value) * shown[y, x]
        if value > 0.5:
          numbers[y, x] = k
  assert len(found) == len(COLORS)
  for k, mask in enumerate(found):
    np.testing.assert_array_equal(mask, numbers == k)
  np.testing.assert_allclose(image, shown, atol=len(COLORS))  # It rounds.


def test_no_pixel_is_of_two_objects():
  several = 0
  for sample in composite(Flat(), 60, 48, 0, objects=(1, 4)):
    assert sum(mask.astype(int) for mask in masks(sample)).max() == 1
    several += len(sample.annotations) > 1
  assert several > 20


def layer(corner, alpha, color):
  alpha = Image.fromarray(np.asarray(alpha, np.uint8))
  return Layer(corner, alpha, Image.new("RGB", alpha.size, color))


def test_painting_by_hand():
  low = layer((0, 0), np.full((3, 4), 255), (200, 0, 0))
  edge = [[0, 127, 128], [255, 255, 255]]
  high = layer((2, 1), edge, (0, 100, 0))
  image, (first, second) = paint(Image.new("RGB", (5, 4)), [low, high])
  expected = np.zeros((4, 5), bool)
  expected[1, 4] = expected[2, 2:5] = True
  np.testing.assert_array_equal(second, expected)
  rest = np.zeros((4, 5), bool)
  rest[:3, :4] = True
  np.testing.assert_array_equal(first, rest & ~expected)
  assert image[0, 0].tolist() == [200, 0, 0]
  assert image[2, 3].tolist() == [0, 100, 0]
  assert image[1, 3].tolist() == [100, 50, 0]
  assert image[3, 0].tolist() == [0, 0, 0]


def test_boxes_and_points_are_of_the_visible_mask():
  for sample in composite(Flat(), 60, 64, 2, objects=(2, 5)):
    for annotation, mask in zip(sample.annotations, masks(sample)):
      assert mask.sum() >= module.MIN_AREA
      assert list(annotation.bbox) == rle.bbox(annotation.rle)
      x, y = annotation.point
      assert (x, y) == (int(x), int(y))
      assert mask[int(y), int(x)]
      deep = ~near(~np.pad(mask, 2), 2)[2:-2, 2:-2]
      if deep.any():
        cross = [(0, 0), (0, 2), (0, -2), (2, 0), (-2, 0)]
        assert all(mask[int(y) + b, int(x) + a] for a, b in cross)


def test_every_picture_has_an_annotation_and_the_last_object_is_one():
  counts = []
  for sample in composite(Flat(), 80, 24, 5, objects=(6, 6)):
    assert sample.annotations[-1].id == 5
    counts.append(len(sample.annotations))
  assert min(counts) < 6  # What is covered has none.


@pytest.mark.parametrize(
  ("mask", "points"),
  [
    (np.ones((5, 5)), {(2, 2)}),
    (np.ones((3, 4)), {(1, 1), (2, 1)}),
    (np.eye(3), {(0, 0), (1, 1), (2, 2)}),
  ],
)
def test_points_lie_as_far_inside_as_two_pixels(mask, points):
  random = np.random.default_rng(0)
  drawn = {inner_point(random, mask.astype(bool)) for _ in range(60)}
  assert drawn == points


def equal(a, b):
  return (
    a.name == b.name
    and np.array_equal(a.image, b.image)
    and a.annotations == b.annotations
  )


@pytest.mark.parametrize("make", [composite, crops])
def test_a_picture_is_a_function_of_seed_and_number(make):
  source = make(Flat(), 20, 32, 3)
  forward = [source[i] for i in range(20)]
  for other in (
    make(Flat(), 20, 32, 3),
    make(Flat(), 900, 32, 3),
    pickle.loads(pickle.dumps(source)),
  ):
    assert all(equal(other[i], forward[i]) for i in reversed(range(20)))
  assert not equal(make(Flat(), 20, 32, 4)[0], forward[0])
  images = {sample.image.tobytes() for sample in forward}
  assert len(images) > (3 if make is crops else 19)


@pytest.mark.parametrize("make", [composite, crops])
def test_fingerprints_change_with_every_setting(make):
  variants = [
    (Flat(), 20, 32, 3), (Flat(COLORS[:3]), 20, 32, 3), (Flat(), 21, 32, 3),
    (Flat(), 20, 33, 3), (Flat(), 20, 32, 4), (Flat(), 20, 32, (3, 1)),
  ]  # fmt: skip
  prints = [make(*variant).fingerprint for variant in variants]
  assert len(set(prints)) == len(prints)
  assert make(*variants[0]).fingerprint == prints[0]
  if make is composite:
    assert make(*variants[0], objects=(1, 5)).fingerprint not in prints


def test_only_composites_are_labelled():
  assert composite(Flat(), 1, 32, 0).labelled
  source = crops(Flat(), 1, 32, 0)
  assert not source.labelled
  assert source[0].annotations == ()
  assert source[0].image.shape == (32, 32, 3)
  assert source[0].image.dtype == np.uint8


def test_crops_are_squares_of_the_photograph_at_many_scales():
  widths, flipped = [], 0
  source = crops(Ramp(), 200, 50, 0)
  for sample in source:
    x, y = (sample.image[..., k].astype(float) for k in (0, 1))
    assert np.ptp(x, axis=0).max() == np.ptp(y, axis=1).max() == 0
    assert y[-1, 0] > y[0, 0]  # Never upside down.
    flipped += x[0, 0] > x[0, -1]
    width, height = np.abs(x[0, -1] - x[0, 0]), y[-1, 0] - y[0, 0]
    assert abs(width - height) <= 2
    widths.append(width * 50 / 49)
  assert 70 < flipped < 130
  # 50 pixels, a quarter of the side, are not scaled up.
  assert 48 < min(widths) < 60
  assert 190 < max(widths) < 202


def test_small_photographs_are_scaled_up():
  source = composite(Flat(size=(9, 7)), 4, 40, 0)
  assert {sample.image.shape for sample in source} == {(40, 40, 3)}


def test_photographs_are_decoded_once_and_kept_small(monkeypatch):
  flat = Flat(size=(600, 900))
  source = composite(flat, 50, 16, 0)
  list(source)
  assert flat.decoded == len(COLORS)
  assert source.photographs[0].size == (96, 64)
  # A copy for another process takes no decoded photographs along.
  assert len(pickle.dumps(source)) < 1500
  # With room for two, the others are decoded again, and nothing else changes.
  monkeypatch.setattr(module, "_MOST_BYTES", 2 * 3 * 96 * 64)
  tight = composite(flat, 50, 16, 0)
  assert all(equal(a, b) for a, b in zip(tight, source, strict=True))
  assert flat.decoded > 2 * len(COLORS)
  assert len(tight.photographs._kept) == 2


@pytest.mark.parametrize("outline", shapes._OUTLINES)
def test_outlines_have_radius_one_and_do_not_cross(outline):
  random = np.random.default_rng(1)
  for _ in range(200):
    corners = outline(random)
    radii = np.hypot(*corners.T)
    assert 0.1 < radii.min() <= radii.max() <= 1 + 1e-9
    turns = np.diff(np.arctan2(corners[:, 1], corners[:, 0])) % (2 * np.pi)
    assert turns.sum() < 2 * np.pi  # They go once around the middle.


def test_a_shapes_coverage_is_that_of_its_area():
  """A square from 2.5 to 5.5: pixels at its edges are half covered."""
  corners = np.array([[2.5, 2.5], [5.5, 2.5], [5.5, 5.5], [2.5, 5.5]])
  alpha = np.asarray(shapes._coverage(corners, np.array([8, 8])))
  assert alpha.shape == (8, 8)
  assert (alpha[3:5, 3:5] == 255).all()
  # Pillow takes the outline's pixels for inside: an eighth of a pixel more.
  np.testing.assert_allclose(alpha[2, 3:5] / 255, 0.5, atol=0.26)
  assert abs(alpha.sum() / 255 - 9) < 1.7
  assert alpha[:2].sum() == alpha[6:].sum() == 0


def test_shapes_stay_in_the_picture():
  random = np.random.default_rng(0)
  for _ in range(300):
    (x, y), alpha = shapes.draw(random, 20)
    width, height = alpha.size
    assert 0 <= x < x + width <= 20
    assert 0 <= y < y + height <= 20


BAD = [
  ({"length": 0}, "data.source.length=0"),
  ({"size": 8}, "data.source.size=8: give 16"),
  ({"seed": -1}, "data.source.seed=-1"),
  ({"source": Images((), ())}, "holds no image"),
]


@pytest.mark.parametrize("make", [composite, crops])
@pytest.mark.parametrize(("change", "words"), BAD)
def test_settings_that_make_no_picture(one_line, make, change, words):
  settings = {"source": Flat(), "length": 1, "size": 32, "seed": 0}
  assert words in one_line(make, **{**settings, **change})


@pytest.mark.parametrize("objects", [(0, 3), (3, 2), (2,), (1, 2, 3)])
def test_objects_need_a_range(one_line, objects):
  message = one_line(composite, Flat(), 1, 32, 0, objects=objects)
  assert "give the fewest and the most" in message


def test_composites_need_another_photograph(one_line):
  assert "at least two" in one_line(composite, Flat(COLORS[:1]), 1, 32, 0)


def test_pictures_do_not_depend_on_the_process():
  """Nothing global is drawn from, and nothing depends on Python's hashes."""
  code = """
import hashlib
from slimsam.composite import composite
from slimsam.sources import Sample, Source
import numpy as np
class Flat(Source):
  labelled, fingerprint = False, ""
  def __len__(self):
    return 3
  def read(self, i):
    return Sample("", np.full((40, 50, 3), 99 * i, np.uint8), ())
for sample in composite(Flat(), 4, 32, 0):
  content = sample.image.tobytes() + repr(sample.annotations).encode()
  print(hashlib.sha256(content).hexdigest())
"""
  printed = [
    subprocess.run(
      [sys.executable, "-c", code],
      env={**os.environ, "PYTHONHASHSEED": seed},
      capture_output=True,
      check=True,
    ).stdout
    for seed in ("1", "2")
  ]
  assert printed[0] == printed[1]
  assert len(set(printed[0].split())) == 4
