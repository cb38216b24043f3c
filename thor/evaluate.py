"""`python -m thor.evaluate runs/thor`: BLEU and chrF, with signatures."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common import app
from common.flags import Parser

EXAMPLE = "python -m thor.evaluate runs/thor --split test_names"
FILES_EXAMPLE = (
  "python -m thor.evaluate --references ref.de --hypotheses ours.de theirs.de"
)
METRICS = ("bleu", "chrf", "exact_match")


def main() -> None:
  """Scores trained runs on a test set, or files of translations."""
  parser = Parser(
    "thor.evaluate",
    description="BLEU and chrF of trained runs, or of files of translations; "
    "of several, a paired bootstrap against the first.",
    example=f"{EXAMPLE}\n  {FILES_EXAMPLE}",
  )
  add = parser.add_argument
  add("runs", nargs="*", metavar="RUNDIR", help="runs' folders")
  add("--split", default="", help="of the runs' data; else the first test set")
  add("--dispatch", default="", help="the way to use the experts")
  add("--seed", type=int, default=0, help="of the dispatch")
  add("--beam", type=int, default=0, help="0: the run's")
  add("--average", type=int, default=1, help="the mean of so many checkpoints")
  add("--step", type=int, default=None, help="which checkpoint, else the last")
  add("--references", default="", metavar="FILE", help="a sentence a line")
  add("--hypotheses", nargs="+", default=(), metavar="FILE")
  add("--language", default="", help="of the references, for BLEU's tokenizer")
  add("--tokenize", default="", help="sacrebleu's, in place of the language's")
  add("--samples", type=int, default=1000, help="of the bootstrap")
  add("--json", action="store_true", help="print JSON")
  args = parser.parse_args()
  if bool(args.runs) == bool(args.references):
    parser.error("give runs' folders, or --references and --hypotheses")
  if args.references and not args.hypotheses:
    parser.error("--references needs --hypotheses")
  found = _of_files(args) if args.references else _of_runs(args)
  print(json.dumps(found, indent=2) if args.json else _page(found))


def _of_files(args: Any) -> dict[str, Any]:
  from common.errors import UserError
  from thor import scores
  from thor.sources import read_lines

  def lines(file: str) -> list[str]:
    return [line for _, line in read_lines(file)]

  references = lines(args.references)
  tokenize = args.tokenize or scores.tokenizer_for(args.language)
  systems, tables = {}, {}
  for file in args.hypotheses:
    texts = systems[file] = lines(file)
    if len(texts) != len(references):
      raise UserError(
        f"{file} has {len(texts)} lines, but {args.references} "
        f"{len(references)}: give one translation for each"
      )
    tables[file] = {
      args.language: {
        "bleu": scores.bleu(texts, references, tokenize=tokenize),
        "chrf": scores.chrf(texts, references),
        "exact_match": scores.exact_match(texts, references),
      }
    }
  return {
    "systems": {name: _plain(table) for name, table in tables.items()},
    "bootstrap": _bootstrap(systems, references, args.samples, tokenize),
  }


def _of_runs(args: Any) -> dict[str, Any]:
  from common.errors import UserError
  from thor.run import load_run
  from thor.scores import by_language
  from thor.sources import load_parallel
  from thor.translations import translate_pairs

  systems, tables, copied = {}, {}, {}
  pairs: Any = None
  for folder in args.runs:
    run = load_run(folder, step=args.step, average=args.average)
    splits = load_parallel(run.config.data.source).splits
    split = args.split or next((n for n in splits if n[:4] == "test"), "valid")
    if split not in splits:
      raise UserError(f"--split={split!r}: {folder} has {', '.join(splits)}")
    own = list(splits[split])
    if pairs is not None and own != pairs:
      raise UserError(
        f"{folder} was trained with other data than {args.runs[0]}: its "
        f"{split} differs, so scores do not compare"
      )
    pairs = own
    if args.beam:
      with run.config.unlocked():
        run.config.translation.beam = args.beam
    texts = translate_pairs(run, pairs, dispatch=args.dispatch, seed=args.seed)
    systems[folder] = texts
    references = [pair.target for pair in pairs]
    languages = [pair.language for pair in pairs]
    tables[folder] = by_language(texts, references, languages)
    sources = [pair.source for pair in pairs]
    copied = by_language(sources, references, languages)
  references = [pair.target for pair in pairs]
  found = {name: _plain(table) for name, table in tables.items()}
  found["copying the source"] = _plain(copied)
  return {
    "systems": found,
    "bootstrap": _bootstrap(systems, references, args.samples, "13a"),
  }


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
  samples: int,
  tokenize: str,
) -> dict[str, Any]:
  """Against the first system; {} for one alone."""
  from thor.scores import paired_bootstrap

  if len(systems) < 2:
    return {}
  found = paired_bootstrap(
    systems, references, baseline=next(iter(systems)), samples=samples,
    tokenize=tokenize,
  )  # fmt: skip
  return {
    name: {
      metric: {
        "mean": one.mean,
        "half_width": one.half_width,
        # JSON has no NaN: the baseline has no p-value.
        "p": None if one.p_value != one.p_value else one.p_value,
        "signature": one.score.signature,
      }
      for metric, one in own.items()
    }
    for name, own in found.items()
  }


def _page(found: Mapping[str, Any]) -> str:
  lines, signatures = [], dict[str, None]()
  width = max(len(name) for name in found["systems"])
  for name, table in found["systems"].items():
    lines.append(f"{name:{width}s}     BLEU   chrF  exact")
    for language, own in table.items():
      values = [own[metric]["value"] for metric in METRICS]
      signatures |= {own[m]["signature"]: None for m in METRICS[:2]}
      cells = "  ".join(f"{value:5.1f}" for value in values)
      lines.append(f"{language:>{width}s}    {cells}")
    if len(table) > 1:
      means = [
        sum(own[m]["value"] for own in table.values()) / len(table)
        for m in METRICS
      ]
      cells = "  ".join(f"{value:5.1f}" for value in means)
      lines.append(f"{'mean':>{width}s}    {cells}")
    lines.append("")
  lines += [f"signature  {signature}" for signature in signatures]
  if found["bootstrap"]:
    lines += ["", "paired bootstrap against the first, all languages as one"]
    for name, own in found["bootstrap"].items():
      parts = [
        f"{metric} {one['mean']:.1f} ± {one['half_width']:.1f}"
        + ("" if one["p"] is None else f" (p = {one['p']:.3g})")
        for metric, one in own.items()
      ]
      lines.append(f"{name:{width}s}  {'  '.join(parts)}")
    first = next(iter(found["bootstrap"].values()))
    lines += [f"signature  {one['signature']}" for one in first.values()]
  return "\n".join(lines)


if __name__ == "__main__":
  app.leave(app.call(main))
