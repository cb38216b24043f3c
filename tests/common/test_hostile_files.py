"""Files of weights and arrays that lie: refused in a line, for little memory.

What they claim is hundreds of megabytes, and what they hold a few hundred
bytes: a reader that believed them would be seen in what it allocates.
"""

import json
import os
import pathlib
import random
import stat
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from common import files, numpy_files
from common.data.sources import json_record
from common.errors import UserError
from common.weights import (
  read_arrays,
  read_weights,
  write_arrays,
  write_safetensors,
)

CLAIMED = 2**28  # bytes, or numbers
UNPACKED = 2**25  # bytes that compression makes small
ALLOWED = 2**22
LIKE = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}


@pytest.fixture
def frugal(one_line):
  """`one_line`, in a few megabytes."""

  def call(function, *arguments, **settings) -> str:
    tracemalloc.start()
    try:
      line = one_line(function, *arguments, **settings)
      _, peak = tracemalloc.get_traced_memory()
    finally:
      tracemalloc.stop()
    assert peak < ALLOWED
    return line

  return call


# -- torch ---------------------------------------------------------------------

STORAGE = b"ctorch\nFloatStorage\n"


def text(value: bytes) -> bytes:
  return b"X" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
  return b"\x8a\x08" + struct.pack("<q", value)


def tensor(size, stride, *, key=b"0", count=2, offset=0) -> bytes:
  """The instructions that `torch.save` writes for a tensor."""
  numbers = b"".join(map(number, size)), b"".join(map(number, stride))
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n(("
    + text(b"storage") + STORAGE + text(key) + text(b"cpu") + number(count)
    + b"tQ" + number(offset) + b"(" + numbers[0] + b"t(" + numbers[1] + b"t"
    + b"\x89ccollections\nOrderedDict\n)RtR"
  )  # fmt: skip


def dictionary(*values: bytes) -> bytes:
  pairs = [text(b"w%d" % i) + value for i, value in enumerate(values)]
  return b"\x80\x02}(" + b"".join(pairs) + b"u."


PLAIN = dictionary(tensor((2,), (1,)))
BYTES = np.float32([1, 2]).tobytes()


def torch_file(tmp_path, program=PLAIN, **entries) -> str:
  """A file as torch 1.6 writes it, and what is to be in it besides."""
  path = tmp_path / "a.pth"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/data.pkl", program)
    archive.writestr("a/data/0", BYTES)
    for name, content in entries.items():
      archive.writestr(name, content)
  return str(path)


def test_an_honest_file_is_read(tmp_path):
  found = read_weights(torch_file(tmp_path))
  np.testing.assert_array_equal(found["w0"], [1, 2])


NESTED = b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))

PROGRAMS = {
  "a call": (b"cos\nsystem\n(X\x04\0\0\0trueetR.", "it holds a os.system"),
  "a call by name": (
    b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "it holds a os.system",
  ),
  "a method": (
    dictionary(b"ccollections\nOrderedDict.update\n"),
    "it holds a collections.OrderedDict.update",
  ),
  "a class": (b"(i__main__\nA\n.", "it holds the instruction INST"),
  "an object": (
    b"\x80\x02ccollections\nOrderedDict\n)\x81.", "the instruction NEWOBJ",
  ),
  "attributes of a tensor": (
    dictionary(tensor((2,), (1,)) + b"}b"), "it holds a BUILD of a ndarray",
  ),
  "a number that repeats": (
    dictionary(tensor((CLAIMED,), (0,))), "far more numbers than the file has",
  ),
  "many tensors of one storage": (
    dictionary(*[tensor((2000,), (0,))] * 100), "far more numbers than the",
  ),
  "a tensor beyond its storage": (
    dictionary(tensor((3,), (1,))), "a tensor is larger than its storage",
  ),
  "a tensor before its storage": (
    dictionary(tensor((2,), (1,), offset=-1)), "a tensor has no size",
  ),
  "strides backwards": (
    dictionary(tensor((2,), (-1,), offset=1)), "a tensor has no size",
  ),
  "a storage that is not there": (
    dictionary(tensor((2,), (1,), key=b"../1")), "There is no item named",
  ),
  "a storage of more than its bytes": (
    dictionary(tensor((2,), (1,), count=CLAIMED)), "buffer is smaller",
  ),
  "text of more than its bytes": (
    b"\x80\x02X" + struct.pack("<I", CLAIMED) + b"a.",
    "expected 268435456 byte",
  ),
  "a place of its own choice": (
    b"\x80\x02Nr" + struct.pack("<I", CLAIMED) + b".", "something else than",
  ),
  "a key that takes forever to hash": (
    b"\x80\x02})" + NESTED + b"Ns.", "a key is neither text nor number",
  ),
  "a storage that takes forever to hash": (
    b"\x80\x02(" + text(b"storage") + STORAGE + b")" + NESTED + b"NNtQ.",
    "it refers to what is no storage",
  ),
  "nothing": (b".", "pop from empty list"),
  "no end": (b"\x80\x02}", "pickle exhausted before seeing STOP"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_are_no_weights(frugal, tmp_path, name):
  program, reason = PROGRAMS[name]
  line = frugal(read_weights, torch_file(tmp_path, program))
  assert line.startswith(f"{tmp_path}/a.pth holds ")
  assert reason in line
  assert line.endswith("save the model's state_dict alone")


ENTRIES = {
  "../evil": "'../evil' leads out of it",
  "/etc/evil": "'/etc/evil' leads out of it",
  "a/data/..\\evil": "leads out of it",
  "C:/evil": "'C:/evil' leads out of it",
  "b/data/0": "'b/data/0' is outside of a/",
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_that_belong_elsewhere(frugal, tmp_path, name):
  line = frugal(read_weights, torch_file(tmp_path, **{name: b"x"}))
  assert ENTRIES[name] in line


def test_an_entry_that_is_a_link(frugal, tmp_path):
  path = torch_file(tmp_path)
  link = zipfile.ZipInfo("a/data/1")
  link.external_attr = (stat.S_IFLNK | 0o777) << 16
  with zipfile.ZipFile(path, "a") as archive:
    archive.writestr(link, "/etc/passwd")
  assert "its entry 'a/data/1' is a link" in frugal(read_weights, path)


def test_two_entries_of_one_name(frugal, tmp_path):
  path = torch_file(tmp_path)
  with (
    zipfile.ZipFile(path, "a") as archive,
    pytest.warns(UserWarning, match="Duplicate name"),
  ):
    archive.writestr("a/data/0", b"12345678")
  assert "its entry 'a/data/0' is there twice" in frugal(read_weights, path)


def test_a_compressed_entry_is_not_unpacked(frugal, tmp_path):
  """32 megabytes of zeros are 32 kilobytes."""
  path = torch_file(tmp_path)
  with (
    zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
    archive.open("a/data/1", "w") as entry,
  ):
    for _ in range(UNPACKED // 2**20):
      entry.write(bytes(2**20))
  assert os.path.getsize(path) < UNPACKED / 500
  assert "its entry 'a/data/1' is compressed" in frugal(read_weights, path)


def directory_of(path, change):
  """Rewrites an archive's directory, entry by entry."""
  file = pathlib.Path(path)
  data, start = bytearray(file.read_bytes()), 0
  while (start := data.find(b"PK\1\2", start)) >= 0:
    change(data, start)
    start += 4
  file.write_bytes(data)


def test_entries_that_share_their_bytes(frugal, tmp_path):
  """As in bombs that no compression needs: many names for one place."""
  more = {f"a/data/{i}": bytes(1000) for i in range(1, 9)}
  path = torch_file(tmp_path, **more)

  def larger(data, start):
    if data[start + 24 : start + 28] == struct.pack("<I", 1000):
      data[start + 20 : start + 28] = struct.pack("<II", 2000, 2000)

  directory_of(path, larger)
  line = frugal(read_weights, path)
  assert "its entries claim 16," in line
  assert " bytes of a file that has " in line


def test_an_entry_with_two_sizes(frugal, tmp_path):
  path = torch_file(tmp_path)

  def larger(data, start):
    data[start + 24 : start + 28] = struct.pack("<I", CLAIMED)

  directory_of(path, larger)
  assert "has two sizes" in frugal(read_weights, path)


# -- safetensors ---------------------------------------------------------------


def entry(shape, begin, end, dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
  "a header of more than the file": (b"{}", 2**60, "header too large"),
  "a header of 100 MB": (b"{}", 99 * 2**20, "header"),
  "offsets outside": ({"a": entry([4], 0, 16)}, None, "file not fully covered"),
  "offsets that overlap": (
    {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, None, "invalid offset",
  ),
  "a gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, None, "offset"),
  "a shape of more": ({"a": entry([CLAIMED], 0, 4)}, None, "a"),
  "a shape beyond numbers": ({"a": entry([2**62, 4], 0, 4)}, None, "overflow"),
  "brackets in brackets": (
    b'{"a":' + b"[" * 10**5, None, "recursion limit",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(frugal, tmp_path, name):
  pytest.importorskip("safetensors")
  header, size, reason = HEADERS[name]
  data = header if isinstance(header, bytes) else json.dumps(header).encode()
  size = len(data) if size is None else size
  path = tmp_path / "a.safetensors"
  path.write_bytes(size.to_bytes(8, "little") + data + bytes(12))
  line = frugal(read_weights, str(path))
  assert line.startswith(f"{path} is no safetensors file (")
  assert reason in line
  assert line.endswith("): fetch it again")


# -- NumPy ---------------------------------------------------------------------


def npy(shape, dtype="<f4", held=b"1234", *, version=b"\x01\x00"):
  head = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
  return framed(head.encode(), held, version=version)


def framed(head: bytes, held: bytes = b"1234", *, version=b"\x01\x00"):
  size = struct.pack("<H" if version[0] == 1 else "<I", len(head) + 1)
  return b"\x93NUMPY" + version + size + head + b"\n" + held


ARRAYS = {
  "more values than bytes": (npy((CLAIMED,)), "claims 1,073,741,824 bytes"),
  "a shape beyond numbers": (npy((2**40, 2**40)), "bytes of values, and there"),
  "a shape that wraps around": (npy((2**32, 2**32)), "bytes of values"),
  "a shape below zero": (npy((-1,)), "its header claims -4 bytes"),
  "two below zero": (npy((-1, -1)), "its header claims 4 bytes"),
  "objects": (npy((1,), "|O"), "its type is object, and only numbers"),
  "long text": (npy((1,), f"<U{CLAIMED}"), "and only numbers are read"),
  "a long header": (framed(b" " * 20_000), "its header is broken"),
  "no Python": (framed(b"{'descr': __import__('os')"), "its header is broken"),
  "brackets in brackets": (framed(b"(" * 3000), "its header is broken"),
  "a header beyond the file": (npy((1,))[:20], "its header is broken"),
  "another version": (npy((1,), version=b"\x03\x00"), "of another version"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_headers_of_arrays(frugal, tmp_path, name):
  content, reason = ARRAYS[name]
  (tmp_path / "a.npy").write_bytes(content)
  with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
    archive.writestr("a.npy", content)
  line = frugal(read_arrays, tmp_path / "a.npz", LIKE, remedy="copy it again")
  assert line.startswith(f"{tmp_path}/a.npz is not readable (")
  assert reason in line
  assert line.endswith("): copy it again")
  with pytest.raises(ValueError, match="it") as error:
    numpy_files.map_npy(tmp_path / "a.npy")
  assert reason in str(error.value)


def test_a_pickle_for_an_array(tmp_path):
  (tmp_path / "a.npy").write_bytes(b"cos\nsystem\n(X\x04\0\0\0true\ntR.")
  with pytest.raises(ValueError, match="the magic string is not correct"):
    numpy_files.map_npy(tmp_path / "a.npy")


def test_a_compressed_array_of_another_shape_is_not_unpacked(frugal, tmp_path):
  """What it claims is true, which only the model's shapes can tell."""
  path = tmp_path / "a.npz"
  with (
    zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
    archive.open("a.npy", "w") as stream,
  ):
    stream.write(npy((UNPACKED // 4,), held=b""))
    for _ in range(UNPACKED // 2**20):
      stream.write(bytes(2**20))
  line = frugal(read_arrays, path, LIKE, remedy="copy it again")
  assert "'a' has shape (8388608,), but the model takes (3, 4)" in line


def test_compressed_arrays_of_the_shape_are_read(tmp_path):
  arrays = {"a": np.eye(3, 4, dtype=np.float64), "b": np.ones(5, np.float32)}
  np.savez_compressed(tmp_path / "a.npz", **arrays)
  found = read_arrays(tmp_path / "a.npz", LIKE, remedy="")
  for name, array in arrays.items():
    assert found[name].dtype == np.float32
    np.testing.assert_array_equal(found[name], array)


# -- all of them ---------------------------------------------------------------


def write(kind, path):
  if kind == "a.npz":
    write_arrays(path, LIKE)
  elif kind == "compressed.npz":
    np.savez_compressed(path, **LIKE)
  elif kind == "a.safetensors":
    pytest.importorskip("safetensors")
    write_safetensors(path, LIKE)
  else:
    torch_file(path.parent)


@pytest.mark.parametrize(
  "kind", ["a.npz", "compressed.npz", "a.safetensors", "a.pth"]
)
def test_whatever_is_damaged_is_read_or_refused(tmp_path, kind):
  """150 files with bytes changed, cut out, set to what means much."""
  path, rng = tmp_path / kind, random.Random(0)
  write(kind, path)
  whole = path.read_bytes()
  refused, lines = 0, set()
  for _ in range(150):
    data = bytearray(whole)
    place = rng.randrange(len(data))
    new = rng.choice([b"", b"\xff" * 4, b"\0", bytes([rng.randrange(256)])])
    data[place : place + rng.choice([1, 4])] = new
    path.write_bytes(data)
    try:
      if path.suffix == ".npz":
        read_arrays(path, LIKE, remedy="")
      else:
        read_weights(str(path))
    except UserError as error:
      refused += 1
      lines.add(str(error).count("\n"))
  assert 50 < refused < 150
  assert lines == {0}


@pytest.mark.parametrize(
  "content", [b"[" * 10**5, b'{"a": ' + b"1" * 5000 + b"}"]
)
def test_json_that_python_gives_up_on(one_line, tmp_path, content):
  assert one_line(json_record, content, "a.jsonl:7").startswith(
    "a.jsonl:7: not JSON: "
  )
  (tmp_path / "a.json").write_bytes(content)
  line = one_line(files.read_json, tmp_path / "a.json")
  assert line.startswith(f"{tmp_path}/a.json is not JSON: ")
