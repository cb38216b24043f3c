"""What a comparison may say holds."""

import pytest

from udim.claims import claims_section

SEEDS = range(6)
NOISE = (0.004, -0.003, 0.001, -0.002, 0.003, -0.001)  # of a seed


def page(**means):
  """A page of labels with given accuracies; seeds move all labels alike."""

  def scores(label, method):
    assert method == "source"
    if label not in means:
      return {}
    shift = 0.05 if label == "udim_1" else 0.04
    return {
      s: means[label] + shift * s + NOISE[s] * means[label] for s in SEEDS
    }

  return claims_section(scores)


def rows(text):
  """claim -> (difference, seeds won, p, verdict)."""
  lines = [line for line in text.splitlines() if line.startswith("| ")]
  cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in
           lines]  # fmt: skip
  return {cell[0]: tuple(cell[1:]) for cell in cells}


@pytest.mark.parametrize(
  ("udim", "verdict", "won"),
  [
    (0.80, "holds", "6 of 6"),
    (0.70, "not shown", "0 of 6"),
    (0.60, "the opposite holds", "0 of 6"),
  ],
)
def test_a_claim_is_tested_in_pairs(udim, verdict, won):
  found = rows(page(udim=udim, sam=0.70))["UDIM is better than SAM"]
  assert (found[1], found[3]) == (won, verdict)


def test_p_values_are_corrected_for_the_number_of_claims():
  def p_of(**others):
    text = page(udim=0.71, sam=0.70, **others)
    return float(rows(text)["UDIM is better than SAM"][2])

  assert p_of(erm=0.70) > p_of() > 0


@pytest.mark.parametrize(
  ("exact", "verdict"), [(0.702, "holds"), (0.71, "not shown")]
)
def test_worth_another_is_an_interval_within_half_a_point(exact, verdict):
  text = page(udim=0.70, udim_exact=exact)
  found = rows(text)["the exact data gradient is worth the fast one"]
  assert (found[2], found[3]) == ("–", verdict)


def test_a_gain_is_measured_against_another_gain():
  """Ten points from one source, four from all; a seed adds one more each."""
  labels = {"udim_1": 0.70, "sam_1": 0.60, "udim": 0.74, "sam": 0.70}
  claim = "UDIM gains more over SAM from one source than from all sources"
  found = rows(page(**labels))[claim]
  # 10 - 4 points and 1 a seed, 0 to 5: 8.5 on average.
  assert found[0].startswith("+8.5")
  assert found[3] == "holds"


def test_what_was_not_run_is_not_claimed():
  assert page(udim=0.7) == ""
  found = rows(page(udim=0.7, sam=0.6, udim_1=0.5))
  assert [text for text in found if text.startswith("UDIM")] == [
    "UDIM is better than SAM"
  ]


def test_a_page_without_tuning_says_so():
  def scores(label, method):
    return {s: 0.7 + NOISE[s] for s in SEEDS}

  assert "Nothing was tuned" in claims_section(scores, tuned=False)
  assert "Nothing was tuned" not in claims_section(scores)


def test_one_seed_is_no_test():
  text = claims_section(lambda label, method: {0: 0.7})
  assert "one seed: no test" in text
  assert "holds |" not in text.split("exact data gradient")[0]
