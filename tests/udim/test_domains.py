import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from common.errors import UserError
from udim.domains import (
  LOADERS,
  ArrayExamples,
  Domain,
  DomainSet,
  RecordExamples,
  load_domains,
  tfds_records,
)

PIXEL = np.arange(5, dtype=np.uint8)[:, None, None, None]


def domain(name="a", count=5):
  labels = np.arange(count) % 2
  return Domain(name, ArrayExamples(PIXEL[:count], labels))


def domain_set(*names, **settings):
  return DomainSet(
    name="set",
    classes=("x", "y"),
    domains=tuple(map(domain, names)),
    **settings,
  )


def pixels(sequence):
  return [int(example["image"].item()) for example in sequence]


def test_a_domain_is_a_sequence_of_images_and_labels():
  d = domain()
  assert len(d) == 5
  assert d[3]["image"].shape == (1, 1, 1)
  assert (d[3]["image"].item(), d[3]["label"]) == (3, 1)
  assert isinstance(d[3]["label"], int)
  assert pixels(d) == [0, 1, 2, 3, 4]
  with pytest.raises(IndexError, match="image 5 of the 5 of domain 'a'"):
    d[5]


def test_a_selection_of_a_selection():
  part = domain().select([4, 0, 2])
  assert pixels(part) == [4, 0, 2]
  assert pixels(part.select([2, 0])) == [2, 4]
  assert pixels(part.select([])) == []
  images, labels = part.arrays(np.array([1, 2]))
  assert images.ravel().tolist() == [0, 2]
  assert labels.tolist() == [0, 0]


def test_records_of_other_shapes():
  records = [{"picture": PIXEL[2], "y": np.int64(1), "more": b""}]
  examples = RecordExamples(records, "r", "picture", "y")
  d = Domain("d", examples)
  assert (d[0]["image"].item(), d[0]["label"]) == (2, 1)
  assert d.arrays(np.array([0])) is None
  wrong = RecordExamples(records, "r", "picturre", "y")
  with pytest.raises(UserError, match=r"'picturre'; did you mean 'picture'"):
    wrong[0]


def test_a_domain_set_by_name():
  data = domain_set("a", "b")
  assert data.names == data.sources == ("a", "b")
  assert data["b"] is data.domains[1]
  assert data.index("b") == 1
  assert domain_set("a", "b", sources=("b",)).sources == ("b",)
  with pytest.raises(UserError, match=r"no domain 'photos'.*'photo'"):
    domain_set("photo", "sketch").index("photos")


@pytest.mark.parametrize(
  ("domains", "message"),
  [
    ((), "'set' has no domain"),
    ((domain("a"), domain("b", 0)), "domain 'b' of 'set' is empty"),
    ((domain("a"), domain("a")), "two domains 'a'"),
  ],
)
def test_domain_sets_that_make_no_sense(domains, message):
  with pytest.raises(UserError, match=message):
    DomainSet(name="set", classes=("x",), domains=domains)


def test_facts_tell_when_the_data_changed():
  facts = domain_set("a", "b").facts()
  assert facts["images"] == {"a": 5, "b": 5}
  assert (facts["data_set"], facts["num_classes"]) == ("set", 2)
  assert facts == domain_set("a", "b").facts()
  others = [
    domain_set("a", "c"),
    DomainSet(name="set", classes=("x", "z"), domains=(domain("a"),)),
    DomainSet(
      name="set",
      classes=("x", "y"),
      domains=(Domain("a", ArrayExamples(PIXEL + 1, np.arange(5) % 2)),),
    ),
  ]
  hashes = {facts["data_hash"], *(o.facts()["data_hash"] for o in others)}
  assert len(hashes) == 4


def test_an_unknown_kind_is_named_with_the_known_ones():
  with pytest.raises(UserError) as caught:
    load_domains(ConfigDict({"kind": "digits"}))
  assert "data.source.kind='digits'" in str(caught.value)
  assert all(kind in str(caught.value) for kind in LOADERS)


@pytest.mark.parametrize("kind", LOADERS)
def test_every_kind_has_its_loader_and_its_description(kind):
  import importlib

  module, function = LOADERS[kind]
  assert callable(getattr(importlib.import_module(module), function))
  assert f"      {kind}: " in load_domains.__doc__


# In another process, where TFDS's own warnings are no errors. The data sets are
# written without TensorFlow, as `download_and_prepare` writes them.
TFDS = """
import io
import sys
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image
from common.errors import UserError
from udim.domains import load_domains, tfds_records

folder = sys.argv[1]
tfds.disable_progress_bar()

def prepare(name, splits, configs=("",), classes=10, version="1.0.0"):
  def infos(self):
    features = tfds.features.FeaturesDict(
      {"image": tfds.features.Image(shape=(32, 32, 3)),
       "label": tfds.features.ClassLabel(num_classes=classes)})
    return tfds.core.DatasetInfo(builder=self, features=features)
  def examples(self, split):
    where = self.builder_config.name if self.builder_config else name
    value = len(where) + len(split)
    for i in range(splits[split]):
      png = io.BytesIO()  # An array would need TensorFlow.
      Image.new("RGB", (32, 32), (value,) * 3).save(png, "png")
      png.seek(0 if name != "broken" else 9)
      yield i, {"image": png, "label": i % classes}
  body = {
    "VERSION": tfds.core.Version(version), "_info": infos, "name": name,
    "_generate_examples": examples,
    "_split_generators": lambda self, dl: {s: self._generate_examples(s)
                                           for s in splits},
    "BUILDER_CONFIGS": [tfds.core.BuilderConfig(name=c) for c in configs if c],
  }
  with tfds.core.registered.skip_registration():
    made = type(name, (tfds.core.GeneratorBasedBuilder,), body)
  for config in configs:
    made(data_dir=folder, file_format="array_record",
         config=config or None).download_and_prepare()

def message(function, *arguments):
  try:
    function(*arguments)
  except UserError as error:
    assert "\\n" not in str(error), error
    return str(error)
  raise AssertionError("no error")

prepare("cifar10", {"train": 6, "test": 4}, version="3.0.2")
names = ("fog_2", "frosted_glass_blur_2")
prepare("cifar10_corrupted", {"test": 4}, configs=names)
cfg = ConfigDict({"kind": "cifar10c", "data_dir": folder, "severities": (2,),
                  "corruptions": ("fog", "glass_blur")})
data = load_domains(cfg)
assert data.names == ("train", "test", "fog_2", "glass_blur_2"), data.names
assert [len(d) for d in data.domains] == [6, 4, 4, 4]
assert [d[3]["image"].max() for d in data.domains] == [12, 11, 9, 24]
labels = [sorted(e["label"] for e in d) for d in data.domains]
assert labels == [list(range(len(d))) for d in data.domains]
assert len(data.classes) == 10 and data.facts()["data_hash"]

cfg.severities = (3,)
lost = message(load_domains, cfg)
assert "cifar10_corrupted/fog_3" in lost, lost
assert "download_and_prepare()" in lost, lost
bare = message(tfds_records, "cifar10_corrupted", "test")
assert "has 95 configs: name one" in bare, bare

prepare("first", {"train": 2}, classes=3)
prepare("second", {"train": 2}, classes=3)
prepare("third", {"train": 2}, classes=4)
both = ConfigDict({"kind": "tfds", "names": ("first", "second"),
                   "split": "train", "data_dir": folder})
data = load_domains(both)
assert (data.names, data.classes) == (("first", "second"), ("0", "1", "2"))
both.names = ("first", "third")
differs = message(load_domains, both)
assert "first: 3, third: 4" in differs, differs
both.split = "dev"
assert "has the splits train" in message(load_domains, both)
prepare("broken", {"train": 2}, classes=3)
both.update({"names": ("broken",), "split": "train"})
broken = message(load_domains, both)
assert broken.startswith("broken[train]: record 0 cannot be decoded"), broken
assert "tensorflow" not in sys.modules
"""


def test_tfds_data_by_names_with_their_configs(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", TFDS, str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("names", [(), "", "cifar10"])
def test_tfds_domains_need_a_sequence_of_names(names):
  cfg = ConfigDict({"kind": "tfds", "names": names, "split": "train"})
  with pytest.raises(UserError, match=r"data.source.names=.*give a sequence"):
    load_domains(cfg)


def test_an_empty_tfds_name_is_refused():
  with pytest.raises(UserError, match=r"needs data.source.name"):
    tfds_records("", "train")


@pytest.mark.parametrize("kind", ["digits_c", "tfds"])
def test_a_path_whose_kind_was_forgotten_is_refused(kind, one_line):
  cfg = ConfigDict({"kind": kind, "path": "PACS", "names": ()})
  assert (
    f"data.source.path='PACS' means nothing to data.source.kind='{kind}': set "
    "data.source.kind to cifar10c or folder"
  ) in one_line(load_domains, cfg)
