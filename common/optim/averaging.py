"""Averages of weights over a run: SWAD, dense averaging in a loss valley."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.optim.ascent import check_settings, next_count
from common.optim.second_pass import check_period

PyTree = Any


class SwadState(NamedTuple):
  """State of `swad`: arrays only, Q = max(n_converge, n_tolerance).

  A segment is the steps after one validation up to and with the next. All
  trees have the paths, shapes and sharding of the parameters.

  Attributes:
    running: the mean over the segment that is not yet validated.
    running_count: int32 [], its steps.
    segments: the means of the last Q segments, oldest first.
    counts: int32 [Q], their steps; 0 where there was no such segment.
    losses: float32 [Q], their validation losses.
    validations: int32 [], validations so far.
    valley: the mean over the segments taken into the average.
    valley_count: int32 [], their steps.
    start: int32 [], the number of the first of them, from 0; -1 until the
      valley's start is detected.
    end: int32 [], the number of the last of them; start - 1 while none is.
    threshold: float32 [], the loss that ends the valley.
    is_over: bool [], whether it has ended: training may stop.
  """

  running: PyTree
  running_count: jax.Array
  segments: tuple[PyTree, ...]
  counts: jax.Array
  losses: jax.Array
  validations: jax.Array
  valley: PyTree
  valley_count: jax.Array
  start: jax.Array
  end: jax.Array
  threshold: jax.Array
  is_over: jax.Array


class Swad(NamedTuple):
  """Pure functions, usable under jit.

  Attributes:
    init: `params -> state`.
    update: `(state, params) -> state`, after every training step.
    validate: `(state, loss) -> state`, when the weights that `update` saw last
      were validated.
    average: `(state, params) -> params`: the average, in the dtypes of the
      given current parameters.
  """

  init: Callable[[PyTree], SwadState]
  update: Callable[[SwadState, PyTree], SwadState]
  validate: Callable[[SwadState, Any], SwadState]
  average: Callable[[SwadState, PyTree], PyTree]


def swad(
  n_converge: int = 3, n_tolerance: int = 6, tolerance_ratio: float = 0.3
) -> Swad:
  """Stochastic Weight Averaging Densely: the mean over a validation valley.

  With E_i the i-th validation loss and segment i the steps that led to it,

      start s: the first s with E_s = min(E_s, ..., E_(s + n_converge - 1))
      l = (1 + tolerance_ratio) mean(E_s, ..., E_(s + n_converge - 1))
      end: the last segment before the first j >= s with
           min(E_j, ..., E_(j + n_tolerance - 1)) > l

  and the average is that of the weights after each step of the segments from
  start to end, each step with the same weight. At the end of a run the windows
  are cut there, so that a tail above l is left out. For example:

      averager = swad()
      state = averager.init(params)
      for step, batch in enumerate(data, start=1):
        params = train_step(params, batch)
        state = averager.update(state, params)
        if step % 100 == 0:
          state = averager.validate(state, validation_loss(params))
      params = averager.average(state, params)

  Where no start was detected (the loss fell to the end; `state.start` is -1)
  the average is the last validated segment's, and before any validation the
  given parameters, as in the authors' code. That code counts some segments
  twice or not at all, depending on how its queues are filled; this one follows
  the paper's algorithm. Running statistics (BatchNorm) are not parameters:
  freeze them or take them anew for the average.

  The state holds Q + 2 copies of the parameters, in float32 at least.

  Args:
    n_converge: validations that show the start (N_s in the paper).
    n_tolerance: validations that show the end (N_e).
    tolerance_ratio: how far above the start's losses the valley ends (r - 1).
      The defaults are the authors'.

  Returns:
    The averager.

  Raises:
    UserError: for windows that are no whole numbers from 1 or a negative
      ratio.

  References:
    Cha et al., SWAD: Domain Generalization by Seeking Flat Minima, algorithm
    1, arXiv 2102.08604
  """
  check_period(n_converge=n_converge, n_tolerance=n_tolerance)
  check_settings(tolerance_ratio=tolerance_ratio)
  size = max(n_converge, n_tolerance)

  def validate(state: SwadState, loss: Any) -> SwadState:
    state = _close_segment(state, loss)
    state = _find_start(state, n_converge, 1 + tolerance_ratio)
    for slot in range(size - n_tolerance + 1):  # those whose window is whole
      state = _judge(state, slot, slice(slot, slot + n_tolerance))
    return state

  def average(state: SwadState, params: PyTree) -> PyTree:
    any_validated = state.counts[-1] > 0
    for slot in range(size):
      state = _judge(state, slot, slice(slot, slot + n_tolerance))
    found = state.valley_count > 0

    def choose(valley: jax.Array, last: jax.Array, now: jax.Array):
      fallback = jnp.where(any_validated, last.astype(now.dtype), now)
      return jnp.where(found, valley.astype(now.dtype), fallback)

    return jax.tree.map(choose, state.valley, state.segments[-1], params)

  return Swad(lambda params: _init(params, size), _update, validate, average)


def _init(params: PyTree, size: int) -> SwadState:
  def zeros() -> PyTree:
    return jax.tree.map(
      lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)),
      params,
    )

  return SwadState(
    running=zeros(),
    running_count=jnp.int32(0),
    segments=tuple(zeros() for _ in range(size)),
    counts=jnp.zeros(size, jnp.int32),
    losses=jnp.full(size, jnp.inf, jnp.float32),
    validations=jnp.int32(0),
    valley=zeros(),
    valley_count=jnp.int32(0),
    start=jnp.int32(-1),
    end=jnp.int32(-2),
    threshold=jnp.float32(jnp.inf),
    is_over=jnp.bool_(False),
  )


def _update(state: SwadState, params: PyTree) -> SwadState:
  """One more step in the running segment."""
  count = next_count(state.running_count)
  running = jax.tree.map(
    lambda mean, x: mean + (x.astype(mean.dtype) - mean) / count,
    state.running,
    params,
  )
  return state._replace(running=running, running_count=count)


def _close_segment(state: SwadState, loss: Any) -> SwadState:
  """The running segment gets its loss and joins the queue."""
  last = jnp.asarray(loss, jnp.float32).reshape(1)
  count = state.running_count.reshape(1)
  return state._replace(
    running=jax.tree.map(jnp.zeros_like, state.running),
    running_count=jnp.zeros_like(state.running_count),
    segments=(*state.segments[1:], state.running),
    counts=jnp.concatenate([state.counts[1:], count]),
    losses=jnp.concatenate([state.losses[1:], last]),
    validations=next_count(state.validations),
  )


def _find_start(state: SwadState, window: int, ratio: float) -> SwadState:
  losses = state.losses[-window:]
  found = (
    (state.start < 0)
    & (state.validations >= window)
    & (losses[0] == jnp.min(losses))  # False with a NaN among them
  )
  start = jnp.where(found, state.validations - window, state.start)
  return state._replace(
    start=start,
    end=jnp.where(found, start - 1, state.end),
    threshold=jnp.where(found, ratio * jnp.mean(losses), state.threshold),
  )


def _judge(state: SwadState, slot: int, window: slice) -> SwadState:
  """Takes the segment in `slot` into the valley, or ends the valley there.

  Does nothing unless it is that segment's turn.
  """
  number = state.validations - len(state.segments) + slot
  is_next = (state.start >= 0) & ~state.is_over & (number == state.end + 1)
  is_low = jnp.min(state.losses[window]) <= state.threshold
  taken = is_next & is_low
  count = state.counts[slot]
  total = state.valley_count + jnp.where(taken, count, 0)
  part = count / jnp.maximum(total, 1)

  def merge(mean: jax.Array, segment: jax.Array) -> jax.Array:
    merged = mean + part.astype(mean.dtype) * (segment - mean)
    return jnp.where(taken, merged, mean)

  return state._replace(
    valley=jax.tree.map(merge, state.valley, state.segments[slot]),
    valley_count=total,
    end=jnp.where(taken, number, state.end),
    is_over=state.is_over | (is_next & ~is_low),
  )
