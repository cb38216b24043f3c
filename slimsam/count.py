"""`python -m slimsam.count vit_b --ratio=0.5`: widths, parameters, work."""

import json
from typing import TYPE_CHECKING, Any

from common import app
from common.flags import Parser

if TYPE_CHECKING:  # jax takes most of a second, which --help need not wait for
  from slimsam.settings import SamSettings

EXAMPLE = "python -m slimsam.count vit_b --ratio=0.5"


def make_parser() -> Parser:
  """The flags."""
  parser = Parser(
    "slimsam.count",
    description="Counts parameters and multiply-accumulates of an image, of a "
    "published model or of one on disk, whole or pruned uniformly.",
    example=EXAMPLE,
  )
  add = parser.add_argument
  add("model", help="vit_b, vit_l, vit_h, vit_p50, vit_p77, or a model's path")
  add("--ratio", type=float, default=0.0, help="share to be pruned (0.0)")
  add("--xla", action="store_true", help="XLA's own count as well")
  add("--json", action="store_true", help="print JSON")
  return parser


def main() -> None:
  """Prints a model's counts."""
  args = make_parser().parse_args()
  found = counts(_settings(args.model), args.ratio, xla=args.xla)
  print(json.dumps(found, indent=2) if args.json else _page(args.model, found))


def counts(
  settings: "SamSettings", ratio: float = 0.0, *, xla: bool = False
) -> dict[str, Any]:
  """Widths, parameters and multiply-accumulates.

  Args:
    settings: of the whole model.
    ratio: the share of every width to be pruned, by the local rule.
    xla: also ask XLA.

  Raises:
    UserError: for a ratio that leaves nothing.
  """
  from common.tree import count_params
  from slimsam.cost import decoder_macs, encoder_macs, encoder_params, xla_macs
  from slimsam.init import abstract_params
  from slimsam.select import pruned_widths

  if ratio:
    settings = pruned_widths(settings, ratio)
  cfg, macs = settings.encoder, encoder_macs(settings.encoder)
  made = {
    "widths": {
      "embedding": cfg.width,
      "qkv": list(cfg.qkv_widths),
      "mlp": list(cfg.mlp_widths),
    },
    "encoder_params": encoder_params(settings),
    "params": count_params(abstract_params(settings)),
    "macs_conv_linear": macs.conv_linear,
    "macs_true": macs.true,
    "macs_attention": macs.attention,
    "macs_positions": macs.positions,
    "macs_reference": macs.reference,
    "decoder_macs_reference": decoder_macs(settings).reference,
  }
  return made | ({"macs_xla": round(xla_macs(settings))} if xla else {})


def _settings(model: str) -> "SamSettings":
  import os

  from slimsam.settings import preset

  if os.path.exists(os.path.expanduser(model)):
    from slimsam.weights import load_settings

    return load_settings(model)
  return preset(model)


def _page(model: str, found: dict[str, Any]) -> str:
  widths = found["widths"]

  def shown(values: list[int]) -> str:
    same = len(set(values)) == 1
    return str(values[0]) if same else ", ".join(map(str, values))

  def giga(name: str) -> str:
    value = found[name]
    if value < 1e8:
      return f"{value / 1e6:10.3f} M"
    return f"{value / 1e9:10.3f} G"

  lines = [
    f"{model}, {len(widths['qkv'])} blocks",
    f"embedding  {widths['embedding']}",
    f"qkv        {shown(widths['qkv'])}",
    f"mlp        {shown(widths['mlp'])}",
    "",
    f"image encoder          {found['encoder_params']:>14,} parameters",
    f"all                    {found['params']:>14,} parameters",
    "",
    "multiply-accumulates of an image",
    f"  convolutions, linear {giga('macs_conv_linear')}",
    f"  attention            {giga('macs_attention')}",
    f"  relative positions   {giga('macs_positions')}",
    f"  all                  {giga('macs_true')}",
    f"  the authors' counter {giga('macs_reference')}",
    f"  and of a prompt      {giga('decoder_macs_reference')}",
  ]
  if "macs_xla" in found:
    lines.append(f"  XLA                  {giga('macs_xla')}")
  return "\n".join(lines)


if __name__ == "__main__":
  app.run_alone(main)
