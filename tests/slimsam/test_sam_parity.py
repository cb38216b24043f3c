"""Equality with transformers' SamModel on random weights (parity extra).

Its own initial values are useless here: the encoder's are 1e-10. Everything is
drawn anew, so that embeddings and logits are of order 1.
"""

import functools

import chex
import jax
import numpy as np
import pytest

from slimsam import weights
from slimsam.attention import TEXTBOOK, How
from slimsam.encoder import Compute
from slimsam.formats import from_hf, to_hf, with_epsilon
from slimsam.model import Sam
from slimsam.settings import DecoderSettings, preset, uniform

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HF = DecoderSettings(epsilon="hf")
MODELS = {
  # 4 rows of patches in windows of 3: padded to 6.
  "tiny": uniform(
    width=24, depth=4, heads=2, mlp_width=40, image_size=64, window=3,
    global_blocks=(1, 3), decoder=HF,
  ),
  "padded": uniform(
    width=48, depth=4, heads=3, mlp_width=96, image_size=128, patch=8,
    window=7, global_blocks=(1, 3), decoder=HF,
  ),
  # Windows that need no padding, one that is larger than the grid, and another
  # decoder.
  "even": uniform(
    width=32, depth=2, heads=4, mlp_width=48, image_size=64, patch=8, window=4,
    global_blocks=(1,), decoder=HF,
  ),
  "wide_window": uniform(
    width=16, depth=2, heads=1, mlp_width=24, image_size=48, patch=8, window=8,
    global_blocks=(), decoder=HF,
  ),
  "slimsam_77": uniform(
    width=168, depth=12, heads=12, mlp_width=696, image_size=256,
    global_blocks=(2, 5, 8, 11), decoder=HF,
  ),
  "narrow_decoder": uniform(
    width=24, depth=1, heads=2, mlp_width=32, image_size=64, window=2,
    global_blocks=(0,), out=64,
    decoder=DecoderSettings(
      heads=4, mlp_width=96, depth=3, num_masks=2, iou_width=40, iou_depth=4,
      mask_channels=8, epsilon="hf",
    ),
  ),
}  # fmt: skip


def hf_model(settings):
  """A `SamModel` with weights drawn anew."""
  _, config = to_hf(zeros(settings), settings)
  model = transformers.SamModel(transformers.SamConfig(**config)).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if "norm" in name:
        value.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
      elif "positional_embedding" in name:
        value.normal_(0, 1)
      elif "pos" in name:
        value.normal_(0, 0.5)
      elif name.endswith(("token.weight", "tokens.weight")) or (
        "prompt_encoder" in name and value.ndim == 2
      ):
        value.normal_(0, 1)
      elif name.endswith("bias"):
        value.normal_(0, 0.1)
      else:
        fan_in = value[0].numel()
        if "upscale_conv" in name:
          fan_in = value.shape[0]
        value.normal_(0, fan_in**-0.5)
  return model


def zeros(settings):
  from slimsam.init import abstract_params

  return jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(settings)
  )


@pytest.fixture(scope="module", params=MODELS)
def both(request):
  settings = MODELS[request.param]
  model = hf_model(settings)
  weights = {k: v.numpy() for k, v in model.state_dict().items()}
  params, found = from_hf(weights, model.config.to_dict())
  assert found == settings
  return model, params, settings


def images_of(settings):
  size = settings.encoder.image_size
  rng = np.random.default_rng(1)
  return rng.normal(size=(2, size, size, 3)).astype(np.float32)


def prompts_of(settings, kind):
  """Three prompts for each of two images; all labels there are."""
  size, grid = settings.encoder.image_size, settings.encoder.grid
  rng = np.random.default_rng(2)
  made = {}
  if "points" in kind:
    made["points"] = rng.uniform(0, size, (2, 3, 4, 2)).astype(np.float32)
    made["labels"] = np.array([1, 0, -1, -10], np.int32) * np.ones(
      (2, 3, 1), np.int32
    )
  if "boxes" in kind:
    corners = np.sort(rng.uniform(0, size, (2, 3, 2, 2)), axis=2)
    made["boxes"] = corners.reshape(2, 3, 4).astype(np.float32)
  if "masks" in kind:
    # transformers takes one mask for all prompts of an image.
    mask = rng.normal(size=(2, 1, 4 * grid, 4 * grid)).astype(np.float32)
    made["masks"] = np.repeat(mask, 3, axis=1)
  return made


def of_hf(model, images, prompts, multimask):
  tensors = {
    {"points": "input_points", "labels": "input_labels",
     "boxes": "input_boxes"}[name]: torch.from_numpy(value)
    for name, value in prompts.items() if name != "masks"
  }  # fmt: skip
  if "masks" in prompts:
    tensors["input_masks"] = torch.from_numpy(prompts["masks"][:, :1])
  with torch.no_grad():
    out = model(
      pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
      multimask_output=multimask, **tensors,
    )  # fmt: skip
  return out.pred_masks.numpy(), out.iou_scores.numpy()


@functools.partial(jax.jit, static_argnums=0)
def encode(sam, params, images):
  return sam.apply({"params": params}, images, method=sam.encode)


@functools.partial(jax.jit, static_argnames=("sam", "multimask"))
def run(params, images, prompts, *, sam, multimask):
  return sam.apply({"params": params}, images, **prompts, multimask=multimask)


@pytest.mark.parametrize("how", [How(), How(chunks=2), TEXTBOOK])
def test_embeddings_are_equal(both, how):
  model, params, settings = both
  images = images_of(settings)
  with torch.no_grad():
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    expected = model.get_image_embeddings(pixels).numpy()
  found = encode(Sam(settings, Compute(how=how)), params, images)
  assert 0.1 < np.std(expected) < 10
  np.testing.assert_allclose(
    np.moveaxis(found, -1, 1), expected, atol=3e-5, rtol=0
  )


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize(
  "kind", ["points", "boxes", "points boxes", "points boxes masks"]
)
def test_masks_are_equal(both, kind, multimask):
  model, params, settings = both
  images, prompts = images_of(settings), prompts_of(settings, kind)
  masks, iou = of_hf(model, images, prompts, multimask)
  found = run(params, images, prompts, sam=Sam(settings), multimask=multimask)
  assert 0.05 < np.std(masks) < 20
  np.testing.assert_allclose(found.logits, masks, atol=2e-5, rtol=0)
  np.testing.assert_allclose(found.iou, iou, atol=2e-5, rtol=0)


def test_at_the_size_of_the_checkpoint():
  """SlimSAM-77 at 1024 pixels: one image, embedding and masks of points."""
  settings = with_epsilon(preset("vit_p77"), "hf")
  model = hf_model(settings)
  weights = {k: v.numpy() for k, v in model.state_dict().items()}
  params, found = from_hf(weights, model.config.to_dict())
  assert found == settings
  image = images_of(settings)[:1]
  prompts = {k: v[:1] for k, v in prompts_of(settings, "points").items()}
  with torch.no_grad():
    pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    expected = model.get_image_embeddings(pixels)
    masks = model(
      image_embeddings=expected,
      input_points=torch.from_numpy(prompts["points"]),
      input_labels=torch.from_numpy(prompts["labels"]),
    ).pred_masks.numpy()
  expected, sam = expected.numpy(), Sam(settings)
  embedding = encode(sam, params, image)
  np.testing.assert_allclose(
    np.moveaxis(embedding, -1, 1), expected, atol=3e-5, rtol=0
  )
  given = np.moveaxis(expected, 1, -1)  # of the same embedding
  logits = jax.jit(
    lambda e: sam.apply({"params": params}, e, **prompts, method=sam.decode)
  )(given).logits
  np.testing.assert_allclose(logits, masks, atol=2e-5, rtol=0)


def test_dense_positions_are_equal(both):
  from slimsam.prompts import grid_positions

  model, params, settings = both
  expected = model.get_image_wide_positional_embeddings()[0].detach().numpy()
  found = grid_positions(params["prompt_encoder"], settings)
  np.testing.assert_allclose(
    np.moveaxis(found, -1, 0), expected, atol=4e-6, rtol=0
  )


def test_files_of_torch_and_transformers(both, tmp_path):
  """Transformers loads what is written, nothing missing and nothing over; a
  .pth comes back bit for bit.
  """
  model, params, settings = both
  weights.save_hf(tmp_path / "hf", params, settings)
  loaded, info = transformers.SamModel.from_pretrained(
    tmp_path / "hf", output_loading_info=True
  )
  assert not info["missing_keys"]
  assert not info["unexpected_keys"]
  for name, value in model.state_dict().items():
    assert torch.equal(loaded.state_dict()[name], value), name
  weights.save_pth(tmp_path / "sam.pth", params, settings)
  again, found = weights.load_model(tmp_path / "sam.pth")
  if settings.decoder.heads == 8:  # a state dict does not tell
    assert found == with_epsilon(settings, "original")
    chex.assert_trees_all_equal(again, params)


def test_the_epsilons_differ(both, monkeypatch):
  """By little: some 1e-5, which a looser comparison would not see; with the
  original one in its norms the other model agrees.
  """
  model, params, settings = both
  images, prompts = images_of(settings), prompts_of(settings, "points")
  masks, _ = of_hf(model, images, prompts, True)
  sam = Sam(with_epsilon(settings, "original"))
  found = run(params, images, prompts, sam=sam, multimask=True)
  assert 1e-6 < np.abs(found.logits - masks).max() < 1e-3
  for module in model.mask_decoder.transformer.layers.modules():
    if isinstance(module, torch.nn.LayerNorm):
      monkeypatch.setattr(module, "eps", 1e-5)
  masks, _ = of_hf(model, images, prompts, True)
  np.testing.assert_allclose(found.logits, masks, atol=2e-5)
