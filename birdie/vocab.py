"""Token ids with a meaning: GEN, paradigms, sentinels."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

SPECIALS = ("pad", "gen", "eos", "sep")
MARKERS = ("start", "end", "context", "done")
# Objective (or UL2 mode) -> its token, in the order of the ids from 4 on.
PARADIGMS = (
  "next_token_prediction",
  "prefix_language_modeling",
  "infilling",
  "infilling_x",
  "autoencoding",
  "autoencoding_with_deshuffling",
  "copying",
  "deshuffling",
  "selective_copying",
)
NUM_SENTINELS = 100
BYTE_OFFSET = 64


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The ids that objectives put between text tokens.

  Attributes:
    pad: padding.
    gen: where generation begins.
    eos: end of a document.
    sep: between the spans of selective copying.
    start, end: before a start and an end delimiter.
    context: before the context of selective copying.
    done: ends the label of selective copying.
    paradigms: the tokens that announce an objective, by its name.
    sentinels: stand for masked spans.
    size: of the embedding; all ids are below it.
    text: the ids of text.
    byte_offset: id of byte 0, where tokens are bytes; None elsewhere.
  """

  pad: int
  gen: int
  eos: int
  sep: int
  start: int
  end: int
  context: int
  done: int
  paradigms: Mapping[str, tuple[int, ...]]
  sentinels: tuple[int, ...]
  size: int
  text: range
  byte_offset: int | None = None

  @property
  def special_ids(self) -> frozenset[int]:
    """Every id that is not text."""
    single = {getattr(self, name) for name in (*SPECIALS, *MARKERS)}
    announced = {i for ids in self.paradigms.values() for i in ids}
    ids = single | announced | set(self.sentinels)
    return frozenset(i for i in ids if i not in self.text)


def as_ids(
  value: int | str | Sequence[int], encode: Callable[[str], Iterable[int]]
) -> tuple[int, ...]:
  """Ids of an id, of several, or of a string that `encode` tokenizes."""
  ids: Iterable[Any]
  if isinstance(value, str):
    ids = encode(value)
  else:
    ids = value if isinstance(value, Iterable) else (value,)
  return tuple(operator.index(i) for i in ids)


def byte_vocabulary() -> Vocabulary:
  """Specials below 64, byte b at 64 + b, sentinels from 320: 420 ids.

  The size is 512.
  """
  text = range(BYTE_OFFSET, BYTE_OFFSET + 256)
  made = _vocabulary(0, text.stop, text=text, multiple=512)
  return dataclasses.replace(made, byte_offset=BYTE_OFFSET)


def extend(base_size: int, *, multiple: int = 128) -> Vocabulary:
  """Special ids behind those of a tokenizer with `base_size` of its own.

  Args:
    base_size: the tokenizer's vocabulary.
    multiple: the size is padded to one, so that it shards evenly.
  """
  count = len(SPECIALS) + len(PARADIGMS) + len(MARKERS)
  return _vocabulary(
    base_size, base_size + count, text=range(base_size), multiple=multiple
  )


def _vocabulary(
  first: int, sentinel: int, *, text: range, multiple: int
) -> Vocabulary:
  names = [*SPECIALS, *PARADIGMS, *MARKERS]
  ids = {name: first + i for i, name in enumerate(names)}
  sentinels = tuple(range(sentinel, sentinel + NUM_SENTINELS))
  size = -(-(sentinels[-1] + 1) // multiple) * multiple
  return Vocabulary(
    **{name: ids[name] for name in (*SPECIALS, *MARKERS)},
    paradigms={name: (ids[name],) for name in PARADIGMS},
    sentinels=sentinels,
    size=size,
    text=text,
  )
