"""`python -m birdie.convert --run runs/birdie --output models/birdie`."""

import os

from common import app
from common.errors import UserError
from common.flags import Parser

EXAMPLE = "python -m birdie.convert --run runs/birdie --output models/birdie"
DTYPES = ("float32", "bfloat16")


def make_parser() -> Parser:
  """The flags."""
  parser = Parser(
    "birdie.convert",
    description="Writes what a run has learned as a folder of its own: "
    "safetensors, settings, a page about it. Every verb reads it like a run's "
    "folder, and training begins from it with --config.init_from.",
    example=EXAMPLE,
  )
  add = parser.add_argument
  add("--run", required=True, help="a run's folder, or a model's")
  add("--output", required=True, metavar="DIR", help="a new or empty folder")
  add("--step", type=int, help="which checkpoint; else the newest")
  add("--dtype", help="float32 or bfloat16; else as it was saved")
  return parser


def main() -> None:
  """Converts a run."""
  parser = make_parser()
  args = parser.parse_args()
  if args.dtype not in (None, *DTYPES):
    parser.error(f"--dtype={args.dtype} must be one of {', '.join(DTYPES)}")

  from birdie import weights
  from birdie.run import load_run
  from common.tree import bytes_of, count_params

  run = load_run(args.run, step=args.step)
  if args.dtype is not None:
    run = weights.as_dtype(run, args.dtype)
  try:
    weights.save_model(args.output, run, args.run)
  except OSError as error:
    raise UserError(f"{args.output}: {error.strerror or error}") from error
  print(
    f"{os.path.join(args.output, '')}: {run.config.model.name} of step "
    f"{run.step}, {count_params(run.params):,} parameters, "
    f"{bytes_of(run.params) / 2**20:.1f} MiB"
  )


if __name__ == "__main__":
  app.run_alone(main)
