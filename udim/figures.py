"""Figures of a comparison: accuracies, loss lines, bars, images.

Each is a function from numbers to the bytes of a PNG, the same bytes for the
same numbers. Points, lines and bars are means over seeds; whiskers and bands
are their 95 % t-intervals, which a single seed has not. One `Palette` given to
all of them keeps every algorithm in one colour.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import UserError
from common.plots import COLOURS, DPI, Palette, plain, png, sheet
from common.statistics import interval

if TYPE_CHECKING:
  from matplotlib.axes import Axes

Seeds = Sequence[float] | np.ndarray
Table = Mapping[str, Mapping[str, Seeds]]  # algorithm -> domain -> by seed

FEW_DOMAINS = 12  # side by side; more of them stand one above the other
MANY_DOMAINS = 24  # more than these in two columns
MARKERS = "osD^vP*"
CHARACTER = 0.08  # inches, of a tick label
SHADE = "#f3f3f3"
RULE = {"color": "#e4e4e4", "linewidth": 0.6, "zorder": 0.5}
IMAGE_SIZE = 72  # pixels of the figure, about as high is a small image drawn
GAP = 4  # of them between images


def accuracy_by_domain(
  table: Table, *, title: str, palette: Palette | None = None
) -> bytes:
  """Accuracy of every algorithm on every domain, with t-intervals.

  Args:
    table: algorithm -> domain -> accuracies in [0, 1], one a seed. A domain
      that an algorithm lacks stays empty.
    title: above the figure.
    palette: colours by algorithm.

  Returns:
    A PNG. Up to 12 domains stand side by side, more one above the other in
    blocks of a name: `blur_1` to `blur_5`, and so on.

  Raises:
    UserError: for a table without values.
  """
  palette = palette or Palette()
  domains = _domains(table)
  is_across = len(domains) <= FEW_DOMAINS
  parts = [domains] if is_across else _in_columns(domains)
  rows = max(map(len, parts))
  if is_across:
    slot = max(7.2 / rows, 0.2 + 0.085 * len(table))
    width, height = 1.8 + slot * rows, _height(table)
  else:
    width = 9.0 if len(parts) == 1 else 11.0
    slot, height = 0.0, 1.2 + rows * (0.12 + 0.065 * len(table))
    height = max(height, _height(table))
  with sheet(width, height) as figure:
    each = figure.subplots(1, len(parts), sharex=not is_across, squeeze=False)
    for axes, part in zip(each[0], parts):
      _accuracies(axes, table, part, palette, is_across=is_across)
      if is_across:
        axes.set_ylabel("accuracy in %")
        axes.set_xlim(-0.5, rows - 0.5)
        _ticks(axes.xaxis, part, slot)
      else:
        axes.set_xlabel("accuracy in %")
        axes.set_ylim(rows - 0.5, -0.5)
        _ticks(axes.yaxis, part)
    each[0, 0].set_title(plain(title))
    _legend(figure, table, palette)
    return png(figure)


def _domains(table: Mapping[str, Mapping]) -> list[str]:
  """All domains, in the order in which they come."""
  domains = list(dict.fromkeys(name for row in table.values() for name in row))
  if not domains:
    raise UserError("nothing to draw: the table has no domain")
  return domains


def _starts(domains: Sequence[str]) -> list[int]:
  """Where blocks of one name, but for a number at its end, start."""
  names = [re.sub(r"_\d+$", "", domain) for domain in domains]
  return [i for i, own in enumerate(names) if i == 0 or own != names[i - 1]]


def _in_columns(domains: Sequence[str]) -> list[list[str]]:
  """One column, or two of about the same length that break no block."""
  cuts = _starts(domains)[1:]
  if len(domains) <= MANY_DOMAINS or not cuts:
    return [list(domains)]
  cut = min(cuts, key=lambda start: abs(2 * start - len(domains)))
  return [list(domains[:cut]), list(domains[cut:])]


def _accuracies(
  axes: "Axes",
  table: Table,
  domains: Sequence[str],
  palette: Palette,
  *,
  is_across: bool,
) -> None:
  """Points with whiskers, a group a domain; every second block is shaded."""
  starts = _starts(domains)
  if is_across:
    starts = list(range(len(domains)))
  for start, stop in zip(starts[1::2], [*starts, len(domains)][2::2]):
    shade = axes.axvspan if is_across else axes.axhspan
    shade(start - 0.5, stop - 0.5, color=SHADE, linewidth=0, zorder=0)
  if not is_across:
    lines = np.arange(1, len(domains)) - 0.5
    axes.hlines(lines, 0, 1, transform=axes.get_yaxis_transform(), **RULE)
  for i, (algorithm, row) in enumerate(table.items()):
    places = [place for place, name in enumerate(domains) if name in row]
    means, widths = _intervals([row[domains[place]] for place in places])
    at = np.array(places) + 0.8 * ((i + 0.5) / len(table) - 0.5)
    options: dict[str, Any] = {"linestyle": "none", "markersize": 4}
    options |= _marks(algorithm, palette)
    if is_across:
      axes.errorbar(at, 100 * means, yerr=100 * widths, **options)
    else:
      axes.errorbar(100 * means, at, xerr=100 * widths, **options)
  (axes.xaxis if is_across else axes.yaxis).grid(visible=False)


def _marks(algorithm: str, palette: Palette) -> dict[str, Any]:
  """Colour and marker; hollow where the colours have come round."""
  colour, style = palette(algorithm)
  marker = MARKERS[COLOURS.index(colour) % len(MARKERS)]
  fill = colour if style == "-" else "white"
  return {"color": colour, "marker": marker, "markerfacecolor": fill}


def _height(algorithms: Mapping) -> float:
  """Inches that the legend of so many algorithms has room in."""
  return max(4.2, 0.4 + 0.21 * len(algorithms))


def _intervals(
  values: Sequence[Seeds] | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Means and half widths, [n].

  Widths are 0 where there is no interval: no whisker is drawn. Means that are
  not finite are NaN: nothing is.
  """
  found = [interval(seeds) for seeds in values]
  means = np.array([f.mean for f in found], np.float64)
  widths = np.array([f.half_width for f in found], np.float64)
  return np.where(np.isfinite(means), means, np.nan), np.nan_to_num(widths)


def _ticks(axis, names: Sequence[str], slot: float = math.inf) -> None:
  """Names at 0, 1, ...; slanted where they are wider than `slot` inches."""
  longest = max(map(len, names))
  slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
  options = slanted if CHARACTER * longest > slot else {}
  axis.set_ticks(
    range(len(names)), [plain(name) for name in names], fontsize=9, **options
  )
  axis.set_tick_params(length=0)


def _legend(figure, algorithms: Mapping, palette: Palette) -> None:
  """Beside the axes."""
  from matplotlib.lines import Line2D

  handles = []
  for algorithm in algorithms:
    style = palette(algorithm)[1]
    marks = _marks(algorithm, palette)
    marks |= {"linestyle": style, "markersize": 5}
    handles.append(Line2D([], [], **marks))
  names = [plain(name) for name in algorithms]
  figure.legend(handles, names, loc="outside right upper")


def corruption_grid(
  differences: Mapping[str, Mapping[str, float]],
  *,
  title: str,
  label: str = "points",
) -> bytes:
  """Differences by domain as a heat map: red below 0, blue above.

  Args:
    differences: algorithm -> domain -> the mean difference to another
      algorithm, in points. A domain that an algorithm lacks stays empty.
    title: above the figure.
    label: what the numbers are.

  Returns:
    A PNG, with the longer side of the table down the page.

  Raises:
    UserError: for a table without values.
  """
  domains, algorithms = _domains(differences), list(differences)
  cells = np.array(
    [
      [differences[name].get(domain, np.nan) for name in algorithms]
      for domain in domains
    ],
    np.float64,
  )
  if len(algorithms) > len(domains):
    cells, rows, columns = cells.T, algorithms, domains
  else:
    rows, columns = domains, algorithms
  return _heat_map(cells, rows, columns, title=title, label=label)


def _heat_map(
  cells: np.ndarray,
  rows: Sequence[str],
  columns: Sequence[str],
  *,
  title: str,
  label: str,
) -> bytes:
  """Numbers [rows, columns] in cells, on a scale with white at 0."""
  longest = CHARACTER * max(map(len, columns))
  slot = min(max(longest + 0.1, 0.75), 1.2)
  left = 0.3 + CHARACTER * max(map(len, rows))
  width = max(5.0, left + slot * len(columns) + 1.2)
  with sheet(width, 1.6 + 0.26 * len(rows)) as figure:
    axes = figure.subplots()
    finite = np.abs(cells[np.isfinite(cells)])
    limit = float(finite.max(initial=0)) or 1.0
    image = axes.imshow(
      np.ma.masked_invalid(cells),
      cmap="RdBu",
      vmin=-limit,
      vmax=limit,
      aspect="auto",
    )
    for (i, j), value in np.ndenumerate(cells):
      if np.isfinite(value):
        colour = "white" if abs(value) > 0.6 * limit else "black"
        text = f"{value:+z.1f}"
        axes.text(j, i, text, color=colour, ha="center", va="center", size=8)
    for start in _starts(rows)[1:]:
      axes.axhline(start - 0.5, color="white", linewidth=2)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    _ticks(axes.xaxis, columns, slot)
    _ticks(axes.yaxis, rows)
    axes.set_title(plain(title))
    figure.colorbar(image, ax=axes, label=plain(label), pad=0.02, aspect=30)
    return png(figure)


def loss_lines(
  lines: Mapping[str, np.ndarray],
  distances: Seeds,
  *,
  title: str,
  xlabel: str,
  palette: Palette | None = None,
) -> bytes:
  """Mean losses along a line, with bands of their t-intervals.

  Args:
    lines: algorithm -> losses [seeds, m].
    distances: [m].
    title: above the figure.
    xlabel: what the distances are.
    palette: colours by algorithm.

  Returns:
    A PNG.

  Raises:
    UserError: without lines, or for lines of other shapes.
  """
  palette = palette or Palette()
  distances = np.asarray(distances, np.float64)
  if not lines:
    raise UserError("no losses to draw: there is no algorithm")
  with sheet(height=_height(lines)) as figure:
    axes = figure.subplots()
    for algorithm, losses in lines.items():
      losses = np.asarray(losses, np.float64)
      if losses.ndim != 2 or losses.shape[1:] != distances.shape:
        raise UserError(
          f"losses of {algorithm!r} are {list(losses.shape)}: need [seeds, m] "
          f"at distances [m], which are {list(distances.shape)}"
        )
      means, widths = _intervals(losses.T)
      colour, style = palette(algorithm)
      marks = _marks(algorithm, palette)
      axes.plot(distances, means, linestyle=style, markersize=4, **marks)
      axes.fill_between(
        distances,
        means - widths,
        means + widths,
        color=colour,
        alpha=0.15,
        linewidth=0,
      )
    axes.set(xlabel=plain(xlabel), ylabel="loss in nats")
    axes.set_title(plain(title))
    axes.margins(x=0.01)
    _legend(figure, lines, palette)
    return png(figure)


def bars(
  values: Mapping[str, Seeds],
  *,
  title: str,
  ylabel: str,
  palette: Palette | None = None,
) -> bytes:
  """Means as bars, with t-intervals.

  Args:
    values: label -> numbers, one a seed.
    title: above the figure.
    ylabel: what the numbers are.
    palette: colours by label.

  Returns:
    A PNG.

  Raises:
    UserError: without values.
  """
  if not values:
    raise UserError("no bars to draw: there is no value")
  palette = palette or Palette()
  means, widths = _intervals(list(values.values()))
  slot = max(0.6, 7.5 / max(len(values), 5))
  with sheet(1.5 + slot * len(values)) as figure:
    axes = figure.subplots()
    places = np.arange(len(values))
    axes.bar(
      places,
      means,
      width=min(0.7, 0.7 / slot),
      color=[palette(label)[0] for label in values],
      alpha=0.85,
    )
    axes.errorbar(places, means, yerr=widths, fmt="none", ecolor="#222222")
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.xaxis.grid(visible=False)
    _ticks(axes.xaxis, list(values), slot)
    axes.set_title(plain(title))
    axes.set_ylabel(plain(ylabel))
    return png(figure)


def image_grid(rows: Sequence[tuple[str, np.ndarray]], *, title: str) -> bytes:
  """Rows of images, each pixel a square of whole pixels of the figure.

  Args:
    rows: (label, images [n, H, W, C]), float in [0, 1]; what lies outside is
      clipped. One channel is grey, two are red and green.
    title: above the figure.

  Returns:
    A PNG.

  Raises:
    UserError: without images, or for images of another kind or size than
      those of the first row.
  """
  if not rows or not len(rows[0][1]):
    raise UserError("no images to draw: there is no row, or it is empty")
  coloured = [_coloured(label, np.asarray(images)) for label, images in rows]
  height, width = coloured[0].shape[1:3]
  zoom = max(1, round(IMAGE_SIZE / height))
  down, right = zoom * height + GAP, zoom * width + GAP
  most = max(map(len, coloured))
  canvas = np.full((down * len(rows) - GAP, right * most - GAP, 3), 1.0)
  for i, ((label, _), images) in enumerate(zip(rows, coloured)):
    if images.shape[1:3] != (height, width):
      raise UserError(
        f"images {label!r} are {list(images.shape[1:3])}, those of "
        f"{rows[0][0]!r} are {[height, width]}: a grid has one size"
      )
    top, enlarged = i * down, images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    for j, image in enumerate(enlarged):
      left = j * right
      canvas[top : top + zoom * height, left : left + zoom * width] = image
  centres = [(i * down + zoom * height / 2) for i in range(len(rows))]
  return _framed(canvas, [label for label, _ in rows], centres, title)


def _coloured(label: str, images: np.ndarray) -> np.ndarray:
  """[n, H, W, 1 to 3] -> [n, H, W, 3], in [0, 1]."""
  kind = images.dtype
  if images.ndim != 4 or images.shape[-1] not in (1, 2, 3) or kind.kind != "f":
    raise UserError(
      f"images {label!r} are {kind} {list(images.shape)}: need floats in "
      "[0, 1] of one to three channels, [n, H, W, C]"
    )
  channels = images.shape[-1]
  if channels == 1:
    images = images.repeat(3, axis=-1)
  if channels == 2:
    images = np.concatenate([images, np.zeros_like(images[..., :1])], axis=-1)
  return np.clip(np.nan_to_num(images), 0, 1)


def _framed(
  canvas: np.ndarray,
  labels: Sequence[str],
  centres: Sequence[float],
  title: str,
) -> bytes:
  """The canvas, pixel by pixel, with a title and labels beside its rows."""
  from matplotlib.transforms import IdentityTransform

  top, edge = 36, 10
  height, width = canvas.shape[:2]
  with sheet(layout=None) as figure:
    options = {"va": "center", "transform": IdentityTransform()}  # in pixels
    head = figure.text(
      edge, edge + height + top / 2, plain(title), size=12, weight="bold",
      **options,
    )  # fmt: skip
    texts = [
      figure.text(
        0, edge + height - centre, plain(label), ha="right", **options
      )
      for label, centre in zip(labels, centres)
    ]
    widest = max(text.get_window_extent().width for text in texts)
    left = math.ceil(edge + widest + 8)
    for text in texts:
      text.set_x(left - 8)
    across = max(left + width, edge + head.get_window_extent().width) + edge
    # Half a pixel more, as the size in pixels is rounded down.
    size = math.ceil(across) + 0.5, top + height + edge + 0.5
    figure.set_size_inches(size[0] / DPI, size[1] / DPI)
    pixels = np.round(255 * canvas).astype(np.uint8)
    figure.figimage(pixels, left, edge, origin="upper")
    return png(figure)
