import io
import os
import pathlib
import struct
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from common.data.folders import Inside
from common.data.images import ENDINGS, image_files, read_image, write_png
from common.errors import UserError

PHOTO = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
RAMP = np.linspace(0, 65535, 30).astype(np.uint16).reshape(5, 6)


def encoded(array, kind="png", *, mode=None, **options):
  image = Image.fromarray(array)
  content = io.BytesIO()
  (image.convert(mode) if mode else image).save(content, kind, **options)
  return content.getvalue()


def grey(values):
  return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def test_a_path_bytes_and_open_files(tmp_path):
  path = tmp_path / "photo.png"
  path.write_bytes(encoded(PHOTO))
  for source in (
    path,
    str(path),
    path.read_bytes(),
    io.BytesIO(encoded(PHOTO)),
  ):
    image = read_image(source)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, PHOTO)
  with path.open("rb") as file:
    np.testing.assert_array_equal(read_image(file), PHOTO)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P"])
def test_grey_and_palettes_become_rgb(mode):
  values = np.array([[0, 255, 255], [255, 0, 0]], np.uint8)
  image = read_image(encoded(values, mode=mode))
  np.testing.assert_array_equal(image, grey(values))


def test_colours_of_a_palette_are_kept():
  colours = np.array([[[255, 0, 0], [0, 0, 255], [10, 200, 30]]], np.uint8)
  palette = Image.fromarray(colours).quantize(3)
  content = io.BytesIO()
  palette.save(content, "png", transparency=b"\0\1\2")
  np.testing.assert_array_equal(read_image(content.getvalue()), colours)


def test_transparency_is_dropped():
  """As `convert("RGB")` does, which users of segment-anything call."""
  alpha = np.arange(35, dtype=np.uint8).reshape(5, 7, 1)
  image = read_image(encoded(np.concatenate([PHOTO, alpha], axis=-1)))
  np.testing.assert_array_equal(image, PHOTO)


def test_cmyk_becomes_rgb():
  ink = np.zeros((4, 4, 4), np.uint8)
  ink[..., 1:3] = 255  # magenta and yellow
  content = io.BytesIO()
  Image.frombytes("CMYK", (4, 4), ink.tobytes()).save(content, "tiff")
  red = np.broadcast_to(np.uint8([255, 0, 0]), (4, 4, 3))
  np.testing.assert_array_equal(read_image(content.getvalue()), red)


def png_of_16_bits(values):
  """An RGB PNG of 16 bits a channel, which Pillow reads but cannot write."""

  def chunk(name, data):
    sums = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + sums

  h, w, _ = values.shape
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  header = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + b"".join([
    chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)),
    chunk(b"IEND", b""),
  ])  # fmt: skip


@pytest.mark.parametrize(
  ("content", "expected"),
  [
    (encoded(RAMP), grey(RAMP >> 8)),  # I;16
    (encoded(RAMP, "tiff"), grey(RAMP >> 8)),
    (encoded(RAMP.astype(">u2"), "tiff"), grey(RAMP >> 8)),  # I;16B
    (encoded(RAMP.astype(np.int32), "ppm"), grey(RAMP >> 8)),  # I
    (png_of_16_bits(grey(RAMP)), grey(RAMP >> 8)),
    (
      encoded(np.array([[0, 0.1, 0.5, 1]], np.float32), "tiff"),  # F
      grey([[0, 26, 128, 255]]),
    ),
  ],
  ids=["png", "tiff", "big-endian", "pgm", "rgb", "float"],
)
def test_deep_images_are_scaled_to_8_bits(content, expected):
  """Pillow's own `convert` cuts values at 255: all but the darkest white."""
  image = read_image(content)
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    (np.array([[0, 70000]], np.int32), "int32 values from 0 to 70000 where 0 "
     "to 65,535 are known"),
    (np.array([[-1, 0]], np.int32), "int32 values from -1 to 0"),
    (np.array([[0, 255]], np.float32), "float32 values from 0 to 255 where 0 "
     "to 1 are known"),
    (np.array([[0, np.nan]], np.float32), "float32 values from nan to nan"),
  ],
)  # fmt: skip
def test_numbers_without_a_known_range_are_refused(one_line, values, expected):
  assert expected in one_line(read_image, encoded(values, "tiff"))


TURNS = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_as_exif_says(kind, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  content = encoded(PHOTO, kind, exif=exif)
  np.testing.assert_array_equal(read_image(content), TURNS[orientation](PHOTO))


def test_turned_images_of_16_bits_and_untouched_ones():
  exif = Image.Exif()
  exif[0x0112] = 6
  content = encoded(RAMP, exif=exif)
  turned = grey(np.rot90(RAMP >> 8, -1))
  np.testing.assert_array_equal(read_image(content), turned)
  np.testing.assert_array_equal(
    read_image(content, upright=False), grey(RAMP >> 8)
  )


def test_broken_exif_says_so(one_line):
  content = encoded(PHOTO, exif=b"Exif\0\0no tags")
  assert "its EXIF data cannot be read" in one_line(read_image, content)
  np.testing.assert_array_equal(read_image(content, upright=False), PHOTO)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_an_animation(kind):
  frames = [Image.new("RGB", (4, 3), (i, i, i)) for i in (0, 255, 0)]
  content = io.BytesIO()
  options = {"lossless": True} if kind == "webp" else {}
  frames[0].save(
    content, kind, save_all=True, append_images=frames[1:], **options
  )
  image = read_image(content.getvalue())
  np.testing.assert_array_equal(image, np.zeros((3, 4, 3), np.uint8))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_thin_images(size):
  image = np.full((*size, 3), 7, np.uint8)
  np.testing.assert_array_equal(read_image(encoded(image)), image)


NOISE = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)


def halved(kind):
  content = encoded(NOISE, kind)
  return content[: len(content) // 2]


def flipped(content, place):
  return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


def without_width():
  content = encoded(PHOTO)
  header = b"IHDR" + bytes(4) + content[20:29]
  return content[:12] + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"", "an empty file, no image"),
    (b"no image", "no image of a kind that is read"),
    (b"<html>" * 100, "no image of a kind that is read"),
    (encoded(PHOTO)[:8], "no image of a kind that is read"),
    (halved("jpeg"), "image file is truncated"),
    (halved("png"), "image file is truncated"),
    (halved("tiff"), ""),
    (halved("webp"), ""),
    (halved("bmp"), "image file is truncated"),
    (flipped(encoded(NOISE), 60), "broken data stream"),
    (without_width(), "no image of a kind that is read"),
  ],
  ids=[
    "empty",
    "text",
    "html",
    "signature",
    "jpeg",
    "png",
    "tiff",
    "webp",
    "bmp",
    "flipped",
    "no-width",
  ],
)
def test_broken_images_are_one_line(one_line, tmp_path, content, reason):
  path = tmp_path / "image.jpg"
  path.write_bytes(content)
  message = one_line(read_image, path)
  assert message.startswith(f"{path}: ")
  assert reason in message
  assert message.endswith(": mend or replace the image")


@pytest.mark.parametrize(
  ("make", "reason"),
  [
    (lambda path: None, "No such file or directory"),
    (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    (lambda path: path.mkdir(), "Is a directory"),
  ],
)
def test_what_is_no_file_is_one_line(one_line, tmp_path, make, reason):
  path = tmp_path / "image.png"
  make(path)
  assert one_line(read_image, path) == (
    f"{path}: {reason}: name an image file that can be read"
  )


def test_messages_name_the_image(one_line, tmp_path):
  path = tmp_path / "bad.png"
  path.write_bytes(b"no image")
  assert one_line(read_image, b"x").startswith("the image: no image")
  assert one_line(read_image, io.BytesIO(b"x")).startswith("the image: no")
  assert one_line(read_image, b"x", name="photo 7").startswith("photo 7: no")
  assert one_line(read_image, path, name="photo 7").startswith("photo 7: no")
  with path.open("rb") as file:
    assert one_line(read_image, file).startswith(f"{path}: no image")
  assert one_line(read_image, "").startswith("'': No such file")
  message = one_line(read_image, path, remedy="buy another")
  assert message.endswith("JPEG2000, PNG, PPM, TIFF, WEBP): buy another")


def test_cut_images_are_read_as_far_as_they_go_where_that_is_wanted(one_line):
  content = halved("png")
  for _ in range(2):  # One choice does not outlive its call.
    image = read_image(content, allow_truncated=True)
    np.testing.assert_array_equal(image[:20], NOISE[:20])
    assert "truncated" in one_line(read_image, content)


@pytest.fixture
def small_limit(monkeypatch):
  """Pillow warns above 1,000 pixels and raises above 2,000."""
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)


SIZES = [(40, 25), (41, 25), (50, 40), (41, 49), (60, 50)]
BOMBS = [encoded(np.zeros((w, h, 3), np.uint8)) for h, w in SIZES]
HUGE = b"P6 99999 99999 255\n"  # 30 gigabytes if it were decoded


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("content", BOMBS[:3], ids=map(str, SIZES[:3]))
def test_images_below_the_limit_are_read_without_a_warning(content):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    image = read_image(content)
  assert not caught
  assert (image == 0).all()


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("content", BOMBS[3:], ids=map(str, SIZES[3:]))
def test_images_above_the_limit_are_one_line(one_line, content):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    message = one_line(read_image, content, name="big.png")
  assert not caught
  assert message.startswith(
    "big.png: more than twice the 1,000 pixels that Pillow takes for safe: "
    "Image size ("
  )
  assert message.endswith(": scale it down, or raise max_pixels")


def test_a_bomb_is_refused_before_it_is_decoded(one_line):
  message = one_line(read_image, HUGE)
  assert "more than twice the 89,478,485 pixels" in message
  assert "Image size (9999800001 pixels)" in message


@pytest.mark.parametrize(("max_pixels", "fits"), [(2009, True), (2008, False)])
def test_the_limit_can_be_lowered_and_raised(
  one_line, monkeypatch, max_pixels, fits
):
  for limit in (100, 10**6):  # Pillow's own
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if fits:
      assert read_image(BOMBS[3], max_pixels=max_pixels).shape == (49, 41, 3)
    else:
      message = one_line(read_image, BOMBS[3], max_pixels=max_pixels)
      assert "more than max_pixels=2,008: Image size (2009 pixels)" in message
    assert limit == Image.MAX_IMAGE_PIXELS


def test_without_pillows_limit_there_is_none(monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
  assert read_image(BOMBS[4]).shape == (50, 60, 3)


def test_threads_with_limits_of_their_own(monkeypatch):
  """None reads with another's limit, and Pillow's is there at the end."""
  before, wrong, image_open = Image.MAX_IMAGE_PIXELS, [], Image.open

  def slow(file, **settings):
    time.sleep(0.001)
    return image_open(file, **settings)

  monkeypatch.setattr(Image, "open", slow)

  def read(max_pixels, fits):
    for _ in range(10):
      try:
        read_image(BOMBS[3], max_pixels=max_pixels)
      except UserError:
        wrong.extend([max_pixels] if fits else [])
      else:
        wrong.extend([] if fits else [max_pixels])

  cases = [(None, True), (2009, True), (2008, False), (10**6, True)]
  threads = [threading.Thread(target=read, args=case) for case in cases]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
  assert before == Image.MAX_IMAGE_PIXELS


def tree(root):
  names = ("b.JPG", "a.png", "Z.jpeg", "sub/c.png", "sub/deep/e.tif",
           "sub.x/d.bmp", "10.webp", "notes.txt", ".hidden.png",
           ".thumbnails/a.png")  # fmt: skip
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b"")
  return root


def test_image_files_are_sorted_folder_by_folder(tmp_path):
  root = tree(tmp_path / "photos")
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "elsewhere/f.ppm").write_bytes(b"")
  (root / "linked").symlink_to(tmp_path / "elsewhere")
  inside = Inside(str(root), follow_links=True)
  own = ["10.webp", "Z.jpeg", "a.png", "b.JPG"]
  below = ["linked/f.ppm", "sub/c.png", "sub.x/d.bmp", "sub/deep/e.tif"]
  for folder in (root, str(root)):
    assert image_files(folder, inside=inside) == [
      f"{root}/{name}" for name in own + below
    ]
    assert image_files(folder, recursive=False) == [
      f"{root}/{name}" for name in own
    ]


def test_files_are_read_by_the_names_that_the_list_gives(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write_png("photos/a.png", PHOTO)
  (name,) = image_files("photos")
  np.testing.assert_array_equal(read_image(name), PHOTO)


def test_every_ending_is_an_image_that_can_be_read(tmp_path):
  for ending in ENDINGS:
    Image.fromarray(PHOTO).save(tmp_path / f"image{ending}")
  assert len(image_files(tmp_path)) == len(ENDINGS)
  for path in image_files(tmp_path):
    assert read_image(path).shape == PHOTO.shape


@pytest.mark.parametrize("recursive", [True, False])
def test_a_folder_that_cannot_be_read_is_one_line(
  one_line, tmp_path, recursive
):
  missing = tmp_path / "missing"
  message = one_line(image_files, missing, recursive=recursive)
  assert message.startswith(f"{missing}: No such file or directory: name a")
  missing.write_text("a file")
  message = one_line(image_files, missing, recursive=recursive)
  assert message.startswith(f"{missing}: Not a directory: name a folder")


def test_a_folder_below_that_cannot_be_read_is_not_passed_over(
  one_line, tmp_path, monkeypatch
):
  tree(tmp_path)
  scan = os.scandir

  def refusing(path):
    if pathlib.Path(path).name == "deep":
      raise PermissionError(13, "Permission denied", str(path))
    return scan(path)

  monkeypatch.setattr(os, "scandir", refusing)
  message = one_line(image_files, tmp_path)
  assert message.startswith(f"{tmp_path}/sub/deep: Permission denied: name")


@pytest.mark.parametrize(
  ("array", "mode"),
  [
    (PHOTO, "RGB"),
    (PHOTO[..., 0], "L"),
    (np.concatenate([PHOTO, PHOTO[..., :1]], axis=-1), "RGBA"),
    (PHOTO[::-1, ::2], "RGB"),  # not contiguous
  ],
)
def test_png_files_hold_what_was_written(tmp_path, array, mode):
  path = tmp_path / "new/folder/image.png"
  for _ in range(2):  # the second replaces the first
    write_png(path, array)
  with Image.open(path) as image:
    assert (image.format, image.mode) == ("PNG", mode)
    np.testing.assert_array_equal(image, array)
  assert [file.name for file in path.parent.iterdir()] == ["image.png"]


def test_masks_are_written_black_and_white(tmp_path):
  mask = PHOTO[..., 0] > 99
  write_png(tmp_path / "mask.png", mask)
  np.testing.assert_array_equal(
    read_image(tmp_path / "mask.png"), grey(np.where(mask, 255, 0))
  )


@pytest.mark.parametrize(
  ("array", "found"),
  [
    (np.zeros((4, 5), np.float32), "float32 [4, 5]"),
    (np.zeros((4, 5, 2), np.uint8), "uint8 [4, 5, 2]"),
    (np.zeros((4, 5, 3), bool), "bool [4, 5, 3]"),
    (np.zeros((2, 4, 5, 3), np.uint8), "uint8 [2, 4, 5, 3]"),
    (np.zeros((0, 5), np.uint8), "uint8 [0, 5]"),
    (np.zeros(5, np.uint8), "uint8 [5]"),
  ],
)
def test_what_is_no_image_is_not_written(one_line, tmp_path, array, found):
  path = tmp_path / "image.png"
  message = one_line(write_png, path, array)
  assert message.startswith(f"{path}: an array {found} is no image: give uint8")
  assert not path.exists()


def test_a_place_that_cannot_be_written_is_one_line(one_line, tmp_path):
  (tmp_path / "file").write_text("no folder")
  path = tmp_path / "file/image.png"
  message = one_line(write_png, path, PHOTO)
  assert message.startswith(f"{path}: ")
  assert message.endswith(": name a file that can be written")


def test_strict_reading_is_pillows_default():
  read_image(encoded(PHOTO))
  assert ImageFile.LOAD_TRUNCATED_IMAGES is False
