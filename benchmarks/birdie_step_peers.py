"""Training steps of transformers' models; for `birdie_step.py`."""

from collections.abc import Callable
from typing import Any


def torch_steps(
  model: Any, *, rows: int, length: int, device: str, dtype: str
) -> dict[str, Callable]:
  """Training steps of PyTorch models of the same shapes, by our model's name.

  Args:
    model: a mapping of sizes: `vocab_size`, `width`, `state`, `layers`,
      `heads`, `mlp_width` and `gate_blocks`.
    rows: of a batch.
    length: of a row.
    device: "cpu" or "cuda".
    dtype: of the computation, by autocast; parameters are in 32 bits.

  Returns:
    Functions that do one step of AdamW on a fixed batch and return how many
    parameters there are.
  """
  import transformers  # type: ignore

  common = {
    "vocab_size": model["vocab_size"],
    "hidden_size": model["width"],
    "num_hidden_layers": model["layers"],
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "use_cache": False,
  }
  hawk = transformers.RecurrentGemmaForCausalLM(
    transformers.RecurrentGemmaConfig(
      **common,
      intermediate_size=2 * model["mlp_width"],  # it counts both halves
      lru_width=model["state"],
      num_attention_heads=model["gate_blocks"],
      block_types=("recurrent",),
    )
  )
  llama = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      **common,
      intermediate_size=model["mlp_width"],
      num_attention_heads=model["heads"],
      num_key_value_heads=model["heads"],
      hidden_act="gelu_pytorch_tanh",
      attn_implementation="sdpa",
    )
  )
  vocabulary, shape = model["vocab_size"], (rows, length)
  return {
    name: _step(peer.to(device), vocabulary, shape, device, dtype)
    for name, peer in (("hawk", hawk), ("transformer", llama))
  }


def _step(
  model: Any, vocab_size: int, shape: tuple[int, int], device: str, dtype: str
) -> Callable:
  import torch  # type: ignore

  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
  )
  tokens = torch.randint(0, vocab_size, shape, device=device)
  mixed = torch.autocast(
    device, getattr(torch, dtype), enabled=dtype != "float32"
  )

  def step() -> int:
    with mixed:
      logits = model(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(
      logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if device == "cuda":
      torch.cuda.synchronize()
    return sum(p.numel() for p in model.parameters())

  return step
