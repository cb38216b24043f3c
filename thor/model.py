"""The Transformer: dense, or with experts in some of its feed-forward layers.

# b batch, s source time, t target time, d width, v vocabulary, k experts

Parameters, with a leading axis of blocks below `layers` (a block is the
pattern of expert and dense layers that repeats):

    embedding [v d]                       of sources, targets and logits
    encoder/layers/layer_i/{attention, attention_norm, experts | feed_forward,
                            feed_forward_norm}
    decoder/layers/layer_i/{…, cross_attention, cross_attention_norm}
    {encoder, decoder}/norm               with pre_norm

Which expert runs where is data: see `thor.routing`. One compiled program
serves every draw.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.nn import Uniform, dense, drawn, norm, norm_init, plus
from common.parallel import constrain
from thor import layers
from thor.expert_layer import run_experts, sentence_means
from thor.layers import Array, Dropout, Site
from thor.routing import NO_ROUTES, Routes
from thor.settings import Settings

ROWS = ("data", "fsdp")


def rules_of(settings: Settings) -> tuple:
  """Where parameters live, by path; optimizer moments end in the same paths.

  Stacks of experts are cut along their hidden width where one expert is drawn
  for a whole batch or tokens go to any experts, and along the experts where
  tokens travel to them. See `common.parallel.experts`.
  """
  cut = settings.expert_axis or None
  if settings.cut_experts:
    stack = ((r"/experts/(up|down)/", jax.P(None, cut)),)
  else:
    stack = (
      (r"/experts/up/kernel$", jax.P(None, None, None, cut)),
      (r"/experts/up/bias$", jax.P(None, None, cut)),
      (r"/experts/down/kernel$", jax.P(None, None, cut)),
      (r"/experts/down/bias$", jax.P()),
    )
  return (
    (r"^extra/", jax.P()),
    # Adafactor's moments: small, and without the dimensions of the parameters.
    (r"/(v_row|v_col|v)/", jax.P()),
    (r"(^|/)embedding$", jax.P("model", "fsdp")),
    (r"(^|/)logits_bias$", jax.P()),
    *stack,
    (r"/gate/kernel$", jax.P()),
    (r"/(query|key|value)/kernel$", jax.P(None, "fsdp", "model")),
    (r"/(query|key|value)/bias$", jax.P(None, "model")),
    (r"/out/kernel$", jax.P(None, "model", None, "fsdp")),
    (r"/feed_forward/up/kernel$", jax.P(None, "fsdp", "model")),
    (r"/feed_forward/up/bias$", jax.P(None, "model")),
    (r"/feed_forward/down/kernel$", jax.P(None, "model", "fsdp")),
    (r"(^|/)(bias|scale)$", jax.P()),
  )


class Transformer(nn.Module):
  """The model.

  Attributes:
    settings: its sizes, and what experts need.
  """

  settings: Settings

  @nn.compact
  def __call__(
    self,
    source: Array,
    target: Array,
    routes: Routes = NO_ROUTES,
    *,
    key: Array | None = None,
  ) -> tuple[Array, dict[str, Array]]:
    """Logits of every next token.

    Args:
      source: int [b s], padded on the right.
      target: int [b t], the decoder's input: see `thor.data.shift_right`.
      routes: which expert runs where; without experts the default.
      key: of dropout and jitter; None switches both off.

    Returns:
      Logits float32 [b t v], and what the expert layers report, each [layers,
      ...], encoder first: see `thor.expert_layer.run_experts`.
    """
    cfg = self.settings
    table = self.param("embedding", functools.partial(_init_embedding, cfg))
    if not self.is_initializing():
      table = constrain(table, "model", None)
    bias = None
    if cfg.logits_bias:
      bias = self.param("logits_bias", lambda _: jnp.zeros(cfg.vocab_size))
    first_keys = second_keys = None
    if key is not None:
      depths = cfg.encoder_layers + 1, cfg.decoder_layers + 1
      keys = jax.random.split(key, sum(depths))
      first_keys, second_keys = keys[: depths[0]], keys[depths[0] :]
    memory, first = _Stack(cfg, cross=False, name="encoder")(
      source, table, routes.encoder, routes.how, first_keys
    )
    out, second = _Stack(cfg, cross=True, name="decoder")(
      target, table, routes.decoder, routes.how, second_keys, memory, source
    )
    aux = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    return logits_of(out, table, bias), aux


class _Stack(nn.Module):
  """Embedding and layers of the encoder, or (`cross`) of the decoder."""

  settings: Settings
  cross: bool

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    table: Array,
    ids: Array | None,
    how: str,
    keys: Array | None,
    memory: Array | None = None,
    source: Array | None = None,
  ) -> tuple[Array, dict[str, Array]]:
    cfg = self.settings
    depth = cfg.decoder_layers if self.cross else cfg.encoder_layers
    pattern, blocks = cfg.blocks(depth)
    place = _leave if self.is_initializing() else _by_rows
    own = None
    if keys is not None:
      own, keys = keys[0], keys[1:].reshape(blocks, len(pattern))
    if ids is not None:
      ids = ids.reshape(blocks, sum(pattern), *ids.shape[1:])
    x = place(embedded(cfg, table, tokens, Dropout(own)))
    masks = masks_of(cfg, tokens, source)
    block = nn.remat(_Block, prevent_cse=False) if cfg.remat else _Block
    x, aux = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, 0, nn.broadcast, nn.broadcast),
      length=blocks,
    )(cfg, pattern, self.cross, how, name="layers")(x, ids, keys, memory, masks)
    if cfg.pre_norm:
      x = norm(self.param("norm", lambda _: norm_init(cfg.width)), x)
    return place(x), jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux)


class _Block(nn.Module):
  """The layers that repeat."""

  settings: Settings
  pattern: tuple[bool, ...]
  cross: bool
  how: str

  @nn.compact
  def __call__(self, x, ids, keys, memory, masks):
    reports, used = [], 0
    for i, has_experts in enumerate(self.pattern):
      init = functools.partial(
        init_layer, self.settings, has_experts=has_experts, cross=self.cross
      )
      params = self.param(f"layer_{i}", init)
      own = None
      if has_experts:
        own = None if ids is None else ids[used]
        used += 1
      x, report = layer(
        self.settings, params, x, masks,
        memory=memory, ids=own, how=self.how,
        dropout=Dropout(None if keys is None else keys[i]),
      )  # fmt: skip
      reports += [report] if has_experts else []
    if not reports:
      return x, {}
    return x, jax.tree.map(lambda *a: jnp.stack(a), *reports)


def layer(
  settings: Settings,
  params: Any,
  x: Array,
  masks: dict[str, Array],
  *,
  memory: Array | None = None,
  ids: Array | None = None,
  how: str = "one",
  dropout: Dropout = layers.NO_DROPOUT,
) -> tuple[Array, dict[str, Array]]:
  """An encoder's layer, or with `memory` a decoder's.

  Args:
    settings: the model's.
    params: of the layer, without the axis of blocks.
    x: [b t d].
    masks: see `masks_of`.
    memory: [b s d], the encoder's output.
    ids: of its experts; see `thor.routing.Routes`.
    how: see `thor.routing.Routes`.
    dropout: and the gates' jitter.

  Returns:
    [b t d], and what the experts report; {} without.
  """
  params = computed(params, settings.dtype)
  report = {}

  def sublayer(x: Array, name: str, site: Site, run: Any) -> Array:
    normed = norm(params[name], x) if settings.pre_norm else x
    x = x + dropout(run(normed), settings.dropout, site)
    return x if settings.pre_norm else norm(params[name], x)

  def attend(name: str, site: Site):
    def run(x: Array) -> Array:
      own_keys = name == "attention" or memory is None
      seen = x if own_keys else memory
      return layers.attention(
        params[name], x, seen, masks[name],
        dropout=dropout, rate=settings.attention_dropout, site=site,
      )  # fmt: skip

    return run

  def feed_forward(x: Array) -> Array:
    if "experts" not in params:
      own = params["feed_forward"]
      hidden = settings.activate(dense(own["up"], x))
      hidden = dropout(hidden, settings.activation_dropout, Site.HIDDEN)
      return dense(own["down"], hidden)
    sentence = None
    if settings.gate_level == "sentence":
      states, mask = x, masks["tokens"]
      if memory is not None:
        states, mask = memory, masks["cross_attention"][:, 0, 0]
      sentence = sentence_means(states, mask)
    out, made = run_experts(
      settings, params["experts"], x, ids, how=how, mask=masks["tokens"],
      dropout=dropout, sentence=sentence,
    )  # fmt: skip
    report.update(made)
    return out

  run = attend("attention", Site.ATTENTION_WEIGHTS)
  x = sublayer(x, "attention_norm", Site.ATTENTION, run)
  if memory is not None:
    run = attend("cross_attention", Site.CROSS_ATTENTION_WEIGHTS)
    x = sublayer(x, "cross_attention_norm", Site.CROSS_ATTENTION, run)
  x = sublayer(x, "feed_forward_norm", Site.FEED_FORWARD, feed_forward)
  return x, report


def computed(params: Any, dtype: Any) -> Any:
  """A layer's parameters as products take them; norms and gates stay as they
  are, float32.
  """

  def cast(path: Any, leaf: Array) -> Array:
    kept = any("norm" in str(p) or "gate" in str(p) for p in path)
    return leaf if kept else leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, dict(params))


def masks_of(
  settings: Settings, tokens: Array, source: Array | None
) -> dict[str, Array]:
  """Who sees whom: `attention`, `cross_attention` (bool [b 1 t s]), and which
  tokens are no padding, `tokens` [b t].

  Args:
    settings: the model's.
    tokens: int [b t], what the stack reads.
    source: int [b s] for a decoder, None for an encoder.
  """
  real = tokens != settings.pad_id
  if source is None:
    return {"tokens": real, "attention": real[:, None, None]}
  length = tokens.shape[1]
  causal = jnp.tril(jnp.ones((length, length), bool))
  # A token that is padding still sees what precedes: Marian's first is one.
  return {
    "tokens": real,
    "attention": causal[None, None],
    "cross_attention": (source != settings.pad_id)[:, None, None],
  }


def embedded(
  settings: Settings, table: Array, tokens: Array, dropout: Dropout
) -> Array:
  """Vectors of tokens and positions, [b t d]."""
  x = jnp.take(table, tokens, axis=0).astype(settings.dtype)
  if settings.scale_embedding:
    x = x * settings.width**0.5
  places = layers.sinusoids(
    tokens.shape[1], settings.width, kind=settings.positions
  )
  x = x + jnp.asarray(places, x.dtype)[None]
  return dropout(x, settings.dropout, Site.EMBEDDING)


def logits_of(x: Array, table: Array, bias: Array | None) -> Array:
  """[b t d] -> float32 [b t v]."""
  logits = jnp.einsum(
    "btd,vd->btv", x, table.astype(x.dtype), preferred_element_type=jnp.float32
  )
  return logits if bias is None else plus(logits, bias)


def init_layer(
  settings: Settings, key: Array, *, has_experts: bool, cross: bool
) -> dict:
  """A layer's first parameters."""
  width, heads = settings.width, settings.heads
  made: dict[str, Any] = {
    "attention": layers.attention_init(width, heads),
    "attention_norm": norm_init(width),
    "feed_forward_norm": norm_init(width),
  }
  if cross:
    made["cross_attention"] = layers.attention_init(width, heads)
    made["cross_attention_norm"] = norm_init(width)
  small, large = jax.random.split(key)
  if not has_experts:
    made["feed_forward"] = layers.feed_forward_init(width, settings.hidden)
    return drawn(small, made)
  if settings.gated:
    gate = Uniform((width, settings.experts), width**-0.5)
    made["experts"] = {"gate": {"kernel": gate}}
  stack = layers.feed_forward_init(width, settings.hidden, settings.experts)
  made = drawn(small, made)
  stack = drawn(large, stack, at_once=False)
  return made | {"experts": {**made.get("experts", {}), **stack}}


def _init_embedding(settings: Settings, key: Array) -> Array:
  """Normal with variance 1 / d; the row of padding is 0."""
  shape = (settings.vocab_size, settings.width)
  table = jax.random.normal(key, shape) * settings.width**-0.5
  return table.at[settings.pad_id].set(0)


def _by_rows(x: Array) -> Array:
  return constrain(x, ROWS)


def _leave(x: Array) -> Array:
  return x


def init_params(settings: Settings, key: Array) -> Any:
  """A model's first parameters; to be jitted."""
  # Where experts run does not matter here, and two tokens divide no mesh.
  model = Transformer(dataclasses.replace(settings, expert_axis=""))
  tokens = jnp.zeros((1, 2), jnp.int32)
  encoder, decoder = settings.expert_layers
  routes = Routes(jnp.zeros(encoder, jnp.int32), jnp.zeros(decoder, jnp.int32))
  return model.init(key, tokens, tokens, routes)["params"]


def num_params(settings: Settings) -> int:
  """How many numbers a model has."""
  init = functools.partial(init_params, settings)
  made = jax.eval_shape(init, jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(made))
