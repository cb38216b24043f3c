"""A feed-forward layer with experts.

# b batch, t time, d width, k experts
"""

from typing import Any

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.parallel import experts as stacks
from thor.layers import NO_DROPOUT, Array, Dropout, Site
from thor.routing import row_shards
from thor.settings import Settings


def run_experts(
  settings: Settings,
  params: Any,
  x: Array,
  ids: Array | None,
  *,
  how: str,
  mask: Array,
  dropout: Dropout = NO_DROPOUT,
  sentence: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
  """A feed-forward layer with experts.

  Args:
    settings: the model's.
    params: `up` and `down`, a stack of `common.parallel.experts`; with
      `settings.gated` also `gate`.
    x: [b t d].
    ids: int [], [b] or [b t]; None with a gate, or with one expert.
    how: see `Routes`.
    mask: bool [b t], False where there is padding, which counts for nothing.
    dropout: of the hidden layer, and the key of the gate's jitter.
    sentence: [b d], what a gate looks at instead of x; see `sentence_means`.

  Returns:
    [b t d], and
      load: [k], the share of tokens that an expert was chosen for;
      kept: the share of them that it had room for;
      balance: k sum_i f_i P_i of the gate, f the load and P its mean
        probabilities: 1 where all are equal. 0 without a gate.
  """
  stack = {part: params[part] for part in ("up", "down")}
  weight, balance = None, jnp.zeros(())
  if settings.gated:
    asked = x if sentence is None else sentence[:, None]
    probs = gate_probs(params["gate"], asked, settings.jitter, dropout)
    probs = jnp.broadcast_to(probs, (*mask.shape, settings.experts))
    ids = jnp.argmax(probs, axis=-1) if ids is None else ids
    each = _by_token(ids, mask.shape)
    weight = jnp.take_along_axis(probs, each[..., None], axis=-1)
    balance = balance_loss(probs, ids, mask)
  if ids is None:
    if settings.experts > 1 and how != "averaged":
      raise UserError(
        f"a model of {settings.experts} experts needs routes: see "
        "thor.routing.train_routes and thor.dispatch"
      )
    ids = jnp.zeros((), jnp.int32)
  out, kept = _run(settings, stack, x, ids, how, mask, dropout)
  if weight is not None:
    out = out * weight.astype(out.dtype)
  report = {
    "load": load_of(ids, mask, settings.experts),
    "kept": kept,
    "balance": balance,
  }
  return out, report


def _run(
  settings: Settings,
  stack: Any,
  x: Array,
  ids: Array,
  how: str,
  mask: Array,
  dropout: Dropout,
) -> tuple[Array, Array]:
  """[b t d], and the share of tokens that had room."""
  rows, length, width = x.shape
  all_kept = jnp.ones(())
  activate, placement = settings.activate, _placement(settings)
  if how == "averaged":
    return stacks.averaged(stack, x, activation=activate), all_kept
  if how == "one":
    keep = dropout.keep(
      (rows, length, settings.hidden), settings.activation_dropout, Site.HIDDEN
    )
    out = stacks.selected(
      stack, x, ids, activation=activate, placement=placement,
      keep=None if keep is None else keep.astype(x.dtype),
    )  # fmt: skip
    return out, all_kept
  if dropout.key is not None:
    check_experts(settings, by_batch=False)
  if ids.ndim == 1:
    ids = _by_token(ids, (rows, length))
  if how == "capacity":
    train = dropout.key is not None
    factor = settings.capacity if train else settings.eval_capacity
    if factor:
      return _with_room(settings, stack, x, ids, mask, factor, placement)
    how = "grouped"
  run = stacks.balanced if how == "balanced" else stacks.grouped
  # Balanced ids are for a length that the experts divide.
  x = jnp.pad(x, ((0, 0), (0, ids.shape[1] - length), (0, 0)))
  out = run(
    stack, x.reshape(-1, width), ids.reshape(-1),
    activation=activate, placement=placement,
  )  # fmt: skip
  return out.reshape(rows, -1, width)[:, :length], all_kept


def check_experts(settings: Settings, *, by_batch: bool) -> None:
  """Refuses to drop hidden units that tokens of several experts share."""
  if settings.activation_dropout and not by_batch:
    raise UserError(
      f"model.activation_dropout={settings.activation_dropout} only works "
      "where one expert serves the whole batch: set it to 0"
    )


def _with_room(settings, stack, x, ids, mask, factor, placement):
  """Tokens of a group share their experts' room, earlier rows first."""
  groups = settings.groups
  if len(x) % groups:
    raise UserError(
      f"routing.groups={groups} does not divide the {len(x)} rows of a batch"
    )
  if placement is not None and groups % row_shards():
    raise UserError(
      f"routing.groups={groups} does not divide among the {row_shards()} "
      "devices that rows are cut along: choose a multiple"
    )
  size = x.shape[0] * x.shape[1] // groups
  out, has_room = stacks.capacity(
    stack, x.reshape(groups, size, -1), ids.reshape(groups, size),
    slots=stacks.capacity_of(size, settings.experts, factor),
    mask=mask.reshape(groups, size),
    activation=settings.activate, placement=placement,
  )  # fmt: skip
  kept = jnp.sum(has_room) / jnp.maximum(jnp.sum(mask), 1)
  return out.reshape(x.shape), kept


def _placement(settings: Settings) -> stacks.Placement | None:
  """Where stacks lie, inside a mesh whose expert axis has several devices."""
  sizes = jax.sharding.get_abstract_mesh().shape
  if sizes.get(settings.expert_axis, 1) == 1:
    return None
  return stacks.Placement(settings.expert_axis, ("data", "fsdp"))


def gate_probs(
  params: Any, x: Array, jitter: float, dropout: Dropout = NO_DROPOUT
) -> Array:
  """The gate's probabilities [b t k], in float32.

  Args:
    params: `kernel` [d k].
    x: [b t d].
    jitter: in training x is multiplied by uniform (1 - jitter, 1 + jitter).
    dropout: whose key the jitter takes.
  """
  x = x.astype(jnp.float32)
  if dropout.key is not None and jitter:
    key = jax.random.fold_in(dropout.key, int(Site.GATE))
    x = x * jax.random.uniform(
      key, x.shape, minval=1 - jitter, maxval=1 + jitter
    )
  return jax.nn.softmax(x @ params["kernel"].astype(jnp.float32))


def sentence_means(states: Array, mask: Array) -> Array:
  """Means over the tokens that are no padding, in float32.

  Args:
    states: [b s d].
    mask: bool [b s].

  Returns:
    [b d]; 0 where there is none.
  """
  weights = mask.astype(jnp.float32)[..., None]
  total = jnp.sum(states.astype(jnp.float32) * weights, axis=1)
  return total / jnp.maximum(jnp.sum(weights, axis=1), 1)


def load_of(ids: Array, mask: Array, experts: int) -> Array:
  """The share of tokens of each expert, [k].

  Args:
    ids: int [], [b] or [b t].
    mask: bool [b t], which tokens count.
    experts: k.
  """
  if ids.ndim == 2:
    ids = ids[:, : mask.shape[1]]
  ids = _by_token(ids, mask.shape)
  counts = jnp.zeros(experts).at[ids].add(mask.astype(jnp.float32))
  return counts / jnp.maximum(jnp.sum(mask), 1)


def _by_token(ids: Array, shape: tuple[int, ...]) -> Array:
  """Ids [], [b] or [b t] -> [b t]."""
  return jnp.broadcast_to(ids[:, None] if ids.ndim == 1 else ids, shape)


def balance_loss(probs: Array, ids: Array, mask: Array) -> Array:
  """The loss k sum_i f_i P_i (arXiv 2101.03961, eq. 4, without its factor).

  Args:
    probs: [b t k].
    ids: int [b t]; f has no gradient.
    mask: bool [b t], which tokens count.
  """
  experts = probs.shape[-1]
  load = jax.lax.stop_gradient(load_of(ids, mask, experts))
  weights = mask.astype(probs.dtype)[..., None]
  mean = jnp.sum(probs * weights, axis=(0, 1)) / jnp.maximum(jnp.sum(mask), 1)
  return experts * jnp.sum(load * mean)
