"""Models of segment-anything and transformers: names, layouts, round trips."""

import functools
import json
import re

import chex
import jax
import numpy as np
import pytest

from common.errors import UserError
from slimsam import formats, weights
from slimsam.convert import convert, main
from slimsam.encoder import encode
from slimsam.formats import (
  check_uniform,
  from_hf,
  from_sam,
  name_of,
  padded,
  to_hf,
  to_sam,
)
from slimsam.init import abstract_params
from slimsam.prune import prune_model
from slimsam.settings import (
  PRESETS,
  DecoderSettings,
  SamSettings,
  preset,
  uniform,
)
from slimsam.torch_names import entries, hf_name, leaf, torch_shape

# What segment-anything can hold: equal blocks, eight heads in the decoder.
UNIFORM = uniform(
  width=24, depth=4, heads=2, mlp_width=40, image_size=64, patch=8, window=3,
  global_blocks=(1, 3), out=32,
  decoder=DecoderSettings(heads=8, mlp_width=48, iou_width=24),
)  # fmt: skip


@pytest.fixture(scope="module")
def params(draw):
  return draw(UNIFORM)


def test_vit_b_has_the_published_names_and_shapes():
  """314 tensors; those written out in the specification of the format."""
  settings = preset("vit_b")
  names = [entry.name for entry in entries(settings)]
  assert len(names) == len(set(names)) == 314
  for name in (
    "image_encoder.pos_embed", "image_encoder.patch_embed.proj.weight",
    "image_encoder.blocks.11.attn.qkv.bias",
    "image_encoder.blocks.0.attn.rel_pos_w", "image_encoder.neck.2.weight",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "prompt_encoder.point_embeddings.3.weight",
    "prompt_encoder.not_a_point_embed.weight",
    "prompt_encoder.mask_downscaling.6.bias", "mask_decoder.iou_token.weight",
    "mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.bias",
    "mask_decoder.transformer.final_attn_token_to_image.q_proj.weight",
    "mask_decoder.transformer.norm_final_attn.weight",
    "mask_decoder.output_upscaling.3.bias",
    "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight",
    "mask_decoder.iou_prediction_head.layers.0.bias",
  ):  # fmt: skip
    assert name in names, name


@pytest.mark.parametrize(
  ("ours", "theirs"),
  [
    ("image_encoder.blocks.3.norm1.weight",
     "vision_encoder.layers.3.layer_norm1.weight"),
    ("image_encoder.neck.3.bias", "vision_encoder.neck.layer_norm2.bias"),
    ("prompt_encoder.not_a_point_embed.weight",
     "prompt_encoder.not_a_point_embed.weight"),
    ("prompt_encoder.point_embeddings.2.weight",
     "prompt_encoder.point_embed.2.weight"),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
     "shared_image_embedding.positional_embedding"),
    ("mask_decoder.transformer.layers.1.norm4.bias",
     "mask_decoder.transformer.layers.1.layer_norm4.bias"),
    ("mask_decoder.transformer.norm_final_attn.weight",
     "mask_decoder.transformer.layer_norm_final_attn.weight"),
    ("mask_decoder.output_hypernetworks_mlps.0.layers.1.bias",
     "mask_decoder.output_hypernetworks_mlps.0.layers.0.bias"),
    ("mask_decoder.iou_prediction_head.layers.2.weight",
     "mask_decoder.iou_prediction_head.proj_out.weight"),
  ],
)  # fmt: skip
def test_names_in_transformers(ours, theirs):
  assert hf_name(ours, preset("vit_b")) == theirs


def test_layouts_written_out(params):
  state = to_sam(params, UNIFORM)
  attn = params["image_encoder"]["blocks"]["2"]["attn"]
  # [q | k | v], each by head and dimension; weights are [out in].
  qkv = state["image_encoder.blocks.2.attn.qkv.weight"]
  head, dimension = 1, 5
  np.testing.assert_array_equal(
    qkv[24 + head * 12 + dimension],
    attn["qkv"]["kernel"][:, 1, head, dimension],
  )
  np.testing.assert_array_equal(
    state["image_encoder.blocks.2.attn.proj.weight"][7, head * 12 + dimension],
    attn["proj"]["kernel"][head, dimension, 7],
  )
  patch = params["image_encoder"]["patch_embed"]["kernel"]
  assert state["image_encoder.patch_embed.proj.weight"].shape == (24, 3, 8, 8)
  np.testing.assert_array_equal(
    state["image_encoder.patch_embed.proj.weight"][4, 2, 1, 6],
    patch[1, 6, 2, 4],
  )
  up = params["mask_decoder"]["upscale"]["conv1"]["kernel"]
  np.testing.assert_array_equal(
    state["mask_decoder.output_upscaling.0.weight"][3, 2, 0, 1], up[0, 1, 3, 2]
  )
  assert state["image_encoder.neck.0.weight"].shape == (32, 24, 1, 1)
  assert state["prompt_encoder.point_embeddings.2.weight"].shape == (1, 32)


def test_round_trips_are_bit_identical(params):
  """Segment-anything -> ours -> transformers -> ours -> segment-anything."""
  state = to_sam(params, UNIFORM)
  ours, settings = from_sam(state)
  assert settings == UNIFORM
  chex.assert_trees_all_equal(ours, params)
  theirs, config = to_hf(ours, settings)
  assert not set(theirs) & {"prompt_encoder.shared_embedding"}
  again, settings = from_hf(theirs, json.loads(json.dumps(config)))
  assert settings == formats.with_epsilon(UNIFORM, "hf")
  chex.assert_trees_all_equal(again, params)
  for name, value in to_sam(again, settings).items():
    np.testing.assert_array_equal(value, state[name])


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_are_recognised(name):
  """From shapes alone: a downloaded file just loads."""
  settings = preset(name)
  like, shapes = abstract_params(settings), {}
  for entry in entries(settings):
    shape = leaf(like, entry.path).shape
    part = shape if entry.row is None else shape[1:]
    shapes[entry.name] = np.broadcast_to(
      np.float32(0), torch_shape(entry.kind, part)
    )
  found = formats._settings_of(shapes, name)
  assert found == settings
  assert name_of(found) == name


def test_queries_keys_and_values_may_be_three_tensors(params):
  """The authors' pruned models; buffers that hold the mean colour, too."""
  state = to_sam(params, UNIFORM)
  for name in [n for n in state if ".attn.qkv." in n]:
    for part, own in zip("qkv", np.split(state.pop(name), 3)):
      state[name.replace(".qkv.", f".{part}.")] = own
  state["pixel_mean"] = np.zeros((3, 1, 1), np.float32)
  ours, settings = from_sam(state)
  assert settings == UNIFORM
  chex.assert_trees_all_equal(ours, params)


def pruned(params, widths=((4, 6, 8, 12), (20, 13, 40, 2))):
  """Blocks of different widths, no embedding pruned."""
  keep = {f"qkv/{i}": range(n) for i, n in enumerate(widths[0])}
  keep |= {f"mlp/{i}": range(n) for i, n in enumerate(widths[1])}
  return prune_model(params, UNIFORM, keep)


def test_padding_keeps_the_function(params, images_of):
  small, settings = pruned(params)
  large, uniform_settings, note = padded(small, settings)
  check_uniform(uniform_settings, "segment-anything")
  assert "8 to 24 padded to 24" in note
  images = images_of(UNIFORM)
  expected, found = (
    jax.jit(functools.partial(encode, settings=s.encoder))(
      p["image_encoder"], images
    )
    for p, s in ((small, settings), (large, uniform_settings))
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)
  # It is pruned as much as it was: what was added is zero.
  mlp = large["image_encoder"]["blocks"]["3"]["mlp"]
  assert not np.any(mlp["lin1"]["kernel"][:, 2:])


def test_what_a_form_cannot_hold_is_refused_by_name(params):
  small, settings = pruned(params)
  with pytest.raises(
    UserError, match=r"block 0 has qkv width 8, and it takes 24; pad it"
  ):
    to_sam(small, settings)
  first, one = prune_model(params, UNIFORM, {"embedding": range(16)})
  for save in (to_sam, to_hf):
    with pytest.raises(UserError, match=r"block 0 has qkv width 24.*our own"):
      save(first, one)
  with pytest.raises(UserError, match=r"block 0 has qkv width 24.*have 16"):
    padded(first, one)


def broken(state, how):
  state = dict(state)
  name = "image_encoder.blocks.1.mlp.lin2.weight"
  value = state.pop(name)
  if how == "renamed":
    state[name.replace("lin2", "fc2")] = value
  elif how == "cut":
    state[name] = value[:, :-1]
  elif how == "extra":
    state |= {name: value, "mask_decoder.pe": value}
  return state


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ("missing", r"lacks 'image_encoder.blocks.1.mlp.lin2.weight'"),
    ("renamed", r"lacks 'image_encoder.blocks.1.mlp.lin2.weight'"),
    ("cut", r"lin2.weight' has shape \(24, 39\), but the model takes \(24, 40"),
    ("extra", r"no place for: 'mask_decoder.pe'"),
  ],
)
def test_wrong_tensors_are_refused_by_name(params, how, message):
  with pytest.raises(UserError, match=message) as error:
    from_sam(broken(to_sam(params, UNIFORM), how), source="x.pth")
  assert str(error.value).startswith("x.pth")
  assert "\n" not in str(error.value)


def test_a_model_that_ends_within_windows_is_doubted(params, caplog):
  """Without its last block a state dict is that of a shallower model."""
  state = to_sam(params, UNIFORM)
  last = f"image_encoder.blocks.{UNIFORM.encoder.depth - 1}."
  _, settings = from_sam(state)
  assert not caplog.text
  cut = {name: w for name, w in state.items() if not name.startswith(last)}
  _, shallow = from_sam(cut, source="x.pth")
  assert shallow.encoder.depth == settings.encoder.depth - 1
  assert "x.pth: the last of 3 blocks attends within windows" in caplog.text


@pytest.mark.parametrize(
  "vision",
  [None, "x", {"hidden_size": "16"}, {"hidden_size": 16.5},
   {"global_attn_indexes": None}, {"num_hidden_layers": None},
   {"global_attn_indexes": [0.5]}],
)  # fmt: skip
def test_a_configuration_of_wrong_kinds_is_one_line(params, vision):
  weights, config = to_hf(params, UNIFORM)
  if isinstance(vision, dict):
    vision = config["vision_config"] | vision
  with pytest.raises(UserError) as error:
    from_hf(weights, config | {"vision_config": vision}, source="folder")
  assert "\n" not in str(error.value)


def test_something_else_is_no_sam():
  with pytest.raises(UserError, match=r"image_encoder\.pos_embed.*whole\?"):
    from_sam({"conv1.weight": np.zeros((1, 1), np.float32)}, source="r.pth")
  for config, message in (
    ({"model_type": "sam2"}, "model_type='sam2': only 'sam'"),
    ({"model_type": "sam", "vision_config": {"hidden_act": "relu"}},
     r"vision_config\.hidden_act='relu' has no counterpart"),
  ):  # fmt: skip
    with pytest.raises(UserError, match=message):
      from_hf({}, config)


def test_models_on_disk(params, tmp_path):
  """Ours and transformers'; whichever it is, it loads."""
  weights.save_model(tmp_path / "ours", params, UNIFORM)
  found, settings = weights.load_model(tmp_path / "ours")
  assert settings == UNIFORM
  chex.assert_trees_all_equal(found, params)
  convert(tmp_path / "ours", tmp_path / "hf", "hf")
  assert {path.name for path in (tmp_path / "hf").iterdir()} == {
    "config.json", "model.safetensors", "preprocessor_config.json",
  }  # fmt: skip
  found, settings = weights.load_model(tmp_path / "hf")
  assert settings.decoder.epsilon == "hf"
  chex.assert_trees_all_equal(found, params)
  small, settings = pruned(params)
  weights.save_model(tmp_path / "small", small, settings)
  assert weights.load_model(tmp_path / "small")[1] == settings
  for name, message in (
    ("nothing", "no such file or folder"), (".", "holds no model"),
  ):  # fmt: skip
    with pytest.raises(UserError, match=message):
      weights.load_model(tmp_path / name)
  (tmp_path / "ours" / "params.npz").write_bytes(b"PK")
  with pytest.raises(UserError, match=r"params\.npz is not readable"):
    weights.load_model(tmp_path / "ours")
  (tmp_path / "ours" / "settings.json").write_text('{"encoder": {}}')
  with pytest.raises(UserError, match="no settings of a SAM"):
    weights.load_model(tmp_path / "ours")


def test_the_command(params, tmp_path, monkeypatch, capsys):
  small, settings = pruned(params)
  weights.save_model(tmp_path / "small", small, settings)

  def command(*arguments):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    main()
    return capsys.readouterr().out

  with pytest.raises(UserError, match=r"--pad"):
    command(tmp_path / "small", tmp_path / "hf", "--to=hf")
  out = command(tmp_path / "small", tmp_path / "hf", "--to=hf", "--pad")
  assert re.search(r"mlp widths 2 to 40 to 40\n.*hf: 4 blocks, width 24", out)
  with pytest.raises(UserError, match="there already"):
    command(tmp_path / "small", tmp_path / "hf", "--to=hf", "--pad")
  with pytest.raises(UserError, match=r"is a folder with --to=hf: drop \.pth"):
    command(tmp_path / "small", tmp_path / "x.pth", "--to=hf")
  with pytest.raises(UserError, match=r"--to=pth writes a file: .* NAME\.pth"):
    command(tmp_path / "small", tmp_path / "x", "--to=pth")
  with pytest.raises(UserError, match="--to=hf does not hold it"):
    command(tmp_path / "hf", tmp_path / "x", "--to=hf", "--epsilon=original")
  out = command(tmp_path / "hf", tmp_path / "back", "--epsilon=original")
  assert "4 blocks" in out
  assert weights.load_model(tmp_path / "back")[1].decoder.epsilon == "original"


def test_settings_survive_json():
  settings = UNIFORM.with_widths(16, (8, 6, 4, 2), (1, 2, 3, 4))
  content = json.loads(json.dumps(settings.to_dict()))
  assert SamSettings.from_dict(content) == settings
