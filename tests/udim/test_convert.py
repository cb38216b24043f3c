"""Weights of PyTorch, fabricated: what goes where, and what is refused."""

import functools
import logging
import sys

import chex
import jax
import numpy as np
import pytest

from common.errors import UserError
from common.weights import read_weights
from udim.convert import from_torch, load_pretrained
from udim.models import ResNet, SmallCNN, ViT, WideResNet, init_variables

IMAGE = (32, 32, 3)
RESNET = ResNet(7, stages=(1, 2), width=4)
BOTTLENECK = ResNet(7, stages=(1, 2), width=4, bottleneck=True)
VIT = ViT(7, width=12, depth=2, heads=3, patch=16)


@functools.cache
def fresh(model):
  """Shapes, but for a head of values: the conversion needs no others."""
  init = functools.partial(init_variables, model, image_shape=IMAGE)
  variables = jax.eval_shape(init, jax.random.key(0))
  head = variables["params"]["head"]
  variables["params"]["head"] = jax.tree.map(
    lambda leaf: np.full(leaf.shape, 0.25, leaf.dtype), head
  )
  return variables


def tensors(shapes):
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def norm_shapes(name, channels):
  return {
    f"{name}.weight": (channels,),
    f"{name}.bias": (channels,),
    f"{name}.running_mean": (channels,),
    f"{name}.running_var": (channels,),
    f"{name}.num_batches_tracked": (),
  }


def resnet_weights(*, bottleneck, classes=7, stages=(1, 2), width=4):
  """A state dict with torchvision's names and shapes."""
  shapes = {"conv1.weight": (width, 3, 7, 7), **norm_shapes("bn1", width)}
  inputs = width
  for stage, blocks in enumerate(stages, 1):
    inner = width * 2 ** (stage - 1)
    outputs = 4 * inner if bottleneck else inner
    for i in range(blocks):
      name = f"layer{stage}.{i}"
      plan = (
        [(inner, inputs, 1), (inner, inner, 3), (outputs, inner, 1)]
        if bottleneck
        else [(inner, inputs, 3), (inner, inner, 3)]
      )
      for j, (o, c, size) in enumerate(plan, 1):
        shapes[f"{name}.conv{j}.weight"] = (o, c, size, size)
        shapes |= norm_shapes(f"{name}.bn{j}", o)
      if inputs != outputs:
        shapes[f"{name}.downsample.0.weight"] = (outputs, inputs, 1, 1)
        shapes |= norm_shapes(f"{name}.downsample.1", outputs)
      inputs = outputs
  shapes |= {"fc.weight": (classes, inputs), "fc.bias": (classes,)}
  return tensors(shapes)


def timm_weights(*, classes=7, d=12, depth=2, patch=16, positions=5):
  """A state dict with timm's names and shapes."""
  shapes = {
    "cls_token": (1, 1, d),
    "pos_embed": (1, positions, d),
    "patch_embed.proj.weight": (d, 3, patch, patch),
    "patch_embed.proj.bias": (d,),
  }
  for i in range(depth):
    for name, out, into in (
      ("attn.qkv", 3 * d, d),
      ("attn.proj", d, d),
      ("mlp.fc1", 4 * d, d),
      ("mlp.fc2", d, 4 * d),
    ):
      shapes[f"blocks.{i}.{name}.weight"] = (out, into)
      shapes[f"blocks.{i}.{name}.bias"] = (out,)
    for name in ("norm1", "norm2"):
      shapes[f"blocks.{i}.{name}.weight"] = (d,)
      shapes[f"blocks.{i}.{name}.bias"] = (d,)
  shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
  shapes |= {"head.weight": (classes, d), "head.bias": (classes,)}
  return tensors(shapes)


FILES = (  # as transformers saves, and as its modules call them
  ("attn.q.", "attention.attention.query.", "attention.q_proj."),
  ("attn.k.", "attention.attention.key.", "attention.k_proj."),
  ("attn.v.", "attention.attention.value.", "attention.v_proj."),
  ("attn.proj.", "attention.output.dense.", "attention.o_proj."),
  ("norm1.", "layernorm_before.", "layernorm_before."),
  ("norm2.", "layernorm_after.", "layernorm_after."),
  ("mlp.fc1.", "intermediate.dense.", "mlp.fc1."),
  ("mlp.fc2.", "output.dense.", "mlp.fc2."),
)
OUTER = {
  "cls_token": "embeddings.cls_token",
  "pos_embed": "embeddings.position_embeddings",
  "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
  "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
  "norm.weight": "layernorm.weight",
  "norm.bias": "layernorm.bias",
}


def transformers_weights(weights, *, prefix, module):
  """The same tensors under the names of transformers."""
  found = {}
  for name, value in weights.items():
    if name.startswith("head."):
      found[name.replace("head.", "classifier.")] = value
    elif name in OUTER:
      found[prefix + OUTER[name]] = value
    else:
      _, index, rest = name.split(".", 2)
      layers = "layers" if module else "encoder.layer"
      parts = {rest: value}
      if rest.startswith("attn.qkv."):
        kind = rest.removeprefix("attn.qkv.")
        keys = [f"attn.{part}.{kind}" for part in "qkv"]
        parts = dict(zip(keys, np.split(value, 3)))
      for key, part in parts.items():
        for timm, file, new in FILES:
          if key.startswith(timm):
            key = key.replace(timm, new if module else file)
            break
        found[f"{prefix}{layers}.{index}.{key}"] = part
  return found


# -- what goes where -----------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "count"),
  [
    ({"bottleneck": False, "stages": (2, 2, 2, 2)}, 122),
    ({"bottleneck": True, "stages": (3, 4, 6, 3)}, 320),
  ],
)
def test_the_fabricated_names_are_as_many_as_torchvisions(options, count):
  assert len(resnet_weights(**options)) == count


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_resnet(bottleneck):
  model = BOTTLENECK if bottleneck else RESNET
  weights = resnet_weights(bottleneck=bottleneck)
  found = from_torch(weights, model, fresh(model))
  chex.assert_trees_all_equal_shapes_and_dtypes(found, fresh(model))
  params, stats = found["params"], found["batch_stats"]
  kernel = params["stem"]["kernel"]
  assert kernel[2, 5, 1, 3] == weights["conv1.weight"][3, 1, 2, 5]
  kernel = params["layer2_1"]["conv2"]["kernel"]
  assert kernel[2, 1, 5, 3] == weights["layer2.1.conv2.weight"][3, 5, 2, 1]
  kernel = params["layer2_0"]["downsample"]["kernel"]
  assert kernel[0, 0, 3, 7] == weights["layer2.0.downsample.0.weight"][7, 3]
  for ours, theirs in (
    (params["stem_bn"]["scale"], "bn1.weight"),
    (params["layer1_0"]["bn2"]["bias"], "layer1.0.bn2.bias"),
    (stats["layer1_0"]["bn1"]["mean"], "layer1.0.bn1.running_mean"),
    (stats["layer2_0"]["downsample_bn"]["var"],
     "layer2.0.downsample.1.running_var"),
    (params["head"]["kernel"].T, "fc.weight"),
    (params["head"]["bias"], "fc.bias"),
  ):  # fmt: skip
    np.testing.assert_array_equal(ours, weights[theirs])


def test_a_vit_of_timm():
  weights = timm_weights()
  found = from_torch(weights, VIT, fresh(VIT))
  chex.assert_trees_all_equal_shapes_and_dtypes(found, fresh(VIT))
  params = found["params"]
  layers = params["layers"]
  kernel = params["patch"]["kernel"]
  assert kernel[3, 8, 1, 7] == weights["patch_embed.proj.weight"][7, 1, 3, 8]
  # Row 12 * part + 4 * head + i of qkv: part of (query, key, value).
  qkv = weights["blocks.1.attn.qkv.weight"]
  assert layers["qkv"]["kernel"][1, 9, 2, 1, 3] == qkv[24 + 4 + 3, 9]
  qkv = weights["blocks.1.attn.qkv.bias"]
  assert layers["qkv"]["bias"][1, 1, 2, 0] == qkv[12 + 8]
  # The columns of the projection are heads by their width.
  proj = weights["blocks.0.attn.proj.weight"]
  assert layers["proj"]["kernel"][0, 2, 1, 5] == proj[5, 8 + 1]
  for ours, theirs in (
    (params["class_token"], "cls_token"),
    (params["positions"], "pos_embed"),
    (layers["norm1"]["scale"][1], "blocks.1.norm1.weight"),
    (layers["norm2"]["bias"][0], "blocks.0.norm2.bias"),
    (layers["up"]["kernel"][1].T, "blocks.1.mlp.fc1.weight"),
    (layers["down"]["kernel"][0].T, "blocks.0.mlp.fc2.weight"),
    (params["norm"]["scale"], "norm.weight"),
    (params["head"]["kernel"].T, "head.weight"),
  ):
    np.testing.assert_array_equal(ours, weights[theirs])


@pytest.mark.parametrize("prefix", ["vit.", ""])
@pytest.mark.parametrize("module", [False, True])
def test_a_vit_of_transformers(prefix, module):
  weights = timm_weights()
  theirs = transformers_weights(weights, prefix=prefix, module=module)
  theirs[f"{prefix}pooler.dense.weight"] = np.zeros((12, 12), np.float32)
  found = from_torch(theirs, VIT, fresh(VIT))
  expected = from_torch(weights, VIT, fresh(VIT))
  chex.assert_trees_all_equal(found, expected)


def test_half_precision_becomes_float32():
  weights = resnet_weights(bottleneck=False)
  half = {name: value.astype(np.float16) for name, value in weights.items()}
  found = from_torch(half, RESNET, fresh(RESNET))
  chex.assert_trees_all_equal_shapes_and_dtypes(found, fresh(RESNET))
  np.testing.assert_array_equal(
    found["params"]["head"]["bias"], half["fc.bias"]
  )


# -- the head ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("classes", "said"),
  [(1000, "x.pth: a head for 1000 classes; "), (None, "x.pth: no head; ")],
)
@pytest.mark.parametrize("model", [RESNET, VIT], ids=["resnet", "vit"])
def test_another_head_is_left_out_and_the_log_says_so(
  model, classes, said, caplog
):
  if model is VIT:
    weights = timm_weights(classes=classes or 1)
  else:
    weights = resnet_weights(bottleneck=False, classes=classes or 1)
  if classes is None:
    weights = {
      k: v for k, v in weights.items() if not k.startswith(("fc.", "head."))
    }
  with caplog.at_level(logging.INFO, "udim.convert"):
    found = from_torch(weights, model, fresh(model), source="x.pth")
  expected = said + "the head for 7 classes starts fresh"
  assert caplog.messages == [expected]
  assert found["params"]["head"] is fresh(model)["params"]["head"]


def test_a_head_that_fits_needs_no_words(caplog):
  with caplog.at_level(logging.INFO, "udim.convert"):
    from_torch(timm_weights(), VIT, fresh(VIT))
  assert not caplog.messages


# -- what is refused -----------------------------------------------------------


def _with(weights, **changes):
  return {**weights, **{k.replace("__", "."): v for k, v in changes.items()}}


BASIC = functools.partial(resnet_weights, bottleneck=False)


@pytest.mark.parametrize(
  ("weights", "model", "message"),
  [
    (resnet_weights(bottleneck=True), RESNET,
     "a ResNet of 1-2 bottleneck blocks, but model.name asks for a ResNet of "
     "1-2 basic blocks"),
    (BASIC(stages=(2, 2)), RESNET, "a ResNet of 2-2 basic blocks, but"),
    (timm_weights(), RESNET, "a ViT of 2 layers, width 12, patch 16, but"),
    (BASIC(), VIT,
     "a ResNet of 1-2 basic blocks, but model.name asks for a ViT of 2 layers"),
    (timm_weights(depth=3), VIT, "a ViT of 3 layers, width 12"),
    (timm_weights(patch=8), VIT, "patch 8, but"),
    ({"weight": np.zeros(3)}, VIT, "neither a torchvision ResNet nor"),
    ({}, RESNET, "neither a torchvision ResNet nor"),
    (timm_weights(positions=197), VIT,
     r"'pos_embed' has shape \(1, 197, 12\), but the model takes \(1, 5, 12\): "
     "it was made for images of another size"),
    (BASIC(width=8), RESNET, r"has shape \(8,\), but the model takes \(4,\)"),
    ({k: v for k, v in BASIC().items() if ".running_" not in k}, RESNET,
     "lacks 'layer1.0.bn1.running_mean', .* and 13 more"),
    (_with(BASIC(), layer1__0__se__weight=np.ones(3)), RESNET,
     "has weights that the model has no place for: 'layer1.0.se.weight'"),
    (_with(timm_weights(), blocks__1__ls1__gamma=np.ones(12)), VIT,
     "no place for: 'blocks.1.ls1.gamma'"),
    ({k: v for k, v in timm_weights().items() if k != "head.bias"}, VIT,
     "lacks 'head.bias'"),
    (BASIC(), SmallCNN(7), "no weights for a SmallCNN"),
    (BASIC(), WideResNet(7), "no weights for a WideResNet"),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(weights, model, message):
  variables = fresh(model) if model in (RESNET, VIT) else {}
  with pytest.raises(UserError, match=message) as error:
    from_torch(weights, model, variables, source="x.pth")
  assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
  path = str(tmp_path / "absent.pth")
  with pytest.raises(UserError, match=r"absent\.pth: no such file"):
    read_weights(path)
  (tmp_path / "weights.npz").touch()
  with pytest.raises(UserError, match=r"\.safetensors, \.pth, \.pt, \.bin"):
    load_pretrained(str(tmp_path / "weights.npz"), RESNET, fresh(RESNET))


@pytest.mark.parametrize(
  ("name", "library"),
  [("x.safetensors", "safetensors"), ("x.pth", "torch")],
)
def test_a_missing_library_is_named(name, library, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, library, None)
  path = tmp_path / name
  path.touch()
  with pytest.raises(
    UserError, match=rf"{name}.* needs {library}: pip install"
  ):
    read_weights(str(path))
