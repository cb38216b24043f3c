"""`python -m slimsam.segment photo.jpg --point 300,200 --checkpoint PATH`."""

import argparse
import colorsys
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from common import app
from common.errors import RunError, UserError
from common.flags import Parser
from common.logs import one_line

log = logging.getLogger(__name__)

EXAMPLE = (
  "python -m slimsam.segment photo.jpg --point 300,200 "
  "--checkpoint sam_vit_b_01ec64.pth"
)
# Of --everything alone, by their names in `AutomaticMaskGenerator`.
EVERYTHING = (
  "points_per_side", "pred_iou_thresh", "stability_score_thresh",
  "crop_n_layers", "min_mask_region_area",
)  # fmt: skip
_GOLDEN = 0.618034  # turns between hues: however many, no two are near
_OPAQUE = 0.55  # share of a mask's colour over the image


class _Job(NamedTuple):
  """An image, and where its answers go: below --output, without an ending."""

  path: str
  target: str


def make_parser() -> Parser:
  """The flags."""
  parser = Parser(
    "slimsam.segment",
    description="Finds masks in images: what points or boxes mean, or "
    "everything.\nOf photo.jpg it writes photo.png, where masks are coloured, "
    "photo_mask_0.png\nand so on, and photo.json with their run-length codes "
    "and scores.",
    example=EXAMPLE,
  )
  add = parser.add_argument
  add("images", nargs="+", metavar="IMAGE", help="files, or folders of them")
  add(
    "--checkpoint",
    required=True,
    metavar="PATH",
    help="a .pth of segment-anything, or a folder of ours or of transformers",
  )
  add(
    "--point",
    action="append",
    type=_point,
    default=[],
    metavar="X,Y[,LABEL]",
    help="in pixels; label 1: on the object (1), 0: beside it. All points "
    "together, and with a box, are one prompt",
  )
  add(
    "--box",
    action="append",
    type=_box,
    default=[],
    metavar="X0,Y0,X1,Y1",
    help="left, top, right, bottom in pixels; each is a prompt of its own",
  )
  add("--everything", action="store_true", help="all masks of the image")
  add("--multimask", action="store_true", help="three masks for each prompt")
  add(
    "--output", default="segmented", metavar="DIR", help="a folder (segmented)"
  )
  add("--dtype", default="float32", help="float32 or bfloat16 (float32)")
  _add_limits(parser)
  own = parser.add_argument_group("with --everything")
  for name, kind, text in (
    ("points_per_side", int, "of the grid (32)"),
    ("pred_iou_thresh", float, "drop masks of lower predicted IoU (0.88)"),
    ("stability_score_thresh", float, "drop less stable ones (0.95)"),
    ("crop_n_layers", int, "crops of the image too, for small things (0)"),
    ("min_mask_region_area", int, "drop smaller holes and islands (0)"),
  ):
    own.add_argument(f"--{name}", type=kind, metavar="N", help=text)
  return parser


def _add_limits(parser: Parser) -> None:
  """Flags for what is refused of images that others have made."""
  parser.add_argument(
    "--max_pixels",
    type=int,
    default=0,
    metavar="N",
    help="refuse larger images (0: more than 179 million)",
  )
  parser.add_argument(
    "--follow_links",
    action="store_true",
    help="of a folder: also links that lead out of it",
  )


def _point(text: str) -> tuple[float, float, int]:
  numbers = _numbers(text, (2, 3), "X,Y or X,Y,LABEL such as 300,200,1")
  label = numbers[2] if len(numbers) == 3 else 1
  if label not in (0, 1):
    raise argparse.ArgumentTypeError(
      f"{text!r}: the label is 1 on the object or 0 beside it"
    )
  return numbers[0], numbers[1], int(label)


def _box(text: str) -> list[float]:
  return _numbers(text, (4,), "X0,Y0,X1,Y1 such as 10,20,300,200")


def _numbers(text: str, counts: tuple[int, ...], form: str) -> list[float]:
  try:
    numbers = [float(part) for part in text.split(",")]
  except ValueError:
    numbers = []
  if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
    raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
  return numbers


def main() -> None:
  """Segments images."""
  parser = make_parser()
  # Flags may also come between images.
  args, rest = parser.parse_known_intermixed_args()
  for argument in rest:
    parser.refuse(argument)
  _check(parser, args)
  jobs = _jobs(args.images, follow_links=args.follow_links)
  _check_output(args.output, jobs)

  logging.basicConfig(format="%(message)s", level=logging.WARNING)
  log.setLevel(logging.INFO)
  answer = _answerer(args)
  if len(jobs) == 1:
    return _do(jobs[0], args, answer)
  failed = _do_all(jobs, args, answer)
  if failed:
    raise RunError(
      f"{failed} of {len(jobs)} images were left out, for the reasons above"
    )


def _check(parser: Parser, args: Any) -> None:
  """Refuses what makes no sense, before anything is loaded."""
  asked = bool(args.point or args.box)
  if not asked and not args.everything:
    parser.error("say what to find: --point, --box or --everything")
  if asked and args.everything:
    parser.error("--everything takes no --point and no --box")
  if args.everything and args.multimask:
    parser.error("--multimask goes with --point and --box")
  if args.point and len(args.box) > 1:
    parser.error(
      f"--point with {len(args.box)} times --box: points go with one box, or "
      "alone"
    )
  for name in EVERYTHING:
    if getattr(args, name) is not None and not args.everything:
      parser.error(f"--{name} goes with --everything")


def _jobs(paths: Sequence[str], *, follow_links: bool) -> list[_Job]:
  """The images of files and folders.

  Raises:
    UserError: for what is not there, for links out of a folder, and for two
      that would be written to the same files.
  """
  from common.data.folders import Inside
  from common.data.images import ENDINGS, image_files

  jobs = []
  for path in paths:
    if os.path.isdir(path):
      remedy = "give --follow_links"
      inside = Inside(path, follow_links=follow_links, remedy=remedy)
      files = image_files(path, inside=inside)
      if not files:
        raise UserError(f"{path} holds no images: {', '.join(ENDINGS)}")
      names = [os.path.relpath(file, path) for file in files]
    elif os.path.exists(path):
      files, names = [path], [os.path.basename(path)]
    else:
      raise UserError(f"{path}: no such file or folder")
    jobs += [
      _Job(file, os.path.splitext(name)[0]) for file, name in zip(files, names)
    ]
  by_target: dict[str, _Job] = {}
  for job in jobs:
    other = by_target.setdefault(job.target, job)
    if other is not job:
      raise UserError(
        f"{other.path} and {job.path} would both become {job.target}.png: "
        "segment them one after the other, with another --output"
      )
  for job in jobs:
    plain = re.sub(r"_mask_\d+$", "", job.target)
    if plain != job.target and plain in by_target:
      raise UserError(
        f"{job.path} has the name of a mask of {by_target[plain].path}: "
        "segment them one after the other, with another --output"
      )
  return jobs


def _check_output(output: str, jobs: Sequence[_Job]) -> None:
  """Refuses to write among the images: they may be overwritten."""
  folders = {
    os.path.realpath(os.path.dirname(job.path)): job.path for job in jobs
  }
  for job in jobs:
    folder = os.path.dirname(os.path.join(output, job.target))
    path = folders.get(os.path.realpath(folder))
    if path is not None:
      raise UserError(
        f"--output={output} is where {path} lies, which may be overwritten: "
        "choose another folder"
      )
  try:
    os.makedirs(output, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"--output={output} cannot be made: {error.strerror}"
    ) from error


def _answerer(args: Any) -> Callable[[Any], list[dict[str, Any]]]:
  """Loads the model; returns `image -> records`."""
  from slimsam.amg import AutomaticMaskGenerator
  from slimsam.predict import Predictor

  predictor = Predictor.load(args.checkpoint, args.dtype)
  if args.everything:
    given = {name: getattr(args, name) for name in EVERYTHING}
    given = {name: value for name, value in given.items() if value is not None}
    return AutomaticMaskGenerator(
      predictor, output_mode="coco_rle", **given
    ).generate
  return lambda image: _of_prompts(predictor, image, args)


def _of_prompts(predictor: Any, image: Any, args: Any) -> list[dict[str, Any]]:
  """Records of the prompts' masks, prompt by prompt."""
  from slimsam import rle
  from slimsam.amg import xywh
  from slimsam.masks import boxes_of

  given: dict[str, Any] = {}
  if args.point:
    given["points"] = [[point[:2] for point in args.point]]
    given["labels"] = [[point[2] for point in args.point]]
  if args.box:
    given["boxes"] = args.box
  predictor.set_image(image)
  masks, scores, _ = predictor.predict_batch(
    **given, multimask_output=args.multimask
  )
  records = []
  for i, own in enumerate(masks):
    prompt: dict[str, Any] = {}
    if args.point:
      prompt["point_coords"] = given["points"][0]
      prompt["point_labels"] = given["labels"][0]
    if args.box:
      prompt["box"] = args.box[i]
    for mask, score in zip(own, scores[i]):
      records.append(
        {
          "segmentation": rle.encode(mask),
          "area": int(mask.sum()),
          "bbox": xywh(boxes_of(mask)),
          "predicted_iou": float(score),
          **prompt,
        }
      )
  return records


def _do_all(
  jobs: Sequence[_Job],
  args: Any,
  answer: Callable[[Any], list[dict[str, Any]]],
) -> int:
  """Segments many images; returns how many could not be."""
  from common.progress import ProgressBar

  failed = 0
  with ProgressBar(len(jobs), name="images") as bar:
    bar.start(0)
    for done, job in enumerate(jobs, 1):
      try:
        _do(job, args, answer, f"{done} of {len(jobs)}  ")
      except UserError as error:
        failed += 1
        log.error("error: %s", one_line(error))
      bar.update(done, {})
  return failed


def _do(
  job: _Job,
  args: Any,
  answer: Callable[[Any], list[dict[str, Any]]],
  count: str = "",
) -> None:
  """Segments an image and says so."""
  from common.data.images import read_image

  most = args.max_pixels or None
  image = read_image(job.path, max_pixels=most, key="--max_pixels")
  try:
    records = answer(image)
  except UserError as error:
    raise UserError(f"{job.path}: {error}") from error
  target = os.path.join(args.output, job.target)
  _write(target, job.path, image, records, args)
  masks = "1 mask" if len(records) == 1 else f"{len(records)} masks"
  log.info("%s%s: %s in %s.json", count, job.path, masks, target)


def _write(
  target: str, path: str, image: Any, records: list[dict[str, Any]], args: Any
) -> None:
  """Writes an image's files, the JSON at last."""
  import pathlib

  import numpy as np

  from common.data.images import write_png
  from common.files import write_json
  from slimsam import rle

  owner = np.full(image.shape[:2], -1)
  # Small masks lie on large ones.
  for i in sorted(range(len(records)), key=lambda i: -records[i]["area"]):
    mask = rle.decode(records[i]["segmentation"])
    owner[mask] = i
    write_png(f"{target}_mask_{i}.png", mask)
    records[i]["file"] = f"{os.path.basename(target)}_mask_{i}.png"
  write_png(f"{target}.png", _overlay(image, owner, args.point, args.box))
  write_json(
    pathlib.Path(f"{target}.json"),
    {
      "image": path,
      "size": list(image.shape[:2]),
      "checkpoint": args.checkpoint,
      "masks": records,
    },
  )


def _overlay(
  image: Any, owner: Any, points: Sequence[Any], boxes: Sequence[Any]
) -> Any:
  """The image, its masks coloured, with the prompts on top.

  Args:
    image: uint8 [h w 3].
    owner: int [h w], the number of the mask on a pixel, or -1.
    points: x, y, label of each.
    boxes: XYXY.

  Returns:
    uint8 [h w 3].
  """
  import numpy as np
  from PIL import Image, ImageDraw

  colours = np.array([colour(i) for i in range(owner.max() + 1)] or [(0, 0, 0)])
  mixed = (1 - _OPAQUE) * image + _OPAQUE * colours[np.maximum(owner, 0)]
  made = np.where(owner[..., None] < 0, image, np.rint(mixed))
  picture = Image.fromarray(made.astype(np.uint8))
  draw = ImageDraw.Draw(picture)
  thick = max(round(max(image.shape) / 300), 1)
  for box in boxes:
    draw.rectangle(box, outline=(255, 255, 255), width=thick)
  for x, y, label in points:
    radius = 2 * thick
    draw.ellipse(
      (x - radius, y - radius, x + radius, y + radius),
      fill=(0, 200, 0) if label else (220, 0, 0),
      outline=(255, 255, 255),
    )
  return np.asarray(picture)


def colour(i: int) -> tuple[int, int, int]:
  """The colour of mask i, the same in all images."""
  hue = (i * _GOLDEN + 0.58) % 1
  r, g, b = colorsys.hsv_to_rgb(hue, 0.85, 1.0 if i % 2 == 0 else 0.8)
  return round(255 * r), round(255 * g), round(255 * b)


if __name__ == "__main__":
  app.run_alone(main)
