"""Results on disk, and what is made of them."""

import dataclasses
import json
import math

import pytest

from common.errors import UserError
from udim.results import (
  Result,
  best_draw,
  by_domain,
  by_seed,
  choose_draws,
  draw_scores,
)
from udim.selection import Selected


def selected(target, criterion=0.5, tuning=0.5, domains=None):
  return Selected(
    step=10, criterion=criterion, source=0.9, tuning=tuning, target=target,
    reference=0.8, domains=domains or {"t": target},
  )  # fmt: skip


def result(label="udim", run="a", seed=0, draw=0, target=0.5, **numbers):
  one = selected(target, **numbers)
  return Result(
    label, run, seed, draw, {"algorithm": label},
    {"source": one, "oracle": one, "last": one},
    {"flops": 100.0, "seconds": 0.01, "temporaries": 2.0**20}, {},
  )  # fmt: skip


def test_a_result_is_read_as_it_was_written(tmp_path):
  one = result(domains={"t": 0.25, "u": 0.75})
  assert Result.load(tmp_path) is None
  one.save(tmp_path)
  assert Result.load(tmp_path) == one


def test_what_is_not_finite_is_none_on_the_disk(tmp_path):
  one = result()
  one.landscape["gap_target"] = [0.1, math.inf]
  one.save(tmp_path)
  assert Result.load(tmp_path).landscape == {"gap_target": [0.1, None]}


def test_a_damaged_result_says_what_to_do(tmp_path):
  result().save(tmp_path)
  path = tmp_path / "result.json"
  content = json.loads(path.read_text())
  del content["seed"]
  path.write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"result\.json is damaged.*delete it"):
    Result.load(tmp_path)


def test_draws_are_chosen_by_their_criterion_not_by_their_targets():
  draws = [
    result(draw=0, target=0.9, criterion=0.5),
    result(draw=1, target=0.1, criterion=0.7),
    result(draw=2, target=0.8, criterion=0.7),
    result(draw=0, seed=1, target=0.3),
  ]
  chosen = choose_draws(draws, "source")
  assert [(r.seed, r.draw) for r in chosen] == [(0, 1), (1, 0)]


def test_tuning_takes_the_best_mean_over_seeds_and_runs():
  results = [
    result(draw=draw, seed=seed, target=1 - tuning, tuning=tuning)
    for draw, tunings in enumerate([(0.5, 0.7), (0.9, 0.2), (0.6, 0.7)])
    for seed, tuning in enumerate(tunings)
  ]
  assert best_draw(results) == 2
  scores = [one["tuning_accuracy"] for one in draw_scores(results)]
  assert scores == pytest.approx([0.6, 0.55, 0.65])


def test_a_seed_counts_when_all_its_runs_are_there():
  results = [
    result(run="a", seed=0, target=0.2),
    result(run="b", seed=0, target=0.4),
    result(run="a", seed=1, target=0.9),
  ]
  assert by_seed(results, "source") == {0: pytest.approx(0.3)}


def test_domains_are_means_over_the_runs_that_have_them():
  results = [
    result(run="a", domains={"c": 0.2, "b": 0.3}),
    result(run="b", domains={"c": 0.4, "a": 0.5}),
  ]
  found = by_domain(results, "source")
  assert found["c"] == {0: pytest.approx(0.3)}
  assert found["a"] == {0: 0.5}


def test_results_hold_plain_data():
  assert json.loads(json.dumps(dataclasses.asdict(result())))["seed"] == 0
