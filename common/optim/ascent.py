"""Ascents: where the weights go before the second gradient is taken.

Each is a plain `optax.GradientTransformation` that turns the gradient g at the
weights w into a perturbation e *in the direction of growing loss*, so that
`optax.apply_updates(w, e)` is the perturbed point. `common.optim.sharpness`
builds the SAM family on them. optax's own SAM expects an optimizer, which
descends, and negates it; there they stand behind `optax.scale(-1)`:

    optax.contrib.sam(
      optax.adam(1e-3),
      optax.chain(sam_ascent(0.05), optax.scale(-1)),
      opaque_mode=True,
      reset_state=False,  # else a schedule never leaves its first value
    )

Every hyper-parameter is a number or a schedule, a function of the number of
updates done. Norms go over all parameters, in float32 at least: under jit with
sharded arrays they are those of the whole model. A gradient of zero gives a
perturbation of zero. The arithmetic is float32 at least too; the perturbation
has the dtype of the gradient.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.errors import UserError
from common.rngs import RngStreams
from common.tree import global_norm, names

PyTree = Any
Setting = float | jax.Array | optax.Schedule
TINY = 1e-12  # beside a norm that is divided by


class AscentState(NamedTuple):
  """State of an ascent: int32 [], the number of updates done."""

  count: jax.Array


def sam_ascent(rho: Setting = 0.05) -> optax.GradientTransformation:
  """A step of length rho along the gradient.

      e = rho g / (||g|| + 1e-12)

  Args:
    rho: the radius. 0.05 is the default of the paper's experiments.

  Returns:
    The ascent, direction of growing loss.

  Raises:
    UserError: for a negative `rho`.

  References:
    Foret et al., Sharpness-Aware Minimization for Efficiently Improving
    Generalization, eq. 2, arXiv 2010.01412
  """
  check_settings(rho=rho)
  return make_ascent(lambda grads, params, rho: climb(grads, rho), rho=rho)


def asam_ascent(
  rho: Setting = 0.5, eta: Setting = 0.01
) -> optax.GradientTransformation:
  """A step inside a ball that scales with the weights.

      e = rho T^2 g / (||T g|| + 1e-12),   T = |w| + eta   (elementwise)

  Args:
    rho: the radius, in units of the weights; 0.5 to 2 is common.
    eta: what keeps small weights moving; 0.01 is common. 0 is the
      `adaptive` flag of davda54/sam, under which a weight of 0 stays 0.

  Returns:
    The ascent; its `update` needs the parameters.

  Raises:
    UserError: for negative settings; from `update`, without parameters.

  References:
    Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for
    Scale-Invariant Learning of Deep Neural Networks, arXiv 2102.11600
  """
  check_settings(rho=rho, eta=eta)

  def direction(grads, params, rho, eta):
    if params is None:
      raise UserError("asam_ascent scales with the weights: give it params")
    scaled = jax.tree.map(
      lambda g, w: widen(g) * (jnp.abs(widen(w)) + eta), grads, params
    )
    length = rho / (global_norm(scaled) + TINY)
    return jax.tree.map(
      lambda g, w, s: (length * (jnp.abs(widen(w)) + eta) * s).astype(g.dtype),
      grads,
      params,
      scaled,
    )

  return make_ascent(direction, rho=rho, eta=eta)


def fisher_ascent(
  rho: Setting = 0.1, eta: Setting = 1.0
) -> optax.GradientTransformation:
  """A step inside an ellipsoid of the Fisher metric.

      e = rho f g / (sqrt(sum f g^2) + 1e-12),   f = 1 / (1 + eta g^2)

  The square of the batch's gradient stands for the diagonal of the Fisher
  information, as implementations do in practice.

  Args:
    rho: the radius (gamma in the paper).
    eta: the weight of the Fisher information. Both defaults are those of
      third-party implementations.

  Returns:
    The ascent.

  Raises:
    UserError: for negative settings.

  References:
    Kim et al., Fisher SAM: Information Geometry and Sharpness Aware
    Minimisation, arXiv 2206.04920
  """
  check_settings(rho=rho, eta=eta)

  def direction(grads, params, rho, eta):
    del params
    natural = jax.tree.map(
      lambda g: widen(g) / (1 + eta * jnp.square(widen(g))), grads
    )
    length = rho / (jnp.sqrt(dot(natural, grads)) + TINY)
    return jax.tree.map(
      lambda g, n: (length * n).astype(g.dtype), grads, natural
    )

  return make_ascent(direction, rho=rho, eta=eta)


def sagm_ascent(
  rho: Setting = 0.05, alpha: Setting = 0.001
) -> optax.GradientTransformation:
  """A SAM step, shortened in proportion to the gradient.

      e = (rho / (||g|| + 1e-12) - alpha) g

  Args:
    rho: the radius.
    alpha: the shortening. 0.001 is the authors' setting for PACS, VLCS and
      TerraIncognita; 0.0005 theirs for OfficeHome and DomainNet.

  Returns:
    The ascent. Where alpha ||g|| exceeds rho it descends.

  Raises:
    UserError: for negative settings.

  References:
    Wang et al., Sharpness-Aware Gradient Matching for Domain Generalization,
    arXiv 2303.10353
  """
  check_settings(rho=rho, alpha=alpha)

  def direction(grads, params, rho, alpha):
    del params
    return scaled(grads, rho / (global_norm(grads) + TINY) - alpha)

  return make_ascent(direction, rho=rho, alpha=alpha)


def random_part(
  fraction: Setting, seed: int = 0
) -> optax.GradientTransformation:
  """Keeps a random part of the numbers, for use after an ascent.

      e -> (m / fraction) e,   m ~ Bernoulli(fraction) for each number

  Args:
    fraction: the probability to stay, above 0 and at most 1.
    seed: m is a function of it and of the number of updates done.

  Returns:
    The transform.

  Raises:
    UserError: for a fraction out of range.

  References:
    Du et al., Efficient Sharpness-aware Minimization for Improved Training of
    Neural Networks, arXiv 2110.03141
  """
  check_fractions(fraction=fraction)
  if is_known(fraction) and fraction == 1:
    return optax.identity()
  streams = RngStreams(seed, ("weights",))

  def direction(grads, params, fraction, key):
    del params
    leaves, structure = jax.tree.flatten(grads)
    kept = []
    for i, x in enumerate(leaves):
      drawn = jax.random.bernoulli(
        jax.random.fold_in(key, i), fraction, x.shape
      )
      kept.append(jnp.where(drawn, x, 0))
    return scaled(jax.tree.unflatten(structure, kept), 1 / fraction)

  return make_ascent(
    direction, fraction=fraction, key=lambda count: streams(count)["weights"]
  )


def climb(grads: PyTree, rho: float | jax.Array) -> PyTree:
  """Returns rho g / (||g|| + 1e-12), in the dtypes of `grads`."""
  return scaled(grads, rho / (global_norm(grads) + TINY))


def make_ascent(
  direction: Callable[..., PyTree], **settings: Setting | Callable
) -> optax.GradientTransformation:
  """An ascent whose only state is the number of updates done.

  Args:
    direction: `(grads, params, **settings) -> e`.
    **settings: numbers, or functions of the number of updates done; their
      values are handed to `direction`.

  Returns:
    The ascent.
  """

  def init(params: PyTree) -> AscentState:
    del params
    return AscentState(jnp.zeros((), jnp.int32))

  def update(
    updates: PyTree, state: Any, params: PyTree | None = None
  ) -> tuple[PyTree, AscentState]:
    values = {name: value_at(s, state.count) for name, s in settings.items()}
    epsilon = direction(updates, params, **values)
    return epsilon, AscentState(next_count(state.count))

  return optax.GradientTransformation(init, update)


def state_after(
  ascent: optax.GradientTransformation, params: PyTree, count: int | jax.Array
) -> PyTree:
  """The state of an ascent after `count` updates, if that is all it holds.

  Args:
    ascent: one of this module, or any whose state is nothing but leaves that
      are called `count`, such as `optax.scale_by_schedule`, or is empty.
    params: the parameters.
    count: int, updates done.

  Returns:
    The state.

  Raises:
    UserError: for an ascent that remembers more.
  """
  state = jax.eval_shape(ascent.init, params)
  for path in jax.tree.leaves(names(state)):
    if path.split("/")[-1] != "count":
      raise UserError(
        "only an ascent whose state is the number of updates can be begun at "
        f"any step; this one has {path!r}"
      )
  return jax.tree.map(lambda s: jnp.asarray(count, s.dtype), state)


def check_settings(*, upto: float = math.inf, **settings: Setting) -> None:
  """Refuses numbers that are not finite or not between 0 and `upto`.

  Schedules and traced numbers (`optax.inject_hyperparams`) pass unseen.

  Raises:
    UserError: names the setting and its value.
  """
  for name, value in settings.items():
    if is_known(value) and not (
      is_number(value) and 0 <= value <= upto and value < math.inf
    ):
      bound = "" if upto == math.inf else f" to {upto:g}"
      raise UserError(f"{name}={value!r} must be a number from 0{bound}")


def check_fractions(**settings: Setting) -> None:
  """Refuses numbers outside (0, 1].

  Raises:
    UserError: names the setting and its value.
  """
  for name, value in settings.items():
    if is_known(value) and not (is_number(value) and 0 < value <= 1):
      raise UserError(f"{name}={value!r} must be above 0 and at most 1")


def is_number(value: Any) -> bool:
  """Whether it can be compared with one: of Python, NumPy or JAX."""
  return isinstance(value, numbers.Real | jax.Array | np.ndarray)


def is_known(setting: Setting) -> TypeGuard[float]:
  """Whether it is a number now: no schedule, not traced."""
  return not (callable(setting) or isinstance(setting, jax.core.Tracer))


def value_at(setting: Setting, count: jax.Array) -> Any:
  """The number that a setting is after `count` updates."""
  return setting(count) if callable(setting) else setting


def next_count(count: jax.Array) -> jax.Array:
  """int32 [], one more; it stays at the largest int32."""
  return jnp.asarray(optax.safe_increment(count))


def widen(x: jax.Array) -> jax.Array:
  """The same numbers in float32 at least."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def scaled(tree: PyTree, scale: float | jax.Array) -> PyTree:
  """Returns scale * tree in the tree's dtypes, multiplied in float32."""
  return jax.tree.map(lambda x: (scale * widen(x)).astype(x.dtype), tree)


def add_scaled(tree: PyTree, scale: float | jax.Array, other: PyTree) -> PyTree:
  """Returns tree + scale * other in the first tree's dtypes."""
  return jax.tree.map(
    lambda x, y: (widen(x) + scale * widen(y)).astype(x.dtype), tree, other
  )


def dot(first: PyTree, second: PyTree) -> jax.Array:
  """The inner product over all leaves, summed in float32 at least."""
  products = jax.tree.map(
    lambda x, y: jnp.sum(widen(x) * widen(y)), first, second
  )
  return sum(jax.tree.leaves(products), start=jnp.zeros((), jnp.float32))


def reject(tree: PyTree, axis: PyTree) -> PyTree:
  """The part of `tree` orthogonal to `axis`; all of it where that is 0."""
  square = jnp.maximum(dot(axis, axis), TINY**2)
  return add_scaled(tree, -dot(tree, axis) / square, axis)
