"""The entries of a mixture: which objectives, how controlled, how often."""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from birdie.controls import CONTROLS, ObjectiveConfig
from birdie.mixture import class_uniform, normalized
from birdie.objectives import OBJECTIVES, NotEnough, Result
from birdie.problems import Task, settings_of
from birdie.tasks import TASKS
from birdie.vocab import Vocabulary, as_ids
from common.config import check_keys, did_you_mean
from common.errors import UserError
from common.rngs import np_rng

log = logging.getLogger(__name__)

PRESETS = ("birdie", "birdie_uniform", "ul2", "ul2_decoder", "ntp")
GRIDS = ("paper", "small")
Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Configuration:
  """One entry of the mixture.

  Attributes:
    name: unique in its mixture.
    objective: a key of `OBJECTIVES`, or of `TASKS`.
    cls: the class that rewards and reports average over.
    cfg: the objective's controls, or the task.
    weight: of a fixed mixture, before normalization.
  """

  name: str
  objective: str
  cls: str
  cfg: ObjectiveConfig | Task
  weight: float = 1.0

  def make(
    self, tokens: np.ndarray, rng: np.random.Generator, space: int
  ) -> Result:
    """An example of a text; see `birdie.objectives`. A task takes none."""
    if isinstance(self.cfg, Task):
      return self.cfg.example(rng, space)
    return OBJECTIVES[self.objective](tokens, self.cfg, rng, space)


@dataclasses.dataclass(frozen=True)
class Preset:
  """A mixture.

  Attributes:
    configurations: the entries.
    probs: float32 [K], the mixture that a run starts with.
    dropped: names of entries whose shortest example exceeds a row.
  """

  configurations: tuple[Configuration, ...]
  probs: np.ndarray
  dropped: tuple[str, ...] = ()


def preset(
  name: str,
  vocab: Vocabulary,
  *,
  sequence_length: int,
  grid: str = "paper",
  paradigm_append_prob: float = 0.5,
) -> Preset:
  """A published mixture.

  Args:
    name: "birdie" and "birdie_uniform" hold all eight objectives and start
      with 1 / classes, then 1 / configurations; "ul2" (Tay et al., seven
      denoisers; paper, table 5), "ul2_decoder" (table 6) and "ntp" are fixed.
    vocab: special tokens.
    sequence_length: places of a row.
    grid: for the first two, "paper": the 96 configurations of appendix A.2;
      "small": 16 whose lengths are parts of the sequence length.
    paradigm_append_prob: see `ObjectiveConfig`; UL2 always prepends.

  Raises:
    UserError: for unknown names, or when nothing fits the sequence length.
  """
  if name not in PRESETS:
    raise UserError(f"mixture.preset={name!r}{did_you_mean(name, PRESETS)}")
  if grid not in GRIDS:
    raise UserError(f"mixture.grid={grid!r}{did_you_mean(grid, GRIDS)}")
  if name.startswith("birdie"):
    entries = _paper() if grid == "paper" else _small(sequence_length)
  elif name == "ntp":
    entries, paradigm_append_prob = _whole()[:1], 0.0
  else:
    ul2 = {"ul2": _ul2, "ul2_decoder": _ul2_decoder}[name]
    entries, paradigm_append_prob = ul2(vocab), 0.0
  made = [
    make_configuration(
      {**entry, "paradigm_append_prob": paradigm_append_prob}, vocab
    )
    for entry in entries
  ]
  kept = tuple(c for c in made if smallest_size(c) <= sequence_length)
  dropped = tuple(c.name for c in made if c not in kept)
  if not kept:
    raise UserError(
      f"mixture {name!r} has no configuration for rows of {sequence_length} "
      "places: choose a larger data.sequence_length"
    )
  if dropped:
    log.warning(
      "%d of %d configurations need more than %d places and are left out: %s",
      len(dropped), len(made), sequence_length, ", ".join(dropped),
    )  # fmt: skip
  if name.startswith("birdie"):
    probs = class_uniform([c.cls for c in kept])
  else:
    probs = normalized([c.weight for c in kept])
  return Preset(kept, probs, dropped)


def smallest_size(configuration: Configuration) -> int:
  """Places of a configuration's shortest example, as its objective says."""
  made = configuration.make(np.zeros(0, np.int32), np_rng(0, "size"), 0)
  if not isinstance(made, NotEnough):
    raise ValueError(f"{configuration.name} makes an example of nothing")
  return made.needed


def make_mixture(
  entries: Iterable[Mapping[str, Any]],
  vocab: Vocabulary,
  *,
  sequence_length: int,
  encode: Callable[[str], Iterable[int]] | None = None,
) -> Preset:
  """A mixture of the user's own.

  Args:
    entries: see `make_configuration`.
    vocab: special tokens.
    sequence_length: places of a row.
    encode: tokenizes paradigms that are given as strings.

  Raises:
    UserError: for unknown keys, names used twice, or an entry that does not
      fit a row.
  """
  made = tuple(
    make_configuration(entry, vocab, encode=encode)
    for entry in _checked(entries)
  )
  names = [c.name for c in made]
  for c in made:
    if names.count(c.name) > 1:
      raise UserError(
        f"mixture: {names.count(c.name)} entries are called {c.name!r}: give "
        "each a name of its own"
      )
    if smallest_size(c) > sequence_length:
      raise UserError(
        f"mixture: {c.name!r} needs {smallest_size(c)} places, a row has "
        f"{sequence_length}: lower its {_sizes(c)} or raise "
        "data.sequence_length"
      )
  return Preset(made, normalized([c.weight for c in made]))


def _checked(entries: Any) -> Iterable[Mapping[str, Any]]:
  """Refuses what a comma that is missing makes of a tuple of entries."""
  if isinstance(entries, str) or hasattr(entries, "keys"):
    raise UserError(
      f"mixture.entries={entries!r} is one entry and no tuple of them: write "
      "({'objective': …},), with a comma behind it"
    )
  for entry in entries:
    if not hasattr(entry, "keys"):
      raise UserError(
        f"mixture.entries: {entry!r} is no entry: write {{'objective': …}}"
      )
  return entries


def _sizes(configuration: Configuration) -> str:
  """The settings that make an example longer."""
  cfg = configuration.cfg
  if not isinstance(cfg, Task):
    return "min_length"
  pairs = [
    name
    for name in settings_of(type(cfg))
    if isinstance(getattr(cfg, name), tuple) and name != "paradigm"
  ]
  return " or ".join(pairs) or "sizes"


def with_shares(
  shares: str, configurations: Sequence[Configuration]
) -> np.ndarray:
  """A mixture that gives classes the shares of a text.

  Args:
    shares: as `copying=4, infilling=1`: by class, before normalization; a class
      that is not named gets 0. Configurations of a class share evenly.
    configurations: the K entries.

  Returns:
    float32 [K].

  Raises:
    UserError: for an unknown class, or a share that is no number from 0.
  """
  classes = [c.cls for c in configurations]
  found = dict.fromkeys(classes, 0.0)
  for part in shares.split(","):
    name, equals, value = (text.strip() for text in part.partition("="))
    if name not in found:
      raise UserError(f"mixture.shares: {name!r}{did_you_mean(name, found)}")
    try:
      number = float(value)
    except ValueError:
      raise UserError(
        f"mixture.shares: {name}{equals}{value!r} needs a number"
      ) from None
    found[name] = _weight(number, f"mixture.shares: {name}")
  return normalized([found[c] / classes.count(c) for c in classes])


def make_configuration(
  entry: Mapping[str, Any],
  vocab: Vocabulary,
  *,
  encode: Callable[[str], Iterable[int]] | None = None,
) -> Configuration:
  """A configuration from a mapping.

  Args:
    entry: `objective`, which may be a task; optional `name`, `cls` (default of
      both: the objective), `weight`, and any control that the objective reads
      (see `CONTROLS`) or setting of the task. `paradigm` may be an id, ids, or
      a string.
    vocab: special tokens; gives the paradigm where the entry names none.
    encode: tokenizes a string.

  Raises:
    UserError: for an unknown objective, key or value: nothing is ignored.
  """
  entry = dict(entry)
  objective = entry.pop("objective", None)
  known = _controls()
  if objective is None:
    raise UserError(
      "mixture: an entry has no key 'objective'; its keys: "
      f"{', '.join(map(repr, entry)) or 'none'}"
    )
  if objective in TASKS and not TASKS[objective].is_trainable:
    raise UserError(
      f"mixture: objective {objective!r} is for evaluation only: give it to "
      "birdie.evaluate --tasks"
    )
  if objective not in known:
    raise UserError(
      f"mixture: objective {objective!r} is unknown"
      f"{did_you_mean(str(objective), known)}"
    )
  what = f"mixture entry {entry.get('name', objective)!r}"
  about = ("name", "cls", "weight")
  check_keys(entry, (*about, *known[objective]), what=what)
  name, cls = (str(entry.pop(key, objective)) for key in ("name", "cls"))
  weight = _weight(entry.pop("weight", 1.0), what)
  is_task = objective not in OBJECTIVES
  announces = "prefix_language_modeling" if is_task else objective
  paradigm = entry.pop("paradigm", vocab.paradigms[announces])
  entry["paradigm"] = _paradigm(paradigm, vocab, encode, what)
  try:
    if is_task:
      cfg = TASKS[objective](vocab=vocab, encode=encode, **entry)
    else:
      cfg = ObjectiveConfig(vocab=vocab, **entry)
    made = Configuration(name, objective, cls, cfg, weight)
    smallest_size(made)  # refuses a bucket that can never be met
  except UserError as error:
    raise UserError(f"{what}: {error}") from None
  return made


def _controls() -> dict[str, tuple[str, ...]]:
  """The keys of every objective, and of tasks that one may train on."""
  tasks = {
    name: settings_of(task)
    for name, task in TASKS.items()
    if task.is_trainable and name not in CONTROLS
  }
  return CONTROLS | tasks


def _weight(value: Any, what: str) -> float:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not 0 <= value < math.inf:
    raise UserError(f"{what}: weight={value!r} must be a number of at least 0")
  return float(value)


def _paradigm(
  value: Any,
  vocab: Vocabulary,
  encode: Callable[[str], Iterable[int]] | None,
  what: str,
) -> tuple[int, ...]:
  if isinstance(value, str) and encode is None:
    raise UserError(f"{what}: paradigm={value!r} needs a tokenizer; give ids")
  try:
    ids = as_ids(value, encode or (lambda text: ()))
  except TypeError:
    raise UserError(
      f"{what}: paradigm={value!r} must be an id, ids, or a string"
    ) from None
  if not all(0 <= i < vocab.size for i in ids):
    raise UserError(
      f"{what}: paradigm={value!r} must have ids below {vocab.size}"
    )
  return ids


def _bucket(low: int, high: int) -> Entry:
  return {"min_length": low, "max_length": high}


def _entry(objective: str, name: str, **controls: Any) -> Entry:
  return {"objective": objective, "name": f"{objective}/{name}", **controls}


def _whole() -> list[Entry]:
  return [
    {"objective": "next_token_prediction"},
    {"objective": "prefix_language_modeling"},
  ]


def _paper() -> list[Entry]:
  """The 96 configurations of appendix A.2.

  Copying's upper bucket is printed as 256-2014; 1024 is taken, which is all
  that fits a row of 2048.
  """
  entries = _whole()
  entries += _corrupted(
    "infilling",
    [(128, 256), (256, 512), (512, 1024), (1024, 2048)],
    rates=[0.05, 0.15, 0.5],
  )
  for objective in ("autoencoding", "autoencoding_with_deshuffling"):
    entries += _corrupted(
      objective, [(192, 384), (384, 768), (768, 1536)], rates=[0.15, 0.85]
    )
  for low, high in [(64, 256), (256, 1024)]:
    entries.append(_entry("copying", f"{low}-{high}", **_bucket(low, high)))
  for (low, high), share in itertools.product(
    [(128, 256), (512, 1024)], [0.5, 1.0]
  ):
    name, controls = f"{low}-{high}_share{share:g}", _bucket(low, high)
    entries.append(_entry("deshuffling", name, shuffle_rate=share, **controls))
  for count, order, (low, high) in itertools.product(
    [1, 2, 3, 4],
    ["query_context", "context_query"],
    [(384, 768), (768, 1536)],
  ):
    name = f"{low}-{high}_spans{count}_{order}"
    controls = {"num_spans": count, "order": order, **_bucket(low, high)}
    entries.append(_entry("selective_copying", name, **controls))
  return entries


def _corrupted(
  objective: str, buckets: Sequence[tuple[int, int]], *, rates: Sequence[float]
) -> list[Entry]:
  """Every bucket with every rate and mean spans of 3, 8 and 32."""
  return [
    _entry(
      objective,
      f"{low}-{high}_rate{rate:g}_span{span:g}",
      corruption_rate=rate,
      mean_span=span,
      **_bucket(low, high),
    )
    for (low, high), rate, span in itertools.product(
      buckets, rates, [3.0, 8.0, 32.0]
    )
  ]


def _small(length: int) -> list[Entry]:
  """16 configurations of all eight objectives for rows of `length`."""

  def part(low: int, high: int) -> Entry:
    # At least what any of them needs, however short the rows.
    return _bucket(max(length // low, 4), max(length // high, 16))

  entries = _whole()
  for name, rate, span, bucket in [
    ("short_light", 0.15, 3.0, part(4, 2)),
    ("long_light", 0.15, 8.0, part(2, 1)),
    ("short_heavy", 0.5, 8.0, part(4, 2)),
  ]:
    entries.append(
      _entry("infilling", name, corruption_rate=rate, mean_span=span, **bucket)
    )
  for objective in ("autoencoding", "autoencoding_with_deshuffling"):
    for name, rate, span in [("light", 0.15, 3.0), ("heavy", 0.85, 8.0)]:
      entries.append(
        _entry(
          objective, name, corruption_rate=rate, mean_span=span, **part(8, 3)
        )
      )
  entries.append(_entry("copying", "short", **part(16, 8)))
  entries.append(_entry("copying", "long", **part(8, 3)))
  for name, share in [("half", 0.5), ("all", 1.0)]:
    entries.append(
      _entry("deshuffling", name, shuffle_rate=share, **part(8, 4))
    )
  for count, order in [
    (1, "query_context"),
    (1, "context_query"),
    (2, "query_context"),
  ]:
    entries.append(
      _entry(
        "selective_copying",
        f"spans{count}_{order}",
        num_spans=count,
        order=order,
        max_span=16,
        **part(4, 2),
      )
    )
  return entries


def _denoiser(span: float, rate: float, weight: float) -> Entry:
  return {
    "objective": "infilling",
    "name": f"r_span{span:g}_rate{rate:g}",
    "cls": "r",
    "mean_span": span,
    "corruption_rate": rate,
    "weight": weight,
  }


def _extreme(
  span: float, rate: float, weight: float, vocab: Vocabulary
) -> Entry:
  """UL2 announces its extreme denoisers with a token of their own."""
  return {
    **_denoiser(span, rate, weight),
    "name": f"x_span{span:g}_rate{rate:g}",
    "cls": "x",
    "paradigm": vocab.paradigms["infilling_x"],
  }


def _ul2(vocab: Vocabulary) -> list[Entry]:
  entries = [
    _denoiser(3, 0.15, 0.2),
    _denoiser(8, 0.15, 0.2),
    _extreme(3, 0.5, 0.1, vocab),
    _extreme(8, 0.5, 0.1, vocab),
    _extreme(64, 0.15, 0.1, vocab),
    _extreme(64, 0.5, 0.1, vocab),
  ]
  s = {"objective": "prefix_language_modeling", "name": "s", "cls": "s"}
  return [*entries, {**s, "weight": 0.2}]


def _ul2_decoder(vocab: Vocabulary) -> list[Entry]:
  next_token, prefix = _whole()
  return [
    {**next_token, "weight": 0.6},
    {**prefix, "weight": 0.2},
    _denoiser(3, 0.15, 0.1),
    _extreme(32, 0.5, 0.1, vocab),
  ]
