r"""Birdie's models as rows get longer: training, memory, decoding.

    python benchmarks/birdie_lengths.py                       # a CPU's sizes
    python benchmarks/birdie_lengths.py --width=512 --layers=12 --heads=4 \
      --dtype=bfloat16 --lengths=2048,8192,32768 --tokens=65536 --peak=989e12

Every length has as many tokens in a batch (at least one row), so what changes
is the length alone. Training is a step of AdamW; its work is 6 a parameter and
token, and for attention 6 t a head's width and token (half of all pairs, three
passes of two products). `--peak`, in FLOP/s of the device, turns it into
utilization. Decoding is one token of one sequence after a prompt of that
length; its state's bytes stand beside it. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from birdie import decode
from birdie.losses import batch_losses
from birdie.models import init_params, make_model
from common.optim import make_optimizer
from configs.birdie import get_config

VOCABULARY = 512
DECODED = 64  # tokens behind a prompt, at most
# Layers of the Gated SSM for each of the others': about as many parameters.
DEPTH = {"gated_ssm": 2, "hawk": 1, "transformer": 1}


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--lengths", default="512,2048,8192")
  add("--tokens", type=int, default=8192, help="of a batch, at least")
  add("--width", type=int, default=192, help="of the model, and of the state")
  add("--layers", type=int, default=2, help="twice as many for the Gated SSM")
  add("--heads", type=int, default=3)
  add("--dtype", default="float32")
  add("--models", default=",".join(DEPTH))
  add("--scan_impl", default="auto", help="of the recurrences")
  add("--rounds", type=int, default=5)
  add("--peak", type=float, default=0.0, help="FLOP/s of the device")
  args = parser.parse_args()
  lengths = [int(length) for length in args.lengths.split(",")]
  rows = {
    f"{name} {length}": measure(args, name, length)
    for length in lengths
    for name in args.models.split(",")
  }
  print(
    f"{'model, length':20s}  tokens/s   MFU %  temporaries  decoding, ms"
    "   state, bytes  parameters"
  )
  for name, row in rows.items():
    share = f"{100 * row['utilization']:7.1f}" if args.peak else " " * 7
    print(
      f"{name:20s} {row['tokens_per_second']:9,.0f} {share} "
      f"{row['temporaries'] / 2**20:8,.0f} MiB {1e3 * row['decode']:13.2f} "
      f"{row['state']:14,}  {row['parameters']:10,}"
    )
  device = jax.devices()[0].device_kind
  line = {"benchmark": "birdie_lengths", "jax": jax.__version__,
          "device": device, **vars(args), "rows_of": rows}  # fmt: skip
  print(json.dumps(line))
  return 0


def measure(args: argparse.Namespace, name: str, length: int) -> dict[str, Any]:
  """One model at one length."""
  config = get_config()
  config.model.update(
    {"name": name, "width": args.width, "state": args.width,
     "layers": args.layers * DEPTH[name], "heads": args.heads,
     "dtype": args.dtype, "scan_impl": args.scan_impl}
  )  # fmt: skip
  if name == "transformer":
    config.model.bidirectional = "all"
  model = make_model(config.model, VOCABULARY)
  params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(params))
  made = train(args, config, model, params, length)
  work = 6 * count
  if name == "transformer":
    work += 6 * length * args.width * config.model.layers
  rate = made["tokens_per_second"]
  return made | {
    "utilization": work * rate / args.peak if args.peak else None,
    "decode": decode_seconds(args, model, params, length),
    "state": decode.state_bytes(model, length + DECODED),
    "parameters": count,
  }


def train(args, config, model, params, length: int) -> dict[str, Any]:
  """Tokens a second and temporaries of a step; prefixes of half a row."""
  shape = (max(args.tokens // length, 1), length)
  rng = np.random.default_rng(0)
  places = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
  batch = {
    "tokens": rng.integers(0, VOCABULARY, shape, np.int32),
    "targets": rng.integers(0, VOCABULARY, shape, np.int32),
    "segment_ids": np.ones(shape, np.int32),
    "positions": places,
    "prefix": places < length // 2,
  }
  batch = jax.tree.map(jnp.asarray, batch)
  tx, _ = make_optimizer(config.optim, 100)

  def step(state, batch):
    params, moments = state

    def loss_fn(params):
      return jnp.mean(batch_losses(model, params, batch, chunk=1024)[0])

    updates, moments = tx.update(jax.grad(loss_fn)(params), moments, params)
    return jax.tree.map(jnp.add, params, updates), moments

  state = (jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params))
  compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
  seconds = []
  for _ in range(args.rounds + 1):  # the first warms up
    start = time.perf_counter()
    state = jax.block_until_ready(compiled(state, batch))
    seconds.append(time.perf_counter() - start)
  memory: Any = compiled.memory_analysis()
  return {
    "tokens_per_second": shape[0] * length / statistics.median(seconds[1:]),
    "temporaries": memory.temp_size_in_bytes,
  }


def decode_seconds(
  args: argparse.Namespace, model: Any, params: Any, length: int
) -> float:
  """Of one token after a prompt, the median of many."""
  prompt = np.random.default_rng(1).integers(2, VOCABULARY, (1, length))
  steps = min(8 * args.rounds, DECODED)
  state = decode.prefill(
    model,
    params,
    jnp.asarray(prompt, jnp.int32),
    jnp.full(1, length),
    capacity=length + DECODED,
  )
  token, seconds = jnp.ones(1, jnp.int32), []
  for _ in range(steps):
    start = time.perf_counter()
    logits, state = decode.decode_step(model, params, state, token)
    token = jax.block_until_ready(jnp.argmax(logits, -1).astype(jnp.int32))
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[steps // 4 :])


if __name__ == "__main__":
  raise SystemExit(main())
