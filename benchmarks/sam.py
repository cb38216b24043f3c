"""Segment Anything here and in torch, with the same random weights.

    python benchmarks/sam.py                      # everything that is gated
    python benchmarks/sam.py --parts=everything --rounds=3
    python benchmarks/sam.py --batch=8 --dtype=bfloat16      # on a GPU

Parts:

    blocks       a windowed and a global block of ViT-B
    encoder      the image encoders of ViT-B and of the uniform SlimSAM-50, -77
    everything   all masks of one image, beside segment-anything's generator

The peers are transformers' SamModel (scaled_dot_product_attention) and
segment-anything, in the same process and on the same device; a peer that is not
installed is left out. Every round runs every candidate once, one after the
other; printed are medians, and over ours the ratios of medians and, in
brackets, of the least. `apart` is how far results are from ours; `temp` is
memory beyond parameters, input and output: ours as the compiler plans it,
torch's as its allocator saw it, which only a GPU's tells. A gate is missed when
both ratios are above it. The last line is JSON; the exit status is 1 where a
gate is missed. The first lines say what compiling takes, from nothing and from
the cache on disk.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Both libraries shall have room on a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from sam_peers import Torch, has, hf_model, sam_model

from slimsam import encoder as encoder_lib
from slimsam.encoder import DTYPES, Compute, encode
from slimsam.settings import SamSettings, preset

PARTS = ("blocks", "encoder", "everything")
MODELS = ("vit_p77", "vit_p50", "vit_b")
MIB = 2**20
# Ours over transformers', and of a pruned encoder over the whole one.
WINDOWED, GLOBAL, ENCODER, HALF = 1.15, 0.9, 1.05, 0.6
EVERYTHING = 1 / 1.5  # ours over segment-anything's
APART = 1e-4  # of results of order one
GLOBAL_TEMP, P77_TEMP = 300 * MIB, 500e6
GPU = jax.default_backend() == "gpu"
# The threads of one library wait for more work for a while, on the cores that
# the other one needs.
PAUSE_S = 0.0 if GPU else 0.3


class Case(NamedTuple):
  """Candidates for one piece of work.

  Attributes:
    ours: compiled.
    peers: by name.
    gate: of ours over transformers', at most.
    temp: bytes that ours may have beyond parameters, input and output.
    images: of a call.
  """

  ours: Any
  peers: dict[str, Any]
  gate: float | None
  temp: float | None
  images: int

  @property
  def all(self) -> dict[str, Any]:
    """Ours first."""
    return {"ours": self.ours, **self.peers}


def draw(settings: SamSettings) -> Any:
  """Random parameters for which embeddings and logits are of order one."""
  from slimsam.init import abstract_params

  rng = np.random.default_rng(0)

  def leaf(path: Any, like: Any) -> np.ndarray:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    centre, scale = 0.0, 0.5
    if "norm" in name:
      centre, scale = float(name.endswith("scale")), 0.1
    elif name.endswith("kernel"):
      scale = (like.size / like.shape[-1]) ** -0.5
      if "qkv" in name:
        scale = like.shape[0] ** -0.5
    elif name.endswith("bias"):
      scale = 0.1
    shape = like.shape
    if "upscale/conv" in name and name.endswith("kernel"):
      shape = (1, 1, *shape[2:])  # as good as smooth: masks, not noise
    drawn = rng.normal(centre, scale, shape).astype(np.float32)
    return np.array(np.broadcast_to(drawn, like.shape))

  return jax.tree_util.tree_map_with_path(leaf, abstract_params(settings))


class Ours:
  """A compiled program with its inputs on the device."""

  def __init__(self, run: Callable[..., Any], *args: Any):
    self._args = jax.device_put(args)
    self.compile_s: dict[str, float] = {}
    for name in ("cold", "cached"):
      jax.clear_caches()
      start = time.perf_counter()
      self._program = jax.jit(run).lower(*self._args).compile()
      self.compile_s[name] = time.perf_counter() - start
    analysis: Any = self._program.memory_analysis()
    self.temp = int(analysis.temp_size_in_bytes)

  def wait(self) -> Any:
    return jax.block_until_ready(self._program(*self._args))

  def run(self) -> np.ndarray:
    return np.asarray(self.wait().astype(jnp.float32))


def blocks(args: argparse.Namespace) -> dict[str, Any]:
  """ViT-B's first windowed and first global block."""
  settings = preset("vit_b")
  cfg, dtype = settings.encoder, DTYPES[args.dtype]
  params = draw(settings)
  rng = np.random.default_rng(1)
  shape = (args.batch, cfg.grid, cfg.grid, cfg.width)
  x = rng.normal(size=shape).astype(np.float32)
  layers = None
  if has("transformers"):
    layers = hf_model(params, settings, args.dtype).vision_encoder.layers
  made = {}
  gates = {"windowed": (0, WINDOWED, None), "global": (2, GLOBAL, GLOBAL_TEMP)}
  for name, (index, gate, temp) in gates.items():

    def run(own: Any, x: Any, index: int = index) -> Any:
      return encoder_lib.block(own, x, index, cfg, Compute(dtype))[0]

    own = params["image_encoder"]["blocks"][str(index)]
    own = encoder_lib.computed(own, dtype)
    ours = Ours(run, own, jnp.asarray(x, dtype))
    peers = {}
    if layers is not None:
      peers["transformers"] = Torch(layers[index], x, args.dtype, first=True)
    limit = temp * args.batch if temp and not GPU else None
    made[f"{name} block"] = Case(
      ours, peers, None if GPU else gate, limit, args.batch
    )
  return made


def encoders(args: argparse.Namespace) -> dict[str, Any]:
  """The image encoders at 1024 pixels."""
  made = {}
  dtype = DTYPES[args.dtype]
  for name in args.models.split(","):
    settings = preset(name)
    cfg, params = settings.encoder, draw(settings)
    rng = np.random.default_rng(1)
    shape = (args.batch, cfg.image_size, cfg.image_size, 3)
    x = rng.normal(size=shape).astype(np.float32)

    def run(own: Any, x: Any, cfg: Any = cfg) -> Any:
      return encode(own, x, cfg, Compute(dtype))

    weights = encoder_lib.computed(params["image_encoder"], dtype)
    ours = Ours(run, weights, jnp.asarray(x, dtype))
    channels_first = np.moveaxis(x, -1, 1)
    peers = {}
    if has("transformers"):
      model = hf_model(params, settings, args.dtype).vision_encoder
      peers["transformers"] = Torch(
        model, channels_first, args.dtype, first=False
      )
      if args.compile:
        import torch  # type: ignore

        peers["transformers, compiled"] = Torch(
          torch.compile(model), channels_first, args.dtype, first=False
        )
    if has("segment_anything") and not args.no_segment_anything:
      model = sam_model(params, settings, args.dtype).image_encoder
      peers["segment-anything"] = Torch(
        model, channels_first, args.dtype, first=True
      )
    gate = 1.0 if GPU else ENCODER
    made[name] = Case(
      ours,
      peers,
      gate if name != "vit_p50" else None,
      P77_TEMP * args.batch if name == "vit_p77" else None,
      args.batch,
    )
  return made


def measure(
  cases: dict[str, dict[str, Callable[[], Any]]], rounds: int
) -> dict[str, dict[str, list[float]]]:
  """Seconds, by case and candidate."""
  times = {name: {own: [] for own in runs} for name, runs in cases.items()}
  for _ in range(rounds):
    for name, runs in cases.items():
      for own, run in runs.items():
        time.sleep(PAUSE_S)
        start = time.perf_counter()
        run()
        times[name][own].append(time.perf_counter() - start)
  return times


def table(made: dict[str, Case], args: argparse.Namespace) -> list[Any]:
  """Runs, prints and judges; the rows."""
  for name, case in made.items():
    compiled = [f"{k} {v:.1f} s" for k, v in case.ours.compile_s.items()]
    print(f"compiled {name}: {', '.join(compiled)}", flush=True)
  apart = {name: differences(case) for name, case in made.items()}
  runs = {
    name: {own: one.wait for own, one in case.all.items()}
    for name, case in made.items()
  }
  times = measure(runs, args.rounds)
  print(
    f"{'':15s} {'':23s}      ms  images/s  over ours (least)  apart  temp MiB"
  )
  rows = []
  for name, case in made.items():
    for own, seconds in times[name].items():
      row = _row(name, own, seconds, times[name]["ours"], case.images)
      temp = case.all[own].temp
      row |= {"apart": apart[name][own], "temp_bytes": temp}
      rows.append(row)
      shown = "–" if temp is None else f"{temp / MIB:.0f}"
      print(
        f"{name:15s} {own:23s} {1e3 * row['seconds']:7.1f} "
        f"{row['images_per_second']:9.2f} {row['over_ours']:9.2f} "
        f"({row['least_over_ours']:5.2f}) {row['apart']:8.1e} {shown:>8s}"
      )
    found = _judge(name, case, times[name])
    if args.dtype == "float32":
      found.append(gate(f"{name} apart", max(apart[name].values()), APART))
    rows[-len(times[name])]["gates"] = found
  return rows


def differences(case: Case) -> dict[str, float]:
  """How far the results of each candidate are from ours, at most."""
  expected = case.ours.run()
  made = {}
  for own, one in case.all.items():
    found = one.run()
    if found.shape != expected.shape:  # channels first
      found = np.moveaxis(found, 1, -1)
    made[own] = float(np.abs(found - expected).max())
  return made


def _row(
  name: str, own: str, seconds: list[float], ours: list[float], images: int
) -> dict[str, Any]:
  median = statistics.median
  return {
    "case": name,
    "candidate": own,
    "seconds": median(seconds),
    "images_per_second": images / median(seconds),
    "over_ours": median(seconds) / median(ours),
    "least_over_ours": min(seconds) / min(ours),
  }


def _judge(
  name: str, case: Case, times: dict[str, list[float]]
) -> list[dict[str, Any]]:
  found = []
  if case.gate is not None and "transformers" in times:
    ours, theirs = times["ours"], times["transformers"]
    ratios = (
      statistics.median(ours) / statistics.median(theirs),
      min(ours) / min(theirs),
    )
    found.append(gate(f"{name} over transformers'", min(ratios), case.gate))
  if case.temp is not None:
    own, limit = case.ours.temp / MIB, case.temp / MIB
    found.append(gate(f"{name}: MiB", own, limit))
  return found


def gate(what: str, value: float, limit: float) -> dict[str, Any]:
  """Prints whether it holds."""
  holds = value <= limit
  print(f"  gate: {what} {value:.3g} <= {limit:.3g}: "
        f"{'holds' if holds else 'missed'}")  # fmt: skip
  return {"what": what, "value": value, "limit": limit, "holds": holds}


def everything(args: argparse.Namespace) -> list[Any]:
  """All masks of an image, both generators with the same thresholds."""
  from slimsam.amg import AutomaticMaskGenerator
  from slimsam.predict import Predictor

  rows = []
  for name in args.everything_models.split(","):
    settings = preset(name)
    params = draw(settings)
    image = picture()
    predictor = Predictor(params, settings, Compute(DTYPES[args.dtype]))
    cuts = thresholds(predictor, image)
    runs: dict[str, Callable[[], Any]] = {}
    side = {"points_per_side": args.points_per_side}
    made = AutomaticMaskGenerator(predictor, **side, **cuts)
    runs["ours"] = functools.partial(made.generate, image)
    if has("segment_anything"):
      from segment_anything import SamAutomaticMaskGenerator  # type: ignore

      theirs = SamAutomaticMaskGenerator(
        sam_model(params, settings, args.dtype), **side, **cuts
      )
      runs["segment-anything"] = functools.partial(theirs.generate, image)
    counts = {own: len(run()) for own, run in runs.items()}
    times = measure({name: runs}, args.everything_rounds)[name]
    for own, seconds in times.items():
      row = _row(f"everything, {name}", own, seconds, times["ours"], 1)
      row |= {"masks": counts[own], "thresholds": cuts}
      rows.append(row)
      print(
        f"everything, {name:8s} {own:36s} {row['seconds']:7.2f} s "
        f"{row['over_ours']:6.2f} ({row['least_over_ours']:5.2f}) "
        f"{counts[own]} masks"
      )
    if "segment-anything" in times:
      ratio = 1 / max(rows[-1]["over_ours"], rows[-1]["least_over_ours"])
      what = f"everything, {name}, over segment-anything's"
      ours, theirs = counts["ours"], counts["segment-anything"]
      rows[-len(times)]["gates"] = [
        gate(what, ratio, EVERYTHING),
        gate("difference of masks", abs(ours - theirs), 0.02 * theirs),
      ]
  return rows


def picture() -> np.ndarray:
  """uint8 [768 1024 3]: blotches of several sizes."""
  rng = np.random.default_rng(2)
  made = np.zeros((768, 1024, 3))
  for cells in (4, 16, 64):
    small = rng.normal(size=(cells * 3 // 4, cells, 3))
    side = 1024 // cells
    made += np.kron(small, np.ones((side, side, 1)))
  made = (made - made.min()) / (made.max() - made.min())
  return (255 * made).astype(np.uint8)


def thresholds(predictor: Any, image: np.ndarray) -> dict[str, Any]:
  """Half of the masks are good enough, and a quarter stable as well: about as
  many as of a trained model, which random weights with the usual thresholds
  would not give.
  """
  from slimsam.masks import point_grid, stability

  predictor.set_image(image)
  points = point_grid(32)[::33] * (image.shape[1], image.shape[0])
  logits, ious, _ = predictor.predict_batch(
    points[:, None], np.ones((len(points), 1), np.int32), return_logits=True
  )
  iou = float(np.quantile(ious, 0.5))
  stable = float(np.quantile(stability(logits[ious > iou]), 0.5))
  return {"pred_iou_thresh": iou, "stability_score_thresh": stable}


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--parts", default=",".join(PARTS))
  add("--models", default=",".join(MODELS), help="of the part encoder")
  add("--rounds", type=int, default=7)
  add("--batch", type=int, default=1, help="images at once")
  add("--dtype", default="float32", choices=sorted(DTYPES))
  add("--compile", action="store_true", help="torch.compile as well")
  add("--no_segment_anything", action="store_true", help="in part encoder")
  add("--everything_models", default="vit_p77,vit_b")
  add("--everything_rounds", type=int, default=3)
  add("--points_per_side", type=int, default=32)
  args = parser.parse_args()
  unknown = set(args.parts.split(",")) - set(PARTS)
  if unknown:
    parser.error(f"--parts: {', '.join(sorted(unknown))}: of {PARTS}")
  rows: list[Any] = []
  with tempfile.TemporaryDirectory() as cache:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    for part in args.parts.split(","):
      print(f"# {part}", flush=True)
      if part in ("blocks", "encoder"):
        rows += table({"blocks": blocks, "encoder": encoders}[part](args), args)
      else:
        rows += everything(args)
  seconds = {
    row["case"]: row["seconds"]
    for row in rows
    if row.get("candidate") == "ours"
  }
  last = []
  if {"vit_p50", "vit_b"} <= set(seconds) and not GPU:
    ratio = seconds["vit_p50"] / seconds["vit_b"]
    last.append(gate("vit_p50 over vit_b", ratio, HALF))
  versions = {
    name: __import__(name).__version__
    for name in ("jax", "torch", "transformers")
    if has(name)
  }
  line = {
    "benchmark": "sam", "python": platform.python_version(), **versions,
    "device": jax.devices()[0].device_kind,
    "cores": len(os.sched_getaffinity(0)), **vars(args), "rows": rows,
    "gates": last,
  }  # fmt: skip
  print(json.dumps(line))
  gates = last + [g for row in rows for g in row.get("gates", ())]
  return 0 if all(g["holds"] for g in gates) else 1


if __name__ == "__main__":
  sys.exit(main())
