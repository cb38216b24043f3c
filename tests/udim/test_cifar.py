import numpy as np
import pytest
from ml_collections import ConfigDict

from common.errors import UserError
from udim.cifar import BENCHMARK, EXTRA, TFDS_NAMES
from udim.domains import load_domains

# Images of each severity here; 10,000 in the real files.
SIZE = 4


def gradient(count, seed=0):
  """Images that no transposed or shifted reading resembles."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def folders(tmp_path):
  """CIFAR-10-C and CIFAR-10 with few images."""
  corrupted, clean = tmp_path / "CIFAR-10-C", tmp_path / "cifar"
  corrupted.mkdir()
  clean.mkdir()
  for i, name in enumerate(BENCHMARK + EXTRA):
    np.save(corrupted / f"{name}.npy", gradient(5 * SIZE, i))
  np.save(corrupted / "labels.npy", np.tile(np.uint8([3, 8, 0, 9]), 5))
  for i, (split, count) in enumerate((("train", 10), ("test", SIZE))):
    np.save(clean / f"{split}_images.npy", gradient(count, 100 + i))
    np.save(clean / f"{split}_labels.npy", np.arange(count) % 10)
  return corrupted, clean


def load(folders, **settings):
  paths = {"path": str(folders[0]), "clean_path": str(folders[1])}
  return load_domains(ConfigDict({"kind": "cifar10c", **paths, **settings}))


def images(domain):
  return domain.arrays(np.arange(len(domain)))[0]


def test_the_names_of_the_corruptions():
  assert (len(BENCHMARK), len(EXTRA)) == (15, 4)
  assert len({*BENCHMARK, *EXTRA}) == 19
  assert TFDS_NAMES == {
    "glass_blur": "frosted_glass_blur",
    "elastic_transform": "elastic",
  }


def test_the_layout_of_the_npy_files(folders):
  data = load(folders)
  assert (data.sources, data.references) == (("train",), ("test",))
  assert data.classes[:2] == ("airplane", "automobile")
  assert len(data.names) == 2 + 15 * 5
  assert data.names[2:4] == ("gaussian_noise_1", "gaussian_noise_2")
  for name in ("gaussian_noise_1", "fog_3", "jpeg_compression_5"):
    corruption, _, severity = name.rpartition("_")
    rows = slice((int(severity) - 1) * SIZE, int(severity) * SIZE)
    file = gradient(5 * SIZE, BENCHMARK.index(corruption))
    np.testing.assert_array_equal(images(data[name]), file[rows])
    assert [example["label"] for example in data[name]] == [3, 8, 0, 9]
  np.testing.assert_array_equal(images(data["train"]), gradient(10, 100))
  np.testing.assert_array_equal(images(data["test"]), gradient(SIZE, 101))
  assert [example["label"] for example in data["train"]] == list(range(10))


def test_the_files_stay_on_the_disk(folders):
  data = load(folders)
  for name in ("train", "fog_3"):
    held = data[name].examples.images
    assert isinstance(held, np.memmap)


def test_some_corruptions_and_severities(folders):
  data = load(folders, corruptions=("spatter", "fog"), severities=(5, 1))
  assert data.names == (
    "train", "test", "spatter_5", "spatter_1", "fog_5", "fog_1",
  )  # fmt: skip


def test_the_binary_version_of_cifar10(folders):
  """Records of a label, then red, green and blue planes row by row."""
  folder = folders[1]
  for file in folder.iterdir():
    file.unlink()
  whole = gradient(10)
  records = np.concatenate(
    [
      np.arange(10, dtype=np.uint8)[:, None],
      whole.transpose(0, 3, 1, 2).reshape(10, -1),
    ],
    axis=1,
  )
  for i in range(5):
    records[2 * i : 2 * i + 2].tofile(folder / f"data_batch_{i + 1}.bin")
  records[:3].tofile(folder / "test_batch.bin")
  data = load(folders, severities=(1,), corruptions=("fog",))
  np.testing.assert_array_equal(images(data["train"]), whole)
  np.testing.assert_array_equal(images(data["test"]), whole[:3])
  assert [example["label"] for example in data["train"]] == list(range(10))


def remove(name):
  return lambda corrupted, clean: (corrupted / name).unlink()


def save(name, array):
  return lambda corrupted, clean: np.save(corrupted / name, array)


def clean_binary(corrupted, clean):
  (clean / "train_images.npy").unlink()
  for i in range(1, 6):
    (clean / f"data_batch_{i}.bin").write_bytes(b"12345")


def cut(corrupted, clean):
  data = (corrupted / "fog.npy").read_bytes()
  (corrupted / "fog.npy").write_bytes(data[:1000])


WHOLE = gradient(5 * SIZE)
BAD = [
  (remove("fog.npy"), "fog.npy: No such file"),
  (remove("labels.npy"), "labels.npy: No such file"),
  (cut, r"fog.npy: no .npy file of an array"),
  (save("fog.npy", np.array([{}])), r"fog.npy: no .npy file of an array"),
  (save("fog.npy", WHOLE.astype(np.float32)), "uint8.*found float32"),
  (save("fog.npy", WHOLE[:, :, :16]), r"found uint8 \[20, 32, 16, 3\]"),
  (save("fog.npy", WHOLE[:19]), r"19 images, but labels of shape \[20\]"),
  (save("labels.npy", np.full(20, 10)), "labels from 10 to 10: expected 0 to"),
  (
    lambda corrupted, clean: (clean / "train_images.npy").unlink(),
    r"clean_path=.*neither .*train_images.npy nor .*data_batch_1.bin",
  ),
  (clean_binary, r"data_batch_1.bin: 5 bytes are no whole number"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_bad_files_are_one_line_with_their_name(folders, spoil, message):
  spoil(*folders)
  with pytest.raises(UserError, match=message) as caught:
    load(folders, corruptions=("fog",))
  assert "\n" not in str(caught.value)


def test_severities_of_unequal_size_are_refused(folders):
  np.save(folders[0] / "fog.npy", WHOLE[:19])
  np.save(folders[0] / "labels.npy", np.zeros(19, int))
  with pytest.raises(UserError, match="19 images are not five severities"):
    load(folders, corruptions=("fog",))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      {"corruptions": ("frosted_glass_blur",)},
      "'frosted_glass_blur' is unknown; did you mean 'glass_blur'",
    ),
    ({"severities": (0,)}, "severities: 0: choose 1 to 5"),
  ],
)
def test_unknown_names_are_refused(folders, settings, message):
  with pytest.raises(UserError, match=message):
    load(folders, **settings)


def test_unprepared_tfds_data_is_one_line_with_the_command(folders, tmp_path):
  with pytest.raises(UserError) as caught:
    load(folders, clean_path="", data_dir=str(tmp_path))
  message = str(caught.value)
  assert "\n" not in message
  assert "'cifar10' is not prepared" in message
  assert "download_and_prepare()" in message
