"""Checkpoints: whole or not there, on any mesh, never overwritten."""

import dataclasses
import errno
import os
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

from common import checksums
from common.checkpoint import Checkpointer, checkpoint_steps, load_params
from common.errors import RunError, UserError
from common.parallel import make_mesh, shardings
from common.state import TrainState

RULES = [("kernel", jax.P("data")), (".*", jax.P())]


class Box:
  """Host state: an iterator's position, or a hook's."""

  def __init__(self, value=None):
    self.value = value

  def get_state(self):
    return self.value

  def set_state(self, value):
    self.value = value


def make_state(step, mesh):
  def create():
    params = {"kernel": jnp.arange(32.0).reshape(8, 4) + step}
    state = TrainState.create(
      params, optax.adam(1e-3), {"key": jax.random.key(step)}
    )
    return state.replace(step=jnp.int32(step))

  tree = jax.eval_shape(create)
  return jax.jit(create, out_shardings=shardings(tree, mesh, RULES))()


def abstract(state, mesh):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    shardings(state, mesh, RULES),
  )


def numpy(state):
  return jax.tree.map(
    lambda x: np.asarray(
      jax.random.key_data(x)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
    ),
    state,
  )


@pytest.fixture
def mesh():
  return make_mesh({"data": 4, "fsdp": 2})


def test_everything_comes_back_on_another_mesh(tmp_path, mesh):
  state = make_state(3, mesh)
  saved = Checkpointer(tmp_path / "c")
  saved.save(3, state, Box({"step": 3}), {"log": Box([1.5])})
  saved.close()
  other = make_mesh({"data": 2, "fsdp": 2, "model": 2})
  data, hook = Box(), Box()
  restored = Checkpointer(tmp_path / "c").restore(
    abstract(state, other), data, {"log": hook}
  )
  chex.assert_trees_all_equal(numpy(state), numpy(restored))
  chex.assert_trees_all_equal_dtypes(state, restored)  # a key is a key
  assert restored.params["kernel"].sharding.mesh.shape["data"] == 2
  assert (data.value, hook.value) == ({"step": 3}, [1.5])


def test_the_newest_and_the_best_stay_over_restarts(tmp_path, mesh):
  for steps in ([1, 2, 3, 4], [5, 6]):
    checkpointer = Checkpointer(tmp_path / "c", keep=2, best="loss")
    for step in steps:
      loss = abs(step - 2.0)
      checkpointer.save(
        step, make_state(step, mesh), None, metrics={"loss": loss}
      )
    checkpointer.close()
  assert Checkpointer(tmp_path / "c").steps == [2, 5, 6]


def test_a_step_is_never_overwritten(tmp_path, mesh):
  checkpointer = Checkpointer(tmp_path / "c")
  checkpointer.save(1, make_state(1, mesh), None)
  with pytest.raises(
    UserError, match=r"checkpoint 1 exists .* another workdir"
  ):
    checkpointer.save(1, make_state(1, mesh), None)
  checkpointer.close()


def test_nothing_to_restore_is_none(tmp_path, mesh):
  state = make_state(0, mesh)
  found = Checkpointer(tmp_path / "c").restore(abstract(state, mesh), None)
  assert found is None


@pytest.mark.parametrize("harm", ["cut", "bit"])
@pytest.mark.parametrize("item", ["params", "state", "data", "host", "metrics"])
def test_a_broken_checkpoint_falls_back_and_says_so(
  tmp_path, mesh, item, harm, caplog
):
  checkpointer = Checkpointer(tmp_path / "c", best="loss")
  for step in (1, 2):
    state, position = make_state(step, mesh), Box({"step": step})
    checkpointer.save(step, state, position, metrics={"loss": step / 4})
  checkpointer.close()
  files = [f for f in (tmp_path / "c/2" / item).rglob("*") if f.is_file()]
  file = max(files, key=lambda file: file.stat().st_size)
  data = bytearray(file.read_bytes())
  if harm == "bit":
    data[len(data) // 2] ^= 1
  else:
    del data[len(data) // 2 :]
  file.write_bytes(data)
  if item == "params":
    assert load_params(tmp_path / "c")[0] == 1
  checkpointer = Checkpointer(tmp_path / "c", best="loss")
  data = Box()
  state = checkpointer.restore(abstract(make_state(0, mesh), mesh), data)
  assert (int(state.step), data.value) == (1, {"step": 1})
  assert "checkpoint 2 cannot be read" in caplog.text
  checkpointer.save(2, make_state(2, mesh), None)  # its place is free again
  checkpointer.close()
  assert (tmp_path / "c.unreadable" / "2").is_dir()


def test_a_checkpoint_without_hashes_is_read_and_says_so(
  tmp_path, mesh, caplog
):
  checkpointer = Checkpointer(tmp_path / "c")
  checkpointer.save(1, make_state(1, mesh), None)
  checkpointer.wait()
  (tmp_path / "c/1/checksums.json").unlink()
  state = checkpointer.restore(abstract(make_state(0, mesh), mesh), None)
  assert int(state.step) == 1
  assert "checkpoint 1 has no hashes" in caplog.text


def test_of_several_one_whose_save_fails_hears_of_it_once_and_waits_no_more(
  tmp_path, mesh, monkeypatch
):
  """The others' writers wait for its, which has ended."""
  checkpointer = Checkpointer(tmp_path / "c")
  manager = checkpointer._manager
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(manager, "is_saving_in_progress", lambda: True)
  checkpointer.close(patience=0)  # returns, whatever others do
  manager.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  with pytest.raises(OSError, match="while saving a checkpoint"):
    checkpointer.wait()
  checkpointer.close(patience=None)


def test_a_writer_that_fails_is_noted_before_the_others_know(
  tmp_path, mesh, monkeypatch
):
  checkpointer = Checkpointer(tmp_path / "c")

  def fail(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(checksums, "write", fail)
  checkpointer.save(1, make_state(1, mesh), None)
  with pytest.raises(OSError, match="while saving a checkpoint"):
    checkpointer.wait()
  assert checkpointer._manager.failure.errno == errno.ENOSPC


def test_no_training_asks_for_a_stop_with_the_numbers_of_another(
  tmp_path, mesh, monkeypatch
):
  """jax names the next number that nobody has asked with; steps come again."""
  asked = []

  def reached(number):
    asked.append(number)
    return False

  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
  for name in ("a", "b"):
    checkpointer = Checkpointer(tmp_path / name)
    for step in (1, 2):
      with monkeypatch.context() as several:
        several.setattr(jax, "process_count", lambda: 2)
        assert not checkpointer.reached_preemption()
      checkpointer.save(step, make_state(step, mesh), None)
    checkpointer.close()
  first = asked[0]
  assert asked == [first, first + 1, first + 2, first + 3]


def test_a_changed_model_moves_nothing_away(tmp_path, mesh):
  checkpointer = Checkpointer(tmp_path / "c")
  checkpointer.save(1, make_state(1, mesh), None)
  checkpointer.wait()
  state = abstract(make_state(1, mesh), mesh)
  wrong = state.replace(
    params={"other": jax.ShapeDtypeStruct((2,), jnp.float32)}
  )
  with pytest.raises(UserError, match=r"none of the checkpoints \[1\]"):
    checkpointer.restore(wrong, None)
  assert checkpointer.steps == [1]


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path, mesh):
  leftover = tmp_path / "c" / "7.orbax-checkpoint-tmp"
  (leftover / "state").mkdir(parents=True)
  checkpointer = Checkpointer(tmp_path / "c")
  assert checkpointer.steps == []
  checkpointer.save(7, make_state(7, mesh), None)
  checkpointer.close()
  assert checkpointer.steps == [7]
  assert not leftover.exists()


@pytest.mark.parametrize("as_numpy", [True, False])
def test_parameters_are_read_alone(tmp_path, mesh, as_numpy):
  state = make_state(5, mesh)
  checkpointer = Checkpointer(tmp_path / "c")
  checkpointer.save(5, state, None)
  checkpointer.close()
  for file in (tmp_path / "c" / "5" / "state").rglob("*"):
    if file.is_file():
      file.unlink()
  target = None if as_numpy else abstract(state, mesh).params
  step, params = load_params(tmp_path / "c", target)
  assert step == 5
  np.testing.assert_array_equal(params["kernel"], state.params["kernel"])


def test_the_rest_of_the_state_is_read_as_plain_dicts(tmp_path, mesh):
  with_extra = dataclasses.replace(make_state(5, mesh), extra={"a": {"b": 3}})
  checkpointer = Checkpointer(tmp_path / "c")
  checkpointer.save(5, with_extra, None)
  checkpointer.close()
  assert checkpoint_steps(tmp_path / "c") == [5]
  step, state = load_params(tmp_path / "c", item="state")
  assert step == int(state["step"]) == 5
  assert state["extra"]["a"]["b"] == 3


@pytest.mark.parametrize("folder", ["seed0", "seed0/finetune"])
def test_what_a_comparison_has_removed_is_said(tmp_path, folder, one_line):
  (tmp_path / folder).mkdir(parents=True)
  (tmp_path / "seed0" / "result.json").write_text("{}")
  said = one_line(checkpoint_steps, tmp_path / folder / "checkpoints")
  assert "compare.keep_checkpoints=true" in said


@pytest.mark.parametrize(
  ("step", "message"),
  [(None, "no checkpoints in .*train first"), (4, "no checkpoint 4 .*")],
)
def test_missing_parameters_are_one_line(tmp_path, mesh, step, message):
  directory: pathlib.Path = tmp_path / "c"
  if step is not None:
    checkpointer = Checkpointer(directory)
    checkpointer.save(1, make_state(1, mesh), None)
    checkpointer.close()
  with pytest.raises(UserError, match=message):
    load_params(directory, step=step)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_storage_refuses_is_one_os_error(
  tmp_path, mesh, monkeypatch, code
):
  checkpointer = Checkpointer(tmp_path / "c")

  def refuse(*_, **__):
    raise ValueError(f"[Errno {code}] {os.strerror(code)}: while writing")

  monkeypatch.setattr(checkpointer._manager, "save", refuse)
  message = f"{os.strerror(code)} while saving .* are whole"
  with pytest.raises(OSError, match=message) as caught:
    checkpointer.save(1, make_state(1, mesh), None)
  assert caught.value.errno == code


def test_a_save_that_is_not_answered_is_one_run_error(
  tmp_path, mesh, monkeypatch
):
  checkpointer = Checkpointer(tmp_path / "c")

  def hang():
    raise TimeoutError("timed out after 300 seconds")

  monkeypatch.setattr(checkpointer._manager, "wait_until_finished", hang)
  with pytest.raises(RunError, match="not saved in time"):
    checkpointer.wait()
