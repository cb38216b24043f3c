"""What comparisons share: settings of systems, results on disk."""

import types

import pytest
from ml_collections import ConfigDict

from common.comparison import (
  RESULT,
  by_system,
  check_settings,
  grouped,
  job_config,
  load_result,
  save_result,
)
from common.errors import UserError


def result(system, seed, **scores):
  return types.SimpleNamespace(system=system, seed=seed, scores=scores)


def test_settings_change_and_multiply():
  config = ConfigDict({"seed": 0, "steps": 5, "optim": {"lr": 0.1}})
  made = job_config(config, ("optim.lr=0.5", "steps*=2.5"), seed=3)
  assert made.to_dict() == {"seed": 3, "steps": 12, "optim": {"lr": 0.5}}
  assert config.to_dict() == {"seed": 0, "steps": 5, "optim": {"lr": 0.1}}
  with pytest.raises(UserError, match=r"optim\.l"):
    job_config(config, ("optim.l=0.5",), seed=0)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"systems": " , "}, "compare.systems is empty"),
    ({"systems": "plan"}, "compare.systems: 'plan'; did you mean 'plain'"),
    ({"baseline": "plan"}, "compare.baseline='plan'; did you mean 'plain'"),
    ({"seeds": 0}, "compare.seeds=0 must be at least 1"),
  ],
)  # fmt: skip
def test_what_is_to_be_run_must_be_known(changes, message, one_line):
  cfg = {"systems": "plain, other", "baseline": "plain", "seeds": 1,
         "settings": {"plain": (), "other": ()}}  # fmt: skip
  assert check_settings(ConfigDict(cfg), {"seeds": 1}) == ["plain", "other"]
  refused = ConfigDict(cfg | changes)
  assert message in one_line(check_settings, refused, {"seeds": 1})


def test_results_are_whole_or_refused(tmp_path):
  def read():
    return load_result(tmp_path, lambda content: content["score"])

  assert read() is None
  save_result(tmp_path, {"score": 0.5})
  assert read() == 0.5
  for text in ("{", "[]", "{}"):
    (tmp_path / RESULT).write_text(text)
    with pytest.raises(UserError, match=r"result\.json is damaged.*delete it"):
      read()


def test_results_are_gathered_by_system():
  found = [result("b", 1, x=3.0), result("a", 0, x=1.0), result("b", 0)]
  assert by_system(found, "x") == {"b": {1: 3.0}, "a": {0: 1.0}}
  assert [(name, len(own)) for name, own in grouped(found)] == [
    ("b", 2), ("a", 1),
  ]  # fmt: skip
