import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from common.data.pipeline import batches
from common.errors import UserError

SOURCE = [{"x": np.full(3, i), "y": np.int32(i)} for i in range(10)]


def take(count, **kwargs):
  settings = {"batch_size": 4, "seed": 0, **kwargs}
  with batches(SOURCE, **settings) as data:
    return [next(data) for _ in range(count)]


def ids(found):
  return [batch["y"].tolist() for batch in found]


def augment(example, rng):
  return {"y": example["y"], "noise": rng.normal(size=2)}


def test_each_epoch_holds_each_example_once_in_a_new_order():
  flat = np.concatenate(ids(take(10)))  # four epochs of ten
  epochs = flat.reshape(4, 10)
  assert (np.sort(epochs) == np.arange(10)).all()
  assert len({tuple(epoch) for epoch in epochs}) == 4
  assert ids(take(3, seed=1)) != ids(take(3))
  assert ids(take(3)) == ids(take(3))


def test_without_shuffling_the_order_is_the_sources():
  assert ids(take(3, shuffle=False)) == [
    [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1],
  ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_processes_makes_the_same_batches(count):
  parts = [
    take(5, process_index=i, process_count=count, transform=augment)
    for i in range(count)
  ]
  whole = take(5, transform=augment)
  for k, batch in enumerate(whole):
    for key, value in batch.items():
      joined = np.concatenate([part[k][key] for part in parts])
      np.testing.assert_array_equal(joined, value)


@pytest.mark.parametrize("kwargs", [{"num_threads": 2}, {"workers": 1}])
def test_threads_and_workers_change_nothing(kwargs):
  assert ids(take(4, **kwargs)) == ids(take(4))


def test_it_goes_on_from_its_counter():
  straight = take(6, transform=augment)
  with batches(SOURCE, batch_size=4, seed=0, transform=augment) as data:
    for _ in range(3):
      next(data)
    state = data.get_state()
  assert state == {"step": 3}
  with batches(SOURCE, batch_size=4, seed=0, transform=augment) as data:
    data.set_state(state)
    for expected in straight[3:]:
      np.testing.assert_array_equal(next(data)["noise"], expected["noise"])
  resumed = take(3, start=3, transform=augment)
  np.testing.assert_array_equal(resumed[0]["noise"], straight[3]["noise"])


def test_an_example_is_transformed_anew_each_epoch():
  noise = np.concatenate([b["noise"] for b in take(5, transform=augment)])
  assert len(np.unique(noise[:, 0])) == 20


def test_batches_reach_the_devices():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, P("data"))
  (batch,) = take(1, sharding=sharding)
  assert batch["x"].sharding.is_equivalent_to(sharding, 2)
  assert batch["y"].tolist() == ids(take(1))[0]


def test_bad_settings_are_refused():
  with pytest.raises(UserError, match="batch of 4 is not divisible by 3"):
    take(1, process_count=3)
  with pytest.raises(UserError, match="data set is empty"):
    batches([], batch_size=1, seed=0)
  with pytest.raises(ValueError, match="process 2 of 2"):
    take(1, process_index=2, process_count=2)
