"""What SECURITY.md promises of the whole project: read from the syntax tree,
and seen in a process that trains.

Files that lie are refused in `tests/common/test_hostile_files.py` and beside
their readers.
"""

import ast
import fnmatch
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.data import Loader
from common.errors import UserError
from common.logs import one_line
from common.metrics import Mean
from common.rngs import RngStreams
from common.state import TrainState
from common.step import make_train_step
from common.train import train

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = (
  "benchmarks", "birdie", "common", "configs", "launch", "slimsam", "tests",
  "thor", "udim",
)  # fmt: skip

# module -> why nothing imports it
MODULES = {
  **dict.fromkeys(
    ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal",
     "shelve"), "what it reads may be any program",
  ),
  **dict.fromkeys(
    ("http.server", "socketserver", "socket", "xmlrpc", "asyncio"),
    "nothing listens on the network",
  ),
  **dict.fromkeys(
    ("ftplib", "http.client", "huggingface_hub", "httpx", "requests",
     "urllib.request"), "nothing is fetched from the net",
  ),
}  # fmt: skip
# call -> a setting that makes it harmless, or None
CALLS = {
  "eval": None, "exec": None, "os.system": None, "os.popen": None,
  "pickle.load": None, "pickle.loads": None, "tempfile.mktemp": None,
  "yaml.load": None, "yaml.unsafe_load": None, "shutil.unpack_archive": None,
  "jax.export.deserialize": None, "jax.profiler.start_server": None,
  "torch.load": ("weights_only", True),
  "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False),
}  # fmt: skip
METHODS = ("extractall", "extract")  # of archives
_LAST = {name.rpartition(".")[2] for name in CALLS}
_WORDS = re.compile(
  rf"\b({'|'.join([*MODULES, *_LAST, *METHODS, 'shell'])})\b".replace(
    ".", r"\b.+\b"
  )
)
# (file, what) -> why it may
ALLOWED = {
  ("common/flags.py", "exec"): "configurations are programs, as documented",
  ("common/addresses.py", "socket"): "asks whether an address is the machine's",
  ("birdie/export.py", "jax.export.deserialize"): "documented as a program",
  ("tests/*", "pickle"): "sends objects of the test's own, as to workers",
  ("tests/*", "pickle.loads"): "reads them again",
  ("tests/*", "jax.export.deserialize"): "of what the test has written",
  ("tests/*", "exec"): "runs what our own pages show",
  ("tests/*", "socket"): "finds a free port of 127.0.0.1",
  ("benchmarks/faults_runs.py", "socket"): "finds a free port of 127.0.0.1",
  ("tests/birdie/test_weights.py", "shell=True"): "runs our own page's command",
}


def breaches(path: str, source: str):
  """Yields (line, what) for what a file must not do."""
  if not _WORDS.search(source):  # most of the files: parsing takes seconds
    return
  tree = ast.parse(source, path)
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      names = []
    for name in names:
      yield from (
        (node.lineno, module)
        for module in MODULES
        if f"{name}.".startswith(f"{module}.")
      )
    if isinstance(node, ast.Call):
      yield from ((node.lineno, what) for what in of_call(node))


def of_call(node: ast.Call):
  settings = {
    keyword.arg: getattr(keyword.value, "value", None)
    for keyword in node.keywords
  }
  last = getattr(node.func, "attr", getattr(node.func, "id", ""))
  name = ast.unparse(node.func) if last in _LAST else ""
  if name in CALLS and (CALLS[name] is None or not safe(name, settings)):
    yield name
  if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
    yield f".{node.func.attr}"
  if settings.get("shell"):
    yield "shell=True"


def safe(name: str, settings: dict) -> bool:
  key, value = CALLS[name]
  return settings.get(key) is value


def sources():
  for folder in FOLDERS:
    for path in sorted((ROOT / folder).rglob("*.py")):
      yield path.relative_to(ROOT).as_posix(), path.read_text()


def test_nothing_runs_what_it_reads_listens_or_fetches():
  found, used = [], set()
  for path, source in sources():
    for line, what in breaches(path, source):
      key = next(
        (k for k in ALLOWED if fnmatch.fnmatch(path, k[0]) and k[1] == what),
        None,
      )
      used.add(key)
      if key is None:
        found.append(f"{path}:{line}: {what}: {MODULES.get(what, 'refused')}")
  assert not found, "\n".join(found)
  assert used == {*ALLOWED}, "allowed, and used nowhere"


BAD = [
  "import pickle", "from pickle import loads", "import marshal as m",
  "def f():\n  import cloudpickle", "import http.server",
  "from http import server", "import urllib.request",
  "from urllib.request import urlopen", "from huggingface_hub import x",
  "eval('1')", "exec(compile('', '', 'exec'))", "os.system('ls')",
  "torch.load(p)", "torch.load(p, weights_only=False)",
  "torch.load(p, weights_only=flag)", "np.load(p)", "numpy.load(p)",
  "np.load(p, allow_pickle=True)", "yaml.load(f)", "tempfile.mktemp()",
  "subprocess.run('ls', shell=True)", "archive.extractall(p)",
  "tarfile.open(p).extract(m)", "jax.export.deserialize(d)",
  "jax.profiler.start_server(9999)",
]  # fmt: skip


@pytest.mark.parametrize("source", BAD)
def test_the_checker_sees_a_breach(source):
  assert len(list(breaches("a.py", source))) == 1


GOOD = [
  "model.eval()", "np.load(p, mmap_mode='r', allow_pickle=False)",
  "torch.load(p, weights_only=True)", "subprocess.run(['ls'])",
  "yaml.safe_load(f)", "import pickletools", "from . import pickle",
  "import http", "re.search('eval', text)",
]  # fmt: skip


@pytest.mark.parametrize("source", GOOD)
def test_the_checker_lets_good_code_pass(source):
  assert not list(breaches("a.py", source))


def listening() -> list[str]:
  """Local addresses that this process listens on, as the system writes them."""
  own = set()
  for number in os.listdir("/proc/self/fd"):
    try:
      own.add(os.readlink(f"/proc/self/fd/{number}"))
    except OSError:  # closed meanwhile
      continue
  found = []
  for table in ("tcp", "tcp6", "udp", "udp6"):
    path = pathlib.Path(f"/proc/self/net/{table}")
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    for _, address, _, state, *rest in map(str.split, lines):
      inode = rest[5]
      # 0A: listens. UDP has no such state: a bound socket is one.
      is_open = state == "0A" or table.startswith("udp")
      if is_open and f"socket:[{inode}]" in own:
        found.append(address)
  return found


needs_proc = pytest.mark.skipif(
  not os.path.exists("/proc/self/net/tcp"), reason="Linux says it, others not"
)


@needs_proc
def test_a_socket_that_listens_would_be_seen():
  import socket

  before = listening()
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    server.listen()
    (found,) = set(listening()) - set(before)
  assert found.startswith("0100007F:")
  assert listening() == before


def loss_fn(params, batch, rngs):
  del rngs
  error = (params["w"] - batch["x"]) ** 2
  return jnp.mean(error), {"loss": Mean.of(error)}


def fetch(k, arg):
  del arg
  return {"x": np.full((8,), k, np.float32)}


@needs_proc
def test_a_training_process_listens_on_nothing(monkeypatch):
  """On eight devices, with what loads its batches: during a step."""
  monkeypatch.syspath_prepend(ROOT)  # where the worker finds `fetch`
  mesh = jax.make_mesh((8,), ("data",))
  sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
  seen = []

  class Look:
    every = 1

    def __call__(self, info):
      seen.append(listening())

  tx = optax.adam(0.1)
  state = TrainState.create({"w": jnp.ones(1)}, tx)
  step = make_train_step(loss_fn, tx, RngStreams(0))
  with Loader(fetch, workers=1, sharding=sharding) as data:
    train(state, step, data, num_steps=3, hooks=(Look(),))
  assert seen == [[], [], []]


def test_control_characters_do_not_reach_the_terminal():
  error = UserError("a\x1b[31mb\x9b1m.png:\n is no image")
  assert one_line(error) == "a\ufffd[31mb\ufffd1m.png: is no image"
