"""Images with masks, or without, chosen by a config.

Every kind of data has one shape here: a `Source`, which is a sequence of
`Sample`s that are decoded when they are asked for.

    source = make_source(config.data.source, "train")
    source[0].image, source[0].annotations
"""

import abc
import hashlib
import importlib
import math
import operator
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.config import check_keys, check_read, did_you_mean
from common.errors import UserError

SPLITS = ("train", "valid")
_KEY = "data.source"


class Annotation(NamedTuple):
  """One mask of an image, and its prompts.

  Attributes:
    rle: the mask's code, `{"size": [h, w], "counts": str}`; see `slimsam.rle`.
    bbox: the box around the mask as (x, y, width, height), in pixels.
    point: (x, y) in pixels of a point on the object, or None.
    id: what its data set calls it.
  """

  rle: dict[str, Any]
  bbox: tuple[float, float, float, float]
  point: tuple[float, float] | None
  id: int


class Sample(NamedTuple):
  """One image.

  Attributes:
    name: for reports and errors.
    image: uint8 [h w 3], RGB.
    annotations: () where there are none.
  """

  name: str
  image: np.ndarray
  annotations: tuple[Annotation, ...]


class Source(Sequence):
  """Samples with random access, which may be sent to other processes.

  Attributes:
    labelled: whether its samples may have annotations.
  """

  labelled: bool

  @property
  @abc.abstractmethod
  def fingerprint(self) -> str:
    """Changes with the samples, by their names and sizes or by their seeds."""

  @abc.abstractmethod
  def read(self, i: int) -> Sample:
    """Sample i, from 0 to the length - 1."""

  def __getitem__(self, i: int) -> Sample:  # type: ignore[override]
    position = operator.index(i)
    if not -len(self) <= position < len(self):
      raise IndexError(f"sample {position} of {len(self)}")
    return self.read(position % len(self))


class Remembered(Source):
  """A source that keeps what it has read, the first of it that has room.

  Copies that are sent to other processes begin with nothing.

  Args:
    source: whose samples are kept.
    megabytes: room for them; 0: nothing is kept.
  """

  def __init__(self, source: Source, megabytes: float):
    self._source, self._room = source, int(megabytes * 2**20)
    self.labelled = source.labelled
    self._kept: dict[int, Sample] = {}
    self._left, self._lock = self._room, threading.Lock()

  def __len__(self) -> int:
    return len(self._source)

  @property
  def fingerprint(self) -> str:
    return self._source.fingerprint

  def read(self, i: int) -> Sample:
    if i in self._kept:
      return self._kept[i]
    sample = self._source[i]
    codes = sum(len(own.rle["counts"]) + 500 for own in sample.annotations)
    size = sample.image.nbytes + codes
    with self._lock:
      if size <= self._left and i not in self._kept:
        self._left -= size
        self._kept[i] = sample
    return sample

  def __reduce__(self) -> Any:
    return Remembered, (self._source, self._room / 2**20)


class _Kind(NamedTuple):
  """A reader, and the keys that it takes from a config.

  Attributes:
    module, function: the modules read each other's data lazily.
    place: keys that say where the data are; they are needed.
    options: keys that may be missing.
  """

  module: str
  function: str
  place: tuple[str, ...]
  options: tuple[str, ...]


_SOME, _DRAWN = ("start", "limit"), ("length", "size", "seed")
_FILES = (*_SOME, "max_pixels", "follow_links")
KINDS = {
  "sa1b": _Kind("slimsam.sa1b", "sa1b", ("path",), (*_FILES, "on_error")),
  "tfds": _Kind(
    "slimsam.sa1b", "tfds_sa1b", ("data_dir",), (*_SOME, "on_error")
  ),
  "coco": _Kind(
    "slimsam.coco", "coco", ("images_dir", "json_path"), (*_FILES, "on_error")
  ),
  "folder": _Kind("slimsam.photographs", "image_folder", ("path",), _FILES),
  "bundled": _Kind("slimsam.photographs", "bundled", (), ()),
  "composite": _Kind(
    "slimsam.composite", "composite", (), (*_DRAWN, "objects")
  ),
  "crops": _Kind("slimsam.composite", "crops", (), _DRAWN),
}
_KEYS = {"kind", "photographs", *SPLITS}.union(
  *(kind.place + kind.options for kind in KINDS.values())
)


def make_source(config: Mapping[str, Any], split: str) -> Source:
  """The source that a config names.

  Args:
    config: `kind`, and what that kind reads; a key in brackets may be missing:
      sa1b: SA-1B as it is released. `path` of a folder, or of tars: one, a
        pattern or a sequence; [`start` 0, `limit` 0: all]: so many images from
        there on, sorted by name; [`on_error` "error"]: or "skip".
      tfds: SA-1B prepared by TFDS. `data_dir`, "" for TFDS's own; [`start`,
        `limit`, `on_error`].
      coco: COCO's instances. `images_dir`, `json_path`; [`start`, `limit`,
        `on_error`].
      folder: images without masks. `path`; [`start`, `limit`].
      bundled: photographs in the packages scikit-image and scikit-learn.
      composite: drawn pictures with exact masks. `length`, `size` in pixels,
        `seed`; [`objects` (1, 4)]: fewest and most in a picture;
        [`photographs` {"kind": "bundled"}]: the config of another source.
      crops: random crops of photographs, without masks. `length`, `size`,
        `seed`, [`photographs`].
      sa1b, coco and folder refuse images of more than [`max_pixels` 0: twice
        what Pillow takes for safe, 179 million], and links that lead out of
        their folder unless [`follow_links` False].
      Keys of other kinds do not count, but for those that say where data are
      where nothing is read. The keys `train` and `valid` may hold
      what is different in that split, such as `{"start": 10000, "limit": 50}`;
      empty text and None stand for no difference. Crops and composites of two
      splits are never alike, bundled photographs are divided.
    split: one of `SPLITS`.

  Raises:
    UserError: for an unknown kind, split or key; for a key that is missing; for
      validation on images of the training split; for data that is missing or
      bad, with its place.
  """
  if split not in SPLITS:
    raise UserError(f"split {split!r}{did_you_mean(str(split), SPLITS)}")
  content = _plain(config)
  settings = _settings(content, split)
  if split != "train":
    _check_apart(_settings(content, "train"), settings, split)
  kind = KINDS[settings["kind"]]
  arguments = {k: settings[k] for k in kind.options if k in settings}
  places = [settings[key] for key in kind.place]
  if settings["kind"] == "bundled":
    places = [split]
  elif "seed" in kind.options:
    inner = settings.get("photographs") or {"kind": "bundled"}
    places = [make_source(inner, split)]
    # The splits' pictures must differ in more than their photographs.
    arguments["seed"] = (settings["seed"], SPLITS.index(split))
  reader = getattr(importlib.import_module(kind.module), kind.function)
  return reader(*places, **arguments)


def _plain(config: Any) -> dict[str, Any]:
  return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def _settings(content: Mapping[str, Any], split: str) -> dict[str, Any]:
  """What holds for a split."""
  special = content.get(split) or {}
  for keys, what in ((content, _KEY), (special, f"{_KEY}.{split}")):
    check_keys(keys, sorted(_KEYS), what=what)
  settings = {k: v for k, v in content.items() if k not in SPLITS}
  settings |= {k: v for k, v in special.items() if v not in ("", None)}
  name = settings.get("kind")
  if name not in KINDS:
    raise UserError(f"{_KEY}.kind={name!r}{did_you_mean(str(name), KINDS)}")
  kind = KINDS[name]
  if not kind.place:
    check_read(settings, {own: KINDS[own].place for own in KINDS})
  for key in kind.place + (_DRAWN if "seed" in kind.options else ()):
    if settings.get(key) is None:
      raise UserError(f"{_KEY}.kind={name!r} needs {_KEY}.{key}")
  return settings


def _check_apart(
  train: Mapping[str, Any], other: Mapping[str, Any], split: str
) -> None:
  """Raises `UserError` if two splits read the same files."""
  place = KINDS[other["kind"]].place
  same = train["kind"] == other["kind"] and all(
    train[key] == other[key] for key in place
  )
  if not place or not same:
    return
  (a, a_stop), (b, b_stop) = _range(train), _range(other)
  if a < b_stop and b < a_stop:
    name = place[0]
    raise UserError(
      f"{_KEY}.{split} has images of the training split: name others, such as "
      f"{_KEY}.{split}.{name}=..., or {_KEY}.limit=10000 with "
      f"{_KEY}.{split}.start=10000"
    )


def _range(settings: Mapping[str, Any]) -> tuple[float, float]:
  start, limit = settings.get("start", 0), settings.get("limit", 0)
  return start, start + limit if limit else math.inf


def fingerprint_of(*parts: Any) -> str:
  """A hash of strings, numbers, and tuples of these."""
  digest = hashlib.blake2b(digest_size=16)
  for part in parts:
    digest.update(f"{part!r};".encode())
  return digest.hexdigest()
