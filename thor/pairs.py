"""Sentence pairs, and data sets of them."""

import dataclasses
import functools
import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Pair(NamedTuple):
  """A sentence and its translation.

  Attributes:
    source: the sentence.
    target: its translation.
    language: the target's tag, such as `de`; empty where there is one pair of
      languages only.
  """

  source: str
  target: str
  language: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs(Sequence):
  """Pairs as one block of UTF-8, which workers receive in one piece.

  Millions of Python strings would take several times the text's own size.

  Attributes:
    text: sources and targets in turn.
    offsets: int64 [2 n + 1] where each of them begins.
    tags: uint16 [n] places in `languages`.
    languages: the tags that occur.
  """

  text: bytes
  offsets: np.ndarray
  tags: np.ndarray
  languages: tuple[str, ...]

  @classmethod
  def of(cls, pairs: Iterable[Pair]) -> "Pairs":
    """Copies pairs, in their order."""
    text, offsets, tags = bytearray(), array("q", [0]), array("H")
    places: dict[str, int] = {}
    for source, target, language in pairs:
      for sentence in (source, target):
        text += sentence.encode()
        offsets.append(len(text))
      tags.append(places.setdefault(language, len(places)))
    return cls(
      bytes(text),
      np.array(offsets, np.int64),
      np.array(tags, np.uint16),
      tuple(places),
    )

  def __len__(self) -> int:
    return len(self.tags)

  def __getitem__(self, i: Any) -> Any:
    """Pair i; a list of pairs for a slice."""
    if isinstance(i, slice):
      return [self[j] for j in range(*i.indices(len(self)))]
    if not -len(self) <= i < len(self):
      raise IndexError(f"pair {i} of {len(self)}")
    i %= len(self)
    start, middle, stop = self.offsets[2 * i : 2 * i + 3].tolist()
    return Pair(
      self.text[start:middle].decode(),
      self.text[middle:stop].decode(),
      self.languages[self.tags[i]],
    )

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of the sentences, their order and their tags."""
    digest = hashlib.blake2b(repr(self.languages).encode(), digest_size=16)
    for part in (self.text, self.offsets.data, self.tags.data):
      digest.update(part)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class ParallelText:
  """The pairs of a data set.

  Attributes:
    name: what errors call it.
    fingerprint: a hash of all splits.
    languages: the targets' tags; () where there is one pair of languages only.
    splits: name -> pairs; `train`, and whatever else there is.
    facts: sizes, hash, and how much was left out, to be kept with a run.
  """

  name: str
  fingerprint: str
  languages: tuple[str, ...]
  splits: dict[str, Sequence[Pair]]
  facts: dict[str, Any]

  @classmethod
  def of(
    cls,
    name: str,
    splits: Mapping[str, Pairs],
    languages: Sequence[str],
    facts: Mapping[str, Any],
    *,
    edition: str = "",
  ) -> "ParallelText":
    """Adds the fingerprint, and sizes to the facts.

    Args:
      name: what errors call it.
      splits: the pairs.
      languages: the targets' tags.
      facts: what else is to be kept with a run.
      edition: what else the fingerprint should depend on.
    """
    prints = [edition] + [
      f"{split}/{pairs.fingerprint}" for split, pairs in splits.items()
    ]
    digest = hashlib.blake2b("\0".join(prints).encode(), digest_size=16)
    sizes = {f"{split}_pairs": len(pairs) for split, pairs in splits.items()}
    return cls(
      name=name,
      fingerprint=digest.hexdigest(),
      languages=tuple(languages),
      splits=dict(splits),
      facts={
        "text_hash": digest.hexdigest(),
        "languages": list(languages),
        **sizes,
        **facts,
      },
    )


def check_tag(tag: str, place: str) -> None:
  """Raises `UserError`, which begins with a place, for what is no tag."""
  if not _TAG.fullmatch(tag):
    raise UserError(
      f"{place}: {tag!r} is no language tag: use letters, digits, - and _"
    )


def check_languages(languages: Iterable[str]) -> tuple[str, ...]:
  """The tags in `data.source.languages`; `UserError` for odd or double ones."""
  key = "data.source.languages"
  tags = (languages,) if isinstance(languages, str) else tuple(languages)
  for tag in tags:
    check_tag(tag, key)
  twice = [tag for tag, count in Counter(tags).items() if count > 1]
  if twice:
    raise UserError(f"{key} names {twice[0]!r} twice")
  return tags
