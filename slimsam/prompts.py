"""The prompt encoder, as functions of its parameters.

# b images, p prompts of each, n points of a prompt, g patches along a side, c

    gaussian [2 c/2]             frequencies, never trained
    points [4 c]                 background, foreground, box corners
    not_a_point, no_mask [c]
    masks/{conv1 [2 2 1 m/4], norm1, conv2 [2 2 m/4 m], norm2, conv3 [m c]}

Coordinates are pixels of the padded image, x first.
"""

import einops
import jax
import jax.numpy as jnp

from common.nn import Array, Params, dense, norm
from slimsam.settings import SamSettings

EPSILON = 1e-6
BACKGROUND, FOREGROUND, NO_POINT, IGNORED = 0, 1, -1, -10  # labels


def encode_prompts(
  params: Params,
  settings: SamSettings,
  points: Array | None = None,
  labels: Array | None = None,
  boxes: Array | None = None,
) -> Array:
  """The tokens of prompts: points first, then the corners of boxes.

  Where there is no box one point that is none is added, as Segment Anything
  does.

  Args:
    params: the prompt encoder's.
    settings: the model's.
    points: float [b p n 2].
    labels: int [b p n]: 0 background, 1 foreground, -1 no point, -10 a token
      of zeros.
    boxes: float [b p 4], x y x y.

  Returns:
    float32 [b p tokens c].
  """
  found = []
  if points is not None and labels is not None:
    if boxes is None:
      points = jnp.pad(points, ((0, 0), (0, 0), (0, 1), (0, 0)))
      labels = jnp.pad(
        labels, ((0, 0), (0, 0), (0, 1)), constant_values=NO_POINT
      )
    found.append(encode_labelled(params, settings, points, labels))
  if boxes is not None:
    corners = einops.rearrange(boxes, "b p (corner xy) -> b p corner xy", xy=2)
    made = _fourier(params, _unit(corners, settings))
    found.append(made + params["points"][2:4][None, None])
  if not found:
    raise ValueError("prompts without points and without boxes have no tokens")
  return jnp.concatenate(found, axis=2)


def encode_labelled(
  params: Params, settings: SamSettings, points: Array, labels: Array
) -> Array:
  """Tokens of points and of corners of boxes, and nothing is added.

  Args:
    params: the prompt encoder's.
    settings: the model's.
    points: float [b p n 2].
    labels: int [b p n]: as for `encode_prompts`, and 2 and 3 for the top left
      and the bottom right corner of a box.

  Returns:
    float32 [b p n c].
  """
  places = _fourier(params, _unit(points, settings))
  kinds = jnp.concatenate([params["points"], params["not_a_point"][None]])
  index = jnp.where(labels == NO_POINT, 4, jnp.clip(labels, 0, 3))
  kept = (labels != NO_POINT)[..., None]
  made = jnp.where(kept, places, 0.0) + kinds[index]
  return jnp.where((labels == IGNORED)[..., None], 0.0, made)


def encode_masks(params: Params, masks: Array) -> Array:
  """Dense embeddings of mask prompts.

  Args:
    params: the prompt encoder's.
    masks: logits float [b p 4g 4g].

  Returns:
    [b p g g c].
  """
  own = params["masks"]
  x = masks[..., None]
  for i in ("1", "2"):
    x = einops.rearrange(
      x, "b p (y i) (x j) c -> b p y x (i j c)", i=2, j=2
    )  # fmt: skip
    conv = own[f"conv{i}"]
    flat = {"kernel": conv["kernel"].reshape(x.shape[-1], -1)}
    x = dense(flat | {"bias": conv["bias"]}, x)
    x = norm(own[f"norm{i}"], x, epsilon=EPSILON)
    x = jax.nn.gelu(x, approximate=False)
  return dense(own["conv3"], x)


def no_masks(params: Params, settings: SamSettings) -> Array:
  """The dense embedding where there is no mask prompt, [1 1 g g c]."""
  grid, width = settings.encoder.grid, settings.encoder.out
  return jnp.broadcast_to(params["no_mask"], (1, 1, grid, grid, width))


def grid_positions(params: Params, settings: SamSettings) -> Array:
  """Positions of the patches' centres, float32 [g g c]."""
  grid = settings.encoder.grid
  places = (jnp.arange(grid) + 0.5) / grid
  y, x = jnp.meshgrid(places, places, indexing="ij")
  return _fourier(params, jnp.stack([x, y], axis=-1))


def _unit(points: Array, settings: SamSettings) -> Array:
  """Pixels, whose centres are meant, in parts of the image."""
  return (points.astype(jnp.float32) + 0.5) / settings.encoder.image_size


def _fourier(params: Params, unit: Array) -> Array:
  """[... 2] -> [... c]."""
  turns = jnp.matmul(
    2 * unit - 1, params["gaussian"], precision=jax.lax.Precision.HIGHEST
  )
  angles = 2 * jnp.pi * turns
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
