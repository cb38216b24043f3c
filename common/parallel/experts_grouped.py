"""Products of rows that are sorted by expert with a stack of kernels.

# n rows, e experts, k and m widths, b rows of a block

    product   y[i] = x[i] K[expert of i]              [n k] [e k m] -> [n m]
    outer     G[j] = sum over j's rows x[i]^T y[i]    [n k] [n m] -> [e k m]

Each is the derivative of the other, so a gradient costs what it should, and has
gradients itself.

On the CPU (`BLOCKS`) a loop over the experts reads each kernel once, and an
inner one multiplies as many blocks as the expert's rows fill. The last block
reaches into the rows of the next expert, which then writes over what does not
belong there. `jax.lax.ragged_dot` would compute all experts on a CPU. On a TPU
(`MEGABLOX`) it is the Pallas kernel of JAX, with widths padded to its tiles.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
LANES = 128  # what a width is padded to for the TPU


class Form(NamedTuple):
  """One way to compute.

  Attributes:
    product: `(x, kernels, counts, transposed)`; kernels may be [e m k].
    outer: `(x, y, counts)`.
    opaque: a kernel that the compiler cannot cut: it runs on one device, or in
      a `jax.shard_map` over all axes that does not check types.
  """

  product: Callable[[Array, Array, Array, bool], Array]
  outer: Callable[[Array, Array, Array], Array]
  opaque: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(
  x: Array, kernels: Array, counts: Array, form: Form, transposed: bool = False
) -> Array:
  """Multiplies each row by its expert's kernel.

  Args:
    x: [n k], sorted by expert.
    kernels: [e k m]; if `transposed` [e m k].
    counts: int32 [e], rows of each expert, n together.
    form: how.
    transposed: whether the kernels are.

  Returns:
    [n m].
  """
  return form.product(x, kernels, counts, transposed)


def _product_forward(x, kernels, counts, form, transposed):
  y = product(x, kernels, counts, form, transposed)
  return y, (x, kernels, counts)


def _product_backward(form, transposed, saved, y):
  x, kernels, counts = saved
  pair = (y, x) if transposed else (x, y)
  return (
    product(y, kernels, counts, form, not transposed),
    outer(*pair, counts, form),
    None,
  )


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def outer(x: Array, y: Array, counts: Array, form: Form) -> Array:
  """Sums the outer products of each expert's rows.

  Args:
    x: [n k], sorted by expert.
    y: [n m].
    counts: int32 [e], rows of each expert, n together.
    form: how.

  Returns:
    [e k m].
  """
  return form.outer(x, y, counts)


def _outer_forward(x, y, counts, form):
  return outer(x, y, counts, form), (x, y, counts)


def _outer_backward(form, saved, kernels):
  x, y, counts = saved
  return (
    product(y, kernels, counts, form, True),
    product(x, kernels, counts, form),
    None,
  )


outer.defvjp(_outer_forward, _outer_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _biases(bias: Array, ids: Array, counts: Array, form: Form) -> Array:
  """Each row's bias, [n m]; its gradient without a slow scattered sum."""
  del counts, form
  return bias[ids]


def _biases_forward(bias, ids, counts, form):
  return _biases(bias, ids, counts, form), counts


def _biases_backward(form, counts, y):
  ones = jnp.ones_like(y[:, :1])
  return outer(ones, y, counts, form)[:, 0], None, None


_biases.defvjp(_biases_forward, _biases_backward)


def _block_rows(rows: int, experts: int, least: int, most: int) -> int:
  """A quarter of an expert's mean share, as a power of two in the bounds.

  Larger blocks are faster, but the last of each expert is half empty.
  """
  share = max(1, rows // (4 * experts))
  return min(max(1 << (share - 1).bit_length(), least), most)


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, counts: Array) -> Array:
  """Zeros that inside `jax.shard_map` have the type of what varies by device.

  A loop's carry must begin with the type that it ends with.
  """
  return jnp.broadcast_to((0 * counts[0]).astype(dtype), shape)


def _block_product(
  x: Array, kernels: Array, counts: Array, transposed: bool
) -> Array:
  """`product` by blocks."""
  size = _block_rows(len(x), len(kernels), 16, 256)
  padded = jnp.pad(x, ((0, size), (0, 0)))
  contract = ((1,), (1 if transposed else 0,))

  def add_expert(y: Array, one: tuple[Array, Array, Array]):
    kernel, start, count = one

    def add_block(i: Array, y: Array) -> Array:
      block = jax.lax.dynamic_slice_in_dim(padded, start + i * size, size)
      part = jax.lax.dot_general(block, kernel, (contract, ((), ())))
      return jax.lax.dynamic_update_slice_in_dim(y, part, start + i * size, 0)

    return jax.lax.fori_loop(0, -(-count // size), add_block, y), None

  width = kernels.shape[1 if transposed else 2]
  y = _zeros((len(padded), width), x.dtype, counts)
  starts = jnp.cumsum(counts) - counts
  return jax.lax.scan(add_expert, y, (kernels, starts, counts))[0][: len(x)]


def _block_outer(x: Array, y: Array, counts: Array) -> Array:
  """`outer` by blocks, summed in float32 or better."""
  size = _block_rows(len(x), len(counts), 16, 512)
  x, y = (jnp.pad(rows, ((0, size), (0, 0))) for rows in (x, y))
  total_type = jnp.promote_types(x.dtype, jnp.float32)

  def of_expert(one: tuple[Array, Array]) -> Array:
    start, count = one

    def add_block(i: Array, total: Array) -> Array:
      left, right = (
        jax.lax.dynamic_slice_in_dim(rows, start + i * size, size)
        for rows in (x, y)
      )
      own = jnp.arange(size) < count - i * size
      return total + jax.lax.dot_general(
        left,
        jnp.where(own[:, None], right, 0),
        (((0,), (0,)), ((), ())),
        preferred_element_type=total_type,
      )

    total = _zeros((x.shape[1], y.shape[1]), total_type, counts)
    total = jax.lax.fori_loop(0, -(-count // size), add_block, total)
    return total.astype(x.dtype)

  return jax.lax.map(of_expert, (jnp.cumsum(counts) - counts, counts))


BLOCKS = Form(_block_product, _block_outer)


def _pad(array: Array, *multiples: int) -> Array:
  """Appends zeros up to multiples."""
  ends = (-size % unit for size, unit in zip(array.shape, multiples))
  return jnp.pad(array, [(0, end) for end in ends])


def _tile(width: int) -> int:
  """The largest of 512, 256 and 128 that divides a multiple of 128."""
  return next(tile for tile in (512, 256, LANES) if width % tile == 0)


def _tpu_product(
  x: Array,
  kernels: Array,
  counts: Array,
  transposed: bool,
  *,
  interpret: bool = False,
) -> Array:
  """`product` by the TPU's kernel."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  rows = _block_rows(len(x), len(counts), 128, 512)
  width = kernels.shape[1 if transposed else 2]
  padded, kernels = _pad(x, rows, LANES), _pad(kernels, 1, LANES, LANES)
  padded_width = kernels.shape[1 if transposed else 2]
  y = gmm(
    padded,
    kernels,
    counts,
    preferred_element_type=x.dtype,
    tiling=(rows, _tile(padded.shape[1]), _tile(padded_width)),
    transpose_rhs=transposed,
    interpret=interpret,
  )
  return y[: len(x), :width]


def _tpu_outer(
  x: Array, y: Array, counts: Array, *, interpret: bool = False
) -> Array:
  """`outer` by the TPU's kernel."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  rows = _block_rows(len(x), len(counts), 128, 512)
  left, right = (_pad(part, rows, LANES) for part in (x, y))
  total = tgmm(
    left.T,
    right,
    counts,
    preferred_element_type=x.dtype,
    tiling=(rows, _tile(left.shape[1]), _tile(right.shape[1])),
    interpret=interpret,
  )
  return total[:, : x.shape[1], : y.shape[1]]


def make_megablox(*, interpret: bool = False) -> Form:
  """The TPU's form; `interpret` runs it elsewhere, slowly."""
  return Form(
    functools.partial(_tpu_product, interpret=interpret),
    functools.partial(_tpu_outer, interpret=interpret),
    opaque=True,
  )


MEGABLOX = make_megablox()


def form_for(axes: tuple[str, ...] | None) -> Form | None:
  """The form for the platform; None stands for `jax.lax.ragged_dot`.

  Args:
    axes: mesh axes over which the caller maps; None: the compiler may cut.
  """
  platform = jax.default_backend()
  if platform == "cpu":
    return BLOCKS
  mesh = jax.sharding.get_abstract_mesh()
  alone = all(
    size == 1 for axis, size in mesh.shape.items() if axis not in (axes or ())
  )
  return MEGABLOX if platform == "tpu" and alone else None


def feed_forward_by_expert(
  stack: Mapping[str, Mapping[str, Array]],
  x: Array,
  ids: Array,
  activation: Callable[[Array], Array],
  form: Form | None,
) -> Array:
  """Each token its own expert.

  Args:
    stack: {"up": {"kernel" [e k m], "bias" [e m]}, "down": {"kernel" [e m k],
      "bias" [e k]}}.
    x: [n k].
    ids: int [n].
    activation: of the hidden layer.
    form: how; None: `jax.lax.ragged_dot`.

  Returns:
    [n k].
  """
  kernels = stack["up"]["kernel"]
  counts = jnp.bincount(ids, length=len(kernels)).astype(jnp.int32)
  order = jnp.argsort(ids, stable=True)
  sorted_ids = ids[order]

  def layer(name: str, rows: Array) -> Array:
    kernels, bias = stack[name]["kernel"], stack[name]["bias"]
    if form is None:
      y = jax.lax.ragged_dot(rows, kernels, counts)
      return y + bias[sorted_ids]
    dtype = jnp.promote_types(rows.dtype, kernels.dtype)
    rows, kernels = rows.astype(dtype), kernels.astype(dtype)
    y = product(rows, kernels, counts, form)
    return y + _biases(bias, sorted_ids, counts, form)

  out = layer("down", activation(layer("up", x[order])))
  return jnp.zeros_like(out).at[order].set(out, unique_indices=True)
