"""What a step costs before it runs: bytes, FLOPs and traffic of a device.

Steps are compiled for simulated devices of the CPU, as many as asked for, and
what the compiler made is read. So a plan for a pod is made on a laptop. State,
batch, FLOPs and traffic are those of any platform; an accelerator's compiler
fuses otherwise, so its temporaries differ. On a CPU it computes half-precision
numbers in float32, which takes twice their room.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from common.errors import UserError
from common.parallel import bytes_per_device
from common.parallel.program import flops
from common.parallel.traffic import bytes_sent
from common.state import TrainState

# Nothing is run: what the compiler would do for the speed of it takes minutes.
_QUICKLY = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True)
class Program:
  """A step with the shapes that it is given.

  Attributes:
    name: what the table calls it.
    step: jitted, `(state, batch, *constants)`.
    state: shapes, dtypes and shardings of a state.
    batch: the same of a batch.
    mesh: the devices.
    constants: the same of what the step is given besides, such as a teacher.
  """

  name: str
  step: Any
  state: TrainState
  batch: Any
  mesh: jax.sharding.Mesh
  constants: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step needs on each device.

  Attributes:
    name: of the program.
    mesh: devices along each axis.
    bytes: by what they hold; `temporaries` live during a step alone.
    flops: of a step, of matrix products and convolutions.
    sent: bytes of a step by kind of collective.
  """

  name: str
  mesh: Mapping[str, int]
  bytes: Mapping[str, int]
  flops: int
  sent: Mapping[str, int]


def make_plan(program: Program) -> Plan:
  """Compiles a step and reads what it needs."""
  given = (program.state, program.batch, *program.constants)
  with jax.set_mesh(program.mesh):
    compiled = program.step.lower(*given).compile(compiler_options=_QUICKLY)
  text = compiled.as_text()
  state = program.state
  return Plan(
    name=program.name,
    mesh=dict(program.mesh.shape),
    bytes={
      "parameters": bytes_per_device(state.params),
      "optimizer": bytes_per_device(state.opt_state),
      "other state": bytes_per_device((state.extra, program.constants)),
      "batch": bytes_per_device(program.batch),
      "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    },
    flops=flops(text),
    sent=bytes_sent(text),
  )


def abstract_batch(
  sharding: jax.sharding.NamedSharding,
  arrays: Mapping[str, tuple[Sequence[int], Any]],
) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch's shapes, each array's first axes on the mesh as `sharding` says.

  Args:
    sharding: cut to an array's rank, as `common.data.Loader` does.
    arrays: (shape, dtype) by name.

  Raises:
    UserError: for rows that do not divide among the devices.
  """
  made = {}
  for name, (shape, dtype) in arrays.items():
    spec = jax.P(*sharding.spec[: len(shape)])
    own = jax.sharding.NamedSharding(sharding.mesh, spec)
    try:
      own.shard_shape(tuple(shape))
    except ValueError:
      sizes = ", ".join(f"{k}={v}" for k, v in sharding.mesh.shape.items())
      raise UserError(
        f"a batch's {name!r} of shape {tuple(shape)} does not divide among the "
        f"devices of the mesh {sizes}: choose a multiple"
      ) from None
    made[name] = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=own)
  return made


def plan_table(plans: Iterable[Plan]) -> str:
  """Plans beside each other, one a column."""
  plans = list(plans)
  rows = [["", *(plan.name for plan in plans)]]
  rows += [
    [f"{name}, MiB", *(_mebibytes(plan.bytes[name]) for plan in plans)]
    for name in plans[0].bytes
  ]
  rows.append(
    ["together, MiB", *(_mebibytes(sum(p.bytes.values())) for p in plans)]
  )
  rows.append(["GFLOPs a step", *(_short(p.flops / 1e9) for p in plans)])
  kinds = dict.fromkeys(kind for plan in plans for kind in plan.sent)
  rows += [
    [f"{kind}, MiB sent", *(_mebibytes(p.sent.get(kind, 0)) for p in plans)]
    for kind in kinds
  ]
  widths = [max(map(len, column)) for column in zip(*rows)]
  head = f"Each of {math.prod(plans[0].mesh.values())} devices, " + ", ".join(
    f"{name}={size}" for name, size in plans[0].mesh.items()
  )
  return "\n".join(
    [head]
    + [
      "  ".join(
        [row[0].ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
      )
      for row in rows
    ]
  )


def _mebibytes(count: int) -> str:
  return _short(count / 2**20)


def _short(value: float) -> str:
  """Three digits, or all of those before the point."""
  digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
  return f"{value:,.{digits}f}"
