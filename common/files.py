"""Files that a reader sees whole, whenever the writer is killed."""

from typing import Any


def replace(path: Any, content: bytes | str) -> None:
  """Writes beside `path`, then renames: the old file or the new one is there.

  Args:
    path: an `epath.Path`.
    content: of the file.
  """
  data = content.encode() if isinstance(content, str) else content
  new = path.with_name(f"{path.name}.new")
  new.write_bytes(data)
  new.replace(path)
