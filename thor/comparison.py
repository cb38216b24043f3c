"""The page of a comparison: scores, cost, claims, the ways to use THOR."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from common import files, statistics
from common.comparison import Claim, by_system, claims_table, grouped
from common.report import FILE_NAME, markdown_table
from thor.compare import Result
from thor.dispatch import Dispatch
from thor.routing import Routing
from thor.scores import by_tokenizer, paired_bootstrap

METRICS = (("bleu", "BLEU"), ("chrf", "chrF"), ("exact_match", "exact"))


# Tested where both were run. The first five at equal training cost.
CLAIMS = (
  Claim("THOR is better than R-Drop", "thor", "r_drop"),
  Claim("THOR is better than twice the updates of a dense model", "thor",
        "dense_2x"),
  Claim("THOR is better than Switch, twice the updates", "thor", "switch_2x"),
  Claim("THOR is better than Switch with two passes that agree", "thor",
        "switch_agree"),
  Claim("agreement helps: THOR is better than with alpha 0", "thor",
        "thor_alpha0"),
  Claim("R-Drop is better than twice the updates of a dense model", "r_drop",
        "dense_2x"),
  Claim("a gate is better than a random choice of experts", "switch",
        "random_switch"),
  Claim("fixed words are better than a random choice of experts", "hash",
        "random_switch"),
  Claim("Switch is better than a dense model", "switch", "dense"),
  Claim("pairs that are distinct are better", "thor_distinct", "thor"),
)  # fmt: skip


def write_page(folder: Any, config: Any) -> str:
  """Writes `report.md` from what has finished.

  Args:
    folder: the comparison's.
    config: see `configs/thor.py`.

  Returns:
    Its path.
  """
  order = list(config.compare.settings)
  results = [
    result
    for path in sorted(folder.glob("runs/*/*"))
    if (result := Result.load(path)) is not None and result.system in order
  ]
  results.sort(key=lambda result: (order.index(result.system), result.seed))
  splits = _splits(results)
  parts = [_head(config, results)]
  parts += [_table(split, results) for split in splits]
  parts += [
    _languages(splits[0], results),
    _claims(splits[0], results),
    _bootstrap(splits[0], folder, config, results),
    _modes(config, results),
    _settings(config, results),
  ]
  text = "\n\n".join(part for part in parts if part) + "\n"
  files.replace(folder / FILE_NAME, text)
  return str(folder / FILE_NAME)


def _splits(results: Sequence[Result]) -> list[str]:
  names = dict.fromkeys(
    name.partition("/")[0]
    for result in results
    for name in result.scores
    if name.partition("/")[2] == "bleu" and not name.startswith("copy_")
  )
  return list(names)


def _head(config: Any, results: Sequence[Result]) -> str:
  seeds = sorted({result.seed for result in results})
  return (
    "# THOR and its rivals\n\n"
    f"{len(results)} trainings, seeds {', '.join(map(str, seeds))}. Every "
    "system has the same text, vocabulary, batches and settings but for those "
    "listed at the end. Scores are means over target languages of the last "
    f"update's model, beam {config.translation.beam}; ± is the 95 % "
    "t-interval over seeds."
  )


def _table(split: str, results: Sequence[Result]) -> str:
  rows: list[tuple[str, ...]] = []
  values = {m: by_system(results, f"{split}/{m}") for m, _ in METRICS}
  for system, own in grouped(results):
    found = [_mean(values[m].get(system, {})) for m, _ in METRICS]
    first = own[0]
    rows.append(
      (
        f"`{system}`",
        *found,
        str(len(own)),
        f"{first.params:,}",
        f"{first.steps * first.train_flops / 1e12:.2f}",
        f"{first.infer_flops / 1e6:.2f}",
        f"{np.median([r.seconds for r in own]) * first.steps / 60:.1f}",
      )
    )
  copied = [
    f"{next(iter(_first(results, f'copy_{split}/{m}')), np.nan):.1f}"
    for m, _ in METRICS
  ]
  rows.append(("copying the source", *copied, *["–"] * 5))
  header = (
    "system", *(title for _, title in METRICS), "seeds", "parameters",
    "training, TFLOP", "translation, MFLOP", "training, minutes",
  )  # fmt: skip
  note = (
    "Training counts the matrix products of all updates, the room that "
    "experts keep included and padding left out; translation those of a source "
    "token and a target token; by formula. Minutes are wall time beside "
    "whatever else ran."
  )
  return f"## {split}\n\n{markdown_table(header, rows)}\n\n{note}"


def _first(results: Sequence[Result], metric: str) -> Iterator[float]:
  return (r.scores[metric] for r in results if metric in r.scores)


def _mean(values: Mapping[int, float]) -> str:
  if not values:
    return "–"
  found = statistics.interval(list(values.values()))
  return statistics.format_interval(found, scale=1)


def _languages(split: str, results: Sequence[Result]) -> str:
  prefix = f"{split}/bleu/"
  names = dict.fromkeys(
    name.removeprefix(prefix)
    for result in results
    for name in result.scores
    if name.startswith(prefix)
  )
  if not names:
    return ""
  rows = [
    (
      f"`{system}`",
      *(_mean(by_system(own, prefix + name)[system]) for name in names),
    )
    for system, own in grouped(results)
  ]
  table = markdown_table(("system", *names), rows)
  return f"## BLEU of `{split}` by language\n\n{table}"


def _claims(split: str, results: Sequence[Result]) -> str:
  values = by_system(results, f"{split}/bleu")
  table = claims_table(CLAIMS, values, unit="BLEU", scale=1)
  if not table:
    return ""
  note = (
    f"Differences of `{split}` seed by seed, two-sided paired t-tests, "
    "corrected for the number of claims. Nothing was tuned for this page, so "
    "what holds here holds for these settings."
  )
  return f"## What holds\n\n{note}\n\n{table}"


def _bootstrap(
  split: str, folder: Any, config: Any, results: Sequence[Result]
) -> str:
  """Resampled sentences: all seeds' translations as one test set."""
  baseline = config.compare.baseline
  seeds = {name: {r.seed for r in own} for name, own in grouped(results)}
  if baseline not in seeds:
    return ""
  common = set.intersection(*seeds.values())
  if not common or len(seeds) < 2:
    return ""
  texts: dict[str, list[str]] = {}
  pairs: list[dict[str, str]] = []
  for system in seeds:
    pairs = [
      json.loads(line)
      for seed in sorted(common)
      for line in (
        folder / f"runs/{system}/seed{seed}/translations/{split}.jsonl"
      ).read_text().splitlines()
    ]  # fmt: skip
    texts[system] = [pair["translation"] for pair in pairs]
  parts = by_tokenizer([pair["language"] for pair in pairs])
  samples = config.compare.samples
  note = (
    f"The sentences of `{split}` resampled {samples:,} times, against "
    f"`{baseline}`, the translations of {len(common)} seeds as one text; p is "
    "not corrected."
  )
  tables = [
    _resampled(
      part,
      {name: [own[i] for i in places] for name, own in texts.items()},
      [pairs[i]["target"] for i in places],
      {"baseline": baseline, "samples": samples, "tokenize": tokenize},
    )
    for part, (places, tokenize) in parts.items()
  ]
  return "\n\n".join(["## Paired bootstrap", note, *tables])


def _resampled(
  part: str,
  texts: Mapping[str, Sequence[str]],
  references: Sequence[str],
  settings: Mapping[str, Any],
) -> str:
  """The table of languages that one tokenizer serves."""
  found = paired_bootstrap(texts, references, **settings)
  rows = []
  for system, own in found.items():
    cells = []
    for metric in ("bleu", "chrf"):
      one = own[metric]
      cells.append(f"{one.mean:.1f} ± {one.half_width:.1f}")
      cells.append("–" if np.isnan(one.p_value) else f"{one.p_value:.3g}")
    rows.append((f"`{system}`", *cells))
  header = ("system", "BLEU", "p", "chrF", "p")
  name = "All languages" if part == "all" else part
  signature = found[settings["baseline"]]["bleu"].score.signature
  table = markdown_table(header, rows)
  return f"{name}, signature `{signature}`:\n\n{table}"


def _modes(config: Any, results: Sequence[Result]) -> str:
  """How the ways to use THOR differ, and what they cost."""
  own = [result for result in results if result.modes]
  if not own:
    return ""
  routing = Routing(**config.routing.to_dict())
  rows = []
  for mode in own[0].modes:
    cells = []
    for metric, _ in METRICS:
      values = np.array(
        [result.modes[mode][metric] for result in own if mode in result.modes]
      )
      # [trainings, draws]: the draws' spread within a training.
      spread = "–"
      if values.shape[1] > 1:
        spread = f"{values.std(axis=1, ddof=1).mean():.2f}"
      cells.append(f"{values.mean():.1f} ({spread})")
    way = Dispatch.parse(mode, routing)
    rows.append((f"`{way}`", *cells, f"{_cost(config, way):.2f}"))
  header = ("dispatch", *(title for _, title in METRICS), "cost")
  note = (
    f"Means over languages, {len(own)} trainings and "
    f"{config.compare.mode_seeds} seeds where there are draws, of at most "
    f"{config.translation.mode_rows} sentences a language; in brackets the "
    "standard deviation over draws. Cost is that of a token's matrix products "
    "against one expert a layer."
  )
  return f"## Ways to use THOR\n\n{note}\n\n{markdown_table(header, rows)}"


def _cost(config: Any, way: Dispatch) -> float:
  from thor.cost import dispatch_flops, forward_flops
  from thor.settings import make_settings

  settings = make_settings(
    config.model.to_dict(),
    Routing(**config.routing.to_dict()),
    vocab_size=config.vocabulary.size,
  )
  flops = dispatch_flops(settings, way.name, way.number).total
  return flops / forward_flops(settings).total


def _settings(config: Any, results: Sequence[Result]) -> str:
  rows = [
    (f"`{system}`", f"{own[0].steps:,}",
     ", ".join(f"`{e}`" for e in config.compare.settings[system]) or "–")
    for system, own in grouped(results)
  ]  # fmt: skip
  return "## Systems\n\n" + markdown_table(
    ("system", "updates", "settings"), rows
  )
