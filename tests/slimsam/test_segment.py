"""The command: files in, files out, one-line errors."""

import json
import logging
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from common import app
from common.data.images import read_image
from slimsam import rle, segment
from slimsam.amg import AutomaticMaskGenerator
from slimsam.masks import boxes_of
from slimsam.predict import Predictor
from slimsam.weights import save_model

ROOT = pathlib.Path(__file__).parents[2]
H, W = 30, 44
POINT, BOX, SECOND = "20,10", "4,3,40,25", "0,0,12.5,30"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny, draw):
  folder = tmp_path_factory.mktemp("model") / "tiny"
  save_model(folder, draw(tiny), tiny)
  return str(folder)


@pytest.fixture(scope="module")
def predictor(checkpoint):
  return Predictor.load(checkpoint)


@pytest.fixture
def photos(tmp_path):
  """A folder of two photographs, one of them in a folder below."""
  folder = tmp_path / "photos"
  rng = np.random.default_rng(0)
  for name in ("a.png", "below/b.png"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (H, W, 3), np.uint8)).save(file)
  return folder


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch, caplog, capfd):
  """`(arguments)`: status, error lines and log lines; output is in `out`."""

  def call(*arguments):
    argv = ["segment", "--checkpoint", checkpoint]
    argv += [f"--output={tmp_path / 'out'}", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", argv)
    caplog.clear()
    status = app.call(segment.main)
    own = [r.message for r in caplog.records if r.name == segment.log.name]
    return status, capfd.readouterr().err, own

  yield call
  segment.log.setLevel(logging.NOTSET)


def test_a_point(command, predictor, photos, tmp_path):
  status, err, lines = command(photos / "a.png", "--point", POINT)
  out = tmp_path / "out"
  assert (status, err) == (0, "")
  assert lines == [f"{photos / 'a.png'}: 1 mask in {out / 'a.json'}"]
  assert sorted(file.name for file in out.iterdir()) == [
    "a.json", "a.png", "a_mask_0.png",
  ]  # fmt: skip
  image = read_image(photos / "a.png")
  predictor.set_image(image)
  masks, scores, _ = predictor.predict([[20, 10]], [1], multimask_output=False)
  page = json.loads((out / "a.json").read_text())
  assert page["image"] == str(photos / "a.png")
  assert page["size"] == [H, W]
  (record,) = page["masks"]
  np.testing.assert_array_equal(rle.decode(record["segmentation"]), masks[0])
  written = np.asarray(Image.open(out / "a_mask_0.png"))
  np.testing.assert_array_equal(written, 255 * masks[0])
  x0, y0, x1, y1 = boxes_of(masks[0])
  assert record["bbox"] == [x0, y0, x1 - x0, y1 - y0]
  assert record["area"] == masks.sum()
  assert record["predicted_iou"] == pytest.approx(scores[0], abs=1e-6)
  assert record["point_coords"] == [[20, 10]]
  assert record["point_labels"] == [1]
  assert record["file"] == "a_mask_0.png"


def test_colours_lie_on_masks_only(command, photos, tmp_path):
  command(photos / "a.png", "--box", BOX)
  image = read_image(photos / "a.png").astype(float)
  overlay = np.asarray(Image.open(tmp_path / "out" / "a.png"))
  mask = np.asarray(Image.open(tmp_path / "out" / "a_mask_0.png")) > 0
  frame = np.zeros((H, W), bool)
  frame[3:26, 4:41] = True
  frame[4:25, 5:40] = False
  np.testing.assert_array_equal(overlay[frame], 255)
  bare = ~mask & ~frame
  np.testing.assert_array_equal(overlay[bare], image[bare])
  mixed = 0.45 * image + 0.55 * np.array(segment.colour(0))
  mask &= ~frame
  np.testing.assert_allclose(overlay[mask], mixed[mask], atol=0.51)
  assert mask.any()
  assert bare.any()


def test_small_masks_lie_on_large_ones():
  image = np.zeros((2, 3, 3), np.uint8)
  owner = np.array([[0, 0, -1], [0, 1, -1]])
  found = segment._overlay(image, owner, (), ())
  for i in (0, 1):
    expected = np.rint(0.55 * np.array(segment.colour(i)))
    np.testing.assert_array_equal(
      found[owner == i], [expected] * (owner == i).sum()
    )
  assert len({segment.colour(i) for i in range(200)}) == 200


def test_folders_boxes_and_a_broken_image(command, predictor, photos, tmp_path):
  """Each box is a prompt; what cannot be read is named, and the rest done."""
  (photos / "broken.png").write_bytes(b"no image")
  status, err, lines = command(photos, "--box", BOX, f"--box={SECOND}")
  assert status == 1
  assert err == ("error: 1 of 3 images were left out, for the reasons above\n")
  assert len(lines) == 3
  assert lines[0].startswith(f"1 of 3  {photos / 'a.png'}: 2 masks in ")
  assert lines[1].startswith(f"error: {photos / 'broken.png'}: no image")
  assert lines[2].startswith(f"3 of 3  {photos / 'below' / 'b.png'}: 2 masks")
  boxes = [[float(n) for n in box.split(",")] for box in (BOX, SECOND)]
  for name in ("a", "below/b"):
    predictor.set_image(read_image(photos / f"{name}.png"))
    masks, _, _ = predictor.predict_batch(boxes=boxes, multimask_output=False)
    page = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert [record["box"] for record in page["masks"]] == boxes
    for record, (mask,) in zip(page["masks"], masks, strict=True):
      np.testing.assert_array_equal(rle.decode(record["segmentation"]), mask)
      file = tmp_path / "out" / f"{name}.json"
      assert (file.parent / record["file"]).exists()
  assert not (tmp_path / "out" / "broken.json").exists()


def test_points_and_a_box_are_one_prompt(command, predictor, photos, tmp_path):
  status, _, _ = command(
    "--point", POINT, photos / "a.png", "--point=5,6,0", "--box", BOX,
    "--multimask",
  )  # fmt: skip
  assert status == 0
  predictor.set_image(read_image(photos / "a.png"))
  masks, scores, _ = predictor.predict(
    [[20, 10], [5, 6]], [1, 0], [4, 3, 40, 25]
  )
  page = json.loads((tmp_path / "out" / "a.json").read_text())
  for i, record in enumerate(page["masks"]):
    found = rle.decode(record["segmentation"])
    np.testing.assert_array_equal(found, masks[i])
    assert record["predicted_iou"] == pytest.approx(scores[i], abs=1e-6)
    assert record["point_labels"] == [1, 0]
    assert record["box"] == [4, 3, 40, 25]
    assert record["file"] == f"a_mask_{i}.png"
  assert len(page["masks"]) == 3


def test_everything(command, predictor, photos, tmp_path):
  settings = {
    "points_per_side": 2, "pred_iou_thresh": 0.01, "stability_score_thresh": 0,
    "min_mask_region_area": 2,
  }  # fmt: skip
  flags = [f"--{name}={value}" for name, value in settings.items()]
  status, _, _ = command(photos / "a.png", "--everything", *flags)
  assert status == 0
  expected = AutomaticMaskGenerator(
    predictor, output_mode="coco_rle", **settings
  ).generate(read_image(photos / "a.png"))
  page = json.loads((tmp_path / "out" / "a.json").read_text())
  assert expected
  for i, (record, other) in enumerate(
    zip(page["masks"], expected, strict=True)
  ):
    assert record == other | {"file": f"a_mask_{i}.png"}


def test_an_image_without_masks(command, photos, tmp_path):
  status, _, lines = command(
    photos / "a.png", "--everything", "--points_per_side=2",
    "--pred_iou_thresh=99",
  )  # fmt: skip
  assert status == 0
  assert ": 0 masks in " in lines[0]
  page = json.loads((tmp_path / "out" / "a.json").read_text())
  assert page["masks"] == []
  overlay = np.asarray(Image.open(tmp_path / "out" / "a.png"))
  np.testing.assert_array_equal(overlay, read_image(photos / "a.png"))


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    ((), "say what to find: --point, --box or --everything"),
    (("--point=3",), "argument --point: '3' is not X,Y or X,Y,LABEL"),
    (("--point=3,nan",), "'3,nan' is not X,Y"),
    (("--point=3,4,2",), "the label is 1 on the object or 0 beside it"),
    (("--box=1,2,3",), "argument --box: '1,2,3' is not X0,Y0,X1,Y1"),
    (("--point=1,2", "--box=0,0,1,1", "--box=0,0,1,1"),
     "--point with 2 times --box: points go with one box"),
    (("--point=1,2", "--everything"), "--everything takes no --point"),
    (("--multimask", "--everything"), "--multimask goes with"),
    (("--point=1,2", "--crop_n_layers=1"), "--crop_n_layers goes with"),
    (("--everything", "--points_per_side=0"), "points_per_side=0"),
    (("--point=1,2", "--dtype=float16"), "dtype='float16'"),
    (("--point=1,2", "--ouput=x"), "did you mean '--output'"),
    (("/no/such.png", "--point=1,2"), "/no/such.png: no such file or folder"),
    # Of one image, what is wrong with it.
    (("--point=45,10",), "a.png: points[0, 0] is (45, 10), outside the image"),
    (("--box=9,9,3,3",), "a.png: boxes[0] is (9, 9, 3, 3), whose right"),
  ],
)  # fmt: skip
def test_mistakes_have_one_line(command, photos, arguments, text):
  status, err, lines = command(photos / "a.png", *arguments)
  assert (status, lines) == (2, [])
  assert text in err
  assert err.startswith("error: ")
  assert err.count("\n") == 1


def test_one_broken_image_is_bad_input(command, photos):
  (photos / "a.png").write_bytes(b"no image")
  status, err, _ = command(photos / "a.png", "--point", POINT)
  assert status == 2
  assert err.startswith(f"error: {photos / 'a.png'}: no image")
  assert err.count("\n") == 1


def test_a_prompt_that_one_image_cannot_have(command, photos):
  Image.new("RGB", (9, 9)).save(photos / "small.png")
  status, err, lines = command(photos, "--point", POINT)
  assert status == 1
  assert err.startswith("error: 1 of 3 images")
  assert lines[1].startswith(
    f"error: {photos / 'small.png'}: points[0, 0] is (20, 10), outside"
  )
  assert "a.png: 1 mask" in lines[0]


@pytest.mark.parametrize("place", ["photos", "photos/below"])
def test_images_are_not_overwritten(command, photos, tmp_path, place):
  output = tmp_path / place
  status, err, _ = command(photos, "--point", POINT, f"--output={output}")
  assert status == 2
  assert f"--output={output} is where {output}" in err
  assert err.count("\n") == 1


def test_a_folder_that_cannot_be_made(command, photos, tmp_path):
  (tmp_path / "file").write_text("")
  output = tmp_path / "file" / "below"
  status, err, _ = command(photos, "--point", POINT, f"--output={output}")
  assert status == 2
  assert f"--output={output} cannot be made: Not a directory" in err


@pytest.mark.parametrize(
  ("name", "text"),
  [("a.jpg", "would both become a.png"), ("a_mask_0.png", "name of a mask")],
)
def test_names_that_would_be_written_twice(command, photos, name, text):
  Image.new("RGB", (W, H)).save(photos / name)
  status, err, _ = command(photos, "--point", POINT)
  assert status == 2
  assert text in err
  assert err.count("\n") == 1


def test_a_folder_without_images(command, tmp_path):
  (tmp_path / "empty").mkdir()
  status, err, _ = command(tmp_path / "empty", "--point", POINT)
  assert status == 2
  assert f"{tmp_path / 'empty'} holds no images" in err


def test_help_comes_without_jax():
  script = (
    "import sys; sys.argv[1:] = ['--help']\n"
    "from slimsam import segment\n"
    "try: segment.main()\n"
    "finally: assert 'jax' not in sys.modules"
  )
  done = subprocess.run(
    [sys.executable, "-c", script],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert segment.EXAMPLE in done.stdout
  assert "--everything" in done.stdout
