"""Models of segment-anything and of transformers, as trees of ours and back.

Sizes are read from the tensors of segment-anything, which holds no others, and
from `config.json` of transformers.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.errors import UserError
from common.weights import Tensors, Weights
from slimsam import hf_config
from slimsam.settings import (
  PRESETS,
  DecoderSettings,
  EncoderSettings,
  SamSettings,
  preset,
)
from slimsam.torch_names import (
  TIED,
  entries,
  from_torch,
  hf_name,
  leaf,
  to_torch,
  torch_shape,
)

log = logging.getLogger(__name__)
PyTree = Any
_HEADS = 8  # of every SAM's mask decoder; tensors do not tell
_BUFFERS = ("pixel_mean", "pixel_std")


def from_sam(
  weights: Weights, *, source: str = "the model of segment-anything"
) -> tuple[PyTree, SamSettings]:
  """Our parameters from a state dict of segment-anything.

  Args:
    weights: its tensors by name. Queries, keys and values may be one tensor
      (`attn.qkv`) or three (`attn.q`, `attn.k`, `attn.v`), as in the authors'
      pruned models.
    source: what error messages call it.

  Returns:
    Float32 parameters and settings.

  Raises:
    UserError: for tensors that are missing, unknown, or do not go together.
  """
  weights = _joined(
    {name: w for name, w in weights.items() if name not in _BUFFERS}
  )
  settings = _settings_of(weights, source)
  tensors = Tensors(
    weights, source, remedy="is it a state dict of segment-anything, and whole?"
  )
  return _taken(tensors, settings, names="sam"), settings


def to_sam(params: PyTree, settings: SamSettings) -> dict[str, np.ndarray]:
  """The state dict of segment-anything; see `check_uniform`.

  Raises:
    UserError: for widths that segment-anything cannot hold.
  """
  check_uniform(settings, "segment-anything")
  return _given(params, settings, names="sam")


def from_hf(
  weights: Weights,
  config: Mapping[str, Any],
  *,
  source: str = "the model of transformers",
) -> tuple[PyTree, SamSettings]:
  """Our parameters from those of transformers' `SamModel`.

  Args:
    weights: its tensors by name; the tied one may be left out.
    config: its `config.json`.
    source: what error messages call it.

  Raises:
    UserError: for what has no counterpart here, and for tensors that are
      missing, unknown, or of another shape than the configuration's.
  """
  settings = hf_config.settings_of(config, source)
  tensors = Tensors(
    weights, source, remedy="take tensors and config.json from one model"
  )
  tensors.drop(TIED)
  return _taken(tensors, settings, names="hf"), settings


def to_hf(
  params: PyTree, settings: SamSettings
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Tensors and `config.json` of transformers' `SamModel`.

  Raises:
    UserError: for widths that it cannot hold.
  """
  check_uniform(settings, "transformers")
  weights = _given(params, settings, names="hf")
  return weights, hf_config.config_of(settings)


def name_of(settings: SamSettings) -> str:
  """The published model that has these sizes; "" if none has."""
  for name in PRESETS:
    if preset(name).encoder == settings.encoder:
      return name
  return ""


def check_uniform(settings: SamSettings, what: str) -> None:
  """Refuses widths that segment-anything and transformers cannot hold.

  Their blocks are alike, and queries are as wide as embeddings.
  """
  cfg = settings.encoder
  for name, widths in (("qkv", cfg.qkv_widths), ("mlp", cfg.mlp_widths)):
    wanted = cfg.width if name == "qkv" else widths[0]
    for block, width in enumerate(widths):
      if width != wanted:
        remedy = "pad it (--pad)" if _can_pad(cfg) else "use our own format"
        raise UserError(
          f"{what} cannot hold this model: block {block} has {name} width "
          f"{width}, and it takes {wanted}; {remedy}"
        )


def _can_pad(cfg: EncoderSettings) -> bool:
  return cfg.width % cfg.heads == 0 and max(cfg.qkv_widths) <= cfg.width


def padded(
  params: PyTree, settings: SamSettings
) -> tuple[PyTree, SamSettings, str]:
  """The same function with zeros where blocks are narrower than they may be.

  Heads become D / h wide; where that changes the scale of the logits, queries
  and positions make up for it. Hidden layers become as wide as the widest.

  Args:
    params: the model's.
    settings: its.

  Returns:
    Parameters, settings, and what was added, in words.

  Raises:
    UserError: where queries are wider than embeddings, which cannot be padded.
  """
  cfg = settings.encoder
  if not _can_pad(cfg):
    block = int(np.argmax(cfg.qkv_widths))
    raise UserError(
      f"block {block} has qkv width {cfg.qkv_widths[block]} and embeddings "
      f"have {cfg.width}: wider embeddings would change the norms, so that "
      "this model is kept in our own format alone"
    )
  mlp = max(cfg.mlp_widths)
  blocks = {
    str(i): _padded_block(
      params["image_encoder"]["blocks"][str(i)], cfg.width // cfg.heads, mlp
    )
    for i in range(cfg.depth)
  }
  made = settings.with_widths(
    qkv_widths=(cfg.width,) * cfg.depth, mlp_widths=(mlp,) * cfg.depth
  )
  encoder = {**params["image_encoder"], "blocks": blocks}
  note = (
    f"qkv widths {min(cfg.qkv_widths)} to {max(cfg.qkv_widths)} padded to "
    f"{cfg.width}, mlp widths {min(cfg.mlp_widths)} to {mlp} to {mlp}"
  )
  return {**params, "image_encoder": encoder}, made, note


def _padded_block(block: Any, head: int, mlp: int) -> Any:
  attn, ratio = block["attn"], head / block["attn"]["rel_pos_h"].shape[-1]
  factor = np.array([math.sqrt(ratio), 1.0, 1.0], np.float32)

  def grown(array: Any, axis: int, width: int) -> np.ndarray:
    array = np.asarray(array)
    extra = [(0, 0)] * array.ndim
    extra[axis] = (0, width - array.shape[axis])
    return np.pad(array, extra)

  qkv, lin1, lin2 = attn["qkv"], block["mlp"]["lin1"], block["mlp"]["lin2"]
  tables = {
    name: grown(attn[name], -1, head) / np.float32(math.sqrt(ratio))
    for name in ("rel_pos_h", "rel_pos_w")
  }
  return {
    **block,
    "attn": {
      "qkv": {
        "kernel": grown(qkv["kernel"], -1, head) * factor[:, None, None],
        "bias": grown(qkv["bias"], -1, head) * factor[:, None, None],
      },
      "proj": {
        "kernel": grown(attn["proj"]["kernel"], 1, head),
        "bias": attn["proj"]["bias"],
      },
      **tables,
    },
    "mlp": {
      "lin1": {name: grown(lin1[name], -1, mlp) for name in lin1},
      "lin2": {**lin2, "kernel": grown(lin2["kernel"], 0, mlp)},
    },
  }


def _given(
  params: PyTree, settings: SamSettings, *, names: str
) -> dict[str, np.ndarray]:
  made = {}
  for entry in entries(settings):
    array = np.asarray(leaf(params, entry.path), np.float32)
    if entry.row is not None:
      array = array[entry.row]
    name = entry.name if names == "sam" else hf_name(entry.name, settings)
    made[name] = np.ascontiguousarray(to_torch(array, entry.kind))
  return made


def _taken(tensors: Tensors, settings: SamSettings, *, names: str) -> PyTree:
  from slimsam.init import abstract_params

  like = abstract_params(settings)
  tree: dict[str, Any] = {}
  for entry in entries(settings):
    shape = leaf(like, entry.path).shape
    part = shape if entry.row is None else shape[1:]
    name = entry.name if names == "sam" else hf_name(entry.name, settings)
    found = tensors.take(name, torch_shape(entry.kind, part))
    array = np.ascontiguousarray(from_torch(found, entry.kind, part))
    *stem, last = entry.path
    place = tree
    for step in stem:
      place = place.setdefault(step, {})
    if entry.row is None:
      place[last] = array
    else:
      place.setdefault(last, np.empty(shape, np.float32))[entry.row] = array
  tensors.finish()
  return tree


def _joined(weights: Weights) -> dict[str, np.ndarray]:
  """Queries, keys and values as one tensor."""
  made = dict(weights)
  for name in weights:
    found = re.fullmatch(r"(.*\.attn)\.q\.(weight|bias)", name)
    if found is None:
      continue
    stem, kind = found.groups()
    three = [f"{stem}.{part}.{kind}" for part in "qkv"]
    if all(part in made for part in three):
      made[f"{stem}.qkv.{kind}"] = np.concatenate(
        [made.pop(part) for part in three]
      )
  return made


def _settings_of(weights: Weights, source: str) -> SamSettings:
  """The sizes that the tensors of segment-anything have."""

  def shape(name: str, rank: int) -> tuple[int, ...]:
    if name not in weights or weights[name].ndim != rank:
      raise UserError(
        f"{source} has no {name!r} of {rank} axes: is it a state dict of "
        "segment-anything, and whole?"
      )
    return weights[name].shape

  def count(pattern: str) -> int:
    found = (re.match(pattern, name) for name in weights)
    return len({match.group(1) for match in found if match})

  grid = shape("image_encoder.pos_embed", 4)[1]
  patch = shape("image_encoder.patch_embed.proj.weight", 4)[2]
  width = shape("image_encoder.pos_embed", 4)[3]
  qkv, mlp, spans, heads = [], [], [], 1
  for i in range(count(r"image_encoder\.blocks\.(\d+)\.")):
    block = f"image_encoder.blocks.{i}"
    qkv.append(shape(f"{block}.attn.qkv.weight", 2)[0] // 3)
    mlp.append(shape(f"{block}.mlp.lin1.weight", 2)[0])
    rows, head = shape(f"{block}.attn.rel_pos_h", 2)
    spans.append((rows + 1) // 2)
    heads = qkv[-1] // max(head, 1)
  if spans and spans[-1] != grid:
    # Tensors cannot tell a model without its last blocks from a shallow one.
    log.warning(
      "%s: the last of %d blocks attends within windows, which no published "
      "SAM does: is the state dict whole?", source, len(spans),
    )  # fmt: skip
  window = min((span for span in spans if span != grid), default=grid)
  encoder = EncoderSettings(
    image_size=grid * patch,
    patch=patch,
    width=width,
    heads=heads,
    qkv_widths=tuple(qkv),
    mlp_widths=tuple(mlp),
    window=window,
    global_blocks=tuple(i for i, span in enumerate(spans) if span == grid),
    out=shape("image_encoder.neck.0.weight", 4)[0],
  )
  layer = "mask_decoder.transformer.layers.0"
  inner = shape(f"{layer}.cross_attn_token_to_image.q_proj.weight", 2)[0]
  head = "mask_decoder.iou_prediction_head.layers"
  decoder = DecoderSettings(
    heads=_HEADS,
    mlp_width=shape(f"{layer}.mlp.lin1.weight", 2)[0],
    depth=count(r"mask_decoder\.transformer\.layers\.(\d+)\."),
    downsample=max(encoder.out // max(inner, 1), 1),
    num_masks=shape("mask_decoder.mask_tokens.weight", 2)[0] - 1,
    iou_width=shape(f"{head}.0.weight", 2)[0],
    iou_depth=count(r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
    mask_channels=shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
    epsilon="original",
  )
  return SamSettings(encoder, decoder)


def with_epsilon(settings: SamSettings, epsilon: str) -> SamSettings:
  """The same sizes with the norms of `original` or of `hf`."""
  decoder = dataclasses.replace(settings.decoder, epsilon=epsilon)
  return dataclasses.replace(settings, decoder=decoder)
