import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from common import config, plots
from common.errors import UserError
from common.metrics import MetricWriter
from common.plots import Palette, Plot
from common.report import (
  ReportSpec,
  Table,
  duration,
  markdown_table,
  number,
  write_report,
)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))

SPEC = ReportSpec(
  title="A toy",
  intro="What it is.",
  plots=(
    Plot("Loss", ("train/loss", "eval/loss"), ylabel="nats", yscale="log"),
    Plot("The mixture", ("mixture/.+",), kind="area", note="It changes."),
    Plot("Not there", ("controller/.+",)),
  ),
  tables=(
    Table("Results", ("eval/loss", "train/.+")),
    Table("Later", ("test/.+",), note="Comes with the last step."),
  ),
)
FACTS = {
  "text_hash": "12|ab",
  "tokens_per_step": 4096,
  "versions": {"jax": "0.10.2", "numpy": "2.1"},
  "devices": "8 x cpu",
  "seeds": [1, 2],
}


def make_run(path, spec=SPEC, facts=FACTS):
  config.save_config(
    path, ConfigDict({"seed": 7, "num_steps": 40, "optim": {"lr": 0.1}})
  )
  (path / "facts.json").write_text(json.dumps(facts))
  spec.save(path)
  writer = MetricWriter(path)
  for step in (10, 20, 30):
    writer.write(step, {"train/loss": 8 / step, "train/rate": 1e-5})
  writer.write(20, {"mixture/copying": 0.25, "mixture/infilling": 0.75})
  writer.write(30, {"eval/loss": math.nan})
  writer.write(30, {"eval/loss": 12345.6, "mixture/copying": 1.0})
  return path


def test_report(tmp_path):
  path = write_report(make_run(tmp_path))
  assert path == str(tmp_path / "report.md")
  page = (tmp_path / "report.md").read_text()
  for part in (
    "# A toy\n\nWhat it is.\n\n## The run\n",
    "| steps | 30 of 40 |",
    "| tokens seen | 122,880 |",
    "| training time | 0 s |",
    "| seed | 7 |",
    r"| text hash | 12\|ab |",
    "| versions | jax 0.10.2, numpy 2.1 |",
    "| devices | 8 x cpu |",
    "| seeds | 1, 2 |",
    "## Results\n\n| metric | first | lowest | highest | last | at step |\n",
    "| `eval/loss` | – | 12,346 | 12,346 | 12,346 | 30 |\n"
    "| `train/loss` | 0.8 | 0.2667 | 0.8 | 0.2667 | 30 |\n"
    "| `train/rate` | 1e-05 | 1e-05 | 1e-05 | 1e-05 | 30 |\n",
    "## Later\n\nComes with the last step.\n\n*No values yet.*\n",
    "## Loss\n\n![Loss](plots/loss.png)\n",
    "![The mixture](plots/the-mixture.png)\n\nIt changes.\n",
    "## Not there\n\n*No values yet.*\n",
    "| `optim.lr` | `0.1` |",
  ):
    assert part in page, part
  files = {p.name for p in (tmp_path / "plots").iterdir()}
  assert files == {"loss.png", "the-mixture.png"}
  for name in files:
    with Image.open(tmp_path / "plots" / name) as image:
      assert image.size == (990, 462)
  assert not list(tmp_path.glob("**/*.new"))


def test_report_can_be_written_again(tmp_path):
  write_report(make_run(tmp_path))
  before = (tmp_path / "report.md").read_bytes()
  image = (tmp_path / "plots" / "loss.png").read_bytes()
  write_report(tmp_path)
  assert (tmp_path / "report.md").read_bytes() == before
  assert (tmp_path / "plots" / "loss.png").read_bytes() == image


def test_spec_survives_its_file(tmp_path):
  SPEC.save(tmp_path)
  assert ReportSpec.load(tmp_path) == SPEC


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("config.json", None, ["no run in", "config.json"]),
    ("config.json", "{", ["config.json", "damaged"]),
    ("facts.json", None, ["facts.json", "missing"]),
    ("facts.json", "[1]", ["facts.json", "damaged"]),
    ("report.json", None, ["report.json", "missing"]),
    ("report.json", '{"title": ', ["report.json", "damaged"]),
    ("report.json", '{"title": "x"}', ["report.json", "damaged", "intro"]),
    (
      "report.json",
      '{"title": "", "intro": "", "plots": [{"titel": 1}], "tables": []}',
      ["report.json", "damaged", "titel"],
    ),
    ("metrics.jsonl", None, ["no metrics in", "metrics.jsonl"]),
    ("metrics.jsonl", "", ["no metrics in", "nothing to report"]),
  ],
)
def test_a_folder_that_is_no_run_is_one_line(tmp_path, name, content, words):
  make_run(tmp_path)
  (tmp_path / name).unlink()
  if content is not None:
    (tmp_path / name).write_text(content)
  with pytest.raises(UserError) as error:
    write_report(tmp_path)
  assert all(word in str(error.value) for word in words), error.value
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("cell", "shown"),
  [
    ("a | b\nc", r"a \| b c"),
    ("`a<b`", "`a<b`"),
    ("p < 0.05", "p &lt; 0.05"),
    ("[0.1, 0.3]", "[0.1, 0.3]"),
    ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)>"),
    (r"\`<script>`", r"\`&lt;script>`"),
    ("`a` <b> `c`", "`a` &lt;b> `c`"),
    ("![x](https://example.org/x.png)", r"![x]\(https://example.org/x.png)"),
  ],
)
def test_cells_hold_text_and_nothing_that_acts(cell, shown):
  assert markdown_table(("", ""), [(cell, "1")]).splitlines()[-1] == (
    f"| {shown} | 1 |"
  )


def test_plots_of_one_name_are_refused(tmp_path):
  spec = ReportSpec(
    "x", plots=(Plot("A b", ("train/loss",)), Plot("a-B", ("train/loss",)))
  )
  with pytest.raises(ValueError, match=r"two plots .* plots/a-b\.png"):
    write_report(make_run(tmp_path, spec))


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "common.report", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def test_command(tmp_path):
  result = command(os.fspath(make_run(tmp_path)))
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout == f"{tmp_path}/report.md\n"
  assert (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
  ("arguments", "status", "words"),
  [
    (["--help"], 0, ["RUNDIR", "python -m common.report runs/birdie"]),
    ([], 2, ["error: ", "RUNDIR"]),
    (["no/such/folder"], 2, ["error: no run in 'no/such/folder'"]),
  ],
)
def test_command_answers(arguments, status, words):
  result = command(*arguments)
  assert result.returncode == status
  text = result.stdout if status == 0 else result.stderr
  assert all(word in text for word in words)
  assert status == 0 or text.count("\n") == 1


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0.0, "0"),
    (3.0, "3"),
    (1234567.0, "1,234,567"),
    (0.123456, "0.1235"),
    (1234.56, "1,235"),
    (123456.7, "123,457"),
    (1.5e-7, "1.5e-07"),
    (-2.5, "-2.5"),
    (math.nan, "–"),
    (math.inf, "–"),
  ],
)
def test_number(value, text):
  assert number(value) == text


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0.4, "0 s"), (59.6, "1 min 00 s"), (3723, "1 h 02 min 03 s")],
)
def test_duration(seconds, text):
  assert duration(seconds) == text


LINES = [
  {"step": 1, "a/x": 1.0, "a/y": None, "p/x": 1.0, "p/y": 2.0, "r/x": 0.5},
  {"step": 2, "a/y": 4.0, "b": None, "p/x": None, "r/x": 1.0, "r/y": 0.1},
  {"step": 4, "a/x": 3.0, "p/x": 2.0, "r/x": 3.0},
]


@pytest.mark.parametrize(
  ("keys", "names"),
  [
    (("a/.+",), ["a/x", "a/y"]),
    (("a/y", "a/.+"), ["a/y", "a/x"]),  # the order of the regexes
    (("a",), []),  # whole names
    (("b",), []),  # nothing but null
    (("[ab].*",), ["a/x", "a/y"]),
  ],
)
def test_select(keys, names):
  assert list(plots.select(LINES, keys)) == names


def test_series_have_gaps_for_null():
  series = plots.select(LINES, ("a/y",))["a/y"]
  np.testing.assert_array_equal(series.steps, [1, 2])
  np.testing.assert_array_equal(series.values, [np.nan, 4])


def test_pairs_are_of_one_line_and_one_group():
  found = plots.pairs(LINES, ("p/(.+)", "r/(.+)"))
  assert {k: v.tolist() for k, v in found.items()} == {
    "x": [[1.0, 0.5], [2.0, 3.0]]
  }


@pytest.mark.parametrize(
  ("names", "labels"),
  [
    ([], []),
    (["train/loss"], ["train/loss"]),
    (["train/loss", "eval/loss"], ["train/loss", "eval/loss"]),
    (["mixture/a", "mixture/b"], ["a", "b"]),
    (["m/c/a", "m/c/b", "m/d"], ["c/a", "c/b", "d"]),
    (["m", "m/a"], ["m", "m/a"]),
  ],
)
def test_labels_leave_out_what_is_shared(names, labels):
  assert plots.labels(names) == labels


def test_colours_stay_with_their_labels_and_differ():
  palette = Palette()
  first = [palette(f"{i}") for i in range(50)]
  assert [palette(f"{i}") for i in range(50)] == first
  assert len(set(first)) == 50


def many(count):
  rng = np.random.default_rng(0)
  return [
    {
      "step": step,
      **{f"m/{i:02d}": float(rng.normal()) for i in range(count)},
      **{f"n/{i:02d}": float(rng.normal()) for i in range(count)},
    }
    for step in range(0, 100, 20)
  ]


@pytest.mark.parametrize(
  ("kind", "count", "options", "is_wide", "is_high"),
  [
    ("line", 1, {"ylabel": "$x$ and $y"}, False, False),
    ("line", 3, {"yscale": "log", "xscale": "log"}, False, False),
    ("line", 30, {}, True, False),  # room for the legend
    ("area", 9, {}, False, False),
    ("heatmap", 30, {"ylabel": "reward"}, False, True),  # and for the rows
    ("scatter", 1, {}, False, False),
    ("scatter", 9, {}, False, False),
    ("bars", 5, {}, False, False),
  ],
)
def test_draw(kind, count, options, is_wide, is_high):
  keys = ("m/(.+)", "n/(.+)") if kind == "scatter" else ("m/.+",)
  plot = Plot("Of $ and % and _", keys, kind=kind, **options)
  image = Image.open(io.BytesIO(plots.draw(plot, many(count), Palette())))
  assert (image.width > 990, image.height > 462) == (is_wide, is_high)
  colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
  assert len(colours) > 10  # it is not an empty page


@pytest.mark.parametrize("kind", plots.KINDS)
def test_one_point_is_enough(kind):
  keys = ("a/(x)", "p/(x)") if kind == "scatter" else ("a/x",)
  assert plots.draw(Plot("t", keys, kind=kind), LINES[:1], Palette())


@pytest.mark.parametrize("kind", plots.KINDS)
def test_nothing_to_draw(kind):
  keys = ("no/(x)", "p/(x)") if kind == "scatter" else ("no/x",)
  assert plots.draw(Plot("t", keys, kind=kind), LINES, Palette()) is None


def test_a_log_axis_without_positive_values_has_nothing_to_draw():
  lines = [{"step": 1, "a": -1.0}, {"step": 2, "a": 0.0}]
  assert plots.draw(Plot("t", ("a",), yscale="log"), lines, Palette()) is None


@pytest.mark.parametrize(
  "options",
  [{"kind": "pie"}, {"yscale": "cubic"}, {"xscale": ""}, {"kind": "scatter"}],
)
def test_plots_check_themselves(options):
  with pytest.raises(ValueError, match="'My plot'"):
    Plot("My plot", ("a",), **options)


def test_a_folder_of_several_runs_says_so(tmp_path):
  (tmp_path / "runs").mkdir()
  with pytest.raises(UserError, match=r"report\.json is missing: it holds"):
    ReportSpec.load(tmp_path)
