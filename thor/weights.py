"""Files of weights: models of ours, and Marian's of transformers.

A model of ours is a folder that NumPy alone can read: `settings.json`, the
fields of `thor.settings.Settings`, and `params.npz`, a float32 array for each
parameter under its path, such as `encoder/layers/layer_0/attention/out/bias`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from common import files
from common.config import check_keys, did_you_mean
from common.errors import UserError
from common.weights import (
  Tensors,
  read_arrays,
  read_weights,
  write_arrays,
  write_safetensors,
)
from thor.model import init_params
from thor.settings import DTYPES, Settings

PyTree = Any
State = Mapping[str, np.ndarray]
_REMEDY = "take tensors and {} from one model"


def tensors_of(state: State, source: str, *, sizes: str) -> Tensors:
  """Tensors to be taken one by one.

  Args:
    state: by name.
    source: what error messages call them.
    sizes: the file that says which shapes they must have.
  """
  remedy = _REMEDY.format(sizes)
  return Tensors(state, source, remedy=remedy, hint=lambda _: f"; {remedy}")


def save_model(folder: Any, params: PyTree, settings: Settings) -> None:
  """Writes a model's two files; see the module.

  Args:
    folder: is made.
    params: of the model.
    settings: its.
  """
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  write_arrays(path / "params.npz", params)
  facts = dataclasses.asdict(settings)
  facts["dtype"] = np.dtype(settings.dtype).name
  # At the end: a folder with settings is whole.
  files.write_json(path / "settings.json", facts)


def load_model(folder: Any) -> tuple[PyTree, Settings]:
  """Reads what `save_model` wrote.

  Returns:
    NumPy parameters, and their settings.

  Raises:
    UserError: for files that are missing or broken, or do not go together.
  """
  path = pathlib.Path(folder)
  settings = _read_settings(path / "settings.json")
  init = functools.partial(init_params, settings)
  like = jax.eval_shape(init, jax.random.key(0))
  remedy = _REMEDY.format("settings.json")
  return read_arrays(path / "params.npz", like, remedy=remedy), settings


def _read_settings(file: pathlib.Path) -> Settings:
  facts = files.read_json(file)
  fields = [field.name for field in dataclasses.fields(Settings)]
  check_keys(facts, fields, what=str(file))
  for name in fields:
    if name not in facts:
      raise UserError(f"{file} lacks {name!r}")
  if facts["dtype"] not in DTYPES:
    raise UserError(
      f"{file}: dtype={facts['dtype']!r}{did_you_mean(facts['dtype'], DTYPES)}"
    )
  facts |= {"pattern": tuple(facts["pattern"]), "dtype": DTYPES[facts["dtype"]]}
  return Settings(**facts)


def read_marian(
  folder: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The tensors and the configuration in a folder of transformers.

  Of `model.safetensors`, else of `pytorch_model.bin`, of which only tensors
  are read: nothing in it is executed.

  Raises:
    UserError: for files or libraries that are missing, or broken files.
  """
  path = pathlib.Path(folder)
  config = files.read_json(path / "config.json")
  file = path / "model.safetensors"
  if file.exists():
    return read_weights(str(file)), config
  other = path / "pytorch_model.bin"
  if other.exists():
    return read_weights(str(other)), config
  raise UserError(f"{path} has neither {file.name} nor {other.name}")


def write_marian(folder: Any, state: State, config: Mapping[str, Any]) -> None:
  """Writes what `MarianMTModel.from_pretrained` reads.

  Args:
    folder: is made.
    state: see `thor.convert.to_marian`.
    config: likewise.
  """
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  write_safetensors(path / "model.safetensors", state)
  files.write_json(path / "config.json", config)
