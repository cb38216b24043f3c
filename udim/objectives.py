"""Objectives of the baselines: one loss over a batch of source domains.

# s domains, n images of each, b = n s images of a batch, d features, k classes

With L_e the mean cross-entropy of domain e and L the mean of the L_e,

    erm       L
    mixup     L on images and labels that are mixed across domains
    coral     L + weight mean_{e<f} (mean (mu_e - mu_f)^2 + mean (C_e - C_f)^2)
              for the means mu [d] and covariances C [d, d] of the features
    groupdro  sum_e q_e L_e,  q_e <- q_e exp(eta L_e) / sum
    irm       L + weight mean_e D_e D'_e, where D and D' are the derivatives of
              the even and the odd images' loss along a scale of the logits
    fishr     L + weight mean_e mean (v_e - mean_f v_f)^2 for the variances v of
              per-sample gradients of the head, smoothed over steps

The forms and defaults are those of `domainbed/algorithms.py` in
facebookresearch/DomainBed (arXiv 2007.01434). There mixup, coral and groupdro
call the model once for each domain, here all domains go through it together;
it differs where BatchNorm uses batch statistics.

Mixup 2001.00677; CORAL 1607.01719; GroupDRO 1911.08731; IRM 1907.02893; Fishr
2109.02934.
"""

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common import tree
from common.config import check_keys, did_you_mean
from common.errors import UserError
from common.optim.ascent import widen
from common.rngs import fold_name
from udim.heads import LinearHead
from udim.inconsistency import head_moments, make_targets, merge_domains

PyTree = Any
Metrics = dict[str, jax.Array]
Settings = Mapping[str, Any]

# name -> its settings with their defaults.
OBJECTIVES: Mapping[str, Settings] = {
  "erm": {},
  "mixup": {"alpha": 0.2},
  "coral": {"weight": 1.0},
  "groupdro": {"eta": 1e-2},
  "irm": {"weight": 1e2, "anneal_steps": 500},
  "fishr": {"weight": 1e3, "anneal_steps": 1500, "ema": 0.95},
}
# They compare domains: with a single one they would be erm under another name.
NEEDS_DOMAINS = frozenset({"coral", "groupdro", "fishr"})
# Their statistics of a domain's batch mean nothing for a single image.
_NEEDS_IMAGES = frozenset({"coral", "irm", "fishr"})


class Outcome(NamedTuple):
  """What an objective makes of a batch.

  Attributes:
    loss: scalar, to be differentiated.
    metrics: scalars: "loss", the mean cross-entropy of the images that the
      model saw; "accuracy", but for mixup; "penalty", before its weight, of
      coral, irm and fishr; "worst_loss" and "largest_q" of groupdro's domains.
    batch_stats: after the forward pass.
    memory: the objective's new arrays, of the old ones' structure and types.
  """

  loss: jax.Array
  metrics: Metrics
  batch_stats: PyTree
  memory: PyTree


class Objective(NamedTuple):
  """A loss with arrays of its own.

  Attributes:
    init: (number of domains, params) -> memory, {} where there is none.
    loss: `(forward, params, batch, *, key, step, memory) -> Outcome`, see
      `make_objective`.
    restart_step: step at which the optimizer starts afresh, because the loss
      jumps there; -1 never.
  """

  init: Callable[[int, PyTree], PyTree]
  loss: Callable[..., Outcome]
  restart_step: int = -1


class _Context(NamedTuple):
  """How an objective was made; the arguments of `make_objective`, checked."""

  name: str
  settings: Settings
  head_path: str
  label_smoothing: float


class _Seen(NamedTuple):
  """A batch behind the model, in float32 or better, and the other arguments.

  Attributes:
    features: [n, s, d].
    logits: [n, s, k].
    targets: [n, s, k].
    losses: cross-entropies of the domains, [s].
  """

  features: jax.Array
  logits: jax.Array
  targets: jax.Array
  losses: jax.Array
  params: PyTree
  head_path: str
  step: jax.Array
  memory: PyTree


_Term = tuple[jax.Array, Metrics, PyTree]  # the loss, its metrics, new memory


def make_objective(
  name: str,
  settings: Settings,
  *,
  head_path: str = "head",
  label_smoothing: float = 0.0,
) -> Objective:
  """Makes an objective.

  Args:
    name: one of `OBJECTIVES`.
    settings: what differs from the defaults there.
    head_path: path of the linear head's `kernel` and `bias` in the parameters,
      such as "net/classifier"; only fishr reads it.
    label_smoothing: share of each target that is spread over all classes.

  Returns:
    An `Objective`. Its `loss` takes

    forward: `(params, images [b, ...], key) -> (features [b, d], logits
      [b, k], batch_stats)`; called once, for all domains.
    batch: `{"image": float [s, n, ...], "label": int [s, n] or distributions
      [s, n, k]}`. Losses are means over the global batch: under jit it may be
      sharded along n.
    key: random key of the step.
    step: int, the number of updates done.
    memory: from `init`, later from the last `Outcome`.

  Raises:
    UserError: for unknown names, keys and values; from `init` and `loss` for
      too few domains, from `loss` for a batch or a head of other shapes.
  """
  settings = _complete(name, settings)
  _check_value("", "label_smoothing", label_smoothing)
  context = _Context(name, settings, head_path, label_smoothing)
  return Objective(
    functools.partial(_init, context),
    functools.partial(_loss, context),
    # A restart at step 0, of a fresh optimizer, is none.
    restart_step=settings.get("anneal_steps") or -1,
  )


def _init(context: _Context, num_domains: int, params: PyTree) -> PyTree:
  _check_domains(context.name, num_domains)
  if context.name == "groupdro":
    return {"q": jnp.full(num_domains, 1 / num_domains, jnp.float32)}
  if context.name == "fishr":

    def zeros(like: jax.Array) -> jax.Array:
      dtype = jnp.result_type(like, jnp.float32)
      return jnp.zeros((num_domains, *like.shape), dtype)

    kernel, bias = LinearHead(context.head_path).of(params)
    return jax.tree.map(zeros, {"kernel": kernel, "bias": bias})
  return {}


def _loss(
  context: _Context,
  forward: Callable[..., tuple[jax.Array, jax.Array, PyTree]],
  params: PyTree,
  batch: Mapping[str, jax.Array],
  *,
  key: jax.Array,
  step: jax.Array,
  memory: PyTree,
) -> Outcome:
  name, settings, head_path, label_smoothing = context
  images, labels = _check_batch(name, batch)
  domains, count = labels.shape[:2]
  mix = lambda x: x  # noqa: E731
  if name == "mixup":
    mix = _draw_mix(fold_name(key, "mixup"), domains, count, **settings)
  features, logits, batch_stats = forward(
    params, merge_domains(mix(images)), fold_name(key, "dropout")
  )
  features, logits = (
    widen(x).reshape(count, domains, -1) for x in (features, logits)
  )
  # The loss is linear in the targets: mixed targets are mixed losses.
  targets = mix(make_targets(labels, logits.shape[-1], label_smoothing))
  targets = jnp.swapaxes(targets, 0, 1)
  losses = jnp.mean(optax.softmax_cross_entropy(logits, targets), axis=0)
  metrics = {"loss": jnp.mean(losses)}
  if name != "mixup":
    right = jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)
    metrics["accuracy"] = jnp.mean(right)
  seen = _Seen(
    features, logits, targets, losses, params, head_path, step, memory
  )
  loss, more, memory = _TERMS[name](seen, **settings)
  memory = jax.lax.stop_gradient(memory)
  return Outcome(loss, metrics | more, batch_stats, memory)


def _draw_mix(
  key: jax.Array, domains: int, count: int, *, alpha: float
) -> Callable[[jax.Array], jax.Array]:
  """Draws partners and shares: a function that mixes any [s, n, ...].

  The domains stand in a random circle, and image i of each is mixed with image
  i of the next; one share ~ Beta(alpha, alpha) for each of these pairs. The
  images of a single domain are mixed with a permutation of themselves.
  """
  order_key, share_key = jax.random.split(key)
  shares = jax.random.beta(share_key, alpha, alpha, (domains,))
  if domains > 1:
    circle = jax.random.permutation(order_key, domains)
    partner, axis = circle[(jnp.argsort(circle) + 1) % domains], 0
  else:
    partner, axis = jax.random.permutation(order_key, count), 1

  def mix(x: jax.Array) -> jax.Array:
    share = shares.reshape(domains, *[1] * (x.ndim - 1))
    other = jnp.take(x, partner, axis=axis)
    return (share * x + (1 - share) * other).astype(x.dtype)

  return mix


def _erm(seen: _Seen) -> _Term:
  return jnp.mean(seen.losses), {}, seen.memory


def _mixup(seen: _Seen, *, alpha: float) -> _Term:
  del alpha  # at work before the model
  return _erm(seen)


def _coral(seen: _Seen, *, weight: float) -> _Term:
  mean = jnp.mean(seen.features, axis=0)
  centred = seen.features - mean[None]
  covariance = jnp.einsum(
    "nsd,nse->sde", centred, centred, precision="highest"
  ) / (len(centred) - 1)

  def distance(x: jax.Array) -> jax.Array:
    """Over pairs of domains, mean (x_e - x_f)^2 is twice the variance."""
    return 2 * jnp.mean(jnp.var(x, axis=0, ddof=1))

  penalty = distance(mean) + distance(covariance)
  loss = jnp.mean(seen.losses) + weight * penalty
  return loss, {"penalty": penalty}, seen.memory


def _groupdro(seen: _Seen, *, eta: float) -> _Term:
  """Algorithm 1 of the paper; softmax, or exp(eta L) could overflow."""
  old = seen.memory["q"]
  q = jax.nn.softmax(jnp.log(old) + eta * jax.lax.stop_gradient(seen.losses))
  metrics = {"worst_loss": jnp.max(seen.losses), "largest_q": jnp.max(q)}
  return jnp.sum(q * seen.losses), metrics, {"q": q.astype(old.dtype)}


def _irm(seen: _Seen, *, weight: float, anneal_steps: int) -> _Term:
  """IRMv1, estimated without bias from two halves.

  The cross-entropy of scaled logits, c z, has at c = 1 the derivative
  (softmax(z) - y) z.
  """
  delta = jax.nn.softmax(seen.logits) - seen.targets
  slopes = jnp.sum(delta * seen.logits, axis=-1)  # [n s]
  count = len(slopes)
  is_even = jnp.arange(count) % 2 == 0
  # A product, not slices: n may be sharded.
  averages = jnp.stack([is_even / ((count + 1) // 2), ~is_even / (count // 2)])
  even, odd = jnp.matmul(averages, slopes, precision="highest")
  penalty = jnp.mean(even * odd)
  weight_now = jnp.where(seen.step >= anneal_steps, weight, 1.0)
  loss = jnp.mean(seen.losses) + weight_now * penalty
  return loss, {"penalty": penalty}, seen.memory


def _fishr(
  seen: _Seen, *, weight: float, anneal_steps: int, ema: float
) -> _Term:
  """The averages start at 0 and are compared divided by 1 - ema, as in
  DomainBed: so the gradient through the newest variances is free of ema.
  """
  kernel, bias = LinearHead(seen.head_path).of(seen.params)
  moments = jax.vmap(head_moments, in_axes=(1, None, None, 1))(
    seen.features, kernel, bias, seen.targets
  )

  def smooth(old: jax.Array, m1: jax.Array, m2: jax.Array) -> jax.Array:
    return ema * old + (1 - ema) * (m2 - jnp.square(m1))

  def sum_of_squares(average: jax.Array) -> jax.Array:
    return jnp.sum(jnp.var(average / (1 - ema), axis=0))

  averages = jax.tree.map(smooth, seen.memory, *moments)
  squares = jax.tree.leaves(jax.tree.map(sum_of_squares, averages))
  penalty = jnp.stack(squares).sum() / tree.count_params((kernel, bias))
  weight_now = jnp.where(seen.step >= anneal_steps, weight, 0.0)
  loss = jnp.mean(seen.losses) + weight_now * penalty
  memory = jax.tree.map(
    lambda new, old: new.astype(old.dtype), averages, seen.memory
  )
  return loss, {"penalty": penalty}, memory


_TERMS: Mapping[str, Callable[..., _Term]] = {
  "erm": _erm,
  "mixup": _mixup,
  "coral": _coral,
  "groupdro": _groupdro,
  "irm": _irm,
  "fishr": _fishr,
}


def _complete(name: str, settings: Settings) -> dict[str, Any]:
  """All settings of `name`, checked."""
  if name not in OBJECTIVES:
    raise UserError(
      f"unknown objective {name!r}{did_you_mean(name, OBJECTIVES)}"
    )
  check_keys(settings, OBJECTIVES[name], what=f"methods.{name}")
  settings = {**OBJECTIVES[name], **settings}
  for key, value in settings.items():
    _check_value(f"methods.{name}.", key, value)
  return settings


_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
  "alpha": (lambda value: value > 0, "a number above 0"),
  "weight": (lambda value: value >= 0, "a number from 0"),
  "eta": (lambda value: value >= 0, "a number from 0"),
  "anneal_steps": (lambda value: value >= 0, "an integer from 0"),
  "ema": (lambda value: 0 <= value < 1, "in [0, 1)"),
  "label_smoothing": (lambda value: 0 <= value < 1, "in [0, 1)"),
}


def _check_value(section: str, key: str, value: Any) -> None:
  kind = numbers.Integral if key == "anneal_steps" else numbers.Real
  holds, what = _RANGES[key]
  is_number = isinstance(value, kind) and not isinstance(value, bool)
  if not (is_number and math.isfinite(value) and holds(float(value))):
    raise UserError(f"{section}{key}={value!r} must be {what}")


def _check_domains(name: str, domains: int) -> None:
  if name in NEEDS_DOMAINS and domains < 2:
    raise UserError(
      f"{name} compares source domains and got {domains}: give at least two, "
      "or leave it out for single-source data"
    )


def _check_batch(
  name: str, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """The batch's images and labels."""
  images, labels = batch["image"], batch["label"]
  is_soft = not jnp.issubdtype(labels.dtype, jnp.integer)
  if labels.ndim != 2 + is_soft or images.shape[:2] != labels.shape[:2]:
    raise UserError(
      f"{name}: images {list(images.shape)} and labels {list(labels.shape)} "
      "must be blocked by domain, [s, n, ...]: add an axis [None] for one "
      "domain"
    )
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(f"{name}: images of {images.dtype}: scale them to floats")
  domains, count = labels.shape[:2]
  _check_domains(name, domains)
  if name in _NEEDS_IMAGES and count < 2:
    raise UserError(
      f"{name} takes statistics of each domain's images: "
      f"data.images_per_domain={count} must be at least 2"
    )
  return images, labels
