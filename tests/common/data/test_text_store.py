import pickle
import types

import numpy as np
import pytest

from common.data import text as text_lib
from common.data.text import (
  PackedRows,
  TokenStore,
  Windows,
  build_splits,
  concat_and_split,
  shuffled_windows,
  split_of,
)
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError

DOCUMENTS = ["ab", "", "cdefghij", "k", "lmnop"]


def store_of(documents=DOCUMENTS):
  return TokenStore.build(documents, ByteTokenizer())


def read(pieces):
  return [ByteTokenizer().decode(piece) for piece in pieces]


class Source:
  name = "the test's text"

  def __init__(self, texts, fingerprint="1"):
    self.texts, self.fingerprint, self.reads = texts, fingerprint, 0

  def __iter__(self):
    self.reads += 1
    return iter([(str(i), text) for i, text in enumerate(self.texts)])


CORPUS = [f"document {i} " * (1 + i % 7) for i in range(400)]


def test_a_store_gives_its_documents_back():
  store = store_of()
  assert store.tokens.dtype == np.uint16
  assert (store.num_tokens, store.num_documents) == (16, 4)
  texts = [t for t in DOCUMENTS if t]
  assert read(store.document(i) for i in range(4)) == texts
  with pytest.raises(IndexError):
    store.document(4)


def test_a_large_vocabulary_takes_32_bits():
  tokenizer = types.SimpleNamespace(
    vocab_size=70_000, encode=lambda text: np.array([69_999])
  )
  store = TokenStore.build(["x"], tokenizer)
  assert store.document(0).tolist() == [69_999]


@pytest.mark.parametrize("bad", [-1, 320])
def test_ids_outside_the_vocabulary_are_refused(bad):
  tokenizer = types.SimpleNamespace(
    vocab_size=320, encode=lambda text: np.array([bad])
  )
  with pytest.raises(ValueError, match="its vocabulary is 320"):
    TokenStore.build(["x"], tokenizer)


def test_the_fingerprint_sees_tokens_and_borders():
  prints = {
    store_of(d).fingerprint for d in (["ab", "c"], ["a", "bc"], ["ab", "d"])
  }
  assert len(prints) == 3
  assert store_of().fingerprint == store_of().fingerprint


def test_splits_are_disjoint_whole_and_near_their_shares():
  stores = build_splits(Source(CORPUS), ByteTokenizer())
  found = {
    name: set(read(s.document(i) for i in range(s.num_documents)))
    for name, s in stores.items()
  }
  assert set.union(*found.values()) == set(CORPUS)
  assert sum(map(len, found.values())) == len(CORPUS)
  # Binomial: 360 +- 6 and 20 +- 4.4; four deviations.
  assert abs(len(found["train"]) - 360) < 24
  assert all(3 < len(found[name]) < 38 for name in ("validation", "test"))


def test_a_document_keeps_its_split_whatever_comes_with_it():
  # Fixed values: a change of the rule would move text between splits.
  splits = [split_of(f"text {i}") for i in range(40)]
  assert splits.count("train") < 40
  assert splits == [split_of(f"text {i}") for i in range(40)]
  few = build_splits(Source(CORPUS[::2]), ByteTokenizer())["validation"]
  many = build_splits(Source(CORPUS), ByteTokenizer())["validation"]
  everything = set(read(many.document(i) for i in range(many.num_documents)))
  assert few.num_documents
  for i in range(few.num_documents):
    assert read([few.document(i)])[0] in everything


def test_the_cache_is_read_instead_of_the_source(tmp_path):
  source, byte = Source(CORPUS), ByteTokenizer()
  fresh = build_splits(source, byte)
  first = build_splits(source, byte, cache_dir=str(tmp_path))
  again = build_splits(source, byte, cache_dir=str(tmp_path))
  assert source.reads == 2
  for name, store in fresh.items():
    for other in (first[name], again[name]):
      np.testing.assert_array_equal(other.tokens, store.tokens)
      np.testing.assert_array_equal(other.offsets, store.offsets)
      assert other.fingerprint == store.fingerprint
      assert type(other.tokens) is np.ndarray  # `np.memmap` slices slowly
  build_splits(Source(CORPUS, "2"), byte, cache_dir=str(tmp_path))
  build_splits(source, ByteTokenizer(3), cache_dir=str(tmp_path))
  assert source.reads == 3
  assert len(list(tmp_path.iterdir())) == 3  # and no scratch folder


def test_an_interrupted_or_damaged_cache_is_made_again(tmp_path, caplog):
  class Broken(Source):
    def __iter__(self):
      yield "0", "text"
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    build_splits(Broken([]), ByteTokenizer(), cache_dir=str(tmp_path))
  assert not list(tmp_path.iterdir())
  source = Source(CORPUS)
  build_splits(source, ByteTokenizer(), cache_dir=str(tmp_path))
  (file,) = tmp_path.glob("*/train.tokens")
  file.write_bytes(file.read_bytes()[:-1])
  build_splits(source, ByteTokenizer(), cache_dir=str(tmp_path))
  assert source.reads == 2
  assert "damaged" in caplog.text


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match=r"cannot write tokens to .*cache_dir"):
    build_splits(
      Source(CORPUS), ByteTokenizer(), cache_dir=str(tmp_path / "file" / "x")
    )


def test_tokens_are_not_cached_in_a_bucket():
  with pytest.raises(UserError, match=r"cache_dir='gs://b/c' is no folder"):
    build_splits(Source(CORPUS), ByteTokenizer(), cache_dir="gs://b/c")


def test_pickling_a_cached_store_sends_its_path(tmp_path):
  byte = ByteTokenizer()
  cached = build_splits(Source(CORPUS), byte, cache_dir=str(tmp_path))["train"]
  data = pickle.dumps(cached)
  assert len(data) < 1000 < cached.tokens.nbytes
  np.testing.assert_array_equal(pickle.loads(data).tokens, cached.tokens)
  loose = pickle.loads(pickle.dumps(store_of()))
  np.testing.assert_array_equal(loose.tokens, store_of().tokens)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 100])
def test_windows_cut_the_text_and_never_cross_documents(length):
  store = store_of()
  windows = Windows(store, length)
  assert len(windows) == -(-store.num_tokens // length)
  everything = [windows[i] for i in range(len(windows))]
  assert all(sum(map(len, w)) == length for w in everything[:-1])
  assert "".join(read(p for w in everything for p in w)) == "".join(DOCUMENTS)
  assert all(
    any(piece in document for document in DOCUMENTS)
    for w in everything
    for piece in read(w)
  )
  with pytest.raises(IndexError):
    windows[len(windows)]


def test_a_window_as_an_example():
  assert read(Windows(store_of(), 6)[0]) == ["ab", "cdef"]
  assert read(Windows(store_of(), 6)[1]) == ["ghij", "k", "l"]
  assert read(Windows(store_of(), 6)[2]) == ["mnop"]


@pytest.mark.parametrize("use", [Windows, PackedRows])
def test_an_empty_store_is_one_line(use):
  empty = TokenStore(np.zeros(0, np.uint16), np.zeros(1, np.int64))
  with pytest.raises(UserError, match="holds no document"):
    use(empty, 4)
  with pytest.raises(UserError, match="holds no text"):
    TokenStore.build(["", ""], ByteTokenizer())
  with pytest.raises(UserError, match="the test's text holds no text"):
    build_splits(Source([""]), ByteTokenizer())


def test_each_epoch_of_windows_is_another_permutation():
  store = store_of(["abcdefghijklmnopqrstuvwxyz" * 3])
  windows = shuffled_windows(store, 3, 0)
  count = len(Windows(store, 3))
  epochs = [
    [read(windows[e * count + i])[0] for i in range(count)] for e in range(3)
  ]
  plain = sorted(read(Windows(store, 3)[i])[0] for i in range(count))
  assert all(sorted(epoch) == plain for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3
  other = shuffled_windows(store, 3, 1)
  assert [read(other[i])[0] for i in range(count)] not in epochs
  copy = pickle.loads(pickle.dumps(windows))
  assert read(copy[10**9]) == read(windows[10**9])


def test_packed_rows_as_an_example():
  rows = concat_and_split(
    [np.array([5, 6]), np.array([7, 8, 9, 10, 11])], 4, pad_id=1
  )
  assert rows["tokens"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 1]]
  assert rows["segment_ids"].tolist() == [[1, 1, 2, 2], [1, 1, 1, 0]]
  assert rows["positions"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
  assert {row.dtype for row in rows.values()} == {np.dtype(np.int32)}


def test_text_shorter_than_a_row_is_padded():
  rows = PackedRows(store_of(["ab"]), 5)
  assert len(rows) == 1
  assert rows[0]["tokens"].tolist() == [161, 162, 0, 0, 0]
  assert rows[0]["segment_ids"].tolist() == [1, 1, 0, 0, 0]


def test_the_shares_add_up():
  assert sum(text_lib.SPLITS.values()) == 100


def test_documents_may_end_in_a_token():
  plain = build_splits(Source(CORPUS), ByteTokenizer())["train"]
  ended = build_splits(Source(CORPUS), ByteTokenizer(), end=2)["train"]
  assert ended.num_documents == plain.num_documents
  assert ended.num_tokens == plain.num_tokens + plain.num_documents
  for i in range(plain.num_documents):
    start, stop = ended.offsets[i : i + 2]
    first, last = plain.offsets[i : i + 2]
    document = ended.tokens[start:stop]
    np.testing.assert_array_equal(document[:-1], plain.tokens[first:last])
    assert document[-1] == 2


def test_a_large_end_token_takes_32_bits():
  stores = build_splits(Source(CORPUS), ByteTokenizer(), end=1 << 16)
  assert stores["train"].tokens.dtype == np.uint32
