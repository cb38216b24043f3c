"""The controls of the objectives (paper, appendix A.2)."""

import dataclasses

from birdie.vocab import Vocabulary
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The controls of an objective; `CONTROLS` says which ones it reads.

  Attributes:
    vocab: special tokens.
    min_length, max_length: the bucket of text lengths, both included. The
      length is drawn uniformly from it; with `max_length=None` an example
      takes as much as there is and fits.
    paradigm: tokens that announce the objective; () for none.
    paradigm_append_prob: how often they stand behind the prefix, not before.
    prefix_frac, jitter, min_side: prefix LM: the split is uniform in
      prefix_frac +- jitter, with at least `min_side` tokens on both sides.
    corruption_rate, mean_span: share of masked text and mean span length. A
      text has at most as many spans as there are sentinels, less one for the
      end of the labels; beyond, the rate stays exact and spans get longer.
    sentinel_position: in the labels of infilling, "before" or "after" a span.
    final_sentinel: ends the labels of infilling (only with "before").
    shuffle_rate: deshuffling: the share of positions that are permuted.
    level: deshuffling: "token", or "char" for byte tokens: whole UTF-8
      characters move.
    num_spans: selective copying: how many spans are asked for.
    min_span, max_span: their lengths.
    min_delimiter, max_delimiter: lengths of the delimiters around them.
    order: "query_context" or "context_query".

  Raises:
    UserError: for a value that makes no sense.
  """

  vocab: Vocabulary
  min_length: int = 16
  max_length: int | None = None
  paradigm: tuple[int, ...] = ()
  paradigm_append_prob: float = 0.5
  prefix_frac: float = 0.75
  jitter: float = 0.25
  min_side: int = 4
  corruption_rate: float = 0.15
  mean_span: float = 3.0
  sentinel_position: str = "before"
  final_sentinel: bool = True
  shuffle_rate: float = 1.0
  level: str = "token"
  num_spans: int = 1
  min_span: int = 4
  max_span: int = 32
  min_delimiter: int = 1
  max_delimiter: int = 8
  order: str = "query_context"

  def __post_init__(self):
    for name in _COUNTS:
      value = getattr(self, name)
      holds = _is_number(value, int) and value >= 1
      holds = holds or (name == "max_length" and value is None)
      _require(holds, name, value, "an integer of at least 1")
    for low, high in _ORDERED:
      least, most = getattr(self, low), getattr(self, high)
      holds = most is None or most >= least
      _require(holds, high, most, f"at least {low}={least}")
    for name, interval in _SHARES.items():
      value = getattr(self, name)
      holds = _is_number(value) and 0 <= value <= 1
      holds = holds and (value > 0 or interval[0] == "[")
      _require(holds, name, value, f"in {interval}")
    holds = _is_number(self.mean_span) and self.mean_span >= 1
    _require(holds, "mean_span", self.mean_span, "a number of at least 1")
    for name, allowed in _CHOICES.items():
      value = getattr(self, name)
      _require(value in allowed, name, value, f"one of {allowed}")
    _require(
      self.level == "token" or self.vocab.byte_offset is not None,
      "level",
      self.level,
      "'token' with a vocabulary that is not of bytes",
    )


_COUNTS = (
  "min_length", "max_length", "min_side", "num_spans", "min_span", "max_span",
  "min_delimiter", "max_delimiter",
)  # fmt: skip
_ORDERED = (
  ("min_length", "max_length"),
  ("min_span", "max_span"),
  ("min_delimiter", "max_delimiter"),
)
_SHARES = {
  "paradigm_append_prob": "[0, 1]",
  "prefix_frac": "[0, 1]",
  "jitter": "[0, 1]",
  "corruption_rate": "(0, 1]",
  "shuffle_rate": "(0, 1]",
}
_CHOICES = {
  "sentinel_position": ("before", "after"),
  "final_sentinel": (True, False),
  "level": ("token", "char"),
  "order": ("query_context", "context_query"),
}


def _is_number(value: object, kind: type | tuple = (int, float)) -> bool:
  return isinstance(value, kind) and not isinstance(value, bool)


def _require(holds: bool, name: str, value: object, what: str) -> None:
  if not holds:
    raise UserError(f"objective: {name}={value!r} must be {what}")


_EVERY = ("min_length", "max_length", "paradigm", "paradigm_append_prob")
_CORRUPTION = ("corruption_rate", "mean_span")
# The controls that each objective reads.
CONTROLS: dict[str, tuple[str, ...]] = {
  "next_token_prediction": _EVERY,
  "prefix_language_modeling": (*_EVERY, "prefix_frac", "jitter", "min_side"),
  "infilling": (
    *_EVERY, *_CORRUPTION, "sentinel_position", "final_sentinel",
  ),
  "autoencoding": (*_EVERY, *_CORRUPTION),
  "autoencoding_with_deshuffling": (*_EVERY, *_CORRUPTION),
  "copying": _EVERY,
  "deshuffling": (*_EVERY, "shuffle_rate", "level"),
  "selective_copying": (
    *_EVERY, "num_spans", "min_span", "max_span", "min_delimiter",
    "max_delimiter", "order",
  ),
}  # fmt: skip
