"""Parallel sentences out of Unicode's locale data: an embedded benchmark.

Names of territories, languages, scripts and currencies, lists with "and" and
"or", full dates, plural units and relative times, as Babel writes them in any
of its locales, composed into sentences with an English source:

    Finland, Peru, or Tonga – in 3 weeks
    Suomi, Peru tai Tonga – 3 viikon päästä

This is a synthetic multilingual text of templates with real grammar in it
(plurals and cases, word order, capitals), not open-domain translation: a fair
test of generalisation to combinations nobody has seen. Copying the English
already scores well on chrF, so that baseline belongs beside every score.

    train       sentences of the known names
    valid, test unseen combinations of names that occur in train
    test_names  sentences with a held-out name, which occurs nowhere in train,
                valid, test and test_long, in no language
    test_long   lists longer than any in train

An English sentence occurs once, in one split, with all its translations. Babel
is BSD-3-Clause; the data are the Unicode CLDR, under the Unicode License v3.
What Babel's version says, another may say otherwise: the fingerprint tells.
"""

import dataclasses
import datetime
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from common.rngs import np_rng
from thor.pairs import Pair, Pairs, ParallelText, check_languages

LANGUAGES = ("de", "fr", "es", "it", "sv", "tr", "fi", "cs")
# A locale's attributes that map a code to its name.
KINDS = ("territories", "languages", "scripts", "currencies")
# Codes for what has no name.
_NAMELESS = {
  "ZZ", "XA", "XB", "und", "mul", "mis", "zxx", "XXX", "XTS", "XRE",
  "Zinh", "Zmth", "Zsym", "Zxxx", "Zyyy", "Zzzz",
}  # fmt: skip
# Names with these would make sentences ambiguous.
_BREAKS = set('()[]{},;:–—/"“”«»|，、；：（）،؛')
UNITS = (
  "length-kilometer", "length-meter", "length-centimeter", "length-mile",
  "length-foot", "mass-kilogram", "mass-gram", "mass-pound", "duration-second",
  "duration-minute", "duration-hour", "duration-day", "duration-week",
  "duration-month", "duration-year", "duration-century", "volume-liter",
  "volume-milliliter", "volume-cubic-meter", "volume-tablespoon",
  "area-square-kilometer", "area-square-meter", "area-hectare",
  "temperature-celsius", "angle-degree", "speed-kilometer-per-hour",
  "energy-kilowatt-hour", "energy-calorie", "power-watt", "graphics-pixel",
)  # fmt: skip
_RAW_UNIT = re.compile("|".join(UNITS))
# As `babel.dates.format_timedelta` counts.
_SECONDS = {
  "second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400,
  "month": 30 * 86400, "year": 365 * 86400,
}  # fmt: skip
_FIRST_DAY, _DAYS = datetime.date(1950, 1, 1), 100 * 365
# The largest numbers: of one digit, of two, of up to four.
_NUMBERS = (9, 9, 99, 99, 1999)
# How sentences are put together; each has one list of names.
_FORMS = (
  ("{}", "names"),
  ("{}: {}", "date", "names"),
  ("{} – {}", "names", "relative"),
  ("{} ({})", "names", "date"),
  ("{}: {}", "name", "measures"),
  ("{}, {}: {}", "name", "relative", "measures"),
)
# Shortest and longest lists: of names, of names in test_long, of measures.
_SHORT, _LONG, _MEASURES = (1, 3), (4, 6), (1, 2)
# Fewer names make no kind.
_FEWEST = 10
# Draws for one sentence before the settings are to blame.
_PATIENCE = 1000

Name = tuple[str, ...]  # in English, then in each target language
Pools = dict[str, tuple[Name, ...]]  # kind -> names


@dataclasses.dataclass(frozen=True)
class CoreNames:
  """Names in English and in each language.

  Attributes:
    known: what train may use.
    held_out: what only `test_names` uses; no other name contains one of them.
  """

  known: Pools
  held_out: Pools


def composed_text(cfg: Any) -> ParallelText:
  """The benchmark; a function of its settings and of Babel's version.

  Args:
    cfg: all optional:
      languages: targets, any of Babel's locales; () stands for `LANGUAGES`.
      rows: English sentences in train (3,000); each has a pair a language.
      test_rows: as many in each other split (250).
      names: the most names of a kind (100); 0: all. Fewer are seen oftener.
      held_out: the share of the names that is held out (0.1); 0: none, and
        no `test_names`.
      seed: of the choice of names and of all sentences (0).

  Returns:
    The text. The pairs of a sentence follow one another, a language each.

  Raises:
    UserError: for a locale that Babel does not know, or settings that leave
      too few names or sentences.
  """
  sizes = {"train": cfg.get("rows", 3000)}
  for split in ("valid", "test", "test_names", "test_long"):
    sizes[split] = cfg.get("test_rows", 250)
  if min(sizes.values()) < 1:
    raise UserError(
      f"data.source.rows={sizes['train']} and data.source.test_rows="
      f"{sizes['test']} must be at least 1"
    )
  languages, names = target_languages(cfg), core_names(cfg)
  if not any(names.held_out.values()):
    del sizes["test_names"]
  composer = _Composer(("en", *languages), names.held_out)
  splits = {
    split: Pairs.of(
      Pair(row[0], target, language)
      for row in rows
      for language, target in zip(languages, row[1:])
    )
    for split, rows in _drawn(composer, sizes, names, cfg.get("seed", 0))
  }
  version = _babel().__version__
  facts = {
    "source": "cldr",
    "babel": version,
    "names_known": sum(map(len, names.known.values())),
    "names_held_out": sum(map(len, names.held_out.values())),
    **{f"redrawn_{reason}": n for reason, n in composer.redrawn.items()},
  }
  return ParallelText.of(
    "data.source.kind='cldr'", splits, languages, facts, edition=version
  )


def _drawn(
  composer: "_Composer", sizes: dict[str, int], names: CoreNames, seed: int
) -> Iterator[tuple[str, list[list[str]]]]:
  """Yields (split, sentences in all languages).

  Train is the first; the others know the names that it has used.
  """
  pools = names.known
  for split, size in sizes.items():
    sentences = _Sentences(
      np_rng(seed, f"cldr/{split}"),
      pools,
      names.held_out if split == "test_names" else None,
      _LONG if split == "test_long" else _SHORT,
    )
    rows, used = composer.rows(sentences, size)
    yield split, rows
    if split == "train":
      pools = {
        kind: tuple(name for name in pool if name in used)
        for kind, pool in pools.items()
      }


def target_languages(cfg: Any) -> tuple[str, ...]:
  """The targets of a config; see `composed_text`."""
  tags = check_languages(cfg.get("languages", ()) or LANGUAGES)
  for tag in tags:
    if tag == "en":
      raise UserError(
        "data.source.languages holds 'en', which is the source: remove it"
      )
    _locale(tag)
  return tags


def core_names(cfg: Any) -> CoreNames:
  """The names that all languages of a config have; see `composed_text`.

  A name is left out if it has brackets, digits or the like in any language, or
  if its English names something else as well.
  """
  seed, most = cfg.get("seed", 0), cfg.get("names", 100)
  share = cfg.get("held_out", 0.1)
  if most and most < _FEWEST:
    raise UserError(
      f"data.source.names={most}: give at least {_FEWEST}, or 0 for all"
    )
  if not 0 <= share <= 0.5:
    raise UserError(f"data.source.held_out={share} must be in [0, 0.5]")
  tags = target_languages(cfg)
  locales = [_locale(tag) for tag in ("en", *tags)]
  taken: set[str] = set()
  pools: Pools = {}
  for kind in KINDS:
    tables = [getattr(locale, kind) for locale in locales]
    codes = sorted(set(tables[0]).intersection(*tables[1:]) - _NAMELESS)
    order = np_rng(seed, f"cldr/{kind}").permutation(len(codes))
    found = [tuple(table[codes[i]] for table in tables) for i in order]
    pool = []
    for name in found:
      english = name[0].casefold()
      if english not in taken and all(map(_is_plain, name)):
        taken.add(english)
        pool.append(tuple(map(_plain_spaces, name)))
    if len(pool) >= _FEWEST:
      pools[kind] = tuple(pool[: most or None])
  if not pools:
    known = {t: sum(len(getattr(_locale(t), k)) for k in KINDS) for t in tags}
    fewest = min(known, key=lambda tag: known[tag])
    raise UserError(
      f"data.source.languages: too few names are known in all of them; "
      f"{fewest!r} has the fewest, {known[fewest]}: leave it out"
    )
  return _hold_out(pools, share)


def _is_plain(name: str) -> bool:
  return not _BREAKS.intersection(name) and not any(map(str.isdigit, name))


def _plain_spaces(text: str) -> str:
  return text.replace("\xa0", " ").replace("\u202f", " ")


def _hold_out(pools: Pools, share: float) -> CoreNames:
  """Holds out names that no other name contains, in no language."""
  folded = [
    "\n".join(names).casefold()
    for names in zip(*(name for pool in pools.values() for name in pool))
  ]

  def is_alone(name: Name) -> bool:
    pairs = zip(folded, name)
    return all(text.count(part.casefold()) == 1 for text, part in pairs)

  held_out = {
    kind: tuple(filter(is_alone, pool))[: round(share * len(pool))]
    for kind, pool in pools.items()
  }
  known = {
    kind: tuple(name for name in pool if name not in held_out[kind])
    for kind, pool in pools.items()
  }
  return CoreNames(known, held_out)


def _babel() -> Any:
  try:
    import babel
    import babel.dates
    import babel.lists
    import babel.localedata
    import babel.units
  except ImportError as error:
    raise UserError(
      "data.source.kind='cldr' needs Babel: pip install -e '.[translation]'"
    ) from error
  return babel


@functools.cache
def _locale(tag: str) -> Any:
  babel = _babel()
  try:
    return babel.Locale.parse(tag.replace("-", "_"))
  except (babel.UnknownLocaleError, ValueError) as error:
    known = babel.localedata.locale_identifiers()
    raise UserError(
      f"data.source.languages: Babel knows no locale {tag!r}"
      f"{did_you_mean(tag, known)}"
    ) from error


class _Writer:
  """Writes in one language.

  Args:
    tag: the language.
  """

  def __init__(self, tag: str):
    self._babel = _babel()
    self._locale = _locale(tag)
    self.measure = functools.cache(self._measure)
    self.relative = functools.cache(self._relative)

  def listed(self, items: Sequence[str], style: str) -> str:
    """`A, B, and C`; the style is `standard` or `or`."""
    return self._babel.lists.format_list(items, style, self._locale)

  def date(self, day: datetime.date) -> str:
    """`Tuesday, March 5, 2024`."""
    return self._babel.dates.format_date(day, "full", self._locale)

  def _measure(self, number: int, unit: str) -> str:
    """`7 kilometers`."""
    return self._babel.units.format_unit(number, unit, locale=self._locale)

  def _relative(self, number: int, unit: str) -> str:
    """`in 3 days`; `3 days ago` for a negative number."""
    return self._babel.dates.format_timedelta(
      number * _SECONDS[unit],
      granularity=unit,
      threshold=math.inf,
      add_direction=True,
      locale=self._locale,
    )


# A part of a sentence, in the language of place i.
Part = Callable[[int, _Writer], str]


class _Sentences:
  """Draws sentences, each as something that can be written in any language.

  Args:
    rng: draws.
    pools: names.
    held_out: names of which each sentence has one at least; None: no matter.
    lengths: of lists of names.
  """

  def __init__(
    self,
    rng: np.random.Generator,
    pools: Pools,
    held_out: Pools | None,
    lengths: tuple[int, int],
  ):
    self._rng = rng
    self._pools = pools
    self._held_out = held_out
    self.has_held_out = held_out is not None
    self._lengths = lengths
    self._kinds = [
      kind
      for kind, pool in pools.items()
      if len(pool) >= lengths[1] and (held_out is None or held_out[kind])
    ]
    self._forms = [
      form for form in _FORMS if "names" in form or lengths[0] == 1
    ]
    self._slots = {
      "date": self._date,
      "relative": self._relative,
      "measures": self._measures,
    }
    if not self._kinds:
      raise UserError(
        "data.source.rows is too small: too few names occur in train"
      )

  def draw(self) -> tuple[str, list[Part], list[Name]]:
    """A template, what fills it, and the names therein."""
    template, *slots = self._pick(self._forms)
    names: list[Name] = []
    parts = []
    for slot in slots:
      if slot in ("names", "name"):
        names = self._names(self._lengths if slot == "names" else (1, 1))
        parts.append(_listed_names(names, self._style()))
      else:
        parts.append(self._slots[slot]())
    return template, parts, names

  def _names(self, lengths: tuple[int, int]) -> list[Name]:
    """Different names of one kind."""
    kind, count = self._pick(self._kinds), self._between(*lengths)
    if self._held_out is None:
      return self._several(self._pools[kind], count)
    held_out = self._held_out[kind]
    chosen = self._several(held_out, self._between(1, count))
    known = self._several(self._pools[kind], count - len(chosen))
    return self._several(chosen + known, count)

  def _measures(self) -> Part:
    units = self._several(UNITS, self._between(*_MEASURES))
    numbered = [(self._number(), unit) for unit in units]
    style = self._style()
    return lambda i, writer: writer.listed(
      [writer.measure(*measure) for measure in numbered], style
    )

  def _date(self) -> Part:
    day = _FIRST_DAY + datetime.timedelta(days=self._between(0, _DAYS))
    return lambda i, writer: writer.date(day)

  def _relative(self) -> Part:
    number = self._between(1, 60) * self._pick((1, -1))
    unit = self._pick(tuple(_SECONDS))
    return lambda i, writer: writer.relative(number, unit)

  def _number(self) -> int:
    return self._between(1, self._pick(_NUMBERS))

  def _style(self) -> str:
    return self._pick(("standard", "or"))

  def _between(self, low: int, high: int) -> int:
    return int(self._rng.integers(low, high + 1))

  def _pick(self, options: Sequence[Any]) -> Any:
    return options[self._between(0, len(options) - 1)]

  def _several(self, options: Sequence[Any], count: int) -> list[Any]:
    order = self._rng.permutation(len(options))[:count]
    return [options[i] for i in order]


def _contains(text: str, names: Sequence[str]) -> bool:
  text = text.casefold()
  return any(name in text for name in names)


def _listed_names(names: Sequence[Name], style: str) -> Part:
  return lambda i, writer: writer.listed([name[i] for name in names], style)


class _Composer:
  """Makes sentences of all splits, no English one twice.

  Args:
    tags: of all languages, English first.
    held_out: names that sentences must not contain unless they have to.
  """

  def __init__(self, tags: Sequence[str], held_out: Pools):
    self._writers = [_Writer(tag) for tag in tags]
    names = [name for pool in held_out.values() for name in pool]
    self._held_out = [[n.casefold() for n in column] for column in zip(*names)]
    self._taken: set[str] = set()
    self.redrawn: Counter[str] = Counter()

  def rows(
    self, sentences: _Sentences, size: int
  ) -> tuple[list[list[str]], set[Name]]:
    """Sentences in all languages, and the names that occur in them."""
    rows, used = [], set()
    failures = 0
    while len(rows) < size:
      if failures == _PATIENCE:
        raise UserError(
          f"data.source.rows: no new sentence in {_PATIENCE} draws, after "
          f"{len(self._taken)} sentences: give fewer rows or more names"
        )
      failures += 1
      template, parts, names = sentences.draw()
      row = [
        _plain_spaces(template.format(*(part(i, writer) for part in parts)))
        for i, writer in enumerate(self._writers)
      ]
      if self._is_new(row, sentences.has_held_out):
        failures = 0
        rows.append(row)
        used.update(names)
    return rows, used

  def _is_new(self, row: list[str], has_held_out: bool) -> bool:
    english = row[0].casefold()
    if english in self._taken:
      return False
    # Babel writes a unit's id where CLDR has no plural form.
    if any(map(_RAW_UNIT.search, row)):
      self.redrawn["raw_unit"] += 1
      return False
    # Other words than names may contain one: "Mon" is a language, and a
    # part of "Monday".
    if not has_held_out and any(map(_contains, row, self._held_out)):
      self.redrawn["held_out_name"] += 1
      return False
    self._taken.add(english)
    return True
