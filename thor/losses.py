"""THOR's objective: two label-smoothed cross-entropies and their agreement.

# b batch, t time, v vocabulary

With lp1 and lp2 the log-probabilities of two passes over the same batch, n its
target tokens without padding, and eps the label smoothing:

    LS(lp)  = sum_t (1 - eps - eps / (v - 1)) (-lp[y]) + eps / (v - 1) sum_v -lp
    SKL     = sum_t 1/2 sum_v (p1 - p2) (lp1 - lp2)
    loss    = (LS(lp1) + LS(lp2) + alpha SKL) / n

The smoothing runs over the whole vocabulary, padding too, and the two
cross-entropies are added, not averaged, as in fairseq and the authors' code
(arXiv 2110.04260; `microsoft/Stochastic-Mixture-of-Experts`). All in float32
on log-probabilities: the authors' logarithm of a softmax is infinite where a
probability underflows, this is finite for any finite logits.

With one expert this is R-Drop (arXiv 2106.14448).
"""

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.metrics import Mean

Array = jax.Array


def thor_loss(
  logits1: Array,
  logits2: Array,
  targets: Array,
  *,
  pad_id: int,
  label_smoothing: float = 0.1,
  alpha: float = 5.0,
) -> tuple[Array, dict[str, Mean]]:
  """The loss of two passes over a batch.

  Args:
    logits1: [b t v], of the first pass.
    logits2: [b t v], of the second.
    targets: int [b t].
    pad_id: the target that does not count.
    label_smoothing: eps; 0.1 in the published script.
    alpha: the weight of the agreement; 5 in the published script, 1 by the
      authors' default.

  Returns:
    The loss per target token, and `{"ce1", "ce2", "skl"}`: the smoothed
    cross-entropies and the symmetric divergence, each a `Mean` over tokens.

  Raises:
    UserError: for shapes that do not go together, or a smoothing outside
      [0, 1).
  """
  if logits1.shape != logits2.shape:
    raise UserError(
      f"thor_loss: logits of {list(logits1.shape)} and {list(logits2.shape)} "
      "are not of the same batch"
    )
  counted = targets != pad_id
  first, second = log_probs(logits1), log_probs(logits2)
  parts = {
    "ce1": smoothed_cross_entropy(first, targets, label_smoothing),
    "ce2": smoothed_cross_entropy(second, targets, label_smoothing),
    "skl": symmetric_kl(first, second),
  }
  means = {name: Mean.of(values, counted) for name, values in parts.items()}
  total = means["ce1"].total + means["ce2"].total + alpha * means["skl"].total
  return total / jnp.maximum(means["ce1"].count, 1), means


def cross_entropy_loss(
  logits: Array,
  targets: Array,
  *,
  pad_id: int,
  label_smoothing: float = 0.1,
) -> tuple[Array, dict[str, Mean]]:
  """The loss of a single pass: LS / n, as a dense Transformer is trained.

  Args: as for `thor_loss`.

  Returns:
    The loss per target token, and `{"ce1"}`.
  """
  values = smoothed_cross_entropy(log_probs(logits), targets, label_smoothing)
  mean = Mean.of(values, targets != pad_id)
  return mean.total / jnp.maximum(mean.count, 1), {"ce1": mean}


def log_probs(logits: Array) -> Array:
  """Log-probabilities [..., v], in float32 or better."""
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  return jax.nn.log_softmax(logits.astype(dtype))


def smoothed_cross_entropy(
  log_probs: Array, targets: Array, label_smoothing: float
) -> Array:
  """Label smoothing as fairseq has it, for each token.

  Not that of `torch.nn.functional.cross_entropy` or optax, which give each
  class eps / v.

  Args:
    log_probs: [..., v].
    targets: int [...].
    label_smoothing: eps, the share that all classes but one divide.

  Returns:
    [...], nats.

  Raises:
    UserError: for targets of another shape, or a smoothing outside [0, 1).
  """
  if targets.shape != log_probs.shape[:-1]:
    raise UserError(
      f"targets of {list(targets.shape)} do not fit logits of "
      f"{list(log_probs.shape)}"
    )
  if not 0 <= label_smoothing < 1:
    raise UserError(f"label_smoothing={label_smoothing} must be in [0, 1)")
  nll = negative_log_likelihood(log_probs, targets)
  if not label_smoothing:
    return nll
  share = label_smoothing / (log_probs.shape[-1] - 1)
  everything = -jnp.sum(log_probs, axis=-1)
  return (1 - label_smoothing - share) * nll + share * everything


def negative_log_likelihood(log_probs: Array, targets: Array) -> Array:
  """-log p of each target: [..., v], int [...] -> [...]."""
  chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)
  return -chosen[..., 0]


def symmetric_kl(first: Array, second: Array) -> Array:
  """(KL(p1 || p2) + KL(p2 || p1)) / 2 for each token.

  Args:
    first: [..., v], log-probabilities.
    second: [..., v], log-probabilities.

  Returns:
    [...], nats; gradients flow into both.
  """
  difference = (jnp.exp(first) - jnp.exp(second)) * (first - second)
  return jnp.sum(difference, axis=-1) / 2
