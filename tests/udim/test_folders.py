import io
import logging
import os

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from udim.domains import load_domains
from udim.folders import read_image

LAYOUTS = {
  "PACS": ("art_painting", "cartoon", "photo", "sketch"),
  "VLCS": ("Caltech101", "LabelMe", "SUN09", "VOC2007"),
  "office_home": ("Art", "Clipart", "Product", "Real World"),
  # Sorted as text.
  "terra_incognita": (
    "location_100", "location_38", "location_43", "location_46",
  ),
  "domain_net": (
    "clipart", "infograph", "painting", "quickdraw", "real", "sketch",
  ),
  "mine": ("day", "night"),
}  # fmt: skip
CLASSES = ("dog", "elephant", "guitar")


def write(path, color=0, *, mode="RGB", size=(6, 5), **options):
  """Writes an image of one grey level."""
  path.parent.mkdir(parents=True, exist_ok=True)
  values = np.full((size[1], size[0]), color, np.uint8)
  Image.fromarray(values).convert(mode).save(path, **options)
  return path


def tree(root, domains=("day", "night"), classes=CLASSES, count=2):
  for i, domain in enumerate(domains):
    for j, name in enumerate(classes):
      for k in range(count):
        write(root / domain / name / f"{k}.png", 40 * i + 10 * j + k)
  return root


def load(path, **settings):
  return load_domains(
    ConfigDict({"kind": "folder", "path": str(path), **settings})
  )


def colors(domain):
  return [
    (int(example["image"].mean()), example["label"]) for example in domain
  ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_domainbeds_layouts_and_the_users_own(tmp_path, name):
  data = load(tree(tmp_path / name, LAYOUTS[name]), duplicates="")
  assert data.name == name
  assert data.names == data.sources == LAYOUTS[name]
  assert data.classes == CLASSES
  for i, domain in enumerate(data.domains):
    assert colors(domain) == [
      (40 * i + 10 * j + k, j) for j in range(3) for k in range(2)
    ]
    assert domain[0]["image"].shape == (5, 6, 3)
    assert domain[0]["image"].dtype == np.uint8


def test_files_come_in_the_order_of_torchvision(tmp_path):
  """`ImageFolder`: for each class the walked folders sorted, then the files."""
  names = ("b.JPG", "a.png", "Z.jpeg", "sub/c.png", "sub.x/d.bmp", "10.webp",
           "9.tiff")  # fmt: skip
  for domain in ("day", "night"):
    for name in names:
      write(tmp_path / domain / "dog" / name)
  for name in ("notes.txt", ".hidden.png", "Thumbs.db"):
    (tmp_path / "day/dog" / name).write_text("no image")
  (tmp_path / ".cache/dog").mkdir(parents=True)
  (tmp_path / "README.txt").write_text("no domain")
  data = load(tmp_path)
  assert data.names == ("day", "night")
  assert data["day"].examples.files == tuple(
    f"day/dog/{name}"
    for name in ("10.webp", "9.tiff", "Z.jpeg", "a.png", "b.JPG",
                 "sub/c.png", "sub.x/d.bmp")
  )  # fmt: skip


@pytest.mark.parametrize(
  ("mode", "options"),
  [
    ("L", {}),
    ("1", {}),
    ("LA", {}),
    ("RGBA", {}),
    ("P", {}),
    ("P", {"transparency": b"\0\1"}),
    ("RGB", {}),
  ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, options):
  path = write(tmp_path / "image.png", 255, mode=mode, **options)
  image = read_image(str(path))
  assert image.shape == (5, 6, 3)
  assert image.dtype == np.uint8
  assert (image == 255).all()


def test_cmyk_and_16_bits_become_rgb(tmp_path):
  cmyk = write(tmp_path / "cmyk.jpg", 100, mode="CMYK")
  assert abs(int(read_image(str(cmyk)).mean()) - 100) < 3  # JPEG is not exact
  deep = np.linspace(0, 65535, 30).astype(np.uint16).reshape(5, 6)
  Image.fromarray(deep).save(tmp_path / "deep.png")
  image = read_image(str(tmp_path / "deep.png"))
  np.testing.assert_array_equal(image, (deep // 256)[..., None].repeat(3, 2))


def truncated(path):
  """A JPEG that ends in the middle."""
  noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
  whole = io.BytesIO()
  Image.fromarray(noise).save(whole, "jpeg")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
  return np.asarray(Image.open(whole))


def test_a_truncated_jpeg_is_read_as_far_as_it_goes(tmp_path):
  whole = truncated(tmp_path / "cut.jpg")
  image = read_image(str(tmp_path / "cut.jpg"))
  assert image.shape == (64, 64, 3)
  # The colours of row 15 mix with those of the next blocks.
  np.testing.assert_array_equal(image[:15], whole[:15])


def broken_png(path):
  whole = io.BytesIO()
  Image.new("RGB", (64, 64)).save(whole, "png")
  path.write_bytes(whole.getvalue()[:20])


UNREADABLE = [
  (
    lambda path: path.write_bytes(b"no image"),
    "no image of a kind that is read",
  ),
  (lambda path: path.write_bytes(b""), "an empty file, no image"),
  (lambda path: path.symlink_to("nowhere"), "No such file"),
  (lambda path: path.mkdir(), "Is a directory"),
  (broken_png, ""),
]


@pytest.mark.parametrize(("make", "reason"), UNREADABLE)
def test_an_unreadable_image_names_itself_and_the_switch(
  one_line, tmp_path, make, reason
):
  path = tmp_path / "image.png"
  make(path)
  message = one_line(read_image, str(path))
  assert message.startswith(f"{path}: ")
  assert reason in message
  assert "data.source.unreadable='skip'" in message


def test_an_image_bomb_is_one_line(one_line, tmp_path, monkeypatch):
  path = write(tmp_path / "big.png", size=(60, 50))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  message = one_line(read_image, str(path))
  assert message.startswith(f"{path}: more than twice the 1,000 pixels")


def test_unreadable_images_are_skipped_counted_and_named(
  one_line, tmp_path, caplog
):
  tree(tmp_path)
  (tmp_path / "day/dog/0.png").write_bytes(b"no image")
  (tmp_path / "night/guitar/1.png").write_bytes(b"")
  truncated(tmp_path / "night/guitar/2.jpg")  # tolerated, as DomainBed does
  data = load(tmp_path)  # Reading says what is wrong, not before.
  message = one_line(lambda: list(data["day"]))
  assert str(tmp_path / "day/dog/0.png") in message
  with caplog.at_level(logging.WARNING):
    data = load(tmp_path, unreadable="skip", threads=2)
  assert data.skipped == ("day/dog/0.png", "night/guitar/1.png")
  assert data.facts()["skipped_images"] == 2
  assert data.facts()["skipped_files"] == list(data.skipped)
  assert [len(domain) for domain in data.domains] == [5, 6]
  assert len(list(data["day"])) == 5
  assert "left out 2 of 13 images" in caplog.text
  assert "day/dog/0.png, night/guitar/1.png" in caplog.text


def test_skipping_may_not_empty_a_class(one_line, tmp_path):
  tree(tmp_path, count=1)
  (tmp_path / "day/dog/0.png").write_bytes(b"no image")
  message = one_line(load, tmp_path, unreadable="skip")
  assert "no image in day/dog" in message


def test_a_domain_of_one_image(tmp_path):
  tree(tmp_path, classes=("dog",), count=1)
  data = load(tmp_path)
  assert [len(domain) for domain in data.domains] == [1, 1]
  assert colors(data["night"]) == [(40, 0)]


def test_domains_with_other_classes_are_told_apart(one_line, tmp_path):
  tree(tmp_path)
  write(tmp_path / "night/horse/0.png")
  os.rename(tmp_path / "day/dog", tmp_path / "day/dogs")
  message = one_line(load, tmp_path)
  assert "the domains differ in their classes" in message
  assert "'day' lacks 'dog', 'horse'; 'night' lacks 'dogs'" in message


@pytest.mark.parametrize(
  ("make", "expected"),
  [
    (lambda root: None, "No such file or directory: data.source.path"),
    (lambda root: root.write_text(""), "Not a directory: data.source.path"),
    (lambda root: root.mkdir(), "holds no domain folder"),
    (lambda root: (root / "day").mkdir(parents=True), "day holds no class"),
    (
      lambda root: (
        (tree(root) / "day/zebra").mkdir() or (root / "night/zebra").mkdir()
      ),
      "no image in day/zebra, night/zebra (known endings: .jpg,",
    ),
    (lambda root: tree(root / "PACS"), "name the data set's own folder"),
  ],
)
def test_bad_folders_are_one_line(one_line, tmp_path, make, expected):
  root = tmp_path / "data"
  make(root)
  message = one_line(load, root)
  assert str(root) in message
  assert expected in message


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    ({"path": ""}, "data.source.path is empty"),
    ({"unreadable": "ignore"}, "'ignore': choose 'error' or 'skip'"),
    ({"duplicates": "no/such.txt"}, "data.source.duplicates='no/such.txt'"),
  ],
)
def test_bad_settings_are_one_line(one_line, tmp_path, settings, expected):
  tree(tmp_path)
  assert expected in one_line(load, **{"path": tmp_path, **settings})


def test_listed_duplicates_are_left_out(tmp_path, caplog):
  root = tree(tmp_path / "domain_net", LAYOUTS["domain_net"])
  listed = tmp_path / "domain_net_duplicates.txt"
  listed.write_text("real/dog/0.png\nsketch/guitar/1.png \n\ngone/x/y.png\n")
  with caplog.at_level(logging.INFO):
    data = load(root, duplicates=str(listed))
  assert [len(domain) for domain in data.domains] == [6, 6, 6, 6, 5, 5]
  assert "real/dog/0.png" not in data["real"].examples.files
  assert "2 of the 3 images listed" in caplog.text
  assert "comparable" not in caplog.text


@pytest.mark.parametrize(
  ("name", "warns"),
  [("domain_net", True), ("DomainNet", True), ("PACS", False)],
)
def test_domainnet_with_its_duplicates_is_not_comparable(
  tmp_path, caplog, name, warns
):
  tree(tmp_path / name)
  with caplog.at_level(logging.WARNING):
    load(tmp_path / name)
  assert ("comparable with DomainBed's only without" in caplog.text) == warns


def test_the_same_tree_elsewhere_has_the_same_hash(tmp_path):
  def hash_of(root):
    return load(root).facts()["data_hash"]

  one, two = tree(tmp_path / "a/set"), tree(tmp_path / "b/set")
  assert hash_of(one) == hash_of(two)
  write(two / "day/dog/9.png")
  assert hash_of(one) != hash_of(two)


def test_links_out_of_the_data_set_are_refused_unless_they_are_wanted(
  one_line, tmp_path
):
  """A class, a domain, an image: none may come from somewhere else."""
  root = tree(tmp_path / "data")
  elsewhere = tree(tmp_path / "elsewhere")
  image = root / "day" / CLASSES[0] / "9.png"
  for link, target in (
    (image, elsewhere / "day" / CLASSES[0] / "0.png"),
    (root / "dusk", elsewhere / "day"),
  ):
    link.symlink_to(target)
    line = one_line(load, root)
    assert line.startswith(f"{link} leads out of {root}, to {target}")
    assert line.endswith("or set data.source.follow_links=True")
    link.unlink()
  image.symlink_to(elsewhere / "day" / CLASSES[0] / "0.png")
  assert len(load(root, follow_links=True)["day"]) == 2 * len(CLASSES) + 1
  image.unlink()
  (root / "dusk").symlink_to("day")
  assert load(root).names == ("day", "dusk", "night")


def test_the_limit_on_pixels_is_a_setting(one_line, tmp_path):
  root = tree(tmp_path / "data")
  data = load(root, max_pixels=29)
  line = one_line(data["day"].__getitem__, 0)
  assert "more than data.source.max_pixels=29: Image size (30 pixels)" in line
  assert line.endswith("raise data.source.max_pixels")
  assert load(root, max_pixels=30)["day"][0]["image"].shape == (5, 6, 3)
  line = one_line(load, root, max_pixels=29, unreadable="skip")
  assert "no image in" in line
