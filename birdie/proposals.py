"""Which mixture to try next: candidates, the best of them, exploration, bounds.

# k configurations, c classes, m candidates

Sources: the paper's section 3.3; exploration is in the authors' code only.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

PROPOSALS = ("mixed", "uniform")
# Added to draws that are divided by their sum, so that it is never 0.
_TINY = 1e-6


def _exponential(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Divided by their sum, such numbers are Dirichlet(1)."""
  return jax.random.exponential(key, shape) + _TINY


def _by_class(values: jax.Array, classes: Sequence[int]) -> jax.Array:
  """Sums over each class, [..., k] -> [..., c]."""
  members = np.eye(max(classes) + 1, dtype=np.float32)[list(classes)]
  return values @ members


def _inside(
  key: jax.Array, shape: tuple[int, ...], allowed: jax.Array, classes
) -> jax.Array:
  """Dirichlet(1) inside each class over what is allowed there, [..., k]."""
  draws = _exponential(key, shape) * jnp.broadcast_to(allowed, shape)
  sums = _by_class(draws, classes)[..., jnp.asarray(classes)]
  return draws / jnp.maximum(sums, _TINY)


def _dirichlet(
  key: jax.Array, alpha: float, shape: tuple[int, ...], allowed: jax.Array
) -> jax.Array:
  # In logarithms, since the draws of small alphas underflow.
  logs = jax.random.loggamma(key, alpha, shape)
  allowed = jnp.broadcast_to(allowed, shape)
  return jax.nn.softmax(jnp.where(allowed, logs, -jnp.inf), axis=-1)


def propose(
  key: jax.Array,
  action: jax.Array,
  *,
  allowed: jax.Array,
  classes: Sequence[int],
  kind: str,
  count: int,
) -> jax.Array:
  """Candidate mixtures, [m, k].

  "uniform" normalizes uniform numbers (section 3.3). With many configurations
  no entry of such a vector gets far above 2 / k, so "mixed" draws a quarter
  each from: Dirichlet(1); a peaked Dirichlet(1 / k); a Dirichlet(1) over
  classes times Dirichlet(1) inside them; neighbours of the current mixture.

  Args:
    key: of the draws.
    action: [k], the current mixture.
    allowed: bool [k]; the others get probability 0.
    classes: the class of each configuration.
    kind: one of `PROPOSALS`, see above.
    count: m.
  """
  k, m = len(classes), count
  if kind == "uniform":
    values = (1 - jax.random.uniform(key, (m, k))) * allowed[None]
    return values / jnp.sum(values, axis=1, keepdims=True)
  keys = jax.random.split(key, 5)
  part = -(-m // 4)
  usable = _by_class(allowed.astype(jnp.float32), classes) > 0
  of_class = _dirichlet(keys[2], 1.0, (part, usable.size), usable[None])
  inside = _inside(keys[3], (part, k), allowed[None], classes)
  noise = jnp.exp(0.5 * jax.random.normal(keys[4], (part, k)))
  near = ((action + 1e-4) * allowed)[None] * noise
  candidates = [
    _dirichlet(keys[0], 1.0, (part, k), allowed[None]),
    _dirichlet(keys[1], 1.0 / k, (part, k), allowed[None]),
    of_class[:, jnp.asarray(classes)] * inside,
    near / jnp.sum(near, axis=1, keepdims=True),
  ]
  return jnp.concatenate(candidates)[:m]


def choose(
  candidates: jax.Array,
  predicted: jax.Array,
  *,
  weights: jax.Array,
  top_k: int,
) -> jax.Array:
  """The mean of the candidates with the best predicted total, [k].

  Args:
    candidates: [m, k].
    predicted: [m, k] rewards.
    weights: [k], of the total: 1 / (configurations in the class).
    top_k: how many are averaged.
  """
  _, best = jax.lax.top_k(predicted @ weights, top_k)
  mean = jnp.mean(candidates[best], axis=0)
  return mean / jnp.sum(mean)


def explore(
  key: jax.Array, allowed: jax.Array, *, classes: Sequence[int]
) -> jax.Array:
  """A mixture of one or two classes at random; the others share 5 %, [k]."""
  keys = jax.random.split(key, 4)
  usable = _by_class(allowed.astype(jnp.float32), classes) > 0
  places = jax.random.uniform(keys[0], usable.shape)
  rank = jnp.argsort(jnp.argsort(jnp.where(usable, places, 2.0)))
  chosen = usable & (rank < jax.random.randint(keys[1], (), 1, 3))
  others = usable & ~chosen
  shares = _exponential(keys[2], usable.shape) * chosen
  shares = shares / jnp.sum(shares)
  rest = others / jnp.maximum(jnp.sum(others), 1)
  shares = jnp.where(jnp.any(others), 0.95 * shares + 0.05 * rest, shares)
  inside = _inside(keys[3], allowed.shape, allowed, classes)
  return shares[jnp.asarray(classes)] * inside


def apply_bounds(
  probs: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
  """The nearest mixture (Euclidean) with low <= p <= high, [k].

  That is clip(probs + shift, low, high) for the one shift that makes the sum
  1, found by bisection.

  Args:
    probs: [k], a mixture.
    low: [k], of sum at most 1.
    high: [k], of sum at least 1.
  """

  def body(_, bracket):
    left, right = bracket
    middle = (left + right) / 2
    above = jnp.sum(jnp.clip(probs + middle, low, high)) > 1
    return jnp.where(above, left, middle), jnp.where(above, middle, right)

  start = (jnp.float32(-1.0), jnp.float32(1.0))
  left, right = jax.lax.fori_loop(0, 40, body, start)
  bounded = jnp.clip(probs + (left + right) / 2, low, high)
  # Dividing moves a value by its rounding error, maybe across a bound.
  return jnp.clip(bounded / jnp.sum(bounded), low, high)
