import json
import logging
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import metrics
from common.errors import UserError
from common.metrics import Mean, MetricWriter, merge, read_metrics
from common.progress import ProgressBar

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
  ("values", "weights", "expected"),
  [
    ([1.0, 2.0, 6.0], None, 3.0),
    ([[1.0, 2.0], [3.0, 6.0]], None, 3.0),
    (5.0, None, 5.0),
    ([1.0, 2.0, 6.0], [1.0, 1.0, 0.0], 1.5),
    ([1.0, 3.0], [3.0, 1.0], 1.5),
    ([1.0, NAN], [1.0, 0.0], 1.0),  # what is masked cannot spoil the mean
    ([1.0, INF], [1.0, 0.0], 1.0),
    ([1.0, 2.0], [False, True], 2.0),
    ([1.0, 2.0], [0.0, 0.0], NAN),  # nothing counted
    ([1, 2], None, 1.5),
  ],
)
def test_mean(values, weights, expected):
  weights = None if weights is None else jnp.asarray(weights)
  mean = jax.jit(Mean.of)(jnp.asarray(values), weights)
  np.testing.assert_equal(float(mean.value()), expected)


def test_mean_of_unequal_parts_is_the_mean_of_the_whole():
  values = np.arange(10, dtype=np.float32)
  parts = [Mean.of(jnp.asarray(part)) for part in (values[:3], values[3:])]
  assert float((parts[0] + parts[1]).value()) == 4.5
  wrong = (float(parts[0].value()) + float(parts[1].value())) / 2
  assert wrong != 4.5


def test_bfloat16_values_are_summed_in_float32():
  ones = jnp.ones(1000, jnp.bfloat16)  # a bfloat16 sum would stop at 256
  mean = Mean.of(ones)
  assert (mean.total.dtype, float(mean.total)) == (jnp.float32, 1000.0)


def test_merge_adds_trees():
  first = {"a": Mean.of(jnp.array([1.0])), "b": Mean.of(jnp.array([2.0, 4.0]))}
  second = {"a": Mean.of(jnp.array([2.0, 3.0])), "b": Mean.of(jnp.zeros(0))}
  merged = merge(first, second)
  assert {k: float(m.value()) for k, m in merged.items()} == {"a": 2, "b": 3}


def test_merge_refuses_other_metrics():
  with pytest.raises(ValueError, match="b"):
    merge({"a": Mean.of(jnp.ones(1))}, {"b": Mean.of(jnp.ones(1))})


def scalars(lines):
  return [
    {k: v for k, v in line.items() if not k.startswith("time")}
    for line in lines
  ]


def no_constant(token):
  raise AssertionError(f"{token} is not JSON")


def test_lines_are_json_with_null_for_what_is_not_finite(tmp_path):
  writer = MetricWriter(tmp_path / "new")
  writer.write(1, {"loss": jnp.float32(0.5), "a": NAN, "b": -INF})
  writer.write(np.int64(2), {"loss": np.float32(0.25)})
  text = (tmp_path / "new" / "metrics.jsonl").read_text()
  lines = [
    json.loads(t, parse_constant=no_constant) for t in text.split("\n")[:-1]
  ]
  assert scalars(lines) == [
    {"step": 1, "loss": 0.5, "a": None, "b": None},
    {"step": 2, "loss": 0.25},
  ]
  assert list(lines[0])[:3] == ["step", "time", "time_run"]
  assert lines == read_metrics(tmp_path / "new")


@pytest.mark.parametrize("name", ["step", "time", "time_run"])
def test_a_metric_cannot_hide_a_clock(tmp_path, name):
  with pytest.raises(ValueError, match=name):
    MetricWriter(tmp_path).write(1, {name: 0.0})


def test_only_the_writer_writes(tmp_path):
  writer = MetricWriter(tmp_path / "run", is_writer=False)
  writer.write(1, {"loss": 1.0})
  writer.truncate(0)
  writer.close()
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3', "\0\0", "{"])
def test_a_torn_line_costs_that_line_only(tmp_path, torn, caplog):
  MetricWriter(tmp_path).write(1, {"loss": 1.0})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(torn)
  assert scalars(read_metrics(tmp_path)) == [{"step": 1, "loss": 1.0}]
  assert "line 2 is torn" in caplog.text
  writer = MetricWriter(tmp_path)
  writer.write(2, {"loss": 2.0})
  writer.write(3, {"loss": 3.0})
  steps = [line["step"] for line in read_metrics(tmp_path)]
  assert steps == [1, 2, 3]


@pytest.mark.parametrize(
  ("step", "kept"),
  [(0, []), (1, [1]), (3, [1, 2]), (4, [1, 2, 4, 4]), (9, [1, 2, 4, 4])],
)
def test_truncate_goes_back_to_a_step(tmp_path, step, kept):
  writer = MetricWriter(tmp_path)
  for s in (1, 2, 4, 4):
    writer.write(s, {"loss": float(s)})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 1, "torn')
  MetricWriter(tmp_path).truncate(step)
  text = (tmp_path / "metrics.jsonl").read_text()
  assert [json.loads(line)["step"] for line in text.splitlines()] == kept
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_clock_of_the_run_goes_on_after_a_resume(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(
    '{"step": 1, "time": 1.0, "time_run": 100.0}\n'
    '{"step": 2, "time": 2.0, "time_run": 200.0}\n'
  )
  writer = MetricWriter(tmp_path)
  writer.truncate(1)
  writer.write(2, {})
  assert 100 <= read_metrics(tmp_path)[-1]["time_run"] < 150


def test_lines_survive_when_nothing_is_closed(tmp_path):
  writer = MetricWriter(tmp_path)
  writer.write(1, {"loss": 1.0})
  assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")


def test_missing_metrics_are_one_line(tmp_path):
  with pytest.raises(
    UserError, match=r"no metrics in .*metrics\.jsonl"
  ) as error:
    read_metrics(tmp_path)
  assert "\n" not in str(error.value)


def test_tensorboard_missing_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[tensorboard\]'"):
    MetricWriter(tmp_path, tensorboard=True)


def test_tensorboard_gets_every_number_and_where_a_resume_starts(
  tmp_path, monkeypatch
):
  calls = []

  class Board:
    def __init__(self, folder, purge_step):
      calls.append((folder, purge_step))

    def add_scalar(self, *args):
      calls.append(args)

    def close(self):
      calls.append("close")

  fake = type(sys)("tensorboardX")
  fake.SummaryWriter = Board
  monkeypatch.setitem(sys.modules, "tensorboardX", fake)
  with_resume = MetricWriter(tmp_path, tensorboard=True)
  with_resume.truncate(7)
  with_resume.write(8, {"loss": 1.0})
  with_resume.write(9, {"loss": 2.0, "never": NAN})
  with_resume.close()
  folder = str(tmp_path / "tensorboard")
  assert calls == [(folder, 8), ("loss", 1.0, 8), ("loss", 2.0, 9), "close"]


def test_object_stores_are_rewritten_because_they_cannot_append(monkeypatch):
  class Bucket:
    content = b'{"step": 1, "torn'

    def __fspath__(self):
      return "gs://bucket/run/metrics.jsonl"

    def exists(self):
      return True

    def read_bytes(self):
      return self.content

    def write_bytes(self, content):
      self.content = content

  writer = MetricWriter("unused", is_writer=False)
  bucket = Bucket()
  monkeypatch.setattr(writer, "_path", bucket)
  monkeypatch.setattr(writer, "_is_writer", True)
  writer.write(2, {"loss": 2.0})
  writer.write(3, {"loss": 3.0})
  assert bucket.content.count(b"\n") == 2  # the second is not urgent
  writer.flush()
  torn, *whole = bucket.content.decode().splitlines()
  assert torn == '{"step": 1, "torn'
  assert [json.loads(line)["step"] for line in whole] == [2, 3]


def test_the_disk_is_waited_for_at_most_once_a_second(tmp_path, monkeypatch):
  synced, clock = [], [0.0]
  monkeypatch.setattr(metrics.os, "fsync", synced.append)
  monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
  writer = MetricWriter(tmp_path)
  counts = []
  for now in (0.0, 0.5, 0.9, 1.5, 2.0, 2.6):
    clock[0] = now
    writer.write(1, {})
    counts.append(len(synced))
  assert counts == [1, 1, 1, 2, 2, 3]


def test_progress_is_plain_lines_where_there_is_no_terminal(
  caplog, monkeypatch
):
  clock = [100.0]
  monkeypatch.setattr("common.progress.time.monotonic", lambda: clock[0])
  caplog.set_level(logging.INFO, "common.progress")
  with ProgressBar(8000, name="toy") as progress:
    progress.start(200)
    clock[0] += 50
    progress.update(300, {"train/loss": 1.23456})
    progress.update(300, {})
  assert caplog.messages == [
    "step 300 of 8000  loss 1.2346  2.00 steps/s  1:04:10 left",
    "step 300 of 8000  2.00 steps/s  1:04:10 left",
  ]


def test_a_terminal_shows_a_bar_and_the_file_gets_the_lines(
  monkeypatch, tmp_path
):
  class Terminal:
    def __init__(self):
      self.text = ""

    def write(self, text):
      self.text += text

    def flush(self):
      pass

    def isatty(self):
      return True

  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  root = logging.getLogger()
  handlers = [
    logging.StreamHandler(terminal),
    logging.FileHandler(tmp_path / "log"),
  ]
  monkeypatch.setattr(root, "handlers", handlers)
  monkeypatch.setattr(root, "level", logging.INFO)
  monkeypatch.setattr(
    logging.getLogger("common.progress"), "level", logging.INFO
  )
  with ProgressBar(10, name="toy") as progress:
    progress.start(0)
    progress.update(10, {"train/loss": 0.5})
    root.warning("something else")
  root.warning("afterwards")
  handlers[1].close()
  assert "toy: 100%" in terminal.text
  assert "loss 0.5000" in terminal.text
  assert "step 10 of 10" not in terminal.text
  assert "\rsomething else\n" in terminal.text  # the bar made room
  assert terminal.text.endswith("afterwards\n")
  lines = (tmp_path / "log").read_text().splitlines()
  assert lines[0].startswith("step 10 of 10  loss 0.5000")
  assert lines[1:] == ["something else", "afterwards"]
  assert handlers[0].filters == []
