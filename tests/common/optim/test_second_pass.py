"""What every member of the SAM family keeps to: chains, masks, accumulation,
aux, low precision, shards."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.optim import (
  esam,
  fill_masked,
  gam,
  gsam,
  look_sam,
  sagm,
  sam,
  sam_ascent,
  sharpness_aware,
)
from common.parallel import make_mesh, shardings
from common.tree import global_norm

RHO = 0.1
WEIGHTS = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
MASK = {"body": True, "head": {"kernel": False, "bias": True}}


def make_params(dtype=jnp.float32):
  rng = np.random.default_rng(1)
  shapes = {"body": (8, 16), "head": {"kernel": (16, 8), "bias": (8,)}}
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def predict(params, x):
  hidden = jnp.tanh(x @ params["body"])
  return hidden @ params["head"]["kernel"] + params["head"]["bias"][None]


def loss(params, x=WEIGHTS):
  """[B, 8] inputs; their mean is that of the rows."""
  x = jnp.asarray(x, params["body"].dtype)
  return jnp.mean(jnp.sin(predict(params, x)) + predict(params, x) ** 2)


grad = jax.grad(loss)


def step(tx, params, state=None, grad_fn=grad, grads=None, **extra):
  """One update: (updates, state)."""
  state = tx.init(params) if state is None else state
  grads = grad(params) if grads is None else grads
  return tx.update(grads, state, params, grad_fn=grad_fn, **extra)


def by_hand(params, rho=RHO, mask=None, grad_fn=grad, grads=None):
  """SAM's gradient."""
  grads = grad(params) if grads is None else grads
  if mask is not None:
    grads = jax.tree.map(lambda m, g: g if m else 0 * g, mask, grads)
  scale = rho / global_norm(grads)
  return grad_fn(jax.tree.map(lambda p, g: p + scale * g, params, grads))


def close(actual, expected, rtol=1e-5, atol=1e-6):
  chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


# Chains


def test_a_clip_before_acts_on_the_first_gradient_only():
  params = make_params()
  tx = optax.chain(optax.clip(0.01), sam(optax.identity(), RHO))
  clipped = jax.tree.map(lambda g: jnp.clip(g, -0.01, 0.01), grad(params))
  close(step(tx, params)[0], by_hand(params, grads=clipped))


@pytest.mark.parametrize(
  "tx",
  [
    optax.chain(sam(optax.identity(), RHO), optax.clip(0.01)),
    sam(optax.clip(0.01), RHO),
  ],
)
def test_a_clip_after_or_inside_acts_on_the_outcome(tx):
  params = make_params()
  expected = jax.tree.map(lambda g: jnp.clip(g, -0.01, 0.01), by_hand(params))
  close(step(tx, params)[0], expected)


def test_the_base_may_need_more_arguments():
  params = make_params()
  tx = sam(optax.polyak_sgd(), RHO)
  value = loss(params)
  expected, _ = optax.polyak_sgd().update(
    by_hand(params), optax.polyak_sgd().init(params), params, value=value
  )
  close(step(tx, params, value=value)[0], expected)


def test_the_base_may_take_gradients_itself():
  def init(params):
    del params
    return optax.EmptyState()

  def update(updates, state, params, *, grad_fn, **extra):
    return jax.tree.map(jnp.subtract, updates, grad_fn(params)), state

  params = make_params()
  tx = sam(optax.GradientTransformationExtraArgs(init, update), RHO)
  expected = jax.tree.map(jnp.subtract, by_hand(params), grad(params))
  close(step(tx, params)[0], expected)


def test_hyper_parameters_can_be_injected():
  params = make_params()
  tx = optax.inject_hyperparams(sam)(base=optax.identity(), rho=0.3)
  state = tx.init(params)
  state.hyperparams["rho"] = jnp.float32(RHO)
  close(step(tx, params, state)[0], by_hand(params))


# Accumulation


def micro_batches():
  halves = [WEIGHTS[:4], WEIGHTS[4:]]
  return [lambda p, x=x: jax.grad(loss)(p, x) for x in halves]


def test_accumulation_inside_perturbs_with_each_micro_batch():
  params = make_params()
  base = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
  tx = sam(base, RHO)
  state = None
  for grad_fn in micro_batches():
    updates, state = step(tx, params, state, grad_fn, grad_fn(params))
  each = [by_hand(params, grad_fn=f, grads=f(params)) for f in micro_batches()]
  close(updates, jax.tree.map(lambda a, b: -(a + b) / 2, *each))


def test_accumulation_outside_is_the_large_batch_if_grad_fn_is():
  params = make_params()
  tx = optax.MultiSteps(sam(optax.sgd(1.0), RHO), 2)
  for whole_batch in (True, False):
    state = None
    for micro in micro_batches():
      grad_fn = grad if whole_batch else micro
      updates, state = step(tx, params, state, grad_fn, micro(params))
    # The perturbation is that of the mean gradient in either case.
    close(updates, jax.tree.map(jnp.negative, by_hand(params, grad_fn=grad_fn)))
  assert int(state.inner_opt_state.count) == 1  # one update, two micro-steps


# Masks


@pytest.mark.parametrize(
  ("mask", "whole"),
  [
    (MASK, MASK),
    (lambda tree: jax.tree.map(lambda m, _: m, MASK, tree), MASK),
    (
      {"body": True, "head": False},
      {"body": True, "head": {"kernel": False, "bias": False}},
    ),
  ],
)
def test_a_mask_leaves_parameters_where_they_are(mask, whole):
  params = make_params()
  tx = sam(optax.identity(), RHO, mask=mask)
  close(step(tx, params)[0], by_hand(params, mask=whole))


@pytest.mark.parametrize(
  "member", [sam, gam, functools.partial(look_sam, k=1), esam]
)
def test_what_is_masked_is_the_same_at_every_evaluation(member):
  params = make_params()
  seen = []

  def grad_fn(point):
    seen.append(point)
    return grad(point)

  tx = member(optax.identity(), mask=MASK)
  tx.update(grad(params), tx.init(params), params, grad_fn=grad_fn)
  assert seen
  for point in seen:
    moved = jax.tree.map(lambda p, q: bool(jnp.any(p != q)), params, point)
    assert moved == MASK


def test_inside_optax_masked_what_is_masked_out_is_not_perturbed():
  params = make_params()
  tx = optax.masked(sam(optax.scale(-2.0), RHO), MASK)
  updates, _ = step(tx, params, grad_fn=fill_masked(grad, params))
  inside = jax.tree.map(lambda g: -2 * g, by_hand(params, mask=MASK))
  # optax.masked hands the gradients outside on as they are.
  expected = jax.tree.map(
    lambda m, i, g: i if m else g, MASK, inside, grad(params)
  )
  close(updates, expected)


def test_groups_of_parameters_may_have_different_optimizers():
  params = make_params()
  labels = jax.tree.map(lambda m: "sharp" if m else "plain", MASK)
  txs = {"sharp": sam(optax.scale(-1.0), RHO), "plain": optax.scale(-3.0)}
  tx = optax.multi_transform(txs, labels)
  filled = fill_masked(lambda p: (grad(p), "aux"), params)
  updates, _ = step(tx, params, grad_fn=filled)
  expected = jax.tree.map(
    lambda m, sharp, g: -sharp if m else -3 * g,
    MASK,
    by_hand(params, mask=MASK),
    grad(params),
  )
  close(updates, expected)


# Aux, periods


def test_the_last_aux_stays_readable_in_the_state():
  """In a scan too: its structure is known from the start."""
  params = make_params()

  def grad_fn(point):
    return grad(point), {"loss": loss(point), "point": point}

  like = jax.eval_shape(grad_fn, params)[1]
  tx = sam(optax.sgd(0.01), RHO, every=2, aux_like=like)

  def one(carry, _):
    params, state = carry
    updates, state = tx.update(grad(params), state, params, grad_fn=grad_fn)
    after = optax.apply_updates(params, updates)
    return (after, state), (params, state.aux)

  _, (seen, aux) = jax.jit(
    lambda: jax.lax.scan(one, (params, tx.init(params)), length=4)
  )()
  for i, source in enumerate((0, 0, 2, 2)):  # odd steps evaluate nothing
    start = jax.tree.map(lambda x, s=source: x[s], seen)
    scale = RHO / global_norm(grad(start))
    point = jax.tree.map(lambda p, g, s=scale: p + s * g, start, grad(start))
    close(jax.tree.map(lambda x, i=i: x[i], aux["point"]), point)
    close(aux["loss"][i], loss(point))


def test_without_aux_like_the_aux_is_dropped():
  params = make_params()
  updates, state = step(
    sam(optax.identity(), RHO), params, grad_fn=lambda p: (grad(p), loss(p))
  )
  close(updates, by_hand(params))
  assert state.aux == ()


def test_parameters_that_are_a_pair_are_no_gradients_and_aux():
  params = (jnp.ones(3), jnp.ones(3))
  tx = sam(optax.identity(), RHO)
  updates, _ = step(tx, params, grads=params, grad_fn=lambda p: p)
  expected = jax.tree.map(lambda p: p + RHO / np.sqrt(6), params)
  close(updates, expected)


@pytest.mark.parametrize("member", [sam, gam, esam])
def test_between_its_turns_it_is_the_base_optimizer(member):
  params = make_params()
  grads = grad(params)

  @functools.partial(jax.jit, static_argnums=0)
  def update(every, state):
    tx = member(optax.identity(), every=every)
    return tx.update(grads, state, params, grad_fn=grad)

  state = start = member(optax.identity()).init(params)
  for count in range(4):
    updates, state = update(3, state)
    # Schedules and draws see the number of updates, not of turns.
    now = jax.tree.map(lambda x, c=count: jnp.full_like(x, c), start)
    close(updates, grads if count % 3 else update(1, now)[0])


# Precision


@pytest.mark.parametrize("member", [sam, gsam, sagm, gam, look_sam, esam])
def test_bfloat16_parameters_stay_bfloat16(member):
  params = make_params(jnp.bfloat16)
  tx = member(optax.adam(0.1))
  state = jax.eval_shape(tx.init, params)
  updates, after = jax.eval_shape(
    lambda state, params: step(tx, params, state), state, params
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_bfloat16_parameters_move_by_rho():
  params = make_params(jnp.bfloat16)
  tx = sam(optax.identity(), 1.0, aux_like=params)
  _, state = step(tx, params, grad_fn=lambda p: (grad(p), p))
  moved = jax.tree.map(
    lambda p, q: np.float64(q) - np.float64(p), params, state.aux
  )
  length = np.sqrt(sum(np.sum(m**2) for m in jax.tree.leaves(moved)))
  # Weights near 1 are rounded by up to 2^-9, against moves of about 1/16.
  np.testing.assert_allclose(length, 1.0, rtol=5e-3)


# Shards


def fsdp():
  mesh = make_mesh({"data": 2, "fsdp": 4})
  rules = [("body|kernel", jax.P("fsdp")), (".*", jax.P())]
  params = make_params()
  x = jax.device_put(WEIGHTS, jax.NamedSharding(mesh, jax.P("data")))
  return jax.device_put(params, shardings(params, mesh, rules)), x


@pytest.mark.parametrize("member", [sam, gam, look_sam, esam])
def test_sharded_is_unsharded(member):
  """Float32, whose sums are taken in another order."""

  @jax.jit
  def train(params, x):
    grad_fn = lambda p: jax.grad(loss)(p, x)  # noqa: E731
    tx = member(optax.sgd(0.1))
    updates, state = step(tx, params, None, grad_fn, grad_fn(params))
    return optax.apply_updates(params, updates), state

  sharded, expected = train(*fsdp()), train(make_params(), WEIGHTS)
  assert not sharded[0]["body"].sharding.is_fully_replicated
  gap = jax.tree.map(lambda a, b: np.asarray(a) - b, sharded, expected)
  assert global_norm(gap) < 1e-6 * global_norm(expected)


def test_the_radius_is_kept_when_parameters_are_sharded():
  params, x = fsdp()
  ascent = sam_ascent(RHO)
  epsilon = jax.jit(
    lambda p, x: ascent.update(jax.grad(loss)(p, x), ascent.init(p), p)[0],
    out_shardings=jax.tree.map(lambda p: p.sharding, params),
  )(params, x)
  assert epsilon["body"].sharding.spec == jax.P("fsdp")
  square = sum(np.sum(np.float64(e) ** 2) for e in jax.tree.leaves(epsilon))
  np.testing.assert_allclose(np.sqrt(square), RHO, rtol=1e-6)


def update_on_each_of_8(tx, params, x):
  def local(params, x):
    grad_fn = lambda p: jax.grad(loss)(p, x)  # noqa: E731
    grads = grad_fn(jax.lax.pcast(params, "data", to="varying"))
    return step(tx, params, None, grad_fn, grads)

  return jax.jit(
    jax.shard_map(
      local,
      mesh=make_mesh({"data": 8}),
      in_specs=(jax.P(), jax.P("data")),
      out_specs=jax.P(),
    )
  )(params, x)


@pytest.mark.parametrize("member", [sam, look_sam])
def test_m_sharpness_perturbs_each_shard_along_its_own_gradient(member):
  """Only on demand: the outcome depends on the number of devices."""
  params = make_params()
  tx = member(optax.identity(), RHO, axis_name="data")
  updates, state = update_on_each_of_8(tx, params, WEIGHTS)
  rows = [lambda p, x=x: jax.grad(loss)(p, x[None]) for x in WEIGHTS]
  each = [by_hand(params, grad_fn=f, grads=f(params)) for f in rows]
  close(updates, jax.tree.map(lambda *g: sum(g) / 8, *each))
  assert int(state.count) == 1


def test_m_sharpness_on_equal_shards_changes_nothing():
  params = make_params()
  rows = np.tile(WEIGHTS[:1], (8, 1))
  tx = gam(optax.identity(), RHO, axis_name="data")
  updates, _ = update_on_each_of_8(tx, params, rows)
  grad_fn = lambda p: jax.grad(loss)(p, rows[:1])  # noqa: E731
  tx = gam(optax.identity(), RHO)
  expected, _ = step(tx, params, None, grad_fn, grad_fn(params))
  close(updates, expected)


# Errors


def update(tx, params=..., **kwargs):
  real = make_params()
  params = real if params is ... else params
  return tx.update(real, tx.init(real), params, **kwargs)


SAM = sam(optax.sgd(1.0))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: sam(optax.sgd(1.0), every=0), "every=0 must be a whole number"),
    (lambda: gam(optax.sgd(1.0), every=1.5), "every=1.5 must be a whole"),
    (lambda: update(SAM), "a second gradient needs grad_fn: call update"),
    (lambda: update(SAM, None, grad_fn=grad), "a second gradient needs params"),
    (
      lambda: update(SAM, grad_fn=jax.value_and_grad(loss)),
      r"grad_fn returned \(value, grads\)",
    ),
    (
      lambda: update(SAM, grad_fn=lambda p: p["body"]),
      r"like the parameters, .*'bias': \(8,\).* got \(8, 16\)",
    ),
    (
      lambda: update(sam(optax.sgd(1.0), aux_like=jnp.zeros(())), grad_fn=grad),
      r"must be like aux_like, \(\); got none",
    ),
    (
      lambda: update(
        sam(optax.sgd(1.0), aux_like=jnp.zeros(())),
        grad_fn=lambda p: (grad(p), jnp.zeros(3)),
      ),
      r"must be like aux_like, \(\); got \(3,\)",
    ),
  ],
)
def test_what_makes_no_sense_is_refused(call, message):
  with pytest.raises(UserError, match=message):
    call()


def test_a_new_member_is_an_ascent_and_a_combination():
  """The builder, with a random ascent and the sum of both gradients."""
  params = make_params()
  noise = jax.tree.map(lambda p: jnp.cos(17 * p), params)
  ascent = optax.stateless(lambda grads, params: noise)
  tx = sharpness_aware(
    optax.identity(),
    ascent,
    lambda g, g_p, count: jax.tree.map(lambda a, b: a + b * count, g, g_p),
    mask=MASK,
  )
  state = tx.init(params)._replace(count=jnp.int32(3))
  there = jax.tree.map(lambda m, p, n: p + n if m else p, MASK, params, noise)
  expected = jax.tree.map(lambda a, b: a + 3 * b, grad(params), grad(there))
  close(step(tx, params, state)[0], expected)
