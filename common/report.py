"""A run's report: `report.md` and its plots, from what its folder holds.

A project says once, at the start of a run, what its report should show:

    spec = ReportSpec(
      title="A toy",
      plots=(Plot("Loss", ("train/loss", "eval/loss"), ylabel="nats"),),
      tables=(Table("Results", ("eval/.+",)),),
    )
    spec.save(workdir)

`write_report(workdir)` makes it at the end, and `python -m common.report
RUNDIR` at any time, also while the run goes on.
"""

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from common import files
from common.errors import UserError
from common.plots import Palette, Plot, draw, select

__all__ = ["Plot", "ReportSpec", "Table", "write_report"]

FILE_NAME = "report.md"
SPEC_NAME = "report.json"
FACTS_NAME = "facts.json"
PLOTS = "plots"  # the folder of the PNG files


@dataclasses.dataclass(frozen=True)
class Table:
  """Metrics by name: first, lowest, highest and last value.

  Attributes:
    title: above the table.
    keys: regexes, as in `Plot`.
    note: a sentence to stand above it.
  """

  title: str
  keys: tuple[str, ...]
  note: str = ""

  def __post_init__(self):
    object.__setattr__(self, "keys", tuple(self.keys))


@dataclasses.dataclass(frozen=True)
class ReportSpec:
  """What a project's report shows.

  Attributes:
    title: of the page.
    intro: Markdown under the title.
    plots: figures, in order.
    tables: tables of values, in order.
    pages: Markdown files in the run's folder that follow the tables, as soon
      as they are there.
  """

  title: str
  intro: str = ""
  plots: tuple[Plot, ...] = ()
  tables: tuple[Table, ...] = ()
  pages: tuple[str, ...] = ()

  def save(self, workdir: str | os.PathLike[str]) -> None:
    """Writes `report.json`."""
    text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
    files.replace(_folder(workdir) / SPEC_NAME, text)

  @classmethod
  def load(cls, workdir: str | os.PathLike[str]) -> "ReportSpec":
    """Reads `report.json`.

    Raises:
      UserError: it is missing or damaged.
    """
    path = _folder(workdir) / SPEC_NAME
    content = _read_json(path)
    try:
      return cls(
        title=content["title"],
        intro=content["intro"],
        plots=tuple(Plot(**plot) for plot in content["plots"]),
        tables=tuple(Table(**table) for table in content["tables"]),
        pages=tuple(content.get("pages", ())),
      )
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f"{path} is damaged: {error!r}") from None


def write_report(workdir: str | os.PathLike[str]) -> str:
  """Writes `report.md` and `plots/*.png` into a run's folder.

  Reads `config.json`, `facts.json`, `metrics.jsonl` and `report.json`. In a
  run of several processes one of them calls it.

  Args:
    workdir: the run's folder.

  Returns:
    The path of the page.

  Raises:
    UserError: one of the files is missing, or no metric has been written.
  """
  from common.config import load_config

  folder = _folder(workdir)
  config = load_config(folder)
  spec = ReportSpec.load(folder)
  facts = _read_json(folder / FACTS_NAME)

  from common.metrics import read_metrics  # slow: imports jax

  lines = read_metrics(folder)
  if not lines:
    raise UserError(f"no metrics in {folder} yet: nothing to report")
  parts = [f"# {spec.title}", spec.intro, _run_section(config, facts, lines)]
  parts += [_table_section(table, lines) for table in spec.tables]
  pages = [folder / page for page in spec.pages]
  parts += [page.read_text() for page in pages if page.exists()]
  parts += _plot_sections(spec.plots, lines, folder)
  parts.append(_config_section(config))
  text = "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"
  files.replace(folder / FILE_NAME, text)
  return os.fspath(folder / FILE_NAME)


def _run_section(config: Any, facts: Mapping[str, Any], lines) -> str:
  step = lines[-1]["step"]
  total = config.get("num_steps")
  rows = [("steps", f"{step:,}" + (f" of {total:,}" if total else ""))]
  if "tokens_per_step" in facts:
    rows.append(("tokens seen", f"{step * facts['tokens_per_step']:,}"))
  rows.append(("training time", duration(lines[-1]["time_run"])))
  if config.get("seed") is not None:
    rows.append(("seed", str(config["seed"])))
  rows += [(name.replace("_", " "), _fact(v)) for name, v in facts.items()]
  return "## The run\n\n" + markdown_table(("", ""), rows)


def _fact(value: Any) -> str:
  if isinstance(value, Mapping):
    return ", ".join(f"{name} {_fact(v)}" for name, v in value.items())
  if isinstance(value, Sequence) and not isinstance(value, str):
    return ", ".join(map(_fact, value))
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  return str(value)


def _table_section(table: Table, lines) -> str:
  rows = []
  for name, series in select(lines, table.keys).items():
    finite = series.values[[math.isfinite(v) for v in series.values]]
    values = (series.values[0], finite.min(), finite.max(), series.values[-1])
    rows.append((f"`{name}`", *map(number, values), f"{series.steps[-1]:,.0f}"))
  header = ("metric", "first", "lowest", "highest", "last", "at step")
  body = markdown_table(header, rows) if rows else "*No values yet.*"
  return "\n\n".join(filter(None, (f"## {table.title}", table.note, body)))


def _plot_sections(plots: Sequence[Plot], lines, folder: Any) -> list[str]:
  palette = Palette()
  sections, taken = [], set()
  (folder / PLOTS).mkdir(parents=True, exist_ok=True)
  for plot in plots:
    png = draw(plot, lines, palette)
    if png is None:
      body = "*No values yet.*"
    else:
      slug = re.sub(r"[^a-z0-9]+", "-", plot.title.lower()).strip("-")
      name = f"{slug or 'plot'}.png"
      if name in taken:
        raise ValueError(f"two plots would be written to {PLOTS}/{name}")
      taken.add(name)
      files.replace(folder / PLOTS / name, png)
      body = f"![{plot.title}]({PLOTS}/{name})"
    sections.append(
      "\n\n".join(filter(None, (f"## {plot.title}", body, plot.note)))
    )
  return sections


def _config_section(config: Any) -> str:
  from common.config import FILE_NAME as CONFIG
  from common.config import folded

  shown = folded(config, place=CONFIG)
  rows = [(f"`{key}`", f"`{text}`") for key, text in shown.items()]
  return "## Configuration\n\n" + markdown_table(("key", "value"), rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table; numbers stand to the right of their columns.

  Cells may hold what data sets call their parts, and sentences of them: what
  would be HTML, a link or an image is shown as it is written.
  """

  def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"

  # Numbers to the right: every column but the first, if there are many.
  right = "---:" if len(header) > 2 else "---"
  ruler = f"|{'|'.join(['---', *[right] * (len(header) - 1)])}|"
  return "\n".join([line(header), ruler, *map(line, rows)])


def _cell(text: str) -> str:
  text = " ".join(text.replace("|", r"\|").split())
  if re.fullmatch("`[^`]*`", text):  # code, in which nothing means anything
    return text
  return text.replace("<", "&lt;").replace("](", r"]\(")


def number(value: float) -> str:
  """Four significant digits; a dash where there is no value."""
  if not math.isfinite(value):
    return "–"
  if value == int(value) and abs(value) < 1e15:
    return f"{int(value):,}"
  return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
  """Such as `1 h 02 min 03 s`."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes:02d} min {rest:02d} s"
  return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _folder(workdir: str | os.PathLike[str]) -> Any:
  from etils import epath

  return epath.Path(workdir)


def _read_json(path: Any) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except FileNotFoundError:
    hint = "is this a run's folder?"
    if (path.parent / "runs").is_dir():
      hint = (
        "it holds several runs; name one, or repeat the command that made it"
      )
    raise UserError(f"{path} is missing: {hint}") from None
  except files.JSON_ERRORS as error:
    raise UserError(f"{path} is damaged: {error}") from None
  if not isinstance(content, dict):
    raise UserError(f"{path} is damaged: it holds no object")
  return content


def main(argv: Sequence[str]) -> None:
  """Writes the report of one run's folder and prints where it is."""
  from common.flags import Parser

  parser = Parser(
    "common.report",
    description="Writes report.md and its plots into a run's folder.",
    example="python -m common.report runs/birdie",
  )
  parser.usage = "%(prog)s RUNDIR"
  parser.add_argument("rundir", metavar="RUNDIR", help="the run's folder")
  print(write_report(parser.parse_args(argv).rundir))


if __name__ == "__main__":
  from common import app

  app.leave(app.call(lambda: main(sys.argv[1:])))
