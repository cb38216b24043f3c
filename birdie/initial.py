"""Training that begins from the parameters of another run: `init_from`."""

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from birdie import data, weights
from birdie.models import make_model
from birdie.run import read_params
from common.checkpoint import checkpoint_steps
from common.data.tokenizers import Tokenizer, make_tokenizer
from common.errors import UserError
from common.state import TrainState

PyTree = Any
log = logging.getLogger(__name__)
# Settings that say how a model is computed or kept, and not which it is.
_FREE = ("dtype", "param_dtype", "remat", "scan_impl", "seq_axis",
         "attention_impl", "attention_chunk")  # fmt: skip


def make_create(
  config: Any, setup: Any, tokenizer: Tokenizer, workdir: str
) -> Callable[[], TrainState]:
  """What makes a run's first state.

  Without `init_from` it is `setup.create`. A folder that holds checkpoints
  goes on from those, and the other run's folder is not looked at again: it may
  be gone by then.

  Args:
    config: see `configs/birdie.py`.
    setup: a `birdie.train.Setup`.
    tokenizer: of this training.
    workdir: the run's folder.

  Raises:
    UserError: where the other model is not this one, naming what differs.
  """
  if not config.init_from or _has_checkpoints(workdir):
    return setup.create
  folder = os.path.expanduser(config.init_from)
  source = weights.read_config(folder)
  _check(config, setup.model, tokenizer, source)
  where = f"init_from={config.init_from!r}"
  return lambda: _create(folder, setup, source, where)


def _has_checkpoints(workdir: str) -> bool:
  folder = epath.Path(workdir) / "checkpoints"
  return folder.exists() and bool(checkpoint_steps(folder))


def _check(config: Any, model: Any, tokenizer: Tokenizer, source: Any) -> None:
  where = f"init_from={config.init_from!r}"
  theirs = make_tokenizer(source.tokenizer)
  if theirs.fingerprint != tokenizer.fingerprint:
    raise UserError(
      f"{where}: its vocabulary is that of tokenizer.kind="
      f"{source.tokenizer.kind!r} ({theirs.fingerprint}), and not "
      f"{config.tokenizer.kind!r} ({tokenizer.fingerprint}): train with its "
      "tokenizer"
    )
  if weights.is_model(source):
    weights.check_vocabulary(source, theirs, data.make_vocabulary(theirs))
  other = make_model(source.model, model.vocab_size)
  if source.model.name != config.model.name:
    raise UserError(
      f"{where}: model.name is {source.model.name!r} there and "
      f"{config.model.name!r} here: only the same model goes on"
    )
  changed = [
    f"model.{key} is {getattr(other, key)!r} there and {own!r} here"
    for key, own in _settings(model).items()
    if getattr(other, key) != own
  ]
  shapes = [
    weights.shapes_of(weights.flat(weights.abstract_params(each)))
    for each in (other, model)
  ]
  difference = weights.first_difference(*shapes)
  if difference:
    raise UserError(f"{where}: {', '.join(changed)} ({difference})")
  if changed:
    log.warning("%s fits, but %s", where, ", ".join(changed))


def _settings(model: Any) -> dict[str, Any]:
  """What says which model it is."""
  names = [field.name for field in dataclasses.fields(model)]
  known = (name for name in names if name not in (*_FREE, "parent", "name"))
  return {name: getattr(model, name) for name in known}


def _create(folder: str, setup: Any, source: Any, where: str) -> TrainState:
  other = make_model(source.model, setup.model.vocab_size)
  step, params = read_params(folder, source, other)
  abstract = setup.abstract
  # Every process reads all of it, and gives its devices their shares.
  placed = jax.tree.map(
    lambda value, like: jax.make_array_from_callback(
      value.shape, like.sharding, lambda place: value[place].astype(like.dtype)
    ),
    params,
    abstract.params,
  )
  fresh = setup.create()
  fresh = TrainState(fresh.step, placed, None, fresh.extra)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)

  def init(params: PyTree) -> PyTree:
    # Of copies: an optimizer that keeps parameters shall not share them.
    return setup.tx.init(jax.tree.map(jnp.copy, params))

  with jax.set_mesh(setup.mesh):
    opt_state = jax.jit(init, out_shardings=shardings)(placed)
  log.info("%s: the parameters of step %d", where, step)
  return dataclasses.replace(fresh, opt_state=opt_state)
