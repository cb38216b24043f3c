"""The page of a comparison: quality, work, claims, ratios, masks."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common import files, plots, statistics
from common.comparison import Claim, by_system, grouped, system_names
from common.report import FILE_NAME, PLOTS, markdown_table
from slimsam.compare import (
  MAIN,
  MSE,
  TEACHER,
  Result,
  held_out,
)

CURVE, MASKS = f"{PLOTS}/macs.png", f"{PLOTS}/masks.png"
# Of the sheet of masks, as far as they were run.
SHOWN = ("alternate", "one_step", "ratio_80", "one_step_80", "magnitude_80",
         "random_80")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Metric:
  """A column.

  Attributes:
    key: of a result's scores.
    title: of the column.
    scale: what 1 is written as.
    digits: after the point.
    sign: -1 where less is better.
  """

  key: str
  title: str
  scale: float = 100.0
  digits: int = 1
  sign: int = 1


BY_TRUTH = Metric(MAIN, "point")
BY_TEACHER = Metric("miou/teacher/point/single", "teacher, point")
ERROR = Metric(MSE, "embedding MSE", scale=1.0, digits=4, sign=-1)
METRICS = (
  BY_TRUTH,
  Metric("miou/gt/box/single", "box"),
  Metric("miou/gt/point/oracle", "point, best of three"),
  BY_TEACHER,
  Metric("miou/teacher/box/single", "teacher, box"),
  ERROR,
)
# Those that claims are tested by, each a family of its own.
TESTED = (
  (BY_TRUTH, "Mean IoU with the true mask, by a point: the main test"),
  (BY_TEACHER, "Mean IoU with the teacher's mask, by a point"),
  (ERROR, "Embedding MSE: less is better"),
)


# Tested where both were run.
CLAIMS = (
  Claim("alternating is better than one step", "alternate", "one_step"),
  Claim("… at 80 %", "ratio_80", "one_step_80"),
  Claim("disturbed importance is better than magnitude", "alternate",
        "magnitude"),
  Claim("… at 80 %", "ratio_80", "magnitude_80"),
  Claim("disturbed importance is better than a random choice", "alternate",
        "random"),
  Claim("… at 80 %", "ratio_80", "random_80"),
  Claim("disturbed importance is better than that of true masks", "alternate",
        "taylor"),
  Claim("sums of squares are better than disturbed importance", "disturbed_sq",
        "alternate"),
  Claim("comparing what is in between helps", "alternate", "no_intermediate"),
  Claim("a global ranking is better than a local one", "global", "alternate"),
  Claim("… at 80 %", "global_80", "ratio_80"),
  Claim("the losses used here are better than the paper's", "alternate",
        "paper"),
  Claim("… and than the authors' code", "alternate", "reference"),
)  # fmt: skip


def write_page(folder: pathlib.Path, config: Any) -> str:
  """Writes `report.md` from what has finished.

  Args:
    folder: the comparison's.
    config: see `configs/slimsam.py`.

  Returns:
    The page's path.
  """
  results = load_results(folder, config)
  parts = [
    _head(config, results),
    _table(config, results),
    _claims(results),
    _curve(folder, results),
    _pruned(results),
    _masks(folder),
    _settings(config, results),
  ]
  text = "\n\n".join(part for part in parts if part) + "\n"
  files.replace(folder / FILE_NAME, text)
  return str(folder / FILE_NAME)


def load_results(folder: pathlib.Path, config: Any) -> list[Result]:
  """All that has finished: teachers first, then in the order of `systems`."""
  cfg = config.compare
  # A ConfigDict's keys are in the order of the alphabet.
  order = list(
    dict.fromkeys((TEACHER, *system_names(cfg.systems), *cfg.settings))
  )
  results = [
    result
    for path in sorted(folder.glob("runs/*/*"))
    if (result := Result.load(path)) is not None and result.system in order
  ]
  return sorted(results, key=lambda own: (order.index(own.system), own.seed))


def _head(config: Any, results: Sequence[Result]) -> str:
  seeds = sorted({result.seed for result in results})
  slimmed = sum(result.system != TEACHER for result in results)
  cfg = config.data
  return (
    "# Ways to slim a teacher\n\n"
    f"{len(seeds)} teachers, seeds {', '.join(map(str, seeds))}, and {slimmed} "
    "students of theirs. Systems of one seed slim the same teacher "
    f"with the same {cfg.images or 'all'} images of `{cfg.source.kind}`, and "
    "differ by the settings listed at the end. Scores are those of the "
    f"checkpoint with the best `{config.evaluation.best}` on "
    f"{config.evaluation.images} validation images, on "
    f"{config.compare.test_images} other images. Mean IoU is in percent; ± is "
    "the 95 % t-interval over seeds, which are the teachers' and the "
    "students'; the images are the same for all seeds."
  )


def _mean(metric: Metric, scores: Sequence[Mapping[str, float]]) -> str:
  values = [own[metric.key] for own in scores if metric.key in own]
  if not values:
    return "–"
  return _text(metric, statistics.interval(values))


def _text(
  metric: Metric, found: statistics.Interval, *, signed: bool = False
) -> str:
  return statistics.format_interval(
    found, digits=metric.digits, scale=metric.scale, signed=signed
  )


def _paired(
  results: Sequence[Result], metric: Metric, system: str, reference: str
) -> statistics.Difference | None:
  """How much better a system is, seed by seed; None where no seed has both."""
  values = by_system(results, metric.key)
  a, b = values.get(system, {}), values.get(reference, {})
  if not set(a) & set(b):
    return None
  better, worse = statistics.align(a, b)
  return statistics.paired(metric.sign * better, metric.sign * worse)


def _table(config: Any, results: Sequence[Result]) -> str:
  baseline = config.compare.baseline
  rows = []
  for system, own in grouped(results):
    against = None
    if system not in (TEACHER, baseline):
      against = _paired(results, BY_TRUTH, system, baseline)
    scores = [result.scores for result in own]
    rows.append(
      (
        f"`{system}`",
        *(_mean(metric, scores) for metric in METRICS),
        "–" if against is None else _text(BY_TRUTH, against, signed=True),
        str(len(own)),
        _count([result.params for result in own]),
        _mega([result.macs_conv_linear for result in own]),
        _mega([result.macs_true for result in own]),
        f"{np.median([result.seconds for result in own]) / 60:.1f}",
      )
    )
  header = (
    "system", *(metric.title for metric in METRICS),
    f"point, against `{baseline}`", "seeds", "encoder parameters",
    "conv and linear, M MAC", "all, M MAC", "minutes",
  )  # fmt: skip
  note = (
    "Mean IoU of one mask for a point or a box with the true mask, of the best "
    "of three for a point, and with the mask that the teacher finds. "
    "Differences are paired by seed and not corrected. Parameters and "
    "multiply-accumulates are those of the image encoder, means over seeds; "
    "minutes are wall time of training, beside whatever else ran."
  )
  return f"## Test images\n\n{note}\n\n{markdown_table(header, rows)}"


def _count(values: Sequence[int]) -> str:
  return f"{round(np.mean(values)):,}"


def _mega(values: Sequence[int]) -> str:
  return f"{np.mean(values) / 1e6:.2f}"


def _claims(results: Sequence[Result]) -> str:
  tables = []
  for metric, title in TESTED:
    tested = [
      (claim, found)
      for claim in CLAIMS
      if (found := _paired(results, metric, claim.system, claim.reference))
    ]
    if tested:
      tables += [f"{title}.", _verdicts(metric, tested)]
  if not tables:
    return ""
  note = (
    "Differences on the test images seed by seed, two-sided paired t-tests, "
    "corrected for the number of claims in a table. What holds here holds for "
    "this teacher, these images and this training."
  )
  return "\n\n".join(["## What holds", note, *tables])


def _verdicts(
  metric: Metric, tested: Sequence[tuple[Claim, statistics.Difference]]
) -> str:
  judged = statistics.verdicts([found for _, found in tested])
  rows = []
  for (claim, found), (p, verdict) in zip(tested, judged):
    shown = dataclasses.replace(found, mean=metric.sign * found.mean)
    rows.append(
      (
        claim.text,
        f"`{claim.system}`, `{claim.reference}`",
        _text(metric, shown, signed=True),
        f"{found.wins} of {found.count}",
        "–" if np.isnan(p) else f"{p:.2g}",
        verdict,
      )
    )
  header = (
    "claim", "systems", metric.title, "seeds won", "p (Holm)", "verdict"
  )  # fmt: skip
  return markdown_table(header, rows)


def _family(system: str) -> str:
  """Systems that differ by their ratio alone: `ratio_80` is `alternate`."""
  name = re.sub(r"_\d+$", "", system)
  return "alternate" if name == "ratio" else name


def _families(
  results: Sequence[Result],
) -> dict[str, list[list[Result]]]:
  """By family with several ratios, the seeds of each, by their work."""
  made: dict[str, list[list[Result]]] = {}
  for system, own in grouped(results):
    if system != TEACHER:
      made.setdefault(_family(system), []).append(own)
  return {
    name: sorted(points, key=lambda own: np.mean([r.macs_true for r in own]))
    for name, points in made.items()
    if len(points) > 1
  }


def _curve(folder: pathlib.Path, results: Sequence[Result]) -> str:
  families = _families(results)
  if not families:
    return ""
  teachers = [own for system, own in grouped(results) if system == TEACHER]
  rows = [_point("teacher", "–", own) for own in teachers]
  rows += [
    _point(name, f"{100 * own[0].ratio:.0f} %", own)
    for name, points in families.items()
    for own in reversed(points)
  ]
  shown = (BY_TRUTH, BY_TEACHER, ERROR)
  header = (
    "method", "ratio", "embedding", "qkv", "mlp", "encoder parameters",
    "conv and linear, M MAC", "all, M MAC",
    *(metric.title for metric in shown), "seeds",
  )  # fmt: skip
  note = (
    "What stays is rounded down to multiples of the heads, so that small "
    "models lose more than the ratio says. Widths are those of the first seed; "
    "where blocks differ, from the smallest to the largest."
  )
  picture = (
    f"![Mean IoU against work]({CURVE})" if (folder / CURVE).exists() else ""
  )
  parts = ("## Ratios", picture, note, markdown_table(header, rows))
  return "\n\n".join(part for part in parts if part)


def _point(name: str, ratio: str, own: Sequence[Result]) -> tuple[str, ...]:
  scores = [result.scores for result in own]
  return (
    name,
    ratio,
    *(_range(widths) for widths in own[0].widths),
    _count([result.params for result in own]),
    _mega([result.macs_conv_linear for result in own]),
    _mega([result.macs_true for result in own]),
    *(_mean(metric, scores) for metric in (BY_TRUTH, BY_TEACHER, ERROR)),
    str(len(own)),
  )


def _range(widths: Sequence[int]) -> str:
  low, high = min(widths), max(widths)
  return str(low) if low == high else f"{low}–{high}"


def draw_curve(folder: pathlib.Path, config: Any) -> None:
  """Draws mean IoU against multiply-accumulates, if there are several ratios.

  Args: as for `write_page`.
  """
  from matplotlib.ticker import MaxNLocator

  results = load_results(folder, config)
  families = _families(results)
  if not families:
    return
  palette = plots.Palette()
  teachers = [r.scores[MAIN] for r in results if r.system == TEACHER]
  with plots.sheet() as figure:
    sides: Any = figure.subplots(1, 2, sharex=True)
    titles = ("With the true mask", "With the teacher's mask")
    for axes, metric, title in zip(sides, (BY_TRUTH, BY_TEACHER), titles):
      axes.set_title(title)
      axes.set_xlabel("all M MAC of the image encoder")
      axes.set_ylabel("mean IoU by a point, %")
      axes.xaxis.set_major_locator(MaxNLocator(6))
      for name, points in families.items():
        _draw_family(axes, metric, name, points, palette(name))
    if teachers:
      sides[0].axhline(
        100 * np.mean(teachers), color="#666666", linestyle="--",
        linewidth=1, label="teacher",
      )  # fmt: skip
    sides[0].legend(loc="lower right")
    (folder / PLOTS).mkdir(exist_ok=True)
    files.replace(folder / CURVE, plots.png(figure))


def _draw_family(
  axes: Any,
  metric: Metric,
  name: str,
  points: Sequence[Sequence[Result]],
  style: tuple[str, str],
) -> None:
  found = [
    statistics.interval([metric.scale * r.scores[metric.key] for r in own])
    for own in points
  ]
  axes.errorbar(
    [np.mean([r.macs_true for r in own]) / 1e6 for own in points],
    [one.mean for one in found],
    yerr=np.nan_to_num([one.half_width for one in found]),
    color=style[0], linestyle=style[1], marker="o", markersize=3.5,
    elinewidth=0.8, capsize=2, label=name,
  )  # fmt: skip


def _pruned(results: Sequence[Result]) -> str:
  """What pruning alone leaves, stage by stage."""
  shown = (BY_TRUTH, BY_TEACHER, ERROR)
  rows = []
  for system, own in grouped(results):
    for stage in own[0].pruned:
      scores = [r.pruned[stage] for r in own if stage in r.pruned]
      cells = (_mean(metric, scores) for metric in shown)
      rows.append((f"`{system}`", stage, *cells))
  if not rows:
    return ""
  header = ("system", "stage", *(metric.title for metric in shown))
  note = (
    "The same test images before a stage's training: all that later stages "
    "have is what came before, so that `step_2` begins with the trained "
    "student of `step_1`."
  )
  table = markdown_table(header, rows)
  return f"## Right after pruning\n\n{note}\n\n{table}"


def draw_masks(folder: pathlib.Path, config: Any) -> None:
  """Draws masks of the first test images, by models of the first seed.

  Args: as for `write_page`.
  """
  from slimsam import pictures
  from slimsam.run import Model, alone
  from slimsam.train import MODEL

  cfg = config.compare
  asked = pictures.questions(held_out(config, cfg.pictures), cfg.pictures)
  if not asked:
    return
  runs, seed = folder / "runs", f"seed{cfg.first_seed}"
  teacher = config.teacher.path or runs / TEACHER / seed / "teacher" / MODEL
  places = {TEACHER: pathlib.Path(teacher)} | {
    name: runs / name / seed / MODEL
    for name in SHOWN
    if (runs / name / seed / MODEL).exists()
  }
  with alone():
    found = {
      name: pictures.answers(Model.load(place), asked)
      for name, place in places.items()
    }
  (folder / PLOTS).mkdir(exist_ok=True)
  files.replace(folder / MASKS, pictures.draw(asked, found))


def _masks(folder: pathlib.Path) -> str:
  if not (folder / MASKS).exists():
    return ""
  return (
    "## Masks\n\nThe first test images, of each the largest object, found by "
    "the point drawn; numbers are the IoU with the true mask, in percent.\n\n"
    f"![Masks side by side]({MASKS})"
  )


def _settings(config: Any, results: Sequence[Result]) -> str:
  rows = [
    (f"`{system}`", f"{own[0].steps:,}",
     ", ".join(f"`{e}`" for e in config.compare.settings.get(system, ()))
     or "–")
    for system, own in grouped(results)
  ]  # fmt: skip
  return "## Systems\n\n" + markdown_table(
    ("system", "updates", "settings"), rows
  )
