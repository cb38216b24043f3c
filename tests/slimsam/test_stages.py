"""Stages: the loss of each epoch against its terms, programs, baselines."""

import dataclasses
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.rngs import RngStreams
from common.state import TrainState
from common.step import make_train_step
from slimsam.distill import Model, bottleneck_error, follow, loss_weights
from slimsam.encoder import PLAIN, encode
from slimsam.prune import prune_model
from slimsam.stages import Roles, make_loss, make_steps, stage_of


@pytest.fixture(scope="module")
def trees(tiny, draw):
  """Original, the student of step 1, a pruned one that has moved on."""
  params = draw(tiny)
  first, one = prune_model(params, tiny, {"embedding": range(0, 24, 2)})
  moved = jax.tree.map(lambda leaf: leaf * 1.02, first)
  keep = {f"qkv/{i}": range(6) for i in range(3)}
  second, two = prune_model(moved, one, keep)
  return {
    name: (p["image_encoder"], s.encoder)
    for name, p, s in (("original", params, tiny), ("first", first, one),
                       ("step_1", moved, one), ("step_2", second, two))
  }  # fmt: skip


def roles_of(trees, name):
  first = trees["first"][1] if name == "step_2" else None
  return Roles(trees[name][1], trees["original"][1], first, PLAIN, PLAIN)


def given_of(trees, stage, epoch):
  made = {"weights": stage.weights(epoch), "original": trees["original"][0]}
  if stage.name == "step_2":
    made["first"] = trees["first"][0]
  return made


def model(trees, name):
  return Model(*trees[name], PLAIN)


def square(a, b):
  return np.square(np.asarray(a) - np.asarray(b)).reshape(len(a), -1).mean(1)


@pytest.mark.parametrize("preset", ["fixed", "paper", "reference"])
def test_step_1_follows_the_original(trees, images_of, tiny, preset):
  stage, images = stage_of("step_1", preset), images_of(tiny)
  loss, metrics = make_loss(
    stage, roles_of(trees, "step_1"), with_features=True
  )(
    trees["step_1"][0], {"images": images}, {}, given_of(trees, stage, 3)
  )  # fmt: skip
  _, errors = follow(
    model(trees, "step_1"), model(trees, "original"), images, "bottlenecks"
  )
  expected = {
    "paper": [errors["embedding"].mean, bottleneck_error(errors)],
    "reference": [
      errors[k].mean for k in ("embedding", "qkv_windowed", "hidden")
    ],
    "fixed": [
      errors[k].mean
      for k in ("embedding", "qkv_windowed", "qkv_global", "hidden")
    ],
  }[preset]
  np.testing.assert_allclose(
    loss, 0.5 * sum(np.mean(own) for own in expected), rtol=1e-5
  )
  assert metrics["loss"].count == 2
  for name, own in zip(stage.terms, expected):
    value = metrics[name].total / metrics[name].count
    np.testing.assert_allclose(value, np.mean(own), rtol=1e-5)


@pytest.mark.parametrize("preset", ["fixed", "paper"])
def test_step_2_follows_both(trees, images_of, tiny, preset):
  stage, images = stage_of("step_2", preset), images_of(tiny)
  run = make_loss(stage, roles_of(trees, "step_2"), with_features=True)
  loss, _ = run(
    trees["step_2"][0], {"images": images}, {}, given_of(trees, stage, 3)
  )
  out, errors = follow(
    model(trees, "step_2"), model(trees, "first"), images, "embeddings"
  )
  target = encode(trees["original"][0], images, trees["original"][1])
  a = {"fixed": 7 / 11, "paper": 0.6}[preset]
  assert loss_weights(preset, 2, 3) == pytest.approx((1 - a, a, a))
  expected = (1 - a) * square(out, target) + a * (
    errors["embedding"].mean + errors["features"].mean
  )
  np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
  # Embeddings that were kept take the original's place.
  batch = {"images": images, "targets": target}
  given = given_of(trees, stage, 3) | {"original": None}
  kept, _ = run(trees["step_2"][0], batch, {}, given)
  np.testing.assert_allclose(kept, loss, rtol=1e-6)


def test_kept_targets_count_where_the_original_runs(trees, images_of, tiny):
  """Step 1 follows its bottlenecks; the embedding is compared with what was
  kept, as in all other epochs.
  """
  stage, images = stage_of("step_1", "fixed"), images_of(tiny)
  run = make_loss(stage, roles_of(trees, "step_1"), with_features=True)
  own, targets = (
    encode(trees[k][0], images, trees[k][1]) for k in ("step_1", "original")
  )
  found = {}
  for shift in (0, 1):
    batch = {"images": images, "targets": targets + shift}
    given = given_of(trees, stage, 3)
    _, metrics = run(trees["step_1"][0], batch, {}, given)
    found[shift] = {name: float(mean.total) for name, mean in metrics.items()}
    expected = square(own, targets + shift).sum()
    assert found[shift]["embedding"] == pytest.approx(expected, rel=1e-5)
  for name in ("qkv_windowed", "qkv_global", "hidden"):
    assert found[0][name] == found[1][name] > 0


@pytest.mark.parametrize("name", ["step_1", "step_2"])
def test_in_the_end_and_without_features_the_embedding_counts(
  trees, images_of, tiny, name
):
  images = images_of(tiny)
  expected = square(
    *(encode(trees[k][0], images, trees[k][1]) for k in (name, "original"))
  ).mean()
  for stage, epoch in (
    (stage_of(name, "fixed"), 20),
    (stage_of(name, "fixed", intermediate=False), 0),
  ):
    run = make_loss(stage, roles_of(trees, name), with_features=False)
    given = given_of(trees, stage, epoch)
    loss, _ = run(trees[name][0], {"images": images}, {}, given)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert stage_of("one_step", "fixed").feature_epochs == 0
  assert stage_of("one_step", "paper").kinds == ("embedding", "qkv", "mlp")


def test_epochs_choose_weights_and_compile_nothing(trees, images_of, tiny):
  """Two updates an epoch; features count in ten epochs of twelve."""
  stage, tx = stage_of("step_2", "fixed"), optax.sgd(0.0)
  programs = []

  def make_step(loss):
    programs.append(make_train_step(loss, tx, RngStreams(0)))
    return programs[-1]

  given = {name: trees[name][0] for name in ("original", "first")}
  steps = make_steps(
    stage, make_step, roles_of(trees, "step_2"), given, steps_per_epoch=2
  )
  params = jax.tree.map(jnp.asarray, trees["step_2"][0])
  batch = {"images": images_of(tiny)}
  losses = {}
  for done in (0, 1, 2, 19, 20, 23):
    state = TrainState.create(jax.tree.map(jnp.copy, params), tx)
    _, metrics = steps.choose(done)(state, batch)
    losses[done] = float(metrics["loss"].total)
    assert ("features" in metrics) == (done < 20)
  assert losses[0] == losses[1] != losses[2]
  assert losses[20] == losses[23]
  assert [program._cache_size() for program in programs] == [1, 1]
  # Equal where they share a program, which the loop compiles beforehand.
  assert steps.choose(0) == steps.choose(19) != steps.choose(20)
  assert steps.choose(20) == steps.choose(23)


# The teachers that run while features count, and afterwards.
TEACHERS = [
  ("step_1", False, {"original"}, {"original"}),
  ("step_2", False, {"original", "first"}, {"original"}),
  ("one_step", False, {"original"}, {"original"}),
  ("step_1", True, {"original"}, set()),
  ("step_2", True, {"first"}, set()),
  ("one_step", True, set(), set()),
]


@pytest.mark.parametrize(("name", "kept", "early", "late"), TEACHERS)
def test_teachers_are_on_the_devices_while_they_run(
  trees, images_of, tiny, name, kept, early, late
):
  """Placed once, then let go of; a program takes those alone that run."""
  student, settings = trees["step_2" if name == "step_2" else "step_1"]
  roles = dataclasses.replace(roles_of(trees, "step_2"), student=settings)
  batch = {"images": images_of(tiny)}
  if kept:
    grid = trees["original"][1].grid
    batch["targets"] = np.zeros((2, grid, grid, tiny.encoder.out), np.float32)
  seen, placed = [], []

  def make_step(loss):
    def step(state, batch, given):
      seen.append({*given} - {"weights"})
      jax.eval_shape(loss, state, batch, {}, given)

    return step

  def place(params):
    made = jax.tree.map(jnp.array, params)
    placed.append(weakref.ref(made["pos_embed"]))
    return made

  steps = make_steps(
    stage_of(name, "fixed"), make_step, roles,
    {key: trees[key][0] for key in ("original", "first")},
    steps_per_epoch=1, kept=kept, place=place,
  )  # fmt: skip
  for epoch in (0, 9, 10, 15):
    steps.choose(epoch)(student, batch)
    alive = sum(ref() is not None for ref in placed)
    assert alive == len(early if epoch < 10 else late)
  assert seen == [early, early, late, late]
  assert len(placed) == len(early | late)


def test_gradients_reach_the_student_alone(trees, images_of, tiny):
  stage = stage_of("step_2", "fixed")
  run = make_loss(stage, roles_of(trees, "step_2"), with_features=True)
  batch, given = {"images": images_of(tiny)}, given_of(trees, stage, 0)
  grad = jax.jit(
    jax.grad(
      lambda params, given: run(params, batch, {}, given)[0], argnums=(0, 1)
    )
  )
  mine, its = grad(trees["step_2"][0], given)
  chex.assert_tree_all_finite(mine)
  for name in ("original", "first"):
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(its[name]))


def test_unknown_names_are_refused():
  with pytest.raises(UserError, match="did you mean 'step_1'"):
    stage_of("step1", "fixed")
  with pytest.raises(UserError, match="did you mean 'paper'"):
    stage_of("one_step", "papr")


@pytest.mark.parametrize("name", ["step_1", "step_2"])
def test_what_was_pruned_learns_to_follow(trees, images_of, tiny, name):
  """The error of the embedding on images of training falls well below what it
  was after pruning.
  """
  tx, images = optax.adam(5e-3), images_of(tiny)
  given = {key: trees[key][0] for key in ("original", "first")}
  steps = make_steps(
    stage_of(name, "fixed"),
    lambda loss: make_train_step(loss, tx, RngStreams(0)),
    roles_of(trees, name),
    given,
    steps_per_epoch=5,  # all of them in epochs that compare features
  )
  student, settings = trees["first" if name == "step_1" else "step_2"]
  target = encode(trees["original"][0], images, trees["original"][1])

  def error(params):
    return square(encode(params, images, settings), target).mean()

  before = error(student)
  state = TrainState.create(jax.tree.map(jnp.array, student), tx)
  for done in range(50):
    state, _ = steps.choose(done)(state, {"images": images})
  assert error(state.params) < 0.6 * before
