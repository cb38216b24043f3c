"""Generation: step by step equals all at once, with a state of one size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie import decode
from birdie.models import RULES, GatedSSM, Hawk, Transformer, init_params
from common.parallel import make_mesh, shardings

VOCAB = 32
GEN = 1
MODEL = GatedSSM(VOCAB, width=8, state=8, layers=2)
MODELS = {
  "gated_ssm": MODEL,
  "hawk": Hawk(VOCAB, width=8, state=8, mlp_width=16, layers=2),
  "transformer": Transformer(
    VOCAB, width=8, heads=2, kv_heads=1, mlp_width=16, layers=2
  ),
}
NEW = 6
LENGTHS = (0, 3, 11, decode.BUCKET)


@functools.partial(jax.jit, static_argnums=0)
def init(model):
  return init_params(model, jax.random.key(0))


@pytest.fixture(scope="module")
def params():
  return init(MODEL)


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(2, VOCAB, n).astype(np.int32) for n in LENGTHS]


@functools.partial(jax.jit, static_argnums=0)
def _parallel(model, params, tokens, prefix):
  ones = jnp.ones_like(tokens)
  places = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  return model.apply({"params": params}, tokens, ones, places, prefix)


def parallel(model, params, prompts, continuations):
  """Logits of every new token as in training: [b NEW v]."""
  size = max(map(len, prompts)) + NEW
  tokens = np.zeros((len(prompts), size), np.int32)
  prefix = np.zeros((len(prompts), size), bool)
  for i, (prompt, new) in enumerate(zip(prompts, continuations)):
    row = np.concatenate([prompt, [GEN], new[:-1]])
    tokens[i, : len(row)] = row
    prefix[i, : len(prompt)] = True
  # Nothing sees what comes after it, so the rows' ends do not matter.
  logits = np.asarray(_parallel(model, params, tokens, prefix))
  return np.stack([x[len(p) :][:NEW] for x, p in zip(logits, prompts)])


def stepwise(model, params, prompts, continuations):
  padded, lengths = decode.pad_prompts(prompts, gen=GEN)
  capacity = padded.shape[1] + NEW
  state = decode.prefill(model, params, padded, lengths, capacity=capacity)
  tokens = np.concatenate(
    [np.full((len(prompts), 1), GEN), continuations[:, :-1]], axis=1
  )
  logits = []
  for token in tokens.T.astype(np.int32):
    row, state = decode.decode_step(model, params, state, token)
    logits.append(row)
  return np.stack(logits, axis=1), state


@pytest.mark.parametrize(
  ("name", "options", "tolerance"),
  [
    ("gated_ssm", {"bidirectional": "none"}, 1e-4),
    ("gated_ssm", {}, 1e-4),
    ("gated_ssm", {"prefix_mode": "paper"}, 1e-4),
    ("gated_ssm", {"bidirectional": "all", "tie_embeddings": False}, 1e-4),
    # One unit in the last place of a bfloat16 near 2 is 2 ** -7.
    ("gated_ssm", {"dtype": jnp.bfloat16}, 2e-2),
    ("hawk", {"bidirectional": "none", "reset_gamma": "one"}, 1e-4),
    ("hawk", {"reset_gamma": "one", "gate_blocks": 2}, 1e-4),
    ("hawk", {"prefix_mode": "paper", "bidirectional": "all"}, 1e-4),
    ("hawk", {"dtype": jnp.bfloat16}, 2e-2),
    ("transformer", {"bidirectional": "none"}, 1e-4),
    ("transformer", {}, 1e-4),
    ("transformer", {"bidirectional": "all", "attention_chunk": 16}, 1e-4),
    ("transformer", {"dtype": jnp.bfloat16}, 2e-2),
  ],
  ids=str,
)
def test_steps_equal_the_parallel_form(prompts, name, options, tolerance):
  model = MODELS[name].clone(**options)
  params = init(model)
  new = np.random.default_rng(1).integers(2, VOCAB, (len(prompts), NEW))
  steps, state = stepwise(model, params, prompts, new)
  assert steps.dtype == np.float32
  expected = parallel(model, params, prompts, new)
  np.testing.assert_allclose(steps, expected, atol=tolerance)
  np.testing.assert_array_equal(state.position, np.add(LENGTHS, NEW))


@pytest.mark.parametrize(
  ("name", "floats"),
  [
    # A causal layer's state, and half a bidirectional one's (the other half
    # holds zeros, for one shape).
    ("gated_ssm", 2 * 8),
    # The same, and three inputs of every convolution.
    ("hawk", 2 * 8 + 2 * 3 * 8),
  ],
)
def test_the_bytes_of_a_state(name, floats):
  for capacity in (1, 1 << 20):
    assert decode.state_bytes(MODELS[name], capacity) == 4 * floats


def test_the_bytes_of_a_cache():
  # Keys and values of 100 tokens, one head of 4, in 2 layers.
  assert decode.state_bytes(MODELS["transformer"], 100) == 4 * 2 * 100 * 4 * 2


def test_the_state_does_not_grow(params):
  """N floats a causal layer and sequence, none for a reverse half."""

  def state_after(length):
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    return jax.eval_shape(
      functools.partial(decode.prefill, MODEL), params, tokens, lengths
    )

  short, long = state_after(1), state_after(1 << 20)
  assert short == long
  token = jax.ShapeDtypeStruct((2,), jnp.int32)
  step = functools.partial(decode.decode_step, MODEL)
  assert jax.eval_shape(step, params, long, token)[1] == short
  assert short.layers.shape == (1, 2, 2, 2, 4)  # blocks, kinds, b, halves, n/2
  assert short.layers.dtype == jnp.float32


def test_the_reverse_half_leaves_nothing(params, prompts):
  state = decode.prefill(MODEL, params, *decode.pad_prompts(prompts, gen=GEN))
  bidirectional, causal = state.layers[0]
  assert not bidirectional[:, 1].any()
  # Empty prompts leave nothing at all, the others something everywhere else.
  assert not state.layers[:, :, 0].any()
  assert bidirectional[1:, 0].all()
  assert causal[1:].all()


@pytest.mark.parametrize("size", [decode.BUCKET, 2 * decode.BUCKET])
def test_padding_is_not_read(params, prompts, size):
  prompts = prompts[:-1]
  tokens, lengths = decode.pad_prompts(prompts, gen=GEN)
  expected = decode.prefill(MODEL, params, tokens, lengths)
  other = np.random.default_rng(2).integers(0, VOCAB, (3, size), np.int32)
  for row, prompt in zip(other, prompts):
    row[: len(prompt)] = prompt
  found = decode.prefill(MODEL, params, other, lengths)
  np.testing.assert_allclose(found.layers, expected.layers, atol=1e-6)


def test_pad_prompts_puts_gen_behind_every_prompt(prompts):
  tokens, lengths = decode.pad_prompts(prompts, gen=GEN)
  assert tokens.shape == (4, 2 * decode.BUCKET)
  np.testing.assert_array_equal(lengths, LENGTHS)
  for row, prompt in zip(tokens, prompts):
    np.testing.assert_array_equal(row[: len(prompt)], prompt)
    assert (row[len(prompt) :] == GEN).all()


# -- whole continuations -------------------------------------------------------

GENERATE = {"gen": GEN, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def greedy(params, prompts):
  return decode.generate(MODEL, params, prompts, **GENERATE)


def test_greedy_takes_the_best_token_each_time(params, prompts, greedy):
  assert [len(row) for row in greedy] == [NEW] * len(prompts)
  logits = parallel(MODEL, params, prompts, np.stack(greedy))
  np.testing.assert_array_equal(logits.argmax(-1), greedy)


def test_a_stop_token_ends_its_own_row_only(params, prompts, greedy):
  stop = int(greedy[2][3])
  found = decode.generate(MODEL, params, prompts, stop=stop, **GENERATE)
  for row, whole in zip(found, greedy):
    ends = np.flatnonzero(whole == stop)
    end = ends[0] if len(ends) else NEW
    np.testing.assert_array_equal(row, whole[:end])
  assert len(found[2]) <= 3


def test_any_of_several_stop_tokens_ends_a_row(params, prompts, greedy):
  stop = [int(greedy[2][3]), VOCAB - 1]
  found = decode.generate(MODEL, params, prompts, stop=stop, **GENERATE)
  for row, whole in zip(found, greedy):
    ends = np.flatnonzero(np.isin(whole, stop))
    np.testing.assert_array_equal(row, whole[: ends[0] if len(ends) else NEW])


def test_a_cache_without_room_is_not_silent():
  model = MODELS["transformer"]
  params = init(model)
  tokens = jnp.full((2, 4), 5)
  state = decode.prefill(model, params, tokens, jnp.array([4, 2]), capacity=5)
  finite = []
  for _ in range(4):
    logits, state = decode.decode_step(model, params, state, tokens[:, 0])
    finite.append(np.isfinite(logits).all(-1))
  # One place behind the first prompt, three behind the second.
  np.testing.assert_array_equal(
    np.transpose(finite), [[1, 0, 0, 0], [1, 1, 1, 0]]
  )


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_that_fills_its_room_is_read_whole(name):
  """Chunks of queries shorter than it, and no place behind it."""
  model = MODELS[name].clone(bidirectional="all")
  if name == "transformer":
    model = model.clone(attention_chunk=4)
  params = init(model)
  tokens = np.random.default_rng(3).integers(2, VOCAB, (1, 8))
  lengths = np.full(1, 8)
  exact, roomy = (
    decode.prefill(model, params, tokens, lengths, capacity=capacity).layers
    for capacity in (8, 16)
  )
  if name == "transformer":
    roomy = jax.tree.map(lambda cache: cache[:, :, :, :8], roomy)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), exact, roomy
  )


@pytest.mark.parametrize("name", ["hawk", "transformer"])
def test_a_prompt_alone_is_the_prompt_among_others(prompts, name):
  params = init(MODELS[name])
  together = decode.generate(MODELS[name], params, prompts, **GENERATE)
  for prompt, expected in zip(prompts, together):
    (alone,) = decode.generate(MODELS[name], params, [prompt], **GENERATE)
    np.testing.assert_array_equal(alone, expected)
    streamed = decode.stream(MODELS[name], params, prompt, **GENERATE)
    assert list(streamed) == alone.tolist()


def test_a_prompt_does_not_see_its_neighbours(params, prompts, greedy):
  (alone,) = decode.generate(MODEL, params, prompts[2:3], **GENERATE)
  np.testing.assert_array_equal(alone, greedy[2])


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
  ],
  ids=str,
)
def test_stream_is_generate(params, prompts, settings):
  (whole,) = decode.generate(
    MODEL, params, prompts[2:3], **GENERATE, **settings
  )
  tokens = decode.stream(MODEL, params, prompts[2], **GENERATE, **settings)
  assert list(tokens) == whole.tolist()
  stop = int(whole[-1])
  tokens = decode.stream(
    MODEL, params, prompts[2], stop=stop, **GENERATE, **settings
  )
  assert list(tokens) == whole.tolist()[: whole.tolist().index(stop)]


def test_a_seed_is_a_continuation(params, prompts):
  def draw(seed):
    rows = decode.generate(
      MODEL, params, prompts, temperature=1.0, seed=seed, **GENERATE
    )
    return np.stack(rows)

  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(0) != draw(1)).any()


def test_a_run_sharded_over_time_decodes(params, prompts, greedy):
  model = MODEL.clone(seq_axis="seq")
  found = decode.generate(model, params, prompts, **GENERATE)
  np.testing.assert_array_equal(found, greedy)


def test_sharded_parameters_decode_alike(params, prompts, greedy):
  mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
  placed = jax.device_put(params, shardings(params, mesh, RULES))
  found = decode.generate(MODEL, placed, prompts, **GENERATE)
  np.testing.assert_array_equal(found, greedy)


# -- draws ---------------------------------------------------------------------

PROBS = (0.15, 0.5, 0.05, 0.3)  # in order of rank: 1, 3, 0, 2
DRAWS = 4096


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    ({"temperature": 0.0}, (0, 1, 0, 0)),
    ({"temperature": 1e-30}, (0, 1, 0, 0)),
    ({"temperature": 1.0}, PROBS),
    # p ** 2, normalized.
    (
      {"temperature": 0.5},
      (0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365),
    ),
    ({"temperature": 1.0, "top_k": 1}, (0, 1, 0, 0)),
    ({"temperature": 1.0, "top_k": 2}, (0, 0.625, 0, 0.375)),
    ({"temperature": 1.0, "top_k": 9}, PROBS),
    ({"temperature": 1.0, "top_p": 0.01}, (0, 1, 0, 0)),
    ({"temperature": 1.0, "top_p": 0.6}, (0, 0.625, 0, 0.375)),
    ({"temperature": 1.0, "top_p": 0.9}, (3 / 19, 10 / 19, 0, 6 / 19)),
    ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, (0, 1, 0, 0)),
  ],
  ids=str,
)
def test_draws_follow_the_distribution(settings, expected):
  logits = jnp.tile(jnp.log(jnp.array(PROBS)), (DRAWS, 1))
  tokens = decode.sample(logits, jax.random.key(0), **settings)
  found = np.bincount(tokens, minlength=4) / DRAWS
  assert not found[np.equal(expected, 0)].any()
  # Four standard deviations of a share: 4 * sqrt(0.25 / 4096).
  np.testing.assert_allclose(found, expected, atol=0.0313)
