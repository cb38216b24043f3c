"""Prepared TFDS data sets, looked at before TFDS opens them.

The `features.json` of a data set names Python classes, and TFDS imports them.
Python finds modules below the working directory too, so a data set that
somebody else has prepared could bring along code and have it run.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from common.errors import UserError
from common.files import JSON_ERRORS

_OWN = "tensorflow_datasets."
# Under which TFDS looks for names of classes, today and in older files.
_KEYS = ("pythonClassName", "python_class_name", "type", "proto_cls")


def check_tfds(name: str, data_dir: str | None) -> None:
  """Refuses what TFDS would fetch from the net, and classes not its own.

  Args:
    name: of a data set, with its config and version if it has them.
    data_dir: where it was prepared; None stands for TFDS's own folders.

  Raises:
    UserError: for a name with a namespace, which names code in the net; for a
      `features.json` that is no JSON, or names classes outside of TFDS.
  """
  from etils import epath
  from tensorflow_datasets.core import naming
  from tensorflow_datasets.core.utils import file_utils

  try:
    parsed, _ = naming.parse_builder_name_kwargs(name)
  except ValueError:  # TFDS will say what is wrong with it.
    return
  if parsed.namespace:
    raise UserError(
      f"data.source.name={name!r}: TFDS would fetch what {parsed.namespace!r} "
      "stands for from the net: prepare the data set, and name it without that"
    )
  for folder in file_utils.list_data_dirs(data_dir):
    place = epath.Path(folder) / parsed.name
    for depth in ("*", "*/*"):  # of a version, of a config's version
      for file in sorted(place.glob(f"{depth}/features.json")):
        _check_features(file)


def _check_features(file: Any) -> None:
  try:
    content = json.loads(file.read_text())
    foreign = [own for own in _classes(content) if not own.startswith(_OWN)]
  except JSON_ERRORS as error:
    raise UserError(
      f"{os.fspath(file)}: not JSON: {error}: prepare the data set again"
    ) from error
  if foreign:
    raise UserError(
      f"{os.fspath(file)} asks for {foreign[0]!r:.80}, which is none of TFDS's "
      "classes and could be any code: prepare the data set yourself"
    )


def _classes(content: Any) -> Iterator[str]:
  """The names of classes anywhere in a `features.json`."""
  if isinstance(content, list):
    for own in content:
      yield from _classes(own)
  elif isinstance(content, dict):
    for key, own in content.items():
      if key in _KEYS and isinstance(own, str):
        yield own
      else:
        yield from _classes(own)
