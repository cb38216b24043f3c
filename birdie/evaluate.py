"""`python -m birdie.evaluate --run runs/birdie`: tasks, beside baselines."""

import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from common import app
from common.errors import UserError
from common.flags import Parser

EXAMPLE = (
  "python -m birdie.evaluate --run runs/birdie --tasks phone_book "
  "--set phone_book.entries=8,16 --set phone_book.lookups=1,2,4"
)
SQUAD_EXAMPLE = (
  "python -m birdie.evaluate --run runs/birdie --tasks squad "
  "--data dev-v2.0.json"
)
DEFAULT_TASKS = "phone_book,associative_recall"
HEADS = ("model", "guess", "majority", "context")


def make_parser() -> Parser:
  """The flags."""
  parser = Parser(
    "birdie.evaluate",
    description="A trained model's answers to tasks, beside what is expected "
    "of an answer\nguessed at random (guess), of the most frequent one "
    "(majority), and of one drawn from\nthe prompt (context). birdie/README.md "
    "lists the tasks.",
    example=f"{EXAMPLE}\n  {SQUAD_EXAMPLE}",
  )
  add = parser.add_argument
  add("--run", required=True, metavar="DIR", help="a run's folder")
  add("--tasks", help=f"names with commas ({DEFAULT_TASKS})")
  add("--problems", type=int, default=64, help="of each combination (64)")
  add(
    "--set", action="append", default=[], metavar="TASK.SETTING=VALUES",
    help="values with commas, all combined; 8-16 draws from 8 to 16",
  )  # fmt: skip
  add(
    "--data", action="append", default=[], metavar="FILE",
    help="of squad or story_infilling; TASK=FILE if both are asked for",
  )  # fmt: skip
  add("--objectives", action="store_true", help="validation losses, too")
  add("--json", action="store_true", help="print JSON")
  add("--plot", metavar="FILE.png", help="accuracy by look-ups and by length")
  add("--seed", type=int, default=0, help="of the problems (0)")
  add("--batch_size", type=int, default=16, help="answered together (16)")
  add("--step", type=int, default=None, help="a checkpoint; else the newest")
  return parser


def main() -> None:
  """Evaluates a run's model on tasks and on its objectives."""
  parser = make_parser()
  args = parser.parse_args()
  for name in ("problems", "batch_size"):
    if getattr(args, name) < 1:
      parser.error(f"--{name}={getattr(args, name)} must be at least 1")
  if args.plot:
    _check_plot(parser, args.plot)
  asked = args.tasks
  if asked is None:
    asked = "" if args.objectives else DEFAULT_TASKS
  names = [name.strip() for name in asked.split(",") if name.strip()]
  names = list(dict.fromkeys(names))
  if args.tasks is not None and not names:
    parser.error(f"--tasks={args.tasks!r} names no task: leave it out")
  if args.plot and not names:
    parser.error("--plot shows tasks: name some with --tasks")
  grids = make_grids(names, args.set, args.data)

  from birdie.run import load_run

  run = load_run(args.run, step=args.step)
  found = {"run": args.run, "step": run.step, "seed": args.seed, "tasks": {}}
  corpus = None
  if args.objectives or "selective_copying" in names:
    corpus = _corpus(run, args.run)
  cells = {name: make_cells(run, corpus, name, grids[name]) for name in names}
  for name in names:
    found["tasks"][name] = _evaluate(run, name, cells[name], args)
  if args.objectives:
    found["objectives"] = _objectives(run, corpus, args.batch_size)
  if args.plot:
    _plot(args.plot, found["tasks"])
  print(json.dumps(found, indent=2) if args.json else _page(found))


def _check_plot(parser: Parser, file: str) -> None:
  folder = os.path.dirname(file) or "."
  if not file.endswith(".png"):
    parser.error(f"--plot={file!r} must end in .png")
  if not os.path.isdir(folder):
    parser.error(f"--plot={file!r}: there is no folder {folder!r}")


# -- what is asked for ---------------------------------------------------------


def make_grids(
  names: Sequence[str], settings: Sequence[str], files: Sequence[str]
) -> dict[str, dict[str, tuple]]:
  """The values of each task's settings.

  Args:
    names: of tasks.
    settings: `TASK.SETTING=VALUES`, in place of the task's own grid.
    files: `FILE` or `TASK=FILE`.

  Raises:
    UserError: for unknown tasks or settings, or a file that no task takes.
  """
  from birdie.problems import settings_of
  from birdie.tasks import TASKS
  from common.config import check_keys, did_you_mean

  for name in names:
    if name not in TASKS:
      raise UserError(f"--tasks={name}{did_you_mean(name, TASKS)}")
  given: dict[str, dict[str, tuple]] = {name: {} for name in names}
  for argument in settings:
    key, equals, values = argument.partition("=")
    name, dot, setting = key.partition(".")
    if not (equals and dot and setting and values):
      raise UserError(f"--set {argument}: need TASK.SETTING=VALUES")
    if name not in given:
      hint = did_you_mean(name, names)
      raise UserError(f"--set {argument}: {name!r} is not evaluated{hint}")
    known = [key for key in settings_of(TASKS[name]) if key != "paradigm"]
    check_keys([setting], known, what=f"--set {argument}")
    given[name][setting] = tuple(_value(text) for text in values.split(","))
  for argument in files:
    name, file = _file_of(argument, names)
    given[name]["path"] = (file,)
  for name, own in given.items():
    if not TASKS[name].is_trainable and "path" not in own:
      raise UserError(f"{name} needs its file: add --data FILE")
    # Sizes of one's own replace the task's; other settings join them.
    if not own.keys() & TASKS[name].grid.keys():
      given[name] = {**TASKS[name].grid, **own}
  return given


def _value(text: str) -> Any:
  """A number, the least and the most, or a word."""
  parts = text.strip().split("-")
  if all(part.isdecimal() for part in parts) and len(parts) <= 2:
    numbers = tuple(int(part) for part in parts)
    return numbers if len(numbers) == 2 else numbers[0]
  return text.strip()


def _file_of(argument: str, names: Sequence[str]) -> tuple[str, str]:
  from birdie.tasks import TASKS

  of_files = [name for name in names if not TASKS[name].is_trainable]
  name, equals, file = argument.partition("=")
  if equals and name in of_files:
    return name, file
  if len(of_files) == 1:
    return of_files[0], argument
  if of_files:
    raise UserError(f"--data {argument}: write {of_files[0]}={argument}")
  raise UserError(
    f"--data {argument}: no task takes a file; ask for one, as in --tasks squad"
  )


def make_cells(
  run: Any, corpus: Any, name: str, grid: Mapping[str, Sequence[Any]]
) -> list[tuple[dict[str, Any], Any]]:
  """Every combination of settings, with its task.

  Args:
    run: gives the vocabulary and the tokenizer.
    corpus: gives held-out text to `selective_copying`.
    name: of the task.
    grid: values by setting.
  """
  from birdie.tasks import make_task

  others = {}
  if name == "selective_copying":
    others["tokens"] = corpus.validation.tokens
  made = []
  for values in itertools.product(*grid.values()):
    settings = dict(zip(grid, values))
    task = make_task(
      name, settings, run.vocab, tokenizer=run.tokenizer, **others
    )
    made.append((settings, task))
  return made


def _corpus(run: Any, folder: str) -> Any:
  """The run's text; it must be what the run was trained on."""
  from birdie.data import make_corpus
  from common import files

  corpus = make_corpus(run.config, run.tokenizer)
  facts = os.path.join(folder, "facts.json")
  then = files.read_json(facts).get("text_hash")
  if then != (now := corpus.facts()["text_hash"]):
    raise UserError(
      f"{folder}: its text is not the one it was trained with (text_hash "
      f"{now}, then {then}): bring that back, or train again"
    )
  return corpus


# -- what is found -------------------------------------------------------------


def _evaluate(
  run: Any, name: str, cells: Sequence[Any], args: Any
) -> dict[str, Any]:
  """Answers every combination; each is a line on the error stream."""
  from birdie import evaluation
  from birdie.answering import answer

  def answers(task, problems):
    return answer(
      run.model, run.params, task, problems, batch_size=args.batch_size
    )

  records, settings = [], []
  for number, (chosen, task) in enumerate(cells, 1):
    made = evaluation.evaluate(
      task, answers, problems=args.problems, seed=args.seed
    )
    records += made
    settings += [chosen] * len(made)
    metric = task.metrics[0]
    mean = sum(record.scores[metric] for record in made) / len(made)
    named = " ".join(f"{key}={value}" for key, value in chosen.items())
    print(
      f"[{number}/{len(cells)}] {name} {named}: {metric} {100 * mean:.1f} %",
      file=sys.stderr,
      flush=True,
    )
  return evaluation.page_data(records, settings, cells[0][1])


def _objectives(run: Any, corpus: Any, batch_size: int) -> dict[str, Any]:
  """Loss and accuracy of every configuration of the run's mixture."""
  from birdie.data import make_configurations
  from birdie.validation import Evaluator, make_eval_batches
  from common.parallel import batch_sharding, local_mesh

  config = run.config
  made = make_configurations(config, run.vocab, run.tokenizer.encode)
  mesh = local_mesh()
  batches = make_eval_batches(
    corpus.validation,
    made,
    length=config.data.sequence_length,
    rows_per_config=config.evaluation.rows,
    batch_size=-(-batch_size // mesh.size) * mesh.size,
    seed=config.seed,
  )
  scores = Evaluator(
    run.model.clone(seq_axis=None),
    batches,
    num_configs=len(made),
    sharding=batch_sharding(mesh),
    chunk=run.config.loss.chunk,
  )(run.params)
  columns = (scores.losses, scores.accuracies, scores.tokens)
  return {
    c.name: {"loss": float(loss), "accuracy": float(hit), "tokens": int(n)}
    for c, loss, hit, n in zip(made, *columns)
  }


# -- how it is shown -----------------------------------------------------------


def _page(found: Mapping[str, Any]) -> str:
  lines = [f"{found['run']}, step {found['step']}, seed {found['seed']}"]
  for name, task in found["tasks"].items():
    for metric in task["metrics"]:
      lines += ["", *_table(name, metric, task)]
  if found["tasks"]:
    lines += ["", "in percent, with intervals of 95 % over the problems"]
  if "objectives" in found:
    lines += ["", *_losses(found["objectives"])]
  return "\n".join(lines)


def _table(name: str, metric: str, task: Mapping[str, Any]) -> list[str]:
  rows: list[Sequence[str]] = [(f"{name}: {metric}", "problems", *HEADS)]
  parts = task["by_setting"] | {"length": task["by_length"]}
  # Where the number of look-ups was a setting it stands there already.
  if _labels(task["by_lookups"]) not in map(_labels, parts.values()):
    parts["look-ups"] = task["by_lookups"]
  for title, own in parts.items():
    if len(own) > 1:
      rows += [(f"  {title} {r['label']}", *_cells(r, metric)) for r in own]
  rows.append(("  all", *_cells(task["all"], metric)))
  return _aligned(rows)


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  return sorted(row["label"] for row in rows)


def _cells(row: Mapping[str, Any], metric: str) -> tuple[str, ...]:
  one = row["metrics"][metric]
  low, mean, high = (f"{100 * one[key]:.1f}" for key in ("low", "mean", "high"))
  baselines = (
    "–" if one[name] is None else f"{100 * one[name]:.1f}" for name in HEADS[1:]
  )
  return str(row["problems"]), f"{mean} ({low}–{high})", *baselines


def _losses(objectives: Mapping[str, Mapping[str, float]]) -> list[str]:
  rows = [("configuration", "tokens", "nats a token", "accuracy, %")]
  rows += [
    (name, str(o["tokens"]), f"{o['loss']:.4f}", f"{100 * o['accuracy']:.1f}")
    for name, o in objectives.items()
  ]
  return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*rows)]
  return [
    "  ".join(
      cell.ljust(width) if j == 0 else cell.rjust(width)
      for j, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in rows
  ]


def _plot(file: str, tasks: Mapping[str, Any]) -> None:
  """Tasks' main metrics; dashed what a guess earns, dotted the prompt."""
  import pathlib

  from common import files, plots

  palette = plots.Palette()
  with plots.sheet(11, 4.2) as figure:
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, fact in (
      (left, "by_lookups", "lookups"),
      (right, "by_length", "length"),
    ):
      for name, task in tasks.items():
        _curve(axes, f"{name}: {task['metrics'][0]}", task, key, fact, palette)
      axes.set_xscale("log", base=2)
      axes.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("look-ups")
    right.set_xlabel("tokens of the prompt")
    left.set_ylabel("share right (dashed: guess, dotted: context)")
    left.set_ylim(-0.02, 1.02)
    right.legend()
    files.replace(pathlib.Path(file), plots.png(figure))


def _curve(axes, label, task, key: str, fact: str, palette) -> None:
  colour, _ = palette(label)
  rows = task[key]
  own = [row["metrics"][task["metrics"][0]] for row in rows]
  places = [row[fact] for row in rows]
  axes.errorbar(
    places,
    [one["mean"] for one in own],
    [
      [one["mean"] - one["low"] for one in own],
      [one["high"] - one["mean"] for one in own],
    ],
    color=colour,
    marker="o",
    markersize=3.5,
    capsize=2,
    label=label,
  )
  for name, style in (("guess", "--"), ("context", ":")):
    known = [(x, one[name]) for x, one in zip(places, own)]
    known = [(x, y) for x, y in known if y is not None]
    if known:
      axes.plot(*zip(*known), color=colour, linestyle=style, linewidth=1)


if __name__ == "__main__":
  app.run_alone(main)
