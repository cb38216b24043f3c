"""First parameters and positions are fairseq's."""

import re

import jax
import numpy as np
import pytest

from common.tree import names
from thor.layers import sinusoids
from thor.model import init_params
from thor.settings import Settings

WIDTH, HIDDEN = 64, 96
SETTINGS = Settings(
  300, width=WIDTH, hidden=HIDDEN, heads=4, encoder_layers=4, decoder_layers=2,
  experts=3, pattern=(True, False), gated=True, pre_norm=True,
  logits_bias=True, pad_id=5,
)  # fmt: skip
XAVIER = (6 / (2 * WIDTH)) ** 0.5
# Paths and the bound of a uniform draw; the first that is found counts.
BOUNDS = {
  r"(query|key|value)/kernel$": XAVIER / 2**0.5,
  r"(query|key|value)/bias$": WIDTH**-0.5,
  r"attention/out/kernel$": XAVIER,
  r"(experts|feed_forward)/up/(kernel|bias)$": WIDTH**-0.5,
  r"(experts|feed_forward)/down/(kernel|bias)$": HIDDEN**-0.5,
  r"experts/gate/kernel$": WIDTH**-0.5,
}
CONSTANTS = {
  r"attention/out/bias$": 0,
  r"^logits_bias$": 0,
  r"norm/scale$": 1,
  r"norm/bias$": 0,
}


@pytest.fixture(scope="module")
def drawn():
  """{path: NumPy array}."""
  params = jax.jit(init_params, static_argnums=0)(SETTINGS, jax.random.key(0))
  leaves = map(np.asarray, jax.tree.leaves(params))
  return dict(zip(jax.tree.leaves(names(params)), leaves))


def test_every_parameter_is_of_one_kind(drawn):
  for path in drawn.keys() - {"embedding"}:
    found = [p for p in (*BOUNDS, *CONSTANTS) if re.search(p, path)]
    assert len(found) == 1, path


@pytest.mark.parametrize("pattern", BOUNDS)
def test_weights_are_uniform_in_their_bounds(drawn, pattern):
  bound = BOUNDS[pattern]
  found = {k: v for k, v in drawn.items() if re.search(pattern, k)}
  assert found
  for path, value in found.items():
    size = value.size
    assert np.abs(value).max() <= bound, path
    # The chance that no value comes nearer is e^-10.
    assert np.abs(value).max() > bound * (1 - 10 / size), path
    # Five standard deviations of the estimates of a mean and a variance.
    sigma = bound / 3**0.5
    assert abs(value.mean()) < 5 * sigma * size**-0.5, path
    assert abs(value.var() / sigma**2 - 1) < 5 * (0.8 / size) ** 0.5, path


@pytest.mark.parametrize("pattern", CONSTANTS)
def test_norms_change_nothing_and_offsets_are_zero(drawn, pattern):
  found = [v for k, v in drawn.items() if re.search(pattern, k)]
  assert found
  for value in found:
    np.testing.assert_array_equal(value, CONSTANTS[pattern])


def test_embeddings_are_normal_and_padding_is_zero(drawn):
  table = drawn["embedding"]
  assert table.shape == (300, WIDTH)
  np.testing.assert_array_equal(table[5], 0)
  rest = np.delete(table, 5, axis=0) * WIDTH**0.5
  size = rest.size
  # Five standard deviations of the estimates.
  assert abs(rest.mean()) < 5 * size**-0.5
  assert abs(rest.var() - 1) < 5 * (2 / size) ** 0.5
  assert abs((rest**4).mean() - 3) < 5 * (96 / size) ** 0.5
  assert not np.any(np.all(rest == 0, axis=1))


def test_every_layer_part_and_expert_is_drawn_alone(drawn):
  """No two draws are alike, nor one a multiple of the other."""
  seen = {}
  for pattern, bound in BOUNDS.items():
    for path, value in drawn.items():
      if not re.search(pattern, path):
        continue
      axes = 2 if re.search(r"experts/(up|down)", path) else 1
      for i, one in enumerate(value.reshape(-1, *value.shape[axes:])):
        first = tuple(np.round(one.ravel()[:4] / bound, 4))
        assert first not in seen, (path, i, seen[first])
        seen[first] = path, i
  # 6 attentions and 2 across, of 4 kernels and 3 offsets; 3 layers of three
  # experts and a gate, 3 without.
  assert len(seen) == 8 * 7 + 3 * (3 * 4 + 1) + 3 * 4


def test_the_first_position_is_fairseqs():
  """Padding is 1 and the first position 2: sines, then cosines, of 2 and of
  2 / 10000.
  """
  table = sinusoids(2, 4, kind="fairseq")
  np.testing.assert_allclose(
    table[0], [0.909297, 0.000200, -0.416147, 1.0], atol=1e-6
  )
  np.testing.assert_allclose(table[1, 0], np.sin(3), atol=1e-6)


def test_the_first_position_is_marians():
  """From 0, and the last frequency is not 1 / 10000."""
  table = sinusoids(3, 4, kind="marian")
  np.testing.assert_array_equal(table[0], [0, 0, 1, 1])
  expected = [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)]
  np.testing.assert_allclose(table[2], expected, atol=1e-6)
