"""Kept targets: what they are, that they change no run, what is refused."""

import dataclasses
import itertools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.slimsam import get_config
from slimsam import parts
from slimsam import targets as targets_lib
from slimsam.data import TargetExample
from slimsam.encoder import Compute, encode
from slimsam.preprocess import preprocess
from slimsam.run import First, Model, Run
from slimsam.targets import FILE, FOLDER, kept_targets
from slimsam.train import check, original_model, slimmed
from slimsam.weights import save_model

pytestmark = pytest.mark.usefixtures("compile_once")
BEST = "miou/teacher/point/single"
COUNT, SHAPE = 11, (5, 5, 16)


@pytest.fixture(scope="module", autouse=True)
def four_to_a_file():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(targets_lib, "FILE_BYTES", 4 * 5 * 5 * 16 * 4)
    yield


@pytest.fixture(scope="module")
def teacher(tiny, draw, tmp_path_factory):
  """A model of one block, on disk."""
  encoder = dataclasses.replace(
    tiny.encoder, qkv_widths=(24,), mlp_widths=(40,), global_blocks=()
  )
  settings = dataclasses.replace(tiny, encoder=encoder)
  path = tmp_path_factory.mktemp("teacher") / "model"
  save_model(path, draw(settings), settings)
  return path


def config_of(teacher, **distill):
  """Thirteen images, of which slimming sees eleven, on all eight devices."""
  config = get_config("smoke")
  config.compile_cache, config.export = "", ()
  config.teacher.path = str(teacher)
  config.data.source.length = 13
  config.data.source.valid.length = 1
  config.data.images = COUNT
  config.importance.kind = "magnitude"
  config.distill.update({"stages": ("one_step",), "epochs": 3, **distill})
  config.checkpoint.update({"every": 1, "keep": 9})
  config.log.every = 1
  return config


def expected_of(run, model, compute):
  """The embeddings, without any of what is tested."""
  images = [preprocess(run.train[i].image, 40) for i in range(COUNT)]
  made = jax.jit(encode, static_argnums=(2, 3))(
    model.encoder, np.stack(images), model.settings.encoder, compute
  )
  return np.asarray(made.astype(jnp.float32))


@pytest.fixture(scope="module")
def kept(teacher, tmp_path_factory):
  """A run and its targets."""
  run = Run(config_of(teacher), tmp_path_factory.mktemp("run"))
  return run, kept_targets(run, Model.load(teacher))


def test_targets_are_the_embeddings_of_the_images(kept, teacher):
  run, targets = kept
  expected = expected_of(run, Model.load(teacher), Compute())
  np.testing.assert_allclose(list(targets), expected, rtol=1e-5, atol=1e-5)
  names = sorted(file.name for file in (run.folder / FOLDER).iterdir())
  assert names == [f"0000{i}-of-00003.array_record" for i in range(3)] + [FILE]


@pytest.fixture(scope="module")
def halves(teacher, tmp_path_factory):
  """The same in bfloat16."""
  config = config_of(teacher, teacher_dtype="bfloat16")
  run = Run(config, tmp_path_factory.mktemp("halves"))
  return run, kept_targets(run, Model.load(teacher))


def test_a_teacher_in_bfloat16_leaves_bfloat16(halves, teacher):
  run, targets = halves
  assert targets[3].dtype == jnp.bfloat16
  expected = expected_of(run, Model.load(teacher), Compute(jnp.bfloat16))
  found = np.asarray(list(targets), np.float32)
  np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.05)
  # Two bytes a number, and next to nothing around them.
  size = sum(file.stat().st_size for file in (run.folder / FOLDER).iterdir())
  assert size == pytest.approx(COUNT * 5 * 5 * 16 * 2, rel=0.2, abs=2**18)


@pytest.mark.parametrize("settings", [{}, {"threads": 2}, {"workers": 1}])
def test_an_image_comes_with_its_target(halves, settings):
  """Also where other threads or processes read it."""
  run, targets = halves
  run.config.data.update({"threads": 0, "workers": 0, **settings})
  source = First(run.train, COUNT)
  with run.loader(source, TargetExample(40, targets), 8) as loader:
    batches = list(itertools.islice(loader, 2))
  for batch in batches:
    assert batch["targets"].dtype == jnp.bfloat16
    assert batch["targets"].sharding.shard_shape((8, *SHAPE)) == (1, *SHAPE)
    for row, number in enumerate(batch["ids"]):
      np.testing.assert_array_equal(batch["targets"][row], targets[int(number)])
      image = preprocess(source[int(number)].image, 40)
      np.testing.assert_array_equal(batch["images"][row], image)


def lines_of(folder):
  """What training measured, by step."""
  lines = (folder / "one_step" / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return {
    line["step"]: {k: v for k, v in line.items() if k.startswith("train/")}
    for line in found if "train/loss" in line
  }  # fmt: skip


def forbid(monkeypatch):
  """Lets nobody compute targets."""

  def embeddings(*args):
    pytest.fail("targets are computed")
    yield

  monkeypatch.setattr(targets_lib, "_embeddings", embeddings)


def train(config, folder):
  """Slims, but to judge and to draw takes longer than that."""

  def nobody(run, original):
    return lambda encoder, settings: {BEST: 0.5}

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Run, "measure", nobody)
    patch.setattr(parts, "write_report", lambda folder: None)
    (stage,), run = check(config), Run(config, folder)
    original = original_model(run)
    slimmed(run, stage, original, original)


@pytest.fixture(scope="module")
def runs(teacher, tmp_path_factory):
  """The folders of a run with kept targets, and of one without."""
  folders = {}
  for kept in (True, False):
    folders[kept] = tmp_path_factory.mktemp(f"kept_{kept}")
    train(config_of(teacher, cache_targets=kept), folders[kept])
  return folders


def assert_close(ours, theirs):
  assert len(ours) == len(theirs) == 3
  for step, values in theirs.items():
    assert ours[step] == pytest.approx(values, rel=1e-5)


def test_kept_targets_change_no_run(runs):
  assert (runs[True] / FOLDER / FILE).exists()
  assert not (runs[False] / FOLDER).exists()
  assert_close(lines_of(runs[True]), lines_of(runs[False]))


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_goes_on_with_its_targets_or_without(
  runs, teacher, tmp_path, kept, monkeypatch
):
  """After its first update; nothing is computed again."""
  folder = tmp_path / "run"
  shutil.copytree(runs[True], folder)
  shutil.rmtree(folder / "one_step" / "model")
  for step in (2, 3):
    shutil.rmtree(folder / "one_step" / "checkpoints" / f"{step}")
  forbid(monkeypatch)
  train(config_of(teacher, cache_targets=kept), folder)
  ours, theirs = lines_of(folder), lines_of(runs[True])
  assert_close(ours, theirs)
  assert not kept or ours == theirs


def test_what_has_finished_needs_no_targets(runs, teacher, tmp_path):
  """They are the largest files of a run."""
  folder = tmp_path / "run"
  shutil.copytree(runs[True], folder)
  shutil.rmtree(folder / FOLDER)
  train(config_of(teacher, cache_targets=True), folder)
  assert not (folder / FOLDER).exists()


def test_targets_are_written_whole_or_not_at_all(
  teacher, tmp_path, monkeypatch
):
  run, model = Run(config_of(teacher), tmp_path), Model.load(teacher)
  rows = [np.full(SHAPE, i, np.float32) for i in range(COUNT)]

  def broken(*args):
    yield from rows[:7]
    raise KeyboardInterrupt

  monkeypatch.setattr(targets_lib, "_embeddings", broken)
  with pytest.raises(KeyboardInterrupt):
    kept_targets(run, model)
  assert not (tmp_path / FOLDER).exists()
  monkeypatch.setattr(targets_lib, "_embeddings", lambda *args: iter(rows))
  np.testing.assert_array_equal(list(kept_targets(run, model)), rows)
  assert not list(tmp_path.glob(f"{FOLDER}?*"))


def cut(folder, targets):
  del targets
  file = folder / "00001-of-00003.array_record"
  file.write_bytes(file.read_bytes()[:-4000])


def flip(folder, targets):
  """A bit of an embedding, which its checksum shows."""
  file = folder / "00001-of-00003.array_record"
  content = bytearray(file.read_bytes())
  content[content.index(targets[5].tobytes()) + 100] ^= 1
  file.write_bytes(content)


def swap(folder, targets):
  """A file with four embeddings where three are to be."""
  del targets
  shutil.copy(folder / "00000-of-00003.array_record",
              folder / "00002-of-00003.array_record")  # fmt: skip


MISTAKES = [
  (cut, "00001-of-00003.array_record is missing or damaged"),
  (flip, "00001-of-00003.array_record is missing or damaged"),
  (swap, "00002-of-00003.array_record is missing or damaged"),
  (lambda folder, _: (folder / "00000-of-00003.array_record").unlink(),
   "00000-of-00003.array_record is missing or damaged"),
  (lambda folder, _: (folder / FILE).write_text("{"), f"{FILE} is not JSON"),
  (lambda folder, _: (folder / FILE).unlink(), f"{FILE}: No such file"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), MISTAKES)
def test_damage_is_told_in_a_line(
  kept, teacher, tmp_path, one_line, damage, message
):
  shutil.copytree(kept[0].folder / FOLDER, tmp_path / FOLDER)
  damage(tmp_path / FOLDER, kept[1])
  run, model = Run(config_of(teacher), tmp_path), Model.load(teacher)
  said = one_line(lambda: list(kept_targets(run, model)))
  assert message in said
  assert f"delete {tmp_path / FOLDER} to have it made anew" in said


CHANGES = [
  ("data", {"data.source.seed": 1}),
  ("data", {"data.images": 10}),
  ("dtype", {"distill.teacher_dtype": "bfloat16"}),
  ("teacher", {}),
]


@pytest.mark.parametrize(("name", "changes"), CHANGES)
def test_targets_of_something_else_are_refused(
  kept, teacher, tmp_path, one_line, name, changes
):
  shutil.copytree(kept[0].folder / FOLDER, tmp_path / FOLDER)
  config, model = config_of(teacher), Model.load(teacher)
  config.update_from_flattened_dict(changes)
  if not changes:
    model.encoder["pos_embed"][0, 0, 0, 0] += 1e-3
  said = one_line(kept_targets, Run(config, tmp_path), model)
  assert f"{FILE}: {name} is " in said
  assert f"delete {tmp_path / FOLDER}" in said


def test_a_disk_without_room_is_seen_before_work_begins(
  teacher, tmp_path, one_line, monkeypatch
):
  forbid(monkeypatch)
  usage = types.SimpleNamespace(free=1000)
  monkeypatch.setattr(targets_lib.shutil, "disk_usage", lambda path: usage)
  run = Run(config_of(teacher), tmp_path)
  said = one_line(kept_targets, run, Model.load(teacher))
  assert "distill.cache_targets needs 0.0 GB" in said
  assert "make room or set it to False" in said


TWO = """
import pathlib, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from common.config import load_config
from slimsam.data import TargetExample
from slimsam.run import First, Model, Run
from slimsam.targets import kept_targets

folder = pathlib.Path({folder!r})
run = Run(load_config(folder), folder)
targets = kept_targets(run, Model.load(run.config.teacher.path))
source = First(run.train, run.config.data.images)
with run.loader(source, TargetExample(40, targets), 8) as loader:
  batch = next(loader)
ids = [shard.data for shard in batch["ids"].addressable_shards]
rows = [shard.data for shard in batch["targets"].addressable_shards]
assert len(rows) == 2, rows
for own, row in zip(ids, rows):
  for i, number in enumerate(np.asarray(own)):
    np.testing.assert_array_equal(row[i], targets[int(number)])
"""


def test_two_processes_keep_one_set(
  kept, teacher, tmp_path, monkeypatch, run_script_twice
):
  """The first one writes, and both read."""
  run = Run(config_of(teacher), tmp_path)
  run_script_twice(TWO.format(folder=str(tmp_path)))
  forbid(monkeypatch)
  monkeypatch.setattr(targets_lib, "FILE_BYTES", 2**30)
  made = kept_targets(run, Model.load(teacher))
  np.testing.assert_allclose(list(made), list(kept[1]), rtol=1e-5, atol=1e-5)
