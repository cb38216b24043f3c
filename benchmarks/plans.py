r"""What the published settings of all four projects take on 8, 64, 256 devices.

    python benchmarks/plans.py

Every row is what `python -m PROJECT.main --config=… --plan=DEVICES` prints of
its first program.
Data are not needed: a vocabulary of 32,000 words, folders of four domains and
seven classes, and the sizes of SAM ViT-B stand in for them, of which nothing
but sizes is read. Rows of a batch are the published ones where the devices
divide them, and else the least that they do; THOR's budget of tokens is the
script's on each device.
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

COUNTS = (8, 64, 256)
SEQ = ("mesh.seq=4", "model.seq_axis=seq")
# Configuration, then overrides by the number of devices.
RUNS: dict[str, dict[int, tuple[str, ...]]] = {
  "birdie.py:paper": {
    8: ("mesh.fsdp=8",),
    64: ("mesh.fsdp=8", "mesh.model=8"),
    256: ("mesh.fsdp=8", "mesh.model=8", *SEQ),
  },
  "udim.py:paper": {
    8: (),
    64: ("data.images_per_domain=64",),
    256: ("data.images_per_domain=256", "mesh.fsdp=4"),
  },
  "slimsam.py:vit_b_77,paper": {
    8: ("data.rows=8",),
    64: ("data.rows=64",),
    256: ("data.rows=256", "mesh.fsdp=4"),
  },
  "thor.py:paper": {
    8: ("data.token_budget=32768",),
    64: ("data.token_budget=262144", "mesh.fsdp=4"),
    256: ("data.token_budget=1048576", "mesh.fsdp=4"),
  },
  "thor.py:multilingual_big": {
    8: (),
    64: (),
    256: ("mesh.data=4", "mesh.fsdp=64", "data.token_budget=1048576"),
  },
}
COLUMNS = (
  "run", "devices", "mesh", "parameters", "optimizer", "other state", "batch",
  "temporaries", "GFLOPs", "sent",
)  # fmt: skip


def main() -> None:
  """Prints the table, or with `--devices` one JSON line a program."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--devices", type=int, choices=COUNTS)
  add("--match", default="", help="only configurations with this in the name")
  args = parser.parse_args()
  if args.devices:
    for row in rows(args.devices, args.match):
      print(json.dumps(row), flush=True)
    return
  made = [row for count in COUNTS for row in _elsewhere(count, args.match)]
  order = list(RUNS)
  made.sort(key=lambda row: (order.index(row["config"]), row["devices"]))
  print(table(made))


def _elsewhere(devices: int, match: str) -> list[dict[str, Any]]:
  """The rows of a process of its own: a process has one number of devices."""
  command = [sys.executable, __file__, f"--devices={devices}"]
  command.append(f"--match={match}")
  found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  return [json.loads(line) for line in found.stdout.splitlines()]


def rows(devices: int, match: str = "") -> Iterator[dict[str, Any]]:
  """Plans on so many devices as plain data, of the first program of each run,
  which needs the most.
  """
  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", devices)
  from common import flags
  from common.plan import make_plan

  with tempfile.TemporaryDirectory() as folder:
    stand_ins = _stand_ins(pathlib.Path(folder))
    for name, by_count in RUNS.items():
      if match not in name:
        continue
      project = name.partition(".")[0]
      config, _ = flags.load_config_file(f"configs/{name}")
      for entry in (*stand_ins.get(project, ()), *by_count[devices]):
        key = entry.partition("=")[0]
        config = flags.override(config, key, [f"--config.{entry}"])
      programs = importlib.import_module(f"{project}.plan").programs(config)
      plan = make_plan(next(iter(programs)))
      yield {
        "config": name, "devices": devices, "program": plan.name,
        "mesh": dict(plan.mesh), "bytes": dict(plan.bytes),
        "flops": plan.flops, "sent": dict(plan.sent),
      }  # fmt: skip


def _stand_ins(folder: pathlib.Path) -> dict[str, tuple[str, ...]]:
  """What a plan reads sizes from, by project, as overrides."""
  from PIL import Image

  from common import files
  from slimsam.settings import preset

  words = {f"w{i}": i for i in range(32_000)}
  files.write_json(
    folder / "tokenizer.json",
    {"version": "1.0", "model": {"type": "WordLevel", "vocab": words,
     "unk_token": "w0"}},
  )  # fmt: skip
  for domain in ("art", "cartoon", "photo", "sketch"):
    for label in map(str, range(7)):
      place = folder / "pacs" / domain / label
      place.mkdir(parents=True)
      for i in range(5):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(place / f"{i}.png")
  (folder / "resnet50.pth").touch()
  (folder / "vit_b").mkdir()
  settings = preset("vit_b").to_dict()
  files.write_json(folder / "vit_b" / "settings.json", settings)
  return {
    "birdie": (
      "tokenizer.kind=huggingface",
      f"tokenizer.path={folder / 'tokenizer.json'}",
    ),
    "udim": (
      f"data.source.path={folder / 'pacs'}",
      f"model.pretrained={folder / 'resnet50.pth'}",
    ),
    "slimsam": (f"teacher.path={folder / 'vit_b'}",),
  }


def table(made: list[dict[str, Any]]) -> str:
  """Markdown; MiB and GFLOPs of one device."""
  lines = [
    "| " + " | ".join(COLUMNS) + " |",
    "|---|" + "---:|" * (len(COLUMNS) - 1),
  ]
  for row in made:
    mesh = " ".join(f"{k}={v}" for k, v in row["mesh"].items() if v > 1)
    cells = [f"`{row['config']}` {row['program']}", str(row["devices"]), mesh]
    cells += [f"{size / 2**20:,.1f}" for size in row["bytes"].values()]
    cells.append(f"{row['flops'] / 1e9:,.1f}")
    cells.append(f"{sum(row['sent'].values()) / 2**20:,.1f}")
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


if __name__ == "__main__":
  os.chdir(pathlib.Path(__file__).resolve().parents[1])
  main()
