"""Image data sets in several domains, chosen by a config.

Every kind of data has one shape here: a `DomainSet` of `Domain`s, and a domain
is a sequence of `{"image": [H, W, C] uint8 or float32 in [0, 1], "label": int}`
with random access. Images come as they are stored; `udim.augment` makes them
equal in size and normalises them.
"""

import dataclasses
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.config import check_read, did_you_mean
from common.data.sources import record_source
from common.errors import UserError

Example = dict[str, Any]

# kind -> (module, function): the modules read each other's data lazily.
LOADERS = {
  "digits_c": ("udim.digits", "digits_c"),
  "digits_rot": ("udim.digits", "digits_rot"),
  "digits_color": ("udim.digits", "digits_color"),
  "cifar10c": ("udim.cifar", "cifar10c"),
  "folder": ("udim.folders", "image_folders"),
  "tfds": ("udim.domains", "tfds_domains"),
}
# Keys that say where the data are, by kind.
_PLACES = {
  "cifar10c": ("path", "clean_path", "data_dir"),
  "folder": ("path", "duplicates"),
  "tfds": ("names", "data_dir"),
}

# Images that a fingerprint reads of an array: all of it may be gigabytes.
_SAMPLES = 64


def fingerprint(*parts: Any) -> str:
  """A hash of strings, numbers and arrays."""
  digest = hashlib.blake2b(digest_size=16)
  for part in parts:
    if isinstance(part, np.ndarray):
      digest.update(f"{part.shape}{part.dtype}".encode())
      digest.update(np.ascontiguousarray(part).tobytes())
    else:
      digest.update(f"{part!r};".encode())
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayExamples(Sequence):
  """Examples held in arrays.

  Attributes:
    images: [N, H, W, C] uint8, or float32 in [0, 1]; may be a memory map.
    labels: [N] integers.
  """

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, i: int) -> Example:  # type: ignore[override]
    return {"image": np.asarray(self.images[i]), "label": int(self.labels[i])}

  @property
  def fingerprint(self) -> str:
    """Changes with shape, labels, or some of the images."""
    step = max(1, len(self) // _SAMPLES)
    return fingerprint(
      self.images.shape, np.asarray(self.labels), self.images[::step]
    )


@dataclasses.dataclass(frozen=True, eq=False)
class RecordExamples(Sequence):
  """Examples from records that hold more than an image and a label.

  Attributes:
    records: dicts with random access.
    name: what a fingerprint calls them.
    image_key, label_key: where image and label stand.
  """

  records: Sequence[Any]
  name: str
  image_key: str = "image"
  label_key: str = "label"

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, i: int) -> Example:  # type: ignore[override]
    from PIL.Image import DecompressionBombError

    try:
      record = self.records[i]
    except (OSError, ValueError, DecompressionBombError) as error:
      raise UserError(
        f"{self.name}: record {i} cannot be decoded: "
        f"{str(error).splitlines()[0]}: prepare the data set again"
      ) from error
    for key in (self.image_key, self.label_key):
      if key not in record:
        raise UserError(
          f"{self.name}: no key {key!r}{did_you_mean(key, record)}; set "
          "data.source.image_key and data.source.label_key"
        )
    image = np.asarray(record[self.image_key])
    return {"image": image, "label": int(record[self.label_key])}

  @property
  def fingerprint(self) -> str:
    """Changes with the name and the number of records."""
    return fingerprint(self.name, len(self))


@dataclasses.dataclass(frozen=True, eq=False)
class Domain(Sequence):
  """The images of one domain, or some of them.

  Attributes:
    name: of the domain.
    examples: all of them, with `len`, random access and a `fingerprint`.
    keys: [n] which of them, in which order; None: all.
  """

  name: str
  examples: Any
  keys: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.examples if self.keys is None else self.keys)

  def __getitem__(self, i: int) -> Example:  # type: ignore[override]
    if not -len(self) <= i < len(self):
      raise IndexError(f"image {i} of the {len(self)} of domain {self.name!r}")
    return self.examples[int(self._keys_of(i))]

  def select(self, keys: Sequence[int] | np.ndarray) -> "Domain":
    """The same domain with the images `keys` [n] alone, in their order."""
    keys = np.asarray(keys, np.int64)
    return dataclasses.replace(self, keys=self._keys_of(keys))

  def arrays(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Images [n, H, W, C] and labels [n] at once, where arrays hold them."""
    if not isinstance(self.examples, ArrayExamples):
      return None
    keys = self._keys_of(keys)
    return self.examples.images[keys], self.examples.labels[keys]

  def _keys_of(self, keys: Any) -> Any:
    return keys if self.keys is None else self.keys[keys]


@dataclasses.dataclass(frozen=True, eq=False)
class DomainSet:
  """Domains with the same classes.

  Attributes:
    name: of the data set.
    classes: K names; label k is `classes[k]`.
    domains: D of them; the position is the number that seeds a split.
    sources: names of the domains to train on; () stands for all.
    references: names of domains with held-out images of a source: they are
      reported, and no target.
    validations: name of a domain -> name of the source whose images it holds,
      changed and in the same order. Hyper-parameters may be chosen by those
      that the source holds out; such a domain is no target.
    skipped: files that could not be read and were left out.

  Raises:
    UserError: for no domain, an empty one, or two of the same name.
  """

  name: str
  classes: tuple[str, ...]
  domains: tuple[Domain, ...]
  sources: tuple[str, ...] = ()
  references: tuple[str, ...] = ()
  validations: Mapping[str, str] = dataclasses.field(default_factory=dict)
  skipped: tuple[str, ...] = ()

  def __post_init__(self):
    if not self.domains:
      raise UserError(f"data set {self.name!r} has no domain")
    for i, domain in enumerate(self.domains):
      if not len(domain):
        raise UserError(
          f"domain {domain.name!r} of {self.name!r} is empty: give it images "
          "or remove it"
        )
      if domain.name in self.names[:i]:
        raise UserError(f"{self.name!r} has two domains {domain.name!r}")
    if not self.sources:
      used = (*self.references, *self.validations)
      sources = tuple(name for name in self.names if name not in used)
      object.__setattr__(self, "sources", sources)

  @property
  def names(self) -> tuple[str, ...]:
    """The domains' names, in order."""
    return tuple(domain.name for domain in self.domains)

  def index(self, name: str) -> int:
    """The position of a domain.

    Raises:
      UserError: for an unknown name, with the nearest ones.
    """
    if name not in self.names:
      raise UserError(
        f"{self.name!r} has no domain {name!r}{did_you_mean(name, self.names)}"
      )
    return self.names.index(name)

  def __getitem__(self, name: str) -> Domain:
    return self.domains[self.index(name)]

  def facts(self) -> dict[str, Any]:
    """Names and sizes, and a hash to tell whether the data changed."""
    prints = [domain.examples.fingerprint for domain in self.domains]
    return {
      "data_set": self.name,
      "num_classes": len(self.classes),
      "images": {domain.name: len(domain) for domain in self.domains},
      "skipped_images": len(self.skipped),
      "skipped_files": list(self.skipped),
      "data_hash": fingerprint(self.classes, self.names, *prints),
    }


def load_domains(cfg: Any) -> DomainSet:
  """The data set that a config names.

  Args:
    cfg: `kind`, and what that kind reads; a key in brackets may be missing:
      digits_c: 8x8 digits, 1198 clean to train on, the other 599 clean and
        corrupted. [`seed` 0] of the division and the noise, [`corruptions` ():
        all of `udim.corruptions.FAMILIES`], [`severities` (1, 2, 3, 4, 5)].
      digits_rot: digits at six angles. [`seed` 0].
      digits_color: digits whose colour betrays the label. [`seed` 0].
      cifar10c: CIFAR-10 to train on, CIFAR-10-C. [`path`] of the folder with
        `fog.npy`, `labels.npy` and so on, [`clean_path`] of CIFAR-10's own
        `.bin` files or of `train_images.npy` and so on; "" takes them from
        TFDS, in [`data_dir`]. [`corruptions` (): the 15 of the benchmark],
        [`severities` (1, 2, 3, 4, 5)].
      folder: `path` of a tree domain/class/image, such as DomainBed's PACS.
        [`duplicates` ""]: a file that lists images to leave out, one path a
        line; [`unreadable` "error"]: or "skip"; [`threads` 8]: check images;
        [`max_pixels` 0]: larger images are refused, by default those of more
        than twice what Pillow takes for safe, 179 million; [`follow_links`
        False]: also those that lead out of `path`, which are refused else.
      tfds: prepared TFDS data sets. `names`: one with its config for each
        domain, such as ("domainnet/real", "domainnet/sketch"); `split`,
        [`data_dir` ""], [`image_key` "image"], [`label_key` "label"].

  Size and normalisation are no business of the data set: see
  `udim.augment.make_transform`.

  Raises:
    UserError: for an unknown kind; for a place that the kind does not read; for
      data that is missing or bad, with its place.
  """
  if cfg.kind not in LOADERS:
    raise UserError(
      f"data.source.kind={cfg.kind!r}: choose one of {', '.join(LOADERS)}"
    )
  check_read(cfg, {kind: _PLACES.get(kind, ()) for kind in LOADERS})
  module, function = LOADERS[cfg.kind]
  return getattr(importlib.import_module(module), function)(cfg)


def tfds_records(name: str, split: str, *, data_dir: str = "") -> Any:
  """A prepared TFDS data set with random access.

  Args:
    name: with the config where there are several. The default one is never
      taken: CIFAR-10-C's, for example, is nearly clean.
    split: such as `train` or `test[:100]`.
    data_dir: where it was prepared; "" is TFDS's own default.

  Raises:
    UserError: for a name without config; for data that is not prepared, with
      the command.
  """
  from ml_collections import ConfigDict

  tfds = importlib.import_module("tensorflow_datasets")
  base = name.partition(":")[0]
  if base and "/" not in base:
    try:
      configs = [c.name for c in tfds.builder_cls(base).BUILDER_CONFIGS]
    except (ValueError, ImportError, OSError, AttributeError):
      configs = []  # Opening it says what is wrong, or that it is here.
    if len(configs) > 1:
      raise UserError(
        f"data set {name!r} has {len(configs)} configs: name one, such as "
        f"{base}/{configs[0]}"
      )
  return record_source(
    ConfigDict(
      {"kind": "tfds", "name": name, "split": split, "data_dir": data_dir}
    )
  )


def tfds_domains(cfg: Any) -> DomainSet:
  """One domain for each of `cfg.names`; see `load_domains`."""
  names = cfg.get("names", ())
  if not names or isinstance(names, str):
    raise UserError(
      f"data.source.names={names!r}: give a sequence, a TFDS name for each "
      "domain, such as ('domainnet/real', 'domainnet/sketch')"
    )
  label_key = cfg.get("label_key", "label")
  domains, classes = [], {}
  for name in names:
    records = tfds_records(name, cfg.split, data_dir=cfg.get("data_dir", ""))
    examples = RecordExamples(
      records, f"{name}[{cfg.split}]", cfg.get("image_key", "image"), label_key
    )
    if len(examples):
      examples[0]  # Names a missing key now.
    domains.append(Domain(name, examples))
    feature = records.dataset_info.features[label_key]
    classes[name] = tuple(getattr(feature, "names", None) or ())
  known = set(classes.values())
  if len(known) > 1 or () in known:
    counts = ", ".join(f"{n}: {len(c)}" for n, c in classes.items())
    raise UserError(
      f"data.source.names: {label_key!r} must have the same named classes in "
      f"all of them, but these have {counts}"
    )
  return DomainSet(
    name=names[0].partition("/")[0],
    classes=known.pop(),
    domains=tuple(domains),
  )
