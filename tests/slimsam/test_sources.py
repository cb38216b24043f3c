import importlib.util
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from slimsam import listing
from slimsam.sources import (
  KINDS,
  SPLITS,
  Remembered,
  Sample,
  Source,
  fingerprint_of,
  make_source,
)


class Numbers(Source):
  """Samples whose one pixel holds their number."""

  labelled = False

  def __len__(self):
    return 5

  @property
  def fingerprint(self):
    return fingerprint_of("numbers", len(self))

  def read(self, i):
    return Sample(f"n{i}", np.full((1, 1, 3), i, np.uint8), ())


def folder(path, names, side=20):
  path.mkdir(parents=True, exist_ok=True)
  for k, name in enumerate(names):
    Image.new("RGB", (side, side), (9 * k, 0, 0)).save(path / name)
  return str(path)


def test_a_source_is_a_sequence():
  source = Numbers()
  assert [sample.name for sample in source] == ["n0", "n1", "n2", "n3", "n4"]
  assert source[-1].name == source[np.int64(4)].name == "n4"
  for i in (5, -6):
    with pytest.raises(IndexError, match=f"sample {i} of 5"):
      source[i]
  with pytest.raises(TypeError):
    source[1.0]


def test_what_was_read_is_kept_while_there_is_room():
  reads = []

  class Counted(Numbers):
    def read(self, i):
      reads.append(i)
      return super().read(i)

  source = Remembered(Counted(), megabytes=7 / 2**20)  # of 3 bytes each
  expected = [sample.name for sample in Numbers()]
  for _ in range(2):
    assert [sample.name for sample in source] == expected
  assert reads == [0, 1, 2, 3, 4, 2, 3, 4]
  assert source.fingerprint == Numbers().fingerprint
  assert not source.labelled
  empty = pickle.loads(pickle.dumps(Remembered(Numbers(), 1)))
  assert empty[3].name == "n3"


def test_a_source_must_say_what_it_reads():
  with pytest.raises(TypeError, match="abstract"):
    Source()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_reader_and_its_description(kind):
  module, function, place, options = KINDS[kind]
  reader = getattr(importlib.import_module(module), function)
  known = reader.__code__.co_varnames
  assert set(place + options) <= set(known)
  assert f"      {kind}: " in make_source.__doc__
  for key in place + options:
    assert (
      f"`{key}`" in make_source.__doc__ or f"`{key} " in make_source.__doc__
    )


@pytest.mark.parametrize("wrap", [dict, ConfigDict])
def test_a_config_names_a_source(tmp_path, wrap):
  path = folder(tmp_path, ["a2.png", "a10.png", "b.png"])
  config = wrap({"kind": "folder", "path": path, "start": 1, "json_path": ""})
  assert [s.name for s in make_source(config, "train")] == ["a10.png", "b.png"]


def test_a_split_has_settings_of_its_own(tmp_path):
  train = folder(tmp_path / "train", ["a.png", "b.png"])
  valid = folder(tmp_path / "valid", ["c.png", "d.png"])
  config = {
    "kind": "folder", "path": train, "limit": 1,
    "valid": {"kind": "", "path": valid, "start": None},
  }  # fmt: skip
  assert [s.name for s in make_source(config, "train")] == ["a.png"]
  assert [s.name for s in make_source(config, "valid")] == ["c.png"]


@pytest.mark.parametrize(
  ("settings", "valid", "good"),
  [
    ({"limit": 2}, {}, False),
    ({"limit": 2}, {"limit": 1}, False),
    ({}, {"start": 2}, False),
    ({"limit": 2}, {"start": 1, "limit": 1}, False),
    ({"limit": 2}, {"start": 2, "limit": 1}, True),
    ({"start": 1}, {"start": 0, "limit": 1}, True),
  ],
)
def test_validation_sees_no_image_of_training(
  one_line, tmp_path, settings, valid, good
):
  path = folder(tmp_path, ["a.png", "b.png", "c.png"])
  config = {"kind": "folder", "path": path, **settings, "valid": valid}
  if good:
    names = [{s.name for s in make_source(config, x)} for x in SPLITS]
    assert not names[0] & names[1]
  else:
    message = one_line(make_source, config, "valid")
    assert message.startswith("data.source.valid has images of the training")
    assert "data.source.valid.path=" in message


def test_drawn_splits_differ_by_more_than_their_photographs(tmp_path):
  """Else a picture of one would have the objects of one of the other."""
  paths = {
    split: folder(tmp_path / split, ["a.png", "b.png"]) for split in SPLITS
  }
  photographs = {
    "kind": "folder", "path": paths["train"], "valid": {"path": paths["valid"]},
  }  # fmt: skip
  config = {
    "kind": "composite", "length": 8, "size": 20, "seed": 3, "objects": (2, 2),
    "photographs": photographs,
  }  # fmt: skip
  train, valid = (make_source(config, split) for split in SPLITS)
  assert train.fingerprint != valid.fingerprint
  masks = [{a.rle["counts"] for s in x for a in s.annotations}
           for x in (train, valid)]  # fmt: skip
  assert not masks[0] & masks[1]
  config = {**config, "kind": "crops"}
  assert not make_source(config, "train").labelled
  assert make_source(config, "train")[0].image.shape == (20, 20, 3)


@pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ("skimage", "sklearn"))),
  reason="needs the `photographs` extra",
)
def test_photographs_are_the_bundled_ones_unless_told():
  config = {"kind": "crops", "length": 1, "size": 16, "seed": 0}
  own = {**config, "photographs": {"kind": "bundled"}}
  for split, count in (("train", 9), ("valid", 3)):
    source = make_source(config, split)
    assert len(source.photographs) == count
    assert source.fingerprint == make_source(own, split).fingerprint


BAD = [
  ({"kind": "foldr"}, "train", "data.source.kind='foldr'; did you mean 'fol"),
  ({"kind": "tree"}, "train", "known: sa1b, tfds, coco, folder, bundled, comp"),
  ({}, "train", "data.source.kind=None; known: sa1b"),
  ({"kind": "bundled"}, "test", "split 'test'; known: train, valid"),
  ({"kind": "bundled"}, "vald", "split 'vald'; did you mean 'valid'?"),
  ({"kind": "sa1b", "pth": "x"}, "train", "'pth'; did you mean 'path'?"),
  (
    {"kind": "sa1b", "path": "x", "valid": {"pth": "y"}}, "valid",
    "data.source.valid: unknown key 'pth'",
  ),
  ({"kind": "sa1b"}, "train", "kind='sa1b' needs data.source.path"),
  ({"kind": "coco", "images_dir": "x"}, "train", "needs data.source.json_path"),
  ({"kind": "crops", "length": 4, "seed": 0}, "train", "data.source.size"),
  (
    {"kind": "sa1b", "path": "x", "on_error": "ignore"}, "train",
    "on_error='ignore'; known: error, skip",
  ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "split", "words"), BAD)
def test_a_bad_config_is_one_line(one_line, config, split, words):
  assert words in one_line(make_source, config, split)


def test_fingerprints_tell_parts_apart():
  prints = [
    fingerprint_of(*parts)
    for parts in [(), ("a",), ("a", 1), ("a1",), ("a", "1"), (("a", 1),)]
  ]
  assert len(set(prints)) == len(prints)


def test_numbers_in_names_count_by_value():
  names = ["sa_10", "sa_2", "b", "sa_02", "10", "9", "sa_2b1", "sa_2b"]
  assert sorted(names, key=listing.natural_order) == [
    "9", "10", "b", "sa_02", "sa_2", "sa_2b", "sa_2b1", "sa_10",
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("start", "limit", "numbers"),
  [(0, 0, [0, 1, 2]), (0, 2, [0, 1]), (1, 0, [1, 2]), (1, 2, [1, 2])],
)
def test_a_part_of_the_images(start, limit, numbers, caplog):
  assert list(listing.chosen(3, start, limit, place="x")) == numbers
  assert not caplog.records


def test_fewer_images_than_asked_for_are_told(caplog):
  assert list(listing.chosen(3, 1, 5, place="x")) == [1, 2]
  assert "limit=5, but there are 2 images" in caplog.text


@pytest.mark.parametrize(("start", "limit"), [(3, 0), (-1, 0), (0, -1)])
def test_no_images_are_refused(one_line, start, limit):
  message = one_line(listing.chosen, 3, start, limit, place="x")
  assert f"data.source.start={start}" in message


def test_a_file_that_shrank_is_named(one_line, tmp_path):
  (tmp_path / "a").write_bytes(b"1234")
  place = listing.whole_file(str(tmp_path / "a"))
  assert pickle.loads(pickle.dumps(place)).read() == b"1234"
  (tmp_path / "a").write_bytes(b"12")
  assert f"{tmp_path / 'a'}: 2 of its 4 bytes are gone" in one_line(place.read)
  (tmp_path / "a").unlink()
  assert one_line(place.read).startswith(f"{tmp_path / 'a'}: cannot be read")
  assert "cannot be read" in one_line(listing.whole_file, place.file)


def test_a_path_whose_kind_was_forgotten_is_refused(one_line):
  config = {"kind": "composite", "path": "SA1B", "data_dir": "",
            "length": 2, "size": 32, "seed": 0}  # fmt: skip
  assert (
    "data.source.path='SA1B' means nothing to data.source.kind='composite': "
    "set data.source.kind to sa1b or folder"
  ) in one_line(make_source, config, "train")
