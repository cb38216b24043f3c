"""Training end to end: resuming, warm-up, averaging, what selection reads."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from common.checkpoint import load_params
from common.config import save_config
from common.errors import UserError
from common.metrics import read_metrics
from configs.udim import get_config
from udim.domains import ArrayExamples, load_domains
from udim.evaluate import evaluate_run, load_run
from udim.selection import select
from udim.train import make_setup, train_and_evaluate

ROOT = pathlib.Path(__file__).parents[2]
CLOCK = ("time", "speed/")  # what depends on the clock, not on the run


pytestmark = pytest.mark.usefixtures("compile_once")


def make_config(algorithm="udim", **settings):
  """Ten steps on clean digits, four of them a warm-up."""
  config = get_config("train,smoke")
  config.algorithm = algorithm
  config.num_steps = 10
  config.compile_cache = ""
  config.data.source.corruptions = ("blur", "shift")
  config.methods.udim.warm_up_percent = 40.0
  config.evaluation.every = 2
  config.checkpoint.update({"every": 1, "keep": 20})
  config.log.every = 3
  for key, value in settings.items():
    config[key] = value
  return config


def metrics(workdir):
  """Every line but what the clock wrote, by step."""
  lines = {}
  for line in read_metrics(workdir):
    kept = {k: v for k, v in line.items() if not k.startswith(CLOCK)}
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
  step_a, params_a = load_params(a / "checkpoints")
  step_b, params_b = load_params(b / "checkpoints")
  assert step_a == step_b
  chex.assert_trees_all_equal(params_a, params_b)
  chex.assert_trees_all_equal(read_state(a, step_a), read_state(b, step_b))
  assert metrics(a) == metrics(b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight")
  train_and_evaluate(make_config(), str(workdir))
  return workdir


class Stopped(BaseException):
  """Ends a run between two steps, past everything that handles errors."""


def stopped_at(step, config, workdir, monkeypatch):
  from udim import train as train_lib

  def stop(info):
    raise Stopped

  stop.every = {step}.__contains__
  real = train_lib.train

  def train(*args, hooks, **kwargs):
    return real(*args, hooks=[*hooks, stop], **kwargs)

  with monkeypatch.context() as patched:
    patched.setattr(train_lib, "train", train)
    with pytest.raises(Stopped):
      train_and_evaluate(config, str(workdir))


# Inside the warm-up, at its end, behind it.
@pytest.mark.parametrize("step", [1, 3, 4, 5, 8])
def test_resumed_across_the_warm_up(straight, tmp_path, step, monkeypatch):
  stopped_at(step, make_config(), tmp_path, monkeypatch)
  train_and_evaluate(make_config(), str(tmp_path))
  assert_same_run(straight, tmp_path)


def test_sharded_parameters_change_nothing(straight, tmp_path):
  config = make_config()
  config.mesh.update({"data": 2, "fsdp": 4})
  state = train_and_evaluate(config, str(tmp_path))
  kernel = state.extra["best"]["params"]["conv1"]["kernel"]
  assert kernel.sharding.spec == state.params["conv1"]["kernel"].sharding.spec
  assert "fsdp" in str(kernel.sharding.spec)
  _, params = load_params(straight / "checkpoints")
  # Adam divides by small numbers that are sums in another order.
  chex.assert_trees_all_close(
    jax.device_get(state.params), params, atol=2e-4, rtol=0
  )


def test_averages_forget_a_path_that_was_left(tmp_path):
  """The warm-up's evaluations are not in the valley."""
  state = train_and_evaluate(make_config("udim+swad"), str(tmp_path))
  # Of five evaluations two belong to the warm-up.
  assert int(state.extra["swad"].validations) == 3


@pytest.mark.parametrize("algorithm", ["erm+swad", "look_sam"])
def test_resumed_with_arrays_of_its_own(algorithm, tmp_path, monkeypatch):
  config = make_config(algorithm)
  train_and_evaluate(config, str(tmp_path / "a"))
  stopped_at(5, config, tmp_path / "b", monkeypatch)
  train_and_evaluate(config, str(tmp_path / "b"))
  assert_same_run(tmp_path / "a", tmp_path / "b")


def test_resumed_with_memory_of_its_own(tmp_path, monkeypatch):
  config = make_config("fishr")
  config.data.source.kind = "digits_rot"
  config.update({"sources": ("0", "15"), "targets": ("75",)})
  train_and_evaluate(config, str(tmp_path / "a"))
  stopped_at(5, config, tmp_path / "b", monkeypatch)
  train_and_evaluate(config, str(tmp_path / "b"))
  assert_same_run(tmp_path / "a", tmp_path / "b")


def test_the_main_phase_starts_from_the_best_of_the_warm_up(
  tmp_path, monkeypatch
):
  """The second of three evaluations is told to be the best."""
  from udim import validation

  told = iter([0.4, 0.6, 0.6, 0.9, 0.9, 0.9])
  real = validation.summary
  monkeypatch.setattr(
    validation, "summary", lambda s: real(s) | {"val/accuracy": next(told)}
  )
  config = make_config()
  config.num_steps = 12
  config.methods.udim.warm_up_percent = 50.0
  config.optim.update({"name": "sgd", "momentum": 0.9, "schedule": "linear"})
  train_and_evaluate(config, str(tmp_path))
  assert metrics(tmp_path)[6]["warm_up/accuracy"] == pytest.approx(0.6)
  _, params = load_params(tmp_path / "checkpoints", step=4)
  _, restored = load_params(tmp_path / "checkpoints", step=6)
  chex.assert_trees_all_equal(params, restored)
  then, now = (read_state(tmp_path, step)["opt_state"] for step in (4, 6))
  # The momentum is the best state's, the schedule's clock the run's.
  for a, b in zip(jax.tree.leaves(then), jax.tree.leaves(now)):
    if a.ndim:
      np.testing.assert_array_equal(a, b)
    else:
      assert (int(a), int(b)) == (4, 6)


def test_without_it_the_main_phase_goes_on(tmp_path):
  config = make_config()
  config.methods.udim.warm_up_best = False
  state = train_and_evaluate(config, str(tmp_path))
  assert "best" not in state.extra
  assert "warm_up/accuracy" not in metrics(tmp_path)[4]


def randomised(domain_set, seed):
  """The targets with labels that mean nothing."""
  rng = np.random.default_rng(seed)

  def change(domain):
    if domain.name in domain_set.sources:
      return domain
    if domain.name in domain_set.validations:
      return domain
    labels = rng.permutation(domain.examples.labels)
    examples = ArrayExamples(domain.examples.images, labels)
    return dataclasses.replace(domain, examples=examples)

  return dataclasses.replace(
    domain_set, domains=tuple(map(change, domain_set.domains))
  )


@pytest.mark.parametrize("algorithm", ["udim", "erm+swad"])
def test_neither_training_nor_selection_reads_labels_of_targets(
  algorithm, tmp_path
):
  config = make_config(algorithm)
  true = load_domains(config.data.source)
  runs = []
  for name, domain_set in (("true", true), ("false", randomised(true, 0))):
    setup = make_setup(config, domain_set)
    state = train_and_evaluate(config, str(tmp_path / name), setup=setup)
    runs.append((state.params, select(read_metrics(tmp_path / name))))
  (params, chosen), (other_params, other) = runs
  chex.assert_trees_all_equal(params, other_params)
  for method in ("source", "last"):
    assert chosen[method].step == other[method].step
    assert chosen[method].source == other[method].source
    assert chosen[method].tuning == other[method].tuning
    assert chosen[method].target != other[method].target


def test_swad_ends_with_the_average(tmp_path):
  config = make_config("erm+swad")
  state = train_and_evaluate(config, str(tmp_path))
  swad = state.extra["swad"]
  assert int(swad.validations) == 5
  lines = metrics(tmp_path)
  with_targets = [s for s in lines if "target/accuracy" in lines[s]]
  assert with_targets == [10]
  # The same steps without averaging end elsewhere.
  plain = train_and_evaluate(make_config("erm"), str(tmp_path / "plain"))
  gap = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), state.params, plain.params
  )
  assert max(jax.tree.leaves(gap)) > 1e-3
  found = load_run(tmp_path, step="last")
  scores = evaluate_run(found)
  assert scores["target_main/blur_3"].accuracy == pytest.approx(
    lines[10]["target_main/accuracy/blur_3"]
  )


def test_a_trained_run_is_read_and_scored(straight, tmp_path):
  run = load_run(straight)
  lines = metrics(straight)
  best = max(
    (s for s in lines if "val/accuracy" in lines[s]),
    key=lambda s: (lines[s]["val/accuracy"], -s),
  )
  assert run.step == best
  scores = evaluate_run(run)
  for name, score in scores.items():
    role, domain = name.split("/")
    assert score.accuracy == lines[best][f"{role}/accuracy/{domain}"]
  with pytest.raises(UserError, match=r"no checkpoint 77"):
    load_run(straight, step="77")
  with pytest.raises(UserError, match=r"no run in"):
    load_run(tmp_path)


def test_averaged_weights_are_evaluated_as_such(tmp_path):
  config = make_config("erm+swad")
  train_and_evaluate(config, str(tmp_path))
  assert load_run(tmp_path).step == 10  # whatever was better before


def test_a_comparison_is_no_training(tmp_path):
  from common.config import save_config

  save_config(tmp_path, make_config())
  (tmp_path / "runs").mkdir()
  with pytest.raises(UserError, match="holds a comparison, not a training"):
    load_run(tmp_path)


def test_frozen_statistics_want_weights(tmp_path):
  config = make_config()
  config.model.name = "wrn28_1"
  with pytest.raises(UserError, match=r"would not normalise at all: set"):
    train_and_evaluate(config, str(tmp_path / "run"))


def test_images_of_ones_own(straight, tmp_path):
  from PIL import Image

  run = load_run(straight)
  rng = np.random.default_rng(0)
  for name in run.classes:
    path = tmp_path / "set" / "mine" / name / "x.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).save(path)
  run.config.data.image_size = 8
  with pytest.raises(UserError, match=r"\[8, 8, 3\].*trained on .*8, 8, 1"):
    evaluate_run(run, folder=str(tmp_path / "set"))
  (tmp_path / "set/mine/0").rename(tmp_path / "set/mine/zero")
  with pytest.raises(UserError, match=r"the classes are .*zero"):
    evaluate_run(run, folder=str(tmp_path / "set"))


def test_domains_called_like_sources_are_no_targets(straight, tmp_path):
  from PIL import Image

  run = load_run(straight)
  assert run.sources == ("clean",)
  run.config.data.image_size = 8
  run = run._replace(image_shape=[8, 8, 3], apply_fn=lambda *_, **__: (
    None, np.zeros((len(run.classes), len(run.classes))), {}
  ))  # fmt: skip
  for domain in ("clean", "other"):
    for name in run.classes:
      path = tmp_path / domain / name / "x.png"
      path.parent.mkdir(parents=True)
      Image.new("RGB", (8, 8)).save(path)
  scores = evaluate_run(run, folder=str(tmp_path))
  assert sorted(scores) == ["source_main/clean", "target_main/other"]


def test_a_run_of_another_kind_is_one_line(tmp_path):
  save_config(tmp_path, ConfigDict({"mode": "train"}))
  with pytest.raises(UserError, match=r"a run of another kind"):
    load_run(tmp_path)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("algorithm", "coral", "compares source domains, and there is one"),
    ("protocol", "leave", "protocol='leave'"),
    ("run", "clena", "run='clena'; did you mean 'clean'"),
    ("num_steps", 0, "num_steps=0 must be at least 1"),
    ("label_smoothing", 1.0, r"label_smoothing=1.0 must be in \[0, 1\)"),
    ("accum", 3, "data.images_per_domain=16 is not divisible by accum=3"),
    ("sources", ("blur_3",), "is for testing"),
  ],
)
def test_mistakes_are_one_line_and_take_no_folder(
  key, value, message, tmp_path
):
  workdir = tmp_path / "run"
  with pytest.raises(UserError, match=message):
    train_and_evaluate(make_config(**{key: value}), str(workdir))
  assert not workdir.exists()


def test_another_configuration_is_refused(straight):
  config = make_config()
  config.optim.lr = 1.0
  with pytest.raises(UserError, match=r"optim.lr: 0.002 -> 1.0"):
    train_and_evaluate(config, str(straight))


def test_as_a_process(tmp_path):
  command = [
    sys.executable, "-m", "udim.main",
    "--config=configs/udim.py:train,smoke", "--config.num_steps=4",
    f"--workdir={tmp_path}", "--config.evaluation.every=2",
    "--config.data.source.corruptions=('blur',)",
  ]  # fmt: skip
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  report = (tmp_path / "report.md").read_text()
  assert "target_main/accuracy/blur_3" in report
  assert len(list((tmp_path / "plots").glob("*.png"))) >= 5
  verb = [sys.executable, "-m", "udim.evaluate", f"--run={tmp_path}", "--json"]
  done = subprocess.run(verb, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)["parts"]["target_main/blur_3"]["count"] == 480
