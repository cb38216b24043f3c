"""Segment Anything: image encoder, prompt encoder and mask decoder.

# b images, p prompts of each, n points of a prompt, g patches along a side

The module declares parameters; `slimsam.encoder`, `slimsam.prompts` and
`slimsam.decoder` compute with them and can be used without it.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.nn import Array
from slimsam import decoder, encoder, init, prompts
from slimsam.encoder import PLAIN, Compute
from slimsam.settings import SamSettings

# Where parameters live, by path; optimizer moments end in the same paths. Heads
# and hidden layers are cut over `model`, embeddings over `fsdp`. Convolutions
# are whole: XLA's CPU gradients of kernels that are cut twice are wrong.
RULES = (
  (r"blocks/\d+/attn/qkv/kernel$", jax.P("fsdp", None, "model")),
  (r"blocks/\d+/attn/qkv/bias$", jax.P(None, "model")),
  (r"blocks/\d+/attn/proj/kernel$", jax.P("model", None, "fsdp")),
  (r"blocks/\d+/mlp/lin1/kernel$", jax.P("fsdp", "model")),
  (r"blocks/\d+/mlp/lin1/bias$", jax.P("model")),
  (r"blocks/\d+/mlp/lin2/kernel$", jax.P("model", "fsdp")),
  (r"(^|/)(patch_embed|pos_embed|blocks|neck)(/|$)", jax.P()),
  (r"(^|/)(prompt_encoder|mask_decoder)/", jax.P()),
  (r"(^|/)(step|count|factor)$", jax.P()),
)


class Masks(NamedTuple):
  """Masks of prompts.

  Attributes:
    logits: float32 [b p m 4g 4g], of the padded image; above 0 is inside.
    iou: float32 [b p m], the quality that the model predicts.
  """

  logits: Array
  iou: Array


class Sam(nn.Module):
  """The model.

      sam = Sam(preset("vit_b"))
      embeddings = sam.apply({"params": params}, images, method=sam.encode)
      masks = sam.apply({"params": params}, embeddings, points, labels,
                        method=sam.decode)

  Attributes:
    settings: its sizes.
    compute: how it runs.
  """

  settings: SamSettings
  compute: Compute = PLAIN

  def setup(self) -> None:
    cfg = self.settings
    self.image_encoder = self.param(
      "image_encoder", functools.partial(init.init_encoder, cfg.encoder)
    )
    self.prompt_encoder = self.param(
      "prompt_encoder", functools.partial(init.init_prompts, cfg)
    )
    self.mask_decoder = self.param(
      "mask_decoder", functools.partial(init.init_decoder, cfg)
    )

  def __call__(
    self,
    images: Array,
    points: Array | None = None,
    labels: Array | None = None,
    boxes: Array | None = None,
    masks: Array | None = None,
    *,
    multimask: bool | None = True,
  ) -> Masks:
    """Masks of prompts in images; see `encode` and `decode`."""
    return self.decode(
      self.encode(images), points, labels, boxes, masks, multimask=multimask
    )

  def encode(self, images: Array) -> Array:
    """Image embeddings [b g g c] of images [b size size 3]."""
    return encoder.encode(
      self.image_encoder, images, self.settings.encoder, self.compute
    )

  def decode(
    self,
    embeddings: Array,
    points: Array | None = None,
    labels: Array | None = None,
    boxes: Array | None = None,
    masks: Array | None = None,
    *,
    multimask: bool | None = True,
  ) -> Masks:
    """Masks of prompts: points, boxes, masks, or several of these.

    Args:
      embeddings: [b g g c], from `encode`.
      points: float [b p n 2], pixels of the padded image, x first.
      labels: int [b p n]: 1 foreground, 0 background, -1 no point, -10 ignored.
      boxes: float [b p 4], x y x y.
      masks: logits float [b p 4g 4g], such as those of an earlier answer.
      multimask: several masks for each prompt, or the one for prompts that
        are not ambiguous; None: that one, and then the others.
    """
    own = self.prompt_encoder
    if masks is not None and points is None and boxes is None:
      sparse = jnp.zeros((*masks.shape[:2], 0, self.settings.encoder.out))
    else:
      sparse = prompts.encode_prompts(own, self.settings, points, labels, boxes)
    if masks is None:
      dense = prompts.no_masks(own, self.settings)
    else:
      dense = prompts.encode_masks(own, masks)
    return Masks(
      *decoder.decode(
        self.mask_decoder,
        self.settings,
        embeddings,
        prompts.grid_positions(own, self.settings),
        sparse,
        dense,
        multimask=multimask,
        dtype=self.compute.dtype,
      )
    )
