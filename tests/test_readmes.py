"""What the pages print can be typed: extras, folders, examples."""

import json
import pathlib
import re
import shlex
import string
import tomllib

import pytest
from ml_collections import ConfigDict

from common.data.tokenizers import make_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
  "optional-dependencies"
]
SOURCES = [
  path
  for folder in ("birdie", "common", "slimsam", "thor", "udim")
  for path in sorted((ROOT / folder).rglob("*.py"))
]


def commands(page):
  for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL):
    for line in block.replace("\\\n", " ").splitlines():
      if line.startswith("python -m "):
        yield shlex.split(line, comments=True)


def page_id(page):
  return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_a_run_of_other_settings_has_a_folder_of_its_own(page):
  """Or it would be refused by the run that the page has made before."""
  for command in commands(page):
    keys = [part for part in command if part.startswith("--config.")]
    planned = any(part.startswith("--plan") for part in command)
    if keys and not planned and keys != ["--config.mode=data_report"]:
      assert any(part.startswith("--workdir=") for part in command), command


def test_every_extra_is_named_in_one_form():
  """That works in the repository's folder."""
  found = set()
  for path in [*PAGES, *SOURCES]:
    text = path.read_text()
    assert "pip install 'tetrad" not in text, path
    for names in re.findall(r"-e '\.\[([\w,]+)\]'", text):
      found |= set(names.split(","))
  assert found <= set(EXTRAS)


def test_the_table_of_extras_is_whole():
  rows = re.findall(r"^\| `(\w+)` \| ", PAGES[0].read_text(), re.MULTILINE)
  devices = {"gpu", "gpu12", "tpu", "test"}
  assert set(rows) == set(EXTRAS) - devices


def test_the_story_is_one(tmp_path):
  from birdie.task_files import read_stories

  text = (ROOT / "birdie" / "README.md").read_text()
  (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
  json.loads(example)
  (tmp_path / "stories").write_text(example)
  (story,) = read_stories(str(tmp_path / "stories"))
  assert story.choices[story.answer] == "It was late."


def test_a_tokenizer_as_birdies_page_makes_it(tmp_path, monkeypatch):
  page = (ROOT / "birdie/README.md").read_text()
  (code,) = re.findall(r"```python\n(import itertools.*?)```", page, re.S)
  text = "def f(x):\n    return  x  # ñ\n"
  (tmp_path / "a.txt").write_text(text * 20 + string.printable)
  monkeypatch.chdir(tmp_path)
  code = re.sub(
    r"cfg = (?s:.*?)books",
    'cfg = ConfigDict({"kind": "text", "path": "a.txt"})\nbooks',
    code,
  )
  exec(code.replace("/data/", "").replace("32_000", "370"), {})
  tokenizer = make_tokenizer(
    ConfigDict({"kind": "sentencepiece", "path": "tokenizer.model"})
  )
  assert tokenizer.decode(tokenizer.encode(text)) == text
