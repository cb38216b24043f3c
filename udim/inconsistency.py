"""Inconsistency of two domains: how the gradients of the head differ.

# n samples of one domain, d features, k classes, p parameters of the head

With g_i the gradient of sample i's loss, g~_i that of its perturbed twin, mu
the mean of the g_i,

    v0 = mean_i (g_i - mu)^2,   v1 = mean_i (g~_i - mu)^2       [p]
    pen = 1/4 mean_p (v0 - v1)^2
    gn  = sum over the head's arrays of mean_i ||g~_i||^2 / size

v1 is centred on the *source's* mean. Both follow from moments that are linear
in the samples, m1 = mean_i g_i and m2 = mean_i g_i^2:

    v1 - v0 = m2~ - m2 - 2 m1 (m1~ - m1)

(exactly 0 for equal halves, and free of the cancellation in v0 and v1). For a
linear head under cross-entropy, g_i = h_i (softmax(z_i) - y_i)^T, they are two
products of matrices. Sums run in float32 or better, whatever the inputs.

arXiv 2403.07329; the authors' `iada/iada_final.py`. The variances stand for
the diagonal of the Hessian as in Fishr (arXiv 2109.02934).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common import tree
from common.errors import UserError
from common.optim.ascent import widen

PyTree = Any
_HIGHEST = jax.lax.Precision.HIGHEST  # no TF32, no bf16 passes


class Moments(NamedTuple):
  """Means of per-sample gradients and of their squares; linear in samples.

  Attributes:
    m1: mean_i g_i, of the structure of the parameters.
    m2: mean_i g_i^2, elementwise.
  """

  m1: PyTree
  m2: PyTree


def head_inconsistency(
  h_source: jax.Array,
  h_perturbed: jax.Array,
  weight: jax.Array,
  bias: jax.Array,
  labels: jax.Array,
  *,
  label_smoothing: float = 0.0,
) -> dict[str, jax.Array]:
  """The two terms on a linear head, closed form, differentiable throughout.

  Args:
    h_source: [n, d], features of the source images.
    h_perturbed: [n, d], features of their perturbed twins.
    weight: [d, k].
    bias: [k].
    labels: int [n], or distributions over classes [n, k].
    label_smoothing: share of each target that is spread over all classes.

  Returns:
    `{"pen", "gn", "ilc"}`, scalars; ilc = pen + gn.

  Raises:
    UserError: for shapes that do not fit together.
  """
  smoothing = {"label_smoothing": label_smoothing}
  source = head_moments(h_source, weight, bias, labels, **smoothing)
  perturbed = head_moments(h_perturbed, weight, bias, labels, **smoothing)
  terms = moments_inconsistency(source, perturbed)
  return terms | {"ilc": terms["pen"] + terms["gn"]}


def head_moments(
  features: jax.Array,
  weight: jax.Array,
  bias: jax.Array,
  labels: jax.Array,
  *,
  label_smoothing: float = 0.0,
) -> Moments:
  """Moments of a linear head's gradients under cross-entropy, closed form.

  Args: as for `head_inconsistency`.

  Returns:
    Moments of `{"kernel": [d, k], "bias": [k]}`.

  Raises:
    UserError: for shapes that do not fit together.
  """
  logits = head_logits(features, weight, bias)
  targets = make_targets(labels, weight.shape[1], label_smoothing)
  delta = jax.nn.softmax(logits) - targets.astype(logits.dtype)
  features = features.astype(logits.dtype)

  def mean(of_features, of_delta):
    # Scaled before the sum, not behind it: the compiler would contract the
    # difference of two scaled sums, and equal halves would differ by 1e-8.
    of_delta = of_delta / delta.shape[0]
    kernel = jnp.matmul(of_features.T, of_delta, precision=_HIGHEST)
    return {"kernel": kernel, "bias": jnp.sum(of_delta, axis=0)}

  return Moments(
    mean(features, delta), mean(jnp.square(features), jnp.square(delta))
  )


def head_logits(
  features: jax.Array, weight: jax.Array, bias: jax.Array
) -> jax.Array:
  """[..., d] -> [..., k] in float32 or better."""
  if features.shape[-1:] != weight.shape[:1] or weight.shape[1:] != bias.shape:
    raise UserError(
      f"udim: features {list(features.shape)} do not fit a linear head with "
      f"kernel {list(weight.shape)} and bias {list(bias.shape)}"
    )
  dtype = jnp.result_type(features, weight, bias, jnp.float32)
  features, weight, bias = (a.astype(dtype) for a in (features, weight, bias))
  logits = jnp.matmul(features, weight, precision=_HIGHEST)
  return logits + jnp.broadcast_to(bias, logits.shape)


def make_targets(
  labels: jax.Array, num_classes: int, label_smoothing: float = 0.0
) -> jax.Array:
  """Labels, int [...] or distributions [..., k] -> distributions [..., k]."""
  if jnp.issubdtype(labels.dtype, jnp.integer):
    dtype = jnp.result_type(float)
    targets = jax.nn.one_hot(labels, num_classes, dtype=dtype)
  elif labels.shape[-1:] == (num_classes,):
    targets = widen(labels)
  else:
    raise UserError(
      f"udim: labels of {labels.dtype} {list(labels.shape)} are neither "
      f"integers nor distributions over the head's {num_classes} classes"
    )
  return (1 - label_smoothing) * targets + label_smoothing / num_classes


def merge_domains(x: jax.Array) -> jax.Array:
  """[s, n, ...] -> [n s, ...]: n, which may be sharded, is the major axis, so
  that no image changes its device.
  """
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def per_sample_moments(
  loss_fn: Callable[[PyTree, Any], jax.Array],
  params: PyTree,
  examples: PyTree,
  *,
  keep: Callable[[str], bool] = lambda path: True,
  chunk: int | None = None,
) -> Moments:
  """Moments for any head and any loss, by a gradient per sample.

  Args:
    loss_fn: `(params, example) -> loss` of one sample, a scalar.
    params: parameters; the gradients are with respect to those that `keep`
      chooses.
    examples: tree of arrays [n, ...].
    keep: predicate on a parameter's path, such as `head/kernel`.
    chunk: samples at a time, all if None. Memory for gradients, in the
      backward pass too, is that of one chunk.

  Returns:
    Moments of the parameters' structure, with None where `keep` is false.

  Raises:
    UserError: when `keep` chooses nothing or `chunk` does not divide n.
  """
  kept, rest = tree.partition(params, keep)
  if not jax.tree.leaves(kept):
    raise UserError("udim: `keep` chooses no parameter for the inconsistency")
  count = jax.tree.leaves(examples)[0].shape[0]
  chunk = count if chunk is None else chunk
  if chunk < 1 or count % chunk:
    raise UserError(
      f"udim: chunk={chunk} does not divide the {count} samples; choose a "
      "divisor"
    )

  def loss(kept, example):
    return loss_fn(tree.combine(kept, rest), example)

  def moments(kept, chunk_of_examples):
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(kept, chunk_of_examples)
    grads = jax.tree.map(widen, grads)
    squares = jax.tree.map(jnp.square, grads)
    return Moments(*jax.tree.map(_mean_over_samples, (grads, squares)))

  if chunk == count:
    return moments(kept, examples)
  chunks = jax.tree.map(
    lambda x: x.reshape(count // chunk, chunk, *x.shape[1:]), examples
  )
  by_chunk = jax.checkpoint(moments)  # or the scan would keep all gradients
  stacked = jax.lax.map(lambda one: by_chunk(kept, one), chunks)
  return jax.tree.map(_mean_over_samples, stacked)


def _mean_over_samples(x: jax.Array) -> jax.Array:
  return jnp.mean(x, axis=0)


def moments_inconsistency(
  source: Moments, perturbed: Moments
) -> dict[str, jax.Array]:
  """`{"pen", "gn"}` from the moments of the two halves."""

  def square_sum(m1, m2, m1_perturbed, m2_perturbed):
    difference = m2_perturbed - m2 - 2 * m1 * (m1_perturbed - m1)
    return jnp.sum(jnp.square(difference))

  squares = jax.tree.leaves(jax.tree.map(square_sum, *source, *perturbed))
  norms = [jnp.mean(m2) for m2 in jax.tree.leaves(perturbed.m2)]
  zero = jnp.zeros((), jnp.float32)
  return {
    "pen": sum(squares, start=zero) / (4 * tree.count_params(source.m1)),
    "gn": sum(norms, start=zero),
  }


def accumulated_gradient(
  statistics_fn: Callable[[PyTree, Any], PyTree],
  params: PyTree,
  batches: PyTree,
  *,
  objective: Callable[[PyTree], tuple[jax.Array, Any]],
) -> tuple[Any, PyTree]:
  """The gradient of an objective of statistics over micro-batches. Exact.

  The inconsistency is no mean over samples, so its gradients cannot be
  averaged; its moments can. A first sweep takes their mean, the objective is
  differentiated there, and a second sweep pulls that back through each
  micro-batch: one gradient and one forward pass, and memory for one.

  Args:
    statistics_fn: `(params, batch) -> statistics`, any tree whose mean over
      micro-batches is the statistic of them all, such as `Moments`.
    params: the parameters.
    batches: tree of arrays [m, ...], a row for each micro-batch.
    objective: `statistics -> (value, aux)`.

  Returns:
    `(aux, gradient)`, as if the micro-batches were one batch.
  """
  statistics, _ = mean_over_batches(
    lambda batch: (statistics_fn(params, batch), ()), batches
  )
  cotangent, aux = jax.grad(objective, has_aux=True)(statistics)

  def pull_back(batch):
    _, pull = jax.vjp(lambda p: statistics_fn(p, batch), params)
    return pull(cotangent)[0], ()

  gradient, _ = mean_over_batches(pull_back, batches)
  return aux, gradient


def mean_over_batches(
  fn: Callable[[Any], tuple[PyTree, PyTree]], batches: PyTree
) -> tuple[PyTree, PyTree]:
  """Runs over micro-batches one after the other.

  As a loop, with the memory of one; on the CPU one behind the other in the
  program, which takes more memory and, with convolutions, a fiftieth of the
  time.

  Args:
    fn: `batch -> (to_average, to_stack)`, two trees.
    batches: tree of arrays [m, ...].

  Returns:
    The mean of the first trees and the second ones stacked, [m, ...].
  """
  count = jax.tree.leaves(batches)[0].shape[0]

  def body(total, batch):
    values, rows = fn(batch)
    return jax.tree.map(lambda t, v: t + v / count, total, values), rows

  shapes, _ = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], batches))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  # XLA compiles the gradients of convolutions badly inside loops on the CPU.
  unroll = jax.default_backend() == "cpu"
  return jax.lax.scan(body, zeros, batches, unroll=unroll)
