"""A run with random parameters, for tests of what translates with it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from thor.model import init_params
from thor.routing import Routing
from thor.settings import Settings
from thor.vocabulary import EOS, train_vocabulary

TEXT = "a cab can back a bad bag and bake a cake in a dark cabin"
WORDS = TEXT.split()
PLACES = ((0, 3), (2, 9), (5, 1), (1, 5))  # first word, words
LINES = [" ".join(WORDS[i : i + n]) for i, n in PLACES]


@pytest.fixture(scope="module")
def cab_vocabulary(tmp_path_factory):
  """Of a few words, with the tags of two languages."""
  path = tmp_path_factory.mktemp("spm") / "a.model"
  return train_vocabulary([*LINES, *WORDS], 26, path, languages=("de", "fi"))


@pytest.fixture(scope="module")
def cab_run(cab_vocabulary):
  """A run with random parameters."""
  vocabulary = cab_vocabulary
  routing = Routing("thor", axis="")
  settings = Settings(
    vocabulary.size, width=16, hidden=12, heads=2, encoder_layers=1,
    decoder_layers=1, logits_bias=True, **routing.model_settings(),
  )  # fmt: skip
  rng = np.random.default_rng(0)
  make = functools.partial(init_params, settings)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32),
    jax.eval_shape(make, jax.random.key(0)),
  )
  # Words, not tags.
  bias = np.where(np.arange(vocabulary.size) < 6, -9, 0).astype(np.float32)
  bias[EOS] = 0
  params["logits_bias"] = jnp.asarray(bias)
  params["embedding"] = 2 * params["embedding"]
  translation = {
    "beam": 2, "length_penalty": 0.6, "penalty": "gnmt", "max_ratio": 0.0,
    "max_extra": 4, "token_budget": 64,
  }  # fmt: skip
  config = ConfigDict(
    {
      "data": {"lengths": (8, (24, 32))},
      "evaluation": {"dispatch": "fixed:1", "seed": 3},
      "translation": translation,
    }
  )
  return types.SimpleNamespace(
    config=config, vocabulary=vocabulary, settings=settings, routing=routing,
    params=params, table=None, step=7,
  )  # fmt: skip
