"""Random search: draws are functions of seed, algorithm and number."""

import math

import pytest

from common.errors import UserError
from configs.udim import get_config
from udim.search import draw_settings


def spaces(config, **ranges):
  config.search.spaces.udim = tuple((k, *v) for k, v in ranges.items())
  return config


def test_draw_0_is_the_configuration():
  assert draw_settings(get_config(), "udim", 0) == {}


def test_draws_are_pure():
  config = get_config()
  draws = [draw_settings(config, "udim", i) for i in range(1, 20)]
  assert draws == [draw_settings(config, "udim", i) for i in range(1, 20)]
  assert len({tuple(d.values()) for d in draws}) == 19
  config.search.seed = 1
  assert draws[0] != draw_settings(config, "udim", 1)
  assert draws[0].keys() == {
    "methods.udim.rho", "methods.udim.rho_x", "methods.udim.lambda1"
  }  # fmt: skip


def test_averaged_weights_are_drawn_like_their_algorithm():
  config = get_config()
  assert draw_settings(config, "udim+swad", 3) == draw_settings(
    config, "udim", 3
  )


def test_ranges():
  config = spaces(
    get_config(),
    rho=("log", 0.01, 1.0),
    rho_x=("uniform", 1.0, 3.0),
    normalise=("choice", "sample", "sign"),
  )
  draws = [draw_settings(config, "udim", i) for i in range(1, 400)]
  rho = sorted(d["methods.udim.rho"] for d in draws)
  assert 0.01 <= rho[0] < 0.012
  assert 0.85 < rho[-1] <= 1
  # Half of a logarithmic range lies below its geometric mean.
  assert math.isclose(math.log10(rho[199]), -1, abs_tol=0.15)
  rho_x = [d["methods.udim.rho_x"] for d in draws]
  assert 1 <= min(rho_x) < 1.05
  assert 2.95 < max(rho_x) <= 3
  chosen = [d["methods.udim.normalise"] for d in draws]
  assert 150 < chosen.count("sign") < 250


def test_all_algorithms_share_a_range():
  config = get_config()
  config.search.shared = (("optim.lr", "log", 1e-4, 1e-2),)
  assert set(draw_settings(config, "erm", 1)) == {"optim.lr"}
  assert "optim.lr" in draw_settings(config, "sam", 1)


@pytest.mark.parametrize(
  "range_",
  [("lag", 1.0, 2.0), ("log", 0.0, 1.0), ("log", 2.0, 1.0), ("uniform", 1.0),
   ("choice",)],
)  # fmt: skip
def test_ranges_that_are_none(range_):
  config = spaces(get_config(), rho=range_)
  with pytest.raises(UserError, match=r"search: methods\.udim\.rho has the"):
    draw_settings(config, "udim", 1)
