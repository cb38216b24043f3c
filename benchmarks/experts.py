"""What the forms of `common.parallel.experts` cost beside one dense layer.

    python benchmarks/experts.py
    python benchmarks/experts.py --tokens=2048 --rounds=15

Layers: everything on one device in one process, float32. Forward alone, and
forward with the gradients of all weights and of the input, over the same of one
feed-forward layer of the same width. Times are ratios of medians over rounds in
which every row runs once, with the ratios of the least behind them; slow rows
run in the first rounds only. `gate` is what a ratio may be at most: it fails if
both ratios are above, and with 2048 tokens or more; then the exit status is 1.
FLOPs are the compiler's, which counts the body of a loop once: rows that loop
show none. `temp` is its memory for temporaries, in MiB.

The number in a name is that of the experts. `zeros` fills an array of the
stack's shape: what the gradient of a stack costs at least beyond that of one
expert. `one-hot` multiplies tokens with a one-hot array of experts and places
(Mesh TensorFlow, Switch Transformer), `all, masked` computes all experts for
all tokens and keeps one, as the reference of THOR does.

Traffic: on 8 simulated devices, in a process of its own, compiled and not run;
bytes that a device sends, as `traffic` reads them from the program,
beside the formulas in the docstring of `common.parallel.experts`.

Outputs are written into the memory of the outputs before them, and the process
starts itself again with huge pages for malloc: else clearing fresh pages is a
part of every time. The last line is JSON.
"""

import argparse
import functools
import json
import math
import operator
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from common.parallel import experts, make_mesh
from common.parallel.traffic import bytes_sent

DEVICES, EXPERTS = 8, 4  # of the traffic; of the rows that choose by token
SELECTED = 1.10
BALANCED = 1.25
Row = dict[str, Any]


class Candidate(NamedTuple):
  """One row.

  Attributes:
    call: `(stack, x, chosen) -> [n d]`.
    experts: of its stack.
    chosen: the third argument: an expert, or one for each token.
    gate: over the dense layer, if there is a limit.
    loops: the compiler's FLOPs say nothing.
    rounds: it runs in no more than so many.
  """

  call: Callable[..., Any]
  experts: int
  chosen: jax.Array
  gate: float | None = None
  loops: bool = False
  rounds: float = math.inf


def make_stack(key: jax.Array, count: int, width: int, hidden: int) -> dict:
  up, down = jax.random.split(key)
  return {
    "up": {
      "kernel": jax.random.normal(up, (count, width, hidden)) / width**0.5,
      "bias": jnp.zeros((count, hidden)),
    },
    "down": {
      "kernel": jax.random.normal(down, (count, hidden, width)) / hidden**0.5,
      "bias": jnp.zeros((count, width)),
    },
  }


def dense(stack: dict, x: jax.Array, chosen: jax.Array) -> jax.Array:
  """The only expert of a stack of one."""
  del chosen
  up, down = stack["up"], stack["down"]
  hidden = jax.nn.relu(x @ up["kernel"][0] + up["bias"])
  return hidden @ down["kernel"][0] + down["bias"]


def with_capacity(stack: dict, x: jax.Array, ids: jax.Array) -> jax.Array:
  room = experts.capacity_of(len(x), len(stack["up"]["kernel"]), 1.25)
  return experts.capacity(stack, x[None], ids[None], slots=room)[0][0]


def one_hot(stack: dict, x: jax.Array, ids: jax.Array) -> jax.Array:
  count = len(stack["up"]["kernel"])
  room = experts.capacity_of(len(x), count, 1.25)
  goes = jax.nn.one_hot(ids, count)
  place = (jnp.cumsum(goes, axis=0) - 1) * goes
  where = jax.nn.one_hot(place.sum(axis=1).astype(int), room)
  dispatch = goes[:, :, None] * where[:, None, :]
  up, down = stack["up"], stack["down"]
  slots = jnp.einsum("nec,nd->ecd", dispatch, x)
  hidden = jnp.einsum("ecd,edf->ecf", slots, up["kernel"])
  hidden = jax.nn.relu(hidden + up["bias"][:, None])
  out = jnp.einsum("ecf,efd->ecd", hidden, down["kernel"])
  return jnp.einsum("nec,ecd->nd", dispatch, out + down["bias"][:, None])


def all_masked(stack: dict, x: jax.Array, ids: jax.Array) -> jax.Array:
  total = jnp.zeros_like(x)
  for k in range(len(stack["up"]["kernel"])):
    one = jax.tree.map(operator.itemgetter(slice(k, k + 1)), stack)
    total += jnp.where((ids == k)[:, None], dense(one, x, ids), 0)
  return total


def make_candidates(tokens: int) -> dict[str, Candidate]:
  key = jax.random.key(1)
  free = jax.random.randint(key, (tokens,), 0, EXPERTS)
  even = experts.balanced_ids(key, 1, tokens, EXPERTS).reshape(-1)
  one, many = jnp.int32(1), EXPERTS
  slow: dict[str, Any] = {"rounds": 3}
  return {
    "dense": Candidate(dense, 1, one),
    "selected 2": Candidate(experts.selected, 2, one, SELECTED),
    "selected 64": Candidate(experts.selected, 64, one, SELECTED),
    "balanced 4": Candidate(experts.balanced, many, even, BALANCED),
    "grouped 4": Candidate(experts.grouped, many, free, loops=True),
    "capacity 4, 1.25": Candidate(with_capacity, many, free),
    "averaged 4": Candidate(
      lambda stack, x, _: experts.averaged(stack, x),
      many, one, loops=True, **slow,
    ),
    "one-hot 4, 1.25": Candidate(one_hot, many, free, **slow),
    "all, masked 4": Candidate(all_masked, many, free, **slow),
  }  # fmt: skip


class Program:
  """A compiled program, what the compiler says of it, and its times.

  Each run writes over what the one before returned, as in a training step. For
  fresh memory the kernel would have to clear pages, which for the gradient of
  64 experts takes longer than the layer.
  """

  def __init__(self, call: Callable[..., Any], *inputs: Any):
    def run(last: Any, *inputs: Any) -> Any:
      del last
      return call(*inputs)

    self._inputs = inputs
    self._last = jax.tree.map(
      lambda out: jnp.zeros(out.shape, out.dtype),
      jax.eval_shape(call, *inputs),
    )
    # Kept although unused: its memory is what counts.
    step = jax.jit(run, donate_argnums=0, keep_unused=True)
    self._compiled = step.lower(self._last, *inputs).compile()
    cost: Any = self._compiled.cost_analysis()
    memory: Any = self._compiled.memory_analysis()
    self.flops = cost.get("flops", 0.0)
    self.temp = memory.temp_size_in_bytes
    self.times: list[float] = []

  def run(self) -> None:
    start = time.perf_counter()
    self._last = self._compiled(self._last, *self._inputs)
    jax.block_until_ready(self._last)
    self.times.append(time.perf_counter() - start)


def forward_and_back(call: Callable[..., Any]) -> Callable[..., Any]:
  """The output, and the gradients of the weights and of the input."""

  def run(stack, x, *chosen_and_upstream):
    *chosen, upstream = chosen_and_upstream
    out, pull = jax.vjp(lambda stack, x: call(stack, x, *chosen), stack, x)
    return out, pull(upstream)

  return run


def time_in_rounds(
  programs: dict[str, list[Program]], limits: dict[str, float], rounds: int
) -> None:
  for i in range(rounds + 1):
    for name, pair in programs.items():
      for program in pair:
        if i <= limits.get(name, math.inf):
          program.run()
        if i == 0:  # the first round warms up
          program.times.clear()


def compare(mine: Program, dense: Program, gate: float | None) -> Row:
  ratio = statistics.median(mine.times) / statistics.median(dense.times)
  least = min(mine.times) / min(dense.times)
  return {
    "seconds": statistics.median(mine.times),
    "over_dense": ratio,
    "least_over_dense": least,
    "gate": gate,
    "holds": None if gate is None else min(ratio, least) <= gate,
    "temp": mine.temp,
  }


def layers(args: argparse.Namespace) -> dict[str, Row]:
  """The first table."""
  key = jax.random.key(0)
  x = jax.random.normal(key, (args.tokens, args.width))
  candidates = make_candidates(args.tokens)
  stacks = {
    count: make_stack(key, count, args.width, args.hidden)
    for count in {candidate.experts for candidate in candidates.values()}
  }
  programs = {
    name: [
      Program(c.call, stacks[c.experts], x, c.chosen),
      Program(forward_and_back(c.call), stacks[c.experts], x, c.chosen, x),
    ]
    for name, c in candidates.items()
  }
  zeros = functools.partial(jax.tree.map, jnp.zeros_like)
  programs["zeros 64"] = [Program(zeros, stacks[64])]
  limits = {name: c.rounds for name, c in candidates.items()}
  time_in_rounds(programs, limits, args.rounds)
  rows = {}
  for name, c in candidates.items():
    gate = c.gate if args.tokens >= 2048 else None
    for part, mine, dense in zip(
      ("forward", "with gradients"), programs[name], programs["dense"]
    ):
      flops = None if c.loops else mine.flops / dense.flops
      rows[f"{name}, {part}"] = compare(mine, dense, gate) | {
        "flops_over_dense": flops
      }
  (fill,), both = programs["zeros 64"], programs["dense"][1]
  rows["zeros 64"] = compare(fill, both, None) | {"flops_over_dense": None}
  show_layers(rows)
  return rows


def show_layers(rows: dict[str, Row]) -> None:
  print(f"{'':32s}     ms  time/dense (least)  gate holds FLOPs/dense  temp")
  for name, row in rows.items():
    gate = "   -" if row["gate"] is None else f"{row['gate']:.2f}"
    holds = {None: "-", True: "yes", False: "NO"}[row["holds"]]
    flops = row["flops_over_dense"]
    print(
      f"{name:32s} {row['seconds'] * 1e3:6.0f} {row['over_dense']:11.2f} "
      f"({row['least_over_dense']:5.2f})  {gate} {holds:>5s} "
      f"{'-' if flops is None else f'{flops:.2f}':>11s} "
      f"{row['temp'] / 2**20:5.0f}"
    )


def traffic(args: argparse.Namespace) -> dict[str, Row]:
  """The second table, from a process with simulated devices."""
  flags = [f"--{name}={getattr(args, name)}" for name in ("width", "hidden")]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(DEVICES),
  }
  printed = subprocess.run(
    [sys.executable, __file__, "--traffic", f"--tokens={args.tokens}", *flags],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  ).stdout
  rows = json.loads(printed.splitlines()[-1])
  print(
    f"\n{'bytes that each of 8 devices sends':32s}  formula  by the program"
  )
  for name, row in rows.items():
    kinds = ", ".join(f"{kind} {size:,}" for kind, size in row["sent"].items())
    print(f"{name:32s} {row['formula']:>12,}  {kinds}")
  return rows


class Sent(NamedTuple):
  """A form over a mesh, how its stack is cut, and bytes by its formula."""

  call: Callable[[Any, jax.Array], jax.Array]
  cut: str
  formula: float


def make_sent(args: argparse.Namespace) -> dict[str, Sent]:
  """float32: an expert's kernels, tokens of a device, rows of all slots."""
  at = experts.Placement("fsdp", ("data", "fsdp"))
  n, count = args.tokens // DEVICES, DEVICES
  room = experts.capacity_of(n, count, 1.25)
  ids = jnp.arange(args.tokens) % count
  share, token = (DEVICES - 1) / DEVICES, 4 * args.width

  def capacity(stack, x):
    groups, group_ids = x.reshape(DEVICES, n, -1), ids.reshape(DEVICES, n)
    out, _ = experts.capacity(
      stack, groups, group_ids, slots=room, placement=at
    )
    return out.reshape(x.shape)

  return {
    "selected": Sent(
      lambda s, x: experts.selected(s, x, jnp.int32(1), placement=at),
      "f", 4 * 2 * args.width * args.hidden * share,
    ),
    "balanced": Sent(
      lambda s, x: experts.balanced(s, x, ids, placement=at),
      "e", 2 * n * token * share,
    ),
    "capacity, 1.25": Sent(capacity, "e", 2 * count * room * token * share),
    "grouped": Sent(
      lambda s, x: experts.grouped(s, x, ids, placement=at),
      "f", 2 * n * token * (DEVICES - 1),
    ),
  }  # fmt: skip


def compile_traffic(args: argparse.Namespace) -> dict[str, Row]:
  """Rows of `traffic`; for a process with the simulated devices."""
  mesh = make_mesh({"fsdp": DEVICES})
  shapes = jax.eval_shape(
    functools.partial(
      make_stack, count=DEVICES, width=args.width, hidden=args.hidden
    ),
    jax.random.key(0),
  )
  x = jax.ShapeDtypeStruct((args.tokens, args.width), jnp.float32)
  rows = {}
  for name, (call, cut, formula) in make_sent(args).items():
    stack, placed = place(shapes, x, mesh, cut)
    back = forward_and_back(call)
    with jax.set_mesh(mesh):
      forward: Any = jax.jit(call).lower(stack, placed).compile()
      both: Any = jax.jit(back).lower(stack, placed, placed).compile()
    for part, program, passes in (
      ("forward", forward, 1), ("with gradients", both, 2)
    ):  # fmt: skip
      rows[f"{name}, {part}"] = {
        "formula": round(passes * formula),
        "sent": bytes_sent(program.as_text()),
      }
  return rows


def place(shapes: Any, x: Any, mesh: jax.sharding.Mesh, cut: str) -> Any:
  """Abstract arrays with their places: the stack cut along e or along f."""
  hidden = {
    "up": {"kernel": jax.P(None, None, "fsdp"), "bias": jax.P(None, "fsdp")},
    "down": {"kernel": jax.P(None, "fsdp"), "bias": jax.P()},
  }
  whole = jax.tree.map(lambda _: jax.P("fsdp"), shapes)

  def put(shape: Any, spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
      shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec)
    )

  stack = jax.tree.map(put, shapes, hidden if cut == "f" else whole)
  return stack, put(x, jax.P("fsdp"))


# Each prints its table and returns its rows by name.
SECTIONS = {"layers": layers, "traffic": traffic}


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--tokens", type=int, default=8192)
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--hidden", type=int, default=2048)
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--traffic", action="store_true", help="only that: JSON")
  args = parser.parse_args()
  if args.tokens % 64 or args.hidden % DEVICES:
    parser.error("--tokens must be a multiple of 64, --hidden of 8")
  if args.traffic:
    print(json.dumps(compile_traffic(args)))
    return 0
  if "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.argv])
  found = {name: section(args) for name, section in SECTIONS.items()}
  line = {
    "benchmark": "experts",
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "tokens": args.tokens,
    "width": args.width,
    "hidden": args.hidden,
    "rounds": args.rounds,
    **found,
  }
  print(json.dumps(line))
  rows = [row for section in found.values() for row in section.values()]
  return 1 if any(row.get("holds") is False for row in rows) else 0


if __name__ == "__main__":
  raise SystemExit(main())
