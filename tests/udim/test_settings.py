"""Settings are checked when they are made; quirks override the rest."""

import dataclasses

import numpy as np
import optax
import pytest

from common.errors import UserError
from udim import UdimConfig

GOOD = [
  {},
  {"lambda1": 0, "rho": 0, "rho_x": 0},
  {"lambda1": optax.constant_schedule(1.0), "rho": np.float32(0.1)},
  {"rho_x": optax.linear_schedule(0, 1, 10), "normalise": "sign"},
  {"clip_range": (-2.1, 2.6), "terms": ("norm",)},
  {"clip_range": [0, 1], "terms": ["norm", "pen"]},
  {"start_step": np.int64(5), "every": 4, "domain_reduce": "mean"},
  {"mode": "perturbed_sam", "perturbation": "style", "data_grad": "plain"},
  {"label_smoothing": 0.1, "reference_quirks": True},
  {"term_images": np.int32(8)},
]


@pytest.mark.parametrize("settings", GOOD)
def test_good_settings_pass(settings):
  cfg = UdimConfig(**settings)
  assert all(getattr(cfg, name) == value for name, value in settings.items())
  hash(dataclasses.replace(cfg, clip_range=None, terms=("pen",)))


BAD = [
  ({"lambda1": -1}, ["lambda1=-1", "from 0", "schedule"]),
  ({"rho": float("nan")}, ["rho=nan"]),
  ({"rho": True}, ["rho=True"]),
  ({"rho_x": "1"}, ["rho_x='1'"]),
  ({"normalise": "samples"}, ["normalise='samples'", "'sample'"]),
  ({"data_grad": "quick"}, ["data_grad='quick'", "fast, exact, plain"]),
  ({"clip_range": (1, 0)}, ["clip_range=(1, 0)", "(low, high)"]),
  ({"clip_range": (0, 1, 2)}, ["clip_range=(0, 1, 2)"]),
  ({"clip_range": 1.0}, ["clip_range=1.0", "None"]),
  ({"detach_source": "False"}, ["detach_source='False'", "True or False"]),
  ({"domain_reduce": "max"}, ["domain_reduce='max'", "sum, mean"]),
  ({"terms": "pen"}, ["terms='pen'", "tuple"]),
  ({"terms": ()}, ["terms=()"]),
  ({"terms": ("pen", "pen")}, ["terms=('pen', 'pen')"]),
  ({"terms": ("pen", "gn")}, ["terms=('pen', 'gn')", "'norm'"]),
  ({"start_step": -1}, ["start_step=-1", "from 0"]),
  ({"start_step": 0.5}, ["start_step=0.5", "integer"]),
  ({"every": 0}, ["every=0", "from 1"]),
  ({"term_images": -1}, ["term_images=-1", "from 0"]),
  ({"term_images": 0.5}, ["term_images=0.5", "integer"]),
  ({"mode": "sam"}, ["mode='sam'", "perturbed_sam"]),
  ({"perturbation": "styl"}, ["perturbation='styl'", "'style'"]),
  ({"share_dropout": 1}, ["share_dropout=1"]),
  ({"label_smoothing": 1.0}, ["label_smoothing=1.0", "[0, 1)"]),
  ({"reference_quirks": None}, ["reference_quirks=None"]),
]


@pytest.mark.parametrize(("settings", "words"), BAD)
def test_mistakes_are_one_line(settings, words):
  with pytest.raises(UserError) as error:
    UdimConfig(**settings)
  assert all(word in str(error.value) for word in ["udim", *words])
  assert "\n" not in str(error.value)


def test_an_unknown_setting_is_refused():
  with pytest.raises(TypeError, match="rhox"):
    UdimConfig(rhox=1.0)


@pytest.mark.parametrize(
  ("settings", "due"),
  [
    ({}, [0, 1, 2, 3, 4, 5]),
    ({"start_step": 2, "every": 3}, [2, 5]),
    ({"lambda1": 0}, []),
    ({"lambda1": lambda step: step > 3, "every": 2}, [4]),
  ],
)
def test_what_is_due(settings, due):
  cfg = UdimConfig(**settings)
  assert [step for step in range(6) if cfg.is_due(step)] == due


def test_quirks_override_and_their_absence_changes_nothing():
  cfg = UdimConfig(
    rho_x=10.0, clip_range=(0, 1), terms=("pen",), reference_quirks=True
  )
  found = dataclasses.asdict(cfg.resolved())
  plain = dataclasses.asdict(cfg)
  changed = {name for name in found if found[name] != plain[name]}
  assert changed == {"normalise", "data_grad", "clip_range", "share_dropout"}
  assert found["normalise"] == "batch"
  assert found["data_grad"] == "exact"
  assert found["clip_range"] is None
  assert cfg.resolved().resolved() == cfg.resolved()
  cfg = dataclasses.replace(cfg, reference_quirks=False)
  assert cfg.resolved() is cfg
