"""Which units stay: from their scores to indices.

# l blocks, n units of a group

SlimSAM prunes the embedding by one ranking of its channels, and bottlenecks
either block by block (`local`: every block keeps the same number, which the
published uniform models need) or by one ranking over all blocks (`global`).
"""

import math
from collections.abc import Collection, Mapping

import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from slimsam.settings import SamSettings

Scores = Mapping[str, np.ndarray]
NORMALIZATIONS = ("gaussian", "standard", "max", "mean", "sum")
SCOPES = ("local", "global")


def kept_width(width: int, ratio: float, multiple: int) -> int:
  """How many channels stay: rounded down, then down to a multiple.

  768 at 50 % are 384, at 77 % 168; 3072 are 1536 and 696 (twelve heads).

  Args:
    width: channels.
    ratio: the share to be pruned, in [0, 1).
    multiple: the number of heads.

  Raises:
    UserError: where nothing would stay.
  """
  if not 0 <= ratio < 1:
    raise UserError(f"ratio={ratio} must be from 0 and below 1")
  # A float's error must not cost a channel: 768 * (1 - 0.75) is 192.
  kept = math.floor(round(width * (1 - ratio), 6))
  kept = kept // multiple * multiple
  if not kept:
    raise UserError(
      f"ratio={ratio} leaves nothing of a width of {width}: channels stay in "
      f"multiples of {multiple}; prune less"
    )
  return kept


def pruned_widths(
  settings: SamSettings,
  ratio: float,
  kinds: Collection[str] = ("embedding", "qkv", "mlp"),
) -> SamSettings:
  """The sizes of a model that is pruned by the local rule.

  Args:
    settings: of the model.
    ratio: the share of every width to be pruned.
    kinds: of groups that are pruned; see `slimsam.groups`.

  Raises:
    UserError: for a ratio that leaves nothing.
  """
  cfg = settings.encoder

  def kept(width: int) -> int:
    return kept_width(width, ratio, cfg.heads)

  return settings.with_widths(
    kept(cfg.width) if "embedding" in kinds else None,
    map(kept, cfg.qkv_widths) if "qkv" in kinds else None,
    map(kept, cfg.mlp_widths) if "mlp" in kinds else None,
  )


def best(scores: np.ndarray, count: int) -> np.ndarray:
  """The places of the largest scores, in rising order; the first of equals."""
  order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
  return np.sort(order[:count])


def select_embedding(
  scores: np.ndarray, ratio: float, heads: int, *, by_residue: bool = False
) -> np.ndarray:
  """Channels of the embedding that stay.

  Args:
    scores: [d].
    ratio: the share to be pruned.
    heads: h; what stays is a multiple of it.
    by_residue: rank channels that lie d / h apart as one, as the authors' code
      does (it takes the embedding for something with heads): what stays then
      repeats with that period.

  Returns:
    Indices in rising order.
  """
  count = kept_width(len(scores), ratio, heads)
  if not by_residue:
    return best(scores, count)
  if len(scores) % heads:
    raise UserError(
      f"by_residue: a width of {len(scores)} is not divisible by {heads} heads"
    )
  period = len(scores) // heads
  chosen = best(np.reshape(scores, (heads, period)).sum(axis=0), count // heads)
  return np.sort((chosen[None] + period * np.arange(heads)[:, None]).ravel())


def select_bottlenecks(
  scores: Scores,
  ratio: float,
  heads: int,
  *,
  scope: str = "local",
  normalization: str = "gaussian",
  min_keep: int = 1,
) -> dict[str, np.ndarray]:
  """Units of `qkv/I` and `mlp/I` that stay.

  With `local` each block keeps what `kept_width` says. With `global` all
  blocks' dimensions of heads are ranked together, and so are all hidden units,
  after each block's scores have been normalized; of the hidden units as many
  are removed as make a multiple of `heads` in each block, the last ones of
  those below the threshold being spared (SlimSAM, section 3.2, and its code).

  Args:
    scores: by group, [n]; of `qkv` one score a dimension of a head.
    ratio: the share to be pruned.
    heads: h.
    scope: one of `SCOPES`.
    normalization: of `global`, one of `NORMALIZATIONS`.
    min_keep: units of each block that `global` leaves at least.

  Returns:
    By group, indices in rising order.

  Raises:
    UserError: for unknown names, and where nothing would stay.
  """
  if scope not in SCOPES:
    raise UserError(f"scope={scope!r}{did_you_mean(scope, SCOPES)}")
  if scope == "local":
    return {
      name: best(own, _kept_units(name, len(own), ratio, heads))
      for name, own in scores.items()
    }
  made = {}
  for kind, multiple in (("qkv", 1), ("mlp", heads)):
    own = {k: v for k, v in scores.items() if k.startswith(f"{kind}/")}
    if own:
      made |= _ranked_together(
        own, ratio, multiple=multiple, normalization=normalization,
        min_keep=min_keep,
      )  # fmt: skip
  return made


def _kept_units(name: str, size: int, ratio: float, heads: int) -> int:
  """Units of a group; one of `qkv` is a channel of every head."""
  if name.startswith("qkv/"):
    return kept_width(size * heads, ratio, heads) // heads
  return kept_width(size, ratio, heads)


def _ranked_together(
  scores: Scores,
  ratio: float,
  *,
  multiple: int,
  normalization: str,
  min_keep: int,
) -> dict[str, np.ndarray]:
  sizes = [len(own) for own in scores.values()]
  count = kept_width(sum(sizes), ratio, 1)
  if min_keep < 1 or min_keep * len(sizes) > count or min_keep > min(sizes):
    raise UserError(
      f"min_keep={min_keep}: {count} units stay in {len(sizes)} blocks of "
      f"{min(sizes)} and more; choose from 1 to "
      f"{min(count // len(sizes), min(sizes))}"
    )
  ranked = []
  for own in scores.values():
    values = normalized(own, normalization)
    values[best(values, min_keep)] = np.inf
    ranked.append(values)
  chosen = np.zeros(sum(sizes), bool)
  chosen[best(np.concatenate(ranked), count)] = True
  made = {}
  for name, own in zip(scores, np.split(chosen, np.cumsum(sizes)[:-1])):
    removed = np.flatnonzero(~own)
    # Those beyond a multiple, the last ones, are spared.
    own[removed[len(removed) // multiple * multiple :]] = True
    made[name] = np.flatnonzero(own)
  return made


def normalized(scores: np.ndarray, how: str) -> np.ndarray:
  """A block's scores made comparable with another's; float64.

  Args:
    scores: [n], not negative.
    how: one of `NORMALIZATIONS`: `sum` and `mean` divide by these, `max` by
      the largest; `standard` is (I - min) / (max - min), `gaussian`
      (I - mean) / std.

  Raises:
    UserError: for another name.
  """
  own = np.asarray(scores, np.float64)
  if how == "gaussian":
    std = own.std(ddof=1) if len(own) > 1 else 0.0
    return (own - own.mean()) / (std + 1e-8)
  if how == "standard":
    return (own - own.min()) / (own.max() - own.min() + 1e-8)
  scale = {"sum": own.sum, "mean": own.mean, "max": own.max}.get(how)
  if scale is None:
    raise UserError(f"normalization={how!r}{did_you_mean(how, NORMALIZATIONS)}")
  return own / max(float(scale()), np.finfo(np.float64).tiny)
