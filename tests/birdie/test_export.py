"""Exported programs: run, they give what the model gives."""

import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from birdie import decode, export, load_exported, weights
from birdie import run as run_lib
from birdie.models import init_params, make_model
from birdie.vocab import byte_vocabulary
from common import app, files
from common.data.tokenizers import ByteTokenizer
from configs.birdie import get_config

pytest.importorskip("flatbuffers")

ROOT = pathlib.Path(__file__).parents[2]
VOCAB = byte_vocabulary()
LENGTH, NEW = 16, 4
MODELS = {
  "gated_ssm": {"scan_impl": "triton", "prefix_mode": "paper"},
  "hawk": {"dtype": "bfloat16", "param_dtype": "bfloat16"},
  "transformer": {"kv_heads": 1},
}
KERNELS = ("triton", "mosaic", "cudnn", "tpu_custom_call")


def make_run(name, **settings):
  config = get_config(f"smoke,{name}" if name != "gated_ssm" else "smoke")
  config.model.update({"width": 8, "state": 8} | settings)
  model = make_model(config.model, VOCAB.size)
  plain = weights.plain(model)
  params = jax.jit(lambda: init_params(plain, jax.random.key(0)))()
  return run_lib.Run(config, model, params, ByteTokenizer(), VOCAB, 5)


def call(run, folder, *flags):
  """The command on a run that was never written: its status."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib, "load_run", lambda folder, *, step: run)
    arguments = ["--run", str(folder), "--output", str(folder / "out")]
    sizes = [f"--length={LENGTH}", f"--new_tokens={NEW}"]
    patch.setattr(sys, "argv", ["export", *arguments, *sizes, *flags])
    return app.call(export.main)


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
  """A run and what was read of its programs."""
  folder = tmp_path_factory.mktemp(request.param)
  run = make_run(request.param, **MODELS[request.param])
  assert call(run, folder) == 0
  return run, folder / "out", load_exported(folder / "out")


def test_they_run_and_agree(exported):
  """On prompts of other lengths and another number than one."""
  run, _, programs = exported
  prompts = [ByteTokenizer().encode(text) for text in ("ab", "", "x" * 15)]
  # Live, the model is as it was: another form of the recurrence on a CPU.
  model = run.model.clone(scan_impl="sequential")
  if hasattr(model, "attention_impl"):
    model = model.clone(attention_impl="xla")
  tokens, lengths = decode.pad_prompts(prompts, gen=VOCAB.gen)
  expected = decode.prefill(
    model, run.params, tokens, lengths, capacity=tokens.shape[1] + NEW
  )
  state = programs.prefill(programs.params, *programs.pad(prompts))
  np.testing.assert_array_equal(state["position"], lengths)
  token = np.full(3, VOCAB.gen, np.int32)
  # A bfloat16 of about 1 has steps of 2 ** -7.
  tolerance = 3e-2 if run.config.model.dtype == "bfloat16" else 1e-5
  for _ in range(3):
    logits, state = programs.step(programs.params, state, token)
    live, expected = decode.decode_step(model, run.params, expected, token)
    np.testing.assert_allclose(logits, live, atol=tolerance)
    token = np.asarray(live).argmax(-1).astype(np.int32)


def test_they_run_on_every_platform_and_hold_no_kernel(exported):
  _, folder, programs = exported
  assert programs.manifest["platforms"] == ["cpu", "cuda", "tpu"]
  for name in ("prefill", "step"):
    data = bytearray((folder / f"{name}.bin").read_bytes())
    found = jax.export.deserialize(data)
    assert found.platforms == ("cpu", "cuda", "tpu")
    assert not any(kernel in found.mlir_module() for kernel in KERNELS)
    assert str(ROOT).encode() not in data  # nor a folder of this machine


def test_parameters_are_an_argument(exported):
  """So the programs are small, and others fit: here they are all zero."""
  _, folder, programs = exported
  zeros = jax.tree.map(np.zeros_like, programs.params)
  state = programs.prefill(zeros, *programs.pad([[64]]))
  logits, _ = programs.step(zeros, state, np.ones(1, np.int32))
  assert not logits.any()
  assert (folder / "step.bin").stat().st_size < 100_000


def test_the_folder_is_a_models(exported):
  run, folder, programs = exported
  found = run_lib.load_run(folder)
  assert found.model == run.model
  for ours, theirs in zip(
    jax.tree.leaves(found.params), jax.tree.leaves(programs.params)
  ):
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == theirs.dtype


def test_the_manifest_says_how_they_are_called(exported):
  run, folder, _ = exported
  manifest = files.read_json(folder / "manifest.json")
  assert manifest["model"] == run.config.model.name
  assert (manifest["length"], manifest["longest_prompt"]) == (16, 15)
  assert (manifest["capacity"], manifest["gen"]) == (20, VOCAB.gen)
  prefill, step = (manifest["programs"][name] for name in ("prefill", "step"))
  assert prefill["inputs"] == ["params", "int32[b,16]", "int32[b]"]
  assert step["inputs"] == ["params", *prefill["outputs"], "int32[b]"]
  assert step["outputs"] == ["float32[b,512]", *prefill["outputs"]]


def test_the_pages_code_runs(exported, tmp_path, monkeypatch, capsys):
  """As printed, in a folder that holds the programs."""
  run, folder, _ = exported
  if run.config.model.name == "transformer":
    pytest.skip("its cache was exported for fewer tokens")
  page = (ROOT / "birdie" / "README.md").read_text()
  code = page[page.index("from birdie import load_exported") :]
  (tmp_path / "exported").symlink_to(folder)
  monkeypatch.chdir(tmp_path)
  exec(code[: code.index("```")], {"__name__": "page"})
  assert capsys.readouterr().out


# -- mistakes ------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """For a TPU alone."""
  folder = tmp_path_factory.mktemp("tpu")
  run = make_run("transformer", layers=1)
  assert call(run, folder, "--platforms=tpu") == 0
  return folder / "out"


def test_programs_of_another_platform(folder, one_line):
  assert "run on tpu, and this is cpu" in one_line(load_exported, folder)


def test_a_prompt_that_is_too_long(one_line):
  programs = export.Exported(
    {"length": 16, "longest_prompt": 15, "gen": 1}, {}, None, None
  )
  line = one_line(programs.pad, [[64] * 16])
  assert "has 16 tokens, and the program reads at most 15" in line


def test_a_damaged_program_is_not_given_to_jax(exported, tmp_path, one_line):
  """Which would end the process at some of them."""
  _, folder, _ = exported
  copy = shutil.copytree(folder, tmp_path / "copy")
  data = bytearray((copy / "prefill.bin").read_bytes())
  data[100] ^= 1
  (copy / "prefill.bin").write_bytes(data)
  line = one_line(load_exported, copy)
  assert line == (
    f"{copy}/prefill.bin is not what manifest.json says: copy it again"
  )


def test_a_folder_without_programs(tmp_path, one_line):
  assert "manifest.json" in one_line(load_exported, tmp_path)


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--platforms=cpu,cude", "'cude'; did you mean 'cuda'?"),
    ("--length=1", "--length=1 must be at least 2"),
    ("--new_tokens=0", "--new_tokens=0 must be at least 1"),
    ("--dtype=float16", "--dtype=float16 must be float32 or bfloat16"),
  ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, flag, message):
  assert call(None, tmp_path, flag) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1
  assert not list(tmp_path.iterdir())
