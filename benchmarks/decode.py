"""Translating against transformers' MarianMTModel, in tokens a second.

    python benchmarks/decode.py

Both have the same random weights, in one process on all cores, and decode the
same number of tokens of each sentence: the end is made too unlikely to come
before the last. Every round runs every case both ways, one after the other.
The tokens are compared too: the likeliest of a random model are close to one
another, so that rounding may decide between some.

With `--one_core` both run on one core and seconds are those of the processor,
which other programs on the machine change less. Prints medians and their
ratios with those of the least times, and one JSON line; exits with 1 when both
ratios of a case miss its gate, or the tokens differ. The gates are for all
cores.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from thor.convert import to_marian
from thor.decode import Search, beam_search
from thor.dispatch import Dispatch, prepare
from thor.model import init_params
from thor.settings import Settings

# (batch, beam) -> the least ratio of tokens a second, ours over theirs.
GATES = {(1, 1): 2.3, (1, 4): 1.5, (16, 1): 1.0, (16, 4): 1.0}
VOCAB, PAD, EOS = 10_000, 9_999, 0
# Of all translations that both found. The rest is due to rounding.
LEAST_SAME = 0.9
# The threads of one library wait for more work for a while, on the cores that
# the other one needs.
PAUSE_S = 0.3


def make_settings() -> Settings:
  return Settings(
    VOCAB, width=512, hidden=2048, heads=8, encoder_layers=6, decoder_layers=6,
    pattern=(False,), activation="swish", positions="marian", logits_bias=True,
    pad_id=PAD, eos_id=EOS, start_id=PAD,
  )  # fmt: skip


def make_params(settings: Settings):
  """Random parameters, of which no translation ends by itself."""
  params = jax.jit(init_params, static_argnums=0)(settings, jax.random.key(0))
  bias = params["logits_bias"].at[np.array([PAD, EOS])].set(-30)
  return {**params, "logits_bias": bias}


def make_marian(params, settings: Settings):
  import torch  # type: ignore
  from transformers import MarianConfig, MarianMTModel  # type: ignore

  state, config = to_marian(params, settings)
  model = MarianMTModel(MarianConfig(**config)).eval()
  tensors = {name: torch.tensor(value) for name, value in state.items()}
  missing, unexpected = model.load_state_dict(tensors, strict=False)
  tied = ("embed_tokens.weight", "embed_positions.weight", "lm_head.weight")
  if unexpected or not all(name.endswith(tied) for name in missing):
    raise SystemExit(f"not the same model: {missing}, {unexpected}")
  model.tie_weights()
  return model


class Ways:
  """Both programs on one batch; a call returns tokens [b k t].

  Args:
    model: theirs.
    prepared: ours.
    source: int [b s], without padding.
    beam: k.
    tokens: t, the end included.
  """

  def __init__(self, model, prepared, source, *, beam: int, tokens: int):
    import torch  # type: ignore

    self._model, self._prepared, self._source = model, prepared, source
    self._beam, self._tokens = beam, tokens
    self._search = Search(
      beam=beam, n_best=beam, max_ratio=0, max_extra=tokens - 1
    )
    self._placed = jax.device_put(source)
    self._ids = torch.tensor(source).long()
    self._mask = torch.ones_like(self._ids)

  def ours(self) -> np.ndarray:
    found = beam_search(self._prepared, self._placed, self._search)
    return np.asarray(found.tokens)

  def theirs(self) -> np.ndarray:
    found = self._model.generate(
      input_ids=self._ids,
      attention_mask=self._mask,
      num_beams=self._beam,
      num_return_sequences=self._beam,
      max_new_tokens=self._tokens,
      do_sample=False,
    )
    rows = found[:, 1:].reshape(len(self._source), self._beam, -1)
    return rows.numpy()

  def same(self) -> float:
    """The share of translations that both have found, in any order: the last
    token's probability counts in ours alone.
    """
    ours, theirs = self.ours(), self.theirs()
    if ours.shape != theirs.shape:
      raise SystemExit(f"{ours.shape} tokens, but theirs are {theirs.shape}")
    shared = sum(
      len({tuple(row) for row in a} & {tuple(row) for row in b})
      for a, b in zip(ours, theirs)
    )
    return shared / (ours.shape[0] * ours.shape[1])


def measure(cases: dict, rounds: int, clock: Callable[[], float]) -> dict:
  """{case: {"ours" | "theirs": seconds of each round}}."""
  times = {case: {"ours": [], "theirs": []} for case in cases}
  for _ in range(rounds):
    for case, ways in cases.items():
      for name in ("ours", "theirs"):
        time.sleep(PAUSE_S)
        start = clock()
        getattr(ways, name)()
        times[case][name].append(clock() - start)
  return times


def report(times: dict, same: dict, tokens: int) -> bool:
  """Prints the table and the JSON line; whether all gates hold."""
  import torch  # type: ignore
  import transformers  # type: ignore

  print("batch  beam   ours/s  theirs/s  ratio  of the least  gate    same")
  rows, holds = [], True
  for (batch, beam), both in times.items():
    count, gate = batch * tokens, GATES[batch, beam]
    median = {k: statistics.median(v) for k, v in both.items()}
    ratio = median["theirs"] / median["ours"]
    least = min(both["theirs"]) / min(both["ours"])
    ours, theirs = (count / median[k] for k in ("ours", "theirs"))
    part = same[batch, beam]
    good = max(ratio, least) >= gate and part >= LEAST_SAME
    holds &= good
    print(
      f"{batch:5d} {beam:5d} {ours:8.0f} {theirs:9.0f} {ratio:6.2f} "
      f"{least:13.2f} {gate:5.1f} {100 * part:5.0f} %"
      f"{'' if good else '  missed'}"
    )
    rows.append({
      "batch": batch, "beam": beam, "ours": ours, "theirs": theirs,
      "ratio": ratio, "ratio_of_the_least": least, "gate": gate, "same": part,
    })  # fmt: skip
  line = {
    "benchmark": "decode",
    "python": platform.python_version(),
    "jax": jax.__version__,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "device": jax.devices()[0].device_kind,
    "cores": len(os.sched_getaffinity(0)),
    "torch_threads": torch.get_num_threads(),
    "rows": rows,
  }
  print(json.dumps(line))
  return holds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--source", type=int, default=32, help="its tokens")
  parser.add_argument("--tokens", type=int, default=64, help="to be decoded")
  parser.add_argument("--one_core", action="store_true")
  args = parser.parse_args()

  clock = time.perf_counter
  if args.one_core:
    import torch  # type: ignore

    # Before either library has made its threads.
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    torch.set_num_threads(1)
    clock = time.process_time
  settings = make_settings()
  params = make_params(settings)
  model = make_marian(params, settings)
  prepared = prepare(params, settings, Dispatch("dense"))
  source = np.random.default_rng(0).integers(1, PAD, (16, args.source))
  source = source.astype(np.int32)
  cases = {
    (batch, beam): Ways(
      model, prepared, source[:batch], beam=beam, tokens=args.tokens
    )
    for batch, beam in GATES
  }
  same = {case: ways.same() for case, ways in cases.items()}
  times = measure(cases, args.rounds, clock)
  sys.exit(0 if report(times, same, args.tokens) else 1)


if __name__ == "__main__":
  main()
