"""Trains a state-space language model under Birdie's mixture."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from birdie import controller, initial
from birdie import data as data_lib
from birdie.curriculum import Curriculum, CurriculumHook, EvaluationHook
from birdie.losses import batch_losses
from birdie.models import RULES, init_params, make_model
from birdie.report import make_spec
from birdie.retrieval import RetrievalEvaluation
from birdie.validation import Evaluator, eval_batches
from common import hooks as hooks_lib
from common.config import flatten
from common.data.sources import source_name
from common.data.tokenizers import Tokenizer, make_tokenizer
from common.errors import UserError
from common.metrics import Mean, read_metrics
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
from common.step import LossFn, StepFn, make_train_step
from common.train import train
from common.workdir import Workdir

log = logging.getLogger(__name__)

# Keys that may change when a run is resumed: the batches stay the same, and so
# do all numbers, but for the order of sums on another mesh.
FREE = ("log", "checkpoint", "profile", "compile_cache", "data.workers",
        "data.prefetch", "data.source.follow_links", "mesh")  # fmt: skip


def make_loss_fn(
  model: Any,
  curriculum: Curriculum,
  *,
  chunk: int = 0,
  z_loss: float = 0.0,
) -> LossFn:
  """The loss of a packed batch: mean over target tokens, in float32.

  Besides the whole, it reports loss and accuracy of every class of objectives
  (a class no sample of the batch belongs to has count 0) and how full the
  rows are.

  Args:
    model: a module of `birdie.models`.
    curriculum: the classes.
    chunk: see `birdie.losses.token_losses`.
    z_loss: times the mean squared log of the partition function, which is
      added to what is minimized, and reported apart ("PaLM", arXiv 2204.02311,
      section 5).
  """
  names = curriculum.class_names
  # One more class, for padding (configuration -1).
  classes = np.asarray([*curriculum.classes, len(names)], np.int32)

  def loss_fn(params, batch, rngs):
    del rngs
    loss, correct, partition = batch_losses(model, params, batch, chunk=chunk)
    weights = batch["loss_weights"]
    ids = jnp.asarray(classes)[batch["config_ids"]]
    sums = jax.ops.segment_sum(
      jnp.stack([loss * weights, correct * weights, weights], -1).reshape(
        -1, 3
      ),
      ids.reshape(-1),
      len(names) + 1,
    )
    metrics = {
      "loss": Mean.of(loss, weights),
      "accuracy": Mean.of(correct, weights),
      "fill": Mean.of((batch["segment_ids"] > 0).astype(jnp.float32)),
    }
    for i, name in enumerate(names):
      metrics[f"loss_of/{name}"] = Mean(sums[i, 0], sums[i, 2])
      metrics[f"accuracy_of/{name}"] = Mean(sums[i, 1], sums[i, 2])
    total = metrics["loss"].total
    if z_loss:
      metrics["z_loss"] = Mean.of(z_loss * partition**2, weights)
      total += metrics["z_loss"].total
    return total / jnp.maximum(metrics["loss"].count, 1e-9), metrics

  return loss_fn


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a configuration describes, before anything is trained.

  Attributes:
    configurations: the mixture's entries.
    create: makes the state of step 0, sharded.
    abstract: its shapes, dtypes and shardings.
  """

  configurations: Sequence[Any]
  curriculum: Curriculum
  model: Any
  mesh: jax.sharding.Mesh
  sharding: jax.sharding.NamedSharding
  tx: Any
  learning_rate: Callable[[int], Any]
  create: Callable[[], TrainState]
  abstract: TrainState
  eval_steps: Sequence[int]


def make_setup(config: Any, tokenizer: Tokenizer) -> Setup:
  """Builds model, optimizer and sharded state from a configuration.

  No text is read, so a mistake is answered before hours of tokenizing.

  Args:
    config: see `configs/birdie.py`.
    tokenizer: gives the vocabulary.

  Raises:
    UserError: for counts below 1, a mesh that does not fit the devices, a
      batch that does not fit the mesh, unknown names.
  """
  check_counts(config)
  mesh = make_mesh(config.mesh.to_dict())
  check_batch(config, mesh)
  vocab = data_lib.make_vocabulary(tokenizer)
  configurations = data_lib.make_configurations(config, vocab, tokenizer.encode)
  curriculum = Curriculum.of(configurations)
  model = make_model(config.model, vocab.size)
  eval_steps = controller.eval_steps(
    config.num_steps, config.controller.schedule
  )
  tx, learning_rate = make_optimizer(config.optim, config.num_steps)

  def init(key: jax.Array) -> TrainState:
    params = init_params(model, key)
    extra = {}
    if config.controller.enabled:
      extra["controller"] = controller.init_state(
        controller_config(config),
        jax.random.fold_in(key, 1),
        classes=curriculum.classes,
        capacity=len(eval_steps),
        probs=data_lib.first_mixture(configurations),
      )
    return TrainState.create(params, tx, extra)

  key = jax.random.key(config.seed)
  return Setup(
    configurations=configurations,
    curriculum=curriculum,
    model=model,
    mesh=mesh,
    sharding=batch_sharding(mesh, seq=bool(config.model.seq_axis)),
    tx=tx,
    learning_rate=learning_rate,
    create=lambda: init_sharded(init, mesh, RULES, key),
    abstract=abstract_sharded(init, mesh, RULES, key),
    eval_steps=eval_steps,
  )


def controller_config(config: Any) -> controller.ControllerConfig:
  """The controller's settings, without the keys that are the trainer's."""
  settings = config.controller.to_dict()
  for name in ("enabled", "schedule"):
    settings.pop(name)
  return controller.ControllerConfig(**settings)


# Settings that count something, with the least that makes sense.
_LEAST = {
  "seed": 0, "num_steps": 1, "accum": 1, "data.sequence_length": 2,
  "data.batch_size": 1,
  "data.pack_rows": 1, "data.workers": 0, "data.prefetch": 0,
  "evaluation.rows": 1, "evaluation.batch_size": 1, "retrieval.every": 0,
  "retrieval.books": 1, "retrieval.batch_size": 1, "log.every": 1,
  "checkpoint.every": 1, "checkpoint.keep": 1, "profile.start": 0,
  "profile.count": 0, "loss.chunk": 0, "loss.z_loss": 0,
}  # fmt: skip


def check_counts(config: Any) -> None:
  """Raises `UserError` for the first setting below its least value."""
  flat = flatten(config)
  for key, least in _LEAST.items():
    if not flat[key] >= least:  # NaN neither
      raise UserError(f"{key}={flat[key]} must be at least {least}")


def check_batch(config: Any, mesh: jax.sharding.Mesh) -> None:
  """Refuses batches that cannot be dealt out evenly.

  Raises:
    UserError: naming both numbers.
  """
  shards = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
  for name, rows in (
    ("data.batch_size", config.data.batch_size),
    ("evaluation.batch_size", config.evaluation.batch_size),
  ):
    if rows % shards:
      raise UserError(
        f"{name}={rows} is not divisible by the {shards} devices along "
        "mesh.data and mesh.fsdp: choose a multiple"
      )
  seq, length = mesh.shape.get("seq", 1), config.data.sequence_length
  if seq > 1 and not config.model.seq_axis:
    raise UserError(
      f"mesh.seq={seq} needs model.seq_axis=seq: without it these devices "
      "would repeat each other's work"
    )
  if length % seq:
    raise UserError(
      f"data.sequence_length={length} is not divisible by the {seq} devices "
      "along mesh.seq: choose a multiple"
    )
  if config.data.batch_size % (config.accum * shards):
    raise UserError(
      f"data.batch_size={config.data.batch_size} is not divisible by accum="
      f"{config.accum} times {shards} devices: choose a multiple"
    )


def train_and_evaluate(config: Any, workdir: str) -> TrainState:
  """Trains to the end, or on from where the folder left off.

  What may refuse the configuration comes before the text is read, and what may
  refuse the text before the folder holds more than a log.

  Args:
    config: see `configs/birdie.py`.
    workdir: the run's folder.

  Returns:
    The last state.
  """
  tokenizer = make_tokenizer(config.tokenizer)
  setup = make_setup(config, tokenizer)
  create = initial.make_create(config, setup, tokenizer, workdir)
  corpus = data_lib.make_corpus(config, tokenizer)
  with contextlib.ExitStack() as stack:
    loader = stack.enter_context(
      data_lib.train_loader(
        config, corpus, setup.configurations, sharding=setup.sharding
      )
    )
    evaluator = make_evaluator(config, setup, corpus)
    retrieval = RetrievalEvaluation(config.retrieval, setup.model, corpus)
    folder = stack.enter_context(
      Workdir(
        workdir,
        config,
        free=FREE,
        facts=corpus.facts(),
        pinned=("text_hash",),
        keep=config.checkpoint.keep,
        best="eval/loss" if config.checkpoint.keep_best else None,
        tensorboard=config.log.tensorboard,
      )
    )
    if jax.process_index() == 0:
      make_spec(config).save(folder.path)
    progress = stack.enter_context(
      ProgressBar(config.num_steps, name="birdie", loss_key="train/loss")
    )
    hooks = make_hooks(config, setup, folder, progress, evaluator, retrieval)
    stack.enter_context(hooks.preemption)
    state = folder.resume(create, setup.abstract, loader, hooks.host)
    log.info(
      "%s",
      startup_report(
        setup.mesh,
        state,
        global_batch=config.data.batch_size,
        data=f"{source_name(config.data.source)}: {corpus.summary()}",
      ),
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
    for line in last_scores(read_metrics(folder.path)):
      log.info("%s", line)
    log.info("report: %s", write_report(folder.path))
  return state


def last_scores(lines: Sequence[Mapping[str, Any]]) -> list[str]:
  """What a run has come to, in a line each: validation and retrieval.

  Args:
    lines: of its metrics.
  """
  made = []
  for title, pattern in (("validation", "eval/loss"), ("retrieval", _SCORES)):
    found = {
      name.rpartition("/")[2]: (value, line["step"])
      for line in lines
      for name, value in line.items()
      if re.fullmatch(pattern, name)
    }
    if found:
      values = ", ".join(f"{name} {v:.4g}" for name, (v, _) in found.items())
      steps = sorted({step for _, step in found.values()})
      made.append(f"{title:11} {values} at step {steps[-1]}")
  return made


_SCORES = "retrieval/.+"


def make_step(config: Any, setup: Setup) -> StepFn:
  """The jitted train step of a configuration."""
  loss_fn = make_loss_fn(
    setup.model,
    setup.curriculum,
    chunk=config.loss.chunk,
    z_loss=config.loss.z_loss,
  )
  return make_train_step(
    loss_fn, setup.tx, RngStreams(config.seed), accum=config.accum
  )


def make_hooks(
  config: Any,
  setup: Setup,
  folder: Workdir,
  progress: ProgressBar,
  evaluator: Evaluator,
  retrieval: RetrievalEvaluation,
) -> hooks_lib.RunHooks:
  """Guard, log, evaluate, save, preempt, profile: in this order."""
  guard = hooks_lib.StopOnNonFinite()
  host: dict[str, Any] = {
    "log": hooks_lib.LogHook(
      config.log.every,
      folder.writer,
      progress,
      examples_per_step=config.data.batch_size * config.data.sequence_length,
      extra=lambda step: {
        "train/learning_rate": float(setup.learning_rate(step))
      },
    ),
    "evaluation": make_evaluation(config, setup, folder, evaluator),
    "retrieval": hooks_lib.EvaluateHook(
      config.retrieval.every, retrieval, folder.writer
    ),
  }
  checkpoint = hooks_lib.CheckpointHook(
    config.checkpoint.every,
    folder.checkpointer,
    host=host,
    guard=guard,
    metrics=host["evaluation"].measured_at,
  )
  preemption = hooks_lib.PreemptionHook(checkpoint)
  profile = hooks_lib.ProfileHook(
    str(folder.path / "profile"),
    start=config.profile.start,
    count=config.profile.count,
  )
  in_order = [guard, *host.values(), checkpoint, preemption]
  if config.profile.count:
    in_order.append(profile)
  return hooks_lib.RunHooks(in_order, host, preemption)


def make_evaluator(
  config: Any, setup: Setup, corpus: data_lib.Corpus
) -> Evaluator:
  """Losses of every configuration on held-out text."""
  return Evaluator(
    setup.model,
    eval_batches(config, corpus, setup.configurations, sharding=setup.sharding),
    num_configs=len(setup.configurations),
    sharding=setup.sharding,
    chunk=config.loss.chunk,
  )


def make_evaluation(
  config: Any, setup: Setup, folder: Workdir, evaluator: Evaluator
) -> EvaluationHook:
  """The controller where it is enabled, plain evaluation otherwise."""
  common = {
    "steps": setup.eval_steps,
    "evaluator": evaluator,
    "curriculum": setup.curriculum,
    "writer": folder.writer,
  }
  if not config.controller.enabled:
    return EvaluationHook(**common)
  return CurriculumHook(
    controller_config(config),
    num_steps=config.num_steps,
    seed=config.seed,
    **common,
  )
