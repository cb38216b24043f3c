import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from common.data.loader import FetchPlan, Loader, process_share
from common.errors import RunError, UserError

# Workers import it by its name, which they cannot do with a test's module.
FETCHES = """
import os

import numpy as np


def rows(k, arg):
  return {"x": np.arange(4) + 10 * k, "arg": np.array(arg)}


def fragile(k, arg):
  if k == arg:
    raise ValueError(f"no batch {k}")
  return rows(k, arg)


def about_me(k, arg):
  import jax

  return {"pid": os.getpid(), "platform": jax.default_backend()}


def dies(k, arg):
  os._exit(3)
"""


@pytest.fixture
def fetches(tmp_path, monkeypatch):
  (tmp_path / "fetches_for_test.py").write_text(FETCHES)
  monkeypatch.syspath_prepend(tmp_path)
  import fetches_for_test

  yield fetches_for_test
  del sys.modules["fetches_for_test"]


def first(batches, count):
  return [next(batches)["x"].tolist() for _ in range(count)]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_batches_come_in_order_from_any_start(fetches, prefetch):
  with Loader(fetches.rows, prefetch=prefetch) as straight:
    expected = first(straight, 6)
    assert straight.get_state() == {"step": 6}
  assert expected[2] == [20, 21, 22, 23]
  with Loader(fetches.rows, start=4, prefetch=prefetch) as later:
    assert first(later, 2) == expected[4:]
    later.set_state({"step": 1})
    assert first(later, 2) == expected[1:3]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_refresh_makes_prefetched_batches_again(fetches, prefetch):
  now = {"arg": 0}
  plan = FetchPlan(fetches.rows, lambda k: now["arg"])
  with Loader(plan, prefetch=prefetch) as data:
    assert [int(next(data)["arg"]) for _ in range(3)] == [0, 0, 0]
    now["arg"] = 1
    data.refresh()
    batch = next(data)
    assert (int(batch["arg"]), int(batch["x"][0])) == (1, 30)


def test_no_more_is_begun_than_promised(fetches):
  begun = []
  plan = FetchPlan(fetches.rows, begun.append)
  with Loader(plan, prefetch=2) as data:
    assert begun == []
    for _ in range(3):
      next(data)
      # Indices below next + prefetch.
      assert max(begun) < data.get_state()["step"] + 2
    data.refresh()
    assert max(begun) < data.get_state()["step"] + 2


def test_an_error_surfaces_with_its_batch_and_keeps_the_position(fetches):
  bad = {"k": 2}
  plan = FetchPlan(fetches.fragile, lambda k: bad["k"])
  with Loader(plan) as data:
    first(data, 2)
    for _ in range(2):
      with pytest.raises(ValueError, match="no batch 2") as caught:
        next(data)
      assert caught.value.__notes__ == ["while batch 2 was made"]
    bad["k"] = -1
    assert first(data, 1) == [[20, 21, 22, 23]]


def test_a_user_error_stays_one():
  def fetch(k, arg):
    raise UserError("the text is empty")

  with Loader(fetch) as data, pytest.raises(UserError, match="is empty"):
    next(data)


def test_closing_twice_stops_the_thread(fetches):
  before = threading.active_count()
  data = Loader(fetches.rows)
  next(data)
  assert threading.active_count() == before + 1
  data.close()
  data.close()
  assert threading.active_count() == before
  with pytest.raises(RuntimeError, match="closed"):
    next(data)
  Loader(fetches.rows).close()  # never begun


def test_a_forgotten_loader_stops_its_thread(fetches):
  before = threading.active_count()
  data = Loader(fetches.rows)
  next(data)
  del data
  assert threading.active_count() == before


@pytest.mark.parametrize("name", ["start", "prefetch", "workers"])
def test_negative_numbers_are_refused(fetches, name):
  with pytest.raises(ValueError, match=f"{name}=-1"):
    Loader(fetches.rows, **{name: -1})


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_batches_of_one_thread(fetches, workers):
  now = {"arg": 7}
  plan = FetchPlan(fetches.rows, lambda k: now["arg"])
  with Loader(plan) as one, Loader(plan, workers=workers) as many:
    assert first(many, 5) == first(one, 5)
    now["arg"] = 8
    many.refresh()
    batch = next(many)
    assert (int(batch["arg"]), int(batch["x"][0])) == (8, 50)


def test_an_error_in_a_worker_surfaces_with_its_traceback(fetches):
  plan = FetchPlan(fetches.fragile, lambda k: 1)
  with Loader(plan, workers=1) as data:
    first(data, 1)
    with pytest.raises(ValueError, match="no batch 1") as caught:
      next(data)
    in_worker, batch = caught.value.__notes__
    assert "fetches_for_test.py" in in_worker
    assert batch == "while batch 1 was made"
    data.set_state({"step": 2})
    assert first(data, 1) == [[20, 21, 22, 23]]


def test_a_worker_that_dies_is_an_error_and_not_a_wait(fetches):
  data = Loader(fetches.dies, workers=1)
  with data, pytest.raises(RunError, match=r"has died .* start again"):
    next(data)


def test_what_cannot_be_pickled_is_an_error_and_not_a_wait():
  data = Loader(lambda k, arg: {}, workers=1)
  with data, pytest.raises(Exception, match="pickle"):
    next(data)


def test_a_worker_uses_the_cpu(fetches):
  with Loader(fetches.about_me, workers=1) as data:
    batch = next(data)
  assert batch["platform"] == "cpu"
  assert batch["pid"] != os.getpid()


def is_alive(pid):
  try:
    with open(f"/proc/{pid}/stat") as stat:
      return stat.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_when_their_parent_is_killed(fetches):
  program = (
    f"import sys; sys.path[:] = {sys.path!r}\n"
    "if __name__ == '__main__':\n"
    "  import fetches_for_test as f\n"
    "  from common.data.loader import Loader\n"
    "  data = Loader(f.about_me, workers=1)\n"
    "  print(next(data)['pid'], flush=True)\n"
    "  sys.stdin.read()\n"
  )
  folder = os.path.dirname(fetches.__file__)
  script = os.path.join(folder, "parent.py")
  with open(script, "w") as file:
    file.write(program)
  parent = subprocess.Popen(
    [sys.executable, script],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  with parent:
    worker = int(parent.stdout.readline())
    assert is_alive(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
  deadline = time.monotonic() + 20
  while is_alive(worker) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not is_alive(worker)


def mesh_of(**axes):
  return jax.make_mesh(
    tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
  )


@pytest.mark.parametrize(
  ("axes", "spec"),
  [
    ({"data": 8}, P("data")),
    ({"data": 4, "seq": 2}, P("data", "seq")),
    ({"data": 2, "fsdp": 2, "model": 2}, P(("data", "fsdp"))),
    ({"data": 1, "model": 8}, P("data")),
    ({"data": 8}, P()),
  ],
)
def test_batches_go_where_the_sharding_says(axes, spec):
  expected = np.arange(64).reshape(8, 8)

  def fetch(k, arg):
    return {"tokens": expected + k, "labels": expected[:, 0] + k}

  sharding = NamedSharding(mesh_of(**axes), spec)
  with Loader(fetch, sharding=sharding) as data:
    next(data)
    batch = next(data)
  assert batch["tokens"].sharding.is_equivalent_to(sharding, 2)
  np.testing.assert_array_equal(batch["tokens"], expected + 1)
  np.testing.assert_array_equal(batch["labels"], expected[:, 0] + 1)
  assert process_share(sharding) == (0, 1)
