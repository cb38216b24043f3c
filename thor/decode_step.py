"""One step of decoding: a token for every beam, with what was computed kept.

# b sentences, k beams, s source time, t target time, d width, h heads,
# e head width, v vocabulary, l expert layers

What stays the same at every step is made once: each layer's parameters as
arrays of their own, with query, key and value in one matrix, and the keys and
values of the source, which a sentence's beams share. The decoder's own keys
and values are written in place and never move: which beam a hypothesis was in
at each position is a table of small numbers, `ancestors`, and a query sees the
places that it names. Keys have time last, which makes scores a plain product
of matrices: on a CPU that is several times faster than time first. And what is
written is read in the same shape: XLA would else copy the whole cache.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from common.nn import dense, norm, plus
from thor import layers
from thor.dispatch import Prepared, is_expert, sentence_keys
from thor.expert_layer import run_experts, sentence_means
from thor.layers import Array, Params
from thor.model import computed, embedded, layer, masks_of
from thor.paths import layers_of
from thor.settings import Settings

Cache = list[dict[str, Array]]


@flax.struct.dataclass
class Decoder:
  """What the steps of a batch have in common.

  Attributes:
    weights: see `_weights`; in an ensemble those of experts are [m, …].
    memory: `key` [b h e s] and `value` [b h s e] of each layer, and what gates
      by sentence look at, `sentence` [b d]; in an ensemble [m, …].
    seen: bool [b s], where the source is no padding.
    keys: uint32 [b], see `thor.dispatch.sentence_keys`.
    places: [t d], vectors of the positions.
    fixed_ids: int [l b], of draws that hold for a whole sentence.
    prepared: the model and how it is used.
  """

  weights: Any
  memory: Cache
  seen: Array
  keys: Array
  places: Array
  fixed_ids: Array | None
  prepared: Prepared


def start(
  prepared: Prepared,
  source: Array,
  beams: int,
  length: int,
  *,
  apart: bool = False,
) -> tuple[Decoder, Cache]:
  """Reads the sources.

  Args:
    prepared: a model and how it is used.
    source: int [b s], padded on the right.
    beams: k.
    length: t, at most so many tokens are decoded.
    apart: several beams whose hypotheses never change them.

  Returns:
    What all steps have in common, and an empty cache: for each layer `key`
    [b h e tk] and `value` [b h tk e], or apart [b h k e t] and [b h k t e].
  """
  cfg = prepared.settings
  keys = sentence_keys(source, cfg.pad_id)
  ids = prepared.encoder_ids(source)
  read = functools.partial(_read, cfg, prepared.how, source=source, ids=ids)
  if prepared.members:
    weights = jax.vmap(
      functools.partial(_weights, cfg),
      in_axes=(prepared.member_axes,),
      out_axes=_member_axes(prepared),
    )(prepared.params)
    memory = jax.vmap(read, in_axes=(prepared.member_axes,))(prepared.params)
  else:
    weights = _weights(cfg, prepared.params)
    memory = read(prepared.params)
  fixed = None
  if prepared.name == "dispatch_sentence":
    fixed = prepared.decoder_ids(keys, source[:, :1], jnp.zeros((), jnp.int32))
  places = layers.sinusoids(length, cfg.width, kind=cfg.positions)
  cache = _empty_cache(prepared, len(source), beams, length, apart)
  decoder = Decoder(
    weights,
    memory,
    source != cfg.pad_id,
    keys,
    jnp.asarray(places, cfg.dtype),
    fixed,
    prepared,
  )
  return decoder, cache


def advance(
  decoder: Decoder,
  cache: Cache,
  tokens: Array,
  position: Array,
  ancestors: Array | None,
) -> tuple[Array, Cache]:
  """Reads a token of every beam.

  Args:
    decoder: see `start`.
    cache: keys and values of the tokens before.
    tokens: int [b k], the decoder's input.
    position: int scalar, how many tokens precede.
    ancestors: int [b k t], the beam that each token of a hypothesis was read
      in, -1 where there is none yet; None where all stay in their beam.

  Returns:
    Logits float32 [b k v] (of an ensemble log-probabilities), and the cache.
  """
  prepared = decoder.prepared
  step = functools.partial(
    _step,
    prepared.settings,
    prepared.how,
    tokens=tokens,
    position=position,
    place=jax.lax.dynamic_index_in_dim(
      decoder.places, position, keepdims=False
    ),
    seen=decoder.seen,
    ids=_ids(decoder, tokens, position),
    mask=_own_mask(decoder, cache, position, ancestors),
  )
  if not prepared.members:
    return step(decoder.weights, decoder.memory, cache)
  logits, cache = jax.vmap(step, in_axes=(_member_axes(prepared), 0, 0))(
    decoder.weights, decoder.memory, cache
  )
  each = jax.nn.log_softmax(logits)
  return jax.nn.logsumexp(each, axis=0) - jnp.log(prepared.members), cache


def _empty_cache(
  prepared: Prepared, rows: int, beams: int, length: int, apart: bool
) -> Cache:
  cfg = prepared.settings
  lead = (prepared.members,) if prepared.members else ()
  lead = (*lead, rows, cfg.heads, *((beams,) if apart else ()))
  places = length if apart else length * beams
  size = cfg.width // cfg.heads
  # A CPU would convert the whole of a bfloat16 cache at every step.
  is_cpu = jax.default_backend() == "cpu"
  zeros = functools.partial(
    jnp.zeros, dtype=jnp.float32 if is_cpu else cfg.dtype
  )
  return [
    {
      "key": zeros((*lead, size, places)),
      "value": zeros((*lead, places, size)),
    }
    for _ in range(cfg.decoder_layers)
  ]


def _weights(settings: Settings, params: Any) -> dict:
  """Parameters as a step takes them, in the type of the computation."""

  def ready(own: Any) -> dict:
    made = dict(own)
    parts = [own["attention"][name] for name in ("query", "key", "value")]
    parts[0] = _scaled(parts[0])
    made["attention"] = {
      # The three side by side: [d 3he].
      "in": {
        "kernel": jnp.stack([p["kernel"] for p in parts], 1).reshape(width, -1),
        "bias": jnp.stack([p["bias"] for p in parts]).reshape(-1),
      },
      "out": _flat_out(own["attention"]["out"]),
    }
    cross = own["cross_attention"]
    query = _scaled(cross["query"])
    made["cross_attention"] = {
      "in": {
        "kernel": query["kernel"].reshape(width, -1),
        "bias": query["bias"].reshape(-1),
      },
      "out": _flat_out(cross["out"]),
    }
    return made

  width = settings.width
  params = dict(params)
  decoder = params.pop("decoder")
  del params["encoder"]
  if "norm" in decoder:
    params["norm"] = decoder["norm"]
  each = layers_of({"decoder": decoder}, "decoder")
  # Vectors times [d v] are quicker than times [v d]. XLA would undo it.
  table = params["embedding"].astype(settings.dtype).T
  params["logits"] = jax.lax.optimization_barrier(table)
  return params | {
    "layers": [computed(ready(own), settings.dtype) for own in each]
  }


def _scaled(params: Params) -> dict:
  """A query's parameters, times what attention multiplies it by."""
  scale = params["kernel"].shape[-1] ** -0.5
  return jax.tree.map(lambda leaf: leaf * scale, dict(params))


def _flat_out(params: Params) -> dict:
  """Kernel [he d]."""
  kernel = params["kernel"]
  return {**params, "kernel": kernel.reshape(-1, kernel.shape[-1])}


def _member_axes(prepared: Prepared) -> Any:
  """Which of the weights an ensemble has for each member."""

  def axis(path: Any, leaf: Any) -> int | None:
    del leaf
    return 0 if is_expert(path) else None

  make = functools.partial(_weights, prepared.settings)
  return jax.tree_util.tree_map_with_path(
    axis, jax.eval_shape(make, prepared.params)
  )


def _read(
  settings: Settings,
  how: str,
  params: Any,
  *,
  source: Array,
  ids: Array | None,
) -> Cache:
  """The encoder: keys and values of the source for each decoder layer."""
  pattern, blocks = settings.blocks(settings.encoder_layers)
  x = embedded(settings, params["embedding"], source, layers.NO_DROPOUT)
  masks = masks_of(settings, source, None)
  if ids is not None:
    ids = ids.reshape(blocks, sum(pattern), *ids.shape[1:])

  def block(x: Array, own: tuple[Any, Array | None]) -> tuple[Array, None]:
    params, ids = own
    used = 0
    for i, has_experts in enumerate(pattern):
      chosen = ids[used] if has_experts and ids is not None else None
      used += has_experts
      x, _ = layer(
        settings, params[f"layer_{i}"], x, masks, ids=chosen, how=how
      )
    return x, None

  x, _ = jax.lax.scan(block, x, (params["encoder"]["layers"], ids))
  if settings.pre_norm:
    x = norm(params["encoder"]["norm"], x)

  sentence = {}
  if settings.gate_level == "sentence":
    sentence = {"sentence": sentence_means(x, masks["tokens"])}

  def look(own: Params) -> dict[str, Array]:
    own = jax.tree.map(lambda p: p.astype(x.dtype), dict(own))
    return {
      "key": jnp.moveaxis(layers.heads_of(own["key"], x), 1, 3),
      "value": jnp.swapaxes(layers.heads_of(own["value"], x), 1, 2),
      **sentence,
    }

  return [look(own["cross_attention"]) for own in layers_of(params, "decoder")]


def _ids(decoder: Decoder, tokens: Array, position: Array) -> Array | None:
  """Experts of the step's rows, [l bk] or [l bk 1]: a sentence's beams have
  the same, but for those that depend on the token.
  """
  beams = tokens.shape[1]
  if decoder.prepared.name == "hash":
    keys = jnp.repeat(decoder.keys, beams)
    return decoder.prepared.decoder_ids(keys, tokens.reshape(-1, 1), position)
  ids = decoder.fixed_ids
  if ids is None:
    ids = decoder.prepared.decoder_ids(decoder.keys, tokens[:, :1], position)
  return None if ids is None else jnp.repeat(ids, beams, axis=1)


def _own_mask(
  decoder: Decoder, cache: Cache, position: Array, ancestors: Array | None
) -> Array:
  """Which keys a query sees: [b 1 k tk], without ancestors [t] and ones."""
  if ancestors is not None:
    rows, beams, _ = ancestors.shape
    seen = ancestors[..., None] == jnp.arange(beams)[None, None, None]
    return seen.reshape(rows, 1, beams, -1)
  own = cache[0]["key"].ndim - bool(decoder.prepared.members)
  seen = jnp.arange(len(decoder.places)) <= position
  return seen.reshape((1,) * (own - 1) + (-1,))


def _step(
  settings: Settings,
  how: str,
  weights: Any,
  memory: Cache,
  cache: Cache,
  *,
  tokens: Array,
  position: Array,
  place: Array,
  seen: Array,
  ids: Array | None,
  mask: Array,
) -> tuple[Array, Cache]:
  """`advance` of one member, all of a layer's rows in one matrix [bk d]."""
  rows, new_cache, used = (tokens.shape[0], tokens.shape[1]), [], 0
  x = jnp.take(weights["embedding"], tokens.reshape(-1), axis=0)
  x = x.astype(settings.dtype)
  if settings.scale_embedding:
    x = x * settings.width**0.5
  x = x + place[None]
  for i, own in enumerate(weights["layers"]):
    attend = functools.partial(
      _self_attention, settings, own["attention"], cache[i], new_cache,
      rows=rows, position=position, mask=mask,
    )  # fmt: skip
    x = _sublayer(settings, own["attention_norm"], x, attend)
    attend = functools.partial(
      _cross_attention, settings, own["cross_attention"], memory[i], seen, rows
    )
    x = _sublayer(settings, own["cross_attention_norm"], x, attend)
    chosen = None
    if "experts" in own:
      chosen = None if ids is None else ids[used]
      used += 1
    feed = functools.partial(
      _feed_forward, settings, how, own, chosen, memory[i].get("sentence")
    )
    x = _sublayer(settings, own["feed_forward_norm"], x, feed)
  if settings.pre_norm:
    x = norm(weights["norm"], x)
  logits = jnp.matmul(x, weights["logits"], preferred_element_type=jnp.float32)
  if settings.logits_bias:
    logits = plus(logits, weights["logits_bias"])
  return logits.reshape(*rows, -1), new_cache


def _sublayer(settings: Settings, own: Params, x: Array, run: Any) -> Array:
  if settings.pre_norm:
    return x + run(norm(own, x))
  return norm(own, x + run(x))


def _self_attention(
  settings: Settings,
  params: Params,
  cache: dict[str, Array],
  new_cache: Cache,
  x: Array,
  *,
  rows: tuple[int, int],
  position: Array,
  mask: Array,
) -> Array:
  """Writes this token's key and value, and looks at all so far."""
  three = dense(params["in"], x)
  three = three.reshape(*rows, 3, settings.heads, -1)
  three = jnp.moveaxis(three, (2, 3), (0, 2))  # [3 b h k e]
  query, new_key, new_value = three.astype(cache["key"].dtype)
  write = jax.lax.dynamic_update_slice_in_dim
  if mask.ndim == 5:  # apart
    query = query[..., None, :]
    key = write(cache["key"], new_key[..., None], position, axis=4)
    value = write(cache["value"], new_value[..., None, :], position, axis=3)
  else:
    place = position * rows[1]
    key = write(cache["key"], jnp.swapaxes(new_key, 2, 3), place, axis=3)
    value = write(cache["value"], new_value, place, axis=2)
  new_cache.append({"key": key, "value": value})
  mixed = _looked_up(query, key, value, mask)
  return _joined(params["out"], mixed.reshape(three.shape[1:]), x)


def _cross_attention(
  settings: Settings,
  params: Params,
  memory: dict[str, Array],
  seen: Array,
  rows: tuple[int, int],
  x: Array,
) -> Array:
  """Looks at the source."""
  query = dense(params["in"], x).reshape(*rows, settings.heads, -1)
  mixed = _looked_up(
    query.swapaxes(1, 2), memory["key"], memory["value"], seen[:, None, None]
  )
  return _joined(params["out"], mixed, x)


def _looked_up(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """[… q e], [… e n], [… n e] -> [… q e]."""
  logits = jnp.einsum(
    "...qe,...en->...qn", query, key, preferred_element_type=jnp.float32
  )
  mask = jnp.broadcast_to(mask, logits.shape)
  weights = jax.nn.softmax(jnp.where(mask, logits, layers.NEVER))
  return jnp.einsum("...qn,...ne->...qe", weights.astype(value.dtype), value)


def _joined(params: Params, mixed: Array, like: Array) -> Array:
  """[b h k e] -> [bk d]."""
  flat = mixed.swapaxes(1, 2).reshape(like.shape[0], -1)
  return dense(params, flat.astype(like.dtype))


def _feed_forward(
  settings: Settings,
  how: str,
  params: Params,
  ids: Array | None,
  sentence: Array | None,
  x: Array,
) -> Array:
  if "experts" not in params:
    own = params["feed_forward"]
    return dense(own["down"], settings.activate(dense(own["up"], x)))
  if sentence is not None:
    sentence = jnp.repeat(sentence, len(x) // len(sentence), axis=0)
  out, _ = run_experts(
    settings, params["experts"], x[:, None], ids,
    how=how, mask=jnp.ones((len(x), 1), bool), sentence=sentence,
  )  # fmt: skip
  return out[:, 0]
