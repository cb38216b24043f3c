import json
import subprocess
import sys

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict

from common.data import python_docs
from common.data.sources import record_source, source_name, text_source
from common.errors import UserError

TEXTS = ["first\nlines", "second é", "third"]
DEFAULTS = {
  "kind": "text", "name": "", "split": "train", "path": "",
  "text_key": "text", "separator": "", "data_dir": "",
}  # fmt: skip


def config(**kwargs):
  return ConfigDict({**DEFAULTS, **kwargs})


def texts(**kwargs):
  return [text for _, text in text_source(config(**kwargs))]


def write_records(path, records):
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  return str(path)


def write_lines(path, records):
  path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
  return str(path)


@pytest.fixture
def folder(tmp_path):
  """The same documents in every format."""
  records = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
  write_lines(tmp_path / "a.jsonl", records[:2])
  write_lines(tmp_path / "b.jsonl", records[2:])
  write_records(tmp_path / "plain.array_record", [t.encode() for t in TEXTS])
  write_records(
    tmp_path / "json.array_record", [json.dumps(r).encode() for r in records]
  )
  for i, text in enumerate(TEXTS):
    (tmp_path / f"{i}.txt").write_text(text)
  (tmp_path / "all.text").write_text("\n\n".join([*TEXTS, " \n"]))
  return tmp_path


@pytest.mark.parametrize(
  ("kind", "path", "kwargs"),
  [
    ("jsonl", "*.jsonl", {}),
    ("text", "*.txt", {}),
    ("text", "all.text", {"separator": "\\n\\n"}),
    ("array_record", "plain.array_record", {"text_key": ""}),
    ("array_record", "json.*", {}),
  ],
)
def test_every_format_gives_the_same_documents(folder, kind, path, kwargs):
  settings = {"kind": kind, "path": str(folder / path), **kwargs}
  assert texts(**settings) == TEXTS
  source, again = (
    text_source(config(**settings)),
    text_source(config(**settings)),
  )
  assert source.fingerprint == again.fingerprint
  assert list(source) == list(source)


def test_the_fingerprint_follows_files_and_settings(tmp_path):
  file = tmp_path / "a.txt"
  file.write_text("one")
  found = {text_source(config(path=str(file))).fingerprint}
  found.add(text_source(config(path=str(file), separator="n")).fingerprint)
  file.write_text("longer")
  found.add(text_source(config(path=str(file))).fingerprint)
  assert len(found) == 3


BAD = [
  ("text", b"a\xff", {}, r"bad: byte 2 is not UTF-8"),
  ("text", b"", {}, "holds no text"),
  ("text", b" \n ", {}, "holds no text"),
  ("jsonl", b'{"text": "a"}\n{"x": 1}', {}, "bad:2: no key 'text'.* keys: x"),
  ("jsonl", b'{"text": "a"}\n{"text"', {}, "bad:2: not JSON"),
  ("jsonl", b"[1]", {}, "bad:1: not a JSON object"),
  ("jsonl", b'{"text": 3}', {}, "bad:1: 'text' is no text but int"),
  ("jsonl", b'{"text": "\xff"}', {}, "bad:1: byte 11 is not UTF-8"),
  ("jsonl", b'{"text": "\\ud800"}', {}, "bad:1: .*lone surrogate"),
  ("jsonl", b"", {}, "holds no text"),
  ("jsonl", b"{}", {"text_key": ""}, "needs data.source.text_key"),
  ("array_record", b"junk", {}, "bad: no ArrayRecord file"),
]


@pytest.mark.parametrize(("kind", "data", "kwargs", "message"), BAD)
def test_bad_files_are_one_line_with_the_place(
  tmp_path, kind, data, kwargs, message
):
  (tmp_path / "bad").write_bytes(data)
  with pytest.raises(UserError, match=message) as caught:
    texts(kind=kind, path=str(tmp_path / "bad"), **kwargs)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.99])
def test_a_truncated_shard_is_one_line(tmp_path, share):
  path = tmp_path / "cut.array_record"
  write_records(path, [b"a line of text " * 40] * 200)
  data = path.read_bytes()
  path.write_bytes(data[: int(share * len(data))])
  with pytest.raises(UserError, match=r"cut\.array_record: no") as e:
    texts(kind="array_record", path=str(path), text_key="")
  assert "\n" not in str(e.value)


def test_a_flipped_bit_of_a_record_is_one_line(tmp_path):
  path = tmp_path / "bit.array_record"
  write_records(path, [b"a line of text " * 40] * 200)
  data = bytearray(path.read_bytes())
  data[1000] ^= 4
  path.write_bytes(data)
  with pytest.raises(UserError, match="record 0 or later is damaged: make"):
    texts(kind="array_record", path=str(path), text_key="")
  records = record_source(config(kind="array_record", path=str(path)))
  assert records[100] == b"a line of text " * 40
  with pytest.raises(UserError, match=r"bit\.array_record: record \d+ is"):
    [records[i] for i in range(200)]


def test_a_bad_record_is_named(tmp_path):
  path = write_records(tmp_path / "r.array_record", [b"a", b"\xff"])
  with pytest.raises(UserError, match=r"r.array_record: record 1: byte 1"):
    texts(kind="array_record", path=path, text_key="")


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"kind": "csv"}, "'csv': choose one of python_docs, tfds"),
    ({"path": "no/such*"}, r"'no/such\*': no such file \(looked from /"),
    ({"path": "/"}, r"data.source.path='/' is a folder: .* as in '/\*'"),
    ({"path": ""}, "data.source.path is empty"),
    ({"kind": "tfds"}, "needs data.source.name"),
    ({"kind": "tfds", "name": "nope_at_all"}, "Dataset nope_at_all not found"),
    (
      {"kind": "tfds", "name": "squad"},
      r"not prepared in .*prepare it: ",
    ),
  ],
)
def test_missing_data_is_one_line(tmp_path, kwargs, message):
  folder = str(tmp_path) if kwargs.get("kind") == "tfds" else ""
  with pytest.raises(UserError, match=message) as caught:
    text_source(config(data_dir=folder, **kwargs))
  assert "\n" not in str(caught.value)
  if kwargs.get("name") == "squad":
    assert "tfds.builder('squad', data_dir=" in str(caught.value)
    assert ".download_and_prepare()" in str(caught.value)


def test_records_have_random_access(folder):
  path = str(folder / "plain.array_record")
  records = record_source(config(kind="array_record", path=path))
  assert (len(records), records[1]) == (3, TEXTS[1].encode())
  assert list(records) == [text.encode() for text in TEXTS]
  assert records[-1] == records[2]
  with pytest.raises(UserError, match="records come from"):
    record_source(config(kind="jsonl", path=path))


def test_docstrings_come_in_the_order_of_the_file():
  source = (
    '"""Module."""\nclass A:\n  """Class."""\n  def f(self):\n'
    '    """Method."""\ndef g():\n  "escape \\d"\nasync def h():\n  """  """\n'
  )
  found = python_docs.docstrings(source)
  assert found == "Module.\n\nClass.\n\nMethod.\n\nescape \\d"


def test_python_docs_are_many_sorted_and_free_of_tests():
  documents = list(text_source(config(kind="python_docs")))
  names = [name for name, _ in documents]
  modules = [n for n in names if n.startswith("modules/")]
  assert modules == sorted(set(modules))
  assert len(names) == len(set(names)) > 500
  assert {"topics/if", "modules/argparse", "modules/json.decoder"} <= set(names)
  assert not [n for n in names if "test_" in n or ".tests." in n]
  assert sum(len(text.encode()) for _, text in documents) > 1_500_000
  assert "if_stmt" in dict(documents)["topics/if"]


# In another process, where no other test can have imported TensorFlow and where
# TFDS's own warnings are no errors.
ROUND_TRIP = """
import pathlib, sys
from ml_collections import ConfigDict
from common.data import python_docs
from common.data.sources import record_source, source_name, text_source
documents = list(python_docs.documents())
python_docs.documents = lambda: iter(documents)  # parsing takes seconds
cfg = ConfigDict({"kind": "tfds", "name": "python_docs", "split": "train",
                  "text_key": "text", "data_dir": sys.argv[1]})
source = text_source(cfg)
assert [text for _, text in source] == [text for _, text in documents]
assert source.fingerprint == text_source(cfg).fingerprint
cfg.split = "train[:3]"
assert len(record_source(cfg)) == 3
for key, value, message in (
  ("text_key", "body", "record 0: no key 'body'; its keys: id, text"),
  ("split", "dev", "has the splits train"),
):
  with cfg.unlocked():
    bad = ConfigDict({**cfg.to_dict(), key: value})
  try:
    list(text_source(bad))
  except ValueError as error:
    assert message in str(error) and "\\n" not in str(error), error
  else:
    raise AssertionError(key)
(shard,) = pathlib.Path(sys.argv[1]).rglob("*.array_record*")
whole = shard.read_bytes()
place = len(whole) // 3
cfg.split = "train"
for data in (
  whole[: len(whole) // 2],
  whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
  b"",
):
  shard.write_bytes(data)
  for read in (
    lambda: list(text_source(cfg)),
    lambda: [record_source(cfg)[i] for i in range(len(documents))],
  ):
    try:
      read()
    except ValueError as error:
      assert str(error).startswith(f"{shard.parent}: record "), error
      assert "is damaged: remove that folder and prepare " in str(error), error
      assert "\\n" not in str(error), error
    else:
      raise AssertionError(len(data))
assert "tensorflow" not in sys.modules
print("equal")
"""


def test_python_docs_as_a_tfds_data_set_without_tensorflow(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", ROUND_TRIP, str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.endswith("equal\n")


@pytest.mark.parametrize(
  ("separator", "wanted"),
  [
    ("--", ["a", "b\nc"]),
    (r"\n", ["a--b", "c"]),
    ("—", ["a--b\nc"]),
  ],
)
def test_separators_are_as_written_or_escaped(tmp_path, separator, wanted):
  path = tmp_path / "text.txt"
  path.write_text("a--b\nc")
  cfg = config(kind="text", path=str(path), separator=separator)
  assert [text for _, text in text_source(cfg)] == wanted


@pytest.mark.parametrize("separator", ["\\", r"\x"])
def test_escapes_that_mean_nothing_are_refused(tmp_path, separator):
  path = tmp_path / "text.txt"
  path.write_text("a")
  with pytest.raises(UserError, match="means nothing"):
    text_source(config(kind="text", path=str(path), separator=separator))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      {"kind": "python_docs", "path": "a.txt"},
      "data.source.path='a.txt' means nothing to data.source.kind="
      "'python_docs': set data.source.kind to array_record or jsonl or text",
    ),
    ({"kind": "python_docs", "name": "x"}, "data.source.name='x'"),
    ({"kind": "text", "path": "a", "text_key": "b"}, "source.text_key='b'"),
    ({"kind": "jsonl", "path": "a", "separator": "b"}, "separator='b'"),
    ({"kind": "jsonl", "path": "a", "split": "test"}, "kind to tfds,"),
    ({"kind": "text", "path": "a", "data_dir": "d"}, "data.source.data_dir="),
  ],
)  # fmt: skip
def test_a_setting_that_a_kind_does_not_read_is_refused(
  settings, message, one_line
):
  assert message in one_line(text_source, config(**settings))


def test_sources_have_names():
  named = [{"kind": "python_docs"}, {"path": "a/*.txt"},
           {"kind": "tfds", "name": "x"}]  # fmt: skip
  assert [source_name(config(**one)) for one in named] == [
    "python_docs", "text a/*.txt", "tfds x",
  ]  # fmt: skip
