"""The import rules of WORKSPACE.md, read from the syntax tree."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECTS = ("birdie", "slimsam", "thor", "udim")
OURS = (*PROJECTS, "common", "configs")
OPTIONAL = (
  "babel",
  "lm_eval",
  "onnx",
  "onnxruntime",
  "sacrebleu",
  "safetensors",
  "sentencepiece",
  "tensorboardX",
  "tensorflow",
  "tokenizers",
  "torch",
  "transformers",
  "wandb",
)
BANNED = {
  "flax.training": "write it with optax and common.train",
  "flax.metrics": "use common.metrics",
  "flax.nnx": "models are Linen",
  "jax.experimental.pjit": "use jax.jit with shardings",
  "jax.experimental.shard_map": "use jax.shard_map",
  "jax.pmap": "use jax.jit with shardings",
}


def in_package(module: str, package: str) -> bool:
  return module == package or module.startswith(f"{package}.")


def may_import_linen(path: str) -> bool:
  name = path.rpartition("/")[2]
  return (
    path == "common/nn.py"
    or name.startswith("model")
    or name == "reward_model.py"
  )


def imported(tree: ast.AST, path: str):
  """Yields (line, module or module.name, whether at module level)."""
  package = path.split("/")[:-1]
  inside = {
    id(node)
    for function in ast.walk(tree)
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for node in ast.walk(function)
  }
  for node in ast.walk(tree):
    top = id(node) not in inside
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name, top
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else []
      module = ".".join([*base, *filter(None, [node.module])])
      for alias in node.names:
        yield node.lineno, f"{module}.{alias.name}", top


def used(tree: ast.AST):
  """Yields (line, dotted name) for attributes such as `jax.pmap`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      yield node.lineno, ast.unparse(node)


def why_not(path: str, module: str, top: bool) -> str | None:
  """Why the file at `path` must not import `module`, or None if it may."""
  own, root = path.split("/")[0], module.split(".")[0]
  for name, remedy in BANNED.items():
    if in_package(module, name):
      return f"{name} is out: {remedy}"
  if own == "common" and root in (*PROJECTS, "configs"):
    return "common imports no project"
  if own in PROJECTS and root in (*PROJECTS, "configs") and root != own:
    return "projects never import each other"
  if top and root in OPTIONAL and own != "tests":
    return f"{root} is optional: import it inside the function"
  if in_package(module, "flax.linen") and not may_import_linen(path):
    return "only models and common/nn.py import flax.linen"
  if path.startswith("common/parallel/"):
    allowed = ("jax", "numpy", "common.parallel", "common.errors")
    is_stdlib = root in sys.stdlib_module_names
    if not is_stdlib and not any(in_package(module, a) for a in allowed):
      return "common/parallel knows arrays and meshes only"
  if own == "configs" and not (
    root == "ml_collections" or in_package(module, "common.config")
  ):
    return "configs import ml_collections and common.config only"
  name = path.rpartition("/")[2]
  if own in PROJECTS and name.startswith("model"):
    for other in ("optax", "grain", "common.optim", "common.data"):
      if in_package(module, other):
        return "models know no optimizer and no data"
  return None


def breaches(path: str, source: str) -> list[str]:
  """Returns `path:line: module: reason` for each breach in a file."""
  tree = ast.parse(source, path)
  found = []
  for line, module, top in imported(tree, path):
    reason = why_not(path, module, top)
    if reason:
      found.append(f"{path}:{line}: {module}: {reason}")
  for line, name in used(tree):
    if name in BANNED:
      found.append(f"{path}:{line}: {name} is out: {BANNED[name]}")
    if name == "flax.linen" and not may_import_linen(path):
      found.append(f"{path}:{line}: only models use flax.linen")
  return found


def files():
  for package in (*OURS, "benchmarks"):
    for path in sorted((ROOT / package).rglob("*.py")):
      yield path.relative_to(ROOT).as_posix()


def test_no_file_breaks_the_rules():
  paths = list(files())
  assert {"common/app.py", "common/config.py", "configs/birdie.py"} <= set(
    paths
  )
  found = [b for p in paths for b in breaches(p, (ROOT / p).read_text())]
  assert not found, "\n".join(found)


BAD = [
  ("common/train.py", "import birdie"),
  ("common/train.py", "def f():\n  from udim.transform import udim"),
  ("common/data/text.py", "from configs import birdie"),
  ("birdie/train.py", "from thor import losses"),
  ("birdie/train.py", "import slimsam.model as model"),
  ("thor/train.py", "from configs.thor import get_config"),
  ("birdie/data.py", "import torch"),
  ("birdie/data.py", "if True:\n  from transformers import AutoTokenizer"),
  ("birdie/data.py", "try:\n  import sentencepiece\nexcept ImportError: ..."),
  ("common/metrics.py", "class A:\n  import tensorboardX"),
  ("benchmarks/data_path.py", "import tensorflow as tf"),
  ("birdie/train.py", "import flax.linen as nn"),
  ("birdie/train.py", "from flax import linen as nn"),
  ("birdie/train.py", "import flax\nx = flax.linen.Dense"),
  ("common/tree.py", "from flax.linen import Module"),
  ("common/parallel/scan.py", "import flax"),
  ("common/parallel/scan.py", "from common import tree"),
  ("common/parallel/scan.py", "from .. import tree"),
  ("common/parallel/rules.py", "from ..rngs import RngStreams"),
  ("common/parallel/mesh.py", "def f():\n  import optax"),
  ("configs/birdie.py", "import jax"),
  ("configs/birdie.py", "import os"),
  ("configs/birdie.py", "from common import optim"),
  ("configs/birdie.py", "from configs import thor"),
  ("birdie/models.py", "import optax"),
  ("slimsam/model.py", "from common.data import loader"),
  ("common/step.py", "from flax.training import train_state"),
  ("common/metrics.py", "from flax import metrics"),
  ("thor/model.py", "from flax import nnx"),
  ("common/step.py", "from jax.experimental.pjit import pjit"),
  ("common/step.py", "from jax.experimental import shard_map"),
  ("common/step.py", "from jax import pmap"),
  ("common/step.py", "import jax\nf = jax.pmap(abs)"),
  ("common/step.py", "import jax\nf = jax.experimental.pjit.pjit(abs)"),
]


@pytest.mark.parametrize(("path", "source"), BAD)
def test_the_checker_sees_a_breach(path, source):
  assert len(breaches(path, source)) == 1


GOOD = [
  ("common/train.py", "import jax, optax\nfrom common.metrics import Mean"),
  ("common/train.py", "from flax import struct"),
  ("common/nn.py", "import flax.linen as nn"),
  ("birdie/models.py", "from flax import linen as nn\nimport common.nn"),
  ("birdie/reward_model.py", "import flax.linen as nn\nimport optax"),
  ("birdie/data.py", "def f():\n  import torch"),
  ("birdie/data.py", "from . import packing\nfrom birdie import vocab"),
  ("common/parallel/scan.py", "import jax.numpy as jnp\nimport functools"),
  ("common/parallel/rules.py", "from common.errors import UserError"),
  ("common/parallel/rules.py", "from .mesh import make_mesh"),
  ("configs/birdie.py", "from ml_collections import ConfigDict"),
  ("configs/birdie.py", "from common import config"),
  ("configs/birdie.py", "from common.config import apply_variants"),
  ("benchmarks/step.py", "from birdie import models\nimport jax"),
  ("common/step.py", "import jax\nf = jax.shard_map"),
]


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_the_checker_lets_good_code_pass(path, source):
  assert breaches(path, source) == []
