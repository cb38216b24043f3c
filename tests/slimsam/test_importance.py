"""Disturbed importance: its laws, and its derivative against differences."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from common.errors import UserError
from common.parallel import make_mesh, replicated
from slimsam import importance
from slimsam.encoder import Compute, encode
from slimsam.groups import encoder_groups, with_leaves
from slimsam.importance import (
  KINDS,
  accumulate,
  disturbed_loss,
  make_accumulate,
  needs_gradients,
  scores,
  zero_sums,
)

X64 = jax.enable_x64
KEY = jax.random.key(3)


def batch_of(images, first=0):
  count = len(images)
  return {
    "images": images,
    "ids": np.arange(first, first + count, dtype=np.int32),
    "weights": np.ones(count, np.float32),
  }


def summed(settings, params, batches, *, sigma=0.01):
  groups = encoder_groups(settings)
  loss = disturbed_loss(settings, sigma=sigma)
  return accumulate(loss, params, groups, batches, KEY)


@pytest.fixture(scope="module")
def sums(tiny, draw, images_of):
  """The model after four images, two at a time."""
  params, images = draw(tiny), images_of(tiny, 4)
  batches = [batch_of(images[:2]), batch_of(images[2:], 2)]
  return tiny, params, images, summed(tiny, params, batches)


def test_without_noise_there_is_no_gradient(tiny, draw, images_of):
  params = draw(tiny)
  found = summed(tiny, params, [batch_of(images_of(tiny))], sigma=0.0)
  for grad in (*found.grads.values(), *found.squares.values()):
    assert not np.any(grad)


def test_scores_are_linear_in_sigma(sums):
  tiny, params, images, found = sums
  batches = [batch_of(images[:2]), batch_of(images[2:], 2)]
  groups = encoder_groups(tiny)
  twice = summed(tiny, params, batches, sigma=0.02)
  for kind, factor in (("disturbed", 2), ("disturbed_sq", 4)):
    ours = scores(kind, params, groups, sums=found)
    theirs = scores(kind, params, groups, sums=twice)
    for name, own in ours.items():
      np.testing.assert_allclose(theirs[name], factor * own, rtol=1e-4)
      assert own.min() > 0


def test_the_noise_belongs_to_the_image_not_to_the_batch(sums):
  """Batches of one image, in another order and with padding."""
  tiny, params, images, found = sums
  batches = [batch_of(images[i : i + 1], i) for i in (3, 0, 2)]
  last = batch_of(images[[1, 0]], 1)
  last["weights"][1] = 0
  other = summed(tiny, params, [*batches, last])
  chex.assert_trees_all_close(other.grads, found.grads, rtol=1e-4, atol=1e-8)


def test_the_gradient_is_that_of_the_loss(tiny, draw, images_of):
  """A unit's lin2 row scaled by 1 - e: dL/de is -sum(w g), in float64."""
  unit, path = 5, ("image_encoder", "blocks", "1", "mlp", "lin2", "kernel")
  name = "/".join(path)
  groups = encoder_groups(tiny)
  with X64(True):
    params = jax.tree.map(jnp.asarray, draw(tiny, dtype=np.float64))
    images = jnp.asarray(images_of(tiny, 1), jnp.float64)
    compute = Compute(dtype=jnp.float64)
    loss = disturbed_loss(tiny, compute)
    batch = batch_of(images)
    found = make_accumulate(loss, groups)(
      zero_sums(params, groups), params, batch, KEY
    )
    weights = params["image_encoder"]["blocks"]["1"]["mlp"]["lin2"]["kernel"]
    expected = -float(jnp.sum(weights[unit] * found.grads[name][unit]))
    # The target is the whole model's, whatever the student is.
    cfg = tiny.encoder
    own = jax.random.fold_in(KEY, 0)
    whole = encode(params["image_encoder"], images, cfg, compute)
    noise = 0.01 * jax.random.normal(own, whole.shape[1:], jnp.float64)

    @jax.jit
    def loss_at(e):
      changed = with_leaves(params, {path: weights.at[unit].multiply(1 - e)})
      out = encode(changed["image_encoder"], images, cfg, compute)
      return jnp.mean(jnp.square(out - whole - noise[None]))

    step = 1e-4
    found_slope = float(loss_at(step) - loss_at(-step)) / (2 * step)
  assert abs(expected) > 1e-7
  np.testing.assert_allclose(found_slope, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["disturbed", "disturbed_sq", "magnitude"])
def test_permuted_hidden_units_have_permuted_scores(sums, kind):
  tiny, params, images, found = sums
  order = np.random.default_rng(0).permutation(40)
  mlp = params["image_encoder"]["blocks"]["0"]["mlp"]
  changed = jax.tree.map(np.copy, params)
  changed["image_encoder"]["blocks"]["0"]["mlp"] = {
    "lin1": {
      "kernel": mlp["lin1"]["kernel"][:, order],
      "bias": mlp["lin1"]["bias"][order],
    },
    "lin2": {**mlp["lin2"], "kernel": mlp["lin2"]["kernel"][order]},
  }
  batches = [batch_of(images[:2]), batch_of(images[2:], 2)]
  groups = encoder_groups(tiny)
  other = summed(tiny, changed, batches)
  ours = scores(kind, params, groups, sums=found)
  theirs = scores(kind, changed, groups, sums=other)
  np.testing.assert_allclose(theirs["mlp/0"], ours["mlp/0"][order], rtol=1e-3)
  np.testing.assert_allclose(theirs["embedding"], ours["embedding"], rtol=1e-3)


def test_a_score_is_the_mean_over_the_matrices_of_a_group(sums):
  """Written out for one channel of the embedding: 74 matrices in ViT-B."""
  tiny, params, _, found = sums
  groups = encoder_groups(tiny)
  c, total, count = 7, 0.0, 0
  parts = [("patch_embed/kernel", 3), ("neck/conv1/kernel", 0)]
  for i in range(3):
    parts += [(f"blocks/{i}/attn/proj/kernel", 2),
              (f"blocks/{i}/mlp/lin1/kernel", 0),
              (f"blocks/{i}/mlp/lin2/kernel", 1)]  # fmt: skip
    parts += [(f"blocks/{i}/attn/qkv/kernel", 0)]
  for name, axis in parts:
    w = params["image_encoder"]
    for part in name.split("/"):
      w = w[part]
    product = np.abs(w * found.grads[f"image_encoder/{name}"])
    total += np.take(product, c, axis=axis).sum()
    count += 3 if "qkv" in name else 1
  assert count == 2 + 6 * 3
  own = scores("disturbed", params, groups, sums=found)["embedding"]
  np.testing.assert_allclose(own[c], total / count, rtol=1e-5)


def test_eight_devices_are_one(sums):
  tiny, params, _, _ = sums
  rng = np.random.default_rng(5)
  images = rng.normal(size=(8, 40, 40, 3)).astype(np.float32)
  batch, groups = batch_of(images), encoder_groups(tiny)
  add = make_accumulate(disturbed_loss(tiny), groups)
  expected = add(zero_sums(params, groups), params, batch, KEY)
  mesh = make_mesh({"data": 8})
  with jax.set_mesh(mesh):
    there = jax.device_put(params, replicated(mesh))
    rows = NamedSharding(mesh, jax.P(("data", "fsdp")))
    cut = jax.device_put(batch, rows)
    found = make_accumulate(disturbed_loss(tiny), groups)(
      zero_sums(there, groups), there, cut, KEY
    )
  for name, grad in expected.grads.items():
    scale = np.abs(grad).max()
    np.testing.assert_allclose(
      found.grads[name], grad, rtol=0, atol=1e-5 * scale
    )


def test_the_other_kinds(tiny, draw):
  params, groups = draw(tiny), encoder_groups(tiny)
  mlp = params["image_encoder"]["blocks"]["2"]["mlp"]
  expected = (mlp["lin1"]["kernel"] ** 2).sum(0) + (
    mlp["lin2"]["kernel"] ** 2
  ).sum(1)
  found = scores("magnitude", params, groups)["mlp/2"]
  np.testing.assert_allclose(found, expected / 2, rtol=1e-5)
  one, same, other = (
    scores("random", params, groups, seed=seed) for seed in (1, 1, 2)
  )
  chex.assert_trees_all_equal(one, same)
  assert not np.array_equal(one["mlp/0"], other["mlp/0"])
  assert [needs_gradients(kind) for kind in KINDS] == [True] * 3 + [False] * 2
  with pytest.raises(UserError, match="did you mean 'disturbed'"):
    needs_gradients("disturbd")
  with pytest.raises(ValueError, match="needs sums"):
    importance.scores("taylor", params, groups)
