"""What a comparison sets out to show, and the verdicts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from common import statistics
from common.report import markdown_table

SAME = 0.005  # differences within half a point count as none

BySeed = Mapping[int, float]
Scores = Callable[[str, str], BySeed]


class Claim(NamedTuple):
  """That a label does better than another.

  Attributes:
    text: of the table.
    label: what is claimed to be better.
    reference: than this.
    beside: two more labels, whose difference the former is measured against:
      then the claim is that the gain is larger here than there.
  """

  text: str
  label: str
  reference: str
  beside: tuple[str, str] | None = None

  def sides(self, scores: Scores) -> tuple[BySeed, BySeed] | None:
    """What is compared, by seed; None where some of it was not run."""
    gain = _difference(scores, self.label, self.reference)
    other: BySeed = dict.fromkeys(gain, 0.0)
    if self.beside:
      other = _difference(scores, *self.beside)
    return (gain, other) if set(gain) & set(other) else None


def _difference(scores: Scores, label: str, reference: str) -> BySeed:
  """Of the seeds that both have."""
  ours, theirs = scores(label, "source"), scores(reference, "source")
  return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


# Tested where all of it was run. UDIM's parts are held against SAM inside UDIM,
# with the same radius and warm-up.
CLAIMS = (
  Claim("UDIM is better than SAM", "udim", "sam"),
  Claim("UDIM is better than ERM", "udim", "erm"),
  Claim("SAM is better than ERM", "sam", "erm"),
  Claim("UDIM is better than the loss on its images", "udim", "perturbed_loss"),
  Claim("UDIM is better than SAM on its images too", "udim", "perturbed_sam"),
  Claim("the variance term alone is better than none", "udim_pen", "udim_zero"),
  Claim("the norm term alone is better than none", "udim_norm", "udim_zero"),
  Claim(
    "the term on unmoved images is better than none", "udim_still", "udim_zero"
  ),
  *(
    Claim(
      f"UDIM gains more over {name} from {few} than from all sources",
      f"udim_{count}", f"{reference}_{count}", ("udim", reference),
    )
    for count, few in ((1, "one source"), (2, "two"))
    for reference, name in (("sam", "SAM"), ("erm", "ERM"))
  ),
)  # fmt: skip
# The same, where no difference would be shown: an interval within `SAME`.
EQUALITIES = (
  Claim("the exact data gradient is worth the fast one", "udim_exact", "udim"),
  Claim("the plain data gradient is worth the fast one", "udim_plain", "udim"),
  Claim(
    "a detached source is worth one that is not", "udim_detached", "udim"
  ),
)  # fmt: skip


def claims_section(scores: Scores, *, tuned: bool = True) -> str:
  """Every claim with its paired test, Holm's correction over all of them.

  Args:
    scores: `(label, method) -> {seed: accuracy}`, empty for what was not run.
    tuned: whether settings were chosen by something else than the targets.

  Returns:
    Markdown, "" where there is nothing to claim.
  """
  tested = list(_tested(CLAIMS, scores))
  judged = statistics.verdicts([found for _, found in tested])
  rows = [_row(*one, *verdict) for one, verdict in zip(tested, judged)]
  for text, found in _tested(EQUALITIES, scores):
    reach = abs(found.mean) + found.half_width
    verdict = "holds" if reach <= SAME else "not shown"
    rows.append(_row(text, found, np.nan, verdict))
  if not rows:
    return ""
  header = ("claim", "difference", "seeds won", "p (Holm)", "verdict")
  note = (
    "Models chosen by the sources' held-out images; two-sided paired t-tests, "
    "corrected for the number of claims on this page. One is worth another if "
    f"the 95 % interval lies within ± {100 * SAME:g} points."
  )
  if not tuned:
    note = (
      "Nothing was tuned for this page, so a claim that holds here holds for "
      f"these settings alone. {note}"
    )
  return f"## What holds\n\n{note}\n\n" + markdown_table(header, rows)


def _tested(
  claims: Iterable[Claim], scores: Scores
) -> Iterator[tuple[str, statistics.Difference]]:
  for claim in claims:
    sides = claim.sides(scores)
    if sides is not None:
      yield claim.text, statistics.paired(*statistics.align(*sides))


def _row(
  text: str, found: statistics.Difference, p: float, verdict: str
) -> tuple[str, ...]:
  return (
    text,
    statistics.format_interval(found, signed=True),
    f"{found.wins} of {found.count}",
    "–" if np.isnan(p) else f"{p:.2g}",
    verdict,
  )
