"""Handwritten digits in domains: 1797 real images that come with the package.

The images are the UCI optical digits (see `udim/assets/README.md`), 8 x 8 with
17 grey levels, here float32 [8, 8, 1] in [0, 1]. Everything is a function of
the seed.
"""

import pathlib
from typing import Any

import numpy as np

from common.rngs import np_rng
from udim.corruptions import (
  FAMILIES,
  SEVERITIES,
  VALIDATION_FAMILIES,
  corrupt,
  rotate,
)
from udim.domains import ArrayExamples, Domain, DomainSet

CLASSES = tuple("0123456789")
ANGLES = (0, 15, 30, 45, 60, 75)
NUM_TRAIN = 1198
VALIDATION_SEVERITIES = (2, 4)
# Name -> how often the colour contradicts the label: DomainBed's ColoredMNIST.
COLORS = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}
LABEL_NOISE = 0.25


def load_digits() -> tuple[np.ndarray, np.ndarray]:
  """The images, float32 [1797, 8, 8, 1] in [0, 1], and labels, int32 [1797]."""
  path = pathlib.Path(__file__).parent / "assets" / "digits.npz"
  with np.load(path, allow_pickle=False) as data:
    images, labels = data["images"], data["labels"]
  return (images[..., None] / 16).astype(np.float32), labels.astype(np.int32)


def _shuffled(seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
  images, labels = load_digits()
  order = np_rng(seed, f"{name}/order").permutation(len(labels))
  return images[order], labels[order]


def digits_c(cfg: Any) -> DomainSet:
  """Digits-C: clean digits to train on, other digits clean and corrupted.

  Domains: `clean` (1198 images, the source), `clean_test` (the other 599) and
  `blur_3` and so on: those 599 under each corruption and severity. For the
  choice of hyper-parameters, `rotation_2` and so on: the 1198 under kinds of
  change that are not among the targets.

  Args:
    cfg: [`seed`], [`corruptions`], [`severities`]; see `load_domains`.

  Raises:
    UserError: for an unknown corruption or severity.
  """
  seed = cfg.get("seed", 0)
  images, labels = _shuffled(seed, "digits_c")
  test, test_labels = images[NUM_TRAIN:], labels[NUM_TRAIN:]
  train = ArrayExamples(images[:NUM_TRAIN], labels[:NUM_TRAIN])
  domains = [
    Domain("clean", train),
    Domain("clean_test", ArrayExamples(test, test_labels)),
  ]
  for family in cfg.get("corruptions", ()) or FAMILIES:
    for severity in cfg.get("severities", SEVERITIES):
      rng = np_rng(seed, f"digits_c/{family}", int(severity))
      corrupted = corrupt(test, family, severity, rng=rng)
      examples = ArrayExamples(corrupted, test_labels)
      domains.append(Domain(f"{family}_{severity}", examples))
  validations = {}
  for family in VALIDATION_FAMILIES:
    for severity in VALIDATION_SEVERITIES:
      name = f"{family}_{severity}"
      rng = np_rng(seed, f"digits_c/{family}", severity)
      changed = corrupt(train.images, family, severity, rng=rng)
      domains.append(Domain(name, ArrayExamples(changed, train.labels)))
      validations[name] = "clean"
  return DomainSet(
    name="digits_c",
    classes=CLASSES,
    domains=tuple(domains),
    sources=("clean",),
    references=("clean_test",),
    validations=validations,
  )


def digits_rot(cfg: Any) -> DomainSet:
  """Digits-Rot: image j of the shuffled digits at angle j mod 6.

  The angles 0, 15, ..., 75 name the domains; their images are disjoint, as
  those of DomainBed's RotatedMNIST are. Rotation is counter-clockwise, with
  bilinear interpolation.

  Args:
    cfg: [`seed`]; see `load_domains`.
  """
  images, labels = _shuffled(cfg.get("seed", 0), "digits_rot")
  domains = []
  for i, angle in enumerate(ANGLES):
    turned = rotate(images[i :: len(ANGLES)], angle)
    examples = ArrayExamples(turned, labels[i :: len(ANGLES)])
    domains.append(Domain(str(angle), examples))
  return DomainSet(name="digits_rot", classes=CLASSES, domains=tuple(domains))


def digits_color(cfg: Any) -> DomainSet:
  """Digits-Color: is it below 5? The colour knows better, until it lies.

  DomainBed's ColoredMNIST recipe on disjoint thirds of the shuffled digits:
  the label is flipped with probability 0.25; the colour is the label, flipped
  with probability 0.1, 0.2 and 0.9; the image stands in the channel of its
  colour, and the other one is black. Images are [8, 8, 2].

  Args:
    cfg: [`seed`]; see `load_domains`.
  """
  seed = cfg.get("seed", 0)
  images, digits = _shuffled(seed, "digits_color")
  domains = []
  for i, (name, flip) in enumerate(COLORS.items()):
    part = images[i :: len(COLORS)]
    rng = np_rng(seed, "digits_color/flips", i)
    below = digits[i :: len(COLORS)] < 5
    labels = below ^ (rng.random(len(part)) < LABEL_NOISE)
    colors = labels ^ (rng.random(len(part)) < flip)
    channels = colors[:, None, None, None] == np.arange(2)
    colored = np.where(channels, part, np.float32(0))
    domains.append(
      Domain(name, ArrayExamples(colored, labels.astype(np.int32)))
    )
  return DomainSet(
    name="digits_color", classes=("5 to 9", "0 to 4"), domains=tuple(domains)
  )
