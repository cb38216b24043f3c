"""The linear recurrence h_t = a_t h_(t-1) + x_t, in several forms.

# b batch, t time, n channels

All forms keep one contract: the same values and the same gradients, a carry of
at least float32, outputs in the dtype of the input. They differ in speed and
memory:

- `sequential`: one loop that overwrites its input row by row. On a CPU it is
  several times faster than a parallel scan, and it needs no temporaries.
- `associative`: `jax.lax.associative_scan`; logarithmic depth.
- `chunked`: saves the state at chunk boundaries only and runs the recurrence
  again inside each chunk during the backward pass, so that training keeps
  t / chunk states instead of t.

The gradients are written out. With g the cotangent of h and gT that of the
last state,

    lam_t = g_t + a_(t+1) lam_(t+1),   lam_(T-1) = g_(T-1) + gT
    dx_t = lam_t,   da_t = lam_t h_(t-1),   dh0 = a_0 lam_0

which is the same recurrence in the other direction. Nothing divides by a and
no product of gates is inverted, so gates may be 0.

Time may be sharded. What a shard does to a state is one affine map, so each
shard first reduces its part to (state, decay): what it makes of a zero state,
and the product of its gates. One all-gather of these tells every shard the
state that enters it, and it runs as if it were alone. The backward pass does
the same from the other end, where the decays are the same ones.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

IMPLEMENTATIONS = ("auto", "sequential", "associative", "chunked")
DEFAULT_CHUNK = 256


def linear_scan(
  x: jax.Array,
  a: jax.Array,
  h0: jax.Array | None = None,
  *,
  reverse: bool = False,
  reset: jax.Array | None = None,
  impl: str = "auto",
  chunk: int | None = None,
  mesh_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes h_t = a_t * h_(t-1) + x_t for all t.

  Args:
    x: [B, T, N] the drive.
    a: [B, T, N] the gates.
    h0: [B, N] the state before the first step; zeros if None.
    reverse: run from t = T-1 to 0; `h0` then enters at T-1.
    reset: bool [B, T]; where True, a_t counts as 0 (and gets no gradient).
    impl: one of `IMPLEMENTATIONS`. "auto" is sequential on a CPU and
      associative elsewhere.
    chunk: steps in a chunk, for "chunked"; 256 if None.
    mesh_axis: an axis of the current mesh (`jax.set_mesh`) that time is
      sharded over. One all-gather, of 2 B N numbers a shard, joins the shards;
      the backward pass has one of B N.

  Returns:
    `(h, h_last)`: [B, T, N] all states, in the dtype of `x`, and [B, N] the
    last one (the first in time if `reverse`), in the carry's dtype.

  Raises:
    ValueError: for shapes that do not fit, an unknown `impl`, or a mesh axis
      that is absent; names the argument.
    TypeError: for dtypes that are not floating point.
  """
  x, a = jnp.asarray(x), jnp.asarray(a)
  _check(x, a, h0, reset, impl, chunk)
  carry_dtype = jnp.promote_types(jnp.result_type(x, a), jnp.float32)
  if h0 is None:
    # Like x, also in what it varies over inside somebody's shard_map.
    h0 = jnp.zeros_like(x, carry_dtype, shape=(x.shape[0], x.shape[2]))
  h0 = h0.astype(carry_dtype)
  if mesh_axis is not None:
    _check_axis(x.shape, mesh_axis)
  if x.shape[1] == 0:
    return x, h0
  if impl == "auto":
    impl = "sequential" if jax.default_backend() == "cpu" else "associative"
  form = _Form(reverse, impl, chunk or DEFAULT_CHUNK, mesh_axis)
  return _scan(form, x, a, h0, reset)


def _check(x, a, h0, reset, impl: str, chunk: int | None) -> None:
  if impl not in IMPLEMENTATIONS:
    raise ValueError(f"impl={impl!r} is not one of {IMPLEMENTATIONS}")
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk={chunk} must be at least 1")
  if x.ndim != 3:
    raise ValueError(f"x has shape {x.shape}; expected [B, T, N]")
  batch, time, channels = x.shape
  for name, array, shape in (
    ("a", a, x.shape),
    ("h0", h0, (batch, channels)),
    ("reset", reset, (batch, time)),
  ):
    if array is not None and array.shape != shape:
      raise ValueError(
        f"{name} has shape {array.shape}; with x of shape {x.shape} it must "
        f"be {shape}"
      )
  for name, array in (("x", x), ("a", a), ("h0", h0)):
    if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
      raise TypeError(f"{name} is {array.dtype}; expected floating point")
  if reset is not None and reset.dtype != jnp.bool_:
    raise TypeError(f"reset is {reset.dtype}; expected bool")


class _Form(NamedTuple):
  """What is static in a scan."""

  reverse: bool
  impl: str
  chunk: int
  mesh_axis: str | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(form: _Form, x, a, h0, reset):
  return _scan_fwd(form, x, a, h0, reset)[0]


def _scan_fwd(form: _Form, x, a, h0, reset):
  forward = _forward if form.mesh_axis is None else _sharded_forward
  h, last, saved = forward(form, x, a, h0, reset)
  return (h.astype(x.dtype), last), saved


def _scan_bwd(form: _Form, saved, cotangents):
  backward = _backward if form.mesh_axis is None else _sharded_backward
  return *backward(form, saved, *cotangents), None


_scan.defvjp(_scan_fwd, _scan_bwd)


class _Saved(NamedTuple):
  """What the backward pass needs; the inputs keep their dtype."""

  a: jax.Array
  reset: jax.Array | None
  x: jax.Array | None  # chunked recomputes h from it
  h: jax.Array | None  # the others keep h
  starts: jax.Array  # h0, or the states that enter the chunks
  decays: jax.Array | None = None  # of the shards


def _forward(form: _Form, x, a, h0, reset):
  """Returns h in the carry's dtype, the last state and a `_Saved`."""
  # Cast whole arrays: a loop that slices or updates a bf16 buffer converts all
  # of it at every step on a CPU.
  xs, gates = x.astype(h0.dtype), a.astype(h0.dtype)
  if form.impl == "chunked":
    h, last, starts = _chunked(form, xs, gates, h0, reset)
    return h, last, _Saved(a, reset, x, None, starts)
  scan = _sequential if form.impl == "sequential" else _associative
  h, last = scan(form.reverse, xs, gates, h0, reset)
  return h, last, _Saved(a, reset, None, h, h0)


def _backward(form: _Form, saved: _Saved, g, g_last):
  """Returns the cotangents of x, a and h0."""
  gates, gs = saved.a.astype(g_last.dtype), g.astype(g_last.dtype)
  if form.impl == "chunked":
    dx, da, dh0 = _chunked_bwd(form, saved, gates, gs, g_last)
  else:
    is_loop = form.impl == "sequential"
    scan_bwd = _sequential_bwd if is_loop else _associative_bwd
    dx, da, dh0 = scan_bwd(
      form.reverse, gates, saved.h, saved.starts, saved.reset, gs, g_last
    )
  return dx.astype(g.dtype), da.astype(saved.a.dtype), dh0


# -- sequential ----------------------------------------------------------------


def _row(array: jax.Array, t: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(array, t, axis=1, keepdims=False)


def _with_row(array: jax.Array, row: jax.Array, t: jax.Array) -> jax.Array:
  return lax.dynamic_update_index_in_dim(array, row, t, axis=1)


def _masked(gate: jax.Array, reset: jax.Array | None, t: jax.Array):
  """The gate of one step; masking a row inside the loop is free."""
  if reset is None:
    return gate
  return jnp.where(_row(reset, t)[:, None], jnp.zeros_like(gate), gate)


def _sequential(reverse, x, a, h0, reset):
  length = x.shape[1]

  def body(i, carry):
    h, buffer = carry  # rows not reached yet still hold x
    t = length - 1 - i if reverse else i
    h = _masked(_row(a, t), reset, t) * h + _row(buffer, t)
    return h, _with_row(buffer, h, t)

  last, h = lax.fori_loop(0, length, body, (h0, x))
  return h, last


def _sequential_bwd(reverse, a, h, h0, reset, g, g_last):
  length = g.shape[1]
  before = 1 if reverse else -1

  def body(i, carry):
    decayed, dx, da = carry  # decayed = a_(t+1) lam_(t+1)
    t = i if reverse else length - 1 - i
    # Not from a buffer that holds g and is overwritten with dx: two updates
    # that read one of the updated buffers make XLA copy all of it every step.
    lam = _row(g, t) + decayed
    previous = jnp.where(
      i == length - 1, h0, _row(h, jnp.clip(t + before, 0, length - 1))
    )
    da = _with_row(da, _masked(lam * previous, reset, t), t)
    return _masked(_row(a, t), reset, t) * lam, _with_row(dx, lam, t), da

  # lam_(T-1) = g_(T-1) + gT, since the gate after the end counts as 1.
  zeros = jnp.zeros_like(g)
  dh0, dx, da = lax.fori_loop(0, length, body, (g_last, zeros, zeros))
  return dx, da, dh0


# -- associative ---------------------------------------------------------------


def _gates(a: jax.Array, reset: jax.Array | None) -> jax.Array:
  return a if reset is None else jnp.where(reset[:, :, None], 0.0, a)


def _combine(left, right):
  a_left, x_left = left
  a_right, x_right = right
  return a_left * a_right, a_right * x_left + x_right


def _associative(reverse, x, a, h0, reset):
  a = _gates(a, reset)
  first = -1 if reverse else 0
  x = x.at[:, first].add(a[:, first] * h0)
  _, h = lax.associative_scan(_combine, (a, x), reverse=reverse, axis=1)
  return h, h[:, 0 if reverse else -1]


def _shift(array: jax.Array, edge: jax.Array, *, later: bool) -> jax.Array:
  """Every row moves one step later (or earlier); `edge` fills the gap."""
  edge = edge[:, None]
  if later:
    return jnp.concatenate([edge, array[:, :-1]], axis=1)
  return jnp.concatenate([array[:, 1:], edge], axis=1)


def _associative_bwd(reverse, a, h, h0, reset, g, g_last):
  a = _gates(a, reset)
  one = jnp.ones_like(h0)
  following = _shift(a, one, later=reverse)
  lam, _ = _associative(not reverse, g, following, g_last, None)
  previous = _shift(h, h0, later=not reverse)
  da = lam * previous
  if reset is not None:
    da = jnp.where(reset[:, :, None], 0.0, da)
  first = -1 if reverse else 0
  return lam, da, a[:, first] * lam[:, first]


# -- chunked -------------------------------------------------------------------


def _to_chunks(array: jax.Array, chunk: int, reverse: bool, fill) -> jax.Array:
  """[B, T, ...] -> [chunks, B, chunk, ...], padded where the scan ends."""
  pad = -array.shape[1] % chunk
  widths = [(0, 0)] * array.ndim
  widths[1] = (pad, 0) if reverse else (0, pad)
  array = jnp.pad(array, widths, constant_values=fill)
  batch, time, *rest = array.shape
  return jnp.swapaxes(array.reshape(batch, time // chunk, chunk, *rest), 0, 1)


def _from_chunks(array: jax.Array, length: int, reverse: bool) -> jax.Array:
  chunks, batch, chunk, *rest = array.shape
  array = jnp.swapaxes(array, 0, 1).reshape(batch, chunks * chunk, *rest)
  return array[:, -length:] if reverse else array[:, :length]


def _chunks(chunk, reverse, x, a, reset):
  # A padded step has gate 1 and drive 0: it hands the state on.
  return (
    _to_chunks(x, chunk, reverse, 0),
    _to_chunks(a, chunk, reverse, 1),
    None if reset is None else _to_chunks(reset, chunk, reverse, False),
  )


def _chunked(form: _Form, x, a, h0, reset):
  def body(state, part):
    x, a, reset = part
    h, last = _sequential(form.reverse, x, a, state, reset)
    return last, (h, state)

  length = x.shape[1]
  parts = _chunks(min(form.chunk, length), form.reverse, x, a, reset)
  last, (h, starts) = lax.scan(body, h0, parts, reverse=form.reverse)
  return _from_chunks(h, length, form.reverse), last, starts


def _chunked_bwd(form: _Form, saved: _Saved, a, g, g_last):
  reverse, length = form.reverse, g.shape[1]
  chunk = min(form.chunk, length)

  def body(decayed, part):
    (x, a, reset), start, g = part
    h, _ = _sequential(reverse, x, a, start, reset)
    dx, da, decayed = _sequential_bwd(reverse, a, h, start, reset, g, decayed)
    return decayed, (dx, da)

  assert saved.x is not None
  x = saved.x.astype(g.dtype)
  parts = _chunks(chunk, reverse, x, a, saved.reset)
  gs = _to_chunks(g, chunk, reverse, 0)
  dh0, (dx, da) = lax.scan(
    body, g_last, (parts, saved.starts, gs), reverse=not reverse
  )
  dx, da = (_from_chunks(d, length, reverse) for d in (dx, da))
  return dx, da, dh0


# -- sharded along time --------------------------------------------------------


def _check_axis(shape: tuple[int, ...], axis: str) -> None:
  mesh = jax.sharding.get_abstract_mesh()
  if axis not in mesh.axis_names:
    raise ValueError(
      f"mesh_axis={axis!r} is not an axis of the current mesh "
      f"{mesh.axis_names}; enter it with jax.set_mesh"
    )
  if shape[1] % mesh.shape[axis]:
    raise ValueError(
      f"x has shape {shape}: its {shape[1]} steps do not divide among the "
      f"{mesh.shape[axis]} shards of mesh_axis={axis!r}"
    )


def _saved_specs(form: _Form) -> Any:
  time, chunked = jax.P(None, form.mesh_axis), form.impl == "chunked"
  specs: Any = _Saved  # specs in the places of arrays
  return specs(
    a=time,
    reset=time,
    x=time if chunked else None,
    h=None if chunked else time,
    starts=jax.P(form.mesh_axis),  # [shards * chunks, B, N], 1 chunk if not
    decays=jax.P(),
  )


def _shard_map(form: _Form, function, in_specs, out_specs):
  # What all-gathered numbers give is the same on all shards, which the check
  # of varying axes cannot see.
  return jax.shard_map(
    function,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names={form.mesh_axis},
    check_vma=False,
  )


@functools.partial(jax.jit, static_argnums=0)
def _sharded_forward(form: _Form, x, a, h0, reset):
  time = jax.P(None, form.mesh_axis)

  def local(x, a, h0, reset):
    state, decay = _reduce(
      form, form.reverse, x.astype(h0.dtype), a.astype(h0.dtype), reset
    )
    states, decays = lax.all_gather((state, decay), form.mesh_axis, axis=1)
    start, last = _enter(form, form.reverse, states, decays, h0)
    h, _, saved = _forward(form, x, a, start, reset)
    if form.impl != "chunked":
      saved = saved._replace(starts=start[None])
    return h, last, saved._replace(decays=decays)

  return _shard_map(
    form,
    local,
    in_specs=(time, time, jax.P(), time),
    out_specs=(time, jax.P(), _saved_specs(form)),
  )(x, a, h0, reset)


@functools.partial(jax.jit, static_argnums=0)
def _sharded_backward(form: _Form, saved: _Saved, g, g_last):
  time = jax.P(None, form.mesh_axis)

  def local(saved, g, g_last):
    # a_t lam_t = a_t (a_(t+1) lam_(t+1)) + a_t g_t: the forward pass's gates.
    a = _gates(saved.a.astype(g_last.dtype), saved.reset)
    drive = a * g.astype(g_last.dtype)
    state, _ = _reduce(form, not form.reverse, drive, a, None)
    states = lax.all_gather(state, form.mesh_axis, axis=1)
    decayed, dh0 = _enter(form, not form.reverse, states, saved.decays, g_last)
    if form.impl != "chunked":
      saved = saved._replace(starts=saved.starts[0])
    dx, da, _ = _backward(form, saved, g, decayed)
    return dx, da, dh0

  return _shard_map(
    form,
    local,
    in_specs=(_saved_specs(form), time, jax.P()),
    out_specs=(time, time, jax.P()),
  )(saved, g, g_last)


def _reduce(form: _Form, reverse: bool, x, a, reset):
  """What [B, T, N] steps make of a zero state, and the product of the gates."""
  zero, one = jnp.zeros_like(x[:, 0]), jnp.ones_like(x[:, 0])
  if form.impl == "associative":
    pair = (_gates(a, reset), x)
    decay, state = lax.associative_scan(_combine, pair, reverse=reverse, axis=1)
    last = 0 if reverse else -1
    return state[:, last], decay[:, last]
  length = x.shape[1]

  def body(i, carry):
    state, decay = carry
    t = length - 1 - i if reverse else i
    gate = _masked(_row(a, t), reset, t)
    return gate * state + _row(x, t), gate * decay

  return lax.fori_loop(0, length, body, (zero, one))


def _enter(form: _Form, reverse: bool, states, decays, first):
  """The state that enters this shard, and the one that leaves the last.

  Args:
    form: names the axis.
    reverse: whether the last shard in time comes first.
    states: [B, shards, N], as `decays`: from `_reduce`, of all shards.
    decays: likewise.
    first: [B, N], the state that enters the first shard.
  """
  after, last = _sequential(reverse, states, decays, first, None)
  before = _shift(after, first, later=not reverse)
  return _row(before, lax.axis_index(form.mesh_axis)), last
