"""The settings of UDIM, checked when they are made."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

from common.config import did_you_mean
from common.errors import UserError

Scheduled = float | Callable[[Any], Any]  # a number, or a function of the step


@dataclasses.dataclass(frozen=True)
class UdimConfig:
  """What UDIM adds to the SAM gradient, and how.

  Attributes:
    lambda1: weight of the added term; 0 leaves SAM. Like the two radii it may
      be an optax schedule, a function of the step.
    rho: radius of the ascent on the parameters, eps = rho g / ||g||.
    rho_x: length of the ascent on the data. 0 leaves the images as they are.
      The authors' length l over a batch of n images ("batch") is that of
      l sqrt(h w c / n) for each image ("sample").
    normalise: what has that length: "sample", each image's perturbation in
      L2, whatever the batch and its sharding; "batch", each pixel's over the
      whole batch, so that a perturbation depends on its batch mates; "sign",
      every pixel's absolute value.
    data_grad: gradient that the data ascends, of A = L + rho ||grad L||:
      "fast", that of L at theta + eps, which costs nothing beyond SAM and
      differs by O(rho^2); "exact", by a derivative along eps; "plain", that
      of L at theta, an ablation.
    clip_range: (low, high), the range of valid images, or None.
    detach_source: treat the statistics of the source half as constants; saves
      one gradient of four.
    domain_reduce: "sum" (the authors': the weight grows with the number of
      domains) or "mean" of the terms of the source domains.
    terms: which of "pen" (squared distance of the gradient variances) and
      "norm" (squared norms of the perturbed gradients) make up the term.
    start_step: until then a step is one of SAM, at the cost of SAM.
    every: from then on every so many steps have the term, times `every`. Like
      `start_step` and a schedule of `lambda1` it makes a branch in the program
      unless the caller decides, with `is_due`.
    term_images: how many images of each domain the term uses, a divisor of
      their number n; 0 is all. Those are every (n / term_images)-th one, so
      that shards of a batch give equally many; batches are random draws, so
      any will do. Passes of the term cost that much less, but none is shared
      with the loss. "batch" normalises over those images.
    mode: "inconsistency", or a control that tells what the perturbed images
      do alone: "perturbed_loss" adds their plain loss, and "perturbed_sam"
      SAM's gradient of it, with a perturbation of the weights of their own
      (the authors' earlier `iada/iada.py`; one gradient more).
    perturbation: "pixel", or "style": each channel's mean and standard
      deviation move, and the image is rebuilt from them.
    share_dropout: one dropout mask for all passes of a step, so that equal
      images are equal features and pass 1 is used twice. False draws one for
      each pass, as the authors do, and costs one forward pass more.
    label_smoothing: share of each target that is spread over all classes.
    reference_quirks: overrides the above with what the authors' code does:
      normalise "batch", data_grad "exact" with the same rho as the parameters,
      no 1e-12 in eps (so a zero gradient is NaN), no clipping, the sum over
      domains, a source half that is not detached, a dropout mask for each
      pass; and with "style" the perturbed images are the images. Not
      brought back: running the two halves as one batch (it differs where
      BatchNorm uses batch statistics), and what only crashes or only costs.

  Raises:
    UserError: for a value that makes no sense.
  """

  lambda1: Scheduled = 1.0
  rho: Scheduled = 0.05
  rho_x: Scheduled = 1.0
  normalise: str = "sample"
  data_grad: str = "fast"
  clip_range: tuple[float, float] | None = None
  detach_source: bool = False
  domain_reduce: str = "sum"
  terms: tuple[str, ...] = ("pen", "norm")
  start_step: int = 0
  every: int = 1
  term_images: int = 0
  mode: str = "inconsistency"
  perturbation: str = "pixel"
  share_dropout: bool = True
  label_smoothing: float = 0.0
  reference_quirks: bool = False

  def __post_init__(self):
    for name in ("lambda1", "rho", "rho_x"):
      value = getattr(self, name)
      holds = callable(value) or (_is_number(value) and value >= 0)
      _require(holds, name, value, "a number from 0, or a schedule")
    for name, least in _COUNTS.items():
      value = getattr(self, name)
      holds = _is_number(value, numbers.Integral) and value >= least
      _require(holds, name, value, f"an integer from {least}")
    for name, allowed in _CHOICES.items():
      value = getattr(self, name)
      if value not in allowed:
        raise UserError(
          f"udim: {name}={value!r}{did_you_mean(str(value), allowed)}"
        )
    for name in _SWITCHES:
      value = getattr(self, name)
      _require(isinstance(value, bool), name, value, "True or False")
    value = self.label_smoothing
    holds = _is_number(value) and 0 <= value < 1
    _require(holds, "label_smoothing", value, "in [0, 1)")
    _require(
      _is_selection(self.terms), "terms", self.terms,
      "one or both of 'pen' and 'norm', in a tuple",
    )  # fmt: skip
    value = self.clip_range
    holds = value is None or _is_range(value)
    _require(holds, "clip_range", value, "(low, high), or None")

  def is_due(self, step: int) -> bool:
    """Whether a step has the term: the `due` of `udim` and `udim_grads`.

    For the host, which then chooses between two programs without a branch. A
    schedule of `lambda1` is evaluated, and waited for, where the other
    settings leave it open; a `start_step` is cheaper than zeros before it.

    Args:
      step: the number of updates done.
    """
    since = step - self.start_step
    if since < 0 or since % self.every:
      return False
    weight = self.lambda1(step) if callable(self.lambda1) else self.lambda1
    return float(weight) != 0

  def resolved(self) -> "UdimConfig":
    """The settings in force: `reference_quirks` overrides others."""
    if not self.reference_quirks:
      return self
    return dataclasses.replace(
      self,
      normalise="batch",
      data_grad="exact",
      clip_range=None,
      detach_source=False,
      domain_reduce="sum",
      share_dropout=False,
    )


_CHOICES = {
  "normalise": ("sample", "batch", "sign"),
  "data_grad": ("fast", "exact", "plain"),
  "domain_reduce": ("sum", "mean"),
  "mode": ("inconsistency", "perturbed_loss", "perturbed_sam"),
  "perturbation": ("pixel", "style"),
}
_COUNTS = {"start_step": 0, "every": 1, "term_images": 0}  # least values
_SWITCHES = ("detach_source", "share_dropout", "reference_quirks")


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
  is_kind = isinstance(value, kind) and not isinstance(value, bool)
  return is_kind and math.isfinite(value)


def _is_selection(terms: object) -> bool:
  if not isinstance(terms, tuple | list) or not terms:
    return False
  return set(terms) <= {"pen", "norm"} and len(set(terms)) == len(terms)


def _is_range(value: object) -> bool:
  if not isinstance(value, tuple | list) or len(value) != 2:
    return False
  return all(map(_is_number, value)) and value[0] < value[1]


def _require(holds: bool, name: str, value: object, what: str) -> None:
  if not holds:
    raise UserError(f"udim: {name}={value!r} must be {what}")
