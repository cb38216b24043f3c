"""The classifiers: their equations, modes and sharding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.parallel import make_mesh, shardings
from udim.model_parts import BatchNorm
from udim.models import (
  RULES,
  ResNet,
  SmallCNN,
  ViT,
  WideResNet,
  init_variables,
  make_apply_fn,
)

K = 5
IMAGE = (16, 16, 3)
TINY = {
  "cnn": SmallCNN(K),
  "resnet": ResNet(K, stages=(1, 1), width=8),
  "bottleneck": ResNet(K, stages=(1, 1), width=8, bottleneck=True),
  "wrn": WideResNet(K, widen=1, blocks=1),
  "vit": ViT(K, width=16, depth=2, heads=2, patch=8),
}
NORMALIZED = ("resnet", "bottleneck", "wrn")
# float32, sums of some hundred terms of order 1.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
FLOAT32 = np.dtype("float32")
# A third of the time to compile, and as exact.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def images(rows, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(rows, *IMAGE)).astype(np.float32)


@functools.cache
def variables_of(name):
  """Variables without a scale of 1 or a bias of 0; no program to compile."""
  init = functools.partial(init_variables, TINY[name], image_shape=IMAGE)
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    last = path[-1].key
    if last in ("scale", "var"):
      value = rng.uniform(0.5, 1.5, leaf.shape)
    elif last in ("bias", "mean"):
      value = rng.uniform(-0.2, 0.2, leaf.shape)
    else:
      value = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
    return jnp.asarray(value, leaf.dtype)

  shapes = jax.eval_shape(init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jit, static_argnums=(0, 3))
def run(model, variables, x, train=False, key=None):
  rngs = None if key is None else {"dropout": key}
  return make_apply_fn(model)(variables, x, train=train, rngs=rngs)


# -- equations -----------------------------------------------------------------


def _conv(x, layer, stride=1, pad=None):
  """By the definition, in float64, with `pad` zeros on every side."""
  kernel = layer["kernel"]
  size = kernel.shape[0]
  pad = size // 2 if pad is None else pad
  x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  y = np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], kernel)
  return y + layer.get("bias", 0)


def _norm(x, params, stats):
  std = np.sqrt(stats["var"] + 1e-5)
  return (x - stats["mean"]) / std * params["scale"] + params["bias"]


def _relu(x):
  return np.maximum(x, 0)


def _cnn(p, s, x):
  x = _relu(_conv(x, p["stem"]))
  return _relu(_conv(x, p["conv1"], 2)).reshape(len(x), -1)


def _resnet(p, s, x, *, strides):
  x = _relu(_norm(_conv(x, p["stem"], 2), p["stem_bn"], s["stem_bn"]))
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
  x = windows[:, ::2, ::2].max((-1, -2))
  for layer, stride in (("layer1_0", 1), ("layer2_0", 2)):
    q, t, y = p[layer], s[layer], x
    for i, strided in enumerate(strides, 1):
      y = _conv(y, q[f"conv{i}"], stride if strided else 1)
      y = _norm(y, q[f"bn{i}"], t[f"bn{i}"])
      y = y if i == len(strides) else _relu(y)
    if "downsample" in q:
      x = _conv(x, q["downsample"], stride)
      x = _norm(x, q["downsample_bn"], t["downsample_bn"])
    x = _relu(x + y)
  return x.mean((1, 2))


def _wrn(p, s, x):
  x = _conv(x, p["stem"])
  for layer, stride in (("layer1_0", 1), ("layer2_0", 2), ("layer3_0", 2)):
    q, t = p[layer], s[layer]
    y = _relu(_norm(x, q["bn1"], t["bn1"]))
    shortcut = _conv(y, q["downsample"], stride) if "downsample" in q else x
    y = _conv(y, q["conv1"], stride)
    x = shortcut + _conv(_relu(_norm(y, q["bn2"], t["bn2"])), q["conv2"])
  return _relu(_norm(x, p["bn"], s["bn"])).mean((1, 2))


def _layer_norm(x, params):
  centred = x - x.mean(-1, keepdims=True)
  std = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
  return centred / std * params["scale"] + params["bias"]


def _vit(p, s, x):
  erf = np.vectorize(__import__("math").erf)
  tokens = []
  for row in range(2):
    for column in range(2):
      patch = x[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
      kernel = p["patch"]["kernel"]
      tokens.append(np.einsum("bijc,ijcd->bd", patch, kernel))
  x = np.stack(tokens, 1) + p["patch"]["bias"]
  token = np.repeat(p["class_token"], len(x), 0)
  x = np.concatenate([token, x], 1) + p["positions"]
  for i in range(2):
    q = jax.tree.map(lambda leaf: leaf[i], p["layers"])  # noqa: B023
    y = _layer_norm(x, q["norm1"])
    parts = np.einsum("btd,dpne->pbtne", y, q["qkv"]["kernel"])
    query, key, value = parts + q["qkv"]["bias"][:, None, None]
    scores = np.exp(np.einsum("btne,bsne->bnts", query, key) / np.sqrt(8))
    scores /= scores.sum(-1, keepdims=True)
    y = np.einsum("bnts,bsne->btne", scores, value)
    y = np.einsum("btne,ned->btd", y, q["proj"]["kernel"])
    x = x + y + q["proj"]["bias"]
    y = _layer_norm(x, q["norm2"]) @ q["up"]["kernel"] + q["up"]["bias"]
    y = y * (1 + erf(y / np.sqrt(2))) / 2
    x = x + y @ q["down"]["kernel"] + q["down"]["bias"]
  return _layer_norm(x[:, 0], p["norm"])


EQUATIONS = {
  "cnn": _cnn,
  "resnet": functools.partial(_resnet, strides=(1, 0)),
  "bottleneck": functools.partial(_resnet, strides=(0, 1, 0)),
  "wrn": _wrn,
  "vit": _vit,
}


@pytest.mark.parametrize("name", TINY)
def test_a_model_is_its_equations(name):
  variables = variables_of(name)
  x = images(4)
  p, s = (
    jax.tree.map(lambda v: np.asarray(v, np.float64), variables[key])
    for key in ("params", "batch_stats")
  )
  expected = EQUATIONS[name](p, s, x.astype(np.float64))
  features, logits, _ = run(TINY[name], variables, x)
  np.testing.assert_allclose(features, expected, **CLOSE)
  head = p["head"]
  np.testing.assert_allclose(
    logits, expected @ head["kernel"] + head["bias"], **CLOSE
  )


# -- batch normalization -------------------------------------------------------


def test_batch_norm_is_torchs():
  """Biased variance to normalize, unbiased for the running one."""
  x = images(3).astype(np.float64) * 3 + 1
  rng = np.random.default_rng(2)
  scale, bias, mean = rng.normal(size=(3, 3))
  var = rng.uniform(1, 2, size=3)
  variables = {
    "params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)},
    "batch_stats": {"mean": jnp.float32(mean), "var": jnp.float32(var)},
  }
  norm = BatchNorm(use_batch=True)
  y, changed = norm.apply(variables, jnp.float32(x), mutable=["batch_stats"])
  batch_mean, batch_var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  expected = (x - batch_mean) / np.sqrt(batch_var + 1e-5) * scale + bias
  np.testing.assert_allclose(y, expected, **CLOSE)
  n = x[..., 0].size
  np.testing.assert_allclose(
    changed["batch_stats"]["mean"], 0.9 * mean + 0.1 * batch_mean, **CLOSE
  )
  np.testing.assert_allclose(
    changed["batch_stats"]["var"],
    0.9 * var + 0.1 * batch_var * n / (n - 1),
    **CLOSE,
  )
  # A pass that must not write gets the same output.
  np.testing.assert_array_equal(norm.apply(variables, jnp.float32(x)), y)


@pytest.mark.parametrize("name", NORMALIZED)
def test_frozen_statistics_are_those_of_evaluation(name):
  variables = variables_of(name)
  x = images(4)
  evaluated = run(TINY[name], variables, x)
  trained = run(TINY[name], variables, x, True)
  chex.assert_trees_all_equal(trained, evaluated)
  chex.assert_trees_all_equal(trained[2], variables["batch_stats"])


@pytest.mark.parametrize("name", NORMALIZED)
def test_updated_statistics(name):
  model = TINY[name].clone(batch_norm="update")
  variables = variables_of(name)
  x = images(4)
  # In training the batch mates count, and every statistic moves.
  whole, _, new = run(model, variables, x, True)
  others = np.concatenate([x[:2], images(2, seed=1)])
  half, _, _ = run(model, variables, others, True)
  assert np.abs(whole[:2] - half[:2]).max() > 1e-3
  moved = jax.tree.map(
    lambda a, b: bool(np.all(a != b)), new, variables["batch_stats"]
  )
  assert all(jax.tree.leaves(moved))
  # In evaluation neither.
  features, _, same = run(model, variables, x)
  chex.assert_trees_all_equal(same, variables["batch_stats"])
  frozen, _, _ = run(TINY[name], variables, x)
  np.testing.assert_array_equal(features, frozen)


@pytest.mark.parametrize("name", TINY)
def test_evaluation_does_not_depend_on_the_batch(name):
  model = TINY[name]
  if name in NORMALIZED:
    model = model.clone(batch_norm="update")
  variables = variables_of(name)
  x = images(128)
  logits = {n: run(model, variables, x[:n])[1] for n in (1, 7, 128)}
  for n in (1, 7):
    # The compiler may sum in another order.
    np.testing.assert_allclose(logits[n], logits[128][:n], atol=2e-6, rtol=1e-5)


# -- dropout -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "bottleneck"])
def test_dropout_of_the_features(name):
  model = TINY[name].clone(dropout=0.5)
  variables = variables_of(name)
  x = images(4)
  kept, logits, _ = run(model, variables, x, True, jax.random.key(3))
  whole, _, _ = run(model, variables, x)
  dropped = kept == 0
  assert 0.2 < (dropped & (whole != 0)).mean() / (whole != 0).mean() < 0.8
  np.testing.assert_allclose(
    np.where(dropped, 0, kept), np.where(dropped, 0, 2 * whole), **CLOSE
  )
  # The head reads what dropout left.
  head = variables["params"]["head"]
  np.testing.assert_allclose(
    logits, kept @ head["kernel"] + head["bias"][None], **CLOSE
  )
  again, _, _ = run(model, variables, x, True, jax.random.key(3))
  other, _, _ = run(model, variables, x, True, jax.random.key(4))
  np.testing.assert_array_equal(again, kept)
  assert not np.allclose(other, kept)


@pytest.mark.parametrize("name", ["wrn", "vit"])
def test_dropout_inside_the_blocks(name):
  model = TINY[name].clone(block_dropout=0.5)
  variables = variables_of(name)
  x = images(4)
  first, _, _ = run(model, variables, x, True, jax.random.key(3))
  second, _, _ = run(model, variables, x, True, jax.random.key(4))
  assert not np.allclose(first, second)
  evaluated = run(model, variables, x)[0]
  np.testing.assert_array_equal(evaluated, run(TINY[name], variables, x)[0])


def test_layers_of_a_vit_draw_their_own_masks():
  """Of two equal layers that add their bias alone, each drops its own part."""
  model = TINY["vit"].clone(block_dropout=0.5)
  params = jax.tree.map(jnp.zeros_like, variables_of("vit")["params"])
  params["layers"]["down"]["bias"] += 1.0
  params["norm"]["scale"] += 1.0
  features, _, _ = run(
    model, {"params": params}, images(64), True, jax.random.key(3)
  )
  # Before the norm 0, 2 or 4: with one mask for both there were no 2.
  levels = [len(np.unique(np.round(row, 3))) for row in np.asarray(features)]
  assert max(levels) == 3


# -- precision, memory, compilation --------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_computes_and_float32_remains(name):
  variables = variables_of(name)
  x = images(4)
  model = TINY[name].clone(dtype=jnp.bfloat16)
  if name in NORMALIZED:
    model = model.clone(batch_norm="update")
  init = functools.partial(init_variables, model, image_shape=IMAGE)
  fresh = jax.eval_shape(init, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {FLOAT32}
  apply_fn = functools.partial(make_apply_fn(model), train=True)
  trained = jax.eval_shape(apply_fn, variables, x)
  assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {FLOAT32}
  exact, rough = (run(m, variables, x)[1] for m in (TINY[name], model))
  error = np.abs(rough - exact).max() / np.abs(exact).max()
  assert 1e-5 < error < 0.05  # 8 bits, several layers


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_remat_changes_nothing(name):
  variables = variables_of(name)
  x = images(4)

  @functools.partial(jit, static_argnums=0)
  def gradient(model, params):
    def loss(params):
      full = {**variables, "params": params}
      _, logits, new = make_apply_fn(model)(
        full, x, train=True, rngs={"dropout": jax.random.key(3)}
      )
      return jnp.sum(jnp.sin(logits)), new

    return jax.value_and_grad(loss, has_aux=True)(params)

  model = TINY[name].clone(dropout=0.5)
  if name in NORMALIZED:
    model = model.clone(batch_norm="update")
  else:
    model = model.clone(block_dropout=0.2)
  plain = gradient(model, variables["params"])
  less = gradient(model.clone(remat=True), variables["params"])
  chex.assert_trees_all_close(less, plain, **CLOSE)


def test_the_program_of_a_vit_does_not_grow_with_its_depth():
  def size(depth):
    model = TINY["vit"].clone(depth=depth)
    init = functools.partial(init_variables, model, image_shape=IMAGE)
    variables = jax.eval_shape(init, jax.random.key(0))
    traced = jit(functools.partial(model.apply, train=False)).trace(
      variables, images(1)
    )
    return traced.lower().as_text().count("\n")

  assert size(2) == size(24)


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_images_have_second_derivatives(name):
  """d/dparams of d/dx along v is d/dx of <d/dparams, v>: what the exact data
  gradient needs, through pooling and normalization.
  """
  model = TINY[name]
  variables = variables_of(name)
  stats = variables["batch_stats"]
  x = images(3)
  direction = jax.tree.map(
    lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(
      leaf.shape
    ),
    variables["params"],
  )

  def loss(params, x):
    variables = {"params": params, "batch_stats": stats}
    _, logits = model.apply(variables, x, train=False)
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

  @jit
  def both(params, x):
    _, forward = jax.jvp(
      lambda params: jax.grad(loss, 1)(params, x), (params,), (direction,)
    )
    reverse = jax.grad(
      lambda x: optax.tree.vdot(jax.grad(loss)(params, x), direction)
    )(x)
    return forward, reverse

  forward, reverse = both(variables["params"], x)
  scale = float(jnp.abs(forward).max())
  assert scale > 0
  np.testing.assert_allclose(forward, reverse, atol=1e-5 * scale)


# -- sharding ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "resnet", "vit"])
def test_eight_devices_are_one(name):
  model = TINY[name].clone(dropout=0.5)
  if name in NORMALIZED:
    model = model.clone(batch_norm="update")
  variables, x = variables_of(name), jnp.asarray(images(8))

  def gradient(variables, x):
    def loss(params):
      features, logits, new = make_apply_fn(model)(
        {**variables, "params": params},
        x,
        train=True,
        rngs={"dropout": jax.random.key(3)},
      )
      return jnp.mean(jnp.sin(3 * logits)), (features, logits, new)

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])

  expected = jit(gradient)(variables, x)
  mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
  placed = jax.device_put(variables, shardings(variables, mesh, RULES))
  rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
  with jax.set_mesh(mesh):
    found = jit(gradient)(placed, jax.device_put(x, rows))
  chex.assert_trees_all_close(
    jax.device_get(found), jax.device_get(expected), **CLOSE
  )
  # Every device computes its own rows, not everybody's.
  features = found[0][1][0]
  assert features.addressable_shards[0].data.shape[0] == 2


def test_any_number_of_rows_evaluates_on_a_mesh():
  variables = variables_of("resnet")
  mesh = make_mesh({"data": 4, "fsdp": 2})
  expected = run(TINY["resnet"], variables, images(7))
  placed = jax.device_put(variables, shardings(variables, mesh, RULES))
  with jax.set_mesh(mesh):
    found = run(TINY["resnet"], placed, images(7))
  chex.assert_trees_all_close(
    jax.device_get(found), jax.device_get(expected), **CLOSE
  )


def test_a_model_runs_inside_shard_map():
  """As norms of the gradient by device need it."""
  model, variables = TINY["cnn"], variables_of("cnn")
  mesh = make_mesh({"data": 4, "fsdp": 2})

  def logits(variables, x):
    return model.apply(variables, x, train=False)[1]

  with jax.set_mesh(mesh):
    by_device = jax.shard_map(
      logits, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P("data")
    )
    found = jit(by_device)(variables, images(8))
  expected = run(model, variables, images(8))[1]
  np.testing.assert_allclose(found, expected, **CLOSE)
