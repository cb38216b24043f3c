"""Accuracy and loss of a model by domain."""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.data.loader import Batches
from udim.augment import make_transform
from udim.data import eval_batches
from udim.domains import Domain
from udim.passes import ApplyFn
from udim.splits import RunSplits

PyTree = Any
# So much of all parts stays on the devices between evaluations.
KEPT_BYTES = 2**28
IN_FLIGHT = 4


@dataclasses.dataclass(frozen=True)
class Score:
  """Of one part of the data.

  Attributes:
    accuracy: share of images whose first choice is the label.
    loss: mean cross-entropy in nats.
    count: images.
  """

  accuracy: float
  loss: float
  count: int


Scores = dict[str, Score]


class Evaluator:
  """Scores a model on parts of the data, by running statistics only.

  Args:
    apply_fn: see `udim.models.make_apply_fn`.
    parts: name -> batches of `eval_batches`.
    sharding: where these lie; None for one device.
  """

  def __init__(
    self,
    apply_fn: ApplyFn,
    parts: Mapping[str, Batches],
    sharding: jax.sharding.NamedSharding | None = None,
  ):
    self._parts, left = {}, KEPT_BYTES
    for name, batches in parts.items():
      reader: Any = batches.fetch
      size = len(batches) * reader.batch_bytes
      self._parts[name] = list(batches) if size <= left else batches
      left -= size if size <= left else 0
    self._sums = _sums_of(apply_fn, sharding and sharding.mesh)

  @property
  def names(self) -> tuple[str, ...]:
    """The parts, in order."""
    return tuple(self._parts)

  def __call__(
    self,
    params: PyTree,
    batch_stats: PyTree,
    names: Iterable[str] | None = None,
  ) -> Scores:
    """Evaluates; all processes get the same numbers.

    Args:
      params: the parameters.
      batch_stats: running statistics, {} without any.
      names: which parts; all if None.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    scores = {}
    for name in self.names if names is None else names:
      right, loss, count = self._sums_over(variables, self._parts[name])
      scores[name] = Score(right / count, loss / count, int(count))
    return scores

  def _sums_over(self, variables: PyTree, batches: Iterable) -> np.ndarray:
    """Sums over batches, [3] float64, with few of them in flight: many, each
    with a sum over all devices, starve each other on simulated devices.
    """
    total, pending = np.zeros(3), collections.deque()
    for batch in batches:
      pending.append(self._sums(variables, batch))
      if len(pending) > IN_FLIGHT:
        total += np.asarray(pending.popleft(), np.float64)
    return total + np.sum([np.asarray(p, np.float64) for p in pending], axis=0)


@functools.lru_cache(maxsize=32)
def _sums_of(apply_fn: ApplyFn, mesh: jax.sharding.Mesh | None) -> Any:
  """`(variables, batch) -> [3]`: right answers, losses and images."""
  everywhere = mesh and jax.sharding.NamedSharding(mesh, jax.P())

  @functools.partial(jax.jit, out_shardings=everywhere)
  def sums(variables: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
    _, logits, _ = apply_fn(variables, batch["image"], train=False, rngs=None)
    logits = logits.astype(jnp.float32)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )
    right = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
    # where: a padded row may be anything.
    seen = batch["weight"] > 0
    rows = [right, loss, jnp.ones_like(loss)]
    return jnp.stack([jnp.sum(jnp.where(seen, row, 0)) for row in rows])

  return sums


def make_parts(
  config: Any, splits: RunSplits, sharding: Any = None
) -> dict[str, Batches]:
  """What a run is evaluated on: `role_part/domain` -> batches.

  `source_holdout` selects models; `source_main` is what it trains on;
  `target_main` is reported, `target_holdout` is the oracle's;
  `reference_main` are held-out images like the sources';
  `validation_holdout` the sources' held-out images, changed.
  Empty parts are left out.

  Args:
    config: `data` and `evaluation.batch_size`.
    splits: of one run.
    sharding: where batches go.
  """
  chosen = {
    "source_holdout": [(s.name, s.holdout) for s in splits.sources],
    "source_main": [(s.name, s.main) for s in splits.sources],
    "target_main": [(s.name, s.main) for s in splits.targets],
    "target_holdout": [(s.name, s.holdout) for s in splits.targets],
    "reference_main": [(s.name, s.main) for s in splits.references],
    "validation_holdout": [(s.name, s.holdout) for s in splits.validations],
  }
  transform = make_transform(config.data)
  return {
    f"{role}/{name}": eval_batches(
      part,
      batch_size=min(config.evaluation.batch_size, len(part)),
      transform=transform,
      sharding=sharding,
      workers=_workers_for(part, config),
      threads=config.data.threads,
    )
    for role, parts in chosen.items()
    for name, part in parts
    if len(part)
  }


def _workers_for(part: Domain, config: Any) -> int:
  """Processes of their own do not pay for images that are there already, nor
  for a single batch.
  """
  is_single = len(part) <= config.evaluation.batch_size
  return (
    0 if is_single or part.arrays(np.zeros(1, int)) else config.data.workers
  )


def summary(scores: Mapping[str, Score]) -> dict[str, float]:
  """Scalars to write: means over domains first, then every part.

  `val/` is the mean over the sources' held-out parts, by which models are
  selected; `tuning/accuracy` takes in the changed ones, for hyper-parameters;
  `target/` is the mean over the targets.
  """
  lines = {}
  for title, roles in (
    ("val", ("source_holdout",)),
    ("tuning", ("source_holdout", "validation_holdout")),
    ("target", ("target_main",)),
    ("reference", ("reference_main",)),
  ):
    found = {r: of_role(scores, r) for r in roles}
    if any(found.values()):
      for value in ("accuracy", "loss"):
        means = [
          np.mean([getattr(s, value) for s in f.values()])
          for f in found.values()
          if f
        ]
        lines[f"{title}/{value}"] = float(np.mean(means))
  for name, score in scores.items():
    role, _, domain = name.partition("/")
    lines[f"{role}/accuracy/{domain}"] = score.accuracy
    lines[f"{role}/loss/{domain}"] = score.loss
  return lines


def of_role(scores: Mapping[str, Any], role: str) -> dict[str, Any]:
  """The scores of one role, by domain."""
  return {
    name.removeprefix(f"{role}/"): score
    for name, score in scores.items()
    if name.startswith(f"{role}/")
  }
