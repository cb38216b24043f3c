"""Files that a reader sees whole, whenever the writer is killed."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from common.errors import RunError, UserError
from common.logs import one_line

# What `json.loads` raises: numbers of thousands of digits and brackets in
# brackets are no `JSONDecodeError`.
JSON_ERRORS = (ValueError, RecursionError)

# What storage refuses, whatever a program does.
_REFUSALS = (
  errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
  errno.ESTALE,
)  # fmt: skip


def storage_error(error: BaseException) -> int | None:
  """The `errno` of an error that says that storage has refused something.

  Such as a full disk, or a folder that cannot be written any more. The storage
  layer of checkpoints reports them as errors that hold the system's text, not
  as OSErrors.
  """
  if isinstance(error, OSError) and error.errno in _REFUSALS:
    return error.errno
  text = str(error)
  for code in _REFUSALS:
    if os.strerror(code) in text:
      return code
  return None


def replace(path: Any, content: bytes | str) -> None:
  """Writes beside `path`, then renames: the old file or the new one is there.

  Args:
    path: a `pathlib.Path` or an `epath.Path`.
    content: of the file.
  """
  data = content.encode() if isinstance(content, str) else content
  new = path.with_name(f"{path.name}.new")
  with refusals_of(path):
    new.write_bytes(data)
    new.replace(path)


@contextlib.contextmanager
def refusals_of(path: Any) -> Iterator[None]:
  """Gives errors of storage the place that they do not name, as a write to an
  open file does not.
  """
  try:
    yield
  except OSError as error:
    if storage_error(error) and not error.filename:
      raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    raise


@contextlib.contextmanager
def bucket_errors(workdir: Any) -> Iterator[None]:
  """Says in a line what a bucket answers when a run begins there.

  Libraries have errors of their own for it. A folder's pass as they are.

  Raises:
    UserError: it is missing or not ours, which no restart mends.
    RunError: it cannot be reached.
  """
  place = os.fspath(workdir)
  try:
    yield
  except (UserError, RunError):
    raise
  except Exception as error:
    if "://" not in place:
      raise
    code = str(getattr(error, "code", ""))
    if isinstance(error, FileNotFoundError) or code == "404":
      problem = "there is no such bucket"
    elif code in ("401", "403") or "Forbidden" in str(error):
      problem = "this machine may not write there"
    else:
      what = f"{type(error).__name__}: {one_line(error)}"
      raise RunError(f"cannot reach workdir {place!r}: {what}") from error
    raise UserError(
      f"cannot write to workdir {place!r}: {problem} ({one_line(error)}); "
      "choose another --workdir, or the account that may"
    ) from error


def write_json(file: Any, content: Any) -> None:
  """Writes JSON, whole or not at all."""
  replace(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(file: Any) -> dict[str, Any]:
  """Reads an object of keys and values.

  Raises:
    UserError: where there is none.
  """
  path = pathlib.Path(file)
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"{file}: {error.strerror}") from None
  except JSON_ERRORS as error:
    raise UserError(f"{file} is not JSON: {error}") from None
  if not isinstance(content, dict):
    raise UserError(f"{file} holds no object of keys and values")
  return content
