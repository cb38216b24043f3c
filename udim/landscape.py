"""The loss around a point: curvature, lines, and what an ascent step costs.

Of parameters and a batch that may be sharded in any way. The arithmetic is
float32 at least, also that of matrix products inside the loss on devices whose
default is less. `line`, `data_line` and `perturb_gap` are traceable; jit them
with the batch as an argument:

    @jax.jit
    def gaps(params, batch):
      return perturb_gap(lambda params: loss(params, batch), params, RADII)

`top_eigenvalues` loops on the host and compiles its own step. A `Partial` has
it compile once for all batches of a shape:

    loss_fn = jax.tree_util.Partial(loss, batch=batch)
    eigenvalues, residuals = top_eigenvalues(loss_fn, params, key)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding

from common.errors import UserError
from common.optim.ascent import add_scaled, climb, dot, scaled, widen
from common.tree import count_params, global_norm
from udim.perturb import perturb_images

PyTree = Any
LossFn = Callable[[PyTree], jax.Array]
Distances = jax.Array | Sequence[float]


def top_eigenvalues(
  loss_fn: LossFn,
  params: PyTree,
  key: jax.Array,
  *,
  count: int = 1,
  iterations: int = 30,
) -> tuple[jax.Array, jax.Array]:
  """The largest eigenvalues of the loss's Hessian, by Lanczos iteration.

  Every iteration is one product of the Hessian with a vector, about two
  gradients' worth. All vectors are kept, orthogonal to each other, so that no
  eigenvalue comes up again as its own ghost. They take `iterations` times the
  memory of the parameters, and lie on the devices as those do.

  Args:
    loss_fn: parameters to loss, twice differentiable. Arrays in a
      `jax.tree_util.Partial` are arguments of the compiled step, arrays in
      any other function are constants in it.
    params: where.
    key: draws the first vector.
    count: eigenvalues.
    iterations: products; at most as many as there are parameters are used,
      and with that many the eigenvalues are exact. Fewer give lower bounds.

  Returns:
    eigenvalues: [count], the largest, not the largest in magnitude; falling.
    residuals: [count], ||H v - eigenvalue v|| of the unit vectors v found: the
      Hessian has an eigenvalue no further than this.

  Raises:
    UserError: for more eigenvalues than there can be, or none; inside jit.

  References:
    Golub and Van Loan, Matrix Computations, sections 10.1 and 10.3
  """
  steps = min(iterations, count_params(params))
  if not 1 <= count <= steps:
    raise UserError(
      f"count={count} eigenvalues need as many iterations and parameters: "
      f"there are iterations={iterations} and {count_params(params)} parameters"
    )
  if not isinstance(loss_fn, jax.tree_util.Partial):
    loss_fn = jax.tree_util.Partial(loss_fn)
  params = jax.tree.map(lambda p: widen(jnp.asarray(p)), params)
  carry = _start(params, jax.random.fold_in(key, 0), steps + 1)
  # Else the compiler chooses places, and compiles another step for them.
  step = jax.jit(
    _step,
    donate_argnames="carry",
    out_shardings=(jax.tree.map(_place, carry), None),
  )
  found = []
  # No loop on the device: XLA compiles the gradients of convolutions badly
  # inside loops on the CPU, and a step is long anyway.
  for i in range(steps):
    carry, elements = step(loss_fn, params, key, i, carry)
    # Fetched at once: many steps in flight, each with sums over all devices,
    # starve each other of threads on simulated devices.
    found.append(jax.device_get(elements))
  return _ritz(np.array(found), count)


def _start(params: PyTree, key: jax.Array, rows: int) -> PyTree:
  """An empty basis but for its first vector; see `_step`."""

  def zeros(like: jax.Array) -> jax.Array:
    place = _place(like)
    if place is not None:
      place = NamedSharding(place.mesh, jax.P(None, *place.spec))
    return jnp.zeros((rows, *like.shape), like.dtype, device=place)

  basis = jax.tree.map(zeros, params)
  first = jax.tree.map(
    lambda v, p: jax.device_put(v, _place(p)), _fresh(basis, key), params
  )
  return _put(basis, first, 0), first, jnp.zeros_like(global_norm(first))


def _place(x: jax.Array) -> NamedSharding | None:
  if isinstance(x, jax.core.Tracer):
    raise UserError("top_eigenvalues loops on the host: call it outside jit")
  return x.sharding if isinstance(x.sharding, NamedSharding) else None


def _step(loss_fn, params: PyTree, key: jax.Array, i: jax.Array, carry):
  """One product: the basis gets its vector i + 1.

  Returns:
    The carry: basis, its last vector, a bound for the Hessian so far.
    (own, length): the Hessian's diagonal element in the basis, and the one
      beside it.
  """
  basis, vector, size = carry
  with jax.default_matmul_precision("float32"):
    moved = jax.jvp(jax.grad(loss_fn), (params,), (vector,))[1]
  own = dot(vector, moved)
  moved = _reject_all(moved, basis)
  length = global_norm(moved)
  # All the Hessian makes of the first vector is in the basis: rounding errors
  # are left. Another vector finds the rest, such as an eigenvalue's second
  # dimension.
  size = jnp.maximum(size, jnp.abs(own) + length)
  is_exhausted = length <= 10 * jnp.finfo(length.dtype).eps * size
  length = jnp.where(is_exhausted, 0, length)
  vector = jax.lax.cond(
    is_exhausted,
    lambda: _fresh(basis, jax.random.fold_in(key, i + 1)),
    lambda: scaled(moved, 1 / length),
  )
  return (_put(basis, vector, i + 1), vector, size), (own, length)


@jax.jit
def _fresh(basis: PyTree, key: jax.Array) -> PyTree:
  """A random unit vector orthogonal to a basis, [n, ...]."""
  flat, unravel = ravel_pytree(jax.tree.map(lambda b: b[0], basis))
  drawn = jax.random.normal(key, flat.shape, flat.dtype)
  drawn = _reject_all(unravel(drawn), basis)
  return scaled(drawn, 1 / global_norm(drawn))


@functools.partial(jax.jit, donate_argnames="basis")
def _put(basis: PyTree, vector: PyTree, i: int | jax.Array) -> PyTree:
  put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
  return jax.tree.map(lambda b, v: put(b, v, i), basis, vector)


@functools.partial(jax.jit, static_argnames="count")
def _ritz(found: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues and residuals from [n, 2], what the steps found."""
  diagonal, beside = found.T
  matrix = jnp.diag(diagonal)
  matrix += jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
  values, vectors = jnp.linalg.eigh(matrix)
  residuals = beside[-1] * jnp.abs(vectors[-1])
  return values[::-1][:count], residuals[::-1][:count]


def _reject_all(vector: PyTree, basis: PyTree) -> PyTree:
  """The part of a vector orthogonal to those of a basis, [n, ...]."""

  def once(_, vector):
    shares = jax.vmap(dot, in_axes=(0, None))(basis, vector)
    weigh = functools.partial(
      jnp.tensordot, shares, axes=1, precision="highest"
    )
    return jax.tree.map(lambda v, b: v - weigh(b), vector, basis)

  # Once leaves rounding errors, twice is enough.
  return jax.lax.fori_loop(0, 2, once, vector)


def line(
  loss_fn: LossFn, params: PyTree, direction: PyTree, distances: Distances
) -> jax.Array:
  """Losses along a line: L(w + t d / ||d||), one after the other.

  Args:
    loss_fn: parameters to loss.
    params: w.
    direction: d, of the parameters' structure; its length does not matter.
    distances: t, [m]; negative ones lie behind w.

  Returns:
    [m]. For a direction of zero, L(w) throughout.
  """
  params, direction = (
    jax.tree.map(widen, tree) for tree in (params, direction)
  )
  unit = climb(direction, 1.0)
  return _losses(lambda t: loss_fn(add_scaled(params, t, unit)), distances)


def data_line(
  loss_of_images: Callable[[jax.Array], jax.Array],
  images: jax.Array,
  direction: jax.Array,
  distances: Distances,
) -> jax.Array:
  """Losses as all images move: image i is at x_i + t d_i / ||d_i||.

  Distances are those of `UdimConfig.rho_x` with `normalise="sample"`, so the
  perturbation of a training step is the point at rho_x, if its `clip_range`
  cuts nothing off: a line is not clipped.

  Args:
    loss_of_images: [b, ...] to loss.
    images: x, [b, ...], float.
    direction: d, [b, ...]; an image without one stays.
    distances: t, [m].

  Returns:
    [m].

  Raises:
    UserError: for images of integers.
  """
  move = functools.partial(perturb_images, images, direction)
  return _losses(lambda t: loss_of_images(move(rho_x=t)), distances)


def perturb_gap(loss_fn: LossFn, params: PyTree, radii: Distances) -> jax.Array:
  """What a step up the gradient adds to the loss: L(w + rho g / ||g||) - L(w).

  Args:
    loss_fn: parameters to loss.
    params: w.
    radii: rho, [m]. The UDIM authors' probe (`iada/perturb_gap.py`) has 0.01
      to 0.05.

  Returns:
    [m], in float32 at least; zeros where the gradient is zero.
  """
  params = jax.tree.map(widen, params)
  with jax.default_matmul_precision("float32"):
    loss, grads = jax.value_and_grad(loss_fn)(params)
  return line(loss_fn, params, grads, radii) - loss


def _losses(
  loss_at: Callable[[jax.Array], jax.Array], distances: Distances
) -> jax.Array:
  """Losses at the distances, [m], with the memory of one."""
  with jax.default_matmul_precision("float32"):
    return jax.lax.map(loss_at, jnp.asarray(distances, float))
