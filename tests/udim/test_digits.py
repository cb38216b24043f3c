import pathlib
import tomllib

import numpy as np
import pytest
from ml_collections import ConfigDict

import udim.digits
from common.errors import UserError
from udim.corruptions import FAMILIES, VALIDATION_FAMILIES, rotate
from udim.digits import ANGLES, load_digits
from udim.domains import load_domains
from udim.splits import make_runs, split_run


def load(kind, **settings):
  return load_domains(ConfigDict({"kind": kind, **settings}))


def arrays(domain):
  images, labels = domain.arrays(np.arange(len(domain)))
  return images, labels


def rows(images):
  """Each image as bytes, to count which are which."""
  return [image.tobytes() for image in images]


def test_the_digits_are_the_ones_of_uci():
  images, labels = load_digits()
  assert images.shape == (1797, 8, 8, 1)
  assert images.dtype == np.float32
  np.testing.assert_array_equal(np.unique(images) * 16, np.arange(17))
  assert np.bincount(labels).tolist() == [
    178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
  ]  # fmt: skip
  assert labels[:10].tolist() == list(range(10))
  # The first rows of the first image.
  assert (images[0, :3, :, 0] * 16).astype(int).tolist() == [
    [0, 0, 5, 13, 9, 1, 0, 0],
    [0, 0, 13, 15, 10, 15, 5, 0],
    [0, 3, 15, 2, 0, 11, 8, 0],
  ]


def test_an_installation_has_the_file():
  root = pathlib.Path(udim.digits.__file__).parents[1]
  project = tomllib.loads((root / "pyproject.toml").read_text())
  patterns = project["tool"]["setuptools"]["package-data"]["udim"]
  assert (root / "udim/assets/digits.npz") in {
    path for pattern in patterns for path in (root / "udim").glob(pattern)
  }


def test_the_file_is_small_and_says_where_it_comes_from():
  folder = pathlib.Path(udim.digits.__file__).parent / "assets"
  assert (folder / "digits.npz").stat().st_size < 50_000
  note = (folder / "README.md").read_text()
  for words in ("Alpaydin", "UCI Machine Learning Repository", "CC BY 4.0"):
    assert words in note


@pytest.mark.parametrize("kind", ["digits_c", "digits_rot", "digits_color"])
def test_everything_follows_from_the_seed(kind):
  def hash_of(**settings):
    return load(kind, **settings).facts()["data_hash"]

  assert hash_of() == hash_of(seed=0) == hash_of(seed=0)
  assert hash_of(seed=1) != hash_of(seed=0)


def test_digits_c_trains_clean_and_tests_corrupted():
  data = load("digits_c")
  assert (data.sources, data.references) == (("clean",), ("clean_test",))
  assert data.classes == tuple("0123456789")
  assert len(data.names) == 2 + 8 * 5 + 3 * 2
  assert data.names[2:8] == (
    "gauss_1", "gauss_2", "gauss_3", "gauss_4", "gauss_5", "impulse_1",
  )  # fmt: skip
  assert {n.rpartition("_")[0] for n in data.names[2:42]} == set(FAMILIES)
  train, train_labels = arrays(data["clean"])
  test, test_labels = arrays(data["clean_test"])
  assert (len(train), len(test)) == (1198, 599)
  every, labels = load_digits()
  assert sorted(rows(train) + rows(test)) == sorted(rows(every))
  assert sorted([*train_labels, *test_labels]) == sorted(labels)
  for name in data.names[2:42]:
    images, labels = arrays(data[name])
    assert images.shape == test.shape
    assert images.dtype == np.float32
    np.testing.assert_array_equal(labels, test_labels)
    assert np.abs(images - test).max() > 0.02, name


def test_digits_c_has_changed_sources_to_choose_settings_by():
  data = load("digits_c")
  train, labels = arrays(data["clean"])
  assert tuple(data.validations) == data.names[42:]
  assert {n.rpartition("_")[0] for n in data.validations} == set(
    VALIDATION_FAMILIES
  )
  assert not set(VALIDATION_FAMILIES) & set(FAMILIES)
  for name, source in data.validations.items():
    assert source == "clean"
    images, same = arrays(data[name])
    np.testing.assert_array_equal(same, labels)
    assert np.abs(images - train).max() > 0.02, name
  # They are nobody's target, and only the source's held-out keys count.
  (run,) = make_runs(data, "chosen")
  assert not set(run.targets) & set(data.validations)
  splits = split_run(data, run)
  held_out = splits.sources[0].holdout.keys
  for part in splits.validations:
    np.testing.assert_array_equal(part.holdout.keys, held_out)


def test_digits_c_can_be_cut_to_some_corruptions():
  data = load("digits_c", corruptions=("blur", "shift"), severities=(3,))
  assert data.names[:4] == ("clean", "clean_test", "blur_3", "shift_3")
  assert data.names[4:] == tuple(data.validations)
  whole = load("digits_c")
  for name in data.names:  # the same images as among all others
    np.testing.assert_array_equal(arrays(data[name])[0], arrays(whole[name])[0])
  for settings in ({"corruptions": ("fog",)}, {"severities": (9,)}):
    with pytest.raises(UserError, match=r"fog|9"):
      load("digits_c", **settings)


def test_digits_rot_deals_the_images_out_to_six_angles():
  data = load("digits_rot")
  assert data.names == ("0", "15", "30", "45", "60", "75")
  assert data.sources == data.names
  assert [len(d) for d in data.domains] == [300, 300, 300, 299, 299, 299]
  upright, upright_labels = arrays(data["0"])
  every, every_labels = load_digits()
  known = dict(zip(rows(every), every_labels, strict=True))
  assert [known[row] for row in rows(upright)] == upright_labels.tolist()
  # Every digit is at one angle, with its label.
  rotated = {
    image.tobytes(): (angle, label)
    for angle in ANGLES
    for image, label in zip(rotate(every, angle), every_labels, strict=True)
  }
  seen = 0
  for angle in ANGLES:
    for row, label in zip(*map(list, arrays(data[str(angle)])), strict=True):
      assert rotated[row.tobytes()] == (angle, label)
      seen += 1
  assert seen == 1797
  counts = sum(np.bincount(arrays(d)[1]) for d in data.domains)
  np.testing.assert_array_equal(counts, np.bincount(every_labels))


def test_digits_color_follows_the_recipe_of_colored_mnist():
  data = load("digits_color")
  assert data.names == ("+90%", "+80%", "-90%")
  assert len(data.classes) == 2
  every, digits = load_digits()
  below = {row: d < 5 for row, d in zip(rows(every), digits, strict=True)}
  for domain, correlation in zip(data.domains, (0.9, 0.8, 0.1), strict=True):
    images, labels = arrays(domain)
    assert images.shape == (599, 8, 8, 2)
    color = images[..., 1].any((1, 2))
    assert (images[..., 0].any((1, 2)) != color).all()  # one channel is black
    # 599 coins: three standard deviations are below 0.06.
    assert abs((color == labels).mean() - correlation) < 0.06
    grey = images.sum(-1, keepdims=True)
    truth = np.array([below[row] for row in rows(grey)])
    assert abs((truth != labels).mean() - 0.25) < 0.06
