"""One way through the experts as a model of its own."""

import dataclasses
import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from thor.model import init_params, num_params
from thor.paths import (
  export_dense,
  from_layers,
  keep_experts,
  layers_of,
  mean_weights,
  take_path,
)
from thor.settings import PATTERNS, Settings

# Experts in layers 0, 2 and 4 of the encoder and 0 and 2 of the decoder.
SETTINGS = Settings(
  20, width=16, hidden=32, heads=2, encoder_layers=6, decoder_layers=4,
  experts=3,
)  # fmt: skip
PATH = (2, 0, 1, 1, 2)


def params_of(settings, seed=0):
  rng = np.random.default_rng(seed)
  init = functools.partial(init_params, settings)
  shapes = jax.eval_shape(init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes
  )


def exported(params, settings, path):
  """`export_dense`, compiled as one."""
  plain = []

  def export(params):
    dense, settings_of_it = export_dense(params, settings, path)
    plain.append(settings_of_it)
    return dense

  return jax.jit(export)(params), plain[0]


PARAMS = params_of(SETTINGS)
PATTERN_CASES = pytest.mark.parametrize(
  ("pattern", "encoder", "decoder"),
  [
    (PATTERNS["every_second"], 4, 2),
    (PATTERNS["every_second"], 3, 1),  # of one block
    ((False, True, True), 6, 3),
  ],
)


@PATTERN_CASES
def test_a_plain_model_has_the_experts_of_the_path(pattern, encoder, decoder):
  settings = dataclasses.replace(
    SETTINGS, pattern=pattern, encoder_layers=encoder, decoder_layers=decoder
  )
  params = params_of(settings)
  rng = np.random.default_rng(1)
  path = rng.integers(0, 3, sum(settings.expert_layers))
  dense, plain = exported(params, settings, path)
  assert (plain.experts, plain.expert_layers) == (1, (0, 0))
  init = functools.partial(init_params, plain)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    dense, jax.eval_shape(init, jax.random.key(0))
  )
  chosen = iter(path)
  for side in ("encoder", "decoder"):
    pairs = zip(layers_of(params, side), layers_of(dense, side), strict=True)
    for i, (layer, found) in enumerate(pairs):
      assert ("experts" in layer) == pattern[i % len(pattern)]
      if "experts" in layer:
        take = operator.itemgetter(next(chosen))
        layer["feed_forward"] = jax.tree.map(take, layer.pop("experts"))
      chex.assert_trees_all_equal(found, layer)
  assert next(chosen, None) is None
  chex.assert_trees_all_equal(dense["embedding"], params["embedding"])


@PATTERN_CASES
def test_layers_to_blocks_and_back(pattern, encoder, decoder):
  settings = dataclasses.replace(
    SETTINGS, pattern=pattern, encoder_layers=encoder, decoder_layers=decoder
  )
  params = params_of(settings)
  for side, depth in (("encoder", encoder), ("decoder", decoder)):
    own = layers_of(params, side)
    assert len(own) == depth
    blocks = jax.jit(functools.partial(from_layers, settings=settings))(own)
    chex.assert_trees_all_equal(blocks, params[side]["layers"])


def test_a_traced_path_takes_the_same():
  _, one = take_path(PARAMS, SETTINGS, jnp.asarray(PATH))
  assert (one.experts, one.pattern) == (1, SETTINGS.pattern)
  taken = jax.jit(lambda params, path: take_path(params, SETTINGS, path)[0])(
    PARAMS, jnp.asarray(PATH)
  )
  # The same numbers as the plain model's.
  dense, plain = exported(PARAMS, SETTINGS, PATH)
  again, _ = exported(taken, one, (0,) * 5)
  chex.assert_trees_all_equal(again, dense)
  assert sum(leaf.size for leaf in jax.tree.leaves(taken)) == num_params(plain)


def test_the_mean_of_the_weights():
  mean, one = mean_weights(jax.tree.map(jnp.asarray, PARAMS), SETTINGS)
  assert one.experts == 1
  for side in ("encoder", "decoder"):
    found = mean[side]["layers"]["layer_0"]["experts"]
    stack = PARAMS[side]["layers"]["layer_0"]["experts"]
    expected = jax.tree.map(
      lambda leaf: np.float64(leaf).mean(1, keepdims=True), stack
    )
    chex.assert_trees_all_close(
      jax.tree.map(np.float64, found), expected, atol=1e-6
    )
    # The rest is as it was.
    chex.assert_trees_all_equal(
      mean[side]["layers"]["layer_1"], PARAMS[side]["layers"]["layer_1"]
    )


def test_a_model_without_experts_is_its_own_path():
  settings = dataclasses.replace(SETTINGS, experts=1, pattern=PATTERNS["none"])
  params = params_of(settings)
  dense, plain = exported(params, settings, ())
  assert plain == settings
  chex.assert_trees_all_equal(dense, params)


@pytest.mark.parametrize(
  ("change", "path", "message"),
  [
    ({}, (0, 1), "path of 2 experts, but 5 layers have some"),
    ({}, (0, 1, 2, 3, 0), r"path=\[0, 1, 2, 3, 0\].*from 0 to 2"),
    ({}, (0, 1, 2, -1, 0), r"numbered from 0 to 2"),
    ({"gated": True}, PATH, "gates has no fixed path"),
  ],
)
def test_a_path_that_is_none(change, path, message):
  settings = dataclasses.replace(SETTINGS, **change)
  with pytest.raises(UserError, match=message) as error:
    export_dense(PARAMS, settings, path)
  assert "\n" not in str(error.value)


def test_some_experts_are_a_model_of_their_own():
  made, settings = keep_experts(PARAMS, SETTINGS, [2, 0])
  assert settings.experts == 2
  assert num_params(settings) == sum(x.size for x in jax.tree.leaves(made))
  kept = take_path(made, settings, jnp.array([0, 1, 0, 0, 1]))
  same = take_path(PARAMS, SETTINGS, jnp.array([2, 0, 2, 2, 0]))
  chex.assert_trees_all_equal(kept[0], same[0])
  assert kept[1] == same[1]


@pytest.mark.parametrize("kept", [[], [1, 1], [3], [-1]])
def test_experts_that_cannot_be_kept(kept):
  with pytest.raises(UserError, match="name experts from 0 to 2"):
    keep_experts(PARAMS, SETTINGS, kept)
