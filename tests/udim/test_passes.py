"""UDIM's gradients on a model: known answers, NumPy, dropout, BatchNorm,
micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from udim import UdimConfig, perturb_images, udim_grads, udim_passes

X64 = jax.enable_x64
# Compiles in half the time, and nothing here is large.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def net():
  """A small network, images and labels in closed form, in NumPy."""
  row, column = np.arange(6.0)[:, None], np.arange(6.0)[None, :]
  params = {
    "hidden": 0.4 * np.cos(0.5 * row[:5] + 0.7 * column[:, :4]),
    "head": {
      "kernel": 0.3 * np.sin(1 + 0.4 * row[:4] + 0.9 * column[:, :3]),
      "bias": 0.1 * np.arange(3.0),
    },
  }
  images = np.sin(0.9 * row + 0.4 * column[:, :5] + 0.3)
  return params, images, (2 * np.arange(6) + 1) % 3


def apply_fn(variables, images, *, train, rngs):
  assert train
  params = variables["params"]
  features = jnp.tanh(images @ params["hidden"])
  if "dropout" in rngs:
    keep = jax.random.bernoulli(rngs["dropout"], 0.5, features.shape)
    features = jnp.where(keep, features * 2, 0)
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  return features, logits, variables["batch_stats"]


def fixture(domains=1):
  params, images, labels = net()
  batch = {
    "image": images.reshape(domains, -1, 5),
    "label": labels.reshape(domains, -1),
  }
  return jax.tree.map(jnp.asarray, (params, batch))


@functools.cache  # a compilation for each of the settings, not each test
def compiled(accum, **settings):
  cfg = UdimConfig(**settings)
  return jit(udim_grads(apply_fn, "head", cfg, accum=accum))


def run(params, batch, rng=None, *, accum=1, step=0, **settings):
  """Gradients and metrics, as NumPy."""
  grads, aux = compiled(accum, **settings)(params, batch, rng, step)
  assert aux["batch_stats"] == {}
  return jax.tree.map(np.asarray, (grads, aux["metrics"]))


@functools.cache
def compiled_term(accum, **settings):
  cfg = UdimConfig(data_grad="plain", **settings)
  passes_of = udim_passes(apply_fn, "head", cfg, accum=accum)

  @jit
  def term(params, batch):
    passes = passes_of(params, batch, None, 0)
    data_grad = passes.data_grad_fn(params, None)
    return passes.inconsistency_grad_fn(params, data_grad)

  return term


def term_of(params, batch, *, accum=1, **settings):
  """The gradient of the added term, and the metrics; data_grad is "plain"."""
  term = compiled_term(accum, rho_x=0.5, **settings)
  return jax.tree.map(np.asarray, term(params, batch))


def assert_close(found, expected, atol=1e-12):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
    found,
    expected,
  )


ROWS = [
  (
    {"data_grad": "exact"},
    {
      "loss": (1.1463389087, 6e-11),
      "grad_norm": (0.2304106097, 6e-11),
      "pen": (7.875879852e-05, 6e-15),
      "gn": (0.3532706314, 6e-11),
      "term_grad_norm": (0.1833803931, 6e-11),
    },
    (0.4182269270, 6e-11),
  ),
  (
    {"data_grad": "exact", "normalise": "batch"},
    {"pen": (6.486982230e-05, 6e-15), "gn": (0.3480103006, 6e-11)},
    # Printed as .4188058138; NumPy below gives .41880579394 too.
    (0.4188057939, 6e-11),
  ),
  ({"data_grad": "fast"}, {}, (0.4182806445, 6e-11)),
]


def norm(tree):
  leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(tree)]
  return np.linalg.norm(np.concatenate(leaves))


def test_the_fixture_under_sam():
  with X64(True):
    grads, _ = run(*fixture(), lambda1=0.0)
  assert norm(grads) == pytest.approx(0.2545966110, abs=6e-11)


@pytest.mark.parametrize(("settings", "metrics", "total"), ROWS)
def test_the_fixture(settings, metrics, total):
  with X64(True):
    grads, found = run(*fixture(), rho_x=0.5, **settings)
  for name, (value, digits) in metrics.items():
    assert float(found[name]) == pytest.approx(value, abs=digits)
  assert norm(grads) == pytest.approx(total[0], abs=total[1])
  length = 5 if settings.get("normalise") is None else 6  # pixels, images
  rms = float(found["perturbation_rms"])
  assert rms == pytest.approx(0.5 / length**0.5, rel=1e-9)


def test_the_fixtures_new_bias():
  with X64(True):
    grads, _ = run(*fixture(), rho_x=0.5, data_grad="exact")
  bias = 0.1 * np.arange(3.0) - 0.1 * grads["head"]["bias"]
  expected = [0.00145295, 0.10272647, 0.19582058]
  np.testing.assert_allclose(bias, expected, rtol=0, atol=6e-9)


class Reference:
  """One step of the authors' code in NumPy, from its formulas.

  Derivatives are written out where they are of first order, and otherwise
  taken by a complex step: exact to the last digits, with no automatic
  differentiation. Parameters are one vector.
  """

  def __init__(self):
    params, self.images, labels = net()
    self.shapes = [(5, 4), (4, 3), (3,)]
    leaves = [params["hidden"], *params["head"].values()]
    self.theta = np.concatenate([np.ravel(leaf) for leaf in leaves])
    self.targets = np.eye(3)[labels]

  def split(self, theta):
    sizes = np.cumsum([np.prod(shape) for shape in self.shapes])[:-1]
    parts = np.split(theta, sizes)
    return [p.reshape(s) for p, s in zip(parts, self.shapes)]

  def forward(self, theta, images):
    hidden, weight, bias = self.split(theta)
    features = np.tanh(images @ hidden)
    exp = np.exp(features @ weight + bias)
    return features, exp / exp.sum(axis=1, keepdims=True)

  def gradients(self, theta):
    """Of the loss, with respect to theta and to the images."""
    hidden, weight, _ = self.split(theta)
    features, probs = self.forward(theta, self.images)
    delta = (probs - self.targets) / len(probs)
    before = delta @ weight.T * (1 - features**2)
    grads = self.images.T @ before, features.T @ delta, delta.sum(axis=0)
    return np.concatenate([np.ravel(g) for g in grads]), before @ hidden.T

  def head_gradients(self, theta, images):
    """Of each sample's loss: weights [n, 12] and bias [n, 3]."""
    features, probs = self.forward(theta, images)
    delta = probs - self.targets
    of_weight = features[:, :, None] * delta[:, None, :]
    return of_weight.reshape(len(delta), -1), delta

  def inconsistency(self, theta, perturbed):
    """pen and gn from per-sample gradients of the head."""
    halves = [
      self.head_gradients(theta, images) for images in (self.images, perturbed)
    ]
    joined = [np.concatenate(half, axis=1) for half in halves]
    mean = joined[0].mean(axis=0)
    variances = [np.mean((g - mean) ** 2, axis=0) for g in joined]
    middle = sum(variances) / 2
    pen = sum(np.mean((v - middle) ** 2) for v in variances) / 2
    gn = sum(np.mean(np.sum(g**2, axis=1)) / g.shape[1] for g in halves[1])
    return pen, gn

  def step(self, *, rho=0.05, syn_lr=0.5, weight=1.0):
    tiny = 1e-30j
    gradient, _ = self.gradients(self.theta)
    eps = rho * gradient / np.linalg.norm(gradient)
    plain = self.gradients(self.theta)[1]
    along = self.gradients(self.theta + tiny * eps)[1].imag / tiny.imag
    ascent = plain + along
    perturbed = self.images + syn_lr * ascent / np.linalg.norm(ascent, axis=0)
    of_term = complex_step(
      lambda theta: sum(self.inconsistency(theta, perturbed)), self.theta
    )
    total = self.gradients(self.theta + eps)[0] + weight * of_term
    return total, self.inconsistency(self.theta, perturbed)


def complex_step(fn, at):
  """The gradient of an analytic function, exact to the last digits."""
  tiny = 1e-30
  moves = 1j * tiny * np.eye(len(at))
  return np.array([fn(at + move).imag / tiny for move in moves])


def test_the_authors_step_derived_in_numpy():
  reference = Reference()
  expected, (pen, gn) = reference.step()
  assert pen == pytest.approx(6.486982230e-05, abs=6e-15)
  assert gn == pytest.approx(0.3480103006, abs=6e-11)
  assert np.linalg.norm(expected) == pytest.approx(0.4188058138, abs=1e-6)
  with X64(True):
    grads, metrics = run(*fixture(), rho_x=0.5, reference_quirks=True)
  found = [metrics["pen"], metrics["gn"]]
  np.testing.assert_allclose(found, [pen, gn], rtol=1e-12)
  head = grads["head"]
  found = [grads["hidden"], head["kernel"], head["bias"]]
  assert_close(found, reference.split(expected), atol=1e-15)


@pytest.mark.parametrize("accum", [1, 3])
def test_domains_are_summed_or_averaged(accum):
  with X64(True):
    params, batch = fixture(domains=2)
    found, metrics = term_of(params, batch, accum=accum)
    mean, mean_metrics = term_of(params, batch, domain_reduce="mean")
    parts = [
      term_of(params, jax.tree.map(lambda x, s=s: x[s : s + 1], batch))
      for s in range(2)
    ]
  expected = jax.tree.map(np.add, parts[0][0], parts[1][0])
  assert_close(found, expected)
  assert_close(mean, jax.tree.map(lambda g: g / 2, expected))
  for name in ("pen", "gn", "ilc"):
    total = sum(part[1][name] for part in parts)
    assert metrics[name] == pytest.approx(total, rel=1e-12)
    assert mean_metrics[name] == pytest.approx(total / 2, rel=1e-12)


def test_terms_add_up():
  with X64(True):
    both, metrics = term_of(*fixture())
    single = [term_of(*fixture(), terms=(term,)) for term in ("pen", "norm")]
  assert_close(both, jax.tree.map(np.add, single[0][0], single[1][0]))
  for (_, found), name in zip(single, ("pen", "gn")):
    assert found["ilc"] == found[name]
    assert found[name] == pytest.approx(metrics[name], rel=1e-12)
  assert metrics["ilc"] == metrics["pen"] + metrics["gn"]


def plain_loss(params, images, labels):
  logits = apply_fn(
    {"params": params, "batch_stats": {}}, images, train=True, rngs={}
  )[1]
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def perturbed_images(params, batch):
  """x_tilde along the plain gradient, made by hand."""
  images, labels = batch["image"][0], batch["label"][0]
  gradient = jax.grad(plain_loss, argnums=1)(params, images, labels)
  return perturb_images(images, gradient, rho_x=0.5)


@pytest.mark.parametrize("accum", [1, 2])
def test_the_control_adds_the_plain_loss_on_the_perturbed_images(accum):
  with X64(True):
    params, batch = fixture()
    moved, labels = perturbed_images(params, batch), batch["label"][0]
    loss, expected = jax.value_and_grad(plain_loss)(params, moved, labels)
    found, metrics = term_of(params, batch, mode="perturbed_loss", accum=accum)
    _, full = term_of(params, batch)
    assert_close(found, expected)
    loss = float(loss)
  assert metrics["perturbed_loss"] == pytest.approx(loss, rel=1e-12)
  for name in ("pen", "gn"):  # reported all the same
    assert metrics[name] == pytest.approx(full[name], rel=1e-12)


@pytest.mark.parametrize("accum", [1, 3])
def test_a_detached_source_is_constant(accum):
  """By complex steps in NumPy around a source that stays."""
  with X64(True):
    params, batch = fixture()
    settings = {"terms": ("pen",)}
    found, _ = term_of(
      params, batch, detach_source=True, accum=accum, **settings
    )
    attached, _ = term_of(params, batch, **settings)
    moved = np.asarray(perturbed_images(params, batch))
  reference = Reference()

  def pen(theta):
    of_source = reference.head_gradients(reference.theta, reference.images)
    of_twin = reference.head_gradients(theta, moved)
    joined = [np.concatenate(g, axis=1) for g in (of_source, of_twin)]
    mean = joined[0].mean(axis=0)
    v0, v1 = (np.mean((g - mean) ** 2, axis=0) for g in joined)
    return np.mean((v0 - v1) ** 2) / 4

  expected = reference.split(complex_step(pen, reference.theta))
  head = found["head"]
  assert_close(
    [found["hidden"], head["kernel"], head["bias"]], expected, atol=1e-15
  )
  assert np.any(np.abs(found["hidden"] - attached["hidden"]) > 1e-6)


def test_hard_labels_are_a_special_case_of_soft_ones():
  with X64(True):
    params, batch = fixture()
    hard, _ = run(params, batch, rho_x=0.5, label_smoothing=0.1)
    targets = 0.9 * np.eye(3)[net()[2]] + 0.1 / 3
    soft = batch | {"label": jnp.asarray(targets)[None]}
    assert_close(run(params, soft, rho_x=0.5)[0], hard)
    graded = jnp.asarray([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]] * 3)
    other = batch | {"label": graded[None]}
    one = run(params, other, rho_x=0.5)[0]
    accumulated = run(params, other, rho_x=0.5, accum=2)[0]
    assert_close(accumulated, one)


@pytest.mark.parametrize(
  ("accum", "every"),
  [(1, 1), (3, 2)],  # straight on, and in a branch
)
def test_unmoved_images_under_one_mask_have_no_penalty(every, accum):
  cfg = UdimConfig(rho_x=0.0, every=every)
  # As a user compiles it: fusions must not round the halves apart.
  grads_of = jax.jit(udim_grads(apply_fn, "head", cfg, accum=accum))
  _, aux = grads_of(*fixture(), jax.random.key(0), 0)
  assert float(aux["metrics"]["pen"]) == 0
  assert float(aux["metrics"]["gn"]) > 0


def test_a_mask_a_pass_is_drawn_only_on_demand():
  key, other = jax.random.split(jax.random.key(0))
  same = [run(*fixture(), rng, rho=0.0)[1] for rng in (key, key, other)]
  assert same[0]["loss"] == same[0]["sam_loss"]  # the same mask at rho = 0
  assert same[0]["loss"] == same[1]["loss"] != same[2]["loss"]
  _, found = run(*fixture(), key, rho=0.0, rho_x=0.0, share_dropout=False)
  assert found["loss"] != found["sam_loss"]
  assert float(found["pen"]) > 1e-4


def no_dropout(variables, images, *, train, rngs):
  """So that a mask a pass is no mask, and only the form of a step differs."""
  del rngs
  return apply_fn(variables, images, train=train, rngs={})


@pytest.mark.parametrize(
  ("data_grad", "form", "accum"),
  [
    ("fast", {"share_dropout": False}, 1),
    ("fast", {}, 3),
    ("exact", {"share_dropout": False}, 3),
    ("plain", {"share_dropout": False}, 1),
  ],
)
def test_a_kept_pass_equals_repeated_and_accumulated_ones(
  data_grad, form, accum
):
  with X64(True):
    params, batch = fixture(domains=2)
    settings = {"rho_x": 0.5, "data_grad": data_grad}
    kept = run(params, batch, **settings)
    cfg = UdimConfig(**settings, **form)
    other = jit(udim_grads(no_dropout, "head", cfg, accum=accum))
    grads, aux = other(params, batch, jax.random.key(0), 0)
    assert_close((grads, aux["metrics"]), kept)


@pytest.mark.parametrize("data_grad", ["exact", "plain"])
def test_other_parameters_than_the_first_are_right_too(data_grad):
  """Pass 1 is reused for the very same tree, not for its copy."""
  with X64(True):
    params, batch = fixture()
    cfg = UdimConfig(rho_x=0.5, data_grad=data_grad)
    passes_of = udim_passes(apply_fn, "head", cfg)

    @jit
    def both(params):
      passes = passes_of(params, batch, None, 0)
      found = []
      for at in (params, jax.tree.map(lambda x: x, params)):
        gradient = passes.data_grad_fn(at, jax.tree.map(jnp.cos, at))
        found.append(passes.inconsistency_grad_fn(at, gradient))
      return found

    assert_close(*both(params))


@pytest.mark.parametrize("data_grad", ["fast", "exact"])
def test_a_zero_gradient_gives_a_finite_step(data_grad):
  """All images and the bias at 0, labels as likely as predicted."""
  params, batch = fixture()
  params["head"]["bias"] = jnp.zeros(3)
  batch["image"] = jnp.zeros((1, 6, 5))
  batch["label"] = jnp.full((1, 6, 3), 1 / 3)
  grads, metrics = run(params, batch, data_grad=data_grad)
  assert metrics["grad_norm"] < 1e-7
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
  assert np.isfinite(list(metrics.values())).all()


def test_the_quirks_are_those_documented():
  with X64(True):
    params, batch = fixture()
    by_hand, _ = run(
      params, batch, rho_x=0.5, data_grad="exact", normalise="batch"
    )
    quirks, _ = run(
      params, batch, rho_x=0.5, clip_range=(0.0, 0.1), reference_quirks=True
    )
    assert_close(quirks, by_hand)  # 1e-12 in eps, and no clipping
    _, metrics = run(
      params, batch, rho_x=0.5, perturbation="style", reference_quirks=True
    )
    assert float(metrics["pen"]) == float(metrics["perturbation_rms"]) == 0
    batch["label"] = jnp.full((1, 6, 3), 1 / 3)
    zero = jax.tree.map(jnp.zeros_like, params)
    grads, _ = run(zero, batch, reference_quirks=True)
    assert any(np.any(np.isnan(g)) for g in jax.tree.leaves(grads))


def with_batch_norm(variables, images, *, train, rngs):
  """A layer whose running mean moves by a tenth at every training pass."""
  del rngs
  params, stats = variables["params"], variables["batch_stats"]
  hidden = images @ params["hidden"]
  mean, std = (f(hidden, axis=0, keepdims=True) for f in (jnp.mean, jnp.std))
  new = {
    "mean": 0.9 * stats["mean"] + 0.1 * mean[0],
    "std": 0.9 * stats["std"] + 0.1 * std[0],
  }
  features = jnp.tanh((hidden - mean) / (std + 0.1))
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  return features, logits, new if train else stats


def test_only_the_clean_pass_writes_statistics():
  with X64(True):
    params, batch = fixture()
    stats = {"mean": jnp.ones(4), "std": jnp.full(4, 2.0)}
    cfg = UdimConfig(rho=0.3, rho_x=1.0, data_grad="exact", every=2)
    grads_of = udim_grads(with_batch_norm, "head", cfg)
    variables = {"params": params, "batch_stats": stats}
    expected = with_batch_norm(
      variables, batch["image"][0], train=True, rngs={}
    )[2]
    _, aux = jit(grads_of)(params, batch, None, 0, batch_stats=stats)
    assert_close(aux["batch_stats"], expected, atol=1e-15)
    accumulated = udim_grads(with_batch_norm, "head", cfg, accum=2)
    _, aux = jit(accumulated)(params, batch, None, 0, batch_stats=stats)
    # The mean over micro-batches: for running means that of the whole.
    assert_close(aux["batch_stats"]["mean"], expected["mean"], atol=1e-15)
