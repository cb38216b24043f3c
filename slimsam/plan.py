"""The programs of a run, for `--plan`."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from common.parallel import abstract_sharded, make_mesh, replicated
from common.plan import Program, abstract_batch
from common.rngs import RngStreams
from common.state import TrainState
from common.step import make_train_step
from slimsam.checks import check
from slimsam.data import rows_sharding
from slimsam.init import init_encoder, init_params
from slimsam.model import RULES, Sam
from slimsam.run import as_teacher
from slimsam.select import pruned_widths
from slimsam.settings import SamSettings
from slimsam.stages import Stage, make_programs, teachers_of
from slimsam.teacher import make_loss_fn
from slimsam.train import (
  make_roles,
  stage_optimizer,
  teacher_optimizer,
  teacher_settings,
)
from slimsam.weights import load_settings

Shapes = dict[str, tuple[tuple[int, ...], Any]]
KEY = jax.eval_shape(lambda: jax.random.key(0))


def programs(config: Any) -> Iterator[Program]:
  """The steps of the teacher, where it is trained, and of every stage.

  No image is read, and of a teacher that is given only its sizes. Which units
  will stay is not known yet; the widths are those of the local rule.

  Args:
    config: see `configs/slimsam.py`.
  """
  stages = check(config)
  mesh = make_mesh(config.mesh.to_dict())
  cfg = config.teacher
  original = load_settings(cfg.path) if cfg.path else teacher_settings(cfg)
  if not cfg.path:
    yield _teacher(config, original, mesh)
  current = original
  for stage in stages:
    pruned = pruned_widths(current, config.prune.ratio, stage.kinds)
    yield from _stage(config, mesh, stage, pruned, current, original)
    current = pruned


def _teacher(config: Any, settings: SamSettings, mesh: Any) -> Program:
  cfg, encoder = config.teacher, settings.encoder
  tx, _ = teacher_optimizer(cfg)
  side, places = 4 * encoder.grid, (cfg.rows, cfg.prompts)
  batch: Shapes = {
    "points": ((*places, 2), np.float32),
    "boxes": ((*places, 4), np.float32),
    "masks": ((*places, side, side), np.float32),
    "valid": (places, np.float32),
  }
  return Program(
    name="teacher",
    step=make_train_step(
      make_loss_fn(Sam(settings)), tx, RngStreams(config.seed)
    ),
    state=abstract_sharded(
      lambda key: TrainState.create(init_params(settings, key), tx),
      mesh,
      RULES,
      KEY,
    ),
    batch=abstract_batch(
      rows_sharding(mesh), _images(cfg.rows, settings) | batch
    ),
    mesh=mesh,
  )


def _stage(
  config: Any,
  mesh: Any,
  stage: Stage,
  pruned: SamSettings,
  first: SamSettings,
  original: SamSettings,
) -> Iterator[Program]:
  cfg, rows = config.distill, config.data.rows
  tx, _ = stage_optimizer(cfg, cfg.epochs)  # the rate changes no shape
  steps = make_programs(
    stage,
    functools.partial(
      make_train_step, tx=tx, streams=RngStreams(config.seed), accum=cfg.accum
    ),
    make_roles(cfg, stage, pruned, first, original),
  )
  batch = _images(rows, original)
  if cfg.cache_targets:
    grid = original.encoder.grid
    batch["targets"] = ((rows, grid, grid, original.encoder.out), np.float32)
  state = abstract_sharded(
    lambda key: TrainState.create(init_encoder(pruned.encoder, key), tx),
    mesh,
    RULES,
    KEY,
  )
  teachers = {"original": original, "first": first}
  for wanted in (True, False):
    if wanted and not stage.feature_epochs:
      continue
    if not wanted and stage.feature_epochs >= cfg.epochs:
      continue
    names = teachers_of(stage, with_features=wanted, kept=cfg.cache_targets)
    weights = stage.weights(0) if wanted else stage.weights(0)[:1]
    given = {name: _followed(teachers[name], mesh, cfg) for name in names}
    given["weights"] = jax.ShapeDtypeStruct(
      weights.shape, weights.dtype, sharding=replicated(mesh)
    )
    yield Program(
      name=stage.name if wanted else f"{stage.name}, embedding alone",
      step=steps[wanted],
      state=state,
      batch=abstract_batch(rows_sharding(mesh), batch),
      mesh=mesh,
      constants=(given,),
    )


def _followed(settings: SamSettings, mesh: Any, cfg: Any) -> Any:
  """Shapes of an image encoder that is followed, where the mesh has them."""
  return abstract_sharded(
    lambda key: as_teacher(
      init_encoder(settings.encoder, key), cfg.teacher_dtype
    ),
    mesh,
    RULES,
    KEY,
  )


def _images(rows: int, settings: SamSettings) -> Shapes:
  size = settings.encoder.image_size
  return {
    "images": ((rows, size, size, 3), np.float32),
    "ids": ((rows,), np.int32),
  }
