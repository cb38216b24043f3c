"""Annotations as data sets write them, read and checked."""

import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from common.config import did_you_mean
from common.errors import UserError
from slimsam import rle
from slimsam.sources import Annotation

log = logging.getLogger(__name__)

ON_ERROR = ("error", "skip")

Raw = Mapping[str, Any]


def check_on_error(on_error: str) -> None:
  """Raises `UserError` for what is none of `ON_ERROR`."""
  if on_error not in ON_ERROR:
    raise UserError(
      f"data.source.on_error={on_error!r}{did_you_mean(on_error, ON_ERROR)}"
    )


def read_annotations(
  entries: Iterable[Any],
  parse: Callable[[Raw], Annotation],
  *,
  place: str,
  on_error: str,
) -> tuple[Annotation, ...]:
  """Parses the annotations of an image.

  Args:
    entries: what the data set holds of each.
    parse: see `parse_annotation`.
    place: the file, for errors.
    on_error: "error" raises for a bad annotation, "skip" leaves it out and logs
      how many of the image were.

  Raises:
    UserError: for a bad annotation, with its id.
  """
  good, bad = [], []
  for number, raw in enumerate(entries):
    try:
      good.append(parse(raw))
    except UserError as error:
      bad.append(f"{_called(raw, number)}: {error}")
      if on_error == "error":
        raise UserError(
          f"{place}: {bad[0]}: mend or remove it, or leave such annotations "
          "out with data.source.on_error='skip'"
        ) from error
  if bad:
    log.warning(
      "%s: left out %d of %d annotations; the first is %s",
      place, len(bad), len(good) + len(bad), bad[0],
    )  # fmt: skip
  return tuple(good)


def parse_annotation(raw: Raw, size: tuple[int, int]) -> Annotation:
  """An annotation with a run-length code, as in SA-1B's files.

  Args:
    raw: `id`, `segmentation`, `bbox` and, where there is one, `point_coords`.
    size: (height, width) of its image.

  Raises:
    UserError: for an annotation without a mask, a mask without pixels or of
      another size than its image; a box without area; a point outside of the
      image. It says what is wrong, but not of which annotation.
  """
  if not isinstance(raw, Mapping):
    raise UserError("is no JSON object")
  code = raw.get("segmentation")
  if not isinstance(code, Mapping) or not code.get("counts"):
    raise UserError("has no mask (segmentation with size and counts)")
  if not rle.area(code):
    raise UserError("its mask has no pixel")
  own = tuple(operator.index(n) for n in code["size"])
  if own != size:
    raise UserError(
      f"its mask has {own[0]} x {own[1]} pixels (height x width), but its "
      f"image {size[0]} x {size[1]}"
    )
  counts = code["counts"]
  if isinstance(counts, bytes):
    counts = counts.decode("ascii")
  elif not isinstance(counts, str):
    counts = rle.compress(counts)
  return Annotation(
    rle={"size": list(own), "counts": counts},
    bbox=_box(raw.get("bbox"), size),
    point=_point(raw.get("point_coords"), size),
    id=_id(raw),
  )


def _called(raw: Any, number: int) -> str:
  if isinstance(raw, Mapping) and "id" in raw:
    return f"annotation {raw['id']}"
  return f"annotation number {number}, which has no id"


def _id(raw: Raw) -> int:
  try:
    return operator.index(raw["id"])
  except (KeyError, TypeError) as error:
    raise UserError("its id is no integer") from error


def _numbers(values: Any) -> tuple[float, ...]:
  """() for anything but finite numbers."""
  try:
    numbers = tuple(float(value) for value in values)
  except (TypeError, ValueError):
    return ()
  return numbers if all(map(math.isfinite, numbers)) else ()


def _box(
  values: Any, size: tuple[int, int]
) -> tuple[float, float, float, float]:
  box = _numbers(values)
  if len(box) != 4:
    raise UserError(f"bbox={values!r}: four numbers x, y, width, height needed")
  x, y, width, height = box
  if width <= 0 or height <= 0:
    raise UserError(f"bbox={list(box)} has no area, but there is a mask")
  # Rounding may put an edge a pixel outside.
  if x < -1 or y < -1 or x + width > size[1] + 1 or y + height > size[0] + 1:
    raise UserError(
      f"bbox={list(box)} is not inside its image of {size[1]} x {size[0]} "
      "pixels (width x height)"
    )
  return x, y, width, height


def _point(values: Any, size: tuple[int, int]) -> tuple[float, float] | None:
  if values is None or values == []:
    return None
  point = _numbers(values[0]) if isinstance(values, list) else ()
  if len(point) != 2:
    raise UserError(
      f"point_coords={values!r}: pairs of numbers [[x, y]] needed"
    )
  x, y = point
  if not (0 <= x <= size[1] and 0 <= y <= size[0]):
    raise UserError(
      f"its point ({x:g}, {y:g}) is outside of the image of {size[1]} x "
      f"{size[0]} pixels (width x height)"
    )
  return x, y
