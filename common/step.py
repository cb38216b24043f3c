"""The train step: gradients, accumulation, update, norms. One jit."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from common.metrics import Mean
from common.rngs import RngStreams
from common.state import TrainState
from common.tree import global_norm

PyTree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, Any]  # `Mean`s, and `Digest`s of what devices compare
# Further metrics that follow from a step's gradients.
GradMetrics = Callable[[PyTree], Metrics]
LossFn = Callable[
  [PyTree, Batch, dict[str, jax.Array]], tuple[jax.Array, Metrics]
]
StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class StepChoice:
  """Several compiled steps; the host chooses one by the number of the step.

  For methods that do more work in some steps than in others: a branch inside
  one program would reserve memory for both sides, and XLA compiles
  convolutions in branches badly on the CPU.

  Attributes:
    choose: updates done so far -> the step function for the next one, jitted or
      a `Given`.
  """

  choose: Callable[[int], StepFn]


@dataclasses.dataclass(frozen=True)
class Given:
  """A jitted step with what it is given besides state and batch.

  Two are equal that run the same program.

  Attributes:
    program: see `make_train_step`.
    constants: arrays, such as a teacher's parameters.
  """

  program: Any
  constants: tuple[PyTree, ...] = dataclasses.field(compare=False)

  def __call__(self, state: TrainState, batch: Batch) -> Any:
    return self.program(state, batch, *self.constants)

  def lower(self, state: TrainState, batch: Batch) -> Any:
    """As `jax.jit` has it, for who compiles before the first call."""
    return self.program.lower(state, batch, *self.constants)


def make_train_step(
  loss_fn: LossFn | Callable,
  tx: optax.GradientTransformation,
  streams: RngStreams,
  *,
  accum: int = 1,
  grad_metrics: GradMetrics | None = None,
) -> StepFn:
  """Makes the jitted step `(state, batch) -> (state, metrics)`.

  The state is donated. Besides the loss function's metrics the step reports
  `grad_norm` (before any clipping), `update_norm` and `param_norm`.

  With `accum > 1` the batch's first axis is cut into that many micro-batches,
  one after the other, and the gradient is that of the *whole* batch's mean:

      g = sum_i n_i * grad(loss_i) / sum_i n_i,   n_i = metrics["loss"].count

  so a micro-batch with few target tokens counts for as little as it should.

  Args:
    loss_fn: `(params, batch, rngs) -> (loss, metrics)`; `metrics["loss"]` is
      the `Mean` whose value is the loss and whose count is its weight.
    tx: the optimizer.
    streams: random streams; micro-batch `i` sees each key folded with `i`.
    accum: number of micro-batches; divides the batch's first axis.
    grad_metrics: gradients -> what else to report.

  Returns:
    The step function. Its first call compiles, later ones do not. What it is
    given besides state and batch, such as a teacher's parameters, goes to the
    loss: such arrays are neither saved nor compiled in.

  Raises:
    ValueError: from the first call, when `accum` does not divide the batch.
  """

  def step(
    state: TrainState, batch: Batch, *constants: PyTree
  ) -> tuple[TrainState, Metrics]:
    rngs = streams(state.step)
    gradient = jax.grad(_weighted(loss_fn, *constants), has_aux=True)
    if accum == 1:
      grads, metrics = gradient(state.params, batch, rngs)
    else:
      grads, metrics = _accumulate(
        gradient, state.params, _split(batch, accum), rngs
      )
    weight = jnp.maximum(metrics["loss"].count, 1e-9)
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = metrics | {
      "grad_norm": Mean.of(global_norm(grads)),
      "update_norm": Mean.of(global_norm(updates)),
      "param_norm": Mean.of(global_norm(params)),
    }
    if grad_metrics is not None:
      metrics |= grad_metrics(grads)
    new_state = dataclasses.replace(
      state, step=state.step + 1, params=params, opt_state=opt_state
    )
    return new_state, metrics

  return jax.jit(step, donate_argnums=0)


def _weighted(loss_fn: Callable, *constants: PyTree):
  """`loss * count`: its gradients add up over micro-batches."""

  def weighted(params, batch, rngs):
    loss, metrics = loss_fn(params, batch, rngs, *constants)
    count = jax.lax.stop_gradient(metrics["loss"].count)
    return loss * count.astype(loss.dtype), metrics

  return weighted


def _split(batch: Batch, accum: int) -> Batch:
  """[B, ...] -> [accum, B / accum, ...], rows dealt round so that every
  micro-batch spans all data shards.
  """

  def split(x: jax.Array) -> jax.Array:
    if x.shape[0] % accum:
      raise ValueError(
        f"accum={accum} does not divide the batch's {x.shape[0]} rows; "
        "choose a divisor"
      )
    x = x.reshape(x.shape[0] // accum, accum, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1)

  return jax.tree.map(split, batch)


def _accumulate(gradient, params: PyTree, batches: Batch, rngs):
  """Sums gradients and metrics over the leading axis of `batches`."""

  def one(i, batch):
    keys = {name: jax.random.fold_in(key, i) for name, key in rngs.items()}
    return gradient(params, batch, keys)

  def body(carry, indexed):
    return jax.tree.map(jnp.add, carry, one(*indexed)), None

  count = jax.tree.leaves(batches)[0].shape[0]
  shapes = jax.eval_shape(one, 0, jax.tree.map(lambda x: x[0], batches))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, _ = jax.lax.scan(body, zeros, (jnp.arange(count), batches))
  return total
