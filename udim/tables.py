"""The page of a comparison: tables, claims and figures from results."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common import files, statistics
from common.report import duration, markdown_table, number
from udim.claims import claims_section
from udim.results import Result, by_domain, by_seed, choose_draws
from udim.selection import METHODS

FILE_NAME = "report.md"
BySeed = dict[int, float]

_TITLES = {
  "source": "Models chosen by the sources' held-out images",
  "oracle": "Models chosen by the targets' held-out images (oracle)",
  "last": "Models at the end of training",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Results in the order of the table.

  Attributes:
    labels: rows.
    references: what others are compared with, in pairs.
    results: all of them.
  """

  labels: tuple[str, ...]
  references: tuple[str, ...]
  results: tuple[Result, ...]

  def of(self, label: str, method: str) -> list[Result]:
    """The results of a label, one for each run and seed."""
    own = [r for r in self.results if r.label == label]
    return choose_draws(own, method)

  def scores(self, label: str, method: str) -> BySeed:
    """Mean target accuracy by seed."""
    return by_seed(self.of(label, method), method)

  def measured(self, label: str, value: Callable[[Result], Any]) -> BySeed:
    """A number of every run of the source selection, mean by seed."""
    found: dict[int, list[float]] = {}
    for result in self.of(label, "source"):
      one = value(result)
      if one is not None:
        found.setdefault(result.seed, []).append(one)
    return {seed: float(np.mean(v)) for seed, v in found.items()}


def write_comparison(
  folder: Any, config: Any, results: Sequence[Result]
) -> str:
  """Writes `report.md` and `plots/*.png`.

  Args:
    folder: of the comparison.
    config: its configuration.
    results: of all finished runs.

  Returns:
    The path of the page.
  """
  from udim.jobs import split_labels

  present = {result.label for result in results}
  order = [x for x in split_labels(config.compare.algorithms) if x in present]
  references = split_labels(config.compare.references)
  table = Comparison(
    tuple(order), tuple(r for r in references if r in present), tuple(results)
  )
  parts = [_head(folder, config, table)]
  methods = [m for m in METHODS if any(table.of(x, m) for x in order)]
  parts += [_accuracy_section(table, method) for method in methods]
  parts.append(claims_section(table.scores, tuned=_is_tuned(config)))
  parts.append(_domain_section(table))
  parts.append(cost_section(table))
  parts.append(landscape_section(table))
  parts.append(_figures_section(folder, config, table))
  parts.append(_settings_section(table))
  text = "\n\n".join(part.strip() for part in parts if part) + "\n"
  files.replace(folder / FILE_NAME, text)
  return os.fspath(folder / FILE_NAME)


def _is_tuned(config: Any) -> bool:
  """Whether other seeds, or another comparison, chose the settings."""
  return bool(config.search.tuning_seeds or config.search.chosen)


def _head(folder: Any, config: Any, table: Comparison) -> str:
  import json

  first = folder / _folder_of(table.results[0]) / "facts.json"
  facts = json.loads(first.read_text()) if first.exists() else {}
  seeds = sorted({r.seed for r in table.results})
  runs = list(dict.fromkeys(r.run for r in table.results))
  steps = sum(r.cost["seconds"] or 0 for r in table.results)
  rows = [
    ("data", f"{config.data.source.kind}, protocol {config.protocol}"),
    ("runs a seed", ", ".join(runs)),
    ("seeds", f"{len(seeds)}: {', '.join(map(str, seeds))}"),
    ("steps", f"{config.num_steps:,}"),
    ("images in a batch", f"{config.data.images_per_domain} a source domain"),
    ("model", config.model.name),
    ("devices", str(facts.get("devices", "–"))),
    ("versions", ", ".join(
      f"{k} {v}" for k, v in facts.get("versions", {}).items()
    )),
    ("time in steps", duration(steps * config.num_steps)),
  ]  # fmt: skip
  intro = (
    "Accuracies in percent, means over the targets; ± is the 95 % t-interval "
    "over seeds. Differences are paired: the same seed means the same weights "
    "at first, the same batches and the same splits. A seed moves everything "
    "that is random, the data's corruptions too."
  )
  if not _is_tuned(config):
    intro += (
      " Nothing was tuned for this page: settings are the configuration's, or "
      "each run chose among its own draws; those of the digits were known to "
      "do well on them, so the page shows that all works, not which method is "
      "better."
    )
  head = f"# Comparison: {config.data.source.kind}"
  return "\n\n".join([head, intro, markdown_table(("", ""), rows)])


def _folder_of(result: Result) -> str:
  from udim.jobs import Job

  return Job(
    result.label, result.run, result.seed, result.draw, None, {}
  ).folder


def _accuracy_section(table: Comparison, method: str) -> str:
  header = ["algorithm", "target"]
  header += [f"minus {reference}" for reference in table.references]
  header += ["source held out", "reference"]
  rows = []
  for label in table.labels:
    scores = table.scores(label, method)
    row = [label, _interval(scores)]
    for reference in table.references:
      row.append(_difference(scores, table.scores(reference, method), label,
                             reference))  # fmt: skip
    for name in ("source", "reference"):
      values = {}
      for result in table.of(label, method):
        one = getattr(result.selected[method], name)
        if one is not None:
          values.setdefault(result.seed, []).append(one)
      row.append(_interval({s: float(np.mean(v)) for s, v in values.items()}))
    rows.append(row)
  return f"## {_TITLES[method]}\n\n" + markdown_table(header, rows)


def _interval(values: BySeed, **form: Any) -> str:
  if not values:
    return "–"
  found = statistics.interval(list(values.values()))
  return statistics.format_interval(found, **form)


def _difference(
  values: BySeed, reference: BySeed, label: str, other: str, **form: Any
) -> str:
  if label == other or not set(values) & set(reference):
    return "–"
  found = statistics.paired(*statistics.align(values, reference))
  return statistics.format_interval(found, signed=True, **form)


def domain_groups(domains: Sequence[str]) -> dict[str, list[str]]:
  """`blur_1`, `blur_2` -> {"blur": [...]}; else each domain for itself."""
  groups: dict[str, list[str]] = {}
  for domain in domains:
    match = re.fullmatch(r"(.+)_([1-5])", domain)
    groups.setdefault(match[1] if match else domain, []).append(domain)
  return groups


def group_scores(results: Sequence[Result]) -> dict[str, BySeed]:
  """Accuracy by group of domains and seed, models chosen by source."""
  domains = by_domain(results, "source")
  found = {}
  for group, names in domain_groups(list(domains)).items():
    seeds = domains[names[0]]
    found[group] = {
      seed: float(np.mean([domains[name][seed] for name in names]))
      for seed in seeds
    }
  return found


def _domain_section(table: Comparison) -> str:
  rows, groups = [], []
  for label in table.labels:
    scores = group_scores(table.of(label, "source"))
    groups = groups or list(scores)
    rows.append([label, *(_interval(scores.get(g, {})) for g in groups)])
  note = "Models chosen by the sources' held-out images."
  return f"## By domain\n\n{note}\n\n" + markdown_table(
    ["algorithm", *groups], rows
  )


def _mean(values: BySeed) -> float:
  return float(np.mean(list(values.values()))) if values else math.nan


def cost_section(table: Comparison) -> str:
  """FLOPs, time and memory of a step, as Markdown."""
  base = "erm" if "erm" in table.labels else table.labels[0]
  flops = _mean(table.measured(base, lambda r: r.cost["flops"]))
  time = table.measured(base, lambda r: r.cost["seconds"])
  rows = []
  for label in table.labels:
    own = table.measured(label, lambda r: r.cost["seconds"])
    ratio = {s: own[s] / time[s] for s in own if s in time}
    per_step = _mean(table.measured(label, lambda r: r.cost["flops"]))
    memory = _mean(table.measured(label, lambda r: r.cost["temporaries"]))
    rows.append(
      (
        label,
        number(per_step / flops),
        _interval(ratio, digits=2, scale=1.0),
        number(1000 * _mean(own)),
        number(memory / 2**20),
      )
    )
  note = (
    f"FLOPs (the compiler's) and time of a mean step over those of {base} on "
    "the same seed; temporaries are what the largest step needs beside its "
    "arguments. Times are of a whole training loop on a machine that may have "
    "had other work."
  )
  header = (
    "algorithm", f"FLOPs / {base}", f"time / {base}", "ms a step",
    "temporaries, MiB",
  )  # fmt: skip
  return f"## Cost\n\n{note}\n\n" + markdown_table(header, rows)


def _landscape_columns() -> dict[str, Callable[[Result], Any]]:
  """Heading -> the number of a result under it."""
  from udim.measure import RADII

  at = RADII.index(0.05)
  return {
    "top eigenvalue": lambda r: r.landscape.get("eigenvalue"),
    "gap on sources": lambda r: r.landscape.get("gap_source", {at: None})[at],
    "gap on targets": lambda r: r.landscape.get("gap_target", {at: None})[at],
  }


def landscape_section(table: Comparison) -> str:
  """Sharpness at the end of training; "" where it was not measured."""
  if not any(r.landscape for r in table.results):
    return ""
  columns = _landscape_columns()
  header = ["algorithm"]
  for name in columns:
    header += [name, *(f"minus {r}" for r in table.references[:2])]
  rows = []
  for label in table.labels:
    row = [label]
    for value in columns.values():
      own = table.measured(label, value)
      row.append(_interval(own, digits=3, scale=1.0))
      for reference in table.references[:2]:
        other = table.measured(reference, value)
        row.append(
          _difference(own, other, label, reference, digits=3, scale=1.0)
        )
    rows.append(row)
  note = (
    "At the end of training, in evaluation mode. The eigenvalue is the largest "
    "of the Hessian of the source loss (Lanczos on Hessian-vector products); a "
    "gap is what a step of 0.05 up the gradient adds to the loss."
  )
  return f"## Flatness\n\n{note}\n\n" + markdown_table(header, rows)


def _figures_section(folder: Any, config: Any, table: Comparison) -> str:
  from udim.gallery import comparison_figures

  (folder / "plots").mkdir(parents=True, exist_ok=True)
  parts = ["## Figures"]
  for name, title, png, note in comparison_figures(
    folder, config, table, folder_of=_folder_of
  ):
    files.replace(folder / "plots" / f"{name}.png", png)
    parts.append(f"![{title}](plots/{name}.png)")
    if note:
      parts.append(note)
  return "\n\n".join(parts)


def _settings_section(table: Comparison) -> str:
  rows = []
  for label in table.labels:
    draws: dict[tuple[int, str], int] = {}
    for result in table.of(label, "source"):
      settings = {k: v for k, v in result.settings.items() if k != "algorithm"}
      shown = ", ".join(
        f"{key} = {number(value) if isinstance(value, float) else value}"
        for key, value in settings.items()
      )
      shown = shown or "as in the configuration"
      key = result.draw, shown + ("; diverged" if result.stopped else "")
      draws[key] = draws.get(key, 0) + 1
    for (draw, shown), count in draws.items():
      rows.append((label, str(draw), shown, str(count)))
  header = ("algorithm", "draw", "settings", "runs")
  return "## Settings\n\n" + markdown_table(header, rows)
