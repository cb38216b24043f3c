import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam.preprocess import (
  MEAN,
  STD,
  check_boxes,
  check_points,
  preprocess,
  resized_shape,
  scale_boxes,
  scale_points,
  upscale,
)


@pytest.mark.parametrize(
  ("original", "size", "expected"),
  [
    ((1024, 1024), 1024, (1024, 1024)),
    ((1200, 1800), 1024, (683, 1024)),  # 682.67
    ((1800, 1200), 1024, (1024, 683)),
    ((427, 640), 1024, (683, 1024)),  # 683.2
    ((5, 10), 5, (3, 5)),  # 2.5 goes up, Python's `round` would give 2
    ((1, 1), 1024, (1024, 1024)),
    ((1, 5000), 1024, (1, 1024)),  # 0.2
    ((5000, 2), 64, (64, 1)),
  ],
)
def test_the_longest_side_fills_the_square(original, size, expected):
  assert resized_shape(*original, size) == expected


def test_a_side_of_nothing_is_refused(one_line):
  assert "0 rows and 7 columns" in one_line(resized_shape, 0, 7, 64)
  image = np.zeros((7, 0, 3), np.uint8)
  assert "7 rows and 0 columns" in one_line(preprocess, image, 64)


def triangle_resize(values, count):
  """Antialiased bilinear along the first axis, from its definition."""
  scale = len(values) / count
  support = max(scale, 1)
  made = []
  for i in range(count):
    centre = (i + 0.5) * scale
    weights = [
      max(0, 1 - abs(j + 0.5 - centre) / support) for j in range(len(values))
    ]
    made.append(np.tensordot(weights, values, 1) / sum(weights))
  return np.array(made)


@pytest.mark.parametrize("shape", [(40, 25), (9, 31), (3, 5), (16, 16)])
def test_images_are_resized_with_antialiasing(shape):
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  h, w = resized_shape(*shape, 16)
  made = preprocess(image, 16)
  assert made.shape == (16, 16, 3)
  assert made.dtype == np.float32
  colours = made[:h, :w] * STD + MEAN
  np.testing.assert_allclose(colours, np.round(colours), atol=1e-4)
  rows = triangle_resize(image.astype(float), h)
  truth = triangle_resize(rows.swapaxes(0, 1), w).swapaxes(0, 1)
  # Pillow rounds after each of the two axes.
  np.testing.assert_allclose(colours, truth, atol=1.01)


def test_the_padding_is_the_mean_colour():
  image = np.full((4, 8, 3), (0, 255, 128), np.uint8)
  made = preprocess(image, 16)
  colour = [-2.1179, 2.4286, 0.4265]  # (0, 255, 128), less mean, over std
  expected = np.broadcast_to(np.float32(colour), (8, 16, 3))
  np.testing.assert_allclose(made[:8], expected, atol=1e-4)
  assert (made[8:] == 0).all()
  tall = preprocess(image.swapaxes(0, 1), 16)
  np.testing.assert_array_equal(tall, made.swapaxes(0, 1))


def test_an_image_of_one_pixel():
  made = preprocess(np.array([[[10, 20, 30]]], np.uint8), 4)
  colour = (np.float32([10, 20, 30]) - MEAN) / STD
  np.testing.assert_array_equal(made, np.broadcast_to(colour, (4, 4, 3)))


@pytest.mark.parametrize(
  ("image", "found"),
  [
    (np.zeros((4, 5), np.uint8), "uint8 [4, 5]"),
    (np.zeros((4, 5, 4), np.uint8), "uint8 [4, 5, 4]"),
    (np.zeros((4, 5, 3), np.float32), "float32 [4, 5, 3]"),
  ],
)
def test_other_arrays_are_no_images(one_line, image, found):
  assert f"not {found}: read it with" in one_line(preprocess, image, 16)


def test_prompts_move_with_the_image():
  # 427 x 640 becomes 683 x 1024: the factors are 1.6 and 683 / 427.
  points = np.array([[[0, 0], [640, 427]], [[320, 100], [1, 2]]])
  moved = scale_points(points, (427, 640), 1024)
  expected = points * np.array([1.6, 683 / 427])[None, None]
  assert moved.dtype == jnp.float32
  np.testing.assert_allclose(moved, expected, rtol=1e-6)
  np.testing.assert_allclose(moved[0, 1], [1024, 683], rtol=1e-6)
  boxes = points.reshape(2, 4)
  np.testing.assert_array_equal(
    scale_boxes(boxes, (427, 640), 1024), moved.reshape(2, 4)
  )


def test_prompts_can_be_moved_inside_a_compiled_program():
  move = functools.partial(scale_boxes, original=(30, 20), size=60)
  boxes = np.array([[1, 2, 3, 4]])
  np.testing.assert_array_equal(jax.jit(move)(boxes), [[2, 4, 6, 8]])


def bilinear(image, shape):
  """`interpolate(mode="bilinear", align_corners=False)` of [h w], by pixels."""
  made = np.empty(shape)
  for i in range(shape[0]):
    for j in range(shape[1]):
      y, x = (
        max((k + 0.5) * old / new - 0.5, 0)
        for k, old, new in zip((i, j), image.shape, shape)
      )
      top, left = math.floor(y), math.floor(x)
      below = min(top + 1, image.shape[0] - 1)
      right = min(left + 1, image.shape[1] - 1)
      p, q = y - top, x - left
      made[i, j] = (
        (1 - p) * (1 - q) * image[top, left]
        + (1 - p) * q * image[top, right]
        + p * (1 - q) * image[below, left]
        + p * q * image[below, right]
      )
  return made


@pytest.mark.parametrize("image_size", [32, 8, 5])
@pytest.mark.parametrize(
  "original",
  [(50, 70), (70, 50), (5, 9), (9, 5), (32, 32), (1, 40), (90, 1), (1, 1)],
)
def test_masks_go_back_as_torch_interpolates_them(image_size, original):
  logits = np.random.default_rng(1).normal(0, 3, (2, 3, 8, 8))
  made = upscale(logits, image_size, original)
  assert made.shape == (2, 3, *original)
  assert made.dtype == jnp.float32
  h, w = resized_shape(*original, image_size)
  for at in ((0, 0), (1, 2)):
    square = bilinear(logits[at], (image_size, image_size))
    truth = bilinear(square[:h, :w], original)
    # Logits of about 10 in float32.
    np.testing.assert_allclose(made[at], truth, atol=5e-6)


def test_interpolation_has_half_pixels_and_no_antialiasing():
  row = np.tile([0.0, 1, 5, 3], (4, 1))
  # Values stand in the middle of their pixels, and the ends go on.
  np.testing.assert_allclose(
    upscale(row, 8, (8, 8))[0], [0, 0.25, 0.75, 2, 4, 4.5, 3.5, 3], atol=1e-6
  )
  # One of three pixels is looked at, not the mean of them.
  shrunk = upscale(np.tile([1.0, 0, 1, 1, 0, 1], (6, 1)), 6, (2, 2))
  np.testing.assert_allclose(shrunk, np.zeros((2, 2)), atol=1e-6)


def test_a_mask_comes_back_where_its_object_is():
  """The object's edges in a wide image, through the model's square."""
  image = np.zeros((60, 120, 3), np.uint8)
  image[12:36, 24:96] = 255
  logits = preprocess(image, 240)[2::4, 2::4, 0]  # of a model that sees white
  mask = upscale(logits, 240, (60, 120)) > 0
  np.testing.assert_array_equal(mask, image[..., 0] > 0)


def test_points_are_given_back_as_arrays():
  points, labels = check_points([[0, 0], [640, 480.5]], [1, 0], (481, 640))
  np.testing.assert_array_equal(points, np.float32([[0, 0], [640, 480.5]]))
  assert points.dtype == np.float32
  np.testing.assert_array_equal(labels, [1, 0])
  assert labels.dtype == np.int32
  batch = jnp.ones((2, 3, 2))
  points, labels = check_points(batch, jnp.ones((2, 3)), (4, 5))
  assert points.shape == (2, 3, 2)
  assert labels.shape == (2, 3)


@pytest.mark.parametrize("label", [-1, -10])
def test_points_that_are_no_points_may_be_anywhere(label):
  points, labels = check_points([[1, 1], [-9, 999]], [1, label], (4, 5))
  assert points[1].tolist() == [-9, 999]
  assert labels.tolist() == [1, label]


@pytest.mark.parametrize(
  ("points", "labels", "expected"),
  [
    ([[5, 1], [6, 1]], [1, 1], "points[1] is (6, 1), outside the image, which "
     "is 5 wide and 4 high"),
    ([[1, 4.001]], [0], "points[0] is (1, 4.001), outside"),
    ([[-0.5, 2]], [1], "points[0] is (-0.5, 2), outside"),
    ([[[1, 1]], [[1, 9]]], [[1], [1]], "points[1, 0] is (1, 9), outside"),
    ([[1, np.nan]], [1], "points[0] is (1, nan): give finite numbers"),
    ([[np.inf, 1]], [-1], "points[0] is (inf, 1): give finite numbers"),
    ([[1, 1]], [2], "labels[0] is 2: a label is 1 for the object"),
    ([[1, 1]], [0.5], "labels[0] is 0.5: a label is"),
    ([[1, 1]], 1, "points [1, 2] need labels [1], one each, not []"),
    ([[1, 1]], [1, 1], "points [1, 2] need labels [1], one each, not [2]"),
    ([1, 1], [1], "points [2] must be [... n 2]"),
    ([[1, 1, 1]], [1], "points [1, 3] must be [... n 2]"),
    (np.zeros((0, 2)), [], "points [0, 2] hold none: give at least one, or"),
    ([[1, 1], [1]], [1, 1], "points are no array"),
    ([["a", "b"]], [1], "points are <U1: give numbers"),
    ([[1, 1]], ["a"], "labels are <U1: give numbers"),
  ],
)  # fmt: skip
def test_points_without_an_answer_are_one_line(
  one_line, points, labels, expected
):
  assert expected in one_line(check_points, points, labels, (4, 5))


def test_boxes_are_given_back_as_an_array():
  boxes = check_boxes([[0, 0, 5, 4], [1, 2, 1, 2]], (4, 5))
  assert boxes.dtype == np.float32
  assert boxes.tolist() == [[0, 0, 5, 4], [1, 2, 1, 2]]


@pytest.mark.parametrize(
  ("boxes", "expected"),
  [
    ([[0, 0, 1, 1], [0, 0, 6, 4]], "boxes[1] is (0, 0, 6, 4), outside the "
     "image, which is 5 wide and 4 high"),
    ([[0, -1, 1, 1]], "boxes[0] is (0, -1, 1, 1), outside"),
    ([[[3, 1, 2, 2]]], "boxes[0, 0] is (3, 1, 2, 2), whose right or bottom"),
    ([[1, 3, 2, 2]], "left, top, right, bottom, not left, top, width, height"),
    ([[1, 3, 2, np.nan]], "boxes[0] is (1, 3, 2, nan): give finite numbers"),
    ([1, 2, 3, 4], "boxes [4] must be [... n 4]"),
    ([[1, 2, 3]], "boxes [1, 3] must be [... n 4]"),
    (np.zeros((0, 4)), "boxes [0, 4] hold none: give at least one, or leave"),
  ],
)  # fmt: skip
def test_boxes_without_an_answer_are_one_line(one_line, boxes, expected):
  assert expected in one_line(check_boxes, boxes, (4, 5))
