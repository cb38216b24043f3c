"""The recurrence as a kernel for GPUs, in Pallas' Triton dialect.

# b batch, t time, n channels

A program has some channels of one row and goes through time with the state in
registers. The rows of the next steps are loaded before those at hand are used,
so that memory is always being read. Where rows and channels make too few
programs for a card, time is divided: every part first finds what it makes of a
zero state, the parts are joined, and every part runs from the state that enters
it. That reads the drive and the gates twice.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from common.parallel.scan_forms import joined
from common.parallel.scan_kernel import (
  Kernel,
  Planes,
  constant,
  divided,
  exp,
  plus,
  shape_like,
  times,
  where,
)

Array = jax.Array
PLATFORM = "cuda"
PROGRAMS = 128  # fewer leave a large card idle
SPAN = 512  # steps that a part of time has at least


class Blocks(NamedTuple):
  """What a program works on.

  Attributes:
    channels: of a program.
    steps: that are loaded at once.
    warps: of 32 threads.
  """

  channels: int = 128
  steps: int = 16
  warps: int = 4


class _Plan(NamedTuple):
  """A kernel's sizes.

  Attributes:
    kernel: its task.
    count: planes of a number.
    length, channels: t and n.
    span: steps of a part of time.
    blocks: see `Blocks`.
  """

  kernel: Kernel
  count: int
  length: int
  channels: int
  span: int
  blocks: Blocks

  @property
  def parts(self) -> int:
    """Of time."""
    return divided(self.length, self.span)

  @property
  def backwards(self) -> bool:
    """Whether time runs from its end."""
    return self.kernel.reverse != (self.kernel.task == "backward")


def run(
  kernel: Kernel,
  numbers: Sequence[Planes],
  reset: Array | None,
  dtypes: Sequence[str],
  *,
  blocks: Blocks | None = None,
  parts: int | None = None,
) -> tuple[Planes, ...]:
  """Runs a task.

  Args:
    kernel: what is computed.
    numbers: the task's inputs; see `scan_kernel`.
    reset: bool [b t].
    dtypes: of the outputs.
    blocks: see `Blocks`.
    parts: into which time is divided; as many as fill a card if None.
  """
  count, (batch, length, channels) = len(numbers[0]), numbers[0][0].shape
  if blocks is None:
    # An interpreter gains nothing by loading ahead; complex numbers are loaded
    # twice, and make programs of four times the length.
    steps = 1 if kernel.interpret else Blocks().steps // count**2
    blocks = Blocks(steps=steps)
  if parts is None:
    parts = parts_of(batch, length, channels, blocks)
  span = divided(length, parts)
  plan = _Plan(kernel, count, length, channels, span, blocks)
  if reset is not None:
    reset = reset.astype(jnp.int8)
  tasks = {"forward": _forward, "backward": _backward, "reduce": _reduce}
  return tasks[kernel.task](plan, *numbers, reset=reset, dtypes=dtypes)


def parts_of(batch: int, length: int, channels: int, blocks: Blocks) -> int:
  """Into how many parts time is divided, so that a card has work."""
  programs = batch * divided(channels, blocks.channels)
  return max(min(PROGRAMS // programs, length // SPAN), 1)


# -- tasks -------------------------------------------------------------------


def _forward(
  plan: _Plan, x: Planes, a: Planes, h0: Planes, *, reset: Any, dtypes: Any
) -> tuple[Planes, Planes]:
  starts, last = _entering(plan, x, a, h0, reset)
  h, ends = _call(
    plan, _forward_kernel, (x, a, starts, reset), steps=dtypes[:1]
  )
  return h, last or _end(ends)


def _backward(
  plan: _Plan,
  a: Planes,
  h: Planes,
  h0: Planes,
  g: Planes,
  g_last: Planes,
  *,
  reset: Any,
  dtypes: Any,
) -> tuple[Planes, Planes, Planes]:
  starts, dh0 = _entering(plan, g, a, g_last, reset)
  dx, da, ends = _call(
    plan, _backward_kernel, (a, h, h0, g, starts, reset), steps=dtypes[:2]
  )
  return dx, da, dh0 or _end(ends)


def _reduce(
  plan: _Plan, x: Planes, a: Planes, *, reset: Any, dtypes: Any
) -> tuple[Planes, Planes]:
  del dtypes
  plan = plan._replace(span=plan.length)
  states, decays = _reduced(plan, x, a, reset)
  return _end(states), _end(decays)


def _entering(
  plan: _Plan, x: Planes, a: Planes, first: Planes, reset: Any
) -> tuple[Planes, Planes | None]:
  """The states that enter the parts, [b parts n], and the one that leaves."""
  if plan.parts == 1:
    return tuple(plane[:, None] for plane in first), None
  states, decays = (_number(own) for own in _reduced(plan, x, a, reset))
  before, last = joined(plan.backwards, states, decays, _number(first))
  return _split(before, plan.count), _split(last, plan.count)


def _reduced(
  plan: _Plan, x: Planes, a: Planes, reset: Any
) -> tuple[Planes, Planes]:
  """Of each part, what it makes of a zero state, and its gates' product."""
  return _call(plan, _reduce_kernel, (x, a, reset), steps=(), ends=2)


def _number(planes: Planes) -> Array:
  return planes[0] if len(planes) == 1 else jax.lax.complex(*planes)


def _split(number: Array, count: int) -> Planes:
  if count == 1:
    return (number,)
  return jax.lax.real(number), jax.lax.imag(number)


def _end(ends: Planes) -> Planes:
  """Of one part."""
  return tuple(plane[:, 0] for plane in ends)


def _call(
  plan: _Plan, kernel: Any, inputs: Any, *, steps: Any, ends: int = 1
) -> Any:
  """Starts the programs.

  Args:
    plan: sizes.
    kernel: its function; gets the inputs' references, then the outputs'.
    inputs: planes, and the resets or None.
    steps: dtypes of the outputs [b t n].
    ends: how many outputs [b parts n] follow them.
  """
  batch = inputs[0][0].shape[0]
  dtypes = [plane.dtype for own in inputs[:-1] for plane in own]
  carry = jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)
  by_step = (batch, plan.length, plan.channels)
  by_part = (batch, plan.parts, plan.channels)

  def planes(shape: tuple[int, ...], dtype: Any) -> Any:
    return (shape_like(inputs[0][0], shape, dtype),) * plan.count

  shapes = [planes(by_step, dtype) for dtype in steps]
  shapes += [planes(by_part, carry)] * ends
  return pl.pallas_call(
    functools.partial(kernel, plan, carry),
    grid=(divided(plan.channels, plan.blocks.channels), plan.parts, batch),
    out_shape=tuple(shapes),
    compiler_params=plgpu.CompilerParams(num_warps=plan.blocks.warps),
    interpret=plan.kernel.interpret,
    name=f"linear_scan_{plan.kernel.task}",
  )(*inputs)


# -- kernels -----------------------------------------------------------------


class _Place:
  """Where a program is, and how it reads and writes there."""

  def __init__(self, plan: _Plan, carry: Any):
    self.plan, self.carry = plan, carry
    tile, self.part, self.row = (pl.program_id(axis) for axis in range(3))
    own = plan.blocks.channels
    self.channels = tile * own + jnp.arange(own)
    self.inside = self.channels < plan.channels
    self.first = self.part * plan.span

  def step(self, i: Array) -> tuple[Array, Array]:
    """The i-th step's time, and whether it is one of this part."""
    plan = self.plan
    last = self.first + plan.span - 1
    t = last - i if plan.backwards else self.first + i
    return t, (i < plan.span) & (t < plan.length) & (t >= self.first)

  def load(self, refs: Any, t: Array, valid: Array, real: float = 0) -> Planes:
    """Row t of [b t n]; a real number where there is none."""
    mask, at = self.inside & valid, jnp.maximum(t, 0)
    return tuple(
      plgpu.load(
        ref.at[self.row, at, self.channels], mask=mask, other=0 if i else real
      ).astype(self.carry)
      for i, ref in enumerate(refs)
    )

  def store(self, refs: Any, t: Array, valid: Array, value: Planes) -> None:
    mask, at = self.inside & valid, jnp.maximum(t, 0)
    for ref, plane in zip(refs, value):
      plgpu.store(
        ref.at[self.row, at, self.channels], plane.astype(ref.dtype), mask=mask
      )

  def load_end(self, refs: Any, part: Array | None = None) -> Planes:
    """Of [b parts n], this part's; of [b n] if `part` is None."""
    at = (self.row,) if part is None else (self.row, part)
    return tuple(
      plgpu.load(ref.at[(*at, self.channels)], mask=self.inside, other=0)
      .astype(self.carry)
      for ref in refs
    )  # fmt: skip

  def store_end(self, refs: Any, value: Planes) -> None:
    for ref, plane in zip(refs, value):
      plgpu.store(
        ref.at[self.row, self.part, self.channels],
        plane.astype(ref.dtype),
        mask=self.inside,
      )

  def gate(self, refs: Any, reset: Any, t: Array, valid: Array) -> Any:
    """What is stored of a gate, and whether it is reset there."""
    log = self.plan.kernel.log_gates
    stored = self.load(refs, t, valid, real=0 if log else 1)
    if reset is None:
      return stored, None
    skip = plgpu.load(
      reset.at[self.row, jnp.maximum(t, 0)], mask=valid, other=0
    )
    return stored, skip != 0

  def effective(self, stored: Planes, skip: Array | None) -> Planes:
    gate = exp(stored) if self.plan.kernel.log_gates else stored
    return gate if skip is None else where(skip, constant(gate, 0), gate)

  def loop(self, load: Any, body: Any, start: Any) -> Any:
    """Steps one after the other, those to come loaded ahead.

    Args:
      load: (t, valid) -> what a step needs.
      body: (carry, t, valid, loaded) -> carry.
      start: the first carry.
    """
    steps = self.plan.blocks.steps

    def rows(group: Array) -> Any:
      places = [self.step(group * steps + k) for k in range(steps)]
      return tuple(load(t, valid) for t, valid in places)

    def group(i: Array, carry: Any) -> Any:
      own, loaded = carry
      ahead = rows(i + 1)
      for k, row in enumerate(loaded):
        t, valid = self.step(i * steps + k)
        own = body(own, t, valid, row)
      return own, ahead

    count = divided(self.plan.span, steps)
    own, _ = jax.lax.fori_loop(0, count, group, (start, rows(jnp.int32(0))))
    return own


def _forward_kernel(
  plan: _Plan, carry: Any, x, a, starts, reset, h, ends
) -> None:
  place = _Place(plan, carry)

  def load(t: Array, valid: Array) -> Any:
    return place.load(x, t, valid), place.gate(a, reset, t, valid)

  def body(state: Planes, t: Array, valid: Array, row: Any) -> Planes:
    drive, gate = row
    state = plus(times(place.effective(*gate), state), drive)
    place.store(h, t, valid, state)
    return state

  place.store_end(ends, place.loop(load, body, place.load_end(
    starts, place.part)))  # fmt: skip


def _reduce_kernel(
  plan: _Plan, carry: Any, x, a, reset, states, decays
) -> None:
  """For the backward pass, of drives a g."""
  place, is_backward = _Place(plan, carry), plan.kernel.task == "backward"

  def load(t: Array, valid: Array) -> Any:
    return place.load(x, t, valid), place.gate(a, reset, t, valid)

  def body(own: Any, t: Array, valid: Array, row: Any) -> Any:
    del t, valid
    (state, decay), (drive, stored) = own, row
    gate = place.effective(*stored)
    if is_backward:
      state = times(gate, plus(state, drive))
    else:
      state = plus(times(gate, state), drive)
    return state, times(gate, decay)

  zero = (jnp.zeros(plan.blocks.channels, carry),) * plan.count
  state, decay = place.loop(load, body, (zero, constant(zero, 1)))
  place.store_end(states, state)
  place.store_end(decays, decay)


def _backward_kernel(
  plan: _Plan, carry: Any, a, h, h0, g, starts, reset, dx, da, ends
) -> None:
  place, reverse = _Place(plan, carry), plan.kernel.reverse
  edge = plan.length - 1 if reverse else 0  # where the forward pass began
  first = place.load_end(h0)

  def load(t: Array, valid: Array) -> Any:
    before = t + 1 if reverse else t - 1
    return (
      place.load(g, t, valid),
      place.load(h, before, valid & (t != edge)),
      place.gate(a, reset, t, valid),
    )

  def body(decayed: Planes, t: Array, valid: Array, row: Any) -> Planes:
    cotangent, previous, (stored, skip) = row
    previous = where(t == edge, first, previous)
    gate = place.effective(stored, skip)
    lam = plus(cotangent, decayed)
    d_gate = times(lam, previous)
    if skip is not None:
      d_gate = where(skip, constant(d_gate, 0), d_gate)
    if plan.kernel.log_gates:
      d_gate = times(d_gate, gate)
    place.store(dx, t, valid, lam)
    place.store(da, t, valid, d_gate)
    return times(gate, lam)

  place.store_end(ends, place.loop(load, body, place.load_end(
    starts, place.part)))  # fmt: skip
