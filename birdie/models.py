"""The three models by name, their parameters' places and how they are made."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from birdie.attention import IMPLEMENTATIONS as ATTENTIONS
from birdie.model_gated_ssm import GatedSSM
from birdie.model_hawk import Hawk
from birdie.model_parts import LanguageModel
from birdie.model_transformer import Transformer
from common.config import did_you_mean
from common.errors import UserError
from common.parallel.scan import IMPLEMENTATIONS as SCANS

__all__ = [
  "RULES", "GatedSSM", "Hawk", "LanguageModel", "Transformer", "init_params",
  "make_model",
]  # fmt: skip

# Where parameters live, by path; optimizer moments end in the same paths.
# Kernels of layers have a leading axis of layers, which is never cut.
RULES = (
  (r"^extra/", jax.P()),
  # Adafactor's moments: small, and without the dimensions of the parameters.
  (r"/(v_row|v_col|v)/", jax.P()),
  (r"(^|/)embedding$", jax.P("model", "fsdp")),
  (r"(^|/)head/kernel$", jax.P("fsdp", "model")),
  (r"(^|/)scale$", jax.P()),
  # [layers d 2 n/2], [layers 2 n/2 d] and what a channel has of its own
  (r"layers/.*/(input|drive|output|forget|side)/kernel$",
   jax.P(None, "fsdp", None, "model")),
  (r"layers/.*/out/kernel$", jax.P(None, None, "model", "fsdp")),
  (r"layers/.*/(forget_bias|lambda|bias)$", jax.P(None, None, "model")),
  (r"layers/.*/conv/kernel$", jax.P(None, None, None, "model")),
  # [layers 2 n/2 2 n/2], or blocks [layers 2 k i i]
  (r"layers/.*/(recurrence|input)_gate/kernel$",
   jax.P(None, None, "fsdp", None, "model")),
  (r"layers/.*/(query|key|value)/kernel$", jax.P(None, "fsdp", "model")),
  (r"layers/.*/attention_out/kernel$", jax.P(None, "model", None, "fsdp")),
  (r"layers/.*/mlp/(gate|up)/kernel$", jax.P(None, "fsdp", "model")),
  (r"layers/.*/mlp/down/kernel$", jax.P(None, "model", "fsdp")),
)  # fmt: skip

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_CHOICES = {
  "bidirectional": ("none", "alternate", "all"),
  "prefix_mode": ("strict", "paper"),
  "forget_bias": ("learned", "fixed", "none"),
  "reset_gamma": ("keep", "one"),
  "dtype": DTYPES,
  "param_dtype": DTYPES,
  "scan_impl": SCANS,
  "attention_impl": ATTENTIONS,
  "remat": ("none", "dots", "full"),
  "seq_axis": ("", "seq"),  # none, or the axis that batches are cut along
}
_LEAST = {
  "width": 1, "layers": 1, "state": 1, "heads": 1, "kv_heads": 0,
  "mlp_width": 0, "gate_blocks": 1, "attention_chunk": 0,
}  # fmt: skip
# Settings that only some models read.
_OWN = {
  "gated_ssm": ("state", "forget_bias"),
  "hawk": ("state", "mlp_width", "gate_blocks", "reset_gamma"),
  "transformer": (
    "heads", "kv_heads", "mlp_width", "rope_base", "attention_impl",
    "attention_chunk",
  ),
}  # fmt: skip
_MODELS: dict[str, Callable[..., LanguageModel]] = {
  "gated_ssm": GatedSSM, "hawk": Hawk, "transformer": Transformer,
}  # fmt: skip


def make_model(cfg: Any, vocab_size: int) -> LanguageModel:
  """Builds the model of a configuration.

  Args:
    cfg: `config.model`; see `configs/birdie.py`.
    vocab_size: size of the embedding.

  Raises:
    UserError: for unknown names and sizes that do not go together.
  """
  settings = dict(cfg)
  name = settings.pop("name")
  if name not in _MODELS:
    raise UserError(f"model.name={name!r}{did_you_mean(name, _MODELS)}")
  own = _OWN[name]
  others = {key for keys in _OWN.values() for key in keys} - set(own)
  settings = {k: v for k, v in settings.items() if k not in others}
  for key, allowed in _CHOICES.items():
    if key in settings and settings[key] not in allowed:
      value = settings[key]
      raise UserError(
        f"model.{key}={value!r}{did_you_mean(str(value), allowed)}"
      )
  for key, least in _LEAST.items():
    if key in settings and settings[key] < least:
      raise UserError(f"model.{key}={settings[key]} must be at least {least}")
  if settings["bidirectional"] == "alternate" and settings["layers"] % 2:
    raise UserError(
      f"model.layers={settings['layers']} must be even with "
      "model.bidirectional='alternate'"
    )
  if "state" in settings:
    _check_state(settings)
  if "heads" in settings:
    _fill_heads(settings)
  if "mlp_width" in settings:
    settings["mlp_width"] = settings["mlp_width"] or settings["width"] * 8 // 3
  for key in ("dtype", "param_dtype"):
    settings[key] = DTYPES[settings[key]]
  settings["seq_axis"] = settings["seq_axis"] or None
  return _MODELS[name](vocab_size=vocab_size, **settings)


def _check_state(settings: dict[str, Any]) -> None:
  state, blocks = settings["state"], settings.get("gate_blocks", 1)
  if state % 2:
    raise UserError(
      f"model.state={state} must be even: half of the channels of a "
      "bidirectional layer run backwards"
    )
  if blocks > 1 and (blocks % 2 or state % blocks):
    raise UserError(
      f"model.gate_blocks={blocks} must be 1, or an even divisor of "
      f"model.state={state}"
    )


def _fill_heads(settings: dict[str, Any]) -> None:
  width, heads = settings["width"], settings["heads"]
  if width % (2 * heads):
    raise UserError(
      f"model.heads={heads} must cut model.width={width} into heads of an even "
      "size"
    )
  settings["kv_heads"] = settings["kv_heads"] or heads
  if heads % settings["kv_heads"]:
    raise UserError(
      f"model.kv_heads={settings['kv_heads']} must divide model.heads={heads}"
    )
  if not settings["rope_base"] > 1:
    raise UserError(
      f"model.rope_base={settings['rope_base']} must be greater than 1"
    )


def init_params(model: LanguageModel, key: jax.Array) -> Any:
  """A model's parameters, of its `param_dtype`.

  Jit it: without, every layer's draw is compiled by itself.
  """
  tokens = jnp.zeros((1, 8), jnp.int32)
  params = model.init(key, tokens, tokens, tokens, tokens > 0)["params"]
  return jax.tree.map(lambda p: p.astype(model.param_dtype), params)
