"""Translating by beam search.

# b sentences, k beams, n hypotheses, s source time, t target time,
# v vocabulary, p prefix, c candidates

The search is fairseq's. At every step the 2 k best of a sentence's k v
continuations count: those among the first k that end are finished, in their
order and until k are, and the first k that do not end live on. At a sentence's
greatest length all have to end. A finished hypothesis of n tokens, its end
included, scores

    fairseq   sum log p / n^a
    gnmt      sum log p / ((5 + n) / 6)^a          (arXiv 1609.08144, eq. 14)

A beam of 1 is the greedy search. Neither a sentence's batch nor its padding
changes its translation, but for rounding, and for experts with limited room.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from thor import decode_step
from thor.dispatch import Prepared
from thor.layers import Array
from thor.settings import Settings

PENALTIES = ("fairseq", "gnmt")
_DEAD = -np.inf
_PART = 128  # of a vocabulary, for `top_k`


@dataclasses.dataclass(frozen=True)
class Search:
  """How to search.

  Attributes:
    beam: k.
    n_best: how many translations of a sentence, at most k.
    length_penalty: a, of the score; larger favours longer translations.
    penalty: one of `PENALTIES`.
    max_ratio, max_extra: a translation has at most ratio * source + extra
      tokens and its end; the source's count with tag and end. At least as many
      as a prefix has.
    min_length: and at least so many and its end; 1 in fairseq.
    early_stop: a sentence is done when k hypotheses are finished, as in
      fairseq. Otherwise when none that lives can still come among the k best.
  """

  beam: int = 4
  n_best: int = 1
  length_penalty: float = 1.0
  penalty: str = "fairseq"
  max_ratio: float = 1.2
  max_extra: int = 10
  min_length: int = 1
  early_stop: bool = True

  def __post_init__(self) -> None:
    if self.penalty not in PENALTIES:
      raise UserError(
        f"penalty={self.penalty!r}{did_you_mean(str(self.penalty), PENALTIES)}"
      )
    for name, least in (
      ("beam", 1), ("n_best", 1), ("max_ratio", 0), ("max_extra", 0),
      ("min_length", 0),
    ):  # fmt: skip
      value = getattr(self, name)
      if not least <= value < math.inf:
        raise UserError(f"{name}={value} must be at least {least}")
    if not math.isfinite(self.length_penalty):
      raise UserError(f"length_penalty={self.length_penalty} must be a number")
    if self.n_best > self.beam:
      raise UserError(
        f"n_best={self.n_best} is more than beam={self.beam}: a beam finds at "
        "most as many translations as it is wide"
      )
    if self.max_length(1) < 1:
      raise UserError(
        f"max_ratio={self.max_ratio} and max_extra={self.max_extra} leave "
        "translations no room: raise one of them"
      )

  def max_length(self, source: int) -> int:
    """The most tokens before the end, for so many of a source."""
    return int(self.max_ratio * source + self.max_extra)

  def normalized(self, log_probs: Array, lengths: Array) -> Array:
    """Scores of hypotheses: log-probabilities [...] by lengths [...]."""
    lengths = jnp.asarray(lengths, jnp.float32)
    if self.penalty == "gnmt":
      lengths = (5 + lengths) / 6
    return log_probs / lengths**self.length_penalty


@flax.struct.dataclass
class Hypotheses:
  """Translations of sentences; those of `beam_search` from the best on.

  Attributes:
    tokens: int32 [b n t], each with EOS at its end, then padding.
    scores: float32 [b n], normalized by length; -inf where there is none, as
      in rows without a source.
    lengths: int32 [b n], EOS included; 0 where there is none.
    log_probs: float32 [b n], not normalized.
  """

  tokens: Array
  scores: Array
  lengths: Array
  log_probs: Array


class _State(NamedTuple):
  """What a step of the search changes.

  Attributes:
    position: int scalar, tokens so far.
    inputs: int [b k], the last of them.
    tokens: int32 [b k t].
    ancestors: see `thor.decode_step.advance`; None for a beam of 1.
    log_probs: float32 [b k], -inf where no hypothesis lives.
    cache: of the decoder.
    finished: the k best so far, from the best on.
    done: bool [b].
  """

  position: Array
  inputs: Array
  tokens: Array
  ancestors: Array | None
  log_probs: Array
  cache: decode_step.Cache
  finished: Hypotheses
  done: Array


class _Next(NamedTuple):
  """How hypotheses may go on.

  Attributes:
    log_probs: [b k c], of those that do.
    tokens: int [b k c].
    ends: [b k], log-probabilities of those that end here.
  """

  log_probs: Array
  tokens: Array
  ends: Array


def search_beams(
  prepared: Prepared, source: Array, prefix: Array | None, *, search: Search
) -> Hypotheses:
  """`thor.decode.beam_search` of the rows of one device, to be jitted."""
  cfg, beam = prepared.settings, search.beam
  limits, length = limits_of(search, cfg, source, prefix)
  decoder, cache = decode_step.start(prepared, source, beam, length)

  def going(state: _State) -> Array:
    return ~jnp.all(state.done)

  def body(state: _State) -> _State:
    ancestors = state.ancestors
    if ancestors is not None:
      ancestors = ancestors.at[:, :, state.position].set(
        jnp.arange(beam, dtype=ancestors.dtype)[None]
      )
    logits, cache = decode_step.advance(
      decoder, state.cache, state.inputs, state.position, ancestors
    )
    state = state._replace(cache=cache, ancestors=ancestors)
    must_end = state.position >= limits
    ways = _continuations(cfg, search, state, logits, must_end, prefix)
    finished = _finish(cfg, search, state, ways)
    state = _live_on(state, ways)._replace(finished=finished)
    done = state.done | must_end | _is_over(search, state, limits)
    return state._replace(position=state.position + 1, done=done)

  first = _first(cfg, beam, source, length, cache)
  finished = jax.lax.while_loop(going, body, first).finished
  return jax.tree.map(lambda leaf: leaf[:, : search.n_best], finished)


def limits_of(
  search: Search, settings: Settings, source: Array, prefix: Array | None
) -> tuple[Array, int]:
  """The most tokens before the end: int [b], and with the end in any row."""
  rows, size = source.shape
  table = np.array([search.max_length(n) for n in range(size + 1)], np.int32)
  real = jnp.sum(source != settings.pad_id, axis=1)
  limits = jnp.take(jnp.asarray(table), real)
  most = int(table.max())
  if prefix is not None:
    if prefix.ndim != 2 or len(prefix) != rows:
      raise UserError(
        f"prefix of shape {list(prefix.shape)} for {rows} sentences: give one "
        "row each"
      )
    places = jnp.arange(1, prefix.shape[1] + 1)[None]
    own = jnp.where(prefix == settings.pad_id, 0, places)
    limits = jnp.maximum(limits, jnp.max(own, axis=1, initial=0))
    most = max(most, prefix.shape[1])
  return limits, most + 1


def _first(
  settings: Settings,
  beam: int,
  source: Array,
  length: int,
  cache: decode_step.Cache,
) -> _State:
  """One living hypothesis of each sentence: nothing."""
  rows = len(source)
  tokens = jnp.full((rows, beam, length), settings.pad_id, jnp.int32)
  none = jnp.full((rows, beam), _DEAD, jnp.float32)
  return _State(
    position=jnp.zeros((), jnp.int32),
    inputs=jnp.full((rows, beam), settings.start_id, jnp.int32),
    tokens=tokens,
    ancestors=None if beam == 1 else jnp.full(tokens.shape, -1, jnp.int32),
    log_probs=none.at[:, 0].set(0),
    cache=cache,
    finished=Hypotheses(tokens, none, jnp.zeros((rows, beam), jnp.int32), none),
    done=jnp.all(source == settings.pad_id, axis=1),
  )


def _continuations(
  settings: Settings,
  search: Search,
  state: _State,
  logits: Array,
  must_end: Array,
  prefix: Array | None,
) -> _Next:
  """The k best tokens of each hypothesis, and its end.

  Only k of them can live on, and whether an end is among the first k of all
  depends on no more of them.
  """
  pad, eos = settings.pad_id, settings.eos_id
  so_far = state.log_probs - jax.nn.logsumexp(logits, axis=-1)
  # The end and padding may be among the best, and are none of them.
  best, tokens = top_k(logits, min(search.beam + 2, logits.shape[-1]))
  best = jnp.where((tokens == eos) | (tokens == pad), _DEAD, best)
  best, order = jax.lax.top_k(best, min(search.beam, best.shape[-1]))
  tokens = jnp.take_along_axis(tokens, order, axis=-1)
  log_probs = best + so_far[..., None]
  ends = logits[..., eos] + so_far
  may_end = jnp.broadcast_to(
    state.position >= search.min_length, must_end.shape
  )
  if prefix is not None and prefix.shape[1]:
    forced = jnp.take(
      prefix, state.position, axis=1, mode="fill", fill_value=pad
    )
    is_forced = forced != pad
    own = jnp.take_along_axis(logits, forced[:, None, None], axis=-1)
    lives = (forced != eos)[:, None, None] & (
      jnp.arange(tokens.shape[-1]) == 0
    )[None, None]
    only = jnp.where(lives, own + so_far[..., None], _DEAD)
    log_probs = jnp.where(is_forced[:, None, None], only, log_probs)
    tokens = jnp.where(is_forced[:, None, None], forced[:, None, None], tokens)
    may_end = jnp.where(is_forced, forced == eos, may_end)
  return _Next(
    jnp.where(must_end[:, None, None], _DEAD, log_probs),
    tokens,
    jnp.where((may_end | must_end)[:, None], ends, _DEAD),
  )


def _finish(
  settings: Settings, search: Search, state: _State, ways: _Next
) -> Hypotheses:
  """The k best that are finished, with those that end at this step."""
  beam, old, ends = search.beam, state.finished, ways.ends
  others = ways.log_probs.reshape(len(ends), 1, -1)
  beams = jnp.arange(beam)
  earlier = (beams[None] < beams[:, None])[None]
  tied = (ends[:, None] == ends[..., None]) & earlier
  better = (ends[:, None] > ends[..., None]) | tied
  place = jnp.sum(better, axis=-1)  # among those that end
  rank = place + jnp.sum(others > ends[..., None], axis=-1)
  taken = (rank < beam) & (ends > _DEAD) & ~state.done[:, None]
  if search.early_stop:
    room = beam - jnp.sum(old.lengths > 0, axis=-1, keepdims=True)
    taken &= place < room
  length = state.position + 1
  ended = state.tokens.at[:, :, state.position].set(settings.eos_id)
  new = Hypotheses(
    tokens=ended,
    scores=jnp.where(taken, search.normalized(ends, length), _DEAD),
    lengths=jnp.where(taken, length, 0),
    log_probs=jnp.where(taken, ends, _DEAD),
  )
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), old, new)
  _, order = jax.lax.top_k(both.scores, beam)
  made = jax.tree.map(lambda leaf: _of_beams(leaf, order), both)
  empty = (made.lengths == 0)[..., None]
  return dataclasses.replace(
    made, tokens=jnp.where(empty, settings.pad_id, made.tokens)
  )


def _live_on(state: _State, ways: _Next) -> _State:
  """The first k that do not end."""
  rows, beam, count = ways.tokens.shape
  log_probs, order = jax.lax.top_k(ways.log_probs.reshape(rows, -1), beam)
  inputs = jnp.take_along_axis(ways.tokens.reshape(rows, -1), order, axis=1)
  tokens, ancestors = state.tokens, state.ancestors
  if ancestors is not None:
    parents = order // count
    tokens = _of_beams(tokens, parents)
    ancestors = _of_beams(ancestors, parents)
  return state._replace(
    inputs=inputs,
    tokens=tokens.at[:, :, state.position].set(inputs),
    ancestors=ancestors,
    log_probs=log_probs,
  )


def _is_over(search: Search, state: _State, limits: Array) -> Array:
  """Whether nothing more can come, [b]."""
  best, worst = state.log_probs[:, 0], state.finished.scores[:, -1]
  none_lives = best == _DEAD
  if search.early_stop:
    return none_lives | (worst > _DEAD)
  # The most that the best can reach, whichever way lengths count.
  bounds = [
    search.normalized(best, length)
    for length in (state.position + 2, limits + 1)
  ]
  return none_lives | (worst >= jnp.maximum(*bounds))


def _of_beams(leaf: Array, order: Array) -> Array:
  """[b k …] by int [b n] -> [b n …]."""
  order = order.reshape(*order.shape, *(1,) * (leaf.ndim - 2))
  return jnp.take_along_axis(leaf, order, axis=1)


def top_k(x: Array, k: int) -> tuple[Array, Array]:
  """`jax.lax.top_k`, on a CPU several times faster where the last axis is long.

  The k best are in the k parts with the greatest maxima.
  """
  size = x.shape[-1]
  parts = -(-size // _PART)
  if parts < 4 * k:
    return jax.lax.top_k(x, k)
  padding = [(0, 0)] * (x.ndim - 1) + [(0, parts * _PART - size)]
  cut = jnp.pad(x, padding, constant_values=_DEAD)
  cut = cut.reshape(*x.shape[:-1], parts, _PART)
  _, best = jax.lax.top_k(jnp.max(cut, axis=-1), k)
  kept = jnp.take_along_axis(cut, best[..., None], axis=-2)
  values, place = jax.lax.top_k(kept.reshape(*x.shape[:-1], -1), k)
  part = jnp.take_along_axis(best, place // _PART, axis=-1)
  return values, part * _PART + place % _PART
