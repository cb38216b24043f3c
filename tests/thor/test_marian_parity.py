"""Equality with transformers' MarianMTModel on random weights (parity extra).

Every tensor is drawn anew: offsets, norms and the logits' offset too.
"""

import functools

import jax
import numpy as np
import pytest

from common.errors import UserError
from thor.convert import from_marian, main, to_marian
from thor.model import Transformer
from thor.weights import load_model, read_marian, write_marian

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# float32, logits of order 1 to 10.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}
VOCAB, EOS, PAD = 53, 0, 52
# activation, layers, scale_embedding, heads
MODELS = [
  ("relu", (1, 1), False, 1),
  ("swish", (2, 3), True, 4),
  ("gelu", (2, 3), False, 2),
  ("relu", (3, 1), True, 2),
]


def marian(activation, layers, scaled, heads):
  config = transformers.MarianConfig(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=layers[0],
    decoder_layers=layers[1],
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    encoder_attention_heads=heads,
    decoder_attention_heads=heads,
    activation_function=activation,
    scale_embedding=scaled,
    max_position_embeddings=64,
    pad_token_id=PAD,
    eos_token_id=EOS,
    decoder_start_token_id=PAD,
    forced_eos_token_id=EOS,
  )
  model = transformers.MarianMTModel(config).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for name, value in model.state_dict().items():
      if "embed_positions" in name:
        continue
      if "layer_norm" in name and name.endswith("weight"):
        value.uniform_(0.5, 1.5)
      elif value.ndim == 1 or name == "final_logits_bias":
        value.normal_(0, 0.3)
      else:
        value.normal_(0, value.shape[-1] ** -0.5)
  return model


def tensors(model):
  return {k: v.numpy().copy() for k, v in model.state_dict().items()}


def batch():
  """Sources and targets [b s], [b t] with padding on the right, and where a
  target is none.
  """
  rng = np.random.default_rng(0)
  source = rng.integers(1, PAD, (3, 9)).astype(np.int32)
  target = rng.integers(1, PAD, (3, 7)).astype(np.int32)
  for row, (s, t) in enumerate([(9, 7), (5, 3), (2, 6)]):
    source[row, s - 1], target[row, t - 1] = EOS, EOS
    source[row, s:], target[row, t:] = PAD, PAD
  inputs = np.concatenate([np.full((3, 1), PAD, np.int32), target[:, :-1]], 1)
  return source, inputs, target != PAD


@functools.partial(jax.jit, static_argnums=0)
def our_logits(settings, params, source, inputs):
  return Transformer(settings).apply({"params": params}, source, inputs)[0]


def their_logits(model, source, inputs):
  with torch.no_grad():
    return model(
      input_ids=torch.tensor(source).long(),
      attention_mask=torch.tensor(source != PAD).long(),
      decoder_input_ids=torch.tensor(inputs).long(),
    ).logits.numpy()


def check_same(model, params, settings):
  source, inputs, real = batch()
  ours = np.asarray(our_logits(settings, params, source, inputs))
  theirs = their_logits(model, source, inputs)
  np.testing.assert_allclose(ours[real], theirs[real], **CLOSE)


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_logits_are_marians(options):
  model = marian(*options)
  params, settings = from_marian(tensors(model), model.config.to_dict())
  assert (settings.encoder_layers, settings.decoder_layers) == options[1]
  check_same(model, params, settings)


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_a_written_model_is_read_by_transformers(options, tmp_path):
  model = marian(*options)
  params, settings = from_marian(tensors(model), model.config.to_dict())
  write_marian(tmp_path, *to_marian(params, settings))
  again, report = transformers.MarianMTModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(report.values()), report
  before, after = tensors(model), tensors(again)
  assert before.keys() == after.keys()
  for name in before.keys() - {"model.encoder.embed_positions.weight"}:
    if "embed_positions" not in name:
      np.testing.assert_array_equal(before[name], after[name], err_msg=name)
  check_same(again.eval(), params, settings)
  assert again.generation_config.forced_eos_token_id == EOS


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_folders_go_through_the_command_and_back(file, tmp_path, monkeypatch):
  model = marian(*MODELS[1])
  theirs = tmp_path / "theirs"
  model.save_pretrained(theirs)
  if file == "pytorch_model.bin":
    (theirs / "model.safetensors").unlink()
    torch.save(model.state_dict(), theirs / file)
  for arguments in (
    ["--from_marian", theirs, "--output", tmp_path / "ours"],
    ["--to_marian", tmp_path / "ours", "--output", tmp_path / "back"],
  ):
    monkeypatch.setattr("sys.argv", ["", *map(str, arguments)])
    main()
  check_same(model, *load_model(tmp_path / "ours"))
  state, _ = read_marian(tmp_path / "back")
  before = tensors(model)
  for name, value in state.items():
    np.testing.assert_array_equal(before[name], value, err_msg=name)


def test_a_model_with_two_embeddings_is_refused():
  config = marian(*MODELS[0]).config
  config.share_encoder_decoder_embeddings = False
  state = transformers.MarianMTModel(config).state_dict()
  with pytest.raises(UserError, match="share_encoder_decoder_embeddings=False"):
    from_marian({k: v.numpy() for k, v in state.items()}, config.to_dict())


def test_a_file_of_something_else_is_refused(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  torch.save({"f": np.random.default_rng}, tmp_path / "pytorch_model.bin")
  with pytest.raises(UserError, match="state_dict alone"):
    read_marian(tmp_path)
  torch.save([torch.ones(1)], tmp_path / "pytorch_model.bin")
  with pytest.raises(UserError, match="state_dict alone"):
    read_marian(tmp_path)
  (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
  with pytest.raises(UserError, match=r"\.safetensors is no safetensors file"):
    read_marian(tmp_path)
