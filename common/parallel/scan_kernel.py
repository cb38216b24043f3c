"""What the kernels of the recurrence share: mapping, sharding, complex numbers.

A kernel works on real arrays. A complex one is two of them, its planes. Rows
and channels are independent, so a mapped axis joins the rows, and on a GPU an
array that is sharded over them is scanned where it lies; time is gathered,
unless the caller names a mesh axis for it. XLA for TPUs has no such rule: there
a kernel of several devices is put into `jax.shard_map`, as any other of Pallas.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding

from common.parallel.scan_forms import Form, Saved, gathered, spread

Array = jax.Array
Planes = tuple[Array, ...]


class Kernel(NamedTuple):
  """What is static in a kernel.

  Attributes:
    impl: which one.
    task: "forward", "backward" or "reduce".
    reverse: the direction of the forward pass; for "reduce" its own.
    log_gates: as for `Form`.
    has_reset: whether the last array says where gates are 0.
    interpret: as plain operations, on any platform; or Pallas' parameters of
      a simulated TPU.
  """

  impl: str
  task: str
  reverse: bool
  log_gates: bool
  has_reset: bool
  interpret: Any = False


def forward(
  form: Form, x: Array, a: Array, h0: Array, reset: Array | None
) -> tuple[Array, Array]:
  """As `scan_forms.sequential`."""
  gates = spread(a, x.shape[-1])
  kernel = _kernel(form, "forward", form.reverse, reset)
  h, last = _run(kernel, [x, gates, h0], [x.dtype, h0.dtype], reset)
  return h, last


def backward(
  form: Form, saved: Saved, g: Array, g_last: Array
) -> tuple[Array, Array, Array]:
  """As `scan_forms.sequential_bwd`."""
  a, reset, _, h, h0, _ = saved
  assert h is not None
  gates = spread(a, g.shape[-1])
  kernel = _kernel(form, "backward", form.reverse, reset)
  # One gate of several channels is summed in the carry's dtype.
  d_gates = a.dtype if gates is a else g_last.dtype
  dx, da, dh0 = _run(
    kernel, [gates, h, h0, g, g_last], [g.dtype, d_gates, g_last.dtype], reset
  )
  return dx, gathered(da, a.shape[-1]).astype(a.dtype), dh0


def reduced(
  form: Form, reverse: bool, x: Array, a: Array, reset: Array | None
) -> tuple[Array, Array]:
  """As `scan_forms.sequential_reduce`."""
  gates = spread(a, x.shape[-1])
  kernel = _kernel(form, "reduce", reverse, reset)
  state, decay = _run(kernel, [x, gates], [x.dtype, x.dtype], reset)
  return state, decay


def _kernel(form: Form, task: str, reverse: bool, reset: Any) -> Kernel:
  return Kernel(form.impl, task, reverse, form.log_gates, reset is not None)


def _run(
  kernel: Kernel,
  arrays: Sequence[Array],
  dtypes: Sequence[Any],
  reset: Array | None,
) -> list[Array]:
  """Runs a kernel on arrays that may be complex; one output a dtype."""
  is_complex = any(jnp.iscomplexobj(array) for array in arrays)
  count = 2 if is_complex else 1
  flat = [plane for array in arrays for plane in _planes(array, count)]
  if reset is not None:
    flat.append(reset)
  parts = [jnp.finfo(dtype).dtype for dtype in dtypes]  # real ones
  outs = _mapped(kernel, count, tuple(map(str, parts)))(*flat)
  made = [outs[i : i + count] for i in range(0, len(outs), count)]
  if not is_complex:
    return [own for (own,) in made]
  return [lax.complex(*own).astype(dtype) for own, dtype in zip(made, dtypes)]


def _planes(array: Array, count: int) -> Planes:
  if count == 1:
    return (array,)
  return lax.real(array), lax.imag(array)


@functools.cache
def _mapped(kernel: Kernel, count: int, dtypes: tuple[str, ...]) -> Callable:
  """The kernel on real arrays, with rules for mapping and sharding."""
  local = functools.partial(_local, kernel, count, dtypes)
  partitioned = _partitioned(kernel, count, dtypes)

  @custom_vmap
  def run(*arrays: Array) -> Any:
    if kernel.impl == "mosaic" or _is_manual():
      return local(*arrays)
    return partitioned(*arrays)

  @run.def_vmap
  def rule(size: int, mapped: Sequence[bool], *arrays: Array) -> Any:
    joined = [
      (array if own else jnp.broadcast_to(array, (size, *array.shape))).reshape(
        -1, *array.shape[2 if own else 1 :]
      )
      for array, own in zip(arrays, mapped)
    ]
    outs = run(*joined)
    made = tuple(out.reshape(size, -1, *out.shape[1:]) for out in outs)
    return made, (True,) * len(made)

  return run


def _is_manual() -> bool:
  """Whether this is a shard of somebody's shard_map."""
  kinds = jax.sharding.get_abstract_mesh().axis_types
  return any(kind == AxisType.Manual for kind in kinds)


# Axes of the arrays of each task, of inputs and of outputs.
_AXES = {
  "forward": ("btn btn bn", "btn bn"),
  "backward": ("btn btn bn btn bn", "btn btn bn"),
  "reduce": ("btn btn", "bn bn"),
}


def _partitioned(
  kernel: Kernel, count: int, dtypes: tuple[str, ...]
) -> Callable:
  """The kernel, each device on its rows and channels."""
  ins, outs = (
    [axes for axes in names.split() for _ in range(count)]
    for names in _AXES[kernel.task]
  )
  if kernel.has_reset:
    ins = [*ins, "bt"]
  local = functools.partial(_local, kernel, count, dtypes)
  call = custom_partitioning(local)

  def partition(mesh: Any, arguments: Any, results: Any) -> Any:
    del results
    by_axis: dict[str, Any] = {"b": None, "t": None, "n": None}
    for axes, argument in zip(ins, arguments):
      for axis, own in zip(axes, argument.sharding.spec):
        if axis != "t" and by_axis[axis] is None:
          by_axis[axis] = own

    def place(axes: str) -> NamedSharding:
      return NamedSharding(mesh, jax.P(*(by_axis[axis] for axis in axes)))

    return mesh, local, tuple(map(place, outs)), tuple(map(place, ins))

  call.def_partition(
    partition=partition,
    sharding_rule=", ".join(" ".join(axes) for axes in ins)
    + " -> "
    + ", ".join(" ".join(axes) for axes in outs),
    need_replication_factors=("t",),
  )
  return call


def _local(
  kernel: Kernel, count: int, dtypes: tuple[str, ...], *arrays: Array
) -> tuple[Array, ...]:
  """On one device: the kernel, or its interpreter on another platform."""
  import importlib

  module: Any = importlib.import_module(f"common.parallel.scan_{kernel.impl}")

  def run(kernel: Kernel, *arrays: Array) -> tuple[Array, ...]:
    *planes, reset = arrays if kernel.has_reset else (*arrays, None)
    numbers = [
      tuple(planes[i : i + count]) for i in range(0, len(planes), count)
    ]
    made = module.run(kernel, numbers, reset, dtypes)
    return tuple(plane for number in made for plane in number)

  compiled = functools.partial(run, kernel)
  plain = functools.partial(run, kernel._replace(interpret=True))
  branches = {module.PLATFORM: compiled}
  return lax.platform_dependent(*arrays, default=plain, **branches)


def shape_like(array: Array, shape: tuple[int, ...], dtype: Any) -> Any:
  """An output that varies over the mesh as an input does."""
  kind = jax.typeof(array).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


# -- what the kernels compute with -------------------------------------------


def times(u: Planes, v: Planes) -> Planes:
  """A product of real or complex numbers."""
  if len(u) == 1:
    return (u[0] * v[0],)
  return u[0] * v[0] - u[1] * v[1], u[0] * v[1] + u[1] * v[0]


def plus(u: Planes, v: Planes) -> Planes:
  """A sum of real or complex numbers."""
  return tuple(p + q for p, q in zip(u, v))


def exp(u: Planes) -> Planes:
  """The exponential of real or complex numbers."""
  if len(u) == 1:
    return (jnp.exp(u[0]),)
  size = jnp.exp(u[0])
  return size * jnp.cos(u[1]), size * jnp.sin(u[1])


def where(condition: Array, u: Planes, v: Planes) -> Planes:
  """Chooses by place."""
  return tuple(jnp.where(condition, p, q) for p, q in zip(u, v))


def constant(like: Planes, real: float) -> Planes:
  """A real number in every place."""
  return tuple(jnp.full_like(p, 0 if i else real) for i, p in enumerate(like))


def divided(size: int, part: int) -> int:
  """How many parts there are."""
  return math.ceil(size / part)
