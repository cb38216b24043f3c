"""The command line as a user meets it: help, overrides, refusals, statuses."""

import contextlib
import errno
import json
import logging
import os
import re

import jax
import pytest

from common import app, config, flags
from common.errors import Preempted, UserError
from common.places import take, taken

CONFIG = """
from ml_collections import ConfigDict, config_dict
from common.config import apply_variants

def get_config(variant=None):
  config = ConfigDict()
  config.seed = 0
  config.name = "toy"
  config.limit = config_dict.placeholder(int)
  config.optim = ConfigDict({"lr": 1e-3, "betas": (0.9, 0.95), "fused": True})
  config.mesh = ConfigDict({"shape": (1, 1), "axes": ("data", "model")})
  config.compile_cache = ""
  return apply_variants(config, variant, VARIANTS)

def smoke(config):
  config.seed = 7

def fast(config):
  config.optim.lr = 0.5

VARIANTS = {"smoke": smoke, "fast": fast}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """A working directory with `configs/toy.py` and nothing else."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs/toy.py").write_text(CONFIG)
  return tmp_path


class Result:
  """What `app.run` did with its arguments."""

  def __init__(self, capsys, arguments, main=None, **options):
    self.calls = []

    def default(config, workdir):
      self.calls.append((config, workdir))

    with pytest.raises(SystemExit) as info:
      app.run(
        main or default,
        name="toy",
        description="A toy.",
        example="python -m toy.main --config=configs/toy.py",
        argv=arguments,
        **options,
      )
    self.status = info.value.code
    self.out, self.err = capsys.readouterr()

  @property
  def config(self):
    ((config, _),) = self.calls
    return config


@pytest.fixture
def run(capsys):
  return lambda *arguments, **kwargs: Result(capsys, arguments, **kwargs)


def test_main_gets_the_config_and_a_folder(run, folder):
  result = run("--config=configs/toy.py")
  ((config, workdir),) = result.calls
  assert result.status == 0
  assert config.seed == 0
  assert config.is_locked
  assert workdir == str(folder / "runs/toy")
  assert os.path.isdir(workdir)


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (["--config=configs/toy.py:smoke"], "runs/toy-smoke"),
    (["--config", "configs/toy.py:smoke,fast"], "runs/toy-smoke-fast"),
    (["--config=configs/toy.py", "--workdir=a/b"], "a/b"),
  ],
)
def test_the_workdir(run, folder, arguments, expected):
  ((_, workdir),) = run(*arguments).calls
  assert workdir == str(folder / expected)


def test_a_verb_has_short_flags_and_a_folder_of_its_own(run, folder):
  options = {"verb": "compare", "aliases": {"rate": "optim.lr"}}
  arguments = ["--config=configs/toy.py:smoke", "--rate=0.25"]
  ((config, workdir),) = run(*arguments, **options).calls
  assert config.optim.lr == 0.25
  assert workdir == str(folder / "runs/toy-smoke-compare")
  page = run("--help", **options).out
  assert "python -m toy.compare" in page
  assert "--rate VALUE" in page
  assert "--config.optim.lr=VALUE" in page
  wrong = run("--config=configs/toy.py", "--rate=fast", **options)
  assert wrong.status == 2
  assert "--config.optim.lr=fast: expected a value of type float" in wrong.err


@pytest.mark.parametrize(
  ("arguments", "key", "value"),
  [
    (["--config.optim.lr=1e-2"], "optim.lr", 0.01),
    (["--config.optim.lr=1"], "optim.lr", 1.0),
    (["--config.optim.lr", "-1"], "optim.lr", -1.0),
    (["-config.seed=3"], "seed", 3),
    (["--config.seed=3", "--config.seed=4"], "seed", 4),
    (["--config.name=a=b c"], "name", "a=b c"),
    (["--config.name="], "name", ""),
    (["--config.limit=5"], "limit", 5),
    (["--config.optim.fused=false"], "optim.fused", False),
    (["--noconfig.optim.fused"], "optim.fused", False),
    (["--config.optim.betas=(0.5, 1)"], "optim.betas", (0.5, 1)),
    (["--config.mesh.shape=4", "--config.mesh.shape=2"], "mesh.shape", (4, 2)),
    (["--config.mesh.shape=()"], "mesh.shape", ()),
  ],
)
def test_typed_overrides(run, arguments, key, value):
  result = run(*arguments, "--config=configs/toy.py")
  found = config.flatten(result.config)[key]
  assert found == value
  assert type(found) is type(value)


def test_overrides_win_over_variants(run):
  result = run("--config=configs/toy.py:fast", "--config.optim.lr=2")
  assert result.config.optim.lr == 2.0


def test_print_config(run, folder):
  result = run(
    "--config=configs/toy.py:smoke", "--config.seed=9", "--print_config"
  )
  assert result.status == 0
  assert result.calls == []
  assert not (folder / "runs").exists()
  assert json.loads(result.out)["optim"]["betas"] == {"__tuple__": [0.9, 0.95]}
  assert config.from_json(result.out).seed == 9


@pytest.mark.parametrize(
  ("arguments", "lr"),
  [([], "0.001"), (["--config=configs/toy.py:fast"], "0.5")],
)
def test_help_lists_every_key_with_its_default(run, arguments, lr):
  result = run("--help", *arguments)
  assert result.status == 0
  assert result.calls == []
  listed = dict(re.findall(r"--config\.(\S+) +(\S.*)\n", result.out))
  del listed["KEY=VALUE"]  # the explanation of --config
  assert listed == {
    "seed": "0",
    "name": "'toy'",
    "limit": "None",
    "optim.lr": lr,
    "optim.betas": "(0.9, 0.95)",
    "optim.fused": "True",
    "mesh.shape": "(1, 1)",
    "mesh.axes": "('data', 'model')",
    "compile_cache": "''",
  }
  assert "variants: smoke, fast" in result.out
  assert "python -m toy.main --config=configs/toy.py" in result.out


def test_help_without_a_config_file(run, folder):
  (folder / "configs/toy.py").unlink()
  result = run("-h")
  assert result.status == 0
  assert "--workdir" in result.out


REFUSED = [
  ([], ["--config is missing", "for example: python -m toy.main"]),
  (["--config"], ["--config", "expected one argument"]),
  (
    ["--config=configs/tyo.py"],
    ["'configs/tyo.py'", "relative to the working"],
  ),
  (["--config=configs/tyo.py"], ["did you mean 'configs/toy.py'"]),
  (["--config=configs"], ["'configs'", "directory"]),
  (["--config=configs/toy.py:smok"], ["'smok'", "did you mean 'smoke'"]),
  (["--confg=x"], ["unknown flag '--confg'", "'--config'"]),
  (["--workdri=x"], ["unknown flag '--workdri'", "'--workdir'"]),
  (["--config.optim.lrr=1"], ["'optim.lrr'", "did you mean 'optim.lr'?"]),
  (["--config.lr=1"], ["no key 'lr'", "did you mean 'optim.lr'?"]),
  (["--config.optim={}"], ["'optim' is a group", "--config.optim."]),
  (["--config.seed=abc"], ["--config.seed=abc", "type int"]),
  (["--config.seed", "1.5"], ["--config.seed 1.5", "type int"]),
  (["--config.seed"], ["--config.seed", "type int"]),
  (["--config.optim.lr=fast"], ["--config.optim.lr=fast", "type float"]),
  (["--config.optim.fused=maybe"], ["--config.optim.fused=maybe", "type bool"]),
  (["--config.optim.fused", "1"], ["unexpected argument '1'", "optim.fused=…"]),
  (["--config.limit=x"], ["--config.limit=x", "int"]),
  (["--config.mesh.shape=(1, 'a')"], ["mesh.shape", "tuple of int", "'a'"]),
  (["--config.optim.betas=x"], ["optim.betas", "tuple of float", "'x'"]),
  (["stray"], ["unexpected argument 'stray'"]),
  (["--process_id=x"], ["--process_id", "'x'"]),
  (["--coordinator=h:1"], ["go together: --num_processes is missing"]),
  (
    ["--coordinator=h", "--num_processes=2", "--process_id=0"],
    ["--coordinator=h has no port"],
  ),
  (
    ["--coordinator=h:1", "--num_processes=2", "--process_id=2"],
    ["--process_id=2", "--num_processes=2"],
  ),
  (["--workdir=configs/toy.py"], ["workdir", "toy.py", "another --workdir"]),
  (["--workdir=/proc/nothing"], ["'/proc/nothing'", "another --workdir"]),
  (["--workdir=ftp://h/a"], ["'ftp://h/a'", "gs:// is one"]),
]


@pytest.mark.parametrize(("arguments", "parts"), REFUSED)
def test_bad_command_lines_get_one_line(run, arguments, parts):
  if arguments and not any(a.startswith("--config=") for a in arguments):
    arguments = ["--config=configs/toy.py", *arguments]
  result = run(*arguments)
  assert (result.status, result.out, result.calls) == (2, "", [])
  assert re.fullmatch(r"error: [^\n]+\n", result.err)
  for part in parts:
    assert part in result.err


@pytest.mark.parametrize(
  ("source", "parts"),
  [
    ("def get_config(:\n", ["toy.py, line 1: invalid syntax"]),
    ("x = 1\n", ["toy.py: it defines no get_config"]),
    ("\nimport no_such_thing\n", ["line 2: ModuleNotFoundError", "no_such"]),
    ("def get_config():\n  return {}\n", ["get_config returned a dict"]),
    ("def get_config():\n\n  return 1 / 0\n", ["line 3: ZeroDivisionError"]),
    (
      "from ml_collections import ConfigDict\n"
      "def get_config():\n  return ConfigDict({'f': (len,)})\n",
      ["config.f[0] is a builtin_function"],
    ),
  ],
)
def test_broken_config_files_get_one_line(run, folder, source, parts):
  (folder / "configs/toy.py").write_text(source)
  result = run("--config=configs/toy.py")
  assert result.status == 2
  assert re.fullmatch(r"error: [^\n]+\n", result.err)
  for part in parts:
    assert part in result.err


def test_an_edited_config_file_is_read_again(run, folder):
  assert run("--config=configs/toy.py").config.seed == 0
  (folder / "configs/toy.py").write_text(CONFIG.replace("seed = 0", "seed = 5"))
  assert run("--config=configs/toy.py").config.seed == 5
  assert os.listdir(folder / "configs") == ["toy.py"]


@pytest.mark.parametrize(
  ("error", "status", "message"),
  [
    (UserError("bad\n  mesh"), 2, "error: bad mesh\n"),
    (Preempted("preempted: saved step 3"), 143, "preempted: saved step 3\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (
      OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl"),
      1,
      "error: [Errno 28] No space left on device: 'metrics.jsonl'\n",
    ),
    (
      OSError(errno.EROFS, os.strerror(errno.EROFS), "metrics.jsonl"),
      1,
      "error: [Errno 30] Read-only file system: 'metrics.jsonl'\n",
    ),
    (
      ValueError("RESOURCE_EXHAUSTED: No space left on device [a/b]"),
      1,
      "error: RESOURCE_EXHAUSTED: No space left on device [a/b]\n",
    ),
  ],
)
def test_expected_ends(run, folder, error, status, message):
  def main(config, workdir):
    raise error

  result = run("--config=configs/toy.py", main=main)
  assert (result.status, result.out, result.err) == (status, "", message)
  if status == 2:  # refused: the folder is nobody's
    assert os.listdir(folder / "runs") == []
    return
  log = (folder / "runs/toy/run.log").read_text()
  assert f"the run ends: {type(error).__name__}" in log


def test_a_full_disk_is_found_behind_other_errors():
  def function():
    try:
      raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
      raise RuntimeError("could not save") from error

  assert app.call(function) == 1


def test_a_failure_keeps_its_traceback(run, folder):
  def main(config, workdir):
    raise ValueError("a bug")

  result = run("--config=configs/toy.py", main=main)
  assert result.status == 1
  for text in (result.err, (folder / "runs/toy/run.log").read_text()):
    assert text.count("Traceback") == 1
    assert "ValueError: a bug" in text


def test_the_log_holds_our_lines_and_the_warnings_of_others(run, folder):
  root = logging.getLogger()
  before = (root.level, list(root.handlers))

  def main(config, workdir):
    logging.getLogger("toy.train").info("step 1")
    logging.getLogger("common.train").info("step 2")
    logging.getLogger("other").info("chatter")
    logging.getLogger("other").warning("beware")

  result = run("--config=configs/toy.py", main=main)
  log = (folder / "runs/toy/run.log").read_text().splitlines()
  assert [line.rpartition(" ")[2] for line in log] == ["1", "2", "beware"]
  assert result.err == "step 1\nstep 2\nbeware\n"
  run("--config=configs/toy.py", main=main)
  assert len((folder / "runs/toy/run.log").read_text().splitlines()) == 6
  assert (root.level, root.handlers) == before


def test_an_error_that_comes_again_while_it_is_handled(run):
  """As that of a writer does, when what it belongs to is closed."""
  first = OSError(errno.ENOSPC, "No space left on device", "params")

  def main(config, workdir):
    try:
      raise RuntimeError("a save failed") from first
    finally:
      raise first

  result = run("--config=configs/toy.py", main=main)
  assert result.status == 1
  assert result.err == "error: [Errno 28] No space left on device: 'params'\n"


@pytest.mark.parametrize("starts", ["later", "at the same time"])
def test_a_run_that_is_refused_leaves_the_log_of_another_alone(
  run, folder, starts
):
  place = folder / "runs/toy"

  def main(config, workdir):
    with contextlib.ExitStack() as stack:
      if starts == "at the same time":  # no lock was seen
        other = stack.enter_context(contextlib.closing(take(place)))
        assert other
      logging.getLogger("toy").info("mine")
      with taken(workdir):
        logging.getLogger("toy").info("never")

  place.mkdir(parents=True)
  (place / "run.log").write_text("live\n")
  with taken(place) if starts == "later" else contextlib.nullcontext():
    result = run("--config=configs/toy.py", main=main)
  assert result.status == 2
  assert f"a run is at work in {place}" in result.err
  text = (place / "run.log").read_text()
  assert "the run ends" not in text
  assert ("mine" in text) == (starts == "at the same time")


def test_the_compilation_cache(run, folder):
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  try:
    run("--config=configs/toy.py")
    assert {name: getattr(jax.config, name) for name in names} == before
    run("--config=configs/toy.py", "--config.compile_cache=~/cache")
    assert jax.config.jax_compilation_cache_dir == os.path.expanduser("~/cache")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def test_a_verb_takes_the_parser_and_the_statuses(capsys):
  def verb(argv):
    parser = flags.Parser("toy.verb", description="A verb.", example="toy 1")
    parser.add_argument("--length", type=int, default=3)
    print(parser.parse_args(argv).length)

  assert app.call(lambda: verb(["--length=4"])) == 0
  assert app.call(lambda: verb(["--lenght=4"])) == 2
  assert app.call(lambda: verb(["--length=x"])) == 2
  assert app.call(lambda: verb(["--len=4"])) == 2
  out, err = capsys.readouterr()
  assert out == "4\n"
  assert [line.split(":")[0] for line in err.splitlines()] == ["error"] * 3
  assert "did you mean '--length'" in err
  with pytest.raises(SystemExit, match="0"):
    verb(["--help"])
  assert "example:\n  toy 1" in capsys.readouterr().out


def test_a_configuration_of_another_program_is_refused(run):
  result = run("--config=configs/toy.py", needs=("seed", "teacher"))
  assert result.status == 2
  assert not result.calls
  assert "configs/toy.py is none of toy: it has no 'teacher'" in result.err


@pytest.mark.parametrize(
  ("asked", "there", "problem"),
  [
    ("cuda", "cpu", "there is no such device"),
    ("cuda", "gpu", ""),
    ("cuda,cpu", "cpu", ""),
    ("tpu", None, "cannot open libtpu.so"),
  ],
)
def test_a_platform_that_is_asked_for_and_not_there(
  run, monkeypatch, asked, there, problem
):
  """jax leaves `cuda` out where there is no GPU, and would go on with cpu."""

  def backend():
    if there is None:
      raise RuntimeError(problem)
    return there

  before = jax.config.jax_platforms
  monkeypatch.setenv("JAX_PLATFORMS", asked)
  monkeypatch.setattr(jax, "default_backend", backend)
  try:
    result = run("--config=configs/toy.py")
  finally:
    jax.config.update("jax_platforms", before)
  assert result.status == bool(problem)
  line = f"error: JAX_PLATFORMS={asked}: {problem}; look for the driver"
  assert result.err.count("\n") == bool(problem)
  assert result.err.startswith(line) == bool(problem)
