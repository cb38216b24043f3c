"""Eigenvalues against dense Hessians, lines and gaps against formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from common.errors import UserError
from common.parallel import make_mesh
from udim import landscape
from udim.landscape import data_line, line, perturb_gap, top_eigenvalues
from udim.perturb import perturb_images

X64 = jax.enable_x64


def mlp(seed=0, widths=(5, 8, 8), rows=16):
  """Parameters and a batch of a net with one hidden layer."""
  rng = np.random.default_rng(seed)
  inputs, hidden, classes = widths
  params = {
    "hidden": rng.normal(size=(inputs, hidden)),
    "head": {
      "kernel": rng.normal(size=(hidden, classes)),
      "bias": rng.normal(size=classes),
    },
  }
  batch = {
    "image": rng.normal(size=(rows, inputs)),
    "label": rng.integers(classes, size=rows, dtype=np.int32),
  }
  return params, batch


def loss(params, batch):
  features = jnp.tanh(batch["image"] @ params["hidden"])
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  return optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, batch["label"]
  ).mean()


def quadratic(matrix, linear, w):
  return jnp.dot(w, matrix @ w) / 2 + jnp.dot(linear, w)


@jax.jit
def hessian_of(params, batch):
  flat, unravel = ravel_pytree(params)
  return jax.hessian(lambda flat: loss(unravel(flat), batch))(flat)


def dense_eigenvalues(params, batch):
  """All of them, falling."""
  return np.linalg.eigvalsh(hessian_of(params, batch))[::-1]


def eigenvalues(params, batch, seed=0, *, count=1, iterations):
  return top_eigenvalues(
    Partial(loss, batch=batch),
    params,
    jax.random.key(seed),
    count=count,
    iterations=iterations,
  )


@pytest.mark.parametrize(("count", "iterations"), [(1, 30), (3, 60), (3, 1000)])
def test_eigenvalues_of_a_network(count, iterations):
  for seed in range(3):
    with X64(True):
      params, batch = jax.tree.map(jnp.asarray, mlp(seed))
      expected = dense_eigenvalues(params, batch)
      found = eigenvalues(params, batch, count=count, iterations=iterations)
      values, residuals = map(np.asarray, found)
    assert values.dtype == np.float64
    assert expected.shape == (112,)
    assert expected[-1] < 0
    np.testing.assert_allclose(values, expected[:count], rtol=1e-6)
    assert np.all(residuals < 1e-3)
    if iterations > 112:  # then nothing is left to find
      np.testing.assert_allclose(values, expected[:count], rtol=1e-12)
      np.testing.assert_allclose(residuals, 0, atol=1e-12)


def test_residuals_bound_the_error():
  with X64(True):
    params, batch = jax.tree.map(jnp.asarray, mlp())
    expected = dense_eigenvalues(params, batch)
    found = [eigenvalues(params, batch, iterations=n) for n in (3, 30)]
    values, residuals = np.squeeze(np.transpose(found, (1, 0, 2)), -1)
  nearest = np.abs(values[:, None] - expected[None]).min(axis=1)
  assert np.all(nearest <= residuals)
  assert residuals[0] > 0.1 > 1e-3 > residuals[1]
  assert values[0] < values[1] <= expected[0] + 1e-12  # from below


def test_every_key_finds_the_same():
  with X64(True):
    params, batch = jax.tree.map(jnp.asarray, mlp())
    found = [eigenvalues(params, batch, s, iterations=30) for s in range(3)]
    values, residuals = np.squeeze(np.transpose(found, (1, 0, 2)), -1)
  np.testing.assert_allclose(values, values[:1].repeat(3), rtol=1e-6)
  assert len(set(residuals)) == 3  # each from a start of its own


def eigenvalues_of_matrix(matrix, *, count, iterations):
  size = len(matrix)
  return top_eigenvalues(
    Partial(quadratic, matrix, jnp.ones(size)),
    jnp.ones(size),
    jax.random.key(0),
    count=count,
    iterations=iterations,
  )


def test_two_products_by_hand():
  """The whole iteration, written out with NumPy."""
  matrix = np.diag([1.0, 4.0, 9.0, -3.0])
  with X64(True):
    values, residuals = map(
      np.asarray,
      eigenvalues_of_matrix(jnp.asarray(matrix), count=2, iterations=2),
    )
    key = jax.random.fold_in(jax.random.key(0), 0)
    first = np.asarray(jax.random.normal(key, (4,), jnp.float64))
  basis, _ = np.linalg.qr(np.stack([first, matrix @ first], axis=1))
  expected, inside = np.linalg.eigh(basis.T @ matrix @ basis)
  vectors = basis @ inside
  lengths = np.linalg.norm(matrix @ vectors - vectors * expected[None], axis=0)
  np.testing.assert_allclose(values, expected[::-1], rtol=1e-12)
  np.testing.assert_allclose(residuals, lengths[::-1], rtol=1e-10)


SPECTRA = {
  "distinct": [9.0, 4.0, 1.0, 0.5],
  "negative": [-1.0, -4.0, -9.0, -10.0],  # no 0 from nowhere
  "by value": [2.0, 0.0, -1.0, -100.0],  # not by magnitude
  "repeated": [5.0, 5.0, 5.0, 1.0],  # one Krylov space finds one of them
  "round": [3.0, 3.0, 3.0, 3.0],
  "low rank": [7.0, 0.0, 0.0, 0.0],
  "flat": [0.0, 0.0, 0.0, 0.0],
  "small": [4e-6, 3e-6, 2e-6, 1e-6],
  "lonely": [7.0],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-12), (False, 2e-6)])
def test_iterations_beyond_the_dimension(spectrum, x64, tolerance):
  expected = np.array(SPECTRA[spectrum])
  size = len(expected)
  turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
  matrix = turn @ np.diag(expected) @ turn.T
  with X64(x64):
    matrix = jnp.asarray(matrix, np.float64 if x64 else np.float32)
    found = eigenvalues_of_matrix(matrix, count=size, iterations=40)
    values, residuals = map(np.asarray, found)
  tolerance *= np.abs(expected).max()
  np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance)
  np.testing.assert_allclose(residuals, 0, atol=tolerance)


def test_eigenvalues_follow_the_parameters():
  """Of the sum of w^4 / 12 the Hessian is the diagonal of w^2."""
  with X64(True):
    values, _ = top_eigenvalues(
      lambda w: sum(jnp.sum(x**4) for x in w.values()) / 12,
      {"a": jnp.array([[1.0, 2.0], [3.0, 0.5]]), "b": jnp.array(5.0)},
      jax.random.key(0),
      count=5,
    )
    values = np.asarray(values)
  np.testing.assert_allclose(values, [25, 9, 4, 1, 0.25], rtol=1e-12)


def test_parameters_of_bfloat16_are_widened():
  diagonal = jnp.array([1.0, 4.0, 9.0], jnp.float32)
  values, _ = top_eigenvalues(
    lambda w: jnp.sum(diagonal * w * w) / 2,
    jnp.ones(3, jnp.bfloat16),
    jax.random.key(0),
  )
  assert values.dtype == jnp.float32
  np.testing.assert_allclose(values, [9], rtol=1e-6)


SPECS = {"hidden": P(None, "data"), "head": {"kernel": P("data"), "bias": P()}}


def placed(params, batch):
  place = functools.partial(NamedSharding, make_mesh({"data": 8}))
  params = jax.device_put(params, jax.tree.map(place, SPECS))
  return params, jax.device_put(batch, place(P("data")))


@jax.jit
def lines(params, batch):
  loss_fn = functools.partial(loss, batch=batch)
  direction = jax.tree.map(jnp.cos, params)
  return (
    line(loss_fn, params, direction, [-0.5, 0.0, 0.5]),
    perturb_gap(loss_fn, params, [0.01, 0.05]),
  )


def test_one_device_equals_eight():
  found = []
  for place in (lambda *problem: problem, placed):
    with X64(True):
      arguments = place(*mlp())
      here = eigenvalues(*arguments, count=2, iterations=6), lines(*arguments)
      found.append(jax.tree.map(np.asarray, here))
  for a, b in zip(*map(jax.tree.leaves, found)):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_vectors_lie_where_the_parameters_do():
  """A device holds an eighth of a vector whose parameter is in eight parts."""
  params, _ = placed(*mlp())
  basis, first, _ = landscape._start(params, jax.random.key(0), 4)
  for leaf, vector, rows in zip(*map(jax.tree.leaves, (params, first, basis))):
    here = leaf.sharding.shard_shape(leaf.shape)
    assert vector.sharding.shard_shape(vector.shape) == here
    assert rows.sharding.shard_shape(rows.shape) == (4, *here)


def test_parameters_of_one_device_and_a_batch_of_eight():
  params, batch = mlp()
  with X64(True):
    params = jax.tree.map(jnp.asarray, params)
    found = [
      np.asarray(eigenvalues(params, b, iterations=30)[0])
      for b in (batch, placed(*mlp())[1])
    ]
  np.testing.assert_allclose(*found, rtol=1e-9)


def test_one_program_for_all_batches():
  traces = []

  def counted(params, batch):
    traces.append(batch)
    return loss(params, batch)

  def run(seed):
    params, batch = mlp(seed)
    key = jax.random.key(seed)
    top_eigenvalues(Partial(counted, batch=batch), params, key, iterations=4)
    return len(traces)

  with X64(True):
    first = run(0)
    assert first == run(1) == run(2) > 0


def test_a_line_of_a_quadratic():
  with X64(True):
    params = {"a": jnp.array([3.0, 2.0]), "b": jnp.array(-1.0)}
    direction = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}  # length 5
    distances = np.array([-5.0, 0.0, 0.5, 10.0])

    def loss_fn(params):
      return jnp.sum(params["a"] ** 2) + 10 * params["b"]

    losses = np.asarray(line(loss_fn, params, direction, distances))
  expected = (3 + 0.6 * distances) ** 2 + 4 + 10 * (-1 + 0.8 * distances)
  np.testing.assert_allclose(losses, expected, rtol=1e-10)


def test_the_length_of_a_direction_does_not_matter():
  with X64(True):
    w, d = jnp.array([3.0, 2.0]), jnp.array([1.0, -1.0])
    found = [line(jnp.prod, w, scale * d, [0.3]) for scale in (1e-3, 1, 50)]
    np.testing.assert_allclose(found, np.full((3, 1), found[1]), rtol=1e-8)


def test_a_direction_of_zero_leads_nowhere():
  params = jnp.array([1.0, 2.0])
  losses = line(jnp.prod, params, jnp.zeros(2), [0.0, 3.0])
  np.testing.assert_array_equal(losses, [2, 2])


def test_a_line_of_bfloat16_parameters_is_not_rounded():
  params = jnp.array([1.0, 0.0], jnp.bfloat16)
  losses = line(lambda w: w[0], params, params, [0.001, 0.002])
  np.testing.assert_allclose(losses, [1.001, 1.002], rtol=1e-6)


def test_a_line_of_data():
  with X64(True):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 4, 4, 2))
    # Each image has a length of its own, whatever its direction's.
    direction = rng.normal(size=images.shape)
    direction *= np.array([1e-3, 1, 50])[:, None, None, None]
    direction[1] = 0
    weights = rng.normal(size=images.shape)
    distances = [-1.0, 0.0, 2.0]
    losses = data_line(
      lambda x: jnp.sum(weights * x),
      jnp.asarray(images),
      jnp.asarray(direction),
      distances,
    )
    losses = np.asarray(losses)
  slope = sum(
    np.sum(w * d) / np.linalg.norm(d)
    for w, d in zip(weights, direction)
    if d.any()
  )
  expected = np.sum(weights * images) + np.array(distances) * slope
  np.testing.assert_allclose(losses, expected, rtol=1e-10)


def test_a_line_of_data_passes_the_perturbed_images():
  images = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 3, 3, 1)))
  direction = jnp.cos(9 * images)
  perturbed = perturb_images(images, direction, rho_x=0.7)
  (found,) = data_line(lambda x: jnp.sum(x**3), images, direction, [0.7])
  np.testing.assert_allclose(found, jnp.sum(perturbed**3), rtol=1e-6)


def test_the_gap_of_a_quadratic():
  """Of f = (w-c)'A(w-c)/2: rho ||g|| + rho^2 g'Ag / (2 ||g||^2)."""
  curvature, centre = np.array([1.0, 4, 9]), np.array([1.0, -1, 2])
  radii = np.array([0.0, 0.01, 0.02, 0.05, 0.1])
  with X64(True):
    gaps = perturb_gap(
      lambda w: jnp.sum(curvature * (w - centre) ** 2) / 2,
      jnp.array([3.0, 2, -1]),
      radii,
    )
    gaps = np.asarray(gaps)
  gradient = np.array([2.0, 12, -27])
  length = 29.614186
  bent = np.sum(curvature * gradient**2) / length**2
  expected = radii * length + radii**2 * bent / 2
  np.testing.assert_allclose(gaps, expected, atol=1e-7)


def test_the_gap_at_a_minimum_is_zero():
  gaps = perturb_gap(lambda w: jnp.sum(w**2), jnp.zeros(3), [0.01, 0.05])
  np.testing.assert_array_equal(gaps, [0, 0])


@pytest.mark.parametrize(
  ("count", "iterations", "words"),
  [
    (0, 30, "count=0"),
    (4, 30, r"count=4 .* iterations=30 and 3 parameters"),
    (2, 1, r"count=2 .* iterations=1 "),
    (1, 0, "iterations=0"),
  ],
)
def test_mistakes_are_one_line(count, iterations, words):
  with pytest.raises(UserError, match=words) as info:
    top_eigenvalues(
      jnp.sum,
      jnp.ones(3),
      jax.random.key(0),
      count=count,
      iterations=iterations,
    )
  assert "\n" not in str(info.value)


def test_eigenvalues_inside_jit_are_refused():
  with pytest.raises(UserError, match="outside jit"):
    jax.jit(lambda w: top_eigenvalues(jnp.sum, w, jax.random.key(0)))(
      jnp.ones(3)
    )


def test_images_of_integers_have_no_line():
  images = jnp.zeros((2, 4, 4, 1), jnp.uint8)
  with pytest.raises(UserError, match="uint8"):
    data_line(jnp.sum, images, jnp.ones(images.shape), [1.0])
