"""Birdie: state-space language models that retrieve.

"Birdie: Advancing State Space Models with Reward-Driven Objectives and
Curricula", Blouir, Smith, Anastasopoulos and Shehu, EMNLP 2024,
arXiv 2411.01030.
"""

from typing import Any

_EXPORTS = {
  "GatedSSM": "birdie.models",
  "Hawk": "birdie.models",
  "Transformer": "birdie.models",
  "make_model": "birdie.models",
  "OBJECTIVES": "birdie.objectives",
  "Example": "birdie.objectives",
  "NotEnough": "birdie.objectives",
  "TASKS": "birdie.tasks",
  "make_task": "birdie.tasks",
  "log_likelihoods": "birdie.scoring",
  "Configuration": "birdie.presets",
  "preset": "birdie.presets",
  "Mixture": "birdie.mixture",
  "MixtureSchedule": "birdie.mixture",
  "reward": "birdie.controller",
  "load_run": "birdie.run",
  "load_exported": "birdie.export",
}
__all__ = list(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if name in _EXPORTS:
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_EXPORTS])
