"""Figures from metric lines: lines, areas, heat maps, predicted-against-real.

Figures are drawn without pyplot, so that nothing global changes and no
display is needed.
"""

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

KINDS = ("line", "area", "scatter", "heatmap", "bars")
SCALES = ("linear", "log")
STYLE: Mapping[str, Any] = {
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.color": "#e4e4e4",
  "axes.axisbelow": True,
  "axes.edgecolor": "#666666",
  "axes.titlesize": 12,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "font.size": 10,
  "legend.fontsize": 9,
  "legend.frameon": False,
  "lines.linewidth": 1.6,
}
# Okabe and Ito's colours, told apart by the colour-blind, without the yellow
# that white paper swallows; then darker and lighter ones.
COLOURS = (
  "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555",
  "#7b3294", "#8c510a", "#a6bd00", "#003f63", "#8a3c00", "#00624a", "#85406c",
)  # fmt: skip
LINE_STYLES = ("-", "--", ":", "-.")
DPI = 110
ROWS_A_COLUMN = 18  # legend entries that fit beside a figure


@dataclasses.dataclass(frozen=True)
class Plot:
  """One figure of a report.

  Attributes:
    title: above the figure.
    keys: regexes; the metrics whose whole name one of them matches are drawn,
      in the order of the regexes, then of the names. A scatter has exactly
      two, for x and y: metrics with equal groups make a pair, such as
      `predicted/(.+)` and `realised/(.+)`, and so do their values in one line
      of the metrics.
    kind: "line"; "area", stacked values that hold until the next line, such
      as a mixture; "scatter"; "heatmap", one row a metric, for many; "bars",
      the last value of each, to compare them.
    xlabel: of the horizontal axis.
    ylabel: of the vertical axis; what the colour means, in a heat map.
    xscale: "linear" or "log".
    yscale: "linear" or "log".
    note: a sentence to stand under the figure.
  """

  title: str
  keys: tuple[str, ...]
  kind: str = "line"
  xlabel: str = "step"
  ylabel: str = ""
  xscale: str = "linear"
  yscale: str = "linear"
  note: str = ""

  def __post_init__(self):
    object.__setattr__(self, "keys", tuple(self.keys))
    for value, known in (
      (self.kind, KINDS),
      (self.xscale, SCALES),
      (self.yscale, SCALES),
    ):
      if value not in known:
        raise ValueError(f"plot {self.title!r}: {value!r} is none of {known}")
    if self.kind == "scatter" and len(self.keys) != 2:
      raise ValueError(f"plot {self.title!r}: a scatter has two keys")


class Palette:
  """The same colour for the same label in all figures of a report."""

  def __init__(self) -> None:
    self._index: dict[str, int] = {}

  def __call__(self, label: str) -> tuple[str, str]:
    """Returns (colour, line style); new labels take the next ones."""
    index = self._index.setdefault(label, len(self._index))
    styles = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
    return COLOURS[index % len(COLOURS)], styles


@dataclasses.dataclass(frozen=True)
class Series:
  """One metric over a run: `steps` [N], `values` [N], NaN for null."""

  steps: np.ndarray
  values: np.ndarray


def select(
  lines: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> dict[str, Series]:
  """The metrics that `keys` match, see `Plot.keys`.

  A metric without a single finite value is left out.
  """
  known = sorted({name for line in lines for name in line})
  found: dict[str, Series] = {}
  for key in keys:
    for name in known:
      if name not in found and re.fullmatch(key, name):
        here = [line for line in lines if name in line]
        values = [
          math.nan if line[name] is None else line[name] for line in here
        ]
        series = Series(
          np.array([line["step"] for line in here], np.float64),
          np.array(values, np.float64),
        )
        if np.isfinite(series.values).any():
          found[name] = series
  return found


def labels(names: Sequence[str]) -> list[str]:
  """Names without the folders that all of them share."""
  if len(names) < 2:
    return list(names)
  parts = [name.split("/") for name in names]
  shared = 0
  while (
    all(len(p) > shared + 1 for p in parts)
    and len({p[shared] for p in parts}) == 1
  ):
    shared += 1
  return ["/".join(p[shared:]) for p in parts]


def draw(
  plot: Plot, lines: Sequence[Mapping[str, Any]], palette: Palette
) -> bytes | None:
  """Returns a PNG, or None where the metrics hold nothing to draw."""
  drawers = {
    "line": _line,
    "area": _area,
    "scatter": _scatter,
    "heatmap": _heatmap,
    "bars": _bars,
  }
  with _axes(plot) as (figure, axes):
    if not drawers[plot.kind](axes, plot, lines, palette):
      return None
    _tick_logs(axes)
    return png(figure)


@contextlib.contextmanager
def sheet(
  width: float = 9, height: float = 4.2, *, layout: str | None = "constrained"
) -> Iterator["Figure"]:
  """An empty figure in our style, in which to draw inside the context.

  Args:
    width: inches.
    height: inches.
    layout: matplotlib's layout engine; None places axes as they are told.
  """
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context({**STYLE}):
    yield Figure(figsize=(width, height), dpi=DPI, layout=layout)  # type: ignore


def png(figure: "Figure") -> bytes:
  """The figure as a file: the same bytes for the same figure."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", metadata={"Software": None})
  return buffer.getvalue()


@contextlib.contextmanager
def _axes(plot: Plot) -> Iterator[tuple["Figure", "Axes"]]:
  with sheet() as figure:
    axes = figure.subplots()
    axes.set_title(plain(plot.title))
    axes.set_xlabel(plain(plot.xlabel))
    axes.set_ylabel(plain(plot.ylabel))
    axes.set_xscale(plot.xscale)
    axes.set_yscale(plot.yscale)
    yield figure, axes


def _tick_logs(axes: "Axes") -> None:
  """Plain numbers on log axes, also between powers of ten if there is room."""
  from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullLocator,
    StrMethodFormatter,
  )

  for axis in (axes.xaxis, axes.yaxis):
    if axis.get_scale() == "log":
      low, high = axis.get_view_interval()
      subs = (1, 2, 5) if high < 1e3 * low else (1,)
      dense = MaxNLocator(6) if high < 10 * low else LogLocator(subs=subs)
      axis.set_major_locator(dense)
      axis.set_minor_locator(NullLocator())
      axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def plain(text: str) -> str:
  """Text without TeX."""
  return text.replace("$", r"\$")  # two dollars would be taken for TeX


def _legend(axes: "Axes", handles: Sequence[Any], names: Sequence[str]) -> None:
  """Inside for a few, beside the axes for many."""
  names = [plain(name) for name in names]
  if len(handles) <= 4:
    axes.legend(handles, names, loc="best")
    return
  columns = math.ceil(len(handles) / ROWS_A_COLUMN)
  axes.figure.set_size_inches(9 + 2.2 * (columns - 1), 4.2)  # type: ignore
  axes.legend(
    handles,
    names,
    loc="upper left",
    bbox_to_anchor=(1.01, 1.0),
    borderaxespad=0.0,
    ncols=columns,
    fontsize=9 if columns == 1 else 8,
  )


def _line(axes: "Axes", plot: Plot, lines, palette: Palette) -> bool:
  found = select(lines, plot.keys)
  if plot.yscale == "log":
    found = {k: s for k, s in found.items() if (s.values > 0).any()}
  handles = []
  for label, series in zip(labels(list(found)), found.values()):
    colour, style = palette(label)
    few = np.isfinite(series.values).sum() <= 40
    handles += axes.plot(
      series.steps,
      series.values,
      color=colour,
      linestyle=style,
      marker="o" if few else None,
      markersize=3.5,
    )
  if len(handles) > 1 or (handles and not plot.ylabel):
    _legend(axes, handles, labels(list(found)))
  axes.margins(x=0.01)
  return bool(handles)


def _grid(
  found: Mapping[str, Series], last: float
) -> tuple[np.ndarray, np.ndarray]:
  """Steps [N + 1] and values [K, N] of values that hold until the next step,
  the last of them until `last`, the run's last step.
  """
  steps = np.unique(np.concatenate([s.steps for s in found.values()]))
  values = np.full((len(found), len(steps)), np.nan)
  for row, series in zip(values, found.values()):
    row[np.searchsorted(steps, series.steps)] = series.values
  # At least a sliver for the last value, if it was written at the very end.
  sliver = (steps[-1] - steps[0]) / 50 or 1.0
  return np.append(steps, max(last, steps[-1] + sliver)), values


def _area(axes: "Axes", plot: Plot, lines, palette: Palette) -> bool:
  found = select(lines, plot.keys)
  if not found:
    return False
  edges, values = _grid(found, max(line["step"] for line in lines))
  values = np.nan_to_num(np.concatenate([values, values[:, -1:]], axis=1))
  names = labels(list(found))
  handles = axes.stackplot(
    edges,
    values,
    colors=[palette(name)[0] for name in names],
    step="post",
    linewidth=0.4,
    edgecolor="white",
  )
  axes.margins(x=0, y=0)
  # Top of the legend is top of the stack.
  _legend(axes, handles[::-1], names[::-1])
  return True


def _heatmap(axes: "Axes", plot: Plot, lines, palette: Palette) -> bool:
  del palette
  found = select(lines, plot.keys)
  if not found:
    return False
  edges, values = _grid(found, max(line["step"] for line in lines))
  names = labels(list(found))
  height = max(4.2, 1.2 + 0.17 * len(names))
  axes.figure.set_size_inches(9, height)  # type: ignore
  signed = np.nanmin(values) < 0
  limit = float(np.nanmax(np.abs(values)))
  mesh = axes.pcolormesh(
    edges,
    np.arange(len(names) + 1) - 0.5,
    np.ma.masked_invalid(values),
    cmap="RdBu" if signed else "viridis",
    vmin=-limit if signed else None,
    vmax=limit if signed else None,
  )
  axes.set_yticks(range(len(names)), [plain(n) for n in names], fontsize=7)
  axes.invert_yaxis()
  axes.grid(visible=False)
  axes.set_ylabel("")
  axes.figure.colorbar(mesh, ax=axes, label=plain(plot.ylabel), pad=0.01)
  return True


def _bars(axes: "Axes", plot: Plot, lines, palette: Palette) -> bool:
  found = select(lines, plot.keys)
  if not found:
    return False
  names = labels(list(found))
  values = [series.values[-1] for series in found.values()]
  places = range(len(names))
  axes.figure.set_size_inches(9, max(2.4, 1.2 + 0.35 * len(names)))  # type: ignore
  axes.barh(places, values, color=[palette(name)[0] for name in found])
  for place, value in zip(places, values):
    axes.annotate(
      f"{value:.4g}", (value, place), xytext=(3, 0), va="center",
      textcoords="offset points", fontsize=8,
    )  # fmt: skip
  axes.set_yticks(places, [plain(name) for name in names])
  axes.invert_yaxis()
  axes.grid(visible=False, axis="y")
  axes.set_xlabel(plain(plot.ylabel))
  axes.set_ylabel("")
  return True


def pairs(
  lines: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> dict[str, np.ndarray]:
  """[N, 2] finite (x, y) of each pair of metrics, by the regexes' groups."""
  found: dict[str, list[tuple[float, float]]] = {}
  for line in lines:
    sides: list[dict[str, Any]] = []
    for key in keys:
      matches = ((re.fullmatch(key, name), name) for name in line)
      sides.append(
        {"/".join(m.groups("")): line[name] for m, name in matches if m}
      )
    for name in sides[0].keys() & sides[1].keys():
      x, y = sides[0][name], sides[1][name]
      if x is not None and y is not None:
        found.setdefault(name, []).append((x, y))
  return {name: np.array(found[name], np.float64) for name in sorted(found)}


def _scatter(axes: "Axes", plot: Plot, lines, palette: Palette) -> bool:
  found = pairs(lines, plot.keys)
  if not found:
    return False
  points = np.concatenate(list(found.values()))
  low = points.min()
  axes.axline((low, low), slope=1, color="#999999", linewidth=1, zorder=1)
  handles = [
    axes.scatter(
      xy[:, 0], xy[:, 1], s=22, color=palette(name)[0], alpha=0.8, linewidths=0
    )
    for name, xy in found.items()
  ]
  if len(handles) > 1:
    _legend(axes, handles, list(found))
  text = f"n = {len(points)}"
  if len(points) > 2 and points.std(axis=0).min() > 0:
    text += f",  r = {np.corrcoef(points.T)[0, 1]:.2f}"
  axes.set_title(text, loc="right", fontsize=10, fontweight="normal")
  axes.set_aspect("equal", adjustable="datalim")
  return True
