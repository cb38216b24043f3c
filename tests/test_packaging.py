"""What `pip install -e .` gives: our packages, pins, extras, fast starts."""

import ast
import fnmatch
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from ml_collections import ConfigDict
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import common
from common.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOT_SHIPPED = ("tests", "benchmarks", "launch")


def packages() -> list[str]:
  """Every folder of the checkout that is a package of ours."""
  return sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for top in ROOT.iterdir()
    if top.is_dir() and top.name not in NOT_SHIPPED and top.name[0] != "."
    for path in top.rglob("__init__.py")
    if "site-packages" not in path.parts and "build" not in path.parts
  )


def declared(*extras: str) -> list[str]:
  """The requirements of the core and of some extras."""
  chosen = [text for extra in extras for text in EXTRAS[extra]]
  return [*PROJECT["dependencies"], *chosen]


def run_python(*arguments, cwd, **environment):
  """Runs Python elsewhere, with our packages as an installation gives them."""
  try:
    importlib.metadata.distribution(PROJECT["name"])
    path = {}
  except importlib.metadata.PackageNotFoundError:  # a checkout, not installed
    path = {"PYTHONPATH": str(ROOT)}
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=cwd,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **path, **environment},
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_tests_import_our_common():
  assert pathlib.Path(common.__file__).parent == ROOT / "common"


def test_our_common_wins_in_a_folder_that_has_another(tmp_path):
  (tmp_path / "common").mkdir()
  (tmp_path / "common/__init__.py").write_text("")
  code = "import common, common.config; print(common.__file__)"
  done = run_python("-P", "-c", code, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == str(ROOT / "common/__init__.py")
  # Without -P Python takes the folder's own: the reason for the advice.
  shadowed = run_python(
    "-c", "import common; print(common.__file__)", cwd=tmp_path
  )
  assert shadowed.stdout.strip() == str(tmp_path / "common/__init__.py")


def test_the_package_list_covers_every_package():
  patterns = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
  missed = [
    package
    for package in packages()
    if not any(fnmatch.fnmatchcase(package, pattern) for pattern in patterns)
  ]
  assert "common" in packages()
  assert not missed


def test_every_folder_with_code_is_a_package():
  known = set(packages())
  for package in known:
    for path in (ROOT / package.replace(".", "/")).rglob("*.py"):
      folder = ".".join(path.parent.relative_to(ROOT).parts)
      assert folder in known, f"{path} stands in no package"


def pins(python_version: str) -> dict[str, str]:
  """The constraints that hold for a Python version."""
  found = {}
  for line in (ROOT / "constraints.txt").read_text().splitlines():
    line = line.partition("#")[0].strip()
    if not line:
      continue
    requirement = Requirement(line)
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", line
    environment = {"python_version": python_version}
    if not requirement.marker or requirement.marker.evaluate(environment):
      name = canonicalize_name(requirement.name)
      assert name not in found, f"{name} is pinned twice"
      found[name] = specifier.version
  return found


@pytest.mark.parametrize("python_version", ["3.11", "3.12", "3.13"])
def test_constraints_pin_what_is_declared(python_version):
  pinned = pins(python_version)
  for text in declared("test", "tokenizers", "tensorboard", "gcs"):
    requirement = Requirement(text)
    version = pinned.get(canonicalize_name(requirement.name))
    assert version is not None, f"{requirement.name} has no pin"
    assert version in requirement.specifier, f"{text} excludes {version}"
    assert ">=" in str(requirement.specifier), f"{text} has no lower bound"


def test_the_commit_hooks_run_the_pinned_tools():
  text = (ROOT / ".pre-commit-config.yaml").read_text()
  hooks = dict(re.findall(r"\[(\w+)==([\d.]+)\]", text))
  pinned = pins("3.11")
  assert hooks == {name: pinned[name] for name in ("pyrefly", "ruff")}


def test_no_file_records_a_registry():
  for name in ("constraints.txt", "pyproject.toml"):
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "--index" not in text
  assert "uv.lock" in (ROOT / ".gitignore").read_text().splitlines()


def top_level_imports(source: str) -> set[str]:
  """The packages that a file imports anywhere, functions included."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
      found.add(node.module.split(".")[0])
  return found


def test_every_imported_package_is_declared():
  names = {canonicalize_name(Requirement(t).name) for t in declared(*EXTRAS)}
  providers = importlib.metadata.packages_distributions()
  ours = {package.split(".")[0] for package in packages()}
  for package in ours:
    for path in (ROOT / package).rglob("*.py"):
      for name in top_level_imports(path.read_text()):
        if name in sys.stdlib_module_names or name in ours:
          continue
        dists = {canonicalize_name(d) for d in providers.get(name, [name])}
        assert dists & names, f"{path} imports {name}, which is undeclared"


def test_licence():
  text = (ROOT / "LICENSE").read_text()
  assert PROJECT["license"] == "Apache-2.0"
  assert "Apache License" in text
  assert "END OF TERMS AND CONDITIONS" in text


def test_importing_a_package_imports_no_jax(tmp_path):
  code = (
    "import importlib, json, sys\n"
    f"for name in {packages()!r}: importlib.import_module(name)\n"
    "print(json.dumps([m for m in ('jax', 'numpy', 'flax') "
    "if m in sys.modules]))"
  )
  done = run_python("-P", "-c", code, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == []


@pytest.mark.parametrize("package", packages())
def test_exported_names_exist_and_hide_no_module(package):
  module = importlib.import_module(package)
  folder = pathlib.Path(module.__file__).parent
  modules = {p.stem for p in folder.glob("*.py")}
  modules |= {p.parent.name for p in folder.glob("*/__init__.py")}
  exported = getattr(module, "__all__", [])
  assert not modules & set(exported)
  for name in exported:
    assert getattr(module, name) is not None
  with pytest.raises(AttributeError, match="no_such_name"):
    module.no_such_name  # noqa: B018


def programs() -> list[str]:
  """Modules that are run with `python -m`."""
  return [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in packages()
    for path in sorted((ROOT / package.replace(".", "/")).glob("*.py"))
    if re.search(r"^if __name__ == .__main__.:", path.read_text(), re.M)
  ]


# What takes a second and more to import, all together.
HEAVY = {
  "jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "scipy",
  "matplotlib", "PIL", "sentencepiece", "transformers",
}  # fmt: skip


@pytest.mark.parametrize("program", programs())
def test_help_imports_nothing_that_takes_time(program):
  code = (
    "import runpy, sys\n"
    f"sys.argv[:] = [{program!r}, '--help']\n"
    f"try: runpy.run_module({program!r}, run_name='__main__', alter_sys=True)\n"
    "except SystemExit as end: status = end.code\n"
    f"print('status', status, sorted({HEAVY!r} & set(sys.modules)))"
  )
  done = run_python("-c", code, cwd=ROOT)
  assert done.stdout.splitlines()[-1:] == ["status 0 []"], done.stderr
  assert f"python -m {program}" in done.stdout
  assert "example" in done.stdout


def test_help_lists_the_keys_of_the_projects_own_config():
  done = run_python("-m", "birdie.main", "--help", cwd=ROOT)
  assert done.returncode == 0
  assert "--config.optim.lr " in done.stdout
  assert "smoke" in done.stdout


def open_tensorboard(folder):
  from common.metrics import MetricWriter

  MetricWriter(folder, tensorboard=True)


def open_tokenizer(kind):
  def function(folder):
    from common.data.tokenizers import make_tokenizer

    path = folder / "tokenizer"
    path.touch()
    make_tokenizer(ConfigDict({"kind": kind, "path": str(path)}))

  return function


def open_bucket(folder):
  from common.app import make_workdir

  make_workdir("gs://bucket/run")


MISSING = [
  ("gcsfs", "gcs", open_bucket),
  ("tensorboardX", "tensorboard", open_tensorboard),
  ("sentencepiece", "tokenizers", open_tokenizer("sentencepiece")),
  ("tokenizers", "tokenizers", open_tokenizer("huggingface")),
]


@pytest.mark.parametrize(("module", "extra", "use"), MISSING)
def test_a_missing_extra_is_one_line(module, extra, use, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, module, None)  # its import raises
  assert extra in EXTRAS
  with pytest.raises(UserError) as info:
    use(tmp_path)
  message = str(info.value)
  assert "\n" not in message
  assert module.lower() in message.lower()
  assert re.search(rf"pip install .*\[{extra}\]", message)
