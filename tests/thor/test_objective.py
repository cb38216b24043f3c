"""What a step minimizes: formulas, counts, accumulation, compilations."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import RunError, UserError
from common.hooks import SameEverywhere
from common.parallel import make_mesh, replicated
from common.rngs import RngStreams
from common.state import TrainState
from common.step import make_train_step
from common.train import StepInfo
from thor.data import shift_right
from thor.losses import cross_entropy_loss, thor_loss
from thor.model import Transformer, init_params
from thor.objective import (
  STREAMS,
  digest_of_draws,
  expert_grad_norms,
  make_loss_fn,
)
from thor.routing import NO_ROUTES, Routing, train_routes
from thor.settings import make_settings

PAD = 1
SIZES = {"width": 16, "hidden": 32, "heads": 2, "encoder_layers": 2,
         "decoder_layers": 2, "dropout": 0.0}  # fmt: skip


@functools.cache
def make(routing):
  settings = make_settings(SIZES, routing, vocab_size=20)
  params = jax.jit(init_params, static_argnums=0)(settings, jax.random.key(0))
  return Transformer(settings), params


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, source, inputs, routes=NO_ROUTES):
  return model.apply({"params": params}, source, inputs, routes)[0]


def make_batch(lengths, seed=0):
  rng = np.random.default_rng(seed)
  batch = {}
  for name in ("source", "target"):
    tokens = rng.integers(4, 20, (len(lengths), 8)).astype(np.int32)
    places = np.arange(8)[None]
    ends = np.array(lengths)[:, None]
    tokens = np.where(places == ends - 1, 2, tokens)
    batch[name] = jnp.asarray(np.where(places < ends, tokens, PAD))
  return batch


def rngs(step=0):
  return RngStreams(0, STREAMS)(step)


def test_two_passes_are_the_loss_of_two_draws():
  routing = Routing(experts=4)
  model, params = make(routing)
  batch = make_batch([8, 5, 3, 0])
  loss_fn = make_loss_fn(model, routing, alpha=3.0)
  loss, metrics = jax.jit(loss_fn)(params, batch, rngs())
  inputs = shift_right(batch["target"])
  routes = train_routes(
    routing, model.settings.expert_layers, rngs()["experts"],
    source=batch["source"], target=inputs, passes=2,
  )  # fmt: skip
  logits = [
    logits_of(model, params, batch["source"], inputs, own) for own in routes
  ]
  expected, parts = thor_loss(*logits, batch["target"], pad_id=PAD, alpha=3.0)
  chex.assert_trees_all_close(loss, expected, rtol=1e-6)
  chex.assert_trees_all_close(metrics["skl"].value(), parts["skl"].value(),
                              rtol=1e-5)  # fmt: skip
  assert metrics["loss"].count == 16  # target tokens, counted once
  nll = (metrics["nll1"].value() + metrics["nll2"].value()) / 2
  chex.assert_trees_all_close(
    metrics["nll_bits"].value(), nll / np.log(2), rtol=1e-6
  )


def test_one_pass_is_the_smoothed_cross_entropy():
  routing = Routing("dense", experts=1)
  model, params = make(routing)
  batch = make_batch([8, 5])
  loss_fn = jax.jit(make_loss_fn(model, routing, passes=1))
  loss, _ = loss_fn(params, batch, rngs())
  inputs = shift_right(batch["target"])
  logits = logits_of(model, params, batch["source"], inputs)
  expected, _ = cross_entropy_loss(logits, batch["target"], pad_id=PAD)
  chex.assert_trees_all_close(loss, expected, rtol=1e-6)


def test_a_gate_adds_its_balance_loss():
  routing = Routing("switch", experts=2, balance=0.5, jitter=0.0)
  model, params = make(routing)
  batch = make_batch([8, 5])
  parts = [
    jax.jit(
      make_loss_fn(
        model, dataclasses.replace(routing, balance=weight), passes=1
      )
    )
    for weight in (0.5, 0.0)
  ]
  (loss, metrics), (without, _) = [f(params, batch, rngs()) for f in parts]
  # The metric is a mean over layers, the loss their sum.
  layers = sum(model.settings.expert_layers)
  expected = without + 0.5 * layers * metrics["balance"].value()
  chex.assert_trees_all_close(loss, expected, rtol=1e-6)


def test_shares_of_experts_and_equal_draws_are_reported():
  routing = Routing(experts=2)
  model, params = make(routing)
  loss_fn = jax.jit(make_loss_fn(model, routing))
  _, metrics = loss_fn(params, make_batch([8]), rngs())
  # One encoder layer and one decoder layer have experts.
  for layer in (0, 1):
    shares = [float(metrics[f"experts/{layer}/{k}"].value()) for k in (0, 1)]
    assert sum(shares) == pytest.approx(1)
    assert set(shares) <= {0.0, 0.5, 1.0}
  equal = [metrics[f"experts/{i}/0"].value() != 0.5 for i in (0, 1)]
  assert float(metrics["same"].value()) == pytest.approx(np.mean(equal))


def test_only_chosen_experts_have_gradients():
  routing = Routing(experts=16)
  model, params = make(routing)
  loss_fn = make_loss_fn(model, routing)
  grads, metrics = jax.jit(jax.grad(loss_fn, has_aux=True))(
    params, make_batch([8, 4]), rngs()
  )
  norms = expert_grad_norms(grads)
  for k in range(16):
    used = any(float(metrics[f"experts/{i}/{k}"].total) for i in (0, 1))
    norm = float(norms[f"expert_grad_norm/{k}"].value())
    assert (norm > 0) == used


@pytest.mark.parametrize("passes", [1, 2])
def test_accumulation_is_one_large_batch_with_unequal_token_counts(passes):
  routing = Routing("dense", experts=1)
  model, params = make(routing)
  loss_fn = make_loss_fn(model, routing, passes=passes)
  tx = optax.sgd(0.1)
  batch = make_batch([8, 1, 6, 2])
  states = []
  for accum in (1, 2):
    step = make_train_step(loss_fn, tx, RngStreams(0, STREAMS), accum=accum)
    state = TrainState.create(jax.tree.map(jnp.copy, params), tx, {})
    states.append(step(state, batch))
  (one, one_metrics), (two, two_metrics) = states
  # Sums in another order.
  chex.assert_trees_all_close(one.params, two.params, atol=1e-6)
  chex.assert_trees_all_close(
    one_metrics["loss"].value(), two_metrics["loss"].value(), rtol=1e-6
  )


def test_micro_batches_draw_anew():
  routing = Routing(experts=16)
  model, params = make(routing)
  loss_fn = make_loss_fn(model, routing)
  tx = optax.sgd(0.1)
  step = make_train_step(loss_fn, tx, RngStreams(0, STREAMS), accum=4)
  _, metrics = step(TrainState.create(params, tx, {}), make_batch([8, 8, 8, 8]))
  shares = [float(metrics[f"experts/0/{k}"].value()) for k in range(16)]
  assert sum(share > 0 for share in shares) > 2


def test_one_program_serves_every_draw():
  routing = Routing(experts=4)
  model, params = make(routing)
  tx = optax.sgd(0.1)
  step = make_train_step(
    chex.assert_max_traces(make_loss_fn(model, routing), n=1),
    tx,
    RngStreams(0, STREAMS),
  )
  state = TrainState.create(jax.tree.map(jnp.copy, params), tx, {})
  seen = set()
  for _ in range(8):
    state, metrics = step(state, make_batch([8, 4]))
    seen.add(tuple(float(metrics[f"experts/0/{k}"].value()) for k in range(4)))
  assert len(seen) > 2


@pytest.mark.parametrize(
  "routing", [Routing(experts=64), Routing(experts=4, level="token")]
)
def test_devices_that_draw_by_themselves_are_stopped(routing):
  mesh, tokens = make_mesh(), make_batch([8] * 8)["source"]

  @jax.jit
  def step(seed):
    key = jax.random.key(seed)
    routes = train_routes(
      routing, (1, 1), key, source=tokens, target=tokens, passes=2
    )
    return {"draws": digest_of_draws(routing, key, routes)}

  def hook(*steps):
    """Each with the seeds of all devices, which count as replicated."""
    hook = SameEverywhere(len(steps), "draws")
    for number, seeds in enumerate(steps, 1):
      own = [jax.device_put(s, d) for s, d in zip(seeds, mesh.devices.flat)]
      seed = jax.make_array_from_single_device_arrays((), replicated(mesh), own)
      with jax.set_mesh(mesh):
        metrics = step(seed)
      hook(StepInfo(number, None, metrics, None))
    return metrics["draws"].bits

  one, two = hook([1] * 8), hook([1] * 8, [2] * 8)
  assert one.shape == (8,)
  assert set(np.asarray(one)) != set(np.asarray(two))
  with pytest.raises(RunError, match="in their draws of steps 1 to 3"):
    hook([1] * 8, [2] * 7 + [3], [4] * 8)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"passes": 3}, "objective.passes=3 must be 1 or 2"),
    ({"alpha": -1.0}, "objective.alpha=-1.0"),
    ({"label_smoothing": 1.0}, "objective.label_smoothing=1.0"),
  ],
)
def test_values_without_a_meaning_are_refused(settings, message):
  routing = Routing(experts=2)
  model, _ = make(routing)
  with pytest.raises(UserError, match=message):
    make_loss_fn(model, routing, **settings)
