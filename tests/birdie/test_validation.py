"""Losses of training and evaluation against NumPy; the controller's hook."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from birdie import controller
from birdie import data as data_lib
from birdie import train as train_lib
from birdie.curriculum import Curriculum, CurriculumHook, agree
from birdie.train import last_scores
from birdie.validation import Evaluator, Scores, eval_batches
from common.config import flatten
from common.data.text import TokenStore
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError
from common.metrics import MetricWriter, read_metrics
from common.train import StepInfo
from configs.birdie import get_config


def make_config():
  config = get_config("smoke")
  config.data.sequence_length = 64
  config.data.cache_dir = ""
  config.model.update({"width": 16, "state": 16})
  config.controller.update({"schedule": "4", "warmup_end": 4, "fit_steps": 2})
  config.mesh.update({"data": 4, "fsdp": 2})
  return config


@pytest.fixture(scope="module")
def setup():
  config = make_config()
  config.lock()
  corpus = data_lib.make_corpus(config)
  made = train_lib.make_setup(config, corpus.tokenizer)
  return config, made, corpus


@pytest.fixture(scope="module")
def params(setup):
  return setup[1].create().params


def token_losses(model, params, batch):
  """float64 [B, T]: -log p of the targets, and whether they come first."""
  rows = (
    batch[key] for key in ("tokens", "segment_ids", "positions", "prefix")
  )
  logits = np.asarray(model.apply({"params": params}, *rows), np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  targets = np.asarray(batch["targets"])
  chosen = np.take_along_axis(logs, targets[..., None], -1)[..., 0]
  return -chosen, logits.argmax(-1) == targets


def test_evaluation_is_a_mean_over_each_configurations_targets(setup, params):
  config, made, corpus = setup
  evaluator = train_lib.make_evaluator(config, made, corpus)
  scores = evaluator(params)
  count = len(made.configurations)
  batches = eval_batches(config, corpus, made.configurations)
  assert len(batches) > 1
  losses, hits, tokens = np.zeros((3, count))
  for batch in batches:
    loss, hit = token_losses(made.model, params, batch)
    for i in range(count):
      mine = (batch["config_ids"] == i) & (batch["loss_weights"] > 0)
      losses[i] += loss[mine].sum()
      hits[i] += hit[mine].sum()
      tokens[i] += mine.sum()
  assert (tokens > 0).all()
  np.testing.assert_array_equal(scores.tokens, tokens)
  np.testing.assert_allclose(scores.losses, losses / tokens, rtol=1e-5)
  np.testing.assert_allclose(scores.accuracies, hits / tokens, rtol=1e-6)


def test_the_loss_of_a_batch_is_a_mean_over_targets(setup, params):
  config, made, corpus = setup
  with data_lib.train_loader(
    config, corpus, made.configurations, sharding=made.sharding
  ) as data:
    batch = next(data)
  with jax.set_mesh(made.mesh):
    loss_fn = train_lib.make_loss_fn(made.model, made.curriculum)
    loss, metrics = jax.jit(loss_fn)(params, batch, {})
  token, hit = token_losses(made.model, params, batch)
  weights = np.asarray(batch["loss_weights"]) > 0
  assert float(loss) == pytest.approx(token[weights].mean(), rel=1e-5)
  assert float(metrics["accuracy"].value()) == pytest.approx(
    hit[weights].mean()
  )
  assert float(metrics["loss"].count) == weights.sum()
  classes = np.append(made.curriculum.classes, -1)[
    np.asarray(batch["config_ids"])
  ]
  for i, name in enumerate(made.curriculum.class_names):
    mine = weights & (classes == i)
    assert float(metrics[f"loss_of/{name}"].count) == mine.sum()
    if mine.any():
      assert float(metrics[f"loss_of/{name}"].value()) == pytest.approx(
        token[mine].mean(), rel=1e-5
      )


def test_a_summary_weighs_by_tokens():
  scores = Scores(
    np.float32([1, 3]), np.float32([0.5, 1]), np.array([30.0, 10])
  )
  assert scores.summary(["a", "b"]) == {
    "eval/loss": 1.5,
    "eval/accuracy": 0.625,
    "eval_config/loss/a": 1.0,
    "eval_config/loss/b": 3.0,
    "eval_config/accuracy/a": 0.5,
    "eval_config/accuracy/b": 1.0,
  }


class Scripted(Evaluator):
  """An evaluator that falls by a tenth from one evaluation to the next."""

  def __init__(self, count):
    self.losses = np.linspace(2, 4, count).astype(np.float32)

  def __call__(self, params):
    scores = Scores(
      self.losses.copy(), self.losses * 0, np.ones(len(self.losses))
    )
    self.losses *= np.float32(0.9)
    return scores


@pytest.fixture
def curriculum_run(setup, tmp_path):
  """Two evaluations, four batches apart, and what they left behind."""
  config, made, corpus = setup
  evaluator = Scripted(len(made.configurations))
  hook = CurriculumHook(
    train_lib.controller_config(config),
    num_steps=8,
    seed=0,
    steps=(4, 8),
    evaluator=evaluator,
    curriculum=made.curriculum,
    writer=MetricWriter(tmp_path),
  )
  state = made.create()
  with data_lib.train_loader(
    config, corpus, made.configurations, sharding=made.sharding
  ) as data:
    for step in range(1, 9):
      batch = next(data)
      if hook.every(step):
        info = StepInfo(step, state, {}, data, batch, step == 8)
        state = hook(info) or state
    yield made, hook, state, data, read_metrics(tmp_path)


def test_the_hook_rewards_by_itself(curriculum_run):
  """In the reference nobody calls the reward's update."""
  made, _, state, _, lines = curriculum_run
  kept = state.extra["controller"]
  assert int(kept.count) == 1
  assert int(kept.evaluations) == 2
  before = np.linspace(2, 4, len(made.configurations)).astype(np.float32)
  earned = controller.reward(before, before * np.float32(0.9))
  np.testing.assert_array_equal(kept.losses[0], before)
  np.testing.assert_allclose(kept.rewards[0], earned, rtol=1e-5)
  by_class = made.curriculum.by_class(np.asarray(earned), mean=True)
  for name, value in by_class.items():
    assert lines[1][f"reward/{name}"] == pytest.approx(value, rel=1e-5)
  assert not any(name.startswith("reward/") for name in lines[0])


def test_the_published_mixture_is_the_one_that_batches_follow(curriculum_run):
  made, _, state, data, lines = curriculum_run
  assert [m["controller/mixture_version"] for m in lines] == [1, 2]
  assert [m["controller/effective_from"] for m in lines] == [4, 8]
  kept = state.extra["controller"]
  np.testing.assert_array_equal(kept.action, data.mixture.at(8).probs)
  # The reward was earned by the mixture of the batches from 4 to 7.
  np.testing.assert_array_equal(kept.actions[0], data.mixture.at(7).probs)
  logged = [
    lines[1][f"mixture_config/{name}"] for name in made.curriculum.names
  ]
  np.testing.assert_array_equal(np.float32(logged), data.mixture.at(8).probs)
  assert (np.asarray(next(data)["mixture_version"]) == 2).all()


def test_a_checkpoint_is_ranked_by_its_own_evaluation(curriculum_run):
  _, hook, *_ = curriculum_run
  assert "eval/loss" in hook.measured_at(8)
  assert hook.measured_at(9) == {}


def test_the_controller_starts_from_the_mixture_in_force():
  config = make_config()
  config.mixture.preset = "ul2"
  made = train_lib.make_setup(config, ByteTokenizer())
  start = made.create().extra["controller"].action
  np.testing.assert_allclose(start, [0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.2])


def test_a_curriculum_numbers_classes_in_order(setup):
  made = setup[1].curriculum
  assert made.class_names[0] == "next_token_prediction"
  assert isinstance(made, Curriculum)
  assert sorted(set(made.classes)) == list(range(len(made.class_names)))
  values = np.arange(len(made.names), dtype=float)
  sums = made.by_class(values, mean=False)
  assert sum(sums.values()) == values.sum()


def test_processes_that_part_are_found_out(monkeypatch):
  """The hash is of what each has computed, before anything is broadcast."""
  probs = np.float32([0.25, 0.75])
  sent = []

  def gather(mine):
    """What all processes have sent, this one included."""
    sent.append(mine)
    return np.stack(sent)

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", np.asarray)
  for _ in range(2):
    np.testing.assert_array_equal(agree(probs, {"a": probs}, 5), probs)
  with pytest.raises(RuntimeError, match="controllers after step 5"):
    agree(probs, {"a": probs[::-1]}, 5)


@pytest.mark.parametrize(
  "key",
  [
    "num_steps", "accum", "data.batch_size", "data.pack_rows", "log.every",
    "evaluation.rows", "retrieval.books", "checkpoint.keep",
  ],
)  # fmt: skip
def test_counts_below_one_are_one_line(key):
  config = make_config()
  assert key in flatten(config)
  group, _, name = key.rpartition(".")
  (config[group] if group else config)[name] = 0
  with pytest.raises(UserError, match=f"^{key}=0 must be at least 1$"):
    train_lib.check_counts(config)


def test_a_weight_that_is_no_number_is_one_line():
  config = make_config()
  config.loss.z_loss = float("nan")
  with pytest.raises(UserError, match=r"loss\.z_loss=nan must be at least 0"):
    train_lib.check_counts(config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mesh.seq": 8, "mesh.data": 1, "mesh.fsdp": 1}, "needs model.seq_axis"),
    (
      {
        "mesh.seq": 8, "mesh.data": 1, "mesh.fsdp": 1,
        "model.seq_axis": "seq", "data.sequence_length": 100,
      },
      "data.sequence_length=100 is not divisible by the 8 devices",
    ),
    ({"data.batch_size": 12}, "data.batch_size=12 is not divisible by the 8"),
    ({"evaluation.batch_size": 4}, "evaluation.batch_size=4 is not divisible"),
    ({"accum": 2}, "not divisible by accum=2 times 8 devices"),
    ({"mesh.data": 3}, "does not fit the 8 devices"),
  ],
)  # fmt: skip
def test_what_does_not_divide_is_one_line_before_text_is_read(
  changes, message, tmp_path, monkeypatch
):
  def reads(*args, **kwargs):
    raise AssertionError("the text was read")

  monkeypatch.setattr(data_lib, "build_splits", reads)
  config = make_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message) as error:
    train_lib.train_and_evaluate(config, str(tmp_path))
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_documents_end_in_what_generation_stops_at(setup):
  """EOS is a label, and stands nowhere but at the end of a document."""
  config, made, corpus = setup
  eos = corpus.vocab.eos
  ends = corpus.train.offsets[1:] - 1
  np.testing.assert_array_equal(
    np.flatnonzero(corpus.train.tokens == eos), ends
  )
  # Documents short enough for their ends to be seen in a few batches.
  tokens = np.full(50 * 40, 100, np.uint16)
  tokens[39::40] = eos
  short = TokenStore(tokens, np.arange(0, len(tokens) + 1, 40))
  corpus = dataclasses.replace(corpus, train=short)
  maker = data_lib.make_batch_maker(config, corpus, made.configurations)
  probs = data_lib.first_mixture(made.configurations)
  batches = [maker(k, probs) for k in range(8)]
  assert any(
    ((b["targets"] == eos) & (b["loss_weights"] > 0)).any() for b in batches
  )


def test_the_last_scores_are_a_line_each():
  lines = [
    {"step": 4, "eval/loss": 2.0, "retrieval/chance": 0.1, "train/loss": 9.0},
    {"step": 6, "retrieval/chance": 0.1, "retrieval/digit_accuracy": 0.25},
    {"step": 8, "eval/loss": 1.5},
  ]
  assert last_scores(lines) == [
    "validation  loss 1.5 at step 8",
    "retrieval   chance 0.1, digit_accuracy 0.25 at step 6",
  ]
  assert last_scores([{"step": 2, "train/loss": 1.0}]) == []
