"""The model: batches of prompts, bf16, remat, devices, first values."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.parallel import init_sharded, make_mesh
from slimsam.data import rows_sharding
from slimsam.encoder import Compute, encode
from slimsam.init import abstract_params, init_params
from slimsam.model import RULES, Sam
from slimsam.settings import (
  DecoderSettings,
  EncoderSettings,
  SamSettings,
  preset,
  uniform,
)


@functools.partial(jax.jit, static_argnames=("sam", "multimask"))
def run(params, images, prompts, *, sam, multimask=True):
  return sam.apply({"params": params}, images, **prompts, multimask=multimask)


def prompts_of(b, p, size=40, seed=0):
  rng = np.random.default_rng(seed)
  corners = np.sort(rng.uniform(0, size, (b, p, 2, 2)), axis=2)
  return {
    "points": rng.uniform(0, size, (b, p, 2, 2)).astype(np.float32),
    "labels": rng.integers(0, 2, (b, p, 2)),
    "boxes": corners.reshape(b, p, 4).astype(np.float32),
  }


def test_images_and_prompts_are_axes(tiny, draw, images_of):
  """Two images with three prompts each are six calls."""
  params, images, prompts = draw(tiny), images_of(tiny), prompts_of(2, 3)
  sam = Sam(tiny)
  whole = run(params, images, prompts, sam=sam)
  assert whole.logits.shape == (2, 3, 3, 20, 20)
  assert whole.iou.shape == (2, 3, 3)
  assert whole.logits.dtype == jnp.float32
  for b, p in np.ndindex(2, 3):
    own = {k: v[b : b + 1, p : p + 1] for k, v in prompts.items()}
    one = run(params, images[b : b + 1], own, sam=sam)
    np.testing.assert_allclose(one.logits[0, 0], whole.logits[b, p], atol=1e-4)
    np.testing.assert_allclose(one.iou[0, 0], whole.iou[b, p], atol=1e-4)


def test_all_masks_are_the_single_one_and_the_others(tiny, draw, images_of):
  params, images, prompts = draw(tiny), images_of(tiny), prompts_of(2, 3)
  one, three, four = (
    run(params, images, prompts, sam=Sam(tiny), multimask=many)
    for many in (False, True, None)
  )
  assert one.logits.shape[2] == 1
  for a, b, c in zip(one, three, four):
    expected = jnp.concatenate([a, b], axis=2)
    np.testing.assert_allclose(c, expected, atol=1e-5)


def test_a_mask_prompt_of_nothing_is_not_no_mask(tiny, draw, images_of):
  params, images, prompts = draw(tiny), images_of(tiny), prompts_of(2, 3)
  without = run(params, images, prompts, sam=Sam(tiny))
  masks = {"masks": np.zeros((2, 3, 20, 20), np.float32)}
  with_zeros = run(params, images, prompts | masks, sam=Sam(tiny))
  assert np.abs(with_zeros.logits - without.logits).max() > 1e-3


def test_prompts_are_needed(tiny, draw, images_of):
  with pytest.raises(ValueError, match="have no tokens"):
    run(draw(tiny), images_of(tiny), {}, sam=Sam(tiny))


def test_bfloat16_is_near(tiny, draw, images_of):
  params, images = draw(tiny), images_of(tiny)
  run = jax.jit(
    lambda dtype: encode(
      params["image_encoder"], images, tiny.encoder, Compute(dtype=dtype)
    ),
    static_argnums=0,
  )
  exact, rough = run(jnp.float32), run(jnp.bfloat16)
  assert rough.dtype == jnp.bfloat16
  error = np.abs(np.asarray(rough, np.float32) - exact)
  assert 1e-4 < error.mean() < 0.05


def test_remat_changes_no_gradient(tiny, draw, images_of):
  params, images = draw(tiny), images_of(tiny)

  def loss(params, remat):
    compute = Compute(remat=remat)
    out = encode(params["image_encoder"], images, tiny.encoder, compute)
    return jnp.mean(jnp.square(out))

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  chex.assert_trees_all_close(
    grad(params, True), grad(params, False), atol=1e-6
  )
  jaxpr = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, True))
  assert jaxpr.count("remat") >= 3


@pytest.mark.parametrize(
  "sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "model": 2}], ids=str
)
def test_cut_over_devices_it_is_the_same(tiny, draw, sizes):
  """Rows, embeddings and heads."""
  params = draw(tiny)
  rng = np.random.default_rng(1)
  images = rng.normal(size=(8, 40, 40, 3)).astype(np.float32)
  prompts = prompts_of(8, 2)
  expected = run(params, images, prompts, sam=Sam(tiny))
  mesh = make_mesh(sizes)

  def init(key):
    del key
    return jax.tree.map(jnp.asarray, params)

  there = init_sharded(init, mesh, RULES, jax.random.key(0))
  kernel = there["image_encoder"]["blocks"]["0"]["attn"]["qkv"]["kernel"]
  if "model" in sizes:
    assert kernel.sharding.spec == jax.P("fsdp", None, "model")
  with jax.set_mesh(mesh):
    cut = jax.device_put((images, prompts), rows_sharding(mesh))
    found = run(there, *cut, sam=Sam(tiny))
  assert found.logits.sharding.spec[0] is not None
  np.testing.assert_allclose(found.logits, expected.logits, atol=2e-4)


def test_first_values_are_torchs():
  settings = uniform(
    width=96, depth=1, heads=4, mlp_width=384, image_size=64, patch=8,
    window=4, global_blocks=(),
  )  # fmt: skip
  params = jax.jit(functools.partial(init_params, settings))(jax.random.key(0))
  mlp = params["image_encoder"]["blocks"]["0"]["mlp"]["lin1"]
  bound = 96**-0.5
  for leaf in (mlp["kernel"], mlp["bias"]):
    assert 0.9 * bound < np.abs(leaf).max() <= bound
  np.testing.assert_allclose(mlp["kernel"].std(), bound / 3**0.5, rtol=0.03)
  gaussian = params["prompt_encoder"]["gaussian"]
  assert abs(float(gaussian.std()) - 1) < 0.1
  assert not np.any(params["image_encoder"]["pos_embed"])
  like = jax.eval_shape(
    Sam(settings).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)),
    jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1), jnp.int32),
  )["params"]  # fmt: skip
  chex.assert_trees_all_equal_shapes(like, abstract_params(settings))


BAD = [
  (lambda: uniform(width=10, depth=1, heads=4, mlp_width=4, global_blocks=()),
   "block 0: qkv width 10 is not divisible by 4 heads"),
  (lambda: uniform(width=8, depth=1, heads=4, mlp_width=4, global_blocks=(1,)),
   r"global_blocks=\(1,\): blocks are numbered from 0 to 0"),
  (lambda: uniform(width=8, depth=1, heads=4, mlp_width=4, global_blocks=(),
                   image_size=100), "image_size=100 is not divisible by"),
  (lambda: uniform(width=8, depth=1, heads=4, mlp_width=4, global_blocks=(),
                   out=24), "out=24 must be a multiple of 8 and of heads=8"),
  (lambda: EncoderSettings(64, 8, 8, 2, (8, 8), (4,), 4, ()),
   "2 qkv_widths and 1 mlp_widths"),
  (lambda: DecoderSettings(epsilon="torch"), "epsilon='torch'"),
  (lambda: preset("vit_x"), "no model 'vit_x'"),
  (lambda: SamSettings.from_dict({}), "no settings of a SAM"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD)
def test_sizes_that_make_no_sense_are_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()
