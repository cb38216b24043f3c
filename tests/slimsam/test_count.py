"""Parameters and multiply-accumulates: the published models' to the digit."""

import json
import subprocess
import sys

import pytest

from common.errors import UserError
from slimsam.cost import decoder_macs, encoder_macs, xla_macs
from slimsam.count import counts
from slimsam.settings import preset
from slimsam.weights import save_model

# Parameters of the encoder; G of: authors' counter, convolutions and linear
# layers, attention, relative positions, all.
PUBLISHED = {
  "vit_b": (89_670_912, 368.859, 368.705, 114.881, 2.454, 486.039),
  "vit_l": (308_278_272, 1311.513, 1311.106, 176.777, 4.957, 1492.840),
  "vit_h": (637_026_048, 2732.976, 2732.300, 240.640, 7.602, 2980.541),
  "vit_p50": (23_897_216, 94.870, 94.793, 57.440, 1.227, 153.461),
  "vit_p77": (5_658_968, 20.925, 20.890, 25.130, 0.537, 46.557),
}
TOTALS = {
  "vit_b": 93_735_728, "vit_l": 312_343_088, "vit_h": 641_090_864,
  "vit_p50": 27_962_032, "vit_p77": 9_723_784,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
  found = counts(preset(name))
  params, *macs = PUBLISHED[name]
  assert found["encoder_params"] == params
  # The matrix of frequencies, 2 x 128, is counted; it is never trained.
  assert found["params"] == TOTALS[name]
  keys = ("reference", "conv_linear", "attention", "positions", "true")
  for key, expected in zip(keys, macs):
    # The table is rounded to millions, some of it cut.
    assert found[f"macs_{key}"] == pytest.approx(expected * 1e9, abs=1.1e6)


@pytest.mark.parametrize(
  ("ratio", "name"), [(0.5, "vit_p50"), (0.77, "vit_p77")]
)
def test_pruned_models_are_the_published_ones(ratio, name):
  assert counts(preset("vit_b"), ratio) == counts(preset(name))


def test_the_decoder_costs_3_billion():
  found = decoder_macs(preset("vit_b"))
  assert found.reference == pytest.approx(2.980e9, abs=5e5)
  assert 4 * found.conv_linear > found.reference > found.conv_linear


@pytest.mark.parametrize("name", ["vit_b", "vit_p77"])
def test_xla_agrees(name):
  """It counts what is done to each number as well, and no padding of qkv."""
  settings = preset(name)
  ratio = xla_macs(settings) / encoder_macs(settings.encoder).true
  assert 0.95 < ratio < 1.10


def test_the_command(tmp_path, tiny, draw):
  save_model(tmp_path / "tiny", draw(tiny), tiny)

  def run(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "slimsam.count", *map(str, arguments)],
      capture_output=True, text=True, check=False,
    )  # fmt: skip

  found = json.loads(run("vit_b", "--ratio=0.5", "--json").stdout)
  assert found["widths"]["embedding"] == 384
  assert found["encoder_params"] == 23_897_216
  assert found["macs_conv_linear"] == 94_793_367_552
  page = run(tmp_path / "tiny", "--xla").stdout
  assert "3 blocks" in page
  assert "XLA" in page
  wrong = run("vit_c")
  assert wrong.returncode == 2
  assert "no model 'vit_c'; did you mean" in wrong.stderr
  assert wrong.stderr.count("\n") == 1


def test_a_ratio_that_leaves_nothing(tiny):
  with pytest.raises(UserError, match="leaves nothing of a width of 24"):
    counts(tiny, 0.95)
