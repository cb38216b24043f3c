"""The Transformer: against NumPy, against plain ones, and its laws."""

import dataclasses
import functools
import itertools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from thor import layers
from thor.data import shift_right
from thor.losses import cross_entropy_loss, thor_loss
from thor.model import Transformer, init_params, num_params
from thor.paths import export_dense
from thor.routing import Routes, draw_pair
from thor.settings import PATTERNS, Settings

PAD, EOS, V = 1, 2, 20
# Experts in all of 2 + 1 layers: 27 paths, and little to compile.
SETTINGS = Settings(
  V, width=16, hidden=32, heads=2, encoder_layers=2, decoder_layers=1,
  experts=3, pattern=PATTERNS["all"],
)  # fmt: skip
# Experts in layers 0 and 2 of the encoder and 0 of the decoder.
SECOND = dataclasses.replace(
  SETTINGS, encoder_layers=4, decoder_layers=2, pattern=PATTERNS["every_second"]
)
PATHS = list(itertools.product(range(3), repeat=3))
# float32 through a few layers, values of order 1.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def params_of(settings, seed=0):
  """Random parameters, the norms' too, without compiling their first values."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape) * 0.3
    values += path[-1].key == "scale"
    return jnp.asarray(values, leaf.dtype)

  init = functools.partial(init_params, settings)
  shapes = jax.eval_shape(init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def sentences(lengths, width, seed):
  """Tokens and EOS, then padding; a length of 0 is an empty row."""
  rng = np.random.default_rng(seed)
  rows = np.full((len(lengths), width), PAD, np.int32)
  for row, length in zip(rows, lengths):
    row[:length] = rng.integers(4, V, length)
    row[max(length - 1, 0) : length] = EOS
  return jnp.asarray(rows)


SOURCE = sentences([7, 4, 5, 0], 7, seed=0)
TARGET = sentences([3, 6, 4, 0], 6, seed=1)
INPUT = shift_right(TARGET)


def routes_of(path, encoder=2):
  path = jnp.int32(path)
  return Routes(path[..., :encoder], path[..., encoder:])


@functools.partial(jax.jit, static_argnums=0)
def run(settings, params, source, target, routes, key):
  model = Transformer(settings)
  return model.apply({"params": params}, source, target, routes, key=key)


def logits(settings, params, path=None, key=None, *, source=SOURCE,
           target=INPUT):  # fmt: skip
  routes = Routes() if path is None else routes_of(path)
  return run(settings, params, source, target, routes, key)[0]


@pytest.fixture(scope="module")
def params():
  return params_of(SETTINGS)


@pytest.fixture(scope="module")
def outputs(params):
  """The logits of every path."""
  made = {PATHS[0]: logits(SETTINGS, params, PATHS[0])}
  programs = run._cache_size()
  made |= {path: logits(SETTINGS, params, path) for path in PATHS[1:]}
  assert run._cache_size() == programs
  return made


# -- its equations -------------------------------------------------------------


def numpy_model(settings, params, source, target, path):
  """One sentence without padding, in float64: [t v]."""
  params = jax.tree.map(np.float64, params)
  chosen = iter(path)
  activation = {
    "relu": lambda x: np.maximum(x, 0),
    "swish": lambda x: x / (1 + np.exp(-x)),
  }[settings.activation]

  def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]

  def attend(p, x, memory=None, causal=False):
    p = p["attention" if memory is None else "cross_attention"]
    memory = x if memory is None else memory
    q, k, v = (
      np.einsum("td,dhe->hte", y, p[name]["kernel"]) + p[name]["bias"][:, None]
      for name, y in (("query", x), ("key", memory), ("value", memory))
    )
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    if causal:
      scores[:, np.triu(np.ones(scores.shape[1:]), 1) > 0] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hte,hed->td", weights @ v, p["out"]["kernel"])
    return out + p["out"]["bias"]

  def feed_forward(p, x):
    if "experts" in p:
      e = next(chosen)
      p = jax.tree.map(lambda leaf: leaf[e], p["experts"])
    else:
      p = p["feed_forward"]
    hidden = activation(x @ p["up"]["kernel"] + p["up"]["bias"])
    return hidden @ p["down"]["kernel"] + p["down"]["bias"]

  def sublayer(p, name, x, g):
    own = p[f"{name}_norm"]
    if settings.pre_norm:
      return x + g(p, norm(own, x))
    return norm(own, x + g(p, x))

  def stack(side, tokens, memory=None):
    first, last = (2, 7) if settings.positions == "fairseq" else (0, 8)
    x = params["embedding"][tokens]
    x = x * 4 if settings.scale_embedding else x
    for t, i in itertools.product(range(len(x)), range(8)):
      angle = (first + t) * 10_000 ** (-i / last)
      x[t, i] += np.sin(angle)
      x[t, 8 + i] += np.cos(angle)
    depth = settings.decoder_layers if side == "decoder" else (
      settings.encoder_layers
    )  # fmt: skip
    stacked = params[side]["layers"]
    for i in range(depth):
      block, place = divmod(i, len(stacked))
      p = jax.tree.map(operator.itemgetter(block), stacked[f"layer_{place}"])
      x = sublayer(
        p, "attention", x, functools.partial(attend, causal=memory is not None)
      )
      if memory is not None:
        x = sublayer(
          p, "cross_attention", x, functools.partial(attend, memory=memory)
        )
      x = sublayer(p, "feed_forward", x, feed_forward)
    return norm(params[side]["norm"], x) if settings.pre_norm else x

  out = stack("decoder", target, stack("encoder", source))
  return out @ params["embedding"].T + params.get("logits_bias", 0)


@pytest.mark.parametrize(
  ("options", "path"),
  [
    ({"positions": "fairseq"}, (2, 0, 1)),
    (
      {"pre_norm": True, "activation": "swish", "positions": "marian",
       "scale_embedding": False, "logits_bias": True},
      (0, 2, 1),
    ),
    # Depths that the pattern does not divide: layers of one block.
    ({"encoder_layers": 3, "decoder_layers": 1}, (1, 2, 0)),
  ],
  ids=["post_norm", "pre_norm", "odd depths"],
)  # fmt: skip
def test_the_model_is_its_equations(options, path):
  """In a padded batch, against each sentence alone."""
  settings = dataclasses.replace(SECOND, **options)
  params = params_of(settings)
  found = logits(settings, params, path)
  for row in range(3):
    source, target = (
      np.asarray(side[row][side[row] != PAD]) for side in (SOURCE, INPUT)
    )
    expected = numpy_model(settings, params, source, target, path)
    np.testing.assert_allclose(found[row, : len(target)], expected, **CLOSE)


@pytest.mark.parametrize(
  ("kind", "expected"),
  [
    ("fairseq", (0.909297, 0.000200, -0.416147, 1.0)),
    ("marian", (0, 0, 1, 1)),
  ],
)
def test_the_first_position(kind, expected):
  table = layers.sinusoids(3, 4, kind=kind)
  np.testing.assert_allclose(table[0], expected, atol=1e-6)


def test_the_first_values_are_fairseqs():
  params = jax.jit(functools.partial(init_params, SETTINGS))(jax.random.key(0))
  table = params["embedding"]
  assert not np.any(table[PAD])
  # 304 normal numbers: 5 standard errors.
  assert float(jnp.std(table[2:])) == pytest.approx(0.25, abs=0.055)
  own = params["decoder"]["layers"]["layer_0"]
  bounds = {
    ("experts", "up", "kernel"): 16**-0.5,
    ("experts", "up", "bias"): 16**-0.5,
    ("experts", "down", "kernel"): 32**-0.5,
    ("experts", "down", "bias"): 32**-0.5,
    ("attention", "query", "kernel"): (6 / 32 / 2) ** 0.5,
    ("cross_attention", "key", "kernel"): (6 / 32 / 2) ** 0.5,
    ("attention", "out", "kernel"): (6 / 32) ** 0.5,
  }
  for path, bound in bounds.items():
    values = functools.reduce(lambda tree, name: tree[name], path, own)
    assert 0.85 * bound < float(jnp.abs(values).max()) <= bound, path
  assert not np.any(own["attention"]["out"]["bias"])
  # Layers, and experts of a layer, begin apart.
  kernels = params["encoder"]["layers"]["layer_0"]["experts"]["up"]["kernel"]
  flat = np.asarray(kernels).reshape(2 * 3, -1)
  assert np.abs(np.corrcoef(flat) - np.eye(6)).max() < 0.25


# -- paths ---------------------------------------------------------------------


def test_every_path_is_a_plain_transformer(params, outputs):
  for path, expected in outputs.items():
    dense, plain = export_dense(params, SETTINGS, path)
    assert plain.expert_layers == (0, 0)
    np.testing.assert_allclose(logits(plain, dense), expected, **CLOSE)
  assert sum(p.size for p in jax.tree.leaves(dense)) == num_params(plain)
  first = outputs[PATHS[0]]
  assert all(np.any(first != outputs[path]) for path in PATHS[1:])


def test_a_path_visits_expert_layers_in_order():
  """Where only every second layer has experts, too."""
  params = params_of(SECOND)
  dense, plain = export_dense(params, SECOND, (2, 0, 1))
  sides = ((SOURCE[0], INPUT[0, :3]), (SOURCE[2, :5], INPUT[2, :4]))
  for source, target in jax.tree.map(np.asarray, sides):
    np.testing.assert_allclose(
      numpy_model(plain, dense, source, target, ()),
      numpy_model(SECOND, params, source, target, (2, 0, 1)),
      rtol=1e-12,
    )


def test_the_mean_over_all_paths_is_the_expectation(outputs):
  """Draws of a training step, against all 27 paths alike."""
  losses = [
    np.asarray(cross_entropy_loss(made, TARGET, pad_id=PAD)[0])
    for made in outputs.values()
  ]
  values = np.array(losses)
  keys = jax.random.split(jax.random.key(3), 2000)
  draw = functools.partial(draw_pair, layers=3, experts=3, passes=2,
                           pair="independent")  # fmt: skip
  drawn = np.asarray(jax.jit(jax.vmap(draw))(keys)) @ [9, 3, 1]
  assert values.std() > 0.01
  error = 5 * values.std() / np.sqrt(len(keys))
  for i in range(2):
    assert abs(values[drawn[:, i]].mean() - values.mean()) < error


def test_copies_of_one_expert_are_a_plain_transformer(params):
  def copy(path, leaf):
    if not any(part.key == "experts" for part in path):
      return leaf
    return jnp.broadcast_to(leaf[:, 1:2], leaf.shape)

  same = jax.tree_util.tree_map_with_path(copy, params)
  dense, plain = export_dense(params, SETTINGS, (1, 1, 1))
  expected = logits(plain, dense)
  first, second = (logits(SETTINGS, same, p) for p in ((0, 2, 1), (2, 1, 0)))
  chex.assert_trees_all_close(first, expected, **CLOSE)
  # Without dropout two passes are one: no divergence, twice the loss.
  loss, parts = thor_loss(first, second, TARGET, pad_id=PAD, alpha=5.0)
  single, _ = cross_entropy_loss(expected, TARGET, pad_id=PAD)
  assert float(parts["skl"].total) == 0
  assert float(loss) == pytest.approx(2 * float(single), rel=1e-5)


# -- gradients -----------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def gradient(settings, params, routes):
  """Of two passes' loss, one call on a doubled batch; and the logits."""

  def loss(params):
    def one(routes):
      return Transformer(settings).apply(
        {"params": params}, SOURCE, INPUT, routes
      )[0]

    both = jax.vmap(one)(routes)
    return thor_loss(*both, TARGET, pad_id=PAD, alpha=5.0)[0], both

  return jax.grad(loss, has_aux=True)(params)


PAIR = [(0, 1, 2), (0, 2, 2)]


@pytest.fixture(scope="module")
def gradients(params):
  return gradient(SETTINGS, params, routes_of(PAIR))


def test_experts_that_are_not_selected_have_no_gradient(gradients):
  """Exactly 0, and what is selected in either pass has one."""
  grads, _ = gradients
  selected = {"encoder": [{0}, {1, 2}], "decoder": [{2}]}
  for side, of_blocks in selected.items():
    stack = grads[side]["layers"]["layer_0"]["experts"]
    for leaf in jax.tree.leaves(stack):
      for block, e in itertools.product(range(len(of_blocks)), range(3)):
        assert bool(np.any(leaf[block, e])) == (e in of_blocks[block])


def test_two_calls_are_one_on_a_doubled_batch(gradients, outputs):
  for path, found in zip(PAIR, gradients[1]):
    np.testing.assert_allclose(found, outputs[path], **CLOSE)


def test_recomputing_a_block_changes_nothing(params, gradients):
  settings = dataclasses.replace(SETTINGS, remat=True)
  found = gradient(settings, params, routes_of(PAIR))
  chex.assert_trees_all_close(found, gradients, rtol=1e-4, atol=1e-4)


def test_an_empty_row_is_no_nan(gradients):
  """The last row's source and target are nothing but padding."""
  chex.assert_tree_all_finite(gradients)
  settings = dataclasses.replace(SETTINGS, pre_norm=True)
  found = gradient(settings, params_of(settings), routes_of(PAIR))
  chex.assert_tree_all_finite(found)


# -- what sees what ------------------------------------------------------------


def test_a_target_token_changes_what_follows_only(params):
  before = np.asarray(logits(SETTINGS, params, (0, 1, 2)))
  for k in range(INPUT.shape[1]):
    other = INPUT.at[:, k].set(jnp.where(INPUT[:, k] == 5, 6, 5))
    after = np.asarray(logits(SETTINGS, params, (0, 1, 2), target=other))
    changed = (before != after).any(-1)
    assert not changed[:, :k].any()
    assert changed[:, k].all()


def test_a_source_token_is_seen_by_all_and_padding_by_none(params):
  before = np.asarray(logits(SETTINGS, params, (0, 1, 2)))
  for k in range(SOURCE.shape[1]):
    other = SOURCE.at[:, k].set(3)
    source = jnp.where(SOURCE == PAD, SOURCE, other)
    after = np.asarray(logits(SETTINGS, params, (0, 1, 2), source=source))
    changed = (before != after).any(-1)
    real = np.asarray(SOURCE[:, k] != PAD)
    assert changed[real].all()
    assert not changed[~real].any()


def test_longer_padding_changes_nothing(params):
  pad = functools.partial(jnp.pad, constant_values=PAD)
  found = logits(
    SETTINGS, params, (2, 0, 1),
    source=pad(SOURCE, ((0, 0), (0, 3))), target=pad(INPUT, ((0, 0), (0, 2))),
  )  # fmt: skip
  expected = logits(SETTINGS, params, (2, 0, 1))
  real = np.asarray(INPUT != PAD)
  np.testing.assert_allclose(found[:, :6][real], expected[real], **CLOSE)
  chex.assert_tree_all_finite(found)


# -- precision -----------------------------------------------------------------


def test_bfloat16_computes_low_and_keeps_high(params):
  settings = dataclasses.replace(SETTINGS, dtype=jnp.bfloat16)
  low = logits(settings, params, (0, 1, 2))
  high = logits(SETTINGS, params, (0, 1, 2))
  assert low.dtype == jnp.float32
  difference = np.abs(np.asarray(low - high))
  scale = float(jnp.std(high))
  # 8 bits of mantissa through 3 layers; not equal, or nothing was low.
  assert 1e-3 * scale < difference.max() < 0.2 * scale
  # Logits are sums in float32, not rounded ones.
  rounded = low.astype(jnp.bfloat16).astype(jnp.float32)
  assert float(jnp.mean(low == rounded)) < 0.1
  kept = jax.eval_shape(
    functools.partial(init_params, settings), jax.random.key(0)
  )
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(kept))


# -- reports and errors --------------------------------------------------------


def test_what_the_expert_layers_report(params):
  _, aux = run(SETTINGS, params, SOURCE, INPUT, routes_of((2, 0, 1)), None)
  np.testing.assert_array_equal(aux["load"], np.eye(3)[[2, 0, 1]])
  np.testing.assert_array_equal(aux["kept"], np.ones(3))
  dense, plain = export_dense(params, SETTINGS, (0, 0, 0))
  assert run(plain, dense, SOURCE, INPUT, Routes(), None)[1] == {}


def test_experts_without_routes_are_an_error(params):
  with pytest.raises(UserError, match="a model of 3 experts needs routes"):
    run(SETTINGS, params, SOURCE, INPUT, Routes(), None)
