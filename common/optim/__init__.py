"""Optimizers and schedules from configuration; the SAM family."""

from typing import Any

_EXPORTS = {
  "make_optimizer": "common.optim.make",
  "make_schedule": "common.optim.schedules",
  "sam": "common.optim.sharpness",
  "asam": "common.optim.sharpness",
  "fisher_sam": "common.optim.sharpness",
  "gsam": "common.optim.sharpness",
  "sagm": "common.optim.sharpness",
  "gam": "common.optim.sharpness",
  "look_sam": "common.optim.sharpness",
  "esam": "common.optim.sharpness",
  "sharpness_aware": "common.optim.second_pass",
  "gsam_combine": "common.optim.second_pass",
  "sagm_combine": "common.optim.second_pass",
  "fill_masked": "common.optim.second_pass",
  "sam_ascent": "common.optim.ascent",
  "asam_ascent": "common.optim.ascent",
  "fisher_ascent": "common.optim.ascent",
  "sagm_ascent": "common.optim.ascent",
  "swad": "common.optim.averaging",
}
__all__ = list(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if name in _EXPORTS:
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_EXPORTS])
