"""What a training step of Birdie's models costs, beside transformers' models.

    python benchmarks/birdie_step.py

The whole step: forward, backward, clipping, AdamW; rows of one segment each,
causal as the peers are, on the device that jax finds, in `--dtype` (PyTorch's
by autocast). With torch and transformers installed (the
`parity` extra) Hawk stands beside RecurrentGemma without attention layers, and
the Transformer beside Llama with PyTorch's fused attention. Every round runs
each once; tokens a second come from medians, `times` is ours over theirs, with
the ratio of the least times behind it. Compilation is timed at one depth and at
twice that: layers are scanned, so both should be equal.

On a CPU with AVX-512 PyTorch multiplies with it and XLA does not. The settings
MKL_ENABLE_INSTRUCTIONS=AVX2, ONEDNN_MAX_CPU_ISA=AVX2 and
ATEN_CPU_CAPABILITY=avx2 hold PyTorch to what XLA has.

Gates, and the exit status 1 when one is missed: Hawk 3 times its peer, the
Transformer once, on a CPU. The last line is JSON.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from typing import Any

# Both libraries shall have room on a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from birdie.losses import batch_losses
from birdie.models import init_params, make_model
from common.optim import make_optimizer
from configs.birdie import get_config

GATES = {"hawk": 3.0, "transformer": 1.0}
VOCABULARY = 512


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--rows", type=int, default=8)
  add("--length", type=int, default=512)
  add("--width", type=int, default=192, help="of the model, and of the state")
  add("--layers", type=int, default=4)
  add("--heads", type=int, default=3)
  add("--gate_blocks", type=int, default=8, help="of Hawk")
  add("--rounds", type=int, default=7)
  add("--dtype", default="float32")
  add("--bidirectional", default="none", help="the peers can do none only")
  args = parser.parse_args()
  steps = {name: Step(args, name) for name in ("gated_ssm", "hawk",
                                               "transformer")}  # fmt: skip
  runs: dict[str, Any] = {name: step.run for name, step in steps.items()}
  has_peers = all(map(importlib.util.find_spec, ("torch", "transformers")))
  if has_peers:
    from birdie_step_peers import torch_steps

    sizes = {"vocab_size": VOCABULARY, **steps["transformer"].sizes}
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    peers = torch_steps(
      sizes,
      rows=args.rows,
      length=args.length,
      device=device,
      dtype=args.dtype,
    )
    runs |= {f"{name}, transformers": run for name, run in peers.items()}
  for run in runs.values():  # compiles, and warms up
    run()
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(args.rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  rows = {}
  for name, own in seconds.items():
    tokens = args.rows * args.length
    rows[name] = {
      "tokens_per_second": tokens / statistics.median(own),
      "milliseconds": 1e3 * statistics.median(own),
    }
    if name in steps:
      rows[name] |= steps[name].facts
  for name, gate in GATES.items() if has_peers else ():
    own, peer = seconds[name], seconds[f"{name}, transformers"]
    times = statistics.median(peer) / statistics.median(own)
    least = min(peer) / min(own)
    rows[name] |= {"times": times, "least_times": least, "gate": gate,
                   "holds": times >= gate}  # fmt: skip
  show(rows)
  device = jax.devices()[0]
  print(json.dumps({"benchmark": "birdie_step", "jax": jax.__version__,
                    "device": device.device_kind, **vars(args),
                    "rows_of": rows}))  # fmt: skip
  missed = [n for n, row in rows.items() if not row.get("holds", True)]
  return 1 if missed and device.platform == "cpu" else 0


def show(rows: dict[str, dict[str, Any]]) -> None:
  """The table."""
  print(
    f"{'':26s}  tokens/s     ms   times (least)  gate  parameters  "
    "compiled in s (twice the depth)  temporaries"
  )
  for name, row in rows.items():
    line = f"{name:26s} {row['tokens_per_second']:9,.0f}"
    line += f" {row['milliseconds']:6.0f}"
    if "times" in row:
      line += f" {row['times']:7.2f} ({row['least_times']:5.2f})"
      line += f" {row['gate']:5.1f}"
    else:
      line += " " * 22
    if "parameters" in row:
      line += f"  {row['parameters']:>10,}"
      line += f"  {row['compile']:5.1f} ({row['compile_twice']:.1f})"
      line += f"{'':16s}{row['temporaries'] / 2**20:10.0f} MiB"
    print(line)


class Step:
  """A compiled step with its state and batch."""

  def __init__(self, args: argparse.Namespace, name: str):
    config = get_config()
    config.model.update(
      {"name": name, "width": args.width, "state": args.width,
       "layers": args.layers, "heads": args.heads,
       "gate_blocks": args.gate_blocks, "dtype": args.dtype,
       "bidirectional": args.bidirectional}
    )  # fmt: skip
    self._config = config
    self.sizes = {
      key: config.model[key]
      for key in ("width", "state", "layers", "heads", "gate_blocks")
    }
    self.sizes["mlp_width"] = args.width * 8 // 3
    shape = (args.rows, args.length)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape, np.int32)
    places = np.broadcast_to(np.arange(args.length, dtype=np.int32), shape)
    self._batch = {
      "tokens": tokens,
      "targets": np.roll(tokens, -1, axis=1),
      "segment_ids": np.ones_like(tokens),
      "positions": places,
      "prefix": np.zeros(shape, bool),
    }
    self._batch = jax.tree.map(jnp.asarray, self._batch)
    twice, _ = self._compiled(2 * args.layers)
    own, (self._step, self._state) = self._compiled(args.layers)
    memory = self._step.memory_analysis()
    self.facts = {
      "parameters": sum(x.size for x in jax.tree.leaves(self._state[0])),
      "compile": own,
      "compile_twice": twice,
      "temporaries": memory.temp_size_in_bytes,
      "flops": self._step.cost_analysis()["flops"],
    }

  def _compiled(self, layers: int) -> tuple[float, Any]:
    """Seconds of compilation, and the program with its first state."""
    config = self._config.copy_and_resolve_references()
    config.model.layers = layers
    model = make_model(config.model, VOCABULARY)
    tx, _ = make_optimizer(config.optim, 100)

    def init(key):
      params = init_params(model, key)
      return params, tx.init(params)

    def step(state, batch):
      params, moments = state

      def loss_fn(params):
        return jnp.mean(batch_losses(model, params, batch)[0])

      gradients = jax.grad(loss_fn)(params)
      updates, moments = tx.update(gradients, moments, params)
      return jax.tree.map(jnp.add, params, updates), moments

    state = jax.jit(init)(jax.random.key(0))
    lowered = jax.jit(step, donate_argnums=0).lower(state, self._batch)
    start = time.perf_counter()
    compiled = lowered.compile()
    return time.perf_counter() - start, (compiled, state)

  def run(self) -> None:
    """One step."""
    self._state = self._step(self._state, self._batch)
    jax.block_until_ready(self._state)


if __name__ == "__main__":
  raise SystemExit(main())
