"""Trained runs, read from their folders, and models cut out of them."""

import dataclasses
import json
import logging
import os
from typing import Any

import jax
import jax.numpy as jnp

from common import files
from common.checkpoint import checkpoint_steps, load_params
from common.config import load_config
from common.errors import UserError
from thor.routing import Routing
from thor.settings import Settings, make_settings
from thor.vocabulary import Vocabulary, saved_vocabulary

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, ready to use.

  Attributes:
    config: of the training.
    table: of hash, int32 [v]; None for other kinds of routing.
    step: which checkpoint was read, of several the last.
    facts: what was written down of the training, such as `text_hash`.
  """

  config: Any
  vocabulary: Vocabulary
  settings: Settings
  routing: Routing
  params: Any
  table: jax.Array | None
  step: int
  facts: dict[str, Any]


def load_run(
  folder: str | os.PathLike[str], *, step: int | None = None, average: int = 1
) -> Run:
  """Reads a run's folder.

  Args:
    folder: what training was given as `--workdir`, or a path through its
      experts that `thor.convert` wrote.
    step: which checkpoint; the newest if None.
    average: the mean of the parameters of so many checkpoints, that one the
      last (a training keeps `checkpoint.keep` of them).

  Raises:
    UserError: when the folder, the checkpoints or the vocabulary are missing,
      or it holds a run of another kind.
  """
  config = load_config(folder)
  if "routing" not in config or "vocabulary" not in config:
    raise UserError(f"{os.fspath(folder)} holds no run of thor.main")
  facts = _facts(folder)
  vocabulary = saved_vocabulary(folder, facts)
  routing = Routing(**config.routing.to_dict())
  if _is_model(folder):
    return _load_path(folder, config, vocabulary, routing, facts, step, average)
  settings = make_settings(
    config.model.to_dict(), routing, vocab_size=vocabulary.size
  )
  found, params = _mean_params(folder, step, average)
  table = None
  if routing.kind == "hash":
    checkpoints = os.path.join(folder, "checkpoints")
    _, state = load_params(checkpoints, step=found, item="state")
    table = jnp.asarray(state["extra"]["hash_table"])
  params = jax.tree.map(jnp.asarray, params)
  return Run(config, vocabulary, settings, routing, params, table, found, facts)


def save_path(
  run: Run, folder: str | os.PathLike[str], params: Any, settings: Settings
) -> None:
  """Writes a path through a run's experts as a model that `load_run` reads.

  Args:
    run: which it is of.
    folder: is made.
    params: see `thor.paths.export_dense`.
    settings: see there.
  """
  from etils import epath

  from common.config import save_config
  from thor.weights import save_model

  save_model(folder, params, settings)
  config = run.config.copy_and_resolve_references()
  with config.unlocked():
    config.routing.update({"kind": "dense", "experts": 1})
    config.routing.update({"level": "batch", "pair": "independent"})
    config.evaluation.dispatch = ""
    config.translation.modes = ()
  path = epath.Path(folder)
  save_config(path, config)
  run.vocabulary.save(path / "vocabulary-path.model")
  files.write_json(path / "facts.json", run.facts | {"step": run.step})


def _is_model(folder: str | os.PathLike[str]) -> bool:
  return os.path.exists(os.path.join(folder, "params.npz"))


def _load_path(
  folder: str | os.PathLike[str],
  config: Any,
  vocabulary: Vocabulary,
  routing: Routing,
  facts: dict[str, Any],
  step: int | None,
  average: int,
) -> Run:
  from thor.weights import load_model

  if average != 1 or step not in (None, facts["step"]):
    raise UserError(
      f"{os.fspath(folder)} holds one model, of step {facts['step']}, and no "
      "checkpoints: leave --step and --average out"
    )
  params, settings = load_model(folder)
  params = jax.tree.map(jnp.asarray, params)
  return Run(
    config, vocabulary, settings, routing, params, None, facts["step"], facts
  )


def _facts(folder: str | os.PathLike[str]) -> dict[str, Any]:
  from etils import epath

  path = epath.Path(folder) / "facts.json"
  try:
    return json.loads(path.read_text())
  except (OSError, *files.JSON_ERRORS) as error:
    raise UserError(f"{path} cannot be read: {error}") from None


def _mean_params(
  folder: str | os.PathLike[str], step: int | None, average: int
) -> tuple[int, Any]:
  """The last step and the mean of its parameters and those before."""
  checkpoints = os.path.join(folder, "checkpoints")
  if average < 1:
    raise UserError(f"--average={average} must be at least 1")
  if average == 1:
    return load_params(checkpoints, step=step)
  steps = [
    own for own in checkpoint_steps(checkpoints) if step is None or own <= step
  ]
  if len(steps) < average:
    raise UserError(
      f"--average={average}: {os.fspath(folder)} has {len(steps)} checkpoints "
      f"({', '.join(map(str, steps))}): train with a larger checkpoint.keep"
    )
  chosen = steps[-average:]
  log.info("the mean of the checkpoints %s", ", ".join(map(str, chosen)))
  trees = [load_params(checkpoints, step=own)[1] for own in chosen]
  mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)
  return chosen[-1], mean
