"""Losses of tokens: known answers, large logits, chunks, the z-loss."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie.curriculum import Curriculum
from birdie.losses import logit_losses, token_losses
from birdie.models import init_params, make_model
from birdie.presets import preset
from birdie.train import make_loss_fn
from birdie.vocab import byte_vocabulary
from configs.birdie import get_config


def test_known_answers():
  logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]])) + 3
  loss, correct, partition = logit_losses(logits, jnp.array([[0, 1]]))
  np.testing.assert_allclose(loss, [[np.log(2), np.log(5)]], rtol=1e-6)
  np.testing.assert_array_equal(correct, [[1, 0]])
  np.testing.assert_allclose(partition, [[3, 3]], rtol=1e-6)


def test_large_and_low_logits():
  logits = jnp.array([[[1000.0, 0.0], [-1000.0, 0.0]]], jnp.bfloat16)
  loss, _, _ = logit_losses(logits, jnp.array([[0, 0]]))
  assert loss.dtype == jnp.float32
  np.testing.assert_array_equal(loss, [[0, 1000]])


WIDTH, VOCAB, ROWS, LENGTH = 4, 64, 2, 24


def _weighted(features, kernel, targets, *, chunk):
  losses = token_losses(features, kernel, targets, chunk=chunk)
  weights = jnp.arange(LENGTH, dtype=jnp.float32)[None]
  return jnp.sum(losses[0] * weights) + jnp.sum(losses[2] ** 2), losses


@pytest.mark.parametrize("chunk", [1, 5, 12, 23, 24, 99])
def test_chunks_change_no_number(chunk):
  rng = np.random.default_rng(0)
  features = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
  kernel = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
  targets = rng.integers(0, VOCAB, (ROWS, LENGTH))
  found, expected = (
    jax.jit(
      jax.value_and_grad(
        functools.partial(_weighted, chunk=size), (0, 1), has_aux=True
      )
    )(features, kernel, targets)
    for size in (chunk, 0)
  )
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-4)


def test_chunks_bound_the_memory():
  """Logits of all places exist nowhere, forward or backward."""

  def bytes_of(chunk):
    features = jax.ShapeDtypeStruct((4, 512, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((8, 4096), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, 512), jnp.int32)

    def loss(features, kernel, targets):
      return jnp.sum(token_losses(features, kernel, targets, chunk=chunk)[0])

    step = jax.jit(jax.grad(loss, (0, 1)))
    compiled = step.lower(features, kernel, targets).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  whole = 4 * 512 * 4096 * 4
  assert bytes_of(0) > whole
  # 1/16 of the places: logits and their gradient.
  assert bytes_of(32) < whole / 4


def test_the_z_loss_is_added_and_reported_apart():
  vocab = byte_vocabulary()
  entries = preset("ntp", vocab, sequence_length=64).configurations
  curriculum = Curriculum.of(entries)
  model = make_model(get_config("smoke").model, vocab.size)
  params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
  tokens = jnp.arange(16, dtype=jnp.int32)[None] + 64
  batch = {
    "tokens": tokens,
    "targets": tokens + 1,
    "segment_ids": jnp.ones_like(tokens),
    "positions": tokens - 64,
    "prefix": tokens < 0,
    "loss_weights": (tokens % 2).astype(jnp.float32),
    "config_ids": jnp.zeros_like(tokens),
  }
  (plain, _), (both, metrics) = (
    jax.jit(make_loss_fn(model, curriculum, z_loss=z))(params, batch, None)
    for z in (0.0, 0.01)
  )
  np.testing.assert_allclose(metrics["loss"].value(), plain, rtol=1e-6)
  np.testing.assert_allclose(both - plain, metrics["z_loss"].value(), rtol=1e-4)
  assert metrics["z_loss"].value() > 0.05  # 0.01 log(512) ** 2 is 0.39
