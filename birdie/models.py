"""The Gated SSM, with a bidirectional prefix.

# b batch, t time, d width, n state, v vocabulary

Source: "Birdie" (arXiv 2411.01030), sections 3.1, 3.4, A.3 and listing A.16.1.
A layer, with x normalized first:

    i = sigmoid(x W_i)   z = x W_z   o = gelu(x W_o)   f = sigmoid(x W_f + c)
    h_t = f_t h_(t-1) + i_t z_t;     y = x + (o h) W_out

In a bidirectional layer half of the channels run backwards, and their gate is
closed outside the prefix. Same parameters, work and state size.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from common.parallel import constrain, linear_scan
from common.parallel.scan import IMPLEMENTATIONS

Array = jax.Array

# Where parameters live, by path; optimizer moments end in the same paths.
# Kernels of layers have a leading axis of layers, which is never cut.
RULES = (
  (r"^extra/", jax.P()),
  # Adafactor's moments: small, and without the dimensions of the parameters.
  (r"/(v_row|v_col|v)/", jax.P()),
  (r"(^|/)embedding$", jax.P("model", "fsdp")),
  (r"(^|/)head/kernel$", jax.P("fsdp", "model")),
  (r"layers/.*/(input|drive|output|forget)/kernel$",
   jax.P(None, "fsdp", None, "model")),
  (r"layers/.*/out/kernel$", jax.P(None, None, "model", "fsdp")),
  (r"layers/.*/forget_bias$", jax.P(None, None, "model")),
  (r"(^|/)scale$", jax.P()),
)  # fmt: skip

BIDIRECTIONAL = ("none", "alternate", "all")
PREFIX_MODES = ("strict", "paper")
FORGET_BIASES = ("learned", "fixed", "none")
# Logits of the forget gates at the start: f from 0.73 to 0.993. Around f = 0.5
# the initial memory would be a few tokens.
FORGET_LOGITS = (1.0, 5.0)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SEQ_AXES = ("", "seq")  # none, or the axis that batches are cut along in time


def make_model(cfg: Any, vocab_size: int) -> "GatedSSM":
  """Builds the model of a configuration.

  Args:
    cfg: `config.model`; see `configs/birdie.py`.
    vocab_size: size of the embedding.

  Raises:
    UserError: for unknown names and sizes that do not go together.
  """
  settings = dict(cfg)
  name = settings.pop("name")
  if name != "gated_ssm":
    raise UserError(f"model.name={name!r}{did_you_mean(name, ['gated_ssm'])}")
  for key, allowed in (
    ("bidirectional", BIDIRECTIONAL),
    ("prefix_mode", PREFIX_MODES),
    ("forget_bias", FORGET_BIASES),
    ("dtype", DTYPES),
    ("scan_impl", IMPLEMENTATIONS),
    ("seq_axis", SEQ_AXES),
  ):
    value = settings[key]
    if value not in allowed:
      raise UserError(
        f"model.{key}={value!r}{did_you_mean(str(value), allowed)}"
      )
  for key in ("width", "state", "layers"):
    if settings[key] < 1:
      raise UserError(f"model.{key}={settings[key]} must be at least 1")
  if settings["state"] % 2:
    raise UserError(
      f"model.state={settings['state']} must be even: half of the channels of "
      "a bidirectional layer run backwards"
    )
  if settings["bidirectional"] == "alternate" and settings["layers"] % 2:
    raise UserError(
      f"model.layers={settings['layers']} must be even with "
      "model.bidirectional='alternate'"
    )
  settings["dtype"] = DTYPES[settings["dtype"]]
  settings["seq_axis"] = settings["seq_axis"] or None
  return GatedSSM(vocab_size=vocab_size, **settings)


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


def _leave(x: Array, *axes: Any) -> Array:
  del axes
  return x


class GatedSSMLayer(nn.Module):
  """One layer: recurrence and mixing of channels in one.

  The state axis is kept as [2, n / 2], so that cutting it in halves moves
  nothing between the shards of the `model` axis.
  """

  width: int
  state: int
  bidirectional: bool
  forget_bias: str
  dtype: Any
  scan_impl: str
  seq_axis: str | None

  @nn.compact
  def __call__(
    self,
    x: Array,
    resets: tuple[Array, Array],
    held: Array | None,
    h0: Array,
  ) -> tuple[Array, Array]:
    """Args:
      x: [b t d].
      resets: of the forward and the reverse recurrence, bool [b t].
      held: bool [b t 1]; where True the token sees the forward state but is
        not kept in it. None: nowhere.
      h0: [b 2 n/2] the state before the first token.

    Returns:
      [b t d] and the forward state after the last token, [b 2 n/2] float32; a
      reverse half has no state, so zeros stand there.
    """
    half = (2, self.state // 2)

    def project(name: str) -> Array:
      return nn.DenseGeneral(
        half,
        use_bias=False,
        dtype=self.dtype,
        kernel_init=_fan_in(self.width),
        name=name,
      )(normed)

    normed = RMSNorm(self.dtype, name="norm")(x)
    logits = project("forget").astype(jnp.float32) + self._forget_logits(half)
    gate = jax.nn.sigmoid(logits)
    drive = jax.nn.sigmoid(project("input")) * project("drive")
    out_gate = jax.nn.gelu(project("output"))

    drive = drive.astype(jnp.float32)
    h, last = self._recur(drive, gate, resets, held, h0)
    y = nn.DenseGeneral(
      self.width,
      axis=(-2, -1),
      use_bias=False,
      dtype=self.dtype,
      kernel_init=_fan_in(self.state),
      name="out",
    )(out_gate * h.astype(self.dtype))
    return x + y, last

  def _forget_logits(self, half: tuple[int, int]) -> Array:
    # Each half gets the whole range.
    spread = np.tile(np.linspace(*FORGET_LOGITS, half[1]), (2, 1))
    if self.forget_bias == "learned":
      bias = self.param("forget_bias", lambda key: jnp.float32(spread))
    elif self.forget_bias == "fixed":
      bias = jnp.float32(spread)
    else:
      bias = jnp.zeros(half, jnp.float32)
    return bias[None, None]

  def _recur(self, drive, gate, resets, held, h0):
    """All states [b t 2 n/2] and the last forward one [b 2 n/2]."""
    scan = functools.partial(
      linear_scan, impl=self.scan_impl, mesh_axis=self.seq_axis
    )

    def forward(half: int):
      x, a = drive[:, :, half], gate[:, :, half]
      if held is None:
        return scan(x, a, h0[:, half], reset=resets[0])
      h, last = scan(
        jnp.where(held, 0.0, x),
        jnp.where(held, 1.0, a),
        h0[:, half],
        reset=resets[0],
      )
      return jnp.where(held, a * h + x, h), last

    def backward(half: int):
      x, a = drive[:, :, half], gate[:, :, half]
      h, _ = scan(x, a, reverse=True, reset=resets[1])
      return h, jnp.zeros_like(h0[:, half])

    halves = forward(0), (backward if self.bidirectional else forward)(1)
    h, last = zip(*halves)
    return jnp.stack(h, axis=2), jnp.stack(last, axis=1)


def _fan_in(size: int):
  return nn.initializers.normal(size**-0.5)


class _Block(nn.Module):
  """The layers that repeat: one, or a bidirectional and a causal one."""

  kinds: tuple[bool, ...]
  layer: dict[str, Any]

  @nn.compact
  def __call__(self, x, h0, resets, held):
    states = []
    for i, bidirectional in enumerate(self.kinds):
      layer = GatedSSMLayer(
        **self.layer,
        bidirectional=bidirectional,
        name="bidirectional" if bidirectional else "causal",
      )
      x, last = layer(x, resets, held, h0[i])
      states.append(last)
    return x, jnp.stack(states)


class GatedSSM(nn.Module):
  """The language model: embedding, layers, norm, logits.

  Attributes:
    vocab_size: v.
    width: d.
    state: n, even.
    layers: how many.
    bidirectional: "none", "alternate" (every second layer, from the first) or
      "all".
    prefix_mode: see `boundaries`.
    forget_bias: offset of the forget gates: "learned", "fixed" or "none".
    tie_embeddings: logits through the embedding; scaled by d ** -0.5.
    dtype: of the computation. Parameters, the recurrence and the logits are
      float32.
    remat: recompute a block in the backward pass.
    scan_impl: see `linear_scan`.
    seq_axis: mesh axis that time is sharded over.
  """

  vocab_size: int
  width: int
  state: int
  layers: int
  bidirectional: str = "alternate"
  prefix_mode: str = "strict"
  forget_bias: str = "fixed"
  tie_embeddings: bool = True
  dtype: Any = jnp.float32
  remat: bool = False
  scan_impl: str = "auto"
  seq_axis: str | None = None

  @property
  def kinds(self) -> tuple[bool, ...]:
    """Which layers of a repeating block are bidirectional."""
    return {"none": (False,), "all": (True,), "alternate": (True, False)}[
      self.bidirectional
    ]

  @property
  def state_shape(self) -> tuple[int, int, int, int]:
    """[blocks, layers of a block, 2, n / 2]: a decode state without batch."""
    kinds = len(self.kinds)
    return self.layers // kinds, kinds, 2, self.state // 2

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    prefix_mask: Array,
    *,
    decode_state: Array | None = None,
  ) -> Array | tuple[Array, Array]:
    """Runs the model.

    Args:
      tokens: int [b t].
      segment_ids: int [b t]; segments never see each other, 0 is padding.
      positions: int [b t]; unused: a recurrence needs no positions. There for
        the signature that all models share.
      prefix_mask: bool [b t], where the prefix is.
      decode_state: float32 [blocks, kinds, b, 2, n/2], the states before the
        first token. Then a row is one segment, padding sees the states but is
        not kept in them, and the states after the last token are returned.

    Returns:
      Logits float32 [b t v], with `decode_state` a pair with the new states.
    """
    del positions
    decoding = decode_state is not None
    held = None
    if decoding:
      held = (segment_ids == 0)[:, :, None]
      segment_ids = jnp.ones_like(segment_ids)
    forward, backward = boundaries(
      segment_ids, prefix_mask, mode=self.prefix_mode
    )
    if decoding:
      forward = jnp.zeros_like(forward)
    embed = nn.Embed(
      self.vocab_size,
      self.width,
      embedding_init=nn.initializers.normal(1.0),
      name="embed",
    )
    # While decoding or initializing, rows may be any number and lie anywhere.
    free = decoding or self.is_initializing()
    place = _leave if free else constrain
    rows = (("data", "fsdp"), self.seq_axis, None)
    # Gathered over fsdp like every other parameter: a lookup in a table that
    # is cut by width would gather the batch instead.
    table = place(embed.embedding, "model", None)
    x = place(jnp.take(table, tokens, axis=0).astype(self.dtype), *rows)
    blocks = self._blocks()
    h0 = decode_state if decoding else self._zeros(x.shape[0])
    x, states = blocks(x, h0, (forward, backward), held)
    logits = self._logits(embed, place(x, *rows))
    return (logits, states) if decoding else logits

  def _logits(self, embed: nn.Embed, x: Array) -> Array:
    x = RMSNorm(jnp.float32, name="norm")(x)
    if self.tie_embeddings:
      return embed.attend(x * self.width**-0.5).astype(jnp.float32)
    head = nn.Dense(
      self.vocab_size,
      use_bias=False,
      kernel_init=_fan_in(self.width),
      name="head",
    )
    return head(x).astype(jnp.float32)

  def _zeros(self, batch: int) -> Array:
    blocks, kinds, *rest = self.state_shape
    return jnp.zeros((blocks, kinds, batch, *rest), jnp.float32)

  def _blocks(self):
    block = nn.remat(_Block, prevent_cse=False) if self.remat else _Block
    return nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast, nn.broadcast),
      length=self.state_shape[0],
    )(
      self.kinds,
      {
        "width": self.width,
        "state": self.state,
        "forget_bias": self.forget_bias,
        "dtype": self.dtype,
        "scan_impl": self.scan_impl,
        "seq_axis": self.seq_axis,
      },
      name="layers",
    )


def token_metrics(logits: Array, batch: Any) -> tuple[Array, Array]:
  """Negative log-likelihood and whether the best guess is right.

  Args:
    logits: [b t v].
    batch: has `targets`, int [b t].

  Returns:
    Two float32 [b t], at every position; weigh them with `loss_weights`.
  """
  logits = logits.astype(jnp.float32)
  targets = batch["targets"]
  chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
  loss = jax.nn.logsumexp(logits, axis=-1) - chosen
  correct = jnp.argmax(logits, axis=-1) == targets
  return loss, correct.astype(jnp.float32)
