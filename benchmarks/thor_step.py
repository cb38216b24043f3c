"""What a training step of THOR and of its rivals costs beside a dense one.

    python benchmarks/thor_step.py

The whole step: one or two passes, gradients, AdamW; width 512, feed-forward
layers of 2,048 hidden units, float32, on one device and one batch. Every round
runs each system once; times are ratios of medians, with the ratios of the least
behind them. A step of two passes through two experts a layer may take 2.1 times
a dense one (`gate`); it fails if both ratios are above, and then the exit
status is 1. Each further expert costs its update in AdamW. The last line is
JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import numpy as np

from configs.thor import get_config
from thor.train import make_setup, make_step

GATE = 2.1
VOCABULARY = 10_000
SYSTEMS = {
  "dense": {"routing.kind": "dense", "routing.experts": 1,
            "objective.passes": 1},
  "R-Drop": {"routing.kind": "dense", "routing.experts": 1},
  "THOR, 2 experts": {},
  "THOR, 8 experts": {"routing.experts": 8},
  "THOR by token, 2 experts": {"routing.level": "token"},
  "Switch, 2 experts": {"routing.kind": "switch", "objective.passes": 1},
  "random Switch, 2 experts": {"routing.kind": "random_switch",
                               "objective.passes": 1},
  "hash, 2 experts": {"routing.kind": "hash", "objective.passes": 1},
}  # fmt: skip


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rows", type=int, default=64)
  parser.add_argument("--length", type=int, default=32)
  parser.add_argument("--layers", type=int, default=2, help="of each stack")
  parser.add_argument("--rounds", type=int, default=9)
  args = parser.parse_args()
  steps = {name: Step(args, changed) for name, changed in SYSTEMS.items()}
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for _ in range(args.rounds):
    for name, step in steps.items():
      seconds[name].append(step.seconds())
  rows = {name: compare(own, seconds["dense"]) for name, own in seconds.items()}
  gated = rows["THOR, 2 experts"]
  gated["holds"] = min(gated["over_dense"], gated["least_over_dense"]) <= GATE
  print(f"{'':28s}     ms  time/dense (least)  parameters")
  for name, row in rows.items():
    row["parameters"] = steps[name].parameters
    print(
      f"{name:28s} {1e3 * row['seconds']:6.0f} {row['over_dense']:11.2f} "
      f"({row['least_over_dense']:5.2f})  {row['parameters']:>10,}"
    )
  print(f"gate {GATE}: {'holds' if gated['holds'] else 'missed'}")
  line = {"benchmark": "thor_step", "jax": jax.__version__,
          "device": jax.devices()[0].device_kind, **vars(args),
          "rows_of": rows}  # fmt: skip
  print(json.dumps(line))
  return 0 if gated["holds"] else 1


def compare(own: list[float], dense: list[float]) -> dict[str, Any]:
  """Seconds, and over those of the dense step."""
  median = statistics.median
  return {
    "seconds": median(own),
    "over_dense": median(own) / median(dense),
    "least_over_dense": min(own) / min(dense),
  }


class Step:
  """A compiled step with its state and batch."""

  def __init__(self, args: argparse.Namespace, changed: dict[str, Any]):
    config = get_config("iwslt14")
    config.accum = 1
    with config.ignore_type():
      config.model.update({"preset": "base", "dropout": 0.1})
      config.model.update(
        {"encoder_layers": args.layers, "decoder_layers": args.layers}
      )
    config.update_from_flattened_dict(changed)
    rng = np.random.default_rng(0)
    table = None
    if config.routing.kind == "hash":
      count = config.routing.experts
      table = rng.integers(count, size=VOCABULARY).astype(np.int32)
    setup = make_setup(config, vocab_size=VOCABULARY, table=table)
    self._state = setup.create()
    self._step = make_step(config, setup)
    self.parameters = sum(x.size for x in jax.tree.leaves(self._state.params))
    shape = (args.rows, args.length)
    tokens = rng.integers(4, VOCABULARY, (2, *shape)).astype(np.int32)
    self._batch = jax.device_put(
      {"source": tokens[0], "target": tokens[1]}, setup.sharding
    )
    for _ in range(2):  # compiles, and warms up
      self.seconds()

  def seconds(self) -> float:
    """Of one step."""
    start = time.perf_counter()
    self._state, metrics = self._step(self._state, self._batch)
    jax.block_until_ready((self._state, metrics))
    return time.perf_counter() - start


if __name__ == "__main__":
  raise SystemExit(main())
