"""Attention with decomposed relative positions, in windows or over all of it.

# b images, y x rows and columns of patches, s the side of what a patch attends
# over, h heads, e width of a head, n queries, k keys

A logit is scale q·k + q·R_h[row] + q·R_w[column], where the tables R are
indexed by the distance and q is not scaled in their products (Segment
Anything's image encoder, `add_decomposed_rel_pos`).
"""

import dataclasses
import functools
import importlib.util
import math

import einops
import jax
import jax.numpy as jnp
import numpy as np

from common.config import did_you_mean
from common.errors import UserError

Array = jax.Array
KERNELS = ("auto", "xla", "triton", "interpret")


@dataclasses.dataclass(frozen=True)
class How:
  """How attention is computed; nothing of it changes what.

  Attributes:
    fold: take the positions into the product of queries and keys: each query
      gets its s row terms and s column terms as further entries, and each key
      ones where they belong. The logits are then written once. None: in
      windows, whose s is small beside the width of a head.
    chunks: of the queries of a global block, one after the other, so that the
      logits are never there as a whole; 0: as many as keep 256 queries or
      fewer together.
    kernel: "xla": the above; "triton": one kernel of `slimsam.attention_triton`
      for Nvidia's GPUs; "auto": that one where it is faster, in 16 bits on such
      a GPU; "interpret": the kernel as plain operations, for tests.
  """

  fold: bool | None = None
  chunks: int = 0
  kernel: str = "auto"

  def __post_init__(self) -> None:
    if self.kernel not in KERNELS:
      raise UserError(
        f"kernel={self.kernel!r}{did_you_mean(str(self.kernel), KERNELS)}"
      )


TEXTBOOK = How(fold=False, chunks=1, kernel="xla")
_CHUNK, _LANES = 256, 8


def attend(
  qkv: Array, tables: tuple[Array, Array], bias: Array, window: int, how: How
) -> Array:
  """Attention of a block.

  Args:
    qkv: [b y x 3 h e], queries, keys and values, y = x.
    tables: relative positions of rows and of columns, [2s-1 e].
    bias: [3 h e], that of the layer which made qkv. What pads a window is no
      patch but has keys and values all the same: the biases.
    window: side of the windows; 0: attend over everything.
    how: see `How`.

  Returns:
    [b y x h e].
  """
  plain = functools.partial(_plain, window=window, how=how)
  if how.kernel == "xla":
    return plain(qkv, tables, bias)
  kernel = functools.partial(_by_kernel, window=window, how=how)
  if how.kernel != "auto":
    return kernel(qkv, tables, bias)
  if jnp.dtype(qkv.dtype).itemsize > 2 or not _has_triton():
    return plain(qkv, tables, bias)
  return jax.lax.platform_dependent(
    qkv, tables, bias, cuda=kernel, default=plain
  )


@functools.cache
def _has_triton() -> bool:
  """Jax 0.11 announces that a later one will not have it."""
  return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def _by_kernel(
  qkv: Array, tables: tuple[Array, Array], bias: Array, window: int, how: How
) -> Array:
  """`attend` by the kernel, each device its own images and heads."""
  run = functools.partial(_fused, window, how)
  mesh = jax.sharding.get_abstract_mesh()
  names = mesh.axis_names
  rows = tuple(name for name in ("data", "fsdp") if name in names)
  heads = "model" if "model" in names else None
  if math.prod(mesh.shape[name] for name in names) > 1:
    cut = math.prod(mesh.shape[name] for name in rows)
    if qkv.shape[0] % cut:
      rows = ()
    if heads and qkv.shape[4] % mesh.shape[heads]:
      heads = None
    spec = jax.P(rows or None, None, None, None, heads)
    # The compiler cannot cut a kernel: it would gather everything.
    run = jax.shard_map(
      run,
      in_specs=(spec, jax.P(), jax.P(None, heads)),
      out_specs=jax.P(rows or None, None, None, heads),
      check_vma=False,
    )
  return run(qkv, tables, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(
  window: int, how: How, qkv: Array, tables: tuple[Array, Array], bias: Array
) -> Array:
  from slimsam.attention_triton import fused

  side = window or qkv.shape[1]
  places = np.arange(qkv.shape[1]) % side
  rows, columns = (_by_distance(t, side)[places] for t in tables)
  q = qkv[:, :, :, 0]
  return fused(
    qkv,
    jnp.einsum("byxhe,yke->bhkyx", q, rows.astype(q.dtype)),
    jnp.einsum("byxhe,xke->bhyxk", q, columns.astype(q.dtype)),
    bias,
    side,
    interpret=how.kernel == "interpret",
  )


def _fused_forward(window: int, how: How, *args):
  return _fused(window, how, *args), args


def _fused_backward(window: int, how: How, args, gradient):
  return jax.vjp(functools.partial(_plain, window=window, how=how), *args)[1](
    gradient
  )


_fused.defvjp(_fused_forward, _fused_backward)


def _plain(
  qkv: Array, tables: tuple[Array, Array], bias: Array, window: int, how: How
) -> Array:
  """`attend` in products and softmax."""
  if not window:
    return _globally(qkv, tables, how)
  grid = qkv.shape[1]
  windows = -(-grid // window)
  extra = windows * window - grid
  if extra:
    inside = np.arange(windows * window) < grid
    inside = np.outer(inside, inside)[None, :, :, None, None, None]
    grown = jnp.pad(qkv, ((0, 0), (0, extra), (0, extra), *[(0, 0)] * 3))
    qkv = jnp.where(inside, grown, bias[None, None, None])
  cut = einops.rearrange(
    qkv, "b (wy y) (wx x) three h e -> three (b wy wx h) y x e",
    y=window, x=window, three=3,
  )  # fmt: skip
  fold = how.fold is not False
  out = _attended(cut[0], cut[1], cut[2], tables, fold)
  out = einops.rearrange(
    out, "(b wy wx h) (y x) e -> b (wy y) (wx x) h e",
    wy=windows, wx=windows, h=qkv.shape[4], y=window,
  )  # fmt: skip
  return out[:, :grid, :grid]


def _globally(qkv: Array, tables: tuple[Array, Array], how: How) -> Array:
  grid, heads = qkv.shape[1], qkv.shape[4]
  q, k, v = einops.rearrange(qkv, "b y x three h e -> three (b h) y x e")
  chunks = how.chunks or _chunks(grid)
  if grid % chunks:
    raise UserError(
      f"chunks={chunks} must divide the {grid} rows of patches, or be 0"
    )
  if chunks == 1:
    out = _attended(q, k, v, tables, bool(how.fold))
  else:
    rows = jnp.moveaxis(q.reshape(q.shape[0], chunks, -1, *q.shape[2:]), 1, 0)
    first = jnp.arange(chunks) * (grid // chunks)

    # Without it the backward pass would keep all logits after all.
    @jax.checkpoint
    def part(one: tuple[Array, Array]) -> Array:
      return _attended(one[0], k, v, tables, bool(how.fold), first_row=one[1])

    out = jnp.moveaxis(jax.lax.map(part, (rows, first)), 0, 1)
  return out.reshape(-1, heads, grid, grid, out.shape[-1]).transpose(
    0, 2, 3, 1, 4
  )


def _chunks(grid: int) -> int:
  """The fewest that divide the rows into small enough chunks."""
  for chunks in range(1, grid):
    if grid % chunks == 0 and grid // chunks * grid <= _CHUNK:
      return chunks
  return grid


def _attended(
  q: Array,
  k: Array,
  v: Array,
  tables: tuple[Array, Array],
  fold: bool,
  first_row: Array | int = 0,
) -> Array:
  """Attention of some rows of queries over all keys.

  Args:
    q: [n y x e], some rows, from `first_row` on.
    k: [n s s e].
    v: [n s s e].
    tables: [2s-1 e].
    fold: see `How`.
    first_row: of q.

  Returns:
    [n (y x) e].
  """
  side = k.shape[1]
  rows = jax.lax.dynamic_slice_in_dim(
    _by_distance(tables[0], side), first_row, q.shape[1]
  )
  columns = _by_distance(tables[1], side)
  by_row = jnp.einsum("nyxe,yke->nyxk", q, rows.astype(q.dtype))
  by_column = jnp.einsum("nyxe,xke->nyxk", q, columns.astype(q.dtype))
  scaled = q * q.shape[-1] ** -0.5
  k, v = (a.reshape(a.shape[0], side * side, -1) for a in (k, v))
  wide = functools.partial(
    jnp.einsum, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32)
  )
  if fold:
    query = jnp.concatenate([scaled, by_row, by_column], axis=-1)
    ones = jnp.asarray(_places(side), k.dtype)
    ones = jnp.broadcast_to(ones, (k.shape[0], *ones.shape))
    key = jnp.concatenate([k, ones], axis=-1)
    query = query.reshape(q.shape[0], -1, query.shape[-1])
    logits = wide("nqe,nke->nqk", query, key)
  else:
    logits = wide(
      "nyxe,nke->nyxk", scaled, k
    ).reshape(*q.shape[:3], side, side)  # fmt: skip
    logits = logits + by_row[..., :, None] + by_column[..., None, :]
    logits = logits.reshape(q.shape[0], -1, side * side)
  return _mixed(logits, v)


def _mixed(logits: Array, v: Array) -> Array:
  """softmax(logits) v, [n q k] and [n k e] -> [n q e].

  Heads of pruned models do not fill a register: there the sum of the softmax
  is a further column of the product, and no pass of its own.
  """
  if v.shape[-1] % _LANES == 0:
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("nqk,nke->nqe", weights, v)
  most = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  weights = jnp.exp(logits - most).astype(v.dtype)
  ones = jnp.ones((*v.shape[:2], 1), v.dtype)
  mixed = jnp.einsum(
    "nqk,nke->nqe", weights, jnp.concatenate([v, ones], axis=-1),
    preferred_element_type=logits.dtype,
  )  # fmt: skip
  return (mixed[..., :-1] / mixed[..., -1:]).astype(v.dtype)


def _places(side: int) -> np.ndarray:
  """Ones where a key's row is, and where its column is: [s*s 2s]."""
  one = np.eye(side, dtype=np.float32)
  return np.concatenate(
    [np.repeat(one, side, axis=0), np.tile(one, (side, 1))], axis=1
  )


def _by_distance(table: Array, side: int) -> Array:
  """R[query, key] = table[query - key + s - 1], [s s e]."""
  places = np.arange(side)
  return fitted(table, side)[places[:, None] - places[None] + side - 1]


def fitted(table: Array, side: int) -> Array:
  """A table of 2s-1 rows: the one given, or resized along them, linearly, with
  half-pixel centres.
  """
  rows = 2 * side - 1
  if len(table) == rows:
    return table
  return jax.image.resize(
    table, (rows, table.shape[1]), method="linear", antialias=False
  )
