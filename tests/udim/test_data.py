import pickle
import threading

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from common.errors import UserError
from common.parallel import batch_sharding, make_mesh
from udim.augment import Transform
from udim.data import (
  TrainReader,
  eval_batches,
  train_loader,
  train_sharding,
)
from udim.domains import ArrayExamples, Domain, load_domains

PLAIN = Transform()
CROPS = Transform(augment="crop_flip")


def array_domain(name="a", count=11, first=0):
  """Image i is `first + i` everywhere, with label i mod 3."""
  values = np.arange(first, first + count, dtype=np.float32) / 256
  images = np.broadcast_to(values[:, None, None, None], (count, 8, 8, 2))
  return Domain(name, ArrayExamples(images, np.arange(count) % 3))


def sources():
  return array_domain("a", 11), array_domain("b", 5, 100).select([0, 2, 4])


@pytest.fixture
def file_domain(tmp_path):
  """Image i of 9 is i everywhere, in files of different sizes."""
  for i in range(9):
    path = tmp_path / "set/day" / "xyz"[i % 3] / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20 + i, 25), (i, i, i)).save(path)
  cfg = ConfigDict({"kind": "folder", "path": str(tmp_path / "set")})
  return load_domains(cfg)["day"]


def take(loader, count):
  with loader:
    return [next(loader) for _ in range(count)]


def batches(domains=None, count=4, **settings):
  known = {"rows": 8, "seed": 0, "transform": PLAIN}
  domains = sources() if domains is None else domains
  return take(train_loader(domains, **known | settings), count)


def assert_equal(a, b):
  for one, other in zip(a, b, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(
        np.asarray(one[key]), np.asarray(other[key])
      )


def numbers(images):
  return (np.asarray(images)[..., 0, 0, 0] * 256).round().astype(int)


def test_a_batch_is_blocked_by_domain():
  for batch in batches():
    assert batch["image"].shape == (2, 8, 8, 8, 2)
    assert batch["image"].dtype == np.float32
    assert batch["label"].shape == (2, 8)
    assert batch["label"].dtype == np.int32
    a, b = numbers(batch["image"])
    assert set(a) <= set(range(11))
    assert set(b) <= {100, 102, 104}
    np.testing.assert_array_equal(batch["label"][0], a % 3)
    np.testing.assert_array_equal(batch["label"][1], (b - 100) % 3)


def test_images_are_drawn_with_replacement_from_all():
  drawn = np.concatenate(
    [numbers(batch["image"]) for batch in batches(count=200)], axis=1
  )
  counts = np.bincount(drawn[0], minlength=11)
  # 1600 draws from 11: 145 each, standard deviation 11.5.
  assert counts.min() > 100
  assert counts.max() < 190
  first = batches(count=30)
  assert any(len(set(numbers(b["image"])[0])) < 8 for b in first)


def test_every_domain_draws_its_own_keys():
  domain = array_domain(count=100)
  (batch,) = batches([domain, domain], count=1)
  assert (batch["label"][0] != batch["label"][1]).any()


def test_seed_and_number_make_the_batch():
  every = batches(count=6)
  assert_equal(every, batches(count=6))
  assert_equal(every[4:], batches(count=2, start=4))
  others = batches(count=6, seed=1)
  assert any((a["label"] != b["label"]).any() for a, b in zip(every, others))
  assert (every[0]["label"] != every[1]["label"]).any()


@pytest.mark.parametrize("transform", [PLAIN, CROPS])
def test_the_position_is_one_number(transform):
  loader = train_loader(sources(), rows=4, seed=0, transform=transform)
  straight = [next(loader) for _ in range(5)]
  assert loader.get_state() == {"step": 5}
  loader.set_state({"step": 2})
  assert_equal(straight[2:], take(loader, 3))


@pytest.mark.parametrize("settings", [{"threads": 3}, {"workers": 2}])
def test_threads_and_workers_change_nothing(settings):
  alone = batches(transform=CROPS)
  assert_equal(alone, batches(transform=CROPS, **settings))


class Together:
  """Images that are read two at a time, or not at all."""

  def __init__(self):
    self.barrier = threading.Barrier(2, timeout=20)

  def __len__(self):
    return 6

  def __getitem__(self, key):
    self.barrier.wait()
    return {"image": np.full((8, 8, 1), key, np.uint8), "label": 0}


def test_threads_decode_at_the_same_time():
  domain = Domain("a", Together())
  (batch,) = batches([domain], count=1, threads=2)
  assert batch["image"].shape == (1, 8, 8, 8, 1)


def test_augmentation_is_drawn_for_every_place_anew():
  (batch,) = batches([array_domain("a", 1, 50)], count=1, transform=CROPS)
  assert len(np.unique(batch["image"], axis=1)[0]) > 3  # of one image


def test_arrays_and_files_give_the_same(file_domain):
  examples = list(file_domain)
  small = Transform(size=8, statistics="imagenet")
  images = np.stack([small.evaluate(e["image"]) for e in examples])
  labels = np.array([e["label"] for e in examples])
  arrays = Domain("day", ArrayExamples(images, labels))
  for settings in ({}, {"threads": 2}):
    from_files = batches([file_domain], transform=small, **settings)
    assert_equal(from_files, batches([arrays]))


def test_images_of_different_sizes_need_one(file_domain):
  with pytest.raises(
    UserError, match=r"set data.image_size to bring"
  ) as caught:
    batches([file_domain])
  assert "images of shapes [25, 2" in str(caught.value)


def test_a_reader_can_be_sent_to_a_worker(file_domain):
  reader = TrainReader(Transform(size=8), 2, (file_domain,), 4, 0, 0, 4)
  batch = reader(3)
  assert_equal([batch], [pickle.loads(pickle.dumps(reader))(3)])


@pytest.mark.parametrize("transform", [PLAIN, CROPS])
def test_processes_bring_a_share_of_every_domain(transform):
  """The shares of all processes, put together, are the whole batch."""
  (whole,) = batches(count=1, transform=transform)
  shares = [
    TrainReader(transform, 0, sources(), 8, 0, start, start + 2)(0)
    for start in range(0, 8, 2)
  ]
  for key in whole:
    np.testing.assert_array_equal(sum(s[key] for s in shares), whole[key])
    for i, share in enumerate(shares):
      own = slice(2 * i, 2 * i + 2)
      np.testing.assert_array_equal(share[key][:, own], whole[key][:, own])


def test_batches_lie_on_the_mesh():
  mesh = make_mesh({"data": 4, "fsdp": 2})
  sharding = train_sharding(mesh)
  placed = batches(sharding=sharding)
  assert_equal(batches(), placed)
  image = placed[0]["image"]
  assert image.sharding.is_equivalent_to(sharding, image.ndim)
  assert image.addressable_shards[0].data.shape == (2, 1, 8, 8, 2)
  assert placed[0]["label"].addressable_shards[0].data.shape == (2, 1)


def test_rows_that_do_not_fit_the_mesh_are_refused():
  sharding = train_sharding(make_mesh({"data": 4, "fsdp": 2}))
  with pytest.raises(UserError, match=r"12 images of each domain.*8 shards"):
    train_loader(sources(), rows=12, seed=0, transform=PLAIN, sharding=sharding)
  with pytest.raises(UserError, match="no source domain"):
    train_loader([], rows=12, seed=0, transform=PLAIN)


def evaluate(domain, batch_size, **settings):
  return eval_batches(
    domain, batch_size=batch_size, **{"transform": PLAIN} | settings
  )


def totals(made):
  """Images, sum of pixels and of labels, weighted."""
  count = pixels = labels = 0
  for batch in made:
    weight = np.asarray(batch["weight"])
    count += weight.sum()
    pixels += (weight * numbers(batch["image"])).sum()
    labels += (weight * np.asarray(batch["label"])).sum()
  return count, pixels, labels


@pytest.mark.parametrize("batch_size", [1, 7, 11, 12, 128])
def test_any_batch_size_gives_the_same_totals(batch_size):
  made = evaluate(array_domain(), batch_size)
  assert len(made) == len(list(made)) == -(-11 // batch_size)
  for batch in made:
    assert batch["image"].shape == (batch_size, 8, 8, 2)
    assert batch["label"].shape == batch["weight"].shape == (batch_size,)
    assert batch["weight"].dtype == np.float32
  assert totals(made) == (11, 55, sum(i % 3 for i in range(11)))
  assert totals(made) == totals(made)  # as often as needed


def test_evaluation_keeps_the_order_and_augments_nothing():
  made = list(evaluate(array_domain(), 4, transform=CROPS))
  assert [*np.concatenate([numbers(b["image"]) for b in made])] == [
    *range(11), 0,
  ]  # fmt: skip
  assert made[-1]["weight"].tolist() == [1, 1, 1, 0]
  assert not made[-1]["image"][3].any()


@pytest.mark.parametrize("settings", [{}, {"threads": 2}])
def test_evaluating_files(file_domain, settings):
  small = Transform(size=8)
  made = evaluate(file_domain, 4, transform=small, **settings)
  rows = [b["image"][b["weight"] > 0] for b in made]
  expected = [small.evaluate(example["image"]) for example in file_domain]
  np.testing.assert_array_equal(np.concatenate(rows), np.stack(expected))


@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_evaluation_pads_to_the_mesh(batch_size):
  sharding = batch_sharding(make_mesh({"data": 8}))
  made = list(evaluate(array_domain(), batch_size, sharding=sharding))
  assert made[0]["image"].shape[0] == -(-batch_size // 8) * 8
  assert totals(made) == totals(evaluate(array_domain(), 3))


def test_one_image_and_none():
  one = array_domain(count=1)
  assert totals(evaluate(one, 128)) == (1, 0, 0)
  with pytest.raises(UserError, match="'a' holds no image to evaluate"):
    evaluate(one.select([]), 8)
  with pytest.raises(UserError, match="batch_size=0"):
    evaluate(one, 0)


# Each of two processes checks its shards against the whole batch, which it
# makes on its own.
TWO = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from ml_collections import ConfigDict
from common.parallel import batch_sharding, make_mesh
from udim.augment import Transform
from udim.data import eval_batches, train_loader, train_sharding
from udim.domains import load_domains

domains = load_domains(ConfigDict({"kind": "digits_rot"})).domains[:2]
mesh = make_mesh({"data": -1})
for augment in ("none", "crop_flip"):
  settings = {"rows": 8, "seed": 0, "transform": Transform(augment=augment)}
  spread = train_loader(domains, sharding=train_sharding(mesh), **settings)
  with spread as ours, train_loader(domains, **settings) as whole:
    for k in range(3):
      placed, expected = next(ours), next(whole)
      for key, array in placed.items():
        assert array.shape == expected[key].shape, array.shape
        assert len(array.addressable_shards) == 2
        for shard in array.addressable_shards:
          np.testing.assert_array_equal(shard.data, expected[key][shard.index])
  settings = {"batch_size": 128, "transform": Transform()}
  placed = eval_batches(domains[0], sharding=batch_sharding(mesh), **settings)
  for ours, whole in zip(placed, eval_batches(domains[0], **settings)):
    for key, array in ours.items():
      for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[key][shard.index])
"""


def test_two_processes_make_one_batch(run_script_twice):
  run_script_twice(TWO)


def test_batches_of_the_real_digits_train_a_jitted_step():
  data = load_domains(ConfigDict({"kind": "digits_rot"}))
  (batch,) = batches(data.domains[:5], count=1)
  assert batch["image"].shape == (5, 8, 8, 8, 1)
  total = jax.jit(lambda b: (b["image"].sum(), b["label"].sum()))(batch)
  assert all(map(np.isfinite, total))
