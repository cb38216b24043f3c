"""The ways to translate: what each computes, on what it depends, its cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from scipy import stats

from common.errors import UserError
from thor.data import shift_right
from thor.dispatch import Dispatch, draw_paths, prepare, sentence_keys
from thor.model import Transformer, init_params
from thor.paths import export_dense, mean_weights
from thor.routing import Routes, Routing, hash_table
from thor.settings import PATTERNS, Settings

PAD, EOS, V, E = 1, 2, 20, 3
SETTINGS = Settings(
  V, width=16, hidden=32, heads=2, encoder_layers=2, decoder_layers=1,
  experts=E, pattern=PATTERNS["all"],
)  # fmt: skip
LAYERS = 3
# float32 through three layers, values of order 1.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def params_of(settings, seed=0):
  """Random parameters, without compiling their first values."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape) * 0.3
    values += path[-1].key == "scale"
    return jnp.asarray(values, leaf.dtype)

  init = functools.partial(init_params, settings)
  shapes = jax.eval_shape(init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def sentences(lengths, width, seed):
  rng = np.random.default_rng(seed)
  rows = np.full((len(lengths), width), PAD, np.int32)
  for row, length in zip(rows, lengths):
    row[:length] = rng.integers(4, V, length)
    row[length - 1] = EOS
  return jnp.asarray(rows)


SOURCE = sentences([7, 4, 5], 7, seed=0)
INPUT = shift_right(sentences([3, 6, 4], 6, seed=1))
REAL = np.asarray(INPUT != PAD)


@pytest.fixture(scope="module")
def params():
  return params_of(SETTINGS)


@jax.jit
def translate(prepared, source, target):
  """Log-probabilities of every next token."""
  routes = prepared.routes(source, target)
  model = Transformer(prepared.settings)

  def run(params):
    logits, _ = model.apply({"params": params}, source, target, routes)
    return jax.nn.log_softmax(logits)

  if not prepared.members:
    return run(prepared.params)
  each = jax.vmap(run, in_axes=(prepared.member_axes,))(prepared.params)
  return jax.nn.logsumexp(each, axis=0) - jnp.log(prepared.members)


@functools.partial(jax.jit, static_argnums=0)
def log_probs(settings, params, source, target, routes):
  model = Transformer(settings)
  logits, _ = model.apply({"params": params}, source, target, routes)
  return jax.nn.log_softmax(logits)


def along(params, path, source=SOURCE, target=INPUT):
  """By the plain model of a path."""
  dense, plain = export_dense(params, SETTINGS, path)
  return log_probs(plain, dense, source, target, Routes())


def prepared(params, text, **options):
  dispatch = Dispatch.parse(text, Routing(experts=E))
  return prepare(params, SETTINGS, dispatch, **options)


# -- names ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ("kind", "text", "expected"),
  [
    ("thor", "", "dispatch_sentence"),
    ("thor", "dispatch_token", "dispatch_token"),
    ("thor", "fixed:2", "fixed:2"),
    ("thor", "ensemble:5", "ensemble:5"),
    ("random_switch", "", "dispatch_token"),
    ("random_switch", "average_output", "average_output"),
    ("switch", "", "gate"),
    ("hash", "", "hash"),
    ("dense", "", "dense"),
  ],
)
def test_reading_a_name(kind, text, expected):
  experts = 1 if kind == "dense" else E
  routing = Routing(kind, experts=experts)
  found = Dispatch.parse(text, routing)
  assert str(found) == expected
  assert Dispatch.parse(str(found), routing) == found


@pytest.mark.parametrize(
  ("routing", "text", "message"),
  [
    ({}, "dispatch_sentense", "did you mean.*dispatch_sentence"),
    ({}, "gate", "dispatch='gate' does not go with routing.kind='thor'"),
    ({"kind": "switch"}, "fixed:0", "does not go with.*'switch'"),
    ({"kind": "hash"}, "dispatch_token", "does not go with.*'hash'"),
    ({"kind": "random_switch", "gate": True}, "fixed:0", "does not go with"),
    ({}, "fixed", "write fixed:2"),
    ({}, "fixed:", "write fixed:2"),
    ({}, "fixed:-1", "write fixed:2"),
    ({}, "ensemble:two", "write ensemble:2"),
    ({}, "fixed:\N{SUPERSCRIPT TWO}", "write fixed:2"),
    ({}, "dispatch_token:2", "write dispatch_token"),
    ({}, "fixed:3", "numbered from 0 to 2"),
    ({}, "ensemble:0", "at least one member"),
  ],
  ids=str,
)
def test_a_name_that_makes_no_sense(routing, text, message):
  with pytest.raises(UserError, match=message) as error:
    Dispatch.parse(text, Routing(**{"experts": E} | routing))
  assert "\n" not in str(error.value)
  assert repr(text) in str(error.value)


# -- what a draw depends on ----------------------------------------------------


def test_a_sentences_key_is_what_it_says():
  keys = np.asarray(sentence_keys(SOURCE, PAD))
  assert keys.dtype == np.uint32
  longer = jnp.pad(SOURCE, ((0, 0), (0, 5)), constant_values=PAD)
  np.testing.assert_array_equal(sentence_keys(longer, PAD), keys)
  np.testing.assert_array_equal(sentence_keys(SOURCE[::-1], PAD), keys[::-1])
  swapped = SOURCE.at[0, :2].set(SOURCE[0, 1::-1])
  assert sentence_keys(swapped, PAD)[0] != keys[0]


def test_sentences_that_differ_have_different_keys():
  """All of up to 3 words of 20: 2 ** 32 keys for 8,000 sentences."""
  words = np.stack(np.meshgrid(*[np.arange(20)] * 3), -1).reshape(-1, 3)
  words = words[np.all((words != PAD) | (np.cumsum(words != PAD, 1) == 3), 1)]
  keys = np.asarray(sentence_keys(jnp.asarray(words), PAD))
  assert len(np.unique(keys)) >= len(keys) - 1
  bits = (keys[:, None] >> np.arange(32, dtype=np.uint32)) & 1
  assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / len(keys) ** 0.5


@jax.jit
def ids_of(prepared, source, target):
  keys = sentence_keys(source, PAD)
  return (
    prepared.encoder_ids(source),
    prepared.decoder_ids(keys, target, jnp.int32(0)),
  )


def many_sources(count=3000, seed=5):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(2, V, (count, 7)), jnp.int32)


def uniform(values, experts=E):
  counts = np.bincount(np.ravel(values), minlength=experts)
  return stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("name", ["dispatch_sentence", "dispatch_token"])
def test_the_draws_are_uniform(name, params):
  source = many_sources()
  made = prepared(params, name)
  encoder, decoder = map(np.asarray, ids_of(made, source, source[:, :6]))
  shapes = {
    "dispatch_sentence": ((2, 3000), (1, 3000)),
    "dispatch_token": ((2, 3000, 7), (1, 3000, 6)),
  }
  assert (encoder.shape, decoder.shape) == shapes[name]
  if name == "dispatch_sentence":
    rows = [*encoder, *decoder]
  else:
    rows = [*encoder[..., 0], *encoder[..., 1], decoder[0, :, 0]]
  for i, row in enumerate(rows):
    assert uniform(row)
    for other in rows[:i]:
      assert uniform(E * row + other, E * E)
  again = prepared(params, name, seed=1)
  other, _ = map(np.asarray, ids_of(again, source, source[:, :6]))
  assert uniform(E * encoder + other, E * E)
  same = prepared(params, name, seed=jnp.int32(0))
  np.testing.assert_array_equal(ids_of(same, source, source[:, :6])[0], encoder)


@pytest.mark.parametrize("name", ["dispatch_sentence", "dispatch_token"])
def test_a_step_of_decoding_draws_what_the_whole_does(name, params):
  made = prepared(params, name)
  _, whole = ids_of(made, SOURCE, INPUT)

  @jax.jit
  def at(made, tokens, t):
    return made.decoder_ids(sentence_keys(SOURCE, PAD), tokens, t)

  for t in (0, 1, 5):
    step = at(made, INPUT[:, t : t + 1], jnp.int32(t))
    expected = whole if whole.ndim == 2 else whole[..., t : t + 1]
    np.testing.assert_array_equal(step, expected)


@pytest.mark.parametrize("name", ["dispatch_sentence", "dispatch_token"])
def test_a_sentence_is_translated_alone_as_in_a_batch(name, params):
  """Neither the others, nor the padding, nor the order play a part."""
  made = prepared(params, name)
  batch = translate(made, SOURCE, INPUT)
  for row in range(3):
    source, target = (
      side[row][side[row] != PAD][None] for side in (SOURCE, INPUT)
    )
    # Two lengths for all, so that little is compiled.
    source, target = (
      jnp.pad(side, ((0, 0), (0, 9 - side.shape[1])), constant_values=PAD)
      for side in (source, target)
    )
    alone = translate(made, source, target)
    length = REAL[row].sum()
    np.testing.assert_allclose(alone[0, :length], batch[row, :length], **CLOSE)


def test_dispatch_is_of_the_drawn_experts(params):
  """Each sentence by the plain model of its path."""
  made = prepared(params, "dispatch_sentence")
  encoder, decoder = ids_of(made, SOURCE, INPUT)
  paths = np.concatenate([encoder, decoder]).T
  found = translate(made, SOURCE, INPUT)
  for row, path in enumerate(paths):
    expected = along(params, path)[row]
    np.testing.assert_allclose(
      found[row][REAL[row]], expected[REAL[row]], **CLOSE
    )
  routes = made.routes(SOURCE, INPUT)
  assert routes.how == "grouped"
  np.testing.assert_array_equal(routes.encoder, encoder)
  np.testing.assert_array_equal(routes.decoder, decoder)


@pytest.mark.parametrize("name", ["dispatch_token", "dispatch_batch"])
def test_seeds_matter(name, params):
  first, again, other = (
    np.asarray(translate(prepared(params, name, seed=seed), SOURCE, INPUT))
    for seed in (0, 0, 4)
  )
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.01


# -- what each computes --------------------------------------------------------


@pytest.mark.parametrize("expert", range(E))
def test_fixed_is_a_plain_transformer(expert, params):
  made = prepared(params, f"fixed:{expert}")
  assert made.settings.experts == 1
  found = translate(made, SOURCE, INPUT)
  np.testing.assert_allclose(found, along(params, (expert,) * 3), **CLOSE)


def test_dispatch_batch_is_one_path(params):
  made = prepared(params, "dispatch_batch", seed=4)
  path = draw_paths(jax.random.key(4), 1, LAYERS, E)[0]
  assert len(set(path.tolist())) > 1
  found = translate(made, SOURCE, INPUT)
  np.testing.assert_allclose(found, along(params, path), **CLOSE)


def test_paths_are_uniform():
  paths = np.asarray(draw_paths(jax.random.key(0), 3000, LAYERS, E))
  assert uniform(paths @ [9, 3, 1], E**3)


def test_an_ensemble_is_the_mean_of_probabilities(params):
  made = prepared(params, "ensemble:4", seed=2)
  paths = draw_paths(jax.random.key(2), 4, LAYERS, E)
  assert made.members == 4
  assert len(np.unique(paths, axis=0)) > 2
  found = translate(made, SOURCE, INPUT)
  each = [np.exp(along(params, path)) for path in paths]
  np.testing.assert_allclose(np.exp(found), np.mean(each, axis=0), **CLOSE)
  # What is shared there is once.
  assert made.params["embedding"].shape == (V, 16)
  axes = made.member_axes
  assert axes["embedding"] is None
  own = axes["encoder"]["layers"]["layer_0"]
  assert own["experts"]["up"]["kernel"] == 0
  assert own["attention"]["query"]["kernel"] is None


def test_average_weight_is_a_plain_transformer(params):
  made = prepared(params, "average_weight")
  mean, one = mean_weights(params, SETTINGS)
  dense, plain = export_dense(mean, one, (0,) * LAYERS)
  expected = log_probs(plain, dense, SOURCE, INPUT, Routes())
  found = translate(made, SOURCE, INPUT)
  np.testing.assert_allclose(found, expected, **CLOSE)


def test_average_output_is_the_mean_in_every_layer(params):
  """A feed-forward layer of all experts' hidden units side by side."""

  def widen(layer):
    layer = dict(layer)
    stack = layer.pop("experts")
    up, down = stack["up"], stack["down"]
    blocks = len(up["bias"])
    wide = {
      "up": {
        "kernel": np.concatenate(np.moveaxis(up["kernel"], 1, 0), -1),
        "bias": np.reshape(up["bias"], (blocks, -1)),
      },
      "down": {
        "kernel": np.reshape(down["kernel"], (blocks, -1, 16)) / E,
        "bias": np.mean(down["bias"], axis=1),
      },
    }
    return layer | {"feed_forward": wide}

  wide = dict(params)
  for side in ("encoder", "decoder"):
    layers = jax.tree.map(np.asarray, params[side]["layers"])
    wide[side] = {"layers": {"layer_0": widen(layers["layer_0"])}}
  plain = Settings(
    V, width=16, hidden=32 * E, heads=2, encoder_layers=2, decoder_layers=1,
    pattern=PATTERNS["none"],
  )  # fmt: skip
  expected = log_probs(plain, wide, SOURCE, INPUT, Routes())
  made = prepared(params, "average_output")
  found = translate(made, SOURCE, INPUT)
  np.testing.assert_allclose(found, expected, **CLOSE)
  other = translate(prepared(params, "average_weight"), SOURCE, INPUT)
  assert np.abs(found - other).max() > 0.01


def test_a_hash_translates_by_its_table(params):
  table = jnp.asarray(hash_table(np.ones(V, int), E, kind="random", seed=0))
  dispatch = Dispatch.parse("", Routing("hash", experts=E))
  made = prepare(params, SETTINGS, dispatch, table=table)
  encoder, decoder = ids_of(made, SOURCE, INPUT)
  np.testing.assert_array_equal(encoder, np.stack([table[SOURCE]] * 2))
  np.testing.assert_array_equal(decoder, table[INPUT][None])
  with pytest.raises(UserError, match="'hash' needs a table"):
    prepare(params, SETTINGS, dispatch)


def gated(*args, **options):
  """A routing with a gate, and a model for it."""
  routing = Routing(*args, experts=E, **options)
  settings = Settings(
    V, width=16, hidden=32, heads=2, encoder_layers=2, decoder_layers=1,
    pattern=PATTERNS["all"], **routing.model_settings(),
  )  # fmt: skip
  return routing, settings


def test_a_gate_translates():
  """A sentence alone as in a batch, unless room is limited."""
  routing, settings = gated("switch")
  dispatch = Dispatch.parse("", routing)
  params = params_of(settings)
  made = prepare(params, settings, dispatch)
  routes = made.routes(SOURCE, INPUT)
  assert routes.encoder is routes.decoder is None
  assert routes.how == "grouped"
  batch = translate(made, SOURCE, INPUT)
  order = jnp.int32([2, 0, 1])
  again = translate(made, SOURCE[order], INPUT[order])
  np.testing.assert_allclose(again[1], batch[0], **CLOSE)
  _, settings = gated("switch", eval_capacity=2.0)
  limited = prepare(params, settings, dispatch)
  assert limited.routes(SOURCE, INPUT).how == "capacity"


def test_a_gate_may_weigh_what_is_drawn():
  routing, settings = gated("random_switch", gate=True)
  params = params_of(settings)
  dispatch = Dispatch.parse("dispatch_sentence", routing)
  found = translate(prepare(params, settings, dispatch), SOURCE, INPUT)
  assert np.all(np.isfinite(found))


@pytest.mark.parametrize("text", ["dispatch_sentence", "ensemble:2"])
def test_a_model_of_one_expert_may_be_used_the_same(text):
  """It has no expert layers: all ways are the plain one."""
  settings = Settings(
    V, width=16, hidden=32, heads=2, encoder_layers=2, decoder_layers=1,
    pattern=PATTERNS["none"],
  )  # fmt: skip
  params = params_of(settings)
  dispatch = Dispatch.parse(text, Routing(experts=1))
  found = translate(prepare(params, settings, dispatch), SOURCE, INPUT)
  expected = log_probs(settings, params, SOURCE, INPUT, Routes())
  np.testing.assert_allclose(found, expected, **CLOSE)


# -- what each costs -----------------------------------------------------------


def products(jaxpr):
  """Multiplications in a program's matrix products. A loop over a number of
  rounds that follows from data counts as one round of it.
  """
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      left = eqn.invars[0].aval.shape
      inner = np.prod([left[i] for i in contracted], dtype=int)
      total += inner * np.prod(eqn.outvars[0].aval.shape, dtype=int)
    rounds = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    inside = core.jaxprs_in_params(eqn.params)
    total += rounds * sum(products(inner) for inner in inside)
  return total


@pytest.mark.parametrize(
  ("text", "grows"),
  [
    ("dispatch_sentence", False),
    ("dispatch_token", False),
    ("dispatch_batch", False),
    ("fixed:1", False),
    ("average_weight", False),
    ("ensemble:2", False),
    ("average_output", True),
  ],
)
def test_only_average_output_costs_more_with_more_experts(text, grows):
  """Where tokens are grouped each expert's come in blocks: as many blocks as
  its tokens need, and they have 1 / (4 k) of all tokens.
  """

  def cost(experts):
    settings = Settings(
      V, width=16, hidden=32, heads=2, encoder_layers=2, decoder_layers=1,
      pattern=PATTERNS["all"], experts=experts,
    )  # fmt: skip
    params = jax.eval_shape(
      functools.partial(init_params, settings), jax.random.key(0)
    )
    tokens = jax.ShapeDtypeStruct((128, 8), jnp.int32)
    dispatch = Dispatch.parse(text, Routing(experts=experts))
    made = jax.eval_shape(
      lambda params: prepare(params, settings, dispatch), params
    )
    return products(translate.trace(made, tokens, tokens).jaxpr.jaxpr)

  few, many = cost(2), cost(16)
  if grows:
    one = 3 * 128 * 8 * 2 * 16 * 32  # of every further expert
    assert many == few + 14 * one
  else:
    assert many == few
