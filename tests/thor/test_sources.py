"""Every kind of file gives the same pairs, or one line that says why not."""

import json
import logging
import pickle
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from common.errors import UserError
from thor.pairs import Pair, Pairs
from thor.sources import load_parallel, read_lines

PAIRS = [("one", "eins"), ("two\u2028three", "zwei drei"), ("four", "vier")]
TAGGED = [Pair(*pair, "de") for pair in PAIRS]


def write(path, lines, end="\n"):
  path.write_bytes("".join(line + end for line in lines).encode())
  return str(path)


def text_config(tmp_path, sources, targets, **settings):
  files = [
    write(tmp_path / "a.en", sources),
    write(tmp_path / "a.de", targets),
  ]
  splits = {"train": files}
  return {"kind": "text", "splits": splits, "languages": ("de",)} | settings


def tsv_config(tmp_path, lines, **settings):
  splits = {"train": write(tmp_path / "a.tsv", lines)}
  return {"kind": "tsv", "splits": splits, "languages": ("de",)} | settings


def jsonl_config(tmp_path, lines, **settings):
  return {
    "kind": "jsonl",
    "splits": {"train": write(tmp_path / "a.jsonl", lines)},
    "languages": ("de",),
    "source_key": "en",
    "target_key": "xx",
  } | settings


def records(pairs):
  return [json.dumps({"en": pair[0], "xx": pair[1]}) for pair in pairs]


def refused(config):
  """The message, which is one line."""
  with pytest.raises(UserError) as caught:
    load_parallel(config)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def make(kind, tmp_path, pairs, **settings):
  if kind == "text":
    return text_config(tmp_path, *zip(*pairs), **settings)
  if kind == "tsv":
    return tsv_config(tmp_path, map("\t".join, pairs), **settings)
  return jsonl_config(tmp_path, records(pairs), **settings)


def test_pairs_are_a_sequence():
  pairs = [Pair("a é", "b", "de"), Pair("", "\U0001f600"), Pair("c", "", "de")]
  packed = Pairs.of(iter(pairs))
  assert list(packed) == pairs
  assert packed[-1] == pairs[-1]
  assert packed[1:] == pairs[1:]
  assert list(pickle.loads(pickle.dumps(packed))) == pairs
  with pytest.raises(IndexError, match="pair 3 of 3"):
    packed[3]


def test_each_change_of_pairs_changes_the_fingerprint():
  texts = [
    [("ab", "c", "de")], [("a", "bc", "de")], [("ab", "c", "fi")],
    [("ab", "c", "de")] * 2, [],
  ]  # fmt: skip
  prints = {Pairs.of(Pair(*row) for row in rows).fingerprint for rows in texts}
  assert len(prints) == len(texts)


@pytest.mark.parametrize("kind", ["text", "tsv", "jsonl"])
@pytest.mark.parametrize("tag", ["de", ""])
def test_each_kind_gives_the_pairs(tmp_path, kind, tag):
  languages = (tag,) if tag else ()
  text = load_parallel(make(kind, tmp_path, PAIRS, languages=languages))
  assert list(text.splits["train"]) == [Pair(*pair, tag) for pair in PAIRS]
  assert text.languages == languages
  assert text.facts["source"] == kind
  assert text.facts["train_pairs"] == 3


def test_all_kinds_have_one_fingerprint(tmp_path):
  kinds = ("text", "tsv", "jsonl")
  texts = [load_parallel(make(kind, tmp_path, PAIRS)) for kind in kinds]
  assert len({text.fingerprint for text in texts}) == 1


def test_lines_end_at_line_feeds_only(tmp_path):
  path = tmp_path / "a"
  path.write_bytes("\ufeffa\r\nb\x0cc\u2028d\r e\nf".encode())
  assert list(read_lines(str(path))) == [
    (1, "a"), (2, "b\x0cc\u2028d\r e"), (3, "f"),
  ]  # fmt: skip


def test_patterns_stand_for_files_in_order(tmp_path):
  for i, (source, target) in enumerate(PAIRS):
    write(tmp_path / f"{i}.en", [source])
    write(tmp_path / f"{i}.de", [target])
  names = [f"{tmp_path}/*.en", f"{tmp_path}/*.de"]
  config = {"kind": "text", "splits": {"train": names}, "languages": ("de",)}
  assert list(load_parallel(config).splits["train"]) == TAGGED
  (tmp_path / "2.de").unlink()
  assert "for 2" in refused(config)


@pytest.mark.parametrize("shape", ["placeholder", "mapping"])
def test_a_file_for_each_language(tmp_path, shape):
  for tag in ("de", "fi"):
    write(tmp_path / f"{tag}.tsv", [f"one\t1 {tag}"])
  files = {tag: str(tmp_path / f"{tag}.tsv") for tag in ("de", "fi")}
  what = f"{tmp_path}/{{language}}.tsv" if shape == "placeholder" else files
  text = load_parallel(
    {"kind": "tsv", "splits": {"train": what}, "languages": ("de", "fi")}
  )
  expected = [Pair("one", "1 de", "de"), Pair("one", "1 fi", "fi")]
  assert list(text.splits["train"]) == expected


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_rows_may_name_their_language(tmp_path, kind):
  pairs = [Pair("one", "eins", "de"), Pair("one", "yksi", "fi")]
  if kind == "tsv":
    config = tsv_config(tmp_path, map("\t".join, pairs), languages=())
  else:
    lines = [
      json.dumps({"en": source, "xx": target, "tag": tag})
      for source, target, tag in pairs
    ]
    config = jsonl_config(tmp_path, lines, languages=(), language_key="tag")
  text = load_parallel(config)
  assert list(text.splits["train"]) == pairs
  assert text.languages == ("de", "fi")
  message = refused(config | {"languages": ("de", "sv")})
  assert re.search(r"a\.\w+:2: unknown language 'fi'", message)


@pytest.mark.parametrize("short", ["a.en", "a.de"])
def test_files_of_unequal_length_are_refused(tmp_path, short):
  sides = {"a.en": ["a", "b", "c"], "a.de": ["x", "y", "z"]}
  sides[short].pop()
  message = refused(text_config(tmp_path, *sides.values()))
  counts = [len(lines) for lines in sides.values()]
  assert re.search(rf"a\.en has {counts[0]} lines", message)
  assert re.search(rf"a\.de {counts[1]}:", message)


@pytest.mark.parametrize("kind", ["text", "tsv", "jsonl"])
def test_what_is_not_utf8_is_refused(tmp_path, kind):
  config = make(kind, tmp_path, PAIRS)
  (file,) = tmp_path.glob("a.de" if kind == "text" else "a.*")
  file.write_bytes(file.read_bytes().replace(b"vier", b"vi\xe9r"))
  assert re.search(rf"{file.name}:3: byte \d+ is not UTF-8", refused(config))


EMPTY = [*PAIRS[:1], ("two", "  "), *PAIRS[1:], ("", "fünf")]


@pytest.mark.parametrize(
  ("kind", "files"),
  [
    ("text", ("a.de", "a.en")),
    ("tsv", ("a.tsv", "a.tsv")),
    ("jsonl", ("a.jsonl", "a.jsonl")),
  ],
)
def test_empty_sentences(tmp_path, caplog, kind, files):
  message = refused(make(kind, tmp_path, EMPTY))
  assert "2 empty sentences" in message
  assert f"{files[0]}:2, " in message
  assert f"{files[1]}:5)" in message
  with caplog.at_level(logging.WARNING):
    text = load_parallel(make(kind, tmp_path, EMPTY, empty="skip"))
  assert list(text.splits["train"]) == TAGGED
  assert text.facts["train_skipped_empty"] == 2
  assert re.search(r"left out: 2 pairs .* empty", caplog.text)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("languages", [(), ("de",), ("fi", "de")])
def test_blank_lines_of_tsv_are_empty_pairs(tmp_path, place, languages):
  lines = ["\t".join(pair) for pair in TAGGED]
  lines.insert(place, "")
  config = tsv_config(tmp_path, lines, languages=languages)
  assert f"a.tsv:{place + 1})" in refused(config)
  text = load_parallel(config | {"empty": "skip"})
  assert list(text.splits["train"]) == TAGGED
  assert text.facts["train_skipped_empty"] == 1


def test_blank_lines_of_jsonl_are_empty_pairs(tmp_path):
  config = jsonl_config(
    tmp_path, [records(TAGGED)[0], "", *records(TAGGED)[1:]]
  )
  assert "a.jsonl:2)" in refused(config)
  text = load_parallel(config | {"empty": "skip"})
  assert text.facts["train_skipped_empty"] == 1


def test_nothing_left_is_refused(tmp_path):
  config = tsv_config(tmp_path, ["", ""], empty="skip")
  assert re.search(r"splits\.train holds no pair.*a\.tsv:1", refused(config))


def test_limits_leave_pairs_out_of_train_only(tmp_path):
  lines = ["a\tb", "a b c\td", "a b c d e\ta b c d e"]
  config = tsv_config(tmp_path, lines, max_ratio=2, max_length=4)
  config["splits"]["valid"] = config["splits"]["train"]
  text = load_parallel(config)
  assert list(text.splits["train"]) == [Pair("a", "b", "de")]
  assert len(text.splits["valid"]) == 3
  assert text.facts["train_skipped_too_long"] == 1
  assert text.facts["train_skipped_of_unequal_length"] == 1


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("no tabs here", r"a\.tsv:2: no tab"),
    ("a\tb\tde\tc", r"a\.tsv:2: 4 columns"),
    ("a\tb\tfi", r"a\.tsv:2: unknown language 'fi'"),
  ],
)
def test_bad_tsv_lines(tmp_path, line, message):
  config = tsv_config(tmp_path, ["one\teins", line])
  assert re.search(message, refused(config))


def test_tsv_rows_of_several_languages_must_say_which(tmp_path):
  config = tsv_config(tmp_path, ["one\teins"], languages=("de", "fi"))
  assert re.search(r"a\.tsv:1 does not say", refused(config))


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"en": "a"}', r"a\.jsonl:2: no key 'xx'; its keys: en"),
    ('{"xx": "a"}', r"a\.jsonl:2: no key 'en'"),
    ('{"en": "a", "xx": 3}', r"a\.jsonl:2: 'xx' is no text but int"),
    ('{"en": "a", "xx": "\\ud800"}', r"a\.jsonl:2: .*lone surrogate"),
    ("[1]", r"a\.jsonl:2: not a JSON object"),
    ("{oops", r"a\.jsonl:2: not JSON"),
  ],
)
def test_bad_json_lines(tmp_path, line, message):
  config = jsonl_config(tmp_path, ['{"en": "one", "xx": "eins"}', line])
  assert re.search(message, refused(config))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"kind": "csv"}, r"data\.source\.kind='csv': choose"),
    ({"kind": None}, r"data\.source\.kind=None: choose"),
    ({"splits": {}}, r"data\.source\.splits\.train is empty"),
    ({"splits": {"train": 3}}, r"data\.source\.splits\.train=\(3,\)"),
    ({"splits": {"train": "none.tsv"}}, r"splits\.train='none\.tsv': no such"),
    ({"splits": {"train": {"sv": "a"}}}, r"splits\.train.* language 'sv'"),
    ({"empty": "keep"}, r"data\.source\.empty='keep': choose"),
    ({"max_ratio": 0.5}, r"data\.source\.max_ratio=0\.5"),
    ({"max_length": -1}, r"data\.source\.max_length=-1"),
    ({"languages": ("d e",)}, r"data\.source\.languages.*'d e'"),
    ({"kind": "jsonl"}, r"data\.source\.source_key"),
    ({"kind": "text"}, r"splits\.train=.*give two files"),
  ],
)
def test_bad_settings(tmp_path, settings, message):
  config = tsv_config(tmp_path, ["one\teins"]) | settings
  assert re.search(message, refused(config))


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    (["a\tb", "c\td\tde"], r"a\.tsv:2 names the language 'de', unlike others"),
    (["a\tb\tde", "c\td\t"], r"a\.tsv:2 names no language, unlike others"),
    (["a\tb\td e"], r"a\.tsv:1: 'd e' is no language tag"),
  ],
)
def test_all_rows_name_their_language_or_none(tmp_path, lines, message):
  assert re.search(message, refused(tsv_config(tmp_path, lines, languages=())))


def test_other_splits_have_the_languages_of_train(tmp_path):
  config = tsv_config(tmp_path, ["a\tb\tde", "c\td\tfi"], languages=())
  valid = write(tmp_path / "valid.tsv", ["a\tb\tfr"])
  config["splits"] = {"valid": valid} | config["splits"]
  message = refused(config)
  assert re.search(
    r"valid\.tsv:1: unknown language 'fr'; known: de, fi", message
  )


def test_a_language_without_training_pairs_is_named(tmp_path, caplog):
  load_parallel(tsv_config(tmp_path, ["a\tb\tde"], languages=("de", "fi")))
  assert "splits.train: no pair is in the language fi" in caplog.text


@pytest.mark.parametrize(
  ("kind", "names"), [("text", ("a.en", "a.de")), ("tsv", ("a.*",))]
)
def test_config_dicts_will_do(tmp_path, kind, names):
  splits = {"train": (), "valid": ()}
  config = ConfigDict(make(kind, tmp_path, PAIRS) | {"splits": splits})
  config.splits.train = tuple(f"{tmp_path}/{name}" for name in names)
  text = load_parallel(config)
  assert list(text.splits) == ["train"]
  assert list(text.splits["train"]) == TAGGED


# In another process, where TFDS's own warnings are no errors and no other test
# can have imported TensorFlow.
DATA_SETS = """
import sys
import tensorflow_datasets as tfds
from thor.sources import load_parallel

class Maker(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  VERSION = tfds.core.Version("1.0.0")
  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=self.features(), disable_shuffling=True)
  def _split_generators(self, manager):
    return {"train": self._generate_examples()}
  def _generate_examples(self):
    yield from enumerate(self.rows())

class Two(Maker):
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=t) for t in ("de", "fi")]
  def features(self):
    return tfds.features.Translation(languages=["en", self.tag])
  def rows(self):
    return ({"en": f"one {i}", self.tag: f"é {self.tag} {i}"} for i in (1, 2))
  @property
  def tag(self):
    return self.builder_config.name

class Talks(Maker):
  def features(self):
    return tfds.features.FeaturesDict({
      "name": tfds.features.Text(),
      "translations": tfds.features.TranslationVariableLanguages()})
  def rows(self):
    yield {"name": "x", "translations": {"en": "one", "de": "é"}}
    yield {"name": "y", "translations": {"en": "two", "fi": "ä", "de": "ö"}}

where = {"data_dir": sys.argv[1], "file_format": "array_record"}
for made in (Two(config="de", **where), Two(config="fi", **where),
             Talks(**where)):
  made.download_and_prepare()
config = {
  "kind": "tfds", "name": "two/{language}", "languages": ("de", "fi"),
  "splits": {"train": "train"}, "source_key": "en",
  "target_key": "{language}", "data_dir": sys.argv[1]}
found = [tuple(pair) for pair in load_parallel(config).splits["train"]]
assert found == [
  (f"one {i}", f"é {tag} {i}", tag) for tag in ("de", "fi") for i in (1, 2)
], found
talks = config | {"name": "talks", "empty": "skip"}
text = load_parallel(talks)
assert [tuple(pair) for pair in text.splits["train"]] == [
  ("one", "é", "de"), ("two", "ö", "de"), ("two", "ä", "fi")]
assert text.facts["train_skipped_empty"] == 1
for bad, message in (
  (config | {"splits": {"train": "dev"}}, "splits.train: data.source.split"),
  (config | {"splits": {"train": ("a", "b")}}, "give one split of"),
  (config | {"target_key": "sv"}, "two/de[train]: record 0: no key 'sv'"),
  (config | {"name": "two/de", "target_key": "de"}, "train does not say"),
  (config | {"name": ""}, "needs data.source.name"),
  (talks | {"empty": "error"}, "1 empty sentence (talks[train]: record 0)"),
):
  try:
    load_parallel(bad)
  except ValueError as error:
    assert message in str(error) and "\\n" not in str(error), error
  else:
    raise AssertionError(message)
assert tfds.builder("wmt16_translate/de-en", **where)
assert "tensorflow" not in sys.modules
print("equal")
"""


def test_tfds_data_sets_without_tensorflow(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", DATA_SETS, str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.endswith("equal\n")


def test_the_embedded_text_is_a_kind():
  text = load_parallel(
    {"kind": "cldr", "rows": 200, "test_rows": 5, "languages": ("de",)}
  )
  assert text.facts["source"] == "cldr"
  assert len(text.splits["train"]) == 200
