"""Image folders: DomainBed's layout, and anybody's own.

    PACS/photo/dog/056_0001.jpg        data set / domain / class / image

Domains, classes and images come sorted by name, images as torchvision's
`ImageFolder` sorts them, so that DomainBed's splits fall on the same files.
Names that begin with a dot do not count.
"""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Collection, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from common.data import images
from common.data.folders import FOLLOW_LINKS, Inside
from common.errors import UserError
from udim.domains import Domain, DomainSet, Example, fingerprint

log = logging.getLogger(__name__)

# Files checked at once, and skipped ones that a log line names.
_CHUNK, _SHOWN = 4096, 20

# domain -> class -> files, relative to the data set
Listing = dict[str, dict[str, list[str]]]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles(Sequence):
  """Examples in image files, decoded when they are asked for.

  Attributes:
    root: the data set's folder.
    files: [N] relative to it.
    labels: [N] integers.
    max_pixels: see `read_image`.
  """

  root: str
  files: tuple[str, ...]
  labels: np.ndarray
  max_pixels: int = 0

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> Example:  # type: ignore[override]
    path = os.path.join(self.root, self.files[i])
    image = read_image(path, max_pixels=self.max_pixels)
    return {"image": image, "label": int(self.labels[i])}

  @property
  def fingerprint(self) -> str:
    """Changes with names and labels."""
    return fingerprint(self.files, self.labels)


def read_image(path: str, *, max_pixels: int = 0) -> np.ndarray:
  """Decodes an image file as uint8 [H, W, 3], as DomainBed does.

  Files are read as far as they go, and EXIF's orientation is not looked at;
  for the rest see `common.data.images.read_image`.

  Args:
    path: of the file.
    max_pixels: larger images are refused; 0: as that function does by itself.

  Raises:
    UserError: for a file that is no image, with its name.
  """
  return images.read_image(
    path,
    max_pixels=max_pixels or None,
    key="data.source.max_pixels",
    upright=False,
    allow_truncated=True,
    remedy=(
      "mend or remove the image, or leave such images out with "
      "data.source.unreadable='skip'"
    ),
  )


def image_folders(cfg: Any) -> DomainSet:
  """The data set in a folder tree; see `load_domains`.

  Args:
    cfg: `path`, [`duplicates`], [`unreadable`], [`threads`], [`max_pixels`],
      [`follow_links`].

  Raises:
    UserError: for a folder that cannot be read or has not this layout, domains
      that differ in their classes, a class without images.
  """
  if not cfg.get("path", ""):
    raise UserError(
      "data.source.path is empty: name the folder that holds the domains"
    )
  unreadable = cfg.get("unreadable", "error")
  if unreadable not in ("error", "skip"):
    raise UserError(
      f"data.source.unreadable={unreadable!r}: choose 'error' or 'skip'"
    )
  root = os.path.abspath(os.path.expanduser(cfg.path))
  most = cfg.get("max_pixels", 0)
  listing = list_images(root, follow_links=cfg.get("follow_links", False))
  check_classes(root, listing)
  listing = _leave_out(listing, _duplicates(cfg, root, listing))
  skipped: tuple[str, ...] = ()
  if unreadable == "skip":
    threads = cfg.get("threads", 8)
    skipped = find_unreadable(root, listing, threads=threads, max_pixels=most)
    listing = _leave_out(listing, set(skipped))
  check_images(root, listing)
  classes = tuple(next(iter(listing.values())))
  return DomainSet(
    name=os.path.basename(root),
    classes=classes,
    domains=tuple(
      Domain(name, _examples(root, files, most))
      for name, files in listing.items()
    ),
    skipped=skipped,
  )


def _examples(
  root: str, classes: dict[str, list[str]], max_pixels: int
) -> ImageFiles:
  counts = [len(files) for files in classes.values()]
  labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
  files = tuple(file for files in classes.values() for file in files)
  return ImageFiles(root, files, labels, max_pixels)


def list_images(root: str, *, follow_links: bool = False) -> Listing:
  """The images under a folder of domains, in torchvision's order.

  Args:
    root: the folder.
    follow_links: also those that lead out of it.

  Raises:
    UserError: for a folder that cannot be read, or holds no folder; for links
      as `common.data.folders.walk` says.
  """
  inside = Inside(root, follow_links=follow_links, remedy=FOLLOW_LINKS)
  listing: Listing = {}
  for domain in _folders(root, "domain"):
    inside.check(os.path.join(root, domain))
    classes = _folders(os.path.join(root, domain), "class")
    listing[domain] = {
      c: _images(root, f"{domain}/{c}", inside) for c in classes
    }
  return listing


def _folders(path: str, what: str) -> list[str]:
  try:
    found = [e.name for e in os.scandir(path) if e.is_dir()]
  except OSError as error:
    raise UserError(
      f"{path}: {error.strerror}: data.source.path must name a folder with one "
      "folder for each domain"
    ) from error
  found = sorted(name for name in found if name[0] != ".")
  if not found:
    raise UserError(
      f"{path} holds no {what} folder: images are looked for in "
      "domain/class/image under data.source.path"
    )
  return found


def _images(root: str, folder: str, inside: Inside) -> list[str]:
  """Image files in a folder and below it, relative to the root."""
  top = os.path.join(root, folder)
  found = images.image_files(top, inside=inside)
  return [f"{folder}/{file[len(top) + 1 :]}" for file in found]


def check_classes(root: str, listing: Listing) -> None:
  """Raises `UserError` unless all domains have the same class folders."""
  known = sorted({c for classes in listing.values() for c in classes})
  lacking = [
    f"{domain!r} lacks {', '.join(map(repr, missing))}"
    for domain, classes in listing.items()
    if (missing := [c for c in known if c not in classes])
  ]
  if lacking:
    raise UserError(
      f"{root}: the domains differ in their classes: {'; '.join(lacking)}: "
      "every domain needs the same class folders"
    )


def check_images(root: str, listing: Listing) -> None:
  """Raises `UserError` for a class without images, or a level too many."""
  empty = [
    f"{domain}/{name}"
    for domain, classes in listing.items()
    for name, files in classes.items()
    if not files
  ]
  if empty:
    raise UserError(
      f"{root}: no image in {', '.join(empty)} (known endings: "
      f"{', '.join(images.ENDINGS)}): every class needs one in every domain"
    )
  if all(file.count("/") > 2 for file in _flat(listing)):
    raise UserError(
      f"{root}: no image stands in domain/class itself, all are deeper: name "
      f"the data set's own folder, such as {root}/{next(iter(listing))}"
    )


def _flat(listing: Listing) -> list[str]:
  return [
    file
    for classes in listing.values()
    for files in classes.values()
    for file in files
  ]


def _leave_out(listing: Listing, removed: Collection[str]) -> Listing:
  if not removed:
    return listing
  return {
    domain: {
      name: [file for file in files if file not in removed]
      for name, files in classes.items()
    }
    for domain, classes in listing.items()
  }


def _duplicates(cfg: Any, root: str, listing: Listing) -> set[str]:
  """What the file `cfg.duplicates` lists, such as DomainBed's for DomainNet."""
  path = cfg.get("duplicates", "")
  name = os.path.basename(root)
  if not path:
    if "".join(filter(str.isalpha, name.lower())) == "domainnet":
      log.warning(
        "%s: results are comparable with DomainBed's only without its "
        "duplicates: set data.source.duplicates to domain_net_duplicates.txt, "
        "unless these images were removed already",
        name,
      )
    return set()
  try:
    text = pathlib.Path(path).expanduser().read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"data.source.duplicates={path!r} cannot be read: {error}"
    ) from error
  listed = {line.strip() for line in text.splitlines() if line.strip()}
  here = listed.intersection(_flat(listing))
  log.info(
    "%s: %d of the %d images listed in %s are here and left out",
    name, len(here), len(listed), path,
  )  # fmt: skip
  return here


def find_unreadable(
  root: str, listing: Listing, *, threads: int = 8, max_pixels: int = 0
) -> tuple[str, ...]:
  """Decodes every image; returns those that cannot be, and names them."""
  files = _flat(listing)
  is_good = functools.partial(_is_readable, root, max_pixels)
  failed: list[str] = []
  log.info("checking %d images in %s", len(files), root)
  with futures.ThreadPoolExecutor(threads) as pool:
    # In pieces: a task for each of a million files would fill the memory.
    for start in range(0, len(files), _CHUNK):
      chunk = files[start : start + _CHUNK]
      failed += [f for f, ok in zip(chunk, pool.map(is_good, chunk)) if not ok]
  if failed:
    more = f" and {len(failed) - _SHOWN} more" if failed[_SHOWN:] else ""
    log.warning(
      "%s: left out %d of %d images, which cannot be read: %s%s",
      root, len(failed), len(files), ", ".join(failed[:_SHOWN]), more,
    )  # fmt: skip
  return tuple(failed)


def _is_readable(root: str, max_pixels: int, file: str) -> bool:
  try:
    read_image(os.path.join(root, file), max_pixels=max_pixels)
  except UserError:
    return False
  return True
