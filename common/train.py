"""The one loop. A project brings a step, an iterator and hooks."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from common.state import TrainState
from common.step import Given, StepChoice, StepFn

COMPILE_SECONDS = 1800
Every = int | Callable[[int], bool]


@dataclasses.dataclass(frozen=True)
class StepInfo:
  """What a hook sees.

  Attributes:
    step: updates done so far.
    state: the state after that update.
    metrics: the step's metrics, still on the device.
    data: the iterator that `train` was given.
    batch: the batch of this step, on the device.
    last: whether this is the run's last step.
  """

  step: int
  state: TrainState
  metrics: Mapping[str, Any]
  data: Iterator
  batch: Any = None
  last: bool = False


@runtime_checkable
class Hook(Protocol):
  """A side effect between two steps.

  `every` says when: a number of steps (the last step counts as well), or a
  predicate of the step. A hook may return a state: the loop goes on with it.
  """

  @property
  def every(self) -> Every: ...

  def __call__(self, info: StepInfo) -> TrainState | None: ...


def is_due(every: Every, step: int, *, last: bool) -> bool:
  """Whether a hook with this `every` runs after `step`."""
  if callable(every):
    return every(step)
  return every > 0 and (step % every == 0 or last)


def train(
  state: TrainState,
  step_fn: StepFn | StepChoice,
  data: Iterator,
  *,
  num_steps: int,
  hooks: Sequence[Hook] = (),
  mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
  """Runs `step_fn` until `state.step == num_steps`.

  The order is a contract: pull a batch, step, then the hooks in the order
  given (evaluation before checkpoints), and only then the next batch. So a
  state and a data position that are saved together always agree.

  Re-entrant: it starts from `state.step`, keeps nothing, and may be called
  again with another step function, as multi-stage methods do.

  Args:
    state: where to start; its buffers are donated to the first step.
    step_fn: see `common.step.make_train_step`; a `StepChoice` is asked before
      every step. What is called is jitted, or a `Given`.
    data: an iterator of device batches.
    num_steps: the step to stop at, counted from the state's creation.
    hooks: run in order after every step they are due at.
    mesh: made current while the loop runs.

  Returns:
    The state after the last step.

  Raises:
    StopIteration: never; data that ends early ends the loop with an error
      that names the step.
    ValueError: for a step that cannot be compiled before it is called.
  """
  step, together = int(state.step), _Together()
  context = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
  with context:
    while step < num_steps:
      try:
        batch = next(data)
      except StopIteration as end:
        raise RuntimeError(
          f"the data ended before step {step + 1} of {num_steps}; "
          "repeat the source or lower num_steps"
        ) from end
      function: Any = step_fn
      if isinstance(step_fn, StepChoice):
        function = step_fn.choose(step)
      together(function, state, batch)
      state, metrics = function(state, batch)
      step += 1
      last = step >= num_steps
      for hook in hooks:
        if is_due(hook.every, step, last=last):
          info = StepInfo(step, state, metrics, data, batch, last)
          state = hook(info) or state
  return state


class _Together:
  """On CPUs, lets the processes begin a new program at the same time.

  Gloo gives a process up that is not there after 30 seconds, and on a busy
  machine the compilation of one may be further behind that of another.
  """

  def __init__(self):
    several = jax.process_count() > 1
    self._is_needed = several and jax.default_backend() == "cpu"
    self._seen: set[Any] = set()

  def __call__(self, function: Any, *arguments: Any) -> None:
    if isinstance(function, Given):
      # By itself, so that nothing here holds a teacher that is let go of.
      function, arguments = function.program, (*arguments, *function.constants)
    if not hasattr(function, "lower"):  # one process tells it as well
      raise ValueError(
        f"the step {function!r} has no `lower`: give what jax.jit returns, or "
        "a common.step.Given of it"
      )
    if not self._is_needed:
      return
    leaves, structure = jax.tree.flatten(arguments)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    if (program := (function, structure, shapes)) in self._seen:
      return
    self._seen.add(program)
    import orbax.checkpoint as ocp

    function.lower(*arguments).compile()  # the call then finds it
    ocp.multihost.get_barrier_sync_fn()(
      key="compiled", timeout_ms=1000 * COMPILE_SECONDS
    )
