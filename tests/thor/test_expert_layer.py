"""A feed-forward layer with experts: gates, room, padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from thor.expert_layer import (
  balance_loss,
  gate_probs,
  load_of,
  run_experts,
  sentence_means,
)
from thor.layers import Dropout
from thor.model import init_layer, init_params, layer, masks_of
from thor.settings import Settings

E, D, PAD = 4, 16, 1
SETTINGS = Settings(
  20, width=D, hidden=32, heads=2, encoder_layers=2, decoder_layers=2,
  experts=E, gated=True, capacity=1.25, jitter=0.0, dropout=0.0,
)  # fmt: skip
PLAIN = dataclasses.replace(SETTINGS, gated=False)
TRAIN = Dropout(jax.random.key(0))  # rates are 0: it only says "in training"
# Sums of 32 products in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


PARAMS = {
  "up": {"kernel": draw(E, D, 32, seed=1) / 4, "bias": draw(E, 32, seed=2)},
  "down": {"kernel": draw(E, 32, D, seed=3) / 5, "bias": draw(E, D, seed=4)},
  "gate": {"kernel": draw(D, E, seed=5)},
}
X = draw(2, 4, D, seed=6)
ALL = jnp.ones((2, 4), bool)


@functools.partial(jax.jit, static_argnums=0, static_argnames="how")
def run(settings, ids, mask, dropout_key, x=X, params=PARAMS, *, how):
  return run_experts(
    settings, params, x, ids, how=how, mask=mask, dropout=Dropout(dropout_key)
  )


def expected_of(ids, x=X):
  """F_e(x) of each token, in float64."""
  params = jax.tree.map(np.float64, PARAMS)
  ids, x = np.asarray(ids), np.float64(x)
  up, down = (jax.tree.map(lambda p: p[ids], params[n]) for n in ("up", "down"))
  hidden = np.einsum("btd,btdf->btf", x, up["kernel"]) + up["bias"]
  hidden = np.maximum(hidden, 0)
  return np.einsum("btf,btfd->btd", hidden, down["kernel"]) + down["bias"]


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def gate(x=X):
  return softmax(np.float64(x) @ np.float64(PARAMS["gate"]["kernel"]))


IDS = jnp.int32([[0, 1, 2, 3], [3, 3, 0, 0]])


# -- the balance loss ----------------------------------------------------------


@pytest.mark.parametrize(
  ("chosen", "probs", "expected"),
  [
    ([0, 0, 1, 2], [[0.4, 0.3, 0.2, 0.1]], 0.013),
    ([0, 1, 2, 3], [[0.25] * 4], 0.01),
  ],
)
def test_the_balance_loss(chosen, probs, expected):
  probs = jnp.broadcast_to(jnp.float32(probs), (1, 4, E))
  found = balance_loss(probs, jnp.int32([chosen]), jnp.ones((1, 4), bool))
  assert 0.01 * float(found) == pytest.approx(expected, rel=1e-6)


def test_padding_counts_for_nothing_in_the_balance_loss():
  probs = jnp.asarray(gate(), jnp.float32)
  ids = jnp.argmax(probs, axis=-1)
  short = balance_loss(probs[:, :3], ids[:, :3], ALL[:, :3])
  mask = jnp.arange(4)[None] < jnp.int32([3, 3])[:, None]
  assert float(balance_loss(probs, ids, mask)) == pytest.approx(
    float(short), rel=1e-6
  )
  load = load_of(ids, mask, E)
  assert float(load.sum()) == pytest.approx(1)


def test_the_gradient_of_the_balance_loss_goes_through_probabilities():
  """k f_i / n for each, not through the choice."""
  probs = jnp.asarray(gate(), jnp.float32)
  ids = jnp.argmax(probs, axis=-1)
  found = jax.grad(balance_loss)(probs, ids, ALL)
  expected = E * np.bincount(np.ravel(ids), minlength=E) / 8 / 8
  np.testing.assert_allclose(
    found, np.broadcast_to(expected, found.shape), rtol=1e-6
  )


# -- the gate ------------------------------------------------------------------


def test_a_gate_chooses_and_weighs():
  out, report = run(SETTINGS, None, ALL, None, how="grouped")
  probs = gate()
  ids = probs.argmax(-1)
  weight = probs.max(-1)[..., None]
  np.testing.assert_allclose(out, weight * expected_of(ids), **CLOSE)
  load = np.bincount(ids.ravel(), minlength=E) / 8
  np.testing.assert_allclose(report["load"], load)
  balance = E * np.sum(load * probs.mean((0, 1)))
  assert float(report["balance"]) == pytest.approx(balance, rel=1e-5)


@pytest.mark.parametrize(
  ("ids", "how"),
  [
    (IDS, "grouped"),
    (jnp.int32([1, 3]), "grouped"),
    (jnp.int32(2), "one"),
  ],
  ids=["by token", "by sentence", "by batch"],
)
@pytest.mark.parametrize("gated", [False, True])
def test_ids_that_are_given(ids, how, gated):
  """A gate then only weighs: with its probability of the drawn expert."""
  settings = SETTINGS if gated else PLAIN
  out, report = run(settings, ids, ALL, None, how=how)
  each = np.broadcast_to(ids[:, None] if ids.ndim == 1 else ids, (2, 4))
  weight = np.take_along_axis(gate(), each[..., None], -1) if gated else 1
  np.testing.assert_allclose(out, weight * expected_of(each), **CLOSE)
  np.testing.assert_allclose(
    report["load"], np.bincount(each.ravel(), minlength=E) / 8
  )
  assert (float(report["balance"]) > 0) == gated


def test_a_gate_learns_from_its_weight():
  def loss(params):
    out, _ = run_experts(SETTINGS, params, X, IDS, how="grouped", mask=ALL)
    return jnp.sum(jnp.sin(out))

  grads = jax.jit(jax.grad(loss))(PARAMS)
  assert float(jnp.abs(grads["gate"]["kernel"]).max()) > 1e-3


def test_jitter_only_in_training():
  @functools.partial(jax.jit, static_argnums=0)
  def probs(jitter, params, x, key):
    return gate_probs(params, x, jitter, Dropout(key))

  key, own = jax.random.key(0), PARAMS["gate"]
  still = probs(0.1, own, X, None)
  np.testing.assert_allclose(still, gate(), rtol=1e-5)
  assert 1e-3 < float(jnp.abs(probs(0.1, own, X, key) - still).max()) < 0.5
  np.testing.assert_array_equal(probs(0.0, own, X, key), still)
  # Factors from 0.9 to 1.1, of each number its own.
  wide = probs(0.1, {"kernel": jnp.eye(D)}, jnp.ones((40, 50, D)), key)
  logits = np.log(np.asarray(wide))
  spread = logits.max(-1) - logits.min(-1)
  assert 0.195 < spread.max() <= 0.2 + 1e-5


def test_a_gate_may_look_at_the_whole_sentence():
  """At the mean of what is no padding; all of its tokens go the same way."""
  mask = jnp.bool_([[1, 1, 1, 0], [1, 1, 0, 0]])
  rows = np.asarray(X)
  asked = np.stack([rows[0, :3].mean(0), rows[1, :2].mean(0)])
  np.testing.assert_allclose(sentence_means(X, mask), asked, rtol=1e-5)
  assert not np.any(sentence_means(X, jnp.zeros_like(mask)))
  out, report = jax.jit(
    lambda sentence: run_experts(
      SETTINGS, PARAMS, X, None, how="grouped", mask=mask, sentence=sentence
    )
  )(jnp.asarray(asked))
  probs = gate(asked)
  ids = np.repeat(probs.argmax(-1)[:, None], 4, axis=1)
  weight = probs.max(-1)[:, None, None]
  np.testing.assert_allclose(out, weight * expected_of(ids), **CLOSE)
  load = np.bincount(ids[np.asarray(mask)], minlength=E) / 5
  np.testing.assert_allclose(report["load"], load, rtol=1e-6)


# -- room ----------------------------------------------------------------------


def test_what_has_no_room_gets_nothing():
  """Eight tokens, four experts, 1.25 shares: three places, by position."""
  ids = jnp.int32([[0, 0, 1, 0], [0, 0, 2, 1]])
  out, report = run(PLAIN, ids, ALL, jax.random.key(0), how="capacity")
  room = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])[..., None]
  np.testing.assert_allclose(out, room * expected_of(ids), **CLOSE)
  assert not np.any(out[1, :2])
  assert float(report["kept"]) == 0.75
  np.testing.assert_allclose(report["load"], [0.625, 0.25, 0.125, 0])
  # Out of training there is room for all, but for a limit of its own.
  free, report = run(PLAIN, ids, ALL, None, how="capacity")
  np.testing.assert_allclose(free, expected_of(ids), **CLOSE)
  assert float(report["kept"]) == 1
  limited = dataclasses.replace(PLAIN, eval_capacity=0.5)
  out, report = run(limited, ids, ALL, None, how="capacity")
  room = np.array([[1, 0, 1, 0], [0, 0, 1, 0]])[..., None]
  np.testing.assert_allclose(out, room * expected_of(ids), **CLOSE)
  assert float(report["kept"]) == 0.375


def test_groups_share_no_room():
  """Four tokens a group: two places of each expert."""
  settings = dataclasses.replace(PLAIN, groups=2)
  ids = jnp.int32([[0, 0, 1, 0], [0, 0, 2, 1]])
  out, report = run(settings, ids, ALL, jax.random.key(0), how="capacity")
  room = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])[..., None]
  np.testing.assert_allclose(out, room * expected_of(ids), **CLOSE)
  assert float(report["kept"]) == 0.875


def test_padding_takes_no_room():
  ids = jnp.int32([[0, 0, 0, 0], [0, 0, 2, 1]])
  mask = jnp.asarray([[False, True, False, False], [True] * 4])
  out, report = run(PLAIN, ids, mask, jax.random.key(0), how="capacity")
  expected = np.asarray(mask)[..., None] * expected_of(ids)
  np.testing.assert_allclose(out, expected, **CLOSE)
  assert float(report["kept"]) == 1
  np.testing.assert_allclose(report["load"], [0.6, 0.2, 0.2, 0], rtol=1e-6)


def test_what_has_no_room_passes_unchanged():
  """Through the residual, here of a layer whose attention adds nothing."""
  settings = dataclasses.replace(PLAIN, pre_norm=True)
  init = functools.partial(init_layer, settings, has_experts=True, cross=False)
  shapes = jax.eval_shape(init, jax.random.key(0))
  params = jax.tree.map(lambda leaf: draw(*leaf.shape), shapes)
  params["attention"]["out"] = jax.tree.map(
    jnp.zeros_like, params["attention"]["out"]
  )
  tokens, ids = jnp.full((2, 4), 5), jnp.zeros((2, 4), jnp.int32)

  @jax.jit
  def call(params, x, ids, key):
    masks = masks_of(settings, tokens, None)
    drop = Dropout(key)
    return layer(
      settings, params, x, masks, ids=ids, how="capacity", dropout=drop
    )

  out, report = call(params, X, ids, jax.random.key(1))
  flat, before = np.reshape(out, (8, D)), np.reshape(X, (8, D))
  np.testing.assert_array_equal(flat[3:], before[3:])
  assert np.all(np.any(flat[:3] != before[:3], axis=1))
  assert float(report["kept"]) == 3 / 8


def test_rows_that_groups_do_not_divide():
  settings = dataclasses.replace(PLAIN, groups=3)
  with pytest.raises(UserError, match="groups=3 does not divide the 2 rows"):
    run_experts(settings, PARAMS, X, IDS, how="capacity", mask=ALL,
                dropout=TRAIN)  # fmt: skip


# -- the other ways ------------------------------------------------------------


def test_balanced_ids_of_a_longer_row():
  """Of 6 tokens on 4 experts the ids are for 8."""
  x = draw(2, 6, D, seed=7)
  ids = jnp.int32([[0, 1, 2, 3, 3, 2, 1, 0], [3, 3, 2, 2, 1, 1, 0, 0]])
  mask = jnp.ones((2, 6), bool)
  out, report = run(PLAIN, ids, mask, None, x, how="balanced")
  np.testing.assert_allclose(out, expected_of(ids[:, :6], x), **CLOSE)
  load = np.bincount(np.ravel(ids[:, :6]), minlength=E) / 12
  np.testing.assert_allclose(report["load"], load, rtol=1e-6)


def test_balanced_ids_of_sentences():
  x, ids = draw(4, 3, D, seed=8), jnp.int32([2, 0, 3, 1])
  out, _ = run(PLAIN, ids, jnp.ones((4, 3), bool), None, x, how="balanced")
  each = np.broadcast_to(ids[:, None], (4, 3))
  np.testing.assert_allclose(out, expected_of(each, x), **CLOSE)


def test_the_mean_of_all_experts():
  out, _ = run(PLAIN, None, ALL, None, how="averaged")
  every = [expected_of(np.full((2, 4), e)) for e in range(E)]
  np.testing.assert_allclose(out, np.mean(every, axis=0), **CLOSE)


def test_dropout_of_hidden_units_is_for_whole_batches():
  settings = dataclasses.replace(PLAIN, activation_dropout=0.5)
  with pytest.raises(UserError, match=r"activation_dropout=0\.5 only works"):
    run_experts(settings, PARAMS, X, IDS, how="grouped", mask=ALL,
                dropout=TRAIN)  # fmt: skip
  out, _ = run(settings, IDS, ALL, None, how="grouped")
  np.testing.assert_allclose(out, expected_of(IDS), **CLOSE)
  dropped, _ = run(settings, jnp.int32(1), ALL, jax.random.key(2), how="one")
  kept = expected_of(np.ones((2, 4), int))
  assert np.all(np.any(np.abs(dropped - kept) > 0.01, axis=-1))


def test_a_gated_model_has_first_parameters():
  made = jax.eval_shape(
    functools.partial(init_params, SETTINGS), jax.random.key(0)
  )
  own = made["encoder"]["layers"]["layer_0"]["experts"]
  assert own["gate"]["kernel"].shape == (1, D, E)
