"""Decoding token by token is teacher forcing, whichever experts run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thor import decode_step
from thor.data import shift_right
from thor.decode import Search, beam_search, score
from thor.dispatch import Dispatch, prepare
from thor.evaluation import next_log_probs
from thor.model import init_params
from thor.routing import Routing
from thor.settings import Settings

PAD, EOS, VOCAB, EXPERTS = 1, 2, 12, 3
SEARCH = Search(beam=3, n_best=3, max_ratio=0.0, max_extra=6)
# The same sums in another order, in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# What only training looks at, the same for all: kinds of routing that decode
# alike compile once.
TRAINING = {"capacity": 0.0, "cut_experts": False}

# Kind of routing, dispatch, what else of the routing.
MODES = [
  ("dense", "dense", {"experts": 1}),
  ("thor", "dispatch_sentence", {}),
  ("thor", "dispatch_token", {}),
  ("thor", "dispatch_batch", {}),
  ("thor", "fixed:1", {}),
  ("thor", "average_output", {}),
  ("thor", "average_weight", {}),
  ("thor", "ensemble:3", {}),
  ("random_switch", "dispatch_token", {}),
  ("random_switch", "dispatch_sentence", {"gate": True}),
  ("switch", "gate", {}),
  ("switch", "gate", {"gate_level": "sentence"}),
  # Room for every token, but by slots.
  ("switch", "gate", {"eval_capacity": 3.0}),
  ("hash", "hash", {}),
]


@functools.cache
def params_of(settings):
  """Normal, and large enough that hypotheses leave their beams."""
  rng = np.random.default_rng(3)
  make = functools.partial(init_params, settings)
  shapes = jax.eval_shape(make, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32),
    shapes,
  )
  return {**params, "embedding": 2 * params["embedding"]}


_prepare = jax.jit(prepare, static_argnums=(1, 2))
_start = jax.jit(decode_step.start, static_argnums=(2, 3))


def prepared_of(kind, mode, more, seed=5, **model):
  routing = Routing(kind, **({"experts": EXPERTS, "axis": ""} | more))
  settings = Settings(
    VOCAB, width=16, hidden=12, heads=2, encoder_layers=1,
    decoder_layers=2 if model else 1,
    **(routing.model_settings() | TRAINING | {"pattern": (True,)} | model),
  )  # fmt: skip
  table = None
  if kind == "hash":
    table = jnp.arange(VOCAB, dtype=jnp.int32) % EXPERTS
  way = Dispatch.parse(mode, routing)
  return _prepare(params_of(settings), settings, way, seed=seed, table=table)


def sources(rows=3, length=5, seed=0):
  rng = np.random.default_rng(seed)
  made = np.full((rows, length), PAD, np.int32)
  for row, count in zip(made, (length, 3, 2, 4, 1)):
    row[: count - 1] = rng.integers(3, VOCAB, count - 1)
    row[count - 1] = EOS
  return made


@pytest.mark.parametrize(("kind", "mode", "more"), MODES)
def test_hypotheses_have_the_probability_of_teacher_forcing(kind, mode, more):
  prepared, source = prepared_of(kind, mode, more), sources()
  made = beam_search(prepared, source, SEARCH)
  assert np.unique(made.tokens[0], axis=0).shape[0] == 3
  # With one expert the name says nothing to teacher forcing: it compiles once.
  is_one = prepared.how == "one" and not prepared.members
  each = score(
    prepared.replace(name="fixed") if is_one else prepared,
    np.repeat(source, 3, axis=0),
    np.asarray(made.tokens).reshape(9, -1),
  )
  np.testing.assert_allclose(
    np.sum(each, axis=-1).reshape(3, 3), made.log_probs, **CLOSE
  )


@pytest.mark.parametrize(
  ("mode", "model"),
  [
    ("dispatch_token", {"pre_norm": True, "pattern": (True, False)}),
    (
      "fixed:1",
      {
        "positions": "marian",
        "logits_bias": True,
        "activation": "swish",
        "scale_embedding": False,
        "start_id": PAD,
      },
    ),
  ],
)
def test_each_step_has_the_logits_of_teacher_forcing(mode, model):
  prepared, source = prepared_of("thor", mode, {}, **model), sources()
  if "logits_bias" in model:
    bias = jnp.linspace(-1, 1, VOCAB)
    params = {**prepared.params, "logits_bias": bias}
    prepared = prepared.replace(params=params)
  target = np.random.default_rng(1).integers(3, VOCAB, (3, 6)).astype(np.int32)
  decoder_input = shift_right(target, prepared.settings.start_id, pad_id=PAD)
  expected = jax.jit(next_log_probs)(prepared, source, decoder_input)
  decoder, cache = _start(prepared, source, 1, 6)
  step = jax.jit(decode_step.advance)
  for i in range(6):
    logits, cache = step(
      decoder, cache, decoder_input[:, i : i + 1], jnp.int32(i), None
    )
    np.testing.assert_allclose(
      jax.nn.log_softmax(logits)[:, 0], expected[:, i], **CLOSE
    )


def test_bfloat16_decodes_like_teacher_forcing():
  prepared = prepared_of("thor", "fixed:1", {}, dtype=jnp.bfloat16)
  source = sources()
  made = beam_search(prepared, source, SEARCH)
  tokens = np.asarray(made.tokens)[:, 0]
  each = np.sum(score(prepared, source, tokens), axis=-1)
  # 8 bits of mantissa, six tokens.
  np.testing.assert_allclose(each, made.log_probs[:, 0], rtol=0.05, atol=0.1)


def test_a_model_of_experts_and_its_exported_path_decode_alike():
  from thor.paths import export_dense

  prepared, source = prepared_of("thor", "fixed:2", {}), sources()
  whole = prepared_of("thor", "average_output", {})
  layers = sum(whole.settings.expert_layers)
  params, settings = export_dense(whole.params, whole.settings, [2] * layers)
  plain = prepare(params, settings, Dispatch("dense"))
  first = beam_search(prepared, source, SEARCH)
  second = beam_search(plain, source, SEARCH)
  np.testing.assert_array_equal(first.tokens, second.tokens)
  np.testing.assert_allclose(first.scores, second.scores, **CLOSE)


def test_another_seed_or_path_compiles_nothing(caplog):
  source = sources()
  for mode in ("dispatch_sentence", "dispatch_token", "dispatch_batch"):
    first = beam_search(prepared_of("thor", mode, {}), source, SEARCH)
    other = prepared_of("thor", mode, {}, seed=11)
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
      caplog.clear()
      second = beam_search(other, source, SEARCH)
    assert not [r for r in caplog.records if "_compiled" in r.getMessage()]
    assert not np.array_equal(first.scores, second.scores)
