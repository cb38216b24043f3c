"""COCO's format of instances, in which LVIS and many others come too."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from common.data.images import read_image
from common.data.sources import json_record
from common.errors import UserError
from slimsam import rle
from slimsam.annotations import (
  Raw,
  check_on_error,
  parse_annotation,
  read_annotations,
)
from slimsam.listing import chosen, inside, natural_order
from slimsam.sources import Annotation, Sample, Source, fingerprint_of

log = logging.getLogger(__name__)


class _Entry(NamedTuple):
  """An image of a COCO file.

  Attributes:
    name: of the image, relative to the folder.
    size: (height, width) that the file gives.
    annotations: a JSON list: as objects those of COCO would fill gigabytes, in
      every process.
  """

  name: str
  size: tuple[int, int]
  annotations: str


@dataclasses.dataclass(frozen=True, eq=False)
class Coco(Source):
  """Images of a folder with instances from one file.

  Attributes:
    images_dir: the folder.
    json_path: the file, for errors.
    json_hash: of the file.
    entries: N images.
    on_error: what becomes of bad annotations; see `read_annotations`.
    max_pixels: larger images are refused; 0: as `read_image` does by itself.
  """

  images_dir: str
  json_path: str
  json_hash: str
  entries: tuple[_Entry, ...]
  on_error: str
  max_pixels: int = 0
  labelled = True

  def __len__(self) -> int:
    return len(self.entries)

  def read(self, i: int) -> Sample:
    """Sample i; raises `UserError` for a bad image or annotation."""
    entry = self.entries[i]
    path = os.path.join(self.images_dir, entry.name)
    # Masks are of the pixels as they are stored.
    image = read_image(
      path,
      max_pixels=self.max_pixels or None,
      key="data.source.max_pixels",
      upright=False,
    )
    if image.shape[:2] != entry.size:
      raise UserError(
        f"{path}: {image.shape[0]} x {image.shape[1]} pixels (height x width), "
        f"but {entry.size[0]} x {entry.size[1]} by {self.json_path}: the "
        "annotations are of another image, or it was resized"
      )
    annotations = read_annotations(
      json.loads(entry.annotations),
      functools.partial(_parse, size=entry.size),
      place=f"{self.json_path}: {entry.name}",
      on_error=self.on_error,
    )
    return Sample(os.path.splitext(entry.name)[0], image, annotations)

  @property
  def fingerprint(self) -> str:
    """Changes with the JSON file and with which images are used."""
    names = [entry.name for entry in self.entries]
    return fingerprint_of("coco", self.json_hash, self.on_error, *names)


def coco(
  images_dir: str,
  json_path: str,
  limit: int = 0,
  *,
  start: int = 0,
  on_error: str = "error",
  max_pixels: int = 0,
  follow_links: bool = False,
) -> Coco:
  """Instances in COCO's format: masks by polygons or run lengths, and boxes.

  Args:
    images_dir: the folder that the file's names are relative to.
    json_path: such as `instances_val2017.json`. Crowds (`iscrowd`) are left
      out: they are no single object; a log line says how many.
    limit: so many images, sorted by name; 0 stands for all. Images without
      annotations count.
    start: the first of them.
    on_error: "error" raises for bad annotations, "skip" leaves them out.
    max_pixels: as `Coco` has it.
    follow_links: also those that lead out of `images_dir`.

  Raises:
    UserError: for data that is missing or bad, with its place; for names of
      images that lead out of the folder, and for links that do.
  """
  check_on_error(on_error)
  if not images_dir or not json_path:
    raise UserError(
      "data.source.images_dir or data.source.json_path is empty: name the "
      "folder of the images and the file of the instances"
    )
  images_dir, json_path = map(os.path.expanduser, (images_dir, json_path))
  try:
    data = pathlib.Path(json_path).read_bytes()
  except OSError as error:
    raise UserError(f"{json_path}: cannot be read: {error.strerror}") from error
  content = json_record(data, json_path)
  images = _images(content, json_path)
  keep = chosen(len(images), start, limit, place=json_path)
  used = {
    number: images[number] for number in list(images)[keep.start : keep.stop]
  }
  entries = _entries(content, images, used, json_path)
  fence = inside(images_dir, follow_links)
  for entry in entries:
    place = os.path.join(images_dir, entry.name)
    if not os.path.isfile(place):
      raise UserError(
        f"{place}: no such file, but {json_path} has it: "
        "data.source.images_dir names its folder"
      )
    fence.check_file(place)
  digest = hashlib.blake2b(data, digest_size=16).hexdigest()
  return Coco(images_dir, json_path, digest, entries, on_error, max_pixels)


def _images(content: Raw, place: str) -> dict[int, Raw]:
  """The file's images by their ids, sorted by name."""
  found: dict[int, Raw] = {}
  for image in _list(content, "images", place):
    for key in ("id", "file_name", "height", "width"):
      if not isinstance(image, Mapping) or key not in image:
        raise UserError(f"{place}: an image has no {key!r}: {image!r:.80}")
    _check_image(image, place)
    if image["id"] in found:
      raise UserError(f"{place}: two images have the id {image['id']}")
    found[image["id"]] = image
  if not found:
    raise UserError(f"{place} holds no image")
  order = sorted(found, key=lambda i: natural_order(found[i]["file_name"]))
  return {i: found[i] for i in order}


def _check_image(image: Raw, place: str) -> None:
  for key, kind in (("id", int), ("file_name", str)):
    if not isinstance(image[key], kind):
      raise UserError(f"{place}: an image's {key} is {image[key]!r:.80}")
  parts = pathlib.PurePath(image["file_name"])
  if parts.is_absolute() or ".." in parts.parts:
    raise UserError(
      f"{place}: an image's file_name is {image['file_name']!r:.80}, which "
      "leads out of data.source.images_dir: name images relative to it"
    )
  for key in ("height", "width"):
    size = image[key]
    if not isinstance(size, int | float) or not size >= 1 or size % 1:
      raise UserError(f"{place}: {image['file_name']}: {key} is {size!r:.80}")


def _list(content: Raw, key: str, place: str) -> list[Any]:
  values = content.get(key)
  if not isinstance(values, list):
    raise UserError(
      f"{place}: no list under the key {key!r}: give a file of instances in "
      "COCO's format"
    )
  return values


def _entries(
  content: Raw, images: Mapping[int, Raw], used: Mapping[int, Raw], place: str
) -> tuple[_Entry, ...]:
  found: dict[int, list[Any]] = {number: [] for number in used}
  crowds = 0
  for annotation in _list(content, "annotations", place):
    number = _image_of(annotation, images, place)
    if number not in used:
      continue
    if annotation.get("iscrowd"):
      crowds += 1
      continue
    keys = ("id", "segmentation", "bbox")
    found[number].append({k: annotation[k] for k in keys if k in annotation})
  log.info(
    "%s: %d images, %d annotations; left out %d crowds",
    place, len(used), sum(map(len, found.values())), crowds,
  )  # fmt: skip
  return tuple(
    _Entry(
      image["file_name"],
      (int(image["height"]), int(image["width"])),
      json.dumps(found[number]),
    )
    for number, image in used.items()
  )


def _image_of(annotation: Any, images: Mapping[int, Raw], place: str) -> int:
  if not isinstance(annotation, Mapping) or "image_id" not in annotation:
    raise UserError(
      f"{place}: an annotation has no 'image_id': {annotation!r:.80}"
    )
  number = annotation["image_id"]
  if not isinstance(number, int) or number not in images:
    raise UserError(
      f"{place}: annotation {annotation.get('id')}: no image has the id "
      f"{number!r}"
    )
  return number


def _parse(raw: Raw, size: tuple[int, int]) -> Annotation:
  """As `parse_annotation`; the mask may be polygons."""
  polygons = raw.get("segmentation")
  if not polygons or not isinstance(polygons, list):
    return parse_annotation(raw, size)
  code = rle.encode(rle.polygons_to_mask(polygons, *size))
  return parse_annotation({**raw, "segmentation": code}, size)
