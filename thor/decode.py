"""Translations of sentences: searched, drawn, scored.

# b sentences, n hypotheses, s source time, t target time, v vocabulary,
# p prefix

Everything follows from a sentence, not from the batch that it is in: see
`thor.decode_search`, `thor.decode_step` and `thor.dispatch`.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from thor import decode_step
from thor.data import shift_right
from thor.decode_search import Hypotheses, Search, limits_of, search_beams
from thor.dispatch import Prepared
from thor.evaluation import next_log_probs
from thor.layers import Array
from thor.losses import negative_log_likelihood
from thor.settings import Settings

__all__ = ["Hypotheses", "Search", "beam_search", "sample", "score"]


def beam_search(
  prepared: Prepared,
  source: Array | np.ndarray,
  search: Search = Search(),  # noqa: B008, frozen
  *,
  prefix: Array | np.ndarray | None = None,
) -> Hypotheses:
  """Translates sentences.

  Where `source` is cut over a mesh's devices, each of them translates its own
  rows, with parameters of its own.

  Args:
    prepared: a model and how it is used; see `thor.dispatch.prepare`.
    source: int [b s], padded on the right; rows of padding are empty.
    search: how to search.
    prefix: int [b p], tokens that translations begin with, such as a tag; where
      it has padding they are free.

  Returns:
    The `search.n_best` best translations of each sentence.
  """
  return _on_rows(prepared, source, prefix, search, None)


def sample(
  prepared: Prepared,
  source: Array | np.ndarray,
  search: Search = Search(),  # noqa: B008, frozen
  *,
  seed: int | Array,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  n: int = 1,
) -> Hypotheses:
  """Draws translations, by what the sentence says and not by its batch.

  Args:
    prepared: a model and how it is used.
    source: int [b s], padded on the right.
    search: its lengths and penalty.
    seed: of the draws, which also follow from the sentence, the number of the
      sample and the position.
    temperature: logits are divided by it.
    top_k: only among the k likeliest tokens; 0: all.
    top_p: only among the fewest that together have this probability.
    n: samples of each sentence.

  Returns:
    n translations, as they were drawn; log-probabilities are the model's own.
  """
  if not 0 < temperature < math.inf:
    raise UserError(
      f"temperature={temperature} must be a number above 0: the likeliest "
      "tokens are found with beam=1"
    )
  if top_k < 0:
    raise UserError(f"top_k={top_k} must be at least 0")
  if not 0 < top_p <= 1:
    raise UserError(f"top_p={top_p} must be in (0, 1]")
  if n < 1:
    raise UserError(f"n={n} must be at least 1")
  draw = _Draw(temperature, top_k, top_p, n)
  return _on_rows(prepared, source, jnp.asarray(seed), search, draw)


@jax.jit
def score(
  prepared: Prepared, source: Array | np.ndarray, target: Array | np.ndarray
) -> Array:
  """What a model thinks of given translations.

  Args:
    prepared: a model and how it is used.
    source: int [b s], padded on the right.
    target: int [b t], with EOS at its end, then padding.

  Returns:
    Log-probabilities float32 [b t] of each target token, 0 for padding; in an
    ensemble of the mean of the members' probabilities.
  """
  cfg = prepared.settings
  target = jnp.asarray(target)
  decoder_input = shift_right(target, cfg.start_id, pad_id=cfg.pad_id)
  log_probs = next_log_probs(prepared, jnp.asarray(source), decoder_input)
  likelihood = -negative_log_likelihood(log_probs, target)
  return jnp.where(target == cfg.pad_id, 0, likelihood)


class _Draw(NamedTuple):
  """How to sample; see `sample`."""

  temperature: float
  top_k: int
  top_p: float
  n: int


def _on_rows(
  prepared: Prepared, source: Any, other: Any, search: Search, draw: Any
) -> Hypotheses:
  """Searches or draws, each device for its rows."""
  sharding = getattr(source, "sharding", None)
  is_cut = isinstance(sharding, jax.sharding.NamedSharding)
  if not is_cut or sharding.is_fully_replicated:
    sharding = None
  # Devices have their rows, and tokens need not travel to experts.
  settings = dataclasses.replace(prepared.settings, expert_axis="")
  return _compiled(
    dataclasses.replace(prepared, settings=settings), source, other,
    search=search, draw=draw, sharding=sharding,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("search", "draw", "sharding"))
def _compiled(
  prepared: Prepared,
  source: Array,
  other: Any,
  *,
  search: Search,
  draw: _Draw | None,
  sharding: Any,
) -> Hypotheses:
  run = functools.partial(search_beams, search=search)
  if draw is not None:
    run = functools.partial(_sample, search=search, draw=draw)
  if sharding is None:
    return run(prepared, source, other)
  rows = jax.P(sharding.spec[0])
  return jax.shard_map(
    run,
    mesh=sharding.mesh,
    in_specs=(jax.P(), rows, rows if draw is None else jax.P()),
    out_specs=rows,
    check_vma=False,  # loops begin with zeros that are the same everywhere
  )(prepared, source, other)


class _State(NamedTuple):
  """What a step of sampling changes; see `thor.decode_search`."""

  position: Array
  inputs: Array
  drawn: Hypotheses
  cache: decode_step.Cache
  done: Array


def _sample(
  prepared: Prepared,
  source: Array,
  seed: Array,
  *,
  search: Search,
  draw: _Draw,
) -> Hypotheses:
  """`sample` of the rows of one device."""
  cfg = prepared.settings
  limits, length = limits_of(search, cfg, source, None)
  decoder, cache = decode_step.start(
    prepared, source, draw.n, length, apart=draw.n > 1
  )
  keys = _keys(seed, decoder.keys, draw.n)

  def body(state: _State) -> _State:
    position, old = state.position, state.drawn
    logits, cache = decode_step.advance(
      decoder, state.cache, state.inputs, position, None
    )
    log_probs = jax.nn.log_softmax(logits)
    allowed = _allowed(cfg, search, logits, position, limits)
    chosen = _chosen(keys, allowed, position, draw)
    chosen = jnp.where(state.done, cfg.pad_id, chosen)
    own = jnp.take_along_axis(log_probs, chosen[..., None], axis=-1)[..., 0]
    drawn = dataclasses.replace(
      old,
      tokens=old.tokens.at[:, :, position].set(chosen),
      lengths=old.lengths + ~state.done,
      log_probs=old.log_probs + jnp.where(state.done, 0, own),
    )
    done = state.done | (chosen == cfg.eos_id)
    return _State(position + 1, chosen, drawn, cache, done)

  shape = (len(source), draw.n)
  zeros = jnp.zeros(shape, jnp.float32)
  empty = jnp.all(source == cfg.pad_id, axis=1)[:, None]
  first = _State(
    position=jnp.zeros((), jnp.int32),
    inputs=jnp.full(shape, cfg.start_id, jnp.int32),
    drawn=Hypotheses(
      jnp.full((*shape, length), cfg.pad_id, jnp.int32),
      zeros, jnp.zeros(shape, jnp.int32), zeros,
    ),
    cache=cache,
    done=jnp.broadcast_to(empty, shape),
  )  # fmt: skip
  drawn = jax.lax.while_loop(lambda s: ~jnp.all(s.done), body, first).drawn
  scores = search.normalized(drawn.log_probs, jnp.maximum(drawn.lengths, 1))
  return dataclasses.replace(
    drawn,
    scores=jnp.where(empty, -jnp.inf, scores),
    log_probs=jnp.where(empty, -jnp.inf, drawn.log_probs),
  )


def _keys(seed: Array, sentences: Array, n: int) -> Array:
  """A key for each sentence and sample, [b n]."""

  def of(sentence: Array) -> Array:
    own = jax.random.fold_in(jax.random.key(seed), sentence)
    return jax.vmap(functools.partial(jax.random.fold_in, own))(jnp.arange(n))

  return jax.vmap(of)(sentences)


def _allowed(
  settings: Settings,
  search: Search,
  logits: Array,
  position: Array,
  limits: Array,
) -> Array:
  """Logits [b n v], -inf for what must not come at a position."""
  tokens = jnp.arange(logits.shape[-1])[None, None]
  ends = tokens == settings.eos_id
  refused = (tokens == settings.pad_id) | (
    ends & (position < search.min_length)
  )
  last = (position >= limits)[:, None, None]
  return jnp.where(jnp.where(last, ~ends, refused), -jnp.inf, logits)


def _chosen(keys: Array, logits: Array, position: Array, draw: _Draw) -> Array:
  """Draws a token for each row, int32 [b n]."""
  logits = logits / draw.temperature
  if 0 < draw.top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, draw.top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if draw.top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered)
    # Those before which less than top_p has been gathered.
    before = jnp.cumsum(probs, axis=-1) - probs
    count = jnp.sum(before < draw.top_p, axis=-1, keepdims=True)
    least = jnp.take_along_axis(ordered, jnp.maximum(count, 1) - 1, axis=-1)
    logits = jnp.where(logits < least, -jnp.inf, logits)

  def one(key: Array, row: Array) -> Array:
    return jax.random.categorical(jax.random.fold_in(key, position), row)

  return jax.vmap(jax.vmap(one))(keys, logits).astype(jnp.int32)
