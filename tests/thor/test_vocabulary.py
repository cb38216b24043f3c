"""Ids as fairseq has them, text that comes back, and files that are kept."""

import io
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from common.errors import UserError
from thor import vocabulary as module
from thor.cldr import composed_text
from thor.pairs import Pair, Pairs, ParallelText
from thor.vocabulary import (
  BOS,
  EOS,
  PAD,
  UNK,
  Vocabulary,
  open_vocabulary,
  saved_vocabulary,
  train_vocabulary,
  vocabulary_for,
)

LANGUAGES = ("de", "fi", "zh_Hant")
SIZE = 400


@pytest.fixture(scope="module")
def text():
  return composed_text(
    {"languages": LANGUAGES, "rows": 150, "test_rows": 10, "names": 10}
  )


@pytest.fixture(scope="module")
def sentences(text):
  pairs = text.splits["train"]
  return [sentence for pair in pairs for sentence in (pair.source, pair.target)]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def vocabulary(sentences, tmp_path_factory, request):
  path = tmp_path_factory.mktemp("spm") / "a.model"
  return train_vocabulary(
    sentences, SIZE, path, languages=LANGUAGES, kind=request.param
  )


@pytest.fixture(scope="module")
def foreign(sentences, tmp_path_factory):
  """A model with the ids that SentencePiece gives when nobody asks."""
  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter(sentences), model_writer=model, vocab_size=SIZE,
    user_defined_symbols=["<2fi>", "and"], minloglevel=2,
  )  # fmt: skip
  path = tmp_path_factory.mktemp("foreign") / "b.model"
  path.write_bytes(model.getvalue())
  return str(path)


def refused(function, *arguments, **settings):
  """The message, which is one line."""
  with pytest.raises(UserError) as caught:
    function(*arguments, **settings)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def parallel(pairs, languages=()):
  return ParallelText.of("test", {"train": Pairs.of(pairs)}, languages, {})


def test_special_ids_then_tags_then_pieces(vocabulary):
  assert (BOS, PAD, EOS, UNK) == (0, 1, 2, 3)
  assert (vocabulary.bos, vocabulary.pad) == (BOS, PAD)
  assert (vocabulary.eos, vocabulary.unk) == (EOS, UNK)
  assert vocabulary.tags == {"de": 4, "fi": 5, "zh_Hant": 6}
  assert vocabulary.size == SIZE


def test_the_file_holds_the_same_ids(vocabulary):
  """Other programs that read our `.model` see what the checkpoint means."""
  import sentencepiece

  model = sentencepiece.SentencePieceProcessor()
  model.LoadFromSerializedProto(vocabulary.__reduce__()[1][0])
  names = ["<s>", "<pad>", "</s>", "<unk>", "<2de>", "<2fi>", "<2zh_Hant>"]
  assert [model.IdToPiece(i) for i in range(7)] == names
  sentence = "Finland, Peru, or Tonga"
  wanted = [*model.EncodeAsIds(sentence), EOS]
  assert vocabulary.encode(sentence).tolist() == wanted


def test_the_tag_is_first_and_eos_last(vocabulary):
  plain = vocabulary.encode("in 3 days")
  assert plain.dtype == np.int32
  assert plain[-1] == EOS
  assert (plain[:-1] >= 7).all()
  for language, tag in vocabulary.tags.items():
    ids = vocabulary.encode("in 3 days", language)
    assert ids.tolist() == [tag, *plain]
  assert vocabulary.encode("").tolist() == [EOS]
  assert vocabulary.encode("", "fi").tolist() == [5, EOS]


def test_known_text_comes_back(vocabulary, text):
  for pairs in text.splits.values():
    for source, target, language in pairs:
      for sentence in (source, target):
        ids = vocabulary.encode(sentence, language)
        if UNK not in ids:
          assert vocabulary.decode(ids) == sentence
  assert all(
    UNK not in vocabulary.encode(pair.target) for pair in text.splits["train"]
  )


@pytest.mark.parametrize("odd", [" in  3   days ", "  ", "in 3 days ", ""])
def test_blanks_come_back(vocabulary, odd):
  assert vocabulary.decode(vocabulary.encode(odd)) == odd


def test_text_is_not_changed_to_look_alike(tmp_path):
  """No NFKC: ligatures, full-width letters and accents stay what they are."""
  odd = ["ﬁnd", "Ａ１", "e\u0301é", "a\u00a0b", "a\tb", "½ №", "…"]
  made = train_vocabulary(odd, 36, tmp_path / "a.model", kind="bpe")
  for sentence in odd:
    ids = made.encode(sentence)
    assert UNK not in ids
    assert made.decode(ids) == sentence


def test_unknown_characters_are_unk_and_visible(vocabulary):
  ids = vocabulary.encode("in ☃ days")
  assert (ids == UNK).sum() == 1
  assert vocabulary.decode(ids) == "in  ⁇  days"


@pytest.mark.parametrize("written", ["<2de>", "</s>", "<pad>", "<unk>"])
def test_text_cannot_write_special_ids(vocabulary, written):
  ids = vocabulary.encode(f"{written} in 3 days")
  assert not np.isin(ids[:-1], [BOS, PAD, EOS, *vocabulary.tags.values()]).any()


def test_decoding_ends_at_eos_and_leaves_the_rest_out(vocabulary):
  ids = vocabulary.encode("in 3 days", "fi").tolist()
  padded = [BOS, PAD, *ids, PAD, *vocabulary.encode("ago")]
  assert vocabulary.decode(padded) == "in 3 days"
  assert vocabulary.decode(np.array(padded)) == "in 3 days"
  assert vocabulary.decode(ids[:-1]) == "in 3 days"
  assert vocabulary.decode([vocabulary.size, -1, *ids]) == "in 3 days"
  assert vocabulary.decode([]) == vocabulary.decode([EOS]) == ""


def test_an_unknown_language_is_named(vocabulary):
  message = refused(vocabulary.encode, "a", "zh_Hans")
  assert re.search("no language 'zh_Hans'; did you mean 'zh_Hant'", message)
  assert "known: de, fi" in refused(vocabulary.tag, "xx")


def test_no_unicode_is_refused(vocabulary):
  assert "no Unicode text" in refused(vocabulary.encode, "a\ud800b")


def test_a_pickled_vocabulary_is_the_same(vocabulary):
  again = pickle.loads(pickle.dumps(vocabulary))
  assert again.fingerprint == vocabulary.fingerprint
  sentence = "Finland or Peru"
  assert (again.encode(sentence) == vocabulary.encode(sentence)).all()


@pytest.mark.parametrize("kind", module.KINDS)
def test_training_depends_on_the_text_alone(sentences, tmp_path, kind):
  models = []
  for i, order in enumerate([sentences, sentences[::-1], sentences * 2]):
    train_vocabulary(iter(order), 300, tmp_path / f"{i}", kind=kind)
    models.append((tmp_path / f"{i}").read_bytes())
  assert models[0] == models[1] == models[2]
  train_vocabulary(sentences[:-20], 300, tmp_path / "b", kind=kind)
  assert (tmp_path / "b").read_bytes() != models[0]


def test_training_skips_no_sentence(tmp_path):
  """SentencePiece leaves out long ones, and those with its own character."""
  long = "x" * 5000 + " ü"
  made = train_vocabulary(
    [long, "qq ▅ zz", "aa"], 12, tmp_path / "a.model", kind="bpe"
  )
  assert UNK not in made.encode("ü qq zz aa x")


def test_training_is_quiet(sentences, tmp_path, capfd):
  train_vocabulary(sentences, 300, tmp_path / "a.model")
  assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"size": 10**5}, r"vocabulary\.size=100000 is more .* at most \d+$"),
    ({"size": 9}, r"vocabulary\.size=9 is too small .* at least \d+, or"),
    ({"size": 4}, r"vocabulary\.size=4: the special ids and tags alone are 4"),
    ({"kind": "word"}, r"vocabulary\.kind='word': choose unigram or bpe"),
    ({"coverage": 2}, r"vocabulary\.coverage=2 must be in"),
    ({"languages": ("d e",)}, r"'d e' is no language tag"),
    ({"sentences": ["", " "]}, "needs text, and there is none"),
    ({"path": "/dev/null/a.model"}, r"cannot write /dev/null/a\.model"),
  ],
)
def test_bad_settings(sentences, tmp_path, settings, message):
  given = {"sentences": sentences, "size": 300, "path": tmp_path / "a.model"}
  assert re.search(message, refused(train_vocabulary, **given | settings))


def test_sizes_that_errors_name_are_possible(sentences, tmp_path):
  for size in (9, 10**5):
    message = refused(train_vocabulary, sentences, size, tmp_path / "a")
    (bound,) = map(int, re.findall(r"at (?:most|least) (\d+)", message))
    assert train_vocabulary(sentences, bound, tmp_path / "a").size == bound


def test_coverage_below_one_drops_rare_characters(tmp_path):
  text = ["ab ba ab abba"] * 1 + [f"{'ab' * i}" for i in range(2, 60)] + ["ü"]
  settings = {"size": 20, "path": tmp_path / "a", "kind": "bpe"}
  assert UNK not in train_vocabulary(text, **settings).encode("ü")
  assert UNK in train_vocabulary(text, coverage=0.99, **settings).encode("ü")


def test_a_foreign_model_gets_our_ids(foreign, sentences):
  made = open_vocabulary(foreign, ("de", "fi"))
  assert made.tags == {"de": 4, "fi": 5}
  # Its own <unk>, <s>, </s> and <2fi> are ours; its other pieces stay.
  assert made.size == 6 + SIZE - 4
  ids = made.encode("Peru or Tonga", "fi")
  assert (ids[0], ids[-1]) == (5, EOS)
  assert (ids[1:-1] > 5).all()
  known = [s for s in sentences if UNK not in made.encode(s)]
  assert len(known) > len(sentences) / 2
  assert all(made.decode(made.encode(s)) == s for s in known[:100])
  assert (made.encode("☃") == UNK).any()
  assert open_vocabulary(foreign).tags == {}
  assert "it has none" in refused(open_vocabulary(foreign).encode, "a", "de")


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_what_is_no_model_is_refused(tmp_path, content):
  path = tmp_path / "a.model"
  if content is not None:
    path.write_bytes(content)
  message = refused(open_vocabulary, path)
  assert message.startswith(f"vocabulary.path={str(path)!r}")
  message = refused(open_vocabulary, path, key="")
  assert message.startswith(str(path))


def test_a_run_trains_once(text, tmp_path, monkeypatch):
  config = {"size": SIZE, "path": ""}
  first = vocabulary_for(config, text, tmp_path / "run")
  with monkeypatch.context() as patch:
    patch.setattr(module, "_trained", None)  # Would fail if it was called.
    again = vocabulary_for(config, text, tmp_path / "run")
  assert again.fingerprint == first.fingerprint
  assert again.languages == LANGUAGES
  assert len(list((tmp_path / "run").iterdir())) == 1
  facts = text.facts | first.facts()
  saved = saved_vocabulary(tmp_path / "run", facts)
  assert saved.fingerprint == first.fingerprint
  (file,) = (tmp_path / "run").iterdir()
  file.write_bytes(b"half")
  message = refused(saved_vocabulary, tmp_path / "run", facts)
  assert message == f"{file}: no SentencePiece model"


@pytest.mark.parametrize(
  "change", [{"size": 390}, {"kind": "bpe"}, {"coverage": 0.99}, {"seed": 1}]
)
def test_another_text_or_setting_is_another_model(text, tmp_path, change):
  config = {"size": SIZE}
  first = vocabulary_for(config, text, tmp_path)
  if "seed" in change:
    text = composed_text(
      {"languages": LANGUAGES, "rows": 150, "names": 10} | change
    )
  other = vocabulary_for(config | change, text, tmp_path)
  assert other.fingerprint != first.fingerprint
  assert len(list(tmp_path.iterdir())) == 2
  # The run that has the first one still finds it.
  facts = first.facts()
  assert saved_vocabulary(tmp_path, facts).fingerprint == first.fingerprint


def test_a_damaged_file_is_made_again(text, tmp_path, caplog):
  first = vocabulary_for({"size": SIZE}, text, tmp_path)
  (file,) = tmp_path.iterdir()
  file.write_bytes(b"half")
  again = vocabulary_for({"size": SIZE}, text, tmp_path)
  assert "is damaged and trained again" in caplog.text
  assert again.fingerprint == first.fingerprint
  assert open_vocabulary(file, LANGUAGES).fingerprint == first.fingerprint


def test_a_foreign_model_is_kept_with_the_run(foreign, text, tmp_path):
  made = vocabulary_for({"path": foreign}, text, tmp_path)
  assert made.languages == LANGUAGES
  saved = saved_vocabulary(tmp_path, made.facts())
  assert saved.fingerprint == made.fingerprint
  assert "lacks the run's vocabulary" in refused(
    saved_vocabulary, tmp_path, {"vocabulary": "x", "languages": ()}
  )


def test_a_large_text_is_sampled(tmp_path):
  pairs = [Pair(f"a{i} b", f"c{i} d") for i in range(2000)]
  found = set(module._sample(parallel(pairs), 1000))
  assert 850 < len(found) < 1150
  assert found == set(module._sample(parallel(pairs[::-1]), 1000))
  assert len(set(module._sample(parallel(pairs), 4000))) == 4000


def test_the_library_is_optional(text, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  message = refused(vocabulary_for, {"size": SIZE}, text, tmp_path)
  assert "pip install -e '.[translation]'" in message


def run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "thor.vocabulary", *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command(sentences, tmp_path):
  (tmp_path / "a.txt").write_text("\n".join(sentences))
  output = tmp_path / "new" / "a.model"
  arguments = ["--input", tmp_path / "*.txt", "--output", output]
  done = run(*arguments, "--size", 300, "--languages", "de", "fi")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == f"{output}: 300 ids\n"
  assert open_vocabulary(output, ("de", "fi")).size == 300
  bad = run(*arguments, "--size", 3)
  assert bad.returncode == 2
  assert re.fullmatch(r"error: --size=3: .*\n", bad.stderr)


@pytest.mark.parametrize(
  "settings",
  [{"size": 10**5}, {"size": 9}, {"size": 4}, {"kind": "x"}, {"coverage": 2}],
)
def test_the_commands_errors_name_its_flags(sentences, tmp_path, settings):
  given = {"sentences": sentences, "size": 300, "path": tmp_path / "a.model"}
  message = refused(train_vocabulary, **given | settings, prefix="--")
  ((name, value),) = settings.items()
  assert message.startswith(f"--{name}={value!r}")
  assert "vocabulary." not in message


def test_saved_models_are_whole_or_absent(vocabulary, tmp_path, monkeypatch):
  """A process that dies while it writes leaves the old file."""
  path = tmp_path / "a.model"
  path.write_bytes(b"old")

  def dies(*arguments):
    raise OSError("killed")

  with monkeypatch.context() as patch:
    patch.setattr(module.files, "replace", dies)
    assert "killed" in refused(vocabulary.save, path)
  assert path.read_bytes() == b"old"
  vocabulary.save(path)
  again = open_vocabulary(path, LANGUAGES)
  assert isinstance(again, Vocabulary)
  assert again.fingerprint == vocabulary.fingerprint
