"""Models in other forms: Marian's of transformers, one path of a run, files.

    python -m thor.convert --from_marian DIR --output MODEL
    python -m thor.convert --to_marian MODEL --output DIR
    python -m thor.convert --run RUN --path 0,1,0,1,1,0 --output MODEL

# v vocabulary, d width, h heads, e head width, i inputs, o outputs

A MODEL is a folder that NumPy alone can read; see `thor.weights`. Weights are
converted, and what decides how they are used; the tokenizer is not.
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common import app
from common.config import did_you_mean
from common.errors import UserError
from common.flags import Parser

if TYPE_CHECKING:  # jax takes most of a second, which --help need not wait for
  from common.weights import Tensors
  from thor.settings import Settings

PyTree = Any
State = Mapping[str, np.ndarray]

EXAMPLE = (
  "python -m thor.convert --from_marian opus-mt-en-de --output models/en-de"
)
# Only a table's length in Marian's form; positions here go on for ever.
_MAX_POSITIONS = 1024
_ACTIVATIONS = {
  "relu": "relu", "swish": "swish", "silu": "swish", "gelu": "gelu",
}  # fmt: skip
# The only value that has a counterpart here, also where the key is missing.
_ONLY: dict[str, tuple[Any, str]] = {
  "model_type": ("marian", "models of other types are not read"),
  "share_encoder_decoder_embeddings": (
    True, "both sides share one vocabulary",
  ),
  "tie_word_embeddings": (True, "logits come from the embedding"),
  "normalize_before": (False, "Marian's norms follow the sub-layers"),
  "normalize_embedding": (False, "no norm follows the embedding"),
  "add_final_layer_norm": (False, "no norm follows the last layer"),
  "static_position_embeddings": (True, "positions are sinusoids"),
}  # fmt: skip
# Pairs of keys that must agree: both stacks have the same sizes.
_EQUAL = (
  ("encoder_attention_heads", "decoder_attention_heads"),
  ("encoder_ffn_dim", "decoder_ffn_dim"),
)
# Settings by the key of Marian's that holds the same number.
_SIZES = {
  "vocab_size": "vocab_size",
  "width": "d_model",
  "hidden": "encoder_ffn_dim",
  "heads": "encoder_attention_heads",
  "encoder_layers": "encoder_layers",
  "decoder_layers": "decoder_layers",
}
_IDS = {
  "pad_id": "pad_token_id",
  "eos_id": "eos_token_id",
  "start_id": "decoder_start_token_id",
}
_RATES = ("dropout", "attention_dropout", "activation_dropout")
# Marian's names of our modules; those of the feed-forward layer lie a level
# higher there.
_NAMES = {
  "attention": "self_attn",
  "attention_norm": "self_attn_layer_norm",
  "cross_attention": "encoder_attn",
  "cross_attention_norm": "encoder_attn_layer_norm",
  "feed_forward": "",
  "feed_forward_norm": "final_layer_norm",
  "query": "q_proj",
  "key": "k_proj",
  "value": "v_proj",
  "out": "out_proj",
  "up": "fc1",
  "down": "fc2",
}
_EMBEDDINGS = (
  "model.shared.weight",
  "model.encoder.embed_tokens.weight",
  "model.decoder.embed_tokens.weight",
  "lm_head.weight",
)
_POSITIONS = tuple(
  f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")
)
_BIAS = "final_logits_bias"


def from_marian(
  state: State, config: Mapping[str, Any], *, source: str = "the Marian model"
) -> tuple[PyTree, "Settings"]:
  """Our parameters from those of transformers' `MarianMTModel`.

  Args:
    state: its tensors by name, of any floating type. Tied ones may be left out
      but for one, and positions, which are computed.
    config: its `config.json`.
    source: what error messages call it.

  Returns:
    Float32 parameters, and settings whose `Transformer` computes the same.

  Raises:
    UserError: for what has no counterpart here, and for tensors that are
      missing, unknown, or of another shape than the configuration's.
  """
  import jax

  from thor.model import init_layer
  from thor.paths import from_layers
  from thor.weights import tensors_of

  settings = _settings_of(config, logits_bias=_BIAS in state, source=source)
  tensors = tensors_of(state, source, sizes="config.json")
  shape = (settings.vocab_size, settings.width)
  params: dict[str, Any] = {"embedding": _tied(tensors, shape)}
  if settings.logits_bias:
    params["logits_bias"] = tensors.take(_BIAS, (1, shape[0]))[0]
  _check_positions(tensors, settings.width)
  for side in ("encoder", "decoder"):
    like = jax.eval_shape(
      lambda key, cross=side == "decoder": init_layer(
        settings, key, has_experts=False, cross=cross
      ),
      jax.random.key(0),
    )
    depth = getattr(settings, f"{side}_layers")
    layers = [
      _read(tensors, f"model.{side}.layers.{i}", like) for i in range(depth)
    ]
    params[side] = {"layers": layers}
  tensors.finish()
  for side in ("encoder", "decoder"):
    params[side] = {"layers": from_layers(params[side]["layers"], settings)}
  return params, settings


def to_marian(
  params: PyTree, settings: "Settings"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The reverse of `from_marian`.

  Args:
    params: of a model without experts.
    settings: its.

  Returns:
    Tensors by name, each of the tied ones once, and what `config.json` says.

  Raises:
    UserError: for a model that Marian's form cannot hold.
  """
  import jax

  from thor.paths import layers_of

  _check_is_marian(settings)
  params = jax.device_get(params)
  state = {_EMBEDDINGS[0]: np.asarray(params["embedding"], np.float32)}
  if settings.logits_bias:
    state[_BIAS] = np.asarray(params["logits_bias"], np.float32)[None]
  for side in ("encoder", "decoder"):
    for i, layer in enumerate(layers_of(params, side)):
      _write(state, f"model.{side}.layers.{i}", layer)
  sizes = {theirs: getattr(settings, ours) for ours, theirs in _SIZES.items()}
  config = {
    "architectures": ["MarianMTModel"],
    **{key: value for key, (value, _) in _ONLY.items()},
    **sizes,
    "decoder_vocab_size": settings.vocab_size,
    "decoder_ffn_dim": settings.hidden,
    "decoder_attention_heads": settings.heads,
    "max_position_embeddings": _MAX_POSITIONS,
    "activation_function": settings.activation,
    "scale_embedding": settings.scale_embedding,
    **{name: getattr(settings, name) for name in _RATES},
    **{theirs: getattr(settings, ours) for ours, theirs in _IDS.items()},
    "bos_token_id": None,
    "forced_eos_token_id": settings.eos_id,
    "is_encoder_decoder": True,
  }
  return state, config


def _settings_of(
  config: Mapping[str, Any], *, logits_bias: bool, source: str
) -> "Settings":
  from thor.settings import Settings

  for key, (only, why) in _ONLY.items():
    if config.get(key, only) != only:
      raise UserError(
        f"{source}: {key}={config[key]!r} has no counterpart here ({why}); "
        f"only {key}={only!r} has"
      )
  number = _Numbers(config, source)
  given: dict[str, Any] = {
    ours: number(theirs) for ours, theirs in (_SIZES | _IDS).items()
  }
  pairs = [*_EQUAL]
  if config.get("decoder_vocab_size") is not None:
    pairs.append(("vocab_size", "decoder_vocab_size"))
  for first, second in pairs:
    if number(first) != number(second):
      raise UserError(
        f"{source}: {first}={number(first)} and {second}={number(second)} "
        "differ; only models with equal ones have a counterpart here"
      )
  activation = config.get("activation_function")
  if activation not in _ACTIVATIONS:
    raise UserError(
      f"{source}: activation_function={activation!r} has no counterpart here"
      f"{did_you_mean(str(activation), _ACTIVATIONS)}"
    )
  for ours, theirs in _IDS.items():
    if not 0 <= given[ours] < given["vocab_size"]:
      raise UserError(
        f"{source}: {theirs}={given[ours]} is no id of a vocabulary of "
        f"{given['vocab_size']}"
      )
  given |= {name: float(config.get(name, 0)) for name in _RATES}
  return Settings(
    **given,
    pattern=(False,),
    activation=_ACTIVATIONS[activation],
    positions="marian",
    scale_embedding=bool(config.get("scale_embedding", False)),
    logits_bias=logits_bias,
  )


@dataclasses.dataclass(frozen=True)
class _Numbers:
  """The integers of a `config.json`."""

  config: Mapping[str, Any]
  source: str

  def __call__(self, key: str) -> int:
    if key not in self.config:
      raise UserError(f"{self.source}: its config.json lacks {key!r}")
    value = self.config[key]
    if type(value) is not int:
      raise UserError(f"{self.source}: {key}={value!r} is not one integer")
    return value


def _check_is_marian(settings: "Settings") -> None:
  if sum(settings.expert_layers):
    raise UserError(
      f"{sum(settings.expert_layers)} layers have experts, and Marian's form "
      "has none: first take one path with thor.paths.export_dense, or with "
      "--run and --path"
    )
  if settings.pre_norm:
    raise UserError(
      "model.pre_norm=True: Marian's norms follow the sub-layers; train with "
      "model.pre_norm=False"
    )
  if settings.positions != "marian":
    raise UserError(
      f"model.positions={settings.positions!r}: Marian's form has sinusoids "
      "of its own; train with model.positions='marian'"
    )


def _tied(tensors: "Tensors", shape: tuple[int, ...]) -> np.ndarray:
  """The embedding, which all of its names that are there hold alike."""
  there = [name for name in _EMBEDDINGS if tensors.shape(name)]
  first, *others = there or _EMBEDDINGS[:1]
  value = tensors.take(first, shape)
  for name in others:
    if not np.array_equal(tensors.take(name, shape), value):
      raise UserError(
        f"{tensors.source}: {name!r} differs from {first!r}; only models with "
        "one embedding for sources, targets and logits have a counterpart here"
      )
  return value


def _check_positions(tensors: "Tensors", width: int) -> None:
  """Raises where tables of positions hold others than are computed here."""
  from thor.layers import sinusoids

  for name in _POSITIONS:
    shape = tensors.shape(name)
    if shape is None:
      continue
    table = sinusoids(shape[0], width, kind="marian")
    found = tensors.take(name, table.shape)
    # Files may hold them in half precision.
    if np.abs(found - table).max() > 2e-3:
      raise UserError(
        f"{tensors.source}: {name!r} is not Marian's table of sinusoids; only "
        "models with it have a counterpart here"
      )


def _read(tensors: "Tensors", name: str, like: PyTree) -> PyTree:
  """Our arrays of a layer or a part of it, of the shapes of `like`."""
  if not _is_leaf(like):
    return {
      part: _read(tensors, _join(name, part), like[part]) for part in like
    }
  bias = like["bias"].shape
  outputs = math.prod(bias)
  made = {"bias": tensors.take(f"{name}.bias", (outputs,)).reshape(bias)}
  if "scale" in like:
    return {"scale": tensors.take(f"{name}.weight", (outputs,)), **made}
  kernel = like["kernel"].shape  # [i… o…], theirs is [o i]
  weight = tensors.take(
    f"{name}.weight", (outputs, math.prod(kernel) // outputs)
  )
  return {"kernel": weight.T.reshape(kernel), **made}


def _write(state: dict[str, np.ndarray], name: str, module: PyTree) -> None:
  """The reverse of `_read`."""
  if not _is_leaf(module):
    for part in module:
      _write(state, _join(name, part), module[part])
    return
  arrays = {k: np.asarray(v, np.float32) for k, v in module.items()}
  bias = arrays["bias"].reshape(-1)
  if "scale" in arrays:
    weight = arrays["scale"]
  else:
    weight = np.ascontiguousarray(arrays["kernel"].reshape(-1, len(bias)).T)
  state |= {f"{name}.weight": weight, f"{name}.bias": bias}


def _join(name: str, part: str) -> str:
  return f"{name}.{_NAMES[part]}" if _NAMES[part] else name


def _is_leaf(module: PyTree) -> bool:
  return "kernel" in module or "scale" in module


def _parser() -> Parser:
  parser = Parser(
    "thor.convert",
    description=(
      "Converts transformers' Marian models to ours and back, and writes one "
      "path of a run as a model without experts."
    ),
    example=EXAMPLE,
  )
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--from_marian", metavar="DIR", help="to a model of ours")
  what.add_argument("--to_marian", metavar="MODEL", help="to a Marian model")
  what.add_argument("--run", metavar="RUN", help="a run's folder, to a model")
  parser.add_argument(
    "--path",
    metavar="0,1,…",
    help="with --run: an expert for every expert layer, the encoder's first",
  )
  parser.add_argument(
    "--step", type=int, help="with --run: which checkpoint; else the newest"
  )
  parser.add_argument(
    "--average",
    type=int,
    help="with --run: the mean of so many checkpoints, that one the last",
  )
  parser.add_argument(
    "--output", required=True, metavar="DIR", help="a new or empty folder"
  )
  return parser


def main() -> None:
  """Converts between folders."""
  parser = _parser()
  args = parser.parse_args()
  for name in ("path", "step", "average"):
    if getattr(args, name) is not None and args.run is None:
      parser.error(f"--{name} goes with --run alone")
  path = _parse_path(args.path or "")
  output = pathlib.Path(args.output)
  if output.is_file() or (output.is_dir() and any(output.iterdir())):
    raise UserError(f"--output={args.output} is there already: name a new one")

  from common.tree import count_params
  from thor import weights

  if args.to_marian is not None:
    params, settings = weights.load_model(args.to_marian)
    weights.write_marian(output, *to_marian(params, settings))
  else:
    if args.from_marian is not None:
      state, config = weights.read_marian(args.from_marian)
      params, settings = from_marian(state, config, source=args.from_marian)
      weights.save_model(output, params, settings)
    else:
      params, settings = _write_path(args, path, output)
  print(
    f"{args.output}: {settings.encoder_layers}+{settings.decoder_layers} "
    f"layers, {count_params(params):,} parameters"
  )


def _parse_path(text: str) -> list[int]:
  parts = text.split(",") if text else []
  if not all(part.strip().isdecimal() for part in parts):
    raise UserError(f"--path={text}: write numbers, as in --path=0,1,0")
  return [int(part) for part in parts]


def _write_path(
  args: argparse.Namespace, path: Sequence[int], output: pathlib.Path
) -> tuple[PyTree, "Settings"]:
  from thor.paths import export_dense
  from thor.run import load_run, save_path

  average = 1 if args.average is None else args.average
  run = load_run(args.run, step=args.step, average=average)
  params, settings = export_dense(run.params, run.settings, path)
  save_path(run, output, params, settings)
  return params, settings


if __name__ == "__main__":
  app.run_alone(main)
