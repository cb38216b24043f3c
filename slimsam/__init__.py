"""SlimSAM: Segment Anything, pruned and distilled."""

from typing import Any

_EXPORTS = {
  "AutomaticMaskGenerator": "slimsam.amg",
  "Predictor": "slimsam.predict",
  "Sam": "slimsam.model",
  "SamSettings": "slimsam.settings",
  "preset": "slimsam.settings",
  "uniform": "slimsam.settings",
  "init_params": "slimsam.init",
  "encoder_groups": "slimsam.groups",
  "prune_params": "slimsam.prune",
  "prune_model": "slimsam.prune",
}
__all__ = list(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if name in _EXPORTS:
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
