"""The variants of configs/udim.py: published settings, ranges around them."""

import pytest

from configs.udim import get_config
from udim.jobs import job_config, overrides_of, split_labels
from udim.search import draw_settings

DOMAINBED = {
  "pacs": (3e-5, 1e-4, 1e-3),
  "vlcs": (1e-5, 1e-4, 1e-3),
  "officehome": (1e-5, 1e-4, 5e-4),
  "terraincognita": (1e-5, 1e-4, 1e-3),
  "domainnet": (3e-5, 1e-6, 5e-4),
}


@pytest.mark.parametrize("name", DOMAINBED)
def test_domainbed(name):
  lr, decay, alpha = DOMAINBED[name]
  config = get_config(name)
  assert (config.optim.lr, config.optim.weight_decay) == (lr, decay)
  assert (config.optim.name, config.optim.decay) == ("adamw", "coupled")
  assert config.methods.sagm.alpha == alpha
  assert config.model.dropout == 0.5
  assert config.model.batch_norm == "frozen"
  steps, every = (15_001, 1000) if name == "domainnet" else (5001, 100)
  assert (config.num_steps, config.evaluation.every) == (steps, every)
  assert config.data.images_per_domain == 16
  assert get_config(f"{name},single_source").data.images_per_domain == 48
  assert config.methods.udim.warm_up_percent == 20
  assert config.methods.udim.rho_x == 560
  assert config.data.holdout == 0.2


@pytest.mark.parametrize("name", [*DOMAINBED, "", "digits_c", "digits_rot",
                                  "digits_color", "cifar10c"])  # fmt: skip
def test_every_label_of_a_table_is_one_and_defaults_lie_in_their_ranges(name):
  config = get_config(name)
  for label in split_labels(config.compare.algorithms):
    assert overrides_of(config, label)
  ranges = list(config.search.shared)
  for algorithm, space in config.search.spaces.items():
    ranges += [(f"methods.{algorithm}.{key}", *rest) for key, *rest in space]
  for key, kind, *bounds in ranges:
    value = config
    for part in key.split("."):
      value = value[part]
    if kind == "choice":
      assert value in bounds, key
    else:
      assert bounds[0] <= value <= bounds[1], (key, value)


def test_draws_of_domainbed_move_images_as_far_as_its_defaults():
  config = get_config("pacs")
  draws = [draw_settings(config, "udim", i) for i in range(1, 50)]
  assert all(140 <= d["methods.udim.rho_x"] <= 2240 for d in draws)
  assert len({d["optim.lr"] for d in draws}) == 49


def test_the_authors_form_has_the_authors_length():
  config = job_config(get_config("pacs"), "udim_reference", 0, {})
  assert config.methods.udim.reference_quirks
  assert config.methods.udim.rho_x == 10
  style = job_config(get_config("pacs"), "udim_style", 0, {})
  assert style.methods.udim.rho_x == 1
