"""Image files: read as uint8 RGB, listed in folders, written as PNG."""

import io
import os
import stat
import threading
import warnings
from typing import IO, Any

import numpy as np

from common.data.folders import Inside, walk
from common.errors import UserError

# What torchvision takes for an image.
ENDINGS = (
  ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip

# What is read, whatever a file is called. Pillow knows forty kinds more, one of
# which, EPS, it gives to another program to be run.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# A file may have so many bytes, or more where its pixels do: RGBA of 16 bits
# and as much again.
_USUAL_BYTES, _BYTES_A_PIXEL = 2**26, 16

# Pillow keeps its limit on pixels for the whole process.
_LIMIT = threading.Lock()


class _TooLarge(ValueError):
  """A file that would fill the memory as it is."""


def read_image(
  source: str | os.PathLike[str] | bytes | IO[bytes],
  *,
  name: str = "",
  max_pixels: int | None = None,
  key: str = "max_pixels",
  upright: bool = True,
  allow_truncated: bool = False,
  remedy: str = "",
) -> np.ndarray:
  """Decodes an image as uint8 [h w 3].

  Grey images, palettes and CMYK become RGB. Transparency is dropped, as by
  Pillow's `convert("RGB")`: what an RGBA file holds under transparent pixels
  shows. 16 bits become the upper 8, and floats in [0, 1] are scaled to 255,
  where `convert` would cut both at 255. Of an animation, the first frame.

  Args:
    source: a path, an encoded image, or an open binary file.
    name: what messages call it; by default the path or the file's name.
    max_pixels: larger images are refused by their headers, before they are
      decoded; by default twice `PIL.Image.MAX_IMAGE_PIXELS`, about 179 million.
    key: what messages call that setting.
    upright: turn and mirror as EXIF's orientation says. Pillow does so to a
      TIFF in any case.
    allow_truncated: leave grey what a cut file lacks, instead of an error.
      Pillow keeps this choice for the whole process: threads that read at the
      same time must agree on it.
    remedy: ends the message of an error, in place of the usual advice, but for
      images that are too large.

  Raises:
    UserError: with the name, for what cannot be read, is no image of one of
      `FORMATS`, is cut or broken, has too many pixels or bytes, or holds
      numbers without a known range.
  """
  from PIL import ImageFile

  ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated  # type: ignore[assignment]
  try:
    with _open(_content(source, max_pixels), max_pixels) as image:
      image.load()
      if upright:
        _turn(image)
      return np.asarray(_rgb(image))
  except Exception as error:  # Pillow's decoders raise all kinds.
    name = name or _name(source)
    too_large = _too_large(error, max_pixels, key)
    if too_large:
      raise UserError(
        f"{name}: {too_large}: scale it down, or raise {key}"
      ) from error
    reason, advice = _explain(error)
    raise UserError(f"{name}: {reason}: {remedy or advice}") from error


def _content(source: Any, max_pixels: int | None) -> bytes:
  if isinstance(source, str | os.PathLike):
    _check_file(os.stat(source), max_pixels)
    with open(source, "rb") as file:
      source = file.read()
  elif not isinstance(source, bytes):
    source = source.read()
  if not source:
    raise ValueError("an empty file, no image")
  return source


def _check_file(status: os.stat_result, max_pixels: int | None) -> None:
  """Refuses what a link may lead to: a device, a pipe, a file without end."""
  if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
    raise ValueError("no file but a device or a pipe")
  pixels = _most_pixels(max_pixels)
  if pixels is not None:
    most = max(_USUAL_BYTES, _BYTES_A_PIXEL * pixels)
    if status.st_size > most:
      raise _TooLarge(f"{status.st_size:,} bytes, more than {most:,}")


def _most_pixels(max_pixels: int | None) -> int | None:
  from PIL import Image

  if max_pixels is not None:
    return max_pixels
  with _LIMIT:
    safe = Image.MAX_IMAGE_PIXELS
  return None if safe is None else 2 * safe


def _name(source: Any) -> str:
  if isinstance(source, str | os.PathLike):
    return os.fspath(source) or "''"
  name = getattr(source, "name", "")
  return name if name and isinstance(name, str) else "the image"


def _open(content: bytes, max_pixels: int | None) -> Any:
  """Reads the header; Pillow raises for more than `max_pixels`."""
  from PIL import Image

  silence = ("ignore", None, Image.DecompressionBombWarning, None, 0)
  if silence not in warnings.filters:
    # Pillow warns from half its limit on; here an image is read or refused.
    # Once, as `catch_warnings` would be unsafe beside other threads.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
  with _LIMIT:
    before = Image.MAX_IMAGE_PIXELS
    if max_pixels is not None:
      # It raises above twice this number, some formats while they open.
      Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment]
    try:
      return Image.open(io.BytesIO(content), formats=FORMATS)
    finally:
      Image.MAX_IMAGE_PIXELS = before


def _turn(image: Any) -> None:
  from PIL import ImageOps

  try:
    ImageOps.exif_transpose(image, in_place=True)
  except Exception as error:
    raise ValueError(f"its EXIF data cannot be read ({error})") from error


def _rgb(image: Any) -> Any:
  from PIL import Image

  if image.mode == "RGB":
    return image
  if image.mode == "F" or image.mode.startswith("I"):
    image = Image.fromarray(_eight_bits(np.asarray(image)))
  if image.mode == "P" and "transparency" in image.info:
    image = image.convert("RGBA")
  return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
  """Grey of 16 bits, kept in 16 or 32, or floats in [0, 1], as uint8."""
  top = 1 if values.dtype.kind == "f" else 2**16 - 1
  # Written so that NaN does not pass.
  if not (values.min() >= 0 and values.max() <= top):
    raise ValueError(
      f"{values.dtype.name} values from {values.min():g} to {values.max():g} "
      f"where 0 to {top:,} are known as black to white"
    )
  if values.dtype.kind == "f":
    return np.round(values * 255).astype(np.uint8)
  return (values >> 8).astype(np.uint8)


def _too_large(error: Exception, max_pixels: int | None, key: str) -> str:
  """In how far an image is too large; "" where something else is wrong."""
  from PIL import Image

  if isinstance(error, _TooLarge):
    return str(error)
  if not isinstance(error, Image.DecompressionBombError):
    return ""
  safe = Image.MAX_IMAGE_PIXELS
  limit = f"twice the {safe:,} pixels that Pillow takes for safe"
  if max_pixels is not None:
    limit = f"{key}={max_pixels:,}"
  return f"more than {limit}: {str(error).partition(' exceeds')[0]}"


def _explain(error: Exception) -> tuple[str, str]:
  """What is wrong with an image, and what to do."""
  from PIL import UnidentifiedImageError

  mend = "mend or replace the image"
  if isinstance(error, UnidentifiedImageError):
    return f"no image of a kind that is read ({', '.join(FORMATS)})", mend
  if isinstance(error, OSError) and error.strerror:
    return error.strerror, "name an image file that can be read"
  return (str(error).splitlines() or [type(error).__name__])[0], mend


def image_files(
  folder: str | os.PathLike[str],
  *,
  recursive: bool = True,
  inside: Inside | None = None,
) -> list[str]:
  """The paths of the image files in a folder.

  Args:
    folder: may be a link, and is walked through links that do not leave it.
    recursive: also those in folders below it.
    inside: what links must not leave in place of the folder.

  Returns:
    Paths that begin with the folder: its own files by name, then those of
    every folder below, as torchvision sorts them. Names that begin with a dot
    or have none of `ENDINGS` do not count.

  Raises:
    UserError: for a folder that cannot be read, the one named or one below, and
      for links as `common.data.folders.walk` says.
  """
  top = os.fspath(folder)
  found = []
  for place, names in walk(
    top,
    inside or Inside(top),
    wanted=lambda name: name.lower().endswith(ENDINGS),
    refuse=_refuse,
    recursive=recursive,
  ):
    found += [(place, name) for name in names]
  return [os.path.join(place, name) for place, name in sorted(found)]


def _refuse(error: OSError) -> None:
  raise UserError(
    f"{error.filename}: {error.strerror}: name a folder of images that can be "
    "read"
  ) from error


def write_png(path: str | os.PathLike[str], array: np.ndarray) -> None:
  """Writes an image; the file is there whole or not at all.

  Args:
    path: of the file; missing folders are made.
    array: uint8 [h w], [h w 3] or [h w 4], or bool [h w], a mask, which
      becomes black and white.

  Raises:
    UserError: for another array, or a place that cannot be written.
  """
  from etils import epath
  from PIL import Image

  from common import files

  array = np.asarray(array)
  shapes = (2,) if array.dtype == bool else (2, 3)
  if (
    array.dtype not in (np.uint8, bool)
    or array.ndim not in shapes
    or array.shape[2:] not in ((), (3,), (4,))
    or not array.size
  ):
    raise UserError(
      f"{os.fspath(path)}: an array {array.dtype} {list(array.shape)} is no "
      "image: give uint8 [h w], [h w 3] or [h w 4], or bool [h w]"
    )
  values = array * np.uint8(255) if array.dtype == bool else array
  encoded = io.BytesIO()
  Image.fromarray(values).save(encoded, "png")
  target = epath.Path(path)
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    files.replace(target, encoded.getvalue())
  except OSError as error:
    raise UserError(
      f"{os.fspath(path)}: {error.strerror or error}: name a file that can be "
      "written"
    ) from error
