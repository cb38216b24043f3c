"""The figures of a comparison."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from common.plots import Palette
from udim import figures
from udim.results import Result, by_domain
from udim.tables import Comparison, group_scores

Figure = tuple[str, str, bytes, str]  # file name, title, PNG, note


def comparison_figures(
  folder: Any,
  config: Any,
  table: Comparison,
  *,
  folder_of: Callable[[Result], str],
) -> Iterator[Figure]:
  """The figures that the results allow.

  Args:
    folder: of the comparison.
    config: its configuration.
    table: the results.
    folder_of: where a run lies in the folder.
  """
  palette = Palette()  # an algorithm has one colour throughout
  yield from _accuracy_figures(table, palette)
  if any(result.landscape for result in table.results):
    yield from _landscape_figures(config, table, palette)
  yield from _image_figures(folder, table, folder_of)


def _accuracy_figures(table: Comparison, palette: Palette) -> Iterator[Figure]:
  groups = {
    label: {
      group: list(scores.values())
      for group, scores in group_scores(table.of(label, "source")).items()
    }
    for label in table.labels
    if table.of(label, "source")
  }
  if not groups:
    return
  title = "Accuracy by domain"
  png = figures.accuracy_by_domain(groups, title=title, palette=palette)
  yield "accuracy-by-domain", title, png, ""
  reference = table.references[-1] if table.references else table.labels[0]
  others = [label for label in groups if label != reference]
  domains = by_domain(table.of(reference, "source"), "source")
  if len(domains) > 1 and others:
    title = f"Accuracy minus that of {reference}, in points"
    means = {
      label: {
        domain: 100 * _mean_difference(scores, domains[domain])
        for domain, scores in by_domain(
          table.of(label, "source"), "source"
        ).items()
        if set(scores) & set(domains[domain])
      }
      for label in others
    }
    png = figures.corruption_grid(means, title=title)
    yield "difference-by-domain", title, png, ""


def _mean_difference(
  scores: dict[int, float], reference: dict[int, float]
) -> float:
  common = [seed for seed in scores if seed in reference]
  return float(np.mean([scores[seed] - reference[seed] for seed in common]))


def _landscape_figures(
  config: Any, table: Comparison, palette: Palette
) -> Iterator[Figure]:
  from udim.measure import DISTANCES, RADII

  distances = np.asarray(DISTANCES)
  for name, title, scale, xlabel, note in (
    (
      "weight_line", "Loss along the direction of SAM", 0.5,
      "distance of the weights",
      "Source loss at w + t g / ‖g‖; what SAM looks at lies at t = rho.",
    ),
    (
      "data_line", "Loss along the perturbation of the images",
      float(config.compare.image_distance), "distance of each image (L2)",
      "Source loss as every image moves along its own perturbation.",
    ),
  ):  # fmt: skip
    lines = {}
    for label in table.labels:
      rows = [
        r.landscape[name] for r in table.of(label, "source") if r.landscape
      ]
      if rows:
        lines[label] = np.asarray(rows, float)  # None is NaN
    png = figures.loss_lines(
      lines, scale * distances, title=title, xlabel=xlabel, palette=palette
    )
    yield name.replace("_", "-"), title, png, note
  at = RADII.index(0.05)
  for name, title, ylabel, value in (
    ("eigenvalue", "Largest eigenvalue of the Hessian of the source loss",
     "eigenvalue", lambda r: r.landscape["eigenvalue"]),
    ("gap-target", "Loss gap at radius 0.05 on unseen domains", "nats",
     lambda r: r.landscape["gap_target"][at]),
  ):  # fmt: skip
    values = {}
    for label in table.labels:
      own = [value(r) for r in table.of(label, "source") if r.landscape]
      if own:
        values[label] = np.asarray(own, float)
    png = figures.bars(values, title=title, ylabel=ylabel, palette=palette)
    yield name, title, png, ""


def _image_figures(
  folder: Any, table: Comparison, folder_of: Callable[[Result], str]
) -> Iterator[Figure]:
  """Images of one run, before and after its perturbation."""
  rows: list[tuple[str, np.ndarray]] = []
  for label in ("erm", "sam", "udim", "perturbed_loss"):
    own = table.of(label, "source") if label in table.labels else []
    path = folder / folder_of(own[0]) / "images.npz" if own else None
    if path is None or not path.exists():
      continue
    with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
      if not rows:
        rows.append(("original", found["original"]))
      rows.append((f"worst for {label}", found["perturbed"]))
  if rows:
    low = min(float(images.min()) for _, images in rows[:1])
    high = max(float(images.max()) for _, images in rows[:1])
    rows = [(name, (x - low) / (high - low or 1.0)) for name, x in rows]
    title = "Images and what each model finds hardest nearby"
    note = (
      "One step of length `compare.image_distance` along the gradient of the "
      "loss, not clipped; shown in the originals' range."
    )
    yield "images", title, figures.image_grid(rows, title=title), note
