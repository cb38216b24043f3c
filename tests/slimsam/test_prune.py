"""Pruning: equal to zeroing, exact counts, union of rounds, clear refusals."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from slimsam import encoder
from slimsam.encoder import Compute, encode
from slimsam.groups import (
  Group,
  Member,
  check_groups,
  encoder_groups,
  of_kind,
)
from slimsam.init import abstract_params
from slimsam.prune import expand, mask_params, prune_model, prune_params
from slimsam.select import kept_width
from slimsam.settings import preset
from slimsam.torch_names import leaf

X64 = jax.enable_x64
DOUBLE = Compute(dtype=jnp.float64)
KEEP = {
  "qkv/0": [0, 3, 4, 9], "qkv/1": [1, 2, 5, 6, 11], "qkv/2": [7],
  "mlp/0": list(range(0, 40, 3)), "mlp/2": [1, 39],
}  # fmt: skip


def embedding(params, images, settings):
  run = jax.jit(
    functools.partial(encode, settings=settings.encoder, compute=DOUBLE)
  )
  return run(params["image_encoder"], images)


@pytest.mark.parametrize("kinds", [("mlp",), ("qkv",), ("qkv", "mlp")])
def test_pruned_is_masked(tiny, draw, images_of, kinds):
  """In float64; a unit that is zeroed and one that is gone do the same."""
  keep = {k: v for k, v in KEEP.items() if k.partition("/")[0] in kinds}
  with X64(True):
    params, images = draw(tiny, dtype=np.float64), images_of(tiny)
    small, settings = prune_model(params, tiny, keep)
    masked = mask_params(params, encoder_groups(tiny), keep)
    expected = embedding(masked, images, tiny)
    found = embedding(small, images, settings)
    whole = embedding(params, images, tiny)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
  assert np.abs(np.asarray(found - whole)).max() > 0.01


@pytest.mark.parametrize("change", [{"fold_scale": False}, {"rel_pos": "zero"}])
def test_the_authors_ways_change_the_function(tiny, draw, images_of, change):
  keep = {k: v for k, v in KEEP.items() if k.startswith("qkv")}
  with X64(True):
    params, images = draw(tiny, dtype=np.float64), images_of(tiny)
    masked = mask_params(params, encoder_groups(tiny), keep)
    small, settings = prune_model(params, tiny, keep, **change)
    expected = embedding(masked, images, tiny)
    found = embedding(small, images, settings)
  assert np.abs(np.asarray(found - expected)).max() > 0.01
  if change == {"rel_pos": "zero"}:
    for i in range(3):
      attn = small["image_encoder"]["blocks"][str(i)]["attn"]
      assert not np.any(attn["rel_pos_h"])
      assert not np.any(attn["rel_pos_w"])


def test_an_embedding_channel_is_gone_for_the_norms_too(
  tiny, draw, images_of, monkeypatch
):
  """The oracle: all channels, those removed zero, and norms that do not count
  them.
  """
  keep = {"embedding": [0, 2, 3, 7, 8, 9, 13, 20, 21]}
  kept = np.zeros(24, bool)
  kept[keep["embedding"]] = True

  def norm_of_kept(params, x, *, epsilon):
    if x.shape[-1] != 24:
      return plain(params, x, epsilon=epsilon)
    mean = jnp.sum(x * kept, -1, keepdims=True) / kept.sum()
    centred = (x - mean) * kept
    variance = jnp.sum(centred**2, -1, keepdims=True) / kept.sum()
    return centred / jnp.sqrt(variance + epsilon) * params["scale"] + (
      params["bias"] * kept
    )

  plain = encoder.norm
  with X64(True), jax.numpy_rank_promotion("allow"):
    params, images = draw(tiny, dtype=np.float64), images_of(tiny)
    small, settings = prune_model(params, tiny, keep)
    found = embedding(small, images, settings)
    masked = mask_params(params, encoder_groups(tiny), keep)
    zeroed = embedding(masked, images, tiny)
    monkeypatch.setattr(encoder, "norm", norm_of_kept)
    expected = embedding(masked, images, tiny)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
  assert np.abs(np.asarray(found - zeroed)).max() > 0.01


def test_two_rounds_are_their_union(tiny, draw):
  params = draw(tiny)
  first = {"embedding": [0, 1, 5, 6, 9, 10, 20, 23], "qkv/1": [0, 2, 4, 6]}
  second = {"embedding": [1, 2, 7], "qkv/1": [1, 3], "mlp/0": [5]}
  step, settings = prune_model(params, tiny, first)
  twice, twice_settings = prune_model(step, settings, second)
  once, once_settings = prune_model(
    params, tiny, {"embedding": [1, 5, 23], "qkv/1": [2, 6], "mlp/0": [5]}
  )
  assert once_settings == twice_settings
  chex.assert_trees_all_close(once, twice, rtol=1e-6)


def test_expanding_brings_the_zeros_back(tiny, draw):
  params = draw(tiny)
  small, _ = prune_model(params, tiny, KEEP)
  large, settings = expand(small, tiny, KEEP)
  assert settings == tiny
  chex.assert_trees_all_close(
    large, mask_params(params, encoder_groups(tiny), KEEP), rtol=1e-6
  )


def test_what_is_given_stays_as_it_was(tiny, draw):
  """No array is shared: a state made of the new tree may be donated."""
  params = jax.tree.map(jnp.asarray, draw(tiny))
  before = jax.tree.map(np.array, params)
  small, _ = prune_model(params, tiny, KEEP)
  ours = {id(array) for array in jax.tree.leaves(params)}
  assert not ours & {id(array) for array in jax.tree.leaves(small)}
  pointers = {a.unsafe_buffer_pointer() for a in jax.tree.leaves(params)}
  others = {a.unsafe_buffer_pointer() for a in jax.tree.leaves(small)}
  assert not pointers & others
  chex.assert_trees_all_equal(params, before)


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("name", "ratio", "step_1", "step_2", "widths"),
  [
    ("vit_b", 0.5, 45_209_472, 23_897_216, (384, 1536)),
    ("vit_b", 0.77, 20_199_912, 5_658_968, (168, 696)),
    ("vit_l", 0.5, None, 78_937_088, (512, 2048)),
    ("vit_h", 0.77, None, 34_376_928, (288, 1168)),
  ],
)
def test_published_counts_follow_from_the_rule(
  name, ratio, step_1, step_2, widths
):
  settings = preset(name)
  groups, heads = encoder_groups(settings), settings.encoder.heads

  def kept(group, unit=1):
    size = groups[group].size
    return list(range(kept_width(size * unit, ratio, heads) // unit))

  first = {"embedding": kept("embedding")}
  second = {k: kept(k, heads) for k in of_kind(groups, "qkv")}
  second |= {k: kept(k) for k in of_kind(groups, "mlp")}
  shapes = abstract_params(settings)
  made = []

  def run(params):
    params, one = prune_model(params, settings, first)
    made.append(params)
    params, two = prune_model(params, one, second)
    made.append(two)
    return params

  out = jax.eval_shape(run, shapes)
  assert count(out["image_encoder"]) == step_2
  if step_1 is not None:
    assert count(made[0]["image_encoder"]) == step_1
  cfg = made[1].encoder
  assert (cfg.width, cfg.mlp_widths[0]) == widths
  assert set(cfg.qkv_widths) == {widths[0]}


def test_the_slimsam_checkpoints_have_these_counts():
  for name, expected in (("vit_p50", 23_897_216), ("vit_p77", 5_658_968)):
    assert count(abstract_params(preset(name))["image_encoder"]) == expected


def test_every_axis_of_a_width_belongs_to_its_group(tiny):
  """24 is D alone, and 12 the width of a head: nothing is forgotten."""
  groups = encoder_groups(tiny)
  check_groups(abstract_params(tiny), groups)
  named = {
    (member.path, member.axis)
    for group in groups.values() for member in group.members
  }  # fmt: skip
  encoder_tree = abstract_params(tiny)["image_encoder"]
  for path, array in jax.tree_util.tree_leaves_with_path(encoder_tree):
    names = ("image_encoder", *(part.key for part in path))
    for axis, size in enumerate(array.shape):
      wide = size in (24, 12, 40)
      assert ((names, axis) in named) == wide, (names, axis)


BAD = [
  ({"embedding": [0, 24]}, "embedding: units are to be kept .* 0 to 23"),
  ({"embedding": [1, 1]}, "rising order"),
  ({"qkv/0": []}, "qkv/0: keep at least one unit of 12"),
  ({"qkv/9": [0]}, "there is no group 'qkv/9'"),
]


@pytest.mark.parametrize(("keep", "message"), BAD)
def test_units_that_are_not_there_are_refused(tiny, draw, keep, message):
  with pytest.raises(UserError, match=message):
    prune_model(draw(tiny), tiny, keep)


def test_tables_that_do_not_fit_are_refused(tiny, draw):
  params = draw(tiny)
  path = ("image_encoder", "pos_embed")
  for group, message in (
    (Group(24, (Member((*path, "x"), 0),)), "there is no image_encoder/pos_em"),
    (Group(23, (Member(path, 3),)), "has 23 units, but axis 3 of image_enc"),
  ):
    with pytest.raises(UserError, match=message):
      prune_params(params, {"mine": group}, {"mine": [0]})
  own = Group(24, (Member(path, 3),))
  with pytest.raises(UserError, match="belongs to a and to b"):
    check_groups(params, {"a": own, "b": own})


def test_an_unknown_treatment_of_positions_is_refused(tiny, draw):
  with pytest.raises(UserError, match="rel_pos='drop'"):
    prune_model(draw(tiny), tiny, KEEP, rel_pos="drop")
  assert leaf(draw(tiny), ("image_encoder", "pos_embed")).shape[-1] == 24
