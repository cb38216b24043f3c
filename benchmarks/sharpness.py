"""What the SAM family and UDIM cost beside a plain step.

    python benchmarks/sharpness.py
    python benchmarks/sharpness.py --rounds=30 --batch=128

Two convolutions of 32 and 64 channels at full resolution, dropout between them,
their mean over the pixels and a linear head; images of 32 x 32 x 3, Adam,
everything in one process. FLOPs are the compiler's (`flops` of the cost
analysis), in units of `erm`; `gate` is what they may be at most. Times are
medians over rounds in which every candidate runs once, of the ratio to `erm`
and to `optax.contrib.sam` in the same round; behind the latter stand the 95 %
t-interval of the ratios' geometric mean and what follows from it. `temp` is the
compiler's memory for temporaries; `peak` is that and the arguments and the
outputs of the program, which is all it can hold at a time.

`esam` chooses half the samples (`losses_fn`); `esam, all` has none to choose
from. `udim, reference` is the authors' code: a double backward pass for the
data's gradient, and a dropout mask for each pass; `by jvp` beneath it computes
the same numbers.

`look_sam` and `udim, warm-up` are two programs each, between which the host
chooses (`due`): the former runs a period of 5 steps, one of them with a second
gradient, of which the mean is shown (of memory the larger program); the latter
is a step of UDIM without the term, as before `start_step`. The rows `branch`
are the same as one program that decides by itself; of its FLOPs XLA counts the
dearer branch. They are slow, and run in the first two rounds only. The last
line is JSON. The exit status is 1 where a gate does not hold.
"""

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from common import optim
from common.statistics import interval
from udim import UdimConfig, udim, udim_grads, udim_passes

PyTree = Any
Batch = dict[str, jax.Array]
PERIOD = 5  # of look_sam


class Candidate(NamedTuple):
  """One row.

  Attributes:
    step: `(params, state, batch, key, due) -> (params, state)`.
    tx: its `init` makes the state.
    gate: FLOPs in units of a plain step that it may take, if there is a limit.
    dues: `due` of the steps of a period.
    rounds: it runs in no more than so many.
  """

  step: Callable[..., tuple[PyTree, PyTree]]
  tx: Any
  gate: float | None
  dues: tuple[bool | None, ...] = (None,)
  rounds: float = math.inf


def make_params(key: jax.Array) -> PyTree:
  shapes = {
    "layers": [(3, 3, 3, 32), (3, 3, 32, 64)],
    "head": {"kernel": (64, 10), "bias": (10,)},
  }
  return jax.tree.map(
    lambda shape: 0.1 * jax.random.normal(key, shape),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def apply_fn(variables, images, *, train, rngs):
  """The network of tests/udim/test_cost.py."""
  del train
  params, hidden = variables["params"], images
  keep = jax.random.bernoulli(rngs["dropout"], 0.5, (len(images), 1, 1, 32))
  for i, kernel in enumerate(params["layers"]):
    hidden = jax.lax.conv_general_dilated(
      hidden, kernel, (1, 1), "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    hidden = jax.nn.relu(hidden)
    hidden = hidden * 2 * keep if i == 0 else hidden
  features = hidden.mean(axis=(1, 2))
  logits = features @ params["head"]["kernel"] + params["head"]["bias"]
  return features, logits, {}


def losses_of(params: PyTree, images, labels, key: jax.Array) -> jax.Array:
  """The loss of each sample, [n]."""
  _, logits, _ = apply_fn(
    {"params": params}, images, train=True, rngs={"dropout": key}
  )
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_gradient(batch: Batch, key: jax.Array) -> Callable[..., PyTree]:
  """`(params, chosen=None) -> grads`, of the samples at the indices."""

  def loss(params, chosen=None):
    images, labels = batch["image"][0], batch["label"][0]
    if chosen is not None:
      images, labels = images[chosen], labels[chosen]
    return losses_of(params, images, labels, key).mean()

  return jax.grad(loss)


def plain(base: Any, gate: float | None) -> Candidate:
  def step(params, state, batch, key, due):
    del due
    updates, state = base.update(
      make_gradient(batch, key)(params), state, params
    )
    return optax.apply_updates(params, updates), state

  return Candidate(step, base, gate)


def of_family(tx: Any, gate: float | None, **settings: Any) -> Candidate:
  """A member of the family: the gradient is handed over as a function."""

  def step(params, state, batch, key, due):
    grad_fn = make_gradient(batch, key)
    updates, state = tx.update(
      grad_fn(params), state, params, grad_fn=grad_fn, due=due
    )
    return optax.apply_updates(params, updates), state

  return Candidate(step, tx, gate, **settings)


def choosing_esam(base: Any, gate: float | None) -> Candidate:
  """ESAM as its authors have it, with a part of the samples."""
  tx = optim.esam(base)

  def step(params, state, batch, key, due):
    del due
    grad_fn = make_gradient(batch, key)

    def losses_fn(params):
      return losses_of(params, batch["image"][0], batch["label"][0], key)

    updates, state = tx.update(
      grad_fn(params), state, params, grad_fn=grad_fn, losses_fn=losses_fn
    )
    return optax.apply_updates(params, updates), state

  return Candidate(step, tx, gate)


def opaque_sam(base: Any) -> Candidate:
  """Optax's own, whose gradient function also gets the step's number."""
  ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
  tx = optax.contrib.sam(base, ascent, sync_period=2, opaque_mode=True)

  def step(params, state, batch, key, due):
    del due
    grad_fn = make_gradient(batch, key)
    updates, state = tx.update(
      grad_fn(params), state, params, grad_fn=lambda params, i: grad_fn(params)
    )
    return optax.apply_updates(params, updates), state

  return Candidate(step, tx, None)


def of_udim(
  base: Any,
  gate: float | None,
  dues: tuple[bool | None, ...] = (None,),
  rounds: float = math.inf,
  **settings: Any,
) -> Candidate:
  grads_of = udim_grads(apply_fn, "head", UdimConfig(**settings))

  def step(params, state, batch, key, due):
    count = optax.tree.get(state, "count")
    grads, _ = grads_of(params, batch, key, count, due=due)
    updates, state = base.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return Candidate(step, base, gate, dues, rounds)


def reference_udim(base: Any) -> Candidate:
  """The authors' data gradient: back through the gradient and its norm."""
  cfg = UdimConfig(reference_quirks=True)
  tx = udim(base, cfg)
  passes_of = udim_passes(apply_fn, "head", cfg)

  def step(params, state, batch, key, due):
    del due
    passes = passes_of(params, batch, key, state.count)
    # That of pass 1, with which the compiler then shares what is equal.
    first_key = jax.random.split(key, 4)[0]

    def data_grad_fn(params, eps):
      del eps

      def ascended(images):
        loss, grads = jax.value_and_grad(
          lambda params: losses_of(
            params, images, batch["label"][0], first_key
          ).mean()
        )(params)
        return loss + cfg.rho * optax.tree.norm(grads)

      return jax.grad(ascended)(batch["image"][0])

    fns = passes.fns | {"data_grad_fn": data_grad_fn}
    updates, state = tx.update(passes.grads, state, params, **fns)
    return optax.apply_updates(params, updates), state

  return Candidate(step, tx, None)


def make_candidates(batch_size: int) -> dict[str, Candidate]:
  base = optax.adam(1e-3)
  period = tuple(i % PERIOD == 0 for i in range(PERIOD))
  of_term = functools.partial(of_udim, base)
  return {
    "erm": plain(base, None),
    "optax.contrib.sam": opaque_sam(base),
    "sam": of_family(optim.sam(base), 2.02),
    "asam": of_family(optim.asam(base), 2.02),
    "fisher_sam": of_family(optim.fisher_sam(base), 2.02),
    "gsam": of_family(optim.gsam(base), 2.02),
    "sagm": of_family(optim.sagm(base), 2.02),
    "esam": choosing_esam(base, 1.86),
    "esam, all": of_family(optim.esam(base), 2.02),
    "gam": of_family(optim.gam(base), 4.05),
    "look_sam": of_family(optim.look_sam(base, k=PERIOD), 1.22, dues=period),
    "look_sam, branch": of_family(
      optim.look_sam(base, k=PERIOD), None, rounds=2
    ),
    "udim, fast": of_term(3.7),
    "udim, no reuse": of_term(4.1, share_dropout=False),
    "udim, half": of_term(3.05, term_images=batch_size // 2),
    "udim, detached": of_term(3.05, detach_source=True),
    "udim, exact": of_term(5.45, data_grad="exact"),
    "udim, reference": reference_udim(base),
    "udim, by jvp": of_term(None, reference_quirks=True),
    "udim, warm-up": of_term(2.02, (False,), start_step=1_000_000),
    "udim, warm-up, branch": of_term(None, rounds=2, start_step=1_000_000),
  }


class Program:
  """The compiled programs of a candidate, and what the compiler says of them.

  Attributes:
    facts: its FLOPs a step, and bytes.
    times: seconds a step, one for each round.
    rounds: it runs in no more than so many.
  """

  def __init__(self, candidate: Candidate, params, batch: Batch, key):
    self._dues, self.rounds = candidate.dues, candidate.rounds
    self._start = candidate.tx.init(params)
    self._inputs = params, batch, key
    step = jax.jit(candidate.step, static_argnames="due")
    self._compiled = {
      due: step.lower(params, self._start, batch, key, due=due).compile()
      for due in set(self._dues)
    }
    flops, temp, peak = {}, [], []
    for due, compiled in self._compiled.items():
      cost: Any = compiled.cost_analysis()
      memory: Any = compiled.memory_analysis()
      flops[due] = cost["flops"]
      temp.append(memory.temp_size_in_bytes)
      peak.append(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
      )
    mean = statistics.fmean(flops[due] for due in self._dues)
    self.facts = {"flops": mean, "temp": max(temp), "peak": max(peak)}
    self.times: list[float] = []

  def run(self, steps: int) -> None:
    params, batch, key = self._inputs
    state = self._start
    start = time.perf_counter()
    for i in range(steps):
      program = self._compiled[self._dues[i % len(self._dues)]]
      _, state = program(params, state, batch, key)
    jax.block_until_ready(state)
    self.times.append((time.perf_counter() - start) / steps)

  def times_over(self, other: "Program") -> list[float]:
    """Ratios, one for each round of both."""
    return [mine / theirs for mine, theirs in zip(self.times, other.times)]


def compare(ratios: list[float]) -> dict[str, Any]:
  """The interval of the geometric mean, and whether 1 is in it."""
  found = interval([math.log(ratio) for ratio in ratios])
  low = math.exp(found.mean - found.half_width)
  high = math.exp(found.mean + found.half_width)
  verdict = "slower" if low > 1 else "faster" if high < 1 else "same"
  return {"low": low, "high": high, "verdict": verdict}


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
  key = jax.random.key(0)
  batch = {
    "image": jax.random.uniform(key, (1, args.batch, 32, 32, 3)),
    "label": jax.random.randint(key, (1, args.batch), 0, 10),
  }
  params = make_params(key)
  candidates = make_candidates(args.batch)
  programs = {
    name: Program(candidate, params, batch, key)
    for name, candidate in candidates.items()
  }
  for i in range(args.rounds + 1):
    for program in programs.values():
      if i <= program.rounds:
        program.run(args.steps)
      if i == 0:  # the first round warms up
        program.times.clear()
  erm, optax_sam = programs["erm"], programs["optax.contrib.sam"]
  rows = {}
  for name, program in programs.items():
    gate = candidates[name].gate
    ratio = program.facts["flops"] / erm.facts["flops"]
    over_optax = program.times_over(optax_sam)
    rows[name] = program.facts | {
      "flops_over_erm": ratio,
      "gate": gate,
      "holds": None if gate is None else ratio <= gate,
      "seconds": statistics.median(program.times),
      "time_over_erm": statistics.median(program.times_over(erm)),
      "time_over_optax": statistics.median(over_optax),
    }
    if program is not optax_sam:
      rows[name] |= compare(over_optax)
  return rows


def show(rows: dict[str, dict[str, Any]]) -> None:
  print(
    f"{'':21s} FLOPs/erm  gate holds  time/erm time/optax "
    f"{'interval and verdict':20s}  temp MiB  peak MiB"
  )
  for name, row in rows.items():
    gate = "   -" if row["gate"] is None else f"{row['gate']:.2f}"
    holds = {None: "-", True: "yes", False: "NO"}[row["holds"]]
    span = ""
    if "verdict" in row:
      span = f"{row['low']:.2f} to {row['high']:.2f} {row['verdict']}"
    print(
      f"{name:21s} {row['flops_over_erm']:9.2f}  {gate} {holds:>5s} "
      f"{row['time_over_erm']:9.2f} {row['time_over_optax']:10.2f} "
      f"{span:20s} {row['temp'] / 2**20:9.1f} {row['peak'] / 2**20:9.1f}"
    )


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument(
    "--steps", type=int, default=PERIOD, help=f"in a round; times {PERIOD}"
  )
  parser.add_argument("--batch", type=int, default=64, help="even")
  args = parser.parse_args()
  if args.steps % PERIOD or args.batch % 2:
    parser.error(f"--steps must be a multiple of {PERIOD}, --batch even")
  rows = measure(args)
  show(rows)
  line = {
    "benchmark": "sharpness",
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "batch": args.batch,
    "rows": rows,
  }
  print(json.dumps(line))
  return 1 if any(row["holds"] is False for row in rows.values()) else 0


if __name__ == "__main__":
  raise SystemExit(main())
