"""Data ascent: unknown domains, emulated by perturbing the source's images.

# b images, h height, w width, c channels

The worst domain near the source maximizes, to first order in rho,

    A(x) = L(theta; x) + rho ||grad_theta L(theta; x)||

and the images take one step of length rho_x along its gradient, normalised.
With eps = rho g / ||g|| that gradient is

    grad_x A = grad_x L + (d / dtheta grad_x L)[eps]

a derivative of grad_x L along eps: no double backward pass. To first order
it is also grad_x L at theta + eps, which the second pass of SAM has anyway.

arXiv 2403.07329; the authors' `iada/iada_final.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from common.errors import UserError

PyTree = Any
_FLAT = 1e-6  # below it a channel's standard deviation does


def exact_data_grad(
  data_grad_fn: Callable[[PyTree], jax.Array], params: PyTree, eps: PyTree
) -> jax.Array:
  """grad_x A at `params`; about two more gradients' worth of FLOPs.

  Args:
    data_grad_fn: parameters to grad_x L, [b, ...].
    params: theta.
    eps: rho g / ||g||, of the parameters' structure.

  Returns:
    [b, ...], equal to the gradient by a double backward pass.
  """
  plain, along = jax.jvp(data_grad_fn, (params,), (eps,))
  return plain + along


def perturb_images(
  images: jax.Array,
  data_grad: jax.Array,
  *,
  rho_x: float | jax.Array,
  normalise: str = "sample",
  perturbation: str = "pixel",
  clip_range: tuple[float, float] | None = None,
) -> jax.Array:
  """One ascent step on the images. No gradient of its own.

  Args:
    images: [b, ..., c], float.
    data_grad: [b, ..., c], the gradient to ascend.
    rho_x: length of the step, see `UdimConfig`.
    normalise: "sample", "batch" or "sign": what has that length.
    perturbation: "pixel" moves the pixels. "style" moves each image's mean
      and standard deviation per channel, its gradient being

          dA/dmean = sum_hw G,   dA/dstd = sum_hw G (x - mean) / std

      and rebuilds the image from the moved statistics. A standard deviation
      stops at 0, that of a constant channel stays.
    clip_range: (low, high) or None.

  Returns:
    The perturbed images, [b, ..., c], of the images' dtype. Where the gradient
    is zero they are the images.

  Raises:
    UserError: for images of integers, or without room for a style.
  """
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f"udim: images of {images.dtype} have no gradient: scale them to floats"
    )
  dtype = jnp.promote_types(images.dtype, jnp.float32)
  old, data_grad = images.astype(dtype), data_grad.astype(dtype)
  if perturbation == "style":
    new = _move_style(old, data_grad, rho_x, normalise)
  else:
    new = old + rho_x * _direction(data_grad, normalise)
  if clip_range is not None:
    new = jnp.clip(new, *clip_range)
  return jax.lax.stop_gradient(new.astype(images.dtype))


def _direction(data_grad: jax.Array, normalise: str) -> jax.Array:
  """The gradient scaled to length 1, or to 0 where there is none."""
  if normalise == "sign":
    return jnp.sign(data_grad)
  axes = (0,) if normalise == "batch" else tuple(range(1, data_grad.ndim))
  # By the largest entry first: a confident image's gradient is below 1e-12, and
  # its squares would be 0.
  largest = jnp.max(jnp.abs(data_grad), axis=axes, keepdims=True)
  scaled = data_grad / jnp.where(largest == 0, 1, largest)
  squares = jnp.sum(jnp.square(scaled), axis=axes, keepdims=True)
  return scaled / jnp.sqrt(jnp.maximum(squares, 1))


def _move_style(
  images: jax.Array, data_grad: jax.Array, rho_x, normalise: str
) -> jax.Array:
  if images.ndim < 3:
    raise UserError(
      f"udim: perturbation='style' needs images [b, ..., c], got "
      f"{list(images.shape)}"
    )
  pixels = tuple(range(1, images.ndim - 1))
  mean = jnp.mean(images, axis=pixels, keepdims=True)
  std = jnp.std(images, axis=pixels, keepdims=True)  # [b 1 1 c]
  whitened = (images - mean) / jnp.maximum(std, _FLAT)
  of_mean = jnp.sum(data_grad, axis=pixels, keepdims=True)
  of_std = jnp.sum(data_grad * whitened, axis=pixels, keepdims=True)
  step = rho_x * _direction(jnp.stack([of_mean, of_std], axis=1), normalise)
  by_mean, by_std = step[:, 0], jnp.maximum(step[:, 1], -std)
  # (x - mean) / std * (std + by_std) + mean + by_mean, without its rounding.
  return images + by_mean + by_std * whitened
