"""What the three models share: embedding, stack of layers, logits.

# b batch, t time, d width, n state, m half of it, v vocabulary

A stack is made of blocks that repeat, one compiled and scanned over all of
them: a bidirectional layer and a causal one, or one layer of either kind.
"""

import functools
import math
import operator
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from common.parallel import constrain, linear_scan

Array = jax.Array
PyTree = Any
ROWS = ("data", "fsdp")


@flax.struct.dataclass
class Context:
  """What the layers know of every place of a batch.

  Attributes:
    segments: int [b t]; segments never see each other.
    positions: int [b t], within the segment.
    prefix: bool [b t], what is read in both directions.
    forward, backward: bool [b t], where the recurrences of either direction
      start anew; see `boundaries`.
    held: bool [b t], padding that leaves a decode state as it is; None where
      nothing is decoded.
  """

  segments: Array
  positions: Array
  prefix: Array
  forward: Array
  backward: Array
  held: Array | None = None

  @property
  def kept(self) -> Array:
    """Bool [b t], what a decode state keeps."""
    if self.held is None:
      return jnp.ones_like(self.prefix)
    return ~self.held


def boundaries(segment_ids: Array, prefix: Array, *, mode: str):
  """Where the two halves of a bidirectional layer forget (section A.3).

  Args:
    segment_ids: [b t], 0 is padding.
    prefix: bool [b t].
    mode: "strict": the prefix sees nothing behind itself; "paper": its last
      token sees the one after it (GEN).

  Returns:
    Two bool [b t]: resets of the forward and of the reverse recurrence.
  """
  changes = segment_ids[:, 1:] != segment_ids[:, :-1]
  edge = jnp.ones_like(prefix[:, :1])
  forward = jnp.concatenate([edge, changes], axis=1)
  ends = jnp.concatenate([changes, edge], axis=1)
  backward = ends | ~prefix
  if mode == "strict":
    following = jnp.concatenate([prefix[:, 1:], ~edge], axis=1)
    backward |= ~following
  return forward, backward


def make_context(
  segment_ids: Array, positions: Array, prefix: Array, *, mode: str,
  decoding: bool,
) -> Context:  # fmt: skip
  """The context of a batch; see `LanguageModel.__call__`."""
  if not decoding:
    forward, backward = boundaries(segment_ids, prefix, mode=mode)
    return Context(segment_ids, positions, prefix, forward, backward)
  held = segment_ids == 0
  whole = jnp.ones_like(segment_ids)
  _, backward = boundaries(whole, prefix, mode=mode)
  forward = (positions == 0) & ~held
  return Context(whole, positions, prefix, forward, backward, held)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, computed in float32."""

  dtype: Any = jnp.float32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x = x.astype(jnp.float32)
    rms = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
    return (x / rms * scale).astype(self.dtype)


def fan_in(size: int, variance: float = 1.0) -> Any:
  """An initializer: normal with variance / size."""
  return nn.initializers.normal((variance / size) ** 0.5)


class Projection(nn.Module):
  """A linear map without bias, of the last axes to others.

  Attributes:
    features: the axes it makes.
    axes: how many of the last axes it takes.
    flat: take the leading axes as one: XLA multiplies matrices faster than
      batches of them on a CPU. Not where two of them are cut over a mesh.
    variance: of the initial kernel, times how many numbers go into one.
  """

  features: tuple[int, ...]
  dtype: Any
  axes: int = 1
  flat: bool = True
  variance: float = 1.0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    lead, inner = x.shape[: -self.axes], x.shape[-self.axes :]
    init = fan_in(math.prod(inner), self.variance)
    kernel = self.param("kernel", init, (*inner, *self.features))
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if self.flat:
      x = x.reshape(-1, *inner)
    y = jnp.tensordot(x, kernel, self.axes)
    return y.reshape(*lead, *self.features)


class GatedMLP(nn.Module):
  """(gelu(x W_gate) * (x W_up)) W_down (section 2.1)."""

  hidden: int
  dtype: Any
  flat: bool = True
  out_variance: float = 1.0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def project(name: str) -> Array:
      features = (self.hidden,)
      return Projection(features, self.dtype, flat=self.flat, name=name)(x)

    return Projection(
      x.shape[-1:],
      self.dtype,
      flat=self.flat,
      variance=self.out_variance,
      name="down",
    )(jax.nn.gelu(project("gate")) * project("up"))


def recur(
  drive: Array,
  gate: Array,
  context: Context,
  h0: Array | None,
  *,
  bidirectional: bool,
  scan_impl: str,
  seq_axis: str | None,
) -> tuple[Array, Array | None]:
  """h_t = a_t h_(t-1) + x_t, one half of a bidirectional layer reversed.

  Args:
    drive: x, float32 [b t 2 m].
    gate: a, the same.
    context: resets, and what leaves the state as it is.
    h0: [b 2 m] the state before the first token; None without one.
    bidirectional: whether the second half runs backwards.
    scan_impl: see `linear_scan`.
    seq_axis: mesh axis that time is cut along.

  Returns:
    All states [b t 2 m], and where h0 is given the forward state after the
    last token, [b 2 m]; zeros stand for a reverse half, which has none.
  """
  scan = functools.partial(linear_scan, impl=scan_impl, mesh_axis=seq_axis)

  def forward(half: int):
    x, a = drive[:, :, half], gate[:, :, half]
    start = None if h0 is None else h0[:, half]
    if context.held is None:
      return scan(x, a, start, reset=context.forward)
    held = context.held[:, :, None]
    h, last = scan(
      jnp.where(held, 0.0, x),
      jnp.where(held, 1.0, a),
      start,
      reset=context.forward,
    )
    return jnp.where(held, a * h + x, h), last

  def backward(half: int):
    x, a = drive[:, :, half], gate[:, :, half]
    h, last = scan(x, a, reverse=True, reset=context.backward)
    return h, jnp.zeros_like(last)

  halves = forward(0), (backward if bidirectional else forward)(1)
  h, last = zip(*halves)
  state = None if h0 is None else jnp.stack(last, axis=1)
  return jnp.stack(h, axis=2), state


_KEPT = jax.checkpoint_policies.save_from_both_policies(
  # Attention's products, of batches, would be scores of time by time.
  jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  jax.checkpoint_policies.save_only_these_names(
    "linear_scan", "attention", "gate"
  ),
)


class _Block(nn.Module):
  """The layers that repeat: one, or a bidirectional and a causal one."""

  kinds: tuple[bool, ...]
  layer: Any
  settings: dict[str, Any]

  @nn.compact
  def __call__(self, x: Array, states: PyTree, context: Context):
    kept = []
    for i, bidirectional in enumerate(self.kinds):
      layer = self.layer(
        **self.settings,
        bidirectional=bidirectional,
        name="bidirectional" if bidirectional else "causal",
      )
      own = jax.tree.map(operator.itemgetter(i), states)
      x, state = layer(x, context, own)
      kept.append(state)
    return x, jax.tree.map(lambda *s: jnp.stack(s), *kept)


class _Head(nn.Module):
  """The matrix of the logits, [d v]."""

  width: int
  vocab_size: int

  @nn.compact
  def __call__(self) -> Array:
    shape = (self.width, self.vocab_size)
    return self.param("kernel", fan_in(self.width), shape)


def _leave(x: Array, *axes: Any) -> Array:
  del axes
  return x


class LanguageModel(nn.Module):
  """Embedding, layers, norm, logits; a subclass says what a layer is.

  Attributes:
    vocab_size: v.
    width: d.
    layers: how many.
    bidirectional: "none", "alternate" (every second layer, from the first) or
      "all".
    prefix_mode: see `boundaries`.
    tie_embeddings: logits through the embedding; scaled by d ** -0.5.
    dtype: of the computation. Recurrences and logits are float32.
    param_dtype: of the parameters, as `birdie.models.init_params` makes them.
    remat: what a block's backward pass computes again: "none", "dots" (all but
      products of matrices, recurrences and attention: on a CPU faster than to
      keep it) or "full".
    scan_impl: see `linear_scan`.
    seq_axis: mesh axis that time is sharded over.
  """

  vocab_size: int
  width: int
  layers: int
  bidirectional: str = "alternate"
  prefix_mode: str = "strict"
  tie_embeddings: bool = True
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str = "dots"
  scan_impl: str = "auto"
  seq_axis: str | None = None

  # -- what a subclass gives -------------------------------------------------

  def _layer(self) -> tuple[Any, dict[str, Any]]:
    """The class of a layer, and the settings that are its own.

    Each also has `width`, `dtype`, `seq_axis` and `bidirectional`.

    It is called with x [b t d], a `Context` and its decode state or None, and
    returns x and what is to be kept.
    """
    raise NotImplementedError

  def empty_state(self, batch: int, capacity: int = 0) -> PyTree:
    """The decode state before any token.

    Args:
      batch: b.
      capacity: tokens that it must be able to hold, where it grows with them.

    Returns:
      A tree of arrays [blocks, kinds, b, ...].
    """
    raise NotImplementedError

  def room(self, state: PyTree) -> int | None:
    """How many tokens a decode state has place for; None: any number."""
    del state
    return None

  def _kept(self, state: PyTree, new: PyTree, context: Context) -> PyTree:
    """The decode state after what the layers have returned."""
    del state, context
    return new

  # --------------------------------------------------------------------------

  @property
  def kinds(self) -> tuple[bool, ...]:
    """Which layers of a repeating block are bidirectional."""
    return {"none": (False,), "all": (True,), "alternate": (True, False)}[
      self.bidirectional
    ]

  @property
  def blocks(self) -> int:
    """How many blocks repeat."""
    return self.layers // len(self.kinds)

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    prefix_mask: Array,
    *,
    decode_state: PyTree | None = None,
    features: bool = False,
  ) -> Any:
    """Runs the model.

    Args:
      tokens: int [b t].
      segment_ids: int [b t]; segments never see each other, 0 is padding.
      positions: int [b t], from 0 in every segment.
      prefix_mask: bool [b t], where the prefix is.
      decode_state: see `empty_state`, what was read before the first token.
        Then a row is one segment, and padding, which stands behind the tokens,
        is not kept. Returns a pair with the state after the last token.
      features: return what the logits are made of; see `vocabulary_logits`.

    Returns:
      Logits float32 [b t v], or with `features` [b t d].
    """
    decoding = decode_state is not None
    context = make_context(
      segment_ids, positions, prefix_mask, mode=self.prefix_mode,
      decoding=decoding,
    )  # fmt: skip
    # While decoding or initializing, rows may be any number and lie anywhere.
    free = decoding or self.is_initializing()
    place = _leave if free else constrain
    rows = (ROWS, self.seq_axis, None)
    embed = nn.Embed(
      self.vocab_size,
      self.width,
      embedding_init=nn.initializers.normal(1.0),
      name="embed",
    )
    # Gathered over fsdp like every other parameter: a lookup in a table that
    # is cut by width would gather the batch instead.
    table = place(embed.embedding, "model", None)
    x = place(jnp.take(table, tokens, axis=0).astype(self.dtype), *rows)
    x, new = self._stack()(x, decode_state, context)
    x = RMSNorm(self.dtype, name="norm")(place(x, *rows))
    if self.tie_embeddings:
      kernel = table.T
      x = x * jnp.asarray(self.width**-0.5, x.dtype)
    else:
      kernel = _Head(self.width, self.vocab_size, name="head")()
    out = x if features else vocabulary_logits(x, kernel)
    if not decoding:
      return out
    return out, self._kept(decode_state, new, context)

  def vocabulary_kernel(self, params: PyTree) -> Array:
    """The matrix [d v] that makes logits of features."""
    if self.tie_embeddings:
      return params["embed"]["embedding"].T
    return params["head"]["kernel"]

  def _stack(self):
    block: Any = _Block
    if self.remat != "none":
      kept = _KEPT if self.remat == "dots" else None
      block = nn.remat(_Block, prevent_cse=False, policy=kept)
    layer, settings = self._layer()
    settings |= {
      "width": self.width,
      "dtype": self.dtype,
      # Parameters are made of a short row, which is not cut.
      "seq_axis": None if self.is_initializing() else self.seq_axis,
    }
    return nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=self.blocks,
    )(self.kinds, layer, settings, name="layers")


def vocabulary_logits(features: Array, kernel: Array) -> Array:
  """[... d] and [d v] to logits float32 [... v].

  Products are of the features' type, sums float32.
  """
  return jnp.einsum(
    "...d,dv->...v",
    features,
    kernel.astype(features.dtype),
    preferred_element_type=jnp.float32,
  )
