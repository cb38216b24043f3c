"""Links in folders of data: followed inside, refused where they lead out."""

import os

import pytest

from common.data.folders import Inside
from common.data.images import image_files
from common.data.sources import find_files


@pytest.fixture
def data(tmp_path):
  """A folder of data, and beside it what is none of it."""
  for name in ("data/a/1.png", "data/b/2.png", "private/key.png"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  return tmp_path / "data"


def found(folder, **settings):
  inside = Inside(str(folder), **settings)
  files = image_files(folder, inside=inside)
  return [os.path.relpath(file, folder) for file in files]


@pytest.mark.parametrize("target", ["../../private/key.png", "/etc/hostname"])
def test_a_file_that_leads_out(one_line, data, target):
  (data / "a/0.png").symlink_to(target)
  line = one_line(image_files, data)
  real = os.path.realpath(data / "a/0.png")
  assert line.startswith(
    f"{data}/a/0.png leads out of {data}, to {real}: put a copy in its place"
  )


def test_a_folder_that_leads_out(one_line, data):
  (data / "c").symlink_to("../private")
  line = one_line(found, data, remedy="set data.source.follow_links=True")
  assert line == (
    f"{data}/c leads out of {data}, to {data.parent}/private: put a copy in "
    "its place, or set data.source.follow_links=True"
  )
  assert found(data, follow_links=True) == ["a/1.png", "b/2.png", "c/key.png"]


def test_a_name_that_begins_alike_is_outside(one_line, data):
  """`data-2` is not in `data`."""
  data.with_name("data-2").mkdir()
  (data / "c").symlink_to("../data-2")
  assert f"{data}/c leads out" in one_line(image_files, data)


def test_links_that_stay_inside_are_followed(data):
  (data / "a/0.png").symlink_to("../b/2.png")
  (data / "c").symlink_to("b")
  assert found(data) == ["a/0.png", "a/1.png", "b/2.png", "c/2.png"]


def test_the_folder_itself_may_be_a_link(data):
  link = data.with_name("link")
  link.symlink_to("data")
  (data / "c").symlink_to(data / "b")
  assert found(link) == ["a/1.png", "b/2.png", "c/2.png"]


def test_what_would_not_be_read_may_lead_anywhere(data):
  (data / "a/notes.txt").symlink_to("/etc/hostname")
  (data / "a/.hidden.png").symlink_to("/etc/hostname")
  assert found(data) == ["a/1.png", "b/2.png"]


@pytest.mark.parametrize("target", [".", "..", "../a"])
def test_links_that_lead_back(one_line, data, target):
  """Forty times over, until the system ends it, if nobody did before."""
  (data / "a/again").symlink_to(target)
  line = one_line(image_files, data)
  assert "links lead back to" in line
  assert line.endswith(" again and again: remove them")


def test_two_links_that_lead_to_each_other(one_line, data):
  (data / "a/b").symlink_to("../b")
  (data / "b/a").symlink_to("../a")
  assert "links lead back to" in one_line(image_files, data)


def test_links_that_double_at_every_level(one_line, tmp_path):
  """2^30 ways through 30 folders, none of which leads back."""
  for i in range(30):
    (tmp_path / f"{i}").mkdir()
    for name in "ab":
      (tmp_path / f"{i}/{name}").symlink_to(f"../{i + 1}")
  (tmp_path / "30").mkdir()
  assert "again and again" in one_line(
    image_files, tmp_path / "0", inside=(Inside(str(tmp_path)))
  )


def test_patterns_find_what_lies_in_their_folder(one_line, data):
  key = data.parent / "private/key.png"
  (data / "a/0.png").symlink_to(key)
  for pattern in (f"{data}/a/*.png", f"{data}/*/*.png"):
    line = one_line(find_files, pattern)
    assert f"a/0.png leads out of {data}" in line
    assert line.endswith(", or set data.source.follow_links=True")
    assert len(find_files(pattern, follow_links=True)) >= 2
  # What is named is read wherever it leads.
  assert find_files(f"{data}/a/0.png") == [f"{data}/a/0.png"]
  assert find_files(f"{data}/b/*.png") == [f"{data}/b/2.png"]


def test_patterns_in_the_working_directory(one_line, data, monkeypatch):
  monkeypatch.chdir(data / "a")
  assert find_files("*.png") == ["1.png"]
  (data / "a/0.png").symlink_to("../b/2.png")
  assert one_line(find_files, "*.png").startswith("0.png leads out of ., to ")
