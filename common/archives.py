"""Zip files with arrays, looked at before anything in them is believed.

Nothing here is ever unpacked to a disk. What is refused is what no writer of
weights makes, and what a reader that trusts it would pay for in memory.
"""

import pathlib
import stat
import zipfile


def check_entries(
  archive: zipfile.ZipFile, size: int, *, compressed: bool = True
) -> None:
  """Refuses entries that are no plain files of their own in the archive.

  Args:
    archive: open to be read.
    size: of the file, in bytes.
    compressed: whether entries may be. If not, they hold no more than the file.

  Raises:
    zipfile.BadZipFile: for two entries of one name or one place, a name that
      leads out of the archive, a link, and what is encrypted or compressed.
  """
  seen, held = set(), 0
  for entry in archive.infolist():
    reason = _reason(entry)
    if entry.filename in seen:
      reason = "is there twice"
    elif not compressed and entry.compress_type != zipfile.ZIP_STORED:
      reason = "is compressed"
    if reason:
      raise zipfile.BadZipFile(f"its entry {entry.filename!r:.80} {reason}")
    seen.add(entry.filename)
    held += entry.file_size if not compressed else entry.compress_size
  if held > size:
    raise zipfile.BadZipFile(
      f"its entries claim {held:,} bytes of a file that has {size:,}"
    )


def _reason(entry: zipfile.ZipInfo) -> str:
  """What is wrong with an entry by itself."""
  path = pathlib.PurePosixPath(entry.filename.replace("\\", "/"))
  if path.is_absolute() or ".." in path.parts or ":" in entry.filename:
    return "leads out of it"
  if stat.S_ISLNK(entry.external_attr >> 16):
    return "is a link"
  if entry.flag_bits & 1:
    return "is encrypted"
  if entry.compress_type == zipfile.ZIP_STORED and (
    entry.compress_size != entry.file_size
  ):
    return "has two sizes"
  return ""
