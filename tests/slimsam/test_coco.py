import json
import logging
import math
import pickle

import numpy as np
import pytest
from PIL import Image

from slimsam import rle
from slimsam.coco import coco

HEIGHT, WIDTH = 8, 10


def rectangle():
  mask = np.zeros((HEIGHT, WIDTH), bool)
  mask[2:5, 1:7] = True
  return mask


# A square of 3 x 6 pixels, written in every way.
POLYGON = [[1, 2, 7, 2, 7, 5, 1, 5]]
PARTS = [[1, 2, 4, 2, 4, 5, 1, 5], [4, 2, 7, 2, 7, 5, 4, 5]]
RUNS = {"size": [8, 10], "counts": rle.encode_runs(rectangle())}


def annotation(id_=1, image_id=1, **changes):
  raw = {
    "id": id_, "image_id": image_id, "segmentation": POLYGON,
    "bbox": [1, 2, 6, 3], "area": 18.0, "iscrowd": 0, "category_id": 3,
  }  # fmt: skip
  return {k: v for k, v in {**raw, **changes}.items() if v is not ...}


def an_image(id_, name, **changes):
  raw = {"id": id_, "file_name": name, "height": HEIGHT, "width": WIDTH}
  return {k: v for k, v in {**raw, **changes}.items() if v is not ...}


def write(path, images, annotations):
  """Returns the folder and the file."""
  for image in images:
    file = path / "images" / str(image["file_name"])
    file.parent.mkdir(parents=True, exist_ok=True)
    red = image["id"] if isinstance(image["id"], int) else 0
    Image.new("RGB", (WIDTH, HEIGHT), (red, 0, 0)).save(file, "png")
  content = {"images": images, "annotations": annotations, "categories": []}
  (path / "instances.json").write_text(json.dumps(content))
  return str(path / "images"), str(path / "instances.json")


@pytest.mark.parametrize(
  "segmentation", [POLYGON, PARTS, RUNS, rle.encode(rectangle())]
)
def test_masks_of_every_kind(tmp_path, segmentation):
  raw = annotation(7, segmentation=segmentation)
  (sample,) = coco(*write(tmp_path, [an_image(1, "a.jpg")], [raw]))
  (found,) = sample.annotations
  np.testing.assert_array_equal(rle.decode(found.rle), rectangle())
  assert isinstance(found.rle["counts"], str)
  assert found.bbox == (1, 2, 6, 3)
  assert found.point is None
  assert found.id == 7


def test_images_by_name_with_their_own_annotations(tmp_path, caplog):
  images = [an_image(30, "b_10.jpg"), an_image(20, "b_9.jpg"),
            an_image(10, "a/c.jpg")]  # fmt: skip
  crowd = annotation(5, 30, iscrowd=1, segmentation=RUNS)
  raw = [annotation(1, 30), annotation(2, 20), crowd, annotation(4, 30)]
  place = write(tmp_path, images, raw)
  with caplog.at_level(logging.INFO):
    source = coco(*place)
  assert "3 images, 3 annotations; left out 1 crowds" in caplog.text
  assert source.labelled
  assert [s.name for s in source] == ["a/c", "b_9", "b_10"]
  assert [s.image[0, 0, 0] for s in source] == [10, 20, 30]
  ids = [[a.id for a in s.annotations] for s in source]
  assert ids == [[], [2], [1, 4]]
  other = pickle.loads(pickle.dumps(source))
  assert other.fingerprint == source.fingerprint
  assert other[2].annotations == source[2].annotations
  part = coco(*place, 1, start=1)
  assert [s.name for s in part] == ["b_9"]
  assert part.fingerprint != source.fingerprint
  raw[0]["bbox"] = [1, 2, 6, 4]
  assert coco(*write(tmp_path, images, raw)).fingerprint != source.fingerprint


BAD = [
  ({"segmentation": ...}, "has no mask"),
  ({"segmentation": []}, "has no mask"),
  ({"segmentation": [[1, 2, 7, 2]]}, "three corners or more"),
  ({"segmentation": [[1, 2, 1, 2, 1, 2]]}, "mask has no pixel"),
  ({"segmentation": {"size": [9, 10], "counts": [90]}}, "mask has no pixel"),
  (
    {"segmentation": {"size": [9, 10], "counts": [80, 10]}},
    "its mask has 9 x 10 pixels (height x width), but its image 8 x 10",
  ),
  ({"bbox": [1, 2, 6, 0]}, "bbox=[1.0, 2.0, 6.0, 0.0] has no area"),
  ({"bbox": ...}, "bbox=None: four numbers"),
  ({"bbox": [1, 2, 1e300, 3]}, "is not inside its image of 10 x 8 pixels"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_a_bad_annotation_is_named(one_line, tmp_path, caplog, changes, words):
  raw = [annotation(7), annotation(8, **changes)]
  place = write(tmp_path, [an_image(1, "a.jpg")], raw)
  message = one_line(coco(*place).__getitem__, 0)
  assert message.startswith(f"{place[1]}: a.jpg: annotation 8: ")
  assert words in message
  (sample,) = coco(*place, on_error="skip")
  assert [a.id for a in sample.annotations] == [7]
  assert "left out 1 of 2 annotations" in caplog.text


IMAGES = [an_image(1, "a.jpg")]
FILES = [
  ([an_image(1, "a.jpg", height=...)], [], "an image has no 'height'"),
  ([an_image(1, "a.jpg"), an_image(1, "b.jpg")], [], "two images have the id"),
  ([], [], "holds no image"),
  ([an_image([1], "a.jpg")], [], "an image's id is [1]"),
  ([an_image(1, 7)], [], "an image's file_name is 7"),
  ([an_image(1, "a.jpg", height=8.5)], [], "a.jpg: height is 8.5"),
  ([an_image(1, "a.jpg", width=math.inf)], [], "a.jpg: width is inf"),
  (IMAGES, [annotation(8, image_id=[1])], "no image has the id [1]"),
  (IMAGES, [annotation(8, 2)], "annotation 8: no image has the id 2"),
  (IMAGES, [annotation(8, image_id=...)], "an annotation has no 'image_id'"),
  (IMAGES, {}, "no list under the key 'annotations'"),
]  # fmt: skip


@pytest.mark.parametrize(("images", "annotations", "words"), FILES)
def test_a_bad_file_is_named(one_line, tmp_path, images, annotations, words):
  place = write(tmp_path, images, annotations)
  message = one_line(coco, *place)
  assert message.startswith(place[1])
  assert words in message


def test_files_that_are_missing(one_line, tmp_path):
  images, path = write(tmp_path, IMAGES, [])
  assert one_line(coco, images, f"{path}x").startswith(f"{path}x: cannot be")
  assert f"{tmp_path}/a.jpg: no such file" in one_line(coco, tmp_path, path)
  assert "json_path is empty" in one_line(coco, images, "")
  (tmp_path / "instances.json").write_text("{")
  assert one_line(coco, images, path).startswith(f"{path}: not JSON")


def test_an_image_of_another_size_than_the_file_says(one_line, tmp_path):
  place = write(tmp_path, [an_image(1, "a.jpg", width=12)], [])
  message = one_line(coco(*place).__getitem__, 0)
  assert f"{place[0]}/a.jpg: 8 x 10 pixels" in message
  assert f"8 x 12 by {place[1]}" in message
