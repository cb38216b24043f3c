"""The recurrence in torch; for `linear_scan.py`."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any


def torch_peers(is_cpu: bool) -> dict[str, tuple[Callable, Callable]]:
  """Of each what (x, a, g) become before time is taken, and (x, a) -> h."""
  import torch  # type: ignore

  def as_it_is(*arrays: Any) -> Any:
    return arrays

  def loop(x: Any, a: Any) -> Any:
    h, state = torch.empty_like(x), torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
      state = torch.addcmul(x[:, t], a[:, t], state)
      h[:, t] = state
    return h

  found: dict[str, tuple[Callable, Callable]] = {
    "torch, loop": (as_it_is, loop)
  }
  try:
    from torch._higher_order_ops.associative_scan import (  # type: ignore
      associative_scan,
    )
  except ImportError:
    pass
  else:
    mode = "generic" if is_cpu else "pointwise"

    def join(left: Any, right: Any) -> Any:
      return left[0] * right[0], right[0] * left[1] + right[1]

    def scanned(x: Any, a: Any) -> Any:
      return associative_scan(join, (a, x), dim=1, combine_mode=mode)[1]

    found["torch, associative_scan"] = as_it_is, scanned
  if importlib.util.find_spec("accelerated_scan") is not None:
    name = "ref" if is_cpu else "scalar"  # a Triton kernel
    module: Any = importlib.import_module(f"accelerated_scan.{name}")

    def time_last(*arrays: Any) -> Any:
      return [array.transpose(1, 2).contiguous() for array in arrays]

    found[f"accelerated-scan, {name}"] = (
      time_last,
      lambda x, a: module.scan(a, x),
    )
  if not is_cpu and importlib.util.find_spec("fla") is not None:
    from fla.ops.hgrn import fused_recurrent_hgrn  # type: ignore

    found["fla, HGRN"] = (
      lambda x, a, g: (x, a.log(), g),
      lambda x, a: fused_recurrent_hgrn(x, a)[0],
    )
  return found
