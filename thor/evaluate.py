"""`python -m thor.evaluate runs/thor`: BLEU and chrF, with signatures."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from common import app
from common.errors import UserError
from common.flags import Parser

EXAMPLE = "python -m thor.evaluate runs/thor --split test_names"
FILES_EXAMPLE = (
  "python -m thor.evaluate --references ref.de --hypotheses ours.de theirs.de"
)
METRICS = ("bleu", "chrf", "exact_match")
# Flags of one form that the other has no use for.
OF_RUNS = ("split", "dispatch", "seed", "beam", "average", "step")
OF_FILES = ("hypotheses", "language", "tokenize")


def make_parser() -> Parser:
  """The flags; None where one is not given."""
  parser = Parser(
    "thor.evaluate",
    description="BLEU and chrF of trained runs, or of files of translations; "
    "of several, a paired bootstrap against the first.",
    example=f"{EXAMPLE}\n  {FILES_EXAMPLE}",
  )
  add = parser.add_argument
  add("runs", nargs="*", metavar="RUNDIR", help="runs' folders")
  add("--split", help="of the runs' data; else the first test set")
  add("--dispatch", help="the way to use the experts; else the run's")
  add("--seed", type=int, help="of the dispatch; else the run's")
  add("--beam", type=int, help="1: greedy; else the run's")
  add("--average", type=int, help="the mean of so many checkpoints (1)")
  add("--step", type=int, help="which checkpoint; else the newest")
  add("--references", metavar="FILE", help="a sentence a line")
  add("--hypotheses", nargs="+", metavar="FILE", help="a translation a line")
  add("--language", help="of the references, for BLEU's tokenizer")
  add("--tokenize", help="sacrebleu's, in place of the language's")
  add("--samples", type=int, default=1000, help="of the bootstrap (1000)")
  add("--json", action="store_true", help="print JSON")
  return parser


def main() -> None:
  """Scores trained runs on a test set, or files of translations."""
  parser = make_parser()
  args = parser.parse_args()
  _check(parser, args)
  found = _of_runs(args) if args.runs else _of_files(args)
  print(json.dumps(found, indent=2) if args.json else _page(found))


def _check(parser: Parser, args: Any) -> None:
  """Refuses what makes no sense, before anything is loaded."""
  is_files = args.references is not None
  if bool(args.runs) == is_files:
    parser.error("give runs' folders, or --references and --hypotheses")
  for name in OF_RUNS if is_files else OF_FILES:
    if getattr(args, name) is not None:
      form = "runs, not with files" if is_files else "--references, not runs"
      parser.error(f"--{name} goes with {form}: leave it out")
  if is_files and not args.hypotheses:
    parser.error("--references needs --hypotheses")
  for name in ("beam", "average", "samples"):
    value = getattr(args, name)
    if value is not None and value < 1:
      parser.error(f"--{name}={value} must be at least 1")
  seen: dict[str, str] = {}
  for name in args.runs or [args.references, *args.hypotheses]:
    place = os.path.realpath(name)
    if place in seen:
      parser.error(f"{seen[place]} and {name} are the same: give it once")
    seen[place] = name


def _of_files(args: Any) -> dict[str, Any]:
  from thor import scores
  from thor.sources import read_lines

  def lines(file: str) -> list[str]:
    return [line for _, line in read_lines(file)]

  references = lines(args.references)
  language = args.language or ""
  tokenize = args.tokenize or scores.tokenizer_for(language)
  systems, tables = {}, {}
  for file in args.hypotheses:
    texts = systems[file] = lines(file)
    if len(texts) != len(references):
      raise UserError(
        f"{file} has {len(texts)} lines, but {args.references} "
        f"{len(references)}: give one translation for each"
      )
    table = {
      "bleu": scores.bleu(texts, references, tokenize=tokenize),
      "chrf": scores.chrf(texts, references),
      "exact_match": scores.exact_match(texts, references),
    }
    tables[file] = _plain({language: table})
  parts = {language or "all": (range(len(references)), tokenize)}
  return {
    "systems": tables,
    "bootstrap": _bootstrap(systems, references, parts, args.samples),
  }


def _of_runs(args: Any) -> dict[str, Any]:
  from thor.scores import by_language, by_tokenizer

  systems: dict[str, list[str]] = {}
  pairs: list[Any] = []
  for folder in args.runs:
    pairs, systems[folder] = _translated(folder, args, pairs)
  references = [pair.target for pair in pairs]
  languages = [pair.language for pair in pairs]
  copied = {"copying the source": [pair.source for pair in pairs]}
  return {
    "systems": {
      name: _plain(by_language(texts, references, languages))
      for name, texts in (systems | copied).items()
    },
    "bootstrap": _bootstrap(
      systems, references, by_tokenizer(languages), args.samples
    ),
  }


def _translated(
  folder: str, args: Any, others: list[Any]
) -> tuple[list[Any], list[str]]:
  """The pairs of a run's test set, and its translations.

  Args:
    folder: the run's.
    args: the flags.
    others: the pairs of the runs before; [] for the first.
  """
  from thor.run import load_run
  from thor.sources import load_parallel
  from thor.translations import translate_pairs

  average = 1 if args.average is None else args.average
  run = load_run(folder, step=args.step, average=average)
  text = load_parallel(run.config.data.source)
  then, now = run.facts.get("text_hash"), text.facts["text_hash"]
  if now != then:
    raise UserError(
      f"{folder}: its data are not those it was trained with (text_hash {now}, "
      f"then {then}): bring those back, or train again"
    )
  split = args.split
  if split is None:
    split = next((n for n in text.splits if n.startswith("test")), "valid")
  if split not in text.splits:
    raise UserError(f"--split={split!r}: {folder} has {', '.join(text.splits)}")
  pairs = list(text.splits[split])
  if others and pairs != others:
    raise UserError(
      f"{folder} was trained with other data than {args.runs[0]}: its {split} "
      "differs, so scores do not compare"
    )
  if args.beam is not None:
    with run.config.unlocked():
      run.config.translation.beam = args.beam
  dispatch = args.dispatch or ""
  return pairs, translate_pairs(run, pairs, dispatch=dispatch, seed=args.seed)


def _plain(table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  return {
    language or "all": {
      metric: {"value": score.value, "signature": score.signature}
      for metric, score in own.items()
    }
    for language, own in table.items()
  }


def _bootstrap(
  systems: Mapping[str, Sequence[str]],
  references: Sequence[str],
  parts: Mapping[str, tuple[Sequence[int], str]],
  samples: int,
) -> dict[str, Any]:
  """Of each part, against the first system; {} for one alone."""
  from thor.scores import paired_bootstrap

  if len(systems) < 2:
    return {}
  made = {}
  for part, (places, tokenize) in parts.items():
    found = paired_bootstrap(
      {name: [own[i] for i in places] for name, own in systems.items()},
      [references[i] for i in places],
      baseline=next(iter(systems)),
      samples=samples,
      tokenize=tokenize,
    )
    made[part] = {
      "tokenize": tokenize,
      "systems": {
        name: {metric: _plain_result(one) for metric, one in own.items()}
        for name, own in found.items()
      },
    }
  return made


def _plain_result(one: Any) -> dict[str, Any]:
  return {
    "mean": one.mean,
    "half_width": one.half_width,
    # JSON has no NaN: the baseline has no p-value.
    "p": None if one.p_value != one.p_value else one.p_value,
    "signature": one.score.signature,
  }


def _page(found: Mapping[str, Any]) -> str:
  tables = found["systems"]
  labels = {label for table in tables.values() for label in table}
  width = max(map(len, (*tables, *labels, "mean")))
  lines, signatures = [], dict[str, None]()

  def row(label: str, values: Sequence[float]) -> str:
    cells = "  ".join(f"{value:5.1f}" for value in values)
    return f"{label:>{width}s}    {cells}"

  for name, table in tables.items():
    lines.append(f"{name:{width}s}     BLEU   chrF  exact")
    columns = [[own[m]["value"] for own in table.values()] for m in METRICS]
    lines += [row(*cells) for cells in zip(table, zip(*columns))]
    if len(table) > 1:
      lines.append(row("mean", [sum(own) / len(own) for own in columns]))
    lines.append("")
    for own in table.values():
      signatures |= {own[m]["signature"]: None for m in METRICS[:2]}
  lines += [f"signature  {signature}" for signature in signatures]
  for part, test in found["bootstrap"].items():
    lines += ["", *_bootstrap_lines(part, test, width)]
  return "\n".join(lines)


def _bootstrap_lines(
  part: str, test: Mapping[str, Any], width: int
) -> list[str]:
  systems = test["systems"]
  first = next(iter(systems))
  lines = [
    f"paired bootstrap against {first}: {part}, tokenizer {test['tokenize']}"
  ]
  for name, own in systems.items():
    cells = [
      f"{metric} {one['mean']:.1f} ± {one['half_width']:.1f}"
      + ("" if one["p"] is None else f" (p = {one['p']:.3g})")
      for metric, one in own.items()
    ]
    lines.append(f"{name:{width}s}  {'  '.join(cells)}")
  lines += [f"signature  {one['signature']}" for one in systems[first].values()]
  return lines


if __name__ == "__main__":
  app.run_alone(main)
