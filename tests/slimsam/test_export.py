"""Exported programs: run, they give what the model gives."""

import jax
import numpy as np
import pytest

from common.errors import UserError
from slimsam import export
from slimsam.model import Sam
from slimsam.weights import save_model

pytest.importorskip("flatbuffers")


@pytest.fixture(scope="module")
def files(tiny, draw, tmp_path_factory):
  folder = tmp_path_factory.mktemp("export")
  save_model(folder / "model", draw(tiny), tiny)
  with pytest.MonkeyPatch.context() as patch:
    arguments = [str(folder / "model"), str(folder / "out")]
    patch.setattr("sys.argv", ["export", *arguments, "--platforms=cpu,tpu"])
    export.main()
  return folder


def read(folder, name):
  data = (folder / "out" / f"{name}.stablehlo").read_bytes()
  return jax.export.deserialize(bytearray(data))


def test_they_run_and_agree(files, tiny, draw, images_of):
  """With other numbers of images, prompts and points than one."""
  params, images, sam = draw(tiny), images_of(tiny, 3), Sam(tiny)
  encoder, decoder = (read(files, name) for name in ("encoder", "decoder"))
  assert encoder.platforms == decoder.platforms == ("cpu", "tpu")
  variables = {"params": params}
  expected = sam.apply(variables, images, method=sam.encode)
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
    own = sam.apply(
      variables, expected, **given, **more, multimask=None, method=sam.decode
    )
    np.testing.assert_allclose(
      logits[:, prompt], own.logits[:, prompt], atol=1e-4
    )
    np.testing.assert_allclose(iou[:, prompt], own.iou[:, prompt], atol=1e-4)


def test_mistakes_are_refused(files, monkeypatch):
  for arguments, message in (
    (("out2", "--platforms=gpu"), "--platforms: 'gpu'"),
    (("out2", "--dtype=float16"), "--dtype=float16 must be"),
    (("out",), "there already"),
  ):
    paths = [str(files / "model"), str(files / arguments[0])]
    monkeypatch.setattr("sys.argv", ["export", *paths, *arguments[1:]])
    with pytest.raises(UserError, match=message):
      export.main()
