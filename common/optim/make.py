"""From a configuration to an optax chain."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from common import tree
from common.config import check_keys, did_you_mean
from common.errors import UserError
from common.optim.schedules import make_schedule

PyTree = Any

# Every key that a configuration's `optim` may hold, with its default.
DEFAULTS: Mapping[str, Any] = {
  "name": "adamw",  # adamw | adafactor | sgd | lion
  "lr": 1e-3,  # the schedule's peak
  "schedule": "cosine",  # cosine | linear | rsqrt | constant
  "warmup_steps": 0,
  "final_ratio": 0.0,  # the schedule's floor, as a part of lr
  "clip_norm": 0.0,  # of all gradients together; 0 is none
  "weight_decay": 0.0,  # times the learning rate, as in AdamW
  # decoupled | coupled: added to the gradient, as PyTorch's Adam and SGD do.
  "decay": "decoupled",
  # Regexes of the parameters without decay. By name, not by rank: under a
  # scan over layers the scale of a norm is a matrix.
  "no_decay": (r"(^|/)(scale|bias|\w+_bias|embedding)$", r"(?i)norm"),
  "frozen": (),  # regexes of the parameters that stay as they are
  "b1": 0.9,  # adamw, lion
  "b2": 0.999,  # adamw, lion (whose authors take 0.99)
  "eps": 1e-8,  # adamw
  "momentum": 0.9,  # sgd; 0 is none
  "nesterov": False,  # sgd
}

DECAYS = ("decoupled", "coupled")


def make_optimizer(
  cfg: Mapping[str, Any], num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Makes the optimizer that `cfg` describes.

  The chain is: clip by global norm, the optimizer's direction, decay, learning
  rate, so that for every optimizer

      p <- p - lr(step) * (direction + weight_decay * p)

  Decay is decoupled from the gradient (Loshchilov and Hutter, arXiv
  1711.05101) and follows the schedule; with `decay="coupled"` it is the L2
  penalty of old, `weight_decay * p` added to the gradient behind the clipping,
  which adamw then is Adam. It spares what `no_decay` finds by
  path: by default norms, biases and embeddings. Frozen parameters get updates
  of zero and no moments, are not decayed and do not count in the clipping.

  adamw is `optax.adamw`, lion `optax.lion`, sgd `optax.sgd`; adafactor is
  `optax.adafactor` (Shazeer and Stern, arXiv 1804.04235) with the given
  learning rate instead of one relative to the parameters' size, and without
  momentum. Its factored moments have fewer dimensions than their parameters:
  sharding rules need one for `(v_row|v_col|v)/` ahead of the parameters'.

  Args:
    cfg: keys of `DEFAULTS`; what is absent has its default. A key that the
      chosen optimizer does not know does nothing.
    num_steps: the run's length.

  Returns:
    `(optimizer, schedule)`; the schedule gives the learning rate of the update
    that follows a step.

  Raises:
    UserError: for unknown names and keys and for values without a meaning;
      from `init`, for a `frozen` or given `no_decay` regex that matches no
      parameter.
  """
  check_keys(cfg, DEFAULTS, what="optim")
  # Defaults need not match: not every model has all of these parameters.
  patterns = {
    f"optim.{name}": tuple(cfg.get(name, ())) for name in ("frozen", "no_decay")
  }
  cfg = {**DEFAULTS, **cfg}
  _check_values(cfg)
  schedule = make_schedule(
    cfg["schedule"],
    lr=cfg["lr"],
    num_steps=num_steps,
    warmup_steps=cfg["warmup_steps"],
    final_ratio=cfg["final_ratio"],
  )
  parts = []
  if cfg["clip_norm"]:
    parts.append(optax.clip_by_global_norm(cfg["clip_norm"]))
  parts.append(_direction(cfg))
  if cfg["weight_decay"]:
    place = len(parts) - (cfg["decay"] == "coupled")
    parts.insert(place, _decay(cfg["weight_decay"], tuple(cfg["no_decay"])))
  parts.append(optax.scale_by_learning_rate(schedule))
  optimizer = optax.chain(*parts)
  if cfg["frozen"]:
    optimizer = _freeze(optimizer, tuple(cfg["frozen"]))
  return _checked(optimizer, patterns), schedule


def _check_values(cfg: Mapping[str, Any]) -> None:
  for name in ("lr", "clip_norm", "weight_decay"):
    if not 0 <= cfg[name] < math.inf:
      raise UserError(f"optim.{name}={cfg[name]} must be a number from 0")
  for name in ("b1", "b2", "momentum"):
    if not 0 <= cfg[name] < 1:
      raise UserError(f"optim.{name}={cfg[name]} must be from 0 and below 1")
  if cfg["decay"] not in DECAYS:
    raise UserError(
      f"optim.decay={cfg['decay']!r}{did_you_mean(cfg['decay'], DECAYS)}"
    )
  if not cfg["eps"] > 0:
    raise UserError(f"optim.eps={cfg['eps']} must be above 0")
  for name in ("frozen", "no_decay"):
    if isinstance(cfg[name], str):
      raise UserError(f"optim.{name}={cfg[name]!r} must be a list of regexes")


def _direction(cfg: Mapping[str, Any]) -> optax.GradientTransformation:
  directions = {
    "adamw": lambda: optax.scale_by_adam(cfg["b1"], cfg["b2"], cfg["eps"]),
    "adafactor": lambda: optax.chain(
      optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    ),
    "sgd": lambda: (
      optax.trace(cfg["momentum"], nesterov=cfg["nesterov"])
      if cfg["momentum"]
      else optax.identity()
    ),
    "lion": lambda: optax.scale_by_lion(cfg["b1"], cfg["b2"]),
  }
  name = cfg["name"]
  if name not in directions:
    raise UserError(f"optim.name={name!r}{did_you_mean(name, directions)}")
  return directions[name]()


def _decay(rate: float, spared: Sequence[str]) -> optax.GradientTransformation:
  def decayed(params: PyTree) -> PyTree:
    return jax.tree.map(lambda found: not found, tree.mask(params, spared))

  return optax.add_decayed_weights(rate, mask=decayed)


def _freeze(
  optimizer: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformation:
  def labels(params: PyTree) -> PyTree:
    frozen = tree.mask(params, patterns)
    return jax.tree.map(lambda f: "frozen" if f else "trained", frozen)

  return optax.multi_transform(
    {"trained": optimizer, "frozen": optax.set_to_zero()}, labels
  )


def _checked(
  optimizer: optax.GradientTransformation,
  patterns: Mapping[str, Sequence[str]],
) -> optax.GradientTransformation:
  """Looks, in `init`, for every regex among all parameters' paths."""

  def init(params: PyTree) -> PyTree:
    for setting, regexes in patterns.items():
      tree.mask(params, regexes, must_match=setting)
    return optimizer.init(params)

  return optimizer._replace(init=init)
