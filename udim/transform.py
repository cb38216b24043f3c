"""UDIM as gradients for any optimizer, and as an optax transform.

A step has up to four gradients:

    1     g = grad L(theta; x)                         eps = rho g / ||g||
    2     G = grad L(theta + eps; x); grad_x L in the same backward pass
    3, 4  T = grad of the inconsistency at theta, through the perturbed half
          and through the source half, whose forward pass is that of 1

and gives G + lambda1 * T to the base optimizer. FLOPs in units of one
gradient, of which a forward pass is a third:

    a step of SAM, or one without the term             2
    "fast" and "plain"; a dropout mask a pass          3.7;  4
    the same with `detach_source`                      3;    3.4
    "exact"                                            5.1;  5.4
    `accum` micro-batches, "fast"                      4.7

arXiv 2403.07329; the authors' `iada/iada_final.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common import tree
from common.errors import UserError
from common.optim.ascent import add_scaled, sam_ascent, scaled, value_at
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
STATE_METRICS = (
  "grad_norm", "term_grad_norm", "pen", "gn", "perturbation_rms", "active",
)  # fmt: skip


class UdimState(NamedTuple):
  """State of `udim`.

  Attributes:
    count: int32, updates done.
    base_state: the base optimizer's.
    metrics: scalars of the last update: `grad_norm` of the first gradient;
      `active`, 1 if it had the term and 0 if not; and of the term (0 without)
      `term_grad_norm`, `pen`, `gn` and `perturbation_rms`.
  """

  count: jax.Array
  base_state: optax.OptState
  metrics: Metrics


def udim(
  base: optax.GradientTransformation, cfg: UdimConfig
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
    grad_fn: `params -> (grads, data_grad [b, ...])`, of one backward pass.
    inconsistency_grad_fn: `(params, data_grad) -> (grads, metrics)`, with at
      least the scalars `pen`, `gn` and `perturbation_rms`.
    data_grad_fn: optional, `(params, eps) -> data_grad`, for `cfg.data_grad`
      "exact" or "plain". Without it `grad_fn` is evaluated for these.

  Args:
    base: the optimizer.
    cfg: the settings. What concerns images, losses and heads is up to
      `inconsistency_grad_fn`.

  Returns:
    The transform. Inside `optax.MultiSteps` only the first gradient would
    accumulate: give `udim_passes` its `accum` instead.

  Raises:
    UserError: from `update`, without parameters, functions or those metrics.
  """
  cfg = cfg.resolved()
  base = optax.with_extra_args_support(base)

  def init(params: PyTree) -> UdimState:
    metrics = {name: jnp.zeros(()) for name in STATE_METRICS}
    return UdimState(jnp.zeros((), jnp.int32), base.init(params), metrics)

  def update(
    updates,
    state,
    params=None,
    *,
    grad_fn=None,
    inconsistency_grad_fn=None,
    data_grad_fn=None,
    **extra,
  ):
    if params is None or grad_fn is None or inconsistency_grad_fn is None:
      raise UserError(
        "udim: update needs params, grad_fn and inconsistency_grad_fn: pass "
        "them, such as those of `udim_passes`"
      )

    if data_grad_fn is None:
      data_grad_fn = functools.partial(
        slow_data_grad, cfg.data_grad, lambda params: grad_fn(params)[1]
      )
    total, metrics = _combine(
      cfg,
      state.count,
      updates,
      params,
      second_pass=lambda ascended: (*grad_fn(ascended), {}),
      term_fn=inconsistency_grad_fn,
      data_grad_fn=data_grad_fn,
    )
    for name in STATE_METRICS:
      if name not in metrics:
        raise UserError(f"udim: inconsistency_grad_fn gives no metric {name!r}")
    updates, base_state = base.update(total, state.base_state, params, **extra)
    kept = {
      name: metrics[name].astype(old.dtype)
      for name, old in state.metrics.items()
    }
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, UdimState(count, base_state, kept)

  return optax.GradientTransformationExtraArgs(init, update)


def udim_grads(
  apply_fn: ApplyFn, head_path: str, cfg: UdimConfig, *, accum: int = 1
) -> Callable[..., tuple[PyTree, dict[str, PyTree]]]:
  """UDIM's gradients, for any optimizer and any loop.

  Args:
    apply_fn: the model, see `udim_passes`.
    head_path: path of its linear head in the parameters.
    cfg: the settings.
    accum: micro-batches, see `udim_passes`.

  Returns:
    `(params, batch, rng, step, *, batch_stats={}) -> (grads, aux)`, arguments
    as for `udim_passes`. `aux` holds

    metrics: scalars: `loss` and `grad_norm` at `params`, `sam_loss` at
      theta + eps; `active`, 1 if the step has the term and 0 if not; of the
      term (0 without) `pen`, `gn`, `ilc`, `perturbed_loss`,
      `perturbation_rms` and `term_grad_norm`.
    batch_stats: those after one forward pass of the images at `params`; no
      other pass writes.

  Raises:
    UserError: from the call, for a batch or a head of other shapes.
  """
  cfg = cfg.resolved()
  passes_of = udim_passes(apply_fn, head_path, cfg, accum=accum)

  def grads_of(
    params: PyTree,
    batch: Batch,
    rng: jax.Array | None,
    step: int | jax.Array,
    *,
    batch_stats: PyTree = {},  # noqa: B006, never written
  ) -> tuple[PyTree, dict[str, PyTree]]:
    passes = passes_of(params, batch, rng, step, batch_stats=batch_stats)
    grads, metrics = _combine(
      cfg,
      step,
      passes.grads,
      params,
      second_pass=passes.second_pass,
      term_fn=passes.inconsistency_grad_fn,
      data_grad_fn=passes.data_grad_fn,
    )
    return grads, passes.aux | {"metrics": passes.aux["metrics"] | metrics}

  return grads_of


def _combine(
  cfg: UdimConfig,
  step: int | jax.Array,
  grads: PyTree,
  params: PyTree,
  *,
  second_pass: Callable[[PyTree], tuple[PyTree, jax.Array, Metrics]],
  term_fn: TermFn,
  data_grad_fn: DataGradFn,
) -> tuple[PyTree, Metrics]:
  """G + lambda1 every T, or G, with the metrics of either."""
  step = jnp.asarray(step)
  eps = _ascent(cfg, step, grads)
  ascended = optax.apply_updates(params, eps)
  weight = value_at(cfg.lambda1, step) * cfg.every

  def with_term():
    sam_grads, data_grad, metrics = second_pass(ascended)
    if cfg.data_grad != "fast":
      data_grad = data_grad_fn(params, eps)
    term, term_metrics = term_fn(params, data_grad)
    norm = tree.global_norm(term)
    own = {"term_grad_norm": norm, "active": jnp.ones_like(norm)}
    total = add_scaled(sam_grads, weight, term)
    return total, metrics | term_metrics | own

  def without_term():
    # The second pass is in both branches so that this one has no grad_x.
    sam_grads, _, metrics = second_pass(ascended)
    _, shapes = jax.eval_shape(with_term)
    zeros = {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()}
    return sam_grads, zeros | metrics

  active = _is_active(cfg, step, weight)
  if isinstance(active, bool):
    total, metrics = with_term() if active else without_term()
  else:
    total, metrics = jax.lax.cond(active, with_term, without_term)
  return total, metrics | {"grad_norm": tree.global_norm(grads)}


def _is_active(cfg: UdimConfig, step: jax.Array, weight) -> bool | jax.Array:
  """Whether this step has the term; a bool if that is so for all steps."""
  if not callable(cfg.lambda1):
    if cfg.lambda1 == 0:
      return False
    if cfg.start_step == 0 and cfg.every == 1:
      return True
  since = step - cfg.start_step
  return (since >= 0) & (since % cfg.every == 0) & (weight != 0)


def _ascent(cfg: UdimConfig, step: jax.Array, grads: PyTree) -> PyTree:
  rho = value_at(cfg.rho, step)
  if cfg.reference_quirks:  # no 1e-12: NaN for a zero gradient
    return scaled(grads, rho / tree.global_norm(grads))
  ascent = sam_ascent(rho)
  return ascent.update(grads, ascent.init(grads))[0]
