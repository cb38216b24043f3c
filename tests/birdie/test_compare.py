"""The comparison of mixtures: its jobs, its page, going on."""

import json
import pathlib

import numpy as np
import pytest

from birdie import compare, comparison
from birdie.compare import Result, finetuning, foreseen, make_jobs
from birdie.comparison import rank_correlation, write_page
from birdie.data import make_configurations
from birdie.vocab import byte_vocabulary
from common.errors import UserError
from configs.birdie import get_config

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def config():
  config = get_config("small")
  config.compare.systems = "none, uniform, birdie, birdie_causal"
  config.compare.seeds = 2
  return config


def test_jobs_differ_by_system_and_seed_alone(config):
  jobs = make_jobs(config)
  assert [(job.seed, job.system) for job in jobs] == [
    (seed, system)
    for seed in (0, 1)
    for system in ("none", "uniform", "birdie", "birdie_causal")
  ]
  none, uniform, birdie, causal = jobs[4:]
  assert none.first is None
  assert (uniform.first.mixture.preset, uniform.first.controller.enabled) == (
    "birdie_uniform",
    False,
  )
  assert birdie.first.controller.enabled
  assert causal.first.model.bidirectional == "none"
  assert {job.first.seed for job in (uniform, birdie, causal)} == {1}
  # All fine-tunings are the same but for the model's direction.
  assert none.second.mixture.entries == birdie.second.mixture.entries
  assert causal.second.model.bidirectional == "none"


def test_a_fine_tuning_is_the_task_alone(config):
  made = finetuning(config)
  ((entry,),) = (made.mixture.entries,)
  assert entry["objective"] == "associative_recall"
  assert not made.controller.enabled
  assert made.num_steps == config.compare.finetune.num_steps
  assert made.optim.weight_decay == 0
  assert config.controller.enabled  # the original is as it was


def test_every_system_can_be_fine_tuned(config):
  systems = tuple(config.compare.settings)
  config.compare.update({"systems": ", ".join(systems), "seeds": 1})
  for job in make_jobs(config):
    (entry,) = make_configurations(job.second, byte_vocabulary())
    assert (entry.cls, entry.weight) == ("associative_recall", 1)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"systems": "birdy"}, "birdie"),
    ({"systems": ""}, "name at least one"),
    ({"seeds": 0}, "at least 1"),
    ({"problems": 0}, "at least 1"),
    ({"batch_size": 0}, "at least 1"),
    ({"lookups": ()}, "is empty"),
    ({"lookups": (1, 13)}, "lookups=13"),
    ({"finetune": {"task": {"name": "associative_recal"}}}, "recall"),
    ({"finetune": {"task": {"key_alphabet": 3}}}, "pairs=12"),
    (
      {"finetune": {"task": {"name": "phone_book"}}},
      "'phone_book' has no 'key_alphabet': another task is set as a whole",
    ),
    (
      {"finetune": {"num_steps": 4}},
      "^compare.finetune: optim.warmup_steps=50 must be between",
    ),
  ],
  ids=str,
)
def test_a_wrong_comparison_is_one_line(config, change, message):
  config.compare.update(change)
  with pytest.raises(UserError, match=message):
    make_jobs(config)


# -- shares of a fixed mixture -------------------------------------------------


def _probs(config):
  made = make_configurations(config, byte_vocabulary())
  by_class: dict[str, float] = {}
  for entry in made:
    by_class[entry.cls] = by_class.get(entry.cls, 0) + entry.weight
  return by_class


def test_shares_are_those_of_classes():
  config = get_config("uniform")
  config.mixture.shares = "copying=3, infilling = 1"
  found = _probs(config)
  assert found.pop("copying") == pytest.approx(0.75)
  assert found.pop("infilling") == pytest.approx(0.25)
  assert set(found.values()) == {0}


def test_half_of_everything_is_half():
  config = get_config("small")
  (job,) = make_jobs(_with(config, systems="half_deshuffling", seeds=1))
  found = _probs(job.first)
  assert found["deshuffling"] == pytest.approx(0.5)
  assert found["copying"] == pytest.approx(1 / 14)


def _with(config, **changes):
  config.compare.update(changes)
  return config


@pytest.mark.parametrize(
  ("shares", "message"),
  [
    ("copyin=1", "copying"),
    ("copying", "needs a number"),
    ("copying=x", "needs a number"),
    ("copying=-1", "at least 0"),
    ("copying=0", "all probabilities"),
  ],
)
def test_wrong_shares_are_one_line(shares, message):
  config = get_config("uniform")
  config.mixture.shares = shares
  with pytest.raises(UserError, match=message):
    _probs(config)


# -- what the controller foresaw -----------------------------------------------


def test_a_prediction_goes_with_the_reward_of_its_line():
  lines = [
    {"step": 1, "predicted/a": 0.5, "mixture/a": 1.0},
    {"step": 2, "reward/a": 0.25, "predicted/a": 0.75, "reward/b": 1.0},
    {"step": 3, "reward/a": -1.0, "predicted/a": 0.0},
  ]
  assert foreseen(lines) == {"a": [[0.75, 0.25], [0.0, -1.0]]}


def test_rank_correlations():
  pairs = np.array([[1, 10], [2, 20], [3, 90]], float)
  assert rank_correlation(pairs) == pytest.approx(1)
  assert rank_correlation(pairs * [1, -1]) == pytest.approx(-1)
  assert np.isnan(rank_correlation(pairs * [0, 1]))


# -- the page ------------------------------------------------------------------


def _result(system, seed, share):
  scores = {"answers": share, "eval_class/loss/copying": 1.5}
  baselines = {"answers": 0.125}
  for lookups in (1, 2, 4, 8):
    scores[f"answers/{lookups}"] = share
    baselines[f"answers/{lookups}"] = 0.125
  chosen = "birdie" in system
  return Result(
    system=system,
    seed=seed,
    scores=scores,
    baselines=baselines,
    params=1000,
    tokens=2_000_000,
    curve=[[10, 0.1], [20, share]],
    mixture=[[5, {"copying": 0.25, "infilling": 0.75}]] if chosen else [],
    foreseen={"copying": [[1, 1], [2, 2], [3, 3]]} if chosen else {},
    seconds=60.0,
  )


def test_the_page_says_what_was_found(config, tmp_path):
  shares = {"uniform": (0.4, 0.5, 0.6), "birdie": (0.5, 0.61, 0.7)}
  for system, values in shares.items():
    for seed, share in enumerate(values):
      folder = tmp_path / "runs" / system / f"seed{seed}"
      folder.mkdir(parents=True)
      _result(system, seed, share).save(folder)
  page = pathlib.Path(write_page(tmp_path, config)).read_text()
  assert "| `uniform` | 50.0 ± 24.8 |" in page
  assert "| `context` | 12.5 |" in page
  assert "controller is better than a uniform mixture | +10.3 ± 1.4" in page
  assert "| `birdie` | copying | 25 % | +1.0 ± 0.0 |" in page
  assert "| `birdie` | infilling | 75 % | – |" in page
  assert "| `birdie` | all | 100 % | +1.0 ± 0.0 |" in page
  for figure in (comparison.FIGURE, comparison.CURVES):
    assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    assert f"({figure})" in page


# -- a small one ---------------------------------------------------------------


def test_a_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
  config = get_config("smoke")
  config.compare.update(
    {"systems": "none", "seeds": 1, "lookups": (1, 2), "problems": 3}
  )
  config.compare.finetune.num_steps = 2
  config.compare.finetune.optim.warmup_steps = 0
  config.compare.finetune.data.update({"sequence_length": 64, "batch_size": 8})
  config.compile_cache = ""
  path = compare.compare(config, str(tmp_path))
  result = json.loads((tmp_path / "runs/none/seed0/result.json").read_text())
  assert set(result["scores"]) == {"answers", "answers/1", "answers/2"}
  assert result["baselines"]["answers/2"] == pytest.approx(1 / 12)
  assert not (tmp_path / "runs/none/seed0/finetune/checkpoints").exists()
  page = pathlib.Path(path).read_text()

  def never(*arguments):
    raise AssertionError("it was done before")

  monkeypatch.setattr(compare, "run_job", never)
  again = compare.compare(config, str(tmp_path))
  assert pathlib.Path(again).read_text() == page
  config.compare.finetune.num_steps = 3
  with pytest.raises(UserError, match=r"finetune\.num_steps"):
    compare.compare(config, str(tmp_path))
