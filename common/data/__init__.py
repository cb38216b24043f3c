"""Data: sources, tokenizers, token stores, pipelines, the loader."""

from typing import Any

_EXPORTS = {
  "ByteTokenizer": "common.data.tokenizers",
  "make_tokenizer": "common.data.tokenizers",
  "text_source": "common.data.sources",
  "record_source": "common.data.sources",
  "TokenStore": "common.data.text",
  "build_splits": "common.data.text",
  "Windows": "common.data.text",
  "shuffled_windows": "common.data.text",
  "PackedRows": "common.data.text",
  "concat_and_split": "common.data.text",
  "FetchPlan": "common.data.loader",
  "Loader": "common.data.loader",
  "batches": "common.data.pipeline",
}
__all__ = list(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  if name in _EXPORTS:
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_EXPORTS])
