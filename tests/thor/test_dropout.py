"""Dropout: its rate, its places, and one expert's two passes: R-Drop."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thor.data import shift_right
from thor.layers import Dropout, Site
from thor.losses import thor_loss
from thor.model import Transformer, init_params, layer, masks_of
from thor.paths import export_dense, layers_of
from thor.routing import Routes
from thor.settings import PATTERNS, Settings

PAD, V = 1, 20
SETTINGS = Settings(
  V, width=16, hidden=32, heads=2, encoder_layers=2, decoder_layers=1,
  experts=3, pattern=PATTERNS["all"],
)  # fmt: skip


def params_of(settings, seed=0):
  rng = np.random.default_rng(seed)
  init = functools.partial(init_params, settings)
  shapes = jax.eval_shape(init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype),
    shapes,
  )


def sentences(lengths, width, seed):
  tokens = np.random.default_rng(seed).integers(4, V, (len(lengths), width))
  padding = np.arange(width) >= np.array(lengths)[:, None]
  return jnp.asarray(np.where(padding, PAD, tokens), jnp.int32)


SOURCE = sentences([7, 4, 5, 0], 7, seed=0)
TARGET = sentences([3, 6, 4, 0], 6, seed=1)
INPUT = shift_right(TARGET)


@functools.partial(jax.jit, static_argnums=0)
def logits(settings, params, key):
  model = Transformer(settings)
  routes = Routes()
  return model.apply({"params": params}, SOURCE, INPUT, routes, key=key)[0]


# -- one expert is R-Drop ------------------------------------------------------

DROPPING = dataclasses.replace(
  SETTINGS, experts=1, dropout=0.3, attention_dropout=0.2,
  activation_dropout=0.1,
)  # fmt: skip
KEYS = [jax.random.key(5), jax.random.key(6)]


def r_drop(logits1, logits2, targets, *, alpha, smoothing):
  """R-Drop's loss over target tokens, written out in float64."""
  total, count = 0.0, 0
  rows = zip(*(np.float64(x).reshape(-1, V) for x in (logits1, logits2)))
  for (one, two), target in zip(rows, np.ravel(targets)):
    if target == PAD:
      continue
    lp, lq = (x - np.log(np.exp(x).sum()) for x in (one, two))
    for log in (lp, lq):
      share = smoothing / (V - 1)
      total -= (1 - smoothing - share) * log[target] + share * log.sum()
    kl = (np.exp(lp) * (lp - lq)).sum() + (np.exp(lq) * (lq - lp)).sum()
    total += alpha * kl / 2
    count += 1
  return total / count


def test_one_expert_is_r_drop():
  """The model with one expert draws the masks of a plain one, so their two
  passes are the same, and so is the loss.
  """
  params = params_of(DROPPING)
  dense, plain = export_dense(params, DROPPING, (0, 0, 0))
  found = [logits(DROPPING, params, key) for key in KEYS]
  expected = [logits(plain, dense, key) for key in KEYS]
  # float32 through three layers, values of order 1.
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=2e-5)
  loss, parts = thor_loss(*found, TARGET, pad_id=PAD, alpha=5.0)
  assert float(parts["skl"].total) > 0.1
  written = r_drop(*expected, TARGET, alpha=5.0, smoothing=0.1)
  assert float(loss) == pytest.approx(written, rel=1e-4)
  again = logits(DROPPING, params, KEYS[0])
  np.testing.assert_array_equal(again, found[0])


# -- places --------------------------------------------------------------------


def test_what_dropout_keeps():
  drop = Dropout(jax.random.key(0))
  x = jnp.full((200, 500), 2.0)
  kept = drop(x, 0.3, Site.ATTENTION)
  share = float(jnp.mean(kept != 0))
  assert share == pytest.approx(0.7, abs=5 * (0.21 / x.size) ** 0.5)
  np.testing.assert_allclose(np.unique(kept), [0, 2 / 0.7], rtol=1e-6)
  np.testing.assert_array_equal(kept, drop(x, 0.3, Site.ATTENTION))
  # Places and keys have masks of their own: two of them keep 0.49.
  for other in (
    *(drop(x, 0.3, site) for site in Site if site != Site.ATTENTION),
    Dropout(jax.random.key(1))(x, 0.3, Site.ATTENTION),
  ):
    both = float(jnp.mean((kept != 0) & (other != 0)))
    assert both == pytest.approx(0.49, abs=5 * (0.25 / x.size) ** 0.5)
  assert drop(x, 0.0, Site.ATTENTION) is x
  assert Dropout(None)(x, 0.3, Site.ATTENTION) is x


@functools.partial(jax.jit, static_argnums=0)
def decoder_layer(settings, params, key):
  rng = np.random.default_rng(2)
  x, memory = (
    jnp.asarray(rng.normal(size=(4, length, 16)), jnp.float32)
    for length in (6, 7)
  )
  masks = masks_of(settings, INPUT, SOURCE)
  return layer(
    settings, params, x, masks, memory=memory, ids=jnp.int32(0),
    dropout=Dropout(key),
  )[0]  # fmt: skip


@pytest.mark.parametrize(
  ("rate", "places"),
  [
    ("dropout", {"attention", "cross_attention", "feed_forward"}),
    ("attention_dropout", {"attention", "cross_attention"}),
    ("activation_dropout", {"feed_forward"}),
  ],
)
@pytest.mark.parametrize("has_experts", [True, False])
def test_where_a_layer_drops(rate, places, has_experts):
  """Where a sub-layer is the only one that adds something, it shows."""
  pattern = PATTERNS["all" if has_experts else "none"]
  settings = dataclasses.replace(
    SETTINGS, pattern=pattern, pre_norm=True, **{"dropout": 0.0, rate: 0.5}
  )
  params = layers_of(params_of(settings), "decoder")[0]
  feed_forward = "experts" if has_experts else "feed_forward"
  last = {
    "attention": ("attention", "out"),
    "cross_attention": ("cross_attention", "out"),
    "feed_forward": (feed_forward, "down"),
  }
  for name in last:
    alone = params
    for other, (group, part) in last.items():
      if other != name:
        nothing = jax.tree.map(jnp.zeros_like, params[group][part])
        alone = alone | {group: alone[group] | {part: nothing}}
    first, again, second = (
      np.asarray(decoder_layer(settings, alone, jax.random.key(seed)))
      for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != second) == (name in places)
