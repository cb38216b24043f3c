"""The head whose gradients UDIM compares: its loss and its moments.

# n samples, d features, k classes

A linear head under cross-entropy has both in closed form. Any other head, and
any other loss, is a function of one sample: its gradients are taken one by one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from common.errors import UserError
from common.optim.ascent import widen
from udim.inconsistency import (
  Moments,
  head_logits,
  head_moments,
  make_targets,
  per_sample_moments,
)

PyTree = Any
HeadLoss = Callable[[PyTree, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LinearHead:
  """`kernel` [d, k] and `bias` [k] under cross-entropy.

  Attributes:
    path: where the parameters hold them, such as "net/classifier".
    label_smoothing: share of each target that is spread over all classes.
  """

  path: str
  label_smoothing: float = 0.0

  def of(self, params: PyTree) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias.

    Raises:
      UserError: where there are none.
    """
    found = _at(params, self.path)
    if not isinstance(found, Mapping) or not {"kernel", "bias"} <= set(found):
      raise UserError(
        f"udim: head_path={self.path!r} has no kernel and bias; the parameters "
        f"hold {', '.join(params)}"
      )
    return found["kernel"], found["bias"]

  def losses(self, head, features, labels, logits=None) -> jax.Array:
    """[n], from features [n, d], labels [n] or [n, k] and, where the network
    has them already, logits [n, k].
    """
    if logits is None:
      weight, bias = head
      logits = head_logits(features, weight, bias)
    targets = make_targets(labels, logits.shape[-1], self.label_smoothing)
    return optax.softmax_cross_entropy(widen(logits), targets)

  def moments(self, head, features, labels) -> Moments:
    weight, bias = head
    return head_moments(
      features, weight, bias, labels, label_smoothing=self.label_smoothing
    )


@dataclasses.dataclass(frozen=True)
class AnyHead:
  """Whatever the parameters hold at `path`, under a loss of one sample.

  Attributes:
    path: where; a tree of arrays, or one.
    loss_fn: `(head, features [d], label) -> loss`, a scalar.
    chunk: samples whose gradients are held at a time; all if None.
  """

  path: str
  loss_fn: HeadLoss
  chunk: int | None = None

  def of(self, params: PyTree) -> PyTree:
    """The head's parameters.

    Raises:
      UserError: where there are none.
    """
    found = _at(params, self.path)
    if not jax.tree.leaves(found):
      raise UserError(
        f"udim: head_path={self.path!r} has no parameters; the parameters hold "
        f"{', '.join(params)}"
      )
    return found

  def losses(self, head, features, labels, logits=None) -> jax.Array:
    """[n], from features [n, ...] and labels [n, ...]."""
    del logits
    found = jax.vmap(self.loss_fn, in_axes=(None, 0, 0))(head, features, labels)
    if found.ndim != 1:
      raise UserError(
        f"udim: head_loss gives {list(found.shape[1:])} for one sample: it "
        "must give a scalar"
      )
    return widen(found)

  def moments(self, head, features, labels) -> Moments:
    return per_sample_moments(
      lambda head, example: self.loss_fn(head, *example),
      head,
      (features, labels),
      chunk=self.chunk,
    )


Head = LinearHead | AnyHead


def _at(params: PyTree, path: str) -> PyTree:
  """What lies at a path, or None."""
  found = params
  for name in path.split("/"):
    found = found.get(name) if isinstance(found, Mapping) else None
  return found
