"""Prepared TFDS data sets that bring code along, or ask the net for some."""

import json
import sys

import pytest
from ml_collections import ConfigDict

from common.data.sources import record_source

OWN = "tensorflow_datasets.core.features.features_dict.FeaturesDict"


def source(name, folder="data"):
  return ConfigDict(
    {"kind": "tfds", "name": name, "split": "train", "data_dir": folder}
  )


@pytest.fixture
def prepare(tmp_path, monkeypatch):
  """`(features)`: a data set in the working directory, with a module in it."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  folder = tmp_path / "data/fake/1.0.0"
  folder.mkdir(parents=True)
  (tmp_path / "data/fake/evil.py").write_text("raise SystemExit('it was run')")
  info = {"name": "fake", "version": "1.0.0", "fileFormat": "array_record"}
  (folder / "dataset_info.json").write_text(json.dumps(info))
  file = folder / "features.json"
  return lambda text: file.write_text(text)


FEATURES = [
  {"pythonClassName": "data.fake.evil.Feature", "featuresDict": {}},
  {"type": "data.fake.evil.Feature", "content": {}},
  {"type": OWN, "content": {}, "proto_cls": "data.fake.evil.Message"},
  {
    "pythonClassName": OWN,
    "featuresDict": {
      "features": {"a": {"pythonClassName": "data.fake.evil.Feature"}}
    },
  },
]


@pytest.mark.parametrize("features", FEATURES)
def test_classes_that_are_not_of_tfds_are_not_imported(
  one_line, prepare, features
):
  prepare(json.dumps(features))
  line = one_line(record_source, source("fake"))
  assert line.startswith("data/fake/1.0.0/features.json asks for 'data.fake.")
  assert line.endswith("could be any code: prepare the data set yourself")
  assert "data.fake.evil" not in sys.modules


@pytest.mark.parametrize("content", ["{", "[" * 10**5])
def test_features_that_are_no_json(one_line, prepare, content):
  prepare(content)
  line = one_line(record_source, source("fake"))
  assert line.startswith("data/fake/1.0.0/features.json: not JSON: ")


def test_classes_of_tfds_are_as_before(one_line, prepare):
  prepare(json.dumps({"pythonClassName": OWN, "featuresDict": {}}))
  assert "asks for" not in one_line(record_source, source("fake"))


@pytest.mark.parametrize(
  "name", ["huggingface:squad", "somebody:data/set:1.0.0"]
)
def test_names_that_stand_for_code_in_the_net(one_line, name):
  line = one_line(record_source, source(name))
  assert line.startswith(f"data.source.name={name!r}: TFDS would fetch what ")
  assert " from the net: prepare the data set" in line
