"""Batches: prompts that belong to their masks, order, shares, refusals."""

import itertools

import numpy as np
import pytest

from common.errors import UserError
from common.parallel import make_mesh
from slimsam import rle
from slimsam.data import (
  ImageExample,
  PromptedExample,
  coarse,
  image_batches,
  rows_sharding,
  train_loader,
)
from slimsam.preprocess import preprocess
from slimsam.sources import Annotation, Sample, Source


def box_of(mask):
  rows, columns = np.nonzero(mask)
  x, y = columns.min(), rows.min()
  return (float(x), float(y), float(columns.max() - x),
          float(rows.max() - y))  # fmt: skip


class Squares(Source):
  """Images of 30 x 40 with `i % 4` squares."""

  def __init__(self, length=10, labelled=True):
    self._length = length
    self.labelled = labelled

  @property
  def fingerprint(self):
    return f"squares/{self._length}"

  def __len__(self):
    return self._length

  def masks(self, i):
    found = []
    for k in range(i % 4):
      mask = np.zeros((30, 40), bool)
      mask[2 + 7 * k : 8 + 7 * k, 10 * k : 10 * k + 9 + i] = True
      found.append(mask)
    return found

  def read(self, i):
    image = np.full((30, 40, 3), 20 * i, np.uint8)
    annotations = tuple(
      Annotation(rle.encode(mask), box_of(mask), None, k)
      for k, mask in enumerate(self.masks(i))
    )
    return Sample(f"{i}", image, annotations)


def rows_of(source, example, count, **more):
  with train_loader(source, example, rows=4, seed=0, **more) as loader:
    return list(itertools.islice(loader, count))


def test_each_epoch_has_every_image_once():
  source = Squares()
  batches = rows_of(source, ImageExample(64), 5)
  ids = np.concatenate([batch["ids"] for batch in batches])
  assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
  assert list(ids[:10]) != list(ids[10:])
  image = preprocess(source[int(ids[3])].image, 64)
  np.testing.assert_array_equal(batches[0]["images"][3], image)
  again = rows_of(source, ImageExample(64), 2, start=3)
  np.testing.assert_array_equal(again[1]["images"], batches[4]["images"])


def test_prompts_belong_to_their_masks():
  source = Squares()
  seen = set()
  for batch in rows_of(source, PromptedExample(80, 10, prompts=2), 5):
    for row, number in enumerate(batch["ids"]):
      masks = source.masks(int(number))
      valid = batch["valid"][row]
      assert list(valid) == [1.0] * min(len(masks), 2) + [0.0] * (
        2 - min(len(masks), 2)
      )
      for k in np.flatnonzero(valid):
        mask = batch["masks"][row, k]
        # 40 columns are 40 cells, and 80 pixels of the padded image.
        own = [m for m in masks if np.array_equal(m, mask[:30] > 0)]
        assert len(own) == 1
        assert not np.any(mask[30:])
        x, y = batch["points"][row, k] / 2
        assert own[0][int(y), int(x)]
        x, y, w, h = box_of(own[0])
        error = batch["boxes"][row, k] / 2 - [x, y, x + w, y + h]
        assert np.abs(error).max() <= 20
        seen.add((int(number), bool(np.any(error))))
  assert {number for number, _ in seen} == {n for n in range(10) if n % 4}
  assert any(moved for _, moved in seen)


def test_masks_are_halved_by_cover():
  mask = np.zeros((4, 8), bool)
  mask[0:2, 0:2] = mask[0, 2:4] = mask[2, 4] = True
  expected = np.zeros((4, 4))
  expected[0, :2] = 1  # all of a cell, half of one, a quarter of one
  np.testing.assert_array_equal(coarse(mask, 4), expected)


def test_devices_and_processes_have_their_rows():
  sharding = rows_sharding(make_mesh({"data": 2, "fsdp": 2, "model": 2}))
  source, example = Squares(), PromptedExample(64, 8, prompts=1)
  (there,) = rows_of(source, example, 1, sharding=sharding)
  (here,) = rows_of(source, example, 1)
  for name, value in here.items():
    np.testing.assert_array_equal(there[name], value)
    assert there[name].sharding.spec[0] == ("data", "fsdp")


@pytest.mark.parametrize(("limit", "threads"), [(0, 0), (7, 2)])
def test_in_order_every_image_comes_once(limit, threads):
  source, count = Squares(), limit or 10
  made = image_batches(source, 64, rows=4, limit=limit, threads=threads)
  for _ in range(2):  # as often as one likes
    batches = list(made)
    assert len(batches) == len(made) == -(-count // 4)
    ids = np.concatenate([batch["ids"] for batch in batches])
    weights = np.concatenate([batch["weights"] for batch in batches])
    assert list(ids[weights > 0]) == list(range(count))
    assert not np.any(weights[count:])
    image = preprocess(source[5].image, 64)
    np.testing.assert_array_equal(batches[1]["images"][1], image)
  sharding = rows_sharding(make_mesh({"data": 8}))
  with pytest.raises(UserError, match="4 images does not divide among the 8"):
    image_batches(source, 64, rows=4, sharding=sharding)
  (batch,) = image_batches(source, 64, rows=16, sharding=sharding)
  assert batch["weights"].sum() == 10


def test_masks_need_masks():
  with pytest.raises(UserError, match="needs a source that has some"):
    train_loader(
      Squares(labelled=False), PromptedExample(64, 8, 1), rows=2, seed=0
    )
