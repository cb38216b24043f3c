"""Where text and records come from, chosen by a config.

A source of text is anything with a `name` for errors, a `fingerprint` that
changes when the text may, and documents (id, text) in a fixed order. Documents
of blanks alone are left out.
"""

import dataclasses
import glob
import hashlib
import importlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.config import check_read
from common.data import python_docs
from common.data.folders import FOLLOW_LINKS, Inside
from common.data.tfds_files import check_tfds
from common.errors import UserError
from common.files import JSON_ERRORS, storage_error

# What each kind of text reads of `data.source`.
_READ_BY = {
  "python_docs": (),
  "tfds": ("name", "split", "text_key", "data_dir"),
  "array_record": ("path", "text_key"),
  "jsonl": ("path", "text_key"),
  "text": ("path", "separator"),
}
_UNSET = {"split": "train", "text_key": "text"}  # others are empty
KINDS = tuple(_READ_BY)
# Records read at once: one by one they come ten times slower.
_READ = 256

Documents = Iterator[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class TextSource:
  """Text outside this package.

  Attributes:
    name: what errors call it.
    fingerprint: of names, sizes and dates of the files.
    read: yields (id, text); ids say the place, such as `a.jsonl:7`.
  """

  name: str
  fingerprint: str
  read: Callable[[], Documents]

  def __iter__(self) -> Documents:
    """Yields (id, text).

    Raises:
      UserError: for what cannot be read, with its place; for no text at all.
    """
    empty = True
    for place, text in self.read():
      if text.strip():
        empty = False
        yield place, encodable(text, place)
    if empty:
      raise UserError(f"{self.name} holds no text")


def text_source(cfg: Any) -> TextSource | python_docs.PythonDocs:
  r"""A source of documents.

  Args:
    cfg: `kind`, and what that kind needs:
      python_docs: nothing; Python's own documentation.
      tfds: `name` of a TFDS data set, `split`, `text_key`, `data_dir`.
      array_record: `path`; records are UTF-8 text if `text_key` is empty,
        JSON objects with that key otherwise.
      jsonl: `path`, `text_key`; one JSON object a line.
      text: `path`; a file is one document if `separator` is empty; otherwise
        the separator divides it (backslash escapes count: `\n\n`).
      `path` is a file or a pattern with `*`, or a sequence of these. What a
      pattern finds must lie in its folder: links that lead out of it are
      refused unless `follow_links` is there and true.

  Raises:
    UserError: for an unknown kind, for a setting that the kind does not read,
      and for data that is missing.
  """
  if cfg.kind not in KINDS:
    raise UserError(
      f"data.source.kind={cfg.kind!r}: choose one of {', '.join(KINDS)}"
    )
  check_read(cfg, _READ_BY, unset=_UNSET)
  if cfg.kind == "python_docs":
    return python_docs.PythonDocs()
  if cfg.kind == "tfds":
    return _tfds_text(cfg)
  files = find_files(cfg.path, follow_links=cfg.get("follow_links", False))
  if cfg.kind == "text":
    detail = _unescaped(cfg.get("separator", ""))
    read = lambda file: _text_documents(file, detail)  # noqa: E731
  elif cfg.kind == "jsonl":
    detail = _text_key(cfg)
    read = lambda file: _json_lines(file, detail)  # noqa: E731
  else:
    detail = cfg.get("text_key", "")
    read = lambda file: _array_records(file, detail)  # noqa: E731
  return TextSource(
    name=f"data.source.path={cfg.path!r}",
    fingerprint=_fingerprint(files, cfg.kind, detail),
    read=lambda: (document for file in files for document in read(file)),
  )


def source_name(cfg: Any) -> str:
  """What a source of text is called, such as `text books/*.txt`."""
  place = {"python_docs": "", "tfds": cfg.get("name", "")}
  named = place.get(cfg.kind, cfg.get("path", ""))
  return f"{cfg.kind} {named}".strip()


def record_source(cfg: Any) -> Sequence[Any]:
  """Records of any kind with random access, such as grain takes.

  Args:
    cfg: `kind` tfds (`name`, `split`, `data_dir`; records are dicts) or
      array_record (`path`; records are bytes).

  Raises:
    UserError: for another kind, and for data that is missing.
  """
  if cfg.kind == "tfds":
    return _data_source(_tfds_builder(cfg), cfg.split)
  if cfg.kind == "array_record":
    follow_links = cfg.get("follow_links", False)
    return _open_array_records(find_files(cfg.path, follow_links=follow_links))
  raise UserError(
    f"data.source.kind={cfg.kind!r}: records come from tfds or array_record"
  )


def find_files(
  path: str | Sequence[str],
  *,
  key: str = "data.source.path",
  follow_links: bool = False,
  remedy: str = FOLLOW_LINKS,
) -> list[str]:
  """The files that a pattern, or several, name; sorted for each.

  Args:
    path: patterns.
    key: the configuration's key that holds them, for errors.
    follow_links: whether a pattern finds links too that lead out of its folder.
    remedy: what helps where it does not.

  Raises:
    UserError: for a pattern that names none, and for such links.
  """
  patterns = [path] if isinstance(path, str) else list(path)
  if not any(patterns):
    raise UserError(f"{key} is empty: name a file or a pattern")
  files = []
  for pattern in patterns:
    full = os.path.expanduser(pattern)
    # A name that exists may contain what would be a pattern.
    is_file = os.path.isfile(full)
    found = [full] if is_file else sorted(glob.glob(full))
    found = [file for file in found if os.path.isfile(file)]
    if not found and os.path.isdir(full):
      raise UserError(
        f"{key}={pattern!r} is a folder: name its files, as in "
        f"{os.path.join(pattern, '*')!r}"
      )
    if not found:
      raise UserError(
        f"{key}={pattern!r}: no such file (looked from {os.getcwd()})"
      )
    if not is_file:
      inside = Inside(_folder(full), follow_links=follow_links, remedy=remedy)
      for file in found:
        inside.check_file(file)
    files += found
  return files


def _folder(pattern: str) -> str:
  """The folder that a pattern looks into, without what it leaves open."""
  while glob.has_magic(pattern):
    pattern = os.path.dirname(pattern)
  return pattern or os.curdir


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "\\": "\\"}


def _unescaped(separator: str) -> str:
  """What escapes stand for; a shell hands them over as they are written."""

  def one(match: re.Match) -> str:
    if match[1] not in _ESCAPES:
      raise UserError(
        f"data.source.separator={separator!r}: {match[0]!r} means nothing; "
        f"escapes are {', '.join(chr(92) + name for name in _ESCAPES)}"
      )
    return _ESCAPES[match[1]]

  return re.sub(r"\\(.?)", one, separator, flags=re.DOTALL)


def _fingerprint(files: Sequence[str], *details: str) -> str:
  stats = [(os.path.abspath(file), os.stat(file)) for file in files]
  content = [*details, [(f, s.st_size, s.st_mtime_ns) for f, s in stats]]
  return hashlib.blake2b(
    json.dumps(content).encode(), digest_size=16
  ).hexdigest()


def _text_key(cfg: Any) -> str:
  key = cfg.get("text_key", "")
  if not key:
    raise UserError(
      f"data.source.kind={cfg.kind!r} needs data.source.text_key: the key "
      "that holds the text"
    )
  return key


def decode(data: bytes, place: str) -> str:
  """UTF-8 as text; `UserError` with its place for what is none."""
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise UserError(
      f"{place}: byte {error.start + 1} is not UTF-8: convert the file"
    ) from error


def encodable(text: str, place: str) -> str:
  """The text; JSON may spell halves of characters that no UTF-8 has."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"{place}: character {error.start + 1} is a lone surrogate: remove it"
    ) from error
  return text


def json_record(data: bytes, place: str) -> dict[str, Any]:
  """A JSON object; `UserError` with its place for anything else."""
  text = decode(data, place)
  try:
    record = json.loads(text)
  except JSON_ERRORS as error:
    raise UserError(f"{place}: not JSON: {error}") from error
  if not isinstance(record, dict):
    raise UserError(f"{place}: not a JSON object")
  return record


def text_value(record: dict, key: str, place: str) -> str:
  """The text under `key` of a record; `UserError` where there is none."""
  if key not in record:
    names = ", ".join(sorted(map(str, record))) or "none"
    raise UserError(f"{place}: no key {key!r}; its keys: {names}")
  value = record[key]
  if isinstance(value, bytes):
    return decode(value, place)
  if not isinstance(value, str):
    raise UserError(f"{place}: {key!r} is no text but {type(value).__name__}")
  return value


def _text_documents(file: str, separator: str) -> Documents:
  text = decode(_read(file), file)
  if not separator:
    yield file, text
    return
  for i, part in enumerate(text.split(separator), 1):
    yield f"{file}: document {i}", part


def _read(file: str) -> bytes:
  try:
    return pathlib.Path(file).read_bytes()
  except OSError as error:
    raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _json_lines(file: str, key: str) -> Documents:
  try:
    with open(file, "rb") as lines:
      for i, line in enumerate(lines, 1):
        if line.strip():
          place = f"{file}:{i}"
          yield place, text_value(json_record(line, place), key, place)
  except OSError as error:
    raise UserError(f"{file}: cannot be read: {error.strerror}") from error


class _Records(Sequence):
  """Records of files, in whose place an error names the files.

  Args:
    records: with random access, to one and to many.
    place: the files, or their folder.
    remedy: what helps where they are damaged.
  """

  def __init__(self, records: Any, place: str, remedy: str):
    self._records, self._place, self._remedy = records, place, remedy

  def __len__(self) -> int:
    return len(self._records)

  def __repr__(self) -> str:
    return repr(self._records)

  def __getitem__(self, place: Any) -> Any:
    # Iteration ends with the IndexError of `range`; others would be raised.
    return self.__getitems__([range(len(self))[place]])[0]

  def __getitems__(self, places: Sequence[int]) -> Sequence[Any]:
    try:
      return self._records.__getitems__(places)
    except (RuntimeError, ValueError) as error:
      if storage_error(error):  # which may answer the next time
        raise
      where = f"record {places[0]}" + (" or later" if len(places) > 1 else "")
      raise UserError(
        f"{self._place}: {where} is damaged: {self._remedy} ({error})"
      ) from error


class _TfdsRecords(_Records):
  """What TFDS opens of a prepared data set."""

  @property
  def dataset_info(self) -> Any:
    """What TFDS knows of the data set."""
    return self._records.dataset_info


def _open_array_records(files: Sequence[str]) -> _Records:
  """The records of at least one file."""
  import grain

  name = f"{files[0]}{' ...' if files[1:] else ''}"
  try:
    records = grain.sources.ArrayRecordDataSource(list(files))
    len(records)  # Opens the files.
  except (RuntimeError, ValueError, OSError) as error:
    raise UserError(f"{name}: no ArrayRecord file: {error}") from error
  return _Records(records, name, "make the file again")


def in_batches(source: Any) -> Iterator[Any]:
  """The records of a source with random access, many at a time."""
  for start in range(0, len(source), _READ):
    stop = min(start + _READ, len(source))
    yield from source.__getitems__(list(range(start, stop)))


def _array_records(file: str, key: str) -> Documents:
  records = in_batches(_open_array_records([file]))
  for i, data in enumerate(records):
    place = f"{file}: record {i}"
    if key:
      yield place, text_value(json_record(data, place), key, place)
    else:
      yield place, decode(data, place)


def _prepare_command(name: str, data_dir: str) -> str:
  where = f", data_dir={data_dir!r}" if data_dir else ""
  return (
    'python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder({name!r}{where}, file_format='array_record')"
    '.download_and_prepare()" (some data sets need '
    "pip install -e '.[prepare]')"
  )


def _tfds_builder(cfg: Any) -> Any:
  """The builder of a prepared data set.

  Raises:
    UserError: when it is unknown, or not prepared: with the command.
  """
  name, data_dir = cfg.name, cfg.get("data_dir", "")
  if not name:
    raise UserError("data.source.kind='tfds' needs data.source.name")
  directory = os.path.expanduser(data_dir) if data_dir else None
  if name == python_docs.NAME:
    return python_docs.builder(directory)
  tfds = importlib.import_module("tensorflow_datasets")
  check_tfds(name, directory)
  try:
    builder = tfds.builder(name, data_dir=directory)
  except (ValueError, ImportError, OSError, AttributeError) as error:
    reason = (str(error).splitlines() or [""])[0]
    raise UserError(
      f"data.source.name={name!r}: {reason} "
      f"If TFDS knows it, prepare it: {_prepare_command(name, data_dir)}"
    ) from error
  if not builder.is_prepared():
    raise UserError(
      f"data set {name!r} is not prepared in {builder.data_dir}; prepare it: "
      f"{_prepare_command(name, data_dir)}"
    )
  return builder


def _data_source(builder: Any, split: str) -> _TfdsRecords:
  folder = str(builder.data_dir)
  try:
    records = builder.as_data_source(split=split)
  except NotImplementedError as error:
    raise UserError(
      f"{folder} was prepared as "
      f"{builder.info.file_format.value}, which has no random access; "
      "prepare it in another data.source.data_dir: "
      f"{_prepare_command(builder.name, 'DIR')}"
    ) from error
  except (ValueError, KeyError) as error:
    names = ", ".join(builder.info.splits) or "none"
    raise UserError(
      f"data.source.split={split!r}: {builder.name} has the splits {names}"
    ) from error
  return _TfdsRecords(
    records, folder, "remove that folder and prepare the data set again"
  )


def _tfds_text(cfg: Any) -> TextSource:
  key = _text_key(cfg)
  builder = _tfds_builder(cfg)
  source = _data_source(builder, cfg.split)

  def read() -> Documents:
    for i, record in enumerate(in_batches(source)):
      place = f"{cfg.name}[{cfg.split}]: record {i}"
      yield place, text_value(record, key, place)

  folder = pathlib.Path(str(builder.data_dir))
  files = sorted(str(file) for file in folder.iterdir() if file.is_file())
  return TextSource(
    name=f"data set {cfg.name!r}, split {cfg.split!r},",
    fingerprint=_fingerprint(files, "tfds", cfg.split, key),
    read=read,
  )
