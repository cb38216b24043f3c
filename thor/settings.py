"""The sizes of a Transformer and what its experts need."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from common.config import did_you_mean
from common.errors import UserError
from thor.layers import ACTIVATIONS, POSITIONS

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# fairseq's architectures; the authors' code has the same ones with experts.
PRESETS: dict[str, dict[str, Any]] = {
  "iwslt_de_en": {
    "width": 512, "hidden": 1024, "heads": 4, "dropout": 0.1,
  },
  "base": {"width": 512, "hidden": 2048, "heads": 8, "dropout": 0.1},
  "vaswani_wmt_en_de_big": {
    "width": 1024, "hidden": 4096, "heads": 16, "dropout": 0.3,
  },
  "wmt_en_de_big": {
    "width": 1024, "hidden": 4096, "heads": 16, "dropout": 0.3,
    "attention_dropout": 0.1,
  },
  "vaswani_wmt_en_fr_big": {
    "width": 1024, "hidden": 4096, "heads": 16, "dropout": 0.1,
  },
}  # fmt: skip
GATE_LEVELS = ("token", "sentence")
PATTERNS = {"every_second": (True, False), "all": (True,), "none": (False,)}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that decides a model's parameters and what it computes.

  Attributes:
    vocab_size: v.
    width: d.
    hidden: f, of the feed-forward layers and of each expert.
    heads: h.
    encoder_layers, decoder_layers: how many.
    experts: k, of each expert layer; 1 is a plain Transformer.
    pattern: which layers have experts, from the first, in each stack; repeats.
    gated: expert layers have a gate (Switch).
    gate_level: what a gate looks at: each "token", or the mean of a "sentence"
      (in the decoder, of the source).
    pre_norm: norms before the sub-layers, and one after the last layer.
    activation: of feed-forward layers, one of `thor.layers.ACTIVATIONS`.
    positions: one of `thor.layers.POSITIONS`.
    scale_embedding: embeddings are multiplied by the root of d.
    logits_bias: the logits have an offset for each token, as Marian's have.
    dropout: of embeddings and sub-layers.
    attention_dropout: of attention weights.
    activation_dropout: of hidden layers.
    pad_id, eos_id, start_id: padding; the end; the decoder's first input.
    dtype: of the computation. Parameters, norms and logits are float32.
    remat: recompute a block in the backward pass.
    capacity: an expert's room in training, in even shares of a group's tokens;
      0: any number.
    eval_capacity: the same out of training.
    groups: into how many groups a batch is cut, whose tokens share that room.
    jitter: the gate's input is multiplied by up to 1 ± jitter in training.
    expert_axis: mesh axis that expert stacks are cut along; "" for none.
    cut_experts: they are cut along the experts, not along the hidden width.
  """

  vocab_size: int
  width: int = 512
  hidden: int = 2048
  heads: int = 8
  encoder_layers: int = 6
  decoder_layers: int = 6
  experts: int = 1
  pattern: tuple[bool, ...] = (True, False)
  gated: bool = False
  gate_level: str = "token"
  pre_norm: bool = False
  activation: str = "relu"
  positions: str = "fairseq"
  scale_embedding: bool = True
  logits_bias: bool = False
  dropout: float = 0.1
  attention_dropout: float = 0.0
  activation_dropout: float = 0.0
  pad_id: int = 1
  eos_id: int = 2
  start_id: int = 2
  dtype: Any = jnp.float32
  remat: bool = False
  capacity: float = 0.0
  eval_capacity: float = 0.0
  groups: int = 1
  jitter: float = 0.0
  expert_axis: str = ""
  cut_experts: bool = False

  def __post_init__(self) -> None:
    _check(self)

  @property
  def expert_layers(self) -> tuple[int, int]:
    """How many layers of the encoder and of the decoder have experts."""

    def count(depth: int) -> int:
      return sum(self.expert_at(i) for i in range(depth))

    return count(self.encoder_layers), count(self.decoder_layers)

  def expert_at(self, i: int) -> bool:
    """Whether layer i of a stack has experts."""
    return self.pattern[i % len(self.pattern)]

  def blocks(self, depth: int) -> tuple[tuple[bool, ...], int]:
    """The layers that repeat, and how often; all at once if they do not."""
    period = len(self.pattern)
    if depth % period == 0:
      return self.pattern, depth // period
    return tuple(self.expert_at(i) for i in range(depth)), 1

  def activate(self, x: jax.Array) -> jax.Array:
    """The activation of hidden layers."""
    return ACTIVATIONS[self.activation](x)


def _check(cfg: Settings) -> None:
  for name in (
    "vocab_size", "width", "hidden", "heads", "encoder_layers",
    "decoder_layers", "experts", "groups",
  ):  # fmt: skip
    value = getattr(cfg, name)
    if value < 1:
      raise UserError(f"model.{name}={value} must be at least 1")
  if cfg.width % cfg.heads:
    raise UserError(
      f"model.width={cfg.width} is not divisible by model.heads={cfg.heads}"
    )
  if cfg.width % 2:
    raise UserError(
      f"model.width={cfg.width} must be even: half of it are sines of positions"
    )
  for name in ("dropout", "attention_dropout", "activation_dropout"):
    if not 0 <= getattr(cfg, name) < 1:
      raise UserError(
        f"model.{name}={getattr(cfg, name)} must be from 0 and below 1"
      )
  for name in ("capacity", "eval_capacity", "jitter"):
    if not 0 <= getattr(cfg, name) < float("inf"):
      raise UserError(
        f"routing.{name}={getattr(cfg, name)} must be a number from 0"
      )
  if not cfg.pattern:
    raise UserError("model.pattern is empty: give True or False for each layer")
  for name, allowed in (
    ("activation", ACTIVATIONS),
    ("positions", POSITIONS),
    ("gate_level", GATE_LEVELS),
  ):
    value = getattr(cfg, name)
    if value not in allowed:
      raise UserError(
        f"model.{name}={value!r}{did_you_mean(str(value), allowed)}"
      )


def make_settings(
  model: Mapping[str, Any], routing: Any, *, vocab_size: int
) -> Settings:
  """The settings that a configuration describes.

  Args:
    model: `config.model`: `preset`, "" or one of `PRESETS`, whose values those
      of the other keys replace where these are not None; `expert_layers`, one
      of `PATTERNS`; otherwise `Settings`' names.
    routing: see `thor.routing.Routing`.
    vocab_size: v.

  Raises:
    UserError: for unknown names and sizes that do not go together.
  """
  given = {k: v for k, v in dict(model).items() if v is not None}
  preset = given.pop("preset", "")
  if preset and preset not in PRESETS:
    raise UserError(f"model.preset={preset!r}{did_you_mean(preset, PRESETS)}")
  given = PRESETS.get(preset, {}) | given
  dtype = given.pop("dtype", "float32")
  if dtype not in DTYPES:
    raise UserError(f"model.dtype={dtype!r}{did_you_mean(dtype, DTYPES)}")
  layers = given.pop("expert_layers", "every_second")
  if layers not in PATTERNS:
    raise UserError(
      f"model.expert_layers={layers!r}{did_you_mean(layers, PATTERNS)}"
    )
  pattern = PATTERNS[layers] if routing.experts > 1 else PATTERNS["none"]
  return Settings(
    vocab_size=vocab_size,
    pattern=pattern,
    dtype=DTYPES[dtype],
    **given,
    **routing.model_settings(),
  )
