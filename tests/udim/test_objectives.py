"""The baselines' losses: definitions in NumPy, laws, gradients, errors."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from udim.objectives import NEEDS_DOMAINS, OBJECTIVES, make_objective

X64 = jax.enable_x64
close = functools.partial(np.testing.assert_allclose, rtol=1e-12)
KEY = jax.random.key(0)


def problem(s=3, n=6, p=4, d=5, k=3, soft=False, seed=0):
  """Parameters and a batch in float64, no two domains alike."""
  rng = np.random.default_rng(seed)
  params = {
    "hidden": rng.normal(size=(p, d)) / 2,
    "head": {"kernel": rng.normal(size=(d, k)), "bias": rng.normal(size=k)},
  }
  scale = np.linspace(0.5, 2, s)[:, None, None]
  labels = rng.integers(k, size=(s, n), dtype=np.int32)
  if soft:
    labels = rng.dirichlet(np.ones(k), size=(s, n))
  return params, {"image": scale * rng.normal(size=(s, n, p)), "label": labels}


def forward(params, images, key):
  del key
  features = jnp.tanh(images @ params["hidden"])
  head = params["head"]
  return features, features @ head["kernel"] + head["bias"][None], {}


@functools.cache
def compiled(name, settings, smoothing):
  objective = make_objective(name, dict(settings), label_smoothing=smoothing)
  return objective, jax.jit(functools.partial(objective.loss, forward))


def evaluate(
  name, settings, params, batch, *, step=0, memory=None, smoothing=0.0
):
  """The outcome for NumPy arrays or others, under fresh memory if None."""
  objective, loss = compiled(name, tuple(settings.items()), smoothing)
  params, batch = jax.tree.map(jnp.asarray, (params, batch))
  if memory is None:
    memory = objective.init(len(batch["label"]), params)
  return loss(params, batch, key=KEY, step=step, memory=memory)


# The definitions, a domain and an image at a time.


def cross_entropy(logits, targets):
  logits = logits - logits.max(-1, keepdims=True)
  return np.mean(
    np.log(np.exp(logits).sum(-1)) * targets.sum(-1)
    - (targets * logits).sum(-1)
  )


def domains_of(params, batch, smoothing=0.0):
  """(features, logits, targets) of each domain."""
  kernel, bias = params["head"]["kernel"], params["head"]["bias"]
  k = len(bias)
  for images, labels in zip(batch["image"], batch["label"]):
    features = np.tanh(images @ params["hidden"])
    targets = labels if labels.ndim == 2 else np.eye(k)[labels]
    targets = (1 - smoothing) * targets + smoothing / k
    yield features, features @ kernel + bias, targets


def coral_by_definition(domains, memory):
  del memory
  pairs = itertools.combinations([features for features, _, _ in domains], 2)
  return np.mean([
    np.mean((a.mean(0) - b.mean(0)) ** 2)
    + np.mean((np.cov(a.T) - np.cov(b.T)) ** 2)
    for a, b in pairs
  ])  # fmt: skip


def irm_by_definition(domains, memory):
  del memory
  step = 1e-5

  def slope(logits, targets):  # finite differences along the scale
    ahead, behind = (1 + step) * logits, (1 - step) * logits
    difference = cross_entropy(ahead, targets) - cross_entropy(behind, targets)
    return difference / (2 * step)

  return np.mean([
    slope(logits[::2], targets[::2]) * slope(logits[1::2], targets[1::2])
    for _, logits, targets in domains
  ])  # fmt: skip


def variances_by_definition(domains):
  """Of per-sample gradients of the head, bias first: [s, k + d k]."""
  rows = []
  for features, logits, targets in domains:
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    gradients = [
      np.concatenate([delta, np.outer(h, delta).ravel()])
      for h, delta in zip(features, softmax - targets)
    ]
    rows.append(np.var(gradients, axis=0))
  return np.stack(rows)


def flat_memory(memory):
  s = len(memory["bias"])
  return np.concatenate([memory["bias"], memory["kernel"].reshape(s, -1)], 1)


EMA = 0.9


def fishr_by_definition(domains, memory):
  average = EMA * flat_memory(memory)
  average += (1 - EMA) * variances_by_definition(domains)
  average /= 1 - EMA
  return np.mean((average - average.mean(0)) ** 2)


PENALTIES = {
  "coral": coral_by_definition,
  "irm": irm_by_definition,
  "fishr": fishr_by_definition,
}
CASES = [  # name, settings, step, weight in force
  ("coral", {"weight": 0.7}, 0, 0.7),
  ("irm", {"weight": 30.0, "anneal_steps": 4}, 3, 1.0),
  ("irm", {"weight": 30.0, "anneal_steps": 4}, 4, 30.0),
  ("irm", {"weight": 30.0, "anneal_steps": 0}, 0, 30.0),
  ("fishr", {"weight": 50.0, "anneal_steps": 4, "ema": EMA}, 3, 0.0),
  ("fishr", {"weight": 50.0, "anneal_steps": 4, "ema": EMA}, 4, 50.0),
]
SHAPES = [{"s": 2, "n": 5}, {"n": 2}, {"soft": True}]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "settings", "step", "weight"), CASES)
def test_penalty_is_its_definition(name, settings, step, weight, shape):
  params, batch = problem(**shape)
  s, smoothing = len(batch["label"]), 0.1
  rng = np.random.default_rng(1)
  memory = {}
  if name == "fishr":
    memory = {
      leaf: rng.uniform(size=(s, *x.shape)) / 10
      for leaf, x in params["head"].items()
    }
  domains = list(domains_of(params, batch, smoothing))
  expected = PENALTIES[name](domains, memory)
  plain = np.mean([cross_entropy(z, y) for _, z, y in domains])
  with X64(True):
    outcome = evaluate(
      name,
      settings,
      params,
      batch,
      step=step,
      memory=jax.tree.map(jnp.asarray, memory),
      smoothing=smoothing,
    )
  close(outcome.metrics["loss"], plain)
  # 1e-9: the finite differences of irm, which the weight multiplies.
  close(outcome.metrics["penalty"], expected, rtol=1e-9, atol=1e-9)
  close(outcome.loss, plain + weight * expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_groupdro_is_its_definition(shape):
  params, batch = problem(**shape)
  losses = [cross_entropy(z, y) for _, z, y in domains_of(params, batch)]
  q = np.float32([0.2, 0.5, 0.3][: len(losses)])
  expected = q * np.exp(2.0 * np.asarray(losses))
  expected /= expected.sum()
  with X64(True):
    memory = {"q": jnp.asarray(q)}
    outcome = evaluate("groupdro", {"eta": 2.0}, params, batch, memory=memory)
  close(outcome.metrics["loss"], np.mean(losses))
  close(outcome.metrics["worst_loss"], max(losses))
  # The memory and its logarithm are float32.
  close(outcome.loss, expected @ losses, rtol=1e-6)
  close(outcome.memory["q"], expected, rtol=1e-6)
  close(outcome.metrics["largest_q"], max(expected), rtol=1e-6)


CLEAN = [(name, False) for name in OBJECTIVES if name != "mixup"]


@pytest.mark.parametrize(("name", "soft"), [*CLEAN, ("erm", True)])
def test_loss_and_accuracy_are_those_of_the_clean_batch(name, soft):
  params, batch = problem(n=40, soft=soft)
  domains = list(domains_of(params, batch))
  metrics = evaluate(name, {}, params, batch).metrics
  loss = np.mean([cross_entropy(z, y) for _, z, y in domains])
  right = [z.argmax(-1) == y.argmax(-1) for _, z, y in domains]
  close(metrics["loss"], loss, rtol=1e-6)
  close(metrics["accuracy"], np.mean(right), rtol=1e-6)


def test_erm_is_the_cross_entropy():
  outcome = evaluate("erm", {}, *problem())
  assert outcome.loss == outcome.metrics["loss"]


# Laws.


@pytest.mark.parametrize("name", ["coral", "fishr"])
def test_equal_domains_are_not_pulled_together(name):
  params, batch = problem()
  batch = jax.tree.map(lambda x: np.stack([x[0]] * 3), batch)
  with X64(True):
    outcome = evaluate(name, {}, params, batch)
  close(outcome.metrics["penalty"], 0, atol=1e-25)


def test_groupdro_without_eta_is_erm():
  outcome = evaluate("groupdro", {"eta": 0}, *problem())
  close(outcome.loss, outcome.metrics["loss"], rtol=1e-6)


def test_groupdro_survives_a_loss_whose_exponential_overflows():
  params, batch = problem()
  params["head"]["kernel"] *= 1e4
  outcome = evaluate("groupdro", {"eta": 10.0}, params, batch)
  worst = outcome.metrics["worst_loss"]
  assert worst > 1e3
  close(outcome.loss, worst, rtol=1e-6)
  close(sorted(outcome.memory["q"]), [0, 0, 1])


def test_irm_takes_a_single_domain():
  params, batch = problem(s=1)
  with X64(True):
    penalty = evaluate("irm", {}, params, batch).metrics["penalty"]
  expected = irm_by_definition(domains_of(params, batch), {})
  close(penalty, expected, rtol=1e-8)


RESTARTS = [
  ("erm", {}, -1),
  ("mixup", {}, -1),
  ("coral", {}, -1),
  ("groupdro", {}, -1),
  ("irm", {}, 500),
  ("fishr", {}, 1500),
  ("fishr", {"anneal_steps": 7}, 7),
  ("irm", {"anneal_steps": 0}, -1),
]


@pytest.mark.parametrize(("name", "settings", "step"), RESTARTS)
def test_the_optimizer_restarts_where_the_penalty_sets_in(name, settings, step):
  assert make_objective(name, settings).restart_step == step


# Gradients.


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_that_of_finite_differences(name):
  params, batch = problem()
  # groupdro's weights are constants for the gradient: hold them.
  settings = {"eta": 0} if name == "groupdro" else at_once(name)
  rng = np.random.default_rng(2)
  along = jax.tree.map(lambda x: rng.normal(size=x.shape), params)

  def loss(distance):
    moved = jax.tree.map(lambda p, v: p + distance * v, params, along)
    return evaluate(name, settings, moved, batch).loss

  with X64(True):
    slope, ahead, behind = jax.jit(
      lambda h: (jax.grad(loss)(0.0 * h), loss(h), loss(-h))
    )(1e-5)
    close(slope, (ahead - behind) / 2e-5, rtol=1e-6)


def at_once(name):
  """Settings with the penalty in force from the start."""
  return {"anneal_steps": 0} if "anneal_steps" in OBJECTIVES[name] else {}


def test_groupdro_does_not_differentiate_its_weights():
  params, batch = problem()
  old = jnp.float32([0.2, 0.5, 0.3])

  @jax.jit
  def gradients(params):
    def loss(params):
      memory = {"q": old}
      outcome = evaluate("groupdro", {"eta": 3.0}, params, batch, memory=memory)
      return outcome.loss, outcome.memory["q"]

    def weighted(params, q):
      by_domain = [
        evaluate("erm", {}, params, {k: x[e, None] for k, x in batch.items()})
        for e in range(3)
      ]
      return q @ jnp.stack([outcome.loss for outcome in by_domain])

    gradient, q = jax.grad(loss, has_aux=True)(params)
    return gradient, jax.grad(weighted)(params, q)

  chex.assert_trees_all_close(*gradients(params), rtol=1e-5)


def test_fishr_does_not_differentiate_its_averages():
  """The gradient through the newest variances does not depend on ema."""
  params, batch = problem()

  def gradient(ema):
    settings = {"anneal_steps": 0, "ema": ema}
    return jax.grad(lambda p: evaluate("fishr", settings, p, batch).loss)

  both = jax.jit(lambda params: [gradient(ema)(params) for ema in (0.0, 0.95)])
  chex.assert_trees_all_close(*both(params), rtol=1e-4)  # float32


# Under jit.


def test_memory_over_four_steps():
  """fishr's averages and groupdro's weights against loops, traced once."""
  params = problem()[0]
  batches = [problem(seed=seed)[1] for seed in range(4)]
  variances = [variances_by_definition(domains_of(params, b)) for b in batches]
  losses = [
    np.array([cross_entropy(z, y) for _, z, y in domains_of(params, b)])
    for b in batches
  ]
  average, q = np.zeros_like(variances[0]), np.ones(3)
  for variance, loss in zip(variances, losses):
    average = EMA * average + (1 - EMA) * variance
    q = q * np.exp(0.5 * loss)
    q = q / q.sum()
  fishr = run_steps("fishr", {"ema": EMA}, params, batches)
  groupdro = run_steps("groupdro", {"eta": 0.5}, params, batches)
  # float32 sums
  close(flat_memory(fishr), average, rtol=1e-5, atol=1e-7)
  close(groupdro["q"], q, rtol=1e-5)


def run_steps(name, settings, params, batches):
  """Memory after a jitted step for each batch, at the same parameters."""
  objective = make_objective(name, settings)
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step_fn(params, memory, batch, step):
    outcome = objective.loss(
      forward, params, batch, key=KEY, step=step, memory=memory
    )
    return outcome.memory

  params = jax.tree.map(jnp.float32, params)
  memory = objective.init(len(batches[0]["label"]), params)
  first = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), memory)
  for i, batch in enumerate(batches):
    batch = {"image": jnp.float32(batch["image"]), "label": batch["label"]}
    memory = step_fn(params, memory, batch, jnp.int32(i))
    now = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), memory)
    assert now == first
  return memory


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_of_a_bfloat16_model_are_float32(name):
  params, batch = jax.tree.map(jnp.bfloat16, problem())
  batch["label"] = batch["label"].astype(jnp.int32)
  outcome = evaluate(name, {}, params, batch, step=10_000)
  scalars = [outcome.loss, *outcome.metrics.values()]
  chex.assert_type([*scalars, *jax.tree.leaves(outcome.memory)], jnp.float32)
  chex.assert_shape(scalars, ())
  chex.assert_tree_all_finite(outcome)


def test_one_forward_pass_under_one_key_for_all_objectives():
  """So that comparisons are paired; and what the model keeps is handed on."""
  params, batch = jax.tree.map(jnp.asarray, problem())
  keys, calls = [], []

  def tell(params, images, key):
    calls.append(images.shape)
    return *forward(params, images, key)[:2], jax.random.key_data(key)

  def stats(objective, memory):
    outcome = objective.loss(
      tell, params, batch, key=KEY, step=0, memory=memory
    )
    return outcome.batch_stats

  for name in OBJECTIVES:
    objective = make_objective(name, {})
    memory = objective.init(3, params)
    keys.append(jax.jit(functools.partial(stats, objective))(memory).tolist())
  assert calls == [(3 * 6, 4)] * len(OBJECTIVES)
  assert keys == [keys[0]] * len(OBJECTIVES)
  assert keys[0] != jax.random.key_data(KEY).tolist()


# Errors.

SETTINGS = [
  ("ermm", {}, "unknown objective 'ermm'; did you mean 'erm'?"),
  ("coral", {"wieght": 1.0}, "methods.coral: unknown key 'wieght'; did you"),
  ("erm", {"weight": 1.0}, "methods.erm: unknown key 'weight'"),
  ("mixup", {"alpha": 0}, "methods.mixup.alpha=0 must be a number above 0"),
  ("coral", {"weight": -1.0}, "methods.coral.weight=-1.0 must be"),
  ("coral", {"weight": "1"}, "methods.coral.weight='1' must be"),
  ("coral", {"weight": True}, "methods.coral.weight=True must be"),
  ("groupdro", {"eta": float("nan")}, "methods.groupdro.eta=nan must be"),
  ("irm", {"anneal_steps": 0.5}, "methods.irm.anneal_steps=0.5 must be an int"),
  ("irm", {"anneal_steps": -1}, "methods.irm.anneal_steps=-1 must be"),
  ("fishr", {"ema": 1.0}, r"methods.fishr.ema=1.0 must be in \[0, 1\)"),
]


@pytest.mark.parametrize(("name", "settings", "message"), SETTINGS)
def test_settings_without_a_meaning_are_refused(name, settings, message):
  with pytest.raises(UserError, match=message):
    make_objective(name, settings)


@pytest.mark.parametrize("value", [1.0, -0.1, "0.1"])
def test_label_smoothing_without_a_meaning_is_refused(value):
  with pytest.raises(UserError, match=f"label_smoothing={value!r} must be in"):
    make_objective("erm", {}, label_smoothing=value)


@pytest.mark.parametrize("name", sorted(NEEDS_DOMAINS))
def test_a_single_domain_is_refused_where_domains_are_compared(name):
  params, batch = problem(s=1)
  message = f"{name} compares source domains and got 1: give at least two"
  with pytest.raises(UserError, match=message):
    make_objective(name, {}).init(1, params)
  with pytest.raises(UserError, match=message):
    evaluate(name, {}, params, batch, memory={})


def of_shape(images, labels, dtype=np.float32):
  return {"image": np.zeros(images, dtype), "label": np.zeros(labels, np.int32)}


BATCHES = [
  ("coral", of_shape((2, 1, 4), (2, 1)), "data.images_per_domain=1 must be"),
  ("irm", of_shape((2, 1, 4), (2, 1)), "data.images_per_domain=1 must be"),
  ("fishr", of_shape((2, 1, 4), (2, 1)), "data.images_per_domain=1 must be"),
  ("erm", of_shape((6, 4), (6,)), "must be blocked by domain"),
  ("erm", of_shape((2, 3, 4), (3, 2)), "must be blocked by domain"),
  ("mixup", of_shape((2, 3, 4), (2, 3), np.uint8), "scale them to floats"),
]


@pytest.mark.parametrize(("name", "batch", "message"), BATCHES)
def test_a_batch_of_another_shape_is_refused(name, batch, message):
  with pytest.raises(UserError, match=message):
    evaluate(name, {}, problem()[0], batch, memory={})


def test_fishr_wants_a_linear_head():
  params, _ = problem()
  objective = make_objective("fishr", {}, head_path="net/head")
  with pytest.raises(UserError, match="head_path='net/head' has no kernel"):
    objective.init(2, params)
