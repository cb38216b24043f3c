"""Trained models, read from runs' folders and from models' own."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp

from birdie import weights
from birdie.data import make_vocabulary
from birdie.models import make_model
from birdie.vocab import Vocabulary
from common.checkpoint import load_params
from common.data.tokenizers import make_tokenizer
from common.errors import UserError

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, ready to use.

  Attributes:
    config: of the training; of a model's folder with what that says besides.
    step: after which the parameters were saved.
  """

  config: Any
  model: Any
  params: PyTree
  tokenizer: Any
  vocab: Vocabulary
  step: int


def load_run(run_dir: str | os.PathLike, *, step: int | None = None) -> Run:
  """Reads a run's folder, or one that `birdie.convert` wrote.

  Args:
    run_dir: the folder that training was given as `--workdir`, or a model's.
    step: which checkpoint; the newest if None.

  Raises:
    UserError: when the folder is missing or holds no checkpoint, or parameters
      that are not those of its own configuration.
  """
  config = weights.read_config(run_dir)
  tokenizer = make_tokenizer(config.tokenizer)
  vocab = make_vocabulary(tokenizer)
  model = make_model(config.model, vocab.size)
  found, params = read_params(run_dir, config, model, step=step)
  if weights.is_model(config):
    weights.check_vocabulary(config, tokenizer, vocab)
  params = jax.tree.map(jnp.asarray, params)
  return Run(config, model, params, tokenizer, vocab, found)


def read_params(
  run_dir: str | os.PathLike,
  config: Any,
  model: Any,
  *,
  step: int | None = None,
) -> tuple[int, PyTree]:
  """The parameters in a run's folder or a model's, as NumPy arrays.

  Args:
    run_dir: the folder.
    config: what `birdie.weights.read_config` found there.
    model: that of the configuration.
    step: which checkpoint; the newest if None.

  Returns:
    The step, and the parameters.

  Raises:
    UserError: see `load_run`.
  """
  folder = os.fspath(run_dir)
  if weights.is_model(config):
    only = config.saved.step
    if step not in (None, only):
      raise UserError(
        f"{folder} holds one model, of step {only}, and no checkpoints: leave "
        f"out step={step}"
      )
    return only, weights.read_params(folder, model)
  found, params = load_params(os.path.join(folder, "checkpoints"), step=step)
  weights.check_params(
    weights.flat(params),
    model,
    source=f"checkpoint {found} in {folder}",
    remedy="its config.json is of another model; bring back the run's own",
  )
  return found, params
