"""Packed tokens a second of the data path, beside the reference's.

  python benchmarks/data_path.py
  python benchmarks/data_path.py --reference=DIR --python=VENV/bin/python

The mix is the reference's own benchmark: next-token prediction 30 %, copying,
prefix LM (half) and autoencoding (85 %, spans of 4) 20 % each, infilling
(85 %, spans of 4) 10 %, in 8 rows of 1024 places, documents of 8192 tokens.
Both sides are warm: start-up and the first batches are not counted. Ours runs
in this process on one thread; theirs has one worker, a batcher process and a
thread. Theirs turns text into tokens on the way, ours before; so the
last column adds what our tokenizer takes for the text that was used.

DIR is a checkout of https://github.com/samblouir/birdie, VENV holds torch,
accelerate, einops, tiktoken, datasets and tqdm. Rounds alternate, so that load
hits both alike; runs of theirs that die are counted and tried again. The last
line is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from birdie.data import BatchMaker
from birdie.packing import Packer, PackStats
from birdie.presets import make_configuration
from birdie.vocab import byte_vocabulary
from common.data.text import TokenStore
from common.data.tokenizers import ByteTokenizer

LENGTH, ROWS, DOCUMENT = 1024, 8, 8192
ATTEMPTS = 20
RATES = {
  "next_token_prediction": 0.3,
  "copying": 0.2,
  "prefix_language_modeling": 0.2,
  "autoencoding": 0.2,
  "infilling": 0.1,
}

# Runs inside the reference's own interpreter.
REFERENCE = """
import json, sys, time
import numpy as np
from birdie_rl.pipeline_generator import pipeline_data_generator
from birdie_rl.tests import pipeline_benchmark_helpers as helpers

length, rows, document, warm, count = map(int, sys.argv[1:6])
controller, batches, *_ = pipeline_data_generator(
  batch_size=rows, sequence_length=length, num_workers=1,
  objectives_config=helpers.build_objectives(json.loads(sys.argv[6])),
  data_generator=helpers.variable_length_data_generator,
  data_generator_fn_kwarg_overrides={"text_lengths": (document,)},
  config={"tokenizer": helpers.CharTokenizer(), "seed": int(sys.argv[7]),
          "min_seq_len_for_packing": max(4, length // 16)})
for _ in range(warm):
  next(batches)
start = time.perf_counter()
made = [next(batches)["segment_ids"] for _ in range(count)]
seconds = time.perf_counter() - start
tokens = int(sum(np.count_nonzero(s) for s in made))
samples = int(sum(s.max(axis=1).sum() for s in made))
controller.close(timeout_join=3.0)
print(json.dumps({"seconds": seconds, "tokens": tokens, "samples": samples,
                  "slots": count * rows * length}))
"""


def make_ours() -> tuple[BatchMaker, np.ndarray]:
  vocab = byte_vocabulary()
  corruption = {"corruption_rate": 0.85, "mean_span": 4.0}
  overrides = {
    "prefix_language_modeling": {"prefix_frac": 0.5, "jitter": 0.0},
    "autoencoding": corruption,
    "infilling": corruption,
  }
  lengths = {"min_length": 64, "max_length": LENGTH}
  entries = tuple(
    make_configuration(
      {"objective": name, **lengths, **overrides.get(name, {})}, vocab
    )
    for name in RATES
  )
  rng = np.random.default_rng(0)
  tokens = rng.integers(64, 320, 512 * DOCUMENT, dtype=np.uint16)
  store = TokenStore(tokens, np.arange(0, len(tokens) + 1, DOCUMENT))
  packer = Packer(entries, rows=ROWS, length=LENGTH, seed=0)
  maker = BatchMaker(store, packer, rows=ROWS, start=0, stop=ROWS)
  return maker, np.array(list(RATES.values()), np.float32)


def run_ours(
  maker: BatchMaker, probs: np.ndarray, first: int, count: int
) -> dict[str, Any]:
  start = time.perf_counter()
  stats: list[PackStats] = [
    maker.with_stats(k, probs)[1] for k in range(first, first + count)
  ]
  seconds = time.perf_counter() - start
  total = sum(stats[1:], stats[0])
  text = "x" * int(total.text_tokens.sum())
  start = time.perf_counter()
  ByteTokenizer().encode(text)
  return {
    "seconds": seconds,
    "tokens": int(total.tokens.sum()),
    "samples": int(total.samples.sum()),
    "slots": total.slots,
    "tokenizer_seconds": time.perf_counter() - start,
  }


def run_reference(
  python: str, folder: str, warm: int, count: int, seed: int
) -> dict[str, Any]:
  """One round; the last bytes of a document kill some runs: tries again."""
  numbers = [LENGTH, ROWS, DOCUMENT, warm, count]
  error = ""
  for attempt in range(ATTEMPTS):
    done = subprocess.run(
      [
        *(python, "-c", REFERENCE, *map(str, numbers), json.dumps(RATES)),
        str(seed * ATTEMPTS + attempt),
      ],
      cwd=folder,
      env={**os.environ, "PYTHONPATH": folder},
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )
    if not done.returncode:
      last = done.stdout.strip().splitlines()[-1]
      return json.loads(last) | {"failed": attempt}
    error = done.stderr[-2000:]
  sys.exit(f"the reference failed {ATTEMPTS} times:\n{error}")


def rate(result: dict[str, Any], *, tokenized: bool = False) -> float:
  extra = result["tokenizer_seconds"] if tokenized else 0
  return result["tokens"] / (result["seconds"] + extra)


def summary(results: list[dict[str, Any]]) -> dict[str, float]:
  rates = [rate(r) for r in results]
  tokens = sum(r["tokens"] for r in results)
  return {
    "median": statistics.median(rates),
    "max": max(rates),
    "fill": tokens / sum(r["slots"] for r in results),
    "mean_sample": tokens / sum(r["samples"] for r in results),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--batches", type=int, default=60)
  parser.add_argument("--warm", type=int, default=20)
  parser.add_argument("--reference", help="a checkout of samblouir/birdie")
  parser.add_argument("--python", default=sys.executable)
  args = parser.parse_args()

  maker, probs = make_ours()
  run_ours(maker, probs, 0, args.warm)
  ours, theirs = [], []
  for i in range(args.rounds):
    first = args.warm + i * args.batches
    ours.append(run_ours(maker, probs, first, args.batches))
    if args.reference:
      theirs.append(
        run_reference(args.python, args.reference, args.warm, args.batches, i)
      )
  result: dict[str, Any] = {
    "shape": [ROWS, LENGTH],
    "python": platform.python_version(),
    "numpy": np.__version__,
    "rounds": args.rounds,
    "batches": args.batches,
    "ours": summary(ours),
  }
  result["ours"]["median_with_tokenizer"] = statistics.median(
    rate(r, tokenized=True) for r in ours
  )
  if theirs:
    result["reference"] = summary(theirs)
    result["reference"]["failed_runs"] = sum(r["failed"] for r in theirs)
    result["ratio"] = result["ours"]["median"] / result["reference"]["median"]
    result["ratio_of_max"] = result["ours"]["max"] / result["reference"]["max"]
  print("                median tok/s  max tok/s    fill  tokens/sample")
  for name in ("ours", "reference"):
    if name in result:
      row = result[name]
      print(
        f"{name:<14}{row['median']:>14,.0f}{row['max']:>11,.0f}"
        f"{row['fill']:>8.1%}{row['mean_sample']:>15.0f}"
      )
  print(
    f"ours, with tokenizer {result['ours']['median_with_tokenizer']:,.0f} tok/s"
  )
  if theirs:
    print(
      f"ratio of medians {result['ratio']:.2f}, of maxima "
      f"{result['ratio_of_max']:.2f}; the reference died "
      f"{result['reference']['failed_runs']} times"
    )
  print(json.dumps(result))


if __name__ == "__main__":
  main()
