"""A full disk, a folder that cannot be written any more, a clock that jumps.

The disks are real ones, where there is the right to mount them. What trains is
the toy of `test_faults.py`, as one process.
"""

import contextlib
import importlib
import importlib.util
import pathlib
import time

import pytest

from common.checkpoint import checkpoint_steps

ROOT = pathlib.Path(__file__).parents[2]
# Python's clock jumps between two saves, as a batch is made.
JUMP = """
import pathlib, time

real, shift = time.time, []
time.time = lambda: real() + sum(shift)
time.time_ns = lambda: int(time.time() * 1e9)


def jump():
  while not pathlib.Path("run/checkpoints/4").exists():
    time.sleep(0.01)
  time.sleep(0.3)  # the save has to be over, not only there
  shift[:] = [{jump}]
"""
SLOW = "time.sleep(0.2)"  # of the toy's batches


@pytest.fixture(scope="module")
def faults():
  """The module beside this one."""
  path = pathlib.Path(__file__).with_name("test_faults.py")
  spec = importlib.util.spec_from_file_location("toys", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def toy(faults, tmp_path):
  return faults.make_toy(tmp_path)


@pytest.fixture
def mounts(monkeypatch):
  """The benchmarks' disks."""
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  return importlib.import_module("faults_mounts")


@contextlib.contextmanager
def disk(mounts, fault, folder):
  """`folder` on a disk that has the fault in the block which this yields."""
  with contextlib.ExitStack() as stack:
    try:
      if fault == "full":
        stack.enter_context(mounts.own_disk(folder))
      else:
        with mounts.read_only(folder.parent):  # only asks for the right
          pass
    except mounts.Impossible:
      pytest.skip("there is no right to mount here")
    yield mounts.full_disk if fault == "full" else mounts.read_only


@pytest.mark.parametrize(
  ("fault", "reason"),
  [("full", "No space left on device"), ("read", "Read-only file system")],
  ids=["full", "read_only"],
)
def test_a_disk_that_refuses_is_one_line_and_loses_nothing(
  faults, toy, mounts, fault, reason
):
  with disk(mounts, fault, toy.folder) as refusing:
    flags = "--config.slow_from=4", "--config.num_steps=500"
    (process,) = toy.start(*flags, processes=1)
    end = time.monotonic() + 60
    while not any(line["step"] >= 6 for line in toy.lines()):
      assert process.poll() is None, faults.finish([process])[1]
      assert time.monotonic() < end
      time.sleep(0.02)
    with refusing(toy.folder):
      statuses, said = faults.finish([process])
    errors = [line for line in said.splitlines() if "error" in line.lower()]
    assert statuses == [1]
    assert len(errors) == 1, said
    assert errors[0].startswith("error: ")
    assert reason in errors[0]
    assert str(toy.folder) in errors[0]
    assert "Traceback" not in said
    # With room again the same command goes on from the last whole step.
    last = checkpoint_steps(toy.folder / "checkpoints")[-1]
    steps = f"--config.num_steps={last + 2}"
    assert toy.ends(steps, processes=1)[0] == [0]
    toy.assert_straight(last + 2)


@pytest.mark.parametrize("jump", [3e7, -3e7])  # seconds: a year
def test_a_clock_that_jumps_changes_nothing(toy, jump):
  program = toy.base / "toy.py"
  before, after = program.read_text().split(SLOW)
  program.write_text(JUMP.format(jump=jump) + before + "jump()" + after)
  statuses, said = toy.ends("--config.slow_from=6", processes=1)
  assert statuses == [0], said
  toy.assert_straight(12)
  first, *_, last = toy.lines()
  assert abs(last["time"] - first["time"] - jump) < 60
  assert 0 < last["time_run"] - first["time_run"] < 60
