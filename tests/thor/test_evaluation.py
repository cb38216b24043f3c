"""Validation: values by hand, and no chance in them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.data.loader import Placer
from common.parallel import batch_sharding, make_mesh
from thor.data import shift_right
from thor.dispatch import Dispatch, prepare
from thor.evaluation import Evaluator, next_log_probs
from thor.losses import symmetric_kl
from thor.model import init_params
from thor.routing import Routing
from thor.settings import Settings

PAD = 1
ROUTING = Routing(experts=3)
SETTINGS = Settings(
  20, width=16, hidden=32, heads=2, encoder_layers=1, decoder_layers=1,
  pattern=(True,), experts=3,
)  # fmt: skip


def make_batch(lengths, languages, seed):
  rng = np.random.default_rng(seed)
  places, ends = np.arange(8)[None], np.array(lengths)[:, None]
  made = {}
  for name in ("source", "target"):
    tokens = rng.integers(4, 20, (len(lengths), 8))
    tokens = np.where(places == ends - 1, 2, tokens)
    made[name] = np.where(places < ends, tokens, PAD).astype(np.int32)
  return made | {"language": np.array(languages, np.int32)}


BATCHES = [
  make_batch([8, 3, 5, 2, 8, 1, 4, 6], [0, 1, 1, 0, 0, 1, 0, 1], 0),
  make_batch([4, 4, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], 1),
]


@pytest.fixture(scope="module")
def params():
  made = jax.jit(functools.partial(init_params, SETTINGS))(jax.random.key(0))
  # Far enough from nothing that experts differ.
  return jax.tree.map(lambda leaf: 2 * leaf, made)


def evaluator(dispatch="dispatch_sentence", seed=0):
  sharding = batch_sharding(make_mesh({"data": 8}))
  return Evaluator(
    SETTINGS,
    ROUTING,
    [Placer(sharding)(batch) for batch in BATCHES],
    languages=("de", "fr"),
    sharding=sharding,
    dispatch=Dispatch.parse(dispatch, ROUTING),
    seed=seed,
  )


@pytest.fixture(scope="module")
def found(params):
  return evaluator()(params)


@jax.jit
def log_probs(prepared, batch):
  inputs = shift_right(batch["target"])
  return next_log_probs(prepared, batch["source"], inputs)


def by_hand(params, way):
  """Log-probabilities of all batches, [n t v]."""
  prepared = prepare(params, SETTINGS, Dispatch.parse(way, ROUTING))
  batches = [jax.tree.map(jnp.asarray, batch) for batch in BATCHES]
  return np.concatenate([log_probs(prepared, batch) for batch in batches])


def test_losses_are_means_over_tokens_without_smoothing(params, found):
  out = by_hand(params, "dispatch_sentence")
  target = np.concatenate([batch["target"] for batch in BATCHES])
  language = np.concatenate([batch["language"] for batch in BATCHES])[:, None]
  nll = -np.take_along_axis(out, target[..., None], -1)[..., 0]
  counted = target != PAD
  assert found["eval/loss"] == pytest.approx(nll[counted].mean(), rel=1e-5)
  assert found["eval/perplexity"] == pytest.approx(
    np.exp(nll[counted].mean()), rel=1e-4
  )
  right = out.argmax(-1) == target
  assert found["eval/accuracy"] == pytest.approx(right[counted].mean())
  for number, name in enumerate(("de", "fr")):
    own = nll[counted & (language == number)].mean()
    assert found[f"eval_loss/{name}"] == pytest.approx(own, rel=1e-5)


def test_agreement_is_that_of_two_paths_without_a_common_expert(params, found):
  first, second = [by_hand(params, f"fixed:{i}") for i in (0, 1)]
  target = np.concatenate([batch["target"] for batch in BATCHES])
  counted = target != PAD
  skl = np.asarray(symmetric_kl(jnp.asarray(first), jnp.asarray(second)))
  assert skl[counted].mean() > 1e-3
  assert found["agreement/skl"] == pytest.approx(skl[counted].mean(), rel=1e-4)
  same = first.argmax(-1) == second.argmax(-1)
  assert found["agreement/top1"] == pytest.approx(same[counted].mean())


def test_validation_depends_on_its_seed_alone(params, found):
  assert evaluator()(params) == found
  other = evaluator(seed=1)(params)
  assert other["eval/loss"] != found["eval/loss"]
  assert other["agreement/skl"] == found["agreement/skl"]
