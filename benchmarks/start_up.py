"""How long it takes to get an answer: `--help`, a first and a second run.

    python benchmarks/start_up.py

Whole processes of `python -m birdie.main`, in rounds, each round with caches
of its own: `--help`; `:smoke` with empty caches; the same again in another
folder, with what the first has compiled and tokenized. Prints medians, the
ratio of second to first, and one JSON line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import jax

MAIN = [sys.executable, "-m", "birdie.main"]


def seconds(*arguments: str) -> float:
  start = time.perf_counter()
  subprocess.run([*MAIN, *arguments], check=True, capture_output=True)
  return time.perf_counter() - start


def one_round() -> dict[str, float]:
  with tempfile.TemporaryDirectory() as folder:

    def smoke(name: str) -> float:
      return seconds(
        "--config=configs/birdie.py:smoke",
        f"--workdir={folder}/{name}",
        f"--config.compile_cache={folder}/xla",
        f"--config.data.cache_dir={folder}/tokens",
      )

    return {
      "--help": seconds("--help"),
      "smoke, first": smoke("first"),
      "smoke, second": smoke("second"),
    }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  rounds = [one_round() for _ in range(args.rounds)]
  medians = {
    name: statistics.median(r[name] for r in rounds) for name in rounds[0]
  }
  for name, median in medians.items():
    print(f"{name:14s} {median:7.2f} s (median of {args.rounds})")
  ratio = medians["smoke, second"] / medians["smoke, first"]
  print(f"second / first {ratio:7.2f}")
  line = {"benchmark": "start_up", "jax": jax.__version__, "ratio": ratio}
  print(json.dumps(line | medians))


if __name__ == "__main__":
  main()
