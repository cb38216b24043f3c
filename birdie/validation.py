"""Losses on held-out text in training's format, of every configuration."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from birdie.data import Batch, Corpus, process_rows
from birdie.losses import batch_losses
from birdie.packing import KEYS, Packer, Pieces
from birdie.presets import Configuration
from common.data.loader import Placer
from common.data.text import TokenStore, shuffled_windows
from common.errors import UserError

PyTree = Any


def eval_batches(
  config: Any,
  corpus: Corpus,
  configurations: Sequence[Configuration],
  *,
  sharding: Any = None,
) -> list[Batch]:
  """`make_eval_batches` as `configs/birdie.py` describes it."""
  rows = config.evaluation.batch_size
  return make_eval_batches(
    corpus.validation,
    configurations,
    length=config.data.sequence_length,
    rows_per_config=config.evaluation.rows,
    batch_size=rows,
    seed=config.seed,
    rows=process_rows(rows, sharding),
  )


def make_eval_batches(
  store: TokenStore,
  configurations: Sequence[Configuration],
  *,
  length: int,
  rows_per_config: int,
  batch_size: int,
  seed: int,
  rows: tuple[int, int] | None = None,
) -> list[Batch]:
  """Fixed rows of held-out text for every configuration, training's format.

  Each configuration has `rows_per_config` rows of its own; the problems of a
  task come from evaluation's stream, so training never meets them. The rows of
  all of them, one after the other, make batches of `batch_size` rows; padding
  rows (segment 0, configuration -1) fill the last one up.

  Args:
    store: held-out text.
    configurations: the K entries of the mixture.
    length: T.
    rows_per_config: R.
    batch_size: rows in a batch.
    seed: the run's seed; evaluation draws from a stream of its own.
    rows: this process's rows of each batch; all of them if None.

  Raises:
    UserError: when the text is too short for a configuration; the controller
      needs a loss of every one.
  """
  packer = Packer(
    tuple(configurations),
    rows=rows_per_config,
    length=length,
    seed=seed,
    stream="eval",
    max_windows=-(-store.num_tokens // length),
  )
  windows = shuffled_windows(store, length, seed)
  packed = [
    _eval_rows(packer, i, windows.__getitem__)
    for i in range(len(configurations))
  ]
  stacked = {key: np.concatenate([p[key] for p in packed]) for key in KEYS}
  total = len(stacked["tokens"])
  short = -total % batch_size
  for key, value in stacked.items():
    padding = np.full((short, length), -1 if key == "config_ids" else 0)
    stacked[key] = np.concatenate([value, padding.astype(value.dtype)])
  first, last = rows or (0, batch_size)
  return [
    {key: value[i + first : i + last] for key, value in stacked.items()}
    for i in range(0, total + short, batch_size)
  ]


def _eval_rows(packer: Packer, config: int, pieces: Pieces) -> Batch:
  entry, need = packer.configurations[config], packer.needs[config]
  try:
    return packer.pack_group(
      config, np.eye(len(packer.configurations))[config], pieces
    )[0]
  except UserError as error:
    if not need.text:
      raise UserError(f"{entry.name}: {error}") from error
    raise UserError(
      f"the held-out text is too short for {entry.name}, which needs "
      f"{need.text} tokens at once and {need.space} of the {packer.length} "
      "places of a row: give longer documents, a larger data.sequence_length "
      "or shorter objectives"
    ) from error


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
    model: a module of `birdie.models`.
    batches: host batches that hold this process's rows.
    num_configs: K.
    sharding: where batches go.
    chunk: see `token_losses`.
  """

  def __init__(
    self,
    model: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    num_configs: int,
    sharding: jax.sharding.NamedSharding,
    chunk: int = 0,
  ):
    place = Placer(sharding)
    self._batches = [place(batch) for batch in batches]

    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.P())

    @functools.partial(jax.jit, out_shardings=everywhere)
    def sums(params: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
      loss, correct, _ = batch_losses(model, params, batch, chunk=chunk)
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
