"""Validation: losses by language, and how much experts agree.

# b batch, s source time, t target time, v vocabulary, m members

Validation has a dispatch with a seed, as translation has: the loss that
checkpoints are compared by does not depend on a draw.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thor.data import shift_right
from thor.dispatch import Dispatch, Prepared, prepare
from thor.layers import Array
from thor.losses import log_probs, negative_log_likelihood, symmetric_kl
from thor.model import Transformer
from thor.routing import Routing
from thor.settings import Settings

PyTree = Any
_SUMS = ("nll", "correct", "skl", "agree", "tokens")


def next_log_probs(prepared: Prepared, source: Array, target: Array) -> Array:
  """Log-probabilities of every next token.

  Args:
    prepared: a model and how it is used.
    source: int [b s].
    target: int [b t], the decoder's input.

  Returns:
    Float32 [b t v]; of an ensemble the mean of the members' probabilities.
  """
  model = Transformer(prepared.settings)
  routes = prepared.routes(source, target)

  def run(params: PyTree) -> Array:
    logits, _ = model.apply({"params": params}, source, target, routes)
    return log_probs(logits)

  if not prepared.members:
    return run(prepared.params)
  each = jax.vmap(run, in_axes=(prepared.member_axes,))(prepared.params)
  return jax.nn.logsumexp(each, axis=0) - jnp.log(prepared.members)


class Evaluator:
  """Scores parameters on fixed batches.

  Args:
    settings: the model's.
    routing: what kinds of dispatch there are.
    batches: placed; see `thor.data.eval_batches`.
    languages: names of the batches' `language`.
    sharding: where batches go.
    dispatch: the way to use the model.
    seed: of its draws.
    table: of hash.
  """

  def __init__(
    self,
    settings: Settings,
    routing: Routing,
    batches: Any,
    *,
    languages: Sequence[str],
    sharding: jax.sharding.NamedSharding,
    dispatch: Dispatch,
    seed: int = 0,
    table: Array | None = None,
  ):
    self._batches = list(batches)
    self._languages = tuple(languages)
    drawn = routing.kind in ("thor", "random_switch") and not routing.gated
    # Two paths that have no expert in common.
    self._compares = drawn and routing.experts > 1
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.P())

    @functools.partial(jax.jit, out_shardings=everywhere)
    def sums(params: PyTree, batch: Mapping[str, Array]) -> Array:
      source, target = batch["source"], batch["target"]
      decoder_input = shift_right(
        target, settings.start_id, pad_id=settings.pad_id
      )

      def run(way: Dispatch) -> Array:
        made = prepare(params, settings, way, seed=seed, table=table)
        return next_log_probs(made, source, decoder_input)

      out = run(dispatch)
      counted = (target != settings.pad_id).astype(jnp.float32)
      skl = agree = jnp.zeros(target.shape)
      if self._compares:
        first, second = [run(Dispatch("fixed", i)) for i in (0, 1)]
        skl = symmetric_kl(first, second)
        agree = first.argmax(-1) == second.argmax(-1)
      values = jnp.stack(
        [
          negative_log_likelihood(out, target), out.argmax(-1) == target,
          skl, agree, jnp.ones(target.shape),
        ], -1,
      )  # fmt: skip
      by_row = jnp.sum(values * counted[..., None], axis=1)
      return jax.ops.segment_sum(
        by_row, batch["language"], len(self._languages)
      )

    self._sums = sums

  def __call__(self, params: PyTree) -> dict[str, float]:
    """Scalars, the same on all processes.

    `eval/{loss, perplexity, accuracy}` over all tokens (the loss without
    smoothing, in nats), `eval_loss/LANGUAGE`, and where experts are drawn
    `agreement/{skl, top1}` of fixed:0 and fixed:1.
    """
    parts = [self._sums(params, batch) for batch in self._batches]
    table = np.sum([np.asarray(part, np.float64) for part in parts], axis=0)
    total = dict(zip(_SUMS, table.sum(axis=0)))
    tokens = max(total["tokens"], 1)
    loss = total["nll"] / tokens
    made = {
      "eval/loss": loss,
      "eval/perplexity": float(np.exp(min(loss, 700))),
      "eval/accuracy": total["correct"] / tokens,
    }
    if self._compares:
      made["agreement/skl"] = total["skl"] / tokens
      made["agreement/top1"] = total["agree"] / tokens
    for name, row in zip(self._languages, table):
      if name and row[-1]:
        made[f"eval_loss/{name}"] = row[0] / row[-1]
    return {name: float(value) for name, value in made.items()}
