"""Classifiers by name, how they are applied, and where their parameters lie.

# b rows, h height, w width, c channels, d features, k classes

Every model maps images [b h w c] to features [b d], which are what its head
reads, and logits [b k] = features head/kernel + head/bias. Evaluation uses
running statistics only: an image's logits do not depend on its batch mates.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.config import check_keys, did_you_mean
from common.errors import UserError
from udim.model_parts import HE_FAN_OUT, classify, place_rows
from udim.model_resnet import ResNet, WideResNet
from udim.model_vit import ViT

Array = jax.Array
PyTree = Any
ApplyFn = Callable[..., tuple[Array, Array, PyTree]]

# Every key that a configuration's `model` may hold, with its default.
DEFAULTS: Mapping[str, Any] = {
  "name": "cnn",  # cnn | wrn28_K | resnet18 | resnet50 | vit_s16 | vit_b16
  "pretrained": "",  # a .safetensors or .pth file; see udim.convert
  "dropout": 0.0,  # of the features; 0.5 in DomainBed
  "block_dropout": 0.0,  # inside the blocks of wrn28_K and the ViTs
  # frozen | update; frozen statistics want pretrained ones: those of a fresh
  # model (mean 0, variance 1) normalize nothing.
  "batch_norm": "frozen",
  "dtype": "float32",  # of the computation: float32 | bfloat16
  "remat": False,  # recompute blocks in the backward pass
}
NAMES = ("cnn", "wrn28_2", "wrn28_10", "resnet18", "resnet50", "vit_s16",
         "vit_b16")  # fmt: skip
BATCH_NORMS = ("frozen", "update")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Where parameters live, by path; optimizer moments end in the same paths, and
# averages of the parameters may lie in `extra`.
RULES = (
  # Adafactor's moments: small, and without the dimensions of the parameters.
  (r"/(v_row|v_col|v)/", jax.P()),
  (r"(^|/)(mean|var)$", jax.P()),
  (r"(^|/)head/kernel$", jax.P("fsdp")),
  # By outputs only: with both channels cut along different axes, XLA of jax
  # 0.10 computes wrong gradients.
  (r"(^|/)(stem|conv\d|downsample)/kernel$",
   jax.P(None, None, None, ("fsdp", "model"))),
  (r"(^|/)patch/kernel$", jax.P(None, None, None, "fsdp")),
  (r"(^|/)(class_token|positions)$", jax.P(None, None, "fsdp")),
  (r"layers/qkv/kernel$", jax.P(None, "fsdp", None, "model")),
  (r"layers/qkv/bias$", jax.P(None, None, "model")),
  (r"layers/proj/kernel$", jax.P(None, "model", None, "fsdp")),
  (r"layers/up/kernel$", jax.P(None, "fsdp", "model")),
  (r"layers/up/bias$", jax.P(None, "model")),
  (r"layers/down/kernel$", jax.P(None, "model", "fsdp")),
  (r"(^|/)(scale|bias)$", jax.P()),
  (r"^extra/", jax.P()),
)  # fmt: skip


class SmallCNN(nn.Module):
  """Two convolutions for small images such as the digits, no normalization.

  Attributes:
    num_classes: k.
    widths: channels; the second convolution halves the map, and d is its
      whole output.
    dropout: of the features.
    dtype: of the computation. Parameters, features and logits are float32.
  """

  num_classes: int
  widths: tuple[int, int] = (16, 32)
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
    """Images [b h w c] -> features [b d] and logits [b k], float32."""
    x = place_rows(x.astype(self.dtype))
    for i, (name, width) in enumerate(zip(("stem", "conv1"), self.widths)):
      x = nn.Conv(
        width,
        (3, 3),
        strides=i + 1,
        padding=1,
        dtype=self.dtype,
        kernel_init=HE_FAN_OUT,
        name=name,
      )(x)
      x = nn.relu(x)
    return classify(
      x.reshape(x.shape[0], -1),
      num_classes=self.num_classes,
      dropout=self.dropout,
      train=train,
    )


def make_model(cfg: Mapping[str, Any], num_classes: int) -> nn.Module:
  """Builds the classifier of a configuration.

  Args:
    cfg: `config.model`; keys and defaults are in `DEFAULTS`.
    num_classes: k, at least 1.

  Returns:
    A module: `module.apply({"params", "batch_stats"}, x, train=..., rngs=...)`
    gives `(features, logits)`. See `make_apply_fn` and `init_variables`.

  Raises:
    UserError: for unknown keys, names and values, and for options that the
      model has no use for.
  """
  check_keys(cfg, DEFAULTS, what="model")
  settings = {**DEFAULTS, **cfg}
  _check(settings)
  if num_classes < 1:
    raise UserError(f"num_classes={num_classes} must be at least 1")
  name = settings["name"]
  options = {
    "num_classes": num_classes,
    "dropout": settings["dropout"],
    "dtype": DTYPES[settings["dtype"]],
  }
  if name == "cnn":
    _refuse(settings, "block_dropout", "remat")
    return SmallCNN(**options)
  options["remat"] = settings["remat"]
  if name.startswith("resnet"):
    _refuse(settings, "block_dropout")
    options["batch_norm"] = settings["batch_norm"]
    if name == "resnet18":
      return ResNet(**options)
    return ResNet(stages=(3, 4, 6, 3), bottleneck=True, **options)
  options["block_dropout"] = settings["block_dropout"]
  if name.startswith("vit"):
    width, heads = {"vit_s16": (384, 6), "vit_b16": (768, 12)}[name]
    return ViT(width=width, heads=heads, **options)
  options["batch_norm"] = settings["batch_norm"]
  return WideResNet(widen=int(name.removeprefix("wrn28_")), **options)


def _check(settings: Mapping[str, Any]) -> None:
  """Refuses what no model takes."""
  name = settings["name"]
  if name not in NAMES and not re.fullmatch(r"wrn28_[1-9]\d*", str(name)):
    raise UserError(f"model.name={name!r}{did_you_mean(str(name), NAMES)}")
  for key, allowed in (("batch_norm", BATCH_NORMS), ("dtype", DTYPES)):
    value = settings[key]
    if value not in allowed:
      raise UserError(
        f"model.{key}={value!r}{did_you_mean(str(value), allowed)}"
      )
  for key in ("dropout", "block_dropout"):
    if not 0 <= settings[key] < 1:
      raise UserError(
        f"model.{key}={settings[key]!r} must be at least 0 and below 1"
      )


def _refuse(settings: Mapping[str, Any], *keys: str) -> None:
  """Refuses options that would be silently without effect."""
  for key in keys:
    if settings[key] != DEFAULTS[key]:
      raise UserError(
        f"model.{key}={settings[key]!r}: model.name={settings['name']!r} has "
        f"no use for it; leave it at {DEFAULTS[key]!r}"
      )


def init_variables(
  module: nn.Module, key: Array, *, image_shape: tuple[int, int, int]
) -> dict[str, PyTree]:
  """Fresh `{"params": ..., "batch_stats": ...}`, the latter {} without any.

  Traceable: jit it, or hand it to `common.parallel.init_sharded`.

  Args:
    module: from `make_model`.
    key: a random key.
    image_shape: (height, width, channels).
  """
  images = jnp.zeros((1, *image_shape), jnp.float32)
  variables = module.init(key, images, train=False)
  return {
    "params": variables["params"],
    "batch_stats": variables.get("batch_stats", {}),
  }


@functools.lru_cache(maxsize=32)  # equal modules share their programs
def make_apply_fn(module: nn.Module) -> ApplyFn:
  """Makes `apply_fn(variables, x, *, train, rngs) -> (features, logits, new)`.

  `variables` is `{"params": ..., "batch_stats": ...}`, `x` is [b h w c] and
  `rngs` is `{"dropout": key}` or None; `new` are the batch statistics after
  the call: other than the old ones only in training with batch_norm="update".

  Args:
    module: from `make_model`, or any Linen module with that contract.
  """

  def apply_fn(
    variables: Mapping[str, PyTree],
    x: Array,
    *,
    train: bool,
    rngs: dict[str, Array] | None = None,
  ) -> tuple[Array, Array, PyTree]:
    (features, logits), changed = module.apply(
      variables, x, train=train, rngs=rngs, mutable=["batch_stats"]
    )
    return features, logits, changed.get("batch_stats", {})

  return apply_fn
