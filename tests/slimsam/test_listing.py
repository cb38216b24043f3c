"""Tars and lists of files that lead elsewhere, or lie about their sizes."""

import io
import json
import tarfile

import numpy as np
import pytest

from common.data.images import write_png
from slimsam.coco import coco
from slimsam.listing import natural_order, tar_members
from slimsam.sources import make_source


def tar(path, *members, content=b"12345"):
  """Writes a tar of `(name, attributes)`."""
  with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
    for name, attributes in members:
      member = tarfile.TarInfo(name)
      member.size = len(content)
      for key, value in attributes.items():
        setattr(member, key, value)
      is_file = member.type == tarfile.REGTYPE
      archive.addfile(member, io.BytesIO(content) if is_file else None)
  return str(path)


def names(path):
  return [place.name.rpartition(":")[2] for place in tar_members(path)]


def test_files_and_folders(tmp_path):
  path = tar(
    tmp_path / "a.tar",
    ("d", {"type": tarfile.DIRTYPE, "size": 0}), ("d/1.jpg", {}),
    ("d/.hidden", {}), ("./2.jpg", {}),
  )  # fmt: skip
  assert names(path) == ["d/1.jpg", "./2.jpg"]
  assert [place.read() for place in tar_members(path)] == [b"12345"] * 2


STRANGE = {
  "a symbolic link": (
    "1.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0},
    "no file but a link",
  ),
  "a hard link": (
    "1.jpg", {"type": tarfile.LNKTYPE, "linkname": "0.jpg", "size": 0},
    "no file but a link",
  ),
  "a device": ("1.jpg", {"type": tarfile.CHRTYPE, "size": 0}, "a device"),
  "a name from above": ("../1.jpg", {}, "leads out of the tar"),
  "a name within": ("a/../../1.jpg", {}, "leads out of the tar"),
  "a name from the root": ("/etc/1.jpg", {}, "leads out of the tar"),
  "more bytes than there are": (
    "1.jpg", {"pax_headers": {"size": "99999999999"}}, "is not inside of it",
  ),
  "fewer than none": (
    "1.jpg", {"pax_headers": {"size": "-512"}}, "is not inside of it",
  ),
  "holes": (
    "1.jpg",
    {"pax_headers": {"GNU.sparse.map": "0,1", "GNU.sparse.size": "3"}},
    "a file with holes",
  ),
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGE)
def test_members_that_are_no_files_of_the_tar(one_line, tmp_path, what):
  name, attributes, reason = STRANGE[what]
  path = tar(tmp_path / "a.tar", ("0.jpg", {}), (name, attributes))
  line = one_line(names, path)
  assert line.startswith(path)
  assert reason in line


def test_headers_that_announce_each_other(one_line, tmp_path):
  """Each says that the next one has a long name."""
  member = tarfile.TarInfo("x")
  member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1
  header = member.tobuf(tarfile.GNU_FORMAT) + b"x" + bytes(511)
  path = tmp_path / "a.tar"
  path.write_bytes(header * 2000 + bytes(1024))
  assert "give an uncompressed tar" in one_line(names, str(path))


def test_names_with_thousands_of_digits(tmp_path):
  """Python takes no such number."""
  path = tar(tmp_path / "a.tar", (f"{'9' * 5000}.jpg", {}), ("10.jpg", {}))
  assert sorted(names(path), key=natural_order)[0] == "10.jpg"


def test_numbers_in_names_sort_by_value():
  ordered = ["01", "1", "2", "10", "a1", "a2b", "a2b3", "a2b10", "a10", "b"]
  assert sorted(ordered[5:] + ordered[:5], key=natural_order) == ordered


def instances(folder, name):
  """A COCO file of one image without annotations."""
  image = {"id": 1, "file_name": name, "height": 4, "width": 5}
  path = folder / "instances.json"
  path.write_text(json.dumps({"images": [image], "annotations": []}))
  return str(path)


@pytest.fixture
def images(tmp_path):
  write_png(tmp_path / "images/a.png", np.zeros((4, 5), np.uint8))
  write_png(tmp_path / "private.png", np.zeros((4, 5), np.uint8))
  return tmp_path / "images"


@pytest.mark.parametrize(
  "name", ["../private.png", "{}/private.png", "a/../.."]
)
def test_names_of_images_that_lead_out(one_line, images, name):
  name = name.format(images.parent)
  path = instances(images.parent, name)
  line = one_line(coco, str(images), path)
  assert line.startswith(f"{path}: an image's file_name is '")
  assert "leads out of data.source.images_dir" in line


def test_links_among_the_images(one_line, images):
  (images / "link.png").symlink_to("../private.png")
  path = instances(images.parent, "link.png")
  line = one_line(coco, str(images), path)
  assert line.startswith(f"{images}/link.png leads out of {images}")
  assert line.endswith("set data.source.follow_links=True")
  assert len(coco(str(images), path, follow_links=True)) == 1


@pytest.mark.parametrize("kind", ["folder", "coco", "sa1b"])
def test_settings_of_every_source_of_files(one_line, images, kind):
  pair = {"image": {}, "annotations": []}
  (images / "a.json").write_text(json.dumps(pair))
  source = {
    "kind": kind,
    "path": str(images),
    "images_dir": str(images),
    "json_path": instances(images.parent, "a.png"),
    "max_pixels": 19,
  }
  line = one_line(make_source(source, "train").read, 0)
  assert line.startswith(f"{images}/a.png: more than data.source.max_pixels=19")
  source["max_pixels"] = 20
  assert make_source(source, "train")[0].image.shape == (4, 5, 3)
  for ending in ("png", "json"):
    (images / f"b.{ending}").symlink_to(images.parent / "private.png")
  if kind == "coco":
    source["json_path"] = instances(images.parent, "b.png")
  assert " leads out of " in one_line(make_source, source, "train")
  source["follow_links"] = True
  assert len(make_source(source, "train")) == (1 if kind == "coco" else 2)
