"""Losses of every token, of all logits at once or of a part at a time."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from birdie.model_parts import LanguageModel, vocabulary_logits

Array = jax.Array
Losses = tuple[Array, Array, Array]


def logit_losses(logits: Array, targets: Array) -> Losses:
  """Losses of logits.

  Args:
    logits: [... v].
    targets: int [...].

  Returns:
    Three float32 [...]: negative log-likelihood, whether the best guess is
    right, and the log of the partition function (of a z-loss). At every
    position; weigh them with `loss_weights`.
  """
  logits = logits.astype(jnp.float32)
  partition = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  correct = jnp.argmax(logits, axis=-1) == targets
  return partition - chosen, correct.astype(jnp.float32), partition


def batch_losses(
  model: LanguageModel,
  params: Any,
  batch: Mapping[str, Array],
  *,
  chunk: int = 0,
) -> Losses:
  """`logit_losses` of a packed batch [b t]; `chunk` as in `token_losses`."""
  features: Any = model.apply(
    {"params": params},
    batch["tokens"],
    batch["segment_ids"],
    batch["positions"],
    batch["prefix"],
    features=True,
  )
  return token_losses(
    features,
    model.vocabulary_kernel(params),
    batch["targets"],
    chunk=chunk,
    seq_axis=model.seq_axis,
  )


def token_losses(
  features: Array,
  kernel: Array,
  targets: Array,
  *,
  chunk: int = 0,
  seq_axis: str | None = None,
) -> Losses:
  """`logit_losses` of a model's features.

  With `chunk`, logits of so many places of every row exist at a time, and are
  computed again in the backward pass: memory for [b chunk v] in place of
  [b t v], for a third more work on the logits.

  Args:
    features: [b t d], of `LanguageModel` with `features=True`.
    kernel: [d v], of `LanguageModel.vocabulary_kernel`.
    targets: int [b t].
    chunk: places; 0: all.
    seq_axis: mesh axis that time is cut along; chunks stay within its shards.
  """
  shards = 1
  if seq_axis is not None:
    shards = jax.sharding.get_abstract_mesh().shape[seq_axis]
  length = targets.shape[1] // shards
  if not 0 < chunk < length:
    return _losses(features, kernel, targets)
  one = jax.checkpoint(lambda part: _losses(part[0], kernel, part[1]))
  cut = functools.partial(_cut, shards=shards, size=chunk)
  found = jax.lax.map(one, (cut(features), cut(targets)))
  join = functools.partial(_joined, length=length)
  return jax.tree.map(join, found)


def _losses(features: Array, kernel: Array, targets: Array) -> Losses:
  return logit_losses(vocabulary_logits(features, kernel), targets)


def _cut(x: Array, *, shards: int, size: int) -> Array:
  """[b t ...] -> [parts b shards size ...], zeros behind every shard."""
  batch, time, *rest = x.shape
  length = time // shards
  parts = -(-length // size)
  pad = [(0, 0)] * (x.ndim + 1)
  pad[2] = (0, parts * size - length)
  x = jnp.pad(x.reshape(batch, shards, length, *rest), pad)
  return jnp.moveaxis(x.reshape(batch, shards, parts, size, *rest), 2, 0)


def _joined(x: Array, *, length: int) -> Array:
  """[parts b shards size] -> [b shards * length]."""
  _, batch, shards, _ = x.shape
  x = jnp.moveaxis(x, 0, 2).reshape(batch, shards, -1)
  return x[:, :, :length].reshape(batch, shards * length)
