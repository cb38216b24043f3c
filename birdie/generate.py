"""`python -m birdie.generate --run runs/birdie --prompt TEXT`."""

import argparse
import codecs
import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from common import app
from common.errors import UserError
from common.flags import Parser

EXAMPLE = 'python -m birdie.generate --run runs/birdie --prompt "The import"'


def make_parser() -> Parser:
  """The flags."""
  parser = Parser(
    "birdie.generate",
    description="Continues prompts with a trained model.",
    example=EXAMPLE,
  )
  add = parser.add_argument
  add("--run", required=True, help="a run's folder, or a model's")
  source = parser.add_mutually_exclusive_group()
  source.add_argument("--prompt", default="", help="the text to continue")
  source.add_argument(
    "--file", help="prompts, one a line; answers are lines of JSON"
  )
  source.add_argument(
    "--interactive",
    action="store_true",
    help="prompts from the terminal, until an empty line",
  )
  add("--out", help="with --file: where answers go; else to the terminal")
  add("--batch_size", type=int, default=16, help="with --file (16)")
  add(
    "--stop",
    action="append",
    default=[],
    metavar="TEXT",
    help="ends a continuation; may be given several times",
  )
  add("--max_tokens", type=int, default=200, help="at most (200)")
  add("--temperature", type=float, default=0.8, help="0: the likeliest (0.8)")
  add("--top_k", type=int, default=0, help="likeliest tokens; 0: all (0)")
  add("--top_p", type=float, default=1.0, help="their share; 1: all (1.0)")
  add("--seed", type=int, default=0, help="of what is drawn (0)")
  add("--step", type=int, help="which checkpoint; else the newest")
  return parser


def main() -> None:
  """Continues prompts, to the terminal as the text comes or to a file."""
  parser = make_parser()
  args = parser.parse_args()
  _check(parser, args)
  prompts = read_prompts(args.file) if args.file is not None else []

  from birdie.continuations import Stops
  from birdie.run import load_run

  run = load_run(args.run, step=args.step)
  stops = Stops.of(run, args.stop)
  meter = Meter()
  if args.file is not None:
    _answer_file(run, stops, prompts, args, meter)
  elif args.interactive:
    _interact(run, stops, args, meter)
  else:
    sys.stdout.write(args.prompt)
    _show(run, stops, args.prompt, args, meter, seed=args.seed)
  if meter.capacity:
    print(meter.line(run.model), file=sys.stderr)


def _check(parser: Parser, args: argparse.Namespace) -> None:
  for name in ("max_tokens", "batch_size"):
    if getattr(args, name) < 1:
      parser.error(f"--{name}={getattr(args, name)} must be at least 1")
  if not 0 <= args.temperature < math.inf:
    parser.error(f"--temperature={args.temperature} must be a number from 0")
  if not 0 <= args.seed < 2**63:
    parser.error(f"--seed={args.seed} must be from 0 to 2**63 - 1")
  if args.top_k < 0:
    parser.error(f"--top_k={args.top_k} must be at least 0")
  if not 0 < args.top_p <= 1:
    parser.error(f"--top_p={args.top_p} must be in (0, 1]")
  for name, texts in (("prompt", [args.prompt]), ("stop", args.stop)):
    if not all(map(_is_unicode, texts)):
      parser.error(f"--{name} is not valid UTF-8")
  if "" in args.stop:
    parser.error("--stop is empty: leave it out")
  if args.out is not None and args.file is None:
    parser.error(f"--out={args.out} goes with --file")
  if args.out is not None and pathlib.Path(args.out).expanduser().is_file():
    raise UserError(f"--out={args.out} is there already: name a new one")


def _is_unicode(text: str) -> bool:
  # Python hides the bytes of an argument that are no UTF-8 in surrogates.
  return not any("\ud800" <= c <= "\udfff" for c in text)


def read_prompts(path: str) -> list[str]:
  """The lines of a file; an empty line is an empty prompt.

  Raises:
    UserError: where it cannot be read or holds no line, and for a line that is
      not UTF-8.
  """
  try:
    data = pathlib.Path(path).expanduser().read_bytes()
  except OSError as error:
    raise UserError(f"--file={path}: {error.strerror}") from error
  lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
  if not lines[-1]:
    lines.pop()
  if not lines:
    raise UserError(f"--file={path} is empty: write one prompt a line")
  prompts = []
  for number, line in enumerate(lines, start=1):
    try:
      prompts.append(line.removesuffix(b"\r").decode())
    except UnicodeDecodeError as error:
      raise UserError(
        f"--file={path}, line {number} is not valid UTF-8, from its byte "
        f"{error.start + 1} on"
      ) from error
  return prompts


# -- what was done -------------------------------------------------------------


@dataclasses.dataclass
class Meter:
  """How much was generated, and how fast.

  Attributes:
    tokens: in all.
    capacity: tokens that a state had room for, at most.
    seconds: for all of them.
    timed: of the tokens, those that waited for no program to be compiled.
    timed_seconds: for those.
  """

  tokens: int = 0
  capacity: int = 0
  seconds: float = 0.0
  timed: int = 0
  timed_seconds: float = 0.0

  def add(self, tokens: int, seconds: float, *, compiled: bool) -> None:
    """Counts what took some time; `compiled` if everything was before."""
    self.tokens += tokens
    self.seconds += seconds
    if compiled:
      self.timed += tokens
      self.timed_seconds += seconds

  def count(self, tokens: Iterable[int]) -> Iterator[int]:
    """The same tokens; the first waits for programs to be compiled."""
    began, is_first = time.monotonic(), True
    for token in tokens:
      now = time.monotonic()
      self.add(1, now - began, compiled=not is_first)
      began, is_first = now, False
      yield token

  def line(self, model: Any) -> str:
    """What is told at the end."""
    from birdie.decode import state_bytes

    size = state_bytes(model, self.capacity)
    if self.timed:
      rate = f"{self.timed / max(self.timed_seconds, 1e-9):,.1f} tokens/s"
    else:
      rate = f"{self.tokens / max(self.seconds, 1e-9):,.1f} tokens/s"
      rate += ", compilation counted"
    return (
      f"{self.tokens:,} tokens, {rate}; the state of a sequence takes {size:,} "
      "bytes"
    )


# -- the three ways ------------------------------------------------------------


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
  names = ("temperature", "top_k", "top_p")
  return {name: getattr(args, name) for name in names}


def _answer_file(
  run: Any, stops: Any, prompts: list[str], args: argparse.Namespace,
  meter: Meter,
) -> None:  # fmt: skip
  """Writes a line of JSON for every prompt, as batches are done."""
  from birdie.continuations import capacity_of, continue_all, prompt_tokens

  tokens = [prompt_tokens(run, prompt) for prompt in prompts]
  answers = continue_all(
    run,
    tokens,
    stops=stops,
    max_new_tokens=args.max_tokens,
    batch_size=args.batch_size,
    seed=args.seed,
    settings=_sampling(args),
  )
  compiled = set()
  with _opened(args.out) as out:
    for start in range(0, len(prompts), args.batch_size):
      chosen = slice(start, start + args.batch_size)
      capacity = capacity_of(tokens[chosen], args.max_tokens)
      began = time.monotonic()
      batch = next(answers)
      count = sum(answer.tokens for answer in batch)
      meter.capacity = max(meter.capacity, capacity)
      seconds = time.monotonic() - began
      meter.add(count, seconds, compiled=capacity in compiled)
      compiled.add(capacity)
      for prompt, answer in zip(prompts[chosen], batch):
        line = {"prompt": prompt, "continuation": answer.text}
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
      out.flush()


def _opened(path: str | None) -> Any:
  if path is None:
    return contextlib.nullcontext(sys.stdout)
  try:
    return pathlib.Path(path).expanduser().open("w", encoding="utf-8")
  except OSError as error:
    raise UserError(f"--out={path}: {error.strerror}") from error


def _interact(
  run: Any, stops: Any, args: argparse.Namespace, meter: Meter
) -> None:
  """Answers prompts until the input ends or a line is empty.

  Ctrl-C is an end like the others.
  """
  from birdie.continuations import seed_of

  mark = "> " if sys.stdin.isatty() else ""
  number = 0
  try:
    while prompt := input(mark):
      if not _is_unicode(prompt):
        raise UserError("a prompt is not valid UTF-8")
      _show(run, stops, prompt, args, meter, seed=seed_of(args.seed, number))
      number += 1
  except UnicodeDecodeError as error:
    raise UserError("a prompt is not valid UTF-8") from error
  except (EOFError, KeyboardInterrupt):
    sys.stdout.write("\n" if mark else "")


def _show(
  run: Any, stops: Any, prompt: str, args: argparse.Namespace, meter: Meter,
  *, seed: int,
) -> None:  # fmt: skip
  """Writes a continuation as it comes."""
  from birdie import decode
  from birdie.continuations import capacity_of, prompt_tokens

  tokens = prompt_tokens(run, prompt)
  capacity = capacity_of([tokens], args.max_tokens)
  meter.capacity = max(meter.capacity, capacity)
  made = decode.stream(
    run.model,
    run.params,
    tokens,
    gen=run.vocab.gen,
    max_new_tokens=args.max_tokens,
    stop=stops.ids,
    seed=seed,
    **_sampling(args),
  )
  texts = decode_stream(run.tokenizer, meter.count(made), tokens.tolist())
  for text in stops.until(texts):
    sys.stdout.write(text)
    sys.stdout.flush()
  sys.stdout.write("\n")


def decode_stream(
  tokenizer: Any, tokens: Iterable[int], prompt: Sequence[int] = ()
) -> Iterator[str]:
  """Text as soon as it is certain: no half characters.

  What a token means may depend on those before it, so everything is decoded
  again, and what ends in a replacement character waits for the next token.

  Args:
    tokenizer: see `common.data.tokenizers`.
    tokens: as they come.
    prompt: the tokens before them.

  Yields:
    Pieces that join to the text of all tokens.
  """
  from birdie.continuations import text_after

  seen, shown, text = [], 0, ""
  for token in tokens:
    seen.append(token)
    text = text_after(tokenizer, prompt, seen)
    if not text.endswith("\N{REPLACEMENT CHARACTER}"):
      yield text[shown:]
      shown = len(text)
  yield text[shown:]


if __name__ == "__main__":
  app.run_alone(main)
