"""`config.json` and `preprocessor_config.json` of transformers' `SamModel`."""

from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from slimsam.settings import DecoderSettings, EncoderSettings, SamSettings

# What transformers takes for granted where config.json is silent.
_VISION: dict[str, Any] = {
  "hidden_size": 768, "output_channels": 256, "num_hidden_layers": 12,
  "num_attention_heads": 12, "image_size": 1024, "patch_size": 16,
  "mlp_dim": None, "mlp_ratio": 4.0, "window_size": 14,
  "global_attn_indexes": (2, 5, 8, 11),
}  # fmt: skip
_DECODER: dict[str, Any] = {
  "mlp_dim": 2048, "num_hidden_layers": 2, "num_attention_heads": 8,
  "attention_downsample_rate": 2, "num_multimask_outputs": 3,
  "iou_head_depth": 3, "iou_head_hidden_dim": 256,
}  # fmt: skip
# The only value that has a counterpart here.
_ONLY: dict[str, dict[str, Any]] = {
  "vision_config": {
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
    "use_abs_pos": True, "use_rel_pos": True, "num_channels": 3,
  },
  "prompt_encoder_config": {
    "hidden_act": "gelu", "num_point_embeddings": 4, "layer_norm_eps": 1e-6,
  },
  "mask_decoder_config": {"hidden_act": "relu", "layer_norm_eps": 1e-6},
}  # fmt: skip


def settings_of(config: Mapping[str, Any], source: str) -> SamSettings:
  """The sizes that a `config.json` gives.

  Args:
    config: its content.
    source: what error messages call it.

  Raises:
    UserError: for what has no counterpart here, and for values of wrong kinds.
  """
  if config.get("model_type") != "sam":
    raise UserError(
      f"{source}: model_type={config.get('model_type')!r}: only 'sam' is read"
    )
  for part, only in _ONLY.items():
    if not isinstance(config.get(part, {}), Mapping):
      raise UserError(f"{source}: {part}={config[part]!r:.80} is no object")
    for key, value in only.items():
      found = config.get(part, {}).get(key, value)
      if found != value:
        raise UserError(
          f"{source}: {part}.{key}={found!r} has no counterpart here, only "
          f"{value!r} has"
        )
  vision = _VISION | {
    key: value
    for key, value in config.get("vision_config", {}).items()
    if key in _VISION
  }
  decoder = _DECODER | {
    key: value
    for key, value in config.get("mask_decoder_config", {}).items()
    if key in _DECODER
  }
  prompts = config.get("prompt_encoder_config", {})
  try:
    return _sizes(vision, decoder, prompts)
  except TypeError as error:
    raise UserError(
      f"{source}: its configuration holds a value of a wrong kind: {error}"
    ) from None


def _sizes(
  vision: Mapping[str, Any],
  decoder: Mapping[str, Any],
  prompts: Mapping[str, Any],
) -> SamSettings:
  """The sizes that configurations of transformers' parts give."""
  width, depth = vision["hidden_size"], vision["num_hidden_layers"]
  mlp = vision["mlp_dim"] or int(width * vision["mlp_ratio"])
  return SamSettings(
    EncoderSettings(
      image_size=vision["image_size"],
      patch=vision["patch_size"],
      width=width,
      heads=vision["num_attention_heads"],
      qkv_widths=(width,) * depth,
      mlp_widths=(mlp,) * depth,
      window=vision["window_size"],
      global_blocks=tuple(vision["global_attn_indexes"]),
      out=vision["output_channels"],
    ),
    DecoderSettings(
      heads=decoder["num_attention_heads"],
      mlp_width=decoder["mlp_dim"],
      depth=decoder["num_hidden_layers"],
      downsample=decoder["attention_downsample_rate"],
      num_masks=decoder["num_multimask_outputs"],
      iou_width=decoder["iou_head_hidden_dim"],
      iou_depth=decoder["iou_head_depth"],
      mask_channels=prompts.get("mask_input_channels", 16),
      epsilon="hf",
    ),
  )


def config_of(settings: SamSettings) -> dict[str, Any]:
  """The `config.json` of a model."""
  cfg, own = settings.encoder, settings.decoder
  vision = {
    "hidden_size": cfg.width,
    "output_channels": cfg.out,
    "num_hidden_layers": cfg.depth,
    "num_attention_heads": cfg.heads,
    "num_channels": 3,
    "image_size": cfg.image_size,
    "patch_size": cfg.patch,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "initializer_range": 1e-10,
    "qkv_bias": True,
    "mlp_dim": cfg.mlp_widths[0],
    "mlp_ratio": cfg.mlp_widths[0] / cfg.width,
    "use_abs_pos": True,
    "use_rel_pos": True,
    "window_size": cfg.window,
    "global_attn_indexes": list(cfg.global_blocks),
    "num_pos_feats": cfg.out // 2,
  }
  prompts = {
    "hidden_size": cfg.out,
    "image_size": cfg.image_size,
    "patch_size": cfg.patch,
    "mask_input_channels": own.mask_channels,
    "num_point_embeddings": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
  }
  decoder = {
    "hidden_size": cfg.out,
    "hidden_act": "relu",
    "mlp_dim": own.mlp_width,
    "num_hidden_layers": own.depth,
    "num_attention_heads": own.heads,
    "attention_downsample_rate": own.downsample,
    "num_multimask_outputs": own.num_masks,
    "iou_head_depth": own.iou_depth,
    "iou_head_hidden_dim": own.iou_width,
    "layer_norm_eps": 1e-6,
  }
  return {
    "model_type": "sam",
    "architectures": ["SamModel"],
    "initializer_range": 0.02,
    "vision_config": vision,
    "prompt_encoder_config": prompts,
    "mask_decoder_config": decoder,
  }


def preprocessor_config(settings: SamSettings) -> dict[str, Any]:
  """`preprocessor_config.json`: what transformers does to an image before."""
  size = settings.encoder.image_size
  mask_size = 4 * settings.encoder.grid
  return {
    "image_processor_type": "SamImageProcessor",
    "processor_class": "SamProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "rescale_factor": 1 / 255,
    "resample": 2,
    "size": {"longest_edge": size},
    "pad_size": {"height": size, "width": size},
    "mask_size": {"longest_edge": mask_size},
    "mask_pad_size": {"height": mask_size, "width": mask_size},
  }
