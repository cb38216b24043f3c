"""What a run costs and how flat it ends: numbers, and the tables of them."""

import jax
import numpy as np
import optax
import pytest

from configs.udim import get_config
from udim import measure
from udim.algorithms import make_steps
from udim.results import Result
from udim.selection import Selected
from udim.tables import Comparison, cost_section, landscape_section
from udim.train import make_loader, make_setup

pytestmark = pytest.mark.usefixtures("compile_once")


def setup_of(algorithm, **methods):
  config = get_config("train,smoke")
  config.algorithm = algorithm
  config.num_steps = 10
  config.data.source.corruptions = ("blur",)
  config.compare.landscape_images = 64
  for key, value in methods.items():
    config.methods[algorithm][key] = value
  return config, make_setup(config)


def compiled(config, setup, step):
  steps = make_steps(setup.algorithm, setup.averager)
  with make_loader(config, setup) as loader:
    batch = next(loader)
  with jax.set_mesh(setup.mesh):
    return steps.choose(step).lower(setup.abstract, batch).compile()


def test_the_cost_is_the_mean_over_steps_and_the_memory_of_the_largest():
  """LookSAM with a period of 5 over 10 steps: two of them look."""
  config, setup = setup_of("look_sam", k=5)
  looking, not_looking = (compiled(config, setup, step) for step in (0, 1))
  flops = [c.cost_analysis()["flops"] for c in (looking, not_looking)]
  memory = [
    c.memory_analysis().temp_size_in_bytes for c in (looking, not_looking)
  ]
  assert flops[0] > 1.5 * flops[1]
  steps = make_steps(setup.algorithm, setup.averager)
  found = measure.cost_of(config, setup, steps)
  assert found["flops"] == pytest.approx(0.2 * flops[0] + 0.8 * flops[1])
  assert found["temporaries"] == max(memory)


def log_line(step, speed):
  return {
    "step": step, "train/loss": 1.0, "speed/steps_per_second": speed
  }  # fmt: skip


def test_seconds_are_of_the_second_half_and_without_evaluations():
  speeds = [0.1, 0.1, 0.1, 4.0, 0.5, 2.0, 5.0]
  lines = [log_line(10 * (i + 1), s) for i, s in enumerate(speeds)]
  # Evaluated after step 40: the interval from there, at 0.5, does not count.
  lines.insert(4, {"step": 40, "val/accuracy": 0.5})
  assert measure.seconds_per_step(lines) == pytest.approx(1 / 4.0)
  assert measure.seconds_per_step([{"step": 1, "train/loss": 1.0}]) is None


def test_flatness_is_that_of_the_loss_on_the_images():
  config, setup = setup_of("erm")
  state = setup.create()
  numbers, images = measure.landscape_of(config, setup, state)
  (source,), (target,) = (
    [part.main for part in side]
    for side in (setup.splits.sources, setup.splits.targets[:1])
  )
  assert len(images["original"]) == len(images["perturbed"]) == measure.SHOWN
  moved = np.square(images["perturbed"] - images["original"])
  distance = np.sqrt(moved.sum(axis=(1, 2, 3)))
  np.testing.assert_allclose(distance, config.compare.image_distance, rtol=1e-4)

  every = -(-len(source) // 64)
  chosen = np.arange(0, len(source), every)
  x, y = source.arrays(chosen)

  def loss(params):
    variables = {"params": params, "batch_stats": state.extra["batch_stats"]}
    _, logits, _ = setup.apply_fn(variables, x, train=False, rngs=None)
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, y
    ).mean()

  here, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
  assert numbers["weight_line"][0] == pytest.approx(float(here), rel=1e-4)
  assert numbers["data_line"][0] == pytest.approx(float(here), rel=1e-4)
  norm = optax.tree.norm(gradient)
  for radius, gap in zip(measure.RADII, numbers["gap_source"], strict=True):
    there = jax.tree.map(
      lambda p, g, r=radius: p + r * g / norm, state.params, gradient
    )
    assert gap == pytest.approx(float(loss(there) - here), rel=2e-2)
  assert numbers["gap_target"] != numbers["gap_source"]
  assert len(target) > 0


def result(label, seed, *, flops, seconds, eigenvalue):
  one = Selected(
    step=1, criterion=0.5, source=0.9, tuning=0.5, target=0.7, reference=0.8,
    domains={"t": 0.7},
  )  # fmt: skip
  return Result(
    label, "clean", seed, 0, {}, {"source": one},
    {"flops": flops, "seconds": seconds, "temporaries": 3 * 2.0**20},
    {"eigenvalue": eigenvalue, "gap_source": [0.01, 0.02, 0.25, 0.4],
     "gap_target": [0.1, 0.2, 0.75, 0.9]},
  )  # fmt: skip


def test_the_tables_hold_these_numbers():
  results = [
    *(
      result("erm", s, flops=100, seconds=0.010 + s / 1e3, eigenvalue=8)
      for s in (0, 1, 2)
    ),
    *(
      result("sam", s, flops=200, seconds=0.018 + 1.8 * s / 1e3, eigenvalue=2)
      for s in (0, 1, 2)
    ),
  ]
  table = Comparison(("erm", "sam"), ("erm",), tuple(results))
  cost, flat = cost_section(table), landscape_section(table)
  rows = {
    (section, line.split("|")[1].strip()): line
    for section, text in (("cost", cost), ("flat", flat))
    for line in text.splitlines()
    if line.startswith(("| erm", "| sam"))
  }
  assert [c.strip() for c in rows["cost", "sam"].split("|")[2:6]] == [
    "2", "1.80 ± 0.00", "19.8", "3"
  ]  # fmt: skip
  cells = [c.strip() for c in rows["flat", "sam"].split("|")[2:-1]]
  assert cells == [
    "2.000 ± 0.000", "-6.000 ± 0.000", "0.250 ± 0.000", "+0.000 ± 0.000",
    "0.750 ± 0.000", "+0.000 ± 0.000",
  ]  # fmt: skip
