"""CIFAR-10 and its corrupted test set CIFAR-10-C, from files or from TFDS.

CIFAR-10-C (Hendrycks & Dietterich, ICLR 2019) is a folder of files such as
`fog.npy`, uint8 [50000, 32, 32, 3]: the 10,000 test images at severity 1, then
at 2 and so on up to 5; `labels.npy` [50000] goes with all of them.
"""

import os
from typing import Any

import numpy as np

from common import numpy_files
from common.config import did_you_mean
from common.errors import UserError
from common.logs import one_line
from udim.corruptions import SEVERITIES
from udim.domains import (
  ArrayExamples,
  Domain,
  DomainSet,
  RecordExamples,
  tfds_records,
)

CLASSES = (
  "airplane", "automobile", "bird", "cat", "deer",
  "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
BENCHMARK = (
  "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur",
  "motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast",
  "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
# Where TFDS calls a corruption otherwise.
TFDS_NAMES = {
  "glass_blur": "frosted_glass_blur",
  "elastic_transform": "elastic",
}


def cifar10c(cfg: Any) -> DomainSet:
  """CIFAR-10 with CIFAR-10-C.

  Domains: `train` (the source), `test` (clean), and `fog_3` and so on.

  Args:
    cfg: [`path`], [`clean_path`], [`data_dir`], [`corruptions`],
      [`severities`]; see `load_domains`.

  Raises:
    UserError: for unknown corruptions or severities, and missing or bad files.
  """
  corruptions = tuple(cfg.get("corruptions", ())) or BENCHMARK
  severities = tuple(cfg.get("severities", SEVERITIES))
  for name in corruptions:
    if name not in BENCHMARK + EXTRA:
      raise UserError(
        f"data.source.corruptions: {name!r} is unknown"
        f"{did_you_mean(name, BENCHMARK + EXTRA)}"
      )
  for severity in severities:
    if severity not in SEVERITIES:
      raise UserError(f"data.source.severities: {severity!r}: choose 1 to 5")
  domains = [Domain(split, _clean(cfg, split)) for split in ("train", "test")]
  for name in corruptions:
    domains += _corrupted(cfg, name, severities)
  return DomainSet(
    name="cifar10c",
    classes=CLASSES,
    domains=tuple(domains),
    sources=("train",),
    references=("test",),
  )


def _clean(cfg: Any, split: str) -> Any:
  path = cfg.get("clean_path", "")
  if not path:
    return _from_tfds(cfg, "cifar10", split)
  folder = os.path.expanduser(path)
  images = os.path.join(folder, f"{split}_images.npy")
  if os.path.exists(images):
    labels = _load(os.path.join(folder, f"{split}_labels.npy"))
    return _examples(_load(images), labels, images)
  names = [f"data_batch_{i}.bin" for i in range(1, 6)]
  files = [
    os.path.join(folder, n)
    for n in (names if split == "train" else ["test_batch.bin"])
  ]
  missing = [file for file in files if not os.path.exists(file)]
  if missing:
    raise UserError(
      f"data.source.clean_path={path!r}: neither {images} nor {missing[0]} is "
      "there: name the folder of CIFAR-10's binary version, or of "
      "train_images.npy, train_labels.npy, test_images.npy, test_labels.npy"
    )
  records = np.concatenate([_binary(file) for file in files])
  planes = records[:, 1:].reshape(-1, 3, 32, 32)
  return _examples(planes.transpose(0, 2, 3, 1), records[:, 0], files[0])


def _binary(file: str) -> np.ndarray:
  """Records of a label and 3 x 32 x 32 values, uint8 [N, 3073]."""
  values = np.fromfile(file, np.uint8)
  if not len(values) or len(values) % 3073:
    raise UserError(
      f"{file}: {len(values)} bytes are no whole number of 3073-byte records: "
      "fetch CIFAR-10's binary version again"
    )
  return values.reshape(-1, 3073)


def _corrupted(
  cfg: Any, name: str, severities: tuple[int, ...]
) -> list[Domain]:
  path = cfg.get("path", "")
  if not path:
    tfds_name = f"cifar10_corrupted/{TFDS_NAMES.get(name, name)}"
    return [
      Domain(f"{name}_{s}", _from_tfds(cfg, f"{tfds_name}_{s}", "test"))
      for s in severities
    ]
  folder = os.path.expanduser(path)
  file = os.path.join(folder, f"{name}.npy")
  every = _examples(
    _load(file), _load(os.path.join(folder, "labels.npy")), file
  )
  size, rest = divmod(len(every), len(SEVERITIES))
  if rest:
    raise UserError(
      f"{file}: {len(every)} images are not five severities of equal size"
    )
  domains = []
  for s in severities:
    rows = slice((s - 1) * size, s * size)
    part = ArrayExamples(every.images[rows], every.labels[rows])
    domains.append(Domain(f"{name}_{s}", part))
  return domains


def _from_tfds(cfg: Any, name: str, split: str) -> RecordExamples:
  records = tfds_records(name, split, data_dir=cfg.get("data_dir", ""))
  return RecordExamples(records, f"{name}[{split}]")


def _load(file: str) -> np.ndarray:
  """A `.npy` file as a memory map."""
  try:
    return numpy_files.map_npy(file)
  except numpy_files.ERRORS as error:
    reason = getattr(error, "strerror", None) or (
      f"no .npy file of an array ({one_line(error)})"
    )
    raise UserError(
      f"{file}: {reason}: data.source.path needs CIFAR-10-C's .npy files, "
      "data.source.clean_path CIFAR-10's"
    ) from error


def _examples(
  images: np.ndarray, labels: np.ndarray, file: str
) -> ArrayExamples:
  if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
    raise UserError(
      f"{file}: expected uint8 [N, 32, 32, 3], found {images.dtype} "
      f"{list(images.shape)}"
    )
  if labels.shape != (len(images),):
    raise UserError(
      f"{file}: {len(images)} images, but labels of shape {list(labels.shape)}"
    )
  labels = np.asarray(labels, np.int32)
  if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
    raise UserError(
      f"{file}: labels from {labels.min()} to {labels.max()}: expected 0 to 9"
    )
  return ArrayExamples(images, labels)
