"""The ascent on the data: its gradient, its length, and images by style."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.optim.ascent import sam_ascent
from udim import exact_data_grad, perturb_images

X64 = jax.enable_x64


def net():
  """The network, images and labels of tests/udim/test_passes.py."""
  row = np.arange(6.0)[:, None]
  column = np.arange(6.0)[None, :]
  params = {
    "hidden": 0.4 * np.cos(0.5 * row[:5] + 0.7 * column[:, :4]),
    "head": {
      "kernel": 0.3 * np.sin(1 + 0.4 * row[:4] + 0.9 * column[:, :3]),
      "bias": 0.1 * np.arange(3.0),
    },
  }
  images = np.sin(0.9 * row + 0.4 * column[:, :5] + 0.3)
  return jax.tree.map(jnp.asarray, params), jnp.asarray(images)


LABELS = (2 * np.arange(6) + 1) % 3


def loss(params, images):
  logits = jnp.tanh(images @ params["hidden"]) @ params["head"]["kernel"]
  logits += params["head"]["bias"][None]
  labels = jnp.asarray(LABELS)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean()


def ascent(params, images, rho):
  grads = jax.grad(loss)(params, images)
  transform = sam_ascent(rho)
  return transform.update(grads, transform.init(params))[0]


def upper_bound(params, images, rho):
  """A = L + rho ||grad L||."""
  norm = optax.tree.norm(jax.grad(loss)(params, images))
  return loss(params, images) + rho * norm


@jax.jit
def gradients(params, images, rho):
  """Of the data, exact and fast."""

  def data_grad(params):
    return jax.grad(loss, argnums=1)(params, images)

  eps = ascent(params, images, rho)
  exact = exact_data_grad(data_grad, params, eps)
  return exact, data_grad(optax.apply_updates(params, eps))


def both(rho):
  return map(np.asarray, gradients(*net(), rho))


def test_the_fixture():
  with X64(True):
    params, images = net()
    grads = jax.jit(jax.grad(loss))(params, images)
    exact, fast = both(0.05)
    lengths = [np.linalg.norm(g) for g in (exact, fast)]
    cosine = np.sum(exact * fast) / (lengths[0] * lengths[1])
    found = [loss(params, images), optax.tree.norm(grads), *lengths, cosine]
  expected = [
    1.1463389087, 0.2304106097, 0.0907585519, 0.0908450745, 0.99999833,
  ]  # fmt: skip
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)
  np.testing.assert_allclose(found[:4], expected[:4], rtol=0, atol=6e-11)


def test_exact_is_the_gradient_by_a_double_backward_pass():
  with X64(True):
    by_double = jax.jit(jax.grad(upper_bound, argnums=1))(*net(), 0.05)
    exact, _ = both(0.05)
  # eps has a norm plus 1e-12 in it.
  np.testing.assert_allclose(exact, by_double, rtol=0, atol=1e-13)


def test_exact_is_the_gradient_by_central_differences():
  step = 1e-5
  with X64(True):
    params, images = net()
    bound = jax.jit(lambda images: upper_bound(params, images, 0.05))
    moves = step * np.eye(images.size).reshape(-1, *images.shape)
    found = [
      (bound(images + m) - bound(images - m)) / (2 * step) for m in moves
    ]
    found = np.reshape(found, images.shape)
    exact, _ = both(0.05)
  error = np.linalg.norm(exact - found) / np.linalg.norm(found)
  assert error < 1e-6


def test_fast_differs_from_exact_in_the_second_order_of_rho():
  with X64(True):
    pairs = [both(rho) for rho in (0.2, 0.1, 0.05, 0.025)]
    gaps = np.array([np.linalg.norm(fast - exact) for exact, fast in pairs])
  expected = [2.907e-3, 7.420e-4, 1.8714e-4, 4.697e-5]
  np.testing.assert_allclose(gaps, expected, rtol=2e-4)  # four digits
  assert np.all((gaps[:-1] / gaps[1:] > 3.9) & (gaps[:-1] / gaps[1:] < 4.0))


def test_the_gradient_of_the_norm_is_a_difference_of_gradients():
  # grad of rho ||g|| = rho H g / ||g||: on a quadratic g(w + eps) - g exactly.
  with X64(True):
    curvature, centre = jnp.array([1.0, 4, 9]), jnp.array([1.0, -1, 2])
    w = jnp.array([3.0, 2, -1])

    def gradient(w):
      return curvature * (w - centre)

    transform = sam_ascent(0.1)
    eps, _ = transform.update(gradient(w), transform.init(w))
    difference = gradient(w + eps) - gradient(w)
    by_norm = jax.grad(lambda w: 0.1 * jnp.linalg.norm(gradient(w)))(w)
  np.testing.assert_allclose(difference, by_norm, rtol=1e-12)


def images_and_gradient(shape=(5, 6, 4, 3), seed=0):
  rng = np.random.default_rng(seed)
  images = rng.uniform(size=shape)
  # Gradients are small, and of different sizes from image to image.
  scale = 10.0 ** -np.arange(1, shape[0] + 1)
  gradient = rng.normal(size=shape) * scale[:, None, None, None]
  return jnp.asarray(images), jnp.asarray(gradient)


NORMALISE = ("sample", "batch", "sign")


def size_of(moved, normalise):
  if normalise == "sign":
    return np.abs(moved)
  axes = 0 if normalise == "batch" else (1, 2, 3)
  return np.sqrt(np.sum(np.square(moved), axis=axes))


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("rho_x", [0.0, 0.3, 7.0])
def test_what_is_normalised_has_length_rho_x(normalise, rho_x):
  with X64(True):
    images, gradient = images_and_gradient()
    moved = perturb_images(images, gradient, rho_x=rho_x, normalise=normalise)
    moved = np.asarray(moved - images)
    assert np.all(moved * gradient >= 0)
  np.testing.assert_allclose(size_of(moved, normalise), rho_x, atol=1e-12)


@pytest.mark.parametrize(
  ("normalise", "equal"), [("sample", True), ("batch", False), ("sign", True)]
)
def test_batch_mates_matter_only_when_the_batch_is_normalised(normalise, equal):
  images, gradient = images_and_gradient()
  together = perturb_images(images, gradient, rho_x=1.0, normalise=normalise)
  alone = perturb_images(
    images[:2], gradient[:2], rho_x=1.0, normalise=normalise
  )
  assert np.allclose(together[:2], alone, atol=1e-6) == equal


def test_a_batch_of_one_normalised_over_the_batch_moves_by_sign():
  images, gradient = images_and_gradient((1, 4, 4, 3))
  found = [
    perturb_images(images, gradient, rho_x=0.5, normalise=normalise)
    for normalise in ("batch", "sign")
  ]
  np.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_the_size_of_the_gradient_does_not_matter(normalise, scale):
  """A mean over n has gradients of 1 / n, and a confident image's vanish."""
  images, gradient = images_and_gradient()
  found, expected = (
    perturb_images(images, g, rho_x=1.0, normalise=normalise)
    for g in (gradient * scale, gradient)
  )
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("perturbation", ["pixel", "style"])
@pytest.mark.parametrize("normalise", NORMALISE)
def test_a_zero_gradient_moves_nothing(perturbation, normalise):
  images, gradient = images_and_gradient()
  gradient = gradient.at[1].set(0)
  moved = perturb_images(
    images, gradient, rho_x=2.0, normalise=normalise, perturbation=perturbation
  )
  np.testing.assert_array_equal(moved[1], images[1])
  assert np.all(np.isfinite(moved))
  stayed = np.all(np.asarray(moved == images), axis=(1, 2, 3))
  assert stayed.tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("perturbation", ["pixel", "style"])
def test_images_stay_in_their_range_and_dtype(perturbation):
  images, gradient = images_and_gradient()
  images = images.astype(jnp.bfloat16)
  moved = perturb_images(
    images,
    gradient,
    rho_x=50.0,
    perturbation=perturbation,
    clip_range=(0.0, 1.0),
  )
  assert moved.dtype == jnp.bfloat16
  assert float(moved.min()) == 0
  assert float(moved.max()) == 1


def test_perturbed_images_have_no_gradient():
  images, gradient = images_and_gradient()

  def total(images, gradient):
    return jnp.sum(perturb_images(images, gradient, rho_x=1.0))

  found = jax.grad(total, argnums=(0, 1))(images, gradient)
  assert not any(np.any(g) for g in found)


def style(images):
  """[b, 2, c]: mean and standard deviation."""
  return np.stack([np.mean(images, (1, 2)), np.std(images, (1, 2))], axis=1)


def with_style(images, statistics):
  """The images, rebuilt with other statistics."""
  mean, std = np.split(style(images)[:, :, None, None], 2, axis=1)
  new_mean, new_std = np.split(statistics[:, :, None, None], 2, axis=1)
  whitened = (images[:, None] - mean) / std
  return (whitened * new_std + new_mean)[:, 0]


@pytest.mark.parametrize("normalise", NORMALISE)
def test_style_climbs_the_gradient_of_its_statistics(normalise):
  """The variables are mean and standard deviation: by central differences."""
  rho_x, step = 0.02, 1e-5
  with X64(True):
    images = np.asarray(images_and_gradient((3, 5, 4, 2))[0])
    weights = jnp.asarray(images_and_gradient((3, 5, 4, 2), seed=1)[1])

    def bound(images):
      return jnp.sum(jnp.tanh(weights * images + 3 * images**2))

    before = style(images)
    by_differences = np.zeros_like(before)
    for place in np.ndindex(before.shape):
      move = np.zeros_like(before)
      move[place] = step
      up, down = (with_style(images, before + m) for m in (move, -move))
      by_differences[place] = (bound(up) - bound(down)) / (2 * step)
    gradient = jax.grad(bound)(jnp.asarray(images))
    after = perturb_images(
      jnp.asarray(images),
      gradient,
      rho_x=rho_x,
      normalise=normalise,
      perturbation="style",
    )
    after = np.asarray(after)
  if normalise == "sign":
    direction = np.sign(by_differences)
  else:
    axes = 0 if normalise == "batch" else (1, 2)
    squares = np.sum(by_differences**2, axis=axes, keepdims=True)
    direction = by_differences / np.sqrt(squares)
  statistics = before + rho_x * direction
  np.testing.assert_allclose(style(after), statistics, atol=1e-8)
  np.testing.assert_allclose(after, with_style(images, statistics), atol=1e-8)


def test_a_standard_deviation_ends_at_zero():
  images, _ = images_and_gradient()
  whitened = images - images.mean((1, 2), keepdims=True)
  moved = perturb_images(images, -whitened, rho_x=50.0, perturbation="style")
  assert np.all(np.std(moved, axis=(1, 2)) < 1e-5)


def test_constant_channels_have_a_style_too():
  images, gradient = images_and_gradient()
  images = images.at[..., 1].set(0.5)
  moved = perturb_images(images, gradient, rho_x=0.5, perturbation="style")
  assert np.all(np.isfinite(moved))
  assert np.all(np.std(moved[..., 1], axis=(1, 2)) < 1e-6)


def test_mistakes_are_one_line():
  ints = jnp.zeros((2, 4, 4, 3), jnp.uint8)
  with pytest.raises(UserError, match="uint8"):
    perturb_images(ints, jnp.zeros(ints.shape), rho_x=1.0)
  flat = jnp.zeros((2, 4))
  with pytest.raises(UserError, match=r"style.*\[2, 4\]"):
    perturb_images(flat, flat, rho_x=1.0, perturbation="style")
