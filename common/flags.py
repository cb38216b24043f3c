"""The command line: a parser with one-line errors, and config files with
variants and typed overrides.

Everything wrong with a command line or a config file is a `UserError`.
"""

import argparse
import os
import pathlib
import re
import traceback
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from common import config as config_lib
from common.errors import UserError

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(=.*)?", re.DOTALL)


class Parser(argparse.ArgumentParser):
  """An argument parser that answers a mistake in one line.

  Args:
    name: the module, as in `python -m NAME`.
    description: what it does, for `--help`.
    example: a command that works, for `--help`.
    add_help: whether argparse answers `--help` itself.
  """

  def __init__(
    self, name: str, *, description: str, example: str, add_help: bool = True
  ):
    super().__init__(
      prog=f"python -m {name}",
      usage="%(prog)s [flags]",
      description=description,
      epilog=f"example:\n  {example}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      add_help=add_help,
    )

  def format_help(self) -> str:
    """As in argparse; the usage names what is not a flag."""
    names = [own.metavar or own.dest for own in self._get_positional_actions()]
    self.usage = " ".join(["%(prog)s", *map(str, names), "[flags]"])
    return super().format_help()

  def error(self, message: str) -> NoReturn:
    """Raises `UserError` where argparse would print its usage and exit."""
    raise UserError(f"{message} (see {self.prog} --help)")

  def parse_args(self, args=None, namespace=None):  # type: ignore[override]
    """As in argparse, with the nearest names for an unknown flag."""
    parsed, rest = self.parse_known_args(args, namespace)
    for argument in rest:
      self.refuse(argument)
    return parsed

  def refuse(self, argument: str) -> NoReturn:
    """Raises for an argument that nothing understands."""
    if not argument.startswith("-"):
      raise UserError(f"unexpected argument {argument!r}")
    known = [f for f in self._option_string_actions if f.startswith("--")]
    flag = argument.partition("=")[0]
    hint = config_lib.did_you_mean(flag, known)
    raise UserError(f"unknown flag {flag!r}{hint}")


def split_config_argument(argument: str) -> tuple[str, str | None]:
  """Splits `configs/x.py:smoke,ntp` into its path and its variant."""
  if os.path.exists(argument) or ":" not in argument:
    return argument, None
  path, _, variant = argument.rpartition(":")
  return path, variant or None


def load_config_file(argument: str) -> tuple[ConfigDict, tuple[str, ...]]:
  """Runs `get_config` of a config file.

  Args:
    argument: the value of `--config`, such as `configs/x.py:smoke`.

  Returns:
    The configuration, locked, and the names of the file's variants.
  """
  path, variant = split_config_argument(argument)
  module = types.ModuleType("config_file")
  module.__file__ = path
  try:
    source = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise UserError(_unreadable(path, error)) from None
  try:
    # Compiled here, since Python's cache of compiled modules would miss an
    # edit within the same second.
    exec(compile(source, path, "exec"), module.__dict__)
    if not callable(getattr(module, "get_config", None)):
      raise UserError("it defines no get_config(variant=None)")
    config = module.get_config(*([] if variant is None else [variant]))
    if not isinstance(config, ConfigDict):
      raise UserError(f"get_config returned a {type(config).__name__}")
    config_lib.to_json(config)  # placeholders that are required, odd types
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  except Exception as error:
    raise UserError(_broken(path, error)) from error
  return config.lock(), tuple(getattr(module, "VARIANTS", ()))


def _unreadable(path: str, error: OSError) -> str:
  if not isinstance(error, FileNotFoundError):
    return f"config file {path!r}: {error.strerror}"
  folder = pathlib.Path(path).parent
  siblings = [str(p) for p in folder.glob("*.py") if p.name != "__init__.py"]
  return (
    f"no config file {path!r} (paths are relative to the working directory, "
    f"{os.getcwd()}){config_lib.did_you_mean(path, siblings)}"
  )


def _broken(path: str, error: Exception) -> str:
  if isinstance(error, SyntaxError):
    return f"{path}, line {error.lineno}: {error.msg}"
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  where = f"{path}, line {lines[-1]}" if lines else path
  return f"{where}: {type(error).__name__}: {error}"


def group_overrides(
  arguments: Sequence[str], parser: Parser
) -> dict[str, list[str]]:
  """Sorts what the parser left over into overrides, by key.

  Args:
    arguments: such as `--config.a.b=1`, `--noconfig.c`, `--config.d`, `2`.
    parser: refuses whatever is no override.

  Returns:
    The arguments of each key. A tuple's key may come several times.
  """
  groups: dict[str, list[str]] = {}
  group: list[str] | None = None
  takes_value = False
  for argument in arguments:
    match = _OVERRIDE.fullmatch(argument)
    if match:
      group = groups.setdefault(match[1], [])
      takes_value = match[2] is None and not argument.lstrip("-").startswith(
        "no"
      )
    elif group is None or not takes_value:
      parser.refuse(argument)
    else:
      takes_value = False
    group.append(argument)
  return groups


def override(config: ConfigDict, key: str, arguments: list[str]) -> ConfigDict:
  """Returns `config` with one key set from the command line.

  Args:
    config: locked; not changed.
    key: such as `optim.lr`.
    arguments: all arguments for this key, such as `["--config.optim.lr=1"]`.

  Raises:
    UserError: there is no such key, or the value is not of the key's type.
  """
  known = config_lib.flatten(config)
  parents = {k[:i] for k in known for i, c in enumerate(k) if c == "."}
  if key in parents:
    raise UserError(
      f"{key!r} is a group of keys; set them one by one, as in "
      f"--config.{next(k for k in known if k.startswith(f'{key}.'))}=…"
    )
  if key.partition("[")[0] not in known:
    hint = config_lib.did_you_mean(key, known)
    raise UserError(f"the config has no key {key!r}{hint}")
  values = flags.FlagValues()
  argv = ["", *arguments]
  try:
    config_flags.DEFINE_config_dict(
      "config", config, flag_values=values, sys_argv=argv
    )
    rest = values(argv)[1:]
    new: Any = values["config"].value
  except (flags.Error, TypeError, ValueError, LookupError) as error:
    raise UserError(_mistyped(known.get(key), arguments, error)) from None
  if rest:  # `--config.flag 1` where the key is a bool, which takes no value
    raise UserError(f"unexpected argument {rest[0]!r}; write --config.{key}=…")
  if isinstance(known.get(key), tuple):
    _check_elements(key, known[key], config_lib.flatten(new)[key])
  return new


def _mistyped(old: Any, arguments: list[str], error: Exception) -> str:
  given = " ".join(arguments)
  if isinstance(old, bool | int | float | str | tuple):
    return f"{given}: expected a value of type {type(old).__name__}"
  return f"{given}: {error}"


def _check_elements(key: str, old: tuple, new: tuple) -> None:
  kinds = {type(element) for element in old}
  if len(kinds) != 1:  # empty or mixed: no type to hold the new ones to
    return
  (kind,) = kinds
  allowed = (int, float) if kind is float else (kind,)
  for element in new:
    if type(element) not in allowed:
      raise UserError(
        f"--config.{key}={new!r}: expected a tuple of {kind.__name__}, and "
        f"{element!r} is a {type(element).__name__}"
      )


def config_help(argument: str) -> str:
  """Returns the part of `--help` that lists a config file's keys."""
  config, variants = load_config_file(argument)
  shown = config_lib.folded(config, place=split_config_argument(argument)[0])
  width = max(map(len, shown), default=0)
  lines = [f"  --config.{key:<{width}}  {text}" for key, text in shown.items()]
  text = f"\nkeys of {argument} and their defaults:\n"
  text += "".join(f"{line}\n" for line in lines)
  if variants:
    text += (
      f"variants: {', '.join(variants)} "
      f"(--config={split_config_argument(argument)[0]}:{variants[0]})\n"
    )
  return text
