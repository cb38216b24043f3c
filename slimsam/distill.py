"""What a student learns from its teachers: squared errors, block by block.

# b images, y x rows and columns of patches

SlimSAM prunes in two steps and lets the student follow, after each, what kept
its width (section 3.2):

    step 1  the embedding was pruned: queries, keys, values and hidden layers of
            every block, and the image embedding, equations 5 and 6
    step 2  bottlenecks were pruned: what flows between blocks, against the
            student of step 1, and the image embedding against both, 7 and 8

Teacher and student run side by side and each block's errors are added up at
once: no feature outlives its block, neither forward nor, recomputed, backward.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from common.nn import Array
from slimsam.encoder import Compute, Features, block, embedded, neck
from slimsam.settings import EncoderSettings

PyTree = Any
PRESETS = ("fixed", "paper", "reference")
# What is compared on the way: nothing, what step 1 or what step 2 compares.
COMPARED = ("nothing", "bottlenecks", "embeddings")
_FIRST_EPOCHS = 10  # of step 1 that compare bottlenecks


class Model(NamedTuple):
  """An image encoder and how it runs.

  Attributes:
    params: the encoder's.
    settings: its.
    compute: how it runs.
  """

  params: PyTree
  settings: EncoderSettings
  compute: Compute


class Errors(NamedTuple):
  """Squared errors of images: their sums, and how many numbers each has."""

  total: Array
  count: int

  @property
  def mean(self) -> Array:
    """Float32 [b]."""
    return self.total / self.count


def follow(
  student: Model, teacher: Model, images: Array, compared: str
) -> tuple[Array, dict[str, Errors]]:
  """Runs both, and compares what flows through them.

  Args:
    student: gets gradients; recomputes its blocks in the backward pass.
    teacher: gets none.
    images: float [b size size 3].
    compared: one of `COMPARED`.

  Returns:
    The student's image embedding [b g g c], and by name the errors of each
    image:
      embedding: of the image embedding;
      qkv_windowed, qkv_global, hidden: with `bottlenecks`; the first counts
        what pads windows as well, as the authors do, `qkv_inside` does not;
      features: with `embeddings`, of the patches, and of each block's
        embedding after attention and after the MLP.
  """
  if compared not in COMPARED:
    raise UserError(f"compared={compared!r}{did_you_mean(compared, COMPARED)}")
  cfg = student.settings
  # Nothing in the teacher asks for a gradient.
  teacher = teacher._replace(params=jax.lax.stop_gradient(teacher.params))
  x, y = (embedded(m.params, images, *m[1:]) for m in (student, teacher))
  found: list[dict[str, Errors]] = []
  if compared == "embeddings":
    found.append({"features": _errors(x, y)})
  for i in range(cfg.depth):
    x, y, totals = _run_block(i, student, teacher, x, y, compared)
    counts = _counts(cfg, i, compared)
    found.append({k: Errors(totals[k], counts[k]) for k in totals})
  x, y = (
    neck(m.params["neck"], z, m.compute)
    for m, z in ((student, x), (teacher, y))
  )
  found.append({"embedding": _errors(x, y)})
  return x, _summed(found)


def _run_block(
  index: int, student: Model, teacher: Model, x: Array, y: Array, compared: str
) -> tuple[Array, Array, dict[str, Array]]:
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def run(
    ours: PyTree, theirs: PyTree, x: Array, y: Array
  ) -> tuple[Array, Array, dict[str, Array]]:
    x, mine = block(ours, x, index, *student[1:])
    y, its = block(theirs, y, index, *teacher[1:])
    if compared == "nothing":
      return x, y, {}
    if compared == "embeddings":
      total = _squares(mine.attended, its.attended) + _squares(x, y)
      return x, y, {"features": total}
    pads = _pads(student.settings, index)
    biases = ours["attn"]["qkv"]["bias"], theirs["attn"]["qkv"]["bias"]
    return x, y, _bottlenecks(mine, its, biases, pads)

  blocks = (m.params["blocks"][str(index)] for m in (student, teacher))
  return run(*blocks, x, y)


def _bottlenecks(
  mine: Features, its: Features, biases: tuple[Array, Array], pads: int | None
) -> dict[str, Array]:
  """Sums of squared errors, [b] each.

  Args:
    mine: of the student.
    its: of the teacher.
    biases: of their queries, keys and values: what pads windows.
    pads: how many patches that is in an image; None in a global block.
  """
  qkv = _squares(mine.qkv, its.qkv)
  hidden = _squares(mine.hidden, its.hidden)
  if pads is None:
    return {"hidden": hidden, "qkv_global": qkv}
  padding = pads * jnp.sum(jnp.square(_wide(biases[0]) - _wide(biases[1])))
  return {"hidden": hidden, "qkv_windowed": qkv + padding, "qkv_inside": qkv}


def _pads(cfg: EncoderSettings, index: int) -> int | None:
  """Patches that pad a block's windows; None in a global block."""
  if cfg.is_global(index):
    return None
  side = -(-cfg.grid // cfg.window) * cfg.window
  return side**2 - cfg.grid**2


def _counts(cfg: EncoderSettings, index: int, compared: str) -> dict[str, int]:
  """How many numbers of an image a block's errors are sums of."""
  patches = cfg.grid**2
  if compared == "embeddings":
    return {"features": 2 * patches * cfg.width}
  qkv, pads = 3 * cfg.qkv_widths[index], _pads(cfg, index) or 0
  return {
    "hidden": patches * cfg.mlp_widths[index],
    "qkv_global": patches * qkv,
    "qkv_inside": patches * qkv,
    "qkv_windowed": (patches + pads) * qkv,
  }


def _wide(x: Array) -> Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _squares(x: Array, y: Array) -> Array:
  """Sums of squared differences, [b]."""
  axes = tuple(range(1, x.ndim))
  return jnp.sum(jnp.square(_wide(x) - _wide(y)), axis=axes)


def _errors(x: Array, y: Array) -> Errors:
  return Errors(_squares(x, y), int(np.prod(x.shape[1:])))


def _summed(found: list[dict[str, Errors]]) -> dict[str, Errors]:
  made: dict[str, Errors] = {}
  for own in found:
    for name, one in own.items():
      if name in made:
        one = Errors(made[name].total + one.total, made[name].count + one.count)
      made[name] = one
  return made


def bottleneck_error(errors: Mapping[str, Errors]) -> Array:
  """The one term of the paper's step 1: all features as one vector, [b]."""
  names = ("hidden", "qkv_global", "qkv_inside")
  parts = [errors[name] for name in names if name in errors]
  total = functools.reduce(jnp.add, [part.total for part in parts])
  return total / sum(part.count for part in parts)


def terms_of(preset: str, step: int) -> tuple[str, ...]:
  """The terms of a loss, in the order of `loss_weights`.

  Args:
    preset: `paper`; `reference`, the authors' code; `fixed`, the same with its
      comparison of the student's global blocks with themselves repaired.
    step: 1 or 2.

  Returns:
    Names: `embedding` against the original model, `embedding_1` against the
    student of step 1, and features.

  Raises:
    UserError: for an unknown preset.
  """
  if preset not in PRESETS:
    raise UserError(f"preset={preset!r}{did_you_mean(preset, PRESETS)}")
  if step == 2:
    return ("embedding", "embedding_1", "features")
  if preset == "paper":
    return ("embedding", "bottlenecks")
  middle = ("qkv_global",) if preset == "fixed" else ()
  return ("embedding", "qkv_windowed", *middle, "hidden")


def loss_weights(preset: str, step: int, epoch: int) -> tuple[float, ...]:
  """What the terms of `terms_of` are multiplied by in an epoch, from 0 on.

  Step 1: one half each in the first ten epochs, then the embedding alone. Step
  2: a = (N - n - 1) / N in epoch n < N for what step 1 taught, 1 - a for the
  original embedding; N is 10 in the paper and 11 in the authors' code.
  """
  names = terms_of(preset, step)
  if step == 1:
    early = epoch < _FIRST_EPOCHS
    return (0.5,) * len(names) if early else (1.0,) + (0.0,) * (len(names) - 1)
  total = 10 if preset == "paper" else 11
  a = max(total - epoch - 1, 0) / total
  return (1 - a, a, a)


def feature_epochs(preset: str, step: int) -> int:
  """The first epoch that compares image embeddings alone."""
  if step == 1:
    return _FIRST_EPOCHS
  return (10 if preset == "paper" else 11) - 1
