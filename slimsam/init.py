"""A model's first parameters, as segment-anything draws them.

Linear layers and convolutions are torch's; positions begin at zero.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from common.nn import Array, Normal, Uniform, drawn, norm_init
from slimsam.settings import DecoderSettings, EncoderSettings, SamSettings


def init_params(settings: SamSettings, key: Array) -> Any:
  """A model's first parameters; to be jitted."""
  names = ("image_encoder", "prompt_encoder", "mask_decoder")
  keys = jax.random.split(key, len(names))
  makers = (
    functools.partial(init_encoder, settings.encoder),
    functools.partial(init_prompts, settings),
    functools.partial(init_decoder, settings),
  )
  return {name: make(own) for name, make, own in zip(names, makers, keys)}


def abstract_params(settings: SamSettings) -> Any:
  """Shapes and dtypes of the parameters."""
  return jax.eval_shape(
    functools.partial(init_params, settings), jax.random.key(0)
  )


def init_encoder(cfg: EncoderSettings, key: Array) -> dict[str, Any]:
  """The image encoder's first parameters."""
  return drawn(key, _encoder(cfg))


def init_prompts(settings: SamSettings, key: Array) -> dict[str, Any]:
  """The prompt encoder's first parameters."""
  return drawn(key, _prompts(settings))


def init_decoder(settings: SamSettings, key: Array) -> dict[str, Any]:
  """The mask decoder's first parameters."""
  return drawn(key, _decoder(settings))


def _dense(inner: tuple[int, ...], outer: tuple[int, ...]) -> dict[str, Any]:
  """As torch's linear layers: uniform within 1 / sqrt of what comes in."""
  bound = math.prod(inner) ** -0.5
  return {
    "kernel": Uniform((*inner, *outer), bound),
    "bias": Uniform(outer, bound),
  }


def _kernel(inner: tuple[int, ...], outer: int) -> dict[str, Any]:
  """A layer without a bias."""
  return {"kernel": _dense(inner, (outer,))["kernel"]}


def _encoder(cfg: EncoderSettings) -> dict[str, Any]:
  width, patch, grid = cfg.width, cfg.patch, cfg.grid

  def block(i: int) -> dict[str, Any]:
    head, mlp = cfg.head_width(i), cfg.mlp_widths[i]
    table = jnp.zeros((2 * cfg.span(i) - 1, head))
    return {
      "norm1": norm_init(width),
      "attn": {
        "qkv": _dense((width,), (3, cfg.heads, head)),
        "proj": _dense((cfg.heads, head), (width,)),
        "rel_pos_h": table,
        "rel_pos_w": table,
      },
      "norm2": norm_init(width),
      "mlp": {
        "lin1": _dense((width,), (mlp,)),
        "lin2": _dense((mlp,), (width,)),
      },
    }

  return {
    "patch_embed": _dense((patch, patch, 3), (width,)),
    "pos_embed": jnp.zeros((1, grid, grid, width)),
    "blocks": {str(i): block(i) for i in range(cfg.depth)},
    "neck": {
      "conv1": _kernel((width,), cfg.out),
      "norm1": norm_init(cfg.out),
      "conv2": _kernel((3, 3, cfg.out), cfg.out),
      "norm2": norm_init(cfg.out),
    },
  }


def _prompts(settings: SamSettings) -> dict[str, Any]:
  width, channels = settings.encoder.out, settings.decoder.mask_channels

  return {
    "gaussian": Normal((2, width // 2)),
    "points": Normal((4, width)),
    "not_a_point": Normal((width,)),
    "no_mask": Normal((width,)),
    "masks": {
      "conv1": _dense((2, 2, 1), (channels // 4,)),
      "norm1": norm_init(channels // 4),
      "conv2": _dense((2, 2, channels // 4), (channels,)),
      "norm2": norm_init(channels),
      "conv3": _dense((channels,), (width,)),
    },
  }


def _decoder(settings: SamSettings) -> dict[str, Any]:
  width, cfg = settings.encoder.out, settings.decoder
  masks = cfg.num_masks + 1

  def layer() -> dict[str, Any]:
    return {
      "self_attn": _attention(cfg, width, width),
      "norm1": norm_init(width),
      "token_to_image": _attention(cfg, width, width // cfg.downsample),
      "norm2": norm_init(width),
      "mlp": {
        "lin1": _dense((width,), (cfg.mlp_width,)),
        "lin2": _dense((cfg.mlp_width,), (width,)),
      },
      "norm3": norm_init(width),
      "image_to_token": _attention(cfg, width, width // cfg.downsample),
      "norm4": norm_init(width),
    }

  def mlp(widths: list[int]) -> dict[str, Any]:
    return {
      str(i): _dense((a,), (b,))
      for i, (a, b) in enumerate(itertools.pairwise(widths))
    }

  return {
    "iou_token": Normal((1, width)),
    "mask_tokens": Normal((masks, width)),
    "layers": {str(i): layer() for i in range(cfg.depth)},
    "final_attn": _attention(cfg, width, width // cfg.downsample),
    "norm_final": norm_init(width),
    "upscale": {
      "conv1": _transposed(width, width // 4),
      "norm": norm_init(width // 4),
      "conv2": _transposed(width // 4, width // 8),
    },
    "hyper": {
      str(i): mlp([width, width, width, width // 8]) for i in range(masks)
    },
    "iou_head": mlp(
      [width, *[cfg.iou_width] * (cfg.iou_depth - 1), masks]
    ),
  }  # fmt: skip


def _attention(cfg: DecoderSettings, width: int, inner: int) -> dict[str, Any]:
  shape = (cfg.heads, inner // cfg.heads)
  return {
    "q": _dense((width,), shape),
    "k": _dense((width,), shape),
    "v": _dense((width,), shape),
    "out": _dense(shape, (width,)),
  }


def _transposed(inner: int, outer: int) -> dict[str, Any]:
  """A transposed convolution, 2x2; torch counts what goes out as coming in."""
  bound = (4 * outer) ** -0.5
  return {
    "kernel": Uniform((2, 2, inner, outer), bound),
    "bias": Uniform((outer,), bound),
  }
