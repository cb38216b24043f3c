"""The passes of a UDIM step over a model and a batch.

# s domains, n images of each, b = n s images of a batch, d features, k classes
# m micro-batches

Pass 1 goes through the clean images at theta; its `vjp` is kept and called
twice, for the gradient of the loss and, when the data has moved, for the
source half of the inconsistency. So the source is forwarded once. That needs
one dropout mask for both: with a mask a pass, the source goes forward again.
So it does for a term of some of the images (`term_images`): pulling back
through all of them would cost more.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.optim.ascent import value_at
from common.optim.second_pass import check_period
from udim.heads import AnyHead, Head, HeadLoss, LinearHead
from udim.inconsistency import (
  accumulated_gradient,
  mean_over_batches,
  merge_domains,
  moments_inconsistency,
)
from udim.perturb import exact_data_grad, perturb_images
from udim.settings import UdimConfig

PyTree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
ApplyFn = Callable[..., tuple[jax.Array, jax.Array, PyTree]]
Keys = dict[str, jax.Array | None]
_PASSES = ("clean", "ascended", "source", "perturbed")


@dataclasses.dataclass(frozen=True)
class Passes:
  """The first gradient of a step, and functions for the others.

  Attributes:
    grads: gradients of the loss at the parameters.
    second_pass: `params -> (grads, data_grad, {"sam_loss"})`, of one backward
      pass. `data_grad` is [b, ...], or of the images of the term alone.
    inconsistency_grad_fn: `(params, data_grad) -> (grads, metrics)`, the added
      term.
    data_grad_fn: `(params, eps) -> data_grad`, for a `data_grad` that is not
      "fast".
    aux: `metrics` and `batch_stats` of the first pass.
    cfg: the settings that all of them follow.
  """

  grads: PyTree
  second_pass: Callable[[PyTree], tuple[PyTree, jax.Array, Metrics]]
  inconsistency_grad_fn: Callable[[PyTree, jax.Array], tuple[PyTree, Metrics]]
  data_grad_fn: Callable[[PyTree, PyTree], jax.Array]
  aux: dict[str, PyTree]
  cfg: UdimConfig

  @property
  def fns(self) -> dict[str, Any]:
    """The keywords of `udim(...).update`."""
    return {
      "value": self.aux["metrics"]["loss"],
      "grad_fn": self.second_pass,
      "inconsistency_grad_fn": self.inconsistency_grad_fn,
      "data_grad_fn": self.data_grad_fn,
      "cfg": self.cfg,
    }


def udim_passes(
  apply_fn: ApplyFn,
  head_path: str,
  cfg: UdimConfig,
  *,
  accum: int = 1,
  head_loss: HeadLoss | None = None,
  chunk: int | None = None,
) -> Callable[..., Passes]:
  """The functions that `udim(...).update` takes, from a model and a batch.

  Args:
    apply_fn: `(variables, images, *, train, rngs) -> (features [b, d],
      logits [b, k], new_batch_stats)`; `variables` has `params` and
      `batch_stats`, and `features` are what the head reads. With `head_loss`
      the logits are not used, and `features` may be [b, ...].
    head_path: path of the linear head's `kernel` [d, k] and `bias` [k] in the
      parameters, such as "head" or "net/classifier".
    cfg: the settings.
    accum: micro-batches, each with n / accum images of every domain. The
      gradients are those of the whole batch (but for BatchNorm, whose batch
      statistics are then a micro-batch's), for one more forward pass of both
      halves: moments accumulate, the inconsistency would not. It divides
      `cfg.term_images` too.
    head_loss: for a head that is not linear, or another loss than
      cross-entropy: `(head, features, label) -> loss` of one sample, where
      `head` is the tree of arrays at `head_path`. It takes the place of the
      loss of the logits, in every pass; moments then take a gradient by
      sample, and the memory of as many heads.
    chunk: with `head_loss`, samples of a domain whose gradients are held at a
      time, a divisor of their number; all if None.

  Returns:
    `(params, batch, rng, step, *, batch_stats={}) -> Passes`, which computes
    the first gradient. What it returns belongs to the trace it was made in:
    call it inside the jitted step, and the functions with the same `params`.
    Other parameters are right too, but then pass 1 is not reused.

    batch: `{"image": float [s, n, ...], "label": int [s, n] or distributions
      [s, n, k]}`; with `head_loss`, labels [s, n, ...] of any kind. Losses are
      means over the global batch: under jit it may be sharded along n, and
      `params` in any way.
    rng: key of the step's dropout, or None.
    step: int, the number of updates done, for schedules.

  Raises:
    UserError: for `accum` below 1, `chunk` or label smoothing that would do
      nothing; from the call, for an `apply_fn` that returns something else, for
      a batch or a head of other shapes, and for numbers of images that do not
      divide.
  """
  cfg = cfg.resolved()
  check_period(accum=accum)
  head = _make_head(head_path, cfg, head_loss, chunk)

  def passes_of(
    params: PyTree,
    batch: Batch,
    rng: jax.Array | None,
    step: int | jax.Array,
    *,
    batch_stats: PyTree = {},  # noqa: B006, never written
  ) -> Passes:
    images, labels, domains = _flatten(batch, any_label=head_loss is not None)
    rho_x = value_at(cfg.rho_x, jnp.asarray(step))
    model = _Model(apply_fn, head, cfg, batch_stats, domains, rho_x)
    _check_counts(len(images) // domains, cfg.term_images, accum)
    keys: Keys = dict.fromkeys(_PASSES, rng)
    if rng is not None and not cfg.share_dropout:
      keys = dict(zip(_PASSES, jax.random.split(rng, len(_PASSES))))
    if accum == 1:
      return _whole(model, params, images, labels, keys)
    return _accumulated(model, params, images, labels, keys, accum)

  return passes_of


def _make_head(
  path: str, cfg: UdimConfig, head_loss: HeadLoss | None, chunk: int | None
) -> Head:
  if head_loss is None:
    if chunk is not None:
      raise UserError(
        f"udim: chunk={chunk} is for a head_loss: a linear head has no "
        "gradients by sample"
      )
    return LinearHead(path, cfg.label_smoothing)
  if cfg.label_smoothing:
    raise UserError(
      f"udim: label_smoothing={cfg.label_smoothing} belongs to the "
      "cross-entropy: smooth the labels in head_loss"
    )
  return AnyHead(path, head_loss, chunk)


def _flatten(
  batch: Batch, *, any_label: bool
) -> tuple[jax.Array, jax.Array, int]:
  """The images and labels of all domains in a row, and how many domains."""
  images, labels = batch["image"], batch["label"]
  is_soft = not jnp.issubdtype(labels.dtype, jnp.integer)
  fits = labels.ndim >= 2 if any_label else labels.ndim == 2 + is_soft
  if not fits or images.shape[:2] != labels.shape[:2]:
    raise UserError(
      f"udim: images {list(images.shape)} and labels {list(labels.shape)} must "
      "be blocked by domain, [s, n, ...]: add an axis [None] for one domain"
    )
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f"udim: images of {images.dtype} have no gradient: scale them to floats"
    )

  return merge_domains(images), merge_domains(labels), labels.shape[0]


def _check_counts(count: int, term_images: int, accum: int) -> None:
  """Refuses numbers that do not divide `count` images of a domain."""
  if term_images and count % term_images:
    raise UserError(
      f"udim: term_images={term_images} does not divide the {count} images of "
      "a domain; choose a divisor, or 0 for all"
    )
  if count % accum:
    raise UserError(
      f"udim: accum={accum} does not divide the {count} images of a domain; "
      "choose a divisor"
    )
  if term_images % accum:
    raise UserError(
      f"udim: accum={accum} does not divide term_images={term_images}; choose "
      "a multiple"
    )


@dataclasses.dataclass(frozen=True)
class _Model:
  """A model under the settings: its losses, statistics and the added term."""

  apply_fn: ApplyFn
  head: Head
  cfg: UdimConfig
  batch_stats: PyTree
  domains: int
  rho_x: float | jax.Array

  def forward(self, params: PyTree, images: jax.Array, key: jax.Array | None):
    """`features, logits, batch_stats`."""
    variables = {"params": params, "batch_stats": self.batch_stats}
    rngs = {} if key is None else {"dropout": key}
    found = self.apply_fn(variables, images, train=True, rngs=rngs)
    if not isinstance(found, tuple) or len(found) != 3:
      raise UserError(
        "udim: apply_fn must return (features, logits, batch_stats), {} for a "
        f"model without statistics; it returned a {type(found).__name__}"
        + (f" of {len(found)}" if isinstance(found, tuple) else "")
      )
    return found

  def losses(self, params, images, labels, key):
    """`(features, losses [b]), batch_stats`."""
    features, logits, stats = self.forward(params, images, key)
    head = self.head.of(params)
    return (features, self.head.losses(head, features, labels, logits)), stats

  def of_term(self, x: jax.Array) -> jax.Array:
    """[n s, ...] -> the rows of the images that the term uses.

    Every so-many-th image of each domain: of a sharded n, equally many from
    every shard that has one at all, and then none is moved.
    """
    rows = self.cfg.term_images * self.domains
    if rows in (0, len(x)):
      return x
    strided = x.reshape(self.cfg.term_images, -1, self.domains, *x.shape[1:])
    return strided[:, 0].reshape(rows, *x.shape[1:])

  def loss_at(self, params, images, labels, key):
    (_, losses), batch_stats = self.losses(params, images, labels, key)
    return jnp.mean(losses), batch_stats

  def gradients(self, params, images, labels, key):
    """`(loss, batch_stats), (grads, data_grad)` of one backward pass."""
    gradients = jax.value_and_grad(self.loss_at, argnums=(0, 1), has_aux=True)
    return gradients(params, images, labels, key)

  def data_grad(self, params, images, labels, key):
    gradient = jax.grad(self.loss_at, argnums=1, has_aux=True)
    return gradient(params, images, labels, key)[0]

  def perturb(self, images: jax.Array, data_grad: jax.Array):
    """The perturbed images and the root of their mean squared distance."""
    cfg = self.cfg
    perturbed = images  # what the authors' style perturbation comes to
    if not (cfg.reference_quirks and cfg.perturbation == "style"):
      perturbed = perturb_images(
        images,
        data_grad,
        rho_x=self.rho_x,
        normalise=cfg.normalise,
        perturbation=cfg.perturbation,
        clip_range=cfg.clip_range,
      )
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    moved = perturbed.astype(dtype) - images.astype(dtype)
    return perturbed, jnp.sqrt(jnp.mean(jnp.square(moved)))

  @property
  def detaches_source(self) -> bool:
    return self.cfg.detach_source or self.cfg.mode != "inconsistency"

  def statistics(self, source, perturbed, head, labels):
    """From features [b, d]: moments by domain, [s, ...] and [s, ...], and the
    loss of the perturbed half. All of them are means over samples.
    """

    def moments(features):
      blocked = (
        x.reshape(-1, self.domains, *x.shape[1:]) for x in (features, labels)
      )
      of_domain = functools.partial(self.head.moments, head)
      return jax.vmap(of_domain, in_axes=1)(*blocked)

    of_source = moments(source)
    if self.detaches_source:
      of_source = jax.lax.stop_gradient(of_source)
    loss = jnp.mean(self.head.losses(head, perturbed, labels))
    return of_source, moments(perturbed), loss

  def statistics_at(self, params, images, perturbed, labels, keys: Keys):
    """The same, with the forward passes of both halves."""
    source = self.forward(params, images, keys["source"])[0]
    twin = self.forward(params, perturbed, keys["perturbed"])[0]
    return self.statistics(source, twin, self.head.of(params), labels)

  def objective(self, statistics) -> tuple[jax.Array, Metrics]:
    """The added term and its parts."""
    source, perturbed, loss = statistics
    reduce = {"sum": jnp.sum, "mean": jnp.mean}[self.cfg.domain_reduce]
    by_domain = jax.vmap(moments_inconsistency)(source, perturbed)
    pen, gn = reduce(by_domain["pen"]), reduce(by_domain["gn"])
    parts = {"pen": pen, "norm": gn}
    ilc = jnp.stack([parts[term] for term in self.cfg.terms]).sum()
    metrics = {"pen": pen, "gn": gn, "ilc": ilc, "perturbed_loss": loss}
    return (ilc if self.cfg.mode == "inconsistency" else loss), metrics


def _whole(model: _Model, params, images, labels, keys: Keys) -> Passes:
  """Passes over the whole batch at once; pass 1 is kept."""
  first_params, how = params, model.cfg.data_grad
  term_images, term_labels = model.of_term(images), model.of_term(labels)
  is_part = len(term_images) < len(images)

  def clean(params, images):
    return model.losses(params, images, labels, keys["clean"])

  outputs, pull, stats = jax.vjp(clean, params, images, has_aux=True)
  features, losses = outputs
  loss, of_losses = jax.value_and_grad(jnp.mean)(losses)
  grads, data_grad = pull((jnp.zeros_like(features), of_losses))

  def data_grad_at(params):
    return model.data_grad(params, term_images, term_labels, keys["clean"])

  if how == "exact" and not is_part:  # not in a branch: it shares pass 1
    _, along = jax.linearize(data_grad_at, params)

  def data_grad_fn(params, eps):
    if params is not first_params or (how == "exact" and is_part):
      return slow_data_grad(how, data_grad_at, params, eps)
    return (
      data_grad + along(eps) if how == "exact" else model.of_term(data_grad)
    )

  def second_pass(params):
    (loss, _), (grads, data_grad) = model.gradients(
      params, images, labels, keys["ascended"]
    )
    return grads, model.of_term(data_grad), {"sam_loss": loss}

  def term_fn(params, data_grad):
    perturbed, rms = model.perturb(term_images, data_grad)
    is_shared = keys["source"] is keys["clean"] and not is_part
    if params is first_params and is_shared:
      term, metrics = _kept_term(
        model, params, (*outputs, pull), perturbed, labels, keys
      )
    else:
      term, metrics = jax.grad(
        lambda params: model.objective(
          model.statistics_at(params, term_images, perturbed, term_labels, keys)
        ),
        has_aux=True,
      )(params)
    return term, metrics | {"perturbation_rms": rms}

  aux = {"metrics": {"loss": loss}, "batch_stats": stats}
  return Passes(grads, second_pass, term_fn, data_grad_fn, aux, model.cfg)


def _kept_term(model: _Model, params, kept, perturbed, labels, keys: Keys):
  """The term's gradient with the source half from the first pass."""
  features, losses, pull = kept

  def twin_and_head(params):
    twin = model.forward(params, perturbed, keys["perturbed"])[0]
    return twin, model.head.of(params)

  def objective(source, twin, head):
    return model.objective(model.statistics(source, twin, head, labels))

  (twin, head), pull_twin = jax.vjp(twin_and_head, params)
  (of_source, *others), metrics = jax.grad(
    objective, argnums=(0, 1, 2), has_aux=True
  )(features, twin, head)
  (term,) = pull_twin(tuple(others))
  if not model.detaches_source:
    by_source, _ = pull((of_source, jnp.zeros_like(losses)))
    term = jax.tree.map(jnp.add, term, by_source)
  return term, metrics


def slow_data_grad(
  how: str,
  data_grad_fn: Callable[[PyTree], jax.Array],
  params: PyTree,
  eps: PyTree,
) -> jax.Array:
  """grad_x L at `params` if "plain", grad_x A if "exact"."""
  if how == "plain":
    return data_grad_fn(params)
  return exact_data_grad(data_grad_fn, params, eps)


def _accumulated(
  model: _Model, params, images, labels, keys: Keys, accum: int
) -> Passes:
  """Passes over micro-batches, one after the other; none is kept."""
  deal = functools.partial(_deal, domains=model.domains, accum=accum)
  term_images, term_labels = model.of_term(images), model.of_term(labels)
  order = jnp.arange(accum)
  batches = (order, deal(images), deal(labels))
  term_batches = (order, deal(term_images), deal(term_labels))

  def key(name: str, i: jax.Array) -> jax.Array | None:
    of_pass = keys[name]
    return None if of_pass is None else jax.random.fold_in(of_pass, i)

  def undeal(data_grads):
    blocked = data_grads.reshape(
      accum, -1, model.domains, *data_grads.shape[2:]
    )
    return jnp.swapaxes(blocked, 0, 1).reshape(-1, *data_grads.shape[2:])

  def gradients(params, name):
    def one(batch):
      i, images, labels = batch
      aux, (grads, data_grad) = model.gradients(
        params, images, labels, key(name, i)
      )
      return (aux, grads), data_grad

    means, data_grads = mean_over_batches(one, batches)
    return *means, undeal(data_grads) / accum

  def data_grad_at(params):
    def one(batch):
      i, images, labels = batch
      return (), model.data_grad(params, images, labels, key("clean", i))

    return undeal(mean_over_batches(one, term_batches)[1]) / accum

  def second_pass(params):
    (loss, _), grads, data_grad = gradients(params, "ascended")
    return grads, model.of_term(data_grad), {"sam_loss": loss}

  def term_fn(params, data_grad):
    perturbed, rms = model.perturb(term_images, data_grad)

    def statistics(params, batch):
      i, images, labels, perturbed = batch
      own_keys = {name: key(name, i) for name in keys}
      return model.statistics_at(params, images, perturbed, labels, own_keys)

    metrics, term = accumulated_gradient(
      statistics, params, (*term_batches, deal(perturbed)),
      objective=model.objective,
    )  # fmt: skip
    return term, metrics | {"perturbation_rms": rms}

  (loss, stats), grads, _ = gradients(params, "clean")
  aux = {"metrics": {"loss": loss}, "batch_stats": stats}
  data_grad_fn = functools.partial(
    slow_data_grad, model.cfg.data_grad, data_grad_at
  )
  return Passes(grads, second_pass, term_fn, data_grad_fn, aux, model.cfg)


def _deal(x: jax.Array, *, domains: int, accum: int) -> jax.Array:
  """[n s, ...] -> [m, n s / m, ...], images dealt round so that every
  micro-batch spans all domains and all data shards.
  """
  blocked = x.reshape(-1, accum, domains, *x.shape[1:])
  return jnp.swapaxes(blocked, 0, 1).reshape(accum, -1, *x.shape[1:])
