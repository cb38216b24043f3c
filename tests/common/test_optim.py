"""The optimizers are optax's own; what is ours is the way they are put
together: schedules, clipping, decay masks, freezing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.optim import make_optimizer, make_schedule
from common.optim.make import DEFAULTS

LR = 0.1


def params():
  """Two scanned layers: what is a vector in one layer has two dimensions."""
  shapes = {
    "embedding": (7, 4),
    "layers": {
      "mlp": {"kernel": (2, 4, 5), "bias": (2, 5)},
      "norm_in": {"scale": (2, 4)},
      "gate": {"forget_bias": (2, 4)},
    },
    "head": {"kernel": (4, 7)},
  }
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda shape: rng.normal(size=shape).astype(np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def gradients(i):
  return jax.tree.map(lambda p: 3 * np.cos(p * (i + 1)), params())


def run(optimizer, steps=4):
  """The parameters after some steps on fixed gradients."""

  @jax.jit
  def step(grads, state, current):
    updates, state = optimizer.update(grads, state, current)
    return optax.apply_updates(current, updates), state

  current = params()
  state = jax.jit(optimizer.init)(current)
  for i in range(steps):
    current, state = step(gradients(i), state, current)
  return current, state


def make(num_steps=4, **cfg):
  return make_optimizer({"lr": LR, "schedule": "constant", **cfg}, num_steps)[0]


def kernels(tree):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "kernel" in jax.tree_util.keystr(path), tree
  )


@pytest.mark.parametrize(
  ("cfg", "expected"),
  [
    ({"name": "adamw"}, optax.adam(LR)),
    (
      {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.3},
      optax.adamw(LR, 0.8, 0.95, 1e-3, weight_decay=0.3, mask=kernels),
    ),
    (
      {"name": "lion", "b2": 0.99, "weight_decay": 0.3},
      optax.lion(LR, 0.9, 0.99, weight_decay=0.3, mask=kernels),
    ),
    ({"name": "sgd", "momentum": 0.0}, optax.sgd(LR)),
    ({"name": "sgd", "momentum": 0.8}, optax.sgd(LR, 0.8)),
    (
      {"name": "sgd", "momentum": 0.8, "nesterov": True},
      optax.sgd(LR, 0.8, nesterov=True),
    ),
    (
      {"name": "adafactor"},
      optax.adafactor(LR, multiply_by_parameter_scale=False),
    ),
    (
      {"name": "sgd", "momentum": 0.0, "clip_norm": 0.5},
      optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(LR)),
    ),
    ({"name": "sgd", "momentum": 0.0, "lr": 0.0}, optax.set_to_zero()),
    (
      {"weight_decay": 0.3, "decay": "coupled", "clip_norm": 0.5},
      optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.add_decayed_weights(0.3, mask=kernels),
        optax.adam(LR),
      ),
    ),
  ],
)  # fmt: skip
def test_equals_plain_optax(cfg, expected):
  # The same operations in the same order; jit may fuse them otherwise.
  chex.assert_trees_all_close(run(make(**cfg))[0], run(expected)[0], rtol=1e-6)


def test_the_schedule_is_the_one_that_is_returned():
  cfg = {"name": "sgd", "momentum": 0.0, "lr": LR, "warmup_steps": 2}
  optimizer, schedule = make_optimizer(cfg, 4)
  expected = optax.sgd(lambda step: schedule(step))
  chex.assert_trees_all_close(run(optimizer)[0], run(expected)[0], rtol=1e-6)
  # The first of them had a rate of 0.
  chex.assert_trees_all_equal(run(optimizer, steps=1)[0], params())


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    # Warm-up of 10, then 40 steps to the floor of 0.25 * 2.
    ("cosine", {0: 0, 5: 1, 10: 2, 20: 1.7803301, 30: 1.25, 50: 0.5, 90: 0.5}),
    ("linear", {0: 0, 5: 1, 10: 2, 20: 1.625, 30: 1.25, 50: 0.5, 90: 0.5}),
    ("rsqrt", {0: 0, 5: 1, 10: 2, 40: 1, 160: 0.5, 1000: 0.5}),
    ("constant", {0: 0, 5: 1, 10: 2, 30: 2, 50: 2, 90: 2}),
  ],
)  # fmt: skip
def test_schedule_values(name, expected):
  schedule = make_schedule(
    name, lr=2.0, num_steps=50, warmup_steps=10, final_ratio=0.25
  )
  got = {step: float(jax.jit(schedule)(step)) for step in expected}
  assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "rsqrt", "constant"])
def test_without_warmup_the_first_update_has_the_peak(name):
  schedule = make_schedule(name, lr=2.0, num_steps=50)
  assert float(schedule(0)) == 2.0
  rates = [float(schedule(step)) for step in range(50)]
  assert rates == sorted(rates, reverse=True)


def test_a_run_that_is_all_warmup():
  schedule = make_schedule("cosine", lr=1.0, num_steps=4, warmup_steps=4)
  assert [float(schedule(i)) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]


def decayed(**cfg):
  """Paths of the parameters that shrink when all gradients are zero."""
  optimizer = make(name="sgd", momentum=0.0, weight_decay=0.5, **cfg)
  before = params()
  zeros = jax.tree.map(np.zeros_like, before)
  state = jax.jit(optimizer.init)(before)
  updates, _ = jax.jit(optimizer.update)(zeros, state, before)
  shrunk = jax.tree.map(
    lambda u, p: bool(np.allclose(u, -LR * 0.5 * p)), updates, before
  )
  same = jax.tree.map(lambda u: not np.any(u), updates)
  assert jax.tree.leaves(shrunk) == [not s for s in jax.tree.leaves(same)]
  found = jax.tree_util.tree_leaves_with_path(shrunk)
  return {
    jax.tree_util.keystr(p, simple=True, separator="/")
    for p, yes in found
    if yes
  }


KERNELS = {"layers/mlp/kernel", "head/kernel"}


@pytest.mark.parametrize(
  ("cfg", "expected"),
  [
    ({}, KERNELS),  # by name: scanned scales and biases are matrices too
    ({"no_decay": ("head", "bias", "layers")}, {"embedding"}),
    ({"no_decay": ("^(?!embedding)",)}, {"embedding"}),
    ({"frozen": ("^head",)}, {"layers/mlp/kernel"}),
    # A pattern that finds frozen parameters only has found something.
    (
      {"frozen": ("^head",), "no_decay": ("^head", "embedding")},
      {
        "layers/mlp/kernel",
        "layers/mlp/bias",
        "layers/norm_in/scale",
        "layers/gate/forget_bias",
      },
    ),
  ],
)  # fmt: skip
def test_decay_goes_by_path(cfg, expected):
  assert decayed(**cfg) == expected


def test_an_empty_no_decay_decays_everything():
  assert len(decayed(no_decay=())) == 6


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "lion"])
def test_frozen_parameters_keep_their_bits_and_have_no_moments(name):
  cfg = {"name": name, "weight_decay": 0.1, "clip_norm": 1.0}
  after, state = run(make(frozen=("^layers/mlp/", "embedding"), **cfg))
  before = params()
  for path in (
    ("embedding",),
    ("layers", "mlp", "kernel"),
    ("layers", "mlp", "bias"),
  ):
    old, new = before, after
    for key in path:
      old, new = old[key], new[key]
    assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
  assert not np.any(after["head"]["kernel"] == before["head"]["kernel"])
  paths = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(state)
  ]
  assert any(path.endswith("head/kernel") for path in paths)
  assert not any("mlp" in path or "embedding" in path for path in paths)


def test_frozen_gradients_do_not_count_in_the_clipping():
  cfg = {"name": "sgd", "momentum": 0.0, "clip_norm": 1.0}
  after, _ = run(make(frozen=("^(?!head)",), **cfg), steps=1)
  step = after["head"]["kernel"] - params()["head"]["kernel"]
  # Clipped to norm 1 by itself, then times the rate.
  assert float(jnp.linalg.norm(step)) == pytest.approx(LR, rel=1e-5)


@pytest.mark.parametrize(
  ("cfg", "words"),
  [
    ({"name": "adamv"}, ["optim.name='adamv'", "'adamw'"]),
    ({"schedule": "cosin"}, ["optim.schedule='cosin'", "'cosine'"]),
    ({"weigth_decay": 0.1}, ["'weigth_decay'", "'weight_decay'"]),
    ({"warmup_steps": 5}, ["optim.warmup_steps=5", "4 steps"]),
    ({"warmup_steps": -1}, ["optim.warmup_steps=-1"]),
    ({"final_ratio": 1.5}, ["optim.final_ratio=1.5"]),
    ({"lr": -1.0}, ["optim.lr=-1.0"]),
    ({"lr": float("nan")}, ["optim.lr=nan"]),
    ({"clip_norm": -1.0}, ["optim.clip_norm=-1.0"]),
    ({"weight_decay": float("inf")}, ["optim.weight_decay=inf"]),
    ({"decay": "couple"}, ["optim.decay='couple'", "'coupled'"]),
    ({"frozen": "head"}, ["optim.frozen='head'", "list"]),
    ({"frozen": ("heads",)}, ["optim.frozen", "'heads'", "no parameter"]),
    ({"no_decay": ("heads",)}, ["optim.no_decay", "'heads'", "no parameter"]),
    ({"frozen": ("head", "(")}, ["'('", "regex"]),
  ],
)
def test_mistakes_are_one_line(cfg, words):
  with pytest.raises(UserError) as error:
    make(**cfg).init(params())
  assert all(word in str(error.value) for word in words)
  assert "\n" not in str(error.value)


def test_defaults_need_not_match():
  optimizer = make(weight_decay=0.1)
  optimizer.init({"kernel": jnp.ones((2, 2))})
  assert DEFAULTS["no_decay"]


def test_the_state_is_arrays_whose_shapes_need_no_arrays():
  optimizer = make(frozen=("head",), weight_decay=0.1, clip_norm=1.0)
  shapes = jax.eval_shape(optimizer.init, params())
  state = optimizer.init(params())
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)
