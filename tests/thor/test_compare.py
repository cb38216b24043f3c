"""Comparisons: resumed, added to, written down, judged."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from common.errors import UserError
from configs.thor import get_config
from thor import compare as compare_lib
from thor.compare import Result, compare, make_jobs
from thor.cost import dispatch_flops, forward_flops, train_flops
from thor.settings import Settings

SENTENCES = [f"ein kleiner Satz mit der Nummer {i}" for i in range(40)]


def config_of(systems="dense, r_drop, thor", seeds=3):
  config = get_config("smoke")
  config.compare.update({"systems": systems, "seeds": seeds, "samples": 50})
  return config.lock()


def fake(quality, ran=None, languages=("de",)):
  """A `run_job` that translates `quality[system]` of the sentences right."""

  def run_job(folder, job):
    if ran is not None:
      ran.append((job.system, job.seed))
    path = folder / job.folder
    (path / "translations").mkdir(parents=True, exist_ok=True)
    right = quality[job.system] + job.seed
    lines = [
      json.dumps(
        {"source": "x", "target": text,
         "language": languages[i % len(languages)],
         "translation": text if i < right else "falsch und ohne Sinn"}
      )
      for i, text in enumerate(SENTENCES)
    ]  # fmt: skip
    (path / "translations" / "test.jsonl").write_text("\n".join(lines) + "\n")
    bleu = 100 * right / 40
    scores = {
      f"{name}/{metric}{tag}": bleu
      for name in ("test", "test_long", "copy_test", "copy_test_long")
      for metric in ("bleu", "chrf", "exact_match")
      for tag in ("", "/de")
    }
    modes = {}
    if job.system == "thor":
      modes = {
        "fixed:0": {m: [bleu] * 2 for m in ("bleu", "chrf", "exact_match")}
      }
    from common.config import save_config

    save_config(path, job.config)
    result = Result(
      job.system, job.seed, job.config.num_steps, scores, 1000, 2e9, 3e6, 0.01,
      modes,
    )  # fmt: skip
    result.save(path)
    return result

  return run_job


QUALITY = {"dense": 10, "r_drop": 20, "thor": 20, "dense_2x": 12}


@pytest.fixture
def page(tmp_path, monkeypatch):
  monkeypatch.setattr(compare_lib, "run_job", fake(QUALITY))
  return pathlib.Path(compare(config_of(), str(tmp_path))).read_text()


def test_the_page_has_scores_costs_and_settings(page):
  # Seeds 0, 1, 2 have 25, 27.5 and 30 % right: a t-interval of 6.2.
  row = "| `dense` | 27.5 ± 6.2 | 27.5 ± 6.2 | 27.5 ± 6.2 | 3 | 1,000 | 0.02 |"
  assert row in page
  for text in ("## test\n", "## test_long\n", "copying the source",
               "## Ways to use THOR", "`fixed:0`",
               "`objective.passes=1`"):  # fmt: skip
    assert text in page
  assert "num_steps*=2" not in page  # of a system that was not run


def test_claims_are_paired_tests(page):
  rows = [line for line in page.splitlines() if line.startswith("| THOR is")]
  assert rows == [
    "| THOR is better than R-Drop | +0.0 ± 0.0 | 0 of 3 | 1 | not shown |"
  ]
  assert "dense_2x" not in page  # a claim about what was not run is not made


def test_the_bootstrap_takes_all_seeds_as_one_text(page):
  section = page[page.index("## Paired bootstrap") :]
  assert "the translations of 3 seeds" in section
  rows = [line for line in section.splitlines() if line.startswith("| `")]
  names = [row.split("`")[1] for row in rows[:3]]
  assert names == ["r_drop", "dense", "thor"]
  # 30 of 120 sentences worse: chance does not do that; thor is the same.
  assert float(rows[1].split("|")[3]) < 0.05
  assert float(rows[2].split("|")[3]) == 1


def test_the_bootstrap_divides_languages_by_their_tokenizer(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(
    compare_lib, "run_job", fake(QUALITY, languages=("de", "ja"))
  )
  page = pathlib.Path(compare(config_of(), str(tmp_path))).read_text()
  section = page[page.index("## Paired bootstrap") :]
  assert section.count("\nde, signature `") == 1
  assert section.count("\nja, signature `") == 1
  assert section.count("tok:13a|") == section.count("tok:char|") == 1


def test_what_has_finished_is_kept_and_added_to(tmp_path, monkeypatch):
  ran = []
  monkeypatch.setattr(compare_lib, "run_job", fake(QUALITY, ran))
  compare(config_of("dense", seeds=1), str(tmp_path))
  compare(config_of("dense, dense_2x", seeds=2), str(tmp_path))
  assert ran == [("dense", 0), ("dense_2x", 0), ("dense", 1), ("dense_2x", 1)]
  page = (tmp_path / "report.md").read_text()
  assert "4 trainings, seeds 0, 1" in page


def test_another_configuration_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(compare_lib, "run_job", fake(QUALITY))
  compare(config_of("dense", seeds=1), str(tmp_path))
  changed = config_of("dense", seeds=1).copy_and_resolve_references()
  with changed.unlocked():
    changed.optim.lr = 1.0
  with pytest.raises(UserError, match=r"optim\.lr"):
    compare(changed, str(tmp_path))
  with changed.unlocked():
    changed.optim.lr = config_of().optim.lr
    changed.translation.beam = 1
  with pytest.raises(UserError, match=r"translation\.beam"):
    compare(changed, str(tmp_path))


def test_a_damaged_result_says_what_to_do(tmp_path):
  (tmp_path / "result.json").write_text("{")
  with pytest.raises(UserError, match=r"delete it, and the run is done again"):
    Result.load(tmp_path)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"systems": "dense, thorr"}, "'thorr'.*thor"),
    ({"systems": " , "}, "name at least one"),
    ({"seeds": 0}, "compare.seeds=0 must be at least 1"),
    ({"samples": 0}, "compare.samples=0 must be at least 1"),
    ({"baseline": "nosuch"}, "compare.baseline='nosuch'"),
  ],
)
def test_mistakes(settings, message):
  config = config_of().copy_and_resolve_references()
  with config.unlocked():
    config.compare.update(settings)
  with pytest.raises(UserError, match=message):
    make_jobs(config)


def test_costs_are_those_of_the_architecture():
  """25.2 M for a source token, 37.7 M and 10.2 M for a target token."""
  settings = Settings(10_000, width=512, hidden=1024, heads=4, experts=2)
  cost = forward_flops(settings)
  np.testing.assert_allclose(cost.source, 25.2e6, rtol=2e-3)
  np.testing.assert_allclose(cost.target, 37.7e6 + 10.2e6, rtol=2e-3)
  assert train_flops(settings, passes=2).total == 6 * cost.total
  # Room for a quarter more tokens costs that in three layers of each side.
  roomy = dataclasses.replace(settings, capacity=1.25, gated=True)
  more = 6 * (4 * 512 * 1024 / 4 + 2 * 512 * 2)
  np.testing.assert_allclose(
    train_flops(roomy, passes=1).total, 3 * (cost.total + more)
  )
  assert dispatch_flops(settings, "fixed", 0) == cost
  assert dispatch_flops(settings, "ensemble", 3).total == 3 * cost.total
  # Three layers of each side run their second expert, too.
  extra = 3 * 4 * 512 * 1024
  assert dispatch_flops(settings, "average_output", 0).source == (
    cost.source + extra
  )
