"""What the SAM family and UDIM cost beside a plain step.

    python benchmarks/sharpness.py
    python benchmarks/sharpness.py --rounds=15 --batch=128

Two convolutions of 32 and 64 channels and a linear head, images of 32 x 32 x 3,
Adam; everything in one process. FLOPs and memory are the compiler's (`flops`
of the cost analysis, temporaries of the memory analysis); times are medians
over rounds in which every candidate runs once, as ratios to the plain step
and, for what takes two gradients, to `optax.contrib.sam`. `udim, warm-up` is a
step of UDIM before its `start_step`. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

from common import optim
from udim import UdimConfig, udim_grads
from udim.models import SmallCNN, init_variables, make_apply_fn

Step = Callable[[Any, Any, dict[str, jax.Array]], tuple[Any, Any]]
UDIM = {
  "udim, fast": {},
  "udim, no reuse": {"share_dropout": False},
  "udim, detached": {"detach_source": True},
  "udim, exact": {"data_grad": "exact"},
  "udim, reference": {"reference_quirks": True},
  "udim, warm-up": {"start_step": 1_000_000},
}


MODEL = SmallCNN(num_classes=10, widths=(32, 64))
apply_fn = make_apply_fn(MODEL)


def loss_fn(params, batch):
  image = batch["image"].reshape(-1, *batch["image"].shape[2:])
  variables = {"params": params, "batch_stats": {}}
  _, logits, _ = apply_fn(variables, image, train=True)
  return optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, batch["label"].reshape(-1)
  ).mean()


def wrapped(tx: Any) -> tuple[Step, Any]:
  """A member of the family: the gradient is handed over as a function."""

  def step(params, state, batch):
    grad_fn = jax.grad(lambda params: loss_fn(params, batch))
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  return step, tx


def opaque_sam(base: Any) -> tuple[Step, Any]:
  """Optax's own, whose gradient function also gets the step's number."""
  ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
  tx = optax.contrib.sam(base, ascent, sync_period=2, opaque_mode=True)

  def step(params, state, batch):
    grad_fn = jax.grad(lambda params: loss_fn(params, batch))
    updates, state = tx.update(
      grad_fn(params), state, params, grad_fn=lambda params, i: grad_fn(params)
    )
    return optax.apply_updates(params, updates), state

  return step, tx


def plain(base: Any) -> tuple[Step, Any]:
  def step(params, state, batch):
    grads = jax.grad(loss_fn)(params, batch)
    updates, state = base.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step, base


def with_udim(base: Any, settings: dict[str, Any]) -> tuple[Step, Any]:
  grads_of = udim_grads(apply_fn, "head", UdimConfig(**settings))

  def step(params, state, batch):
    count = optax.tree.get(state, "count")
    key = jax.random.key(0)
    grads, _ = grads_of(params, batch, key, count)
    updates, state = base.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step, base


def make_candidates() -> dict[str, tuple[Step, Any]]:
  base = optax.adam(1e-3)
  family = {
    "sam": optim.sam(base),
    "asam": optim.asam(base),
    "fisher_sam": optim.fisher_sam(base),
    "gsam": optim.gsam(base),
    "sagm": optim.sagm(base),
    "look_sam": optim.look_sam(base),
    "esam": optim.esam(base),
    "gam": optim.gam(base),
  }
  return {
    "erm": plain(base),
    "optax.contrib.sam": opaque_sam(base),
    **{name: wrapped(tx) for name, tx in family.items()},
    **{name: with_udim(base, s) for name, s in UDIM.items()},
  }


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
  key = jax.random.key(0)
  image = jax.random.uniform(key, (1, args.batch, 32, 32, 3))
  label = jax.random.randint(key, (1, args.batch), 0, 10)
  batch = {"image": image, "label": label}
  params = init_variables(MODEL, key, image_shape=(32, 32, 3))["params"]
  rows, runs = {}, {}
  for name, (step, tx) in make_candidates().items():
    state = tx.init(params)
    compiled = jax.jit(step).lower(params, state, batch).compile()
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    rows[name] = {
      "flops": cost["flops"],
      "temporaries": memory.temp_size_in_bytes,
      "peak": getattr(memory, "peak_memory_in_bytes", 0),
    }
    runs[name] = (compiled, state, [])
  for i in range(args.rounds + 1):
    for compiled, state, times in runs.values():
      now = state
      start = time.perf_counter()
      for _ in range(args.steps):
        _, now = compiled(params, now, batch)
      jax.block_until_ready(now)
      if i:  # the first round warms up
        times.append((time.perf_counter() - start) / args.steps)
  for name, (_, _, times) in runs.items():
    rows[name]["seconds"] = statistics.median(times)
    rows[name]["paired"] = statistics.median(
      a / b for a, b in zip(times, runs["optax.contrib.sam"][2])
    )
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--steps", type=int, default=5, help="in a round")
  parser.add_argument("--batch", type=int, default=64)
  args = parser.parse_args()
  rows = measure(args)
  erm = rows["erm"]
  print(f"{'':18s} FLOPs / erm  time / erm  time / optax  temporaries MiB")
  for name, row in rows.items():
    print(
      f"{name:18s} {row['flops'] / erm['flops']:11.2f} "
      f"{row['seconds'] / erm['seconds']:11.2f} {row['paired']:13.2f} "
      f"{row['temporaries'] / 2**20:16.1f}"
    )
  line = {
    "benchmark": "sharpness",
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "batch": args.batch,
    "rows": rows,
  }
  print(json.dumps(line))


if __name__ == "__main__":
  main()
