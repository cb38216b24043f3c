"""The protocol: against a loop over prompts, means, choices, a teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from slimsam import rle
from slimsam.evaluation import Evaluator, Ious, encode_image
from slimsam.masks import centre, iou
from slimsam.model import Sam
from slimsam.preprocess import preprocess, scale_boxes, scale_points, upscale
from slimsam.sources import Annotation, Sample, Source


class Blobs(Source):
  """Three images of two sizes: 2 masks, none, 17 masks (more than a chunk)."""

  labelled = True
  fingerprint = "blobs"

  def __len__(self):
    return 3

  def read(self, i):
    rng = np.random.default_rng(i)
    h, w = ((30, 50), (30, 50), (44, 36))[i]
    image = rng.integers(0, 255, (h, w, 3)).astype(np.uint8)
    made = []
    for k in range((2, 0, 17)[i]):
      y, x = rng.integers(h - 12), rng.integers(w - 12)
      mask = np.zeros((h, w), bool)
      mask[y : y + 4 + k % 8, x : x + 11 - k % 5] = True
      box = (float(x), float(y), 10.0 - k % 5, 3.0 + k % 8)
      point = None if k == 1 else (x + 1.0, y + 2.0)
      made.append(Annotation(rle.encode(mask), box, point, k))
    return Sample(f"{i}", image, tuple(made))


@pytest.fixture(scope="module")
def model(tiny, draw):
  return draw(tiny), Sam(tiny)


@pytest.fixture(scope="module")
def judged(model):
  return Evaluator(Blobs(), teacher=model)(*model)


@pytest.fixture(scope="module")
def found(judged):
  return judged.ious


def one_by_one(model, sample, annotation, kind):
  """All masks of one prompt at the image's size, and their predicted IoU."""
  params, sam = model
  size, original = sam.settings.encoder.image_size, sample.image.shape[:2]
  image = jnp.asarray(preprocess(sample.image, size))[None]
  embedding = encode_image(sam, params, image)
  mask = rle.decode(annotation.rle)
  if kind == "box":
    x, y, w, h = annotation.bbox
    box = scale_boxes(np.array([x, y, x + w, y + h]), original, size)
    given = {"boxes": box[None, None]}
  else:
    point = annotation.point if kind == "point" else None
    place = np.array(centre(mask) if point is None else point, np.float32)
    point = scale_points(place, original, size)
    given = {
      "points": point[None, None, None], "labels": jnp.ones((1, 1, 1), int)
    }  # fmt: skip
  run = {"params": params}
  parts = [
    sam.apply(run, embedding, **given, multimask=many, method=sam.decode)
    for many in (False, True)
  ]
  logits = jnp.concatenate([part.logits[0, 0] for part in parts])
  predicted = jnp.concatenate([part.iou[0, 0] for part in parts])
  return np.asarray(upscale(logits, size, original)) > 0, predicted, mask


@pytest.mark.parametrize("kind", ["point", "center", "box"])
def test_it_is_what_a_loop_finds(model, found, kind):
  """Chunks, padding and batching do not matter; empty images do not count."""
  for place, number in enumerate((0, 2)):
    sample = Blobs()[number]
    for k in (0, 1, len(sample.annotations) - 1):
      masks, predicted, truth = one_by_one(
        model, sample, sample.annotations[k], kind
      )
      ious = [float(iou(mask, truth)) for mask in masks]
      expected = {
        "single": ious[0],
        "best": ious[1 + int(np.argmax(predicted[1:]))],
        "oracle": max(ious[1:]),
      }
      for choice, value in expected.items():
        own = found[f"gt/{kind}/{choice}"].images
        assert len(own) == 2
        # A pixel at the threshold may fall on either side.
        np.testing.assert_allclose(own[place][k], value, atol=0.02)


def test_a_teacher_agrees_with_itself(judged, found):
  names = [name for name in found if name.startswith("teacher")]
  assert names == [f"teacher/{kind}/single" for kind in ("point", "center",
                                                         "box")]  # fmt: skip
  for name in names:
    for own in found[name].images:
      np.testing.assert_array_equal(own, 1.0)
  scalars = judged.scalars()
  assert scalars["miou/teacher/box/single"] == 1.0
  assert scalars["valid/mse"] == judged.mse == 0.0
  assert found["gt/point/oracle"].mean >= found["gt/point/best"].mean


def test_the_error_is_that_of_the_embedding(model):
  params, sam = model
  neck = params["image_encoder"]["neck"]
  moved = jax.tree.map(lambda a: 1.25 * a, neck)
  other = {
    **params, "image_encoder": {**params["image_encoder"], "neck": moved}
  }  # fmt: skip
  judge = Evaluator(Blobs(), prompts=("box",), choices=("oracle",),
                    teacher=model)  # fmt: skip
  errors = []
  for number in (0, 2):
    image = jnp.asarray(
      preprocess(Blobs()[number].image, sam.settings.encoder.image_size)
    )[None]
    a, b = (encode_image(sam, own, image) for own in (params, other))
    errors.append(np.mean(np.square(np.asarray(a - b, np.float64))))
  found = judge(other, sam)
  assert found.mse > 0
  np.testing.assert_allclose(found.mse, np.mean(errors), rtol=1e-5)
  assert list(found.ious) == ["gt/box/oracle"]
  alone = Evaluator(Blobs(), prompts=("box",), choices=("oracle",))
  assert alone(other, sam).mse is None


def test_means_are_over_images_or_over_masks():
  own = Ious([np.array([1.0, 0.0]), np.array([0.0] * 9 + [0.5])])
  assert own.mean == pytest.approx((0.5 + 0.05) / 2)
  assert own.mean_of_masks == pytest.approx(1.5 / 12)
  low, high = own.interval()
  assert low == pytest.approx(0.05)
  assert high == pytest.approx(0.5)
  assert own.interval() == (low, high)


def test_what_cannot_be_judged_is_refused():
  class Nothing(Blobs):
    def read(self, i):
      image = np.zeros((8, 8, 3), np.uint8)
      return Sample(f"{i}", image, ())

  with pytest.raises(UserError, match="none of the images has a mask"):
    Evaluator(Nothing())
  with pytest.raises(UserError, match="name each of them once"):
    Evaluator(Blobs(), prompts=("point", "point"))
  for given in ({"prompts": ("pont",)}, {"choices": ("orcale",)}):
    with pytest.raises(UserError, match="did you mean"):
      Evaluator(Blobs(), **given)
  assert Evaluator(Blobs(), limit=1).num_masks == 2
