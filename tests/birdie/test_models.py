"""The Gated SSM: its equations, what sees what, its size, its sharding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from birdie import models
from birdie.models import RULES, GatedSSM, boundaries, make_model, token_metrics
from common import tree
from common.errors import UserError
from common.optim import make_optimizer
from common.parallel import (
  batch_sharding,
  init_sharded,
  linear_scan,
  make_mesh,
  shardings,
)
from common.state import TrainState
from configs.birdie import get_config

VOCAB = 32
MODEL = GatedSSM(VOCAB, width=8, state=8, layers=2)
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
def init(model, seed=0):
  row = jnp.zeros((1, 4), jnp.int32)
  key = jax.random.key(seed)
  return model.init(key, row, row, row, row > 0)["params"]


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


@pytest.mark.parametrize(
  ("bidirectional", "mode"),
  [(False, "strict"), (True, "strict"), (True, "paper")],
)
def test_a_layer_is_its_equations(bidirectional, mode):
  """Against a loop in float64, written from section 3.4 and listing A.16.1."""
  layer = models.GatedSSMLayer(
    width=6,
    state=8,
    bidirectional=bidirectional,
    forget_bias="fixed",
    dtype=jnp.float32,
    scan_impl="auto",
    seq_axis=None,
  )
  _, segments, _, prefix = packed()
  rng = np.random.default_rng(1)
  x = rng.normal(size=(*segments.shape, 6)).astype(np.float32)
  h0 = np.zeros((1, 2, 4), np.float32)
  resets = boundaries(jnp.asarray(segments), jnp.asarray(prefix), mode=mode)
  arguments = (x, resets, None, h0)
  params = jax.jit(layer.init)(jax.random.key(0), *arguments)
  params["params"]["norm"]["scale"] = jnp.linspace(0.5, 1.5, 6)
  y, last = jax.jit(layer.apply)(params, *arguments)
  expected, expected_last = _layer_loop(
    jax.tree.map(lambda p: np.asarray(p, np.float64), params["params"]),
    x[0],
    segments[0],
    prefix[0],
    bidirectional=bidirectional,
    mode=mode,
  )
  # float32 against float64, values of order 1.
  np.testing.assert_allclose(y[0], expected, atol=1e-5)
  np.testing.assert_allclose(last[0].reshape(-1), expected_last, atol=1e-5)


def _layer_loop(params, x, segments, prefix, *, bidirectional, mode):
  def sigmoid(v):
    return 1 / (1 + np.exp(-v))

  def gelu(v):
    inner = np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)
    return 0.5 * v * (1 + np.tanh(inner))

  def project(name):
    return n @ params[name]["kernel"].reshape(6, 8)

  x = x.astype(np.float64)
  n = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
  n = n * params["norm"]["scale"]
  f = sigmoid(project("forget") + np.tile(np.linspace(1, 5, 4), 2))
  b = sigmoid(project("input")) * project("drive")
  h, length = np.zeros_like(b), len(x)
  ahead = slice(0, 4) if bidirectional else slice(0, 8)
  for t in range(length):
    h[t, ahead] = b[t, ahead]
    if t and segments[t] == segments[t - 1]:
      h[t, ahead] += f[t, ahead] * h[t - 1, ahead]
  last = h[-1].copy()
  for t in reversed(range(length)) if bidirectional else ():
    h[t, 4:] = b[t, 4:]
    sees = t + 1 < length and segments[t] == segments[t + 1] and prefix[t]
    if sees and (mode == "paper" or prefix[t + 1]):
      h[t, 4:] += f[t, 4:] * h[t + 1, 4:]
  mixed = (gelu(project("output")) * h) @ params["out"]["kernel"].reshape(8, 6)
  return x + mixed, last


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
  ("bidirectional", "mode"),
  [
    ("none", "strict"),
    ("alternate", "strict"),
    ("alternate", "paper"),
    ("all", "strict"),
  ],
)


@VARIANTS
def test_a_changed_token_changes_exactly_what_sees_it(bidirectional, mode):
  model = MODEL.clone(bidirectional=bidirectional, prefix_mode=mode)
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
  np.testing.assert_array_equal(changed, expected)


@VARIANTS
def test_a_packed_sample_is_the_sample_alone(bidirectional, mode):
  model = MODEL.clone(bidirectional=bidirectional, prefix_mode=mode)
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
  ("mode", "equal"), [("strict", True), ("paper", False)]
)
def test_a_strict_prefix_needs_no_gen(mode, equal):
  model = MODEL.clone(prefix_mode=mode)
  params = init(model)
  whole, prefix = packed(((6, 5),), padding=12), packed(((6, 0),), padding=17)
  with_target, alone = (
    apply(model, params, *row)[:, :6] for row in (whole, prefix)
  )
  np.testing.assert_array_equal(whole[0][:, :6], prefix[0][:, :6])
  difference = jnp.abs(with_target - alone)
  assert (float(difference.max()) < 1e-5) == equal


# -- options -------------------------------------------------------------------


def _loss(model, params, batch):
  """Of the targets, as in training; returns the logits too."""
  logits = model.apply({"params": params}, *batch)
  loss, _ = token_metrics(logits, {"targets": (batch[0] + 1) % VOCAB})
  return jnp.mean(loss), logits


_GRADIENT = functools.partial(jax.value_and_grad, has_aux=True)


@pytest.fixture(scope="module")
def reference():
  """Parameters, a batch of 8 rows of 24, and what one device makes of it."""
  params = init(MODEL)
  parts = ((5, 4), (0, 4), (6, 3))
  rows = [packed(parts, padding=2, seed=i) for i in range(8)]
  batch = [np.concatenate(arrays) for arrays in zip(*rows)]
  step = jax.jit(_GRADIENT(functools.partial(_loss, MODEL)))
  return params, batch, step(params, batch)


@pytest.mark.parametrize(
  "option",
  [
    {"remat": True, "scan_impl": "chunked"},
    {"scan_impl": "associative"},
  ],
  ids=str,
)
def test_options_of_execution_change_no_number(reference, option):
  params, batch, expected = reference
  model = MODEL.clone(**option)
  found = jax.jit(_GRADIENT(functools.partial(_loss, model)))(params, batch)
  chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_computes_low_and_keeps_high(reference):
  params, batch, ((_, logits), _) = reference
  model = MODEL.clone(dtype=jnp.bfloat16)
  chex.assert_trees_all_equal_shapes_and_dtypes(init(model), params)
  low = apply(model, params, *batch)
  assert low.dtype == jnp.float32
  difference = np.abs(np.asarray(low - logits))
  # 8 bits of mantissa through 2 layers; not equal, or nothing was low.
  assert 1e-4 < difference.max() < 0.1


def test_a_learned_forget_bias_starts_as_the_fixed_one(reference):
  params, batch, ((_, logits), _) = reference
  learned = MODEL.clone(forget_bias="learned")
  start = init(learned)
  bias = start["layers"]["causal"]["forget_bias"]
  np.testing.assert_allclose(bias[0], [[1, 7 / 3, 11 / 3, 5]] * 2, rtol=1e-6)
  for name in ("bidirectional", "causal"):
    kind = dict(params["layers"][name])
    kind["forget_bias"] = start["layers"][name]["forget_bias"]
    start["layers"][name] = kind
  start["embed"], start["norm"] = params["embed"], params["norm"]
  chex.assert_trees_all_close(apply(learned, start, *batch), logits, atol=1e-6)


def test_a_forget_bias_lengthens_the_memory():
  gates = jax.nn.sigmoid(np.linspace(*models.FORGET_LOGITS, 4))
  np.testing.assert_allclose(
    gates[jnp.array([0, -1])], [0.731, 0.993], atol=1e-3
  )
  tokens, segments, positions, prefix = packed(((0, 23),), padding=0)
  other = (tokens + (np.arange(23) == 0)[None]) % VOCAB
  moved = {}
  for option in ("fixed", "none"):
    model = MODEL.clone(forget_bias=option)
    a, b = (
      apply(model, init(model), t, segments, positions, prefix)[0, -1]
      for t in (tokens, other)
    )
    moved[option] = float(jnp.abs(a - b).max())
  assert moved["fixed"] > 10 * moved["none"]


# -- sizes ---------------------------------------------------------------------

PER_BLOCK = 26_216_448
BODY = 1_258_391_552  # 48 blocks and the last norm
EMBEDDING = 65_536_000


def _paper_shapes(**options):
  cfg = get_config("paper").model
  cfg.update(options)
  return jax.eval_shape(lambda: init(make_model(cfg, 32_000)))


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("options", "extra_per_block", "embeddings"),
  [
    ({"forget_bias": "fixed"}, 0, 1),
    ({"forget_bias": "none"}, 0, 1),
    ({"forget_bias": "fixed", "tie_embeddings": False}, 0, 2),
    ({"forget_bias": "fixed", "bidirectional": "none"}, 0, 1),
    ({"forget_bias": "fixed", "bidirectional": "all"}, 0, 1),
    ({"forget_bias": "learned"}, 2560, 1),
  ],
  ids=str,
)
def test_the_published_size(options, extra_per_block, embeddings):
  params = _paper_shapes(**options)
  layers = _count(params["layers"])
  assert layers == 48 * (PER_BLOCK + extra_per_block)
  expected = BODY + 48 * extra_per_block + embeddings * EMBEDDING
  assert _count(params) == expected


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd", "adafactor"])
def test_the_rules_place_the_whole_state_of_the_paper_model(optimizer):
  tx, _ = make_optimizer({"name": optimizer, "lr": 1e-3}, 10)
  params = _paper_shapes(forget_bias="learned", tie_embeddings=False)
  extra = {"controller": {"history": jnp.zeros((3, 5))}}
  state = jax.eval_shape(lambda p: TrainState.create(p, tx, extra), params)
  mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
  placed = shardings(state, mesh, RULES)
  assert placed.extra["controller"]["history"].spec == jax.P()
  assert placed.step.spec == jax.P()
  # All but the norms' scales are cut in four.
  held = jax.tree.map(
    lambda s, p: np.prod(s.shard_shape(p.shape)), placed.params, params
  )
  assert sum(jax.tree.leaves(held)) < 1.001 * _count(params) / 4
  moments = [
    leaf
    for leaf in jax.tree.leaves(
      placed.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
    )
    if isinstance(leaf, optax.ScaleByAdamState)
  ]
  assert len(moments) == (optimizer == "adamw")
  for moment in moments:
    assert moment.mu == moment.nu == placed.params


def test_halves_of_the_state_lie_on_every_shard():
  """Cutting the state in halves moves nothing over the model axis."""
  mesh = make_mesh({"data": 2, "model": 4})
  params = init_sharded(lambda key: init(MODEL), mesh, RULES, jax.random.key(0))
  kernel = params["layers"]["causal"]["input"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (1, 8, 2, 1)


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
def test_eight_devices_are_one(reference, sizes):
  params, batch, expected = reference
  mesh = make_mesh(sizes)
  over_time = "seq" in sizes
  model = MODEL.clone(seq_axis="seq" if over_time else None)
  placed = shardings(params, mesh, RULES)
  rows = batch_sharding(mesh, seq=over_time)
  params, batch = jax.device_put(params, placed), jax.device_put(batch, rows)
  with jax.set_mesh(mesh):
    step = jax.jit(_GRADIENT(functools.partial(_loss, model)))
    found = step(params, batch)
  chex.assert_trees_all_close(
    jax.device_get(found), jax.device_get(expected), atol=1e-5, rtol=1e-5
  )
  # Every device computes its own rows and steps, not everybody's.
  logits = found[0][1]
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  local = logits.addressable_shards[0].data.shape
  assert local[:2] == (8 // shards, batch[0].shape[1] // mesh.shape["seq"])


# -- configurations ------------------------------------------------------------


def test_make_model_reads_a_configuration():
  cfg = get_config("smoke").model
  cfg.dtype = "bfloat16"
  model = make_model(cfg, VOCAB)
  assert model == GatedSSM(
    VOCAB, width=32, state=32, layers=2, dtype=jnp.bfloat16
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"name": "gated_ssn"}, "gated_ssm"),
    ({"bidirectional": "half"}, "alternate"),
    ({"prefix_mode": "stric"}, "strict"),
    ({"forget_bias": "fix"}, "fixed"),
    ({"dtype": "float16"}, "bfloat16"),
    ({"scan_impl": "seqential"}, "sequential"),
    ({"seq_axis": "time"}, "seq"),
    ({"width": 0}, "at least 1"),
    ({"layers": -2}, "at least 1"),
    ({"state": 7}, "must be even"),
    ({"layers": 3}, "must be even"),
  ],
  ids=str,
)
def test_a_wrong_configuration_is_refused(change, message):
  cfg = get_config("smoke").model
  cfg.update(change)
  ((key, value),) = change.items()
  with pytest.raises(UserError, match=rf"model\.{key}={value!r}.*{message}"):
    make_model(cfg, VOCAB)


def test_an_odd_number_of_layers_is_fine_without_alternation():
  model = MODEL.clone(layers=3, bidirectional="all")
  assert apply(model, init(model), *packed()).shape == (1, 23, 32)


# -- metrics -------------------------------------------------------------------


def test_token_metrics():
  logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]]))
  loss, correct = token_metrics(logits, {"targets": jnp.array([[0, 1]])})
  np.testing.assert_allclose(loss, [[np.log(2), np.log(5)]], rtol=1e-6)
  np.testing.assert_array_equal(correct, [[1, 0]])


def test_token_metrics_bear_large_and_low_logits():
  logits = jnp.array([[[1000.0, 0.0], [-1000.0, 0.0]]], jnp.bfloat16)
  loss, _ = token_metrics(logits, {"targets": jnp.array([[0, 0]])})
  assert loss.dtype == jnp.float32
  np.testing.assert_array_equal(loss, [[0, 1000]])


def test_what_the_paper_spares_from_decay():
  """Forget gates (A.8), norms and embeddings; everything else decays."""
  config = get_config("paper")
  shapes = _paper_shapes()
  spared = tree.mask(shapes, config.optim.no_decay)
  names = jax.tree.leaves(tree.names(shapes))
  kept = {n for n, s in zip(names, jax.tree.leaves(spared)) if not s}
  assert {name.split("/")[-2] for name in kept} == {
    "input", "drive", "output", "out",
  }  # fmt: skip
  assert any(n.endswith("forget/kernel") for n in set(names) - kept)
