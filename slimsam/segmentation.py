"""How well masks fit: the loss that Segment Anything is trained with.

# b images, p prompts of each, m masks of each, y x of the logits

    20 focal + dice, of the best mask where a prompt has several, and the
    squared error of the IoU that the model predicts (Segment Anything,
    section 3 and appendix A)
"""

import jax
import jax.numpy as jnp

from common.nn import Array

FOCAL, GAMMA, ALPHA = 20.0, 2.0, 0.25  # its weight, and its two settings


def focal_loss(logits: Array, targets: Array) -> Array:
  """Means over pixels of the focal loss (arXiv 1708.02002), [...].

  Args:
    logits: [... y x].
    targets: 0 or 1, of the same shape.
  """
  log_right = -jax.nn.softplus(-logits * (2 * targets - 1))
  wrong = -jnp.expm1(log_right)
  weight = jnp.where(targets > 0, ALPHA, 1 - ALPHA)
  return jnp.mean(-weight * wrong**GAMMA * log_right, axis=(-2, -1))


def dice_loss(logits: Array, targets: Array) -> Array:
  """1 - 2 |A and B| / (|A| + |B|) of probabilities, [...].

  Args: as for `focal_loss`. One is added above and below, so that an empty
  mask that is found empty costs nothing.
  """
  inside = jax.nn.sigmoid(logits)
  both = jnp.sum(inside * targets, axis=(-2, -1))
  sizes = jnp.sum(inside, axis=(-2, -1)) + jnp.sum(targets, axis=(-2, -1))
  return 1 - (2 * both + 1) / (sizes + 1)


def mask_iou(logits: Array, targets: Array) -> Array:
  """Intersection over union of what is above 0, [...]; of two empty masks 1."""
  ours, theirs = logits > 0, targets > 0
  both = jnp.sum(ours & theirs, axis=(-2, -1))
  either = jnp.sum(ours | theirs, axis=(-2, -1))
  return jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0)


def prompt_loss(logits: Array, iou: Array, targets: Array) -> Array:
  """The loss of each prompt, [b p].

  Args:
    logits: [b p m y x].
    iou: [b p m], as the model predicts it.
    targets: [b p y x], 0 or 1.
  """
  truth = jnp.broadcast_to(targets[:, :, None], logits.shape)
  losses = FOCAL * focal_loss(logits, truth) + dice_loss(logits, truth)
  found = jax.lax.stop_gradient(mask_iou(logits, truth))
  # Not their min: its gradient looks for losses that equal it, and where a
  # compiler computes them twice, to other last bits, it finds none: 0 / 0.
  best = jax.nn.one_hot(jnp.argmin(losses, axis=-1), losses.shape[-1])
  fit = jnp.sum(jnp.where(best > 0, losses, 0.0), axis=-1)
  return fit + jnp.mean(jnp.square(iou - found), axis=-1)
