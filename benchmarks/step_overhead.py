"""What the loop costs over the bare jitted step, and what input costs.

    python benchmarks/step_overhead.py

Birdie's own step, data and hooks at a size of about 20 ms a step, in one
process. Every round runs the same number of steps three ways: the bare jitted
step on one batch that stays on the device; the loop with that same batch (the
overhead); the loop with the real loader. Of the last, `input wait` is the share
of the time that the loop spends in `next(data)`, and `shared cores` what the
step loses to the loader's thread where the device is the host's own CPU. Prints
medians, ratios, and one JSON line.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time

import jax

from birdie import data as data_lib
from birdie.train import make_loss_fn, make_setup
from common import hooks as hooks_lib
from common.checkpoint import Checkpointer
from common.metrics import MetricWriter
from common.progress import ProgressBar
from common.rngs import RngStreams
from common.step import make_train_step
from common.train import train
from configs.birdie import get_config


class Same:
  """The same device batch for ever."""

  def __init__(self, batch):
    self._batches = itertools.repeat(batch)

  def __next__(self):
    return next(self._batches)


class Timed:
  """An iterator, and the seconds spent waiting for it."""

  def __init__(self, data):
    self._data = data
    self.seconds = 0.0

  def __next__(self):
    start = time.perf_counter()
    batch = next(self._data)
    self.seconds += time.perf_counter() - start
    return batch


def make_config(width: int):
  config = get_config("uniform")
  config.data.sequence_length = 256
  config.data.batch_size = 2
  config.data.pack_rows = 2
  config.evaluation.batch_size = 2
  config.model.update({"width": width, "state": width, "layers": 2})
  return config


def make_ways(args: argparse.Namespace, config, loader, setup) -> dict:
  """Name -> a function that runs the steps and returns seconds."""
  step = make_train_step(
    make_loss_fn(setup.model, setup.curriculum), setup.tx, RngStreams(0)
  )
  batch = next(loader)
  folder = tempfile.mkdtemp()
  writer = MetricWriter(folder)

  def bare() -> float:
    state = setup.create()
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(args.steps):
      state, _ = step(state, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  def loop(data) -> float:
    state = setup.create()
    jax.block_until_ready(state)
    guard = hooks_lib.StopOnNonFinite()
    logs = hooks_lib.LogHook(
      config.log.every, writer, ProgressBar(args.steps), examples_per_step=1
    )
    # Due at no step of a round: what saving and evaluation take is their own.
    never = 10 * args.steps
    save = hooks_lib.CheckpointHook(
      lambda step: step == never, Checkpointer(folder + "/c"), host={}
    )
    hooks = [guard, logs, save, hooks_lib.PreemptionHook(save)]
    start = time.perf_counter()
    state = train(state, step, data, num_steps=args.steps, hooks=hooks)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  return {
    "bare step": bare,
    "loop, same batch": lambda: loop(Same(batch)),
    "loop, real loader": lambda: loop(loader),
  }


def report(times: dict[str, list[float]], waits: list[float]) -> None:
  medians = {name: statistics.median(t) for name, t in times.items()}
  for name, median in medians.items():
    least, rounds = min(times[name]), len(times[name])
    print(
      f"{name:20s} {1e3 * median:8.2f} ms a step (median of {rounds}; "
      f"least {1e3 * least:.2f})"
    )
  bare, same, real = medians.values()
  ratios = {
    "loop_overhead": same / bare - 1,
    "overhead_of_the_least": (
      min(times["loop, same batch"]) / min(times["bare step"]) - 1
    ),
    "input_wait": statistics.median(waits) / real,
    "shared_cores": real / same - 1,
  }
  for name, ratio in ratios.items():
    print(f"{name:22s} {100 * ratio:6.2f} %")
  line = {
    "benchmark": "step_overhead",
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "medians_s": medians,
    **ratios,
  }
  print(json.dumps(line))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=200)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--width", type=int, default=256)
  args = parser.parse_args()

  config = make_config(args.width)
  corpus = data_lib.make_corpus(config)
  setup = make_setup(config, corpus.tokenizer)
  data = data_lib.train_loader(
    config, corpus, setup.configurations, sharding=setup.sharding
  )
  with data, jax.set_mesh(setup.mesh):
    loader = Timed(data)
    ways = make_ways(args, config, loader, setup)
    times, waits = {name: [] for name in ways}, []
    for way in ways.values():
      way()
    for _ in range(args.rounds):
      loader.seconds = 0.0
      for name, way in ways.items():
        times[name].append(way() / args.steps)
      waits.append(loader.seconds / args.steps)
  report(times, waits)


if __name__ == "__main__":
  main()
