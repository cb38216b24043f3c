"""What the steps of SlimSAM cost: importance, and the updates of both stages.

    python benchmarks/sam_steps.py
    python benchmarks/sam_steps.py --dtype=bfloat16     # on a GPU

ViT-B with random weights is slimmed by 77 %: the gradient that scores its
units, and updates of step 1 and step 2, with the features of the first epochs
and without. Blocks are recomputed in the backward pass. Printed are medians of
some calls, and the time of the first one, which compiles. The last line is
JSON.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.rngs import RngStreams
from common.state import TrainState
from common.step import make_train_step
from slimsam import importance, stages
from slimsam.encoder import DTYPES, Compute
from slimsam.groups import encoder_groups
from slimsam.init import init_params
from slimsam.prune import prune_model
from slimsam.select import kept_width
from slimsam.settings import preset

RATIO = 0.77
GPU = jax.default_backend() == "gpu"


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--dtype", default="float32", choices=sorted(DTYPES))
  add("--image_size", type=int, default=1024 if GPU else 512)
  add("--batch", type=int, default=4 if GPU else 1)
  add("--rounds", type=int, default=5)
  args = parser.parse_args()
  rows = steps(args)
  line = {
    "benchmark": "sam_steps", "python": platform.python_version(),
    "jax": jax.__version__, "device": jax.devices()[0].device_kind,
    **vars(args), "rows": rows,
  }  # fmt: skip
  print(json.dumps(line))
  return 0


def steps(args: argparse.Namespace) -> list[Any]:
  """Importance, and the updates of SlimSAM-77 from ViT-B."""
  rows = []
  for name, run in make_steps(args).items():
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    seconds = []
    for _ in range(args.rounds):
      start = time.perf_counter()
      run()
      seconds.append(time.perf_counter() - start)
    row = {
      "case": f"step, {name}", "first": first, "image_size": args.image_size,
      "batch": args.batch, "seconds": statistics.median(seconds),
      "images_per_second": args.batch / statistics.median(seconds),
    }  # fmt: skip
    rows.append(row)
    print(
      f"step, {name:28s} {1e3 * row['seconds']:8.0f} ms "
      f"{row['images_per_second']:7.2f} images/s  first call {first:.1f} s",
      flush=True,
    )
  return rows


def make_steps(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
  whole = preset("vit_b")
  cfg = dataclasses.replace(whole.encoder, image_size=args.image_size)
  whole = dataclasses.replace(whole, encoder=cfg)
  drawn = jax.jit(init_params, static_argnums=0)(whole, jax.random.key(0))
  params = {"image_encoder": drawn["image_encoder"]}
  d, f = (kept_width(n, RATIO, 12) for n in (768, 3072))
  first, first_settings = prune_model(params, whole, {"embedding": range(d)})
  keep = {f"qkv/{i}": range(d // 12) for i in range(12)}
  keep |= {f"mlp/{i}": range(f) for i in range(12)}
  small, small_settings = prune_model(first, first_settings, keep)
  rng = np.random.default_rng(3)
  shape = (args.batch, cfg.image_size, cfg.image_size, 3)
  batch = jax.device_put({
    "images": rng.normal(size=shape).astype(np.float32),
    "ids": np.arange(args.batch, dtype=np.int32),
    "weights": np.ones(args.batch, np.float32),
  })  # fmt: skip
  compute = Compute(DTYPES[args.dtype], remat=True)
  groups = encoder_groups(whole)
  add = importance.make_accumulate(
    importance.disturbed_loss(whole, compute), groups
  )
  sums = [importance.zero_sums(params, groups)]
  placed = jax.device_put(params)

  def accumulate() -> Any:
    sums[0] = add(sums[0], placed, batch, jax.random.key(0))
    jax.block_until_ready(sums[0])

  made: dict[str, Callable[[], Any]] = {"importance, vit_b": accumulate}
  tx = optax.adamw(1e-4)
  encoders = {"original": params["image_encoder"],
              "first": first["image_encoder"]}  # fmt: skip
  for name, student, settings in (
    ("step_1", first, first_settings), ("step_2", small, small_settings),
  ):  # fmt: skip
    stage = stages.stage_of(name, "fixed")
    roles = stages.Roles(
      settings.encoder, cfg, first_settings.encoder, compute, compute
    )
    given = {
      key: jax.device_put(jax.tree.map(
        lambda a: np.asarray(a, DTYPES[args.dtype]), own))
      for key, own in encoders.items()
      if key == "original" or name == "step_2"
    }  # fmt: skip

    def make_step(loss: Any) -> Any:
      return make_train_step(loss, tx, RngStreams(0))

    choice = stages.make_steps(
      stage, make_step, roles, given, steps_per_epoch=1
    )
    for epoch, what in ((0, "with features"), (12, "the embedding")):
      made[f"{name}, {what}"] = updates(
        choice.choose(epoch), student["image_encoder"], tx, batch
      )
  return made


def updates(
  step: Any, params: Any, tx: optax.GradientTransformation, batch: Any
) -> Callable[[], Any]:
  """Each call is one update."""
  # Donated with each call.
  state = TrainState.create(jax.tree.map(jnp.copy, jax.device_put(params)), tx)

  def run() -> None:
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))

  return run


if __name__ == "__main__":
  raise SystemExit(main())
