"""Image files that would fill the memory, wait forever or be run: refused.

See `test_images.py` for the limit on pixels itself.
"""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.data.images import read_image

PHOTO = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
HUGE = 60_000  # squared: 10 gigabytes as RGB


def encoded(kind="png", size=(7, 5), **options):
  content = io.BytesIO()
  Image.new("RGB", size).save(content, kind, **options)
  return bytearray(content.getvalue())


def chunk(name, data):
  sums = struct.pack(">I", zlib.crc32(name + data))
  return struct.pack(">I", len(data)) + name + data + sums


def png(*chunks, side=4):
  header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
  pixels = zlib.compress((b"\0" + bytes(3 * 4)) * 4)
  parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels)]
  return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def gif():
  """A screen of 7 x 5 pixels with a frame that is larger than it."""
  content = encoded("gif")
  place = content.index(b"\x2c")
  content[place + 5 : place + 9] = struct.pack("<HH", HUGE, HUGE)
  return content


def jpeg():
  content = encoded("jpeg")
  place = content.index(b"\xff\xc0")
  content[place + 5 : place + 9] = struct.pack(">HH", HUGE, HUGE)
  return content


def bmp():
  content = encoded("bmp")
  content[18:26] = struct.pack("<ii", HUGE, HUGE)
  return content


def webp():
  content = encoded("webp", lossless=True)
  place = content.index(b"VP8L") + 9
  bits = 16383 | 16383 << 14  # the most that it can say: 268 million pixels
  content[place : place + 4] = struct.pack("<I", bits)
  return content


def tiff():
  content = encoded("tiff")
  for tag in (256, 257):  # width and height, as 16 bits
    place = content.index(struct.pack("<HHI", tag, 4, 1))
    content[place + 8 : place + 12] = struct.pack("<I", HUGE)
  return content


BOMBS = {
  "png": png(side=HUGE), "gif": gif(), "jpeg": jpeg(), "bmp": bmp(),
  "webp": webp(), "tiff": tiff(), "ppm": b"P6 60000 60000 255\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_of_every_kind(one_line, tmp_path, kind):
  path = tmp_path / f"image.{kind}"
  path.write_bytes(BOMBS[kind])
  line = one_line(read_image, path, key="data.source.max_pixels")
  assert line.startswith(f"{path}: more than twice the 89,478,485 pixels")
  size = 16384**2 if kind == "webp" else HUGE**2
  assert f"Image size ({size} pixels)" in line
  assert line.endswith(": scale it down, or raise data.source.max_pixels")


def test_a_limit_of_ones_own(one_line, tmp_path):
  line = one_line(
    read_image,
    bytes(encoded()),
    name="a.png",
    max_pixels=34,
    key="data.source.max_pixels",
    remedy="remove it",
  )
  assert line == (
    "a.png: more than data.source.max_pixels=34: Image size (35 pixels): "
    "scale it down, or raise data.source.max_pixels"
  )


BOMB = zlib.compress(bytes(2**22), 9)


@pytest.mark.parametrize(
  "content",
  [
    png(chunk(b"zTXt", b"Comment\0\0" + BOMB)),
    png(chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB)),
    png(chunk(b"iCCP", b"ICC\0\0" + BOMB)),
  ],
  ids=["text", "international", "profile"],
)
def test_what_stands_beside_the_pixels_is_not_unpacked_without_end(
  one_line, content
):
  assert len(content) < 2**14
  line = one_line(read_image, content)
  assert "Decompressed data too large" in line
  assert line.endswith(": mend or replace the image")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshow\n"


@pytest.mark.parametrize(
  "content", [EPS, b"%PDF-1.4\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_what_is_drawn_by_a_program_is_no_image(one_line, tmp_path, content):
  """Pillow would hand an EPS file to Ghostscript."""
  path = tmp_path / "photo.jpg"
  path.write_bytes(content)
  assert "no image of a kind that is read (BMP," in one_line(read_image, path)


def test_devices_and_pipes_are_not_read(one_line, tmp_path):
  """They never end, or never begin."""
  os.mkfifo(tmp_path / "pipe.png")
  (tmp_path / "zero.png").symlink_to("/dev/zero")
  for name in ("pipe.png", "zero.png"):
    line = one_line(read_image, tmp_path / name)
    assert line == (
      f"{tmp_path}/{name}: no file but a device or a pipe: mend or replace the "
      "image"
    )


def test_a_file_of_more_bytes_than_an_image_needs(one_line, tmp_path):
  path = tmp_path / "image.png"
  path.write_bytes(encoded())
  os.truncate(path, 2**40)  # with holes: it takes no room on the disk
  line = one_line(read_image, path)
  assert line.startswith(f"{path}: 1,099,511,627,776 bytes, more than 2,863,")
  assert line.endswith(": scale it down, or raise max_pixels")
  os.truncate(path, 2**20)
  assert read_image(path).shape == (5, 7, 3)
