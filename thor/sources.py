"""Sentence pairs for translation, chosen by a config.

A source is English or whatever the model translates from; a pair names the
language of its target by a tag such as `de`, so that one model can serve
several. Every kind of data has one shape here: a `ParallelText`.

    text = load_parallel(config.data.source)
    text.splits["train"][0]    # Pair("in 3 days", "in 3 Tagen", "de")

Nothing is left out in silence: what is skipped is counted, logged, and stands
in `ParallelText.facts`.
"""

import importlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from common.config import did_you_mean
from common.data.sources import (
  decode,
  encodable,
  find_files,
  in_batches,
  json_record,
  record_source,
  text_value,
)
from common.errors import UserError
from thor import cldr
from thor.pairs import Pair, Pairs, ParallelText, check_languages, check_tag

log = logging.getLogger(__name__)

_KEY = "data.source"
_PLACEHOLDER = "{language}"
# Places that a message names of those it counts.
_SHOWN = 5
# Keys of TFDS's TranslationVariableLanguages.
_VARIABLE = {"language", "translation"}


def load_parallel(cfg: Any) -> ParallelText:
  """Reads the data set that a config names.

  Args:
    cfg: `kind`, and what that kind needs. For all kinds but `cldr`:
      languages: tags of the targets; () for one pair of languages without a
        tag, and for files that name it themselves.
      splits: split -> what it reads; `train` is needed. A split may also be a
        mapping language -> what it reads, and names may hold `{language}`,
        which stands for each of `languages` in turn.
      empty: `error` refuses empty sentences, `skip` leaves out their pairs.
      max_ratio: leaves out of `train` pairs whose longer side has more than so
        many times the words of the other (1.5 for IWSLT); 0: none.
      follow_links: whether patterns find links too that lead out of their
        folder; else these are refused.
      max_length: leaves out of `train` pairs with a side of more words (175
        for IWSLT); 0: none. Words are what blanks separate.
      The kinds are
      cldr: embedded text; see `thor.cldr.composed_text`.
      text: a split is two files, source and target; line i of one translates
        line i of the other. Patterns with `*` stand for equally many files.
      tsv: a split is files, or patterns, with lines source TAB target, or
        source TAB target TAB language.
      jsonl: a split is files, or patterns, with a JSON object a line, and
        `source_key`, `target_key`, [`language_key`] say what stands where.
      tfds: a split is a split of the prepared TFDS data set `name`, such as
        `wmt16_translate/de-en`; `source_key`, `target_key` are its languages;
        [`data_dir`]. `name` and `target_key` may hold `{language}`.

  Raises:
    UserError: for unknown settings, data that is missing, and text that does
      not go together; it names file and line.
  """
  kind = cfg.get("kind")
  if kind == "cldr":
    return cldr.composed_text(cfg)
  if kind not in _READERS:
    raise UserError(
      f"{_KEY}.kind={kind!r}: choose one of cldr, {', '.join(_READERS)}"
    )
  return _read_splits(cfg)


def _read_splits(cfg: Any) -> ParallelText:
  kind = cfg.get("kind")
  given = {s: what for s, what in cfg.get("splits", {}).items() if what}
  if "train" not in given:
    raise UserError(f"{_KEY}.splits.train is empty: name what to train on")
  reader = _SplitReader(cfg)
  names = sorted(given, key=lambda split: split != "train")
  splits = {split: reader.read(split, given[split]) for split in names}
  name = cfg.get("name", "") if kind == "tfds" else f"{_KEY}.splits"
  facts = {"source": kind, **reader.facts}
  return ParallelText.of(name, splits, reader.tags, facts)


class _Part(NamedTuple):
  """Pairs from one place.

  Attributes:
    source, target: what stands before the numbers of sentences, for messages.
    rows: yields (number, pair).
  """

  source: str
  target: str
  rows: Iterator[tuple[int, Pair]]


class _SplitReader:
  """Reads splits, training's first, and holds all to the same languages."""

  def __init__(self, cfg: Any):
    self._cfg = cfg
    self._open = _READERS[cfg.get("kind")]
    self._known = check_languages(cfg.get("languages", ()))
    self._found: dict[str, None] = {}
    self._empty = cfg.get("empty", "error")
    self._ratio = cfg.get("max_ratio", 0)
    self._length = cfg.get("max_length", 0)
    self.facts: dict[str, int] = {}
    if self._empty not in ("error", "skip"):
      raise UserError(f"{_KEY}.empty={self._empty!r}: choose 'error' or 'skip'")
    if self._ratio and not self._ratio >= 1:
      raise UserError(
        f"{_KEY}.max_ratio={self._ratio}: give a number from 1, or 0 for none"
      )
    if self._length < 0:
      raise UserError(
        f"{_KEY}.max_length={self._length}: give a number of words, 0: no limit"
      )

  @property
  def tags(self) -> tuple[str, ...]:
    """The languages of the config; those in the training text if it has none.

    Pairs without a tag are of no language.
    """
    return self._known or tuple(sorted(filter(None, self._found)))

  def read(self, split: str, what: Any) -> Pairs:
    """The pairs of a split that are not left out."""
    key = f"{_KEY}.splits.{split}"
    skipped: dict[str, list[str]] = {}
    parts = self._open(self._cfg, key, what, self.tags)
    pairs = Pairs.of(self._kept(split, parts, skipped))
    if skipped.get("empty") and self._empty == "error":
      raise UserError(
        f"{key}: {_count(skipped['empty'], 'empty sentence')}: mend them, or "
        f"leave their pairs out with {_KEY}.empty='skip'"
      )
    left_out = "; ".join(
      f"{_count(places, 'pair')} {reason}" for reason, places in skipped.items()
    )
    if not len(pairs):
      raise UserError(f"{key} holds no pair (left out: {left_out or 'none'})")
    if skipped:
      log.warning("%s: %d pairs; left out: %s", key, len(pairs), left_out)
    silent = [tag for tag in self._known if tag not in pairs.languages]
    if silent and split == "train":
      log.warning("%s: no pair is in the language %s", key, ", ".join(silent))
    for reason, places in skipped.items():
      self.facts[f"{split}_skipped_{reason.replace(' ', '_')}"] = len(places)
    return pairs

  def _kept(
    self, split: str, parts: Iterable[_Part], skipped: dict[str, list[str]]
  ) -> Iterator[Pair]:
    is_train = split == "train"
    for part in parts:
      for number, pair in part.rows:
        reason = self._reason(pair, is_train)
        # An empty line has no column to name its language in.
        if reason != "empty":
          place = f"{part.target}{number}"
          self._check_language(place, pair.language, is_train)
        if reason is None:
          yield pair
          continue
        side = part.target if pair.source.strip() else part.source
        skipped.setdefault(reason, []).append(f"{side}{number}")

  def _check_language(self, place: str, tag: str, is_train: bool) -> None:
    known = self._known or tuple(self._found)
    if tag in known:
      return
    is_open = is_train and not self._known
    if is_open and (not known or (tag and "" not in known)):
      if tag:
        check_tag(tag, place)
      self._found[tag] = None
      return
    if tag and any(known):
      raise UserError(
        f"{place}: unknown language {tag!r}{did_you_mean(tag, known)}"
      )
    raise UserError(
      f"{place} names {f'the language {tag!r}' if tag else 'no language'}, "
      "unlike others: name the language of every target or of none"
    )

  def _reason(self, pair: Pair, is_train: bool) -> str | None:
    """Why a pair is left out; None if it is not.

    As Moses' `clean-corpus-n.perl`, which makes the IWSLT text of fairseq.
    """
    if not pair.source.strip() or not pair.target.strip():
      return "empty"
    if not is_train or not (self._ratio or self._length):
      return None
    counts = sorted((len(pair.source.split()), len(pair.target.split())))
    if self._length and counts[1] > self._length:
      return "too long"
    if self._ratio and counts[1] > self._ratio * counts[0]:
      return "of unequal length"
    return None


def _count(places: Sequence[str], noun: str) -> str:
  shown = ", ".join(places[:_SHOWN]) + (", …" if places[_SHOWN:] else "")
  return f"{len(places):,} {noun}{'s' if len(places) > 1 else ''} ({shown})"


def _by_language(
  key: str, what: Any, languages: Sequence[str]
) -> Iterator[tuple[str, str | None, tuple[str, ...]]]:
  """Yields (key, language, names) for each language that has names of its own.

  The language is None where the names leave open which of several it is.
  """
  if hasattr(what, "items"):
    for language, names in what.items():
      if languages and language not in languages:
        raise UserError(
          f"{key}: unknown language {language!r}"
          f"{did_you_mean(language, languages)}"
        )
      yield f"{key}.{language}", language, _strings(key, names)
    return
  names = _strings(key, what)
  if any(_PLACEHOLDER in name for name in names):
    if not languages:
      raise UserError(
        f"{key} holds {_PLACEHOLDER}: list the targets in {_KEY}.languages"
      )
    for tag in languages:
      yield key, tag, tuple(name.replace(_PLACEHOLDER, tag) for name in names)
  elif len(languages) > 1:
    yield key, None, names
  else:
    yield key, "".join(languages), names


def _strings(key: str, names: Any) -> tuple[str, ...]:
  if isinstance(names, str) or not isinstance(names, Iterable):
    names = (names,)
  names = tuple(names)
  for name in names:
    if not isinstance(name, str) or not name:
      raise UserError(f"{key}={names!r}: give names, not {name!r}")
  return names


def _told(key: str, language: str | None, languages: Sequence[str]) -> str:
  """The language; raises where it is left open."""
  if language is None:
    raise UserError(
      f"{key} does not say whether its targets are {', '.join(languages)}: "
      f"write {_PLACEHOLDER} in the name, or one entry for each language"
    )
  return language


def read_lines(file: str) -> Iterator[tuple[int, str]]:
  """Yields (number, line) of a text file; only line feeds end a line.

  Not what Python takes for ends, such as U+2028 and form feeds: other tools
  count lines without them. A carriage return before the feed goes away, and
  so does a byte order mark.

  Raises:
    UserError: for a file that cannot be read, or a line that is not UTF-8.
  """
  try:
    with open(file, "rb") as lines:
      for i, line in enumerate(lines, 1):
        if i == 1:
          line = line.removeprefix(b"\xef\xbb\xbf")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        yield i, decode(line, f"{file}:{i}")
  except OSError as error:
    raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _found(cfg: Any, names: str | Sequence[str], key: str) -> list[str]:
  follow_links = cfg.get("follow_links", False)
  return find_files(names, key=key, follow_links=follow_links)


def _text_parts(
  cfg: Any, key: str, what: Any, languages: Sequence[str]
) -> Iterator[_Part]:
  for entry, language, names in _by_language(key, what, languages):
    if len(names) != 2:
      raise UserError(f"{entry}={names!r}: give two files, source and target")
    language = _told(entry, language, languages)
    sources, targets = (_found(cfg, name, entry) for name in names)
    if len(sources) != len(targets):
      raise UserError(
        f"{entry}: {names[0]!r} stands for {len(sources)} files and "
        f"{names[1]!r} for {len(targets)}: each source needs its target"
      )
    for source, target in zip(sources, targets):
      rows = _aligned(source, target, language)
      yield _Part(f"{source}:", f"{target}:", rows)


def _aligned(
  source: str, target: str, language: str
) -> Iterator[tuple[int, Pair]]:
  both = itertools.zip_longest(read_lines(source), read_lines(target))
  for left, right in both:
    if left is None or right is None:
      lengths = [sum(1 for _ in read_lines(file)) for file in (source, target)]
      raise UserError(
        f"{source} has {lengths[0]:,} lines and {target} {lengths[1]:,}: line "
        "i of one must translate line i of the other: find what is missing"
      )
    yield left[0], Pair(left[1], right[1], language)


def _tsv_parts(
  cfg: Any, key: str, what: Any, languages: Sequence[str]
) -> Iterator[_Part]:
  for entry, language, names in _by_language(key, what, languages):
    for file in _found(cfg, names, entry):
      yield _Part(f"{file}:", f"{file}:", _tsv_rows(file, language, languages))


def _tsv_rows(
  file: str, language: str | None, languages: Sequence[str]
) -> Iterator[tuple[int, Pair]]:
  for i, line in read_lines(file):
    columns = line.split("\t")
    if len(columns) == 3:
      yield i, Pair(*columns)
    elif len(columns) == 2:
      tag = _told(f"{file}:{i}", language, languages)
      yield i, Pair(columns[0], columns[1], tag)
    elif not line.strip():
      yield i, Pair("", "", language or "".join(languages[:1]))
    else:
      found = "no tab" if len(columns) == 1 else f"{len(columns)} columns"
      raise UserError(
        f"{file}:{i}: {found}: write source TAB target, or source TAB target "
        "TAB language"
      )


def _jsonl_parts(
  cfg: Any, key: str, what: Any, languages: Sequence[str]
) -> Iterator[_Part]:
  for entry, language, names in _by_language(key, what, languages):
    for file in _found(cfg, names, entry):
      rows = _json_rows(cfg, file, language, languages)
      yield _Part(f"{file}:", f"{file}:", rows)


def _json_rows(
  cfg: Any, file: str, language: str | None, languages: Sequence[str]
) -> Iterator[tuple[int, Pair]]:
  source_key, target_key = _keys(cfg)
  for i, line in read_lines(file):
    if not line.strip():
      yield i, Pair("", "", language or "")
      continue
    place = f"{file}:{i}"
    record = json_record(line.encode(), place)

    def value(key: str, record: dict = record, place: str = place) -> str:
      return encodable(text_value(record, key, place), place)

    if cfg.get("language_key", ""):
      tag = value(cfg.get("language_key"))
    else:
      tag = _told(place, language, languages)
    yield i, Pair(value(source_key), value(target_key), tag)


def _keys(cfg: Any) -> tuple[str, str]:
  keys = cfg.get("source_key", ""), cfg.get("target_key", "")
  if not all(keys):
    raise UserError(
      f"{_KEY}.kind={cfg.get('kind')!r} needs {_KEY}.source_key and "
      f"{_KEY}.target_key: the keys that hold the sentences"
    )
  return keys


def _tfds_parts(
  cfg: Any, key: str, what: Any, languages: Sequence[str]
) -> Iterator[_Part]:
  source_key, target_key = _keys(cfg)
  # The builders of WMT, Flores and ParaCrawl register only then.
  importlib.import_module("tensorflow_datasets.translate")
  for entry, language, names in _by_language(key, what, languages):
    if len(names) != 1:
      raise UserError(
        f"{entry}={names!r}: give one split of {cfg.get('name')!r}"
      )
    given = cfg.get("name", ""), target_key
    if language is None and any(_PLACEHOLDER in text for text in given):
      tags = tuple(languages)
    else:
      tags = (_told(entry, language, languages),)
    for tag in tags:
      name, target = (text.replace(_PLACEHOLDER, tag) for text in given)
      records = _open_tfds(cfg, entry, name, names[0])
      place = f"{name}[{names[0]}]: record "
      rows = _record_rows(records, place, (source_key, target), tag)
      yield _Part(place, place, rows)


def _open_tfds(cfg: Any, key: str, name: str, split: str) -> Sequence[Any]:
  from ml_collections import ConfigDict

  data_dir = cfg.get("data_dir", "")
  settings = {"kind": "tfds", "name": name, "split": split}
  try:
    return record_source(ConfigDict(settings | {"data_dir": data_dir}))
  except UserError as error:
    raise UserError(f"{key}: {error}") from error


def _record_rows(
  records: Any, place: str, keys: tuple[str, str], language: str
) -> Iterator[tuple[int, Pair]]:
  for i, record in enumerate(in_batches(records)):
    source, target = (_sentence(record, key, f"{place}{i}") for key in keys)
    yield i, Pair(source, target, language)


def _sentence(record: dict[str, Any], key: str, place: str) -> str:
  """The sentence in a language; empty where TED, for one, has none in it."""
  for value in record.values():
    if isinstance(value, dict) and set(value) == _VARIABLE:
      names = [decode(name, place) for name in value["language"]]
      if key not in names:
        return ""
      return decode(value["translation"][names.index(key)], place)
  return text_value(record, key, place)


_READERS: dict[str, Callable[..., Iterator[_Part]]] = {
  "text": _text_parts,
  "tsv": _tsv_parts,
  "jsonl": _jsonl_parts,
  "tfds": _tfds_parts,
}
