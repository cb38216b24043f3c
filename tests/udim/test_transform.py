"""UDIM as an optax transform: what it reduces to, when it is at work, what it
leaves in its state."""

import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.optim import sam
from udim import UdimConfig, UdimState, udim, udim_grads, udim_passes

KEY = jax.random.key(0)
# Compiles in half the time, and nothing here is large or compared bit by bit.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def problem(seed=0):
  rng = np.random.default_rng(seed)
  params = {
    "hidden": rng.normal(size=(5, 4)),
    "head": {"kernel": rng.normal(size=(4, 3)), "bias": np.zeros(3)},
  }
  batch = {
    "image": rng.normal(size=(2, 4, 5)).astype(np.float32),
    "label": rng.integers(3, size=(2, 4), dtype=np.int32),
  }
  return jax.tree.map(jnp.float32, params), batch


def apply_fn(variables, images, *, train, rngs):
  del train
  params = variables["params"]
  features = jnp.tanh(images @ params["hidden"])
  if "dropout" in rngs:
    keep = jax.random.bernoulli(rngs["dropout"], 0.5, features.shape)
    features = jnp.where(keep, features * 2, 0)
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  return features, logits, {}


def plain_gradient(batch, key=KEY):
  """Of the mean cross-entropy, written out."""

  def loss(params):
    # The order of the images decides which masks they get.
    images, labels = (
      np.swapaxes(batch[name], 0, 1).reshape(8, *batch[name].shape[2:])
      for name in ("image", "label")
    )
    _, logits, _ = apply_fn(
      {"params": params}, images, train=True, rngs={"dropout": key}
    )
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  return jax.grad(loss)


def trained(tx, steps, gradients):
  """Parameters and states after each step; `gradients(params, state)` gives
  what `update` takes."""
  params, _ = problem()

  @jit
  def step(params, state):
    grads, fns = gradients(params, state)
    updates, state = tx.update(grads, state, params, **fns)
    return optax.apply_updates(params, updates), state

  history = [(params, tx.init(params))]
  for _ in range(steps):
    history.append(step(*history[-1]))
  return history


def train_udim(base, steps=3, **settings):
  cfg = UdimConfig(**settings)
  passes_of = udim_passes(apply_fn, "head", cfg)
  _, batch = problem()

  def gradients(params, state):
    passes = passes_of(params, batch, KEY, state.count)
    return passes.grads, passes.fns

  return trained(udim(base, cfg), steps, gradients)


def train_other(tx, steps=3, takes_grad_fn=True):
  gradient = plain_gradient(problem()[1])

  def gradients(params, state):
    fns = {"grad_fn": gradient} if takes_grad_fn else {}
    return gradient(params), fns

  return trained(tx, steps, gradients)[-1][0]


def nan(step):
  return jnp.nan * step


def assert_close(found, expected, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
    found,
    expected,
  )


# The term of these settings is NaN: it must not be computed, or not count.
WITHOUT_TERM = [
  {"lambda1": 0.0},
  {"lambda1": lambda step: 0.0 * step},
  {"start_step": 3},
  {"lambda1": 0, "mode": "perturbed_sam", "data_grad": "exact"},
]


@pytest.mark.parametrize("settings", WITHOUT_TERM)
def test_without_the_term_it_is_sam(settings):
  expected = train_other(sam(optax.adam(0.1), rho=0.1))
  *_, (found, state) = train_udim(
    optax.adam(0.1), rho=0.1, rho_x=nan, **settings
  )
  assert_close(found, expected)
  assert float(state.metrics["active"]) == 0
  assert float(state.metrics["grad_norm"]) > 0
  assert int(state.count) == 3


def test_without_term_and_ascent_it_is_the_base():
  base = optax.sgd(0.1, momentum=0.9)
  expected = train_other(base, takes_grad_fn=False)
  assert_close(train_udim(base, rho=0.0, lambda1=0.0)[-1][0], expected)


def test_the_term_begins_at_its_step():
  history = train_udim(optax.sgd(0.1), steps=3, start_step=2, rho_x=nan)
  finite = [np.all(np.isfinite(params["hidden"])) for params, _ in history]
  assert finite == [True, True, True, False]
  active = [float(state.metrics["active"]) for _, state in history]
  assert active == [0, 0, 0, 1]


def grads_at(steps, **settings):
  """Gradients and metrics of `udim_grads` at some steps, one compilation."""
  params, batch = problem()
  grads_of = jit(udim_grads(apply_fn, "head", UdimConfig(**settings)))
  return [grads_of(params, batch, KEY, jnp.int32(step)) for step in steps]


def test_every_so_many_steps_it_counts_so_many_times():
  (sam_grads, _), (full, _) = (
    grads_at([0], lambda1=weight)[0] for weight in (0.0, 0.5)
  )
  third = jax.tree.map(lambda s, f: s + 3 * (f - s), sam_grads, full)
  found = grads_at([1, 2, 3, 4, 5], lambda1=0.5, every=3, start_step=2)
  for (grads, aux), is_active in zip(found, [0, 1, 0, 0, 1]):
    assert float(aux["metrics"]["active"]) == is_active
    assert (float(aux["metrics"]["gn"]) > 0) == is_active
    assert_close(grads, third if is_active else sam_grads)


def test_schedules_are_functions_of_the_step():
  settings = {"lambda1": 0.3, "rho": 0.1, "rho_x": 0.7}
  schedules = {
    name: optax.linear_schedule(0.0, 10 * value, 10)
    for name, value in settings.items()
  }
  [(expected, aux)] = grads_at([0], **settings)
  [(found, other)] = grads_at([1], **schedules)
  assert_close((found, other), (expected, aux))


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    ({}, False),
    ({"lambda1": 0.0, "start_step": 5}, False),
    ({"start_step": 5}, True),
    ({"every": 2}, True),
    ({"lambda1": optax.linear_schedule(0.0, 1.0, 5)}, True),
  ],
)
def test_a_branch_is_there_when_it_is_needed(settings, expected):
  params, batch = problem()
  grads_of = udim_grads(apply_fn, "head", UdimConfig(**settings))
  jaxpr = jax.make_jaxpr(grads_of)(params, batch, KEY, 0)
  names = [equation.primitive.name for equation in jaxpr.eqns]
  assert ("cond" in names) == expected


FORMS = [
  {},
  {"data_grad": "exact", "every": 2},
  {"data_grad": "plain", "share_dropout": False, "mode": "perturbed_sam"},
]


@pytest.mark.parametrize("settings", FORMS)
def test_transform_and_gradients_are_the_same_method(settings):
  base = optax.adam(0.1)
  grads_of = udim_grads(apply_fn, "head", UdimConfig(**settings))
  _, batch = problem()

  @jit
  def step(params, state, count):
    grads, aux = grads_of(params, batch, KEY, count)
    updates, state = base.update(grads, state)
    return optax.apply_updates(params, updates), state, aux["metrics"]

  params, _ = problem()
  state = base.init(params)
  for count in range(3):
    params, state, metrics = step(params, state, count)
  *_, (found, udim_state) = train_udim(base, **settings)
  assert_close(found, params)
  for name, value in udim_state.metrics.items():
    assert float(value) == pytest.approx(float(metrics[name]), abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"lambda1": 0.0}, {"every": 5}])
def test_metrics_are_the_same_scalars_in_every_step(settings):
  grads_of = udim_grads(apply_fn, "head", UdimConfig(**settings))
  _, aux = jax.eval_shape(grads_of, *problem(), KEY, jnp.int32(0))
  assert {name: m.shape for name, m in aux["metrics"].items()} == dict.fromkeys(
    (
      "loss", "sam_loss", "perturbed_loss", "grad_norm", "term_grad_norm",
      "pen", "gn", "ilc", "perturbation_rms", "active",
    ),
    (),
  )  # fmt: skip


@pytest.mark.parametrize("data_grad", ["fast", "exact", "plain"])
def test_functions_of_ones_own(data_grad):
  """A quadratic in w - mean(x), whose data gradients are known:

  grad_w L = w - mean x, grad_x L = -(w - mean x) / n, so along eps the latter
  changes by -eps / n, at once and exactly.
  """
  images = jnp.array([[1.0, 0], [3, 2]])
  w = jnp.array([5.0, 4])
  seen = []

  def grad_fn(w):
    grads = w - images.mean(axis=0)
    return grads, jnp.broadcast_to(-grads / 2, images.shape)

  def term(w, data_grad):
    seen.append(data_grad)
    zero = jnp.zeros(())
    metrics = {"pen": zero, "gn": zero + 2, "perturbation_rms": zero}
    return 3 * jnp.ones_like(w), metrics

  tx = udim(optax.identity(), UdimConfig(0.5, 0.5, data_grad=data_grad))
  fns = {"grad_fn": grad_fn, "inconsistency_grad_fn": term}
  updates, state = tx.update(grad_fn(w)[0], tx.init(w), w, **fns)
  grads = np.array([3.0, 3.0])
  eps = 0.5 * grads / np.linalg.norm(grads)
  np.testing.assert_allclose(updates, grads + eps + 1.5, rtol=1e-6)
  moved = grads if data_grad == "plain" else grads + eps
  np.testing.assert_allclose(seen[0], [-moved / 2] * 2, rtol=1e-6)
  assert float(state.metrics["gn"]) == 2
  assert float(state.metrics["term_grad_norm"]) == pytest.approx(18**0.5)


@pytest.mark.parametrize("given", [True, False])
def test_losses_are_kept_where_they_are_given(given):
  w = jnp.ones(2)

  def grad_fn(w):
    grads = w, jnp.zeros(())
    return (*grads, {"sam_loss": jnp.sum(w)}) if given else grads

  def term(w, data_grad):
    names = ("pen", "gn", "perturbation_rms")
    return w, dict.fromkeys(names, jnp.zeros(()))

  tx = udim(optax.identity(), UdimConfig(rho=2**0.5, every=2))
  fns = {"grad_fn": grad_fn, "inconsistency_grad_fn": term}
  fns |= {"value": 7.0} if given else {}
  _, state = tx.update(w, tx.init(w), w, **fns)
  found = [float(state.metrics[name]) for name in ("loss", "sam_loss")]
  np.testing.assert_allclose(found, [7, 4] if given else [0, 0], rtol=1e-6)


def test_the_example_in_the_docstring_runs():
  example = udim.__doc__.split("```python")[1].split("```")[0]
  names = {"jax": jax, "optax": optax, "apply_fn": apply_fn}
  names |= {"UdimConfig": UdimConfig, "udim": udim, "udim_passes": udim_passes}
  exec(textwrap.dedent(example), names)
  params, batch = problem()
  state = names["tx"].init(params)
  new_params, state = names["step"](params, state, batch, KEY)
  assert np.any(new_params["hidden"] != params["hidden"])
  assert float(state.metrics["active"]) == 1


def test_the_state_keeps_its_structure_inside_a_scan_and_a_chain():
  cfg = UdimConfig(every=2)
  tx = optax.chain(udim(optax.adam(0.1), cfg), optax.scale(0.5))
  passes_of = udim_passes(apply_fn, "head", cfg)
  params, batch = problem()

  def step(carry, count):
    params, state = carry
    passes = passes_of(params, batch, KEY, count)
    updates, state = tx.update(passes.grads, state, params, **passes.fns)
    own = state[0]
    assert isinstance(own, UdimState)
    return (optax.apply_updates(params, updates), state), own.metrics["active"]

  start = params, tx.init(params)
  shapes = jax.eval_shape(lambda: (problem()[0], tx.init(params)))
  (_, state), active = jax.jit(
    lambda start: jax.lax.scan(step, start, jnp.arange(4))
  )(start)
  np.testing.assert_array_equal(active, [1, 0, 1, 0])
  assert int(state[0].count) == 4
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes[1])


def test_bfloat16_parameters_stay_bfloat16():
  params, batch = problem()
  params = jax.tree.map(jnp.bfloat16, params)
  batch["image"] = batch["image"].astype(jnp.bfloat16)
  grads_of = jax.jit(udim_grads(apply_fn, "head", UdimConfig(every=2)))
  grads, aux = grads_of(params, batch, KEY, 0)
  assert {g.dtype.name for g in jax.tree.leaves(grads)} == {"bfloat16"}
  assert {m.dtype.name for m in aux["metrics"].values()} == {"float32"}
  assert np.isfinite(list(aux["metrics"].values())).all()


def test_a_step_needs_no_host():
  cfg = UdimConfig(every=2)
  grads_of = jax.jit(udim_grads(apply_fn, "head", cfg))
  arguments = jax.device_put((*problem(), KEY, jnp.int32(0)))
  grads_of(*arguments)
  with jax.transfer_guard("disallow"):
    grads_of(*arguments)
  text = grads_of.lower(*arguments).as_text()
  assert "callback" not in text
  assert "outfeed" not in text


def test_mistakes_are_one_line():
  params, _ = problem()
  tx = udim(optax.sgd(0.1), UdimConfig())
  update = functools.partial(tx.update, params, tx.init(params))

  def grad_fn(params):
    return params, jnp.zeros(1)

  def term(params, data_grad):
    return params, {"pen": jnp.zeros(())}

  cases = [
    ((), {"grad_fn": grad_fn, "inconsistency_grad_fn": term}, "params"),
    ((params,), {"grad_fn": grad_fn}, "inconsistency_grad_fn"),
    ((params,), {"inconsistency_grad_fn": term}, "grad_fn"),
    # Gradients alone, a value before them, and arrays that unpack like pairs.
    *(
      ((params,), {"grad_fn": bad, "inconsistency_grad_fn": term}, "returned")
      for bad in (
        lambda params: params,
        lambda params: (jnp.zeros(()), params),
        lambda params: jnp.zeros((2, 3)),
        lambda params: (params, "loss"),
      )
    ),
    (
      (params,),
      {
        "grad_fn": grad_fn,
        "inconsistency_grad_fn": term,
        "cfg": UdimConfig(data_grad="exact"),
      },
      "data_grad='exact' and 'fast'",
    ),
    (
      (params,),
      {"grad_fn": grad_fn, "inconsistency_grad_fn": term},
      "metric 'gn'",
    ),
  ]
  for arguments, fns, words in cases:
    with pytest.raises(UserError) as error:
      update(*arguments, **fns)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
