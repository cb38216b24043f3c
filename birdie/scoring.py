"""Log-likelihoods of continuations, in training's format."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from birdie.losses import batch_losses
from birdie.objectives import Example
from birdie.packing import Rows

PyTree = Any
_LEAST = 64
_CHUNK = 512  # places whose logits exist at a time
_KEYS = (
  "tokens", "targets", "loss_weights", "segment_ids", "positions", "prefix",
)  # fmt: skip


def bucket_size(length: int) -> int:
  """The least of few sizes that exceeds a length: a multiple of 64.

  Sizes are 64 apart up to 1024, and from there at most an eighth: one compiled
  program serves all lengths of a size.
  """
  step = max(_LEAST, 1 << max(length.bit_length() - 4, 0))
  return (length // step + 1) * step


def log_likelihoods(
  model: Any,
  params: PyTree,
  prompts: Sequence[np.ndarray],
  continuations: Sequence[np.ndarray],
  *,
  gen: int,
  batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
  """How likely each prompt's continuation is; `score` without its flags."""
  sums, lengths, _ = score(
    model, params, prompts, continuations, gen=gen, batch_size=batch_size
  )
  return sums, lengths


def score(
  model: Any,
  params: PyTree,
  prompts: Sequence[np.ndarray],
  continuations: Sequence[np.ndarray],
  *,
  gen: int,
  batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """How likely each prompt's continuation is, and whether it is the likeliest.

  Args:
    model: a module of `birdie.models`.
    params: its parameters.
    prompts: N int arrays, of any lengths, empty ones too; read in both
      directions, as in training.
    continuations: N int arrays, none of them empty.
    gen: the token between the two.
    batch_size: rows at a time.

  Returns:
    Sums of natural logarithms, float64 [N], and tokens, int64 [N]: a sum is 0
    at most; divide the two to compare continuations of unequal lengths. And
    bool [N], whether every token is the model's first choice there.

  Raises:
    ValueError: for an empty continuation.
  """
  model = model.clone(seq_axis=None)
  lengths = np.array([len(c) for c in continuations], np.int64)
  totals = lengths + [len(prompt) for prompt in prompts]
  by_size: dict[int, list[int]] = {}
  for i in np.argsort(totals, kind="stable").tolist():
    by_size.setdefault(bucket_size(int(totals[i])), []).append(i)
  sums = np.zeros(len(lengths), np.float64)
  misses = np.zeros(len(lengths), np.float64)
  for size, members in by_size.items():
    for start in range(0, len(members), batch_size):
      chosen = members[start : start + batch_size]
      rows = Rows(batch_size, size, gen=gen)
      for row, i in enumerate(chosen):
        rows.place(row, Example(prompts[i], continuations[i], 0), 0)
      batch = {key: rows.arrays[key] for key in _KEYS}
      found = np.asarray(_sums(model, params, batch))[:, : len(chosen)]
      sums[chosen], misses[chosen] = found
  return sums, lengths, misses == 0


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Any, params: PyTree, batch: dict[str, jax.Array]) -> jax.Array:
  """Of each row the log-likelihood and the tokens missed, [2 b]."""
  loss, correct, _ = batch_losses(model, params, batch, chunk=_CHUNK)
  weights = batch["loss_weights"]
  return jnp.stack(
    [-jnp.sum(loss * weights, -1), jnp.sum((1 - correct) * weights, -1)]
  )
