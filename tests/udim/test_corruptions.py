import itertools

import numpy as np
import pytest

from common.errors import UserError
from common.rngs import np_rng
from udim.corruptions import (
  FAMILIES,
  SEVERITIES,
  VALIDATION_FAMILIES,
  bilinear,
  blur,
  contrast,
  corrupt,
  impulse,
  inversion,
  occlusion,
  rotate,
  shift,
)

ALL = {**FAMILIES, **VALIDATION_FAMILIES}
EVERY = [(family, s) for family in ALL for s in SEVERITIES]


def rng(name="test"):
  return np_rng(0, name)


def images(count=40, size=8, channels=1):
  """Smooth images: neighbours resemble each other, as in photographs."""
  noise = rng("images").random((count, size + 2, size + 2, channels))
  windows = np.lib.stride_tricks.sliding_window_view(noise, (3, 3), (1, 2))
  return windows.mean((-1, -2)).astype(np.float32) * 1.6 - 0.3


def clean():
  return images().clip(0, 1)


def test_there_are_eight_families_with_five_severities():
  assert list(FAMILIES) == [
    "gauss", "impulse", "blur", "contrast",
    "brightness", "inversion", "shift", "occlusion",
  ]  # fmt: skip
  assert SEVERITIES == (1, 2, 3, 4, 5)
  for _, strengths in FAMILIES.values():
    assert len(strengths) == 5


@pytest.mark.parametrize(("family", "severity"), EVERY)
def test_every_corruption_keeps_the_form(family, severity):
  before = clean()
  kept = before.copy()
  after = corrupt(before, family, severity, rng=rng())
  assert after.shape == before.shape
  assert after.dtype == np.float32
  assert after.min() >= 0
  assert after.max() <= 1
  np.testing.assert_array_equal(before, kept)  # changed nothing in place
  again = corrupt(before, family, severity, rng=rng())
  np.testing.assert_array_equal(after, again)


@pytest.mark.parametrize("family", ALL)
def test_a_higher_severity_changes_more(family):
  before = clean()
  change = [
    np.abs(corrupt(before, family, s, rng=rng()) - before).mean()
    for s in SEVERITIES
  ]
  assert change[0] > 0.002
  assert all(a < b for a, b in itertools.pairwise(change)), change


@pytest.mark.parametrize(
  ("family", "severity", "message"),
  [
    ("gaus", 1, "'gaus' is unknown; did you mean 'gauss'"),
    ("blur", 0, "severity 0 of 'blur': choose 1 to 5"),
    ("blur", 6, "severity 6 of 'blur': choose 1 to 5"),
  ],
)
def test_unknown_corruptions_are_named(family, severity, message):
  with pytest.raises(UserError, match=message):
    corrupt(clean(), family, severity, rng=rng())


def test_colour_images_and_other_sizes():
  photo = images(count=2, size=20, channels=3).clip(0, 1)
  for family in ALL:
    assert corrupt(photo, family, 5, rng=rng()).shape == photo.shape


def test_bilinear_weighs_the_four_pixels_around():
  image = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1)  # 0 1 2 / 3 4 5
  rows, columns = np.full((1, 2, 3), 0.25), np.full((1, 2, 3), 1.5)
  expected = 0.75 * (1 + 2) / 2 + 0.25 * (4 + 5) / 2
  np.testing.assert_allclose(bilinear(image, rows, columns), expected)
  outside = bilinear(image, rows - 1, columns)  # a quarter of row 0, else black
  np.testing.assert_allclose(outside, 0.25 * (1 + 2) / 2)
  assert not bilinear(image, rows + 9, columns).any()


def test_kinds_for_choosing_settings():
  before = clean()
  np.testing.assert_allclose(
    corrupt(before, "gamma", 2, rng=rng()), np.sqrt(before), atol=1e-6
  )
  turned = corrupt(before, "rotation", 3, rng=rng())
  ways = [rotate(before, degrees) for degrees in (30, -30)]
  left = [np.abs(turned - w).max((1, 2, 3)) < 1e-6 for w in ways]
  assert (left[0] ^ left[1]).all()
  assert 8 < left[0].sum() < 32
  # At half the size, the middle of the image is what it was around it.
  small = corrupt(np.ones((1, 9, 9, 1)), "zoom", 5, rng=rng())
  assert small[0, 2:7, 2:7].min() == 1
  assert not small[0, :2].any()


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4])
def test_quarter_turns_move_whole_pixels(turns):
  before = images()
  after = rotate(before, 90 * turns)
  # The same direction as np.rot90: counter-clockwise with row 0 on top.
  np.testing.assert_allclose(after, np.rot90(before, turns, (1, 2)), atol=1e-6)


def test_a_slanted_rotation_against_the_formula():
  before = images(count=1).astype(float)
  after = rotate(before, 30)
  angle, middle = np.radians(30), 3.5
  for i, j in ((2, 3), (4, 6), (3, 3)):
    y, x = i - middle, j - middle
    row = middle + np.cos(angle) * y + np.sin(angle) * x
    column = middle + np.cos(angle) * x - np.sin(angle) * y
    top, left = int(row), int(column)
    dy, dx = row - top, column - left
    p = before[0, :, :, 0]
    expected = (
      (1 - dy) * ((1 - dx) * p[top, left] + dx * p[top, left + 1])
      + dy * ((1 - dx) * p[top + 1, left] + dx * p[top + 1, left + 1])
    )  # fmt: skip
    np.testing.assert_allclose(after[0, i, j, 0], expected, rtol=1e-6)


def test_blur_spreads_a_point_as_a_gaussian():
  point = np.zeros((1, 17, 17, 1))
  point[0, 8, 8] = 1
  spread = blur(point, 1 / 17, rng())[0, :, :, 0]  # a sigma of one pixel
  np.testing.assert_allclose(spread.sum(), 1, rtol=1e-6)
  np.testing.assert_allclose(spread[8, 9] / spread[8, 8], np.exp(-0.5))
  np.testing.assert_allclose(spread, spread.T)


def test_blur_lets_light_leave_at_the_border():
  white = np.ones((1, 17, 17, 1))
  spread = blur(white, 2 / 17, rng())[0, :, :, 0]
  np.testing.assert_allclose(spread[8, 8], 1, rtol=1e-3)
  # At the border half of the light comes from outside, where it is black: half
  # of a Gaussian and of its middle, of width 1 / (2 sqrt(2 pi)).
  half = (1 + 1 / (2 * np.sqrt(2 * np.pi))) / 2
  np.testing.assert_allclose(spread[8, 0], half, rtol=1e-3)


def test_contrast_keeps_the_mean_of_each_image():
  before = images()
  after = contrast(before, 0.25, rng())
  np.testing.assert_allclose(
    after.mean((1, 2, 3)), before.mean((1, 2, 3)), rtol=1e-5
  )
  np.testing.assert_allclose(
    after.std((1, 2, 3)), 0.25 * before.std((1, 2, 3)), rtol=1e-5
  )


def test_inversion_of_full_strength_is_the_negative():
  np.testing.assert_allclose(inversion(images(), 1.0, rng()), 1 - images())


def test_impulse_makes_the_share_black_or_white():
  grey = np.full((100, 8, 8, 2), 0.5)
  after = impulse(grey, 0.3, rng())
  np.testing.assert_array_equal(after[..., 0], after[..., 1])  # whole pixels
  # 6400 pixels: three standard deviations of a share are below 0.02.
  assert abs((after[..., 0] == 0).mean() - 0.15) < 0.02
  assert abs((after[..., 0] == 1).mean() - 0.15) < 0.02


def test_shift_moves_each_image_the_same_way_far():
  point = np.zeros((30, 17, 17, 1))
  point[:, 8, 8] = 1
  after = shift(point, 3 / 17, rng())[..., 0]
  np.testing.assert_allclose(after.sum((1, 2)), 1, rtol=1e-6)
  y, x = np.mgrid[:17, :17] - 8
  moved = np.stack([(after * axis).sum((1, 2)) for axis in (y, x)])
  np.testing.assert_allclose(np.hypot(*moved), 3, rtol=1e-6)
  assert np.ptp(moved, 1).min() > 4  # in all directions


def test_occlusion_blackens_one_square_inside():
  white = np.ones((30, 8, 8, 1))
  after = occlusion(white, 3 / 8, rng())[..., 0]
  assert ((after == 0).sum((1, 2)) == 9).all()
  for axis in (1, 2):
    assert ((after == 0).any(axis).sum(1) == 3).all()
  assert len(np.unique(after, axis=0)) > 10
