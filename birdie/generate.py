"""`python -m birdie.generate --run runs/birdie --prompt TEXT`."""

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from common import app
from common.flags import Parser

EXAMPLE = 'python -m birdie.generate --run runs/birdie --prompt "The import"'


def main() -> None:
  """Continues a prompt from a run's folder, to the terminal as it comes."""
  parser = Parser(
    "birdie.generate",
    description="Continues a prompt with a trained model.",
    example=EXAMPLE,
  )
  parser.add_argument("--run", required=True, help="a run's folder")
  parser.add_argument("--prompt", default="", help="the text to continue")
  parser.add_argument("--max_tokens", type=int, default=200)
  parser.add_argument(
    "--temperature", type=float, default=0.8, help="0: the likeliest token"
  )
  parser.add_argument("--top_k", type=int, default=0, help="0: all")
  parser.add_argument("--top_p", type=float, default=1.0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--step", type=int, default=None, help="which checkpoint; else the newest"
  )
  args = parser.parse_args()
  if args.max_tokens < 1:
    parser.error(f"--max_tokens={args.max_tokens} must be at least 1")
  if not 0 <= args.temperature < math.inf:
    parser.error(f"--temperature={args.temperature} must be a number from 0")
  if args.top_k < 0:
    parser.error(f"--top_k={args.top_k} must be at least 0")
  if not _is_unicode(args.prompt):
    parser.error("--prompt is not valid UTF-8")
  if not 0 < args.top_p <= 1:
    parser.error(f"--top_p={args.top_p} must be in (0, 1]")

  import numpy as np

  from birdie import decode
  from birdie.run import load_run

  run = load_run(args.run, step=args.step)
  announce = run.vocab.paradigms["prefix_language_modeling"]
  prompt = np.concatenate([announce, run.tokenizer.encode(args.prompt)])
  tokens = decode.stream(
    run.model,
    run.params,
    prompt.astype(np.int32),
    gen=run.vocab.gen,
    max_new_tokens=args.max_tokens,
    stop=run.vocab.eos,
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    seed=args.seed,
  )
  sys.stdout.write(args.prompt)
  for text in decode_stream(run.tokenizer, tokens):
    sys.stdout.write(text)
    sys.stdout.flush()
  sys.stdout.write("\n")


def _is_unicode(text: str) -> bool:
  # Python hides the bytes of an argument that are no UTF-8 in surrogates.
  return not any("\ud800" <= c <= "\udfff" for c in text)


def decode_stream(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
  """Text as soon as it is certain: no half characters.

  What a token means may depend on those before it, so everything is decoded
  again, and what ends in a replacement character waits for the next token.

  Args:
    tokenizer: see `common.data.tokenizers`.
    tokens: as they come.

  Yields:
    Pieces that join to the text of all tokens.
  """
  seen, shown, text = [], 0, ""
  for token in tokens:
    seen.append(token)
    text = tokenizer.decode(seen)
    if not text.endswith("\N{REPLACEMENT CHARACTER}"):
      yield text[shown:]
      shown = len(text)
  yield text[shown:]


if __name__ == "__main__":
  app.leave(app.call(main))
