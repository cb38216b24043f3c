"""One example of each objective on "ABCDEFGHIJ", token for token."""

from unittest import mock

import numpy as np
import pytest

from birdie import corruption
from birdie.controls import ObjectiveConfig
from birdie.objectives import OBJECTIVES, Example, ask
from birdie.packing import Rows
from birdie.vocab import byte_vocabulary
from common.data.tokenizers import ByteTokenizer
from common.rngs import np_rng

VOCAB = byte_vocabulary()
LETTERS = ByteTokenizer().encode("ABCDEFGHIJ")
BC_AND_GH = (np.array([1, 6]), np.array([2, 2]))
TWO_SPANS = {"corruption_rate": 0.4, "mean_span": 2.0}
SPAN_DE = {"min_span": 2, "max_span": 2, "min_delimiter": 1, "max_delimiter": 2}


def scripted(**results):
  """A generator whose methods return what is listed, call by call."""
  rng = mock.Mock(spec=np.random.Generator)
  rng.random.return_value = 0.5
  for name, values in results.items():
    getattr(rng, name).side_effect = [np.array(v) for v in values]
  return rng


def de_between_bc_and_f():
  # Widths of delimiters, span and delimiter; where the first one begins.
  widths = [[[2], [1], [1]], [2], [1]]
  return scripted(integers=widths, permutation=[[0]])


def worked(objective, inputs, labels, *, rng=None, name=None, **controls):
  expected = np.array(inputs.split(), int), np.array(labels.split(), int)
  return pytest.param(objective, controls, rng, *expected, id=name or objective)


TEXT = "129 130 131 132 133 134 135 136 137 138"


@pytest.mark.parametrize(
  ("objective", "controls", "rng", "inputs", "labels"),
  [
    worked("next_token_prediction", "4", TEXT),
    worked(
      "prefix_language_modeling",
      "5 129 130 131 132 133 134",
      "135 136 137 138",
      prefix_frac=0.6,
      jitter=0.0,
    ),
    worked(
      "infilling",
      "6 129 320 132 133 134 321 137 138",
      "320 130 131 321 135 136 322",
      **TWO_SPANS,
    ),
    worked(
      "infilling",
      "6 129 320 132 133 134 321 137 138",
      "320 130 131 321 135 136",
      name="without_final_sentinel",
      final_sentinel=False,
      **TWO_SPANS,
    ),
    worked(
      "infilling",
      "6 129 320 132 133 134 321 137 138",
      "130 131 320 135 136 321",
      name="sentinel_after",
      sentinel_position="after",
      **TWO_SPANS,
    ),
    worked(
      "autoencoding", "8 129 320 132 133 134 321 137 138", TEXT, **TWO_SPANS
    ),
    worked(
      "autoencoding_with_deshuffling",
      "9 321 137 138 129 320 132 133 134",
      TEXT,
      rng=lambda: scripted(permutation=[[2, 0, 1]]),
      **TWO_SPANS,
    ),
    worked("copying", f"10 {TEXT}", TEXT),
    worked(
      "deshuffling",
      "11 129 136 131 133 132 134 135 130 137 138",
      TEXT,
      rng=lambda: scripted(choice=[[7, 4, 3, 1]]),
      shuffle_rate=0.4,
    ),
    worked(
      "selective_copying",
      f"12 13 130 131 14 134 15 {TEXT}",
      "132 133 16",
      rng=de_between_bc_and_f,
      **SPAN_DE,
    ),
    worked(
      "selective_copying",
      f"12 15 {TEXT} 13 130 131 14 134",
      "132 133 16",
      name="context_query",
      rng=de_between_bc_and_f,
      order="context_query",
      **SPAN_DE,
    ),
  ],
)
def test_worked_examples(objective, controls, rng, inputs, labels, monkeypatch):
  # T5's rule never leaves text behind the last span; the example does.
  monkeypatch.setattr(corruption, "random_spans", lambda *_: BC_AND_GH)
  rng = rng() if rng else np_rng(0, "test")
  settings = {
    "paradigm": VOCAB.paradigms[objective],
    "paradigm_append_prob": 0.0,
    "min_length": 1,
    **controls,
  }
  cfg = ObjectiveConfig(VOCAB, **settings)
  example = OBJECTIVES[objective](LETTERS, cfg, rng, 1000)
  assert isinstance(example, Example)
  np.testing.assert_array_equal(example.inputs, inputs)
  np.testing.assert_array_equal(example.labels, labels)
  assert example.used == 10

  n, m = len(inputs), len(labels)
  rows = Rows(1, n + m, gen=VOCAB.gen)
  rows.place(0, example, 0)
  packed = {name: array[0].tolist() for name, array in rows.arrays.items()}
  assert packed["tokens"] == [*inputs, 1, *labels[:-1]]
  assert packed["targets"] == [0] * n + [*labels]
  assert packed["loss_weights"] == [0] * n + [1] * m
  assert packed["prefix"] == [True] * n + [False] * m
  assert packed["positions"] == [*range(n + m)]


def test_several_answers_are_separated():
  cfg = ObjectiveConfig(VOCAB, num_spans=2)
  edges = np.array([[6, 7, 8, 9], [1, 2, 4, 5]])
  inputs, labels = ask(LETTERS, edges, cfg)
  queries = [13, 135, 14, 137, 13, 130, 14, 133]
  np.testing.assert_array_equal(inputs, [*queries, 15, *LETTERS])
  np.testing.assert_array_equal(labels, [136, 3, 131, 132, 16])
