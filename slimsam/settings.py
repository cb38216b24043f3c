"""The sizes of Segment Anything, whole or pruned."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.config import did_you_mean
from common.errors import UserError

# What the two-way transformer's norms add to the variance. Segment Anything has
# torch's 1e-5; transformers has 1e-6 but for the last norm.
EPSILONS = ("original", "hf")


def _whole(name: str, value: Any) -> None:
  if not isinstance(value, int) or isinstance(value, bool):
    raise UserError(f"{name}={value!r} must be a whole number")


def _at_least(cfg: Any, name: str, least: int) -> None:
  value = getattr(cfg, name)
  _whole(name, value)
  if value < least:
    raise UserError(f"{name}={value} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class EncoderSettings:
  """The image encoder: a Vision Transformer with windows.

  A pruned encoder has widths of its own in each block; everything else is that
  of the encoder it came from.

  Attributes:
    image_size: side of the padded image, in pixels.
    patch: side of a patch, in pixels.
    width: D, of the embeddings between blocks.
    heads: h, in every block.
    qkv_widths: Q of each block: of queries, keys and values, all heads
      together.
    mlp_widths: F of each block: of the hidden layer.
    window: side of the windows that a block attends in, in patches.
    global_blocks: blocks that attend over the whole image.
    out: width of the image embedding.
  """

  image_size: int
  patch: int
  width: int
  heads: int
  qkv_widths: tuple[int, ...]
  mlp_widths: tuple[int, ...]
  window: int
  global_blocks: tuple[int, ...]
  out: int = 256

  def __post_init__(self) -> None:
    _check_encoder(self)

  @property
  def depth(self) -> int:
    """L, the number of blocks."""
    return len(self.qkv_widths)

  @property
  def grid(self) -> int:
    """g, patches along a side."""
    return self.image_size // self.patch

  def head_width(self, block: int) -> int:
    """The width of one head of a block."""
    return self.qkv_widths[block] // self.heads

  def is_global(self, block: int) -> bool:
    """Whether a block attends over the whole image."""
    return block in self.global_blocks

  def span(self, block: int) -> int:
    """s, the side of what a block attends over, in patches."""
    return self.grid if self.is_global(block) else self.window


@dataclasses.dataclass(frozen=True)
class DecoderSettings:
  """Prompt encoder and mask decoder; their width is the image embedding's.

  Attributes:
    heads: of the two-way transformer.
    mlp_width: its hidden layers'.
    depth: its layers.
    downsample: cross attentions are that much narrower.
    num_masks: of an ambiguous prompt; one more is for those that are not.
    iou_width: hidden layers of the head that predicts the quality of masks.
    iou_depth: its layers.
    mask_channels: of the mask prompt's second convolution.
    epsilon: one of `EPSILONS`.
  """

  heads: int = 8
  mlp_width: int = 2048
  depth: int = 2
  downsample: int = 2
  num_masks: int = 3
  iou_width: int = 256
  iou_depth: int = 3
  mask_channels: int = 16
  epsilon: str = "original"

  def __post_init__(self) -> None:
    if self.epsilon not in EPSILONS:
      raise UserError(
        f"epsilon={self.epsilon!r}{did_you_mean(str(self.epsilon), EPSILONS)}"
      )
    for name in ("heads", "mlp_width", "depth", "downsample", "num_masks",
                 "iou_width", "mask_channels"):  # fmt: skip
      _at_least(self, name, 1)
    _at_least(self, "iou_depth", 2)


@dataclasses.dataclass(frozen=True)
class SamSettings:
  """Everything that decides a model's parameters.

  Attributes:
    encoder: of images.
    decoder: of prompts and masks.
  """

  encoder: EncoderSettings
  decoder: DecoderSettings = DecoderSettings()

  def __post_init__(self) -> None:
    width, cfg = self.encoder.out, self.decoder
    if width % (cfg.heads * cfg.downsample) or width % 8:
      raise UserError(
        f"out={width} must be a multiple of 8 and of heads={cfg.heads} times "
        f"downsample={cfg.downsample}"
      )

  def to_dict(self) -> dict[str, Any]:
    """Plain data, for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(self)))

  @classmethod
  def from_dict(cls, content: Mapping[str, Any]) -> "SamSettings":
    """The inverse of `to_dict`.

    Raises:
      UserError: for unknown or missing entries.
    """
    try:
      encoder: dict[str, Any] = {
        name: tuple(value) if isinstance(value, Sequence) else value
        for name, value in content["encoder"].items()
      }
      return cls(
        EncoderSettings(**encoder), DecoderSettings(**content["decoder"])
      )
    except (KeyError, TypeError, AttributeError) as error:
      raise UserError(f"no settings of a SAM: {error}") from error

  def with_widths(
    self,
    width: int | None = None,
    qkv_widths: Iterable[int] | None = None,
    mlp_widths: Iterable[int] | None = None,
  ) -> "SamSettings":
    """The same model with other widths in the image encoder."""
    changes: dict[str, Any] = {}
    if width is not None:
      changes["width"] = width
    if qkv_widths is not None:
      changes["qkv_widths"] = tuple(qkv_widths)
    if mlp_widths is not None:
      changes["mlp_widths"] = tuple(mlp_widths)
    encoder = dataclasses.replace(self.encoder, **changes)
    return dataclasses.replace(self, encoder=encoder)


def uniform(
  *,
  width: int,
  depth: int,
  heads: int,
  mlp_width: int,
  global_blocks: Sequence[int],
  qkv_width: int | None = None,
  image_size: int = 1024,
  patch: int = 16,
  window: int = 14,
  out: int = 256,
  decoder: DecoderSettings = DecoderSettings(),
) -> SamSettings:
  """A model whose blocks are alike."""
  return SamSettings(
    EncoderSettings(
      image_size=image_size,
      patch=patch,
      width=width,
      heads=heads,
      qkv_widths=(width if qkv_width is None else qkv_width,) * depth,
      mlp_widths=(mlp_width,) * depth,
      window=window,
      global_blocks=tuple(global_blocks),
      out=out,
    ),
    decoder,
  )


_VIT_B = {"depth": 12, "heads": 12, "global_blocks": (2, 5, 8, 11)}
# Segment Anything's encoders, and those of the uniform SlimSAM checkpoints.
_PRESETS: dict[str, dict[str, Any]] = {
  "vit_b": {"width": 768, "mlp_width": 3072, **_VIT_B},
  "vit_l": {
    "width": 1024, "mlp_width": 4096, "depth": 24, "heads": 16,
    "global_blocks": (5, 11, 17, 23),
  },
  "vit_h": {
    "width": 1280, "mlp_width": 5120, "depth": 32, "heads": 16,
    "global_blocks": (7, 15, 23, 31),
  },
  "vit_p50": {"width": 384, "mlp_width": 1536, **_VIT_B},
  "vit_p77": {"width": 168, "mlp_width": 696, **_VIT_B},
}  # fmt: skip
PRESETS = tuple(_PRESETS)


def preset(name: str) -> SamSettings:
  """The sizes of a published model.

  Raises:
    UserError: for an unknown name.
  """
  if name not in _PRESETS:
    raise UserError(f"no model {name!r}{did_you_mean(name, PRESETS)}")
  return uniform(**_PRESETS[name])


def _check_encoder(cfg: EncoderSettings) -> None:
  for name in ("image_size", "patch", "width", "heads", "window", "out"):
    _at_least(cfg, name, 1)
  if cfg.image_size % cfg.patch:
    raise UserError(
      f"image_size={cfg.image_size} is not divisible by patch={cfg.patch}"
    )
  for name in ("qkv_widths", "mlp_widths", "global_blocks"):
    for value in getattr(cfg, name):
      _whole(name, value)
  if not cfg.qkv_widths or len(cfg.qkv_widths) != len(cfg.mlp_widths):
    raise UserError(
      f"{len(cfg.qkv_widths)} qkv_widths and {len(cfg.mlp_widths)} mlp_widths: "
      "give one of each for every block"
    )
  for block, (qkv, mlp) in enumerate(zip(cfg.qkv_widths, cfg.mlp_widths)):
    if qkv < 1 or qkv % cfg.heads:
      raise UserError(
        f"block {block}: qkv width {qkv} is not divisible by {cfg.heads} heads"
      )
    if mlp < 1:
      raise UserError(f"block {block}: mlp width {mlp} must be at least 1")
  for block in cfg.global_blocks:
    if not 0 <= block < cfg.depth:
      raise UserError(
        f"global_blocks={cfg.global_blocks}: blocks are numbered from 0 to "
        f"{cfg.depth - 1}"
      )
