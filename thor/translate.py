"""`python -m thor.translate runs/thor "The text." --language de`."""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from common import app
from common.errors import UserError
from common.flags import Parser

EXAMPLE = 'python -m thor.translate runs/thor "Good morning" --language de'


def make_parser() -> Parser:
  """The flags."""
  parser = Parser(
    "thor.translate",
    description="Translates text, line by line, with a trained model.",
    example=EXAMPLE,
  )
  add = parser.add_argument
  add("run", metavar="RUNDIR", help="a run's folder")
  add("text", nargs="?", help="the text; else --input or standard input")
  add("--input", metavar="FILE", help="UTF-8 text, a sentence a line")
  add("--output", metavar="FILE", help="else standard output")
  add("--language", default="", help="what to translate into, such as de")
  add("--beam", type=int, default=4, help="1: greedy (4)")
  add("--length_penalty", type=float, default=1.0, help="larger: longer (1.0)")
  add("--penalty", default="fairseq", help="fairseq or gnmt")
  add("--max_ratio", type=float, default=1.2, help="tokens by the source's")
  add("--max_extra", type=int, default=10, help="and so many more (10)")
  add("--n_best", type=int, default=1, help="translations of each line (1)")
  add("--scores", action="store_true", help="each after its score and a tab")
  add(
    "--dispatch",
    default="",
    metavar="MODE",
    help="which experts translate, such as fixed:0 or ensemble:4; by default "
    "what goes with the training",
  )
  add("--seed", type=int, default=0, help="of experts and samples (0)")
  add("--sample", action="store_true", help="draw instead of searching")
  add("--temperature", type=float, default=1.0, help="of --sample (1.0)")
  add("--top_k", type=int, default=0, help="of --sample, 0: all")
  add("--top_p", type=float, default=1.0, help="of --sample, 1: all")
  add("--batch_tokens", type=int, default=4096, help="of a batch (4096)")
  add(
    "--too_long",
    default="error",
    help="lines that do not fit: error, split or cut (error)",
  )
  add("--step", type=int, help="which checkpoint; else the newest")
  add("--average", type=int, default=1, help="the mean of so many checkpoints")
  return parser


def main() -> None:
  """Translates a text, a file or standard input."""
  parser = make_parser()
  # Flags may also come before the text.
  args, rest = parser.parse_known_intermixed_args()
  for argument in rest:
    parser.refuse(argument)
  _check(parser, args)

  import logging

  from thor.decode import Search

  search = Search(
    beam=max(args.beam, args.n_best) if args.sample else args.beam,
    n_best=args.n_best,
    length_penalty=args.length_penalty,
    penalty=args.penalty,
    max_ratio=args.max_ratio,
    max_extra=args.max_extra,
  )
  logging.basicConfig(format="%(message)s", level=logging.WARNING)
  translator, vocabulary = _translator(args, search)
  language = _language(args.language, vocabulary)
  try:
    with _writer(args.output) as write, _progress(args) as advance:
      for made in translator.translate(_lines(args), language):
        for text, score in made.n_best:
          shown = text.replace("\n", " ")
          write(f"{score:.4f}\t{shown}\n" if args.scores else f"{shown}\n")
        advance()
  except BrokenPipeError:
    # Whoever read has seen enough. Nothing is left for Python to flush.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check(parser: Parser, args: Any) -> None:
  """Refuses what makes no sense, before anything is loaded."""
  if args.text is not None and args.input is not None:
    parser.error("give a text or --input, not both")
  if args.output is not None and args.output == args.input:
    parser.error(f"--output={args.output} would overwrite --input")
  if args.batch_tokens < 1:
    parser.error(f"--batch_tokens={args.batch_tokens} must be at least 1")
  if not 0 < args.temperature < math.inf:
    parser.error(f"--temperature={args.temperature} must be a number above 0")
  if args.top_k < 0:
    parser.error(f"--top_k={args.top_k} must be at least 0")
  if not 0 < args.top_p <= 1:
    parser.error(f"--top_p={args.top_p} must be in (0, 1]")
  if not args.sample and (args.temperature, args.top_k, args.top_p) != (
    1.0, 0, 1.0,
  ):  # fmt: skip
    parser.error("--temperature, --top_k and --top_p go with --sample")


def _translator(args: Any, search: Any) -> tuple[Any, Any]:
  """Loads the run; (translator, its vocabulary)."""
  from thor.dispatch import Dispatch, prepare
  from thor.run import load_run
  from thor.translator import Translator

  run = load_run(args.run, step=args.step, average=args.average)
  way = Dispatch.parse(args.dispatch, run.routing)
  prepared = prepare(
    run.params, run.settings, way, seed=args.seed, table=run.table
  )
  sampling = None
  if args.sample:
    sampling = {
      "seed": args.seed,
      "temperature": args.temperature,
      "top_k": args.top_k,
      "top_p": args.top_p,
    }
  # Somebody who types waits for each line.
  types = args.text is None and args.input is None and sys.stdin.isatty()
  translator = Translator(
    prepared,
    run.vocabulary,
    search,
    token_budget=args.batch_tokens,
    too_long=args.too_long,
    sampling=sampling,
    window=1 if types else None,
  )
  return translator, run.vocabulary


def _language(language: str, vocabulary: Any) -> str:
  """Checks the flag before any text is read."""
  known = ", ".join(vocabulary.languages)
  if language and not known:
    raise UserError(
      f"--language={language}: the run translates between two languages only, "
      "leave the flag out"
    )
  if known and language not in vocabulary.languages:
    given = f"={language}" if language else " is missing"
    raise UserError(f"--language{given}: the run translates into {known}")
  return language


def _lines(args: Any) -> Iterator[str]:
  """The text, a line at a time; only line feeds end one."""
  if args.text is not None:
    yield from args.text.split("\n")
    return
  from common.data.sources import decode
  from thor.sources import read_lines

  if args.input is not None:
    for _, line in read_lines(args.input):
      yield line
    return
  for i, line in enumerate(sys.stdin.buffer, 1):
    yield decode(line.removesuffix(b"\n").removesuffix(b"\r"), f"line {i}")


@contextlib.contextmanager
def _writer(output: str | None) -> Iterator[Callable[[str], Any]]:
  """Writes text at once, in UTF-8 whatever the terminal's encoding."""

  def to(file: Any) -> Callable[[str], Any]:
    def write(text: str) -> None:
      file.write(text.encode())
      file.flush()

    return write

  if output is None:
    sys.stdout.flush()
    yield to(sys.stdout.buffer)
    return
  try:
    file = open(output, "wb")  # noqa: SIM115, closed below
  except OSError as error:
    raise UserError(
      f"--output={output} cannot be written: {error.strerror}"
    ) from error
  with file:
    yield to(file)


@contextlib.contextmanager
def _progress(args: Any) -> Iterator[Callable[[], None]]:
  """Counts lines of a file on a terminal that shows nothing else."""
  from common.progress import ProgressBar

  if args.input is None or (args.output is None and sys.stdout.isatty()):
    yield lambda: None
    return
  total = sum(1 for _ in _lines(args))
  done = 0
  with ProgressBar(total, name="lines") as bar:
    bar.start(0)

    def advance() -> None:
      nonlocal done
      done += 1
      bar.update(done, {})

    yield advance


if __name__ == "__main__":
  app.leave(app.call(main))
