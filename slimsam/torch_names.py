"""Parameters of ours under the names of segment-anything and transformers.

# d width D, h heads, e width of a head, c width of the image embedding

Both hold the same tensors under other names. A linear layer's weight is [out
in] there, with queries, keys and values one after the other, each by head; a
convolution's is [out in rows columns], a transposed one's [in out rows
columns].
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from slimsam.settings import EncoderSettings, SamSettings

Path = tuple[str, ...]


class Entry(NamedTuple):
  """One tensor of segment-anything.

  Attributes:
    path: of ours.
    name: its, in segment-anything.
    kind: how the two are laid out: see `to_torch`.
    row: of ours, where it is a row alone; None: all of it.
  """

  path: Path
  name: str
  kind: str
  row: int | None = None


def entries(settings: SamSettings) -> Iterator[Entry]:
  """All tensors of a model; each number of ours belongs to exactly one."""
  yield from encoder_entries(settings.encoder)
  yield from _prompt_entries()
  yield from _decoder_entries(settings)


def encoder_entries(cfg: EncoderSettings) -> Iterator[Entry]:
  """Those of the image encoder."""
  ours, theirs = ("image_encoder",), "image_encoder"
  yield Entry((*ours, "pos_embed"), f"{theirs}.pos_embed", "same")
  yield from _pair((*ours, "patch_embed"), f"{theirs}.patch_embed.proj", "conv")
  for i in range(cfg.depth):
    block, name = (*ours, "blocks", str(i)), f"{theirs}.blocks.{i}"
    for part in ("norm1", "norm2"):
      yield from _norm((*block, part), f"{name}.{part}")
    for part in ("qkv", "proj"):
      kind = "linear_in" if part == "qkv" else "linear_out"
      yield from _pair((*block, "attn", part), f"{name}.attn.{part}", kind)
    for part in ("rel_pos_h", "rel_pos_w"):
      yield Entry((*block, "attn", part), f"{name}.attn.{part}", "same")
    for part in ("lin1", "lin2"):
      yield from _pair((*block, "mlp", part), f"{name}.mlp.{part}", "linear_in")
  neck = (*ours, "neck")
  yield Entry((*neck, "conv1", "kernel"), f"{theirs}.neck.0.weight", "point")
  yield from _norm((*neck, "norm1"), f"{theirs}.neck.1")
  yield Entry((*neck, "conv2", "kernel"), f"{theirs}.neck.2.weight", "conv")
  yield from _norm((*neck, "norm2"), f"{theirs}.neck.3")


def _prompt_entries() -> Iterator[Entry]:
  ours, theirs = ("prompt_encoder",), "prompt_encoder"
  yield Entry(
    (*ours, "gaussian"),
    f"{theirs}.pe_layer.positional_encoding_gaussian_matrix",
    "same",
  )
  for i in range(4):
    name = f"{theirs}.point_embeddings.{i}.weight"
    yield Entry((*ours, "points"), name, "row", row=i)
  for part, name in (
    ("not_a_point", "not_a_point_embed"), ("no_mask", "no_mask_embed"),
  ):  # fmt: skip
    yield Entry((*ours, part), f"{theirs}.{name}.weight", "row")
  masks, name = (*ours, "masks"), f"{theirs}.mask_downscaling"
  yield from _pair((*masks, "conv1"), f"{name}.0", "conv")
  yield from _norm((*masks, "norm1"), f"{name}.1")
  yield from _pair((*masks, "conv2"), f"{name}.3", "conv")
  yield from _norm((*masks, "norm2"), f"{name}.4")
  yield from _pair((*masks, "conv3"), f"{name}.6", "point")


def _decoder_entries(settings: SamSettings) -> Iterator[Entry]:
  cfg = settings.decoder
  ours, theirs = ("mask_decoder",), "mask_decoder"
  for part in ("iou_token", "mask_tokens"):
    yield Entry((*ours, part), f"{theirs}.{part}.weight", "same")
  transformer = f"{theirs}.transformer"
  for i in range(cfg.depth):
    layer, name = (*ours, "layers", str(i)), f"{transformer}.layers.{i}"
    for part, other in (
      ("self_attn", "self_attn"),
      ("token_to_image", "cross_attn_token_to_image"),
      ("image_to_token", "cross_attn_image_to_token"),
    ):
      yield from _attention((*layer, part), f"{name}.{other}")
    for part in ("norm1", "norm2", "norm3", "norm4"):
      yield from _norm((*layer, part), f"{name}.{part}")
    for part in ("lin1", "lin2"):
      yield from _pair((*layer, "mlp", part), f"{name}.mlp.{part}", "linear_in")
  yield from _attention(
    (*ours, "final_attn"), f"{transformer}.final_attn_token_to_image"
  )
  yield from _norm((*ours, "norm_final"), f"{transformer}.norm_final_attn")
  up, name = (*ours, "upscale"), f"{theirs}.output_upscaling"
  yield from _pair((*up, "conv1"), f"{name}.0", "transposed")
  yield from _norm((*up, "norm"), f"{name}.1")
  yield from _pair((*up, "conv2"), f"{name}.3", "transposed")
  for i in range(cfg.num_masks + 1):
    for j in range(3):
      yield from _pair(
        (*ours, "hyper", str(i), str(j)),
        f"{theirs}.output_hypernetworks_mlps.{i}.layers.{j}",
        "linear_in",
      )
  for j in range(cfg.iou_depth):
    yield from _pair(
      (*ours, "iou_head", str(j)),
      f"{theirs}.iou_prediction_head.layers.{j}",
      "linear_in",
    )


def _pair(path: Path, name: str, kind: str) -> Iterator[Entry]:
  yield Entry((*path, "kernel"), f"{name}.weight", kind)
  yield Entry((*path, "bias"), f"{name}.bias", "flat")


def _norm(path: Path, name: str) -> Iterator[Entry]:
  yield Entry((*path, "scale"), f"{name}.weight", "same")
  yield Entry((*path, "bias"), f"{name}.bias", "same")


def _attention(path: Path, name: str) -> Iterator[Entry]:
  for part in ("q", "k", "v"):
    yield from _pair((*path, part), f"{name}.{part}_proj", "linear_in")
  yield from _pair((*path, "out"), f"{name}.out_proj", "linear_out")


def to_torch(array: np.ndarray, kind: str) -> np.ndarray:
  """An array of ours in torch's layout.

  Args:
    array: see `kind`.
    kind: `same`; `flat`: [out] of any shape; `linear_in`: [in, *out];
      `linear_out`: [*in, out]; `conv`: [rows columns in out]; `point`: a
      convolution of one pixel, [in out]; `transposed`: [rows columns in out];
      `row`: [n] for [1 n].
  """
  if kind == "same":
    return array
  if kind == "flat":
    return array.reshape(-1)
  if kind == "linear_in":
    return array.reshape(len(array), -1).T
  if kind == "linear_out":
    return array.reshape(-1, array.shape[-1]).T
  if kind == "conv":
    return array.transpose(3, 2, 0, 1)
  if kind == "point":
    return array.T[:, :, None, None]
  if kind == "transposed":
    return array.transpose(2, 3, 0, 1)
  return array.reshape(1, -1)


def from_torch(
  array: np.ndarray, kind: str, shape: tuple[int, ...]
) -> np.ndarray:
  """The reverse of `to_torch`, of the shape that ours has."""
  if kind in ("linear_in", "linear_out"):
    return array.T.reshape(shape)
  if kind == "conv":
    return array.transpose(2, 3, 1, 0)
  if kind == "point":
    return array[:, :, 0, 0].T
  if kind == "transposed":
    return array.transpose(2, 3, 0, 1)
  return array.reshape(shape)


def torch_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape in torch's layout of an array of ours."""
  return to_torch(np.empty(shape, np.int8), kind).shape


# Segment-anything's names in transformers: replaced in this order.
_RENAMED = (
  (r"^image_encoder\.", "vision_encoder."),
  (r"\.blocks\.", ".layers."),
  (r"^(vision_encoder\.layers\.\d+\.)norm", r"\1layer_norm"),
  (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
  (r"\.neck\.0\.", ".neck.conv1."),
  (r"\.neck\.1\.", ".neck.layer_norm1."),
  (r"\.neck\.2\.", ".neck.conv2."),
  (r"\.neck\.3\.", ".neck.layer_norm2."),
  (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
   "shared_image_embedding.positional_embedding"),
  (r"\.point_embeddings\.", ".point_embed."),
  (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
  (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
  (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
  (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
  (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
  (r"(\.transformer\.layers\.\d+\.)norm", r"\1layer_norm"),
  (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
  (r"\.output_upscaling\.0\.", ".upscale_conv1."),
  (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
  (r"\.output_upscaling\.3\.", ".upscale_conv2."),
)  # fmt: skip
# The same matrix, held twice by transformers.
TIED = "prompt_encoder.shared_embedding.positional_embedding"


def hf_name(name: str, settings: SamSettings) -> str:
  """The name in transformers of a tensor of segment-anything."""
  for pattern, replacement in _RENAMED:
    name = re.sub(pattern, replacement, name)
  found = re.match(r"(.*(?:_mlps\.\d+|_head)\.)layers\.(\d+)(\..*)", name)
  if found is None:
    return name
  stem, number, rest = found.groups()
  last = settings.decoder.iou_depth - 1 if "_head." in stem else 2
  part = {0: "proj_in", last: "proj_out"}.get(
    int(number), f"layers.{int(number) - 1}"
  )
  return f"{stem}{part}{rest}"


def leaf(tree: Any, path: Path) -> Any:
  """What lies at a path."""
  for part in path:
    tree = tree[part]
  return tree
