"""Which evaluation of a run is reported, and what may choose it."""

import numpy as np
import pytest

from common.errors import UserError
from udim.selection import METHODS, best, oracle_view, select, source_view

# (step, source held out, target held out, target)
RECORDS = [
  (10, (0.5, 0.7), 0.9, 0.30),
  (20, (0.8, 0.8), 0.2, 0.40),
  (30, (0.9, 0.7), 0.95, 0.50),
  (40, (0.6, 0.6), 0.95, 0.60),
]


def make_lines(records=RECORDS):
  return [
    {
      "step": step,
      "tuning/accuracy": sum(sources) / 2,
      "reference/accuracy": 0.5,
      "source_holdout/accuracy/a": sources[0],
      "source_holdout/accuracy/b": sources[1],
      "source_main/accuracy/a": 1.0,
      "target_holdout/accuracy/t": oracle,
      "target_main/accuracy/t": target,
      "target_main/loss/t": 3.0,
    }
    for step, sources, oracle, target in records
  ]


def test_the_first_of_the_best_is_taken_by_each_method():
  selected = select([{"step": 1, "train/loss": 1.0}, *make_lines()])
  assert tuple(selected) == METHODS
  steps = {method: one.step for method, one in selected.items()}
  assert steps == {"source": 20, "oracle": 30, "last": 40}
  assert selected["source"].target == pytest.approx(0.4)
  assert selected["source"].source == pytest.approx(0.8)
  assert selected["oracle"].criterion == pytest.approx(0.95)
  assert selected["last"].criterion == pytest.approx(0.6)
  assert selected["last"].domains == {"t": 0.6}


def test_views_hold_nothing_else():
  (line,) = make_lines(RECORDS[:1])
  assert source_view(line) == {"a": 0.5, "b": 0.7}
  assert oracle_view(line) == {"t": 0.9}


@pytest.mark.parametrize("seed", range(5))
def test_selection_by_source_does_not_depend_on_targets(seed):
  rng = np.random.default_rng(seed)
  lines = make_lines()
  for line in lines:
    for name in [n for n in line if n.startswith("target")]:
      line[name] = float(rng.random())
  assert select(lines)["source"].step == 20
  assert best(lines, source_view) == 1


def test_a_run_without_targets_has_nothing_to_select():
  with pytest.raises(UserError, match="no evaluation on its target domains"):
    select([{"step": 1, "source_holdout/accuracy/a": 0.5}])


def test_targets_too_small_to_divide_have_no_oracle():
  lines = make_lines()
  for line in lines:
    del line["target_holdout/accuracy/t"]
  assert tuple(select(lines)) == ("source", "last")
