"""Predictor against the model's functions put together by hand."""

import functools

import jax
import numpy as np
import pytest

from common.errors import UserError
from slimsam import predict
from slimsam.model import Sam
from slimsam.predict import Predictor, enlarge, make_frame
from slimsam.preprocess import preprocess, scale_boxes, scale_points, upscale
from slimsam.weights import save_model

H, W = 33, 70
POINTS = [[[30, 20], [60.5, 4]], [[0, 33], [70, 0]], [[7, 8], [9, 10]]]
LABELS = [[1, 0], [1, 1], [0, 1]]
BOXES = [[10, 5, 60, 30], [0, 0, 70, 33], [20.5, 3, 20.5, 9]]


@pytest.fixture(scope="module")
def params(tiny, draw):
  return draw(tiny)


@pytest.fixture(scope="module")
def image():
  return np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)


@pytest.fixture
def predictor(params, tiny, image):
  made = Predictor(params, tiny)
  made.set_image(image)
  return made


@pytest.fixture(scope="module")
def mask_input(tiny):
  side = 4 * tiny.encoder.grid
  return np.random.default_rng(1).normal(size=(3, side, side))


@functools.partial(jax.jit, static_argnums=0)
def encode(sam, params, inputs):
  return sam.apply({"params": params}, inputs[None], method=sam.encode)


@functools.partial(jax.jit, static_argnums=0, static_argnames="multimask")
def decode(sam, params, embeddings, prompts, *, multimask):
  prompts = {name: value[None, None] for name, value in prompts.items()}
  made = sam.apply(
    {"params": params}, embeddings, **prompts, multimask=multimask,
    method=sam.decode,
  )  # fmt: skip
  return made.logits[0, 0], made.iou[0, 0]


@pytest.mark.parametrize(
  ("kind", "multimask"), [("points", True), ("box", False), ("all", True)]
)
def test_it_is_the_models_functions_put_together(
  predictor, params, tiny, image, mask_input, kind, multimask
):
  size, sam = tiny.encoder.image_size, Sam(tiny)
  asked, prompts = {}, {}
  if kind != "box":
    asked |= {"point_coords": POINTS[0], "point_labels": LABELS[0]}
    prompts["points"] = scale_points(POINTS[0], (H, W), size)
    prompts["labels"] = np.array(LABELS[0])
  if kind != "points":
    asked["box"] = BOXES[0]
    prompts["boxes"] = scale_boxes(BOXES[0], (H, W), size)
  if kind == "all":
    asked["mask_input"] = mask_input[:1]
    prompts["masks"] = mask_input[0].astype(np.float32)
  embeddings = encode(sam, params, preprocess(image, size))
  logits, iou = decode(sam, params, embeddings, prompts, multimask=multimask)
  masks, scores, low_res = predictor.predict(
    **asked, multimask_output=multimask
  )
  count = 3 if multimask else 1
  assert masks.shape == (count, H, W)
  assert masks.dtype == bool
  assert 0.05 < masks.mean() < 0.95
  np.testing.assert_array_equal(masks, upscale(logits, size, (H, W)) > 0)
  np.testing.assert_allclose(scores, iou, atol=1e-5)
  np.testing.assert_allclose(low_res, logits, atol=1e-5)
  assert low_res.dtype == scores.dtype == np.float32
  np.testing.assert_allclose(
    predictor.get_image_embedding(),
    np.moveaxis(embeddings, -1, 1),
    atol=1e-5,
  )


@pytest.fixture(scope="module")
def many(mask_input):
  """Prompts with everything: points, labels, boxes, masks."""
  return *map(np.array, (POINTS, LABELS, BOXES)), mask_input


def test_a_mask_alone_is_a_prompt(predictor, mask_input):
  """One that nothing else tells apart; tokens of zeros are others."""
  masks, scores, logits = predictor.predict(mask_input=mask_input[:1])
  assert masks.shape == (3, H, W)
  assert np.isfinite(scores).all()
  others = predictor.predict(mask_input=mask_input[1:2])[2]
  assert np.abs(logits - others).max() > 1e-3


def test_many_prompts_are_each_by_itself(predictor, many):
  masks, scores, low_res = predictor.predict_batch(*many)
  assert masks.shape == (3, 3, H, W)
  for i, (points, labels, box, mask) in enumerate(zip(*many)):
    one = predictor.predict(points, labels, box, mask[None])
    np.testing.assert_array_equal(masks[i], one[0])
    np.testing.assert_allclose(scores[i], one[1], atol=1e-5)
    np.testing.assert_allclose(low_res[i], one[2], atol=1e-5)
  assert (masks[0] != masks[1]).any()


@pytest.mark.parametrize(("prompts", "masks"), [(64, 2), (1, 1)])
def test_parts_change_nothing(predictor, many, monkeypatch, prompts, masks):
  expected = predictor.predict_batch(*many)
  monkeypatch.setattr(predict, "_PROMPTS", prompts)
  monkeypatch.setattr(predict, "_PIXELS", masks * 64 * 128)
  for a, b in zip(predictor.predict_batch(*many), expected):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_logits_are_above_0_where_masks_are(predictor, many):
  masks, *rest = predictor.predict_batch(*many)
  logits, *others = predictor.predict_batch(*many, return_logits=True)
  assert logits.dtype == np.float32
  np.testing.assert_array_equal(masks, logits > 0)
  for a, b in zip(rest, others):
    np.testing.assert_array_equal(a, b)


def test_colours_may_be_turned_around(predictor, image):
  expected = predictor.get_image_embedding()
  predictor.set_image(image[..., ::-1].copy(), image_format="BGR")
  np.testing.assert_array_equal(predictor.get_image_embedding(), expected)
  predictor.set_image(image, image_format="BGR")
  assert np.abs(predictor.get_image_embedding() - expected).max() > 0.01


@pytest.mark.parametrize(
  "original", [(33, 70), (64, 128), (200, 40), (1, 65), (30, 30)]
)
def test_a_frame_enlarges_and_is_empty_around(tiny, original):
  side = 4 * tiny.encoder.grid
  logits = np.random.default_rng(2).normal(size=(2, side, side))
  logits = logits.astype(np.float32)
  full = np.array(enlarge(logits, make_frame(original, tiny)))
  h, w = original
  expected = upscale(logits, tiny.encoder.image_size, original)
  np.testing.assert_allclose(full[:, :h, :w], expected, atol=1e-6)
  assert [n % 64 for n in full.shape[1:]] == [0, 0]
  full[:, :h, :w] = 0
  assert not full.any()


def test_an_image_is_set_and_forgotten(params, tiny, image):
  predictor = Predictor(params, tiny)
  assert not predictor.is_image_set
  with pytest.raises(UserError, match="call set_image first"):
    predictor.predict(POINTS[0], LABELS[0])
  with pytest.raises(UserError, match="call set_image first"):
    predictor.get_image_embedding()
  predictor.set_image(image)
  assert predictor.is_image_set
  assert predictor.original_size == (H, W)
  with pytest.raises(UserError, match="an image is uint8"):
    predictor.set_image(image.astype(np.float32))
  # An answer about the image before would be mistaken for one about this.
  assert not predictor.is_image_set
  predictor.set_image(image)
  predictor.reset_image()
  assert not predictor.is_image_set
  assert predictor.original_size is None


def test_a_model_on_disk(params, tiny, image, predictor, tmp_path):
  save_model(tmp_path / "model", params, tiny)
  expected = predictor.get_image_embedding()
  for dtype, tolerance in (("float32", 0), ("bfloat16", 0.3)):
    loaded = Predictor.load(tmp_path / "model", dtype=dtype)
    loaded.set_image(image)
    found = loaded.get_image_embedding()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert (found == expected).all() == (dtype == "float32")
  with pytest.raises(UserError, match="dtype='float16'; did you mean"):
    Predictor.load(tmp_path / "model", dtype="float16")


NO_MASK = np.zeros((1, 20, 20))


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    ({}, "there is no prompt"),
    ({"mask_input": NO_MASK[:, 1:]}, "masks [1, 19, 20] must be"),
    ({"point_coords": [[1, 2]]}, "points and labels go together"),
    ({"point_labels": [1]}, "points and labels go together"),
    ({"point_coords": [[1, 2], [71, 3]], "point_labels": [1, 1]},
     "points[1] is (71, 3), outside the image, which is 70 wide"),
    ({"point_coords": [[[1, 2]]], "point_labels": [[1]]},
     "point_coords [1, 1, 2] must be [n 2]: predict_batch"),
    ({"box": BOXES}, "box [3, 4] must be [4]"),
    ({"box": [0, 0, 9]}, "boxes [1, 3] must be"),
    ({"box": [0, 0, 9, 99]}, "outside the image"),
    ({"box": BOXES[0], "mask_input": NO_MASK[0]},
     "masks [20, 20] must be [p 20 20]"),
    ({"box": BOXES[0], "mask_input": NO_MASK > 0}, "masks are bool"),
    ({"box": BOXES[0], "mask_input": NO_MASK + np.nan}, "not finite"),
    ({"box": BOXES[0], "mask_input": np.zeros((2, 20, 20))},
     "1 boxes, 2 masks: give as many of each"),
  ],
)  # fmt: skip
def test_prompts_that_make_no_sense(predictor, arguments, text):
  with pytest.raises(UserError) as caught:
    predictor.predict(**arguments)
  assert text in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    ({"points": POINTS[0], "labels": LABELS[0]}, "points [2, 2] must be"),
    ({"boxes": [BOXES]}, "boxes [1, 3, 4] must be [p 4]"),
    ({"points": POINTS, "labels": LABELS, "boxes": BOXES[:2]},
     "3 points, 3 labels, 2 boxes"),
  ],
)  # fmt: skip
def test_batches_that_make_no_sense(predictor, arguments, text):
  with pytest.raises(UserError) as caught:
    predictor.predict_batch(**arguments)
  assert text in str(caught.value)


def test_unknown_colours(predictor, image):
  with pytest.raises(UserError, match="image_format='rgb'; known: RGB, BGR"):
    predictor.set_image(image, image_format="rgb")
