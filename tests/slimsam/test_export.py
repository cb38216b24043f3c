"""Exported programs: run, they give what the model gives."""

import functools
import sys

import jax
import numpy as np
import pytest

from common.errors import UserError
from slimsam import export
from slimsam.model import Sam
from slimsam.weights import save_model

pytest.importorskip("flatbuffers")
pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def files(tiny, draw, tmp_path_factory):
  folder = tmp_path_factory.mktemp("export")
  save_model(folder / "model", draw(tiny), tiny)
  with pytest.MonkeyPatch.context() as patch:
    arguments = [str(folder / "model"), str(folder / "out")]
    flags = ["--platforms=cpu,tpu", "--format=stablehlo,onnx"]
    patch.setattr("sys.argv", ["export", *arguments, *flags])
    export.main()
  return folder


def read(folder, name):
  data = (folder / "out" / f"{name}.stablehlo").read_bytes()
  return jax.export.deserialize(bytearray(data))


def test_they_run_and_agree(files, tiny, draw, images_of):
  """With other numbers of images, prompts and points than one."""
  images = images_of(tiny, 3)
  sam = Sam(tiny).bind({"params": draw(tiny)})
  encoder, decoder = (read(files, name) for name in ("encoder", "decoder"))
  assert encoder.platforms == decoder.platforms == ("cpu", "tpu")
  expected = jax.jit(sam.encode)(images)
  embeddings = encoder.call(images)
  np.testing.assert_allclose(embeddings, expected, atol=1e-5)
  rng = np.random.default_rng(0)
  points = rng.uniform(0, 40, (3, 2, 4, 2)).astype(np.float32)
  labels = np.array([1, 0, 2, 3], np.int32) * np.ones((3, 2, 1), np.int32)
  masks = rng.normal(size=(3, 2, 20, 20)).astype(np.float32)
  has_mask = np.array([[1, 0]] * 3, np.float32)
  logits, iou = decoder.call(embeddings, points, labels, masks, has_mask)
  given = {
    "points": points[:, :, :2], "labels": labels[:, :, :2],
    "boxes": points[:, :, 2:].reshape(3, 2, 4),
  }  # fmt: skip
  for prompt, more in ((0, {"masks": masks}), (1, {})):
    own = jax.jit(functools.partial(sam.decode, multimask=None))(
      expected, **given, **more
    )
    np.testing.assert_allclose(
      logits[:, prompt], own.logits[:, prompt], atol=1e-4
    )
    np.testing.assert_allclose(iou[:, prompt], own.iou[:, prompt], atol=1e-4)


def test_both_formats_come_at_once(files):
  """What the ONNX graphs compute is tested in test_onnx.py."""
  assert {file.name for file in (files / "out").iterdir()} == {
    f"{name}.{kind}"
    for name in ("encoder", "decoder")
    for kind in ("stablehlo", "onnx")
  }


def test_no_kernel_is_kept(tiny, draw):
  """Also where it would be taken: in 16 bits, on a GPU."""
  made = export.export(
    draw(tiny), tiny, platforms=("cpu", "cuda"), dtype="bfloat16"
  )
  assert made["encoder"].platforms == ("cpu", "cuda")
  assert "windowed_attention" not in made["encoder"].mlir_module()


def test_weights_that_do_not_fit_are_refused(tiny, draw, monkeypatch):
  monkeypatch.setattr(export, "MOST_BYTES", 2**14)
  with pytest.raises(UserError, match=r"GiB of float32 weights: .*bfloat16"):
    export.export(draw(tiny), tiny)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["out2", "--platforms=gpu"], "--platforms: 'gpu'"),
    (["out2", "--platforms="], "--platforms: ''"),
    (["out2", "--dtype=float16"], "--dtype=float16 must be"),
    (["out"], "there already"),
    (["out2", "--format=onx"], "did you mean 'onnx'"),
    (["out2", "--format=onnx", "--platforms=cpu"], "leave it out"),
    (["out2", "--format=onnx", "--dtype=bfloat16"], "--format=stablehlo"),
    (["out2", "--format=stablehlo,onnx", "--dtype=bfloat16"], "in float32"),
    (["out2", "--return_single_mask"], "add --format=onnx"),
  ],
)
def test_mistakes_are_refused(files, arguments, message, monkeypatch, one_line):
  paths = [str(files / "model"), str(files / arguments[0])]
  monkeypatch.setattr("sys.argv", ["export", *paths, *arguments[1:]])
  assert message in one_line(export.main)
  assert not (files / "out2").exists()


@pytest.mark.parametrize(
  ("flags", "package", "message"),
  [
    ([], "flatbuffers", "--format=stablehlo needs flatbuffers"),
    (["--format=onnx"], "onnx", "--format=onnx needs onnx"),
  ],
)
def test_a_missing_package_is_one_line(
  flags, package, message, monkeypatch, one_line
):
  """That comes before the model is read: there is none."""
  monkeypatch.setitem(sys.modules, package, None)
  monkeypatch.setattr("sys.argv", ["export", "model", "out", *flags])
  assert one_line(export.main) == (f"{message}: pip install -e '.[export]'")
