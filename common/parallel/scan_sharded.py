"""The recurrence over time that is sharded over an axis of a mesh.

What a shard does to a state is one affine map, so each shard first reduces its
part to (state, decay): what it makes of a zero state, and the product of its
gates. One all-gather of these, 2 B N numbers a shard, tells every shard the
state that enters it, and it runs as if it were alone. The backward pass does
the same from the other end, where the decays are the same ones: B N numbers.
"""

import functools
from typing import Any

import jax
from jax import lax

from common.parallel import scan_dispatch as forms
from common.parallel.scan_forms import (
  Form,
  Saved,
  effective,
  joined,
)

Array = jax.Array


def check_axis(shape: tuple[int, ...], axis: str) -> None:
  """Refuses an axis that is absent or does not divide time.

  Raises:
    ValueError: names it.
  """
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


def _saved_specs(form: Form) -> Any:
  time, chunked = jax.P(None, form.mesh_axis), form.impl == "chunked"
  specs: Any = Saved  # specs in the places of arrays
  return specs(
    a=time,
    reset=time,
    x=time if chunked else None,
    h=None if chunked else time,
    starts=jax.P(form.mesh_axis),  # [shards * chunks, B, N], 1 chunk if not
    decays=jax.P(),
  )


def _shard_map(form: Form, function: Any, in_specs: Any, out_specs: Any) -> Any:
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
def forward(
  form: Form, x: Array, a: Array, h0: Array, reset: Array | None
) -> tuple[Array, Array, Saved]:
  """As `scan_dispatch.forward`."""
  time = jax.P(None, form.mesh_axis)

  def local(x: Array, a: Array, h0: Array, reset: Array | None) -> Any:
    state, decay = forms.reduced(
      form, form.reverse, x.astype(h0.dtype), a.astype(h0.dtype), reset
    )
    states, decays = lax.all_gather((state, decay), form.mesh_axis, axis=1)
    start, last = _enter(form, form.reverse, states, decays, h0)
    h, _, saved = forms.forward(form, x, a, start, reset)
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
def backward(
  form: Form, saved: Saved, g: Array, g_last: Array
) -> tuple[Array, Array, Array]:
  """As `scan_dispatch.backward`."""
  time = jax.P(None, form.mesh_axis)

  def local(saved: Saved, g: Array, g_last: Array) -> Any:
    # a_t lam_t = a_t (a_(t+1) lam_(t+1)) + a_t g_t: the forward pass's gates.
    gates = effective(
      form, saved.a.astype(g_last.dtype), g.shape[-1], saved.reset
    )
    drive = gates * g.astype(g_last.dtype)
    plain = form._replace(log_gates=False)
    state, _ = forms.reduced(plain, not form.reverse, drive, gates, None)
    states = lax.all_gather(state, form.mesh_axis, axis=1)
    decayed, dh0 = _enter(form, not form.reverse, states, saved.decays, g_last)
    if form.impl != "chunked":
      saved = saved._replace(starts=saved.starts[0])
    dx, da, _ = forms.backward(form, saved, g, decayed)
    return dx, da, dh0

  return _shard_map(
    form,
    local,
    in_specs=(_saved_specs(form), time, jax.P()),
    out_specs=(time, time, jax.P()),
  )(saved, g, g_last)


def _enter(
  form: Form, reverse: bool, states: Array, decays: Array | None, first: Array
) -> tuple[Array, Array]:
  """The state that enters this shard, and the one that leaves the last.

  Args:
    form: names the axis.
    reverse: whether the last shard in time comes first.
    states: [B, shards, N], as `decays`: of all shards.
    decays: likewise.
    first: [B, N], the state that enters the first shard.
  """
  assert decays is not None
  before, last = joined(reverse, states, decays, first)
  index = lax.axis_index(form.mesh_axis)
  return lax.dynamic_index_in_dim(before, index, axis=1, keepdims=False), last
