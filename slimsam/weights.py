"""Models on disk, in three forms.

* Ours: a folder with `settings.json` and `params.npz`, for which NumPy is
  enough.
* Segment-anything's: a `.pth`, its state dict.
* Transformers': a folder with `config.json`, `model.safetensors` and
  `preprocessor_config.json`.
"""

import pathlib
from typing import Any

from common import files
from common.errors import UserError
from common.weights import (
  read_arrays,
  read_weights,
  write_arrays,
  write_safetensors,
)
from slimsam.formats import (
  from_hf,
  from_sam,
  to_hf,
  to_sam,
)
from slimsam.hf_config import preprocessor_config
from slimsam.settings import SamSettings

PyTree = Any
_TORCH = (".pth", ".pt")
FORMS = ("native", "hf", "pth")


def load_model(path: Any) -> tuple[PyTree, SamSettings]:
  """Reads a model, whichever of the three forms it has, or a run's.

  Returns:
    NumPy parameters and settings.

  Raises:
    UserError: for what is missing, broken, or none of them.
  """
  place = pathlib.Path(path).expanduser()
  if place.is_file() and place.suffix in (".npz", ".safetensors"):
    raise UserError(f"{path} is part of a model: give its folder")
  if place.is_file():
    return from_sam(read_weights(str(place)), source=str(path))
  if (place / "settings.json").exists():
    return _load_ours(place)
  if (place / "model" / "settings.json").exists():  # a run's folder
    return _load_ours(place / "model")
  if (place / "config.json").exists():
    config = files.read_json(place / "config.json")
    if "model_type" not in config:
      raise UserError(f"{path} holds something else than a SAM")
    for name in ("model.safetensors", "pytorch_model.bin"):
      if (place / name).exists():
        weights = read_weights(str(place / name))
        return from_hf(weights, config, source=str(path))
    raise UserError(f"{path} has neither model.safetensors nor .bin beside it")
  if not place.exists():
    raise UserError(f"{path}: no such file or folder")
  raise UserError(
    f"{path} holds no model: give a .pth of segment-anything, a folder of "
    "transformers with config.json, or one of ours with settings.json"
  )


def load_settings(path: Any) -> SamSettings:
  """Reads a model's sizes; of our form, without its parameters."""
  file = pathlib.Path(path).expanduser() / "settings.json"
  if file.exists():
    return SamSettings.from_dict(files.read_json(file))
  return load_model(path)[1]


def _load_ours(folder: pathlib.Path) -> tuple[PyTree, SamSettings]:
  from slimsam.init import abstract_params

  settings = load_settings(folder)
  params = read_arrays(
    folder / "params.npz",
    abstract_params(settings),
    remedy="take params.npz and settings.json from one model",
  )
  return params, settings


def save_model(folder: Any, params: PyTree, settings: SamSettings) -> None:
  """Writes our form; the folder is made."""
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  write_arrays(path / "params.npz", params)
  # At the end: a folder with settings is whole.
  files.write_json(path / "settings.json", settings.to_dict())


def save_hf(folder: Any, params: PyTree, settings: SamSettings) -> None:
  """Writes what `SamModel.from_pretrained` and `SamProcessor` read.

  Raises:
    UserError: for widths that transformers cannot hold.
  """
  weights, config = to_hf(params, settings)
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  write_safetensors(path / "model.safetensors", weights)
  files.write_json(
    path / "preprocessor_config.json", preprocessor_config(settings)
  )
  files.write_json(path / "config.json", config)


def save_pth(file: Any, params: PyTree, settings: SamSettings) -> None:
  """Writes a state dict that segment-anything's registry loads.

  Raises:
    UserError: for widths that it cannot hold, or where torch is missing.
  """
  weights = to_sam(params, settings)
  try:
    import torch  # type: ignore
  except ImportError as error:
    raise UserError(
      f"{file} needs torch: pip install -e '.[parity]'"
    ) from error
  path = pathlib.Path(file)
  path.parent.mkdir(parents=True, exist_ok=True)
  tensors = {name: torch.from_numpy(w.copy()) for name, w in weights.items()}
  torch.save(tensors, path)


def save(form: str, path: Any, params: PyTree, settings: SamSettings) -> None:
  """Writes a model in one of `FORMS`: a folder, or with `pth` a file."""
  writers = {"native": save_model, "hf": save_hf, "pth": save_pth}
  writers[form](path, params, settings)
