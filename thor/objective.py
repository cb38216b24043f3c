"""What a training step minimizes: one pass, or two that have to agree.

# b batch, s source time, t target time, l expert layers, k experts

    one pass     LS / n
    two passes   (LS1 + LS2 + alpha SKL) / n, see `thor.losses`
    and with gates, a sum over expert layers and passes of the balance loss

Two passes through a dense model are R-Drop, through experts THOR.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.metrics import Digest, Mean
from common.step import LossFn, Metrics
from common.tree import global_norm
from thor.data import shift_right
from thor.layers import Array
from thor.losses import (
  cross_entropy_loss,
  log_probs,
  negative_log_likelihood,
  thor_loss,
)
from thor.model import Transformer
from thor.routing import Routes, Routing, train_routes

PyTree = Any
LN2 = 0.6931471805599453
SHOWN = 16  # of each layer's experts, those with numbers of their own
STREAMS = ("experts", "dropout")


def make_loss_fn(
  model: Transformer,
  routing: Routing,
  *,
  passes: int = 2,
  alpha: float = 5.0,
  label_smoothing: float = 0.1,
  table: Array | None = None,
) -> LossFn:
  """The loss of a batch, per target token.

  Both passes are one program, and which experts they take is data.

  Args:
    model: the Transformer.
    routing: which expert runs where.
    passes: 1 or 2.
    alpha: weight of the agreement of two passes.
    label_smoothing: see `thor.losses`.
    table: int [v], of hash; see `thor.routing.hash_table`.

  Returns:
    `(params, batch, rngs) -> (loss, metrics)`; rngs are those of `STREAMS`,
    metrics:
      loss; ce1, ce2: the smoothed cross-entropies; nll1, nll2, and in bits
        nll_bits: without smoothing; skl: the disagreement of two passes;
      same: the share of expert layers in which both passes took one expert;
      kept: the share of tokens that experts had room for;
      balance: the gates' loss, 1 if balanced;
      experts/LAYER/EXPERT: the share of tokens;
      draws: see `digest_of_draws`.

  Raises:
    UserError: for values without a meaning.
  """
  check_objective(passes, alpha, label_smoothing)
  cfg = model.settings

  def loss_fn(params: PyTree, batch: Any, rngs: Any) -> tuple[Array, Metrics]:
    source, target = batch["source"], batch["target"]
    decoder_input = shift_right(target, cfg.start_id, pad_id=cfg.pad_id)
    routes = train_routes(
      routing, cfg.expert_layers, rngs["experts"],
      source=source, target=decoder_input, passes=passes, table=table,
    )  # fmt: skip

    def run(routes: Routes, key: Array) -> Any:
      return model.apply(
        {"params": params}, source, decoder_input, routes, key=key
      )

    # Side by side: half of the program, and weights travel once for both.
    logits, reports = jax.vmap(run)(
      jax.tree.map(lambda *own: jnp.stack(own), *routes),
      jax.random.split(rngs["dropout"], passes),
    )
    smooth = {"pad_id": cfg.pad_id, "label_smoothing": label_smoothing}
    if passes == 1:
      loss, metrics = cross_entropy_loss(logits[0], target, **smooth)
    else:
      loss, metrics = thor_loss(
        logits[0], logits[1], target, alpha=alpha, **smooth
      )
    if routing.gated and routing.balance:
      loss = loss + routing.balance * jnp.sum(reports["balance"])
    count = metrics["ce1"].count
    metrics = {"loss": Mean(loss * count, count), **metrics}
    metrics |= _likelihoods(logits, target, cfg.pad_id)
    return loss, metrics | _expert_metrics(
      routing, rngs["experts"], routes, reports
    )

  return loss_fn


def digest_of_draws(
  routing: Routing, key: Array, routes: list[Routes]
) -> Digest:
  """What each device has drawn for itself: the step's key, and the experts of
  whole batches. Experts of sentences and tokens lie where their rows are, so
  that bits drawn from the key stand for them.
  """
  drawn = [jax.random.key_data(key)]
  if routing.kind == "thor" and routing.level == "batch":
    return Digest.of(*drawn, *jax.tree.leaves(routes))
  return Digest.of(*drawn, jax.random.bits(key, (8,)))


def check_objective(passes: int, alpha: float, label_smoothing: float) -> None:
  """Refuses values without a meaning."""
  if passes not in (1, 2):
    raise UserError(f"objective.passes={passes} must be 1 or 2")
  if not 0 <= alpha < float("inf"):
    raise UserError(f"objective.alpha={alpha} must be a number from 0")
  if not 0 <= label_smoothing < 1:
    raise UserError(
      f"objective.label_smoothing={label_smoothing} must be from 0 and below 1"
    )


def _likelihoods(logits: Array, target: Array, pad_id: int) -> Metrics:
  """`nll1`, `nll2` in nats, and `nll_bits` of all passes."""
  counted = target != pad_id
  made = {}
  for i, one in enumerate(jax.lax.stop_gradient(logits), 1):
    nll = negative_log_likelihood(log_probs(one), target)
    made[f"nll{i}"] = Mean.of(nll, counted)
  mean = functools.reduce(operator.add, made.values())
  return made | {"nll_bits": Mean(mean.total / LN2, mean.count)}


def _expert_metrics(
  routing: Routing, key: Array, routes: list[Routes], reports: dict[str, Array]
) -> Metrics:
  """Args: reports: what expert layers say, each [passes, l, …]; {} without."""
  if not reports:
    return {}
  load = jnp.mean(reports["load"], axis=0)
  layers, experts = load.shape
  made: Metrics = {
    f"experts/{i}/{k}": Mean.of(load[i, k])
    for i in range(layers)
    for k in range(min(experts, SHOWN))
  }
  made["draws"] = digest_of_draws(routing, key, routes)
  if routing.kind in ("switch", "random_switch", "hash"):
    made["kept"] = Mean.of(reports["kept"])
  if routing.gated:
    made["balance"] = Mean.of(reports["balance"])
  by_batch = routing.kind == "thor" and routing.level == "batch"
  if by_batch and len(routes) == 2:
    first, second = [jnp.concatenate(jax.tree.leaves(own)) for own in routes]
    made["same"] = Mean.of((first == second).astype(jnp.float32))
  return made


def expert_grad_norms(grads: PyTree) -> Metrics:
  """The norm of the gradient of each expert, over all layers; for
  `common.step.make_train_step`.
  """
  found = [
    layer["experts"]
    for side in ("encoder", "decoder")
    for layer in grads[side]["layers"].values()
    if "experts" in layer
  ]
  if not found:
    return {}
  stacks = [{part: one[part] for part in ("up", "down")} for one in found]
  count = stacks[0]["up"]["bias"].shape[1]
  return {
    f"expert_grad_norm/{k}": Mean.of(
      global_norm(jax.tree.map(functools.partial(_of_expert, k), stacks))
    )
    for k in range(min(count, SHOWN))
  }


def _of_expert(k: int, leaf: Array) -> Array:
  return leaf[:, k]
