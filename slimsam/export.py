"""`python -m slimsam.export MODEL DIR`: programs that need none of this code.

    encoder.stablehlo    images [b size size 3] -> embeddings [b g g c]
    decoder.stablehlo    embeddings [b g g c], points [b p n 2], labels [b p n],
                         masks [b p 4g 4g], has_mask [b p]
                         -> logits [b p m 4g 4g], predicted IoU [b p m]

Both hold the weights, run on every platform that was asked for, and are called
with `jax.export.deserialize(data).call(…)`; b, p and n are free. Boxes are two
points with labels 2 and 3; where there is none, one point with label -1 is to
be added, as for segment-anything's own ONNX decoder. All masks come, first
that of prompts which are not ambiguous.

With `--format=onnx` they are `encoder.onnx`, whose axes are torch's, and
`decoder.onnx`, which stands in for segment-anything's own: see
`slimsam.onnx_encoder` and `slimsam.onnx_decoder`.
"""

import argparse
import functools
import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from common import app
from common.config import did_you_mean
from common.errors import UserError
from common.flags import Parser

EXAMPLE = "python -m slimsam.export models/vit_b exported"
# Each with the package that writes it.
FORMATS = {"stablehlo": "flatbuffers", "onnx": "onnx"}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
USUAL = ("cpu", "cuda", "tpu")
MOST_BYTES = 2**31 - 2**24  # of a program and its weights
PyTree = Any


def make_parser() -> Parser:
  """The flags."""
  parser = Parser(
    "slimsam.export",
    description="Writes a model as StableHLO or ONNX: one program for images, "
    "one for prompts.",
    example=EXAMPLE,
  )
  add = parser.add_argument
  add("model", help="a .pth, or a model's folder")
  add("output", help="a new or empty folder")
  add(
    "--format",
    default="stablehlo",
    help="stablehlo, onnx or stablehlo,onnx (stablehlo)",
  )
  add("--platforms", help=f"of StableHLO ({','.join(USUAL)})")
  add("--dtype", default="float32", help="float32 or bfloat16 (float32)")
  add(
    "--return_single_mask",
    action="store_true",
    help="ONNX: the best mask alone (off: all of them)",
  )
  return parser


def main() -> None:
  """Exports a model."""
  parser = make_parser()
  args = parser.parse_args()
  formats = args.format.split(",")
  platforms = USUAL if args.platforms is None else args.platforms.split(",")
  _check(parser, args, formats, platforms)
  output = pathlib.Path(args.output).expanduser()
  if output.is_file() or (output.is_dir() and any(output.iterdir())):
    raise UserError(f"{args.output} is there already: name a new one")

  from slimsam.weights import load_model

  params, settings = load_model(args.model)
  writers: dict[str, Callable[[pathlib.Path], int]] = {}
  if "stablehlo" in formats:
    made = export(params, settings, platforms=platforms, dtype=args.dtype)
    for name, program in made.items():
      data = program.serialize()
      writers[f"{name}.stablehlo"] = functools.partial(_write_bytes, data)
  if "onnx" in formats:
    from slimsam.onnx_decoder import decoder_graph
    from slimsam.onnx_encoder import encoder_graph

    single = args.return_single_mask
    decoder = decoder_graph(params, settings, single_mask=single)
    writers["encoder.onnx"] = encoder_graph(params, settings).write
    writers["decoder.onnx"] = decoder.write
  try:
    output.mkdir(parents=True, exist_ok=True)
    for name, write in writers.items():
      size = write(output / name)
      print(f"{output / name}: {size / 2**20:.1f} MiB")
  except OSError as error:
    raise UserError(f"{args.output}: {error.strerror or error}") from error


def _write_bytes(data: bytes, path: pathlib.Path) -> int:
  return path.write_bytes(data)


def _check(
  parser: Parser,
  args: argparse.Namespace,
  formats: Sequence[str],
  platforms: Sequence[str],
) -> None:
  """Refuses what is unknown, does not go together, or is not installed."""
  from slimsam.encoder import DTYPES

  for name in formats:
    if name not in FORMATS:
      raise UserError(f"--format: {name!r}{did_you_mean(name, FORMATS)}")
  for name in platforms:
    if name not in PLATFORMS:
      raise UserError(f"--platforms: {name!r}{did_you_mean(name, PLATFORMS)}")
  if args.dtype not in DTYPES:
    parser.error(f"--dtype={args.dtype} must be one of {', '.join(DTYPES)}")
  if args.platforms is not None and "stablehlo" not in formats:
    raise UserError(
      f"--platforms={args.platforms}: ONNX runs wherever a runtime does; leave "
      "it out, or add stablehlo to --format"
    )
  if args.dtype != "float32" and "onnx" in formats:
    raise UserError(
      f"--dtype={args.dtype}: ONNX is written in float32; take "
      "--format=stablehlo for another"
    )
  if args.return_single_mask and "onnx" not in formats:
    raise UserError(
      "--return_single_mask is for ONNX: add --format=onnx, or leave it out"
    )
  for name in formats:
    if importlib.util.find_spec(FORMATS[name]) is None:
      raise UserError(
        f"--format={name} needs {FORMATS[name]}: pip install -e '.[export]'"
      )


def export(
  params: PyTree,
  settings: Any,
  *,
  platforms: Sequence[str] = USUAL,
  dtype: str = "float32",
) -> dict[str, Any]:
  """The two programs of StableHLO, as `jax.export.Exported`.

  Args:
    params: the model's.
    settings: its sizes.
    platforms: where they shall run.
    dtype: of the computation.

  Raises:
    UserError: for weights that no such file can hold.
  """
  import jax
  import jax.numpy as jnp

  from common.tree import count_params
  from slimsam.attention import How
  from slimsam.encoder import DTYPES, Compute, encode

  held = count_params(params["image_encoder"])
  held *= jnp.dtype(DTYPES[dtype]).itemsize
  if held > MOST_BYTES:
    raise UserError(
      f"{held / 2**30:.1f} GiB of {dtype} weights: a file of StableHLO holds "
      "2; take --dtype=bfloat16 or --format=onnx"
    )

  # Kernels have no place in a program that is to be kept.
  cfg, how = settings.encoder, How(kernel="xla")
  compute = Compute(DTYPES[dtype], how=how)
  size, grid = cfg.image_size, cfg.grid

  def encoder(images: jax.Array) -> jax.Array:
    out = encode(params["image_encoder"], images, cfg, compute)
    return out.astype(jnp.float32)

  scope = jax.export.SymbolicScope()

  def spec(shape: str, kind: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    sizes = jax.export.symbolic_shape(shape, scope=scope)
    return jax.ShapeDtypeStruct(sizes, kind)

  side = 4 * grid
  arguments = {
    "encoder": (spec(f"b, {size}, {size}, 3"),),
    "decoder": (
      spec(f"b, {grid}, {grid}, {cfg.out}"),
      spec("b, p, n, 2"),
      spec("b, p, n", jnp.int32),
      spec(f"b, p, {side}, {side}"),
      spec("b, p", jnp.float32),
    ),
  }
  programs = {
    "encoder": encoder,
    "decoder": functools.partial(answer, params, settings, DTYPES[dtype]),
  }
  return {
    name: jax.export.export(jax.jit(run), platforms=platforms)(*arguments[name])
    for name, run in programs.items()
  }


def answer(
  params: PyTree,
  settings: Any,
  dtype: Any,
  embeddings: Any,
  points: Any,
  labels: Any,
  masks: Any,
  has_mask: Any,
) -> tuple[Any, Any]:
  """All masks of prompts, by the inputs of segment-anything's ONNX decoder.

  Args:
    params: the model's.
    settings: its sizes.
    dtype: of the computation.
    embeddings: [b g g c].
    points: [b p n 2], pixels of the padded image.
    labels: [b p n]: 1, 0, -1 for no point, 2 and 3 for corners of a box.
    masks: logits [b p 4g 4g], of prompts that have one.
    has_mask: [b p], 1 or 0.

  Returns:
    Logits [b p m 4g 4g], and predicted IoU [b p m].
  """
  import jax.numpy as jnp

  from slimsam import decoder, prompts

  own = params["prompt_encoder"]
  chosen = has_mask[:, :, None, None, None]
  dense = jnp.where(
    chosen > 0,
    prompts.encode_masks(own, masks),
    prompts.no_masks(own, settings),
  )
  return decoder.decode(
    params["mask_decoder"],
    settings,
    embeddings,
    prompts.grid_positions(own, settings),
    prompts.encode_labelled(own, settings, points, labels),
    dense,
    multimask=None,
    dtype=dtype,
  )


if __name__ == "__main__":
  app.run_alone(main)
