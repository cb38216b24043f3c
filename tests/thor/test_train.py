"""Runs: what they leave, how they go on, what they refuse."""

import json
import pathlib

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from common.checkpoint import load_params
from common.errors import RunError, UserError
from common.hooks import CheckpointHook, SameEverywhere
from common.metrics import Digest
from common.train import StepInfo
from configs.thor import get_config
from thor import train as train_lib
from thor.compare import Result, compare
from thor.run import load_run
from thor.sources import load_parallel
from thor.train import train_and_evaluate

pytestmark = pytest.mark.usefixtures("compile_once")
CLOCK = ("time", "seconds", "speed/")


def tiny(variant=""):
  config = get_config(f"smoke,{variant}" if variant else "smoke")
  config.num_steps = 4
  config.compile_cache = ""
  config.data.source.update({"rows": 60, "test_rows": 2, "names": 10})
  config.data.token_budget = 512
  config.data.lengths = (64,)
  config.vocabulary.size = 256
  config.model.update({"encoder_layers": 2, "decoder_layers": 1})
  config.translation.update({"max_ratio": 0.0, "max_extra": 4})
  config.evaluation.every = 2
  config.checkpoint.update({"every": 2, "keep": 9})
  config.log.every = 2
  return config


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
  """A run's folder, its hooks, and the digests of its steps."""
  workdir, hooks, digests = tmp_path_factory.mktemp("straight"), [], []
  real = train_lib.train

  def look(info):
    digests.append(info.metrics["draws"])

  look.every = 1

  def train(*args, **kwargs):
    hooks.extend(kwargs["hooks"])
    return real(*args, **kwargs | {"hooks": [*hooks, look]})

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_lib, "train", train)
    train_and_evaluate(tiny(), str(workdir))
  return workdir, hooks, digests


@pytest.fixture
def straight(watched):
  return watched[0]


def metrics(workdir):
  """Every line but what the clock wrote, by step."""
  lines = {}
  for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().split("\n"):
    if line:
      values = json.loads(line)
      kept = {k: v for k, v in values.items() if not k.startswith(CLOCK)}
      lines.setdefault(kept.pop("step"), {}).update(kept)
  return lines


def read_state(workdir, step):
  folder = workdir / "checkpoints" / str(step) / "state"
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(folder).item_metadata.tree
    plain = ocp.RestoreArgs(restore_type=np.ndarray)
    return reader.restore(
      folder, restore_args=jax.tree.map(lambda _: plain, tree)
    )


def assert_same_run(a, b):
  (step, params), (other, others) = [
    load_params(folder / "checkpoints") for folder in (a, b)
  ]
  assert step == other
  chex.assert_trees_all_equal(params, others)
  chex.assert_trees_all_equal(read_state(a, step), read_state(b, step))
  assert metrics(a) == metrics(b)


class Stopped(BaseException):
  """Ends a run between two steps, past everything that handles errors."""


def stop_after(monkeypatch, step):
  real = train_lib.train

  def stop(info):
    raise Stopped

  stop.every = {step}.__contains__

  def train(*args, hooks, **kwargs):
    return real(*args, hooks=[*hooks, stop], **kwargs)

  monkeypatch.setattr(train_lib, "train", train)


@pytest.mark.parametrize("step", [1, 3])
def test_stopped_after_any_step_and_started_again(
  straight, tmp_path, step, monkeypatch
):
  """Draws of experts, too: their shares are among the metrics."""
  with monkeypatch.context() as patch:
    stop_after(patch, step)
    with pytest.raises(Stopped):
      train_and_evaluate(tiny(), str(tmp_path))
  train_and_evaluate(tiny(), str(tmp_path))
  assert_same_run(straight, tmp_path)
  assert any(name.startswith("train/experts/") for name in metrics(tmp_path)[4])


def test_draws_are_compared_after_every_step_and_before_a_save(watched):
  """By hashes, of which each device makes its own."""
  _, hooks, digests = watched
  found = [np.asarray(digest.bits) for digest in digests]
  assert [len({*bits}) for bits in found] == [1] * 4  # equal on 8 devices
  assert [bits.shape for bits in found] == [(8,)] * 4
  assert len({bits[0] for bits in found}) == 4  # other steps, other draws
  (own,) = [hook for hook in hooks if isinstance(hook, SameEverywhere)]
  (save,) = [hook for hook in hooks if isinstance(hook, CheckpointHook)]
  assert own.every == 1
  assert hooks.index(own) < hooks.index(save)
  changed = found[2].copy()
  changed[5] += 1  # as if one device had drawn another expert
  parted = Digest(jax.device_put(changed, digests[2].bits.sharding))
  # tiny() logs even steps.
  for step, digest in ((5, digests[0]), (6, digests[1]), (7, parted)):
    own(StepInfo(step, None, {"draws": digest}, None))
  with pytest.raises(RunError, match="in their draws of experts of steps 7 to"):
    save(StepInfo(7, None, {}, None))


def test_a_run_leaves_scores_translations_and_a_report(straight):
  last = metrics(straight)[4]
  for split in ("test", "test_names", "test_long"):
    for metric in ("bleu", "chrf", "exact_match"):
      values = [last[f"{split}/{metric}/{tag}"] for tag in ("de", "fr")]
      assert last[f"{split}/{metric}"] == pytest.approx(np.mean(values))
      assert f"copy_{split}/{metric}/fr" in last
  assert last["copy_test/chrf"] > 5
  assert {"mode/bleu/dispatch_sentence", "mode/bleu/fixed:0"} <= last.keys()
  assert {"agreement/skl", "agreement/top1", "eval_loss/de"} <= last.keys()
  lines = (straight / "translations" / "test.jsonl").read_text().splitlines()
  assert len(lines) == 4
  assert json.loads(lines[0]).keys() == {
    "source", "target", "language", "translation",
  }  # fmt: skip
  page = (straight / "report.md").read_text()
  for text in ("## Test scores", "copy: BLEU", "## Sample translations",
               "## Quality by dispatch", "nrefs:1|case:mixed",
               "plots/share-of-tokens-by-expert.png",
               "plots/agreement-between-experts.png"):  # fmt: skip
    assert text in page
  facts = json.loads((straight / "facts.json").read_text())
  assert {"fill_rate", "text_hash", "vocabulary"} <= facts.keys()


def test_a_run_can_be_read_and_averaged(straight):
  run = load_run(straight)
  assert (run.step, run.routing.kind) == (4, "thor")
  assert run.vocabulary.languages == ("de", "fr")
  trees = [load_run(straight, step=step).params for step in (2, 4)]
  mean = load_run(straight, average=2).params
  expected = jax.tree.map(lambda a, b: (a + b) / 2, *trees)
  chex.assert_trees_all_close(mean, expected, atol=1e-7)
  with pytest.raises(UserError, match=r"--average=5: .* has 2 checkpoints"):
    load_run(straight, average=5)
  with pytest.raises(UserError, match="no checkpoint 3"):
    load_run(straight, step=3)


def test_the_table_of_hash_is_part_of_the_run(tmp_path):
  config = tiny("hash")
  config.num_steps = config.optim.warmup_steps = 2
  train_and_evaluate(config, str(tmp_path))
  run = load_run(tmp_path)
  assert run.table.shape == (run.vocabulary.size,)
  assert set(np.unique(run.table)) == {0, 1, 2, 3}
  assert "train/kept" in metrics(tmp_path)[2]


def load_parallel_too(config, folder):
  """What reads the text: only its own settings are left to be refused."""
  load_parallel(config.data.source)
  raise AssertionError("the text was read")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"routing.kind": "thorr"}, "routing.kind='thorr'.*thor"),
    ({"routing.pair": "distinct", "routing.experts": 1}, "needs two experts"),
    ({"evaluation.dispatch": "fixed:7"}, "numbered from 0 to 3"),
    ({"evaluation.dispatch": "gate"}, "does not go with routing.kind='thor'"),
    ({"translation.modes": ("ensemble",)}, "write ensemble:2"),
    ({"translation.beam": 0}, "beam=0"),
    ({"objective.passes": 3}, "objective.passes=3 must be 1 or 2"),
    ({"objective.alpha": -1.0}, "objective.alpha=-1.0"),
    ({"routing.balance": -1.0}, "routing.balance=-1.0"),
    ({"data.too_long": "drop"}, "data.too_long='drop'"),
    ({"data.row_multiple": 0}, "data.row_multiple=0"),
    ({"data.lengths": (2, 64)}, "none may be below 3"),
    ({"vocabulary.kind": "word"}, "vocabulary.kind='word'"),
    ({"translation.token_budget": 0}, "translation.token_budget=0"),
    (
      {"model.activation_dropout": 0.1, "routing.level": "token"},
      "model.activation_dropout=0.1",
    ),
    ({"model.width": 15}, "model.width=15"),
    ({"model.preset": "iwslt"}, "model.preset='iwslt'"),
    ({"data.token_budget": 0}, "data.token_budget=0 must be at least 1"),
    ({"data.token_budget": 10}, "too small for the bucket"),
    ({"mesh.data": 3}, "does not fit the 8 devices"),
    ({"data.source.languages": ("de", "xx")}, "xx"),
  ],
)
def test_mistakes_are_one_line_before_text_is_read(
  settings, message, tmp_path, monkeypatch
):
  config = tiny()
  with config.ignore_type():
    for key, value in settings.items():
      config.update_from_flattened_dict({key: value})
  monkeypatch.setattr("thor.train.make_corpus", load_parallel_too)
  with pytest.raises(UserError, match=message) as error:
    train_and_evaluate(config, str(tmp_path))
  assert "\n" not in str(error.value)
  assert not (tmp_path / "metrics.jsonl").exists()


def test_a_comparison_trains_and_scores_the_ways_to_use_it(tmp_path):
  config = tiny()
  config.num_steps = config.optim.warmup_steps = 2
  config.log.every = 1
  config.data.source.test_rows = 1
  config.compare.update({"systems": "thor", "seeds": 1, "mode_seeds": 2})
  page = pathlib.Path(compare(config.lock(), str(tmp_path))).read_text()
  result = Result.load(tmp_path / "runs" / "thor" / "seed0")
  assert (result.steps, result.seed) == (2, 0)
  assert result.scores["test/chrf"] == pytest.approx(
    np.mean([result.scores[f"test/chrf/{tag}"] for tag in ("de", "fr")])
  )
  assert not any(name.startswith("train/") for name in result.scores)
  # Draws have a score for each seed, a fixed expert has one.
  draws = result.modes["dispatch_sentence"]["chrf"]
  assert (len(draws), len(result.modes["fixed:0"]["chrf"])) == (2, 1)
  assert 0 < result.seconds < 60
  assert not (tmp_path / "runs" / "thor" / "seed0" / "checkpoints").exists()
  assert "## Ways to use THOR" in page
  assert "`fixed:0`" in page


def test_long_test_sentences_do_not_end_a_run(tmp_path):
  config = tiny()
  config.num_steps = config.optim.warmup_steps = 2
  config.data.lengths = (16,)
  config.data.too_long = "skip"
  train_and_evaluate(config, str(tmp_path))
  assert "test_long/bleu" in metrics(tmp_path)[2]


def test_a_mesh_that_needs_other_batches_is_refused(straight):
  config = tiny()
  config.mesh.update({"data": 4, "fsdp": 2})  # eight rows fit this one
  train_and_evaluate(config, str(straight))
  config = tiny()
  facts = json.loads((straight / "facts.json").read_text())
  assert facts["batch_rows"] == [8]
  facts["batch_rows"] = [16]
  (straight / "facts.json").write_text(json.dumps(facts))
  with pytest.raises(UserError, match=r"batch_rows is \[8\].*with \[16\]"):
    train_and_evaluate(config, str(straight))
  facts["batch_rows"] = [8]
  (straight / "facts.json").write_text(json.dumps(facts))


def test_another_text_is_refused(straight):
  config = tiny()
  config.data.source.seed = 1
  with pytest.raises(UserError, match=r"data\.source\.seed"):
    train_and_evaluate(config, str(straight))
