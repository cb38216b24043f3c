"""Held-out text in training's format: fixed rows of every configuration."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from birdie.data import Batch, Corpus, process_rows
from birdie.packing import KEYS, Packer, Pieces
from birdie.presets import Configuration
from common.data.text import TokenStore, shuffled_windows
from common.errors import UserError


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

  Each configuration has `rows_per_config` rows of its own. The rows of all of
  them, one after the other, make batches of `batch_size` rows; padding rows
  (segment 0, configuration -1) fill the last one up.

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
    raise UserError(
      f"the held-out text is too short for {entry.name}, which needs "
      f"{need.text} tokens at once and {need.space} of the {packer.length} "
      "places of a row: give longer documents, a larger data.sequence_length "
      "or shorter objectives"
    ) from error
