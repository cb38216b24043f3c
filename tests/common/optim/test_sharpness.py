"""The SAM family: its table in NumPy, known answers, laws, cost."""

import doctest

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from common.checkpoint import Checkpointer
from common.optim import (
  asam,
  esam,
  fisher_sam,
  gam,
  gsam,
  look_sam,
  sagm,
  sam,
  sam_ascent,
  sharpness,
)
from common.optim.ascent import AscentState
from common.state import TrainState

T = 1e-12


def unit(v):
  return v / (np.linalg.norm(v) + T)


def part_across(v, axis):
  return v - (v @ axis) / (axis @ axis) * axis


def ref_sam(w, grad, rho=0.1):
  return grad(w + rho * unit(grad(w)))


def ref_asam(w, grad, rho=0.1, eta=0.01):
  size = np.abs(w) + eta
  return grad(w + rho * size * unit(size * grad(w)))


def ref_fisher(w, grad, rho=0.1, eta=1.0):
  g = grad(w)
  natural = g / (1 + eta * g**2)
  return grad(w + rho * natural / (np.sqrt(natural @ g) + T))


def ref_gsam(w, grad, rho=0.1, alpha=0.2):
  perturbed = ref_sam(w, grad, rho)
  return perturbed - alpha * part_across(grad(w), perturbed)


def ref_sagm(w, grad, rho=0.1, alpha=0.05):
  g = grad(w)
  return (g + grad(w + rho * unit(g) - alpha * g)) / 2


def ref_gam(w, grad, rho=0.1, rho2=0.1, beta0=0.1, beta1=0.1, gamma=0.05):
  g0 = grad(w)
  g1 = grad(w + rho * unit(g0))
  flat = w + rho2 * unit(g1 - g0)
  g2 = grad(flat)
  g3 = grad(flat + rho * unit(g2))
  new = beta1 * g1 + (1 - beta1) * g3
  return new - gamma * part_across(g0 + (1 - beta0) * g2, new)


FAMILY = {
  "sam": (sam, {"rho": 0.1}, ref_sam),
  "asam": (asam, {"rho": 0.1, "eta": 0.01}, ref_asam),
  "fisher": (fisher_sam, {"rho": 0.1, "eta": 1.0}, ref_fisher),
  "gsam": (gsam, {"rho": 0.1, "alpha": 0.2}, ref_gsam),
  "sagm": (sagm, {"rho": 0.1, "alpha": 0.05}, ref_sagm),
  "gam": (
    gam,
    {"rho": 0.1, "rho_prime": 0.1, "beta0": 0.1, "beta1": 0.1, "gamma": 0.05},
    ref_gam,
  ),
  "look": (look_sam, {"rho": 0.1, "k": 2, "alpha": 0.7}, ref_sam),
  "esam": (esam, {"rho": 0.1, "weight_fraction": 0.6}, None),
}
members = pytest.mark.parametrize("name", FAMILY)
# Oracle 1: the quadratic (w - c)^T diag(1, 4, 9) (w - c) / 2.
START = (3.0, 2.0, -1.0)
KNOWN = {
  "sam": (2.00675352, 12.16208448, -27.8205527),
  "asam": (2.04910519, 12.52553033, -27.67175894),
  "gsam": (1.99734879, 12.12931724, -27.83555567),
  "sagm": (1.95337676, 10.88104224, -21.33527635),
  "fisher": (2.02393994, 12.01981236, -27.01992262),
  "gam": (2.00077668, 12.20314452, -28.62973735),
}
ITERATES = [
  (2.89966232, 1.39189578, 0.39102763),
  (2.80413519, 0.90255697, 1.15238746),
  (2.71310277, 0.50811434, 1.5652337),
]
DIGITS = 6e-9  # of the known answers


def quadratic(w):
  return jnp.array([1.0, 4.0, 9.0]) * (w - jnp.array([1.0, -1.0, 2.0]))


def make(name, base=None, **changed):
  member, settings, _ = FAMILY[name]
  return member(base or optax.identity(), **(settings | changed))


def network(dtype=np.float32, batch=6, sizes=(3, 5, 4)):
  """Parameters, and a function from them to the losses of (chosen)
  samples."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(batch, sizes[0])), dtype)
  y = jnp.asarray(rng.normal(size=(batch, sizes[2])), dtype)
  params = {
    "hidden": {
      "kernel": rng.normal(size=sizes[:2]).astype(dtype),
      "bias": np.zeros(sizes[1], dtype),
    },
    "head": {"kernel": rng.normal(size=sizes[1:]).astype(dtype)},
  }

  def losses(params, chosen=slice(None)):
    h = jnp.tanh(
      x[chosen] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]
    )
    return jnp.mean((h @ params["head"]["kernel"] - y[chosen]) ** 2, axis=1)

  return jax.tree.map(jnp.asarray, params), losses


def gradient(losses):
  return jax.grad(lambda params: jnp.mean(losses(params)))


def run(tx, params, grad, steps):
  """The parameters after each step, and the last state."""
  state, seen = tx.init(params), []
  for _ in range(steps):
    updates, state = one(tx, params, grad, state)
    params = optax.apply_updates(params, updates)
    seen.append(params)
  return seen, state


def one(tx, params, grad, state=None):
  state = tx.init(params) if state is None else state
  return tx.update(grad(params), state, params, grad_fn=grad)


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name):
  with jax.enable_x64(True):
    out, _ = one(make(name), jnp.array(START), quadratic)
    np.testing.assert_allclose(out, KNOWN[name], atol=DIGITS)


def test_known_iterates_of_sam():
  with jax.enable_x64(True):
    seen, _ = run(sam(optax.sgd(0.05), 0.1), jnp.array(START), quadratic, 3)
    np.testing.assert_allclose(seen, ITERATES, atol=DIGITS)


@pytest.mark.parametrize("name", [n for n in FAMILY if n != "esam"])
def test_is_the_definition_on_a_network(name):
  with jax.enable_x64(True):
    params, losses = network(np.float64)
    w, unravel = ravel_pytree(params)
    flat_gradient = jax.jit(jax.grad(lambda v: jnp.mean(losses(unravel(v)))))
    out = jax.jit(lambda: one(make(name), params, gradient(losses))[0])()
    expected = FAMILY[name][2](
      np.asarray(w), lambda v: np.asarray(flat_gradient(v))
    )
    np.testing.assert_allclose(ravel_pytree(out)[0], expected, rtol=1e-9)


def test_the_step_of_sam_is_the_gradient_of_the_norm():
  """Oracle 6: g(w + e) - g = rho H g / ||g||, exactly so on a quadratic."""
  with jax.enable_x64(True):
    w = jnp.array(START)
    g = quadratic(w)
    out, _ = one(sam(optax.identity(), 0.3), w, quadratic)
    slope = jax.grad(lambda w: 0.3 * jnp.linalg.norm(quadratic(w)))(w)
    np.testing.assert_allclose(out - g, slope, rtol=1e-10)


@pytest.mark.parametrize("base", [optax.sgd(0.1, 0.9), optax.adam(0.01)])
def test_equals_optax_sam_over_20_steps(base):
  params, losses = network()
  grad = gradient(losses)
  theirs = optax.contrib.sam(
    base,
    optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
    opaque_mode=True,
  )

  def run_20(tx, grad_fn):
    def step(carry, _):
      params, state = carry
      updates, state = tx.update(grad(params), state, params, grad_fn=grad_fn)
      params = optax.apply_updates(params, updates)
      return (params, state), params

    start = (params, tx.init(params))
    return jax.jit(lambda: jax.lax.scan(step, start, length=20)[1])()

  chex.assert_trees_all_close(
    run_20(sam(base, 0.05), grad),
    run_20(theirs, lambda params, i: grad(params)),
    atol=1e-6,
    rtol=1e-6,
  )


LAWS = {
  **{
    f"{name}, rho 0": (name, {"rho": 0.0}, optax.identity()) for name in FAMILY
  },
  "gam, rho 0": ("gam", {"rho": 0.0, "rho_prime": 0.0}, optax.identity()),
  "sagm, rho 0": ("sagm", {"rho": 0.0, "alpha": 0.0}, optax.identity()),
  "gsam, alpha 0": ("gsam", {"alpha": 0.0}, make("sam")),
  "look, k 1": ("look", {"k": 1}, make("sam")),
  "esam, all weights": ("esam", {"weight_fraction": 1.0}, make("sam")),
  "fisher, eta 0": ("fisher", {"eta": 0.0}, make("sam")),
}


@pytest.mark.parametrize("law", LAWS)
def test_what_it_reduces_to(law):
  name, changed, other = LAWS[law]
  params, losses = network()
  grad = gradient(losses)
  base = optax.sgd(0.1)
  tx = optax.chain(make(name, **changed), base)
  expected = optax.chain(optax.with_extra_args_support(other), base)
  seen, _ = run(tx, params, grad, 3)
  wanted, _ = run(expected, params, grad, 3)
  chex.assert_trees_all_close(seen, wanted, rtol=1e-5, atol=1e-6)


@members
def test_a_zero_gradient_gives_a_finite_step(name):
  params, _ = network()

  def grad(params):
    return jax.tree.map(jnp.zeros_like, params)

  seen, state = run(make(name, optax.adam(0.1)), params, grad, 3)
  chex.assert_trees_all_equal(seen[-1], params)
  chex.assert_tree_all_finite(state)


@pytest.mark.parametrize(
  ("name", "setting"), [(n, s) for n, (_, kw, _) in FAMILY.items() for s in kw]
)
def test_every_setting_may_be_a_schedule(name, setting):
  """Two updates with a schedule are one with each of its values."""
  first = FAMILY[name][1][setting]
  second = first + 1 if setting == "k" else first / 2
  params, losses = network()
  grad = gradient(losses)

  def twice(early, late):
    out, state = one(early, params, grad)
    return (out, *one(late, params, grad, state))

  scheduled = make(name, **{setting: lambda n: jnp.where(n, second, first)})
  # Outside jit each call of a branch is compiled: compile both at once.
  call = jax.jit if name == "look" else lambda f: f
  out = call(lambda: twice(scheduled, scheduled))()
  constant = [make(name, **{setting: value}) for value in (first, second)]
  expected = call(lambda: twice(*constant))()
  chex.assert_trees_all_close(out, expected, rtol=1e-5, atol=1e-7)


# LookSAM


def test_look_sam_reuses_the_orthogonal_part():
  """Steps 1 and 2 of a period of 3, written out; step 3 renews it."""
  with jax.enable_x64(True):
    tx = look_sam(optax.identity(), 0.1, 3, 0.7)
    points = [jnp.array(START) / (i + 1) for i in range(4)]
    state, outs = tx.init(points[0]), []
    for w in points:
      out, state = one(tx, w, quadratic, state)
      outs.append(np.asarray(out))
    gs = [np.asarray(quadratic(w)) for w in points]
    for i in (0, 3):
      renewed = ref_sam(np.asarray(points[i]), quadratic)
      np.testing.assert_allclose(outs[i], renewed, rtol=1e-12)
    across = part_across(outs[0], gs[0])
    for i in (1, 2):
      reused = 0.7 * np.linalg.norm(gs[i]) * unit(across)
      np.testing.assert_allclose(outs[i], gs[i] + reused, rtol=1e-10)


@pytest.mark.parametrize(
  ("tx", "evaluations"),
  [(look_sam(optax.sgd(0.1), k=3), 3), (sam(optax.sgd(0.1), every=4), 2)],
)
def test_cheap_steps_do_not_evaluate_the_gradient(tx, evaluations):
  params, losses = network()
  calls = []

  def grad(params):
    jax.debug.callback(lambda: calls.append(len(calls)))
    return gradient(losses)(params)

  @jax.jit
  def update(state):
    return tx.update(params, state, params, grad_fn=grad)[1]

  state = tx.init(params)
  for _ in range(7):
    state = update(state)
  jax.effects_barrier()
  assert len(calls) == evaluations


def test_a_checkpoint_holds_all_that_look_sam_remembers(tmp_path):
  params, losses = network()
  grad = gradient(losses)
  tx = look_sam(
    optax.adam(0.01), k=3, aux_like=jax.ShapeDtypeStruct((), jnp.float32)
  )

  def grad_fn(params):
    return grad(params), jnp.mean(losses(params))

  @jax.jit
  def step(state):
    updates, opt_state = tx.update(
      grad(state.params), state.opt_state, state.params, grad_fn=grad_fn
    )
    return state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
    )

  state = step(step(TrainState.create(params, tx)))
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(2, state, None)
  restored = checkpointer.restore(
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state,
    ),
    None,
  )
  checkpointer.close()
  chex.assert_trees_all_equal(step(restored), step(state))


# ESAM


def test_esam_takes_the_samples_whose_loss_grows_most():
  params, losses = network(batch=7)
  grad = gradient(losses)
  tx = esam(optax.identity(), 0.3, 1.0, 0.4)
  seen = []

  def grad_fn(params, chosen):
    seen.append((params, chosen))
    return gradient(lambda p: losses(p)[chosen])(params)

  out, _ = tx.update(
    grad(params), tx.init(params), params, grad_fn=grad_fn, losses_fn=losses
  )
  [(perturbed, chosen)] = seen
  growth = losses(perturbed) - losses(params)
  assert chosen.tolist() == np.argsort(-growth)[:3].tolist()  # round(2.8)
  expected = gradient(lambda p: losses(p)[chosen])(perturbed)
  chex.assert_trees_all_close(out, expected, rtol=1e-6)
  epsilon, _ = sam_ascent(0.3).update(grad(params), AscentState(jnp.int32(0)))
  chex.assert_trees_all_close(
    perturbed, optax.apply_updates(params, epsilon), rtol=1e-6
  )


def test_esam_on_all_samples_is_sam():
  params, losses = network()
  grad = gradient(losses)
  tx = esam(optax.identity(), 0.1, 1.0, 1.0)
  out, _ = tx.update(
    grad(params),
    tx.init(params),
    params,
    grad_fn=lambda p, chosen: gradient(lambda p: losses(p)[chosen])(p),
    losses_fn=losses,
  )
  chex.assert_trees_all_close(out, one(make("sam"), params, grad)[0], rtol=1e-5)


def test_esam_draws_weights_by_seed_and_count():
  params = {"w": jnp.zeros(2000)}
  grads = {"w": jnp.ones(2000)}

  def perturbation(seed, count):
    tx = esam(optax.identity(), 0.1, 0.25, seed=seed)
    state = tx.init(params)
    for _ in range(count + 1):
      out, state = tx.update(grads, state, params, grad_fn=lambda p: p)
    return np.asarray(out["w"])

  drawn = perturbation(0, 0)
  # Kept weights get 4 times SAM's share of 0.1 / sqrt(2000).
  np.testing.assert_allclose(drawn[drawn != 0], 0.4 / np.sqrt(2000), rtol=1e-5)
  assert abs(np.mean(drawn != 0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)
  np.testing.assert_array_equal(drawn, perturbation(0, 0))
  assert np.any(drawn != perturbation(0, 1))
  assert np.any(drawn != perturbation(1, 0))


# Cost


def flops(tx, count=None):
  """Of one step, compiled. A known `count` leaves one branch."""
  params, losses = network(batch=2048, sizes=(64, 128, 32))
  grad = gradient(losses)

  def step(params, state):
    if count is not None:
      state = state._replace(count=jnp.int32(count))
    updates, state = one(tx, params, grad, state)
    return optax.apply_updates(params, updates), state

  compiled = jax.jit(step).lower(params, tx.init(params)).compile()
  return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(
  ("name", "count", "gradients"),
  [
    *((name, None, 2.02) for name in FAMILY if name not in ("gam", "look")),
    ("gam", None, 4.05),
    ("look", 0, 2.02),
    ("look", 1, 1.02),
  ],
)
def test_compiled_flops(name, count, gradients, flops_of_adam):
  """As many gradients as the docstring says; the rest is under 2 %."""
  total = flops(make(name, optax.adam(0.1)), count)
  assert total < gradients * flops_of_adam


def test_esam_that_chooses_leaves_out_a_part_of_a_backward_pass(flops_of_adam):
  """One gradient, a forward pass (0.43 here), and a gradient of a quarter."""
  params, losses = network(batch=2048, sizes=(64, 128, 32))
  tx = esam(optax.adam(0.1), data_fraction=0.25)

  def step(params, state):
    updates, state = tx.update(
      gradient(losses)(params), state, params, losses_fn=losses,
      grad_fn=lambda p, chosen: gradient(lambda p: losses(p, chosen))(p),
    )  # fmt: skip
    return optax.apply_updates(params, updates), state

  compiled = jax.jit(step).lower(params, tx.init(params)).compile()
  assert compiled.cost_analysis()["flops"] < 1.72 * flops_of_adam


@pytest.fixture(scope="module")
def flops_of_adam():
  return flops(optax.with_extra_args_support(optax.adam(0.1)))


def test_the_example_in_the_docstring_runs():
  runner = doctest.DocTestRunner()
  [example] = doctest.DocTestFinder(recurse=False).find(sharpness.sam, "sam")
  assert runner.run(example) == (0, len(example.examples))
