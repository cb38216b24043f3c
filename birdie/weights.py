"""A model's folder: what a run has learned, to be kept and passed on.

    model.safetensors   each parameter under its path, such as `norm/scale`
    config.json         model, tokenizer, vocabulary, step; what trained it
    facts.json          what is known of the text
    README.md           a page about it: `birdie.card`
    tokenizer.*         the tokenizer's file, where it has one

`birdie.run.load_run` reads it as it does a run's folder.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from birdie.card import card_of
from birdie.models import DTYPES, init_params
from birdie.vocab import Vocabulary
from common import config as config_lib
from common import files
from common.errors import UserError
from common.tree import count_params, names
from common.weights import check_safetensors, read_weights, write_safetensors

PyTree = Any
Shapes = Mapping[str, tuple[int, ...]]

FORMAT = "birdie/1"
WEIGHTS = "model.safetensors"
_TOKENIZER_FILES = {
  "sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json",
}  # fmt: skip
# What `facts.json` of a run says of the text, and not of the machine.
_TEXT_FACTS = (
  "text_hash", "train_tokens", "train_documents", "validation_tokens",
  "validation_documents",
)  # fmt: skip
_SAVED = "saved"
_SHOWN_METRICS = ("eval/", "retrieval/", "mixture/")


def save_model(
  folder: str | os.PathLike[str],
  run: Any,
  source: Any,
  *,
  extra: Mapping[str, bytes] | None = None,
) -> None:
  """Writes a model's folder, whole or not at all, always the same bytes.

  Args:
    folder: a new or empty one.
    run: a `birdie.run.Run`, whose parameters are written as they are.
    source: the folder that it was read from.
    extra: contents of more files by name.

  Raises:
    UserError: for a folder that is there already, or a missing library.
    OSError: where it cannot be written.
  """
  check_safetensors(WEIGHTS)
  target = pathlib.Path(os.path.abspath(os.path.expanduser(folder)))
  if target.is_file() or (target.is_dir() and any(target.iterdir())):
    raise UserError(f"{os.fspath(folder)} is there already: name a new one")
  made = target.with_name(f".{target.name}.{os.getpid()}")
  made.mkdir(parents=True)
  try:
    _write(made, run, source)
    for name, content in (extra or {}).items():
      (made / name).write_bytes(content)
    if target.is_dir():
      target.rmdir()
    made.rename(target)
  except BaseException:
    shutil.rmtree(made, ignore_errors=True)
    raise


def _write(folder: pathlib.Path, run: Any, source: Any) -> None:
  params = jax.device_get(run.params)
  write_safetensors(folder / WEIGHTS, flat(params))
  facts = _read_facts(source)
  tokenizer = run.config.tokenizer
  kept = _TOKENIZER_FILES.get(tokenizer.kind, "")
  if kept:
    shutil.copyfile(os.path.expanduser(tokenizer.path), folder / kept)
  training = run.config.to_dict()
  model = training.pop("model")
  for name in ("tokenizer", _SAVED):
    training.pop(name, None)
  content = {
    "format": FORMAT,
    "step": run.step,
    "parameters": count_params(params),
    "model": model,
    "tokenizer": {
      "kind": tokenizer.kind,
      "path": kept,
      "fingerprint": run.tokenizer.fingerprint,
    },
    "vocabulary": vocabulary_facts(run.vocab),
    # Pairs: names of metrics are no keys.
    "metrics": [
      list(pair) for pair in _last_metrics(run.config, source, run.step)
    ],
    "training": training,
  }
  text = config_lib.to_json(content)
  files.replace(folder / config_lib.FILE_NAME, text)
  files.write_json(folder / "facts.json", facts)
  files.replace(folder / "README.md", card_of(content, facts))


def vocabulary_facts(vocab: Vocabulary) -> dict[str, Any]:
  """A vocabulary as plain data; ranges as their first and last id."""
  facts: dict[str, Any] = dataclasses.asdict(vocab)
  facts["paradigms"] = {k: list(ids) for k, ids in vocab.paradigms.items()}
  for name in ("sentinels", "text"):
    ids = getattr(vocab, name)
    facts[name] = [ids[0], ids[-1]]
  return facts


def _read_facts(source: Any) -> dict[str, Any]:
  file = epath.Path(source) / "facts.json"
  found = json.loads(file.read_text()) if file.exists() else {}
  return {name: found[name] for name in _TEXT_FACTS if name in found}


def _last_metrics(
  config: Any, source: Any, step: int
) -> list[tuple[str, float]]:
  """The last values that were written up to a step, by name.

  A mixture that was chosen at that step has not been trained on.
  """
  from common.metrics import FILE_NAME, read_metrics

  if is_model(config):
    return [tuple(pair) for pair in config[_SAVED].metrics]
  if not (epath.Path(source) / FILE_NAME).exists():
    return []
  found = {}
  for line in read_metrics(source):
    if line["step"] <= step:
      found |= {
        name: value
        for name, value in line.items()
        if name.startswith(_SHOWN_METRICS) and value is not None
        if line["step"] < step or not name.startswith("mixture/")
      }
  return sorted(found.items())


# -- reading -------------------------------------------------------------------


def is_model(config: Any) -> bool:
  """Whether a configuration was read from a model's folder."""
  return _SAVED in config


def read_config(folder: str | os.PathLike[str]) -> Any:
  """The configuration in a run's folder or a model's.

  Returns:
    As `configs/birdie.py` describes it. That of a model's folder finds its
    tokenizer there, and has one more key, `saved`: what else the folder's
    `config.json` says of the model.

  Raises:
    UserError: where there is none, or one of another method or version.
  """
  config = config_lib.load_config(folder)
  if "tokenizer" not in config or "model" not in config:
    raise UserError(f"{os.fspath(folder)} holds a run of another method")
  if "format" not in config:
    return config
  if config.format != FORMAT:
    raise UserError(
      f"{os.fspath(folder)}: format={config.format!r} is not read here, only "
      f"{FORMAT!r}: convert the run with this version"
    )
  file, saved = os.path.join(folder, config_lib.FILE_NAME), config.to_dict()
  try:
    tokenizer, model = saved.pop("tokenizer"), saved.pop("model")
    saved["fingerprint"] = tokenizer.pop("fingerprint")
    training = saved.pop("training")
    for name in ("step", "vocabulary", "metrics"):
      saved[name]
    path = tokenizer["path"]
  except KeyError as error:
    raise UserError(f"{file} lacks {error}") from None
  if path:
    if os.path.basename(path) != path:
      raise UserError(
        f"{file}: tokenizer.path={path!r} is no file of this folder: name one "
        "that lies in it"
      )
    tokenizer["path"] = os.path.join(folder, path)
  settings = {"model": model, "tokenizer": tokenizer, _SAVED: saved}
  return config_lib.ConfigDict(training | settings)


def check_vocabulary(config: Any, tokenizer: Any, vocab: Vocabulary) -> None:
  """Refuses a tokenizer other than the one that a model was trained with.

  Raises:
    UserError: naming the file.
  """
  saved = config[_SAVED]
  if saved.fingerprint != tokenizer.fingerprint:
    raise UserError(
      f"tokenizer.path={config.tokenizer.path!r} is not what the model was "
      f"trained with, {saved.fingerprint}: bring that back"
    )
  if saved.vocabulary.to_dict() != vocabulary_facts(vocab):
    raise UserError(
      f"the vocabulary of {saved.fingerprint} is no longer what the model was "
      "trained with: use the version that converted it"
    )


def read_params(folder: str | os.PathLike[str], model: Any) -> PyTree:
  """The parameters in a model's folder, as NumPy arrays of their own dtype.

  Raises:
    UserError: for a file that is missing or broken, or of another model.
  """
  path = os.path.join(folder, WEIGHTS)
  found = read_weights(path)
  check_params(found, model, source=path)
  return jax.tree.map(found.__getitem__, names(abstract_params(model)))


def abstract_params(model: Any) -> PyTree:
  """Shapes and dtypes of a model's parameters."""
  made = plain(model)
  return jax.eval_shape(lambda: init_params(made, jax.random.key(0)))


def plain(model: Any) -> Any:
  """The same model of plain operations, which any platform has."""
  settings: dict[str, Any] = {"scan_impl": "associative", "remat": "none"}
  if hasattr(model, "attention_impl"):
    settings["attention_impl"] = "xla"
  return model.clone(**settings)


def check_params(
  found: Mapping[str, Any], model: Any, *, source: str, remedy: str = ""
) -> None:
  """Refuses parameters that are not a model's.

  Args:
    found: arrays by path; see `flat`.
    model: whose they should be.
    source: what the message calls them.
    remedy: what helps.

  Raises:
    UserError: naming the first path that differs and both shapes.
  """
  wanted = flat(abstract_params(model))
  difference = first_difference(shapes_of(found), shapes_of(wanted))
  if difference:
    remedy = remedy or "take weights and config.json from one model"
    raise UserError(f"{source}: {difference}; {remedy}")


def shapes_of(leaves: Mapping[str, Any]) -> Shapes:
  """The shapes of leaves by path."""
  return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def first_difference(found: Shapes, wanted: Shapes) -> str:
  """Says which path is the first whose shapes differ; "" if none is."""
  for name in sorted(found.keys() | wanted.keys()):
    here, there = found.get(name), wanted.get(name)
    if here == there:
      continue
    if here is None:
      return f"{name!r} is missing, and the model takes {there}"
    if there is None:
      return f"{name!r} has shape {here}, and the model has no such parameter"
    return f"{name!r} has shape {here}, and the model takes {there}"
  return ""


def flat(tree: PyTree) -> dict[str, Any]:
  """A tree's leaves by path, such as `layers/causal/input/kernel`."""
  return dict(zip(jax.tree.leaves(names(tree)), jax.tree.leaves(tree)))


def as_dtype(run: Any, dtype: str) -> Any:
  """A `birdie.run.Run` whose parameters are of another type."""
  config = run.config.copy_and_resolve_references()
  with config.unlocked():
    config.model.param_dtype = dtype
  params = jax.tree.map(lambda p: p.astype(DTYPES[dtype]), run.params)
  model = run.model.clone(param_dtype=DTYPES[dtype])
  return dataclasses.replace(run, config=config, model=model, params=params)
