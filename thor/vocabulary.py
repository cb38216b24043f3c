"""A vocabulary over SentencePiece, with fairseq's special ids.

    0 begin, 1 padding, 2 end, 3 unknown, a tag for each language, the pieces

A tag such as `<2de>` tells a multilingual model what to translate into. It is
an id of its own that no text turns into, whatever stands in it. Training takes
no part of the text away or changes it: decoding gives back what was encoded,
blanks included, but for characters that training has not seen.

`python -m thor.vocabulary --help` trains one from text files.
"""

import hashlib
import io
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from common import app, files
from common.config import did_you_mean
from common.errors import UserError
from common.flags import Parser
from thor.pairs import ParallelText, check_languages

log = logging.getLogger(__name__)

BOS, PAD, EOS, UNK = range(4)
KINDS = ("unigram", "bpe")
EXAMPLE = (
  "python -m thor.vocabulary --input train.en train.de --size 8000 "
  "--output spm.model"
)
# Part of every cache key: raise it when training changes.
_FORMAT = 1


class Vocabulary:
  """Sentences to ids and back; can be pickled.

  Args:
    model: a SentencePiece model, serialized.
    languages: their tags follow the special ids, in this order.

  Attributes:
    languages: the targets.
    tags: language -> id.
    size: ids are below it.
    fingerprint: changes when the ids of some text may.

  Raises:
    UserError: when the library is missing, or the model is none.
  """

  bos, pad, eos, unk = BOS, PAD, EOS, UNK

  def __init__(self, model: bytes, languages: Sequence[str] = ()):
    self._data = model
    self._model = _load(model)
    self.languages = check_languages(languages)
    self.tags = {tag: UNK + 1 + i for i, tag in enumerate(self.languages)}
    # Our id of each of the model's pieces, and the reverse: a model from
    # elsewhere has special ids of its own, and no tags.
    count = self._model.GetPieceSize()
    self._ours = np.full(count, UNK, np.int32)
    special = [self._is_special(i) for i in range(count)]
    pieces = np.flatnonzero(~np.array(special))
    first = UNK + 1 + len(self.tags)
    self._ours[pieces] = np.arange(first, first + len(pieces))
    self.size = first + len(pieces)
    self._theirs = np.full(self.size, -1, np.int64)
    self._theirs[UNK] = self._model.unk_id()
    self._theirs[first:] = pieces
    digest = hashlib.blake2b(model, digest_size=16)
    digest.update(" ".join(self.languages).encode())
    self.fingerprint = f"sentencepiece/{digest.hexdigest()}"

  def _is_special(self, i: int) -> bool:
    model = self._model
    is_tag = model.IdToPiece(i) in map(tag_piece, self.languages)
    is_ours = model.IsControl(i) or model.IsUnknown(i) or model.IsUnused(i)
    return is_ours or is_tag

  def encode(self, text: str, language: str = "") -> np.ndarray:
    """The ids of a sentence, int32 [n]: its tag, its pieces, EOS.

    Args:
      text: the sentence; characters that the model does not know are `UNK`.
      language: whose tag comes first; no tag if empty.

    Raises:
      UserError: for a language without a tag, and text that is no Unicode.
    """
    first = [self.tag(language)] if language else []
    try:
      pieces = self._model.EncodeAsIds(text)
    except (RuntimeError, UnicodeEncodeError) as error:
      raise UserError(f"no Unicode text: {text!r}: remove it") from error
    ids = self._ours[np.array(pieces, np.int64)]
    return np.concatenate([first, ids, [EOS]]).astype(np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of some ids up to EOS.

    Padding, tags, and ids beyond the vocabulary are left out. What is unknown
    shows as SentencePiece's ` ⁇ `.
    """
    chosen = np.asarray(ids, np.int64).reshape(-1)
    chosen = chosen[: next(iter(np.flatnonzero(chosen == EOS)), None)]
    chosen = chosen[(chosen >= 0) & (chosen < self.size)]
    pieces = self._theirs[chosen]
    return self._model.DecodeIds(pieces[pieces >= 0].tolist())

  def tag(self, language: str) -> int:
    """The id of a language's tag; `UserError` where there is none."""
    if language not in self.tags:
      known = (
        did_you_mean(language, self.tags) if self.tags else ": it has none"
      )
      raise UserError(f"the vocabulary has no language {language!r}{known}")
    return self.tags[language]

  def facts(self) -> dict[str, Any]:
    """What to keep with a run; `saved_vocabulary` takes it."""
    return {
      "vocabulary": self.fingerprint,
      "vocabulary_size": self.size,
      "languages": list(self.languages),
    }

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the SentencePiece model, whole or not at all.

    Raises:
      UserError: when it cannot be written.
    """
    from etils import epath

    target = epath.Path(path)
    try:
      target.parent.mkdir(parents=True, exist_ok=True)
      files.replace(target, self._data)
    except OSError as error:
      raise UserError(
        f"cannot write {os.fspath(path)}: {error.strerror or error}"
      ) from error

  def __reduce__(self):
    return Vocabulary, (self._data, self.languages)


def tag_piece(language: str) -> str:
  """How a tag looks among the pieces: `<2de>`."""
  return f"<2{language}>"


def _sentencepiece() -> Any:
  try:
    import sentencepiece
  except ImportError as error:
    raise UserError(
      "a vocabulary needs sentencepiece: pip install -e '.[translation]'"
    ) from error
  return sentencepiece


def _load(data: bytes) -> Any:
  model = _sentencepiece().SentencePieceProcessor()
  try:
    model.LoadFromSerializedProto(data)
  except Exception as error:
    raise UserError("no SentencePiece model") from error
  if not model.GetPieceSize():
    raise UserError("no SentencePiece model")
  return model


def train_vocabulary(
  sentences: Iterable[str],
  size: int,
  path: str | os.PathLike[str],
  *,
  languages: Sequence[str] = (),
  kind: str = "unigram",
  coverage: float = 1.0,
  prefix: str = "vocabulary.",
) -> Vocabulary:
  """Trains a SentencePiece model and writes it; the same for the same text.

  Neither the order of the sentences nor the machine changes it: each different
  one counts once, they come sorted, and one thread does the work.

  Args:
    sentences: of all languages.
    size: of the vocabulary, special ids and tags included.
    path: the `.model` file.
    languages: the targets that get a tag.
    kind: `unigram` or `bpe`.
    coverage: which share of the characters get a piece; below 1 for scripts
      with thousands of them (0.9995 for Chinese).
    prefix: of the settings' names in errors; a command's flags have "--".

  Raises:
    UserError: for unknown settings, a size that the text does not bear, and a
      file that cannot be written.
  """
  vocabulary = Vocabulary(
    _trained(sentences, size, languages, kind, coverage, prefix), languages
  )
  vocabulary.save(path)
  return vocabulary


def _trained(
  sentences: Iterable[str],
  size: int,
  languages: Sequence[str],
  kind: str,
  coverage: float,
  prefix: str = "vocabulary.",
) -> bytes:
  trainer = _sentencepiece().SentencePieceTrainer
  if kind not in KINDS:
    raise UserError(f"{prefix}kind={kind!r}: choose {' or '.join(KINDS)}")
  if not 0 < coverage <= 1:
    raise UserError(f"{prefix}coverage={coverage} must be in (0, 1]")
  symbols = [tag_piece(tag) for tag in check_languages(languages)]
  if size <= UNK + 1 + len(symbols):
    raise UserError(
      f"{prefix}size={size}: the special ids and tags alone are "
      f"{UNK + 1 + len(symbols)}: give more"
    )
  # SentencePiece would skip whole sentences with its reserved character.
  plain = (sentence.replace("\u2585", " ") for sentence in sentences)
  text = sorted({sentence for sentence in plain if sentence.strip()})
  if not text:
    raise UserError("a vocabulary needs text, and there is none")
  model = io.BytesIO()
  try:
    trainer.Train(
      sentence_iterator=iter(text),
      model_writer=model,
      model_type=kind,
      vocab_size=size,
      character_coverage=coverage,
      bos_id=BOS,
      pad_id=PAD,
      eos_id=EOS,
      unk_id=UNK,
      control_symbols=symbols,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      # Longer sentences would be left out without a word.
      max_sentence_length=10 + max(len(line.encode()) for line in text),
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise UserError(_why(size, str(error), prefix)) from error
  return model.getvalue()


def _why(size: int, message: str, prefix: str) -> str:
  """SentencePiece's message in our words."""
  most = re.search(r"too high .*<= (\d+)", message)
  least = re.search(r"required_chars\. \d+ vs (\d+)", message)
  if most:
    return (
      f"{prefix}size={size} is more than this text bears: at most {most[1]}"
    )
  if least:
    return (
      f"{prefix}size={size} is too small for this text's characters: at "
      f"least {least[1]}, or a {prefix}coverage below 1"
    )
  return f"{prefix}size={size}: SentencePiece says: {message.strip()}"


def open_vocabulary(
  path: str | os.PathLike[str],
  languages: Sequence[str] = (),
  *,
  key: str = "vocabulary.path",
) -> Vocabulary:
  """Opens a SentencePiece model, ours or another's.

  Whatever ids it has, here they are this module's: special ids, tags, then its
  pieces in their order.

  Args:
    path: the `.model` file.
    languages: the targets that get a tag, whether the model has it or not.
    key: the setting that names the file, for errors; "" if none does.

  Raises:
    UserError: when library or file are missing, or the file is no model.
  """
  from etils import epath

  name = f"{key}={os.fspath(path)!r}" if key else os.fspath(path)
  try:
    data = epath.Path(path).expanduser().read_bytes()
  except OSError as error:
    raise UserError(f"{name} cannot be read: {error.strerror}") from error
  try:
    return Vocabulary(data, languages)
  except UserError as error:
    raise UserError(f"{name}: {error}") from error


def vocabulary_for(
  cfg: Any, parallel: ParallelText, folder: str | os.PathLike[str]
) -> Vocabulary:
  """A run's vocabulary: trained once, kept in its folder, found again.

  Another text, or other settings, have another file. Every process of a run
  may call this: all come to the same, and the first one writes.

  Args:
    cfg: [`path` ""] of an existing model; without it one is trained: [`size`
      8000], [`kind` unigram], [`coverage` 1.0], [`sentences` 1,000,000]: on
      about so many of the training sentences, if there are more.
    parallel: the text; its training pairs, both sides.
    folder: the run's.

  Raises:
    UserError: see `train_vocabulary` and `open_vocabulary`.
  """
  from etils import epath

  languages = parallel.languages
  if cfg.get("path", ""):
    vocabulary = open_vocabulary(cfg.get("path"), languages)
    file = epath.Path(folder) / _file_name(vocabulary.fingerprint)
  else:
    settings = {
      "size": cfg.get("size", 8000),
      "kind": cfg.get("kind", "unigram"),
      "coverage": cfg.get("coverage", 1.0),
    }
    limit = cfg.get("sentences", 1_000_000)
    key = [_FORMAT, parallel.fingerprint, languages, limit, settings]
    file = epath.Path(folder) / _file_name(json.dumps(key))
    vocabulary = _cached(file, languages)
    if vocabulary is not None:
      return vocabulary
    start = time.perf_counter()
    model = _trained(_sample(parallel, limit), languages=languages, **settings)
    vocabulary = Vocabulary(model, languages)
    log.info(
      "trained a vocabulary of %d in %.1f s: %s",
      vocabulary.size, time.perf_counter() - start, file,
    )  # fmt: skip
  import jax

  if jax.process_index() == 0:
    vocabulary.save(file)
  return vocabulary


def _file_name(key: str) -> str:
  digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
  return f"vocabulary-{digest}.model"


def _cached(file: Any, languages: Sequence[str]) -> Vocabulary | None:
  if not file.exists():
    return None
  try:
    return open_vocabulary(file, languages, key="")
  except UserError as error:
    log.warning("the vocabulary is damaged and trained again: %s", error)
    return None


def _sample(parallel: ParallelText, limit: int) -> Iterator[str]:
  """Sentences of both sides; chosen by their hash if there are too many."""
  pairs = parallel.splits["train"]
  share = limit / (2 * len(pairs))
  if share < 1:
    log.info("the vocabulary learns from %.1f%% of the text", 100 * share)
  for pair in pairs:
    for text in (pair.source, pair.target):
      if share >= 1:
        yield text
      else:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if int.from_bytes(digest, "little") < share * 2**64:
          yield text


def saved_vocabulary(folder: str | os.PathLike[str], facts: Any) -> Vocabulary:
  """The vocabulary in a run's folder.

  Args:
    folder: the run's.
    facts: what `Vocabulary.facts` said, such as the run's `facts.json`.

  Raises:
    UserError: when it is not there.
  """
  from etils import epath

  wanted, languages = facts.get("vocabulary"), facts.get("languages", ())
  for file in sorted(epath.Path(folder).glob("vocabulary-*.model")):
    vocabulary = open_vocabulary(file, languages, key="")
    if vocabulary.fingerprint == wanted:
      return vocabulary
  raise UserError(
    f"{os.fspath(folder)} lacks the run's vocabulary ({wanted}): restore its "
    "vocabulary-….model"
  )


def main() -> None:
  """Trains a vocabulary from text files."""
  parser = Parser(
    "thor.vocabulary",
    description="Trains a SentencePiece vocabulary from text files.",
    example=EXAMPLE,
  )
  add = parser.add_argument
  add("--input", nargs="+", required=True, metavar="FILE", help="UTF-8 text")
  add("--size", type=int, default=8000, help="of the vocabulary (8000)")
  add("--output", required=True, metavar="FILE", help="the .model file")
  add("--kind", default="unigram", help="unigram or bpe")
  add("--coverage", type=float, default=1.0, help="of characters")
  add("--languages", nargs="*", default=(), help="targets that get a tag")
  args = parser.parse_args()

  from common.data.sources import find_files
  from thor.sources import read_lines

  names = find_files(args.input, key="--input", remedy="name the file itself")
  vocabulary = train_vocabulary(
    (line for name in names for _, line in read_lines(name)),
    args.size,
    args.output,
    languages=args.languages,
    kind=args.kind,
    coverage=args.coverage,
    prefix="--",
  )
  print(f"{args.output}: {vocabulary.size} ids")


if __name__ == "__main__":
  app.run_alone(main)
