"""Arrays and meshes: the linear recurrence, meshes, sharding rules."""

from typing import Any

_EXPORTS = {
  "linear_scan": "common.parallel.scan",
  "linear_scan_step": "common.parallel.scan",
  "make_mesh": "common.parallel.mesh",
  "batch_sharding": "common.parallel.mesh",
  "constrain": "common.parallel.mesh",
  "replicated": "common.parallel.mesh",
  "on_device": "common.parallel.mesh",
  "local_mesh": "common.parallel.mesh",
  "check_same": "common.parallel.mesh",
  "wait_for_all": "common.parallel.mesh",
  "gather_texts": "common.parallel.mesh",
  "from_host": "common.parallel.mesh",
  "to_host": "common.parallel.mesh",
  "by_device": "common.parallel.mesh",
  "bytes_per_device": "common.parallel.mesh",
  "startup_report": "common.parallel.mesh",
  "shardings": "common.parallel.rules",
  "abstract_sharded": "common.parallel.rules",
  "init_sharded": "common.parallel.rules",
}
__all__ = list(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if name in _EXPORTS:
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
