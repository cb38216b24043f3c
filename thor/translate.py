"""`python -m thor.translate runs/thor "The text." --language de`."""

import contextlib
import dataclasses
import io
import math
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from common import app
from common.errors import UserError
from common.flags import Parser

EXAMPLE = 'python -m thor.translate runs/thor "Good morning" --language de'
# Of a run's `config.translation`, where a flag is not given.
SEARCH = ("beam", "length_penalty", "penalty", "max_ratio", "max_extra")
_PATIENCE = 0.1  # seconds that lines which came may wait for more
_CHUNK = 1 << 16  # bytes


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
  add("--beam", type=int, help="1: greedy; else the run's")
  add("--length_penalty", type=float, help="larger: longer; else the run's")
  add("--penalty", help="fairseq or gnmt; else the run's")
  add("--max_ratio", type=float, help="tokens by the source's; else the run's")
  add("--max_extra", type=int, help="and so many more; else the run's")
  add(
    "--n_best",
    type=int,
    default=1,
    help="translations of each line, a line each; empty where there are fewer "
    "(1)",
  )
  add("--scores", action="store_true", help="each after its score and a tab")
  add(
    "--dispatch",
    metavar="MODE",
    help="which experts translate, such as fixed:0 or ensemble:4; else the "
    "run's",
  )
  add("--seed", type=int, help="of experts and samples; else the run's")
  add("--sample", action="store_true", help="draw instead of searching")
  add("--temperature", type=float, default=1.0, help="of --sample (1.0)")
  add("--top_k", type=int, default=0, help="of --sample, 0: all")
  add("--top_p", type=float, default=1.0, help="of --sample, 1: all")
  add("--batch_tokens", type=int, help="of a batch; else the run's")
  add(
    "--too_long",
    default="split",
    help="lines longer than the run's longest: error, split or cut (split)",
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

  logging.basicConfig(format="%(message)s", level=logging.WARNING)
  translator, vocabulary = _translator(args)
  language = _language(args.language, vocabulary)
  try:
    with (
      _reader(args) as lines,
      _writer(args.output) as write,
      _progress(args) as advance,
    ):
      for made in translator.translate(
        lines, language, is_ready=lines.is_ready
      ):
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
  if args.batch_tokens is not None and args.batch_tokens < 1:
    parser.error(f"--batch_tokens={args.batch_tokens} must be at least 1")
  if not 0 < args.temperature < math.inf:
    parser.error(f"--temperature={args.temperature} must be a number above 0")
  if args.top_k < 0:
    parser.error(f"--top_k={args.top_k} must be at least 0")
  if not 0 < args.top_p <= 1:
    parser.error(f"--top_p={args.top_p} must be in (0, 1]")
  if args.seed is not None and not 0 <= args.seed < 2**32:
    parser.error(f"--seed={args.seed} must be from 0 to {2**32 - 1}")
  if args.sample and args.beam is not None:
    parser.error(f"--beam={args.beam} does not go with --sample: leave one out")
  if not args.sample and (args.temperature, args.top_k, args.top_p) != (
    1.0, 0, 1.0,
  ):  # fmt: skip
    parser.error("--temperature, --top_k and --top_p go with --sample")


def _translator(args: Any) -> tuple[Any, Any]:
  """Loads the run; (translator, its vocabulary)."""
  import jax.numpy as jnp

  from common.parallel import batch_sharding, local_mesh
  from thor.dispatch import Dispatch, prepare
  from thor.run import load_run
  from thor.translator import Translator

  run = load_run(args.run, step=args.step, average=args.average)
  config = run.config

  def chosen(flag: Any, own: Any) -> Any:
    return own if flag is None else flag

  # All 32 bits: of a Python number jax would make one with a sign.
  seed = jnp.uint32(chosen(args.seed, config.evaluation.seed))
  mode = chosen(args.dispatch, config.evaluation.dispatch)
  prepared = prepare(
    run.params,
    run.settings,
    Dispatch.parse(mode, run.routing),
    seed=seed,
    table=run.table,
  )
  sampling = None
  if args.sample:
    sampling = {
      "seed": seed,
      "temperature": args.temperature,
      "top_k": args.top_k,
      "top_p": args.top_p,
    }
  translator = Translator(
    prepared,
    run.vocabulary,
    _search(args, config),
    lengths=[n if isinstance(n, int) else n[0] for n in config.data.lengths],
    token_budget=chosen(args.batch_tokens, config.translation.token_budget),
    sharding=batch_sharding(local_mesh()),
    too_long=args.too_long,
    sampling=sampling,
  )
  return translator, run.vocabulary


def _search(args: Any, config: Any) -> Any:
  """The run's search, with what the flags change."""
  from thor.translations import make_search

  given = {name: getattr(args, name) for name in SEARCH}
  given = {name: value for name, value in given.items() if value is not None}
  if args.sample:
    given["beam"] = max(args.n_best, 1)
  search = make_search(config)
  return dataclasses.replace(search, n_best=args.n_best, **given)


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


class _Lines:
  """Lines of bytes that come bit by bit.

  Only line feeds end one; see `thor.sources.read_lines`.

  Args:
    file: a binary stream.
    name: its, for errors.
  """

  def __init__(self, file: Any, name: str):
    self._file = file
    self._name = name
    self._lines: deque[bytes] = deque()
    self._rest = b""
    self._ended = False
    self._patience = _PATIENCE

  def __iter__(self) -> Iterator[str]:
    from common.data.sources import decode

    number = 0
    while self._lines or not self._ended:
      if not self._lines:
        self._read()
        continue
      line = self._lines.popleft()
      number += 1
      if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
      yield decode(line.removesuffix(b"\r"), f"{self._name}:{number}")

  def is_ready(self) -> bool:
    """Whether the next line, or the end, has come; waits for it a little."""
    while not self._lines and not self._ended:
      if not self._has_more():
        self._patience = _PATIENCE
        return False
      self._read()
    return True

  def _has_more(self) -> bool:
    """Whether reading would not wait.

    The patience is for all the lines that wait together: where one comes every
    0.09 s they would else wait for ever.
    """
    start = time.monotonic()
    try:
      found, _, _ = select.select([self._file], [], [], self._patience)
    except (OSError, ValueError):
      # What the system cannot tell of, such as a pipe on Windows, is read as
      # fast as it comes, but not from somebody who types.
      return not self._file.isatty()
    waited = time.monotonic() - start
    self._patience = max(self._patience - waited, 0)
    return bool(found)

  def _read(self) -> None:
    try:
      data = self._file.read1(_CHUNK)
    except OSError as error:
      raise _unreadable(self._name, error) from error
    *lines, self._rest = (self._rest + data).split(b"\n")
    self._lines.extend(lines)
    if not data:
      self._ended = True
      self._lines.extend([self._rest] if self._rest else [])


@contextlib.contextmanager
def _reader(args: Any) -> Iterator[_Lines]:
  """The lines of the text, the file or standard input."""
  if args.text is not None:
    text = args.text.encode(errors="surrogateescape")
    yield _Lines(io.BytesIO(text + b"\n"), "the text")
    return
  if args.input is None:
    if sys.stdin is None:
      raise UserError("there is no standard input: give a text or --input")
    yield _Lines(sys.stdin.buffer, "standard input")
    return
  try:
    file = open(args.input, "rb")  # noqa: SIM115, closed below
  except OSError as error:
    raise _unreadable(args.input, error) from error
  with file:
    yield _Lines(file, args.input)


def _unreadable(name: str, error: OSError) -> UserError:
  return UserError(f"{name}: cannot be read: {error.strerror}")


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
  # Of a pipe with a name nothing would be left to translate.
  is_file = args.input is not None and os.path.isfile(args.input)
  if not is_file or (args.output is None and sys.stdout.isatty()):
    yield lambda: None
    return
  from common.progress import ProgressBar

  with _reader(args) as lines:
    total = sum(1 for _ in lines)
  done = 0
  with ProgressBar(total, name="lines") as bar:
    bar.start(0)

    def advance() -> None:
      nonlocal done
      done += 1
      bar.update(done, {})

    yield advance


if __name__ == "__main__":
  app.run_alone(main)
