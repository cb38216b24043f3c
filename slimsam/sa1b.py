"""SA-1B: 11 million images with about a hundred masks each.

It is released as a thousand tars of `sa_N.jpg` and `sa_N.json`. An image and
its annotations belong together by their stem. Tars are read as they are.
"""

import dataclasses
import functools
import importlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from common.data.sources import find_files, json_record, record_source
from common.data.tfds_files import check_tfds
from common.errors import UserError
from slimsam.annotations import (
  check_on_error,
  parse_annotation,
  read_annotations,
)
from slimsam.listing import (
  Place,
  chosen,
  files_below,
  natural_order,
  some,
  stem,
  tar_members,
)
from slimsam.sources import Annotation, Sample, Source, fingerprint_of

log = logging.getLogger(__name__)

_IMAGES = (".jpg", ".jpeg", ".png")
_TFDS_NAME = "segment_anything"


@dataclasses.dataclass(frozen=True, eq=False)
class Sa1b(Source):
  """Pairs of an image and a JSON file.

  Attributes:
    pairs: places of image and annotations.
    on_error: what becomes of bad annotations; see `read_annotations`.
    max_pixels: larger images are refused; 0: as `read_image` does by itself.
  """

  pairs: tuple[tuple[Place, Place], ...]
  on_error: str
  max_pixels: int = 0
  labelled = True

  def __len__(self) -> int:
    return len(self.pairs)

  def read(self, i: int) -> Sample:
    """Sample i; raises `UserError` for files that are no image, no JSON."""
    image_place, json_place = self.pairs[i]
    # Masks are of the pixels as they are stored.
    image = image_place.image(self.max_pixels, upright=False)
    name = json_place.name
    entries = json_record(json_place.read(), name).get("annotations")
    if not isinstance(entries, list):
      raise UserError(f"{name}: no list under the key 'annotations'")
    parse = functools.partial(parse_annotation, size=image.shape[:2])
    annotations = read_annotations(
      entries, parse, place=name, on_error=self.on_error
    )
    return Sample(stem(image_place), image, annotations)

  @property
  def fingerprint(self) -> str:
    """Changes with names and sizes: that of a tar is that of its files."""
    names = [(stem(image), image.size, text.size) for image, text in self.pairs]
    return fingerprint_of("sa1b", self.on_error, *names)


def sa1b(
  path: str | Sequence[str],
  limit: int = 0,
  *,
  start: int = 0,
  on_error: str = "error",
  max_pixels: int = 0,
  follow_links: bool = False,
) -> Sa1b:
  """SA-1B, or one's own data in its format, from a folder or from tars.

  Args:
    path: a folder, whose files may stand in folders below it; or a tar, a
      pattern such as `sa_*.tar`, or a sequence of these.
    limit: so many images, sorted by name, where sa_2 comes before sa_10; 0
      stands for all.
    start: the first of them.
    on_error: "error" raises `UserError` for an image without annotations, for
      annotations without an image and for bad annotations; "skip" leaves them
      out and logs how many.
    max_pixels: as `Sa1b` has it.
    follow_links: also those that lead out of the folder, or out of that of a
      pattern.

  Raises:
    UserError: for data that is missing or bad, with the file's name.
  """
  check_on_error(on_error)
  where = f"data.source.path={path!r}"
  pairs = _pairs(_files(path, follow_links), where, on_error)
  keep = chosen(len(pairs), start, limit, place=where)
  log.info("%s: %d images, %d used", where, len(pairs), len(keep))
  return Sa1b(tuple(pairs[i] for i in keep), on_error, max_pixels)


def _files(path: str | Sequence[str], follow_links: bool) -> list[Place]:
  folder = os.path.expanduser(path) if isinstance(path, str) else ""
  if folder and os.path.isdir(folder):
    return list(files_below(folder, follow_links=follow_links))
  found = find_files(path, follow_links=follow_links)
  tars = dict.fromkeys(map(os.path.abspath, found))
  return [member for tar in tars for member in tar_members(tar)]


def _pairs(
  files: Iterable[Place], where: str, on_error: str
) -> list[tuple[Place, Place]]:
  images, texts = {}, {}
  for place in files:
    ending = os.path.splitext(place.name)[1].lower()
    if ending in _IMAGES:
      _add(images, place)
    elif ending == ".json":
      _add(texts, place)
  alone = [images[name].name for name in images.keys() - texts.keys()]
  widows = [texts[name].name for name in texts.keys() - images.keys()]
  for names, lack in ((alone, ".json"), (widows, "image")):
    if names:
      _lacking(sorted(names, key=natural_order), lack, where, on_error)
  both = sorted(images.keys() & texts.keys(), key=natural_order)
  if not both:
    raise UserError(
      f"{where}: no pair of an image and its annotations such as sa_1.jpg and "
      "sa_1.json: name a folder with such files, or tars with 'FOLDER/*.tar'"
    )
  return [(images[name], texts[name]) for name in both]


def _add(found: dict[str, Place], place: Place) -> None:
  other = found.setdefault(stem(place), place)
  if other is not place:
    raise UserError(
      f"{place.name} and {other.name} have the same name: remove one of them"
    )


def _lacking(names: list[str], lack: str, where: str, on_error: str) -> None:
  if on_error == "error":
    raise UserError(
      f"{where}: {len(names)} files have no {lack} of the same stem: "
      f"{some(names)}: add it, or leave them out with "
      "data.source.on_error='skip'"
    )
  log.warning(
    "%s: left out %d files that have no %s of the same stem: %s",
    where, len(names), lack, some(names),
  )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSa1b(Source):
  """SA-1B as TFDS prepares it.

  Attributes:
    records: with random access.
    keep: which of them.
    facts: what a fingerprint tells of the records.
    on_error: what becomes of bad annotations; see `read_annotations`.
  """

  records: Any
  keep: range
  facts: tuple[Any, ...]
  on_error: str
  labelled = True

  def __len__(self) -> int:
    return len(self.keep)

  def read(self, i: int) -> Sample:
    """Sample i; raises `UserError` for a record that cannot be decoded."""
    from PIL.Image import DecompressionBombError

    number = self.keep[i]
    try:
      record = self.records[number]
    except (OSError, ValueError, DecompressionBombError) as error:
      raise UserError(
        f"{_TFDS_NAME}: record {number} cannot be decoded: "
        f"{str(error).splitlines()[0]}: prepare the data set again"
      ) from error
    image = np.asarray(record["image"]["content"])
    name = _text(record["image"]["file_name"])
    annotations = read_annotations(
      _entries(record["annotations"]),
      functools.partial(_parse_record, size=image.shape[:2]),
      place=f"{_TFDS_NAME}: {name}",
      on_error=self.on_error,
    )
    return Sample(os.path.splitext(name)[0], image, annotations)

  @property
  def fingerprint(self) -> str:
    """Changes with the prepared files and with which records are used."""
    return fingerprint_of("tfds", self.facts, self.keep, self.on_error)


def tfds_sa1b(
  data_dir: str = "",
  limit: int = 0,
  *,
  start: int = 0,
  on_error: str = "error",
) -> TfdsSa1b:
  """SA-1B as TFDS's `segment_anything` prepares it; TensorFlow is not needed.

  Args:
    data_dir: where it was prepared; "" is TFDS's own default.
    limit: so many images, in TFDS's order, which is a shuffled one; 0 stands
      for all.
    start: the first of them.
    on_error: "error" raises for bad annotations, "skip" leaves them out.

  Raises:
    UserError: for data that is not prepared, with how to prepare one tar.
  """
  from ml_collections import ConfigDict

  check_on_error(on_error)
  tfds = importlib.import_module("tensorflow_datasets")
  folder = os.path.expanduser(data_dir) if data_dir else None
  check_tfds(_TFDS_NAME, folder)
  builder = tfds.builder(_TFDS_NAME, data_dir=folder)
  if not builder.is_prepared():
    raise UserError(_how_to_prepare(str(builder.data_dir), data_dir))
  settings = {"kind": "tfds", "name": _TFDS_NAME, "split": "train"}
  records: Any = record_source(ConfigDict({**settings, "data_dir": data_dir}))
  info = builder.info.splits["train"]
  facts = (builder.info.full_name, *info.shard_lengths, int(info.num_bytes))
  where = str(builder.data_dir)
  keep = chosen(len(records), start, limit, place=where)
  return TfdsSa1b(records, keep, facts, on_error)


def _how_to_prepare(place: str, data_dir: str) -> str:
  where = f", data_dir={data_dir!r}" if data_dir else ""
  return (
    f"data set {_TFDS_NAME!r} is not prepared in {place}; to prepare one tar "
    "of the 1000, leave the header and one line in the links file of "
    "https://ai.facebook.com/datasets/segment-anything-downloads, save it as "
    f"DIR/{_TFDS_NAME}_links.txt and run (with tensorflow-cpu and apache-beam "
    'installed) python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder({_TFDS_NAME!r}{where}, file_format='array_record')"
    ".download_and_prepare(download_config=tfds.download.DownloadConfig("
    "manual_dir='DIR'))\"; or read the tar as it is with "
    "data.source.kind='sa1b'"
  )


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)


def _entries(table: Mapping[str, Any]) -> list[dict[str, Any]]:
  """One annotation each from arrays with all of them."""
  code = table["segmentation"]
  columns = (table["id"], table["bbox"], table["point_coords"],
             code["size"], code["counts"])  # fmt: skip
  return [
    {
      "id": int(id_),
      "bbox": np.asarray(box, np.float64).tolist(),
      "point_coords": np.asarray(points).tolist(),
      "segmentation": {"size": np.asarray(size).tolist(), "counts": counts},
    }
    for id_, box, points, size, counts in zip(*columns, strict=True)
  ]


def _parse_record(raw: Mapping[str, Any], size: tuple[int, int]) -> Annotation:
  """As `parse_annotation`; the box is (ymin, xmin, ymax, xmax) in [0, 1]."""
  y0, x0, y1, x1 = raw["bbox"]
  height, width = size
  box = (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)
  return parse_annotation({**raw, "bbox": box}, size)
