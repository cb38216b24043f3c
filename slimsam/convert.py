"""`python -m slimsam.convert sam_vit_b_01ec64.pth models/vit_b`."""

import pathlib
from typing import Any

from common import app
from common.errors import UserError
from common.flags import Parser

EXAMPLE = "python -m slimsam.convert sam_vit_b_01ec64.pth models/vit_b"
FORMS = ("native", "hf", "pth")


def make_parser() -> Parser:
  """The flags."""
  parser = Parser(
    "slimsam.convert",
    description="Converts a model between our form, transformers' and "
    "segment-anything's. What the input is shows by itself: a .pth, a folder "
    "with config.json, one with settings.json, or a run's.",
    example=EXAMPLE,
  )
  add = parser.add_argument
  add("model", help="what to convert")
  add("output", help="a new or empty folder; a .pth for segment-anything")
  add("--to", help="native, hf or pth; else by the output's name, or native")
  add(
    "--pad",
    action="store_true",
    help="add zeros where blocks have other widths than the form can hold",
  )
  add(
    "--epsilon",
    help="of the decoder's norms: original, as segment-anything has it, or hf; "
    "else as the input has it. Only our form holds it",
  )
  return parser


def main() -> None:
  """Converts a model."""
  parser = make_parser()
  args = parser.parse_args()
  form = args.to or ("pth" if args.output.endswith(".pth") else "native")
  if form not in FORMS:
    parser.error(f"--to={form} must be one of {', '.join(FORMS)}")
  output = pathlib.Path(args.output).expanduser()
  if output.is_file() or (output.is_dir() and any(output.iterdir())):
    raise UserError(f"{args.output} is there already: name a new one")
  if form == "pth" and output.suffix != ".pth":
    parser.error(f"{args.output}: --to=pth writes a file: call it NAME.pth")
  if form != "pth" and output.suffix == ".pth":
    parser.error(f"{args.output} is a folder with --to={form}: drop .pth")
  if args.epsilon and form != "native":
    raise UserError(
      f"--epsilon={args.epsilon}: --to={form} does not hold it; leave it out"
    )
  try:
    convert(args.model, output, form, pad=args.pad, epsilon=args.epsilon)
  except OSError as error:
    raise UserError(f"{args.output}: {error.strerror or error}") from error


def convert(
  model: Any,
  output: Any,
  form: str,
  *,
  pad: bool = False,
  epsilon: str | None = None,
) -> None:
  """Reads a model, writes it in another form, and says what it was.

  Args:
    model: see `slimsam.weights.load_model`.
    output: a folder, or with `pth` a file.
    form: one of `FORMS`.
    pad: see `slimsam.formats.padded`.
    epsilon: one of `slimsam.settings.EPSILONS`; None leaves it.

  Raises:
    UserError: for a form that cannot hold the model.
  """
  from common.tree import count_params
  from slimsam import formats, weights

  params, settings = weights.load_model(model)
  if epsilon is not None:
    settings = formats.with_epsilon(settings, epsilon)
  if pad:
    params, settings, note = formats.padded(params, settings)
    print(note)
  weights.save(form, output, params, settings)
  cfg = settings.encoder
  name = formats.name_of(settings)
  print(
    f"{output}: {f'{name}, ' if name else ''}{cfg.depth} blocks, width "
    f"{cfg.width}, {count_params(params):,} parameters"
  )


if __name__ == "__main__":
  app.run_alone(main)
