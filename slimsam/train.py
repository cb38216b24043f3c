"""Trains a teacher, slims it in stages, and leaves a smaller model."""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from common import files
from common.optim import make_optimizer
from common.parallel import (
  abstract_sharded,
  from_host,
  init_sharded,
  to_host,
  wait_for_all,
)
from common.places import taken
from common.rngs import RngStreams
from common.state import TrainState
from common.step import make_train_step
from common.workdir import check_shared
from slimsam import teacher as teacher_lib
from slimsam import weights
from slimsam.checks import check, check_local
from slimsam.data import ImageExample, PromptedExample, TargetExample
from slimsam.encoder import DTYPES, Compute
from slimsam.init import init_params
from slimsam.keep import kept_units
from slimsam.model import RULES, Sam
from slimsam.parts import Part, best_params, fit
from slimsam.plateau import HalveOnPlateau, scale_by_factor
from slimsam.prune import prune_model
from slimsam.report import PRUNED, part_report, write_page
from slimsam.run import MODEL, First, Measure, Model, Run, alone
from slimsam.settings import DecoderSettings, SamSettings, uniform
from slimsam.stages import Roles, Stage, make_steps
from slimsam.targets import fingerprint, kept_targets

log = logging.getLogger(__name__)
PyTree = Any
EXPORTS = {"native": MODEL, "hf": "model_hf", "pth": "model.pth"}


def train_and_evaluate(config: Any, workdir: str | os.PathLike) -> Model:
  """Runs all of it, or on from where the folder left off.

  Args:
    config: see `configs/slimsam.py`.
    workdir: the run's folder. Each training has one below it, which holds what
      any run's folder holds; `report.md` here tells of all of them.

  Returns:
    The slimmed model.
  """
  stages = check(config)
  check_local(workdir)
  folder = epath.Path(workdir)
  with taken(folder):
    check_shared(folder)
    return train_stages(Run(config, pathlib.Path(workdir)), stages)


def train_stages(run: Run, stages: Sequence[Stage]) -> Model:
  """The same, in a folder that is held already."""
  config = run.config
  log.info(
    "data        %s: %s images to train on, %s to judge by",
    config.data.source.kind, f"{len(run.train):,}", f"{len(run.valid):,}",
  )  # fmt: skip
  model = original = original_model(run)
  for stage in stages:
    model = slimmed(run, stage, model, original)
  # Every process judges the original, so that none waits long for the first.
  scores = run.measure(original)(original.encoder, original.settings)
  if jax.process_index() == 0:
    for form in config.export:
      path = run.folder / EXPORTS[form]
      weights.save(form, path, model.params, model.settings)
    names = [stage.name for stage in stages]
    log.info("report: %s", write_page(run, original, names, scores))
  wait_for_all("exported")
  return model


def original_model(run: Run) -> Model:
  """The teacher: from its file, or trained."""
  cfg = run.config.teacher
  if cfg.path:
    return Model.load(cfg.path)
  folder = run.folder / "teacher"
  if not (folder / MODEL / "settings.json").exists():
    settings = teacher_settings(cfg)
    part = _teacher_part(run, settings)
    fit(run.config, folder, part)
    _, params = best_params(folder, part.best)
    _save(folder, params, settings)
  return Model.load(folder / MODEL)


def slimmed(run: Run, stage: Stage, model: Model, original: Model) -> Model:
  """A smaller model: scored, pruned, trained.

  Args:
    run: data and devices.
    stage: what is pruned and followed.
    model: that is pruned; in step 2 the student of step 1.
    original: what everything began with.
  """
  folder = run.folder / stage.name
  if not (folder / MODEL / "settings.json").exists():
    example = _example(run, original)
    cfg, measure = run.config.prune, run.measure(original)
    params, settings = prune_model(
      model.params,
      model.settings,
      kept_units(run, stage, model),
      rel_pos=cfg.rel_pos,
      fold_scale=cfg.fold_scale,
    )
    pruned = Model(jax.tree.map(np.asarray, params), settings)
    if not (folder / PRUNED).exists():
      # By all: who waits for another in a collective is given up for dead.
      judged = measure(pruned.encoder, settings)
      if jax.process_index() == 0:
        files.write_json(folder / PRUNED, judged)
    part = _stage_part(run, stage, pruned, model, original, example, measure)
    fit(run.config, folder, part)
    _, encoder = best_params(folder, part.best)
    _save(folder, original.with_encoder(encoder), settings)
  return Model.load(folder / MODEL)


def _save(folder: pathlib.Path, params: PyTree, settings: SamSettings) -> None:
  if jax.process_index() == 0:
    weights.save_model(folder / MODEL, params, settings)
  wait_for_all(f"saved {folder.name}")


def teacher_settings(cfg: Any) -> SamSettings:
  """The sizes of a teacher that is to be trained."""
  return uniform(
    width=cfg.width,
    depth=cfg.depth,
    heads=cfg.heads,
    mlp_width=cfg.mlp_width,
    global_blocks=cfg.global_blocks,
    image_size=cfg.image_size,
    patch=cfg.patch,
    window=cfg.window,
    out=cfg.out,
    decoder=DecoderSettings(
      heads=cfg.decoder_heads,
      mlp_width=cfg.decoder_mlp_width,
      iou_width=cfg.out,
    ),
  )


def teacher_optimizer(cfg: Any) -> tuple[Any, Callable[[int], Any]]:
  """The optimizer of a teacher that is trained, and its rate by the step."""
  frozen = {"frozen": (r"prompt_encoder/gaussian$",)}
  return make_optimizer(cfg.optim.to_dict() | frozen, cfg.num_steps)


def _teacher_part(run: Run, settings: SamSettings) -> Part:
  cfg, encoder, sam = run.config.teacher, settings.encoder, Sam(settings)
  tx, rate = teacher_optimizer(cfg)
  judge = run.evaluator()

  def init(key: jax.Array) -> TrainState:
    return TrainState.create(init_params(settings, key), tx)

  def evaluate(params: PyTree) -> Mapping[str, float]:
    params = to_host(params)
    with alone():
      return judge(params, sam).scalars()

  example = PromptedExample(encoder.image_size, encoder.grid, cfg.prompts)
  key = jax.random.key(run.config.seed)
  return Part(
    name="teacher",
    num_steps=cfg.num_steps,
    every=cfg.every,
    # There is no teacher of the teacher: true masks stand for its masks.
    best=run.config.evaluation.best.replace("/teacher/", "/gt/"),
    mesh=run.mesh,
    rows=cfg.rows,
    create=lambda: init_sharded(init, run.mesh, RULES, key),
    abstract=abstract_sharded(init, run.mesh, RULES, key),
    steps=make_train_step(
      teacher_lib.make_loss_fn(sam), tx, RngStreams(run.config.seed)
    ),
    loader=run.loader(run.train, example, cfg.rows),
    evaluate=evaluate,
    learning_rate=rate,
    facts=run.facts,
    report=part_report("teacher", ()),
  )


def _example(run: Run, original: Model) -> ImageExample | TargetExample:
  size = original.settings.encoder.image_size
  if not run.config.distill.cache_targets:
    return ImageExample(size)
  return TargetExample(size, kept_targets(run, original))


def stage_optimizer(
  cfg: Any, num_steps: int
) -> tuple[Any, Callable[[int], Any]]:
  """The optimizer of a stage, and its rate by the step."""
  tx, rate = make_optimizer(cfg.optim.to_dict(), num_steps)
  return optax.chain(tx, scale_by_factor()), rate


def _stage_part(
  run: Run,
  stage: Stage,
  pruned: Model,
  first: Model,
  original: Model,
  example: ImageExample | TargetExample,
  measure: Measure,
) -> Part:
  cfg, settings = run.config.distill, pruned.settings
  source = First(run.train, run.config.data.images)
  rows, evaluation = run.config.data.rows, run.config.evaluation
  per_epoch = max(len(source) // rows, 1)
  every = evaluation.every * per_epoch
  num_steps = cfg.epochs * per_epoch
  tx, rate = stage_optimizer(cfg, num_steps)

  def init(key: jax.Array) -> TrainState:
    del key
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape), pruned.encoder)
    return TrainState.create(zeros, tx)

  def create() -> TrainState:
    state = init_sharded(init, run.mesh, RULES, key)
    params = from_host(pruned.encoder, state.params)
    return dataclasses.replace(state, params=params)

  key = jax.random.key(run.config.seed)
  make_step = functools.partial(
    make_train_step, tx=tx, streams=RngStreams(run.config.seed), accum=cfg.accum
  )
  return Part(
    name=stage.name,
    num_steps=num_steps,
    every=every,
    best=evaluation.best,
    mesh=run.mesh,
    rows=rows,
    create=create,
    abstract=abstract_sharded(init, run.mesh, RULES, key),
    steps=make_steps(
      stage,
      make_step,
      make_roles(cfg, stage, settings, first.settings, original.settings),
      {"original": original.encoder, "first": first.encoder},
      steps_per_epoch=per_epoch,
      kept=cfg.cache_targets,
      place=run.teacher,
    ),
    loader=run.loader(source, example, rows),
    evaluate=lambda params: measure(to_host(params), settings),
    learning_rate=rate,
    facts=run.facts | {"teacher_hash": fingerprint(original)},
    report=part_report(stage.name, stage.terms),
    more=_plateau(every, evaluation.best, cfg.patience),
  )


def _plateau(
  every: int, best: str, patience: int
) -> Callable[[Any], Mapping[str, Any]]:
  def more(evaluation: Any) -> Mapping[str, Any]:
    def value(step: int) -> float | None:
      del step
      return evaluation.latest.get(best)

    return {"plateau": HalveOnPlateau(every, value, patience=patience)}

  return more


def make_roles(
  cfg: Any,
  stage: Stage,
  student: SamSettings,
  first: SamSettings,
  original: SamSettings,
) -> Roles:
  """The encoders of a stage.

  Args:
    cfg: `config.distill`.
    stage: see `slimsam.stages.stage_of`.
    student: sizes of the pruned model.
    first: of the model that was pruned.
    original: of what everything began with.
  """
  return Roles(
    student.encoder,
    original.encoder,
    first.encoder if stage.name == "step_2" else None,
    Compute(DTYPES[cfg.dtype], cfg.remat),
    Compute(DTYPES[cfg.teacher_dtype]),
  )
