"""`python -m slimsam.evaluate MODEL --data=coco …`: how well masks fit."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from common import app
from common.config import did_you_mean
from common.errors import UserError
from common.flags import Parser

EXAMPLE = (
  "python -m slimsam.evaluate runs/slimsam/model --teacher "
  "runs/slimsam/teacher/model --data=composite --images=50"
)
# Flags that are keys of `slimsam.sources.make_source`, by the data that take
# them.
FLAGS = {
  "sa1b": ("path", "start", "on_error"),
  "tfds": ("data_dir", "start", "on_error"),
  "coco": ("images_dir", "json_path", "start", "on_error"),
  "composite": ("size", "seed"),
}


def make_parser() -> Parser:
  """The flags."""
  parser = Parser(
    "slimsam.evaluate",
    description="Judges models by the masks that they find for the prompts of "
    "annotated images: mean IoU over images, with 95 % bootstrap intervals.",
    example=EXAMPLE,
  )
  add = parser.add_argument
  add("models", nargs="+", metavar="MODEL", help="a .pth, or a model's folder")
  add(
    "--data",
    required=True,
    help="sa1b, tfds, coco or composite; see slimsam/sources.py",
  )
  add("--path", help="sa1b: a folder, or tars")
  add("--data_dir", help="tfds")
  add("--images_dir", help="coco")
  add("--json_path", help="coco: the annotations")
  add("--images", type=int, default=50, help="at most; 0: all (50)")
  add("--start", type=int, help="the first of them (0); not of composite")
  add("--on_error", help="error, or skip what is broken; not of composite")
  add("--size", type=int, help="composite: of pictures (64)")
  add("--seed", type=int, help="composite (0)")
  add("--teacher", metavar="MODEL", help="whose masks are a second truth")
  add("--prompts", default="point,center,box", help="(point,center,box)")
  add("--choices", default="single,best,oracle", help="(single,best,oracle)")
  add("--json", action="store_true", help="print JSON")
  return parser


def main() -> None:
  """Judges models."""
  parser = make_parser()
  args = parser.parse_args()
  for name in ("images", "start"):
    if (getattr(args, name) or 0) < 0:
      parser.error(f"--{name}={getattr(args, name)} must be at least 0")
  evaluator = _evaluator(args)
  found = {}
  for model in args.models:
    print(f"{model}: {evaluator.num_masks} masks …", file=sys.stderr)
    found[model] = _judged(model, evaluator)
  print(json.dumps(found, indent=2) if args.json else _page(found))


def _source(args: Any) -> Any:
  from slimsam.sources import make_source

  if args.data not in FLAGS:
    raise UserError(f"--data={args.data!r}{did_you_mean(args.data, FLAGS)}")
  every = dict.fromkeys(name for names in FLAGS.values() for name in names)
  given = {n: getattr(args, n) for n in every if getattr(args, n) is not None}
  for name in given:
    if name not in FLAGS[args.data]:
      raise UserError(f"--{name} is not for --data={args.data}: leave it out")
  if args.data == "composite":
    if not args.images:
      raise UserError("--images=0: composited pictures have no end; give some")
    config = {"length": args.images, "size": 64, "seed": 0}
    # Pictures that no training has seen.
    return make_source({"kind": args.data, **config, **given}, "valid")
  return make_source(
    {"kind": args.data, "limit": args.images, **given}, "train"
  )


def _evaluator(args: Any) -> Any:
  from slimsam.evaluation import Evaluator
  from slimsam.model import Sam
  from slimsam.weights import load_model

  teacher = None
  if args.teacher:
    teacher_params, teacher_settings = load_model(args.teacher)
    teacher = (teacher_params, Sam(teacher_settings))
  return Evaluator(
    _source(args),
    prompts=args.prompts.split(","),
    choices=args.choices.split(","),
    teacher=teacher,
    limit=args.images,
  )


def _judged(model: str, evaluator: Any) -> dict[str, Any]:
  """Means and intervals of one model."""
  from slimsam.model import Sam
  from slimsam.weights import load_model

  params, settings = load_model(model)
  found = evaluator(params, Sam(settings))
  return {
    "images": len(next(iter(found.ious.values())).images),
    "masks": evaluator.num_masks,
    "embedding_mse": found.mse,
    "miou": {
      name: {
        "mean": own.mean,
        "interval": own.interval(),
        "mean_of_masks": own.mean_of_masks,
      }
      for name, own in found.ious.items()
    },
  }


def _page(found: dict[str, dict[str, Any]]) -> str:
  lines: list[str] = []
  for model, own in found.items():
    lines.append(f"{model}: {own['images']} images, {own['masks']} masks")
    lines.append(f"  {'truth/prompt/mask':28s}  mIoU   95 %           of masks")
    lines += [
      f"  {name:28s} {_cells(one)}" for name, one in own["miou"].items()
    ]
    if own["embedding_mse"] is not None:
      lines.append(
        f"  embedding MSE to the teacher's {own['embedding_mse']:.4g}"
      )
    lines.append("")
  return "\n".join(lines[:-1])


def _cells(one: dict[str, Any]) -> str:
  low, high = one["interval"]
  values: Sequence[float] = (one["mean"], low, high, one["mean_of_masks"])
  mean, low, high, of_masks = (100 * value for value in values)
  return f"{mean:5.1f}   {low:5.1f} to {high:5.1f}  {of_masks:5.1f}"


if __name__ == "__main__":
  app.run_alone(main)
