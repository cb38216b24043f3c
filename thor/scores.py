"""Scores of translations, as sacreBLEU computes them.

All are from 0 to 100 and of whole sentences as a reader sees them, without
subword pieces. Each carries its signature: scores of different signatures do
not compare.

References:
  Post, A Call for Clarity in Reporting BLEU Scores, WMT 2018
  Popović, chrF: character n-gram F-score for automatic MT evaluation, 2015
  Koehn, Statistical Significance Tests for Machine Translation Evaluation, 2004
"""

import contextlib
import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.config import did_you_mean
from common.errors import UserError

# Languages written without spaces, which `13a` would take for one word a line.
# `ja-mecab` is what WMT uses; it needs sacrebleu[ja], and a score must not
# depend on what is installed.
TOKENIZERS = {
  "zh": "zh", "yue": "zh", "ja": "char", "km": "char", "lo": "char",
  "my": "char", "th": "char",
}  # fmt: skip
_EXTRA = "pip install -e '.[translation]'"


@dataclasses.dataclass(frozen=True)
class Score:
  """A corpus's score.

  Attributes:
    value: 0 to 100.
    signature: how it was computed; equal ones compare.
    name: of the metric. BLEU of text that the user tokenised is "tokenised
      BLEU": it does not compare with any other.
  """

  value: float
  signature: str
  name: str

  def __str__(self) -> str:
    return f"{self.name} {self.value:.1f} ({self.signature})"


@dataclasses.dataclass(frozen=True)
class BootstrapResult:
  """What resampling says of a system.

  Attributes:
    score: of the whole test set; the signature names samples and seed.
    mean: over the samples.
    half_width: 95 % of the samples are within mean ± half_width.
    p_value: that a difference from the baseline as large comes by chance; NaN
      for the baseline, 1 for a score that equals the baseline's.
  """

  score: Score
  mean: float
  half_width: float
  p_value: float


def tokenizer_for(language: str) -> str:
  """The BLEU tokenizer for a language, such as "13a" for "de".

  Args:
    language: a code such as "de", "zh_Hant" or "zh-CN".

  Returns:
    "zh" for Chinese, "char" for other languages that are written without
    spaces, and else "13a", what WMT uses.
  """
  return TOKENIZERS.get(language.replace("_", "-").split("-")[0].lower(), "13a")


def bleu(
  hypotheses: Sequence[str],
  references: Sequence[str],
  *,
  tokenize: str = "13a",
) -> Score:
  """SacreBLEU, the same as `sacrebleu.corpus_bleu`.

  Args:
    hypotheses: translations.
    references: one for each.
    tokenize: sacrebleu's; see `tokenizer_for`. "none" is for text that is
      tokenised already, and labelled so.

  Raises:
    UserError: for another number of references than of translations, none, or
      an unknown tokenizer.
  """
  _check(hypotheses, references)
  return _score(_bleu_metric(tokenize), hypotheses, references)


def chrf(
  hypotheses: Sequence[str],
  references: Sequence[str],
  *,
  word_order: int = 0,
) -> Score:
  """ChrF2, the same as `sacrebleu.corpus_chrf`; chrF2++ for word order 2.

  Args:
    hypotheses: translations.
    references: one for each.
    word_order: the longest n-gram of words that counts beside characters'.

  Raises:
    UserError: for another number of references than of translations, or none.
  """
  _check(hypotheses, references)
  metric = _metrics().CHRF(word_order=word_order)
  return _score(metric, hypotheses, references)


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
  """The share of translations that are the reference, in percent.

  Space around them does not count.

  Raises:
    UserError: for another number of references than of translations, or none.
  """
  _check(hypotheses, references)
  equal = sum(h.strip() == r.strip() for h, r in zip(hypotheses, references))
  value = 100 * equal / len(references)
  return Score(value, "nrefs:1|case:mixed", "exact match")


def all_scores(
  hypotheses: Sequence[str], references: Sequence[str], *, language: str = ""
) -> dict[str, Score]:
  """`{"bleu", "chrf", "exact_match"}` of one target language.

  Args:
    hypotheses: translations.
    references: one for each.
    language: chooses BLEU's tokenizer; see `tokenizer_for`.

  Raises:
    UserError: for another number of references than of translations, or none.
  """
  tokenize = tokenizer_for(language)
  return {
    "bleu": bleu(hypotheses, references, tokenize=tokenize),
    "chrf": chrf(hypotheses, references),
    "exact_match": exact_match(hypotheses, references),
  }


def by_language(
  hypotheses: Sequence[str],
  references: Sequence[str],
  languages: Sequence[str],
) -> dict[str, dict[str, Score]]:
  """`all_scores` of each target language, with its tokenizer.

  Args:
    hypotheses: translations.
    references: one for each.
    languages: the target language of each.

  Returns:
    By language, in the order in which they first come.

  Raises:
    UserError: for unequal numbers of the three, or none.
  """
  _check(hypotheses, references)
  if len(languages) != len(references):
    raise UserError(
      f"{len(references)} references, but {len(languages)} languages: give "
      "one for each"
    )
  rows: dict[str, list[int]] = {}
  for i, language in enumerate(languages):
    rows.setdefault(language, []).append(i)
  return {
    language: all_scores(
      [hypotheses[i] for i in own],
      [references[i] for i in own],
      language=language,
    )
    for language, own in rows.items()
  }


def copy_baseline(
  sources: Sequence[str], references: Sequence[str], *, language: str = ""
) -> dict[str, Score]:
  """`all_scores` of copying the source: what a model has to beat.

  Names are often the same in both languages. For each language apart, give the
  sources to `by_language` as translations.

  Args:
    sources: without language tags.
    references: one for each.
    language: of the references; see `all_scores`.

  Raises:
    UserError: for another number of references than of sources, or none.
  """
  _check(sources, references, what="sources")
  return all_scores(sources, references, language=language)


def by_tokenizer(
  languages: Sequence[str],
) -> dict[str, tuple[Sequence[int], str]]:
  """What a bootstrap can take together: BLEU has one tokenizer.

  13a takes a line of Japanese for a word or two.

  Args:
    languages: of each sentence.

  Returns:
    The places of sentences and their tokenizer: of `all` where one tokenizer
    serves all languages, else of each language.
  """
  rows: dict[str, list[int]] = {}
  for i, language in enumerate(languages):
    rows.setdefault(language, []).append(i)
  tokenizers = {tokenizer_for(language) for language in rows}
  if len(rows) > 1 and len(tokenizers) == 1:
    return {"all": (range(len(languages)), tokenizers.pop())}
  return {
    language or "all": (own, tokenizer_for(language))
    for language, own in rows.items()
  }


def paired_bootstrap(
  systems: Mapping[str, Sequence[str]],
  references: Sequence[str],
  *,
  baseline: str,
  samples: int = 1000,
  seed: int = 12345,
  tokenize: str = "13a",
) -> dict[str, dict[str, BootstrapResult]]:
  """Whether systems differ from a baseline, by sacrebleu's paired bootstrap.

  The same as `sacrebleu --paired-bs`, but for a system whose score equals the
  baseline's: sacrebleu gives it the smallest p-value there is.

  Args:
    systems: by name the translations.
    references: one for each translation.
    baseline: the name of the system that the others are compared with.
    samples: test sets that are drawn from this one, with replacement.
    seed: of the draws, at least 1: sacrebleu takes 0 for no seed at all.
    tokenize: BLEU's; see `tokenizer_for`.

  Returns:
    `{name: {"bleu", "chrf"}}`, the baseline first.

  Raises:
    UserError: for an unknown baseline, unequal numbers of translations and
      references, none, or a seed or number of samples below 1.
  """
  if baseline not in systems:
    raise UserError(
      f"baseline={baseline!r} is no system{did_you_mean(baseline, systems)}"
    )
  for name, value in (("seed", seed), ("samples", samples)):
    if value < 1:
      raise UserError(f"{name}={value}: give 1 or more")
  for name, hypotheses in systems.items():
    _check(hypotheses, references, what=f"translations of {name!r}")
  metrics = {"bleu": _bleu_metric(tokenize), "chrf": _metrics().CHRF()}
  from sacrebleu.significance import PairedTest

  names = [baseline, *(name for name in systems if name != baseline)]
  with _quiet(), _environment("SACREBLEU_SEED", str(seed)):
    test = PairedTest(
      [(name, list(systems[name])) for name in names],
      metrics,
      [list(references)],
      test_type="bs",
      n_samples=samples,
    )
    signatures, columns = test()
  return {
    name: {
      key: _bootstrap_result(column, str(signatures[label]), label, i)
      for key, (label, column) in zip(metrics, _results(columns))
    }
    for i, name in enumerate(names)
  }


def _results(columns: Mapping[str, list]) -> list[tuple[str, list]]:
  return [item for item in columns.items() if item[0] != "System"]


def _bootstrap_result(
  column: list, signature: str, label: str, i: int
) -> BootstrapResult:
  found, first = column[i], column[0]
  p_value = math.nan
  if i:
    p_value = 1.0 if found.score == first.score else float(found.p_value)
  score = Score(float(found.score), signature, _label(label, signature))
  return BootstrapResult(score, float(found.mean), float(found.ci), p_value)


def _metrics() -> Any:
  try:
    with warnings.catch_warnings(action="ignore"):
      import sacrebleu.metrics as metrics
  except ImportError as error:
    raise UserError(f"BLEU and chrF need sacrebleu: {_EXTRA}") from error
  return metrics


def _bleu_metric(tokenize: str) -> Any:
  make = _metrics().BLEU
  if tokenize not in make.TOKENIZERS:
    raise UserError(
      f"tokenize={tokenize!r} is no tokenizer of sacrebleu"
      f"{did_you_mean(tokenize, make.TOKENIZERS)}"
    )
  try:
    with _quiet():
      # `force` only keeps it from saying that text looks tokenised.
      return make(tokenize=tokenize, force=True)
  except (ImportError, RuntimeError) as error:
    mecab = f"pip install 'sacrebleu[{tokenize.partition('-')[0]}]'"
    raise UserError(
      f"tokenize={tokenize!r} needs more: "
      f"{mecab if 'mecab' in tokenize else _EXTRA}"
    ) from error


def _score(
  metric: Any, hypotheses: Sequence[str], references: Sequence[str]
) -> Score:
  with _quiet():
    found = metric.corpus_score(list(hypotheses), [list(references)])
  signature = str(metric.get_signature())
  return Score(float(found.score), signature, _label(found.name, signature))


def _label(name: str, signature: str) -> str:
  is_tokenised = name == "BLEU" and "tok:none" in signature.split("|")
  return "tokenised BLEU" if is_tokenised else name


def _check(
  hypotheses: Sequence[str],
  references: Sequence[str],
  *,
  what: str = "translations",
) -> None:
  if len(hypotheses) != len(references):  # sacrebleu would cut the longer
    raise UserError(
      f"{len(hypotheses)} {what}, but {len(references)} references: give one "
      "for each"
    )
  if not len(references):
    raise UserError(f"there are no {what} to score: give one or more")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps what sacrebleu logs from the terminal."""
  logger = logging.getLogger("sacrebleu")
  before = logger.disabled
  logger.disabled = True
  try:
    yield
  finally:
    logger.disabled = before


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
  """Sets a variable, the only way in which sacrebleu takes a seed."""
  before = os.environ.get(name)
  os.environ[name] = value
  try:
    yield
  finally:
    if before is None:
      del os.environ[name]
    else:
      os.environ[name] = before
