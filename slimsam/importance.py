"""How much the units of each group matter.

    disturbed     |w g|, g the gradient of the loss against a disturbed target
    disturbed_sq  w^2 sum of g^2 over draws: needs fewer images
    taylor        |w g|, g the gradient of the loss against true masks
    magnitude     w^2
    random        a draw

Against its own output a model has no loss and no gradient. SlimSAM therefore
disturbs the target, L = MSE(f(x), f(x) + n) with n ~ N(0, sigma^2) (section
3.1, equations 1 to 4). As E[n] = 0, the sum of gradients is a random projection
of the Jacobian, and a score estimates the Gauss-Newton diagonal; sigma scales
all of them alike.

A unit's score is the mean over the group's weight matrices of what its row or
column adds up to; biases, norms and positions do not count.
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from common.nn import Array
from slimsam.encoder import PLAIN, Compute, encode
from slimsam.groups import Groups
from slimsam.settings import SamSettings
from slimsam.torch_names import leaf

PyTree = Any
KINDS = ("disturbed", "disturbed_sq", "taylor", "magnitude", "random")
SIGMA = 0.01
# (params, batch, key) -> a sum over images, not their mean.
SumLoss = Callable[[PyTree, Any, Array], Array]


def needs_gradients(kind: str) -> bool:
  """Whether images are needed.

  Raises:
    UserError: for an unknown kind.
  """
  if kind not in KINDS:
    raise UserError(f"importance={kind!r}{did_you_mean(kind, KINDS)}")
  return kind not in ("magnitude", "random")


@flax.struct.dataclass
class Sums:
  """What draws add up to; a draw is a batch.

  Attributes:
    grads: of gradients, with their sign; of the scored parameters.
    squares: of their squares.
  """

  grads: dict[str, Array]
  squares: dict[str, Array]


def scored(params: PyTree, groups: Groups) -> dict[str, Array]:
  """The parameters whose gradients count, by path."""
  paths = {
    member.path
    for group in groups.values()
    for member in group.members
    if member.matrices
  }
  return {"/".join(path): leaf(params, path) for path in sorted(paths)}


def zero_sums(params: PyTree, groups: Groups) -> Sums:
  """Before the first draw."""
  zeros = jax.tree.map(jnp.zeros_like, scored(params, groups))
  return Sums(zeros, jax.tree.map(jnp.zeros_like, zeros))


def disturbed_loss(
  settings: SamSettings,
  compute: Compute = PLAIN,
  *,
  sigma: float = SIGMA,
) -> SumLoss:
  """The loss against the model's own, disturbed embeddings.

  Each image has noise of its own, a function of the key and of its number:
  neither batches nor devices matter.

  Args:
    settings: the model's.
    compute: how it runs.
    sigma: of the noise.

  Returns:
    `(params, batch, key) -> sum over images`; batch: `images` float [b size
    size 3], `ids` int [b], and `weights` [b], 0 for rows that are padding.
  """
  cfg = settings.encoder
  shape = (cfg.grid, cfg.grid, cfg.out)

  def loss(params: PyTree, batch: Any, key: Array) -> Array:
    out = encode(params["image_encoder"], batch["images"], cfg, compute)
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32))

    def noise(number: Array) -> Array:
      own = jax.random.fold_in(key, number)
      return jax.random.normal(own, shape, out.dtype) * sigma

    target = jax.lax.stop_gradient(out) + jax.vmap(noise)(batch["ids"])
    errors = jnp.mean(jnp.square(out - target), axis=(1, 2, 3))
    return jnp.sum(errors * batch["weights"])

  return loss


def make_accumulate(
  loss: SumLoss, groups: Groups
) -> Callable[[Sums, PyTree, Any, Array], Sums]:
  """Adds a batch; one compiled gradient serves all groups.

  Args:
    loss: a sum over images.
    groups: whose parameters count.

  Returns:
    `(sums, params, batch, key) -> sums`; the first is donated.
  """

  def add(sums: Sums, params: PyTree, batch: Any, key: Array) -> Sums:
    grads = scored(jax.grad(loss)(params, batch, key), groups)
    return Sums(
      jax.tree.map(jnp.add, sums.grads, grads),
      jax.tree.map(lambda a, g: a + g * g, sums.squares, grads),
    )

  return jax.jit(add, donate_argnums=0)


def accumulate(
  loss: SumLoss,
  params: PyTree,
  groups: Groups,
  batches: Iterable[Any],
  key: Array,
) -> Sums:
  """Adds up a stream of batches."""
  add = make_accumulate(loss, groups)
  sums = zero_sums(params, groups)
  for batch in batches:
    sums = add(sums, params, batch, key)
  return sums


def scores(
  kind: str,
  params: PyTree,
  groups: Groups,
  *,
  sums: Sums | None = None,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """A score for each unit of each group, float64 [units].

  Args:
    kind: one of `KINDS`.
    params: of the model.
    groups: see `slimsam.groups`.
    sums: of gradients, where the kind needs them.
    seed: of `random`.

  Raises:
    UserError: for an unknown kind.
    ValueError: for sums that are missing.
  """
  if needs_gradients(kind) and sums is None:
    raise ValueError(f"importance={kind!r} needs sums of gradients")
  rng = np.random.default_rng(seed)
  made = {}
  for name, group in groups.items():
    if kind == "random":
      made[name] = rng.random(group.size)
      continue
    total, count = np.zeros(group.size), 0
    for path, axis, matrices in group.members:
      if not matrices:
        continue
      values = _values(kind, leaf(params, path), sums, "/".join(path))
      others = tuple(i for i in range(values.ndim) if i != axis)
      total += values.sum(axis=others)
      count += matrices
    made[name] = total / count
  return made


def _values(kind: str, w: Any, sums: Sums | None, path: str) -> np.ndarray:
  """A score for each entry of a parameter."""
  weights = np.asarray(w, np.float64)
  if sums is None or kind == "magnitude":
    return weights * weights
  if kind == "disturbed_sq":
    return weights * weights * np.asarray(sums.squares[path], np.float64)
  return np.abs(weights * np.asarray(sums.grads[path], np.float64))
