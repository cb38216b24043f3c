"""What draws are made of: their laws, and the tables of hashes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from common.errors import UserError
from common.rngs import RngStreams
from thor.routing import (
  NO_ROUTES,
  Routing,
  draw_pair,
  expert_counts,
  hash_table,
  train_routes,
)

LAYERS = (3, 3)
STEPS = 4000
SOURCE, TARGET = jnp.ones((12, 7), jnp.int32), jnp.ones((12, 5), jnp.int32)
# The chance that a right draw fails is this, and it is always the same draw.
UNLIKELY = 1e-3


def uniform(values, experts):
  """Whether a chi-square test finds all experts equally often."""
  counts = np.bincount(np.ravel(values), minlength=experts)
  return stats.chisquare(counts).pvalue > UNLIKELY


def independent(first, second, experts):
  """Whether a chi-square test finds all pairs equally often."""
  return uniform(np.ravel(first) * experts + np.ravel(second), experts**2)


@functools.cache
def drawn(pair, experts, passes=2):
  """int [steps, passes, layers], of consecutive steps."""
  streams = RngStreams(0, ("experts",))

  def of_step(step):
    key = streams(step)["experts"]
    return draw_pair(key, sum(LAYERS), experts, passes, pair=pair)

  return np.asarray(jax.jit(jax.vmap(of_step))(jnp.arange(STEPS)))


# -- one expert for the whole batch --------------------------------------------


@pytest.mark.parametrize("experts", [2, 3, 4])
@pytest.mark.parametrize("pair", ["independent", "distinct"])
def test_every_layer_and_pass_is_uniform(pair, experts):
  ids = drawn(pair, experts)
  for i, layer in itertools.product(range(2), range(sum(LAYERS))):
    assert uniform(ids[:, i, layer], experts)


@pytest.mark.parametrize("experts", [2, 4])
def test_independent_passes_agree_as_often_as_chance(experts):
  first, second = drawn("independent", experts).swapaxes(0, 1)
  for layer in range(sum(LAYERS)):
    assert independent(first[:, layer], second[:, layer], experts)
  equal = np.sum(first == second)
  assert stats.binomtest(equal, first.size, 1 / experts).pvalue > UNLIKELY


@pytest.mark.parametrize("experts", [2, 3, 4])
def test_distinct_passes_never_agree(experts):
  first, second = drawn("distinct", experts).swapaxes(0, 1)
  assert not np.any(first == second)
  if experts > 2:
    assert uniform((second - first) % experts - 1, experts - 1)


@pytest.mark.parametrize("pair", ["independent", "distinct"])
def test_layers_and_steps_are_independent(pair):
  ids = drawn(pair, 3)
  for i in range(2):
    for a, b in itertools.combinations(range(sum(LAYERS)), 2):
      assert independent(ids[:, i, a], ids[:, i, b], 3)
    assert independent(ids[:-1, i], ids[1:, i], 3)


def test_draws_follow_from_seed_and_step():
  routing = Routing(experts=3)
  draw = functools.partial(
    train_routes, routing, LAYERS, source=SOURCE, target=TARGET, passes=2
  )
  key = RngStreams(0, ("experts",))(7)["experts"]
  for i, routes in enumerate(jax.jit(draw)(key)):
    assert routes.how == "one"
    made = np.concatenate([routes.encoder, routes.decoder])
    np.testing.assert_array_equal(made, drawn("independent", 3)[7, i])
    assert routes.encoder.shape == routes.decoder.shape == (3,)
  # Another number of passes leaves the first ones alone.
  np.testing.assert_array_equal(
    drawn("distinct", 3, 3)[:50, :2], drawn("distinct", 3)[:50]
  )


# -- one expert for each sentence or token -------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def routes_of_keys(routing, keys):
  """The routes of two passes, for each key."""

  def of(key):
    return train_routes(
      routing, LAYERS, key, source=SOURCE, target=TARGET, passes=2
    )

  return jax.vmap(of)(keys)


KEYS = jax.random.split(jax.random.key(1), 100)


def test_balanced_tokens():
  """Every expert equally often in every row, over a length rounded up."""
  passes = routes_of_keys(Routing(experts=3, level="token"), KEYS)
  for routes, (side, length) in itertools.product(
    passes, (("encoder", 9), ("decoder", 6))
  ):
    assert routes.how == "balanced"
    ids = np.asarray(getattr(routes, side))
    assert ids.shape == (100, 3, 12, length)
    counts = (ids[..., None] == np.arange(3)).sum(-2)
    np.testing.assert_array_equal(counts, length // 3)
    for place in range(length):
      assert uniform(ids[..., place], 3)
  first, second = (np.asarray(routes.encoder) for routes in passes)
  assert independent(first[..., 0], second[..., 0], 3)
  assert independent(first[:, 0, :, 0], first[:, 1, :, 0], 3)
  assert independent(first[..., 0, 0], first[..., 1, 0], 3)
  both = np.asarray(passes[0].decoder)
  assert independent(first[..., 0], both[..., 0], 3)


def test_balanced_sentences():
  """Every expert equally often in every three rows."""
  passes = routes_of_keys(Routing(experts=3, level="sentence"), KEYS)
  for routes, side in itertools.product(passes, ("encoder", "decoder")):
    assert routes.how == "balanced"
    ids = np.asarray(getattr(routes, side))
    assert ids.shape == (100, 3, 12)
    groups = np.sort(ids.reshape(100, 3, 4, 3), axis=-1)
    np.testing.assert_array_equal(
      groups, np.broadcast_to(range(3), groups.shape)
    )
    for row in range(12):
      assert uniform(ids[..., row], 3)
  first, second = (np.asarray(routes.encoder) for routes in passes)
  assert independent(first[..., 0], second[..., 0], 3)
  assert independent(first[..., 0], first[..., 3], 3)


@pytest.mark.parametrize("level", ["token", "sentence"])
def test_distinct_passes_never_agree_by_token_or_sentence(level):
  routing = Routing(experts=4, level=level, pair="distinct")
  first, second = jax.jit(
    functools.partial(
      train_routes, routing, LAYERS, source=SOURCE, target=TARGET, passes=2
    )
  )(jax.random.key(0))
  for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
    assert (one != other).all()
    # Each is still as often as the others.
    flat = other.reshape(len(other), -1)
    counts = [np.bincount(row, minlength=4) for row in np.asarray(flat)]
    assert np.ptp(counts, axis=1).max() == 0


@pytest.mark.parametrize("change", [{"level": "token"}, {"pair": "distinct"}])
def test_what_a_kind_does_not_have_is_refused(change):
  with pytest.raises(UserError, match="are for kind 'thor', not for 'switch'"):
    Routing("switch", experts=2, **change)


def test_sentences_that_do_not_divide_are_refused():
  routing = Routing(experts=5, level="sentence")
  assert routing.row_multiple == 5
  assert Routing(experts=5).row_multiple == 1
  with pytest.raises(UserError, match=r"12 rows of a batch.*5 experts"):
    train_routes(routing, LAYERS, KEYS[0], source=SOURCE, target=TARGET,
                 passes=2)  # fmt: skip


def test_random_switch_draws_each_token_alone():
  routing = Routing("random_switch", experts=3)
  passes = routes_of_keys(routing, KEYS)
  first, second = (np.asarray(routes.encoder) for routes in passes)
  assert passes[0].how == "capacity"
  assert first.shape == (100, 3, 12, 7)
  assert passes[0].decoder.shape == (100, 3, 12, 5)
  assert uniform(first, 3)
  assert independent(first, second, 3)  # passes
  assert independent(first[:, 0], first[:, 1], 3)  # layers
  assert independent(first[:-1], first[1:], 3)  # steps
  assert independent(first[..., 0, :], first[..., 1, :], 3)  # rows
  assert independent(first[..., 0], first[..., 1], 3)  # tokens


def test_what_needs_no_draw():
  draw = functools.partial(
    train_routes, key=KEYS[0], source=SOURCE, target=TARGET, passes=2
  )
  dense = Routing("dense", experts=1)
  assert draw(dense, (0, 0)) == [NO_ROUTES] * 2
  for capacity, how in ((1.25, "capacity"), (0.0, "grouped")):
    for routes in draw(Routing("switch", capacity=capacity), LAYERS):
      assert routes.encoder is routes.decoder is None
      assert routes.how == how


# -- hashes --------------------------------------------------------------------


def zipf(words=200, seed=0):
  counts = 3000 // np.arange(1, words + 1)
  return np.random.default_rng(seed).permutation(counts)


def test_a_word_has_the_same_expert_everywhere():
  table = jnp.asarray(hash_table(zipf(20), 3, kind="random", seed=0))
  rng = np.random.default_rng(1)
  source, target = (
    jnp.asarray(rng.integers(0, 20, shape)) for shape in ((4, 7), (4, 5))
  )
  made = [
    train_routes(
      Routing("hash", experts=3, capacity=0.0), LAYERS, key,
      source=source, target=target, passes=2, table=table,
    )
    for key in KEYS[:2]
  ]  # fmt: skip
  for routes in itertools.chain(*made):
    assert routes.how == "grouped"
    for side, tokens in (("encoder", source), ("decoder", target)):
      ids = np.asarray(getattr(routes, side))
      expected = np.asarray(table)[np.asarray(tokens)]
      np.testing.assert_array_equal(ids, np.broadcast_to(expected, ids.shape))
      assert len(ids) == 3


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_balanced_loads_differ_by_a_words_count(experts):
  counts = zipf()
  table = hash_table(counts, experts, kind="balanced", seed=0)
  loads = np.bincount(table, weights=counts, minlength=experts)
  assert table.dtype == np.int32
  assert loads.max() - loads.min() <= counts.max()
  # Small words fill up what large ones leave.
  assert loads.max() - loads.min() <= 0.01 * counts.sum() / experts


def test_the_most_frequent_words_part():
  counts = np.array([1, 90, 5, 100, 80, 1])
  table = hash_table(counts, 3, kind="balanced", seed=0)
  assert len({table[1], table[3], table[4]}) == 3
  assert table[2] == table[4]


def test_words_that_never_occur_are_dealt_out():
  counts = np.zeros(90, int)
  table = hash_table(counts, 3, kind="balanced", seed=0)
  assert np.bincount(table).tolist() == [30] * 3


def test_random_tables_are_uniform():
  tables = [
    hash_table(zipf(), 4, kind="random", seed=seed) for seed in range(20)
  ]
  assert uniform(tables, 4)
  assert independent(tables[:-1], tables[1:], 4)


@pytest.mark.parametrize("kind", ["random", "balanced"])
def test_tables_follow_from_the_seed(kind):
  first, again, other = (
    hash_table(zipf(), 4, kind=kind, seed=seed) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert np.mean(first != other) > 0.5


def test_a_hash_without_a_table_is_an_error():
  with pytest.raises(UserError, match="'hash' needs a table"):
    train_routes(Routing("hash"), LAYERS, KEYS[0], source=SOURCE,
                 target=TARGET, passes=1)  # fmt: skip


def test_counting_words():
  sides = [np.array([4, 5, 4, 2]), np.array([7, 2])]
  counts = expert_counts(sides, 9, start_id=0)
  assert counts.tolist() == [1, 0, 2, 0, 2, 1, 0, 1, 0]
