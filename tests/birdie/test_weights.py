"""A model's folder: written from a run's, read like one, trained on from."""

import json
import pathlib
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie import initial, weights
from birdie import train as train_lib
from birdie.convert import main as convert_main
from birdie.run import load_run
from common import app, files
from common.checkpoint import Checkpointer
from common.config import save_config
from common.data.tokenizers import make_tokenizer
from common.metrics import MetricWriter
from common.weights import read_weights, write_safetensors
from configs.birdie import get_config

ROOT = pathlib.Path(__file__).parents[2]
FILES = {"model.safetensors", "config.json", "facts.json", "README.md"}


def tiny(**model):
  config = get_config("smoke")
  config.model.update({"width": 8, "state": 8} | model)
  config.controller.enabled = False
  config.data.cache_dir = ""
  config.data.source.kind = "text"
  return config


def setup_of(config):
  tokenizer = make_tokenizer(config.tokenizer)
  return train_lib.make_setup(config, tokenizer), tokenizer


def write_run(folder, config):
  """What a run leaves behind, without training."""
  setup, _ = setup_of(config)
  state = setup.create()
  save_config(folder, config)
  for step in (3, 7):
    scaled = jax.tree.map(lambda p, step=step: p * step, state.params)
    with_step = state.replace(step=jnp.int32(step), params=scaled)
    checkpointer = Checkpointer(folder / "checkpoints", keep=2)
    checkpointer.save(step, with_step, None)
    checkpointer.close()
  writer = MetricWriter(folder)
  writer.write(3, {"eval/loss": 2.5, "train/loss": 9.0, "mixture/a.b": 0.75})
  writer.write(7, {"eval/loss": 1.25, "mixture/a.b": 0.5})  # of no step
  writer.write(8, {"eval/loss": 0.0})
  files.write_json(folder / "facts.json", {"text_hash": "1f", "command": "x"})
  return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp("run"), tiny())


def convert(*arguments):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", ["birdie.convert", *map(str, arguments)])
    return app.call(convert_main)


@pytest.fixture(scope="module")
def model(run, tmp_path_factory):
  folder = tmp_path_factory.mktemp("converted") / "model"
  assert convert("--run", run, "--output", folder) == 0
  return folder


# -- there and back ------------------------------------------------------------


def test_a_models_folder_is_read_like_the_runs(run, model):
  ours, theirs = load_run(model), load_run(run)
  assert (ours.step, ours.model, ours.vocab) == (7, theirs.model, theirs.vocab)
  assert ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint
  chex.assert_trees_all_equal(ours.params, theirs.params)
  for key, value in theirs.config.items():
    assert ours.config[key] == value, key


def test_tensors_are_called_by_their_paths(model):
  tensors = read_weights(str(model / "model.safetensors"))
  assert "layers/causal/input/kernel" in tensors
  assert tensors["embed/embedding"].shape == (512, 8)
  assert {t.dtype for t in tensors.values()} == {np.dtype("float32")}


def test_a_checkpoint_may_be_chosen(run, tmp_path):
  assert convert("--run", run, "--step=3", "--output", tmp_path / "m") == 0
  chex.assert_trees_all_close(
    jax.tree.map(lambda p: p / 3, load_run(tmp_path / "m").params),
    jax.tree.map(lambda p: p / 7, load_run(run).params),
    rtol=1e-6,
  )


def test_bytes_are_always_the_same(run, model, tmp_path):
  """Also those of a model's folder made from another one."""
  for source in (run, model):
    made = tmp_path / source.name
    assert convert("--run", source, "--output", made) == 0
    assert {file.name for file in made.iterdir()} == FILES
    for name in FILES:
      assert (made / name).read_bytes() == (model / name).read_bytes(), name


def test_bfloat16(run, tmp_path):
  made = tmp_path / "m"
  arguments = ("--run", run, "--output", made, "--dtype=bfloat16")
  assert convert(*arguments) == 0
  found = load_run(made)
  assert found.config.model.param_dtype == "bfloat16"
  expected = jax.tree.map(
    lambda p: p.astype(jnp.bfloat16), load_run(run).params
  )
  chex.assert_trees_all_equal(found.params, expected)
  chex.assert_trees_all_equal_dtypes(found.params, expected)


def test_nothing_is_left_of_what_could_not_be_finished(
  run, tmp_path, monkeypatch
):
  def fails(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(weights, "card_of", fails)
  assert convert("--run", run, "--output", tmp_path / "m") == 2
  assert not list(tmp_path.iterdir())


# -- what it says --------------------------------------------------------------


def test_the_page_says_what_it_is(model):
  text = (model / "README.md").read_text()
  parameters = sum(p.size for p in jax.tree.leaves(load_run(model).params))
  assert f"# A Gated SSM of {parameters:,} parameters" in text
  assert "| state | 8 |" in text
  assert "kv_heads" not in text  # another model's
  assert "7 of 12 steps" in text
  # The last values up to the step, and none of a future that was dropped.
  assert "| eval/loss | 1.25 |" in text
  assert "| a.b | 75.0% |" in text
  assert "train/loss" not in text
  assert "## Licence" in text


def test_the_pages_command_works(model):
  text = (model / "README.md").read_text()
  (command,) = [
    line for line in text.splitlines() if line.startswith("python -m")
  ]
  assert command.startswith("python -m birdie.generate --run . --prompt")
  done = subprocess.run(
    command.replace("python", sys.executable, 1) + " --max_tokens 2",
    shell=True,
    cwd=model,
    env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""},
    capture_output=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(b"Once upon a time")


def test_the_machine_is_not_told(model):
  assert files.read_json(model / "facts.json") == {"text_hash": "1f"}


def test_the_tokenizer_comes_along(tmp_path):
  config = tiny()
  file = tmp_path / "words.json"
  words = {"[UNK]": 0, "a": 1, "b": 2}
  model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
  split = {"type": "Whitespace"}
  file.write_text(json.dumps({"model": model, "pre_tokenizer": split}))
  config.tokenizer.update({"kind": "huggingface", "path": str(file)})
  (tmp_path / "run").mkdir()
  run = write_run(tmp_path / "run", config)
  assert convert("--run", run, "--output", tmp_path / "m") == 0
  file.unlink()
  moved = shutil.move(tmp_path / "m", tmp_path / "moved")
  found = load_run(moved)
  assert found.tokenizer.encode("b a").tolist() == [2, 1]
  assert found.vocab.gen == 4  # behind the tokenizer's own ids
  kept = moved / "tokenizer.json"
  kept.write_text(kept.read_text().replace('"b"', '"c"'))
  with pytest.raises(ValueError, match="not what the model was trained with"):
    load_run(moved)


# -- what does not go together -------------------------------------------------


def changed(model, folder, *, settings=None, tensors=None):
  """A copy of a model's folder with other settings or tensors."""
  shutil.copytree(model, folder)
  if settings:
    content = json.loads((folder / "config.json").read_text())
    content["model"] |= settings
    (folder / "config.json").write_text(json.dumps(content))
  if tensors:
    path = folder / "model.safetensors"
    found = read_weights(str(path))
    tensors(found)
    write_safetensors(path, found)
  return folder


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      {"state": 16},
      "'layers/bidirectional/drive/kernel' has shape (1, 8, 2, 4), and the "
      "model takes (1, 8, 2, 8)",
    ),
    (
      {"name": "hawk"},
      "'layers/bidirectional/conv/bias' is missing, and the model takes "
      "(1, 2, 4)",
    ),
    (
      {"bidirectional": "none"},
      "'layers/bidirectional/drive/kernel' has shape (1, 8, 2, 4), and the "
      "model has no such parameter",
    ),
  ],
  ids=str,
)
def test_parameters_of_another_model(
  run, model, tmp_path, one_line, settings, message
):
  """In a model's folder as in a run's."""
  folder = changed(model, tmp_path / "m", settings=settings)
  found = one_line(load_run, folder)
  assert message in found
  assert str(folder / "model.safetensors") in found
  shutil.copytree(run, tmp_path / "run")
  save_config(tmp_path / "run", tiny(**settings))
  found = one_line(load_run, tmp_path / "run")
  assert message in found
  assert f"checkpoint 7 in {tmp_path / 'run'}" in found


@pytest.mark.parametrize("path", ["/etc/hostname", "../m", "a/tokenizer.json"])
def test_a_tokenizer_that_is_not_in_the_folder(model, tmp_path, one_line, path):
  folder = shutil.copytree(model, tmp_path / "m")
  content = files.read_json(folder / "config.json")
  content["tokenizer"]["path"] = path
  files.write_json(folder / "config.json", content)
  assert one_line(load_run, folder) == (
    f"{folder}/config.json: tokenizer.path={path!r} is no file of this folder: "
    "name one that lies in it"
  )


def test_a_missing_tensor(model, tmp_path, one_line):
  folder = changed(model, tmp_path / "m", tensors=lambda t: t.pop("norm/scale"))
  message = "'norm/scale' is missing, and the model takes (8,)"
  assert message in one_line(load_run, folder)


def test_a_folder_that_is_broken(model, tmp_path, one_line):
  folder = shutil.copytree(model, tmp_path / "m")
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-4])
  assert "is no safetensors file" in one_line(load_run, folder)
  path.unlink()
  assert "no such file of weights" in one_line(load_run, folder)


def test_a_step_that_is_not_there(model, one_line):
  assert load_run(model, step=7).step == 7
  assert "one model, of step 7" in one_line(load_run, model, step=3)


def test_folders_that_are_there_stay(run, model, capsys):
  assert convert("--run", run, "--output", model) == 2
  assert "is there already" in capsys.readouterr().err


# -- training from it ----------------------------------------------------------

MESH = {"data": 2, "fsdp": 2, "model": 2}


@pytest.mark.parametrize("kind", ["run", "model"])
def test_training_begins_from_parameters(request, kind, tmp_path):
  source = request.getfixturevalue(kind)
  config = tiny()
  config.init_from = str(source)
  config.mesh.update(MESH)
  setup, tokenizer = setup_of(config)
  create = initial.make_create(config, setup, tokenizer, str(tmp_path))
  state = create()
  assert int(state.step) == 0
  chex.assert_trees_all_equal(
    jax.device_get(state.params), jax.device_get(load_run(source).params)
  )
  chex.assert_trees_all_equal(
    jax.device_get(state.opt_state), jax.device_get(setup.create().opt_state)
  )
  for found, wanted in zip(
    jax.tree.leaves(state), jax.tree.leaves(setup.abstract)
  ):
    assert found.sharding == wanted.sharding


class Stopped(BaseException):
  """Carries the state that training would begin with."""


def test_a_run_begins_so_and_goes_on_by_itself(model, tmp_path, monkeypatch):
  def train(state, *_, **__):
    raise Stopped(state)

  monkeypatch.setattr(train_lib, "train", train)
  text = tmp_path / "text"
  documents = [f"{i} times {i} is {i * i}. " * 20 for i in range(60)]
  text.write_text("\n\n".join(documents))
  source = shutil.copytree(model, tmp_path / "model")
  config = tiny()
  config.init_from = str(source)
  config.mixture.preset = "ntp"
  config.data.sequence_length = 64
  config.data.source.update({"path": str(text), "separator": "\n\n"})
  workdir = str(tmp_path / "run")
  with pytest.raises(Stopped) as stopped:
    train_lib.train_and_evaluate(config, workdir)
  (state,) = stopped.value.args
  chex.assert_trees_all_equal(state.params, load_run(model).params)
  # With a checkpoint of its own it needs the other folder no more.
  checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
  later = state.replace(step=jnp.int32(1))
  shutil.rmtree(source)
  checkpointer.save(1, later, None)
  checkpointer.close()
  setup, tokenizer = setup_of(config)
  create = initial.make_create(config, setup, tokenizer, workdir)
  assert create == setup.create
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  with pytest.raises(ValueError, match="no run in"):
    initial.make_create(config, setup, tokenizer, workdir)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      {"width": 16},
      "model.width is 8 there and 16 here ('embed/embedding' has shape (512, "
      "8), and the model takes (512, 16))",
    ),
    ({"state": 16}, "model.state is 8 there and 16 here ('layers/"),
    (
      {"name": "hawk"},
      "model.name is 'gated_ssm' there and 'hawk' here",
    ),
    (
      {"bidirectional": "all", "layers": 1},
      "model.layers is 2 there and 1 here, model.bidirectional is 'alternate' "
      "there and 'all' here",
    ),
  ],
  ids=str,
)
def test_another_model_is_refused(model, tmp_path, one_line, settings, message):
  config = tiny(**settings)
  config.init_from = str(model)
  setup = setup_of(config)
  found = one_line(initial.make_create, config, *setup, str(tmp_path))
  assert found.startswith(f"init_from={str(model)!r}: ")
  assert message in found


def test_another_vocabulary_is_refused(model, tmp_path, one_line):
  config = tiny()
  config.init_from = str(model)
  setup, _ = setup_of(config)
  other = make_tokenizer(config.tokenizer)
  other.fingerprint = "sentencepiece/1f"
  found = one_line(initial.make_create, config, setup, other, str(tmp_path))
  assert "init_from=" in found
  assert "byte/64" in found
  assert "sentencepiece/1f" in found


def test_what_changes_the_model_but_no_shape_is_told(model, tmp_path, caplog):
  config = tiny(prefix_mode="paper", dtype="bfloat16")
  config.init_from = str(model)
  initial.make_create(config, *setup_of(config), str(tmp_path))
  assert "model.prefix_mode is 'strict' there and 'paper' here" in caplog.text
  assert "dtype" not in caplog.text
