"""Files of safetensors."""

import json

import ml_dtypes
import numpy as np
import pytest

from common.weights import read_weights, write_safetensors


@pytest.mark.parametrize(
  "dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16, "int8", "bool"]
)
def test_arrays_keep_their_dtype(tmp_path, dtype):
  arrays = {"a/b": np.arange(6).reshape(2, 3), "c": np.array(1), "d": np.eye(0)}
  arrays = {name: array.astype(dtype) for name, array in arrays.items()}
  write_safetensors(tmp_path / "x.safetensors", arrays)
  found = read_weights(str(tmp_path / "x.safetensors"))
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)


def test_a_dtype_that_numpy_lacks(tmp_path, one_line):
  tensor = {"dtype": "F8_E5M2", "shape": [2], "data_offsets": [0, 2]}
  header = json.dumps({"a": tensor}).encode()
  size = len(header).to_bytes(8, "little")
  file = tmp_path / "x.safetensors"
  file.write_bytes(size + header + bytes(2))
  line = one_line(read_weights, str(file))
  assert "'a' has dtype F8_E5M2, which is not read here; known: F64" in line
