"""`python -m birdie.lm_eval --run runs/birdie --tasks lambada_openai`."""

import os
import sys

from common import app
from common.errors import UserError
from common.flags import Parser

EXAMPLE = "python -m birdie.lm_eval --run runs/birdie --tasks lambada_openai"


def make_parser() -> Parser:
  """The flags that are ours."""
  parser = Parser(
    "birdie.lm_eval",
    description="Evaluates a model with EleutherAI's harness; all other flags "
    "are the harness's own, such as --tasks, --limit and --include_path.",
    example=EXAMPLE,
  )
  add = parser.add_argument
  add("--run", required=True, help="a run's folder, or a model's")
  add("--step", type=int, help="which checkpoint; else the newest")
  add("--batch_size", type=int, default=16, help="requests at a time (16)")
  add(
    "--max_length",
    type=int,
    default=0,
    help="tokens of a request, of which the context gives way (any number)",
  )
  return parser


def main() -> None:
  """Hands a model to the harness's own command."""
  args, rest = make_parser().parse_known_args()
  folder = os.path.abspath(os.path.expanduser(args.run))
  if "," in folder or "=" in folder:
    raise UserError(
      f"--run={args.run}: the harness reads no folder with ',' or '=' in its "
      "name; give it another"
    )

  from birdie import lm_eval_adapter

  lm_eval_adapter.register()
  from lm_eval.__main__ import cli_evaluate  # type: ignore

  settings = [f"run={folder}", f"max_length={args.max_length}"]
  if args.step is not None:
    settings.append(f"step={args.step}")
  sys.argv = [
    "lm_eval", "--model", lm_eval_adapter.NAME,
    "--model_args", ",".join(settings),
    "--batch_size", str(args.batch_size), *rest,
  ]  # fmt: skip
  cli_evaluate()


if __name__ == "__main__":
  app.run_alone(main)
