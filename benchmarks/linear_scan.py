"""What the recurrence costs in each form, beside the speed of memory.

    python benchmarks/linear_scan.py
    python benchmarks/linear_scan.py --shapes=8x4096x512 --dtypes=float32
    python benchmarks/linear_scan.py --write --plot=linear_scan.png

The unit is an elementwise program over the same arrays in the same dtype and
process: `a x` for the forward pass (it moves 3 arrays, as the recurrence must),
and `a x`, `g h`, `g a` for forward and backward (8 arrays). Every round runs
every row once; printed are medians, and over the unit the ratios of medians
with those of the least in brackets. `temp` is memory for temporaries, in
arrays, as the compiler plans it. A gate is missed when both ratios are.
`error` is how far a row's numbers, of the first of the batch, are at most from
those of a loop in 64 bits, over the largest of the loop's.

Rows: the forms of `common.parallel.linear_scan`; `reverse` and `resets` of the
first one; `lax.associative_scan` with jax's own gradient; `scan over rows`, a
`lax.scan` over time-major copies (how recurrentgemma's pure form works);
a loop and the associative scan of torch; accelerated-scan's reference or its
Triton kernel, and flash-linear-attention's HGRN kernel, each where it is
installed. Slow rows run in the first rounds only.

`--write` puts the form that trains fastest at each shape into
`common/parallel/scan_choice.json`, which `impl="auto"` reads. The process
starts itself again with huge pages for malloc: else clearing fresh pages is a
part of every time. The last line is JSON.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Both libraries shall have room on a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from linear_scan_peers import torch_peers
from linear_scan_plot import draw

from common.parallel import linear_scan
from common.parallel.scan_choice import TABLE, Measured, table

Arrays = tuple[Any, ...]
PLATFORM = jax.default_backend()
IS_CPU = PLATFORM == "cpu"
SHAPES = {
  "cpu": "1x1024x512,1x16384x512,8x1024x512,8x4096x512",
  "gpu": "1x1024x512,1x65536x512,64x1024x512,8x4096x2048,8x16384x2048",
}
FORMS: dict[str, tuple[str, ...]] = {
  "cpu": ("sequential", "chunked", "associative"),
  "gpu": ("triton", "associative"),
  "tpu": ("mosaic", "associative"),
}
ERROR = {"float32": 1e-5, "bfloat16": 1e-2}
# Of the first form, which compute something else.
VARIANTS = tuple(
  f"{FORMS.get(PLATFORM, ('',))[0]}, {name}" for name in ("reverse", "resets")
)
SLOW = 3  # rounds of rows that are several times slower


class Row(NamedTuple):
  """A candidate.

  Attributes:
    call: (x, a, g) -> anything to wait for.
    part: "forward" or "both".
    temp: bytes for temporaries, where a compiler says so.
    rounds: it runs in no more than so many.
    wait: until what it returned is there.
  """

  call: Callable[..., Any]
  part: str
  temp: int | None = None
  rounds: float = math.inf
  wait: Callable[[Any], Any] = jax.block_until_ready


class Limit(NamedTuple):
  """A gate: `value` may be at most `limit`.

  Attributes:
    value: the ratio of medians.
    least: of the least times.
  """

  what: str
  value: float
  least: float
  limit: float

  @property
  def holds(self) -> bool:
    return min(self.value, self.least) <= self.limit


# -- candidates ----------------------------------------------------------------


def unit_forward(x: Any, a: Any, g: Any) -> Any:
  del g
  return a * x


def unit_both(x: Any, a: Any, g: Any) -> Any:
  # The barrier keeps the two passes apart, as training does.
  h = jax.lax.optimization_barrier(a * x)
  return h, g * h, g * a


def rows_scanned(x: Any, a: Any) -> Any:
  """`lax.scan` over copies whose first axis is time."""

  def step(h: Any, row: Any) -> Any:
    h = row[1] * h + row[0]
    return h, h

  by_time = jnp.swapaxes(x, 0, 1), jnp.swapaxes(a, 0, 1)
  _, h = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), by_time)
  return jnp.swapaxes(h, 0, 1)


def associative(x: Any, a: Any) -> Any:
  """The scan of jax with the gradient of jax."""

  def join(left: Any, right: Any) -> Any:
    return left[0] * right[0], right[0] * left[1] + right[1]

  return jax.lax.associative_scan(join, (a, x), axis=1)[1]


def compiled(function: Callable, arrays: Arrays, part: str, **more: Any) -> Row:
  """A row of one of jax's functions (x, a) -> h."""

  def both(x: Any, a: Any, g: Any) -> Any:
    h, pullback = jax.vjp(function, x, a)
    return h, pullback(g)

  def forward(x: Any, a: Any, g: Any) -> Any:
    del g
    return function(x, a)

  return program({"forward": forward, "both": both}[part], arrays, part, **more)


def program(run: Callable, arrays: Arrays, part: str, **more: Any) -> Row:
  made = jax.jit(run).lower(*arrays).compile()
  memory: Any = made.memory_analysis()
  return Row(made, part, memory.temp_size_in_bytes, **more)


def make_rows(arrays: Arrays, dtype: str, peers: str) -> dict[str, Row]:
  """All candidates, by name and part; `peers` as the flag of that name."""
  x = arrays[0]
  reset = jnp.asarray(np.random.default_rng(1).uniform(size=x.shape[:2]) < 0.01)
  first, *others = FORMS[PLATFORM]
  ours = {
    name: functools.partial(linear_scan, impl=name) for name in (first, *others)
  }
  ours[f"{first}, reverse"] = functools.partial(ours[first], reverse=True)
  ours[f"{first}, resets"] = functools.partial(ours[first], reset=reset)
  calls: dict[str, Callable] = {
    name: lambda x, a, run=run: run(x, a)[0] for name, run in ours.items()
  }
  calls["lax.associative_scan"] = associative
  # In 16 bits on a CPU it takes time quadratic in the steps.
  if not IS_CPU or dtype == "float32" or x.shape[1] <= 1024:
    calls["scan over rows"] = rows_scanned
  rows = {}
  for part, unit in (("forward", unit_forward), ("both", unit_both)):
    rows[f"unit, {part}"] = program(unit, arrays, part)
    for name, call in calls.items():
      quick = name.startswith(first) or name == "chunked"
      rows[f"{name}, {part}"] = compiled(
        call, arrays, part, rounds=math.inf if quick else SLOW
      )
  return rows | dict(torch_rows(arrays, dtype, tuple(peers.split(","))))


def torch_rows(
  arrays: Arrays, dtype: str, names: tuple[str, ...]
) -> Iterator[tuple[str, Row]]:
  """Peers in torch, where they are installed; each in its own layout.

  What a peer cannot do is said in a line.
  """
  if importlib.util.find_spec("torch") is None:
    return
  import torch  # type: ignore

  device = "cpu" if IS_CPU else "cuda"
  kind = getattr(torch, dtype)

  def wait(_: Any) -> None:
    if not IS_CPU:
      torch.cuda.synchronize()

  for name, (prepare, forward) in torch_peers(IS_CPU).items():
    if not name.startswith(names):
      continue
    try:
      x, a, g = prepare(
        *(
          torch.tensor(np.asarray(v, np.float32), dtype=kind, device=device)
          for v in arrays
        )
      )
    except torch.OutOfMemoryError:
      print(f"# {name}: no room")
      continue

    def once(*_: Any, x: Any = x, a: Any = a, forward: Any = forward) -> Any:
      with torch.no_grad():
        return forward(x, a)

    def both(
      *_: Any, x: Any = x, a: Any = a, g: Any = g, forward: Any = forward
    ) -> Any:
      drive, gates = x.detach(), a.detach()
      drive.requires_grad_()
      gates.requires_grad_()
      return torch.autograd.grad(forward(drive, gates), (drive, gates), g)

    for part, call in (("forward", once), ("both", both)):
      # The gradient of a loop over torch's rows keeps every row apart.
      if part == "both" and "loop" in name:
        continue
      try:
        wait(call())
      except Exception as error:  # whatever a peer raises
        reason = str(error).strip().splitlines()[:1]
        print(f"# {name}, {part}: {type(error).__name__}: {reason}")
      else:
        yield f"{name}, {part}", Row(call, part, None, SLOW, wait)


# -- measuring -----------------------------------------------------------------


def in_64_bits(arrays: Arrays) -> dict[str, list[np.ndarray]]:
  """What every part returns for the first of the batch, [t n] each."""
  x, a, g = (np.asarray(array[0], np.float64) for array in arrays)
  h, slope = np.empty_like(x), np.empty_like(x)
  state = np.zeros_like(x[0])
  for t in range(len(x)):
    h[t] = state = a[t] * state + x[t]
  state = np.zeros_like(x[0])
  for t in reversed(range(len(x))):
    slope[t] = state = g[t] + state
    state = a[t] * state
  before = np.concatenate([np.zeros_like(h[:1]), h[:-1]])
  return {"forward": [h], "both": [h, slope, slope * before]}


def error(row: Row, arrays: Arrays, right: list[np.ndarray]) -> float:
  """How far a row is at most from `right`, over the largest of it."""
  found = jax.tree.leaves(row.call(*arrays))
  return max(
    float(np.max(np.abs(np.asarray(one[0], np.float64) - other)))
    / float(np.max(np.abs(other)))
    for one, other in zip(found, right, strict=True)
  )


def time_in_rounds(
  rows: dict[str, Row], arrays: Arrays, rounds: int
) -> dict[str, list[float]]:
  times: dict[str, list[float]] = {name: [] for name in rows}
  for i in range(rounds + 1):
    for name, row in rows.items():
      if i > row.rounds:
        continue
      start = time.perf_counter()
      row.wait(row.call(*arrays))
      if i:  # the first round warms up
        times[name].append(time.perf_counter() - start)
  return times


def measure(
  shape: tuple[int, ...], dtype: str, rounds: int, peers: str
) -> list[dict]:
  """Times of all candidates at one shape, in JSON's terms."""
  keys = jax.random.split(jax.random.key(0), 3)
  x, g = (jax.random.normal(key, shape, dtype) for key in keys[:2])
  a = jax.random.uniform(keys[2], shape, dtype, 0.5, 1)
  arrays = jax.block_until_ready((x, a, g))
  rows = make_rows(arrays, dtype, peers)
  right = in_64_bits(arrays)
  apart = {
    name: error(row, arrays, right[row.part])
    for name, row in rows.items()
    if row.temp is not None and not name.startswith(("unit", *VARIANTS))
  }
  times = time_in_rounds(rows, arrays, rounds)
  made = []
  for name, row in rows.items():
    unit = times[f"unit, {row.part}"]
    temp = None if row.temp is None else row.temp / x.nbytes
    made.append({
      "name": name.removesuffix(f", {row.part}"), "part": row.part,
      "shape": list(shape), "dtype": dtype,
      "seconds": statistics.median(times[name]), "least": min(times[name]),
      "over_unit": statistics.median(times[name]) / statistics.median(unit),
      "least_over_unit": min(times[name]) / min(unit),
      "temp_arrays": temp, "error": apart.get(name),
      "gigabytes_per_second": (3 if row.part == "forward" else 8) * x.nbytes
      / statistics.median(times[name]) / 1e9,
    })  # fmt: skip
  return made


def limits(rows: list[dict]) -> Iterator[Limit]:
  """What is asked of the first form, at the shapes where something is."""
  found = {
    (row["name"], row["part"], tuple(row["shape"]), row["dtype"]): row
    for row in rows
  }
  first = FORMS[PLATFORM][0]
  for (name, part, shape, dtype), row in found.items():
    where = f"{name}, {part}, {'x'.join(map(str, shape))}, {dtype}"
    bound = unit_limit(shape, dtype, part)
    if name == first and bound:
      yield Limit(
        f"{where} over unit", row["over_unit"], row["least_over_unit"], bound
      )
      far = row["error"]
      yield Limit(f"{where}: error", far, far, ERROR[dtype])
      if dtype == "float32":  # bits of 16 are a copy
        temp = row["temp_arrays"]
        yield Limit(f"{where}: temporaries, arrays", temp, temp, 0.1)
    short = found.get((name, part, (8, 1024, 512), dtype))
    if name == first and short and shape == (8, 4096, 512):
      ratio, least = (row[k] / short[k] for k in ("seconds", "least"))
      yield Limit(f"{where} over a quarter of the steps", ratio, least, 5)
    mine = found[first, part, shape, dtype]
    bound = relative_limit(name.removeprefix(f"{first}, "), part, shape, dtype)
    if bound:
      ratio, least = (row[k] / mine[k] for k in ("seconds", "least"))
      if not name.startswith(first):  # a peer is to be slower
        yield Limit(f"{first} over {where}", 1 / ratio, 1 / least, 1 / bound)
      else:
        yield Limit(f"{where} over plain", ratio, least, bound)


def unit_limit(shape: tuple[int, ...], dtype: str, part: str) -> float | None:
  if not IS_CPU:
    return 1.4 if shape == (8, 4096, 2048) else None
  if dtype == "bfloat16":
    return 4.0 if shape == (8, 4096, 512) else None
  if shape not in ((1, 1024, 512), (1, 16384, 512), (8, 4096, 512)):
    return None
  small = shape == (1, 1024, 512)
  return {"forward": 2.0 if small else 3.0, "both": None if small else 3.0}[
    part
  ]


def relative_limit(
  name: str, part: str, shape: tuple[int, ...], dtype: str
) -> float | None:
  """Of the first form's variants, and of peers over it."""
  if not IS_CPU or dtype != "float32" or shape != (8, 4096, 512):
    return None
  peers = {
    "lax.associative_scan": {"forward": 3.5, "both": 3.0},
    "scan over rows": {"forward": 1.6, "both": 1.3},
  }
  variants = {"reverse": 1.3, "resets": 1.15}
  return variants.get(name) or peers.get(name, {}).get(part)


def show(rows: list[dict]) -> None:
  last = None
  for row in rows:
    title = f"{'x'.join(map(str, row['shape']))} {row['dtype']}"
    if title != last:
      print(f"# {title}")
      print(f"{'':38s}      ms  over unit (least)  temp    GB/s  error")
      last = title
    temp = "–" if row["temp_arrays"] is None else f"{row['temp_arrays']:.2f}"
    far = "–" if row["error"] is None else f"{row['error']:.0e}"
    print(
      f"{row['name'] + ', ' + row['part']:38s} {row['seconds'] * 1e3:7.2f} "
      f"{row['over_unit']:9.2f} ({row['least_over_unit']:5.2f}) {temp:>6s} "
      f"{row['gigabytes_per_second']:7.1f} {far:>6s}",
      flush=True,
    )


# -- what is left behind -------------------------------------------------------


def write_table(rows: list[dict]) -> None:
  """The fastest form of each shape, in the place of what stood there."""
  best: dict[Any, dict] = {}
  for row in rows:
    if row["part"] != "both" or row["name"] not in FORMS[PLATFORM]:
      continue
    key = row["dtype"], *row["shape"]
    if key not in best or row["seconds"] < best[key]["seconds"]:
      best[key] = row
  new = {}
  for (dtype, batch, steps, channels), row in best.items():
    made = Measured(PLATFORM, dtype, batch * channels, steps, row["name"])
    new[made[:4]] = made
  kept = {row[:4]: row for row in table()} | new
  lines = [json.dumps(kept[key]._asdict()) for key in sorted(kept)]
  TABLE.write_text("[\n" + ",\n".join(lines) + "\n]\n")
  print(f"{TABLE}: {len(lines)} rows")


def parsed(shapes: str) -> list[tuple[int, ...]]:
  return [tuple(map(int, shape.split("x"))) for shape in shapes.split(",")]


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--shapes", default=SHAPES.get(PLATFORM, SHAPES["gpu"]), help="BxTxN,…")
  add("--dtypes", default="float32,bfloat16")
  add("--rounds", type=int, default=9)
  add("--peers", default="torch,accelerated-scan,fla", help="none: -")
  add("--write", action="store_true", help="the table that auto reads")
  add("--plot", metavar="FILE", help="draw times over sizes")
  args = parser.parse_args()
  if "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.argv])
  rows: list[dict] = []
  for dtype in args.dtypes.split(","):
    for shape in parsed(args.shapes):
      rows += (own := measure(shape, dtype, args.rounds, args.peers))
      show(own)
  gates = list(limits(rows))
  for gate in gates:
    word = "holds" if gate.holds else "MISSED"
    print(f"  gate: {gate.what} {gate.value:.3g} <= {gate.limit:.3g}: {word}")
  if args.write:
    write_table(rows)
  if args.plot:
    draw(rows, args.plot)
  line = {
    "benchmark": "linear_scan", "python": platform.python_version(),
    "jax": jax.__version__, "device": jax.devices()[0].device_kind,
    "cores": os.cpu_count(), "rounds": args.rounds, "rows": rows,
    "gates": [gate._asdict() | {"holds": gate.holds} for gate in gates],
  }  # fmt: skip
  print(json.dumps(line))
  return 0 if all(gate.holds for gate in gates) else 1


if __name__ == "__main__":
  raise SystemExit(main())
