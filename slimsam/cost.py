"""What a model costs: parameters and multiply-accumulates of one image.

Two conventions. `conv_linear` counts convolutions and linear layers, as
published figures do; `true` adds what attention multiplies, and the products
with relative positions, which pruning hardly makes less: at 77 % they are more
than half of the work. Windows count with the patches that pad them (4,900 for
4,096). `reference` is the authors' counter: `conv_linear`, one for each output
of a GELU and of a convolution's bias, and one row of each linear layer's bias.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.tree import count_params
from slimsam.attention import TEXTBOOK
from slimsam.encoder import Compute, encode
from slimsam.init import abstract_params
from slimsam.settings import EncoderSettings, SamSettings


class Macs(NamedTuple):
  """Multiply-accumulates of an image encoder.

  Attributes:
    conv_linear: of convolutions and linear layers.
    attention: queries times keys, and weights times values.
    positions: queries times relative positions.
    reference: what the authors' counter says.
  """

  conv_linear: int
  attention: int
  positions: int
  reference: int

  @property
  def true(self) -> int:
    """All of them."""
    return self.conv_linear + self.attention + self.positions


def encoder_macs(cfg: EncoderSettings) -> Macs:
  """Of one image."""
  grid, width, out = cfg.grid, cfg.width, cfg.out
  patches = grid**2
  conv = patches * cfg.patch**2 * 3 * width
  conv += patches * (width * out + 9 * out * out)
  linear = attention = positions = biases = gelu = 0
  for i in range(cfg.depth):
    qkv, hidden, span = cfg.qkv_widths[i], cfg.mlp_widths[i], cfg.span(i)
    tokens = (-(-grid // span) * span) ** 2
    linear += 4 * tokens * width * qkv + 2 * patches * width * hidden
    attention += 2 * tokens * span**2 * qkv
    positions += 2 * tokens * span * qkv
    biases += 3 * qkv + width + hidden + width
    gelu += patches * hidden
  return Macs(
    conv_linear=conv + linear,
    attention=attention,
    positions=positions,
    reference=conv + linear + gelu + biases + patches * width,
  )


def decoder_macs(settings: SamSettings, tokens: int = 7) -> Macs:
  """Of one prompt: its tokens and those of the masks, 5 + 2 for a point.

  The authors' counter takes a transposed convolution for a convolution of its
  outputs, four times what it multiplies.
  """
  cfg, width, grid = (
    settings.decoder,
    settings.encoder.out,
    settings.encoder.grid,
  )
  places, inner = grid**2, settings.encoder.out // cfg.downsample
  masks = cfg.num_masks + 1
  cross = 2 * (places + tokens) * width * inner
  linear = (2 * cfg.depth + 1) * cross
  linear += cfg.depth * tokens * (4 * width**2 + 2 * width * cfg.mlp_width)
  linear += masks * (2 * width**2 + width * (width // 8))
  linear += width * cfg.iou_width + cfg.iou_width * masks
  linear += (cfg.iou_depth - 2) * cfg.iou_width**2
  up = 4 * places * (width * (width // 4) + 4 * (width // 4) * (width // 8))
  attention = 2 * tokens * places * inner * (2 * cfg.depth + 1)
  attention += 2 * cfg.depth * tokens**2 * width
  attention += masks * 16 * places * (width // 8)
  outputs = 4 * places * (width // 4) + 16 * places * (width // 8)
  attentions = cfg.depth * (4 * width + 2 * (3 * inner + width))
  biases = attentions + 3 * inner + width
  biases += cfg.depth * (cfg.mlp_width + width)
  biases += masks * (2 * width + width // 8)
  biases += (cfg.iou_depth - 1) * cfg.iou_width + masks
  return Macs(
    conv_linear=linear + up,
    attention=attention,
    positions=0,
    reference=linear + 4 * up + 2 * outputs + biases,
  )


def encoder_params(settings: SamSettings) -> int:
  """How many numbers the image encoder has."""
  return count_params(abstract_params(settings)["image_encoder"])


def xla_macs(settings: SamSettings) -> float:
  """XLA's own count of the encoder, halved: a second opinion.

  From shapes alone, nothing is compiled or computed. It also counts what is
  done to each number (softmax, norms, GELU); of the padding of windows it sees
  what attention does with it alone. In the textbook form: a loop's body would
  be counted once.
  """
  cfg = settings.encoder
  size = cfg.image_size
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  compute = Compute(how=TEXTBOOK)

  def run(params: Any, images: Any) -> Any:
    return encode(params, images, cfg, compute)

  shapes = abstract_params(settings)["image_encoder"]
  analysis: Any = jax.jit(run).lower(shapes, image).cost_analysis()
  return analysis["flops"] / 2
