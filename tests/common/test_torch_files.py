"""Files of torch, read without it: only tensors, and nothing is run."""

import collections
import io
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from common.errors import UserError
from common.weights import read_weights


@pytest.fixture
def save(tmp_path, monkeypatch):
  """`(content, name)`: writes a file as `torch.save` does, arrays as tensors.

  What torch's pickles call has to be there under torch's names meanwhile.
  """
  torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  storages = {
    np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage",
    np.dtype(np.float16): "HalfStorage",
  }  # fmt: skip
  for name in storages.values():
    setattr(torch, name, type(name, (), {"__module__": "torch"}))

  def _rebuild_tensor_v2(*arguments):
    raise AssertionError(arguments)

  _rebuild_tensor_v2.__module__ = "torch._utils"
  _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
  utils._rebuild_tensor_v2 = _rebuild_tensor_v2
  torch._utils = utils

  def save(content, name="a.pth"):
    data = []

    class Storage:
      def __init__(self, array):
        self.array = array

    class Pickler(pickle.Pickler):
      def persistent_id(self, obj):
        if not isinstance(obj, Storage):
          return None
        data.append(obj.array.tobytes())
        kind = getattr(torch, storages[obj.array.dtype])
        key = str(len(data) - 1)
        return ("storage", kind, key, "cpu", obj.array.size)

      def reducer_override(self, obj):
        if not isinstance(obj, np.ndarray):
          return NotImplemented
        base = obj if obj.base is None else obj.base
        offset = (
          obj.__array_interface__["data"][0]
          - base.__array_interface__["data"][0]
        )
        step = obj.itemsize
        return _rebuild_tensor_v2, (
          Storage(base), offset // step, obj.shape,
          tuple(own // step for own in obj.strides), False,
          collections.OrderedDict(),
        )  # fmt: skip

    with monkeypatch.context() as patch:
      patch.setitem(sys.modules, "torch", torch)
      patch.setitem(sys.modules, "torch._utils", utils)
      content_file = io.BytesIO()
      Pickler(content_file, protocol=2).dump(content)
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("a/data.pkl", content_file.getvalue())
      for i, own in enumerate(data):
        archive.writestr(f"a/data/{i}", own)
      archive.writestr("a/byteorder", "little")
    return str(path)

  return save


def test_tensors_come_by_name_as_float32(save):
  whole = np.arange(24, dtype=np.float32).reshape(4, 6)
  content = {
    "plain": whole,
    "turned": whole.T,
    "part": whole[1:3, ::2],
    "module.half": np.array([0.5, -2], np.float16),
    "number": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
  }
  found = read_weights(save(content))
  assert list(found) == ["plain", "turned", "part", "half", "number", "empty"]
  for name, value in content.items():
    own = found[name.removeprefix("module.")]
    assert own.dtype == np.float32
    np.testing.assert_array_equal(own, value)


def test_a_checkpoint_keeps_them_a_level_below(save):
  weights = {"w": np.ones(2, np.float32)}
  found = read_weights(save({"state_dict": weights, "epoch": 3}))
  assert list(found) == ["w"]


class Evil:
  def __reduce__(self):
    return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({"w": np.ones(2, np.float32), "x": Evil()}, "it holds a posix.system"),
    ({"w": 3}, "holds something else than tensors by name"),
    ([1, 2], "holds something else than tensors by name"),
  ],
)
def test_anything_else_is_refused_and_not_run(save, content, message):
  with pytest.raises(UserError, match=message) as error:
    read_weights(save(content))
  assert "\n" not in str(error.value)
  assert not os.path.exists("/tmp/never")


def test_cut_files_are_refused(save, tmp_path):
  path = save({"w": np.ones(2000, np.float32)})
  data = (tmp_path / "a.pth").read_bytes()
  (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
  with pytest.raises(UserError, match=r"cut\.pth (is broken|holds no)"):
    read_weights(str(tmp_path / "cut.pth"))
  with (
    zipfile.ZipFile(path) as old,
    zipfile.ZipFile(tmp_path / "short.pth", "w") as new,
  ):
    for name in old.namelist():
      content = old.read(name)
      new.writestr(name, content[:-8] if name.endswith("/0") else content)
  with pytest.raises(UserError, match=r"short\.pth holds no plain tensors"):
    read_weights(str(tmp_path / "short.pth"))


@pytest.mark.parity
def test_torch_itself_writes_what_is_read(tmp_path):
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  whole = torch.randn(4, 6)
  content = {
    "a": whole, "b": whole.T, "c": whole[1:3, ::2],
    "d": torch.nn.Parameter(torch.randn(3)), "e": whole.bfloat16(),
    "f": torch.tensor(True), "g": torch.zeros(0, 2),
  }  # fmt: skip
  path = str(tmp_path / "a.pth")
  torch.save(collections.OrderedDict(content), path)
  found = read_weights(path)
  assert list(found) == list(content)
  for name, value in content.items():
    expected = value.detach().float().numpy()
    np.testing.assert_array_equal(found[name], expected)
