import builtins
import json
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from common.data.tokenizers import ByteTokenizer, make_tokenizer
from common.errors import UserError

TEXT = "def f(x): return x ** 2  # carré ✓"


def make(kind, path=""):
  return make_tokenizer(ConfigDict({"kind": kind, "path": str(path)}))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A trained file of each kind, and one that is neither."""
  folder = tmp_path_factory.mktemp("tokenizers")
  sentencepiece = pytest.importorskip("sentencepiece")
  tokenizers = pytest.importorskip("tokenizers")
  with open(folder / "spm.model", "wb") as out:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([TEXT, "return x", "def g(y): return y"] * 20),
      model_writer=out,
      vocab_size=300,
      hard_vocab_limit=False,
      byte_fallback=True,
      character_coverage=1.0,
      minloglevel=9,
    )
  model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<unk>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator([TEXT] * 3, trainer)
  model.add_tokens(["<|extra|>"])
  model.save(str(folder / "hf.json"))
  (folder / "junk").write_bytes(b"\xff\xfe junk" * 9)
  return {
    "byte": "",
    "sentencepiece": folder / "spm.model",
    "huggingface": folder / "hf.json",
    "junk": folder / "junk",
  }


def test_a_byte_is_64_plus_itself():
  ids = ByteTokenizer().encode("A\nJ")
  assert ids.dtype == np.int32
  assert ids.tolist() == [129, 74, 138]
  assert ByteTokenizer().vocab_size == 320
  assert ByteTokenizer(offset=3).encode("A").tolist() == [68]


def test_decoding_bytes_skips_specials_and_marks_halves():
  byte = ByteTokenizer()
  half = byte.encode("é")[:1]
  ids = [0, 2, *byte.encode("hé"), 320, 419, *half]
  assert byte.decode(ids) == "hé\ufffd"
  assert byte.decode([]) == ""


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "huggingface"])
def test_what_is_encoded_decodes(kind, files):
  tokenizer = make(kind, files[kind])
  ids = tokenizer.encode(TEXT)
  assert ids.dtype == np.int32
  assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
  # SentencePiece joins runs of spaces, as it was trained to.
  assert tokenizer.decode(ids).split() == TEXT.split()
  assert tokenizer.decode([*ids, 10**6]).split() == TEXT.split()
  assert len(tokenizer.encode("")) == 0
  assert tokenizer.fingerprint == make(kind, files[kind]).fingerprint


def test_added_tokens_count_as_vocabulary(files):
  tokenizer = make("huggingface", files["huggingface"])
  (extra,) = tokenizer.encode("<|extra|>")
  assert extra == tokenizer.vocab_size - 1


def test_an_id_that_a_model_would_need_a_million_rows_for(
  files, tmp_path, one_line
):
  content = json.loads(pathlib.Path(files["huggingface"]).read_text())
  vocabulary = content["model"]["vocab"]
  vocabulary[max(vocabulary, key=vocabulary.get)] = 2**31
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  line = one_line(make, "huggingface", str(tmp_path / "tokenizer.json"))
  assert "tokens and the id 2,147,483,648, which a model would" in line


@pytest.mark.parametrize(
  ("kind", "path", "message"),
  [
    ("bytes", "", "tokenizer.kind='bytes': choose byte, sentencepiece"),
    ("sentencepiece", "", "needs its file: set tokenizer.path"),
    ("sentencepiece", "no/file", "'no/file' cannot be read: No such file"),
    ("huggingface", "no/file", "'no/file' cannot be read: No such file"),
    ("sentencepiece", "junk", "is not a SentencePiece model"),
    ("huggingface", "junk", "is not a tokenizer.json"),
  ],
)
def test_bad_settings_are_one_line(kind, path, message, files):
  with pytest.raises(UserError) as caught:
    make(kind, files.get(path, path))
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("kind", "library"),
  [("sentencepiece", "sentencepiece"), ("huggingface", "tokenizers")],
)
def test_a_missing_library_names_the_extra(kind, library, files, monkeypatch):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name.partition(".")[0] == library:
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(UserError, match=r"pip install -e '\.\[tokenizers\]'"):
    make(kind, files[kind])
