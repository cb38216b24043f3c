"""Test sets, translated and scored while training and at its end."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from common import files
from common.errors import UserError
from common.parallel import (
  batch_sharding,
  gather_texts,
  local_mesh,
  replicated,
  to_host,
)
from common.report import markdown_table
from thor.corpus import Corpus
from thor.cost import dispatch_flops
from thor.decode import Search
from thor.dispatch import Dispatch, prepare
from thor.pairs import Pair
from thor.routing import Routing
from thor.scores import Score, by_language
from thor.translator import Translator

log = logging.getLogger(__name__)

PAGE = "translations.md"
METRICS = ("bleu", "chrf", "exact_match")
SAMPLES = 2  # shown of each language


def check_translation(config: Any, routing: Routing) -> None:
  """Refuses settings of `config.translation` without a meaning."""
  cfg = config.translation
  for key, least in (("every", 0), ("rows", 0), ("mode_rows", 0)):
    if cfg[key] < least:
      raise UserError(f"translation.{key}={cfg[key]} must be at least {least}")
  make_search(config)
  if cfg.token_budget < 1:
    raise UserError(
      f"translation.token_budget={cfg.token_budget} must be at least 1"
    )
  if min(_lengths(config), default=0) < 3:
    raise UserError(
      f"data.lengths={config.data.lengths}: none may be below 3: a tag, a "
      "token and the end"
    )
  for mode in cfg.modes:
    Dispatch.parse(mode, routing)


def make_search(config: Any) -> Search:
  """The search of a configuration."""
  cfg = config.translation
  return Search(
    beam=cfg.beam,
    length_penalty=cfg.length_penalty,
    penalty=cfg.penalty,
    max_ratio=cfg.max_ratio,
    max_extra=cfg.max_extra,
  )


class TestTranslations:
  """Translates the test sets, writes them down, and returns their scores.

  Processes divide the sentences, and each uses all of its devices: what they
  translate does not depend on how many there are.

  Args:
    config: see `configs/thor.py`.
    setup: see `thor.train.Setup`.
    corpus: the text.
    folder: the run's; gets `translations.md` and `translations/SPLIT.jsonl`.
  """

  __test__ = False  # not a class of tests

  def __init__(self, config: Any, setup: Any, corpus: Corpus, folder: Any):
    self._config = config
    self._setup = setup
    self._corpus = corpus
    self._folder = folder
    self._search = make_search(config)
    rows = config.translation.rows
    self._splits = {
      name: _first_of_each(corpus.parallel.splits[name], rows)
      for name in corpus.test_splits
    }

  def is_due(self, step: int) -> bool:
    """At the end, and every so many steps."""
    every = self._config.translation.every
    return step == self._config.num_steps or (every > 0 and step % every == 0)

  def __call__(self, params: Any) -> dict[str, float]:
    """Scalars, by split, metric and language.

    `SPLIT/METRIC` is the mean over languages, `SPLIT/METRIC/LANGUAGE` each;
    `copy_SPLIT/…` is what copying the source gives; `mode/METRIC/MODE` are
    means over languages of the first test set.
    """
    params = to_host(params)
    mesh = local_mesh()
    with jax.set_mesh(mesh):
      params = jax.device_put(params, replicated(mesh))
    made, page = self._splits_scored(params)
    modes, rows = self._modes_scored(params)
    if jax.process_index() == 0:
      files.replace(self._folder / PAGE, "\n\n".join([*page, *rows]) + "\n")
    return made | modes

  def _splits_scored(self, params: Any) -> tuple[dict[str, float], list[str]]:
    made, page, samples = {}, [], []
    for split, pairs in self._splits.items():
      log.info("translating %s: %s sentences", split, f"{len(pairs):,}")
      texts = self._translate(params, pairs, self._setup.dispatch)
      self._write(split, pairs, texts)
      ours, copied = _scores(pairs, texts), _scores(pairs, None)
      log.info(
        "%s: BLEU %.1f, chrF %.1f (copying the source: %.1f, %.1f)", split,
        *(_mean(own, m) for own in (ours, copied) for m in METRICS[:2]),
      )  # fmt: skip
      made |= _flat(split, ours) | _flat(f"copy_{split}", copied)
      page.append(_score_table(split, len(pairs), ours, copied))
      samples += _samples(pairs, texts) if not samples else []
    way = f"Dispatch `{self._setup.dispatch}`, beam {self._search.beam}."
    header = ("", "source", "reference", "translation")
    tables = [*page, "## Sample translations", markdown_table(header, samples)]
    return made, ["## Test scores", way, *tables]

  def _modes_scored(self, params: Any) -> tuple[dict[str, float], list[str]]:
    cfg = self._config.translation
    if not cfg.modes:
      return {}, []
    split = next(iter(self._splits))
    pairs = _first_of_each(self._splits[split], cfg.mode_rows)
    made, rows = {}, []
    base = dispatch_flops(self._setup.settings, "fixed", 0).total
    for mode in cfg.modes:
      log.info("translating %s by %s", split, mode)
      way = Dispatch.parse(mode, self._setup.routing)
      scores = _scores(pairs, self._translate(params, pairs, way))
      flops = dispatch_flops(self._setup.settings, way.name, way.number).total
      means = [_mean(scores, metric) for metric in METRICS]
      made |= {
        f"mode/{metric}/{way}": mean for metric, mean in zip(METRICS, means)
      }
      rows.append(
        (f"`{way}`", *(f"{m:.1f}" for m in means), f"{flops / base:.2f}")
      )
    header = ("dispatch", "BLEU", "chrF", "exact", "cost")
    note = (
      f"Means over languages of {len(pairs):,} pairs of `{split}`; cost is "
      "that of a token's matrix products, against one expert a layer."
    )
    table = markdown_table(header, rows)
    return made, ["## Quality by dispatch", note, table]

  def _translate(
    self, params: Any, pairs: Sequence[Pair], dispatch: Dispatch
  ) -> list[str]:
    index, count = jax.process_index(), jax.process_count()
    with jax.set_mesh(local_mesh()):
      prepared = prepare(
        params,
        self._setup.settings,
        dispatch,
        seed=self._config.evaluation.seed,
        table=self._setup.table,
      )
      mine = _translated(
        self._config, prepared, self._corpus.vocabulary, pairs[index::count]
      )
    # All processes together, which no mesh of one of them allows.
    return gather_texts(mine)

  def _write(self, split: str, pairs: Sequence[Pair], texts: list[str]) -> None:
    if jax.process_index() != 0:
      return
    folder = self._folder / "translations"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
      json.dumps(pair._asdict() | {"translation": text}, ensure_ascii=False)
      for pair, text in zip(pairs, texts)
    ]
    files.replace(folder / f"{split}.jsonl", "\n".join(lines) + "\n")


def translate_pairs(
  run: Any,
  pairs: Sequence[Pair],
  *,
  dispatch: str = "",
  seed: int | None = None,
) -> list[str]:
  """Translates with a trained run, as its configuration says.

  Args:
    run: see `thor.run.load_run`.
    pairs: whose sources are translated into their languages.
    dispatch: the way to use the model; "" for the training's.
    seed: of its draws; None: the training's.
  """
  way = Dispatch.parse(dispatch or run.config.evaluation.dispatch, run.routing)
  seed = run.config.evaluation.seed if seed is None else seed
  prepared = prepare(run.params, run.settings, way, seed=seed, table=run.table)
  return _translated(run.config, prepared, run.vocabulary, pairs)


def mode_scores(
  run: Any, pairs: Sequence[Pair], mode: str, seed: int
) -> dict[str, float]:
  """Means over languages of the first `translation.mode_rows` of each.

  Args: as for `translate_pairs`.
  """
  pairs = _first_of_each(pairs, run.config.translation.mode_rows)
  texts = translate_pairs(run, pairs, dispatch=mode, seed=seed)
  scores = _scores(pairs, texts)
  return {metric: _mean(scores, metric) for metric in METRICS}


def _translated(
  config: Any, prepared: Any, vocabulary: Any, pairs: Sequence[Pair]
) -> list[str]:
  translator = Translator(
    prepared,
    vocabulary,
    make_search(config),
    lengths=_lengths(config),
    token_budget=config.translation.token_budget,
    sharding=batch_sharding(local_mesh()),
    # A warning counts them. A run shall not end for a long test sentence.
    too_long="split",
  )
  sources = [pair.source for pair in pairs]
  languages = [pair.language for pair in pairs]
  return [made.text for made in translator.translate(sources, languages)]


def _lengths(config: Any) -> list[int]:
  """Of sources, that batches are padded to."""
  return [n if isinstance(n, int) else n[0] for n in config.data.lengths]


def _first_of_each(pairs: Sequence[Pair], rows: int) -> list[Pair]:
  """At most so many pairs of each language; 0: all."""
  chosen, seen = [], {}
  for pair in pairs:
    seen[pair.language] = seen.get(pair.language, 0) + 1
    if not rows or seen[pair.language] <= rows:
      chosen.append(pair)
  return chosen


def _scores(
  pairs: Sequence[Pair], texts: Sequence[str] | None
) -> dict[str, dict[str, Score]]:
  """By language; of the sources themselves if there are no texts."""
  return by_language(
    [pair.source for pair in pairs] if texts is None else texts,
    [pair.target for pair in pairs],
    [pair.language for pair in pairs],
  )


def _mean(scores: Mapping[str, Mapping[str, Score]], metric: str) -> float:
  values = [own[metric].value for own in scores.values()]
  return sum(values) / len(values)


def _flat(
  name: str, scores: Mapping[str, Mapping[str, Score]]
) -> dict[str, float]:
  made = {f"{name}/{metric}": _mean(scores, metric) for metric in METRICS}
  for language, own in scores.items():
    if language:
      made |= {f"{name}/{m}/{language}": own[m].value for m in METRICS}
  return made


def _score_table(split: str, count: int, ours: Any, copied: Any) -> str:
  def row(name: str, values: Sequence[float]) -> tuple[str, ...]:
    return (name, *(f"{value:.1f}" for value in values))

  rows = [
    row(
      language or "all",
      [own[m].value for m in METRICS]
      + [copied[language][m].value for m in METRICS],
    )
    for language, own in ours.items()
  ]
  if len(rows) > 1:
    means = [_mean(ours, m) for m in METRICS]
    rows.append(row("mean", means + [_mean(copied, m) for m in METRICS]))
  header = (
    "", "BLEU", "chrF", "exact", "copy: BLEU", "copy: chrF", "copy: exact",
  )  # fmt: skip
  kinds = sorted({str(own[m].signature) for own in ours.values()
                  for m in METRICS[:2]})  # fmt: skip
  signatures = ", ".join(f"`{kind}`" for kind in kinds)
  return "\n\n".join(
    [
      f"### {split}",
      markdown_table(header, rows),
      f"{count:,} pairs. `copy` is the source itself in place of a "
      f"translation. Signatures: {signatures}.",
    ]
  )


def _samples(
  pairs: Sequence[Pair], texts: Sequence[str]
) -> list[tuple[str, str, str, str]]:
  rows, seen = [], {}
  for pair, text in zip(pairs, texts):
    seen[pair.language] = seen.get(pair.language, 0) + 1
    if seen[pair.language] <= SAMPLES:
      rows.append((pair.language, pair.source, pair.target, text))
  return rows
