"""Distillation: errors against features written out, schedules, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from slimsam.distill import (
  PRESETS,
  Model,
  bottleneck_error,
  feature_epochs,
  follow,
  loss_weights,
  terms_of,
)
from slimsam.encoder import PLAIN, block, embedded, encode
from slimsam.prune import prune_model


@pytest.fixture(scope="module")
def models(tiny, draw):
  """A teacher, and students after each step."""
  params = draw(tiny)
  first, one = prune_model(params, tiny, {"embedding": range(0, 24, 2)})
  keep = {f"qkv/{i}": range(6) for i in range(3)}
  keep |= {f"mlp/{i}": range(i, 20 + i) for i in range(3)}
  second, two = prune_model(first, one, keep)
  return [
    Model(p["image_encoder"], s.encoder, PLAIN)
    for p, s in ((params, tiny), (first, one), (second, two))
  ]


def features(model, images):
  """What flows through a model, all of it."""
  x = embedded(model.params, images, *model[1:])
  flow, qkv, hidden = [x], [], []
  for i in range(3):
    x, found = block(model.params["blocks"][str(i)], x, i, *model[1:])
    flow += [found.attended, x]
    qkv.append(found.qkv)
    hidden.append(found.hidden)
  return flow, qkv, hidden


def mean_square(pairs):
  """Of all numbers of all pairs, by image."""
  parts = [
    np.square(np.asarray(a) - np.asarray(b)).reshape(len(a), -1)
    for a, b in pairs
  ]
  return np.concatenate(parts, axis=1).mean(axis=1)


def test_step_1_compares_bottlenecks(models, tiny, images_of):
  teacher, student, _ = models
  images = images_of(tiny)
  out, errors = jax.jit(
    lambda images: follow(student, teacher, images, "bottlenecks")
  )(images)
  (_, q, h), (_, r, g) = (features(m, images) for m in (student, teacher))
  # Block 1 is global. 5 x 5 patches in windows of 3: 36, 11 of them padding.
  np.testing.assert_allclose(
    errors["qkv_global"].mean, mean_square([(q[1], r[1])]), rtol=1e-5
  )
  np.testing.assert_allclose(
    errors["qkv_inside"].mean,
    mean_square([(q[0], r[0]), (q[2], r[2])]),
    rtol=1e-5,
  )
  padded = []
  for i in (0, 2):
    for model, own in ((student, q[i]), (teacher, r[i])):
      bias = model.params["blocks"][str(i)]["attn"]["qkv"]["bias"]
      rows = np.asarray(own).reshape(2, 25, -1)
      pad = np.broadcast_to(np.asarray(bias).reshape(-1), (2, 11, 72))
      padded.append(np.concatenate([rows, pad], axis=1))
  np.testing.assert_allclose(
    errors["qkv_windowed"].mean,
    mean_square([(padded[0], padded[1]), (padded[2], padded[3])]),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    errors["hidden"].mean, mean_square(zip(h, g)), rtol=1e-5
  )
  np.testing.assert_allclose(
    bottleneck_error(errors),
    mean_square([*zip(q, r), *zip(h, g)]),
    rtol=1e-5,
  )
  expected = encode(student.params, images, *student[1:])
  np.testing.assert_allclose(out, expected, atol=1e-5)
  target = encode(teacher.params, images, *teacher[1:])
  np.testing.assert_allclose(
    errors["embedding"].mean, mean_square([(out, target)]), rtol=1e-5
  )


def test_step_2_compares_what_flows_between_blocks(models, tiny, images_of):
  _, teacher, student = models
  images = images_of(tiny)
  _, errors = jax.jit(
    lambda images: follow(student, teacher, images, "embeddings")
  )(images)
  ours, theirs = (features(m, images)[0] for m in (student, teacher))
  assert len(ours) == 1 + 2 * 3
  np.testing.assert_allclose(
    errors["features"].mean, mean_square(zip(ours, theirs)), rtol=1e-5
  )
  assert set(errors) == {"features", "embedding"}


def test_global_blocks_are_compared_with_the_teacher(models, tiny, images_of):
  """The authors compare the student with itself there."""
  teacher, student, _ = models
  _, errors = follow(student, teacher, images_of(tiny), "bottlenecks")
  assert np.all(errors["qkv_global"].mean > 1e-4)


def test_only_the_student_learns(models, tiny, images_of):
  teacher, student, _ = models
  images = images_of(tiny)

  def loss(ours, theirs):
    _, errors = follow(
      student._replace(params=ours), teacher._replace(params=theirs),
      images, "bottlenecks",
    )  # fmt: skip
    return sum(jnp.sum(one.mean) for one in errors.values())

  mine, its = jax.jit(jax.grad(loss, argnums=(0, 1)))(
    student.params, teacher.params
  )
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(its))
  zero = [np.any(leaf) for leaf in jax.tree.leaves(mine)]
  assert all(zero)


def test_nothing_on_the_way_costs_nothing(models, tiny, images_of):
  teacher, student, _ = models
  _, errors = follow(student, teacher, images_of(tiny), "nothing")
  assert set(errors) == {"embedding"}
  with pytest.raises(UserError, match="did you mean 'nothing'"):
    follow(student, teacher, images_of(tiny), "nothin")


@pytest.mark.parametrize(
  ("preset", "terms"),
  [
    ("paper", ("embedding", "bottlenecks")),
    ("reference", ("embedding", "qkv_windowed", "hidden")),
    ("fixed", ("embedding", "qkv_windowed", "qkv_global", "hidden")),
  ],
)
def test_step_1_halves_then_leaves_the_embedding(preset, terms):
  assert terms_of(preset, 1) == terms
  assert loss_weights(preset, 1, 0) == (0.5,) * len(terms)
  assert loss_weights(preset, 1, 9) == (0.5,) * len(terms)
  assert loss_weights(preset, 1, 10)[0] == 1
  assert not any(loss_weights(preset, 1, 10)[1:])


@pytest.mark.parametrize(
  ("preset", "weights"),
  [
    ("paper", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0]),
    ("reference", [n / 11 for n in range(10, -1, -1)] + [0]),
    ("fixed", [n / 11 for n in range(10, -1, -1)] + [0]),
  ],
)
def test_step_2_moves_to_the_original_embedding(preset, weights):
  for epoch, a in enumerate(weights):
    found = loss_weights(preset, 2, epoch)
    np.testing.assert_allclose(found, (1 - a, a, a), atol=1e-12)


def test_features_are_compared_as_long_as_they_weigh_something():
  for preset in PRESETS:
    for step in (1, 2):
      end = feature_epochs(preset, step)
      assert any(loss_weights(preset, step, end - 1)[1:])
      assert not any(loss_weights(preset, step, end)[1:])
  with pytest.raises(UserError, match="did you mean 'fixed'"):
    terms_of("fixd", 1)
