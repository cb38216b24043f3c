"""Learning rates over a run: warm-up, then cosine, linear, rsqrt, constant."""

import jax.numpy as jnp
import optax

from common.config import did_you_mean
from common.errors import UserError

SCHEDULES = ("cosine", "linear", "rsqrt", "constant")


def make_schedule(
  name: str,
  *,
  lr: float,
  num_steps: int,
  warmup_steps: int = 0,
  final_ratio: float = 0.0,
) -> optax.Schedule:
  """Linear warm-up from 0 to `lr`, then a decay.

  The schedule's argument is the number of updates done: with a warm-up the
  first update has a rate of 0, and the update after `warmup_steps` others has
  `lr`.

  Args:
    name: "cosine" and "linear" reach `final_ratio * lr` at `num_steps`;
      "rsqrt" is lr * sqrt(w / max(step, w)) with w the warm-up (at least 1),
      and never below that floor; "constant" stays.
    lr: the peak.
    num_steps: the run's length.
    warmup_steps: steps until the peak.
    final_ratio: the floor, as a part of `lr`.

  Returns:
    A function of the step, usable inside jit.

  Raises:
    UserError: for an unknown name, a warm-up longer than the run or a floor
      above the peak.
  """
  if name not in SCHEDULES:
    raise UserError(f"optim.schedule={name!r}{did_you_mean(name, SCHEDULES)}")
  if not 0 <= warmup_steps <= num_steps:
    raise UserError(
      f"optim.warmup_steps={warmup_steps} must be between 0 and the run's "
      f"{num_steps} steps"
    )
  if not 0 <= final_ratio <= 1:
    raise UserError(f"optim.final_ratio={final_ratio} must be from 0 to 1")
  rest = max(num_steps - warmup_steps, 1)
  if name == "cosine":
    decay = optax.cosine_decay_schedule(lr, rest, alpha=final_ratio)
  elif name == "linear":
    decay = optax.linear_schedule(lr, lr * final_ratio, rest)
  elif name == "constant":
    decay = optax.constant_schedule(lr)
  else:
    decay = _rsqrt(lr, max(warmup_steps, 1), final_ratio)
  if not warmup_steps:
    return decay
  warmup = optax.linear_schedule(0.0, lr, warmup_steps)
  return optax.join_schedules([warmup, decay], [warmup_steps])


def _rsqrt(lr: float, timescale: int, final_ratio: float):
  def schedule(step):  # counted from the end of the warm-up
    ratio = jnp.sqrt(timescale / (timescale + jnp.asarray(step, jnp.float32)))
    return lr * jnp.maximum(ratio, final_ratio)

  return schedule
