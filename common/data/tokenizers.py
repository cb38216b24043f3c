"""Text to token ids: bytes, SentencePiece files, Hugging Face files."""

import hashlib
import os
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from common.errors import UserError

# Ids may have gaps, but not so large that they are no vocabulary's: as many
# times the tokens, and so many in any case.
_SPARSEST, _ALWAYS = 4, 2**16

_EXTRA = "pip install -e '.[tokenizers]'"


class Tokenizer(Protocol):
  """What every tokenizer here offers.

  Attributes:
    vocab_size: ids are below it.
    fingerprint: changes when the ids of some text may.
  """

  vocab_size: int
  fingerprint: str

  def encode(self, text: str) -> np.ndarray:
    """The ids of a text, int32 [n], without special tokens."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """The text of some ids; what is not text is left out."""
    ...


class ByteTokenizer:
  """Byte b of the text's UTF-8 is id `offset + b`.

  Args:
    offset: how many ids below the bytes are kept for special tokens.
  """

  def __init__(self, offset: int = 64):
    self.offset = offset
    self.vocab_size = offset + 256
    self.fingerprint = f"byte/{offset}"

  def encode(self, text: str) -> np.ndarray:
    """The ids of a text, int32 [n]."""
    data = np.frombuffer(text.encode(), np.uint8)
    return data.astype(np.int32) + self.offset

  def decode(self, ids: Iterable[int]) -> str:
    """The text of some ids; ids that are no bytes are left out.

    Bytes that are no UTF-8, such as half a character, become U+FFFD.
    """
    values = np.asarray(ids, np.int64).reshape(-1) - self.offset
    values = values[(values >= 0) & (values < 256)]
    return values.astype(np.uint8).tobytes().decode(errors="replace")


class SentencePieceTokenizer:
  """A SentencePiece model file.

  Args:
    path: the `.model` file.

  Raises:
    UserError: when the library or the file is missing, or the file is none.
  """

  def __init__(self, path: str):
    data = _read(path)
    try:
      import sentencepiece
    except ImportError as error:
      raise UserError(
        f"tokenizer.kind='sentencepiece' needs sentencepiece: {_EXTRA}"
      ) from error
    self._model: Any = sentencepiece.SentencePieceProcessor()
    try:
      self._model.LoadFromSerializedProto(data)
      self.vocab_size = int(self._model.GetPieceSize())
    except Exception as error:
      raise UserError(
        f"tokenizer.path={path!r} is not a SentencePiece model"
      ) from error
    if not self.vocab_size:
      raise UserError(f"tokenizer.path={path!r} is not a SentencePiece model")
    self._data = data
    self.fingerprint = f"sentencepiece/{_hash(data)}"

  def encode(self, text: str) -> np.ndarray:
    """The ids of a text, int32 [n], without BOS and EOS."""
    return np.array(self._model.EncodeAsIds(text), np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of some ids; ids beyond the vocabulary are left out."""
    known = [int(i) for i in ids if 0 <= i < self.vocab_size]
    return self._model.DecodeIds(known)


class HuggingFaceTokenizer:
  """A `tokenizer.json` of the Hugging Face `tokenizers` library.

  Args:
    path: the file.

  Raises:
    UserError: when the library or the file is missing, or the file is none.
  """

  def __init__(self, path: str):
    data = _read(path)
    try:
      import tokenizers
    except ImportError as error:
      raise UserError(
        f"tokenizer.kind='huggingface' needs tokenizers: {_EXTRA}"
      ) from error
    try:
      self._model: Any = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:
      # The library raises plain `Exception`.
      raise UserError(
        f"tokenizer.path={path!r} is not a tokenizer.json"
      ) from error
    self._model.no_truncation()
    self._model.no_padding()
    # Ids may have gaps, so the size is the largest one and not their number.
    ids = self._model.get_vocab(with_added_tokens=True).values()
    self.vocab_size = 1 + max(ids, default=-1)
    if self.vocab_size > _SPARSEST * len(ids) + _ALWAYS:
      raise UserError(
        f"tokenizer.path={path!r} has {len(ids):,} tokens and the id "
        f"{self.vocab_size - 1:,}, which a model would need rows for: take a "
        "tokenizer without such gaps"
      )
    self.fingerprint = f"huggingface/{_hash(data)}"

  def encode(self, text: str) -> np.ndarray:
    """The ids of a text, int32 [n], without special tokens."""
    ids = self._model.encode(text, add_special_tokens=False).ids
    return np.array(ids, np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of some ids; special and unknown ids are left out."""
    known = [int(i) for i in ids if 0 <= i < self.vocab_size]
    return self._model.decode(known, skip_special_tokens=True)


_FILES = {
  "sentencepiece": SentencePieceTokenizer,
  "huggingface": HuggingFaceTokenizer,
}


def make_tokenizer(cfg: Any) -> Tokenizer:
  """Builds a tokenizer.

  Args:
    cfg: `kind`, one of byte, sentencepiece, huggingface; `path`, the file of
      the last two.

  Raises:
    UserError: for another kind, or a file or library that is missing.
  """
  if cfg.kind == "byte":
    return ByteTokenizer()
  if cfg.kind not in _FILES:
    raise UserError(
      f"tokenizer.kind={cfg.kind!r}: choose byte, sentencepiece or huggingface"
    )
  if not cfg.path:
    raise UserError(
      f"tokenizer.kind={cfg.kind!r} needs its file: set tokenizer.path"
    )
  return _FILES[cfg.kind](cfg.path)


def _read(path: str) -> bytes:
  try:
    with open(os.path.expanduser(path), "rb") as file:
      return file.read()
  except OSError as error:
    raise UserError(
      f"tokenizer.path={path!r} cannot be read: {error.strerror}"
    ) from error


def _hash(data: bytes) -> str:
  return hashlib.blake2b(data, digest_size=16).hexdigest()
