"""Trained runs, read from their folders."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp

from birdie.data import make_vocabulary
from birdie.models import make_model
from birdie.vocab import Vocabulary
from common.checkpoint import load_params
from common.config import load_config
from common.data.tokenizers import make_tokenizer
from common.errors import UserError

PyTree = Any


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

  config = load_config(run_dir)
  if "tokenizer" not in config:
    raise UserError(f"{os.fspath(run_dir)} holds a run of another method")
  tokenizer = make_tokenizer(config.tokenizer)
  vocab = make_vocabulary(tokenizer)
  model = make_model(config.model, vocab.size)
  found, params = load_params(os.path.join(run_dir, "checkpoints"), step=step)
  params = jax.tree.map(jnp.asarray, params)
  return Run(config, model, params, tokenizer, vocab, found)
