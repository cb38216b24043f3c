"""Marian's form and ours: names, shapes, refusals, files, the command."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import app
from common.errors import UserError
from configs.thor import get_config
from thor import convert, run
from thor.convert import from_marian, main, to_marian
from thor.model import init_params
from thor.paths import export_dense, layers_of
from thor.settings import Settings
from thor.weights import load_model, read_marian, save_model, write_marian

SETTINGS = Settings(
  11, width=8, hidden=12, heads=2, encoder_layers=2, decoder_layers=3,
  pattern=(False,), activation="swish", positions="marian", logits_bias=True,
  dropout=0.25, attention_dropout=0.125, pad_id=10, eos_id=0, start_id=10,
)  # fmt: skip
EXPERTS = dataclasses.replace(SETTINGS, pattern=(True, False), experts=2)


def drawn(settings):
  """Every parameter drawn anew, NumPy."""
  init = jax.eval_shape(
    lambda key: init_params(settings, key), jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), init
  )


def assert_same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("change", [
  {},
  {"activation": "relu", "scale_embedding": False},
  {"activation": "gelu", "logits_bias": False, "activation_dropout": 0.5},
  {"encoder_layers": 1, "heads": 4, "hidden": 8, "start_id": 3},
])  # fmt: skip
def test_there_and_back_is_the_same(change):
  settings = dataclasses.replace(SETTINGS, **change)
  params = drawn(settings)
  state, config = to_marian(params, settings)
  config = json.loads(json.dumps(config))
  back, found = from_marian(state, config)
  assert found == settings
  assert_same(back, params)
  again, same = to_marian(back, found)
  assert json.loads(json.dumps(same)) == config
  assert again.keys() == state.keys()
  for name, value in state.items():
    assert value.dtype == np.float32
    assert value.flags.c_contiguous, name  # files hold no strides
    np.testing.assert_array_equal(again[name], value)


def test_names_and_directions_are_marians():
  params = drawn(SETTINGS)
  state, config = to_marian(params, SETTINGS)
  encoder, decoder = (layers_of(params, s) for s in ("encoder", "decoder"))
  assert len(state) == 2 + 2 * 16 + 3 * 26
  np.testing.assert_array_equal(
    state["model.shared.weight"], params["embedding"]
  )
  assert state["final_logits_bias"].shape == (1, 11)
  # Theirs is [out, in], the heads one after the other.
  query = encoder[1]["attention"]["query"]
  weight = state["model.encoder.layers.1.self_attn.q_proj.weight"]
  bias = state["model.encoder.layers.1.self_attn.q_proj.bias"]
  for head, place in ((0, 1), (1, 3)):
    row = 4 * head + place
    np.testing.assert_array_equal(weight[row], query["kernel"][:, head, place])
    assert bias[row] == query["bias"][head, place]
  out = decoder[2]["cross_attention"]["out"]["kernel"]
  weight = state["model.decoder.layers.2.encoder_attn.out_proj.weight"]
  np.testing.assert_array_equal(weight[:, 4 * 1 + 3], out[1, 3])
  for theirs, ours in {
    "self_attn_layer_norm": "attention_norm",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "final_layer_norm": "feed_forward_norm",
  }.items():
    name = f"model.decoder.layers.0.{theirs}"
    np.testing.assert_array_equal(
      state[f"{name}.weight"], decoder[0][ours]["scale"]
    )
  np.testing.assert_array_equal(
    state["model.encoder.layers.0.fc2.weight"],
    encoder[0]["feed_forward"]["down"]["kernel"].T,
  )
  assert (config["d_model"], config["decoder_ffn_dim"]) == (8, 12)
  assert config["forced_eos_token_id"] == 0


def test_half_precision_is_widened():
  state, config = to_marian(drawn(SETTINGS), SETTINGS)
  half = {name: value.astype(np.float16) for name, value in state.items()}
  params, _ = from_marian(half, config)
  wide = {name: value.astype(np.float32) for name, value in half.items()}
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    np.dtype("float32")
  }
  assert_same(params, from_marian(wide, config)[0])


def test_tied_tensors_may_come_under_any_of_their_names():
  state, config = to_marian(drawn(SETTINGS), SETTINGS)
  expected, _ = from_marian(state, config)
  table = state.pop("model.shared.weight")
  for name in ("lm_head.weight", "model.decoder.embed_tokens.weight"):
    state[name] = table
    assert_same(from_marian(state, config)[0], expected)
  state["lm_head.weight"] = table + 1
  with pytest.raises(UserError, match=r"'lm_head.weight' differs from 'model"):
    from_marian(state, config)


def test_positions_may_be_there_and_must_be_marians():
  state, config = to_marian(drawn(SETTINGS), SETTINGS)
  angles = np.arange(20)[:, None] / 10_000 ** (np.arange(4) / 4)
  table = np.concatenate([np.sin(angles), np.cos(angles)], 1)
  name = "model.encoder.embed_positions.weight"
  from_marian({**state, name: table.astype(np.float16)}, config)
  with pytest.raises(UserError, match="not Marian's table of sinusoids"):
    from_marian({**state, name: table[1:]}, config)
  with pytest.raises(
    UserError,
    match=r"shape \(20, 4\), but the model takes \(20, 8\); .*config.json",
  ):
    from_marian({**state, name: table[:, :4]}, config)


@pytest.mark.parametrize(("key", "value", "says"), [
  ("model_type", "bart", "other types"),
  ("share_encoder_decoder_embeddings", False, "share one vocabulary"),
  ("tie_word_embeddings", False, "logits come from the embedding"),
  ("normalize_before", True, "norms follow the sub-layers"),
  ("normalize_embedding", True, "no norm follows the embedding"),
  ("add_final_layer_norm", True, "no norm follows the last layer"),
  ("static_position_embeddings", False, "sinusoids"),
  ("decoder_attention_heads", 4, "encoder_attention_heads=2"),
  ("decoder_ffn_dim", 16, "encoder_ffn_dim=12"),
  ("decoder_vocab_size", 12, "vocab_size=11"),
  ("activation_function", "gelu_new", "did you mean 'gelu'"),
  ("activation_function", None, "known: relu, swish"),
  ("eos_token_id", [0, 1], "not one integer"),
  ("pad_token_id", None, "not one integer"),
  ("decoder_start_token_id", 11, "no id of a vocabulary of 11"),
])  # fmt: skip
def test_what_has_no_counterpart_is_refused_by_name(key, value, says):
  state, config = to_marian(drawn(SETTINGS), SETTINGS)
  with pytest.raises(UserError, match=says) as error:
    from_marian(state, {**config, key: value}, source="opus")
  assert f"{key}={value!r}" in str(error.value)
  assert str(error.value).startswith("opus: ")
  assert "\n" not in str(error.value)


def test_a_key_that_is_missing_is_named():
  state, config = to_marian(drawn(SETTINGS), SETTINGS)
  del config["d_model"]
  with pytest.raises(UserError, match=r"config\.json lacks 'd_model'"):
    from_marian(state, config)


def test_old_and_new_configurations_lack_some_keys():
  state, config = to_marian(drawn(SETTINGS), SETTINGS)
  _, expected = from_marian(state, config)
  for key in (
    "tie_word_embeddings", "static_position_embeddings", "normalize_before",
    "normalize_embedding", "add_final_layer_norm", "decoder_vocab_size",
    "share_encoder_decoder_embeddings", "activation_dropout",
  ):  # fmt: skip
    del config[key]
  config |= {"bos_token_id": 3, "num_beams": 4, "activation_function": "silu"}
  assert from_marian(state, config)[1] == expected


def test_tensors_that_do_not_fit_are_named():
  state, config = to_marian(drawn(SETTINGS), SETTINGS)
  name = "model.decoder.layers.1.fc1.weight"
  less = {k: v for k, v in state.items() if k != name}
  with pytest.raises(UserError, match=f"lacks '{name}'; take"):
    from_marian(less, config)
  more = {**state, "model.encoder.layers.2.fc1.bias": np.zeros(12)}
  with pytest.raises(UserError, match=r"no place for: 'model.encoder.layers.2"):
    from_marian(more, config)
  turned = {**state, name: state[name].T}
  with pytest.raises(
    UserError, match=r"\(8, 12\), but the model takes \(12, 8\); .*config.json"
  ):
    from_marian(turned, config)
  with pytest.raises(UserError, match="and 13 more"):
    from_marian(state, {**config, "encoder_layers": 3})
  with pytest.raises(UserError, match=r"lacks 'model\.shared\.weight'"):
    from_marian({k: v for k, v in state.items() if "shared" not in k}, config)


@pytest.mark.parametrize(("change", "says"), [
  ({"pattern": (True,)}, "5 layers have experts.*export_dense.*--path"),
  ({"experts": 2, "pattern": (True, False)}, "3 layers have experts"),
  ({"pre_norm": True}, "train with model.pre_norm=False"),
  ({"positions": "fairseq"}, "train with model.positions='marian'"),
])  # fmt: skip
def test_what_marian_cannot_hold_is_refused(change, says):
  settings = dataclasses.replace(SETTINGS, **change)
  with pytest.raises(UserError, match=says):
    to_marian(drawn(settings), settings)


@pytest.mark.parametrize("change", [
  {}, {"dtype": jnp.bfloat16, "pre_norm": True, "positions": "fairseq"},
  {"pattern": (True, False), "experts": 2, "gated": True, "capacity": 1.5},
])  # fmt: skip
def test_a_model_is_read_as_it_was_written(change, tmp_path):
  settings = dataclasses.replace(SETTINGS, **change)
  params = drawn(settings)
  save_model(tmp_path / "new" / "model", params, settings)
  found, same = load_model(tmp_path / "new" / "model")
  assert same == settings
  assert_same(found, params)
  # Plain names, for readers without this package.
  params = tmp_path / "new" / "model" / "params.npz"
  with np.load(params, allow_pickle=False) as arrays:
    assert "encoder/layers/layer_0/attention/query/kernel" in arrays


def test_broken_models_are_named(tmp_path):
  with pytest.raises(UserError, match=r"settings\.json: No such file"):
    load_model(tmp_path)
  save_model(tmp_path, drawn(SETTINGS), SETTINGS)
  file = tmp_path / "settings.json"
  facts = json.loads(file.read_text())
  for change, says in [
    ({"widht": 8}, "widht.*did you mean 'width'"),
    ({"dtype": "float23"}, "did you mean 'float32'"),
    ({"activation": "rleu"}, "did you mean 'relu'"),
    (
      {"hidden": 13},
      r"shape .*, but the model takes .*tensors and settings.json from one",
    ),
    ({"decoder_layers": 4}, "has shape"),
    ({"logits_bias": False}, "no place for: 'logits_bias'"),
  ]:
    file.write_text(json.dumps(facts | change))
    with pytest.raises(UserError, match=says):
      load_model(tmp_path)
  file.write_text(json.dumps({k: v for k, v in facts.items() if k != "heads"}))
  with pytest.raises(UserError, match=r"settings\.json lacks 'heads'"):
    load_model(tmp_path)
  for text, says in (("{", "is not JSON"), ("[]", "no object")):
    file.write_text(text)
    with pytest.raises(UserError, match=says):
      load_model(tmp_path)
  file.write_text(json.dumps(facts))
  for content in (b"", b"nothing of the kind"):
    (tmp_path / "params.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"params\.npz is not readable"):
      load_model(tmp_path)


def test_folders_of_transformers_are_written_and_read(tmp_path):
  pytest.importorskip("safetensors")
  state, config = to_marian(drawn(SETTINGS), SETTINGS)
  write_marian(tmp_path / "a", state, config)
  found, same = read_marian(tmp_path / "a")
  assert same == config
  assert found.keys() == state.keys()
  for name, value in state.items():
    np.testing.assert_array_equal(found[name], value)
  (tmp_path / "a" / "model.safetensors").unlink()
  with pytest.raises(UserError, match=r"neither model\.safetensors nor pytor"):
    read_marian(tmp_path / "a")


@pytest.fixture
def command(monkeypatch, capsys):
  """`(arguments)`: the exit status and what the command printed."""

  def call(*arguments):
    monkeypatch.setattr("sys.argv", ["", *map(str, arguments)])
    status = app.call(main)
    return status, "".join(capsys.readouterr())

  return call


run_of = run.load_run  # before `a_run` takes its place


@pytest.fixture
def a_run(monkeypatch, cab_vocabulary):
  """What `load_run` was asked for."""
  asked = []

  def load_run(folder, **options):
    asked.append((folder, options))
    return types.SimpleNamespace(
      params=drawn(EXPERTS), settings=EXPERTS, config=get_config("smoke"),
      vocabulary=cab_vocabulary, facts=cab_vocabulary.facts(), step=7,
    )  # fmt: skip

  monkeypatch.setattr(run, "load_run", load_run)
  return asked


def test_the_command_writes_one_path_of_a_run(command, a_run, tmp_path):
  pytest.importorskip("safetensors")
  model = tmp_path / "model"
  status, text = command("--run", "runs/a", "--path=1,0,1", "--output", model)
  assert (status, a_run) == (0, [("runs/a", {"step": None, "average": 1})])
  params, settings = load_model(model)
  expected, plain = export_dense(drawn(EXPERTS), EXPERTS, [1, 0, 1])
  assert settings == plain
  assert_same(params, expected)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert text == f"{model}: 2+3 layers, {count:,} parameters\n"
  # It is a run as well, that translates without experts.
  found = run_of(model)
  assert (found.step, found.routing.kind) == (7, "dense")
  assert found.settings == plain
  assert found.vocabulary.fingerprint == found.facts["vocabulary"]
  assert_same(found.params, expected)
  with pytest.raises(UserError, match="of step 7, and no checkpoints"):
    run_of(model, average=2)
  # And that goes on to Marian's form, and back.
  assert command("--to_marian", model, "--output", tmp_path / "b")[0] == 0
  assert (
    command("--from_marian", tmp_path / "b", "--output", tmp_path / "c")[0] == 0
  )
  again, _ = load_model(tmp_path / "c")
  assert_same(again, expected)


def test_the_command_asks_for_a_checkpoint(command, a_run, tmp_path):
  options = ["--step=7", "--average=3", "--path=0,0,0"]
  command("--run=a", *options, f"--output={tmp_path / 'a'}")
  assert a_run == [("a", {"step": 7, "average": 3})]


@pytest.mark.parametrize(("arguments", "says"), [
  (["--output=new"], "--from_marian --to_marian --run is required"),
  (["--run=a", "--to_marian=b", "--output=new"], "not allowed with"),
  (["--run=a"], "--output"),
  (["--to_marian=a", "--path=0", "--output=new"], "--path goes with --run"),
  (["--from_marian=a", "--step=1", "--output=new"], "--step goes with --run"),
  (["--run=a", "--path=0,x", "--output=new"], "as in --path=0,1,0"),
  (["--run=a", "--output=new"], "a path of 0 experts, but 3 layers have some"),
  (["--run=a", "--path=0,2,0", "--output=new"], "numbered from 0 to 1"),
  (["--run=a", "--path=0,1,0", "--output=full"], "--output=full is there"),
  (["--from_marian=none", "--output=new"], "none/config.json: No such file"),
  (["--to_marian=none", "--output=new"], "none/settings.json: No such file"),
])  # fmt: skip
def test_mistakes_are_answered_in_one_line(
  arguments, says, command, a_run, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").touch()
  status, text = command(*arguments)
  assert status == 2
  assert text.startswith("error: ")
  assert says in text
  assert text.count("\n") == 1
  assert not (tmp_path / "new").exists()


def test_help_shows_a_command(command, capsys):
  with pytest.raises(SystemExit):
    command("--help")
  assert convert.EXAMPLE in capsys.readouterr().out
