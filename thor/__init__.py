"""THOR: Transformers whose experts are drawn at random and taught to agree.

"Taming Sparsely Activated Transformer with Stochastic Experts", Zuo et al.,
ICLR 2022, arXiv 2110.04260. The formulas are those of the authors' code.
"""

from typing import Any

_EXPORTS = {
  "thor_loss": "thor.losses",
  "cross_entropy_loss": "thor.losses",
  "symmetric_kl": "thor.losses",
  "smoothed_cross_entropy": "thor.losses",
  "Settings": "thor.settings",
  "Transformer": "thor.model",
  "init_params": "thor.model",
  "Routing": "thor.routing",
  "Routes": "thor.routing",
  "train_routes": "thor.routing",
  "Dispatch": "thor.dispatch",
  "prepare": "thor.dispatch",
  "export_dense": "thor.paths",
  "keep_experts": "thor.paths",
  "Search": "thor.decode",
  "beam_search": "thor.decode",
  "load_run": "thor.run",
}
__all__ = list(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if name in _EXPORTS:
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_EXPORTS])
