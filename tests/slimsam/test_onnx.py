"""ONNX graphs: run by onnxruntime, they give what the model gives."""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.tree import names
from slimsam import export, onnx_decoder, onnx_graph
from slimsam.encoder import encode
from slimsam.onnx_decoder import decoder_graph
from slimsam.onnx_encoder import encoder_graph
from slimsam.preprocess import resized_shape, upscale
from slimsam.settings import DecoderSettings, uniform
from slimsam.weights import save_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# float32 sums in another order; embeddings and logits are of size 1.
CLOSE = {"rtol": 0, "atol": 1e-5}
# Windows fit the grid, tables do not fit the windows, and the decoder has other
# sizes and transformers' epsilons.
OTHER = uniform(
  width=16, depth=2, heads=1, mlp_width=24, image_size=48, patch=8, window=3,
  global_blocks=(0,), out=16,
  decoder=DecoderSettings(
    heads=4, mlp_width=16, depth=1, downsample=1, num_masks=2, iou_width=8,
    iou_depth=2, mask_channels=4, epsilon="hf",
  ),
)  # fmt: skip


def session(model):
  """Runs a graph, or a file, on one thread."""
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  if not isinstance(model, str):
    onnx.checker.check_model(model, full_check=True)
    model = model.SerializeToString()
  return onnxruntime.InferenceSession(
    model, options, providers=["CPUExecutionProvider"]
  )


@dataclasses.dataclass(frozen=True)
class Case:
  """A model and its graphs."""

  settings: object
  params: object
  encoder: object
  decoder: object
  single: object


@pytest.fixture(scope="module", params=["padded", "fitting"])
def case(request, tiny, draw):
  settings = OTHER
  if request.param == "padded":
    settings = tiny.with_widths(qkv_widths=(24, 16, 8), mlp_widths=(40, 24, 8))
  params = draw(settings)
  if request.param == "fitting":
    attn = params["image_encoder"]["blocks"]["1"]["attn"]
    rng = np.random.default_rng(1)
    attn["rel_pos_h"] = rng.normal(size=(9, 16)).astype(np.float32)
  # Small enough that what a norm adds to the variance decides.
  out = params["mask_decoder"]["layers"]["0"]["self_attn"]["out"]
  out.update({name: array * 1e-3 for name, array in out.items()})
  return Case(
    settings,
    params,
    session(encoder_graph(params, settings).model("encoder")),
    session(decoder_graph(params, settings).model("decoder")),
    session(decoder_graph(params, settings, single_mask=True).model("single")),
  )


def prompts_of(settings, labels, *, mask=1, original=(30, 47)):
  """The decoder's inputs by name."""
  cfg = settings.encoder
  rng = np.random.default_rng(len(labels))
  inputs = {
    "image_embeddings": rng.normal(size=(1, cfg.out, cfg.grid, cfg.grid)),
    "point_coords": rng.uniform(0, cfg.image_size, (1, len(labels), 2)),
    "point_labels": [labels],
    "mask_input": rng.normal(size=(1, 1, 4 * cfg.grid, 4 * cfg.grid)),
    "has_mask_input": [mask],
    "orig_im_size": original,
  }
  return {name: np.asarray(x, np.float32) for name, x in inputs.items()}


def test_image_embeddings(case, images_of):
  """Of as many images as come."""
  images = images_of(case.settings, 2)
  cfg, params = case.settings.encoder, case.params["image_encoder"]
  expected = jax.jit(encode, static_argnums=2)(params, images, cfg)
  channels_first = images.transpose(0, 3, 1, 2)
  (both,) = case.encoder.run(None, {"images": channels_first})
  np.testing.assert_allclose(both.transpose(0, 2, 3, 1), expected, **CLOSE)
  (one,) = case.encoder.run(None, {"images": channels_first[1:]})
  np.testing.assert_allclose(one, both[1:], **CLOSE)


@pytest.mark.parametrize("labels", [[1], [0, -1], [1, 2, 3, -10, -1]])
def test_masks_of_prompts(case, labels):
  """With and without a mask, by the model in one call."""
  settings = case.settings
  both = [prompts_of(settings, labels, mask=mask) for mask in (1, 0)]
  answer = functools.partial(export.answer, case.params, settings, jnp.float32)
  given = both[0]
  points, numbers = given["point_coords"], given["point_labels"]
  logits, iou = jax.jit(answer)(
    given["image_embeddings"].transpose(0, 2, 3, 1),
    np.stack([points, points], axis=1),
    np.stack([numbers, numbers], axis=1).astype(np.int32),
    np.concatenate([given["mask_input"]] * 2, axis=1),
    np.array([[1, 0]], np.float32),
  )
  assert np.abs(logits[:, 0] - logits[:, 1]).max() > 0.01
  for i, inputs in enumerate(both):
    masks, quality, low = case.decoder.run(None, inputs)
    np.testing.assert_allclose(low, logits[:, i], **CLOSE)
    np.testing.assert_allclose(quality, iou[:, i], **CLOSE)
    whole = upscale(low, settings.encoder.image_size, (30, 47))
    np.testing.assert_allclose(masks, whole, **CLOSE)


@pytest.mark.parametrize("labels", [[1], [0, -1], [1, 2, 3]])
def test_the_single_mask(case, labels):
  """The first of three points or more, else the best of the others."""
  inputs = prompts_of(case.settings, labels)
  masks, quality, low = case.decoder.run(None, inputs)
  best = 0 if len(labels) > 2 else 1 + int(quality[0, 1:].argmax())
  found = case.single.run(None, inputs)
  for one, all_of_them in zip(found, (masks, quality, low), strict=True):
    np.testing.assert_array_equal(one, all_of_them[:, [best]])


@pytest.mark.parametrize(
  "original", [(40, 40), (61, 33), (17, 100), (1, 200), (3, 2)]
)
def test_masks_have_the_size_of_the_original(case, original):
  inputs = prompts_of(case.settings, [1, -1], original=original)
  masks, _, low = case.decoder.run(None, inputs)
  expected = upscale(low, case.settings.encoder.image_size, original)
  assert masks.shape[2:] == original
  np.testing.assert_allclose(masks, expected, **CLOSE)


def test_the_part_that_an_image_fills_is_that_of_preprocessing():
  """Whole numbers round as float64 does, for Segment Anything's square."""
  graph = onnx_graph.Graph({})
  whole = graph.op("Cast", graph.input("original", (2,)), to=onnx_graph.INT64)
  filled = onnx_decoder.resized_shape(graph, whole, 1024)
  floats = graph.op("Cast", filled, to=onnx_graph.FLOAT)
  graph.output("filled", floats, (2,))
  run = session(graph.model("filled")).run
  for original in itertools.product(range(1, 400, 7), range(1, 4000, 93)):
    (found,) = run(None, {"original": np.array(original, np.float32)})
    assert tuple(found) == resized_shape(*original, 1024)


def test_the_interface(tiny, draw):
  """Names, types and free dimensions of segment-anything's decoder."""

  def declared(values):
    return {value.name: (value.type, value.shape) for value in values}

  params = draw(tiny)
  decoder = session(decoder_graph(params, tiny).model("decoder"))
  assert declared(decoder.get_inputs()) == {
    "image_embeddings": ("tensor(float)", [1, 16, 5, 5]),
    "point_coords": ("tensor(float)", [1, "num_points", 2]),
    "point_labels": ("tensor(float)", [1, "num_points"]),
    "mask_input": ("tensor(float)", [1, 1, 20, 20]),
    "has_mask_input": ("tensor(float)", [1]),
    "orig_im_size": ("tensor(float)", [2]),
  }
  assert declared(decoder.get_outputs()) == {
    "masks": ("tensor(float)", [1, 4, "height", "width"]),
    "iou_predictions": ("tensor(float)", [1, 4]),
    "low_res_masks": ("tensor(float)", [1, 4, 20, 20]),
  }
  encoder = session(encoder_graph(params, tiny).model("encoder"))
  assert declared(encoder.get_inputs()) == {
    "images": ("tensor(float)", ["batch", 3, 40, 40])
  }
  assert declared(encoder.get_outputs()) == {
    "image_embeddings": ("tensor(float)", ["batch", 16, 5, 5])
  }


def test_each_parameter_is_there_once(tiny, draw):
  """As an initializer of its name; the two graphs share none."""
  params = draw(tiny)
  encoder = encoder_graph(params, tiny).initializers
  decoder = decoder_graph(params, tiny).initializers
  own = {"prompt_encoder", "mask_decoder"}
  for graph, tree in (
    (encoder, params["image_encoder"]),
    (decoder, {name: params[name] for name in own}),
  ):
    sizes = {
      name: leaf.size
      for name, leaf in zip(jax.tree.leaves(names(tree)), jax.tree.leaves(tree))
    }
    found = {
      name: array.size
      for name, array in graph.items()
      if not name.startswith("constant")
    }
    assert found == sizes


@pytest.mark.parametrize("one_file", [True, False])
def test_the_command(one_file, tiny, draw, tmp_path, monkeypatch, capsys):
  """Weights that no file of this kind can hold lie beside it."""
  if not one_file:
    monkeypatch.setattr(onnx_graph, "ONE_FILE", 0)
  params = draw(tiny)
  save_model(tmp_path / "model", params, tiny)
  arguments = [str(tmp_path / "model"), str(tmp_path / "out")]
  flags = ["--format=onnx", "--return_single_mask"]
  monkeypatch.setattr("sys.argv", ["export", *arguments, *flags])
  export.main()
  files = ["decoder.onnx", "encoder.onnx"]
  printed = capsys.readouterr().out
  assert all(f"out/{name}: 0." in printed for name in files)
  if not one_file:
    files += [f"{name}.data" for name in files]
  assert {file.name for file in (tmp_path / "out").iterdir()} == set(files)
  onnx.checker.check_model(str(tmp_path / "out" / "encoder.onnx"))
  session(str(tmp_path / "out" / "encoder.onnx"))
  inputs = prompts_of(tiny, [1, -1])
  single = decoder_graph(params, tiny, single_mask=True).model("decoder")
  for found, expected in zip(
    session(str(tmp_path / "out" / "decoder.onnx")).run(None, inputs),
    session(single).run(None, inputs),
    strict=True,
  ):
    np.testing.assert_array_equal(found, expected)


def test_without_onnx_one_line_names_the_extra(
  tiny, draw, tmp_path, monkeypatch, one_line
):
  graph = decoder_graph(draw(tiny), tiny)
  monkeypatch.setitem(sys.modules, "onnx", None)
  assert one_line(graph.write, tmp_path / "decoder.onnx") == (
    "decoder.onnx needs onnx: pip install -e '.[export]'"
  )
