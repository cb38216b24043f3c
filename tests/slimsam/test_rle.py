"""Codes are COCO's, character by character."""

import itertools

import numpy as np
import pytest

from slimsam import rle

RNG = np.random.default_rng(0)


def masks():
  """Masks of all kinds by name."""
  made = {
    "empty": np.zeros((5, 7), bool),
    "full": np.ones((5, 7), bool),
    "zero": np.zeros((1, 1), bool),
    "one": np.ones((1, 1), bool),
    "no rows": np.zeros((0, 3), bool),
    "no columns": np.zeros((3, 0), bool),
    "first": np.arange(12).reshape(3, 4) == 0,
    "last": np.arange(12).reshape(3, 4) == 11,
    "row": np.arange(5)[:, None] == np.full((5, 7), 2),
    "column": np.arange(7)[None] == np.full((5, 7), 2),
    # One run, from the foot of a column to the head of the next.
    "foot and head": np.isin(np.arange(35).reshape(7, 5).T, (9, 10)),
    # Runs whose differences need many groups, of both signs.
    "long runs": np.arange(600 * 700).reshape(600, 700) % 699 == 300,
    "two pixels": np.isin(np.arange(10**6).reshape(10**3, 10**3), (5, 999990)),
  }
  for i, density in enumerate([0.02, 0.1, 0.5, 0.5, 0.9, 0.98]):
    h, w = RNG.integers(1, 30, 2)
    made[f"random {i}"] = RNG.random((h, w)) < density
  return made


MASKS = masks()


def slow_runs(mask):
  runs, value = [0], False
  for x in range(mask.shape[1]):
    for y in range(mask.shape[0]):
      if mask[y, x] != value:
        runs.append(0)
        value = not value
      runs[-1] += 1
  return runs


def slow_compress(runs):
  text = ""
  for i, run in enumerate(runs):
    number = run - runs[i - 2] if i > 2 else run
    while True:
      group = number & 31
      number >>= 5  # towards minus infinity
      if number == (-1 if group & 16 else 0):
        text += chr(48 + group)
        break
      text += chr(48 + (group | 32))
  return text


def known():
  """Pixel (0, 0), and rows 1 to 3 of columns 2 to 5."""
  mask = np.zeros((5, 7), bool)
  mask[0, 0] = mask[1:4, 2:6] = True
  return mask


@pytest.fixture
def one_line(one_line):
  """However long the code is, the line that refuses it is short."""

  def call(*arguments):
    message = one_line(*arguments)
    assert len(message) < 250
    return message

  return call


def test_a_known_code():
  code = {"size": [5, 7], "counts": "01:2H000004"}
  runs = [0, 1, 10, 3, 2, 3, 2, 3, 2, 3, 6]
  assert rle.encode(known()) == code
  assert rle.encode_runs(known()) == runs
  assert rle.compress(runs) == code["counts"]
  assert rle.decompress(code["counts"]) == runs
  np.testing.assert_array_equal(rle.decode(code), known())
  assert rle.area(code) == 13
  assert rle.bbox(code) == [0, 0, 6, 4]


@pytest.mark.parametrize(
  ("runs", "text"),
  [
    ([], ""), ([0], "0"), ([15], "?"), ([16], "`0"), ([31], "o0"),
    ([32], "P1"), ([512], "P`0"), ([5, 6, 7, 5], "567O"),
    ([0, 17, 0, 1], "0a00@"), ([0, 18, 0, 1], "0b00_O"),
  ],
)  # fmt: skip
def test_how_numbers_are_written(runs, text):
  assert rle.compress(runs) == text == slow_compress(runs)
  assert rle.decompress(text) == runs


@pytest.mark.parametrize("name", MASKS)
def test_masks_return_from_their_codes(name):
  mask = MASKS[name]
  runs, code = rle.encode_runs(mask), rle.encode(mask)
  if mask.size < 10**4:
    assert runs == slow_runs(mask)
  assert code == {"size": [*mask.shape], "counts": slow_compress(runs)}
  assert all(type(n) is int for n in [*runs, *code["size"]])
  assert rle.decompress(code["counts"]) == runs
  for counts in (
    runs, tuple(runs), np.asarray(runs), code["counts"],
    code["counts"].encode(),
  ):  # fmt: skip
    found = rle.decode({"size": np.asarray(mask.shape), "counts": counts})
    assert found.dtype == bool
    np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize("name", MASKS)
def test_area_and_box_are_the_masks(name):
  mask = MASKS[name]
  code = rle.encode(mask)
  assert rle.area(code) == mask.sum()
  y, x = np.nonzero(mask)
  box = [0, 0, 0, 0]
  if x.size:
    box = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
  assert rle.bbox(code) == box
  assert all(type(n) is int for n in rle.bbox(code))


def test_empty_runs_between_others():
  code = {"size": [4, 3], "counts": [0, 0, 5, 1, 0, 2, 3, 0, 1, 0]}
  expected = (np.arange(12) >= 5) & (np.arange(12) < 8)
  np.testing.assert_array_equal(rle.decode(code), expected.reshape(3, 4).T)
  assert rle.bbox(code) == [1, 1, 1, 3]
  compressed = {**code, "counts": rle.compress(code["counts"])}
  np.testing.assert_array_equal(rle.decode(compressed), rle.decode(code))


@pytest.mark.parametrize("top", [2**32 - 1, 2**20, 40])
def test_any_runs_return_from_their_text(top):
  rng = np.random.default_rng(1)
  runs = [*rng.integers(0, top + 1, 1000).tolist(), top, 0, 0, top]
  text = rle.compress(runs)
  assert text == slow_compress(runs)
  assert rle.decompress(text) == rle.decompress(text.encode()) == runs


def test_a_mask_in_any_memory_order():
  mask = MASKS["random 2"]
  assert rle.encode(np.asfortranarray(mask)) == rle.encode(mask)
  assert rle.encode(mask[::-1]) == rle.encode(mask[::-1].copy())


@pytest.mark.parametrize(
  ("counts", "word"),
  [
    ("01:2H00000", "sum to 29"), ("01:2H0000044", "sum to 42"), ("", "to 0"),
    ([30, 4], "sum to 34"), ([], "5 x 7 = 35"), ([35, -1, 1], "1 is -1"),
    ("1N", "1 is -2"), ("01:2H00000T", "cut off"), (b"o", "cut off"),
    ("01:2é", "'é' at 4"), (b"01:2\xff", "255 at 4"), ("01:2\udc80", "at 4"),
    ("01 2", "' ' at 2"), ("01p", "'p' at 2"), ("01\n", "'\\n' at 2"),
    ("P" * 7 + "0", "32 bits"), ("0" + "P" * 40 + "1", "number 1"),
    ([30.0, 5.0], "integers"), ([[30], [5]], "integers"), (None, "integers"),
    ([[1], [1, 2]], "integers"), (["35"], "integers"), ([True], "integers"),
    ([2**40], "32"), ([2**70], "integers"), (35, "integers"),
  ],
)  # fmt: skip
def test_bad_codes_say_what_is_wrong(one_line, counts, word):
  code = {"size": [5, 7], "counts": counts}
  for function in (rle.decode, rle.area, rle.bbox):
    assert word in one_line(function, code)


def test_long_bad_codes_are_quoted_in_part(one_line):
  assert "..." in one_line(rle.decode, {"size": [5, 7], "counts": "0" * 10**5})
  assert "..." in one_line(rle.decode, {"size": [5, 7], "counts": [1] * 10**5})


@pytest.mark.parametrize(
  "code",
  [
    {"counts": "0"}, {"size": [0, 0]}, [1, 2], "01:2", None,
    *({"size": size, "counts": "0"}
      for size in ([5], [5, 7, 1], 35, [-5, -7], ["5", "7"], [5.0, 7], None)),
  ],
)  # fmt: skip
def test_what_is_no_code(one_line, code):
  assert "give" in one_line(rle.decode, code)


@pytest.mark.parametrize("runs", [[1, -1], [2**32], [1.5], ["1"], [[1]]])
def test_what_is_no_run(one_line, runs):
  assert "runs" in one_line(rle.compress, runs)


@pytest.mark.parametrize(
  "mask",
  [np.zeros((2, 3)), np.zeros((2, 3), np.uint8), np.zeros((1, 2, 3), bool)],
)
def test_what_is_no_mask(one_line, mask):
  assert str(mask.dtype) in one_line(rle.encode, mask)
  assert str(list(mask.shape)) in one_line(rle.encode_runs, mask)


def box(x0, y0, x1, y1):
  return [x0, y0, x1, y0, x1, y1, x0, y1]


@pytest.mark.parametrize(
  ("polygons", "rows", "columns"),
  [
    ([box(2, 3, 7, 9)], (3, 9), (2, 7)),
    ([box(7, 9, 2, 3)], (3, 9), (2, 7)),
    ([box(0, 0, 12, 10)], (0, 10), (0, 12)),
    ([box(0, 0, 1, 1)], (0, 1), (0, 1)),
    ([box(1.68, 2.32, 4.32, 5.68)], (2, 6), (2, 4)),  # edges to either side
    ([box(-5, -1e5, 1e5, 4)], (0, 4), (0, 12)),
    ([box(2, 3, 5, 9), box(4, 3, 7, 9)], (3, 9), (2, 7)),
    ([box(2, 3, 5, 9), box(5, 3, 7, 9)], (3, 9), (2, 7)),
    ([box(3.7, 1, 4.3, 9)], (0, 0), (0, 0)),  # meets no pixel's middle
    ([box(20, 3, 30, 9)], (0, 0), (0, 0)),
    ([box(-9, 3, 0, 9)], (0, 0), (0, 0)),
    ([], (0, 0), (0, 0)),
  ],
)
def test_rectangles_as_polygons(polygons, rows, columns):
  expected = np.zeros((10, 12), bool)
  expected[slice(*rows), slice(*columns)] = True
  found = rle.polygons_to_mask(polygons, 10, 12)
  assert found.dtype == bool
  np.testing.assert_array_equal(found, expected)


def inside_and_distance(corners, x, y):
  """By rays to the right: whether they cross an odd number of edges."""
  inside, nearest = False, np.inf
  for a, b in itertools.pairwise([*corners, corners[0]]):
    if (a[1] > y) != (b[1] > y):
      inside ^= x < a[0] + (y - a[1]) * (b[0] - a[0]) / (b[1] - a[1])
    edge, point = b - a, np.array([x, y]) - a
    part = np.clip(edge @ point / (edge @ edge), 0, 1)
    nearest = min(nearest, np.hypot(*(point - part * edge)))
  return inside, nearest


STAR = 10 + 9 * np.array(
  [[np.sin(0.8 * np.pi * k), -np.cos(0.8 * np.pi * k)] for k in range(5)]
)


@pytest.mark.parametrize(
  "corners",
  [
    STAR,  # crosses itself; its middle is outside
    RNG.uniform(-3, 24, (3, 2)),
    RNG.uniform(0, 20, (4, 2)),
    RNG.uniform(-5, 30, (9, 2)),
  ],
)
def test_polygons_hold_the_pixels_whose_middles_are_inside(corners):
  found = rle.polygons_to_mask([corners.ravel().tolist()], 20, 22)
  far = 0
  for y, x in np.ndindex(20, 22):
    inside, distance = inside_and_distance(corners, x + 0.5, y + 0.5)
    if distance > 0.3:  # drawn to about a fifth of a pixel
      assert found[y, x] == inside, (x, y)
      far += 1
  assert far > 250
  assert found.any()


def test_a_mask_is_all_that_any_polygon_covers():
  polygons = [[0, 0, 9, 0, 0, 9], [9, 9, 1, 9, 9, 1], [2, 2, 6, 2, 6, 6]]
  each = [rle.polygons_to_mask([polygon], 10, 12) for polygon in polygons]
  found = rle.polygons_to_mask(polygons, 10, 12)
  np.testing.assert_array_equal(found, np.any(each, axis=0))


def test_polygons_are_cut_at_the_image():
  corners = np.random.default_rng(2).uniform(-10, 40, (7, 2))
  whole = rle.polygons_to_mask([(corners + 10).ravel()], 60, 60)
  part = rle.polygons_to_mask([corners.ravel()], 20, 22)
  np.testing.assert_array_equal(part, whole[10:30, 10:32])


@pytest.mark.parametrize(
  ("polygon", "word"),
  [
    ([1, 2, 3, 4], "three corners"), ([1, 2, 3, 4, 5, 6, 7], "three corners"),
    (1.0, "three corners"), ([[1, 2], [3, 4], [5, 6]], "flat"),
    ([1, 2, 3, 4, 5, np.nan], "nan"), ([1, 2, 3, 4, 5, -np.inf], "-inf"),
    ([1, 2, 3, 4, 5, 1e12], "1000000000000.0"), (["a"] * 6, "numbers"),
    ([[1], [2, 3]], "numbers"), (None, "three corners"),
  ],
)  # fmt: skip
def test_bad_polygons_say_what_is_wrong(one_line, polygon, word):
  message = one_line(rle.polygons_to_mask, [polygon], 10, 12)
  assert message.startswith("polygon")
  assert word in message
