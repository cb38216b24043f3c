"""Trains a Transformer with stochastic experts, or one of its rivals."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from common import hooks as hooks_lib
from common.config import flatten
from common.errors import UserError
from common.optim import make_optimizer
from common.parallel import (
  abstract_sharded,
  batch_sharding,
  init_sharded,
  make_mesh,
  startup_report,
)
from common.progress import ProgressBar
from common.report import write_report
from common.rngs import RngStreams
from common.state import TrainState
from common.step import StepFn, make_train_step
from common.train import train
from common.workdir import Workdir
from thor.buckets import BucketedPairs
from thor.corpus import (
  Corpus,
  check_text,
  make_batch_shapes,
  make_corpus,
  make_plans,
)
from thor.data import eval_batches, train_loader
from thor.dispatch import Dispatch
from thor.evaluation import Evaluator
from thor.expert_layer import check_experts
from thor.model import Transformer, init_params, rules_of
from thor.objective import (
  STREAMS,
  check_objective,
  expert_grad_norms,
  make_loss_fn,
)
from thor.report import make_spec
from thor.routing import Routing
from thor.settings import Settings, make_settings
from thor.translations import TestTranslations, check_translation

log = logging.getLogger(__name__)

# Keys that may change when a run is resumed: all numbers stay the same, but for
# the order of sums on another mesh. (One that needs other batches is refused.)
FREE = ("log", "checkpoint", "profile", "compile_cache", "data.workers",
        "data.prefetch", "data.source.follow_links", "mesh",
        "translation")  # fmt: skip

_LEAST = {
  "num_steps": 1, "accum": 1, "data.token_budget": 1, "data.max_rows": 0,
  "data.workers": 0, "data.prefetch": 0, "evaluation.every": 1,
  "log.every": 1, "checkpoint.every": 1, "checkpoint.keep": 1,
  "profile.start": 0, "profile.count": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a configuration describes, before anything is trained.

  Attributes:
    table: of hash, int32 [v].
    create: makes the state of step 0, sharded.
    abstract: its shapes, dtypes and shardings.
  """

  settings: Settings
  routing: Routing
  dispatch: Dispatch
  table: Any
  mesh: jax.sharding.Mesh
  sharding: jax.sharding.NamedSharding
  tx: Any
  learning_rate: Callable[[int], Any]
  create: Callable[[], TrainState]
  abstract: TrainState


def check_counts(config: Any) -> None:
  """Raises `UserError` for the first setting below its least value."""
  flat = flatten(config)
  for key, least in _LEAST.items():
    if flat[key] < least:
      raise UserError(f"{key}={flat[key]} must be at least {least}")


def make_routing(config: Any) -> Routing:
  """The routing of a configuration; see `thor.routing.Routing`."""
  return Routing(**config.routing.to_dict())


def check(config: Any) -> None:
  """Refuses what can be refused before any text is read; see `make_setup`."""
  check_counts(config)
  routing = make_routing(config)
  check_objective(**config.objective.to_dict())
  check_translation(config, routing)
  check_text(config)
  setup = make_setup(config, vocab_size=config.vocabulary.size)
  check_experts(setup.settings, by_batch=routing.by_batch)
  make_batch_shapes(config, setup.sharding, rows=routing.row_multiple)


def make_setup(config: Any, *, vocab_size: int, table: Any = None) -> Setup:
  """Builds model, optimizer and sharded state from a configuration.

  No text is read.

  Args:
    config: see `configs/thor.py`.
    vocab_size: of the vocabulary.
    table: of hash; zeros in its place do, if only shapes matter.

  Raises:
    UserError: for counts below 1, a mesh that does not fit the devices, sizes
      that do not go together, unknown names.
  """
  check_counts(config)
  mesh = make_mesh(config.mesh.to_dict())
  routing = make_routing(config)
  settings = make_settings(
    config.model.to_dict(), routing, vocab_size=vocab_size
  )
  dispatch = Dispatch.parse(config.evaluation.dispatch, routing)
  tx, learning_rate = make_optimizer(config.optim, config.num_steps)

  def init(key: jax.Array) -> TrainState:
    extra = {} if table is None else {"hash_table": jnp.asarray(table)}
    return TrainState.create(init_params(settings, key), tx, extra)

  key = jax.random.key(config.seed)
  rules = rules_of(settings)
  return Setup(
    settings=settings,
    routing=routing,
    dispatch=dispatch,
    table=None if table is None else jnp.asarray(table),
    mesh=mesh,
    sharding=batch_sharding(mesh),
    tx=tx,
    learning_rate=learning_rate,
    create=lambda: init_sharded(init, mesh, rules, key),
    abstract=abstract_sharded(init, mesh, rules, key),
  )


def make_step(config: Any, setup: Setup) -> StepFn:
  """The jitted train step of a configuration."""
  loss_fn = make_loss_fn(
    Transformer(setup.settings),
    setup.routing,
    table=setup.table,
    **config.objective.to_dict(),
  )
  return make_train_step(
    loss_fn,
    setup.tx,
    RngStreams(config.seed, STREAMS),
    accum=config.accum,
    grad_metrics=expert_grad_norms,
  )


def train_and_evaluate(config: Any, workdir: str | os.PathLike) -> TrainState:
  """Trains to the end, or on from where the folder left off.

  What may refuse the configuration comes before the text is read.

  Args:
    config: see `configs/thor.py`.
    workdir: the run's folder.

  Returns:
    The last state.
  """
  check(config)
  corpus = make_corpus(config, workdir)
  routing = make_routing(config)
  setup = make_setup(
    config,
    vocab_size=corpus.vocabulary.size,
    table=corpus.hash_table(routing, seed=config.seed),
  )
  plans = make_plans(config, corpus, setup.sharding, rows=routing.row_multiple)
  with contextlib.ExitStack() as stack:
    loader = stack.enter_context(
      train_loader(
        plans[0],
        seed=config.seed,
        sharding=setup.sharding,
        prefetch=config.data.prefetch,
        workers=config.data.workers,
      )
    )
    folder = stack.enter_context(
      Workdir(
        workdir,
        config,
        free=FREE,
        facts=corpus.facts() | _batch_facts(plans[0]),
        pinned=("text_hash", "vocabulary", "batch_rows"),
        keep=config.checkpoint.keep,
        best="eval/loss" if config.checkpoint.keep_best else None,
        tensorboard=config.log.tensorboard,
      )
    )
    if jax.process_index() == 0:
      make_spec(config, setup).save(folder.path)
    progress = stack.enter_context(
      ProgressBar(config.num_steps, name="thor", loss_key="train/loss")
    )
    hooks = make_hooks(config, setup, corpus, plans, folder, progress)
    stack.enter_context(hooks.preemption)
    state = folder.resume(setup.create, setup.abstract, loader, hooks.host)
    data = (
      f"{config.data.source.kind}: {len(corpus.train):,} pairs to train on, "
      f"{len(corpus.valid):,} held out"
    )
    rows = max(shape.rows for shape in plans[0].buckets.shapes)
    log.info(
      "%s", startup_report(setup.mesh, state, global_batch=rows, data=data)
    )
    progress.start(int(state.step))
    state = train(
      state,
      make_step(config, setup),
      loader,
      num_steps=config.num_steps,
      hooks=hooks.in_order,
      mesh=setup.mesh,
    )
  if jax.process_index() == 0:
    log.info("report: %s", write_report(workdir))
  return state


def _batch_facts(plan: BucketedPairs) -> dict[str, Any]:
  """Source and target tokens of a mean batch, and how full batches are."""
  source, target = (count / plan.num_batches for count in plan.num_tokens)
  return {
    "tokens_per_batch": [round(source), round(target)],
    "fill_rate": [round(rate, 3) for rate in plan.fill_rate],
    "batches_an_epoch": plan.num_batches,
    "batch_rows": [shape.rows for shape in plan.buckets.shapes],
  }


def make_hooks(
  config: Any,
  setup: Setup,
  corpus: Corpus,
  plans: tuple[BucketedPairs, BucketedPairs],
  folder: Workdir,
  progress: ProgressBar,
) -> hooks_lib.RunHooks:
  """Guards, log, evaluate, translate, save, preempt, profile: in this order."""
  guard = hooks_lib.StopOnNonFinite()
  draws = hooks_lib.SameEverywhere(config.log.every, "draws of experts")
  evaluator = Evaluator(
    setup.settings,
    setup.routing,
    eval_batches(plans[1], sharding=setup.sharding),
    languages=corpus.languages,
    sharding=setup.sharding,
    dispatch=setup.dispatch,
    seed=config.evaluation.seed,
    table=setup.table,
  )
  evaluation = hooks_lib.EvaluateHook(
    config.evaluation.every,
    lambda state: evaluator(state.params),
    folder.writer,
  )
  tests = TestTranslations(config, setup, corpus, folder.path)
  host: dict[str, Any] = {
    "log": hooks_lib.LogHook(
      config.log.every,
      folder.writer,
      progress,
      examples_per_step=round(plans[0].num_tokens[1] / plans[0].num_batches),
      unit="target_tokens",
      extra=lambda step: {
        "train/learning_rate": float(setup.learning_rate(step))
      },
    ),
    "evaluation": evaluation,
    "translation": hooks_lib.EvaluateHook(
      tests.is_due, lambda state: tests(state.params), folder.writer
    ),
  }
  checkpoint = hooks_lib.CheckpointHook(
    config.checkpoint.every,
    folder.checkpointer,
    host=host,
    guard=guard,
    same=draws,
    metrics=lambda step: evaluation.latest if _measured(config, step) else {},
  )
  preemption = hooks_lib.PreemptionHook(checkpoint)
  in_order = [guard, draws, *host.values(), checkpoint, preemption]
  if config.profile.count:
    in_order.append(
      hooks_lib.ProfileHook(
        str(folder.path / "profile"),
        start=config.profile.start,
        count=config.profile.count,
      )
    )
  return hooks_lib.RunHooks(in_order, host, preemption)


def _measured(config: Any, step: int) -> bool:
  """Whether validation was at this step."""
  return step % config.evaluation.every == 0 or step == config.num_steps
