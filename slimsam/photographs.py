"""Images without masks: a folder of them, and those in Python packages."""

import dataclasses
import importlib.util
import os

from common.config import did_you_mean
from common.data.images import ENDINGS, image_files
from common.errors import UserError
from slimsam.listing import Place, chosen, inside, natural_order, whole_file
from slimsam.sources import Sample, Source, fingerprint_of

# package -> (what pip calls it, the photographs' folder in it)
_PACKAGES = {
  "skimage": ("scikit-image", "data"),
  "sklearn": ("scikit-learn", "datasets/images"),
}
# Colour photographs in the packages' wheels; the others are grey, drawn, or
# fetched from the net.
PHOTOGRAPHS = {
  "train": (
    "skimage/astronaut.png", "skimage/chelsea.png", "skimage/color.png",
    "skimage/hubble_deep_field.jpg", "skimage/ihc.png",
    "skimage/motorcycle_left.png", "skimage/motorcycle_right.png",
    "skimage/retina.jpg", "sklearn/china.jpg",
  ),
  "valid": (
    "skimage/coffee.png", "skimage/rocket.jpg", "sklearn/flower.jpg",
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Images(Source):
  """Image files.

  Attributes:
    names: N, of the samples.
    places: N, of the files.
    max_pixels: larger images are refused; 0: as `read_image` does by itself.
  """

  names: tuple[str, ...]
  places: tuple[Place, ...]
  max_pixels: int = 0
  labelled = False

  def __len__(self) -> int:
    return len(self.names)

  def read(self, i: int) -> Sample:
    """Sample i; raises `UserError` for a file that is no image."""
    image = self.places[i].image(self.max_pixels)
    return Sample(self.names[i], image, ())

  @property
  def fingerprint(self) -> str:
    """Changes with names and sizes."""
    sizes = [place.size for place in self.places]
    return fingerprint_of("images", *zip(self.names, sizes))


def image_folder(
  path: str,
  limit: int = 0,
  *,
  start: int = 0,
  max_pixels: int = 0,
  follow_links: bool = False,
) -> Images:
  """The images in a folder and below it, without masks.

  Args:
    path: the folder. Names that begin with a dot do not count.
    limit: so many, sorted by name, where a_2 comes before a_10; 0: all.
    start: the first of them.
    max_pixels: as `Images` has it.
    follow_links: also those that lead out of the folder.

  Raises:
    UserError: for a folder that cannot be read, or holds no image; for links
      out of it.
  """
  if not path:
    raise UserError("data.source.path is empty: name a folder of images")
  root = os.path.expanduser(path)
  found = image_files(root, inside=inside(root, follow_links))
  files = {os.path.relpath(file, root): file for file in found}
  if not files:
    raise UserError(
      f"{root}: no image in this folder or below it (known endings: "
      f"{', '.join(ENDINGS)})"
    )
  names = sorted(files, key=natural_order)
  names = [names[i] for i in chosen(len(names), start, limit, place=root)]
  places = tuple(whole_file(files[name]) for name in names)
  return Images(tuple(names), places, max_pixels)


def bundled(split: str) -> Images:
  """Colour photographs inside the packages scikit-image and scikit-learn.

  Args:
    split: "train" (9 photographs) or "valid" (3 others).

  Raises:
    UserError: for another split, and for a package that is missing.
  """
  if split not in PHOTOGRAPHS:
    raise UserError(f"split {split!r}{did_you_mean(split, PHOTOGRAPHS)}")
  files = PHOTOGRAPHS[split]
  names = tuple(os.path.splitext(os.path.basename(file))[0] for file in files)
  return Images(names, tuple(map(_bundled_place, files)))


def _bundled_place(file: str) -> Place:
  package, name = file.split("/")
  title, folder = _PACKAGES[package]
  # Importing them would take seconds.
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise UserError(
      f"the photograph {name} comes with {title}, which is not installed: "
      "pip install -e '.[photographs]'"
    )
  path = os.path.join(spec.submodule_search_locations[0], folder, name)
  if not os.path.isfile(path):
    raise UserError(
      f"{path} is missing: this version of {title} came without it: "
      "pip install -e '.[photographs]'"
    )
  return whole_file(path)
