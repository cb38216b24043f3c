"""The SAM family: optimizers that look for flat minima, as optax transforms.

Each wraps a base optimizer; `common.optim.second_pass` says how to call them,
how they behave in chains, under `optax.MultiSteps` and in masks, and what the
options `every`, `mask`, `axis_name` and `aux_like` and `update`'s `due` do.
Notation: w weights, g = grad L(w), e the perturbation, g_p = grad L(w + e),
||.|| the norm over all parameters, t = 1e-12. Every hyper-parameter is a number
or a schedule of the number of updates done, but those that decide shapes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common.errors import UserError
from common.optim.ascent import (
  TINY,
  Setting,
  add_scaled,
  asam_ascent,
  check_fractions,
  check_settings,
  climb,
  fisher_ascent,
  is_known,
  random_part,
  reject,
  sagm_ascent,
  sam_ascent,
  scaled,
  value_at,
)
from common.optim.second_pass import (
  GradFn,
  Mask,
  Method,
  averager,
  check_period,
  gsam_combine,
  sagm_combine,
  sharpness_aware,
  within,
  wrap,
  zero_outside,
)
from common.tree import global_norm

PyTree = Any


def sam(
  base: optax.GradientTransformation,
  rho: Setting = 0.05,
  *,
  every: Setting = 1,
  mask: Mask = None,
  axis_name: Any = None,
  aux_like: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Sharpness-Aware Minimization: the gradient at the worst point nearby.

      e = rho g / (||g|| + t);   out = g_p

  Two gradients. For example:

    >>> import jax, jax.numpy as jnp, optax
    >>> from common.optim import sam
    >>> loss = lambda params: jnp.sum((params["w"] - 1.0) ** 2)
    >>> params = {"w": jnp.array([3.0, -1.0])}
    >>> tx = sam(optax.adam(0.1), rho=0.05)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...   grad_fn = jax.grad(loss)  # of one batch, both times
    ...   grads = grad_fn(params)
    ...   updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(200):
    ...   params, state = step(params, state)
    >>> [round(float(w), 1) for w in params["w"]]
    [1.0, 1.0]

  Args:
    base: any optax optimizer.
    rho: the radius; the paper's default. Search {0.01, 0.02, 0.05, 0.1}.
    every: as in `sharpness_aware`, like the other options.
    mask: the parameters to perturb.
    axis_name: m-sharpness over this axis.
    aux_like: keeps `grad_fn`'s aux in the state.

  Returns:
    The transform. With rho = 0 it is the base optimizer.

  Raises:
    UserError: for a negative `rho`, and as `sharpness_aware` says.

  References:
    Foret et al., Sharpness-Aware Minimization for Efficiently Improving
    Generalization, algorithm 1, arXiv 2010.01412
  """
  return sharpness_aware(
    base,
    sam_ascent(rho),
    every=every,
    mask=mask,
    axis_name=axis_name,
    aux_like=aux_like,
  )


def asam(
  base: optax.GradientTransformation,
  rho: Setting = 0.5,
  eta: Setting = 0.01,
  *,
  every: Setting = 1,
  mask: Mask = None,
  axis_name: Any = None,
  aux_like: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adaptive SAM: a ball that scales with the weights.

      e = rho T^2 g / (||T g|| + t),  T = |w| + eta;   out = g_p

  Two gradients. Settings and reference (arXiv 2102.11600): `asam_ascent`; rho
  is usually from 0.5 to 2. Options and errors: `sharpness_aware`.
  """
  return sharpness_aware(
    base,
    asam_ascent(rho, eta),
    every=every,
    mask=mask,
    axis_name=axis_name,
    aux_like=aux_like,
  )


def fisher_sam(
  base: optax.GradientTransformation,
  rho: Setting = 0.1,
  eta: Setting = 1.0,
  *,
  every: Setting = 1,
  mask: Mask = None,
  axis_name: Any = None,
  aux_like: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Fisher SAM: an ellipsoid of the Fisher metric instead of a ball.

      e = rho f g / (sqrt(sum f g^2) + t),  f = 1 / (1 + eta g^2);   out = g_p

  Two gradients. Settings and reference (arXiv 2206.04920): `fisher_ascent`.
  Options and errors: `sharpness_aware`.
  """
  return sharpness_aware(
    base,
    fisher_ascent(rho, eta),
    every=every,
    mask=mask,
    axis_name=axis_name,
    aux_like=aux_like,
  )


def gsam(
  base: optax.GradientTransformation,
  rho: Setting = 0.05,
  alpha: Setting = 0.2,
  *,
  every: Setting = 1,
  mask: Mask = None,
  axis_name: Any = None,
  aux_like: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Surrogate-gap guided SAM: also shrinks the gap between the two losses.

      e as SAM's;   perp = g - (<g, g_p> / ||g_p||^2) g_p
      out = g_p - alpha perp

  Two gradients.

  Args:
    base: any optax optimizer.
    rho: the radius. In the paper it follows the learning rate, linearly
      between a maximum and a minimum: give a schedule.
    alpha: the weight of the gap: 0.2 in the authors' example, 0 is SAM.
    every: as in `sharpness_aware`, like the other options.
    mask: the parameters to perturb.
    axis_name: m-sharpness over this axis.
    aux_like: keeps `grad_fn`'s aux in the state.

  Returns:
    The transform.

  Raises:
    UserError: for negative settings, and as `sharpness_aware` says.

  References:
    Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware
    Training, algorithm 1, arXiv 2203.08065
  """
  return sharpness_aware(
    base,
    sam_ascent(rho),
    gsam_combine(alpha),
    every=every,
    mask=mask,
    axis_name=axis_name,
    aux_like=aux_like,
  )


def sagm(
  base: optax.GradientTransformation,
  rho: Setting = 0.05,
  alpha: Setting = 0.001,
  *,
  every: Setting = 1,
  mask: Mask = None,
  axis_name: Any = None,
  aux_like: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Sharpness-Aware Gradient Matching: aligns the two gradients.

      e = (rho / (||g|| + t) - alpha) g;   out = (g + g_p) / 2

  Two gradients. The paper adds both losses; its code averages, as here.
  Settings and reference (arXiv 2303.10353): `sagm_ascent`. Options and errors:
  `sharpness_aware`.
  """
  return sharpness_aware(
    base,
    sagm_ascent(rho, alpha),
    sagm_combine(),
    every=every,
    mask=mask,
    axis_name=axis_name,
    aux_like=aux_like,
  )


def gam(
  base: optax.GradientTransformation,
  rho: Setting = 0.05,
  rho_prime: Setting = 0.05,
  beta0: Setting = 0.1,
  beta1: Setting = 0.1,
  gamma: Setting = 0.05,
  *,
  every: Setting = 1,
  mask: Mask = None,
  axis_name: Any = None,
  aux_like: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Gradient norm Aware Minimization: first-order flatness.

      g0 = g;   g1 at w + rho g0 / (||g0|| + t);   u = g1 - g0
      w2 = w + rho' u / (||u|| + t);   g2 at w2
      g3 at w2 + rho g2 / (||g2|| + t)
      new = beta1 g1 + (1 - beta1) g3;   pm = g0 + (1 - beta0) g2
      out = new - gamma (pm - (<pm, new> / ||new||^2) new)

  Four gradients.

  Args:
    base: any optax optimizer.
    rho: the radius of the inner steps.
    rho_prime: that of the ascent of the gradient's norm. The authors bind both
      to the learning rate, between 0.02 and 0.05: give schedules.
    beta0: one minus the weight of g2.
    beta1: the weight of g1 against g3.
    gamma: the weight of the orthogonal part. Defaults: the authors' code for
      domain generalization.
    every: as in `sharpness_aware`, like the other options.
    mask: the parameters to perturb.
    axis_name: m-sharpness over this axis.
    aux_like: keeps `grad_fn`'s aux at g3 in the state.

  Returns:
    The transform.

  Raises:
    UserError: for negative settings and betas above 1, and as
      `sharpness_aware` says.

  References:
    Zhang et al., Gradient Norm Aware Minimization Seeks First-Order Flatness
    and Improves Generalization, arXiv 2303.03108
  """
  check_settings(rho=rho, rho_prime=rho_prime, gamma=gamma)
  check_settings(upto=1.0, beta0=beta0, beta1=beta1)
  check_period(every=every)
  mean = averager(axis_name)

  def moved(params, direction, radius):
    direction = climb(zero_outside(mask, direction), radius)
    return optax.apply_updates(params, direction)

  def full(grads, memory, params, probe, count):
    radius = value_at(rho, count)
    first, _ = probe(moved(params, grads, radius))
    rise = add_scaled(first, -1.0, grads)
    steepest = moved(params, rise, value_at(rho_prime, count))
    second, _ = probe(steepest)
    third, aux = probe(moved(steepest, second, radius))
    first, second, third = mean((first, second, third))
    weight0, weight1 = value_at(beta0, count), value_at(beta1, count)
    new = add_scaled(scaled(first, weight1), 1 - weight1, third)
    pm = add_scaled(mean(grads), 1 - weight0, second)
    out = add_scaled(new, -value_at(gamma, count), reject(pm, new))
    return out, memory, aux

  def cheap(grads, memory, params, count):
    del params, count
    return mean(grads), memory

  method = Method(lambda params: (), full, cheap)
  return wrap(base, method, every=every, aux_like=aux_like)


class LookSamMemory(NamedTuple):
  """What LookSAM keeps: its ascent's state, a direction like the params."""

  ascent_state: Any
  direction: Any


def look_sam(
  base: optax.GradientTransformation,
  rho: Setting = 0.05,
  k: Setting = 5,
  alpha: Setting = 0.7,
  *,
  mask: Mask = None,
  axis_name: Any = None,
  aux_like: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
  """LookSAM: the part of SAM that bends the gradient changes slowly; reuse it.

      count mod k = 0:   out = g_p;   v = g_p - (<g, g_p> / ||g||^2) g
      otherwise:         out = g + alpha (||g|| / (||v|| + t)) v

  Two gradients in every k-th update, one in the others, 1.2 on average for
  k = 5. As one program that is a branch, in which `grad_fn` is not evaluated,
  but which can take longer than SAM: on the CPU convolutions in branches are
  slow. Rather let the host choose between two programs, `due=i % k == 0` in
  step i, as `common.optim.second_pass` shows. Without a first due update v is
  0, and the others are those of the base.

  A v that is no more than rounding counts as 0, so that rho = 0 is the base
  optimizer. The state holds v: one more copy of the parameters, with their
  paths.

  Args:
    base: any optax optimizer.
    rho: the radius.
    k: the period. 1 is SAM.
    alpha: the weight of the reused part. 5 and 0.7: public implementations.
    mask: as in `sharpness_aware`, like the other options.
    axis_name: m-sharpness over this axis.
    aux_like: keeps `grad_fn`'s aux in the state.

  Returns:
    The transform.

  Raises:
    UserError: for negative settings or k < 1, and as `sharpness_aware` says.

  References:
    Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization,
    algorithm 1, arXiv 2203.02714
  """
  check_settings(alpha=alpha)
  check_period(k=k)
  ascent = within(mask, sam_ascent(rho))
  mean = averager(axis_name)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return LookSamMemory(ascent.init(params), zeros)

  def full(grads, memory, params, probe, count):
    del count
    epsilon, ascent_state = ascent.update(grads, memory.ascent_state, params)
    perturbed, aux = probe(optax.apply_updates(params, epsilon))
    grads, perturbed = mean((grads, perturbed))
    part = reject(perturbed, grads)
    length, whole = global_norm(part), global_norm(perturbed)
    is_real = length > 64 * jnp.finfo(whole.dtype).eps * whole
    direction = jax.tree.map(
      lambda v, old: jnp.where(is_real, v, 0).astype(old.dtype),
      part,
      memory.direction,
    )
    return perturbed, LookSamMemory(ascent_state, direction), aux

  def cheap(grads, memory, params, count):
    _, ascent_state = ascent.update(grads, memory.ascent_state, params)
    grads = mean(grads)
    length = global_norm(memory.direction) + TINY
    scale = value_at(alpha, count) * global_norm(grads) / length
    out = add_scaled(grads, scale, memory.direction)
    return out, LookSamMemory(ascent_state, memory.direction)

  return wrap(base, Method(init, full, cheap), every=k, aux_like=aux_like)


def esam(
  base: optax.GradientTransformation,
  rho: Setting = 0.05,
  weight_fraction: Setting = 0.6,
  data_fraction: float = 0.5,
  *,
  seed: int = 0,
  every: Setting = 1,
  mask: Mask = None,
  axis_name: Any = None,
  aux_like: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Efficient SAM: perturbs some weights, and looks again at some samples.

      e = (m / beta) rho g / (||g|| + t),   m ~ Bernoulli(beta) for each weight
      out = the gradient at w + e of the mean loss of the gamma B samples whose
            loss grew most from w to w + e

  `update(grads, state, params, *, grad_fn, losses_fn=None)`. With `losses_fn`,
  `params -> [B]`, samples are chosen: `grad_fn(params, chosen)` gets their
  int32 [max(1, round(gamma B))] indices, the largest growth first. Without it
  the second gradient is `grad_fn(params)`, on all samples.

  Cost: one gradient, two forward passes, and a gradient on gamma B samples.
  The forward pass at w is free where the compiler sees that the first gradient
  has it too. Leaving weights out saves no time under jit, where the program
  must not depend on the draw; it is there for its effect. Samples are chosen
  from the whole batch: under sharding they travel between devices.

  Args:
    base: any optax optimizer.
    rho: the radius.
    weight_fraction: beta. Defaults: the authors' script for ResNet-18.
    data_fraction: gamma; a number, since it decides shapes.
    seed: m is a function of it and of the number of updates done.
    every: as in `sharpness_aware`, like the other options.
    mask: the parameters to perturb.
    axis_name: m-sharpness over this axis; each shard chooses from its own.
    aux_like: keeps `grad_fn`'s aux in the state.

  Returns:
    The transform. With both fractions 1 it is SAM.

  Raises:
    UserError: as `sam`, for a fraction outside (0, 1], losses that aren't [B].

  References:
    Du et al., Efficient Sharpness-aware Minimization for Improved Training of
    Neural Networks, algorithm 1, arXiv 2110.03141
  """
  check_fractions(weight_fraction=weight_fraction, data_fraction=data_fraction)
  if not is_known(data_fraction):
    raise UserError("data_fraction must be a number: it decides shapes")
  inner = sharpness_aware(
    base,
    optax.chain(sam_ascent(rho), random_part(weight_fraction, seed)),
    every=every,
    mask=mask,
    axis_name=axis_name,
    aux_like=aux_like,
  )

  def update(
    updates, state, params=None, *, grad_fn=None, losses_fn=None, **extra
  ):
    if grad_fn is not None and losses_fn is not None:
      grad_fn = _on_chosen(grad_fn, losses_fn, params, data_fraction)
    return inner.update(updates, state, params, grad_fn=grad_fn, **extra)

  return optax.GradientTransformationExtraArgs(inner.init, update)


def _on_chosen(
  grad_fn: GradFn,
  losses_fn: Callable[[PyTree], jax.Array],
  params: PyTree,
  fraction: float,
) -> GradFn:
  """`grad_fn` on the samples whose loss grows most between `params` and it."""

  def chosen(perturbed: PyTree) -> Any:
    growth = losses_fn(perturbed) - losses_fn(params)
    if growth.ndim != 1:
      raise UserError(f"losses_fn must return [B], not shape {growth.shape}")
    size = max(1, round(fraction * growth.size))
    return grad_fn(perturbed, jax.lax.top_k(growth, size)[1])

  return chosen
