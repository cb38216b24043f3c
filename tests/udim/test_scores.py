"""Scores by domain: exact, whatever the batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.parallel import batch_sharding, make_mesh
from udim import scores as scores_lib
from udim.augment import Transform
from udim.data import eval_batches
from udim.domains import ArrayExamples, Domain
from udim.models import init_variables, make_apply_fn, make_model
from udim.scores import Evaluator, Score, summary


def make_domain(name="a", count=130):
  rng = np.random.default_rng(count)
  images = rng.random((count, 8, 8, 1), np.float32)
  return Domain(name, ArrayExamples(images, rng.integers(0, 10, count)))


def make_net(name="cnn"):
  settings = {"name": name}
  if name != "cnn":
    settings["batch_norm"] = "update"
  module = make_model(settings, 10)
  variables = init_variables(module, jax.random.key(0), image_shape=(8, 8, 1))
  return make_apply_fn(module), variables


def score(domain, batch_size, *, net="cnn", sharding=None):
  apply_fn, variables = make_net(net)
  batches = eval_batches(
    domain, batch_size=batch_size, transform=Transform(), sharding=sharding
  )
  evaluator = Evaluator(apply_fn, {"x/a": batches}, sharding)
  return evaluator(variables["params"], variables["batch_stats"])["x/a"]


def expected(domain):
  apply_fn, variables = make_net()
  images, labels = domain.arrays(np.arange(len(domain)))
  logits = apply_fn(variables, images, train=False)[1]
  logits = np.asarray(logits, np.float64)
  picked = logits[np.arange(len(labels)), labels]
  loss = np.log(np.exp(logits).sum(1)) - picked
  return (logits.argmax(1) == labels).mean(), loss.mean()


@pytest.mark.parametrize("batch_size", [1, 7, 128, 1000])
def test_accuracy_and_loss_whatever_the_batch(batch_size):
  domain = make_domain(count=40)
  found = score(domain, batch_size)
  accuracy, loss = expected(domain)
  assert found.count == 40
  assert found.accuracy == pytest.approx(accuracy, abs=1e-12)
  assert found.loss == pytest.approx(loss, abs=1e-6)


def test_all_devices_together():
  sharding = batch_sharding(make_mesh({"data": 8}))
  domain = make_domain()
  one, eight = score(domain, 60), score(domain, 60, sharding=sharding)
  assert one.accuracy == eight.accuracy
  assert one.loss == pytest.approx(eight.loss, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_logits_do_not_depend_on_batch_mates(batch_size):
  """With running statistics that are not the batch's, too."""
  apply_fn, variables = make_net("wrn28_1")
  stats = jax.tree.map(
    lambda x: x + 0.1 * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape),
    variables["batch_stats"],
  )
  variables = {**variables, "batch_stats": stats}
  logits_of = jax.jit(lambda x: apply_fn(variables, x, train=False)[1])
  images = np.random.default_rng(0).random((130, 8, 8, 1), np.float32)
  whole = np.asarray(logits_of(images))
  domain = Domain("a", ArrayExamples(images, np.zeros(130, int)))
  rows = []
  for batch in eval_batches(
    domain, batch_size=batch_size, transform=Transform()
  ):
    logits = np.asarray(logits_of(batch["image"]))
    rows.append(logits[batch["weight"] > 0])
  # Convolutions of other shapes add in another order.
  np.testing.assert_allclose(np.concatenate(rows), whole, atol=2e-4, rtol=1e-4)


def test_large_parts_are_read_again_each_time(monkeypatch):
  apply_fn, variables = make_net()
  batches = eval_batches(make_domain(), batch_size=50, transform=Transform())
  kept = Evaluator(apply_fn, {"x/a": batches})
  monkeypatch.setattr(scores_lib, "KEPT_BYTES", 0)
  streamed = Evaluator(apply_fn, {"x/a": batches})
  both = [e(variables["params"], {}) for e in (kept, streamed, streamed)]
  assert both[0] == both[1] == both[2]


def test_summary_means_are_over_domains_not_images():
  scores = {
    "source_holdout/a": Score(0.5, 1.0, 10),
    "source_holdout/b": Score(1.0, 2.0, 1000),
    "validation_holdout/a_turned": Score(0.25, 4.0, 10),
    "target_main/c": Score(0.4, 3.0, 7),
    "target_holdout/c": Score(0.9, 0.1, 7),
  }
  lines = summary(scores)
  assert lines["val/accuracy"] == 0.75
  assert lines["val/loss"] == 1.5
  assert lines["tuning/accuracy"] == 0.5
  assert lines["target/accuracy"] == 0.4
  assert "reference/accuracy" not in lines
  assert lines["target_holdout/accuracy/c"] == 0.9
