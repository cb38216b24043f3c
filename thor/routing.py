"""Which expert runs where: drawn, gated, hashed.

# b batch, t time, s source time, d width, k experts, l expert layers

Draws are a function of (seed, step, pass, layer), and do not depend on devices.
By kind (`Routing.kind`):

    dense          no experts
    thor           one expert a layer for the whole batch, drawn anew in each
                   pass and step; or (`level`) one a sentence or a token, each
                   expert equally often
    random_switch  each token its own, drawn
    switch         the one that a gate prefers, times the gate's probability
    hash           a fixed one for each word of the vocabulary

Sources: arXiv 2110.04260 and `microsoft/Stochastic-Mixture-of-Experts` (thor),
arXiv 2101.03961 (switch), arXiv 2106.04426 (hash).
"""

import dataclasses
import functools
import heapq
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from common.parallel import experts as stacks
from common.rngs import np_rng
from thor.layers import Array
from thor.settings import GATE_LEVELS

KINDS = ("dense", "thor", "random_switch", "switch", "hash")
LEVELS = ("batch", "sentence", "token")
PAIRS = ("independent", "distinct")
TABLES = ("balanced", "random")


@flax.struct.dataclass
class Routes:
  """Which expert runs where, in one pass.

  Attributes:
    encoder: int [l] for a whole batch, [l b] by sentence, or [l b s] by token;
      None where a gate chooses, or nothing is to be chosen.
    decoder: int [l], [l b] or [l b t], likewise.
    how: how it is computed. "one": an expert for the whole batch; "balanced":
      the ids name every expert equally often (in each row, or in each k rows);
      "grouped": any ids; "capacity": any ids, with limited room; "averaged":
      the mean of all experts' outputs.
  """

  encoder: Array | None = None
  decoder: Array | None = None
  how: str = flax.struct.field(pytree_node=False, default="one")


NO_ROUTES = Routes()


@dataclasses.dataclass(frozen=True)
class Routing:
  """How training routes.

  Attributes:
    kind: one of `KINDS`.
    experts: k, of each expert layer.
    level: of thor's draws, one of `LEVELS`.
    pair: of thor's two passes: "independent", as the authors draw, or
      "distinct": never the same expert of a layer.
    capacity: of switch, random_switch and hash: an expert's room in training,
      in even shares; 0: any number.
    eval_capacity: the same out of training. Above 0 a sentence's translation
      depends on those it is translated with.
    groups: see `Settings`.
    jitter: of the gate's input in training.
    balance: weight of the gate's balance loss.
    gate: random_switch keeps a gate, and weighs with it.
    gate_level: what a gate looks at; see `thor.settings.Settings`.
    table: of hash: "balanced" by frequency in the training text, or "random".
    axis: the mesh axis of expert stacks; "" for none.
  """

  kind: str = "thor"
  experts: int = 2
  level: str = "batch"
  pair: str = "independent"
  capacity: float = 1.25
  eval_capacity: float = 0.0
  groups: int = 1
  jitter: float = 0.01
  balance: float = 0.01
  gate: bool = False
  gate_level: str = "token"
  table: str = "balanced"
  axis: str = "fsdp"

  def __post_init__(self) -> None:
    for name, allowed in (
      ("kind", KINDS), ("level", LEVELS), ("pair", PAIRS), ("table", TABLES),
      ("axis", ("", "fsdp", "data")), ("gate_level", GATE_LEVELS),
    ):  # fmt: skip
      value = getattr(self, name)
      if value not in allowed:
        raise UserError(
          f"routing.{name}={value!r}{did_you_mean(str(value), allowed)}"
        )
    if not 0 <= self.balance < float("inf"):
      raise UserError(f"routing.balance={self.balance} must be a number from 0")
    if self.kind != "thor" and (self.level, self.pair) != (
      "batch", "independent",
    ):  # fmt: skip
      raise UserError(
        f"routing.level={self.level!r} and routing.pair={self.pair!r} are for "
        f"kind 'thor', not for {self.kind!r}: leave them as they are"
      )
    if self.experts < 1:
      raise UserError(f"routing.experts={self.experts} must be at least 1")
    if self.pair == "distinct" and self.kind == "thor" and self.experts < 2:
      raise UserError(
        f"routing.pair='distinct' needs two experts; routing.experts="
        f"{self.experts}"
      )
    if self.kind == "dense" and self.experts != 1:
      raise UserError(
        f"routing.kind='dense' has one expert; routing.experts={self.experts}: "
        "set it to 1"
      )

  @property
  def by_batch(self) -> bool:
    """Whether one expert of a layer serves a whole batch."""
    drawn = self.kind == "thor" and self.level == "batch"
    return drawn or self.experts == 1

  @property
  def gated(self) -> bool:
    """Whether expert layers have a gate."""
    return self.kind == "switch" or (self.kind == "random_switch" and self.gate)

  def model_settings(self) -> dict[str, Any]:
    """What of this the model has to know."""
    limited = self.kind in ("switch", "random_switch", "hash")
    travels = self.kind == "thor" and self.level != "batch"
    return {
      "experts": self.experts,
      "gated": self.gated,
      "gate_level": self.gate_level,
      "capacity": self.capacity if limited else 0.0,
      "eval_capacity": self.eval_capacity if limited else 0.0,
      "groups": self.groups,
      "jitter": self.jitter if self.gated else 0.0,
      "expert_axis": self.axis,
      "cut_experts": travels or (limited and self.capacity > 0),
    }

  @property
  def row_multiple(self) -> int:
    """What has to divide the rows of a shard."""
    by_rows = self.kind == "thor" and self.level == "sentence"
    return self.experts if by_rows else 1


def train_routes(
  routing: Routing,
  layers: tuple[int, int],
  key: Array,
  *,
  source: Array,
  target: Array,
  passes: int,
  table: Array | None = None,
) -> list[Routes]:
  """The routes of a training step's passes.

  Args:
    routing: how.
    layers: expert layers of encoder and decoder.
    key: of the step.
    source: int [b s].
    target: int [b t], the decoder's input.
    passes: how many.
    table: int [v], of hash: each token's expert.

  Returns:
    One for each pass.

  Raises:
    UserError: for rows that the experts do not divide, at the level of
      sentences.
  """
  if sum(layers) == 0:
    return [NO_ROUTES] * passes
  how = "capacity" if routing.capacity else "grouped"
  if routing.kind == "switch":
    return [Routes(how=how)] * passes
  if routing.kind == "hash":
    return [hash_routes(table, layers, source, target, how=how)] * passes
  if routing.kind == "thor" and routing.level == "batch":
    ids = draw_pair(
      key, sum(layers), routing.experts, passes, pair=routing.pair
    )
    return [Routes(own[: layers[0]], own[layers[0] :]) for own in ids]
  made: list[Routes] = []
  for i in range(passes):
    own = jax.random.fold_in(key, i)
    if made and routing.kind == "thor" and routing.pair == "distinct":
      made.append(_other_experts(routing, own, made[0]))
      continue
    draw = functools.partial(_draw_many, routing, own)
    made.append(
      Routes(
        draw(0, layers[0], source.shape),
        draw(layers[0], layers[1], target.shape),
        how="balanced" if routing.kind == "thor" else how,
      )
    )
  return made


def _other_experts(routing: Routing, key: Array, first: Routes) -> Routes:
  """All experts of a layer moved on by one number, so that none is the same and
  each still comes equally often.
  """

  def moved(ids: Array, key: Array) -> Array:
    shape = (len(ids), *[1] * (ids.ndim - 1))
    steps = jax.random.randint(key, shape, 1, routing.experts)
    return (ids + steps) % routing.experts

  encoder, decoder = jax.random.split(key)
  return jax.tree.map(moved, first, Routes(encoder, decoder, how=first.how))


def row_shards() -> int:
  """Among how many devices of the current mesh the rows of a batch are cut."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return sizes.get("data", 1) * sizes.get("fsdp", 1)


def draw_pair(
  key: Array, layers: int, experts: int, passes: int, *, pair: str
) -> Array:
  """An expert for every layer and pass.

  Args:
    key: of the step.
    layers: l.
    experts: k.
    passes: how many; with `pair="distinct"` at most k differ.
    pair: "independent": uniform each; "distinct": pass p of a layer has
      (first + 1 + r) mod k, r uniform below k - 1.

  Returns:
    int32 [passes, l].
  """

  def draw(i: int, layer: Array) -> Array:
    own = jax.random.fold_in(jax.random.fold_in(key, i), layer)
    if not i or pair == "independent":
      return jax.random.randint(own, (), 0, experts)
    return jax.random.randint(own, (), 1, experts)

  rows = [
    jax.vmap(functools.partial(draw, i))(jnp.arange(layers))
    for i in range(passes)
  ]
  if pair == "distinct":
    rows[1:] = [(rows[0] + row) % experts for row in rows[1:]]
  return jnp.stack(rows)


def _draw_many(
  routing: Routing,
  key: Array,
  first: int,
  layers: int,
  shape: tuple[int, ...],
) -> Array:
  """Experts of sentences [l b] or tokens [l b t] (t rounded up if even)."""
  (rows, length), count = shape, routing.experts

  def draw(layer: Array) -> Array:
    own = jax.random.fold_in(key, layer)
    if routing.kind == "random_switch":
      return jax.random.randint(own, shape, 0, count)
    if routing.level == "token":
      return stacks.balanced_ids(own, rows, length, count)
    # Each device needs every expert equally often, or outputs are wrong.
    shards = row_shards()
    if rows % (count * shards):
      raise UserError(
        f"routing.level='sentence': {rows} rows of a batch do not divide among "
        f"{count} experts on each of {shards} devices: choose "
        "data.token_budget or accum so that they do"
      )
    return stacks.balanced_ids(own, rows // count, count, count).reshape(-1)

  return jax.vmap(draw)(first + jnp.arange(layers))


def hash_routes(
  table: Array | None,
  layers: tuple[int, int],
  source: Array,
  target: Array,
  *,
  how: str,
) -> Routes:
  """Each token's expert by its word: the source's, and the decoder's input's.

  Args:
    table: int [v].
    layers: expert layers of encoder and decoder.
    source: int [b s].
    target: int [b t].
    how: see `Routes`.
  """
  if table is None:
    raise UserError("routing.kind='hash' needs a table: see hash_table")
  ids = [
    jnp.broadcast_to(jnp.take(table, tokens, axis=0), (count, *tokens.shape))
    for count, tokens in zip(layers, (source, target))
  ]
  return Routes(*ids, how=how)


def hash_table(
  counts: np.ndarray, experts: int, *, kind: str, seed: int
) -> np.ndarray:
  """Each word's expert.

  Args:
    counts: int [v], how often each word occurs.
    experts: k.
    kind: "random": uniform; "balanced": from the most frequent word on, each
      goes to the expert with the least so far, so that loads differ by at most
      one word's count. Among equal experts and words the seed decides.
    seed: of the draw.

  Returns:
    int32 [v].
  """
  rng = np_rng(seed, "hash_table")
  if kind == "random":
    return rng.integers(experts, size=len(counts)).astype(np.int32)
  shuffled = rng.permutation(len(counts))
  order = shuffled[np.argsort(-counts[shuffled], kind="stable")]
  heap = [(0, int(tie), k) for k, tie in enumerate(rng.permutation(experts))]
  heapq.heapify(heap)
  table = np.zeros(len(counts), np.int32)
  for word in order:
    load, tie, expert = heap[0]
    table[word] = expert
    # Words that never occur are dealt out as if each occurred once.
    heapq.heapreplace(heap, (load + max(int(counts[word]), 1), tie, expert))
  return table


def expert_counts(
  sides: Sequence[np.ndarray], vocab_size: int, start_id: int
) -> np.ndarray:
  """How often each word occurs, for a hash table, int64 [v].

  Args:
    sides: token ids.
    vocab_size: v.
    start_id: the decoder's first input.
  """
  counts = np.zeros(vocab_size, np.int64)
  for tokens in sides:
    counts += np.bincount(tokens, minlength=vocab_size)
  counts[start_id] = max(counts[start_id], 1)
  return counts
