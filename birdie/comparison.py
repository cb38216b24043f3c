"""The page of a comparison: answers by look-ups, claims, what was chosen."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from birdie.compare import Result
from common import files, statistics
from common.comparison import (
  Claim,
  by_system,
  claims_table,
  grouped,
  system_names,
)
from common.plots import Palette, png, sheet
from common.report import FILE_NAME, markdown_table

FIGURE = "lookups.png"
CURVES = "finetuning.png"
ALL = "all"  # classes together
# Tested where both were run.
CLAIMS = tuple(
  Claim(f"{text}{' (causal)' if causal else ''}", a + causal, b + causal)
  for causal in ("", "_causal")
  for text, a, b in (
    ("training on text helps: NTP is better than no training", "ntp", "none"),
    ("Birdie is better than NTP", "birdie", "ntp"),
    ("Birdie is better than UL2", "birdie", "ul2"),
    ("the controller is better than a uniform mixture", "birdie", "uniform"),
    ("the controller is better than the best fixed mixture of a search",
     "birdie", "searched"),
  )
) + tuple(
  Claim(f"reading both ways is better: {title}", name, f"{name}_causal")
  for title, name in (
    ("no training", "none"), ("NTP", "ntp"), ("UL2", "ul2"),
    ("uniform", "uniform"), ("Birdie", "birdie"),
  )
)  # fmt: skip


def write_page(folder: Any, config: Any) -> str:
  """Writes `report.md` and its figures from what has finished.

  Args:
    folder: the comparison's.
    config: see `configs/birdie.py`.

  Returns:
    The page's path.
  """
  named = system_names(config.compare.systems)
  order = list(dict.fromkeys([*named, *config.compare.settings]))
  results = [
    result
    for path in sorted(folder.glob("runs/*/*"))
    if (result := Result.load(path)) is not None and result.system in order
  ]
  results.sort(key=lambda result: (order.index(result.system), result.seed))
  (folder / FIGURE).write_bytes(_figure(config, results))
  (folder / CURVES).write_bytes(_curves(results))
  parts = [
    _head(config, results),
    _table(config, results),
    f"![Answers right by look-ups]({FIGURE})",
    f"![Fine-tuning]({CURVES})",
    _claims(results),
    _losses(results),
    _controller(results),
    _settings(config, results),
  ]
  text = "\n\n".join(part for part in parts if part) + "\n"
  files.replace(folder / FILE_NAME, text)
  return str(folder / FILE_NAME)


def _head(config: Any, results: Sequence[Result]) -> str:
  seeds = sorted({result.seed for result in results})
  cfg = config.compare.finetune
  task = ", ".join(f"{k}={v}" for k, v in cfg.task.items() if k != "name")
  return (
    "# Mixtures compared by what is found again\n\n"
    f"{len(results)} models, seeds {', '.join(map(str, seeds))}. Each is "
    f"trained {config.num_steps:,} steps on text, then {cfg.num_steps:,} on "
    f"`{cfg.task.name}` ({task}), and answers {config.compare.problems} unseen "
    "problems of every number of look-ups greedily. Parameters, places of all "
    "batches and seeds are equal, but where a system has no training on text; "
    "± is the 95 % t-interval over seeds. `context` is what an answer drawn "
    "from the prompt is expected to have right."
  )


def _table(config: Any, results: Sequence[Result]) -> str:
  metrics = ["answers"] + [f"answers/{q}" for q in config.compare.lookups]
  values = {metric: by_system(results, metric) for metric in metrics}
  rows: list[tuple[str, ...]] = []
  for system, own in grouped(results):
    rows.append(
      (
        f"`{system}`",
        *(_mean(values[metric].get(system, {})) for metric in metrics),
        str(len(own)),
        f"{own[0].params:,}",
        f"{own[0].tokens / 1e6:.2f}",
        f"{np.median([r.seconds for r in own]) / 60:.1f}",
      )
    )
  context = results[0].baselines
  numbers = [f"{100 * context[metric]:.1f}" for metric in metrics]
  rows.append(("`context`", *numbers, *["–"] * 4))
  header = (
    "system", "all",
    *(f"{q} look-up{'s' * (q > 1)}" for q in config.compare.lookups),
    "seeds", "parameters", "training, M places", "minutes",
  )  # fmt: skip
  return f"## Answers right, %\n\n{markdown_table(header, rows)}"


def _mean(values: Mapping[int, float]) -> str:
  if not values:
    return "–"
  found = statistics.interval(list(values.values()))
  return statistics.format_interval(found)


def _figure(config: Any, results: Sequence[Result]) -> bytes:
  palette, lookups = Palette(), list(config.compare.lookups)
  with sheet() as figure:
    axes = figure.subplots()
    for system, own in grouped(results):
      colour, style = palette(system)
      found = [
        statistics.interval([r.scores[f"answers/{q}"] for r in own])
        for q in lookups
      ]
      means = np.array([100 * one.mean for one in found])
      widths = 100 * np.nan_to_num([one.half_width for one in found])
      axes.errorbar(
        lookups,
        means,
        [np.minimum(widths, means), np.minimum(widths, 100 - means)],
        color=colour, linestyle=style, label=system, capsize=2,
      )  # fmt: skip
    context = results[0].baselines
    axes.plot(
      lookups,
      [100 * context[f"answers/{q}"] for q in lookups],
      color="grey",
      linestyle=":",
      label="context",
    )
    axes.set_xticks(lookups)
    axes.set_xlabel("look-ups")
    axes.set_ylabel("answers right, %")
    axes.legend(fontsize="small", ncols=2)
    return png(figure)


def _curves(results: Sequence[Result]) -> bytes:
  palette = Palette()
  with sheet() as figure:
    axes = figure.subplots()
    for system, own in grouped(results):
      colour, style = palette(system)
      shared = min(len(result.curve) for result in own)
      curves = np.array([result.curve[:shared] for result in own])
      axes.plot(
        curves[0, :, 0],
        100 * curves[:, :, 1].mean(0),
        color=colour,
        linestyle=style,
        label=system,
      )
    axes.set_xlabel("steps of fine-tuning")
    axes.set_ylabel("tokens right, %, fresh problems")
    axes.legend(fontsize="small", ncols=2)
    return png(figure)


def _claims(results: Sequence[Result]) -> str:
  values = by_system(results, "answers")
  table = claims_table(CLAIMS, values, unit="points")
  if not table:
    return ""
  note = (
    "Differences of all answers seed by seed, two-sided paired t-tests, "
    "corrected for the number of claims."
  )
  return f"## What holds\n\n{note}\n\n{table}"


def _losses(results: Sequence[Result]) -> str:
  """The last validation losses of the training on text."""
  prefix = "eval_class/loss/"
  names = dict.fromkeys(
    name
    for result in results
    for name in result.scores
    if name.startswith(prefix)
  )
  rows = [
    (f"`{system}`", *(_nats(own, name) for name in names))
    for system, own in grouped(results)
    if any(name in own[0].scores for name in names)
  ]
  if not rows:
    return ""
  header = ("system", *(name.removeprefix(prefix) for name in names))
  note = (
    "In nats a target token, at the end of the training on text. A fixed "
    "mixture is validated on its own objectives."
  )
  return f"## Validation losses\n\n{note}\n\n{markdown_table(header, rows)}"


def _nats(results: Sequence[Result], name: str) -> str:
  values = [r.scores[name] for r in results if name in r.scores]
  return f"{np.mean(values):.2f}" if values else "–"


def _controller(results: Sequence[Result]) -> str:
  """What was chosen, and whether its rewards were foreseen."""
  rows: list[tuple[str, ...]] = []
  for system, own in grouped(results):
    if not own[0].mixture:
      continue
    for cls in (*own[0].mixture[0][1], ALL):
      rows.append((f"`{system}`", cls, *_chosen(own, cls)))
  if not rows:
    return ""
  header = ("system", "class", "mean share", "rank correlation")
  note = (
    "Shares are of samples, means over choices and seeds; choices at random, "
    "by which the controller explores, count as well. The rank correlation "
    "(Spearman) is that of the reward that was predicted for a mixture when it "
    "was chosen with what it then earned, over a training's evaluations; ± "
    f"over seeds. `{ALL}` is the sum, which the controller maximises. Rewards "
    "shrink as a training goes on, and a prediction of that alone correlates."
  )
  return f"## What the controller did\n\n{note}\n\n" + markdown_table(
    header, rows
  )


def _chosen(results: Sequence[Result], cls: str) -> tuple[str, str]:
  """The mean share of a class, and how well its rewards were foreseen."""
  if cls == ALL:
    share = "100 %"
    pairs = [np.sum(list(r.foreseen.values()), axis=0) for r in results]
  else:
    means = [np.mean([c[cls] for _, c in r.mixture]) for r in results]
    share = f"{100 * np.mean(means):.0f} %"
    pairs = [np.array(r.foreseen.get(cls, [])) for r in results]
  found = [rank_correlation(p) for p in pairs if np.ndim(p) and len(p) > 2]
  found = [one for one in found if np.isfinite(one)]
  if not found:
    return share, "–"
  interval = statistics.interval(found)
  return share, statistics.format_interval(interval, scale=1, signed=True)


def rank_correlation(pairs: np.ndarray) -> float:
  """Spearman's, of [n 2]; NaN where either side is constant."""
  from scipy import stats

  if np.ptp(pairs[:, 0]) == 0 or np.ptp(pairs[:, 1]) == 0:
    return float("nan")
  return float(stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def _settings(config: Any, results: Sequence[Result]) -> str:
  rows = [
    (f"`{system}`",
     ", ".join(f"`{e}`" for e in config.compare.settings[system]) or "–")
    for system, _ in grouped(results)
  ]  # fmt: skip
  return "## Systems\n\n" + markdown_table(("system", "settings"), rows)
