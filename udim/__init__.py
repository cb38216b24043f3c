"""UDIM: classifiers that hold up on domains nobody has seen.

"Unknown Domain Inconsistency Minimization for Domain Generalization", Shin,
Bae, Na, Kim and Moon, ICLR 2024, arXiv 2403.07329. The formulas are those of
the authors' code, without its defects; `UdimConfig.reference_quirks` brings
back those that change results.
"""

from typing import Any

_EXPORTS = {
  "UdimConfig": "udim.settings",
  "perturb_images": "udim.perturb",
  "exact_data_grad": "udim.perturb",
  "Moments": "udim.inconsistency",
  "head_inconsistency": "udim.inconsistency",
  "head_moments": "udim.inconsistency",
  "per_sample_moments": "udim.inconsistency",
  "moments_inconsistency": "udim.inconsistency",
  "accumulated_gradient": "udim.inconsistency",
  "UdimState": "udim.transform",
  "udim": "udim.transform",
  "udim_grads": "udim.transform",
  "udim_passes": "udim.passes",
  "load_domains": "udim.domains",
  "Objective": "udim.objectives",
  "make_objective": "udim.objectives",
  "top_eigenvalues": "udim.landscape",
  "perturb_gap": "udim.landscape",
  "load_run": "udim.evaluate",
  "make_model": "udim.models",
  "make_apply_fn": "udim.models",
  "load_pretrained": "udim.convert",
}
__all__ = list(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if name in _EXPORTS:
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_EXPORTS])
