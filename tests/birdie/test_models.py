"""All three models: what sees what, ways to compute them, their sharding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie.losses import batch_losses
from birdie.model_parts import boundaries
from birdie.models import (
  RULES,
  GatedSSM,
  Hawk,
  Transformer,
  init_params,
)
from common.parallel import (
  batch_sharding,
  init_sharded,
  linear_scan,
  make_mesh,
  shardings,
)

VOCAB = 32
MODELS = {
  "gated_ssm": GatedSSM(VOCAB, width=8, state=8, layers=2),
  "hawk": Hawk(VOCAB, width=8, state=16, mlp_width=16, layers=2),
  "transformer": Transformer(
    VOCAB, width=8, heads=2, kv_heads=1, mlp_width=16, layers=2
  ),
}
EVERY = pytest.mark.parametrize("name", MODELS)
# A prefix of 5 and a target of 4; no prefix; a prefix of 3 and a target of 3;
# a prefix alone; padding.
PARTS = ((5, 4), (0, 4), (3, 3), (2, 0))
PADDING = 2


def packed(parts=PARTS, padding=PADDING, seed=0):
  """tokens, segment_ids, positions, prefix of one packed row, each [1, T]."""
  segments, positions, prefix = [], [], []
  for i, (n, m) in enumerate(parts):
    segments += [i + 1] * (n + m)
    positions += range(n + m)
    prefix += [True] * n + [False] * m
  segments += [0] * padding
  positions += [0] * padding
  prefix += [False] * padding
  tokens = np.random.default_rng(seed).integers(0, VOCAB, len(segments))
  return (
    np.asarray(tokens, np.int32)[None],
    np.asarray(segments, np.int32)[None],
    np.asarray(positions, np.int32)[None],
    np.asarray(prefix)[None],
  )


@functools.partial(jax.jit, static_argnums=0)
def init(model):
  return init_params(model, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *batch):
  return model.apply({"params": params}, *batch)


# -- the recurrence in two directions ------------------------------------------


@pytest.mark.parametrize(
  ("mode", "backward"),
  [
    ("strict", [2, 2, 3, 6.5, 5, 6]),
    ("paper", [2.75, 3.5, 3, 8, 8, 6]),
  ],
)
def test_known_answers(mode, backward):
  segments = jnp.array([[1, 1, 1, 2, 2, 2]])
  prefix = jnp.array([[1, 1, 0, 1, 1, 0]]) > 0
  drive = jnp.arange(1.0, 7)[None, :, None]
  gate = jnp.full_like(drive, 0.5)
  resets = boundaries(segments, prefix, mode=mode)
  h_forward, _ = linear_scan(drive, gate, reset=resets[0])
  h_backward, _ = linear_scan(drive, gate, reset=resets[1], reverse=True)
  # Powers of two: the answers are exact.
  np.testing.assert_array_equal(h_forward[0, :, 0], [1, 2.5, 4.25, 4, 7, 9.5])
  np.testing.assert_array_equal(h_backward[0, :, 0], backward)


# -- what sees what ------------------------------------------------------------


def _sees(segments, prefix, *, bidirectional, mode):
  """bool [T, T]: whether the output at q depends on the token at k."""
  q, k = np.mgrid[: len(segments), : len(segments)]
  sees = k <= q
  if bidirectional != "none":
    sees |= prefix[q] & prefix[k]
    if mode == "paper":
      # Through the prefix's last token, also the one behind it (GEN).
      is_gen = ~prefix & np.roll(prefix, 1) & (segments == np.roll(segments, 1))
      sees |= prefix[q] & is_gen[k]
  return sees & (segments[q] == segments[k])


VARIANTS = pytest.mark.parametrize(
  ("name", "bidirectional", "mode"),
  [
    ("gated_ssm", "none", "strict"),
    ("gated_ssm", "alternate", "strict"),
    ("gated_ssm", "alternate", "paper"),
    ("gated_ssm", "all", "strict"),
    ("hawk", "none", "strict"),
    ("hawk", "alternate", "strict"),
    ("hawk", "all", "paper"),
    ("transformer", "none", "strict"),
    ("transformer", "alternate", "strict"),
    ("transformer", "all", "strict"),
  ],
)


@VARIANTS
def test_a_changed_token_changes_exactly_what_sees_it(
  name, bidirectional, mode
):
  model = MODELS[name].clone(bidirectional=bidirectional, prefix_mode=mode)
  params = init(model)
  tokens, segments, positions, prefix = packed()

  def run(tokens):
    return np.asarray(apply(model, params, tokens, segments, positions, prefix))

  before = run(tokens)
  changed = np.zeros((tokens.shape[1],) * 2, bool)
  for k in range(tokens.shape[1]):
    other = tokens.copy()
    other[0, k] = (other[0, k] + 1) % VOCAB
    # Bit for bit, not nearly.
    changed[:, k] = (run(other) != before).any(-1)[0]
  expected = _sees(
    segments[0], prefix[0], bidirectional=bidirectional, mode=mode
  )
  # What padding sees is nobody's concern.
  real = segments[0] > 0
  np.testing.assert_array_equal(changed[real], expected[real])


@VARIANTS
def test_a_packed_sample_is_the_sample_alone(name, bidirectional, mode):
  model = MODELS[name].clone(bidirectional=bidirectional, prefix_mode=mode)
  params = init(model)
  row = packed()
  together = apply(model, params, *row)
  start = 0
  for part in PARTS:
    size = sum(part)
    # Padded to the row's length only so that all share a compiled program.
    alone = packed((part,), padding=row[0].shape[1] - size)
    alone[0][:, :size] = row[0][:, start : start + size]
    chex.assert_trees_all_close(
      apply(model, params, *alone)[:, :size],
      together[:, start : start + size],
      atol=1e-5,
    )
    start += size


@pytest.mark.parametrize(
  ("name", "mode", "equal"),
  [
    ("gated_ssm", "strict", True),
    ("gated_ssm", "paper", False),
    ("hawk", "strict", True),
    ("hawk", "paper", False),
    ("transformer", "strict", True),
  ],
)
def test_a_strict_prefix_needs_no_gen(name, mode, equal):
  model = MODELS[name].clone(prefix_mode=mode)
  params = init(model)
  whole, prefix = packed(((6, 5),), padding=12), packed(((6, 0),), padding=17)
  with_target, alone = (
    apply(model, params, *row)[:, :6] for row in (whole, prefix)
  )
  np.testing.assert_array_equal(whole[0][:, :6], prefix[0][:, :6])
  difference = jnp.abs(with_target - alone)
  assert (float(difference.max()) < 1e-5) == equal


# -- options -------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0, static_argnames="chunk")
def step(model, params, batch, *, chunk=0):
  """Loss, losses of every token and gradients, as in training."""

  def loss_fn(params):
    tokens, segments, positions, prefix = batch
    packed = {
      "tokens": tokens,
      "segment_ids": segments,
      "positions": positions,
      "prefix": prefix,
      "targets": (tokens + 1) % VOCAB,
    }
    losses = batch_losses(model, params, packed, chunk=chunk)
    return jnp.mean(losses[0]), losses

  return jax.value_and_grad(loss_fn, has_aux=True)(params)


@pytest.fixture(scope="module")
def batch():
  """8 rows of 24."""
  parts = ((5, 4), (0, 4), (6, 3))
  rows = [packed(parts, padding=2, seed=i) for i in range(8)]
  return [np.concatenate(arrays) for arrays in zip(*rows)]


@pytest.fixture(scope="module")
def expected(batch):
  """Parameters of a model, and what one device makes of them."""

  @functools.cache
  def of(name):
    params = init(MODELS[name])
    return params, step(MODELS[name], params, batch)

  return of


@pytest.mark.parametrize(
  ("name", "option", "chunk"),
  [
    ("gated_ssm", {"remat": "full", "scan_impl": "chunked"}, 0),
    ("gated_ssm", {"scan_impl": "associative"}, 7),
    ("gated_ssm", {"remat": "none"}, 0),
    ("hawk", {"remat": "full", "scan_impl": "associative"}, 7),
    ("transformer", {"remat": "full", "attention_chunk": 10}, 7),
  ],
  ids=str,
)
def test_options_of_execution_change_no_number(
  expected, batch, name, option, chunk
):
  params, numbers = expected(name)
  found = step(MODELS[name].clone(**option), params, batch, chunk=chunk)
  chex.assert_trees_all_close(found, numbers, atol=1e-5, rtol=1e-5)


@EVERY
def test_bfloat16_computes_low_and_keeps_high(batch, name):
  model = MODELS[name]
  params = init(model)
  high = apply(model, params, *batch)
  low_model = model.clone(dtype=jnp.bfloat16)
  chex.assert_trees_all_equal_shapes_and_dtypes(init(low_model), params)
  low = apply(low_model, params, *batch)
  assert low.dtype == jnp.float32
  difference = np.abs(np.asarray(low - high))
  # 8 bits of mantissa through 2 layers; not equal, or nothing was low.
  assert 1e-4 < difference.max() < 0.25
  small = init(model.clone(param_dtype=jnp.bfloat16))
  assert {p.dtype.name for p in jax.tree.leaves(small)} == {"bfloat16"}


@EVERY
def test_what_is_dear_is_not_computed_again(name):
  """Products of matrices, recurrences and attention, where all else is."""
  count = {}
  for remat in ("none", "dots", "full"):
    model = MODELS[name].clone(remat=remat, scan_impl="sequential")
    params = jax.eval_shape(lambda model=model: init(model))
    row = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    batch = row, row, row, jax.ShapeDtypeStruct((1, 8), bool)
    text = str(step.trace(model, params, batch).jaxpr)
    count[remat] = np.array([text.count("dot_general["), text.count("scan[")])
  assert (count["dots"] <= count["none"]).all()
  recurs = [True, name != "transformer"]
  assert (count["dots"] < count["full"])[recurs].all()


@pytest.mark.parametrize("impl", ["einsum", "xla"])
@pytest.mark.parametrize("bidirectional", ["none", "all"])
def test_attention_never_holds_all_scores(impl, bidirectional):
  """Twice the length, twice the memory of a training step."""
  model = MODELS["transformer"].clone(
    bidirectional=bidirectional, attention_impl=impl, attention_chunk=64
  )

  def bytes_of(length):
    params = jax.eval_shape(lambda: init(model))
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    batch = row, row, row, jax.ShapeDtypeStruct((1, length), bool)
    compiled = step.lower(model, params, batch, chunk=64).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert bytes_of(1024) < 2.3 * bytes_of(512)


@EVERY
def test_depth_adds_nothing_to_the_program(name):
  """Layers are scanned: the program of 4 blocks is that of 2."""

  def lines(layers):
    model = MODELS[name].clone(layers=layers)
    params = jax.eval_shape(lambda: init(model))
    row = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 8), bool)
    return len(
      apply.lower(model, params, row, row, row, mask).as_text().splitlines()
    )

  assert lines(4) == lines(8)


# -- sharding ------------------------------------------------------------------


@pytest.mark.parametrize(
  "sizes",
  [
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "model": 2},
    {"fsdp": 2, "model": 2, "seq": 2},
  ],
  ids=str,
)
@EVERY
def test_eight_devices_are_one(expected, batch, name, sizes):
  params, numbers = expected(name)
  mesh = make_mesh(sizes)
  over_time = "seq" in sizes
  model = MODELS[name].clone(seq_axis="seq" if over_time else None)
  if name == "transformer":
    model = model.clone(kv_heads=2)
    params = init(model)
    numbers = step(MODELS[name].clone(kv_heads=2), params, batch)
  placed = shardings(params, mesh, RULES)
  rows = batch_sharding(mesh, seq=over_time)
  params, batch = jax.device_put(params, placed), jax.device_put(batch, rows)
  with jax.set_mesh(mesh):
    found = step(model, params, batch, chunk=5)
  chex.assert_trees_all_close(
    jax.device_get(found), jax.device_get(numbers), atol=1e-5, rtol=1e-5
  )
  # Every device computes its own rows and steps, not everybody's.
  losses = found[0][1][0]
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  local = losses.addressable_shards[0].data.shape
  assert local == (8 // shards, batch[0].shape[1] // mesh.shape["seq"])


@pytest.mark.parametrize(
  ("name", "kernel"),
  [("gated_ssm", "input"), ("hawk", "input"), ("hawk", "side")],
)
def test_halves_of_the_state_lie_on_every_shard(name, kernel):
  """Cutting the state in halves moves nothing over the model axis."""
  mesh = make_mesh({"data": 2, "model": 4})
  params = init_sharded(
    lambda key: init(MODELS[name]), mesh, RULES, jax.random.key(0)
  )
  kernel = params["layers"]["causal"][kernel]["kernel"]
  half = MODELS[name].state // 2
  assert kernel.sharding.shard_shape(kernel.shape) == (1, 8, 2, half // 4)


def test_an_odd_number_of_layers_is_fine_without_alternation():
  model = MODELS["gated_ssm"].clone(layers=3, bidirectional="all")
  assert apply(model, init(model), *packed()).shape == (1, 23, 32)
