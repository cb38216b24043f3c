"""Text as token arrays: stores, splits, windows, packed rows.

A store is one flat array of token ids and the offsets of its documents, in
memory or mapped from a cache on disk. Everything that reads it is random
access, so any number of processes and workers can share one position.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from common.data.tokenizers import Tokenizer
from common.errors import UserError
from common.rngs import name_hash

log = logging.getLogger(__name__)

# Shares of the documents, in percent.
SPLITS = {"train": 90, "validation": 5, "test": 5}
# Part of every cache key: raise it when the files' layout changes.
_FORMAT = 1
_ABANDONED_SECONDS = 24 * 60 * 60


class Source(Protocol):
  """What this module asks of a text source; see `common.data.sources`.

  Attributes:
    name: what errors call it.
    fingerprint: changes when the text may.
  """

  @property
  def name(self) -> str: ...

  @property
  def fingerprint(self) -> str: ...

  def __iter__(self) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of each document, always in the same order."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
  """Documents as one flat token array.

  Attributes:
    tokens: uint16 or uint32 [N].
    offsets: int64 [D + 1]; document i is `tokens[offsets[i]:offsets[i + 1]]`.
    path: the cached files' common prefix, None in memory. Pickling a cached
      store sends this path, not the tokens.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  path: str | None = None

  @classmethod
  def build(
    cls, texts: Iterable[str], tokenizer: Tokenizer, *, name: str = "the text"
  ) -> "TokenStore":
    """Tokenises documents into memory; those without a token are left out.

    Raises:
      UserError: when no document is left; it says `name`.
    """
    writer = _Writer(_token_dtype(tokenizer, None))
    for text in texts:
      writer.add(tokenizer.encode(text), tokenizer.vocab_size, None)
    store = writer.in_memory()
    if not store.num_documents:
      raise UserError(f"{name} holds no text")
    return store

  @classmethod
  def open(cls, path: str) -> "TokenStore":
    """Maps a store that `build_splits` cached under this prefix."""
    meta = json.loads(pathlib.Path(f"{path}.json").read_text())
    arrays = []
    for part, dtype, size in (
      ("tokens", meta["dtype"], meta["num_tokens"]),
      ("offsets", "int64", meta["num_documents"] + 1),
    ):
      file = f"{path}.{part}"
      if os.path.getsize(file) != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{file} has not the size that {path}.json says")
      # An empty file cannot be mapped. As a plain array, because slices of
      # `np.memmap` take several times as long.
      mapped = np.memmap(file, dtype, "r") if size else np.zeros(0, dtype)
      arrays.append(mapped.view(np.ndarray))
    store = cls(*arrays, path=path)
    store.__dict__["fingerprint"] = meta["fingerprint"]
    return store

  @property
  def num_tokens(self) -> int:
    """N."""
    return len(self.tokens)

  @property
  def num_documents(self) -> int:
    """D."""
    return len(self.offsets) - 1

  def document(self, i: int) -> np.ndarray:
    """The tokens of document i, a view."""
    if not 0 <= i < self.num_documents:
      raise IndexError(f"document {i} of {self.num_documents}")
    return self.tokens[self.offsets[i] : self.offsets[i + 1]]

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of tokens and offsets, hex."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (self.tokens, self.offsets):
      digest.update(f"{array.dtype}{array.shape}".encode())
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

  def __reduce__(self):
    if self.path is not None:
      return TokenStore.open, (self.path,)
    return TokenStore, (self.tokens, self.offsets)


def split_of(text: str) -> str:
  """The split of a document: a function of its text alone.

  So copies of a document share a split, and adding documents moves none.
  """
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  place = int.from_bytes(digest, "little") % 100
  for name, share in SPLITS.items():
    if place < share:
      return name
    place -= share
  raise AssertionError("the shares add up to 100")


def build_splits(
  source: Source,
  tokenizer: Tokenizer,
  *,
  cache_dir: str = "",
  end: int | None = None,
) -> dict[str, TokenStore]:
  """Tokenises a source into `{split: store}`.

  A split of a small source may be empty; `Windows` refuses it.

  Args:
    source: see `common.data.sources.text_source`.
    tokenizer: see `common.data.tokenizers.make_tokenizer`.
    cache_dir: keeps the result in a folder named by the fingerprints of source
      and tokenizer, which appears in one rename; in memory if empty.
    end: a token behind every document; None for none.

  Raises:
    UserError: for a source without text, or a folder that cannot be written
      or is none.
  """
  if not cache_dir:
    dtype = _token_dtype(tokenizer, end)
    writers = {name: _Writer(dtype) for name in SPLITS}
    _fill(writers, source, tokenizer, end)
    return {name: writer.in_memory() for name, writer in writers.items()}
  if "://" in cache_dir:
    raise UserError(
      f"data.cache_dir={cache_dir!r} is no folder: files of tokens are mapped "
      "into memory"
    )
  key = hashlib.blake2b(
    json.dumps(
      [_FORMAT, source.fingerprint, tokenizer.fingerprint, end]
    ).encode(),
    digest_size=16,
  ).hexdigest()
  folder = pathlib.Path(cache_dir).expanduser().absolute() / key
  stores = _open_splits(folder)
  if stores is None:
    _write_splits(folder, source, tokenizer, end)
    stores = _open_splits(folder)
  if stores is None:
    raise UserError(f"the token cache {folder} cannot be read: delete it")
  return stores


def _open_splits(folder: pathlib.Path) -> dict[str, TokenStore] | None:
  """The cached stores; None, and no folder, where they are not whole."""
  if not folder.exists():
    return None
  try:
    return {name: TokenStore.open(str(folder / name)) for name in SPLITS}
  except (OSError, ValueError, KeyError) as error:
    log.warning("the token cache is damaged and made again: %s", error)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _write_splits(
  folder: pathlib.Path, source: Source, tokenizer: Tokenizer, end: int | None
) -> None:
  """Writes the stores next to `folder`, then renames."""
  scratch = None
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    scratch = pathlib.Path(
      tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
    )
    dtype = _token_dtype(tokenizer, end)
    writers = {name: _Writer(dtype, str(scratch / name)) for name in SPLITS}
    try:
      _fill(writers, source, tokenizer, end)
    finally:
      for writer in writers.values():
        writer.close()
    for writer in writers.values():
      writer.finish()
    try:
      scratch.rename(folder)
    except OSError:
      # Another process of this run was faster; its files are the same.
      if not folder.exists():
        raise
  except OSError as error:
    raise UserError(
      f"cannot write tokens to {folder.parent}: {error.strerror or error}; "
      "give another data.cache_dir, or an empty one to keep them in memory"
    ) from error
  finally:
    if scratch is not None:
      shutil.rmtree(scratch, ignore_errors=True)


def _remove_abandoned(folder: pathlib.Path) -> None:
  """Removes what a process that was killed a day ago has left."""
  for old in folder.parent.glob(f".{folder.name}.*"):
    with contextlib.suppress(OSError):
      if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
        shutil.rmtree(old, ignore_errors=True)


def _fill(writers: dict[str, "_Writer"], source, tokenizer, end) -> None:
  vocab_size = tokenizer.vocab_size
  for _, text in source:
    writers[split_of(text)].add(tokenizer.encode(text), vocab_size, end)
  if not any(writer.lengths for writer in writers.values()):
    raise UserError(f"{source.name} holds no text")


def _token_dtype(tokenizer: Tokenizer, end: int | None) -> str:
  size = max(tokenizer.vocab_size, 0 if end is None else end + 1)
  return "uint16" if size <= 1 << 16 else "uint32"


class _Writer:
  """Collects documents, in memory or in a file.

  Args:
    dtype: of the tokens.
    path: the files' common prefix; None keeps them in memory.
  """

  def __init__(self, dtype: str, path: str | None = None):
    self._dtype = dtype
    self._path = path
    self._file: BinaryIO | None = open(f"{path}.tokens", "wb") if path else None  # noqa: SIM115
    self._memory = bytearray()
    self.lengths: list[int] = []

  def add(self, ids: np.ndarray, vocab_size: int, end: int | None) -> None:
    """Adds a document and its end, unless the document is empty.

    Raises:
      ValueError: for an id outside the vocabulary.
    """
    if not len(ids):
      return
    if ids.min() < 0 or ids.max() >= vocab_size:
      raise ValueError(
        f"the tokenizer gave ids {ids.min()}..{ids.max()}, its vocabulary is "
        f"{vocab_size}"
      )
    if end is not None:
      ids = np.append(ids, end)
    data = np.asarray(ids).astype(self._dtype).tobytes()
    if self._file is None:
      self._memory += data
    else:
      self._file.write(data)
    self.lengths.append(len(ids))

  def _offsets(self) -> np.ndarray:
    return np.cumsum([0, *self.lengths], dtype=np.int64)

  def in_memory(self) -> TokenStore:
    tokens = np.frombuffer(bytes(self._memory), self._dtype)
    return TokenStore(tokens, self._offsets())

  def close(self) -> None:
    if self._file is not None:
      self._file.close()

  def finish(self) -> None:
    """Writes offsets and the description beside the closed token file."""
    offsets = self._offsets()
    offsets.tofile(f"{self._path}.offsets")
    tokens = f"{self._path}.tokens"
    size = int(offsets[-1])
    mapped = np.memmap(tokens, self._dtype, "r") if size else np.zeros(0)
    meta = {
      "dtype": self._dtype,
      "num_tokens": size,
      "num_documents": len(self.lengths),
      "fingerprint": TokenStore(mapped, offsets).fingerprint,
    }
    pathlib.Path(f"{self._path}.json").write_text(json.dumps(meta))


class Windows:
  """The flat array cut every `length` tokens.

  Window i covers `tokens[i * length : (i + 1) * length]`; the last one may be
  shorter. `len()` is the number of windows in an epoch.

  Args:
    store: the text.
    length: tokens in a window.

  Raises:
    UserError: when the store is empty.
  """

  def __init__(self, store: TokenStore, length: int):
    if length < 1:
      raise UserError(
        f"windows of {length} tokens: the length must be positive"
      )
    if not store.num_tokens:
      raise UserError(
        "this split of the text holds no document: give more documents (for "
        "text files, data.source.separator divides a file into several)"
      )
    self.store = store
    self.length = length
    starts = np.arange(0, store.num_tokens, length)
    self._first = np.searchsorted(store.offsets, starts, side="right") - 1

  def __len__(self) -> int:
    return len(self._first)

  def __getitem__(self, i: int) -> list[np.ndarray]:
    """The pieces of documents in window i, views in order."""
    if not 0 <= i < len(self._first):
      raise IndexError(f"window {i} of {len(self._first)}")
    tokens, offsets = self.store.tokens, self.store.offsets
    start = i * self.length
    stop = min(start + self.length, len(tokens))
    document = int(self._first[i])
    pieces = []
    while start < stop:
      document += 1
      end = min(int(offsets[document]), stop)
      pieces.append(tokens[start:end])
      start = end
    return pieces


def shuffled_windows(store: TokenStore, length: int, seed: int) -> Any:
  """Windows in a new random order each epoch, without end.

  Args:
    store: the text.
    length: tokens in a window.
    seed: of the order.

  Returns:
    A `grain.MapDataset` with random access in O(1): element i is a list of
    pieces, as in `Windows`. Element `epoch * len(Windows(...)) + j` belongs to
    that epoch. It can be pickled.

  Raises:
    UserError: when the store is empty.
  """
  import grain

  windows = Windows(store, length)
  # Hashed, because grain adds the epoch to the seed: the second epoch of run 0
  # must not be the first of run 1. Shuffling numbers rather than windows
  # halves what grain costs.
  return (
    grain.MapDataset.range(len(windows))
    .shuffle(seed=name_hash(f"windows/{seed}"))
    .repeat()
    .map(windows.__getitem__)
  )


class PackedRows(Sequence):
  """Rows for plain language models: documents one after the other, then cut.

  Row i is window i. Each piece of a document is a segment of its own, with
  positions from 0; only the last row has padding.

  Args:
    store: the text.
    length: T.
    pad_id: the token in padding.

  Raises:
    UserError: when the store is empty.
  """

  def __init__(self, store: TokenStore, length: int, *, pad_id: int = 0):
    self._windows = Windows(store, length)
    self._pad_id = pad_id

  def __len__(self) -> int:
    return len(self._windows)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:  # type: ignore[override]
    """`tokens`, `segment_ids` (0: padding) and `positions`, int32 [T]."""
    pieces = self._windows[i]
    lengths = np.array([len(piece) for piece in pieces])
    ends = np.cumsum(lengths)
    used, size = int(ends[-1]), self._windows.length
    tokens = np.full(size, self._pad_id, np.int32)
    segment_ids = np.zeros(size, np.int32)
    positions = np.zeros(size, np.int32)
    np.concatenate(pieces, out=tokens[:used], casting="unsafe")
    segment_ids[:used] = np.repeat(np.arange(1, len(pieces) + 1), lengths)
    positions[:used] = np.arange(used) - np.repeat(ends - lengths, lengths)
    return {
      "tokens": tokens,
      "segment_ids": segment_ids,
      "positions": positions,
    }


def concat_and_split(
  documents: Iterable[np.ndarray], length: int, *, pad_id: int = 0
) -> dict[str, np.ndarray]:
  """Packs token arrays into rows at once: `PackedRows` as arrays.

  Args:
    documents: integer arrays.
    length: T.
    pad_id: the token in padding.

  Returns:
    `tokens`, `segment_ids`, `positions`, int32 [rows, T].

  Raises:
    UserError: when there is no token.
  """
  arrays = [np.asarray(document) for document in documents]
  store = TokenStore(
    np.concatenate([*arrays, np.zeros(0, np.int32)]).astype(np.uint32),
    np.cumsum([0, *(len(a) for a in arrays)], dtype=np.int64),
  )
  rows = PackedRows(store, length, pad_id=pad_id)
  columns = [rows[i] for i in range(len(rows))]
  return {key: np.stack([row[key] for row in columns]) for key in columns[0]}
