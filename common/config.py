"""Configurations as data: variants, durations, JSON, and what may change.

A file in `configs/` holds `get_config(variant=None)`, which returns a
`ConfigDict`, and may hold `VARIANTS`, a table for `apply_variants`. This
module is all such a file may import beside `ml_collections`, so it stays
cheap: no jax, no NumPy.
"""

import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from common import files
from common.errors import UserError

FILE_NAME = "config.json"
_SHOWN = 8  # changed keys in a message
_MANY = 6  # entries that are shown as one
_TUPLE = "__tuple__"
_FLOAT = "__float__"
Config = ConfigDict | Mapping[str, Any]


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean 'a' or 'b'?`, or the known names if few, or ''.

  A dotted name is also compared by its last part, so that `lr` finds
  `optim.lr`.
  """
  known = [str(k) for k in known]
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.8)
  if not near:
    leaf = name.rpartition(".")[2]
    leaves = {k.rpartition(".")[2] for k in known}
    hits = difflib.get_close_matches(leaf, leaves, n=2, cutoff=0.6)
    near = [k for k in known if k.rpartition(".")[2] in hits][:3]
  if near:
    return f"; did you mean {' or '.join(map(repr, near))}?"
  if known and len(known) <= 12:
    return f"; known: {', '.join(known)}"
  return ""


def check_keys(
  given: Iterable[str], known: Iterable[str], *, what: str
) -> None:
  """Raises `UserError` for the first given key that is not a known one.

  Args:
    given: keys the user wrote.
    known: keys that mean something.
    what: what the keys belong to, for the message.
  """
  known = list(known)
  for key in given:
    if key not in known:
      raise UserError(f"{what}: unknown key {key!r}{did_you_mean(key, known)}")


def check_read(
  source: Config,
  readers: Mapping[str, Iterable[str]],
  *,
  unset: Mapping[str, Any] | None = None,
  key: str = "data.source",
) -> None:
  """Refuses what a source's kind does not read.

  A path whose kind was forgotten would be ignored, and other data used.

  Args:
    source: `kind`, and settings of several kinds.
    readers: the keys that each kind reads; others are not looked at.
    unset: values that stand for none, beside those that are empty.
    key: where the source stands in a configuration.

  Raises:
    UserError: naming the key and the kinds that read it.
  """
  kind = source["kind"]
  for name in dict.fromkeys(n for names in readers.values() for n in names):
    value = source.get(name)
    if name in readers[kind] or value in (
      None,
      "",
      (),
      (unset or {}).get(name),
    ):
      continue
    kinds = " or ".join(k for k, names in readers.items() if name in names)
    raise UserError(
      f"{key}.{name}={value!r} means nothing to {key}.kind={kind!r}: set "
      f"{key}.kind to {kinds}, or leave {key}.{name} out"
    )


def apply_variants(
  config: ConfigDict,
  variant: str | None,
  table: Mapping[str, Callable[[ConfigDict], None]],
) -> ConfigDict:
  """Applies `smoke`, or `smoke,ntp` from left to right, to `config`.

  Args:
    config: changed in place. It gets locked first, so that a variant cannot
      invent a key.
    variant: what follows the colon in `--config=configs/x.py:smoke`.
    table: functions that change a configuration, by variant name.

  Returns:
    `config`, locked.

  Raises:
    UserError: for an unknown variant, with the known or nearest names.
  """
  config.lock()
  for name in (variant or "").split(","):
    name = name.strip()
    if name and name not in table:
      raise UserError(f"unknown variant {name!r}{did_you_mean(name, table)}")
    if name:
      table[name](config)
  return config


def steps(
  name: str,
  config: Config,
  *,
  batch_size: int | None = None,
  data_size: int | None = None,
  tokens_per_step: int | None = None,
  total_steps: int | None = None,
  default: int | None = None,
) -> int:
  """Turns a duration in a configuration into steps.

  One of the keys `{name}_steps`, `{name}_epochs`, `{name}_examples`,
  `{name}_tokens` and `{name}_percent` (of `total_steps`, 0 to 100) gives the
  duration; keys that are absent or None do not count. Rounds to the nearest
  step; a positive duration lasts at least one.

  Args:
    name: the duration's name, such as `total` or `warmup`.
    config: where to look.
    batch_size: examples per step.
    data_size: examples per epoch.
    tokens_per_step: tokens per step.
    total_steps: the steps that 100 percent means.
    default: the result where no key is set.

  Raises:
    UserError: none or several of the keys are set, or the value is not a
      finite number of at least 0, or the unit has no meaning here (such as
      epochs of endless data).
  """
  scales = {
    "steps": 1.0,
    "epochs": _ratio(data_size, batch_size),
    "examples": _ratio(1, batch_size),
    "tokens": _ratio(1, tokens_per_step),
    "percent": _ratio(total_steps, 100),
  }
  keys = {unit: f"{name}_{unit}" for unit in scales}
  found = {u: k for u, k in keys.items() if config.get(k) is not None}
  if not found and default is not None:
    return default
  if len(found) != 1:
    what = " and ".join(found.values()) + " are set" if found else "none is set"
    raise UserError(f"{what}; set exactly one of {', '.join(keys.values())}")
  ((unit, key),) = found.items()
  value, scale = config[key], scales[unit]
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not 0 <= value < math.inf:
    raise UserError(f"{key}={value!r} must be a finite number of at least 0")
  if unit == "percent" and value > 100:
    raise UserError(f"{key}={value!r} must be at most 100")
  if scale is None:
    raise UserError(
      f"{key}={value!r}: {unit} have no length here; use {name}_steps"
    )
  return max(1, round(value * scale)) if value else 0


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
  if numerator is None or denominator is None:
    return None
  return numerator / denominator


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
  """Returns `{"optim.lr": 1e-3, ...}`; an empty mapping is a value."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, (ConfigDict, Mapping)) and len(value):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def folded(config: Config, *, place: str) -> dict[str, str]:
  """What a page shows of each key.

  A mapping of many tuples of settings, as comparisons have one for each of
  their systems, is a line of its own.

  Args:
    config: of any depth.
    place: where all of it stands.
  """
  shown = {}

  def add(mapping: Config, prefix: str) -> None:
    values = list(mapping.values())
    if len(values) >= _MANY and all(map(_is_texts, values)):
      shown[prefix.rstrip(".")] = f"{len(values)} entries, see {place}"
      return
    for key, value in mapping.items():
      if isinstance(value, (ConfigDict, Mapping)) and len(value):
        add(value, f"{prefix}{key}.")
      else:
        shown[f"{prefix}{key}"] = repr(value)

  add(config, "")
  return shown


def _is_texts(value: Any) -> bool:
  return isinstance(value, tuple) and all(isinstance(v, str) for v in value)


def to_json(config: Config) -> str:
  """Returns JSON that `from_json` turns into an equal configuration.

  Tuples and floats that are not finite, which JSON does not have, become
  `{"__tuple__": [...]}` and `{"__float__": "inf"}`.

  Raises:
    UserError: a value is not plain data; the message names its key.
  """
  return json.dumps(_encode(config, ""), indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> ConfigDict:
  """The inverse of `to_json`."""
  return ConfigDict(json.loads(text, object_hook=_decode))


def _encode(value: Any, key: str) -> Any:
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else {_FLOAT: repr(value)}
  if isinstance(value, tuple):
    return {_TUPLE: [_encode(v, f"{key}[{i}]") for i, v in enumerate(value)]}
  if isinstance(value, list):
    return [_encode(v, f"{key}[{i}]") for i, v in enumerate(value)]
  if isinstance(value, (ConfigDict, Mapping)):
    bad = [k for k in value if not isinstance(k, str) or k in (_TUPLE, _FLOAT)]
    if bad:
      raise UserError(f"config key {bad[0]!r} in {key or 'the config'!r}")
    dot = f"{key}." if key else ""
    return {k: _encode(v, f"{dot}{k}") for k, v in value.items()}
  raise UserError(
    f"config.{key} is a {type(value).__name__}, {value!r}; only None, bool, "
    "int, float, str, tuples, lists and mappings of them are data"
  )


def _decode(value: dict[str, Any]) -> Any:
  if _TUPLE in value:
    return tuple(value[_TUPLE])
  if _FLOAT in value:
    return float(value[_FLOAT])
  return value


def diff(old: Config, new: Config) -> list[str]:
  """Returns `key: old -> new` for each key that differs, in sorted order.

  Values differ if their JSON does: 1 and 1.0, and (1,) and [1], differ.
  """
  return [f"{k}: {a} -> {b}" for k, (a, b) in _changes(old, new).items()]


def _changes(old: Config, new: Config) -> dict[str, tuple[str, str]]:
  old, new = flatten(old), flatten(new)

  def same(key: str) -> bool:
    if (key in old) != (key in new):
      return False
    return json.dumps(_encode(old[key], key), sort_keys=True) == json.dumps(
      _encode(new[key], key), sort_keys=True
    )

  def show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "(absent)"

  return {
    key: (show(old, key), show(new, key))
    for key in sorted(old.keys() | new.keys())
    if not same(key)
  }


def save_config(workdir: str | os.PathLike[str], config: Config) -> None:
  """Writes `config.json`; a reader sees the old file or the new one."""
  from etils import epath

  files.replace(epath.Path(workdir) / FILE_NAME, to_json(config))


def load_config(workdir: str | os.PathLike[str]) -> ConfigDict:
  """Reads the `config.json` of a run's folder.

  Raises:
    UserError: it is missing or not a configuration.
  """
  from etils import epath

  path = epath.Path(workdir) / FILE_NAME
  try:
    return from_json(path.read_text())
  except FileNotFoundError:
    raise UserError(
      f"no run in {os.fspath(workdir)!r}: it holds no {FILE_NAME}"
    ) from None
  except NotADirectoryError:
    raise UserError(_not_a_folder(os.fspath(workdir))) from None
  except (*files.JSON_ERRORS, TypeError, AttributeError) as error:
    raise UserError(f"{path} is damaged: {error}") from None


def _not_a_folder(path: str) -> str:
  folder = os.path.dirname(path) or os.curdir
  if os.path.exists(os.path.join(folder, FILE_NAME)):
    return f"{path!r} is a file: give its folder, {folder!r}"
  return f"{path!r} is a file: give a run's folder"


def check_kind(workdir: str | os.PathLike[str], config: Config) -> None:
  """Refuses a folder that holds a run of another method.

  Raises:
    UserError: when each configuration has sections that the other has not.
  """
  from etils import epath

  if not (epath.Path(workdir) / FILE_NAME).exists():
    return
  found, own = set(load_config(workdir)), set(config)
  if found - own and own - found:
    raise UserError(
      f"{os.fspath(workdir)} holds a run of another method (it has "
      f"{min(found - own)!r} and no {min(own - found)!r}): choose another "
      "--workdir"
    )


def is_free(key: str, free: Iterable[str]) -> bool:
  """Whether a key may change; `log` frees `log.every` too."""
  return any(key == name or key.startswith(f"{name}.") for name in free)


def check_resume(
  workdir: str | os.PathLike[str],
  config: Config,
  *,
  free: Iterable[str] = (),
) -> None:
  """Refuses to go on with another configuration than the run began with.

  A folder without a `config.json` is a new run and passes.

  Args:
    workdir: the run's folder.
    config: the configuration of this start.
    free: keys that may change; see `is_free`.

  Raises:
    UserError: names each key that changed with its old and new value.
  """
  from etils import epath

  if not (epath.Path(workdir) / FILE_NAME).exists():
    return
  free = tuple(free)
  changed = [
    f"{key}: {old} -> {new}"
    for key, (old, new) in _changes(load_config(workdir), config).items()
    if not is_free(key, free)
  ]
  if changed:
    shown = "; ".join(changed[:_SHOWN])
    if len(changed) > _SHOWN:
      shown += f"; and {len(changed) - _SHOWN} more"
    raise UserError(
      f"{os.fspath(workdir)} holds a run of another configuration "
      f"({shown}); choose another --workdir to start a new run"
    )
