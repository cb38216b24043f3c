"""Which expert translates: the ways to use a trained model.

# b sentences, t time, s source time, l expert layers, k experts, m members

    dispatch_sentence   one a sentence and layer, the same at every step
    dispatch_token      one a sentence, position and layer
    dispatch_batch      one a layer, for everything: what training does
    fixed:i             expert i everywhere
    average_output      the mean of all outputs of a layer: k times its work
    average_weight      one expert of the mean weights
    ensemble:m          m paths; the mean of their probabilities at every step
    gate, hash          what models trained so do
    dense               a model without experts

All follow from a seed and what the sentence says, so that a translation
depends neither on its batch nor on its beam. But for `average_output` none
computes an expert it does not use.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from common.config import did_you_mean
from common.errors import UserError
from common.rngs import mix_bits
from thor.layers import Array
from thor.paths import mean_weights, take_path
from thor.routing import Routes, Routing
from thor.settings import Settings

PyTree = Any
STOCHASTIC = (
  "dispatch_sentence", "dispatch_token", "dispatch_batch", "fixed",
  "average_output", "average_weight", "ensemble",
)  # fmt: skip
NUMBERED = ("fixed", "ensemble")
# By kind of routing: what it may do, the first by itself.
MODES = {
  "dense": ("dense",),
  "thor": STOCHASTIC,
  "random_switch": ("dispatch_token", *STOCHASTIC),
  "switch": ("gate",),
  "hash": ("hash",),
}


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """A way to use a model.

  Attributes:
    name: see the module.
    number: of `fixed` and `ensemble`.
  """

  name: str
  number: int = 0

  def __str__(self) -> str:
    numbered = self.name in NUMBERED
    return f"{self.name}:{self.number}" if numbered else self.name

  @classmethod
  def parse(cls, text: str, routing: Routing) -> "Dispatch":
    """Reads `fixed:0` and the like; "" is what the kind of routing does.

    Raises:
      UserError: for what the model cannot do, and numbers that make no sense.
    """
    allowed = MODES[routing.kind]
    if routing.kind == "random_switch" and routing.gate:
      allowed = ("dispatch_token", "dispatch_sentence")
    name, colon, number = (text or allowed[0]).partition(":")
    if name not in allowed:
      raise UserError(
        f"dispatch={text!r} does not go with routing.kind={routing.kind!r}"
        f"{did_you_mean(name, allowed)}"
      )
    if (name in NUMBERED) != bool(colon) or (colon and not number.isdecimal()):
      wanted = f"{name}:2" if name in NUMBERED else name
      raise UserError(f"dispatch={text!r}: write {wanted}")
    value = int(number or 0)
    if name == "fixed" and value >= routing.experts:
      raise UserError(
        f"dispatch={text!r}: experts are numbered from 0 to "
        f"{routing.experts - 1}"
      )
    if name == "ensemble" and value < 1:
      raise UserError(f"dispatch={text!r}: give at least one member")
    return cls(name, value)


@flax.struct.dataclass
class Prepared:
  """A model ready to be used.

  Attributes:
    params: parameters; in an ensemble those of experts are [m, …].
    key: of the draws.
    table: int [v], of hash.
    settings: of the model that `params` are for.
    name: of the dispatch.
    members: m; 0 where there is no ensemble, or all of it would be the same.
  """

  params: PyTree
  key: Array
  table: Array | None
  settings: Settings = flax.struct.field(pytree_node=False)
  name: str = flax.struct.field(pytree_node=False)
  members: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def how(self) -> str:
    """How expert layers are computed; see `thor.routing.Routes`."""
    if self.name == "average_output":
      return "averaged"
    if self.name in ("gate", "hash") and self.settings.eval_capacity:
      return "capacity"
    drawn = ("dispatch_sentence", "dispatch_token", "gate", "hash")
    return "grouped" if self.name in drawn else "one"

  @property
  def member_axes(self) -> PyTree:
    """`in_axes` of `params` for `jax.vmap` over the members."""

    def axis(path: Any, leaf: Array) -> int | None:
      del leaf
      return 0 if is_expert(path) else None

    return jax.tree_util.tree_map_with_path(axis, self.params)

  def encoder_ids(self, source: Array) -> Array | None:
    """Ids [l b] or [l b s]; None where nothing is to be chosen.

    Args:
      source: int [b s].
    """
    keys = sentence_keys(source, self.settings.pad_id)
    layers = jnp.arange(self.settings.expert_layers[0])
    return self._ids(layers, keys, source, jnp.zeros((), jnp.int32))

  def decoder_ids(
    self, keys: Array, tokens: Array, position: Array
  ) -> Array | None:
    """Ids [l b] or [l b t]; None where nothing is to be chosen.

    Args:
      keys: uint32 [b], see `sentence_keys`.
      tokens: int [b t], the decoder's input.
      position: int scalar, how many tokens precede them.
    """
    encoder, decoder = self.settings.expert_layers
    return self._ids(encoder + jnp.arange(decoder), keys, tokens, position)

  def _ids(
    self, layers: Array, keys: Array, tokens: Array, position: Array
  ) -> Array | None:
    if self.name == "hash" and self.table is not None:
      ids = jnp.take(self.table, tokens, axis=0)
      return jnp.broadcast_to(ids, (len(layers), *ids.shape))
    if self.name not in ("dispatch_sentence", "dispatch_token"):
      return None

    draw = functools.partial(
      self._draw, places=position + jnp.arange(tokens.shape[1])
    )
    by_sentence = jax.vmap(draw, in_axes=(None, 0))
    return jax.vmap(by_sentence, in_axes=(0, None))(layers, keys)

  def _draw(self, layer: Array, sentence: Array, places: Array) -> Array:
    """The expert of a layer and sentence, or [t] by position."""
    key = jax.random.fold_in(jax.random.fold_in(self.key, layer), sentence)
    count = self.settings.experts
    if self.name == "dispatch_sentence":
      return jax.random.randint(key, (), 0, count)

    def at(place: Array) -> Array:
      return jax.random.randint(jax.random.fold_in(key, place), (), 0, count)

    return jax.vmap(at)(places)

  def routes(self, source: Array, target: Array) -> Routes:
    """For a pass over given targets.

    Args:
      source: int [b s].
      target: int [b t], the decoder's input.
    """
    keys = sentence_keys(source, self.settings.pad_id)
    start = jnp.zeros((), jnp.int32)
    return Routes(
      self.encoder_ids(source),
      self.decoder_ids(keys, target, start),
      how=self.how,
    )


def prepare(
  params: PyTree,
  settings: Settings,
  dispatch: Dispatch,
  *,
  seed: int | Array = 0,
  table: Array | None = None,
) -> Prepared:
  """Leaves out of a model what a dispatch does not use.

  Args:
    params: the model's.
    settings: its.
    dispatch: the way to use it.
    seed: of the draws.
    table: int [v], of hash; see `thor.routing.hash_table`.

  Returns:
    What `thor.decode` and `Prepared.routes` take.
  """
  if dispatch.name == "hash" and table is None:
    raise UserError(
      "dispatch='hash' needs a table: see thor.routing.hash_table"
    )
  key = jax.random.key(seed)
  count, members = sum(settings.expert_layers), 0
  name = dispatch.name
  if name == "fixed":
    path = jnp.full(count, dispatch.number)
    params, settings = take_path(params, settings, path)
  elif name == "dispatch_batch":
    path = draw_paths(key, 1, count, settings.experts)[0]
    params, settings = take_path(params, settings, path)
  elif name == "average_weight":
    params, settings = mean_weights(params, settings)
  elif name == "ensemble" and count:
    members = dispatch.number
    paths = draw_paths(key, members, count, settings.experts)
    params, settings = _ensemble(params, settings, paths)
  return Prepared(params, key, table, settings, name, members)


def draw_paths(key: Array, members: int, layers: int, experts: int) -> Array:
  """Uniform paths, int [m l]."""
  return jax.random.randint(key, (members, layers), 0, experts)


def is_expert(path: Sequence[Any]) -> bool:
  """Whether a leaf at this path, of `jax.tree_util`, is of an expert."""
  return any(getattr(part, "key", "") == "experts" for part in path)


def _ensemble(params: PyTree, settings: Settings, paths: Array):
  """Experts' parameters with a leading axis of members, the rest as it is."""
  made = [take_path(params, settings, path) for path in paths]
  trees = [tree for tree, _ in made]

  def join(path: Any, *leaves: Array) -> Array:
    return jnp.stack(leaves) if is_expert(path) else leaves[0]

  return jax.tree_util.tree_map_with_path(join, *trees), made[0][1]


def sentence_keys(source: Array, pad_id: int) -> Array:
  """A number that follows from what a sentence says, uint32 [b].

  Args:
    source: int [b s]; padding does not count.
    pad_id: what padding is.
  """
  places = jnp.arange(1, source.shape[1] + 1, dtype=jnp.uint32)
  mixed = mix_bits(
    source.astype(jnp.uint32) + (places * jnp.uint32(0x9E3779B9))[None]
  )
  kept = jnp.where(source == pad_id, jnp.uint32(0), mixed)
  return mix_bits(jnp.sum(kept, axis=1, dtype=jnp.uint32))
