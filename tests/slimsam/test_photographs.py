import importlib.util
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from slimsam import photographs
from slimsam.photographs import bundled, image_folder

# Width and height of what the wheels hold.
SIZES = {
  "astronaut": (512, 512), "chelsea": (451, 300), "coffee": (600, 400),
  "color": (371, 370), "hubble_deep_field": (1000, 872), "ihc": (512, 512),
  "motorcycle_left": (741, 500), "motorcycle_right": (741, 500),
  "retina": (1411, 1411), "rocket": (640, 427), "china": (640, 427),
  "flower": (640, 427),
}  # fmt: skip


def write(path, color, size=(4, 3)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", size, (color,) * 3).save(path)


needs_packages = pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ("skimage", "sklearn"))),
  reason="needs the `photographs` extra",
)


@needs_packages
def test_bundled_photographs_are_divided():
  train, valid = bundled("train"), bundled("valid")
  assert valid.names == ("coffee", "rocket", "flower")
  assert sorted(train.names + valid.names) == sorted(SIZES)
  for sample in (*train, *valid):
    assert sample.image.shape == (*SIZES[sample.name][::-1], 3)
    assert sample.image.dtype == np.uint8
    assert sample.image.std() > 10
    assert sample.annotations == ()
  assert train.fingerprint != valid.fingerprint
  assert not train.labelled


@needs_packages
def test_the_packages_are_not_imported():
  code = (
    "import sys; from slimsam.photographs import bundled; "
    "bundled('train')[0]; assert not {'skimage', 'sklearn'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
  ("package", "title", "split"),
  [("skimage", "scikit-image", "train"), ("sklearn", "scikit-learn", "valid")],
)
def test_a_missing_package_names_the_extra(
  one_line, monkeypatch, package, title, split
):
  find = importlib.util.find_spec

  class Spec:
    submodule_search_locations = ("/",)

  for spec, words in ((None, "not installed"), (Spec, "is missing")):
    monkeypatch.setattr(
      importlib.util,
      "find_spec",
      lambda name, spec=spec: spec if name == package else find("PIL"),
    )
    monkeypatch.setattr(photographs, "whole_file", lambda path: path)
    monkeypatch.setattr(
      photographs.os.path, "isfile", lambda path: "PIL" in path
    )
    message = one_line(bundled, split)
    assert title in message
    assert words in message
    assert "pip install -e '.[photographs]'" in message


def test_an_unknown_split_is_refused(one_line):
  assert "split 'tain'; did you mean 'train'?" in one_line(bundled, "tain")


def test_a_folder_of_images(tmp_path):
  for k, name in enumerate(["a_10.png", "a_2.JPG", "b/c.png", ".hidden.png"]):
    write(tmp_path / name, 40 * k)
  (tmp_path / "notes.txt").write_text("no image")
  source = image_folder(str(tmp_path))
  assert source.names == ("a_2.JPG", "a_10.png", "b/c.png")
  assert not source.labelled
  assert [int(s.image.mean()) for s in source] == [40, 0, 80]
  assert source[0].image.shape == (3, 4, 3)
  assert all(s.annotations == () for s in source)
  assert image_folder(str(tmp_path), 1, start=1).names == ("a_10.png",)
  other = pickle.loads(pickle.dumps(source))
  assert other.fingerprint == source.fingerprint
  np.testing.assert_array_equal(other[1].image, source[1].image)


def test_a_folders_fingerprint_is_of_names_and_sizes(tmp_path):
  prints = []
  for root, name, size in (
    ("x", "a.png", (4, 3)), ("y", "a.png", (4, 3)), ("y", "a.png", (90, 80)),
    ("z", "b.png", (4, 3)),
  ):  # fmt: skip
    write(tmp_path / root / name, 0, size)
    prints.append(image_folder(str(tmp_path / root)).fingerprint)
  assert prints[0] == prints[1]
  assert len(set(prints)) == 3


def test_folders_without_images_are_named(one_line, tmp_path):
  (tmp_path / "a.txt").write_text("no image")
  assert f"{tmp_path}: no image in this" in one_line(
    image_folder, str(tmp_path)
  )
  gone = str(tmp_path / "gone")
  assert one_line(image_folder, gone).startswith(f"{gone}: No such file")
  assert "data.source.path is empty" in one_line(image_folder, "")


def test_a_broken_image_is_named(one_line, tmp_path):
  (tmp_path / "a.png").write_bytes(b"no image")
  source = image_folder(str(tmp_path))
  assert one_line(source.__getitem__, 0).startswith(f"{tmp_path / 'a.png'}: ")
