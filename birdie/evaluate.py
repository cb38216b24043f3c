"""Losses of every configuration on held-out text, and runs read from disk."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from birdie.models import token_metrics
from birdie.vocab import Vocabulary
from common.data.loader import Placer

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Scores:
  """Validation results, one value a configuration.

  Attributes:
    losses: [K] mean negative log-likelihood of a target token, in nats.
    accuracies: [K] share of target tokens that are the model's first choice.
    tokens: [K] number of target tokens.
  """

  losses: np.ndarray
  accuracies: np.ndarray
  tokens: np.ndarray

  def summary(self, names: Sequence[str]) -> dict[str, float]:
    """Scalars to write: token-weighted means, then every configuration."""
    total = self.tokens.sum()
    lines = {
      "eval/loss": float((self.losses * self.tokens).sum() / total),
      "eval/accuracy": float((self.accuracies * self.tokens).sum() / total),
    }
    for name, loss, accuracy in zip(names, self.losses, self.accuracies):
      lines[f"eval_config/loss/{name}"] = float(loss)
      lines[f"eval_config/accuracy/{name}"] = float(accuracy)
    return lines


class Evaluator:
  """Scores parameters on fixed batches, in exactly the training format.

  Args:
    model: maps tokens to logits.
    batches: host batches that hold this process's rows.
    num_configs: K.
    sharding: where batches go.
  """

  def __init__(
    self,
    model: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    num_configs: int,
    sharding: jax.sharding.NamedSharding,
  ):
    place = Placer(sharding)
    self._batches = [place(batch) for batch in batches]

    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.P())

    @functools.partial(jax.jit, out_shardings=everywhere)
    def sums(params: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
      logits = apply_model(model, params, batch)
      loss, correct = token_metrics(logits, batch)
      weights = batch["loss_weights"]
      values = jnp.stack([loss * weights, correct * weights, weights], -1)
      ids = jnp.where(weights > 0, batch["config_ids"], num_configs)
      return jax.ops.segment_sum(
        values.reshape(-1, 3), ids.reshape(-1), num_configs + 1
      )[:num_configs]

    self._sums = sums

  def __call__(self, params: PyTree) -> Scores:
    """Evaluates; all processes get the same numbers."""
    parts = [self._sums(params, batch) for batch in self._batches]
    loss, correct, tokens = np.sum(
      [np.asarray(part, np.float64) for part in parts], axis=0
    ).T
    count = np.maximum(tokens, 1)
    return Scores(
      losses=(loss / count).astype(np.float32),
      accuracies=(correct / count).astype(np.float32),
      tokens=tokens,
    )


def apply_model(
  model: Any, params: PyTree, batch: Mapping[str, jax.Array]
) -> jax.Array:
  """Runs the model on a packed batch; returns logits [B, T, V]."""
  return model.apply(
    {"params": params},
    batch["tokens"],
    batch["segment_ids"],
    batch["positions"],
    batch["prefix"],
  )


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, ready to use.

  Attributes:
    step: which checkpoint was read.
  """

  config: Any
  model: Any
  params: PyTree
  tokenizer: Any
  vocab: Vocabulary
  step: int


def load_run(run_dir: str | os.PathLike, *, step: int | None = None) -> Run:
  """Reads a run's folder: its configuration and newest parameters.

  Args:
    run_dir: the folder that training was given as `--workdir`.
    step: which checkpoint; the newest if None.

  Raises:
    UserError: when the folder is missing or holds no checkpoint.
  """
  from birdie.data import make_vocabulary
  from birdie.models import make_model
  from common.checkpoint import load_params
  from common.config import load_config
  from common.data.tokenizers import make_tokenizer
  from common.errors import UserError

  config = load_config(run_dir)
  if "tokenizer" not in config:
    raise UserError(f"{os.fspath(run_dir)} holds a run of another method")
  tokenizer = make_tokenizer(config.tokenizer)
  vocab = make_vocabulary(tokenizer)
  model = make_model(config.model, vocab.size)
  found, params = load_params(os.path.join(run_dir, "checkpoints"), step=step)
  params = jax.tree.map(jnp.asarray, params)
  return Run(config, model, params, tokenizer, vocab, found)
