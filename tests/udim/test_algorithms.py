"""Every algorithm as one step of training, on a small model in plain jax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.optim import make_optimizer, swad
from common.parallel import make_mesh
from common.rngs import RngStreams
from common.state import TrainState
from configs.udim import get_config
from udim.algorithms import (
  NAMES,
  averaged,
  keep_schedule,
  make_algorithm,
  make_steps,
  split_name,
)
from udim.data import train_sharding

DOMAINS, IMAGES, FEATURES, CLASSES = 3, 8, 6, 4


def apply_fn(variables, images, *, train, rngs, rate=0.0):
  """tanh features behind batch statistics, dropout, a linear head."""
  params, stats = variables["params"], variables["batch_stats"]
  hidden = images.reshape(images.shape[0], -1) @ params["body"]["kernel"]
  mean = hidden.mean(0) if train else stats["mean"]
  features = jnp.tanh(hidden - stats["mean"][None])
  if train and rate:
    keep = jax.random.bernoulli(rngs["dropout"], 1 - rate, features.shape)
    features = features * keep / (1 - rate)
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  new = jax.lax.stop_gradient(0.9 * stats["mean"] + 0.1 * mean)
  return features, logits, {"mean": new}


def make_params(seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32)

  return {
    "body": {"kernel": draw(16, FEATURES)},
    "head": {"kernel": draw(FEATURES, CLASSES), "bias": draw(CLASSES)},
  }


def make_batch(seed=0, images=IMAGES):
  rng = np.random.default_rng(seed)
  shape = (DOMAINS, images)
  return {
    "image": jnp.asarray(rng.uniform(0, 1, (*shape, 4, 4, 1)), jnp.float32),
    "label": jnp.asarray(rng.integers(0, CLASSES, shape), jnp.int32),
  }


def make_config(name, **settings):
  config = get_config("train")
  config.algorithm = name
  config.optim.update({"name": "sgd", "lr": 0.1, "momentum": 0.0})
  config.optim.no_decay = ()
  config.num_steps = 10
  for key, value in settings.items():
    parent = config
    *path, last = key.split("__")
    for part in path:
      parent = parent[part]
    parent[last] = value
  return config


def make_state(config, *, seed=0, model=apply_fn):
  tx, _ = make_optimizer(config.optim, config.num_steps)
  algorithm = make_algorithm(config, model, tx)
  params = make_params()
  stats = {"mean": jnp.zeros(FEATURES)}
  extra = {
    "batch_stats": stats,
    "memory": algorithm.init_memory(DOMAINS, params),
    "seed": jnp.int32(seed),
  }
  averager = swad() if split_name(config.algorithm)[1] else None
  if averager:
    extra["swad"] = averager.init(averaged(params, stats))
  state = TrainState.create(params, algorithm.tx, extra)
  return algorithm, averager, state


def run(config, count=3, **options):
  algorithm, averager, state = make_state(config, **options)
  steps = make_steps(algorithm, averager)
  metrics = {}
  for i in range(count):
    state, metrics = steps.choose(i)(state, make_batch(i))
  return state, metrics


def gap(one, other):
  """The largest difference of two heads' biases."""
  first, second = (state.params["head"]["bias"] for state in (one, other))
  return float(jnp.abs(first - second).max())


@pytest.mark.parametrize("name", [*NAMES, "erm+swad", "udim+swad"])
def test_a_step_moves_the_parameters_and_reports(name):
  state, metrics = run(make_config(name))
  chex.assert_tree_all_finite(state.params)
  chex.assert_tree_all_finite(metrics)
  assert {"loss", "grad_norm", "update_norm", "param_norm"} <= set(metrics)
  assert int(state.step) == 3
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), state.params, make_params()
  )
  assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("name", NAMES)
def test_running_statistics_are_those_of_one_clean_forward_pass(name):
  if name == "mixup":
    pytest.skip("its forward pass is of mixed images")
  batch = make_batch()
  algorithm, averager, state = make_state(
    make_config(name, methods__udim__warm_up_percent=0.0,
                methods__perturbed_loss__warm_up_percent=0.0,
                methods__perturbed_sam__warm_up_percent=0.0)
  )  # fmt: skip
  variables = {"params": make_params(), "batch_stats": {"mean": jnp.zeros(6)}}
  # Images in the order that the model sees them in: means over all of them.
  images = batch["image"].reshape(-1, 4, 4, 1)
  expected = apply_fn(variables, images, train=True, rngs=None)[2]
  state, _ = make_steps(algorithm, averager).choose(0)(state, batch)
  chex.assert_trees_all_close(
    state.extra["batch_stats"], expected, atol=1e-6, rtol=0
  )


@pytest.mark.parametrize(
  "name",
  ["erm", "coral", "groupdro", "irm", "fishr", "mixup", "sam", "gam", "esam",
   "udim"],
)  # fmt: skip
def test_eight_devices_do_what_one_does(name):
  config = make_config(name, methods__udim__warm_up_percent=0.0)
  alone, told = run(config, 2)
  mesh = make_mesh({"data": 8})
  algorithm, averager, state = make_state(config)
  steps = make_steps(algorithm, averager)
  with jax.set_mesh(mesh):
    for i in range(2):
      batch = jax.device_put(make_batch(i), train_sharding(mesh))
      state, metrics = steps.choose(i)(state, batch)
  # Float32 sums in another order.
  chex.assert_trees_all_close(state.params, alone.params, atol=1e-5, rtol=0)
  chex.assert_trees_all_close(metrics, told, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["erm", "look_sam", "udim", "fishr"])
def test_other_seeds_use_the_same_programs(name):
  config = make_config(name)
  algorithm, averager, _ = make_state(config)
  steps = make_steps(algorithm, averager)
  for seed in range(3):
    _, _, state = make_state(config, seed=seed)
    for i in range(3):
      state, _ = steps.choose(i)(state, make_batch(i))
  programs = {steps.choose(i) for i in range(10)}
  assert sum(p._cache_size() for p in programs) == len(programs)


def test_the_seed_draws_the_dropout():
  model = functools.partial(apply_fn, rate=0.5)
  config = make_config("erm")
  one, _ = run(config, 2, model=model)
  same, _ = run(config, 2, model=model)
  other, _ = run(config, 2, model=model, seed=1)
  chex.assert_trees_all_equal(one.params, same.params)
  difference = jnp.abs(
    one.params["head"]["bias"] - other.params["head"]["bias"]
  )
  assert float(difference.max()) > 1e-4


@pytest.mark.parametrize("name", ["sam", "udim"])
@pytest.mark.parametrize("share", [True, False])
def test_passes_share_one_dropout_mask_or_draw_their_own(name, share):
  """Without a radius the second gradient is the first, if the masks are."""
  model = functools.partial(apply_fn, rate=0.5)
  settings = {f"methods__{name}__rho": 0.0, "share_dropout": share}
  config = make_config(name, **settings)
  config.methods.udim.warm_up_percent = 100.0
  sam, _ = run(config, 1, model=model)
  erm, _ = run(make_config("erm"), 1, model=model)
  assert (gap(sam, erm) < 1e-6) == share


@pytest.mark.parametrize("name", ["erm", "sam", "udim"])
def test_micro_batches_change_nothing(name):
  def model(variables, images, *, train, rngs):
    frozen = {**variables, "batch_stats": {"mean": jnp.zeros(FEATURES)}}
    return apply_fn(frozen, images, train=False, rngs=rngs)

  whole, _ = run(make_config(name), 2, model=model)
  parts, _ = run(make_config(name, accum=4), 2, model=model)
  chex.assert_trees_all_close(whole.params, parts.params, atol=1e-6, rtol=0)


def test_a_loss_that_is_no_mean_refuses_micro_batches():
  with pytest.raises(UserError, match=r"accum=2: the loss of 'coral'"):
    make_state(make_config("coral", accum=2))


def test_esam_refuses_micro_batches():
  with pytest.raises(UserError, match=r"accum=2: esam chooses images"):
    make_state(make_config("esam", accum=2))


@pytest.mark.parametrize("name", ["irm", "fishr"])
def test_the_optimizer_starts_afresh_where_the_penalty_sets_in(name):
  config = make_config(name)
  config.methods[name].anneal_steps = 2
  config.optim.update({"name": "adamw", "schedule": "linear", "b1": 0.9})
  algorithm, averager, state = make_state(config)
  steps, counts = make_steps(algorithm, averager), []
  for i in range(4):
    state, _ = steps.choose(i)(state, make_batch(i))
    adam = optax.tree.get_all_with_path(state.opt_state, "count")
    counts.append(sorted(int(count) for _, count in adam))
  # Adam's own count goes back; the schedule's is the run's clock.
  assert counts == [[1, 1], [2, 2], [1, 3], [2, 4]]


def test_schedules_keep_the_runs_clock():
  tx = optax.adam(optax.linear_schedule(1.0, 0.0, 10))
  params = {"w": jnp.ones(2)}
  old = state = tx.init(params)
  for _ in range(3):
    _, state = tx.update(params, state, params)
  kept = keep_schedule(old, state)
  assert int(optax.tree.get(kept, "count", filtering=_is_adam)) == 0
  assert int(kept[1].count) == 3
  chex.assert_trees_all_equal(kept[0], old[0])


def _is_adam(path, value):
  del value
  return any(getattr(k, "tuple_name", "") == "ScaleByAdamState" for k in path)


@pytest.mark.parametrize(
  ("name", "due"),
  [
    ("sam", [True] * 6),
    ("look_sam", [True, False, False, True, False, False]),
    ("udim", [False, False, True, False, True, False]),
  ],
)
def test_the_host_knows_which_steps_do_all_the_work(name, due):
  config = make_config(name, methods__look_sam__k=3)
  config.methods.udim.update({"warm_up_percent": 20.0, "every": 2})
  algorithm, _, _ = make_state(config)
  assert [algorithm.is_due(i) for i in range(6)] == due


def test_esam_looks_again_at_the_images_that_suffer_most():
  """With all weights and a quarter of the images, by hand."""
  config = make_config("esam")
  config.methods.esam.update({"weight_fraction": 1.0, "data_fraction": 0.25})
  state, _ = run(config, 1)
  batch, params = make_batch(), make_params()
  images = batch["image"].reshape(-1, 4, 4, 1)
  labels = batch["label"].reshape(-1)

  def losses(params):
    variables = {"params": params, "batch_stats": {"mean": jnp.zeros(FEATURES)}}
    logits = apply_fn(variables, images, train=True, rngs=None)[1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

  grads = jax.grad(lambda p: losses(p).mean())(params)
  scale = 0.05 / optax.tree.norm(grads)
  up = jax.tree.map(lambda p, g: p + scale * g, params, grads)
  growth = losses(up) - losses(params)
  chosen = jnp.argsort(-growth)[: images.shape[0] // 4]
  second = jax.grad(lambda p: losses(p)[chosen].mean())(up)
  decay = config.optim.weight_decay
  expected = jax.tree.map(
    lambda p, g: p - 0.1 * (g + decay * p), params, second
  )
  chex.assert_trees_all_close(state.params, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["perturbed_loss", "perturbed_sam"])
def test_controls_add_a_gradient_on_the_perturbed_images(name):
  """G_sam + lambda1 grad L(x + rho_x direction), at theta or uphill of it."""
  config = make_config(name)
  config.methods[name].update(
    {"warm_up_percent": 0.0, "lambda1": 0.7, "rho_x": 0.3, "clip_range": ()}
  )
  state, _ = run(config, 1)
  batch, params = make_batch(), make_params()
  images = jnp.swapaxes(batch["image"], 0, 1).reshape(-1, 4, 4, 1)
  labels = jnp.swapaxes(batch["label"], 0, 1).reshape(-1)

  def loss(params, images):
    variables = {"params": params, "batch_stats": {"mean": jnp.zeros(FEATURES)}}
    logits = apply_fn(variables, images, train=True, rngs=None)[1]
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  grads = jax.grad(loss)(params, images)
  scale = 0.05 / optax.tree.norm(grads)
  up = jax.tree.map(lambda p, g: p + scale * g, params, grads)
  second, moves = jax.grad(loss, argnums=(0, 1))(up, images)
  length = jnp.sqrt(jnp.sum(moves**2, axis=(1, 2, 3), keepdims=True))
  moved = images + 0.3 * moves / length
  third = jax.grad(loss)(params, moved)
  if name == "perturbed_sam":
    scale = 0.05 / optax.tree.norm(third)
    up = jax.tree.map(lambda p, g: p + scale * g, params, third)
    third = jax.grad(loss)(up, moved)
  decay = config.optim.weight_decay
  expected = jax.tree.map(
    lambda p, g, h: p - 0.1 * (g + 0.7 * h + decay * p), params, second, third
  )
  chex.assert_trees_all_close(state.params, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"algorithm": "udmi"}, r"algorithm='udmi'; did you mean 'udim'"),
    ({"algorithm": "sam+swa"}, r"algorithm='sam\+swa'"),
    ({"methods__udim__rho_x": -1.0}, r"rho_x=-1.0 must be a number"),
    ({"methods__udim__normalise": "batsch"}, r"did you mean 'batch'"),
    ({"methods__udim__clip_range": (0.0,)}, r"clip_range=\(0.0,\)"),
    ({"methods__udim__warm_up_percent": 101.0}, r"warm_up_percent=101.0"),
  ],
)
def test_mistakes_are_named(change, message):
  name = change.get("algorithm", "udim")
  with pytest.raises(UserError, match=message):
    make_state(make_config(name, **change))


def test_an_unknown_setting_is_refused():
  config = make_config("sam")
  with config.unlocked():
    config.methods.sam.rh = 1.0
  with pytest.raises(UserError, match=r"methods.sam: unknown key 'rh'"):
    make_state(config)


def test_the_same_keys_make_the_same_step():
  key = RngStreams(3, ("step",))(5)["step"]
  traced = jax.jit(lambda seed: RngStreams(seed, ("step",))(5)["step"])(3)
  chex.assert_trees_all_equal(
    jax.random.key_data(key), jax.random.key_data(traced)
  )
