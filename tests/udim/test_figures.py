"""Figures are PNGs of a sane size, the same for the same numbers."""

import functools
import io
import math

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.plots import DPI, Palette
from udim.figures import (
  accuracy_by_domain,
  bars,
  corruption_grid,
  image_grid,
  loss_lines,
)


def decoded(png):
  """[H, W, 3] uint8."""
  with Image.open(io.BytesIO(png)) as image:
    assert image.format == "PNG"
    assert "Software" not in image.info
    return np.asarray(image.convert("RGB"))


def size(png):
  """(width, height) in inches."""
  height, width, _ = decoded(png).shape
  return width / DPI, height / DPI


def has_colour(png, colour):
  rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
  return bool(np.any(np.all(decoded(png) == np.array(rgb), axis=-1)))


def table(algorithms=3, domains=("a", "b"), seeds=4):
  rng = np.random.default_rng(0)
  return {
    f"method_{i}": {name: rng.uniform(0.5, 0.9, seeds) for name in domains}
    for i in range(algorithms)
  }


def differences(algorithms, domains):
  return {
    name: {domain: 100 * (np.mean(v) - 0.7) for domain, v in row.items()}
    for name, row in table(algorithms, domains).items()
  }


def severities(families, most=5):
  return [f"{f}_{s}" for f in families.split() for s in range(1, most + 1)]


DIGITS_C = [
  "clean_test",
  *severities("gauss blur shift fog hail snow mist haze"),
]
DISTANCES = np.linspace(-0.5, 0.5, 5)
LINES = {
  "sam": np.random.default_rng(1).uniform(size=(4, 5)),
  "udim": np.random.default_rng(2).uniform(size=(4, 5)),
}
IMAGES = np.random.default_rng(3).uniform(size=(4, 8, 8, 1))
accuracies = functools.partial(accuracy_by_domain, title="Of $ and %")
grid = functools.partial(corruption_grid, title="Of $ and %")
line_figure = functools.partial(loss_lines, title="Of $ and %", xlabel="$t$")
bar_figure = functools.partial(bars, title="Of $ and %", ylabel="$x and $y")
images_figure = functools.partial(image_grid, title="Of $ and %")

# name -> draw, least and greatest width, least and greatest height, in inches.
FIGURES = {
  "one point": (lambda: accuracies({"erm": {"a": [0.5]}}), 8, 10, 4, 5),
  "side by side": (lambda: accuracies(table(8, "abcdef")), 8, 10, 4, 5),
  "many algorithms": (lambda: accuracies(table(18, "abcdef")), 9, 14, 4, 5),
  "stacked": (lambda: accuracies(table(3, DIGITS_C[:13])), 8, 10, 4, 8),
  "two columns": (lambda: accuracies(table(8, DIGITS_C)), 10, 12, 12, 18),
  "tall grid": (lambda: grid(differences(7, DIGITS_C)), 6, 12, 10, 14),
  "wide grid": (lambda: grid(differences(7, "abc")), 4, 8, 2, 5),
  "lines": (lambda: line_figure(LINES, DISTANCES), 8, 10, 4, 5),
  "bars": (lambda: bar_figure({"a": [1.0, 2], "b": [-1.0, 0]}), 4, 10, 4, 5),
  "many bars": (
    lambda: bar_figure({f"method_{i}": [i, 2.0] for i in range(14)}),
    8, 12, 4, 5,
  ),
  "images": (lambda: images_figure([("clean", IMAGES)] * 3), 3, 5, 2, 4),
}  # fmt: skip


@pytest.mark.parametrize("figure", FIGURES)
def test_figures(figure):
  draw, *limits = FIGURES[figure]
  png = draw()
  assert png.startswith(b"\x89PNG\r\n")
  width, height = size(png)
  assert limits[0] <= width <= limits[1]
  assert limits[2] <= height <= limits[3]
  assert len(np.unique(decoded(png).reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize(
  "figure", ["side by side", "wide grid", "lines", "bars", "images"]
)
def test_the_same_bytes_for_the_same_numbers(figure):
  draw, *_ = FIGURES[figure]
  assert draw() == draw()


def test_a_figure_changes_nothing_global():
  import matplotlib
  from matplotlib import _pylab_helpers

  before = dict(matplotlib.rcParams)
  FIGURES["bars"][0]()
  assert dict(matplotlib.rcParams) == before
  assert not _pylab_helpers.Gcf.figs


def test_an_algorithm_keeps_its_colour():
  palette = Palette()
  palette("another")
  colour, _ = palette("udim")
  values = {"udim": [1.0, 2.0, 4.0]}
  draws = (
    lambda p: accuracies({"udim": {"a": [0.5, 0.6]}}, palette=p),
    lambda p: line_figure({"udim": LINES["udim"]}, DISTANCES, palette=p),
  )
  for draw in draws:
    assert has_colour(draw(palette), colour)
    assert not has_colour(draw(None), colour)  # it would take the first
  assert bar_figure(values, palette=palette) != bar_figure(values)


ONE_SEED = {
  "accuracies": lambda: accuracies({"erm": {"a": [0.5], "b": [0.7]}}),
  "lines": lambda: line_figure({"erm": LINES["sam"][:1]}, DISTANCES),
  "bars": lambda: bar_figure({"erm": [3.0], "sam": [2.0]}),
}


@pytest.mark.parametrize("kind", ONE_SEED)
def test_one_seed_is_drawn_without_an_interval(kind):
  """The figure of three equal seeds, whose interval has no width."""
  equal = {
    "accuracies": lambda: accuracies({"erm": {"a": [0.5] * 3, "b": [0.7] * 3}}),
    "lines": lambda: line_figure({"erm": LINES["sam"][[0] * 3]}, DISTANCES),
    "bars": lambda: bar_figure({"erm": [3.0] * 3, "sam": [2.0] * 3}),
  }
  difference = decoded(ONE_SEED[kind]()) != decoded(equal[kind]())
  assert np.mean(difference) < 1e-3  # the mean of three has its rounding error


GAPS = {
  "a domain is missing": lambda: accuracies(
    {"erm": {"a": [0.5, 0.6]}, "sam": {"b": [0.5, 0.6]}, "udim": {}}
  ),
  "a cell is missing": lambda: grid({"sam": {"a": 1.0}, "udim": {"b": -1.0}}),
  "nothing differs": lambda: grid({"sam": {"a": 0.0}}),
  "accuracy": lambda: accuracies({"erm": {"a": [math.nan, 1], "b": [1, 1]}}),
  "cell": lambda: grid({"sam": {"a": math.nan, "b": 1.0}}),
  "line": lambda: line_figure(
    {"sam": [[1, math.inf], [1, 2]], "udim": [[1, 2], [2, 3]]}, [0, 1]
  ),
  "bar": lambda: bar_figure({"sam": [math.nan, 1], "udim": [math.inf, 2, 1]}),
  "pixel": lambda: images_figure([("", np.full((1, 4, 4, 1), math.nan))]),
}


@pytest.mark.parametrize("gap", GAPS)
def test_gaps_are_left_out(gap):
  assert GAPS[gap]().startswith(b"\x89PNG")


def pixels(png, rows, columns, height, width):
  """The images of a grid, [rows, columns, height, width, 3]: they end 10
  pixels from the lower right corner and lie 4 from each other.
  """
  height, width = height + 4, width + 4
  top, left = 6 + rows * height, 6 + columns * width
  found = decoded(png)[-top:, -left:][: rows * height, : columns * width]
  found = found.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
  return found[:, :, :-4, :-4]


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize(
  ("side", "zoom"), [((8, 8), 9), ((32, 24), 2), ((100, 90), 1)]
)
def test_every_pixel_of_an_image_is_a_square(channels, side, zoom):
  rng = np.random.default_rng(0)
  images = rng.uniform(-0.5, 1.5, (2, 3, *side, channels)).astype(np.float32)
  png = image_grid([("", images[0]), ("", images[1])], title="")
  found = pixels(png, 2, 3, zoom * side[0], zoom * side[1])
  expected = images.clip(0, 1).repeat(zoom, axis=2).repeat(zoom, axis=3)
  missing = np.zeros((*expected.shape[:-1], 1))
  expected = {
    1: expected.repeat(3, axis=-1),
    2: np.concatenate([expected, missing], axis=-1),  # red and green
    3: expected,
  }[channels]
  np.testing.assert_array_equal(found, np.round(255 * expected))


def test_rows_of_images_may_differ_in_length_and_channels():
  png = image_grid(
    [("grey", np.zeros((3, 8, 8, 1))), ("colour", np.zeros((1, 8, 8, 3)))],
    title="",
  )
  found = pixels(png, 2, 3, 72, 72)
  assert np.all(found[0] == 0)
  assert np.all(found[1, 0] == 0)
  assert np.all(found[1, 1:] == 255)  # paper


def test_a_long_label_and_a_long_title_find_room():
  short, label, title = (
    decoded(image_grid([(label, IMAGES)], title=title))
    for label, title in (("a", "b"), (40 * "a", "b"), ("a", 80 * "b"))
  )
  assert label.shape[1] > short.shape[1] + 200
  assert title.shape[1] > short.shape[1] + 200
  for page in (short, label, title):
    margin = np.concatenate([page[:, :8], page[:, -8:]], axis=1)
    assert np.all(margin == 255)


MISTAKES = [
  (lambda: accuracies({}), "no domain"),
  (lambda: accuracies({"erm": {}}), "no domain"),
  (lambda: accuracies({"erm": {"a": []}}), r"\[0\]"),
  (lambda: grid({}), "no domain"),
  (lambda: line_figure({}, DISTANCES), "no algorithm"),
  (lambda: line_figure({"sam": [1, 2]}, [0, 1]), r"'sam' are \[2\]"),
  (lambda: line_figure(LINES, [0, 1]), r"\[4, 5\].* \[2\]"),
  (lambda: bar_figure({}), "no value"),
  (lambda: bar_figure({"a": []}), r"\[0\]"),
  (lambda: images_figure([]), "no row"),
  (lambda: images_figure([("a", IMAGES[:0])]), "empty"),
  (lambda: images_figure([("a", IMAGES[0])]), r"'a'.*\[8, 8, 1\]"),
  (lambda: images_figure([("a", IMAGES.repeat(4, -1))]), r"\[4, 8, 8, 4\]"),
  (lambda: images_figure([("a", IMAGES.astype("uint8"))]), "uint8"),
  (
    lambda: images_figure([("a", IMAGES), ("b", IMAGES[:, :4])]),
    r"'b' are \[4, 8\], those of 'a' are \[8, 8\]",
  ),
]


@pytest.mark.parametrize(("call", "words"), MISTAKES)
def test_mistakes_are_one_line(call, words):
  with pytest.raises(UserError, match=words) as info:
    call()
  assert "\n" not in str(info.value)
