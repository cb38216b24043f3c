"""Damage of any file of a folder is noticed, and named."""

import pytest
from etils import epath

from common import checksums


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "deep/er").mkdir(parents=True)
  for i, name in enumerate(("a", "deep/b", "deep/er/c", "empty", "later")):
    content = b"" if name == "empty" else bytes(range(i, 100 + i))
    (tmp_path / name).write_bytes(content)
  checksums.write(epath.Path(tmp_path), but=("later",))
  return epath.Path(tmp_path)


def test_a_whole_folder_passes(folder):
  checksums.check(folder)
  (folder / "later").write_text("changed")
  (folder / "new").write_text("nobody asked")
  checksums.check(folder)


@pytest.mark.parametrize("name", ["a", "deep/b", "deep/er/c"])
@pytest.mark.parametrize("at", [0, 50, 99])
@pytest.mark.parametrize("bit", [0, 7])
def test_every_bit_counts(folder, name, at, bit):
  data = bytearray((folder / name).read_bytes())
  data[at] ^= 1 << bit
  (folder / name).write_bytes(data)
  with pytest.raises(ValueError, match=f"^{name} is damaged$"):
    checksums.check(folder)


def test_files_that_are_cut_or_grow_or_go(folder):
  (folder / "a").write_bytes((folder / "a").read_bytes()[:-1])
  with pytest.raises(ValueError, match=r"^a is damaged$"):
    checksums.check(folder)
  (folder / "a").unlink()
  with pytest.raises(ValueError, match=r"^a is missing$"):
    checksums.check(folder)
  checksums.check(folder, below="deep/")
  (folder / "empty").write_text("x")
  with pytest.raises(ValueError, match=r"^empty is damaged$"):
    checksums.check(folder, below="empty")


def test_readers_share_the_files(folder):
  (folder / "deep/b").unlink()
  found = []
  for i in range(3):
    try:
      checksums.check(folder, part=(i, 3))
    except ValueError as error:
      found.append((i, str(error)))
  assert found == [(1, "deep/b is missing")]  # the second of a, deep/b, …


def test_hashes_that_are_damaged_or_were_never_written(folder):
  (folder / checksums.FILE_NAME).write_text('{"a": "00')
  with pytest.raises(ValueError, match=r"^checksums\.json is damaged$"):
    checksums.check(folder)
  (folder / checksums.FILE_NAME).unlink()
  checksums.check(folder)  # as all folders once were
