"""The stages of slimming: what each prunes, compares and minimizes.

    step_1    prunes the embedding, follows bottlenecks of the original
    step_2    prunes bottlenecks, follows what flows in the student of step 1
    one_step  prunes everything at once and follows the image embedding alone:
              the baseline that alternating is compared with

A stage's loss is a weighted sum of squared errors, and the weights change by
epoch. They and the teachers are given to the step, so that one program serves
all epochs in which features count and another the rest.

Where the original's image embeddings were kept (`slimsam.targets`), the student
is compared with these in every epoch, also where the original runs because its
bottlenecks are followed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from common.metrics import Mean
from common.nn import Array
from common.step import Given, StepChoice
from slimsam import distill
from slimsam.distill import Errors, Model, follow
from slimsam.encoder import Compute, encode
from slimsam.settings import EncoderSettings

PyTree = Any
STAGES = ("step_1", "step_2", "one_step")


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage.

  Attributes:
    name: one of `STAGES`.
    kinds: of groups that are pruned; see `slimsam.groups`.
    compared: what is compared on the way; see `slimsam.distill.COMPARED`.
    terms: of the loss.
    feature_epochs: epochs in which more than the image embedding counts.
    preset: one of `slimsam.distill.PRESETS`.
  """

  name: str
  kinds: tuple[str, ...]
  compared: str
  terms: tuple[str, ...]
  feature_epochs: int
  preset: str

  def weights(self, epoch: int) -> np.ndarray:
    """What the terms are multiplied by, float32."""
    if self.compared == "nothing":
      return np.ones(1, np.float32)
    step = STAGES.index(self.name) + 1
    weights = distill.loss_weights(self.preset, step, epoch)
    return np.asarray(weights, np.float32)


def stage_of(name: str, preset: str, *, intermediate: bool = True) -> Stage:
  """A stage by its name.

  Args:
    name: one of `STAGES`.
    preset: one of `slimsam.distill.PRESETS`.
    intermediate: False compares image embeddings alone.

  Raises:
    UserError: for unknown names.
  """
  if name not in STAGES:
    raise UserError(f"stage {name!r}{did_you_mean(name, STAGES)}")
  kinds = {
    "step_1": ("embedding",),
    "step_2": ("qkv", "mlp"),
    "one_step": ("embedding", "qkv", "mlp"),
  }[name]
  distill.terms_of(preset, 1)  # an unknown preset is refused here
  if name == "one_step" or not intermediate:
    return Stage(name, kinds, "nothing", ("embedding",), 0, preset)
  step = STAGES.index(name) + 1
  return Stage(
    name,
    kinds,
    "bottlenecks" if step == 1 else "embeddings",
    distill.terms_of(preset, step),
    distill.feature_epochs(preset, step),
    preset,
  )


@dataclasses.dataclass(frozen=True)
class Roles:
  """The image encoders of a stage, without their parameters.

  Attributes:
    student: learns.
    original: what everything began with.
    first: the student of step 1, in step 2.
    student_compute, teacher_compute: how they run.
  """

  student: EncoderSettings
  original: EncoderSettings
  first: EncoderSettings | None
  student_compute: Compute
  teacher_compute: Compute


def make_loss(
  stage: Stage, roles: Roles, *, with_features: bool
) -> Callable[[PyTree, Any, Any, Mapping[str, Any]], tuple[Array, Any]]:
  """The loss of a stage.

  Args:
    stage: see `stage_of`.
    roles: the encoders.
    with_features: False for the epochs in which the image embedding is all
      that counts.

  Returns:
    `(params, batch, rngs, given) -> (loss, metrics)`. params: the student's;
    batch: `images` [b size size 3], and `targets` [b g g c] where the
    original's embeddings were kept; given: `weights` of the terms, and the
    parameters of the teachers that run; see `teachers_of`. Metrics: loss, and
    the mean of each term.
  """
  terms = stage.terms if with_features else ("embedding",)

  def loss_fn(
    params: PyTree, batch: Any, rngs: Any, given: Mapping[str, Any]
  ) -> tuple[Array, dict[str, Mean]]:
    del rngs
    student = Model(params, roles.student, roles.student_compute)
    errors = _errors(stage, roles, student, batch, given, with_features)
    weights = given["weights"]
    rows = [errors[name] for name in terms]
    loss = functools.reduce(
      jnp.add, [weights[i] * row for i, row in enumerate(rows)]
    )
    metrics = {name: Mean.of(row) for name, row in zip(terms, rows)}
    return jnp.mean(loss), {"loss": Mean.of(loss), **metrics}

  return loss_fn


def _errors(
  stage: Stage,
  roles: Roles,
  student: Model,
  batch: Any,
  given: Mapping[str, Any],
  with_features: bool,
) -> dict[str, Array]:
  """By term, float32 [b]."""
  images = batch["images"]

  def teacher(name: str) -> Model:
    settings = getattr(roles, name)
    return Model(given[name], settings, roles.teacher_compute)

  def target() -> Array:
    if "targets" in batch:
      return batch["targets"]
    own = teacher("original")
    return jax.lax.stop_gradient(encode(own.params, images, *own[1:]))

  if not with_features:
    out = encode(student.params, images, *student[1:])
    return {"embedding": _error(out, target())}
  followed = "first" if stage.compared == "embeddings" else "original"
  out, found = follow(student, teacher(followed), images, stage.compared)
  errors = {name: own.mean for name, own in found.items()}
  if stage.compared == "embeddings":
    errors["embedding_1"] = errors["embedding"]
    errors["embedding"] = _error(out, target())
  else:
    errors["bottlenecks"] = distill.bottleneck_error(found)
    if "targets" in batch:
      errors["embedding"] = _error(out, target())
  return errors


def _error(out: Array, target: Array) -> Array:
  wide = jnp.promote_types(out.dtype, jnp.float32)
  squares = jnp.square(out.astype(wide) - target.astype(wide))
  total = jnp.sum(squares, axis=tuple(range(1, out.ndim)))
  return Errors(total, int(np.prod(out.shape[1:]))).mean


def teachers_of(
  stage: Stage, *, with_features: bool, kept: bool
) -> tuple[str, ...]:
  """The teachers that run, by their names in `Roles`.

  Args:
    stage: see `stage_of`.
    with_features: see `make_loss`.
    kept: whether batches have the original's embeddings.
  """
  names = set() if kept else {"original"}
  if with_features:
    names.add("first" if stage.compared == "embeddings" else "original")
  return tuple(sorted(names))


def make_programs(
  stage: Stage, make_step: Callable[[Any], Any], roles: Roles
) -> dict[bool, Any]:
  """The jitted steps of a stage, by whether features are compared.

  Args: as for `make_steps`.
  """
  return {
    wanted: make_step(make_loss(stage, roles, with_features=wanted))
    for wanted in (True, False)
  }


def make_steps(
  stage: Stage,
  make_step: Callable[[Any], Any],
  roles: Roles,
  given: Mapping[str, PyTree],
  *,
  steps_per_epoch: int,
  kept: bool = False,
  place: Callable[[PyTree], PyTree] = lambda params: params,
) -> StepChoice:
  """The steps of a stage: the epoch chooses program, weights and teachers.

  Args:
    stage: see `stage_of`.
    make_step: loss -> the jitted step; see `common.step.make_train_step`.
    roles: the encoders.
    given: parameters of `original` and, in step 2, of `first`.
    steps_per_epoch: updates.
    kept: whether batches have the original's embeddings, as `targets`.
    place: puts a teacher's parameters on the devices, before the first step
      that takes them; before the first that does not they are let go of.
  """
  programs = make_programs(stage, make_step, roles)
  held: dict[str, PyTree] = {}

  def choose(done: int) -> Any:
    epoch = done // steps_per_epoch
    wanted = epoch < stage.feature_epochs
    names = teachers_of(stage, with_features=wanted, kept=kept)
    for name in [*held]:
      if name not in names:
        del held[name]
    for name in names:
      if name not in held:
        held[name] = place(given[name])
    weights = stage.weights(epoch)
    seen = {**held, "weights": weights if wanted else weights[:1]}
    return Given(programs[wanted], (seen,))

  return StepChoice(choose)
