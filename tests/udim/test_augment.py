import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from common.errors import UserError
from common.rngs import np_rng
from udim import augment
from udim.augment import (
  STATISTICS,
  Transform,
  color_jitter,
  crop_box,
  crop_flip,
  denormalize,
  domainbed,
  make_transform,
  normalize,
  resize,
  shift_hue,
)


def photo(height=60, width=90):
  y, x = np.mgrid[:height, :width]
  waves = [np.sin(x / 7), np.cos(y / 9), np.sin((x + y) / 11)]
  return (127 + 120 * np.stack(waves, -1)).astype(np.uint8)


def rng(*counters):
  return np_rng(0, "augment", *counters)


def test_the_statistics_are_those_of_imagenet():
  assert STATISTICS["imagenet"] == (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
  )
  white = normalize(np.full((2, 2, 3), 255, np.uint8), "imagenet")
  assert white.dtype == np.float32
  expected = (1 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(white[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_normalisation_can_be_undone(statistics):
  image = photo()
  values = denormalize(normalize(image, statistics), statistics)
  np.testing.assert_allclose(values, image / 255, atol=1e-6)
  floats = (image / 255).astype(np.float32)
  np.testing.assert_allclose(
    normalize(floats, statistics), normalize(image, statistics), atol=1e-6
  )


def test_statistics_for_other_channels_are_refused():
  with pytest.raises(UserError, match=r"'imagenet' is for 3 channels.* 1:"):
    normalize(np.zeros((8, 8, 1), np.float32), "imagenet")
  assert normalize(np.zeros((8, 8, 2), np.float32), "none").shape == (8, 8, 2)


def test_resizing_is_pillows():
  made = Image.fromarray(photo()).resize((24, 24), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(resize(photo(), 24), np.asarray(made))
  same = photo(24, 24)
  assert resize(same, 24) is same


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_any_channels_and_floats_resize(channels, dtype):
  image = photo()[..., :channels].astype(dtype)
  small = resize(image, 30)
  assert small.shape == (30, 30, channels)
  assert small.dtype == dtype
  # Bytes are rounded.
  np.testing.assert_allclose(small, resize(photo(), 30)[..., :channels], atol=1)


def test_evaluation_resizes_and_normalises():
  transform = Transform(size=24, statistics="imagenet")
  made = transform.evaluate(photo())
  assert made.shape == (24, 24, 3)
  np.testing.assert_array_equal(
    made, normalize(resize(photo(), 24), "imagenet")
  )
  pair = np.stack([photo(), photo()[::-1]])
  together = transform.evaluate_all(pair)
  for one, image in zip(together, pair, strict=True):
    np.testing.assert_array_equal(one, transform.evaluate(image))
  np.testing.assert_array_equal(transform.train(photo(), rng()), made)


def test_size_0_keeps_the_size():
  assert Transform().evaluate(photo()).shape == photo().shape
  assert Transform().evaluate_all(photo()[None]).shape == (1, 60, 90, 3)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (64, 64), (90, 70)])
def test_crops_are_of_the_right_area_and_shape(height, width):
  boxes = np.array([crop_box(height, width, rng(i)) for i in range(500)])
  top, left, h, w = boxes.T
  assert (top >= 0).all()
  assert (left >= 0).all()
  assert (top + h <= height).all()
  assert (left + w <= width).all()
  area = h * w / (height * width)
  # Sides are rounded to pixels.
  assert area.min() > 0.67
  assert area.max() <= 1
  assert (w / h).min() > 0.72
  assert (w / h).max() < 1.38
  # The largest permitted box of 60 x 90 has an area of 0.89.
  assert np.ptp(area) > 0.15
  assert len(np.unique(top)) > 5


@pytest.mark.parametrize(
  ("height", "width", "box"),
  [(100, 500, (0, 183, 100, 133)), (500, 100, (183, 0, 133, 100))],
)
def test_an_image_too_long_for_any_box_gives_its_centre(height, width, box):
  # torchvision's own fallback for these sizes.
  assert crop_box(height, width, rng()) == box


def test_hue_turns_the_colour_circle():
  red = Image.new("RGB", (2, 2), (255, 0, 0))
  # A third of the circle; HSV in bytes is not exact.
  green = np.asarray(shift_hue(red, 1 / 3))[0, 0]
  blue = np.asarray(shift_hue(red, -1 / 3))[0, 0]
  np.testing.assert_allclose(green, [0, 255, 0], atol=6)
  np.testing.assert_allclose(blue, [0, 0, 255], atol=6)
  grey = Image.new("RGB", (2, 2), (90, 90, 90))
  np.testing.assert_array_equal(np.asarray(shift_hue(grey, 0.2)), 90)


def test_jitter_changes_colours_and_follows_its_generator():
  image = Image.fromarray(photo())
  made = [np.asarray(color_jitter(image, rng(i))) for i in range(30)]
  again = np.asarray(color_jitter(image, rng(4)))
  np.testing.assert_array_equal(again, made[4])
  means = np.array([m.mean() for m in made])
  assert means.std() > 5
  # Brightness changes by 30 % at most, contrast keeps the mean.
  assert means.min() > 0.6 * photo().mean()
  assert means.max() < 1.4 * photo().mean()


class Recorded:
  """Draws as its generator does, and keeps them."""

  def __init__(self, seed):
    self._rng, self.uniforms, self.orders = rng(seed), [], []

  def uniform(self, *arguments):
    drawn = self._rng.uniform(*arguments)
    self.uniforms.append(drawn)
    return drawn

  def permutation(self, count):
    order = self._rng.permutation(count)
    self.orders.append(tuple(order))
    return order


def by_hand(image, factors, hue, order):
  """torchvision's formulas on bytes, rounded after every operation."""

  def blend(other, factor):
    mixed = other + factor * (pixels.astype(float) - other)
    return np.clip(mixed, 0, 255).astype(np.uint8)

  pixels = np.asarray(image)
  for i in order:
    grey = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    if i == 0:
      pixels = blend(0.0, factors[0])
    elif i == 1:
      pixels = blend(float(int(grey.mean() + 0.5)), factors[1])
    elif i == 2:
      pixels = blend(grey.astype(float), factors[2])
    else:
      pixels = np.asarray(shift_hue(Image.fromarray(pixels), hue))
  return pixels


def test_jitter_is_its_four_formulas_in_a_random_order():
  image = Image.fromarray(photo())
  recorded = [Recorded(seed) for seed in range(200)]
  for one in recorded[:20]:
    found = np.asarray(color_jitter(image, one), int)
    (factors, hue), (order,) = one.uniforms, one.orders
    expected = by_hand(image, factors, hue, order).astype(int)
    # One step of 255, where Pillow rounds another way, and hue spreads it.
    assert np.mean(np.abs(found - expected)) < 1
  for one in recorded[20:]:
    color_jitter(image, one)
  factors = np.array([one.uniforms[0] for one in recorded])
  hues = np.array([one.uniforms[1] for one in recorded])
  assert np.all((factors.min(0) > 0.7) & (factors.min(0) < 0.72))
  assert np.all((factors.max(0) < 1.3) & (factors.max(0) > 1.28))
  assert -0.3 < hues.min() < -0.28
  assert 0.28 < hues.max() < 0.3
  assert len({one.orders[0] for one in recorded}) == 24


def test_domainbeds_augmentation():
  transform = Transform(size=32, augment="domainbed", statistics="imagenet")
  made = np.stack([transform.train(photo(), rng(i)) for i in range(200)])
  assert made.shape == (200, 32, 32, 3)
  assert made.dtype == np.float32
  again = transform.train(photo(), rng(7))
  np.testing.assert_array_equal(again, made[7])
  assert len(np.unique(made, axis=0)) == 200
  values = denormalize(made, "imagenet")
  assert values.min() > -1e-5
  assert values.max() < 1 + 1e-5
  grey = (np.ptp(values, -1) < 1e-5).all((1, 2))
  # A tenth of 200: two standard deviations are 8.
  assert 8 <= grey.sum() <= 34
  kept = transform.evaluate(photo())
  assert not np.isin(kept.sum(), made.sum((1, 2, 3)))


def test_half_of_the_images_are_flipped(monkeypatch):
  monkeypatch.setattr(augment, "color_jitter", lambda image, rng: image)
  monkeypatch.setattr(augment, "GREY", 0)
  ramp = np.arange(64, dtype=np.uint8)[None, :, None] * np.ones(
    (64, 1, 3), "u1"
  )
  flipped = []
  for i in range(200):
    made = domainbed(ramp, 32, rng(i)).astype(int)
    flipped.append(made[0, 0, 0] > made[0, -1, 0])
  assert 80 <= sum(flipped) <= 120


def test_crop_flip_shifts_by_an_eighth_at_most():
  image = np.arange(1, 32 * 32 + 1).reshape(32, 32, 1).astype(np.float32)
  offsets = set()
  for i in range(300):
    made = crop_flip(image, rng(i))
    assert made.shape == image.shape
    y, x = (int(v[0]) for v in np.nonzero(made[..., 0]))
    value = int(made[y, x, 0]) - 1
    offsets.add((value // 32 - y, value % 32 - x))
  assert min(dy for dy, _ in offsets) == -4
  assert max(dy for dy, _ in offsets) == 4


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"augment": "mixup"}, "data.augment='mixup': choose none, domainbed"),
    ({"statistics": "mnist"}, "data.statistics='mnist': choose none, imagenet"),
    ({"image_size": -1}, "data.image_size=-1"),
    ({"augment": "domainbed"}, "needs data.image_size"),
  ],
)
def test_unknown_settings_are_one_line(settings, message):
  known = {"image_size": 0, "augment": "none", "statistics": "none"}
  with pytest.raises(UserError, match=message):
    make_transform(ConfigDict(known | settings))


@pytest.mark.parametrize(
  "image", [np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_colour_augmentation_needs_colour_images_of_bytes(image):
  transform = Transform(size=8, augment="domainbed")
  with pytest.raises(UserError, match="needs colour images of bytes"):
    transform.train(image, rng())
