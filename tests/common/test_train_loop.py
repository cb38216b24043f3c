"""The loop's contract and its hooks."""

import json
import os
import signal
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from common import hooks as hooks_lib
from common.checkpoint import Checkpointer
from common.errors import Preempted, RunError
from common.metrics import Digest, Mean, MetricWriter
from common.progress import ProgressBar
from common.rngs import RngStreams
from common.state import TrainState
from common.step import Given, StepChoice, make_train_step
from common.train import StepInfo, is_due, train


class Counter:
  """Batches 0, 1, 2, ... with a position, and a log of what happened."""

  def __init__(self, log=None, bad_at=None, end=None):
    self.position = 0
    self.log = [] if log is None else log
    self.bad_at = bad_at
    self.end = end

  def __iter__(self):
    return self

  def __next__(self):
    if self.position == self.end:
      raise StopIteration
    value = float(self.position)
    self.log.append(f"batch {self.position}")
    self.position += 1
    if self.bad_at == self.position:
      value = float("nan")
    return {"x": np.full((2,), value, np.float32)}

  def get_state(self):
    return {"step": self.position}

  def set_state(self, state):
    self.position = state["step"]


class Recorder:
  def __init__(self, name, every, log):
    self.name, self.every, self.log = name, every, log

  def __call__(self, info):
    self.log.append(f"{self.name} {info.step}")


def loss_fn(params, batch, rngs):
  del rngs
  error = (params["w"] - batch["x"]) ** 2
  return jnp.mean(error), {"loss": Mean.of(error)}


def setup():
  tx = optax.adam(0.1)
  step = make_train_step(loss_fn, tx, RngStreams(0))
  return TrainState.create({"w": jnp.ones(1)}, tx), step


def abstract(state):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
  )


@pytest.fixture
def writer(tmp_path):
  return MetricWriter(tmp_path)


def read(tmp_path):
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_hooks_run_in_order_before_the_next_batch_is_pulled():
  log = []
  state, step = setup()
  train(
    state,
    step,
    Counter(log),
    num_steps=3,
    hooks=[Recorder("evaluate", 2, log), Recorder("save", 2, log)],
  )
  assert log == [
    "batch 0", "batch 1", "evaluate 2", "save 2",
    "batch 2", "evaluate 3", "save 3",
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("every", "step", "last", "due"),
  [
    (5, 5, False, True),
    (5, 6, False, False),
    (5, 6, True, True),
    (0, 6, True, False),
    ({3, 4}.__contains__, 4, False, True),
    ({3, 4}.__contains__, 5, True, False),
  ],
)
def test_when_a_hook_is_due(every, step, last, due):
  assert is_due(every, step, last=last) == due


def test_the_loop_is_reentrant():
  state, step = setup()
  data = Counter()
  state = train(state, step, data, num_steps=2)
  state = train(state, step, data, num_steps=5)
  straight, step = setup()
  straight = train(straight, step, Counter(), num_steps=5)
  np.testing.assert_array_equal(state.params["w"], straight.params["w"])
  assert train(state, step, data, num_steps=5) is state


def test_a_hook_may_replace_the_state():
  state, step = setup()

  def zero(info):
    return info.state.replace(params={"w": jnp.zeros(1)})

  zero.every = 3
  assert train(
    state, step, Counter(), num_steps=3, hooks=[zero]
  ).params["w"] == 0  # fmt: skip


def test_data_that_ends_early_names_the_step():
  state, step = setup()
  with pytest.raises(RuntimeError, match="ended before step 3 of 9"):
    train(state, step, Counter(end=2), num_steps=9)


def test_logs_are_means_over_the_interval_and_survive_a_resume(
  tmp_path, writer
):
  def run(num_steps, state, data, hook):
    return train(state, step, data, num_steps=num_steps, hooks=[hook])

  def make_hook(writer):
    return hooks_lib.LogHook(
      4, writer, ProgressBar(8), examples_per_step=2,
    )  # fmt: skip

  state, step = setup()
  run(8, state, Counter(), make_hook(writer))
  straight = [line["train/loss"] for line in read(tmp_path)]

  state, step = setup()
  data, first = Counter(), make_hook(writer)
  # A mean over an open interval: stop after 6 steps, 2 into the second one.
  hook_states = []

  class Stop(Exception):
    pass

  def stop(info):
    hook_states.append((info.state, data.get_state(), first.get_state()))
    raise Stop

  stop.every = {6}.__contains__
  with pytest.raises(Stop):
    train(state, step, data, num_steps=8, hooks=[first, stop])
  state, position, saved = hook_states[0]
  data, second = Counter(), make_hook(MetricWriter(tmp_path / "resumed"))
  data.set_state(position)
  second.set_state(json.loads(json.dumps(saved)))
  run(8, state, data, second)
  resumed = [line["train/loss"] for line in read(tmp_path / "resumed")]
  assert resumed == straight[1:]


@pytest.mark.parametrize("lag", [0, 2])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
  tmp_path, lag
):
  state, step = setup()
  guard = hooks_lib.StopOnNonFinite(lag=lag)
  checkpointer = Checkpointer(tmp_path / "c", keep=9)
  save = hooks_lib.CheckpointHook(1, checkpointer, host={}, guard=guard)
  data = Counter(bad_at=4)
  with pytest.raises(
    hooks_lib.NonFiniteError,
    match=r"step 4: .*loss is nan.*batch [0-9a-f]{16}.* a lower optim\.lr",
  ):
    train(state, step, data, num_steps=9, hooks=[guard, save])
  checkpointer.wait()
  assert checkpointer.steps == [1, 2, 3]


def test_a_stop_names_what_is_watched():
  guard = hooks_lib.StopOnNonFinite(lag=0)
  nan, one = (Mean(jnp.float32(x), jnp.float32(1)) for x in ("nan", 1))
  metrics = {"loss_of/a": nan, "param_norm": one, "grad_norm": nan, "loss": nan}
  with pytest.raises(hooks_lib.NonFiniteError) as caught:
    guard(StepInfo(step=4, state=None, metrics=metrics, data=None, last=True))
  assert str(caught.value).startswith("step 4: loss is nan, grad_norm is nan;")


def test_the_fingerprint_depends_on_content_alone():
  a = {"x": np.arange(4), "y": np.ones(2)}
  b = {"y": np.ones(2), "x": np.arange(4)}
  assert hooks_lib.fingerprint(a) == hooks_lib.fingerprint(b)
  assert hooks_lib.fingerprint(a) != hooks_lib.fingerprint(b | {"x": a["y"]})
  on_device = jax.device_put(a["y"], jax.devices()[3])
  same = hooks_lib.fingerprint({"y": jax.device_put(a["y"])})
  assert hooks_lib.fingerprint({"y": on_device}) == same


def test_sigterm_saves_at_the_end_of_the_step_and_leaves(tmp_path):
  state, step = setup()
  checkpointer = Checkpointer(tmp_path / "c")
  save = hooks_lib.CheckpointHook(100, checkpointer, host={})

  def kill(info):
    os.kill(os.getpid(), signal.SIGTERM)

  kill.every = {3}.__contains__
  data = Counter()
  before = signal.getsignal(signal.SIGTERM)
  with (
    hooks_lib.PreemptionHook(save) as preemption,
    pytest.raises(Preempted, match="saved step 3"),
  ):
    train(state, step, data, num_steps=9, hooks=[kill, save, preemption])
  assert signal.getsignal(signal.SIGTERM) == before
  data.set_state({"step": 0})
  state, step = setup()
  restored = checkpointer.restore(abstract(state), data)
  assert (int(restored.step), data.position) == (3, 3)


def digest(step, *, parted):
  """Of what eight devices have computed; one may have parted."""
  mesh = jax.make_mesh((8,), ("data",))
  bits = np.full(8, step, np.uint32)
  bits[5] += parted
  sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
  return Digest(jax.device_put(bits, sharding))


class Saver:
  """Stands for a `Checkpointer`; its machine is taken away at step 7."""

  def __init__(self):
    self.steps, self.asked = [], 0

  def save(self, step, *state, metrics):
    self.steps.append(step)

  def reached_preemption(self):
    self.asked += 1
    return self.asked == 7

  def wait(self):
    pass


def run_hooks(hooks, num_steps, *, parted_at=0):
  """As `train` does, without a program."""
  for step in range(1, num_steps + 1):
    metrics = {"draws": digest(step, parted=step == parted_at)}
    for hook in hooks:
      if is_due(hook.every, step, last=False):
        hook(StepInfo(step, None, metrics, None))


@pytest.mark.parametrize(
  ("parted_at", "seen", "saved"), [(3, "1 to 4", []), (6, "5 to 7", [4])]
)
def test_devices_that_part_are_seen_before_a_save(parted_at, seen, saved):
  """Every fourth step's, and that of a preemption; the interval is longer."""
  saver, same = Saver(), hooks_lib.SameEverywhere(10, "draws")
  save = hooks_lib.CheckpointHook(4, saver, host={}, same=same)
  hooks = [same, save, hooks_lib.PreemptionHook(save)]
  with pytest.raises(RunError, match=f"in their draws of steps {seen}$"):
    run_hooks(hooks, 8, parted_at=parted_at)
  assert saver.steps == saved


def test_a_save_compares_only_what_has_not_been(monkeypatch):
  compared, saver = [], Saver()
  monkeypatch.setattr(
    hooks_lib, "check_same", lambda content, what: compared.append(what)
  )
  same = hooks_lib.SameEverywhere(3, "draws")
  save = hooks_lib.CheckpointHook(
    {3, 5}.__contains__, saver, host={}, same=same
  )
  run_hooks([same, save], 6)
  assert compared == [
    f"draws of steps {n}" for n in ("1 to 3", "4 to 5", "6 to 6")
  ]
  assert saver.steps == [3, 5]


def test_the_profiler_writes_a_trace(tmp_path):
  state, step = setup()
  profile = hooks_lib.ProfileHook(str(tmp_path / "p"), start=2, count=2)
  train(state, step, Counter(), num_steps=6, hooks=[profile])
  assert list((tmp_path / "p").rglob("*.xplane.pb"))


def test_the_host_chooses_among_steps_and_what_they_are_given():
  def signed(params, batch, rngs, sign):
    return loss_fn(params, {"x": sign * batch["x"]}, rngs)

  state, _ = setup()
  step, asked = make_train_step(signed, optax.adam(0.1), RngStreams(0)), []

  def choose(number):
    asked.append(number)
    return Given(step, (np.float32(1 if number % 2 else -1),))

  data = Counter()
  state = train(state, StepChoice(choose), data, num_steps=3)
  again = train(state, StepChoice(choose), data, num_steps=5)
  assert asked == [0, 1, 2, 3, 4]  # a second call goes on with the number
  assert int(again.step) == 5
  expected, step = setup()
  for i in range(5):
    x = np.full((2,), i if i % 2 else -i, np.float32)
    expected, _ = step(expected, {"x": x})
  np.testing.assert_array_equal(again.params["w"], expected.params["w"])


class Program:
  """Stands for a jitted step: (state, batch, *constants)."""

  def __init__(self, name, log):
    self._name, self._log = name, log

  def lower(self, state, batch, *constants):
    rows = len(batch["x"]) + sum(map(len, constants))
    self._log.append(f"lower {self._name} {rows}")
    return self

  def compile(self):
    self._log.append("compile")

  def __call__(self, state, batch, *constants):
    self._log.append(f"run {self._name}")
    return state, {}


@pytest.fixture
def several(monkeypatch):
  """Looks like one of two processes; what it waits for is written down."""
  log = []

  def barrier(*, key, timeout_ms):
    log.append(f"wait {key}")
    assert timeout_ms >= 600_000

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(ocp.multihost, "get_barrier_sync_fn", lambda: barrier)
  return log


def test_processes_on_cpus_begin_a_program_when_all_have_compiled_it(several):
  """Each program once for each of its shapes."""
  a, b = Program("a", several), Program("b", several)
  ones = [np.ones(n, np.float32) for n in (1, 1, 3)]

  def choose(number):  # a, a, a given more, b, a
    return b if number == 3 else Given(a, (ones[min(number, 2)],))

  state, _ = setup()
  train(state, StepChoice(choose), Counter(), num_steps=3)
  begun = ["compile", "wait compiled"]
  assert several == [
    "lower a 3", *begun, "run a", "run a", "lower a 5", *begun, "run a"
  ]  # fmt: skip
  several.clear()
  state = state.replace(step=jnp.int32(3))
  train(state, StepChoice(choose), Counter(), num_steps=5)
  assert several == ["lower b 2", *begun, "run b", "lower a 5", *begun, "run a"]
  assert choose(0) == choose(1) != Given(b, ())


def test_nothing_holds_what_a_step_was_given(several):
  """A teacher leaves the devices when no step takes it any more."""
  refs, alive = [], []

  def choose(number):
    alive.append(sum(ref() is not None for ref in refs))
    constant = jnp.ones(number + 1)
    refs.append(weakref.ref(constant))
    return Given(Program("a", several), (constant,))

  train(setup()[0], StepChoice(choose), Counter(), num_steps=4)
  assert alive == [0] * 4


def test_one_process_waits_for_nobody():
  log = []
  train(setup()[0], Program("a", log), Counter(), num_steps=2)
  assert log == ["run a", "run a"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_steps_that_cannot_be_compiled_beforehand_are_refused(wrapped):
  """By one process too: on many they would be given up while they compile."""

  def plain(state, batch):
    raise AssertionError("was called")

  step = Given(plain, ()) if wrapped else plain
  with pytest.raises(ValueError, match=r"plain.* has no `lower`: .*jax\.jit"):
    train(setup()[0], step, Counter(), num_steps=1)


def test_a_quiet_bar_draws_nothing(capsys, monkeypatch):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
  with ProgressBar(3, quiet=True) as bar:
    bar.start(0)
    bar.update(3, {"train/loss": 1.0})
  assert capsys.readouterr().err == ""
