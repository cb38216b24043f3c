"""UDIM as gradients for any optimizer, and as an optax transform.

A step has up to four gradients:

    1     g = grad L(theta; x)                         eps = rho g / ||g||
    2     G = grad L(theta + eps; x); grad_x L in the same backward pass
    3, 4  T = grad of the inconsistency at theta, through the perturbed half
          and through the source half, whose forward pass is that of 1

and gives G + lambda1 * T to the base optimizer. Any other member of the SAM
family can take SAM's place, GAM with its four gradients too. FLOPs in units of
one gradient, of which a forward pass is a third:

    a step of SAM, or one without the term             2
    "fast" and "plain"; a dropout mask a pass          3.7;  4
    the same with `detach_source`                      3;    3.4
    "exact"                                            5.0;  5.3
    `accum` micro-batches, "fast"                      4.7
    `term_images` of half the images, "fast"           3

Some steps have the term and some have not (`start_step`, `every`, a schedule of
`lambda1`). Decided from the step's number that is a branch in the program. XLA
compiles the gradients of convolutions well only outside branches on the CPU:
inside, a step takes many times as long as its FLOPs say. With `due` the host
decides, and there are two programs without a branch:

    step = jax.jit(step, static_argnames="due")
    for i in range(num_steps):
      params, state = step(params, state, batch(i), due=cfg.is_due(i))

where `step` hands `due` on to `update`, or to the function of `udim_grads`.

arXiv 2403.07329; the authors' `iada/iada_final.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common import tree
from common.errors import UserError
from common.optim.ascent import (
  add_scaled,
  climb,
  is_number,
  make_ascent,
  scaled,
  state_after,
  value_at,
)
from common.optim.second_pass import check_due, is_like, sharpness_aware
from common.optim.sharpness import sam
from udim.heads import HeadLoss
from udim.passes import (
  ApplyFn,
  Batch,
  Metrics,
  slow_data_grad,
  udim_passes,
)
from udim.settings import UdimConfig

PyTree = Any
TermFn = Callable[[PyTree, jax.Array], tuple[PyTree, Metrics]]
DataGradFn = Callable[[PyTree, PyTree], jax.Array]
# Of the last update; the first two are 0 unless the caller gives them.
STATE_METRICS = (
  "loss", "sam_loss", "grad_norm", "term_grad_norm", "pen", "gn",
  "perturbation_rms", "active",
)  # fmt: skip


class UdimState(NamedTuple):
  """State of `udim`.

  Attributes:
    count: int32, updates done.
    base_state: the base optimizer's.
    metrics: scalars of the last update: `loss` (the `value` that `update` was
      given) and `grad_norm` of the first gradient; `sam_loss` at the perturbed
      parameters; `active`, 1 if it had the term and 0 if not; and of the term
      (0 without) `term_grad_norm`, `pen`, `gn` and `perturbation_rms`.
    member_state: that of the member of the SAM family.
  """

  count: jax.Array
  base_state: optax.OptState
  metrics: Metrics
  member_state: PyTree


def udim(
  base: optax.GradientTransformation,
  cfg: UdimConfig,
  *,
  member: optax.GradientTransformationExtraArgs | None = None,
) -> optax.GradientTransformationExtraArgs:
  """SAM plus `lambda1` times the inconsistency, before any base optimizer.

  Example:
    ```python
    cfg = UdimConfig(rho_x=0.5, clip_range=(0.0, 1.0))
    tx = udim(optax.adam(1e-3), cfg)
    passes_of = udim_passes(apply_fn, "head", cfg)

    @jax.jit
    def step(params, state, batch, rng):
      passes = passes_of(params, batch, rng, state.count)
      updates, state = tx.update(passes.grads, state, params, **passes.fns)
      return optax.apply_updates(params, updates), state
    ```

  `update(updates, state, params, *, grad_fn, inconsistency_grad_fn)` evaluates
  `grad_fn` once and, where the step has the term, `inconsistency_grad_fn`
  once: with the gradient it is given, 2 gradients or 4. Its arguments:

    updates: gradients of the loss at `params`.
    grad_fn: `params -> (grads, data_grad [b, ...])`, of one backward pass; as
      a third part it may give metrics, such as `{"sam_loss": loss}`.
    inconsistency_grad_fn: `(params, data_grad) -> (grads, metrics)`, with at
      least the scalars `pen`, `gn` and `perturbation_rms`.
    data_grad_fn: optional, `(params, eps) -> data_grad`, for `cfg.data_grad`
      "exact" or "plain". Without it `grad_fn` is evaluated for these.
    cfg: optional, the settings that the functions follow; refused if they are
      others than the transform's.
    value: optional, the loss at `params`; for the metrics, and for a base
      optimizer that wants it.
    due: optional bool, static: whether this step has the term, in place of
      `start_step`, `every` and a schedule of `lambda1`. `cfg.is_due` tells. A
      `lambda1` of 0 has no term in any case.

  Args:
    base: the optimizer.
    cfg: the settings. What concerns images, losses and heads is up to
      `inconsistency_grad_fn`.
    member: what takes SAM's place, of `common.optim` around
      `optax.identity()`; the term is added to what it makes:

          udim(base, cfg, member=gam(optax.identity()))

      The data ascends at the first point where it takes a gradient. It does
      its whole work in every step: a period of its own is not used. `cfg.rho`
      is then no more than the radius of `mode` "perturbed_sam".

  Returns:
    The transform. Inside `optax.MultiSteps` only the first gradient would
    accumulate: give `udim_passes` its `accum` instead.

  Raises:
    UserError: for a `member` beside `reference_quirks`; from `update`,
      without parameters, functions or those metrics, for a `grad_fn` that
      gives something else, for functions of other settings, and for a `due`
      that is not known when the program is traced.
  """
  own_cfg = cfg.resolved()
  member = _choose_member(own_cfg, member)
  base = optax.with_extra_args_support(base)

  def init(params: PyTree) -> UdimState:
    metrics = {name: jnp.zeros(()) for name in STATE_METRICS}
    count = jnp.zeros((), jnp.int32)
    return UdimState(count, base.init(params), metrics, member.init(params))

  def update(
    updates,
    state,
    params=None,
    *,
    grad_fn=None,
    inconsistency_grad_fn=None,
    data_grad_fn=None,
    cfg=None,
    due=None,
    **extra,
  ):
    if params is None or grad_fn is None or inconsistency_grad_fn is None:
      raise UserError(
        "udim: update needs params, grad_fn and inconsistency_grad_fn: pass "
        "them, such as those of `udim_passes`"
      )
    if cfg is not None and cfg != own_cfg:
      raise UserError(
        f"udim: update's functions follow other settings than the transform, "
        f"{_difference(cfg, own_cfg)}: give both the same UdimConfig"
      )
    if data_grad_fn is None:
      data_grad_fn = functools.partial(
        slow_data_grad, own_cfg.data_grad, lambda params: grad_fn(params)[1]
      )
    total, member_state, metrics = _combine(
      own_cfg,
      state.count,
      updates,
      params,
      member=member,
      member_state=state.member_state,
      second_pass=functools.partial(_second_pass, grad_fn, params),
      term_fn=inconsistency_grad_fn,
      data_grad_fn=data_grad_fn,
      due=due,
    )
    metrics = _for_state(metrics, state.metrics, value=extra.get("value"))
    updates, base_state = base.update(total, state.base_state, params, **extra)
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, UdimState(count, base_state, metrics, member_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _difference(first: UdimConfig, second: UdimConfig) -> str:
  """The first setting that differs, and both values."""
  for field in dataclasses.fields(UdimConfig):
    one, other = (getattr(cfg, field.name) for cfg in (first, second))
    if one != other:
      return f"{field.name}={one!r} and {other!r}"
  return "none"


def _second_pass(
  grad_fn: Callable[[PyTree], Any], like: PyTree, params: PyTree
) -> tuple[PyTree, jax.Array, Metrics]:
  """`grads, data_grad, metrics` of what `grad_fn` gives."""
  found = grad_fn(params)
  holds = isinstance(found, tuple) and len(found) in (2, 3)
  if not holds or not is_like(found[0], like) or not is_number(found[1]):
    shown = str(jax.tree.map(jnp.shape, found))
    raise UserError(
      "udim: grad_fn must return (grads, data_grad), or these and metrics, of "
      "one backward pass (jax.grad over argnums=(0, 1)); it returned "
      f"{shown if len(shown) <= 80 else shown[:77] + '...'}"
    )
  grads, data_grad, *metrics = found
  return grads, data_grad, metrics[0] if metrics else {}


def _for_state(
  found: Metrics, old: Metrics, *, value: jax.Array | None
) -> Metrics:
  """The metrics that the state keeps, in the dtypes it keeps them in."""
  optional = {name: jnp.zeros(()) for name in ("loss", "sam_loss")}
  if value is not None:
    optional["loss"] = jnp.asarray(value)
  found = optional | found
  for name in old:
    if name not in found:
      raise UserError(f"udim: inconsistency_grad_fn gives no metric {name!r}")
  return {name: found[name].astype(like.dtype) for name, like in old.items()}


def udim_grads(
  apply_fn: ApplyFn,
  head_path: str,
  cfg: UdimConfig,
  *,
  accum: int = 1,
  head_loss: HeadLoss | None = None,
  chunk: int | None = None,
  member: optax.GradientTransformationExtraArgs | None = None,
) -> Callable[..., tuple[PyTree, dict[str, PyTree]]]:
  """UDIM's gradients, for any optimizer and any loop.

  Args:
    apply_fn: the model, see `udim_passes`.
    head_path: path of its head in the parameters.
    cfg: the settings.
    accum: micro-batches, see `udim_passes`.
    head_loss: of a head that is not linear, see `udim_passes`.
    chunk: with `head_loss`, see `udim_passes`.
    member: as for `udim`; its state must be no more than the number of updates
      done, which is `step`.

  Returns:
    `(params, batch, rng, step, *, batch_stats={}, due=None) -> (grads, aux)`,
    arguments as for `udim_passes` and `udim`. `aux` holds

    metrics: scalars: `loss` and `grad_norm` at `params`, `sam_loss` at
      theta + eps; `active`, 1 if the step has the term and 0 if not; of the
      term (0 without) `pen`, `gn`, `ilc`, `perturbed_loss`,
      `perturbation_rms` and `term_grad_norm`.
    batch_stats: those after one forward pass of the images at `params`; no
      other pass writes.

  Raises:
    UserError: for a `member` beside `reference_quirks`; from the call, for a
      batch or a head of other shapes, a `member` that remembers more, and a
      `due` that is not known when the program is traced.
  """
  cfg = cfg.resolved()
  member = _choose_member(cfg, member)
  passes_of = udim_passes(
    apply_fn, head_path, cfg, accum=accum, head_loss=head_loss, chunk=chunk
  )

  def grads_of(
    params: PyTree,
    batch: Batch,
    rng: jax.Array | None,
    step: int | jax.Array,
    *,
    batch_stats: PyTree = {},  # noqa: B006, never written
    due: bool | None = None,
  ) -> tuple[PyTree, dict[str, PyTree]]:
    passes = passes_of(params, batch, rng, step, batch_stats=batch_stats)
    grads, _, metrics = _combine(
      cfg,
      jnp.asarray(step),
      passes.grads,
      params,
      member=member,
      member_state=state_after(member, params, step),
      second_pass=passes.second_pass,
      term_fn=passes.inconsistency_grad_fn,
      data_grad_fn=passes.data_grad_fn,
      due=due,
    )
    return grads, passes.aux | {"metrics": passes.aux["metrics"] | metrics}

  return grads_of


def _choose_member(
  cfg: UdimConfig, member: optax.GradientTransformationExtraArgs | None
) -> optax.GradientTransformationExtraArgs:
  """A member of the SAM family that gives its gradient as it is."""
  if member is not None and cfg.reference_quirks:
    raise UserError(
      "udim: reference_quirks=True is about SAM's ascent: leave member=None"
    )
  if member is not None:
    return member
  if not cfg.reference_quirks:
    return sam(optax.identity(), cfg.rho)

  def direction(grads, params, rho):  # no 1e-12: NaN for a zero gradient
    del params
    return scaled(grads, rho / tree.global_norm(grads))

  return sharpness_aware(optax.identity(), make_ascent(direction, rho=cfg.rho))


def _combine(
  cfg: UdimConfig,
  step: jax.Array,
  grads: PyTree,
  params: PyTree,
  *,
  member: optax.GradientTransformationExtraArgs,
  member_state: PyTree,
  second_pass: Callable[[PyTree], tuple[PyTree, jax.Array, Metrics]],
  term_fn: TermFn,
  data_grad_fn: DataGradFn,
  due: bool | None,
) -> tuple[PyTree, PyTree, Metrics]:
  """What the member makes of its gradients, plus lambda1 every T where it is
  due; its next state; and the metrics of either.
  """
  check_due(due)
  weight = value_at(cfg.lambda1, step) * cfg.every

  def of_member():
    seen = []

    def grad_fn(point):
      grads, data_grad, metrics = second_pass(point)
      seen.append((point, data_grad, metrics))
      return grads

    out, state = member.update(
      grads, member_state, params, grad_fn=grad_fn, due=True
    )
    return out, state, *seen[0]

  def with_term():
    out, state, ascended, data_grad, metrics = of_member()
    if cfg.data_grad != "fast":
      # What the weights moved by, rounding included.
      eps = jax.tree.map(jnp.subtract, ascended, params)
      data_grad = data_grad_fn(params, eps)
    term, term_metrics = term_fn(params, data_grad)
    if cfg.mode == "perturbed_sam":
      uphill = climb(term, value_at(cfg.rho, step))
      term, _ = term_fn(optax.apply_updates(params, uphill), data_grad)
    norm = tree.global_norm(term)
    own = {"term_grad_norm": norm, "active": jnp.ones_like(norm)}
    total = add_scaled(out, weight, term)
    return total, state, metrics | term_metrics | own

  def without_term():
    # The member is in both branches so that this one has no grad_x.
    out, state, _, _, metrics = of_member()
    shapes = jax.eval_shape(with_term)[-1]
    zeros = {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()}
    return out, state, zeros | metrics

  active = _is_active(cfg, step, weight, due)
  if isinstance(active, bool):
    total, state, metrics = with_term() if active else without_term()
  else:
    total, state, metrics = jax.lax.cond(active, with_term, without_term)
  norm = tree.global_norm(grads)
  return total, state, metrics | {"grad_norm": norm}


def _is_active(
  cfg: UdimConfig, step: jax.Array, weight, due: bool | None
) -> bool | jax.Array:
  """Whether this step has the term; a bool if that is known now."""
  if not callable(cfg.lambda1) and cfg.lambda1 == 0:
    return False
  if due is not None:
    return bool(due)
  if not callable(cfg.lambda1) and cfg.start_step == 0 and cfg.every == 1:
    return True
  since = step - cfg.start_step
  return (since >= 0) & (since % cfg.every == 0) & (weight != 0)
