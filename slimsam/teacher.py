"""Trains a whole SAM on images with masks: the teacher of small experiments.

# b images, p prompts of each

Each prompt is asked three times, as it will be used: a point for one mask, the
same point for several of which the best counts, and a box for one mask.
"""

from typing import Any

import jax.numpy as jnp

from common.metrics import Mean
from common.nn import Array
from common.step import LossFn
from slimsam.model import Sam
from slimsam.segmentation import mask_iou, prompt_loss

PyTree = Any


def make_loss_fn(sam: Sam) -> LossFn:
  """The loss of prompts, a mean over those that are no padding.

  Args:
    sam: the model.

  Returns:
    `(params, batch, rngs) -> (loss, metrics)`; for the batch see
    `slimsam.data.PromptedExample`. Metrics: loss, and the IoU with the truth of
    a point's one mask (`iou_point`), of the best of its several (`iou_best`)
    and of a box's mask (`iou_box`), on the grid of the logits.
  """

  def loss_fn(
    params: PyTree, batch: Any, rngs: Any
  ) -> tuple[Array, dict[str, Mean]]:
    del rngs
    variables, masks = {"params": params}, batch["masks"]
    valid = batch["valid"]
    embeddings = sam.apply(variables, batch["images"], method=sam.encode)
    points = batch["points"][:, :, None]
    by_point: Any = sam.apply(
      variables, embeddings, points=points,
      labels=jnp.ones(points.shape[:3], jnp.int32), multimask=None,
      method=sam.decode,
    )  # fmt: skip
    by_box: Any = sam.apply(
      variables, embeddings, boxes=batch["boxes"], multimask=False,
      method=sam.decode,
    )  # fmt: skip
    answers = (
      (by_point.logits[:, :, :1], by_point.iou[:, :, :1]),
      (by_point.logits[:, :, 1:], by_point.iou[:, :, 1:]),
      (by_box.logits, by_box.iou),
    )
    rows = [prompt_loss(*answer, masks) for answer in answers]
    loss = Mean.of(jnp.sum(jnp.stack(rows), axis=0), valid)
    metrics = {"loss": loss}
    for name, (logits, _) in zip(("point", "best", "box"), answers):
      truth = jnp.broadcast_to(masks[:, :, None], logits.shape)
      best = jnp.max(mask_iou(logits, truth), axis=-1)
      metrics[f"iou_{name}"] = Mean.of(best, valid)
    return loss.total / jnp.maximum(loss.count, 1e-9), metrics

  return loss_fn
