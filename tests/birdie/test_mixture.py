import json

import numpy as np
import pytest

from birdie.mixture import (
  Mixture,
  MixtureSchedule,
  check_probs,
  class_uniform,
  draw,
  normalized,
)
from common.errors import UserError
from common.rngs import np_rng


@pytest.mark.parametrize(
  ("probs", "words"),
  [
    ([0, 0, 0], "all probabilities of the mixture are 0"),
    ([0.5, float("nan"), 0.5], "probability 1 of the mixture is nan"),
    ([float("inf"), 0], "probability 0 of the mixture is inf"),
    ([1.5, -0.5], "probability 1 of the mixture is -0.5"),
    ([0.5, 0.4], "sum to 0.9"),
    ([], "shape"),
    ([[0.5, 0.5]], "shape"),
  ],
)
def test_what_is_no_distribution_is_refused_in_one_line(probs, words):
  for make in (check_probs, Mixture, MixtureSchedule):
    with pytest.raises(UserError, match=words) as error:
      make(np.array(probs))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [[0, 0], [2, -1], [np.nan, 1], [-1, -1]])
def test_unusable_weights_are_refused(weights):
  with pytest.raises(UserError):
    normalized(weights)


def test_weights_become_probabilities():
  np.testing.assert_array_equal(
    normalized([4, 4, 2, 0]), np.float32([0.4, 0.4, 0.2, 0])
  )


def test_class_uniform_shares_between_classes_then_inside_them():
  probs = class_uniform(["copy", "ntp", "copy", "copy", "copy"])
  np.testing.assert_array_equal(
    probs, np.float32([0.125, 0.5, 0.125, 0.125, 0.125])
  )


def test_draw_inverts_the_cdf():
  probs = np.float32([0, 0.25, 0, 0.75, 0])
  u = [0, 0.2499, 0.25, 0.9999, np.nextafter(1, 0)]
  np.testing.assert_array_equal(draw(probs, np.array(u)), [1, 1, 3, 3, 3])
  assert draw(probs, 0.3) == 3


def test_draw_never_picks_what_has_probability_zero():
  probs = np.zeros(97, np.float32)
  probs[1:97:2] = normalized(np.arange(1, 49))
  drawn = draw(probs, np_rng(0, "test").random(20_000))
  assert set(np.unique(drawn)) <= set(range(1, 97, 2))


def test_counts_follow_the_probabilities():
  probs = normalized([1, 2, 3, 4, 10])
  n = 20_000
  counts = np.bincount(draw(probs, np_rng(3, "test").random(n)), minlength=5)
  chi_square = np.sum((counts - n * probs) ** 2 / (n * probs))
  assert chi_square < 23.5  # upper 1e-4 quantile, 4 degrees of freedom


def test_a_mixture_is_in_force_exactly_from_its_step():
  a, b, c = np.eye(3)
  schedule = MixtureSchedule(a)
  schedule.change(b, 7)
  schedule.change(c, 9)
  assert [int(schedule.at(k).probs.argmax()) for k in (0, 6, 7, 8, 9, 99)] == [
    0, 0, 1, 1, 2, 2,
  ]  # fmt: skip
  assert [schedule.at(k).version for k in (6, 7, 9)] == [0, 1, 2]


def test_a_later_change_for_the_same_step_wins():
  a, b, c = np.eye(3)
  schedule = MixtureSchedule(a)
  schedule.change(b, 7)
  schedule.change(c, 7)
  assert schedule.at(7).probs.argmax() == 2
  assert schedule.at(7).version == 2
  assert schedule.at(6).version == 0


def test_a_change_before_a_later_one_is_refused():
  schedule = MixtureSchedule([1, 0])
  schedule.change(np.array([0, 1]), 7)
  with pytest.raises(ValueError, match="cannot follow"):
    schedule.change(np.array([1, 0]), 6)


def test_a_change_of_another_size_is_refused():
  with pytest.raises(UserError, match="3 probabilities for 2 configurations"):
    MixtureSchedule([0.5, 0.5]).change(np.float32([0.5, 0.5, 0]), 1)


def test_probabilities_cannot_be_edited_in_place():
  mixture = Mixture(np.float32([0.5, 0.5]))
  with pytest.raises(ValueError, match="read-only"):
    mixture.probs[0] = 1


def test_state_survives_json_to_the_last_bit():
  schedule = MixtureSchedule(normalized(np_rng(0, "a").random(96)))
  for step in (10, 20, 30):
    schedule.change(normalized(np_rng(0, "b", step).random(96)), step)
  state = json.loads(json.dumps(schedule.get_state(since=20)))
  restored = MixtureSchedule(np.full(96, 1 / 96))
  restored.set_state(state)
  for step in (20, 29, 30, 1000):
    expected, found = schedule.at(step), restored.at(step)
    assert found.probs.tobytes() == expected.probs.tobytes()
    assert found.version == expected.version
  with pytest.raises(ValueError, match="older than the schedule"):
    restored.at(19)


def test_state_of_another_size_is_refused():
  state = MixtureSchedule([0.5, 0.5]).get_state()
  with pytest.raises(ValueError, match="2 configurations, this run 3"):
    MixtureSchedule(np.float32([1, 0, 0])).set_state(state)
