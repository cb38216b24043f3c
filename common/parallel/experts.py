"""A stack of feed-forward experts: which of them runs on which token.

# e experts, d width, f hidden width, n tokens, p devices along `axis`

    F_k(x) = act(x W_up[k] + b_up[k]) W_down[k] + b_down[k]

A stack is `{"up": {"kernel" [e d f], "bias" [e f]}, "down": {"kernel" [e f d],
"bias" [e d]}}`. Five ways to use it, none of which computes what it throws
away:

    selected     one expert for all tokens, its number traced: slice, multiply
    balanced     each token its own, all equally often: e equal slots
    grouped      each token its own, any loads: sorted by expert
    capacity     each token its own, at most c a group (Switch)
    averaged     the mean of all outputs

Over a mesh, in bytes that a device sends for each layer forward, with b bytes a
number, w = 2 d f and n tokens on a device:

    selected     the hidden width is cut. The chosen slice is gathered, and its
                 gradient reduce-scattered: w b (p - 1) / p
    balanced     the experts are cut. Tokens travel there and back, equally
                 many to each device: 2 n d b (p - 1) / p
    capacity     the same, for e c slots a group in place of n tokens
    grouped      the hidden width is cut. Tokens are gathered, and their outputs
                 reduce-scattered: 2 n d b (p - 1)

The backward pass sends as much again. The bias of the hidden layer travels with
the slice, the tokens' experts with gathered tokens, and the gradient of a bias
that all devices have is added up. Where the batch is also cut along other axes,
over r devices, these add up gradients, as with any layer: 2 w b / p (r - 1) / r
for `selected`, e times that for the others.

So `selected` moves less than `balanced` as soon as a device has more tokens
than the experts have hidden units. Indexing a stack that is cut along its
experts would gather the whole of it, and nothing here does.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.parallel.experts_grouped import feed_forward_by_expert, form_for

Array = jax.Array
Stack = Mapping[str, Mapping[str, Array]]
Activation = Callable[[Array], Array]


class Placement(NamedTuple):
  """Where a stack and its tokens are cut.

  Attributes:
    axis: the mesh axis that the stack is cut along.
    batch_axes: those that the tokens' first dimension is cut along; `axis` is
      one of them.
  """

  axis: str
  batch_axes: tuple[str, ...]


def selected(
  stack: Stack,
  x: Array,
  expert: Array,
  *,
  activation: Activation = jax.nn.relu,
  keep: Array | None = None,
  placement: Placement | None = None,
) -> Array:
  """One expert for everything.

  Args:
    stack: the experts; with `placement` cut along f.
    x: [..., d]; with `placement` cut along its first dimension.
    expert: int scalar, traced: one program serves all experts.
    activation: of the hidden layer.
    keep: [..., f], what the hidden layer is multiplied by, such as a dropout
      mask.
    placement: inside `jax.set_mesh`; None: as the compiler likes.

  Returns:
    [..., d].

  Raises:
    UserError: for dimensions that the axis does not divide.
  """
  if placement is None:
    return _feed_forward(_slice(stack, expert), x, activation, keep)
  axis = placement.axis
  _check_divides(stack["up"]["kernel"].shape[2], "hidden units", axis)

  def local(stack: Stack, x: Array, keep: Array | None, expert: Array):
    # Its gradient is scattered before the other axes add theirs to it.
    one = _vary(_slice(stack, expert), placement)
    gather = functools.partial(jax.lax.all_gather, axis_name=axis, tiled=True)
    one = {
      "up": {
        "kernel": gather(one["up"]["kernel"], axis=1),
        "bias": gather(one["up"]["bias"], axis=0),
      },
      "down": {
        "kernel": gather(one["down"]["kernel"], axis=0),
        "bias": one["down"]["bias"],
      },
    }
    return _feed_forward(one, x, activation, keep)

  return _on_shards(local, placement, _cut_hidden)(stack, x, keep, expert)


def balanced(
  stack: Stack,
  x: Array,
  ids: Array,
  *,
  activation: Activation = jax.nn.relu,
  placement: Placement | None = None,
) -> Array:
  """Each token its own expert, all experts equally often.

  Args:
    stack: the experts; with `placement` cut along e.
    x: [n d]; with `placement` cut along n.
    ids: int [n]. In what a device holds of them every expert occurs equally
      often; else outputs are wrong. See `balanced_ids`.
    activation: of the hidden layer.
    placement: inside `jax.set_mesh`; None: as the compiler likes.

  Returns:
    [n d].

  Raises:
    UserError: for tokens or experts that do not divide.
  """
  experts = stack["up"]["kernel"].shape[0]

  def to_slots(x: Array, ids: Array) -> tuple[Array, Array]:
    if len(x) % experts:
      raise UserError(
        f"balanced: {len(x)} tokens do not divide among {experts} experts: pad "
        "them"
      )
    order = jnp.argsort(ids, stable=True)
    return x[order].reshape(experts, -1, x.shape[-1]), order

  def from_slots(slots: Array, order: Array) -> Array:
    flat = slots.reshape(-1, slots.shape[-1])
    return jnp.zeros_like(flat).at[order].set(flat, unique_indices=True)

  if placement is None:
    slots, order = to_slots(x, ids)
    return from_slots(_all_experts(stack, slots, activation), order)
  axis = placement.axis
  _check_divides(experts, "experts", axis)

  def local(stack: Stack, x: Array, ids: Array) -> Array:
    slots, order = to_slots(x, ids)
    return from_slots(_travel(stack, slots, activation, axis), order)

  return _on_shards(local, placement, _cut_experts)(stack, x, ids)


def balanced_ids(key: Array, rows: int, length: int, num_experts: int) -> Array:
  """Random experts, each equally often in every row.

  However the rows are cut, `balanced` may take what a device has of them.

  Args:
    key: of the draw.
    rows: b.
    length: t, rounded up to a multiple of the experts.
    num_experts: e.

  Returns:
    int32 [b t]. Each token's expert is uniform.
  """
  length = -(-length // num_experts) * num_experts
  even = jnp.arange(length, dtype=jnp.int32) % num_experts
  shuffle = functools.partial(jax.random.permutation, x=even)
  return jax.vmap(shuffle)(jax.random.split(key, rows))


def capacity_of(tokens: int, num_experts: int, factor: float) -> int:
  """Room of an expert in a group: n / e * factor, rounded up, at least 1."""
  return max(1, math.ceil(tokens / num_experts * factor))


def capacity(
  stack: Stack,
  x: Array,
  ids: Array,
  *,
  slots: int,
  mask: Array | None = None,
  activation: Activation = jax.nn.relu,
  placement: Placement | None = None,
) -> tuple[Array, Array]:
  """Each token its own expert, as long as that has room.

  Args:
    stack: the experts; with `placement` cut along e.
    x: [g n d]: tokens in groups, which share no room; with `placement` cut
      along g.
    ids: int [g n].
    slots: c, of each expert in each group. Earlier tokens come first.
    mask: bool [g n]; where False a token takes no room and gets 0.
    activation: of the hidden layer.
    placement: inside `jax.set_mesh`; None: as the compiler likes.

  Returns:
    [g n d], 0 where there was no room; and bool [g n], True where there was.

  Raises:
    UserError: for groups or experts that do not divide.
  """
  experts = stack["up"]["kernel"].shape[0]
  if mask is None:
    mask = jnp.ones(ids.shape, bool)
  slot = jax.vmap(functools.partial(_slot_of, experts=experts, slots=slots))(
    ids, mask
  )
  has_room = slot < experts * slots

  def to_slots(x: Array, slot: Array) -> Array:
    """[g n d] -> [e (g c) d]; what has no room falls off the end."""
    room = jnp.zeros((experts * slots, x.shape[-1]), x.dtype)
    filled = jax.vmap(lambda x, slot: room.at[slot].set(x, mode="drop"))(
      x, slot
    )
    by_expert = filled.reshape(len(x), experts, slots, x.shape[-1])
    return jnp.swapaxes(by_expert, 0, 1).reshape(experts, -1, x.shape[-1])

  def from_slots(out: Array, slot: Array) -> Array:
    by_group = out.reshape(experts, len(slot), slots, out.shape[-1])
    flat = jnp.swapaxes(by_group, 0, 1).reshape(
      len(slot), experts * slots, out.shape[-1]
    )
    take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
    return jax.vmap(take)(flat, slot)

  if placement is None:
    out = _all_experts(stack, to_slots(x, slot), activation)
    return from_slots(out, slot), has_room
  axis = placement.axis
  _check_divides(experts, "experts", axis)

  def local(stack: Stack, x: Array, slot: Array) -> Array:
    out = _travel(stack, to_slots(x, slot), activation, axis)
    return from_slots(out, slot)

  out = _on_shards(local, placement, _cut_experts)(stack, x, slot)
  return out, has_room


def _slot_of(ids: Array, mask: Array, *, experts: int, slots: int) -> Array:
  """Each token's place among e c, or e c if there is none; by position."""
  ids = jnp.where(mask, ids, experts)
  order = jnp.argsort(ids, stable=True)
  starts = jnp.searchsorted(ids[order], jnp.arange(experts + 1))
  rank_in_order = jnp.arange(len(ids)) - starts[ids[order]]
  rank = jnp.zeros_like(ids).at[order].set(rank_in_order.astype(ids.dtype))
  fits = (ids < experts) & (rank < slots)
  return jnp.where(fits, ids * slots + rank, experts * slots)


def grouped(
  stack: Stack,
  x: Array,
  ids: Array,
  *,
  activation: Activation = jax.nn.relu,
  placement: Placement | None = None,
) -> Array:
  """Each token its own expert, whatever the loads.

  Tokens are sorted by expert, and each expert's multiplied with its kernels:
  see `experts_grouped`.

  Args:
    stack: the experts; with `placement` cut along f.
    x: [n d]; with `placement` cut along n.
    ids: int [n].
    activation: of the hidden layer.
    placement: inside `jax.set_mesh`; None: as the compiler likes.

  Returns:
    [n d].

  Raises:
    UserError: for dimensions that the axis does not divide.
  """
  form = form_for(None if placement is None else placement.batch_axes)
  if placement is None:
    return feed_forward_by_expert(stack, x, ids, activation, form)
  axis = placement.axis
  _check_divides(stack["up"]["kernel"].shape[2], "hidden units", axis)

  def local(stack: Stack, x: Array, ids: Array) -> Array:
    x = jax.lax.all_gather(x, axis, tiled=True)
    ids = jax.lax.all_gather(ids, axis, tiled=True)
    stack = _vary(stack, placement)
    # The bias of the output once, not from every device.
    first = (jax.lax.axis_index(axis) == 0).astype(x.dtype)
    down = {**stack["down"], "bias": stack["down"]["bias"] * first}
    stack = {**stack, "down": down}
    out = feed_forward_by_expert(stack, x, ids, activation, form)
    return jax.lax.psum_scatter(out, axis, tiled=True)

  opaque = form is not None and form.opaque
  return _on_shards(local, placement, _cut_hidden, opaque)(stack, x, ids)


def averaged(
  stack: Stack, x: Array, *, activation: Activation = jax.nn.relu
) -> Array:
  """The mean of all experts' outputs: e times the work.

  Args:
    stack: the experts.
    x: [..., d].
    activation: of the hidden layer.

  Returns:
    [..., d].
  """

  def add(total: Array, one: Stack) -> tuple[Array, None]:
    return total + _feed_forward(one, x, activation), None

  total, _ = jax.lax.scan(add, jnp.zeros_like(x), dict(stack))
  return total / stack["up"]["kernel"].shape[0]


def mean_expert(stack: Stack) -> Stack:
  """One expert, of the mean weights: a stack with e = 1."""
  return jax.tree.map(lambda leaf: leaf.mean(axis=0, keepdims=True), stack)


def _slice(stack: Stack, expert: Array) -> dict:
  """The arrays of one expert."""
  take = functools.partial(
    jax.lax.dynamic_index_in_dim, index=expert, axis=0, keepdims=False
  )
  return jax.tree.map(take, dict(stack))


def _feed_forward(
  one: Stack, x: Array, activation: Activation, keep: Array | None = None
) -> Array:
  """[..., d] -> [..., d] by one expert."""
  hidden = _plus(x @ one["up"]["kernel"], one["up"]["bias"])
  hidden = activation(hidden)
  if keep is not None:
    hidden = hidden * keep
  return _plus(hidden @ one["down"]["kernel"], one["down"]["bias"])


def _plus(x: Array, bias: Array) -> Array:
  return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _all_experts(stack: Stack, slots: Array, activation: Activation) -> Array:
  """[e c d] -> [e c d], each expert its own slots."""
  up, down = stack["up"], stack["down"]
  hidden = jnp.einsum("ecd,edf->ecf", slots, up["kernel"])
  hidden = activation(hidden + up["bias"][:, None])
  out = jnp.einsum("ecf,efd->ecd", hidden, down["kernel"])
  return out + down["bias"][:, None]


def _travel(
  stack: Stack, slots: Array, activation: Activation, axis: str
) -> Array:
  """[e c d] -> [e c d], by the devices that have the experts."""
  exchange = functools.partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
  there = exchange(slots, split_axis=0, concat_axis=1)
  out = _all_experts(stack, there, activation)
  return exchange(out, split_axis=1, concat_axis=0)


def _on_shards(
  local: Callable[..., Array],
  placement: Placement,
  cut: Callable[[str], dict],
  opaque: bool = False,
) -> Callable[..., Array]:
  """`local(stack, x, of_rows, *same)` on what every device has of the stack
  and of the rows; what follows is the same on all. `opaque`: the types of
  `local` do not say what differs between devices.

  All axes of the mesh are taken: where some are left to the compiler, XLA's for
  the CPU ends the process at a sum of bfloat16 numbers between devices.
  """
  rows = jax.P(placement.batch_axes)

  def call(stack: Stack, x: Array, of_rows: Array | None, *same: Array):
    specs = (cut(placement.axis), rows, rows, *(jax.P() for _ in same))
    return jax.shard_map(
      local,
      in_specs=specs,
      out_specs=rows,
      check_vma=not opaque,
    )(stack, x, of_rows, *same)

  return call


def _vary(tree: Stack, placement: Placement) -> dict:
  """The same inside `_on_shards`, with a gradient of its own on each device.

  Else the first use of an array that several devices have adds up what they
  all say of its gradient, whatever comes before.
  """

  others = tuple(a for a in placement.batch_axes if a != placement.axis)
  vary = functools.partial(jax.lax.pcast, axis_name=others, to="varying")
  return jax.tree.map(vary, dict(tree)) if others else dict(tree)


def _cut_hidden(axis: str) -> dict:
  """Where a stack lies that is cut along f."""
  return {
    "up": {"kernel": jax.P(None, None, axis), "bias": jax.P(None, axis)},
    "down": {"kernel": jax.P(None, axis), "bias": jax.P()},
  }


def _cut_experts(axis: str) -> dict:
  """Where a stack lies that is cut along e."""
  one = {"kernel": jax.P(axis), "bias": jax.P(axis)}
  return {"up": one, "down": one}


def _check_divides(count: int, what: str, axis: str) -> None:
  size = jax.sharding.get_abstract_mesh().shape[axis]
  if count % size:
    raise UserError(
      f"{count} {what} do not divide among the {size} devices along "
      f"mesh.{axis}: choose a multiple, or another mesh"
    )
