"""`python -m birdie.export --run RUN --output DIR`: programs that need no code.

    prefill.bin     params, tokens [b p], lengths [b] -> state
    step.bin        params, state, token [b] -> logits [b v], state
    manifest.json   their sizes, special tokens and how they are called

beside the files of a model's folder (`birdie.weights`). Both programs run on
every platform that was asked for, for any number of rows b. Parameters are an
argument, a nested dictionary by their paths: a `jax.export.deserialize(data)
.call(…)` needs jax alone, and other weights of the same model fit as well.

The length p of prompts is fixed, for two reasons: the recurrence is the
associative scan, whose levels depend on it, and attention's chunks do. That
form is plain operations on every platform, and of logarithmic depth where the
sequential loop, the other such form, would launch p steps after one another.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from common import app
from common.config import did_you_mean
from common.errors import UserError
from common.flags import Parser

EXAMPLE = "python -m birdie.export --run runs/birdie --output exported"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
USUAL = "cpu,cuda,tpu"
FORMAT = "birdie-programs/1"
_MANIFEST = "manifest.json"
_FILES = {"prefill": "prefill.bin", "step": "step.bin"}
PyTree = Any


def make_parser() -> Parser:
  """The flags."""
  parser = Parser(
    "birdie.export",
    description="Writes a model as programs of StableHLO: one reads prompts, "
    "one makes a token.",
    example=EXAMPLE,
  )
  add = parser.add_argument
  add("--run", required=True, help="a run's folder, or a model's")
  add("--output", required=True, metavar="DIR", help="a new or empty folder")
  add("--platforms", default=USUAL, help=f"where programs run ({USUAL})")
  add(
    "--length",
    type=int,
    help="places for a prompt, one more than the longest; else as trained",
  )
  add(
    "--new_tokens",
    type=int,
    default=256,
    help="a Transformer's cache has room for so many behind a prompt (256)",
  )
  add("--dtype", help="of parameters: float32 or bfloat16; else as saved")
  add("--step", type=int, help="which checkpoint; else the newest")
  return parser


def main() -> None:
  """Exports a model."""
  parser = make_parser()
  args = parser.parse_args()
  platforms = args.platforms.split(",")
  for name in platforms:
    if name not in PLATFORMS:
      raise UserError(f"--platforms: {name!r}{did_you_mean(name, PLATFORMS)}")
  if args.length is not None and args.length < 2:
    parser.error(f"--length={args.length} must be at least 2")
  if args.new_tokens < 1:
    parser.error(f"--new_tokens={args.new_tokens} must be at least 1")
  if args.dtype not in (None, "float32", "bfloat16"):
    parser.error(f"--dtype={args.dtype} must be float32 or bfloat16")
  if importlib.util.find_spec("flatbuffers") is None:
    raise UserError(
      "programs are kept with flatbuffers: pip install -e '.[export]'"
    )

  from birdie import weights
  from birdie.run import load_run

  run = load_run(args.run, step=args.step)
  if args.dtype is not None:
    run = weights.as_dtype(run, args.dtype)
  extra = export(
    run,
    platforms=platforms,
    length=args.length or run.config.data.sequence_length,
    new_tokens=args.new_tokens,
  )
  try:
    weights.save_model(args.output, run, args.run, extra=extra)
  except OSError as error:
    raise UserError(f"{args.output}: {error.strerror or error}") from error
  for name, data in extra.items():
    print(f"{os.path.join(args.output, name)}: {len(data) / 2**10:.1f} KiB")


def export(
  run: Any, *, platforms: Sequence[str], length: int, new_tokens: int
) -> dict[str, bytes]:
  """The two programs and their manifest, as files' contents by name.

  Args:
    run: a `birdie.run.Run`.
    platforms: where the programs shall run.
    length: p, at least 2; the longest prompt has one less, for GEN follows it.
    new_tokens: GEN and those that a Transformer's cache has room for besides.
  """
  import jax

  capacity = length + new_tokens
  programs = make_programs(
    run.model, run.params, platforms=platforms, length=length, capacity=capacity
  )
  vocab = run.vocab
  made = {
    _FILES[name]: bytes(program.serialize())
    for name, program in programs.items()
  }
  manifest = {
    "format": FORMAT,
    "jax": jax.__version__,
    "calling_convention": programs["step"].calling_convention_version,
    "platforms": list(platforms),
    "model": run.config.model.name,
    "length": length,
    "longest_prompt": length - 1,
    "capacity": capacity,
    "vocabulary": vocab.size,
    "gen": vocab.gen,
    "eos": vocab.eos,
    "announce": list(vocab.paradigms["prefix_language_modeling"]),
    "params": "model.safetensors; the parts of a path are nested keys",
    "use": (
      "a prompt is announce and its tokens, filled up with gen; lengths count "
      "without; the first step reads gen, each later one the token before"
    ),
    "programs": {
      name: {
        "file": _FILES[name],
        "hash": _hash(made[_FILES[name]]),
        "inputs": _shapes(program.in_tree, program.in_avals, skip="params"),
        "outputs": _shapes(program.out_tree, program.out_avals),
      }
      for name, program in programs.items()
    },
  }
  text = json.dumps(manifest, indent=2) + "\n"
  return made | {_MANIFEST: text.encode()}


def _hash(data: bytes) -> str:
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def make_programs(
  model: Any,
  params: PyTree,
  *,
  platforms: Sequence[str],
  length: int,
  capacity: int,
) -> dict[str, Any]:
  """`prefill` and `step` as `jax.export.Exported`; see `export`."""
  import jax
  import jax.numpy as jnp

  from birdie import decode, weights

  model = weights.plain(model)

  def prefill(params, tokens, lengths):
    state = decode.prefill(model, params, tokens, lengths, capacity=capacity)
    return {"layers": state.layers, "position": state.position}

  def step(params, state, token):
    before = decode.DecodeState(state["layers"], state["position"])
    logits, after = decode.decode_step(model, params, before, token)
    return logits, {"layers": after.layers, "position": after.position}

  (rows,) = jax.export.symbolic_shape("b")
  row = jax.ShapeDtypeStruct((rows,), jnp.int32)
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  shapes = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params
  )
  state = jax.eval_shape(prefill, shapes, tokens, row)

  def made(function: Any, *arguments: Any) -> Any:
    exporting = jax.export.export(jax.jit(function), platforms=platforms)
    return exporting(shapes, *arguments)

  with _no_folders():
    return {
      "prefill": made(prefill, tokens, row), "step": made(step, state, row),
    }  # fmt: skip


@contextlib.contextmanager
def _no_folders() -> Iterator[None]:
  """Programs name the lines they come from, by the ends of their paths."""
  import jax

  name = "jax_hlo_source_file_canonicalization_regex"
  before = getattr(jax.config, name)
  jax.config.update(name, r".*/(?=[^/]+/[^/]+$)")
  try:
    yield
  finally:
    jax.config.update(name, before)


def _shapes(tree: Any, avals: Sequence[Any], *, skip: str = "") -> list[Any]:
  """Shapes and dtypes of arguments or results, as text in their trees."""
  import jax

  found = jax.tree.unflatten(tree, [aval.str_short() for aval in avals])
  if skip:
    (_, *rest), _ = found
    return [skip, *rest]
  return list(found) if isinstance(found, tuple) else [found]


# -- loading -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Exported:
  """Programs that were read from a folder.

  Attributes:
    manifest: see `export`.
    params: arrays, nested by their paths.
    prefill: of params, tokens and lengths the state.
    step: of params, a state and tokens the logits and the next state.
  """

  manifest: dict[str, Any]
  params: PyTree
  prefill: Any
  step: Any

  def pad(self, prompts: Sequence[Any]) -> tuple[Any, Any]:
    """Prompts of unequal lengths as tokens [b p] and lengths [b], int32.

    Raises:
      UserError: for a prompt that is too long for the program.
    """
    import numpy as np

    longest = self.manifest["longest_prompt"]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if lengths.max(initial=0) > longest:
      raise UserError(
        f"a prompt has {lengths.max()} tokens, and the program reads at most "
        f"{longest}: export with a larger --length"
      )
    shape = len(prompts), self.manifest["length"]
    tokens = np.full(shape, self.manifest["gen"], np.int32)
    for row, prompt in zip(tokens, prompts):
      row[: len(prompt)] = prompt
    return tokens, lengths


def load_exported(folder: str | os.PathLike[str]) -> Exported:
  """Reads what `birdie.export` wrote; no code of a model is run.

  The programs themselves are code, and jax's reader of them is not made for
  files that somebody has tampered with: load them from whom you trust.

  Raises:
    UserError: for files that are missing, damaged or of another version, or
      programs that do not run on this platform.
  """
  import jax
  import jax.numpy as jnp

  from birdie.weights import WEIGHTS
  from common import files
  from common.weights import read_weights

  path = pathlib.Path(folder)
  manifest = files.read_json(path / _MANIFEST)
  if manifest.get("format") != FORMAT:
    raise UserError(
      f"{path / _MANIFEST}: format={manifest.get('format')!r} is not read "
      f"here, only {FORMAT!r}: export with this version"
    )
  here = jax.default_backend()
  known = {"cuda": "gpu", "rocm": "gpu"}
  if here not in [known.get(name, name) for name in manifest["platforms"]]:
    raise UserError(
      f"{path}: its programs run on {', '.join(manifest['platforms'])}, and "
      f"this is {here}: export with --platforms"
    )
  programs = {}
  for name in _FILES:
    data = _program(path / _FILES[name], manifest["programs"][name])
    programs[name] = jax.jit(jax.export.deserialize(data).call)
  params: dict[str, Any] = {}
  for name, array in read_weights(str(path / WEIGHTS)).items():
    *parents, leaf = name.split("/")
    place = params
    for parent in parents:
      place = place.setdefault(parent, {})
    place[leaf] = jnp.asarray(array)
  return Exported(manifest, params, **programs)


def _program(file: pathlib.Path, facts: dict[str, Any]) -> bytearray:
  """A program's bytes; jax would crash on damaged ones."""
  try:
    data = file.read_bytes()
  except OSError as error:
    raise UserError(f"{file}: {error.strerror}") from error
  # Programs of versions before have no hash.
  if _hash(data) != facts.get("hash", _hash(data)):
    raise UserError(f"{file} is not what {_MANIFEST} says: copy it again")
  return bytearray(data)


if __name__ == "__main__":
  app.run_alone(main)
