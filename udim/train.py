"""Trains a classifier on some domains and watches it on others."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import hooks as hooks_lib
from common.config import check_keys, did_you_mean, flatten
from common.errors import UserError
from common.optim import make_optimizer, swad
from common.optim.averaging import Swad
from common.parallel import (
  abstract_sharded,
  batch_sharding,
  from_host,
  init_sharded,
  make_mesh,
  startup_report,
  to_host,
)
from common.progress import ProgressBar
from common.report import write_report
from common.state import TrainState
from common.step import StepChoice
from common.train import train
from common.workdir import Workdir
from udim.algorithms import (
  Algorithm,
  averaged,
  make_algorithm,
  make_steps,
  split_name,
)
from udim.augment import make_transform
from udim.data import train_loader, train_sharding
from udim.domains import DomainSet, load_domains
from udim.models import RULES, init_variables, make_apply_fn, make_model
from udim.objectives import NEEDS_DOMAINS
from udim.passes import ApplyFn
from udim.report import make_spec
from udim.scores import Evaluator, make_parts
from udim.splits import Run, RunSplits, make_runs, split_run
from udim.validation import EvaluationHook, first_best

log = logging.getLogger(__name__)
PyTree = Any

# Keys that may change when a run is resumed: the batches stay the same, and so
# do all numbers, but for the order of sums on another mesh. `compare` and
# `search` say which runs there are, not what one of them does.
FREE = ("log", "checkpoint", "profile", "compile_cache", "data.workers",
        "data.threads", "data.prefetch", "data.source.max_pixels",
        "data.source.follow_links", "mesh", "compare",
        "search")  # fmt: skip

# Settings that count something, with the least that makes sense.
_LEAST = {
  "num_steps": 1, "accum": 1, "sources_limit": 0, "data.images_per_domain": 1,
  "data.workers": 0, "data.threads": 0, "data.prefetch": 0,
  "evaluation.every": 1, "evaluation.batch_size": 1, "log.every": 1,
  "checkpoint.every": 0, "checkpoint.keep": 1, "profile.start": 0,
  "profile.count": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a configuration describes, before anything is trained.

  Attributes:
    image_shape: (height, width, channels), as the network sees them.
    run: which domains train and which test.
    splits: their parts.
    averager: SWAD, or None.
    create: makes the state of step 0, sharded.
    abstract: its shapes, dtypes and shardings.
  """

  domain_set: DomainSet
  image_shape: tuple[int, ...]
  run: Run
  splits: RunSplits
  apply_fn: ApplyFn
  mesh: jax.sharding.Mesh
  algorithm: Algorithm
  averager: Swad | None
  learning_rate: Callable[[int], Any]
  create: Callable[[], TrainState]
  abstract: TrainState


def make_setup(config: Any, domain_set: DomainSet | None = None) -> Setup:
  """Builds data splits, model, algorithm and state from a configuration.

  Args:
    config: see `configs/udim.py`.
    domain_set: the data, if it has been loaded before.

  Raises:
    UserError: for values without a meaning, unknown names, data that is
      missing or bad, a batch that does not fit the mesh.
  """
  check_values(config)
  mesh = make_mesh(config.mesh.to_dict())
  tx, learning_rate = make_optimizer(config.optim, config.num_steps)
  averager = swad(**config.swad) if split_name(config.algorithm)[1] else None
  domain_set = domain_set or load_domains(config.data.source)
  model = make_model(config.model, len(domain_set.classes))
  apply_fn = make_apply_fn(model)
  _check_weights(config.model)
  algorithm = make_algorithm(config, apply_fn, tx)
  run = chosen_run(config, domain_set)
  if algorithm.name in NEEDS_DOMAINS and len(run.sources) < 2:
    raise UserError(
      f"algorithm={config.algorithm!r} compares source domains, and there is "
      f"one, {run.sources[0]!r}: choose another algorithm or more sources"
    )
  splits = split_run(
    domain_set, run, trial_seed=config.trial_seed, holdout=config.data.holdout
  )
  first = splits.sources[0].main[0]["image"]
  shape = make_transform(config.data).evaluate(first).shape

  def init(key: jax.Array) -> TrainState:
    variables = init_variables(model, key, image_shape=shape)
    params, stats = variables["params"], variables["batch_stats"]
    extra = {
      "batch_stats": stats,
      "memory": algorithm.init_memory(len(run.sources), params),
      "seed": jnp.int32(0),  # see `create`: so that all seeds share a program
    }
    if averager is not None:
      extra["swad"] = averager.init(averaged(params, stats))
    state = TrainState.create(params, algorithm.tx, extra)
    if algorithm.takes_best:
      extra["best"] = first_best(params, state.opt_state, stats)
    return state

  key = jax.random.key(config.seed)

  def create() -> TrainState:
    state = init_sharded(init, mesh, RULES, key)
    seed = from_host(np.int32(config.seed), state.extra["seed"])
    state = dataclasses.replace(state, extra={**state.extra, "seed": seed})
    if config.model.pretrained:
      state = _pretrained(config.model.pretrained, model, state)
    return state

  return Setup(
    domain_set, shape, run, splits, apply_fn, mesh, algorithm, averager,
    learning_rate, create, abstract_sharded(init, mesh, RULES, key),
  )  # fmt: skip


def check_values(config: Any) -> None:
  """Raises `UserError` for the first setting that cannot be meant.

  What a part of the program reads alone, it checks itself.
  """
  flat = flatten(config)
  for key, least in _LEAST.items():
    if flat[key] < least:
      raise UserError(f"{key}={flat[key]} must be at least {least}")
  if not 0 <= config.label_smoothing < 1:
    raise UserError(
      f"label_smoothing={config.label_smoothing} must be in [0, 1)"
    )
  if config.data.images_per_domain % config.accum:
    raise UserError(
      f"data.images_per_domain={config.data.images_per_domain} is not "
      f"divisible by accum={config.accum}: choose a multiple"
    )
  check_keys(config.swad, ("n_converge", "n_tolerance", "tolerance_ratio"),
             what="swad")  # fmt: skip


def _check_weights(model: Any) -> None:
  path = model.pretrained
  if path and not os.path.isfile(os.path.expanduser(path)):
    raise UserError(
      f"model.pretrained={path!r}: no such file; name one of torchvision's, "
      "timm's or transformers', or set model.pretrained= for fresh weights"
    )
  normalises = model.name.startswith(("wrn", "resnet"))
  if normalises and model.batch_norm == "frozen" and not model.pretrained:
    raise UserError(
      f"model.name={model.name!r} with model.batch_norm='frozen' and no "
      "model.pretrained would not normalise at all: set "
      "model.batch_norm='update' or give weights"
    )


def chosen_run(config: Any, domain_set: DomainSet) -> Run:
  """The one run of the protocol that a training does.

  Args:
    config: `protocol`, `sources`, `targets`, `sources_limit`, `run`.
    domain_set: the data.

  Raises:
    UserError: for a `run` that the protocol does not have.
  """
  runs = protocol_runs(config, domain_set)
  if not config.run:
    return runs[0]
  names = [run.name for run in runs]
  if config.run not in names:
    raise UserError(f"run={config.run!r}{did_you_mean(config.run, names)}")
  return runs[names.index(config.run)]


def protocol_runs(config: Any, domain_set: DomainSet) -> tuple[Run, ...]:
  """All runs of the configuration's protocol."""
  return make_runs(
    domain_set,
    config.protocol,
    sources=config.sources,
    targets=config.targets,
    limit=config.sources_limit,
  )


def _pretrained(path: str, model: Any, state: TrainState) -> TrainState:
  """The state with a file's weights, where it had fresh ones."""
  from udim.convert import load_pretrained

  fresh = {"params": state.params, "batch_stats": state.extra["batch_stats"]}
  loaded = from_host(load_pretrained(path, model, to_host(fresh)), fresh)
  extra = {**state.extra, "batch_stats": loaded["batch_stats"]}
  return dataclasses.replace(state, params=loaded["params"], extra=extra)


def make_loader(config: Any, setup: Setup) -> Any:
  """Training batches [S, n, ...] of the run's sources."""
  return train_loader(
    [split.main for split in setup.splits.sources],
    rows=config.data.images_per_domain,
    seed=config.seed,
    transform=make_transform(config.data),
    sharding=train_sharding(setup.mesh),
    prefetch=config.data.prefetch,
    workers=config.data.workers,
    threads=config.data.threads,
  )


def _data_line(setup: Setup) -> str:
  """What is trained on and what is asked, for the start."""
  sizes = {domain.name: len(domain) for domain in setup.domain_set.domains}
  sources = ", ".join(f"{name} {sizes[name]:,}" for name in setup.run.sources)
  targets = ", ".join(setup.run.targets)
  return (
    f"{setup.domain_set.name}: images of sources {sources}; targets {targets}"
  )


def train_and_evaluate(
  config: Any,
  workdir: str,
  *,
  setup: Setup | None = None,
  steps: StepChoice | None = None,
  quiet: bool = False,
) -> TrainState:
  """Trains to the end, or on from where the folder left off.

  What may refuse the configuration comes before the folder is taken.

  Args:
    config: see `configs/udim.py`.
    workdir: the run's folder.
    setup: from `make_setup(config)`, if there is one.
    steps: compiled for an equal setup but for its seed, if there are such.
    quiet: no bar, and no report: `python -m common.report` makes one later.

  Returns:
    The last state.
  """
  setup = setup or make_setup(config)
  with contextlib.ExitStack() as stack:
    loader = stack.enter_context(make_loader(config, setup))
    rows = batch_sharding(setup.mesh)
    evaluator = Evaluator(
      setup.apply_fn, make_parts(config, setup.splits, rows), rows
    )
    folder = stack.enter_context(
      Workdir(
        workdir,
        config,
        free=FREE,
        facts={
          **setup.domain_set.facts(),
          "classes": list(setup.domain_set.classes),
          "image_shape": list(setup.image_shape),
          "sources": list(setup.run.sources),
          "targets": list(setup.run.targets),
        },
        pinned=("data_hash", "sources", "targets"),
        keep=config.checkpoint.keep,
        # An average is what its run is for, whatever came before.
        best=(
          "val/accuracy"
          if config.checkpoint.keep_best and setup.averager is None
          else None
        ),
        best_mode="max",
        tensorboard=config.log.tensorboard,
      )
    )
    if jax.process_index() == 0:
      make_spec(config).save(folder.path)
    progress = stack.enter_context(
      ProgressBar(
        config.num_steps, name="udim", loss_key="train/loss", quiet=quiet
      )
    )
    hooks = make_hooks(config, setup, folder, progress, evaluator)
    stack.enter_context(hooks.preemption)
    state = folder.resume(setup.create, setup.abstract, loader, hooks.host)
    images = config.data.images_per_domain * len(setup.run.sources)
    log.info(
      "%s",
      startup_report(
        setup.mesh, state, global_batch=images, data=_data_line(setup)
      ),
    )
    progress.start(int(state.step))
    state = train(
      state,
      steps or make_steps(setup.algorithm, setup.averager),
      loader,
      num_steps=config.num_steps,
      hooks=hooks.in_order,
      mesh=setup.mesh,
    )
  if jax.process_index() == 0 and not quiet:
    log.info("report: %s", write_report(folder.path))
  return state


def make_hooks(
  config: Any,
  setup: Setup,
  folder: Workdir,
  progress: ProgressBar,
  evaluator: Evaluator,
) -> hooks_lib.RunHooks:
  """Guard, log, evaluate, save, preempt, profile: in this order."""
  guard = hooks_lib.StopOnNonFinite()
  images = config.data.images_per_domain * len(setup.run.sources)
  host: dict[str, Any] = {
    "log": hooks_lib.LogHook(
      config.log.every,
      folder.writer,
      progress,
      examples_per_step=images,
      unit="images",
      extra=lambda step: {
        "train/learning_rate": float(setup.learning_rate(step))
      },
    ),
    "evaluation": EvaluationHook(
      config.evaluation.every,
      config.num_steps,
      algorithm=setup.algorithm,
      averager=setup.averager,
      evaluator=evaluator,
      writer=folder.writer,
    ),
  }
  checkpoint = hooks_lib.CheckpointHook(
    config.checkpoint.every or config.num_steps,
    folder.checkpointer,
    host=host,
    guard=guard,
    metrics=host["evaluation"].measured_at,
  )
  preemption = hooks_lib.PreemptionHook(checkpoint)
  in_order = [guard, *host.values(), checkpoint, preemption]
  if config.profile.count:
    in_order.append(
      hooks_lib.ProfileHook(
        str(folder.path / "profile"),
        start=config.profile.start,
        count=config.profile.count,
      )
    )
  return hooks_lib.RunHooks(in_order, host, preemption)
