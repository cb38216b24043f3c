"""The classifiers as they are made: sizes, initial values, shardings,
configurations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.optim import make_optimizer
from common.parallel import make_mesh, shardings
from common.state import TrainState
from common.tree import count_params
from udim.models import (
  DEFAULTS,
  RULES,
  ResNet,
  SmallCNN,
  ViT,
  WideResNet,
  init_variables,
  make_model,
)


@pytest.mark.parametrize(
  ("name", "classes", "shape", "count"),
  [
    ("resnet18", 1000, (224, 224, 3), 11_689_512),
    ("resnet50", 1000, (224, 224, 3), 25_557_032),
    ("vit_s16", 1000, (224, 224, 3), 22_050_664),
    ("vit_b16", 1000, (224, 224, 3), 86_567_656),
    ("wrn28_10", 10, (32, 32, 3), 36_479_194),
    ("cnn", 10, (8, 8, 1), 9_930),
  ],
)
def test_the_published_sizes(name, classes, shape, count):
  assert count_params(_shapes(name, classes, shape)["params"]) == count


def _shapes(name, classes, shape):
  model = make_model({"name": name}, classes)
  init = functools.partial(init_variables, model, image_shape=shape)
  return jax.eval_shape(init, jax.random.key(0))


# -- initial values ------------------------------------------------------------


def test_resnets_start_as_torchvisions():
  """Kernels by He from the outputs; scales 1, of every block; statistics."""
  model = ResNet(5, stages=(1, 1), width=32, bottleneck=True)
  init = functools.partial(init_variables, model, image_shape=(16, 16, 3))
  variables = jax.jit(init)(jax.random.key(0))
  params, d = variables["params"], 256
  for kernel in (params["stem"], params["layer2_0"]["conv3"]):
    height, width, _, outputs = kernel["kernel"].shape
    std = np.sqrt(2 / (height * width * outputs))
    assert np.std(kernel["kernel"]) == pytest.approx(std, rel=0.05)
  for layer in ("layer1_0", "layer2_0"):
    for norm in ("bn1", "bn2", "bn3", "downsample_bn"):
      np.testing.assert_array_equal(params[layer][norm]["scale"], 1)
      np.testing.assert_array_equal(params[layer][norm]["bias"], 0)
  for leaf in params["head"].values():  # torch.nn.Linear
    assert np.abs(leaf).max() <= d**-0.5
  assert np.std(params["head"]["kernel"]) == pytest.approx(
    d**-0.5 / np.sqrt(3), rel=0.05
  )
  np.testing.assert_array_equal(variables["batch_stats"]["stem_bn"]["mean"], 0)
  np.testing.assert_array_equal(variables["batch_stats"]["stem_bn"]["var"], 1)


def test_vits_start_as_timms():
  model = ViT(20, width=64, depth=3, heads=2)
  init = functools.partial(init_variables, model, image_shape=(32, 32, 3))
  params = jax.jit(init)(jax.random.key(0))["params"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if path[-1].key == "bias":
      np.testing.assert_array_equal(leaf, 0)
    elif path[-1].key == "scale":
      np.testing.assert_array_equal(leaf, 1)
    elif leaf.size > 1000:
      assert np.std(leaf) == pytest.approx(0.02, rel=0.05)
  kernel = params["layers"]["up"]["kernel"]
  assert not np.allclose(kernel[0], kernel[1])  # each layer has its own


# -- sharding rules ------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
@pytest.mark.parametrize(
  "name", ["resnet18", "resnet50", "wrn28_10", "vit_s16", "vit_b16", "cnn"]
)
def test_the_rules_place_a_whole_state(name, optimizer):
  """Seven classes: divided by no mesh. Averages of the parameters too."""
  shape = (32, 32, 3) if name in ("wrn28_10", "cnn") else (224, 224, 3)
  variables = _shapes(name, 7, shape)
  tx, _ = make_optimizer({"name": optimizer, "lr": 1e-3}, 10)

  def create(variables):
    extra = {
      "batch_stats": variables["batch_stats"],
      "average": variables["params"],
      "history": jnp.zeros((6,)),
    }
    return TrainState.create(variables["params"], tx, extra)

  state = jax.eval_shape(create, variables)
  mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
  placed = shardings(state, mesh, RULES)
  assert placed.extra["average"] == placed.params
  for leaf in jax.tree.leaves(placed.extra["batch_stats"]):
    assert leaf.spec == jax.P()
  held = jax.tree.map(
    lambda s, p: np.prod(s.shard_shape(p.shape)), placed.params, state.params
  )
  # All but the head's columns, the stem and vectors is cut in four.
  assert sum(jax.tree.leaves(held)) < 0.3 * count_params(state.params) + 2e4


# -- configurations ------------------------------------------------------------


@pytest.mark.parametrize(
  ("cfg", "model"),
  [
    ({"name": "cnn"}, SmallCNN(7)),
    ({}, SmallCNN(7)),
    ({"name": "cnn", "dropout": 0.1, "batch_norm": "update"},
     SmallCNN(7, dropout=0.1)),
    ({"name": "resnet18", "dropout": 0.5}, ResNet(7, dropout=0.5)),
    ({"name": "resnet50", "batch_norm": "update", "remat": True},
     ResNet(7, (3, 4, 6, 3), bottleneck=True, batch_norm="update",
            remat=True)),
    ({"name": "wrn28_4", "block_dropout": 0.3},
     WideResNet(7, widen=4, block_dropout=0.3)),
    ({"name": "vit_s16", "dtype": "bfloat16"}, ViT(7, dtype=jnp.bfloat16)),
    ({"name": "vit_b16", "pretrained": "x.pth"},
     ViT(7, width=768, heads=12)),
  ],
  ids=str,
)  # fmt: skip
def test_make_model_reads_a_configuration(cfg, model):
  assert make_model(cfg, 7) == model


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"name": "resnet19"}, "did you mean 'resnet18'"),
    ({"name": "wrn28_0"}, "wrn28_10"),
    ({"batch_norm": "freeze"}, "did you mean 'frozen'"),
    ({"dtype": "float16"}, "bfloat16"),
    ({"dropout": 1.0}, "below 1"),
    ({"block_dropout": -0.1}, "at least 0"),
    ({"block_dropout": 0.3}, "no use for it"),
    ({"remat": True}, "no use for it"),
  ],
  ids=str,
)
def test_a_wrong_configuration_is_refused(change, message):
  ((key, value),) = change.items()
  with pytest.raises(UserError, match=rf"model\.{key}={value!r}.*{message}"):
    make_model({**DEFAULTS, **change}, 7)


def test_unknown_keys_and_no_classes_are_refused():
  with pytest.raises(UserError, match=r"unknown key 'drop_out'.*'dropout'"):
    make_model({"drop_out": 0.5}, 7)
  with pytest.raises(UserError, match="num_classes=0"):
    make_model({}, 0)


def test_patches_must_tile_the_image():
  model = make_model({"name": "vit_s16"}, 7)
  init = functools.partial(init_variables, model, image_shape=(224, 230, 3))
  with pytest.raises(UserError, match=r"224 x 230 .* 16 x 16"):
    jax.eval_shape(init, jax.random.key(0))
