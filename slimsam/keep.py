"""Which units stay in a stage: importance, then selection."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from common import files
from common.errors import RunError
from common.parallel import to_host
from common.rngs import RngStreams
from slimsam import teacher as teacher_lib
from slimsam.data import PromptedExample, image_batches
from slimsam.encoder import DTYPES, Compute
from slimsam.groups import Groups, encoder_groups, of_kind
from slimsam.importance import (
  accumulate,
  disturbed_loss,
  needs_gradients,
  scores,
)
from slimsam.model import Sam
from slimsam.run import First, Model, Run
from slimsam.select import select_bottlenecks, select_embedding
from slimsam.stages import Stage

log = logging.getLogger(__name__)
PyTree = Any
FILE = "keep.json"


def kept_units(run: Run, stage: Stage, model: Model) -> dict[str, Any]:
  """Units that stay; found once, and kept in the stage's folder."""
  file = run.folder / stage.name / FILE
  if not file.exists():
    made = _select(run, stage, model)
    file.parent.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      plain = {name: [int(i) for i in units] for name, units in made.items()}
      files.replace(file, json.dumps(plain) + "\n")
    return made
  return files.read_json(file)


def _select(run: Run, stage: Stage, model: Model) -> dict[str, Any]:
  cfg, heads = run.config.prune, model.settings.encoder.heads
  groups = encoder_groups(model.settings)
  names = [n for kind in stage.kinds for n in of_kind(groups, kind)]
  groups = {name: groups[name] for name in names}
  found = _scores(run, stage, model, groups)
  keep: dict[str, Any] = {}
  if "embedding" in found:
    keep["embedding"] = select_embedding(
      found.pop("embedding"), cfg.ratio, heads, by_residue=cfg.by_residue
    )
  if found:
    keep |= select_bottlenecks(
      found,
      cfg.ratio,
      heads,
      scope=cfg.scope,
      normalization=cfg.normalization,
      min_keep=cfg.min_keep,
    )
  return keep


def _scores(
  run: Run, stage: Stage, model: Model, groups: Groups
) -> dict[str, Any]:
  cfg, kind = run.config.importance, run.config.importance.kind
  sums = None
  if needs_gradients(kind):
    log.info("%s: importance of %d images", stage.name, cfg.images)
    key = RngStreams(run.config.seed, ("importance",))(0)["importance"]
    with jax.set_mesh(run.mesh):
      sums = accumulate(
        *_importance(run, model), groups, _images(run, model), key
      )
    sums = to_host(sums)
  found = scores(kind, model.params, groups, sums=sums, seed=run.config.seed)
  for name, values in found.items():
    if not np.all(np.isfinite(values)):
      raise RunError(
        f"{stage.name}: {kind!r} scores of {name} are not finite: look at the "
        "model's weights, or set distill.dtype='float32'"
      )
  return found


def _importance(run: Run, model: Model) -> tuple[Any, PyTree]:
  """The loss whose gradients count, and the parameters on the mesh."""
  cfg = run.config.distill
  compute = Compute(DTYPES[cfg.dtype], cfg.remat)
  if run.config.importance.kind != "taylor":
    loss = disturbed_loss(
      model.settings, compute, sigma=run.config.importance.sigma
    )
    return loss, run.placed({"image_encoder": model.encoder})
  by_mask = teacher_lib.make_loss_fn(Sam(model.settings, compute))

  def taylor(params: PyTree, batch: Any, key: Any) -> Any:
    del key
    return by_mask(params, batch, {})[1]["loss"].total

  return taylor, run.placed(model.params)


def _images(run: Run, model: Model) -> Iterator[Any]:
  """Batches of the images that importance is found with."""
  cfg, encoder = run.config.importance, model.settings.encoder
  source = First(First(run.train, run.config.data.images), cfg.images)
  if cfg.kind != "taylor":
    yield from image_batches(
      source, encoder.image_size, rows=cfg.rows, sharding=run.sharding,
      threads=run.config.data.threads,
    )  # fmt: skip
    return
  example = PromptedExample(
    encoder.image_size, encoder.grid, run.config.teacher.prompts
  )
  with run.loader(source, example, cfg.rows) as loader:
    for _ in range(max(len(source) // cfg.rows, 1)):
      yield next(loader)
