"""Pretrained weights of PyTorch: torchvision and timm ResNets, ViTs.

Reads `.safetensors` and `.pth` files and answers in our trees of parameters.
Layouts: torchvision's ResNets (timm's plain ones are the same), timm's Vision
Transformers, and those of transformers, whose files and whose modules differ
since its version 5. What a file lacks or has too much is named; a file of
another architecture is refused.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from common.errors import UserError
from common.weights import Tensors, Weights, read_weights
from udim.model_resnet import ResNet
from udim.model_vit import ViT

log = logging.getLogger(__name__)

PyTree = Any
# What torchvision calls otherwise; else `_` is `.`, as in layer1_0.
_RESNET_NAMES = {
  "stem": "conv1",
  "stem_bn": "bn1",
  "downsample": "downsample.0",
  "downsample_bn": "downsample.1",
  "kernel": "weight",
  "scale": "weight",
  "mean": "running_mean",
  "var": "running_var",
}
# Present in some files, read by no classifier of ours.
_UNUSED = re.compile(r"(\.num_batches_tracked|^(vit\.)?pooler\.dense\.\w+)$")


@dataclasses.dataclass(frozen=True)
class _VitLayout:
  """Names of a Vision Transformer's weights."""

  class_token: str
  positions: str
  patch: str
  layer: str
  norm1: str
  qkv: tuple[str, ...]
  proj: str
  norm2: str
  up: str
  down: str
  norm: str
  head: str


_TIMM = _VitLayout(
  class_token="cls_token",
  positions="pos_embed",
  patch="patch_embed.proj",
  layer="blocks.{}.",
  norm1="norm1",
  qkv=("attn.qkv",),
  proj="attn.proj",
  norm2="norm2",
  up="mlp.fc1",
  down="mlp.fc2",
  norm="norm",
  head="head",
)


def _transformers(prefix: str, *, module: bool) -> _VitLayout:
  """Names of transformers: in files, or in modules since its version 5.

  Args:
    prefix: "vit." in classifiers, "" in `ViTModel`.
    module: the names of the module.
  """
  attention = "attention." if module else "attention.attention."
  parts = (
    ("q_proj", "k_proj", "v_proj") if module else ("query", "key", "value")
  )
  return _VitLayout(
    class_token=f"{prefix}embeddings.cls_token",
    positions=f"{prefix}embeddings.position_embeddings",
    patch=f"{prefix}embeddings.patch_embeddings.projection",
    layer=prefix + ("layers.{}." if module else "encoder.layer.{}."),
    norm1="layernorm_before",
    qkv=tuple(attention + part for part in parts),
    proj="attention.o_proj" if module else "attention.output.dense",
    norm2="layernorm_after",
    up="mlp.fc1" if module else "intermediate.dense",
    down="mlp.fc2" if module else "output.dense",
    norm=f"{prefix}layernorm",
    head="classifier",
  )


_VIT_LAYOUTS = (
  _TIMM,
  *(_transformers(p, module=m) for p in ("vit.", "") for m in (False, True)),
)


def load_pretrained(
  path: str, module: Any, variables: Mapping[str, PyTree]
) -> dict[str, PyTree]:
  """Fresh variables with the weights of a file in their place.

  Args:
    path: `.safetensors`, or `.pth`, `.pt`, `.bin` as torch writes them.
    module: a ResNet or a ViT from `udim.models.make_model`.
    variables: `{"params": ..., "batch_stats": ...}` of `init_variables`.

  Returns:
    As `from_torch`.

  Raises:
    UserError: when the file cannot be read, and as `from_torch`.
  """
  return from_torch(read_weights(path), module, variables, source=path)


def from_torch(
  weights: Weights,
  module: Any,
  variables: Mapping[str, PyTree],
  *,
  source: str = "the weights",
) -> dict[str, PyTree]:
  """Our variables from the tensors of a PyTorch module.

  A head for another number of classes, or none, leaves the fresh one in
  place; a log line says so.

  Args:
    weights: tensors by name, of any floating type.
    module: the ResNet or ViT that they are for.
    variables: its fresh variables. Only the head's values count, the others
      may be `jax.ShapeDtypeStruct`.
    source: what error messages and log lines call the weights.

  Returns:
    The same tree in float32 NumPy arrays, but for a head that stays. Place
    it with `jax.device_put` and the shardings of the old one.

  Raises:
    UserError: when the weights are of another architecture or shape, or some
      are missing or unknown.
  """
  wanted = _describe(module)
  found, layout = _recognise(weights)
  if found != wanted:
    raise UserError(
      f"{source}: {found}, but model.name asks for {wanted}: change "
      "model.name, or take another file"
    )
  used = {k: v for k, v in weights.items() if not _UNUSED.search(k)}
  remedy = "take weights of exactly this model"
  tensors = _Tensors(used, source, remedy=remedy, hint=_hint)
  if isinstance(module, ResNet):
    converted, head = _resnet(tensors, variables), "fc"
  else:
    converted, head = _vit(tensors, variables, layout), layout.head
  converted["params"]["head"] = _head(tensors, head, variables)
  tensors.finish()
  return converted


class _Tensors(Tensors):
  """Of layers as torch keeps them."""

  def conv(self, name: str, shape: Sequence[int]) -> np.ndarray:
    """A kernel [h w i o] from [o i h w]."""
    height, width, inputs, outputs = shape
    kernel = self.take(name, (outputs, inputs, height, width))
    return kernel.transpose(2, 3, 1, 0)

  def linear(self, name: str, like: PyTree) -> PyTree:
    """[o i] -> [i o], where o and i may be several axes of ours."""
    kernel, bias = like["kernel"].shape, like["bias"].shape
    outputs = math.prod(bias)
    inputs = math.prod(kernel) // outputs
    weight = self.take(f"{name}.weight", (outputs, inputs))
    return {
      "kernel": weight.T.reshape(kernel),
      "bias": self.take(f"{name}.bias", (outputs,)).reshape(bias),
    }

  def norm(self, name: str, like: PyTree) -> PyTree:
    """The scale and the bias of a normalization."""
    return {
      "scale": self.take(f"{name}.weight", like["scale"].shape),
      "bias": self.take(f"{name}.bias", like["bias"].shape),
    }


def _hint(name: str) -> str:
  if name.endswith(("pos_embed", "position_embeddings")):
    return ": it was made for images of another size"
  return ""


def _head(tensors: _Tensors, name: str, variables: PyTree) -> PyTree:
  """The head of the weights, or the fresh one with a log line."""
  like = variables["params"]["head"]
  shape = tensors.shape(f"{name}.weight")
  classes = like["kernel"].shape[-1]
  if shape is not None and shape[:1] == (classes,):
    return tensors.linear(name, like)
  tensors.drop(f"{name}.weight", f"{name}.bias")
  log.info(
    "%s: %s; the head for %d classes starts fresh",
    tensors.source,
    f"a head for {shape[0]} classes" if shape else "no head",
    classes,
  )
  return like


def _resnet(tensors: _Tensors, variables: PyTree) -> dict[str, PyTree]:
  """Our `layer1_0/bn1/scale` is torchvision's `layer1.0.bn1.weight`."""

  def leaf(path, like):
    _, *modules, last = (key.key for key in path)
    names = [_RESNET_NAMES.get(m, m.replace("_", ".")) for m in modules]
    name = ".".join([*names, _RESNET_NAMES.get(last, last)])
    take = tensors.conv if last == "kernel" else tensors.take
    return take(name, like.shape)

  params = {k: v for k, v in variables["params"].items() if k != "head"}
  return jax.tree_util.tree_map_with_path(
    leaf, {"params": params, "batch_stats": variables["batch_stats"]}
  )


def _vit(
  tensors: _Tensors, variables: PyTree, layout: _VitLayout
) -> dict[str, PyTree]:
  """A Vision Transformer; the weights of its layers are stacked."""
  like = variables["params"]
  depth = like["layers"]["norm1"]["scale"].shape[0]
  layers = [
    _vit_layer(tensors, layout, i, _without_axis(like["layers"], 0))
    for i in range(depth)
  ]
  kernel, bias = (like["patch"][key].shape for key in ("kernel", "bias"))
  params = {
    "class_token": tensors.take(layout.class_token, like["class_token"].shape),
    "positions": tensors.take(layout.positions, like["positions"].shape),
    "patch": {
      "kernel": tensors.conv(f"{layout.patch}.weight", kernel),
      "bias": tensors.take(f"{layout.patch}.bias", bias),
    },
    "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
    "norm": tensors.norm(layout.norm, like["norm"]),
  }
  return {"params": params, "batch_stats": {}}


def _vit_layer(
  tensors: _Tensors, layout: _VitLayout, index: int, like: PyTree
) -> PyTree:
  """One layer; `like` are its shapes, without the axis of layers."""
  prefix = layout.layer.format(index)
  if len(layout.qkv) == 1:
    qkv = tensors.linear(prefix + layout.qkv[0], like["qkv"])
  else:  # three matrices: side by side, [d n e] -> [d 3 n e]
    third = _without_axis(like["qkv"], -3)
    parts = [tensors.linear(prefix + name, third) for name in layout.qkv]
    qkv = jax.tree.map(lambda *leaves: np.stack(leaves, axis=-3), *parts)
  return {
    "norm1": tensors.norm(prefix + layout.norm1, like["norm1"]),
    "qkv": qkv,
    "proj": tensors.linear(prefix + layout.proj, like["proj"]),
    "norm2": tensors.norm(prefix + layout.norm2, like["norm2"]),
    "up": tensors.linear(prefix + layout.up, like["up"]),
    "down": tensors.linear(prefix + layout.down, like["down"]),
  }


def _without_axis(tree: PyTree, axis: int) -> PyTree:
  """The shapes of a tree less one axis."""

  def shape(leaf):
    sizes = list(leaf.shape)
    del sizes[axis]
    return jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype)

  return jax.tree.map(shape, tree)


def _describe(module: Any) -> str:
  """The architecture of a module, in the words of `_recognise`."""
  if isinstance(module, ResNet):
    return _resnet_words(module.stages, bottleneck=module.bottleneck)
  if isinstance(module, ViT):
    return _vit_words(module.depth, module.width, module.patch)
  raise UserError(
    f"model.pretrained: there are no weights for a {type(module).__name__}; "
    "take model.name='resnet18', 'resnet50', 'vit_s16' or 'vit_b16', or leave "
    "model.pretrained empty"
  )


def _recognise(weights: Weights) -> tuple[str, _VitLayout]:
  """The architecture of weights, and a ViT's layout."""
  if "layer1.0.conv1.weight" in weights:
    stages = []
    while blocks := _count(weights, f"layer{len(stages) + 1}.{{}}."):
      stages.append(blocks)
    bottleneck = "layer1.0.conv3.weight" in weights
    return _resnet_words(stages, bottleneck=bottleneck), _TIMM
  for layout in _VIT_LAYOUTS:
    patch = weights.get(f"{layout.patch}.weight")
    depth = _count(weights, layout.layer)
    if patch is not None and depth and patch.ndim == 4:
      return _vit_words(depth, patch.shape[0], patch.shape[-1]), layout
  return "neither a torchvision ResNet nor a timm or transformers ViT", _TIMM


def _count(weights: Weights, pattern: str) -> int:
  """How many of `pattern.format(0)`, `pattern.format(1)`, ... are prefixes."""
  count = 0
  while any(name.startswith(pattern.format(count)) for name in weights):
    count += 1
  return count


def _resnet_words(stages: Sequence[int], *, bottleneck: bool) -> str:
  kind = "bottleneck" if bottleneck else "basic"
  return f"a ResNet of {'-'.join(map(str, stages))} {kind} blocks"


def _vit_words(depth: int, width: int, patch: int) -> str:
  return f"a ViT of {depth} layers, width {width}, patch {patch}"
