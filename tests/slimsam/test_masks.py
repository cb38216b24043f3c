"""Everything against loops that say what is meant."""

import collections
import itertools

import numpy as np
import pytest

from slimsam.masks import (
  boxes_of,
  centre,
  crop_boxes,
  fill_small,
  iou,
  near_crop_edge,
  nms,
  point_grid,
  stability,
)


def random_masks(seed, *shape, density=0.5):
  return np.random.default_rng(seed).random(shape) < density


def drawn(text):
  """A mask from lines of `#` and `.`."""
  return np.array([[c == "#" for c in line] for line in text.split()])


def test_points_are_the_middles_of_cells(one_line):
  np.testing.assert_array_equal(point_grid(1), [[0.5, 0.5]])
  np.testing.assert_array_equal(
    point_grid(2), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
  )
  points = point_grid(32)
  assert points.shape == (1024, 2)
  expected = np.linspace(1 / 64, 1 - 1 / 64, 32)
  np.testing.assert_allclose(points[:32, 0], expected, rtol=1e-15)
  np.testing.assert_allclose(points[::32, 1], expected, rtol=1e-15)
  assert "0 points" in one_line(point_grid, 0)


def test_without_layers_the_only_crop_is_the_image():
  assert crop_boxes(300, 400, 0) == ([[0, 0, 400, 300]], [0])


def test_crops_by_hand():
  """Layer 1 overlaps by int(0.25 * 100) = 25 pixels, layer 2 by 12.

  Layer 1: ceil((25 + 200) / 2) = 113 wide, ceil((25 + 100) / 2) = 63 high.
  Layer 2: ceil((36 + 200) / 4) = 59 wide, ceil((36 + 100) / 4) = 34 high.
  """
  boxes, layers = crop_boxes(100, 200, 2, 0.25)
  assert layers == [0] + [1] * 4 + [2] * 16
  assert boxes[:5] == [
    [0, 0, 200, 100],
    [0, 0, 113, 63],
    [0, 38, 113, 100],  # cut at the image, from 101
    [88, 0, 200, 63],
    [88, 38, 200, 100],
  ]
  assert boxes[5:9] == [[0, y, 59, y + 34] for y in (0, 22, 44, 66)]
  assert [box[0] for box in boxes[5::4]] == [0, 47, 94, 141]


@pytest.mark.parametrize(
  ("h", "w", "layers", "ratio"),
  [
    (480, 640, 2, 512 / 1500), (33, 17, 2, 0.5), (64, 64, 3, 0),
    (9, 99, 1, 0.9),
  ],
)  # fmt: skip
def test_crops_cover_the_image_and_overlap(h, w, layers, ratio):
  boxes, numbers = crop_boxes(h, w, layers, ratio)
  for layer in range(layers + 1):
    count = np.zeros((h, w), int)
    own = [box for box, n in zip(boxes, numbers) if n == layer]
    assert len(own) == 4**layer
    for x0, y0, x1, y1 in own:
      assert 0 <= x0 < x1 <= w
      assert 0 <= y0 < y1 <= h
      count[y0:y1, x0:x1] += 1
    assert count.min() == 1
    for a, b in itertools.pairwise(own):
      if a[0] == b[0]:
        overlap = int(ratio * min(h, w) * 2 / 2**layer)
        assert a[3] - b[1] == min(overlap, h - b[1])


@pytest.mark.parametrize(
  ("arguments", "word"),
  [
    ((0, 5, 1), "0 x 5"), ((5, 5, -1), "-1 layers"), ((5, 5, 1, 1.0), "by 1.0"),
    ((5, 5, 1, -0.1), "by -0.1"), ((2, 2, 2, 0), "ask for 1"),
    ((100, 1, 3), "ask for 0"), ((1, 100, 3), "ask for 0"),
  ],
)  # fmt: skip
def test_bad_crops(one_line, arguments, word):
  assert word in one_line(crop_boxes, *arguments)


def slow_box(mask):
  pixels = [(x, y) for y, x in np.ndindex(mask.shape) if mask[y, x]]
  if not pixels:
    return [0, 0, 0, 0]
  columns, rows = zip(*pixels)
  return [min(columns), min(rows), max(columns), max(rows)]


@pytest.mark.parametrize("density", [0.0, 0.01, 0.03, 0.2, 1.0])
def test_boxes_of_masks(density):
  masks = random_masks(1, 4, 5, 9, 13, density=density)
  boxes = boxes_of(masks)
  assert boxes.shape == (4, 5, 4)
  assert boxes.dtype == np.int64
  for i in np.ndindex(4, 5):
    assert boxes[i].tolist() == boxes_of(masks[i]).tolist()
    assert boxes[i].tolist() == slow_box(masks[i])


def test_boxes_of_no_masks():
  assert boxes_of(np.zeros((0, 9, 13), bool)).shape == (0, 4)


@pytest.mark.parametrize(
  ("box", "near"),
  [
    ([130, 230, 300, 400], False),
    ([120, 230, 300, 400], True),  # the left edge is at 100
    ([121, 230, 300, 400], False),
    ([130, 201, 300, 400], True),
    ([130, 230, 491, 400], True),
    ([130, 230, 300, 599], False),  # the image's edge too
    ([130, 230, 499, 599], True),
    ([79, 179, 521, 621], False),  # beyond the crop
  ],
)
def test_boxes_near_a_crops_edge(box, near):
  crop, image = [100, 200, 500, 600], [0, 0, 1000, 600]
  assert (
    near_crop_edge(np.array([box, box]), crop, image).tolist() == [near] * 2
  )
  assert near_crop_edge(np.array([box]), image, image).tolist() == [False]


def test_the_tolerance_of_edges():
  boxes = np.array([[13, 20, 30, 30], [14, 20, 30, 30]])
  crop, image = [10, 0, 100, 100], [0, 0, 100, 100]
  found = near_crop_edge(boxes, crop, image, tolerance=3)
  assert found.tolist() == [True, False]
  # The crop's left edge is now within the tolerance of the image's.
  found = near_crop_edge(boxes, crop, image, tolerance=14)
  assert found.tolist() == [False, False]
  assert near_crop_edge(np.zeros((0, 4)), crop, image).shape == (0,)


@pytest.mark.parametrize(("offset", "threshold"), [(1.0, 0.0), (0.5, -0.3)])
def test_stability_is_a_ratio_of_areas(offset, threshold):
  logits = np.random.default_rng(2).normal(size=(3, 2, 6, 7))
  found = stability(logits, offset, threshold)
  assert found.shape == (3, 2)
  for i in np.ndindex(3, 2):
    small = sum(v > threshold + offset for v in logits[i].ravel())
    large = sum(v > threshold - offset for v in logits[i].ravel())
    assert found[i] == small / large


def test_stability_of_masks_by_hand():
  logits = np.array(
    [[[2, 2], [2, 0]], [[1, 1], [9, -1]], [[-5, -5]] * 2, [[9, 9]] * 2]
  )
  # A logit at a threshold is not above it; without a mask the ratio is 0.
  assert stability(logits).tolist() == [3 / 4, 1 / 3, 0, 1]
  assert stability(logits[0]) == 0.75


def slow_nms(boxes, scores, threshold):
  order = sorted(range(len(boxes)), key=lambda i: -scores[i])
  kept = []
  for i in order:
    for j in kept:
      a, b = boxes[i], boxes[j]
      inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(
        min(a[3], b[3]) - max(a[1], b[1]), 0
      )
      union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - inter
      if union and inter / union > threshold:
        break
    else:
      kept.append(i)
  return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_nms_is_greedy(threshold, levels):
  rng = np.random.default_rng(3)
  corners = rng.integers(0, 12, (150, 2))
  boxes = np.concatenate([corners, corners + rng.integers(0, 12, (150, 2))], 1)
  scores = rng.integers(0, levels, 150) / levels
  found = nms(boxes, scores, threshold)
  assert found.dtype == np.int64
  assert found.tolist() == slow_nms(boxes, scores, threshold)
  assert threshold == 1 or 1 < len(found) < 150
  assert (np.diff(scores[found]) <= 0).all()


@pytest.mark.parametrize(
  ("boxes", "scores", "kept"),
  [
    # IoU 1: of equal scores the first stays.
    ([[0, 0, 4, 4]] * 3, [0.5, 0.9, 0.9], [1]),
    # IoU 1/2 is not above 1/2.
    ([[0, 0, 4, 4], [0, 0, 4, 2]], [0.1, 0.2], [1, 0]),
    # IoU 3/5.
    ([[0, 0, 4, 1], [1, 0, 5, 1]], [0.1, 0.2], [1]),
    # The second falls to the first, so that the third stays.
    ([[0, 0, 9, 1], [2, 0, 11, 1], [4, 0, 13, 1]], [3, 2, 1], [0, 2]),
    # Zero area: IoU 0, although they are equal.
    ([[3, 0, 3, 9], [3, 0, 3, 9]], [1, 2], [1, 0]),
    ([[0, 0, 9, 1]], [-np.inf], [0]),
    (np.zeros((0, 4)), [], []),
  ],
)
def test_nms_by_hand(boxes, scores, kept):
  assert nms(np.array(boxes), np.array(scores), 0.5).tolist() == kept


def test_bad_scores(one_line):
  boxes = np.zeros((2, 4))
  assert "2 boxes" in one_line(nms, boxes, np.zeros(3), 0.5)
  assert "1 NaN" in one_line(nms, boxes, np.array([0, np.nan]), 0.5)


def slow_regions(mask):
  """Lists of connected pixels, in reading order of their first ones."""
  h, w = mask.shape
  seen, regions = np.zeros_like(mask), []
  for start in np.ndindex(h, w):
    if not mask[start] or seen[start]:
      continue
    regions.append([])
    seen[start] = True
    queue = collections.deque([start])
    while queue:
      y, x = queue.popleft()
      regions[-1].append((y, x))
      for near in itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1)):
        if 0 <= near[0] < h and 0 <= near[1] < w:
          if mask[near] and not seen[near]:
            queue.append(near)
          seen[near] |= mask[near]
  return regions


def slow_fill(mask, area, mode):
  regions = slow_regions(~mask if mode == "holes" else mask)
  small = [region for region in regions if len(region) < area]
  if mode == "islands" and small and len(small) == len(regions):
    small.remove(max(regions, key=len))
  result = mask.copy()
  for pixel in itertools.chain(*small):
    result[pixel] = mode == "holes"
  return result


@pytest.mark.parametrize("mode", ["holes", "islands"])
@pytest.mark.parametrize("area", [0, 1, 2, 5, 100, 10**6])
@pytest.mark.parametrize("density", [0.0, 0.15, 0.3, 0.7, 0.85, 1.0])
def test_small_regions(mode, area, density):
  for seed in range(5):
    mask = random_masks(seed, 12, 15, density=density)
    before = mask.copy()
    found, changed = fill_small(mask, area, mode)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, slow_fill(mask, area, mode))
    np.testing.assert_array_equal(mask, before)
    assert type(changed) is bool
    assert changed == (found != mask).any()


RING = drawn("""
  #####..
  #.#.#.#
  #.###..
  #####..
""")


@pytest.mark.parametrize(
  ("area", "mode", "pixels"),
  [
    (2, "holes", {(1, 3): True}),
    (3, "holes", {(1, 1): True, (2, 1): True, (1, 3): True}),
    (1, "holes", {}),
    (2, "islands", {(1, 6): False}),
    (1, "islands", {}),
    (1000, "islands", {(1, 6): False}),  # the largest stays
  ],
)
def test_small_regions_by_hand(area, mode, pixels):
  expected = RING.copy()
  for pixel, value in pixels.items():
    expected[pixel] = value
  found, changed = fill_small(RING, area, mode)
  np.testing.assert_array_equal(found, expected)
  assert changed == bool(pixels)


def test_of_equal_small_islands_the_first_stays():
  found, changed = fill_small(drawn(".##.# ....# ##..."), 5, "islands")
  np.testing.assert_array_equal(found, drawn(".##.. ..... ....."))
  assert changed


def test_a_small_island_alone_is_no_change():
  mask = drawn(".##. .... ....")
  found, changed = fill_small(mask, 5, "islands")
  np.testing.assert_array_equal(found, mask)
  assert not changed


def test_pixels_that_touch_at_a_corner_are_connected():
  assert not fill_small(drawn("#.. .#. ..#"), 3, "islands")[1]
  assert not fill_small(drawn(".## #.# ##."), 3, "holes")[1]


def test_other_modes(one_line):
  assert "'both'" in one_line(fill_small, RING, 5, "both")


def test_iou_of_masks():
  a, b = random_masks(4, 2, 3, 6, 7), random_masks(5, 2, 3, 6, 7)
  a[0, 0] = b[0, 0] = a[0, 1] = False
  found = iou(a, b)
  assert found.shape == (2, 3)
  assert found.dtype == np.float64
  for i in np.ndindex(2, 3):
    first, second = (set(zip(*np.nonzero(m[i]))) for m in (a, b))
    union = len(first | second)
    assert found[i] == (len(first & second) / union if union else 1)
    assert found[i] == iou(a[i], b[i])
  assert found[0, 0] == 1
  assert found[0, 1] == 0


def test_iou_of_one_mask_with_many():
  many = random_masks(6, 4, 6, 7)
  np.testing.assert_array_equal(
    iou(many[2], many), [iou(many[2], mask) for mask in many]
  )


def test_iou_of_other_sizes(one_line):
  message = one_line(iou, np.ones((1, 1), bool), np.ones((6, 7), bool))
  assert "[1, 1] and [6, 7]" in message


def slow_centre(mask):
  padded = np.pad(mask, 1)
  border = [p for p in np.ndindex(padded.shape) if not padded[p]]
  best, found = 0, None
  for y, x in np.ndindex(mask.shape):
    distance = min((y + 1 - v) ** 2 + (x + 1 - u) ** 2 for v, u in border)
    if distance > best:
      best, found = distance, (x, y)
  return found


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9, 0.98, 1.0])
def test_the_centre_is_furthest_from_the_border(density):
  for seed in range(3):
    mask = random_masks(seed, 9, 14, density=density)
    mask[4, 4] = True
    found = centre(mask)
    assert found == slow_centre(mask)
    assert all(type(n) is int for n in found)


@pytest.mark.parametrize(
  ("mask", "point"),
  [
    ("#####  ##### #####", (1, 1)),  # three as far: the first
    ("##### ##### ##### ##### #####", (2, 2)),
    ("..... ...#. .....", (3, 1)),
    ("#....... ..#####. ..#####. ..#####. ........", (3, 2)),
    ("##.. ##..", (0, 0)),
  ],
)
def test_centres_by_hand(mask, point):
  assert centre(drawn(mask)) == point


def test_an_empty_mask_has_no_centre(one_line):
  assert "empty" in one_line(centre, np.zeros((3, 4), bool))
