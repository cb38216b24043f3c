"""What a run costs, and how flat the loss is where it ended."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from common.optim.ascent import sam_ascent
from common.parallel import batch_sharding, to_host
from common.state import TrainState
from common.step import StepChoice
from udim import landscape
from udim.augment import make_transform
from udim.data import eval_batches
from udim.domains import Domain
from udim.passes import ApplyFn
from udim.perturb import perturb_images
from udim.train import Setup, make_loader

PyTree = Any

RADII = (0.01, 0.02, 0.05, 0.1)  # of steps up the gradient
DISTANCES = tuple(np.linspace(0, 2, 11).round(3).tolist())
LANCZOS_STEPS = 30
SHOWN = 8  # images that a figure shows


def cost_of(config: Any, setup: Setup, steps: StepChoice) -> dict[str, float]:
  """FLOPs of a mean step, and the memory of the largest one.

  Both are the compiler's, for one device. `temporaries` are the bytes a step
  needs beside its arguments and results.

  Args:
    config: `num_steps`, over which the mean goes, and `data`.
    setup: of the run.
    steps: its compiled steps.
  """
  with make_loader(config, setup) as loader:
    batch = next(loader)
  due = [setup.algorithm.is_due(step) for step in range(config.num_steps)]
  share = float(np.mean(due))
  flops, temporaries = 0.0, 0
  for is_due, part in ((True, share), (False, 1 - share)):
    if not part:
      continue
    program: Any = steps.choose(due.index(is_due))
    with jax.set_mesh(setup.mesh):
      compiled = program.lower(setup.abstract, batch).compile()
    flops += part * compiled.cost_analysis()["flops"]
    memory = compiled.memory_analysis()
    temporaries = max(temporaries, memory.temp_size_in_bytes)
  return {"flops": flops, "temporaries": float(temporaries)}


def seconds_per_step(lines: Sequence[Mapping[str, Any]]) -> float | None:
  """The median over a run's log lines, the first half left out.

  Compilation and warm-up lie there. Nor do intervals count in which the run
  was evaluated: an evaluation follows the log line of its step. None where
  nothing is left.
  """
  evaluated = [line["step"] for line in lines if "val/accuracy" in line]
  speeds, last = [], 0
  for line in lines:
    if "speed/images_per_second" in line or "train/loss" in line:
      since, last = last, line["step"]
      speed = line.get("speed/steps_per_second")
      if speed and not any(since <= step < last for step in evaluated):
        speeds.append(speed)
  speeds = speeds[len(speeds) // 2 :]
  return 1 / float(np.median(speeds)) if speeds else None


def landscape_of(
  config: Any, setup: Setup, state: TrainState
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Sharpness of the loss at the end of a run, on sources and on targets.

  Args:
    config: `data`, `seed`, `compare.landscape_images` (how many images of
      each side are looked at) and `compare.image_distance`.
    setup: of the run.
    state: its last state.

  Returns:
    Numbers: `eigenvalue` (the Hessian's largest on sources) and its
    `residual`; `gap_source` and `gap_target`, what steps of `RADII` up the
    gradient add to the loss; `weight_line` and `data_line`, source losses at
    `DISTANCES` (times 0.5, and times `compare.image_distance`).
    Images: `original` and `perturbed`, [n, H, W, C] as the network sees them.
  """
  limit = config.compare.landscape_images
  sources = _batch(config, setup, [s.main for s in setup.splits.sources], limit)
  targets = _batch(config, setup, [t.main for t in setup.splits.targets], limit)
  # Not a method's own radius: all have to go the same way.
  distance = config.compare.image_distance
  variables = {
    "params": state.params, "batch_stats": state.extra["batch_stats"]
  }  # fmt: skip
  loss = _loss_of(setup.apply_fn)
  with jax.set_mesh(setup.mesh):
    values, residuals = landscape.top_eigenvalues(
      Partial(loss, stats=state.extra["batch_stats"], batch=sources),
      state.params,
      jax.random.key(config.seed),
      iterations=LANCZOS_STEPS,
    )
    numbers, images = _probe(loss)(variables, sources, targets, distance)
  numbers |= {"eigenvalue": values[0], "residual": residuals[0]}
  numbers, images = to_host((numbers, images))
  return {name: value.tolist() for name, value in numbers.items()}, images


@functools.lru_cache(maxsize=8)
def _loss_of(apply_fn: ApplyFn) -> Callable[..., jax.Array]:
  """The loss of a batch in evaluation mode; one function for each model."""

  def loss(params: PyTree, images=None, *, stats: PyTree, batch: Mapping):
    variables = {"params": params, "batch_stats": stats}
    images = batch["image"] if images is None else images
    _, logits, _ = apply_fn(variables, images, train=False, rngs=None)
    each = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits.astype(jnp.promote_types(logits.dtype, jnp.float32)),
      batch["label"],
    )
    weights = batch["weight"]
    return jnp.sum(each * weights) / jnp.sum(weights)

  return loss


@functools.lru_cache(maxsize=8)
def _probe(loss: Callable[..., jax.Array]) -> Any:
  """Gaps, lines and perturbed images as one compiled function."""

  @jax.jit
  def probe(variables, sources, targets, distance):
    params, stats = variables["params"], variables["batch_stats"]
    on_sources, on_targets = (
      functools.partial(loss, stats=stats, batch=batch)
      for batch in (sources, targets)
    )
    grads = jax.grad(on_sources)(params)
    ascent = sam_ascent(0.05)
    ascended = optax.apply_updates(
      params, ascent.update(grads, ascent.init(params))[0]
    )
    uphill = jax.grad(on_sources, argnums=1)(ascended, sources["image"])
    distances = jnp.asarray(DISTANCES)
    numbers = {
      "gap_source": landscape.perturb_gap(on_sources, params, RADII),
      "gap_target": landscape.perturb_gap(on_targets, params, RADII),
      "weight_line": landscape.line(on_sources, params, grads, 0.5 * distances),
      "data_line": landscape.data_line(
        functools.partial(on_sources, params),
        sources["image"],
        uphill,
        distance * distances,
      ),
    }
    perturbed = perturb_images(sources["image"], uphill, rho_x=distance)
    images = {
      "original": sources["image"][:SHOWN], "perturbed": perturbed[:SHOWN]
    }  # fmt: skip
    return numbers, images

  return probe


def _batch(
  config: Any, setup: Setup, domains: Sequence[Domain], limit: int
) -> dict[str, jax.Array]:
  """One batch of at most `limit` images, as many of each domain."""
  share = max(1, limit // len(domains))
  parts = []
  for domain in domains:
    every = -(-len(domain) // share)
    chosen = domain.select(np.arange(0, len(domain), every))
    batches = eval_batches(
      chosen, batch_size=len(chosen), transform=make_transform(config.data),
      sharding=batch_sharding(setup.mesh), threads=config.data.threads,
    )  # fmt: skip
    parts += list(batches)
  return {
    name: jnp.concatenate([part[name] for part in parts]) for name in parts[0]
  }
