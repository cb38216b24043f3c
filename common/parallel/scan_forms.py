"""The recurrence as loops and scans of XLA, with its gradient.

# b batch, t time, n channels, k gates (n, or fewer: one for several channels)

The functions here take what `common.parallel.scan.linear_scan` has checked.
Arrays keep the dtype they were given in; rows are computed in the carry's.

A loop on a CPU that slices or updates an array of a 16-bit float converts all
of it at every step, which takes time quadratic in t. Here such arrays go
through loops as their bits, and only a row at a time becomes numbers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Form(NamedTuple):
  """What is static in a scan.

  Attributes:
    reverse: from the last step to the first.
    impl: a form's name.
    chunk: steps of a chunk.
    mesh_axis: that time is sharded over, or None.
    log_gates: gates are stored as their logarithms.
  """

  reverse: bool
  impl: str
  chunk: int
  mesh_axis: str | None
  log_gates: bool


class Saved(NamedTuple):
  """What the backward pass needs.

  Attributes:
    a: gates as they were given.
    reset: or None.
    x: the drive, where states are computed again; else None.
    h: all states, in the dtype of the drive; None where x is kept.
    starts: h0, or the states that enter chunks.
    decays: of the shards, where time is sharded.
  """

  a: Array
  reset: Array | None
  x: Array | None
  h: Array | None
  starts: Array
  decays: Array | None = None


# -- gates -----------------------------------------------------------------


def spread(gates: Array, channels: int) -> Array:
  """Gates of every channel, [... k] -> [... n]."""
  count = gates.shape[-1]
  if count == channels:
    return gates
  return jnp.repeat(gates, channels // count, axis=-1)


def gathered(values: Array, count: int) -> Array:
  """Sums over the channels of a gate, [... n] -> [... k]."""
  if values.shape[-1] == count:
    return values
  return values.reshape(*values.shape[:-1], count, -1).sum(axis=-1)


def effective(
  form: Form, a: Array, channels: int, reset: Array | None
) -> Array:
  """The numbers that states are multiplied with.

  Args:
    form: says how gates are stored.
    a: [b t k] or [b k], in the carry's dtype.
    channels: n.
    reset: [b t] or [b], or None.

  Returns:
    [b t n] or [b n].
  """
  gates = spread(jnp.exp(a) if form.log_gates else a, channels)
  if reset is None:
    return gates
  return jnp.where(reset[..., None], jnp.zeros_like(gates), gates)


def of_stored(form: Form, d_gates: Array, gates: Array, count: int) -> Array:
  """The cotangent of stored gates, [... k], from those of `effective`.

  A reset has gate 0, so its logarithm's cotangent is 0 by itself; that of a
  gate is to be masked before.
  """
  if form.log_gates:
    d_gates = d_gates * gates
  return gathered(d_gates, count)


# -- sequential ------------------------------------------------------------


class Rows(NamedTuple):
  """Reads and writes rows of an array in a loop.

  Attributes:
    dtype: of the array.
    carry: that rows are computed in.
  """

  dtype: Any
  carry: Any

  @property
  def packed(self) -> bool:
    """Whether the array goes through loops as its bits."""
    return jnp.dtype(self.dtype).itemsize == 2

  def pack(self, array: Array) -> Array:
    """As it goes through the loop."""
    if not self.packed:
      return array
    return lax.bitcast_convert_type(array, jnp.uint16)

  def unpack(self, array: Array) -> Array:
    """As it was."""
    if not self.packed:
      return array
    return lax.bitcast_convert_type(array, self.dtype)

  def read(self, array: Array, t: Array) -> Array:
    """Row t, [b n]."""
    row = lax.dynamic_index_in_dim(array, t, axis=1, keepdims=False)
    return self.unpack(row).astype(self.carry)

  def write(self, array: Array, row: Array, t: Array) -> Array:
    """The array with another row t."""
    row = self.pack(row.astype(self.dtype))
    return lax.dynamic_update_index_in_dim(array, row, t, axis=1)


def _reset_row(reset: Array | None, t: Array) -> Array | None:
  if reset is None:
    return None
  return lax.dynamic_index_in_dim(reset, t, axis=1, keepdims=False)


def sequential(
  form: Form, x: Array, a: Array, h0: Array, reset: Array | None
) -> tuple[Array, Array]:
  """One loop that overwrites the drive with the states.

  Returns:
    All states in the dtype of x, and the last one in that of h0.
  """
  length, channels = x.shape[1:]
  drives, gates = Rows(x.dtype, h0.dtype), Rows(a.dtype, h0.dtype)
  packed = gates.pack(a)

  def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    h, buffer = carry  # rows not reached yet still hold x
    t = length - 1 - i if form.reverse else i
    stored = gates.read(packed, t)
    gate = effective(form, stored, channels, _reset_row(reset, t))
    h = gate * h + drives.read(buffer, t)
    return h, drives.write(buffer, h, t)

  last, h = lax.fori_loop(0, length, body, (h0, drives.pack(x)))
  return drives.unpack(h), last


def sequential_bwd(
  form: Form, saved: Saved, g: Array, g_last: Array
) -> tuple[Array, Array, Array]:
  """One loop the other way.

  Args:
    form: of the forward pass.
    saved: by it.
    g: the cotangent of all states.
    g_last: that of the last one.

  Returns:
    The cotangents of x, a and h0.
  """
  a, reset, _, h, h0, _ = saved
  assert h is not None
  length, channels = g.shape[1:]
  carry_dtype, count = g_last.dtype, a.shape[-1]
  gates, states = Rows(a.dtype, carry_dtype), Rows(h.dtype, carry_dtype)
  drives = Rows(g.dtype, carry_dtype)
  a, h, g = gates.pack(a), states.pack(h), drives.pack(g)
  before = 1 if form.reverse else -1

  def body(i: Array, carry: tuple[Array, Array, Array]) -> Any:
    decayed, dx, da = carry  # decayed = a_(t+1) lam_(t+1)
    t = i if form.reverse else length - 1 - i
    # Not from a buffer that holds g and is overwritten with dx: two updates
    # that read one of the updated buffers make XLA copy all of it every step.
    lam = drives.read(g, t) + decayed
    nearest = jnp.clip(t + before, 0, length - 1)
    previous = jnp.where(i == length - 1, h0, states.read(h, nearest))
    skip = _reset_row(reset, t)
    gate = effective(form, gates.read(a, t), channels, skip)
    d_gate = lam * previous
    if skip is not None:
      d_gate = jnp.where(skip[:, None], jnp.zeros_like(d_gate), d_gate)
    d_gate = of_stored(form, d_gate, gate, count)
    return gate * lam, drives.write(dx, lam, t), gates.write(da, d_gate, t)

  dh0, dx, da = lax.fori_loop(
    # lam_(T-1) = g_(T-1) + gT, since the gate after the end counts as 1.
    0, length, body, (g_last, jnp.zeros_like(g), jnp.zeros_like(a))
  )  # fmt: skip
  return drives.unpack(dx), gates.unpack(da), dh0


def sequential_reduce(
  form: Form, reverse: bool, x: Array, a: Array, reset: Array | None
) -> tuple[Array, Array]:
  """See `reduced`."""
  length, channels = x.shape[1:]

  def row(array: Array, t: Array) -> Array:
    return lax.dynamic_index_in_dim(array, t, axis=1, keepdims=False)

  def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    state, decay = carry
    t = length - 1 - i if reverse else i
    gate = effective(form, row(a, t), channels, _reset_row(reset, t))
    return gate * state + row(x, t), gate * decay

  zero, one = jnp.zeros_like(x[:, 0]), jnp.ones_like(x[:, 0])
  return lax.fori_loop(0, length, body, (zero, one))


def joined(
  reverse: bool, states: Array, decays: Array, first: Array
) -> tuple[Array, Array]:
  """The states between parts of time.

  Args:
    reverse: whether the last part comes first.
    states: [b parts n], what each makes of a zero state.
    decays: likewise, the product of its gates. It may have overflowed: of a
      state that is 0 nothing is left all the same, as in the loop.
    first: [b n], the state that enters the first part.

  Returns:
    [b parts n], the states that enter the parts, and [b n], the one that leaves
    the last.
  """

  def step(state: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
    own, decay = part
    carried = jnp.where(state == 0, jnp.zeros_like(state), decay * state)
    return carried + own, state

  parts = jnp.swapaxes(states, 0, 1), jnp.swapaxes(decays, 0, 1)
  last, before = lax.scan(step, first, parts, reverse=reverse)
  return jnp.swapaxes(before, 0, 1), last


# -- associative -----------------------------------------------------------


def _combine(left: tuple, right: tuple) -> tuple:
  a_left, x_left = left
  a_right, x_right = right
  return a_left * a_right, a_right * x_left + x_right


def scanned(reverse: bool, x: Array, gates: Array, h0: Array) -> Array:
  """`jax.lax.associative_scan`; all states, in the dtype of h0."""
  first = -1 if reverse else 0
  x = x.at[:, first].add(gates[:, first] * h0)
  _, h = lax.associative_scan(_combine, (gates, x), reverse=reverse, axis=1)
  return h


def associative(
  form: Form, x: Array, a: Array, h0: Array, reset: Array | None
) -> tuple[Array, Array]:
  """As `sequential`."""
  xs, stored = x.astype(h0.dtype), a.astype(h0.dtype)
  gates = effective(form, stored, x.shape[-1], reset)
  h = scanned(form.reverse, xs, gates, h0)
  return h.astype(x.dtype), h[:, 0 if form.reverse else -1]


def shifted(array: Array, edge: Array, *, later: bool) -> Array:
  """Every row moves one step later (or earlier); `edge` fills the gap."""
  edge = edge[:, None]
  if later:
    return jnp.concatenate([edge, array[:, :-1]], axis=1)
  return jnp.concatenate([array[:, 1:], edge], axis=1)


def associative_bwd(
  form: Form, saved: Saved, g: Array, g_last: Array
) -> tuple[Array, Array, Array]:
  """As `sequential_bwd`."""
  return shifted_bwd(form, scanned, saved, g, g_last)


def shifted_bwd(
  form: Form, scan: Any, saved: Saved, g: Array, g_last: Array
) -> tuple[Array, Array, Array]:
  """The gradient by one scan over arrays that were shifted by a step.

  Arguments as for `sequential_bwd`, and `scan`: as `scanned`, whose arrays are
  all in the carry's dtype.
  """
  a, reset, _, h, h0, _ = saved
  assert h is not None
  reverse, carry_dtype = form.reverse, g_last.dtype
  gates = effective(form, a.astype(carry_dtype), g.shape[-1], reset)
  following = shifted(gates, jnp.ones_like(h0), later=reverse)
  lam = scan(not reverse, g.astype(carry_dtype), following, g_last)
  previous = shifted(h.astype(carry_dtype), h0, later=not reverse)
  d_gates = lam * previous
  if reset is not None:
    d_gates = jnp.where(reset[..., None], jnp.zeros_like(d_gates), d_gates)
  da = of_stored(form, d_gates, gates, a.shape[-1])
  first = -1 if reverse else 0
  dh0 = gates[:, first] * lam[:, first]
  return lam.astype(g.dtype), da.astype(a.dtype), dh0


def associative_reduce(
  form: Form, reverse: bool, x: Array, a: Array, reset: Array | None
) -> tuple[Array, Array]:
  """See `reduced`."""
  pair = effective(form, a, x.shape[-1], reset), x
  decay, state = lax.associative_scan(_combine, pair, reverse=reverse, axis=1)
  last = 0 if reverse else -1
  return state[:, last], decay[:, last]


# -- chunked ---------------------------------------------------------------


def _to_chunks(array: Array, chunk: int, reverse: bool, fill: Any) -> Array:
  """[b t ...] -> [chunks b chunk ...], padded where the scan ends."""
  pad = -array.shape[1] % chunk
  if pad:
    widths = [(0, 0)] * array.ndim
    widths[1] = (pad, 0) if reverse else (0, pad)
    array = jnp.pad(array, widths, constant_values=fill)
  batch, time, *rest = array.shape
  return jnp.swapaxes(array.reshape(batch, time // chunk, chunk, *rest), 0, 1)


def _from_chunks(array: Array, length: int, reverse: bool) -> Array:
  chunks, batch, chunk, *rest = array.shape
  array = jnp.swapaxes(array, 0, 1).reshape(batch, chunks * chunk, *rest)
  return array[:, -length:] if reverse else array[:, :length]


class _Chunks:
  """Cuts arrays into chunks of bits, which a scan slices at no cost."""

  def __init__(self, form: Form, length: int):
    self.size = min(form.chunk, length)
    self.form, self.length = form, length

  def cut(self, array: Array, fill: float = 0) -> Array:
    rows = Rows(array.dtype, array.dtype)
    bits = rows.pack(jnp.full((), fill, array.dtype))
    return _to_chunks(rows.pack(array), self.size, self.form.reverse, bits)

  def gates(self, a: Array) -> Array:
    # A padded step has gate 1 and drive 0: it hands the state on.
    return self.cut(a, 0 if self.form.log_gates else 1)

  def reset(self, reset: Array | None) -> Array | None:
    if reset is None:
      return None
    return _to_chunks(reset, self.size, self.form.reverse, False)

  def join(self, array: Array, dtype: Any) -> Array:
    whole = _from_chunks(array, self.length, self.form.reverse)
    return Rows(dtype, dtype).unpack(whole)


def chunked(
  form: Form, x: Array, a: Array, h0: Array, reset: Array | None
) -> tuple[Array, Array, Array]:
  """As `sequential`, chunk by chunk.

  Returns:
    All states, the last one, and those that enter the chunks,
    [chunks b n].
  """
  cut, drives, gates = _Chunks(form, x.shape[1]), *_both(x, a, h0)

  def body(state: Array, part: tuple) -> tuple[Array, tuple]:
    x, a, reset = part
    h, last = sequential(form, drives.unpack(x), gates.unpack(a), state, reset)
    return last, (drives.pack(h), state)

  parts = cut.cut(x), cut.gates(a), cut.reset(reset)
  last, (h, starts) = lax.scan(body, h0, parts, reverse=form.reverse)
  return cut.join(h, x.dtype), last, starts


def _both(x: Array, a: Array, h0: Array) -> tuple[Rows, Rows]:
  return Rows(x.dtype, h0.dtype), Rows(a.dtype, h0.dtype)


def chunked_bwd(
  form: Form, saved: Saved, g: Array, g_last: Array
) -> tuple[Array, Array, Array]:
  """Computes the states of one chunk after the other again."""
  x, a, length = saved.x, saved.a, g.shape[1]
  assert x is not None
  cut, drives, gates = _Chunks(form, length), *_both(x, a, g_last)

  def body(decayed: Array, part: tuple) -> tuple[Array, tuple]:
    x, a, reset, start, g = part
    x, a, g = drives.unpack(x), gates.unpack(a), drives.unpack(g)
    h, _ = sequential(form, x, a, start, reset)
    own = Saved(a, reset, None, h, start)
    dx, da, decayed = sequential_bwd(form, own, g, decayed)
    return decayed, (drives.pack(dx), gates.pack(da))

  parts = (
    cut.cut(x), cut.gates(a), cut.reset(saved.reset), saved.starts, cut.cut(g)
  )  # fmt: skip
  dh0, (dx, da) = lax.scan(body, g_last, parts, reverse=not form.reverse)
  return cut.join(dx, g.dtype), cut.join(da, a.dtype), dh0
