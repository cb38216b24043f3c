"""Birdie's controller: reward, what to learn from it, what to try next.

# k configurations, c classes, e capacity of the history

Pure functions on arrays. After each evaluation `update` turns the change of
the losses into a reward for the mixture that was in force, fits the reward
model to the history, and chooses the next mixture. Source: the paper's
sections 3.3 and A.1; what it leaves open is said at its place.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from birdie import reward_model
from birdie.mixture import class_uniform, normalized
from birdie.proposals import PROPOSALS, apply_bounds, choose, explore, propose
from common.config import did_you_mean
from common.errors import UserError

SENSITIVITY = float(np.e)  # rho of section A.1.3
PAPER_STEPS = (10, 50, 250, 500, 1000, 1500, 2000)
# Settings that are checked one by one: name, smallest, largest.
_RANGES = (
  ("warmup_end", 0, np.inf),
  ("lr", 1e-12, 1),
  ("weight_decay", 0, 1e3),
  ("clip_norm", 1e-12, np.inf),
  ("noise", 0, 0.5),
  ("min_prob", 0, 1),
  ("max_prob", 0, 1),
  ("explore_first", 0, 1),
  ("explore_start", 0, 1),
  ("explore_floor", 0, 1),
)


@dataclasses.dataclass(frozen=True)
class ControllerConfig:
  """Settings; the defaults are the paper's where it states them.

  Attributes:
    warmup_end: the mixture stays as it is before this step.
    hidden, layers: of the reward model.
    lr, weight_decay, clip_norm: of its AdamW; the learning rate goes up and
      down once in every fit.
    fit_steps: optimization steps after each evaluation.
    noise: inputs and targets are multiplied by uniform numbers within this of
      1, anew in each of these steps.
    num_candidates: mixtures that are scored.
    top_k: the best of them are averaged.
    proposal: "uniform", the paper's, or "mixed", see `proposals.propose`.
    min_prob, max_prob: bounds of every configuration's probability.
    explore_first, explore_start, explore_floor: chance to explore instead: in
      the first 5 % of the run; up to 10 % of it; from half of it on, with a
      cosine between the last two. The paper does not mention exploration; the
      numbers are those of the authors' code.
  """

  warmup_end: int = 250
  hidden: int = 256
  layers: int = 4
  lr: float = 5e-4
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  fit_steps: int = 200
  noise: float = 0.02
  num_candidates: int = 2048
  top_k: int = 8
  proposal: str = "mixed"
  min_prob: float = 0.0
  max_prob: float = 1.0
  explore_first: float = 1.0
  explore_start: float = 0.5
  explore_floor: float = 0.2

  def __post_init__(self):
    if self.proposal not in PROPOSALS:
      raise UserError(
        f"controller.proposal={self.proposal!r}"
        f"{did_you_mean(self.proposal, PROPOSALS)}"
      )
    for name in ("hidden", "layers", "fit_steps", "num_candidates", "top_k"):
      if not getattr(self, name) >= 1:
        raise UserError(
          f"controller.{name}={getattr(self, name)} must be at least 1"
        )
    for name, low, high in _RANGES:
      if not low <= getattr(self, name) <= high:
        raise UserError(
          f"controller.{name}={getattr(self, name)} must be within "
          f"{low:g} and {high:g}"
        )
    if self.hidden % 2:
      raise UserError(f"controller.hidden={self.hidden} must be even")
    if self.top_k > self.num_candidates:
      raise UserError(
        f"controller.top_k={self.top_k} must be at most num_candidates="
        f"{self.num_candidates}"
      )

  def check(self, num_configs: int) -> None:
    """Raises `UserError` for bounds that no mixture can keep."""
    low, high = self.min_prob, self.max_prob
    least, most = low * num_configs, high * num_configs
    slack = 1e-6  # 49 * (1 / 49) is less than 1
    if low > high or least > 1 + slack or most < 1 - slack:
      raise UserError(
        f"controller.min_prob={low} and max_prob={high} leave no mixture of "
        f"{num_configs} configurations: min_prob may be at most "
        f"{1 / num_configs:.4g}, max_prob must be at least that"
      )


@flax.struct.dataclass
class ControllerState:
  """Everything that the controller knows; shapes never change.

  Attributes:
    losses, actions, rewards: [e, k], the history: losses before, the mixture
      then in force, the reward it earned.
    count: int32, rows of the history that are filled.
    last_losses: [k], of the last evaluation.
    evaluations: int32, how many there were.
    action: [k], the mixture in force.
    allowed: bool [k]; False where the probability stays 0 for good.
    predicted: [k], the rewards predicted for it; NaN before the first fit.
    params, opt_state: of the reward model.
  """

  losses: jax.Array
  actions: jax.Array
  rewards: jax.Array
  count: jax.Array
  last_losses: jax.Array
  evaluations: jax.Array
  action: jax.Array
  allowed: jax.Array
  predicted: jax.Array
  params: Any
  opt_state: Any


def reward(old: jax.Array, new: jax.Array) -> jax.Array:
  """Rewards of loss changes, within [-1, 1]; improvement is positive.

      d = (old - new) / (old + 1e-8),  s = sqrt(old new)
      r = clip(100 rho tanh(rho s d^3), -1, 1),  rho = e

  Section A.1.3; the formula printed there carries a minus that contradicts
  its own example. What is not a number counts as 0.

  Args:
    old: losses before, any shape.
    new: losses after.
  """
  change = (old - new) / (old + 1e-8)
  scale = jnp.sqrt(old * new)
  value = 100 * SENSITIVITY * jnp.tanh(SENSITIVITY * scale * change**3)
  return jnp.where(jnp.isnan(value), 0.0, jnp.clip(value, -1, 1))


def class_rewards(rewards: jax.Array, classes: Sequence[int]) -> jax.Array:
  """Mean over the configurations of each class, [c]."""
  count = max(classes) + 1
  sums = jax.ops.segment_sum(rewards, jnp.asarray(classes), count)
  return sums / jnp.asarray(np.bincount(classes, minlength=count))


def class_weights(classes: Sequence[int]) -> np.ndarray:
  """w_i = 1 / configurations of i's class: rewards @ w is the class total."""
  return (1 / np.bincount(classes)[list(classes)]).astype(np.float32)


def eval_steps(num_steps: int, schedule: str) -> tuple[int, ...]:
  """The steps to evaluate at, in 1 .. num_steps; the last step is one.

  Args:
    num_steps: of the run.
    schedule: "paper" (10, 50, 250, 500, 1000, 1500, 2000, then every 1000;
      section A.1.4) or a number of steps.

  Raises:
    UserError: for anything else.
  """
  if schedule == "paper":
    steps = [*PAPER_STEPS, *range(3000, num_steps + 1, 1000)]
  elif str(schedule).isdecimal() and int(schedule) > 0:
    steps = list(range(int(schedule), num_steps + 1, int(schedule)))
  else:
    raise UserError(
      f"controller.schedule={schedule!r} must be 'paper' or a number of steps "
      "between evaluations, such as '100'"
    )
  return tuple(sorted({s for s in steps if s <= num_steps} | {num_steps}))


def explore_probability(
  cfg: ControllerConfig, step: int, num_steps: int
) -> float:
  """The chance to explore at `step`; see `ControllerConfig`."""
  share = step / max(num_steps, 1)
  if share < 0.05:
    return cfg.explore_first
  place = min(max((share - 0.1) / 0.4, 0.0), 1.0)
  cosine = (1 + np.cos(np.pi * place)) / 2
  return float(
    cfg.explore_floor + (cfg.explore_start - cfg.explore_floor) * cosine
  )


def init_state(
  cfg: ControllerConfig,
  key: jax.Array,
  *,
  classes: Sequence[int],
  capacity: int,
  probs: Sequence[float] | np.ndarray | None = None,
) -> ControllerState:
  """The state before the first evaluation.

  Args:
    cfg: settings.
    key: of the reward model's parameters.
    classes: the class of each configuration.
    capacity: rows of the history; when it is full, the oldest is dropped.
    probs: [k], the weights of the mixture at the start; class-uniform if None.
      A configuration of weight 0 keeps probability 0.

  Raises:
    UserError: for weights that make no mixture, or bounds that none can keep.
    ValueError: for classes that are not numbered 0, 1, ... without a gap.
  """
  k = len(classes)
  if set(classes) != set(range(max(classes) + 1)):
    raise ValueError(f"classes {sorted(set(classes))} leave numbers out")
  start = class_uniform(classes) if probs is None else normalized(probs)
  if start.shape != (k,):
    raise UserError(
      f"the mixture has {start.size} probabilities for {k} configurations: "
      "give one each"
    )
  cfg.check(int(np.count_nonzero(start)))
  params = reward_model.init(
    key, num_configs=k, hidden=cfg.hidden, layers=cfg.layers
  )
  history = jnp.zeros((capacity, k))
  return ControllerState(
    losses=history,
    actions=history,
    rewards=history,
    count=jnp.zeros((), jnp.int32),
    last_losses=jnp.zeros(k),
    evaluations=jnp.zeros((), jnp.int32),
    action=jnp.asarray(start),
    allowed=jnp.asarray(start > 0),
    predicted=jnp.full(k, jnp.nan, jnp.float32),
    params=params,
    opt_state=_optimizer(cfg).init(params),
  )


def _optimizer(cfg: ControllerConfig):
  return reward_model.make_optimizer(
    lr=cfg.lr,
    weight_decay=cfg.weight_decay,
    clip_norm=cfg.clip_norm,
    cycle=cfg.fit_steps,
  )


def _rows(state: ControllerState) -> jax.Array:
  return jnp.concatenate([state.losses, state.actions], axis=1)


def update(
  cfg: ControllerConfig,
  state: ControllerState,
  losses: np.ndarray,
  *,
  step: int,
  num_steps: int,
  key: jax.Array,
  classes: Sequence[int],
) -> tuple[ControllerState, jax.Array, dict[str, jax.Array]]:
  """What follows from an evaluation.

  Args:
    cfg: settings.
    state: from before.
    losses: [k], the validation loss of each configuration.
    step: of the run.
    num_steps: the run's length.
    key: of this evaluation.
    classes: the class of each configuration.

  Returns:
    `(state, mixture [k], facts)`. The facts, NaN where there are none:
    `reward` [k], `class_reward` [c] and `total_reward` of the mixture that was
    in force; `predicted`, `predicted_class` and `predicted_total`, what had
    been predicted for it; `expected_class` and `expected_total`, what is
    predicted for the new one; `explored`, whether the new one is there to
    explore; `fit_loss` [2], before and after the fit.

  Raises:
    ValueError: for losses of another number of configurations.
  """
  if np.shape(losses) != (len(classes),):
    raise ValueError(
      f"losses have shape {np.shape(losses)}; expected ({len(classes)},)"
    )
  keys = jax.random.split(key, 4)
  explores = jax.random.uniform(keys[0]) < explore_probability(
    cfg, step, num_steps
  )
  return _update(
    cfg,
    tuple(classes),
    state,
    jnp.asarray(losses, jnp.float32),
    keys[1:],
    jnp.asarray(step >= cfg.warmup_end),
    explores,
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(cfg, classes, state, losses, keys, controls, explores):
  # What could not be measured is 0, of which `reward` makes 0; what blew up
  # is large, and costs the full penalty.
  losses = jnp.nan_to_num(losses, nan=0.0, posinf=1e4, neginf=0.0)
  has_last = state.evaluations > 0
  earned = reward(state.last_losses, losses)
  predicted = state.predicted
  state = _remember(state, earned, has_last)
  state, fit_loss = _learn(cfg, state, keys[0])
  behind, _ = reward_model.run(state.params, _rows(state), state.count)
  candidates = propose(
    keys[1],
    state.action,
    allowed=state.allowed,
    classes=classes,
    kind=cfg.proposal,
    count=cfg.num_candidates,
  )
  weights = jnp.asarray(class_weights(classes))
  scores = reward_model.score(state.params, behind, losses, candidates)
  action = jnp.where(
    explores,
    explore(keys[2], state.allowed, classes=classes),
    choose(candidates, scores, weights=weights, top_k=cfg.top_k),
  )
  action = apply_bounds(
    action, cfg.min_prob * state.allowed, cfg.max_prob * state.allowed
  )
  action = jnp.where(controls, action, state.action)
  expected = reward_model.score(state.params, behind, losses, action[None])[0]
  state = dataclasses.replace(
    state,
    last_losses=losses,
    evaluations=state.evaluations + 1,
    action=action,
    predicted=jnp.where(state.count > 0, expected, jnp.nan),
  )
  earned = jnp.where(has_last, earned, jnp.nan)
  facts = {"explored": explores & controls, "fit_loss": fit_loss}
  for name, of_class, total, values in (
    ("reward", "class_reward", "total_reward", earned),
    ("predicted", "predicted_class", "predicted_total", predicted),
    ("expected", "expected_class", "expected_total", state.predicted),
  ):
    facts[name] = values
    facts[of_class] = class_rewards(values, classes)
    facts[total] = values @ weights
  return state, action, facts


def _learn(cfg, state, key) -> tuple[ControllerState, jax.Array]:
  """Fits the reward model to the history, if there is one."""
  optimizer, rows = _optimizer(cfg), _rows(state)

  def fit(params, opt_state):
    return reward_model.fit(
      optimizer,
      params,
      opt_state,
      rows,
      state.rewards,
      state.count,
      key,
      steps=cfg.fit_steps,
      noise=cfg.noise,
    )

  def keep(params, opt_state):
    return params, opt_state, jnp.full(2, jnp.nan, jnp.float32)

  params, opt_state, errors = jax.lax.cond(
    state.count > 0, fit, keep, state.params, state.opt_state
  )
  return dataclasses.replace(state, params=params, opt_state=opt_state), errors


def _remember(state, earned, has_last) -> ControllerState:
  """Appends a row to the history if there is one; drops the oldest if full."""
  capacity = state.losses.shape[0]
  is_full = state.count == capacity

  def put(history, row):
    moved = jnp.where(is_full, jnp.roll(history, -1, axis=0), history)
    place = jnp.minimum(state.count, capacity - 1)
    return jnp.where(has_last, moved.at[place].set(row), history)

  grown = jnp.minimum(state.count + has_last.astype(jnp.int32), capacity)
  return dataclasses.replace(
    state,
    losses=put(state.losses, state.last_losses),
    actions=put(state.actions, state.action),
    rewards=put(state.rewards, earned),
    count=grown,
  )
