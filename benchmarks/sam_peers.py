"""Segment Anything in torch, with given weights; for `sam.py`."""

import functools
import importlib.util
from typing import Any

import jax
import numpy as np

from slimsam.settings import SamSettings

GPU = jax.default_backend() == "gpu"


def hf_model(params: Any, settings: SamSettings, dtype: str) -> Any:
  import torch  # type: ignore
  from transformers import SamConfig, SamModel  # type: ignore

  from slimsam.formats import to_hf

  state, config = to_hf(params, settings)
  made = SamConfig(**config)
  made._attn_implementation = "sdpa"
  model = SamModel(made).eval()
  tensors = {k: torch.tensor(np.asarray(v)) for k, v in state.items()}
  found = model.load_state_dict(tensors, strict=False)
  if found.unexpected_keys:
    raise SystemExit(f"not the same model: {found.unexpected_keys}")
  model.tie_weights()
  return model.to(device(), getattr(torch, dtype))


def sam_model(params: Any, settings: SamSettings, dtype: str) -> Any:
  """segment-anything's, of any uniform widths."""
  import torch  # type: ignore
  from segment_anything.modeling import (  # type: ignore
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    TwoWayTransformer,
  )
  from segment_anything.modeling import Sam as TorchSam  # type: ignore

  from slimsam.formats import to_sam

  cfg = settings.encoder
  norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
  model = TorchSam(
    ImageEncoderViT(
      img_size=cfg.image_size, patch_size=cfg.patch, embed_dim=cfg.width,
      depth=cfg.depth, num_heads=cfg.heads, norm_layer=norm,
      mlp_ratio=(cfg.mlp_widths[0] + 0.5) / cfg.width, use_rel_pos=True,
      window_size=cfg.window, global_attn_indexes=cfg.global_blocks,
    ),
    PromptEncoder(256, (cfg.grid,) * 2, (cfg.image_size,) * 2, 16),
    MaskDecoder(transformer=TwoWayTransformer(2, 256, 8, 2048),
                transformer_dim=256),
  )  # fmt: skip
  state = {
    k: torch.tensor(np.asarray(v)) for k, v in to_sam(params, settings).items()
  }
  model.load_state_dict(state)
  return model.eval().to(device(), getattr(torch, dtype))


def device() -> str:
  return "cuda" if GPU else "cpu"


def has(module: str) -> bool:
  return importlib.util.find_spec(module) is not None


class Torch:
  """A module of torch on one input; keeps what its memory grew to."""

  def __init__(self, module: Any, x: np.ndarray, dtype: str, *, first: bool):
    import torch  # type: ignore

    self._torch, self._module, self._first = torch, module, first
    self._x = torch.tensor(x).to(device(), getattr(torch, dtype))
    self.temp: int | None = None

  def wait(self) -> Any:
    with self._torch.inference_mode():
      out = self._module(self._x)
    if GPU:
      self._torch.cuda.synchronize()
    return out

  def run(self) -> np.ndarray:
    before = 0
    if GPU:
      self._torch.cuda.reset_peak_memory_stats()
      before = self._torch.cuda.memory_allocated()
    out = self.wait()
    if GPU:
      self.temp = self._torch.cuda.max_memory_allocated() - before
    while not hasattr(out, "numpy"):
      out = out[0] if self._first else out.last_hidden_state
    return out.float().cpu().numpy()
