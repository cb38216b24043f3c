"""The builder under the SAM family: optimizers that take a second gradient.

Each is an `optax.GradientTransformationExtraArgs` around a base optimizer:

    update(grads, state, params, *, grad_fn, due=None, **extra)
      -> (updates, state)

`grads` is the gradient at `params`; `grad_fn(params) -> grads | (grads, aux)`
takes it elsewhere, on the same batch. So the loop never sees the perturbed
weights, and step counts, logs, averages and checkpoints mean what they say.
`extra` and `grad_fn` are passed on to the base optimizer, `due` is not.

Periods. With `due=None` a member with a period (`every`, LookSAM's `k`) looks
at its count: one program, and in it a branch. XLA compiles the gradients of
convolutions well only outside branches and loops on the CPU; inside, a step
takes many times as long as its FLOPs say. With `due=True` or `due=False` the
caller decides instead, when the program is traced, and there is no branch: two
programs, and the host takes the one for its step. The count goes on in both;
the period is then the caller's. In the loop of `common.train`,
`common.step.StepChoice` does this.

    >>> import functools, jax, optax
    >>> from common.optim import look_sam
    >>> tx = look_sam(optax.sgd(0.1), k=5)
    >>> params = jax.numpy.array([3.0, -1.0])
    >>> state = tx.init(params)
    >>> @functools.partial(jax.jit, static_argnames="due")
    ... def step(params, state, due):
    ...   grad_fn = jax.grad(lambda params: (params**2).sum())
    ...   updates, state = tx.update(
    ...     grad_fn(params), state, params, grad_fn=grad_fn, due=due
    ...   )
    ...   return optax.apply_updates(params, updates), state
    >>> for i in range(20):
    ...   params, state = step(params, state, due=i % 5 == 0)
    >>> print(state.count, jax.numpy.abs(params).max() < 0.1)
    20 True

In a chain, what stands before acts on the first gradient only. To act on the
outcome (clipping, decay), put it into the base optimizer, or behind a member
whose base is `optax.identity()`.

Parameters in bfloat16 move to the nearest bfloat16 of w + e, which for a weight
far larger than its e is w: keep them in float32 if that is most of them.

Accumulation. `sam(optax.MultiSteps(base, n).gradient_transformation())`
perturbs with each micro-batch's own gradient and averages the outcomes.
`optax.MultiSteps(sam(base), n)` perturbs with the mean gradient, but evaluates
`grad_fn` in every micro-step and keeps what it returned in the last; it equals
one step on the large batch if, and only if, `grad_fn` is the gradient of the
mean over all n micro-batches. To accumulate both gradients outside and to call
`update` once costs less.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.errors import UserError
from common.optim.ascent import (
  Setting,
  add_scaled,
  check_settings,
  is_known,
  is_number,
  next_count,
  reject,
  scaled,
  value_at,
)

PyTree = Any
Mask = Any  # a tree of bools, a function that gives one, or None for all
GradFn = Callable[..., Any]  # (params) -> grads | (grads, aux)
Combine = Callable[[PyTree, PyTree, jax.Array], PyTree]  # (g, g_p, count)
Probe = Callable[[PyTree], tuple[PyTree, PyTree]]  # (params) -> (grads, aux)


class SharpnessState(NamedTuple):
  """State of every member of the family: arrays only.

  Attributes:
    count: int32 [], the number of updates done.
    base_state: the base optimizer's.
    memory: what the member remembers between updates: its ascent's state, and
      for LookSAM a direction like the parameters.
    aux: what `grad_fn` returned last beside its gradients; () without
      `aux_like`.
  """

  count: jax.Array
  base_state: Any
  memory: Any
  aux: Any


class Method(NamedTuple):
  """How a member makes one gradient.

  Attributes:
    init: `params -> memory`.
    full: `(grads, memory, params, probe, count) -> (out, memory, aux)`, with
      as many evaluations of `probe` as the method takes.
    cheap: `(grads, memory, params, count) -> (out, memory)`, without any.
  """

  init: Callable[[PyTree], PyTree]
  full: Callable[..., tuple[PyTree, PyTree, PyTree]]
  cheap: Callable[..., tuple[PyTree, PyTree]]


def second_gradient(
  grads: PyTree, perturbed_grads: PyTree, count: jax.Array
) -> PyTree:
  """What SAM makes of its two gradients: the second."""
  del grads, count
  return perturbed_grads


def gsam_combine(alpha: Setting = 0.2) -> Combine:
  """What GSAM makes of its two gradients.

      perp = g - (<g, g_p> / ||g_p||^2) g_p;   out = g_p - alpha perp

  Args:
    alpha: the weight of the gap, as for `gsam`.

  Returns:
    `(g, g_p, count) -> out`.

  Raises:
    UserError: for a negative `alpha`.
  """
  check_settings(alpha=alpha)

  def combine(grads, perturbed_grads, count):
    perp = reject(grads, perturbed_grads)
    return add_scaled(perturbed_grads, -value_at(alpha, count), perp)

  return combine


def sagm_combine() -> Combine:
  """What SAGM makes of its two gradients: (g + g_p) / 2."""

  def combine(grads, perturbed_grads, count):
    del count
    return scaled(add_scaled(grads, 1.0, perturbed_grads), 0.5)

  return combine


def sharpness_aware(
  base: optax.GradientTransformation,
  ascent: optax.GradientTransformation,
  combine: Combine = second_gradient,
  *,
  every: Setting = 1,
  mask: Mask = None,
  axis_name: Any = None,
  aux_like: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Builds an optimizer from an ascent and a way to combine two gradients.

      e = ascent(g);   out = combine(g, grad L(w + e));   base consumes out

  Args:
    base: the optimizer.
    ascent: gives e, in the direction of growing loss.
    combine: `(g, g_p, count) -> out`.
    every: take the second gradient in every so-many-th update, beginning with
      the first; the others hand g to the base and cost one gradient. It is a
      branch, unless `update` is given `due`.
    mask: True for the parameters to perturb, or a function from a tree like
      theirs to such a tree; a prefix will do. The norm goes over those alone.
      None perturbs all. Every parameter gets its second gradient.
    axis_name: m-sharpness, the SAM paper's own multi-device form, for use
      inside `jax.shard_map` over that axis (or axes). `grads` and `grad_fn`
      are then those of the *local* batch, differentiated with respect to
      `jax.lax.pcast(params, axis_name, to="varying")`. Each shard perturbs
      along its own gradient, and gradients are averaged over the axis before
      they are combined. What is optimized then depends on the number of
      devices. None, for global arrays under jit, perturbs along the gradient
      of the whole batch however it is sharded.
    aux_like: arrays or `jax.ShapeDtypeStruct`s like the aux of `grad_fn`
      (`jax.eval_shape(grad_fn, params)[1]`). The state then keeps the aux of
      the last evaluation, zeros before the first. None drops it. With
      `axis_name` it must agree on all shards.

  Returns:
    The transform; its state is a `SharpnessState`.

  Raises:
    UserError: for `every` below 1; from `update`, without `params` or
      `grad_fn`, if that returns something else than described, or for a `due`
      that is not known when the program is traced.
  """
  check_period(every=every)
  ascent = within(mask, ascent)
  mean = averager(axis_name)

  def full(grads, memory, params, probe, count):
    epsilon, memory = ascent.update(grads, memory, params)
    perturbed, aux = probe(optax.apply_updates(params, epsilon))
    return combine(mean(grads), mean(perturbed), count), memory, aux

  def cheap(grads, memory, params, count):
    del count
    _, memory = ascent.update(grads, memory, params)  # its count goes on
    return mean(grads), memory

  method = Method(ascent.init, full, cheap)
  return wrap(base, method, every=every, aux_like=aux_like)


def wrap(
  base: optax.GradientTransformation,
  method: Method,
  *,
  every: Setting,
  aux_like: PyTree | None,
) -> optax.GradientTransformationExtraArgs:
  """`method.full` in every so-many-th update, else `cheap`; then the base.

  `update` takes `due`, which decides in place of the count: see above.
  """
  base = optax.with_extra_args_support(base)
  always = is_known(every) and every == 1

  def init(params: PyTree) -> SharpnessState:
    like = () if aux_like is None else aux_like
    aux = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    count = jnp.zeros((), jnp.int32)
    return SharpnessState(count, base.init(params), method.init(params), aux)

  def update(updates, state, params=None, *, grad_fn=None, due=None, **extra):
    check_due(due)
    probe = _probe(grad_fn, updates, params, aux_like)
    count, memory = state.count, state.memory

    def full():
      return method.full(updates, memory, params, probe, count)

    def cheap():
      return *method.cheap(updates, memory, params, count), state.aux

    if due is None and always:
      due = True
    if due is None:
      is_turn = count % value_at(every, count) == 0
      out, memory, aux = jax.lax.cond(is_turn, full, cheap)
    else:
      out, memory, aux = full() if due else cheap()
    step, base_state = base.update(
      out, state.base_state, params, grad_fn=grad_fn, **extra
    )
    return step, SharpnessState(next_count(count), base_state, memory, aux)

  return optax.GradientTransformationExtraArgs(init, update)


def fill_masked(grad_fn: GradFn, params: PyTree) -> GradFn:
  """Makes a gradient function fit for a member inside a mask.

  `optax.masked` and `optax.multi_transform` show the transform inside only
  its own parameters. A member perturbs those alone, and needs the rest to
  evaluate the model:

      tx = optax.masked(sam(optax.sgd(0.1)), mask)
      tx.update(grads, state, params, grad_fn=fill_masked(grad_fn, params))

  Args:
    grad_fn: as the members take it.
    params: all parameters.

  Returns:
    A function of parameters with `optax.MaskedNode`s, which stand for the
    corresponding part of `params`; its gradients have them too.
  """

  def is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)

  def filled(masked: PyTree, *args: Any) -> Any:
    whole = jax.tree.map(
      lambda x, w: w if is_hole(x) else x, masked, params, is_leaf=is_hole
    )
    grads, aux, has_aux = _parts(grad_fn(whole, *args), params)
    grads = jax.tree.map(
      lambda x, g: x if is_hole(x) else g, masked, grads, is_leaf=is_hole
    )
    return (grads, aux) if has_aux else grads

  return filled


def within(
  mask: Mask, ascent: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`ascent` of the masked gradient: nothing outside moves or counts."""

  def update(updates, state, params=None):
    epsilon, state = ascent.update(zero_outside(mask, updates), state, params)
    return zero_outside(mask, epsilon), state

  return optax.GradientTransformation(ascent.init, update)


def zero_outside(mask: Mask, tree: PyTree) -> PyTree:
  """The tree with zeros where the mask, or its prefix, is False."""
  if mask is None:
    return tree

  def part(keep: bool, subtree: PyTree) -> PyTree:
    return subtree if keep else jax.tree.map(jnp.zeros_like, subtree)

  found = mask(tree) if callable(mask) else mask
  try:
    return jax.tree.map(part, found, tree)
  except ValueError:
    raise UserError(
      f"mask of {_shapes(found)} does not fit parameters of {_shapes(tree)}: "
      "give a tree of bools like theirs, or a prefix"
    ) from None


def averager(axis_name: Any) -> Callable[[PyTree], PyTree]:
  """The mean over a `shard_map` axis; nothing for None."""
  if axis_name is None:
    return lambda tree: tree
  return lambda tree: jax.lax.pmean(tree, axis_name)


def check_period(**settings: Setting) -> None:
  """Refuses periods that are no whole numbers from 1.

  Raises:
    UserError: names the setting and its value.
  """
  for name, value in settings.items():
    if is_known(value) and (
      not is_number(value) or value < 1 or value != int(value)
    ):
      raise UserError(f"{name}={value!r} must be a whole number from 1")


def check_due(due: Any) -> None:
  """Refuses what is neither None nor a bool of the host.

  Raises:
    UserError: names the remedy.
  """
  if due is not None and not isinstance(due, bool | np.bool_):
    raise UserError(
      f"due must be True, False or None, not a {type(due).__name__}: the host "
      "decides, so name it in static_argnames of jax.jit"
    )


def _probe(
  grad_fn: GradFn | None,
  grads: PyTree,
  params: PyTree | None,
  aux_like: PyTree | None,
) -> Probe:
  """`grad_fn` with its outcome checked, in the dtypes of `grads`."""
  if params is None or grad_fn is None:
    missing = "params" if params is None else "grad_fn"
    raise UserError(
      f"a second gradient needs {missing}: call "
      "update(grads, state, params, grad_fn=grad_fn)"
    )

  def probe(point: PyTree) -> tuple[PyTree, PyTree]:
    found, aux, has_aux = _parts(grad_fn(point), params)
    found = jax.tree.map(lambda x, like: x.astype(like.dtype), found, grads)
    if aux_like is None:
      return found, ()
    if not has_aux or not is_like(aux, aux_like):
      shown = _shapes(aux) if has_aux else "none"
      raise UserError(
        f"grad_fn's aux must be like aux_like, {_shapes(aux_like)}; got {shown}"
      )
    cast = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), aux, aux_like)
    return found, cast

  return probe


def _parts(result: Any, params: PyTree) -> tuple[PyTree, PyTree, bool]:
  """`(grads, aux, whether there is aux)` of what a `grad_fn` returned."""
  if is_like(result, params):
    return result, (), False
  if isinstance(result, tuple) and len(result) == 2:
    if is_like(result[0], params):
      return result[0], result[1], True
    if is_like(result[1], params):
      raise UserError(
        "grad_fn returned (value, grads); it must return grads or (grads, "
        "aux): use jax.grad, with has_aux=True for aux"
      )
  raise UserError(
    "grad_fn must return gradients like the parameters, "
    f"{_shapes(params)}, or (gradients, aux); got {_shapes(result)}"
  )


def is_like(tree: PyTree, other: PyTree) -> bool:
  """Whether two trees have the same structure and shapes."""
  return jax.tree.structure(tree) == jax.tree.structure(other) and all(
    jnp.shape(x) == y.shape
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other))
  )


def _shapes(tree: PyTree) -> str:
  shown = str(jax.tree.map(jnp.shape, tree))
  return shown if len(shown) <= 120 else f"{shown[:117]}..."
