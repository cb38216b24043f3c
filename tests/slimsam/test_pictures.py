"""Masks side by side."""

import io

import numpy as np
import pytest
from PIL import Image

from slimsam import rle
from slimsam.evaluation import Evaluator
from slimsam.masks import iou
from slimsam.model import Sam
from slimsam.pictures import Question, answers, draw, painted, questions
from slimsam.run import Model
from slimsam.sources import Annotation, Sample


def square(side, low, high):
  mask = np.zeros((side, side), bool)
  mask[low:high, low:high] = True
  return mask


def sample(name, masks, point=(3.0, 2.0)):
  image = np.random.default_rng(0).integers(256, size=(24, 32, 3))
  own = []
  for number, mask in enumerate(masks):
    wide = np.zeros((24, 32), bool)
    wide[: len(mask), : len(mask)] = mask
    own.append(Annotation(rle.encode(wide), (0, 0, 9, 9), point, number))
  return Sample(name, image.astype(np.uint8), tuple(own))


def test_a_question_is_the_largest_object_of_an_image():
  """Images without masks are passed over, and no more are read than needed."""

  def samples():
    yield sample("empty", [])
    yield sample("first", [square(10, 1, 3), square(10, 1, 8)])
    yield sample("second", [square(10, 2, 7)], point=None)
    raise AssertionError("a third image was asked for")

  first, second = questions(samples(), 2)
  assert (first.name, second.name) == ("first", "second")
  assert np.count_nonzero(first.truth) == 49
  assert first.point.tolist() == [3, 2]
  assert second.point.tolist() == [4, 4]  # the mask's centre


@pytest.fixture(scope="module")
def model(tiny, draw):
  return Model(draw(tiny), tiny)


def test_answers_are_those_that_evaluation_judges(model):
  samples = [sample("one", [square(10, 1, 8)])]
  asked = questions(samples, 1)
  (mask,) = answers(model, asked)
  assert mask.shape == (24, 32)
  assert mask.dtype == bool
  judge = Evaluator(samples, prompts=("point",), choices=("single",))
  found = judge(model.params, Sam(model.settings)).ious["gt/point/single"]
  np.testing.assert_allclose(iou(mask, asked[0].truth), found.mean)


def test_a_sheet_has_a_row_an_image_and_a_column_a_model():
  asked = [Question("a", np.zeros((8, 8, 3), np.uint8), np.array([2.0, 3.0]),
                    square(8, 1, 5))] * 3  # fmt: skip
  empty = np.zeros((8, 8), bool)
  found = {name: [asked[0].truth, empty, ~empty] for name in ("a $1$", "b")}
  small, large = (
    Image.open(io.BytesIO(draw(asked[:rows], found))) for rows in (1, 3)
  )
  assert small.width == large.width == round(4 * 1.45 * 110)
  assert large.height - small.height == round(2 * 1.45 * 110)


def test_a_mask_is_half_clear_inside_and_opaque_at_its_border():
  image = np.full((7, 7, 3), 100, np.uint8)
  made = painted(image, square(7, 1, 6), "#0a2864")
  assert made[0, 0].tolist() == [100, 100, 100]
  assert made[1, 3].tolist() == made[5, 5].tolist() == [10, 40, 100]
  assert made[3, 3].tolist() == [55, 70, 100]
  # What leaves the picture has a border there.
  whole = painted(image, np.ones((7, 7), bool), "#0a2864")
  assert whole[0, 3].tolist() == [10, 40, 100]
