"""A run's folder: what starts anew, what goes on, what is refused."""

import importlib.util
import json
import pathlib

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from common.app import make_workdir
from common.errors import RunError, UserError
from common.state import TrainState
from common.workdir import Workdir, check_shared

CONFIG = ConfigDict({"seed": 0, "log": {"every": 1}})


def open_run(path, changes=(), **settings):
  config = CONFIG.copy_and_resolve_references()
  config.update_from_flattened_dict(dict(changes))
  return Workdir(path, config, free=("log",), **settings)


def make_state():
  return TrainState.create({"w": jnp.ones(3)}, optax.sgd(0.1))


def save(folder, step=1):
  state = make_state()
  state = state.replace(step=jnp.asarray(step, jnp.int32))
  folder.checkpointer.save(step, state, None)
  folder.checkpointer.wait()


def resume(folder):
  shapes = jax.eval_shape(make_state)
  return folder.resume(make_state, shapes, None, {})


def test_before_the_first_checkpoint_the_configuration_may_change(tmp_path):
  """A start that was refused, or died at once, does not take the folder."""
  with open_run(tmp_path):
    pass
  with open_run(tmp_path, {"seed": 1}) as folder:
    assert int(resume(folder).step) == 0
    save(folder)
  with pytest.raises(UserError, match="seed: 1 -> 0"):
    open_run(tmp_path)


def test_free_keys_may_change_and_the_run_goes_on(tmp_path):
  with open_run(tmp_path) as folder:
    for step in (1, 2):
      folder.writer.write(step, {"loss": 1.0})
    save(folder)
  with open_run(tmp_path, {"log.every": 5}) as folder:
    assert int(resume(folder).step) == 1
  # What was written after the checkpoint will be lived again.
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_pinned_facts_may_not_change(tmp_path):
  with open_run(tmp_path, facts={"text_hash": "a"}, pinned=("text_hash",)) as f:
    save(f)
  with pytest.raises(UserError, match="text_hash is b, but the run"):
    open_run(tmp_path, facts={"text_hash": "b"}, pinned=("text_hash",))


def test_checkpoints_of_nobody_are_refused(tmp_path):
  with open_run(tmp_path) as folder:
    save(folder)
  (tmp_path / "config.json").unlink()
  with pytest.raises(UserError, match=r"holds a run but no config\.json"):
    open_run(tmp_path)


def test_metrics_of_another_configuration_are_not_wiped(tmp_path):
  with open_run(tmp_path) as folder:
    folder.writer.write(1, {"loss": 1.0})
  with pytest.raises(UserError, match="seed: 0 -> 1"):
    open_run(tmp_path, {"seed": 1})
  assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_second_run_at_the_same_time_is_refused(tmp_path):
  with open_run(tmp_path), pytest.raises(UserError, match="is at work in"):
    open_run(tmp_path)
  with open_run(tmp_path):
    pass


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """The folder in which everything of `gs://bucket/` lies."""
  if importlib.util.find_spec("tensorflow"):
    pytest.skip("TensorFlow would be asked for the bucket")

  class Buckets(LocalFileSystem):
    """Has no empty folders, as buckets have none."""

    protocol = "gs"

    def makedirs(self, path, exist_ok=False):
      pass

    mkdir = makedirs

    @classmethod
    def _strip_protocol(cls, path):
      name = str(path).removeprefix("gs://")
      return name if name.startswith("/") else str(tmp_path / name)

    def _open(self, path, mode="rb", **kwargs):
      if not path.startswith(str(tmp_path / "bucket")):
        raise FileNotFoundError(path)
      pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
      return super()._open(path, mode, **kwargs)

  stand_in = Buckets()
  monkeypatch.setattr(
    backend.fsspec_backend, "_get_filesystem", lambda name: stand_in
  )
  (tmp_path / "bucket").mkdir()
  return tmp_path / "bucket"


def test_a_run_in_a_bucket(bucket):
  with open_run("gs://bucket/run") as folder:
    resume(folder)
    for step in (1, 2):
      folder.writer.write(step, {"loss": 0.5})
  with open_run("gs://bucket/run") as folder:
    folder.writer.write(3, {"loss": 0.25})
  lines = (bucket / "run/metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
  assert json.loads((bucket / "run/config.json").read_text())["seed"] == 0
  with pytest.raises(UserError, match="seed: 0 -> 1"):
    open_run("gs://bucket/run", {"seed": 1})


def test_a_bucket_has_all_lines_of_a_checkpoint(bucket, monkeypatch):
  # Arrays go to Google by another way.
  monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *_, **__: None)
  file = bucket / "run/metrics.jsonl"

  def steps():
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]

  with open_run("gs://bucket/run") as folder:
    state = resume(folder)
    for step in (1, 2, 3):
      folder.writer.write(step, {"loss": 0.5})
    assert steps() == [1]  # the others wait for company
    folder.checkpointer.save(3, state, None)
    assert steps() == [1, 2, 3]
    folder.writer.write(4, {"loss": 0.5})
    # A run that is killed here goes on from step 3.
    folder.writer.truncate(3)
    folder.writer.write(4, {"loss": 0.25})
    assert steps() == [1, 2, 3]
  assert steps() == [1, 2, 3, 4]
  assert json.loads(file.read_text().splitlines()[-1])["loss"] == 0.25


class Answer(Exception):
  """As gcsfs raises it: what a bucket has said, with the status."""

  def __init__(self, code):
    super().__init__(f"no, {code}")
    self.code = code


@pytest.mark.parametrize(
  ("answer", "error", "message"),
  [
    (FileNotFoundError("b/o"), UserError, "there is no such bucket"),
    (OSError("Forbidden: b/o\nno"), UserError, "this machine may not write"),
    (Answer(401), UserError, r"this machine may not write there \(no, 401\)"),
    (Answer(503), RunError, r"^cannot reach .*/run': Answer: no, 503$"),
  ],
)
def test_what_a_bucket_refuses_is_a_line(
  bucket, monkeypatch, answer, error, message
):
  """Whether making a folder in it asks it, or the first file does."""

  def refuse(*args, **kwargs):
    raise answer

  monkeypatch.setattr(fsspec.AbstractFileSystem, "open", refuse)
  with pytest.raises(error, match=message):
    open_run("gs://bucket/run")
  monkeypatch.setattr(
    backend.fsspec_backend._get_filesystem("gs"), "makedirs", refuse
  )
  with pytest.raises(error, match=message):
    make_workdir("gs://bucket/run")


def test_what_process_0_cannot_write_all_of_them_hear(bucket, monkeypatch):
  told = []

  def broadcast(value):
    told.append(value)
    return value

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
  with pytest.raises(UserError, match="'gs://buckte': there is no such bucket"):
    check_shared(epath.Path("gs://buckte"))
  with pytest.raises(FileNotFoundError):
    check_shared(epath.Path(bucket / "missing"))
  assert [int(status) for status in told[1::2]] == [2, 1]

  monkeypatch.setattr(jax, "process_index", lambda: 1)
  for status, error in ((2, UserError), (1, RunError)):
    answers = [np.array(status), np.zeros(2, np.uint32)]
    monkeypatch.setattr(
      multihost_utils, "broadcast_one_to_all", lambda _, a=answers: a.pop()
    )
    with pytest.raises(error, match="process 0 cannot write to 'gs://buckte'"):
      check_shared(epath.Path("gs://buckte"))


def test_an_interrupt_says_what_is_saved(tmp_path):
  def interrupted(*steps):
    with open_run(tmp_path) as folder:
      for step in steps:
        save(folder, step)
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt, match="before the first checkpoint"):
    interrupted()
  with pytest.raises(KeyboardInterrupt) as caught:
    interrupted(4, 8)
  assert str(caught.value) == (
    "interrupted: step 8 is saved, and the same command goes on"
  )


def test_a_finished_run_says_so(tmp_path, caplog):
  caplog.set_level("INFO")
  for _ in range(2):
    config = ConfigDict({"num_steps": 8})
    with Workdir(tmp_path, config) as folder:
      resume(folder)
      if not folder.checkpointer.steps:
        save(folder, 8)
  page = tmp_path / "report.md"
  assert f"{tmp_path} has finished; its report is {page}" in caplog.messages
  assert not any("resumed" in message for message in caplog.messages)
