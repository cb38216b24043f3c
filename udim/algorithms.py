"""Algorithms by name: what one step makes of a batch.

Three kinds, of which every comparison is made:

- an objective of `udim.objectives` under the plain optimizer: erm, mixup,
  coral, groupdro, irm, fishr;
- a member of the SAM family (`common.optim`) around the plain loss;
- udim, and its controls, with the same perturbed images but without the
  inconsistency: perturbed_loss adds their plain loss, perturbed_sam SAM's
  gradient of it.

`+swad` behind a name averages its weights. Settings stand under
`methods.<name>` of the configuration.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from common import optim, tree
from common.config import check_keys, did_you_mean, steps
from common.errors import UserError
from common.metrics import Mean
from common.optim.ascent import widen
from common.rngs import RngStreams, fold_name
from common.state import TrainState
from common.step import StepChoice
from udim.inconsistency import (
  make_targets,
  mean_over_batches,
  merge_domains,
)
from udim.objectives import OBJECTIVES, Objective, make_objective
from udim.passes import ApplyFn
from udim.settings import UdimConfig
from udim.transform import udim_grads

PyTree = Any
Batch = Mapping[str, jax.Array]
HEAD = "head"

# name -> its settings with their defaults, as in `common.optim`.
SAM_FAMILY: Mapping[str, Mapping[str, Any]] = {
  "sam": {"rho": 0.05},
  "asam": {"rho": 0.5, "eta": 0.01},
  "fisher_sam": {"rho": 0.1, "eta": 1.0},
  "gsam": {"rho": 0.05, "alpha": 0.2},
  "sagm": {"rho": 0.05, "alpha": 0.001},
  "gam": {
    "rho": 0.05, "rho_prime": 0.05, "beta0": 0.1, "beta1": 0.1, "gamma": 0.05
  },
  "look_sam": {"rho": 0.05, "k": 5, "alpha": 0.7},
  "esam": {"rho": 0.05, "weight_fraction": 0.6, "data_fraction": 0.5},
}  # fmt: skip
UDIM = ("udim", "perturbed_loss", "perturbed_sam")
NAMES = (*OBJECTIVES, *SAM_FAMILY, *UDIM)
SWAD = "+swad"


@dataclasses.dataclass(frozen=True)
class Update:
  """What a batch makes of a state.

  Attributes:
    params, opt_state: the new ones.
    batch_stats: after the clean forward pass at the old parameters.
    memory: the algorithm's own arrays.
    metrics: scalars.
  """

  params: PyTree
  opt_state: PyTree
  batch_stats: PyTree
  memory: PyTree
  metrics: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """One algorithm with its settings.

  Attributes:
    name: without `+swad`.
    tx: what `opt_state` belongs to.
    init_memory: (number of source domains, params) -> the algorithm's arrays.
    update: `(state, batch, key, *, due) -> Update`; `due` is static.
    is_due: updates done -> `due` of the next one: whether it does all of the
      algorithm's work.
    start_step: where the warm-up ends; 0 without one.
    takes_best: the main phase starts from the best state of the warm-up.
  """

  name: str
  tx: optax.GradientTransformationExtraArgs
  init_memory: Callable[[int, PyTree], PyTree]
  update: Callable[..., Update]
  is_due: Callable[[int], bool] = lambda step: True
  start_step: int = 0
  takes_best: bool = False


def split_name(name: str) -> tuple[str, bool]:
  """`erm+swad` -> ("erm", True).

  Raises:
    UserError: for an unknown algorithm, with the nearest names.
  """
  base = name.removesuffix(SWAD)
  if base not in NAMES:
    raise UserError(f"algorithm={name!r}{did_you_mean(base, NAMES)}")
  return base, base != name


def make_algorithm(
  config: Any, apply_fn: ApplyFn, base: optax.GradientTransformation
) -> Algorithm:
  """Makes the algorithm that a configuration names.

  Args:
    config: `algorithm`, `methods`, `label_smoothing`, `share_dropout`,
      `accum`, `num_steps`.
    apply_fn: the model, see `udim.models.make_apply_fn`.
    base: the optimizer.

  Raises:
    UserError: for unknown names, keys and values, and for accumulation with a
      loss that is no mean over images.
  """
  name, _ = split_name(config.algorithm)
  settings = config.methods[name].to_dict() if name in config.methods else {}
  if name in UDIM:
    return _udim(name, settings, config, apply_fn, base)
  sharpness = name in SAM_FAMILY
  objective = make_objective(
    "erm" if sharpness else name,
    {} if sharpness else settings,
    head_path=HEAD,
    label_smoothing=config.label_smoothing,
  )
  if config.accum > 1 and not (sharpness or name == "erm"):
    raise UserError(
      f"accum={config.accum}: the loss of {name!r} is no mean over images; "
      "set accum=1"
    )
  if config.accum > 1 and name == "esam":
    raise UserError(
      f"accum={config.accum}: esam chooses images from the whole batch; set "
      "accum=1"
    )
  tx, is_due = base, lambda step: True
  if sharpness:
    known = SAM_FAMILY[name]
    check_keys(settings, known, what=f"methods.{name}")
    tx = getattr(optim, name)(base, **{**known, **settings})
    period = {**known, **settings}.get("k", 1)
    is_due = lambda step: step % period == 0  # noqa: E731
  tx = optax.with_extra_args_support(tx)
  update = functools.partial(
    _objective_update, objective, apply_fn, tx, sharpness, config.accum,
    config.share_dropout, config.label_smoothing,
  )  # fmt: skip
  return Algorithm(name, tx, objective.init, update, is_due)


def _objective_update(
  objective: Objective,
  apply_fn: ApplyFn,
  tx: optax.GradientTransformationExtraArgs,
  sharpness: bool,
  accum: int,
  share_dropout: bool,
  label_smoothing: float,
  state: TrainState,
  batch: Batch,
  key: jax.Array,
  *,
  due: bool,
) -> Update:
  """A gradient of the objective; the optimizer may ask for more of them."""

  def forward(params, images, key):
    variables = {"params": params, "batch_stats": state.extra["batch_stats"]}
    return apply_fn(variables, images, train=True, rngs={"dropout": key})

  def gradient(params, batch, key):
    def loss(params):
      outcome = objective.loss(
        forward, params, batch,
        key=key, step=state.step, memory=state.extra["memory"],
      )  # fmt: skip
      return outcome.loss, outcome

    return jax.grad(loss, has_aux=True)(params)

  grads, outcome = _accumulated(gradient, accum, state.params, batch, key)
  opt_state, extra = state.opt_state, {}
  if objective.restart_step >= 0:
    opt_state = _restarted(tx, state, objective.restart_step)
  if sharpness:
    second = key if share_dropout else jax.random.fold_in(key, 1)
    extra = _second_pass(
      lambda params, batch: _accumulated(
        gradient, accum, params, batch, second
      )[0],
      lambda params, images: forward(
        params, images, fold_name(second, "dropout")
      )[1],
      batch,
      label_smoothing,
    ) | {"due": due}  # fmt: skip
  updates, opt_state = tx.update(grads, opt_state, state.params, **extra)
  params = optax.apply_updates(state.params, updates)
  metrics = outcome.metrics | _norms(grads, updates, params)
  return Update(params, opt_state, outcome.batch_stats, outcome.memory, metrics)


def _accumulated(gradient: Callable, accum: int, params, batch, key):
  """The gradient over micro-batches, each with images of every domain."""
  if accum == 1:
    return gradient(params, batch, key)

  def deal(x: jax.Array) -> jax.Array:  # [s, n, ...] -> [m, s, n / m, ...]
    count = x.shape[1]
    if count % accum:
      raise UserError(
        f"accum={accum} does not divide data.images_per_domain={count}"
      )
    dealt = x.reshape(x.shape[0], count // accum, accum, *x.shape[2:])
    return jnp.moveaxis(dealt, 2, 0)

  def one(indexed):
    i, micro = indexed
    return gradient(params, micro, jax.random.fold_in(key, i)), ()

  batches = jax.tree.map(deal, dict(batch))
  return mean_over_batches(one, (jnp.arange(accum), batches))[0]


def _restarted(tx: Any, state: TrainState, step: int) -> PyTree:
  """The optimizer's state; a fresh one at `step`, on the run's schedule."""
  fresh = keep_schedule(tx.init(state.params), state.opt_state)
  return jax.tree.map(
    lambda new, old: jnp.where(state.step == step, new, old),
    fresh,
    state.opt_state,
  )


def keep_schedule(opt_state: PyTree, current: PyTree) -> PyTree:
  """`opt_state` with the schedules' clocks of `current`."""

  def is_clock(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)

  return jax.tree.map(
    lambda new, now: now if is_clock(new) else new,
    opt_state,
    current,
    is_leaf=is_clock,
  )


def _second_pass(
  gradient: Callable, logits_of: Callable, batch: Batch, label_smoothing: float
) -> dict[str, Any]:
  """`grad_fn` and `losses_fn` for the SAM family.

  ESAM looks again at chosen images. Its losses are in the order and under the
  dropout mask of the objective, so that the forward pass at w is that one.
  """

  def grad_fn(params, chosen=None):
    if chosen is None:
      return gradient(params, batch)
    return gradient(
      params,
      {name: merge_domains(x)[chosen][None] for name, x in batch.items()},
    )

  def losses_fn(params):
    logits = logits_of(params, merge_domains(batch["image"]))
    targets = make_targets(
      merge_domains(batch["label"]), logits.shape[-1], label_smoothing
    )
    return optax.softmax_cross_entropy(widen(logits), targets)

  return {"grad_fn": grad_fn, "losses_fn": losses_fn}


def _norms(grads, updates, params) -> dict[str, jax.Array]:
  return {
    "grad_norm": tree.global_norm(grads),
    "update_norm": tree.global_norm(updates),
    "param_norm": tree.global_norm(params),
  }


def _udim(name, settings, config, apply_fn, base) -> Algorithm:
  """UDIM's gradients before the plain optimizer, and a warm-up of SAM."""
  cfg, takes_best = make_udim_config(name, settings, config)
  tx = optax.with_extra_args_support(base)
  grads_of = udim_grads(apply_fn, HEAD, cfg, accum=config.accum)

  def update(state: TrainState, batch: Batch, key, *, due: bool) -> Update:
    # The mask that the objectives draw, so that algorithms are paired.
    key = fold_name(key, "dropout")
    grads, aux = grads_of(
      state.params, batch, key, state.step,
      batch_stats=state.extra["batch_stats"], due=due,
    )  # fmt: skip
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = aux["metrics"] | _norms(grads, updates, params)
    return Update(params, opt_state, aux["batch_stats"], {}, metrics)

  return Algorithm(
    name,
    tx,
    lambda count, params: {},
    update,
    is_due=cfg.is_due,
    start_step=cfg.start_step,
    takes_best=takes_best and cfg.start_step > 0,
  )


def make_udim_config(
  name: str, settings: Mapping[str, Any], config: Any
) -> tuple[UdimConfig, bool]:
  """`methods.udim` as settings of a step.

  Args:
    name: one of `UDIM`.
    settings: fields of `UdimConfig`, `warm_up_steps` or `warm_up_percent` (of
      `num_steps`), and `warm_up_best`.
    config: gives what all algorithms share.

  Returns:
    The settings, and whether the main phase starts from the warm-up's best.

  Raises:
    UserError: for unknown keys and values without a meaning.
  """
  shared = ("mode", "start_step", "share_dropout", "label_smoothing")
  warm_up = ("warm_up_steps", "warm_up_percent", "warm_up_best")
  fields = [f.name for f in dataclasses.fields(UdimConfig)]
  known = [f for f in fields if f not in shared]
  check_keys(settings, [*known, *warm_up], what=f"methods.{name}")
  rest = {k: v for k, v in settings.items() if k not in warm_up}
  cfg = UdimConfig(
    **rest | {"clip_range": tuple(rest.get("clip_range") or ()) or None},
    mode="inconsistency" if name == "udim" else name,
    start_step=steps(
      "warm_up", settings, total_steps=config.num_steps, default=0
    ),
    share_dropout=config.share_dropout,
    label_smoothing=config.label_smoothing,
  )
  return cfg, bool(settings.get("warm_up_best", False))


def make_steps(algorithm: Algorithm, averager: Any = None) -> StepChoice:
  """The compiled steps of an algorithm, state donated.

  The seed is an array of the state, `extra["seed"]`, so that runs with other
  seeds use the same programs.

  Args:
    algorithm: from `make_algorithm`.
    averager: from `common.optim.swad`, if weights are averaged.
  """

  def step(state: TrainState, batch: Batch, *, due: bool):
    streams = RngStreams(state.extra["seed"], ("step",))
    new = algorithm.update(state, batch, streams(state.step)["step"], due=due)
    extra = {
      **state.extra, "batch_stats": new.batch_stats, "memory": new.memory
    }  # fmt: skip
    if averager is not None:
      extra["swad"] = averager.update(
        state.extra["swad"], averaged(new.params, new.batch_stats)
      )
    state = TrainState(state.step + 1, new.params, new.opt_state, extra)
    return state, {name: Mean.of(value) for name, value in new.metrics.items()}

  programs = {
    due: jax.jit(functools.partial(step, due=due), donate_argnums=0)
    for due in (False, True)
  }
  return StepChoice(lambda step: programs[algorithm.is_due(step)])


def averaged(params: PyTree, batch_stats: PyTree) -> dict[str, PyTree]:
  """What SWAD averages: running statistics are averaged with the weights."""
  return {"params": params, "batch_stats": batch_stats}
