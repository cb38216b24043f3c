"""The linear recurrence h_t = a_t h_(t-1) + x_t, in several forms.

# B batch, T time, N channels, K gates

All forms keep one contract: the same values and the same gradients, a carry of
at least float32, outputs in the dtype of the input. They differ in speed and
memory; `common/parallel/README.md` says how to choose.

- `sequential`: one loop that overwrites its input row by row. On a CPU it is
  several times faster than a parallel scan, and it needs no temporaries.
- `associative`: `jax.lax.associative_scan`; logarithmic depth.
- `chunked`: saves the state at chunk boundaries only and runs the recurrence
  again inside each chunk during the backward pass, so that training keeps
  T / chunk states instead of T.
- `triton`, `mosaic`: one kernel for a GPU or a TPU; the state stays in
  registers or in VMEM while time streams by.

The gradients are written out. With g the cotangent of h and gT that of the
last state,

    lam_t = g_t + a_(t+1) lam_(t+1),   lam_(T-1) = g_(T-1) + gT
    dx_t = lam_t,   da_t = lam_t h_(t-1),   dh0 = a_0 lam_0

which is the same recurrence in the other direction. Nothing divides by a and
no product of gates is inverted, so gates may be 0.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from common.parallel import scan_dispatch, scan_sharded
from common.parallel.scan_choice import choose
from common.parallel.scan_dispatch import IMPLEMENTATIONS, KERNELS
from common.parallel.scan_forms import (
  Form,
  Saved,
  effective,
  shifted_bwd,
)

Array = jax.Array
DEFAULT_CHUNK = 256


def linear_scan(
  x: Array,
  a: Array,
  h0: Array | None = None,
  *,
  reverse: bool = False,
  reset: Array | None = None,
  impl: str = "auto",
  chunk: int | None = None,
  mesh_axis: str | None = None,
  log_gates: bool = False,
) -> tuple[Array, Array]:
  """Computes h_t = a_t * h_(t-1) + x_t for all t.

  Args:
    x: [B, T, N] the drive, real or complex.
    a: [B, T, N] the gates; or [B, T, K] where K divides N: gate k is that of
      channels k N/K to (k+1) N/K - 1, a head. Complex only if x is.
    h0: [B, N] the state before the first step; zeros if None.
    reverse: run from t = T-1 to 0; `h0` then enters at T-1.
    reset: bool [B, T]; where True, a_t counts as 0 (and gets no gradient).
    impl: one of `IMPLEMENTATIONS`. "auto" takes what was fastest where it was
      measured; see `common.parallel.scan_choice`. Kernels of another platform
      than the default one are run by Pallas' interpreter.
    chunk: steps in a chunk, for "chunked"; 256 if None.
    mesh_axis: an axis of the current mesh (`jax.set_mesh`) that time is
      sharded over. One all-gather, of 2 B N numbers a shard, joins the shards;
      the backward pass has one of B N.
    log_gates: `a` holds the logarithms of the gates; -inf is a gate of 0.

  Returns:
    `(h, h_last)`: [B, T, N] all states, in the dtype of `x`, and [B, N] the
    last one (the first in time if `reverse`), in the carry's dtype.

  Raises:
    ValueError: for shapes that do not fit, an unknown `impl`, or a mesh axis
      that is absent; names the argument. For second derivatives of "chunked"
      and along a mesh axis, which are not defined.
    TypeError: for dtypes that are not floating point, for real drives of
      complex gates, and for float16 with "mosaic".

  Derivatives are found in reverse, also second ones; `jax.jvp` has none.
  """
  x, a = jnp.asarray(x), jnp.asarray(a)
  h0, reset = (v if v is None else jnp.asarray(v) for v in (h0, reset))
  _check(x, a, h0, reset, impl, chunk)
  carry_dtype = jnp.promote_types(jnp.result_type(x, a), jnp.float32)
  if h0 is None:
    # Of a row, so that it lies where the row does; of an empty drive, anywhere.
    row = _placed(x)[:, 0] if x.shape[1] else jnp.zeros(x.shape[::2])
    h0 = jnp.zeros_like(row, carry_dtype)
  h0 = h0.astype(carry_dtype)
  if jnp.iscomplexobj(x):
    a = a.astype(carry_dtype)
  if mesh_axis is not None:
    scan_sharded.check_axis(x.shape, mesh_axis)
  if x.size == 0:
    return x, h0
  x, a, h0, reset = _alike(*map(_placed, (x, a, h0, reset)))
  if impl == "auto":
    batch, time, channels = x.shape
    impl = choose((batch, time, channels), x.dtype)
  form = Form(reverse, impl, chunk or DEFAULT_CHUNK, mesh_axis, log_gates)
  return _scan(form, x, a, h0, reset)


def _placed(array: Array | None) -> Any:
  """On the mesh, if that has explicit axes: what was made before is nowhere."""
  mesh = jax.sharding.get_abstract_mesh()
  if array is None or AxisType.Explicit not in mesh.axis_types:
    return array
  if not jax.typeof(array).sharding.mesh.empty:
    return array
  return jax.sharding.reshard(array, jax.P())


def _alike(*arrays: Array | None) -> list[Any]:
  """Arrays that vary over the same axes inside somebody's shard_map."""
  varying = [
    frozenset() if array is None else jax.typeof(array).manual_axis_type.varying
    for array in arrays
  ]
  every = frozenset().union(*varying)
  return [
    array
    if array is None or own == every
    else jax.lax.pcast(array, tuple(every - own), to="varying")
    for array, own in zip(arrays, varying)
  ]


def linear_scan_step(
  x: Array,
  a: Array,
  h: Array,
  *,
  reset: Array | None = None,
  log_gates: bool = False,
) -> Array:
  """One step of `linear_scan`, for decoding.

  Args:
    x: [B, N] the drive.
    a: [B, N] or [B, K] the gates.
    h: [B, N] the state before the step.
    reset: bool [B].
    log_gates: as for `linear_scan`.

  Returns:
    [B, N], the state after it, in the dtype of `h`.

  Raises:
    As `linear_scan`.
  """
  x, a, h = jnp.asarray(x), jnp.asarray(a), jnp.asarray(h)
  if x.ndim != 2:
    raise ValueError(f"x has shape {x.shape}; expected [B, N]")
  batch, channels = x.shape
  if a.ndim != 2 or len(a) != batch or channels % max(a.shape[1], 1):
    raise ValueError(
      f"a has shape {a.shape}; with x of shape {x.shape} it must be {x.shape}, "
      f"or {(batch,)} and a divisor of {channels}"
    )
  if h.shape != x.shape:
    raise ValueError(f"h has shape {h.shape}, and x {x.shape}")
  if reset is not None:
    reset = jnp.asarray(reset)
    if reset.shape != (batch,):
      raise ValueError(f"reset has shape {reset.shape}, and x {x.shape}")
  one = None if reset is None else reset[:, None]
  _check(x[:, None], a[:, None], h, one, "auto", None)
  dtype = jnp.promote_types(jnp.result_type(x, a), jnp.float32)
  form = Form(False, "sequential", 1, None, log_gates)
  gates = effective(form, a.astype(dtype), x.shape[1], reset)
  return (gates * h.astype(dtype) + x.astype(dtype)).astype(h.dtype)


def _check(
  x: Array,
  a: Array,
  h0: Array | None,
  reset: Array | None,
  impl: str,
  chunk: int | None,
) -> None:
  if impl not in IMPLEMENTATIONS:
    raise ValueError(f"impl={impl!r} is not one of {IMPLEMENTATIONS}")
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk={chunk} must be at least 1")
  if x.ndim != 3:
    raise ValueError(f"x has shape {x.shape}; expected [B, T, N]")
  batch, time, channels = x.shape
  if a.shape[:-1] != (batch, time) or not (
    a.shape[-1] == channels or (a.shape[-1] and channels % a.shape[-1] == 0)
  ):
    raise ValueError(
      f"a has shape {a.shape}; with x of shape {x.shape} it must be {x.shape}, "
      f"or {(batch, time)} and a divisor of {channels}"
    )
  for name, array, shape in (
    ("h0", h0, (batch, channels)),
    ("reset", reset, (batch, time)),
  ):
    if array is not None and array.shape != shape:
      raise ValueError(
        f"{name} has shape {array.shape}; with x of shape {x.shape} it must "
        f"be {shape}"
      )
  for name, array in (("x", x), ("a", a), ("h0", h0)):
    if array is None:
      continue
    if not jnp.issubdtype(array.dtype, jnp.inexact):
      raise TypeError(f"{name} is {array.dtype}; expected floating point")
    if jnp.iscomplexobj(array) and not jnp.iscomplexobj(x):
      raise TypeError(
        f"{name} is {array.dtype} and x {x.dtype}: make x complex"
      )
    if impl == "mosaic" and array.dtype == jnp.float16:
      raise TypeError(f"{name} is float16, which impl='mosaic' cannot read")
  if reset is not None and reset.dtype != jnp.bool_:
    raise TypeError(f"reset is {reset.dtype}; expected bool")


# -- derivatives -------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
  form: Form, x: Array, a: Array, h0: Array, reset: Array | None
) -> tuple[Array, Array]:
  h, last, _ = _forward(form, x, a, h0, reset)
  return h, last


def _forward(
  form: Form, x: Array, a: Array, h0: Array, reset: Array | None
) -> tuple[Array, Array, Saved]:
  sharded = form.mesh_axis is not None
  run = scan_sharded.forward if sharded else scan_dispatch.forward
  return run(form, x, a, h0, reset)


def _scan_fwd(
  form: Form, x: Array, a: Array, h0: Array, reset: Array | None
) -> tuple[tuple[Array, Array], Saved]:
  if _is_once(form):
    h, last, saved = _first_order(functools.partial(_forward, form), form)(
      x, a, h0, reset
    )
    h = _named(h)
    if saved.h is not None:
      saved = saved._replace(h=h)
    starts, decays = jax.tree.map(_named, (saved.starts, saved.decays))
    return (h, last), saved._replace(starts=starts, decays=decays)
  h, last = _scan(form, x, a, h0, reset)  # has a derivative of its own
  h = _named(h)
  return (h, last), Saved(a, reset, None, h, h0)


def _named(kept: Array) -> Array:
  """A name for policies of `jax.checkpoint`: with it nothing is scanned again.

  See `jax.checkpoint_policies.save_only_these_names`.
  """
  return checkpoint_name(kept, "linear_scan")


def _scan_bwd(
  form: Form, saved: Saved, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
  if _is_once(form):
    sharded = form.mesh_axis is not None
    run = scan_sharded.backward if sharded else scan_dispatch.backward
    back = _first_order(functools.partial(run, form), form)
    return *back(saved, *cotangents), None
  return *_gradient(form, saved, *cotangents), None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _is_once(form: Form) -> bool:
  """Whether there is a first derivative alone."""
  return form.mesh_axis is not None or form.impl == "chunked"


def _first_order(function: Any, form: Form) -> Any:
  """The function, whose derivative is an error that says what to do."""

  def refuse(*_: Any) -> Any:
    what = f"impl={form.impl!r}"
    if form.mesh_axis is not None:
      what = f"mesh_axis={form.mesh_axis!r}"
    raise ValueError(
      f"linear_scan with {what} has no second derivative: use "
      f"impl='sequential', or one of {('associative', *KERNELS)}, without a "
      "mesh axis"
    )

  once = jax.custom_vjp(function)
  once.defvjp(refuse, refuse)
  return once


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(
  form: Form, saved: Saved, g: Array, g_last: Array
) -> tuple[Array, Array, Array]:
  return scan_dispatch.backward(form, saved, g, g_last)


def _gradient_fwd(form: Form, saved: Saved, g: Array, g_last: Array) -> Any:
  return _gradient(form, saved, g, g_last), (saved, g, g_last)


def _gradient_bwd(form: Form, residuals: Any, cotangents: Any) -> Any:
  """The derivative of the same gradient, written as a scan."""

  def scan(reverse: bool, x: Array, gates: Array, start: Array) -> Array:
    own = form._replace(reverse=reverse, log_gates=False)
    return _scan(own, x, gates, start, None)[0]

  # Of the resets, which are bool, it gives what stands for no cotangent.
  _, pullback = jax.vjp(functools.partial(shifted_bwd, form, scan), *residuals)
  return pullback(cotangents)


_gradient.defvjp(_gradient_fwd, _gradient_bwd)
