"""The recurrence as a kernel for TPUs.

# b batch, t time, n channels

The grid is (b, channels, time) with time last, one block after the other. The
state stays in VMEM from block to block while the next block is on its way;
running from the end of time is a matter of which block comes when, and nothing
is ever flipped. Rows are read in groups that are aligned for every dtype, and a
group's steps are unrolled.

A gradient needs the state before each step. Of a block's first step that is in
the block before, of which 16 rows are read as well.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
PLATFORM = "tpu"
GROUP = 16  # rows that are aligned in float32 and in 16 bits


class Blocks(NamedTuple):
  """What is in VMEM at once.

  Five arrays of them twice, 10 MiB in float32, are what a gradient needs.

  Attributes:
    steps: of time, a multiple of 128.
    channels: a multiple of 256, of real numbers; half as many complex ones.
  """

  steps: int = 256
  channels: int = 1024


class _Plan(NamedTuple):
  """A kernel's sizes.

  Attributes:
    kernel: its task.
    count: planes of a number.
    length, channels: t and n.
    steps, lanes: of a block.
  """

  kernel: Kernel
  count: int
  length: int
  channels: int
  steps: int
  lanes: int

  @property
  def backwards(self) -> bool:
    """Whether time runs from its end."""
    return self.kernel.reverse != (self.kernel.task == "backward")

  @property
  def blocks(self) -> int:
    """Of time."""
    return divided(self.length, self.steps)

  def block(self, i: Any) -> Any:
    """The block of time that comes as number i."""
    return self.blocks - 1 - i if self.backwards else i


def run(
  kernel: Kernel,
  numbers: Sequence[Planes],
  reset: Array | None,
  dtypes: Sequence[str],
  *,
  blocks: Blocks | None = None,
) -> tuple[Planes, ...]:
  """Runs a task.

  Args:
    kernel: what is computed.
    numbers: the task's inputs; see `scan_kernel`.
    reset: bool [b t].
    dtypes: of the outputs.
    blocks: see `Blocks`.
  """
  first, count = numbers[0][0], len(numbers[0])
  batch, length, channels = first.shape
  blocks = blocks or Blocks()
  lanes = min(blocks.channels // count, channels)  # planes share the room
  plan = _Plan(kernel, count, length, channels, blocks.steps, lanes)
  if reset is not None:
    reset = reset.astype(jnp.int32)[:, None]
  body, kinds = _TASKS[kernel.task]
  ins, outs = (names.split() for names in kinds)
  if kernel.task == "backward":
    a, h, h0, g, g_last = numbers
    numbers = [a, h, h, h0, g, g_last]
  carry = jnp.promote_types(
    jnp.result_type(*(plane.dtype for own in numbers for plane in own)),
    jnp.float32,
  )
  shapes = {"step": (batch, length, channels), "end": (batch, 1, channels)}
  specs = _specs(plan)
  made = pl.pallas_call(
    functools.partial(body, plan),
    grid=(batch, divided(channels, lanes), plan.blocks),
    in_specs=(
      *((specs[kind],) * count for kind in ins),
      None if reset is None else specs["reset"],
    ),
    out_specs=tuple((specs[kind],) * count for kind in outs),
    out_shape=tuple(
      (shape_like(first, shapes[kind], dtype),) * count
      for kind, dtype in zip(outs, dtypes)
    ),
    scratch_shapes=([pltpu.VMEM((1, lanes), carry)] * (2 * count),),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=kernel.interpret,
    name=f"linear_scan_{kernel.task}",
  )(
    *(
      tuple(plane[:, None] if kind == "end" else plane for plane in own)
      for kind, own in zip(ins, numbers)
    ),
    reset,
  )
  return tuple(
    tuple(plane[:, 0] for plane in own) if kind == "end" else own
    for kind, own in zip(outs, made)
  )


def _specs(plan: _Plan) -> dict[str, pl.BlockSpec]:
  """Where the blocks of each kind of array are."""
  steps, lanes = plan.steps, plan.lanes
  last = divided(plan.length, GROUP) - 1

  def edge(b: Any, c: Any, i: Any) -> Any:
    """The rows next to a block, where the state before its steps is."""
    first = plan.block(i) * (steps // GROUP)
    next_to = first - 1 if plan.backwards else first + steps // GROUP
    return b, jnp.clip(next_to, 0, last), c

  return {
    "step": pl.BlockSpec(
      (1, steps, lanes), lambda b, c, i: (b, plan.block(i), c)
    ),
    "edge": pl.BlockSpec((1, GROUP, lanes), edge),
    "end": pl.BlockSpec((1, 1, lanes), lambda b, c, i: (b, 0, c)),
    "reset": pl.BlockSpec(
      (1, 1, steps),
      lambda b, c, i: (b, 0, plan.block(i)),
      memory_space=pltpu.SMEM,
    ),
  }


class _Block:
  """A block of time: its groups of rows, in the order in which time runs."""

  def __init__(self, plan: _Plan, reset: Any, carry: Any):
    self.plan, self.reset, self.carry = plan, reset, carry
    self.number = pl.program_id(2)
    self.first = plan.block(self.number) * plan.steps

  def loop(self, group: Any) -> None:
    """Calls `group` with the first row of each group, within the block."""
    groups = self.plan.steps // GROUP

    def body(i: Array, _: Any) -> None:
      own = groups - 1 - i if self.plan.backwards else i
      group(pl.multiple_of(own * GROUP, GROUP))

    jax.lax.fori_loop(0, groups, body, None)

  @property
  def order(self) -> range:
    """The rows of a group as time runs."""
    return range(GROUP)[:: -1 if self.plan.backwards else 1]

  def load(self, refs: Any, row: Array) -> Planes:
    """A group of rows, [GROUP lanes], 0 after the end of time."""
    valid = self._valid(row)
    return tuple(
      jnp.where(valid, ref[0, pl.ds(row, GROUP), :].astype(self.carry), 0)
      for ref in refs
    )

  def gates(self, refs: Any, row: Array) -> tuple[Planes, list[Any]]:
    """What is multiplied with, 1 after the end of time, and resets by row."""
    stored = self.load(refs, row)
    gate = exp(stored) if self.plan.kernel.log_gates else stored
    gate = where(self._valid(row), gate, constant(gate, 1))
    skips: list[Any] = [None] * GROUP
    if self.reset is not None:
      left = self.plan.length - self.first - row  # steps before the end
      skips = [
        (self.reset[0, 0, row + k] != 0) & (k < left) for k in range(GROUP)
      ]
    return gate, skips

  def store(self, refs: Any, row: Array, values: list[Planes]) -> None:
    """A group of rows, from values [1 lanes] in the order of time."""
    for plane, ref in enumerate(refs):
      rows = [values[self.order.index(k)][plane] for k in range(GROUP)]
      whole = jnp.concatenate(rows, axis=0)
      ref[0, pl.ds(row, GROUP), :] = whole.astype(ref.dtype)

  def _valid(self, row: Array) -> Array:
    shape = (GROUP, self.plan.lanes)
    steps = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return self.first + row + steps < self.plan.length


def _row(planes: Planes, k: int) -> Planes:
  return tuple(plane[k : k + 1] for plane in planes)


def _gate(planes: Planes, k: int, skip: Any) -> Planes:
  gate = _row(planes, k)
  return gate if skip is None else where(skip, constant(gate, 0), gate)


def _begin(block: _Block, scratch: Any, refs: Any) -> None:
  """Before the first block, the state is what is given."""

  @pl.when(block.number == 0)
  def _() -> None:
    for own, ref in zip(scratch, refs):
      own[...] = ref[0].astype(own.dtype)


def _finish(block: _Block, scratch: Any, refs: Any) -> None:
  @pl.when(block.number == block.plan.blocks - 1)
  def _() -> None:
    for own, ref in zip(scratch, refs):
      ref[0] = own[...].astype(ref.dtype)


def _read(scratch: Any) -> Planes:
  return tuple(own[...] for own in scratch)


def _write(scratch: Any, value: Planes) -> None:
  for own, plane in zip(scratch, value):
    own[...] = plane


def _forward(plan: _Plan, x, a, h0, reset, h, ends, scratch) -> None:
  state_ref = scratch[: plan.count]
  block = _Block(plan, reset, state_ref[0].dtype)
  _begin(block, state_ref, h0)

  def group(row: Array) -> None:
    drive, (gates, skips) = block.load(x, row), block.gates(a, row)
    state, made = _read(state_ref), []
    for k in block.order:
      gate = _gate(gates, k, skips[k])
      state = plus(times(gate, state), _row(drive, k))
      made.append(state)
    block.store(h, row, made)
    _write(state_ref, state)

  block.loop(group)
  _finish(block, state_ref, ends)


def _reduce(plan: _Plan, x, a, reset, states, decays, scratch) -> None:
  state_ref, decay_ref = scratch[: plan.count], scratch[plan.count :]
  block = _Block(plan, reset, state_ref[0].dtype)

  @pl.when(block.number == 0)
  def _() -> None:
    _write(state_ref, constant(_read(state_ref), 0))
    _write(decay_ref, constant(_read(decay_ref), 1))

  def group(row: Array) -> None:
    drive, (gates, skips) = block.load(x, row), block.gates(a, row)
    state, decay = _read(state_ref), _read(decay_ref)
    for k in block.order:
      gate = _gate(gates, k, skips[k])
      state = plus(times(gate, state), _row(drive, k))
      decay = times(gate, decay)
    _write(state_ref, state)
    _write(decay_ref, decay)

  block.loop(group)
  _finish(block, state_ref, states)
  _finish(block, decay_ref, decays)


def _backward(
  plan: _Plan, a, h, edge, h0, g, g_last, reset, dx, da, ends, scratch
) -> None:
  state_ref, reverse = scratch[: plan.count], plan.kernel.reverse
  block = _Block(plan, reset, state_ref[0].dtype)
  _begin(block, state_ref, g_last)
  began = plan.length - 1 if reverse else 0  # the forward pass
  # The state before the block's steps: next to it, or the very first one.
  outside = tuple(
    (ref[0, :1] if reverse else ref[0, GROUP - 1 :]).astype(own.dtype)
    for ref, own in zip(edge, state_ref)
  )
  initial = tuple(ref[0].astype(own.dtype) for ref, own in zip(h0, state_ref))

  def group(row: Array) -> None:
    cotangent, (gates, skips) = block.load(g, row), block.gates(a, row)
    own = block.load(h, row)
    beside = _beside(block, h, row, outside)
    decayed, lams, d_gates = _read(state_ref), [], []
    for k in block.order:
      nearest = k + 1 if reverse else k - 1
      within = 0 <= nearest < GROUP
      previous = _row(own, nearest) if within else beside
      previous = where(block.first + row + k == began, initial, previous)
      gate = _gate(gates, k, skips[k])
      lam = plus(_row(cotangent, k), decayed)
      d_gate = times(lam, previous)
      if skips[k] is not None:
        d_gate = where(skips[k], constant(d_gate, 0), d_gate)
      if plan.kernel.log_gates:
        d_gate = times(d_gate, gate)
      decayed = times(gate, lam)
      lams.append(lam)
      d_gates.append(d_gate)
    block.store(dx, row, lams)
    block.store(da, row, d_gates)
    _write(state_ref, decayed)

  block.loop(group)
  _finish(block, state_ref, ends)


def _beside(block: _Block, h: Any, row: Array, outside: Planes) -> Planes:
  """The state next to a group: of the next group, or outside the block."""
  plan = block.plan
  reverse, last = plan.kernel.reverse, plan.steps - GROUP
  other = jnp.clip(row + (GROUP if reverse else -GROUP), 0, last)
  group = block.load(h, pl.multiple_of(other, GROUP))
  found = _row(group, 0 if reverse else GROUP - 1)
  at_border = row == (last if reverse else 0)
  return where(at_border, outside, found)


_TASKS: dict[str, Any] = {
  "forward": (_forward, ("step step end", "step end")),
  "backward": (_backward, ("step step edge end step end", "step step end")),
  "reduce": (_reduce, ("step step", "end end")),
}
