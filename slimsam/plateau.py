"""The learning rate is halved where validation stops improving."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.state import TrainState
from common.train import Every, StepInfo


class FactorState(NamedTuple):
  """State of `scale_by_factor`.

  Attributes:
    factor: float32 scalar.
  """

  factor: jax.Array


def scale_by_factor() -> optax.GradientTransformation:
  """Multiplies updates by a number in its state, 1 until somebody changes it.

  To be put at the end of a chain: it is then a factor of the learning rate.
  """

  def init(params: Any) -> FactorState:
    del params
    return FactorState(jnp.ones((), jnp.float32))

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    del params
    scaled = jax.tree.map(lambda u: u * state.factor.astype(u.dtype), updates)
    return scaled, state

  return optax.GradientTransformation(init, update)


def with_factor(opt_state: Any, times: float) -> Any:
  """An optimizer's state with its factor multiplied."""

  def change(own: Any) -> Any:
    if isinstance(own, FactorState):
      return FactorState(own.factor * times)
    return own

  return jax.tree.map(
    change, opt_state, is_leaf=lambda own: isinstance(own, FactorState)
  )


class HalveOnPlateau:
  """Halves the learning rate after some measurements without a gain.

  The rule of torch's `ReduceLROnPlateau`, which the authors use: a gain is
  above the best so far by a ten-thousandth of it; what is more than `patience`
  measurements without one halves the rate, and counts anew.

  Args:
    every: when; after the hook that measures.
    measure: step -> the value, larger is better; None where there is none.
    patience: measurements without a gain that are borne.
  """

  def __init__(
    self,
    every: Every,
    measure: Callable[[int], float | None],
    *,
    patience: int,
  ):
    self.every = every
    self._measure = measure
    self._patience = patience
    self._best = -np.inf
    self._bad = 0
    self._halved = 0

  @property
  def halved(self) -> int:
    """How often."""
    return self._halved

  def __call__(self, info: StepInfo) -> TrainState | None:
    value = self._measure(info.step)
    if value is None:
      return None
    if value > self._best + 1e-4 * abs(self._best) or self._best == -np.inf:
      self._best, self._bad = value, 0
      return None
    self._bad += 1
    if self._bad <= self._patience:
      return None
    self._bad = 0
    self._halved += 1
    opt_state = with_factor(info.state.opt_state, 0.5)
    return dataclasses.replace(info.state, opt_state=opt_state)

  def get_state(self) -> dict[str, float | None]:
    best = None if self._best == -np.inf else float(self._best)
    return {"best": best, "bad": self._bad, "halved": self._halved}

  def set_state(self, state: Mapping[str, Any]) -> None:
    self._best = -np.inf if state["best"] is None else state["best"]
    self._bad, self._halved = int(state["bad"]), int(state["halved"])
