"""What two real processes tell each other."""

SCRIPT = """
import sys
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from common.errors import RunError
from common.hooks import SameEverywhere
from common.metrics import Digest, Mean
from common.parallel import (
  check_same, gather_texts, local_mesh, make_mesh, replicated
)
from common.train import StepInfo

whole = ["eins", "ä" * 100, "zwei\\n", "", "drei"]
assert gather_texts(whole[jax.process_index() :: 2]) == whole
assert gather_texts([]) == []
devices = set(local_mesh().devices.flat)
assert devices == set(jax.local_devices()) and len(devices) == 2

# As TPU slices are meshed: rows of the processes by turns.
import numpy as np
from common.data.loader import Placer, process_share
def rows(*order):
  devices = np.array([jax.devices()[i] for i in order])
  mesh = jax.sharding.Mesh(devices.reshape(-1, 1), ("data", "model"))
  return jax.sharding.NamedSharding(mesh, jax.P("data"))
me = jax.process_index()
for order in ((0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 1, 2)):
  index, count = process_share(rows(*order))
  assert count == 2
  own = [place for place, i in enumerate(order) if i // 2 == me]
  assert index == (0 if 0 in own else 1), order
  batch = Placer(rows(*order))({"x": 10 * me + np.arange(2)})["x"]
  found = sorted((s.index[0].start, int(s.data[0])) for s in
                 batch.addressable_shards)
  assert found == [(own[0], 10 * me), (own[1], 10 * me + 1)], (order, found)

check_same(b"equal", "letters")
try:
  check_same(bytes([jax.process_index()]), "letters")
except RunError as error:
  assert "processes differ in their letters" in str(error)
else:
  raise AssertionError("the difference was not seen")

# A key that counts as replicated, but is another in each process at step 4.
mesh = make_mesh()
rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
tokens = jax.make_array_from_callback((4,), rows, lambda i: np.ones(4)[i])
@jax.jit
def draw(seed, tokens):
  chosen = jax.random.randint(jax.random.key(seed), (3,), 0, 1000)
  share = Mean.of(tokens * (chosen[0] / 1000))
  return {"draws": Digest.of(chosen), "share": share}
hook = SameEverywhere(2, "draws")
def step(number, seed):
  seed = jax.make_array_from_callback(
    (), replicated(mesh), lambda i: np.uint32(seed)
  )
  with jax.set_mesh(mesh):
    metrics = draw(seed, tokens)
  check_same(np.asarray(metrics["share"].total).tobytes(), "sums")
  hook(StepInfo(number, None, metrics, None))
for number in (1, 2, 3):
  step(number, number)
try:
  step(4, jax.process_index())
except RunError as error:
  assert "in their draws of steps 3 to 4" in str(error)
else:
  raise AssertionError("the difference was not seen")
"""


def test_they_collect_texts_and_compare_what_must_be_equal(run_script_twice):
  run_script_twice(SCRIPT)
