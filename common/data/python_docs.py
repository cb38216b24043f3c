"""Real text that is always there: the documentation inside Python itself.

The documents are the entries of `pydoc_data.topics` (the language reference)
and, for each module of the standard library's top two levels, its docstrings.
Python's licence (PSF) covers them. They differ between versions of Python;
`text_hash` says which ones a run has seen.
"""

import ast
import functools
import hashlib
import importlib
import pathlib
import sysconfig
import warnings
from collections.abc import Iterator
from typing import Any

NAME = "python_docs"
# Folders of the library that hold tests, or what pip installed.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
# Part of the hash: raise it when the rule that makes documents changes.
_RULE = 1


def _topics() -> dict[str, str]:
  # By its name, because type checkers know no stubs for it.
  return importlib.import_module("pydoc_data.topics").topics


def module_files() -> list[tuple[str, pathlib.Path]]:
  """(module's name, file) of the top two levels, sorted by name."""
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  files = []
  for pattern in ("*.py", "*/*.py"):
    for path in root.glob(pattern):
      parts = path.relative_to(root).with_suffix("").parts
      is_test = parts[-1].startswith("test_") or not _SKIPPED.isdisjoint(parts)
      # Folders with a hyphen, such as config-3.11-*, are no packages.
      if not is_test and all(part.isidentifier() for part in parts):
        name = ".".join(part for part in parts if part != "__init__")
        files.append((name, path))
  return sorted(files)


def docstrings(source: str) -> str:
  """All docstrings of a module in the order of the file, joined."""
  with warnings.catch_warnings():
    # Old code in the library has escapes that newer versions warn about.
    warnings.simplefilter("ignore")
    tree = ast.parse(source)
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
  nodes.sort(key=lambda node: getattr(node, "lineno", 0))
  found = (ast.get_docstring(node) for node in nodes)
  return "\n\n".join(text for text in found if text and text.strip())


def documents() -> Iterator[tuple[str, str]]:
  """Yields (id, text): topics first, then modules, both sorted."""
  for name, text in sorted(_topics().items()):
    if text.strip():
      yield f"topics/{name}", text
  for name, path in module_files():
    text = docstrings(path.read_text(encoding="utf-8"))
    if text:
      yield f"modules/{name}", text


@functools.cache
def text_hash() -> str:
  """A hash of everything that `documents` reads, hex.

  It reads the files and parses none, so it costs a fraction of the documents.
  """
  digest = hashlib.blake2b(f"{_RULE}".encode(), digest_size=16)
  for name, text in sorted(_topics().items()):
    digest.update(f"\0{name}\0{text}".encode())
  for name, path in module_files():
    digest.update(f"\0{name}\0".encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()


class PythonDocs:
  """The text source; see `common.data.sources`."""

  name = "Python's documentation"

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the interpreter's text."""
    return f"{NAME}/{text_hash()}"

  def __iter__(self) -> Iterator[tuple[str, str]]:
    """Yields (id, text)."""
    return documents()


@functools.cache
def _builder_class() -> type:
  """The TFDS builder; made on demand, for importing TFDS takes a while."""
  import tensorflow_datasets as tfds

  class PythonDocsBuilder(tfds.core.GeneratorBasedBuilder):
    """Python's own documentation as a TFDS data set."""

    name = NAME
    VERSION = tfds.core.Version("1.0.0")
    # Another interpreter's text is another configuration, hence folder.
    BUILDER_CONFIGS = [  # noqa: RUF012
      tfds.core.BuilderConfig(
        name=text_hash(), description="The text with this hash."
      )
    ]

    def _info(self) -> Any:
      return tfds.core.DatasetInfo(
        builder=self,
        description=__doc__,
        features=tfds.features.FeaturesDict(
          {"id": tfds.features.Text(), "text": tfds.features.Text()}
        ),
        homepage="https://docs.python.org",
        license="Python Software Foundation License Version 2",
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      del dl_manager
      return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
      # Without shuffling TFDS orders by number.
      for i, (name, text) in enumerate(documents()):
        yield i, {"id": name, "text": text}

  return PythonDocsBuilder


def builder(data_dir: str | None = None) -> Any:
  """The TFDS builder of these documents, prepared; no TensorFlow is needed.

  Args:
    data_dir: TFDS's folder; its own default if None. Preparing takes a few
      seconds, the first time.
  """
  made = _builder_class()(data_dir=data_dir, file_format="array_record")
  if not made.is_prepared():
    made.download_and_prepare()
  return made
