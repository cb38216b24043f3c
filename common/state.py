"""The training state: arrays only."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

PyTree = Any


@flax.struct.dataclass
class TrainState:
  """What a step maps to its successor. Arrays only, so that `eval_shape`,
  sharding, checkpoints and donation treat it as one tree.

  Attributes:
    step: int32 scalar, the number of updates done.
    params: the parameters, a plain dict tree.
    opt_state: the optimizer's state.
    extra: a method's own arrays, such as Birdie's controller.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  extra: PyTree = flax.struct.field(default_factory=dict)

  @classmethod
  def create(
    cls,
    params: PyTree,
    tx: optax.GradientTransformation,
    extra: PyTree | None = None,
  ) -> "TrainState":
    """Returns the state at step 0. Traceable: jit it to create it sharded."""
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=tx.init(params),
      extra={} if extra is None else extra,
    )
