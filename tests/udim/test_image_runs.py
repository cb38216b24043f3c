"""Published configurations, shrunk: from files on disk to a trained model."""

import numpy as np
import pytest
from PIL import Image

from common.metrics import read_metrics
from configs.udim import get_config
from udim.selection import of_role
from udim.train import train_and_evaluate

PACS = ("art_painting", "cartoon", "photo", "sketch")
pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def pacs(tmp_path_factory):
  """DomainBed's layout, ten images of each of three classes in a domain."""
  root = tmp_path_factory.mktemp("PACS")
  rng = np.random.default_rng(0)
  for domain in PACS:
    for name in ("dog", "elephant", "guitar"):
      folder = root / domain / name
      folder.mkdir(parents=True)
      for i in range(10):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
  return root


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
  """CIFAR-10-C with two corruptions, and CIFAR-10."""
  root = tmp_path_factory.mktemp("cifar")
  rng = np.random.default_rng(0)

  def images(count):
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)

  for name in ("fog", "snow"):
    np.save(root / f"{name}.npy", images(5 * 8))
  np.save(root / "labels.npy", np.tile(np.arange(8), 5))
  for split, count in (("train", 40), ("test", 8)):
    np.save(root / f"{split}_images.npy", images(count))
    np.save(root / f"{split}_labels.npy", np.arange(count) % 10)
  return root


def run(config, workdir):
  """Four steps of UDIM, two of them without the term, on a small network."""
  config.algorithm = "udim"
  config.num_steps = 4
  config.compile_cache = ""
  config.methods.udim.warm_up_percent = 50.0
  config.model.update({"name": "cnn", "pretrained": "", "batch_norm": "frozen"})
  config.data.update({"workers": 0, "threads": 2, "images_per_domain": 8})
  config.evaluation.update({"every": 2, "batch_size": 16})
  config.checkpoint.every = 4
  config.log.every = 1
  state = train_and_evaluate(config, str(workdir), quiet=True)
  lines = read_metrics(workdir)
  assert int(state.step) == 4
  active = {line["step"]: line["train/active"] for line in lines
            if "train/active" in line}  # fmt: skip
  assert active == {1: 0, 2: 0, 3: 1, 4: 1}
  return lines[-1]


@pytest.mark.parametrize(
  ("variant", "targets"),
  [
    ("pacs", {"art_painting"}),
    ("pacs,single_source", {"cartoon", "photo", "sketch"}),
  ],
)
def test_folders(pacs, tmp_path, variant, targets):
  config = get_config(variant)
  config.data.source.path = str(pacs)
  config.data.image_size = 32
  last = run(config, tmp_path)
  seen = set(of_role(last, "target_main/accuracy"))
  assert seen == targets
  assert 0 <= last["val/accuracy"] <= 1


def test_cifar10c(cifar, tmp_path):
  config = get_config("cifar10c")
  config.data.source.update({"path": str(cifar), "clean_path": str(cifar)})
  config.data.source.corruptions = ("fog", "snow")
  last = run(config, tmp_path)
  seen = set(of_role(last, "target_main/accuracy"))
  assert seen == {f"{c}_{s}" for c in ("fog", "snow") for s in range(1, 6)}
