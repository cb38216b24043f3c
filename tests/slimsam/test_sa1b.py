import io
import json
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from slimsam import rle
from slimsam.sa1b import sa1b

HEIGHT, WIDTH = 5, 7


def a_mask(h=HEIGHT, w=WIDTH):
  mask = np.zeros((h, w), bool)
  mask[1:4, 2:6] = mask[0, 0] = True
  return mask


def annotation(id_=1, **changes):
  raw = {
    "id": id_, "segmentation": rle.encode(a_mask()), "bbox": [0, 0, 6, 4],
    "area": 13, "predicted_iou": 0.9, "stability_score": 0.97,
    "crop_box": [0, 0, WIDTH, HEIGHT], "point_coords": [[3.5, 2]],
  }  # fmt: skip
  return {k: v for k, v in {**raw, **changes}.items() if v is not ...}


def files(number, annotations=None):
  """What SA-1B holds of an image: names and bytes."""
  name = f"sa_{number}"
  png = io.BytesIO()
  Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(png, "png")
  if annotations is None:
    annotations = [annotation(100 * number + k) for k in range(2)]
  content = {
    "image": {"image_id": number, "width": WIDTH, "height": HEIGHT,
              "file_name": f"{name}.jpg"},
    "annotations": annotations,
  }  # fmt: skip
  # The content of a .jpg may be anything that Pillow knows; PNG is exact.
  return {
    f"{name}.jpg": png.getvalue(),
    f"{name}.json": json.dumps(content).encode(),
  }


def write_folder(path, contents):
  for name, data in contents.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(data)
  return str(path)


def write_tar(path, contents, mode="w"):
  with tarfile.open(path, mode) as archive:
    for name, data in contents.items():
      member = tarfile.TarInfo(f"./{name}")
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return str(path)


def many(*numbers):
  return {k: v for number in numbers for k, v in files(number).items()}


def names(source):
  return [sample.name for sample in source]


@pytest.fixture(params=["folder", "folders", "tar", "tars", "pattern"])
def released(request, tmp_path):
  """Images 1, 2, 10 and 11 in every form in which they may lie."""
  first, second = many(10, 1), many(2, 11)
  if request.param == "folder":
    return write_folder(tmp_path, {**first, **second, "LICENSE.txt": b""})
  if request.param == "folders":
    write_folder(tmp_path / "sa_000000", first)
    write_folder(tmp_path / "sa_000001", second)
    write_folder(tmp_path / ".trash", many(99))
    return str(tmp_path)
  if request.param == "tar":
    return write_tar(tmp_path / "sa_000000.tar", {**first, **second})
  tars = [
    write_tar(tmp_path / "sa_000000.tar", first),
    write_tar(tmp_path / "sa_000001.tar", second),
  ]
  return tars if request.param == "tars" else str(tmp_path / "sa_*.tar")


def test_images_come_with_their_own_annotations(released):
  source = sa1b(released)
  assert source.labelled
  assert names(source) == ["sa_1", "sa_2", "sa_10", "sa_11"]
  for number, sample in zip((1, 2, 10, 11), source):
    assert sample.image.shape == (HEIGHT, WIDTH, 3)
    assert sample.image.dtype == np.uint8
    assert (sample.image == (number, 0, 0)).all()
    assert [a.id for a in sample.annotations] == [
      100 * number,
      100 * number + 1,
    ]
    for found in sample.annotations:
      np.testing.assert_array_equal(rle.decode(found.rle), a_mask())
      assert found.rle == {"size": [5, 7], "counts": "01:2H000004"}
      assert found.bbox == (0, 0, 6, 4)
      assert found.point == (3.5, 2)


def test_some_images_and_copies_for_other_processes(released):
  assert names(sa1b(released, 2)) == ["sa_1", "sa_2"]
  assert names(sa1b(released, 2, start=1)) == ["sa_2", "sa_10"]
  source = sa1b(released, 3)
  other = pickle.loads(pickle.dumps(source))
  assert other.fingerprint == source.fingerprint
  assert names(other) == names(source)
  assert other[2].annotations == source[2].annotations


def test_a_fingerprint_is_of_names_and_sizes_wherever_they_lie(tmp_path):
  folder = write_folder(tmp_path / "a", many(1, 2))
  tar = write_tar(tmp_path / "b.tar", many(2, 1))
  longer = write_tar(tmp_path / "c.tar", {**many(1), **files(2, [])})
  prints = [sa1b(path).fingerprint for path in (folder, tar, longer)]
  assert prints[0] == prints[1]
  assert len({*prints, sa1b(folder, 1).fingerprint}) == 3


def test_an_annotation_may_have_no_point_and_an_image_no_annotation(tmp_path):
  raw = [annotation(point_coords=...), annotation(point_coords=[])]
  contents = {**files(1, raw), **files(2, [])}
  first, second = sa1b(write_folder(tmp_path, contents))
  assert [a.point for a in first.annotations] == [None, None]
  assert second.annotations == ()


def test_runs_that_are_not_compressed(tmp_path):
  code = {"size": [5, 7], "counts": [0, 1, 10, 3, 2, 3, 2, 3, 2, 3, 6]}
  raw = [annotation(segmentation=code)]
  (sample,) = sa1b(write_folder(tmp_path, files(1, raw)))
  assert sample.annotations[0].rle["counts"] == "01:2H000004"


@pytest.mark.parametrize("lost", ["sa_2.jpg", "sa_2.json"])
@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_files_without_a_partner(one_line, tmp_path, caplog, lost, write):
  contents = many(1, 2, 3)
  del contents[lost]
  path = write(tmp_path / "data", contents)
  alone = "sa_2.json" if lost == "sa_2.jpg" else "sa_2.jpg"
  lack = "image" if lost == "sa_2.jpg" else ".json"
  message = one_line(sa1b, path)
  assert f"1 files have no {lack} of the same stem: {tmp_path}" in message
  assert f"{alone}: add it, or" in message
  assert not caplog.records
  assert names(sa1b(path, on_error="skip")) == ["sa_1", "sa_3"]
  assert f"left out 1 files that have no {lack}" in caplog.text
  assert alone in caplog.text


def test_two_images_of_one_name(one_line, tmp_path):
  tars = [write_tar(tmp_path / f"{k}.tar", many(1)) for k in "ab"]
  message = one_line(sa1b, tars)
  assert f"{tars[1]}:./sa_1.jpg and {tars[0]}:./sa_1.jpg have the" in message
  # One tar that two patterns name is read once.
  assert names(sa1b([tars[0], str(tmp_path / "a*.tar")])) == ["sa_1"]


WRONG = rle.encode(np.ones((7, 5), bool))
BAD = [
  ({"segmentation": ...}, "has no mask"),
  ({"segmentation": {"size": [5, 7], "counts": ""}}, "has no mask"),
  ({"segmentation": [[0, 0, 1, 1, 0, 1]]}, "has no mask"),
  ({"segmentation": rle.encode(np.zeros((5, 7), bool))}, "mask has no pixel"),
  ({"segmentation": WRONG}, "has 7 x 5 pixels (height x width), but its"),
  ({"segmentation": {"size": [5, 8], "counts": "S1"}}, "its runs sum to 35"),
  ({"bbox": [0, 0, 6, 0]}, "bbox=[0.0, 0.0, 6.0, 0.0] has no area"),
  ({"bbox": [0, 0, -1, 4]}, "has no area"),
  ({"bbox": [0, 0, 6]}, "bbox=[0, 0, 6]: four numbers"),
  ({"bbox": [0, 0, 6, float("nan")]}, "four numbers"),
  ({"bbox": ...}, "bbox=None: four numbers"),
  ({"bbox": [100, 100, 5, 5]}, "is not inside its image of 7 x 5 pixels"),
  ({"point_coords": [[8, 1]]}, "its point (8, 1) is outside of the image of 7"),
  ({"point_coords": [[1]]}, "point_coords=[[1]]: pairs of numbers"),
  ({"point_coords": [3, 4]}, "point_coords=[3, 4]: pairs of numbers"),
  ({"point_coords": 3}, "point_coords=3: pairs of numbers"),
  ({"id": "x7"}, "annotation x7: its id is no integer"),
  ({"id": ...}, "annotation number 1, which has no id: its id is no integer"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_a_bad_annotation_is_named(one_line, tmp_path, caplog, changes, words):
  raw = [annotation(7), annotation(**{"id_": 8, **changes}), annotation(9)]
  path = write_folder(tmp_path, files(1, raw))
  message = one_line(sa1b(path).__getitem__, 0)
  assert message.startswith(f"{tmp_path / 'sa_1.json'}: annotation ")
  assert words in message
  if "id" not in changes:
    assert ": annotation 8: " in message
  assert message.endswith("with data.source.on_error='skip'")
  assert not caplog.records
  (sample,) = sa1b(path, on_error="skip")
  assert [a.id for a in sample.annotations] == [7, 9]
  assert f"{tmp_path / 'sa_1.json'}: left out 1 of 3 annotations" in caplog.text
  assert words in caplog.text


@pytest.mark.parametrize("entry", [None, 3, "x", []])
def test_an_annotation_that_is_no_object(one_line, tmp_path, entry):
  path = write_folder(tmp_path, files(1, [entry]))
  assert "is no JSON object" in one_line(sa1b(path).__getitem__, 0)


@pytest.mark.parametrize(
  ("name", "data", "words"),
  [
    ("sa_1.json", b"{", "sa_1.json: not JSON"),
    ("sa_1.json", b"[]", "sa_1.json: not a JSON object"),
    ("sa_1.json", b"{}", "sa_1.json: no list under the key 'annotations'"),
    ("sa_1.jpg", b"no image", "sa_1.jpg: no image"),
  ],
)
@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_broken_file_is_named(one_line, tmp_path, name, data, words, write):
  path = write(tmp_path / "data", {**many(1), name: data})
  message = one_line(sa1b(path).__getitem__, 0)
  assert message.startswith(path)
  assert words in message


def test_tars_that_cannot_be_read(one_line, tmp_path):
  zipped = write_tar(tmp_path / "a.tar.gz", many(1), mode="w:gz")
  message = one_line(sa1b, zipped)
  assert message.startswith(f"{zipped}: ")
  assert "give an uncompressed tar" in message


# A member is a header of 512 bytes and content that is filled up to 512.
@pytest.mark.parametrize("cut", [0, 100, 700, 2 * 1024 + 100, 4 * 1024])
def test_a_tar_that_is_cut_off_or_damaged(one_line, tmp_path, cut):
  contents = dict.fromkeys(many(1, 2, 3), b"content")
  path = write_tar(tmp_path / "a.tar", contents)
  assert len(sa1b(path)) == 3
  data = (tmp_path / "a.tar").read_bytes()
  damaged = data[:cut] + b"x" * 100 + data[cut + 100 :]
  for wrong in (data[:cut], damaged) if cut != 700 else (data[:cut],):
    (tmp_path / "a.tar").write_bytes(wrong)
    message = one_line(sa1b, path)
    assert message.startswith(f"{path}: ")
    assert "fetch it again" in message


def test_paths_without_data(one_line, tmp_path):
  assert "data.source.path=" in one_line(sa1b, str(tmp_path / "gone"))
  assert "data.source.path is empty" in one_line(sa1b, "")
  message = one_line(sa1b, str(tmp_path))
  assert "no pair of an image and its annotations" in message
  write_tar(tmp_path / "a.tar", many(1))
  assert "tars with 'FOLDER/*.tar'" in one_line(sa1b, str(tmp_path))


# In another process, where TFDS's own warnings are no errors. The data set is
# written without TensorFlow and Beam, by the features of TFDS's own builder.
TFDS = """
import io
import pickle
import sys

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.datasets.segment_anything import (
  segment_anything_dataset_builder as released,
)
from common.errors import UserError
from slimsam import rle
from slimsam.sa1b import tfds_sa1b
from slimsam.sources import make_source

folder = sys.argv[1]
tfds.disable_progress_bar()
mask = np.zeros((50, 70), bool)
mask[10:40, 20:60] = True

class Tiny(released.Builder, skip_registration=True):
  name = "segment_anything"

  def _split_generators(self, dl):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for n in range(1, 5):
      png = io.BytesIO()  # An array would need TensorFlow.
      Image.new("RGB", (70, 50), (n, 0, 0)).save(png, "png")
      png.seek(0 if n < 4 else 9)
      size = mask.shape if n < 3 else mask.T.shape
      raw = [
        {"id": 10 * n + k, "area": 1200, "bbox": [20, 10, 40, 30],
         "crop_box": [0, 0, 70, 50], "point_coords": [[35.5, 20]],
         "predicted_iou": 0.9, "stability_score": 0.9,
         "segmentation": rle.encode(mask.reshape(size))}
        for k in range(n - 1)
      ]
      raw = released._parse_annotations(raw, 50, 70)
      yield n, {
        "image": {"content": png, "file_name": f"sa_{n}.jpg", "height": 50,
                  "width": 70, "image_id": n},
        "annotations": raw,
      }

def message(function, *arguments):
  try:
    function(*arguments)
  except UserError as error:
    assert "\\n" not in str(error), error
    return str(error)
  raise AssertionError("no error")

lost = message(tfds_sa1b, folder)
for words in ("is not prepared in " + folder, "one tar of the 1000",
              "segment_anything_links.txt", f"data_dir={folder!r}",
              "apache-beam", "data.source.kind='sa1b'"):
  assert words in lost, lost

Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
source = tfds_sa1b(folder)
assert len(source) == 4 and source.labelled
found, errors = {}, []
for i in range(4):
  try:
    found[source[i].name] = source[i]
  except UserError as error:
    errors.append(str(error))
assert sorted(found) == ["sa_1", "sa_2"], found
assert found["sa_1"].annotations == ()
image, (annotation,) = found["sa_2"].image, found["sa_2"].annotations
assert image.shape == (50, 70, 3) and image.dtype == np.uint8
assert (image == (2, 0, 0)).all()
assert annotation.id == 20 and annotation.point == (35.5, 20)
assert type(annotation.id) is int and type(annotation.rle["counts"]) is str
assert annotation.rle == rle.encode(mask)
# The boxes are kept in 32 bits, as shares of the image's sides.
np.testing.assert_allclose(annotation.bbox, (20, 10, 40, 30), atol=1e-4)
broken, wrong = sorted(errors)[::-1]
assert wrong.startswith("segment_anything: record "), wrong
assert "cannot be decoded" in wrong, wrong
assert broken.startswith("segment_anything: sa_3.jpg: annotation 30: "), broken
assert "has 70 x 50 pixels" in broken, broken
copy = pickle.loads(pickle.dumps(source))
assert copy.fingerprint == source.fingerprint
part = tfds_sa1b(folder, 2, start=1)
assert len(part) == 2 and part.fingerprint != source.fingerprint
config = {"kind": "tfds", "data_dir": folder, "limit": 2,
          "valid": {"start": 2, "limit": 1}}
assert [len(make_source(config, s)) for s in ("train", "valid")] == [2, 1]
assert "tensorflow" not in sys.modules
"""


def test_sa1b_by_tfds_without_tensorflow(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", TFDS, str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr[-3000:]
