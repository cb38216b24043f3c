"""Which domains train and which test, and which images of each.

Splits are DomainBed's to the last key (Gulrajani & Lopez-Paz, ICLR 2021;
`lib/misc.py` and `scripts/train.py` of its repository), so results on the same
folders can be compared run by run.
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Sequence

import numpy as np

from common.errors import UserError
from udim.domains import Domain, DomainSet

log = logging.getLogger(__name__)

PROTOCOLS = ("leave_one_out", "single_source", "chosen")


def seed_hash(*args: object) -> int:
  """DomainBed's seed: 31 bits of the MD5 of the arguments as a tuple."""
  digest = hashlib.md5(str(args).encode(), usedforsecurity=False)
  return int(digest.hexdigest(), 16) % 2**31


def split_keys(
  size: int, *, trial_seed: int, env: int, holdout: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
  """Divides a domain's images as DomainBed does.

  Args:
    size: N images.
    trial_seed: of the division.
    env: the domain's position in its data set, which seeds it too.
    holdout: the share of the second part, rounded down.

  Returns:
    (in, out): the keys of the larger and the smaller part, shuffled. `out` is
    the beginning of the shuffled keys, `in` the rest.

  Raises:
    UserError: for a share outside [0, 1).
  """
  if not 0 <= holdout < 1:
    raise UserError(f"data.holdout={holdout}: choose a share in [0, 1)")
  keys = np.arange(size)
  # The legacy generator, because DomainBed's splits are made with it.
  rng = np.random.RandomState(seed_hash(trial_seed, env))
  rng.shuffle(keys)
  count = int(size * holdout)
  return keys[count:], keys[:count]


@dataclasses.dataclass(frozen=True)
class Run:
  """Which domains one training uses.

  Attributes:
    name: for tables.
    sources: domains to train on.
    targets: domains that training does not see.
  """

  name: str
  sources: tuple[str, ...]
  targets: tuple[str, ...]


def make_runs(
  domain_set: DomainSet,
  protocol: str,
  *,
  sources: Sequence[str] = (),
  targets: Sequence[str] = (),
  limit: int = 0,
) -> tuple[Run, ...]:
  """The trainings that a protocol asks for.

  Args:
    domain_set: its `sources` may train, its `references` and `validations`
      are no targets.
    protocol:
      leave_one_out: each source in turn is the target, the others train;
      single_source: each source in turn trains, all others are targets;
      chosen: one run, from `sources` to `targets`.
    sources: names; () stands for all.
    targets: names; () stands for all that are left. Under leave_one_out the
      held-out domains.
    limit: under leave_one_out, how many of the others train: those that follow
      the target, in a circle. 0: all.

  Raises:
    UserError: for unknown names, or a protocol that these domains do not fit.
  """
  if protocol not in PROTOCOLS:
    raise UserError(f"protocol={protocol!r}: choose {', '.join(PROTOCOLS)}")
  for name in (*sources, *targets):
    domain_set.index(name)
  barred = [name for name in sources if name not in domain_set.sources]
  if barred:
    raise UserError(
      f"domain {barred[0]!r} of {domain_set.name!r} is for testing: train on "
      f"{', '.join(domain_set.sources)}"
    )
  used = tuple(sources) or domain_set.sources
  if limit and protocol != "leave_one_out":
    raise UserError(
      f"sources_limit={limit} has a meaning under leave_one_out alone; name "
      "the sources"
    )
  if protocol == "leave_one_out":
    runs = [
      Run(target, _others(used, target, limit), (target,))
      for target in targets or used
    ]
  elif protocol == "single_source":
    runs = [_run(domain_set, (source,), targets) for source in used]
  else:
    runs = [_run(domain_set, used, targets)]
  for run in runs:
    if not run.sources or not run.targets:
      raise UserError(
        f"protocol={protocol!r} leaves no domain to "
        f"{'test' if run.sources else 'train'} on: {domain_set.name!r} has the "
        f"sources {', '.join(domain_set.sources)} and the domains "
        f"{', '.join(domain_set.names)}"
      )
  return tuple(runs)


def _others(names: Sequence[str], target: str, limit: int) -> tuple[str, ...]:
  """All names but one, in order; the `limit` that follow it."""
  others = tuple(name for name in names if name != target)
  if not limit:
    return others
  if limit > len(others):
    raise UserError(
      f"sources_limit={limit}: there are {len(others)} domains beside "
      f"{target!r}"
    )
  after = names.index(target) if target in names else 0
  circle = others[after:] + others[:after]
  return tuple(sorted(circle[:limit], key=others.index))


def _run(
  domain_set: DomainSet, sources: tuple[str, ...], targets: Sequence[str]
) -> Run:
  barred = (*sources, *domain_set.references, *domain_set.validations)
  left = tuple(n for n in targets or domain_set.names if n not in barred)
  return Run("+".join(sources), sources, left)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """A domain in two parts.

  Attributes:
    name: of the domain.
    main: DomainBed's "in", the larger part: sources train on it, targets are
      reported on it.
    holdout: DomainBed's "out": sources select by it, the oracle too.
  """

  name: str
  main: Domain
  holdout: Domain


@dataclasses.dataclass(frozen=True, eq=False)
class RunSplits:
  """The parts of all domains that a run uses; a `Split` each.

  Attributes:
    sources: what trains.
    targets: what is unseen.
    references: held-out images of the sources, where the data set has such.
    validations: the sources' images, changed, and divided as the sources are:
      their `holdout` is what hyper-parameters may be chosen by.
  """

  sources: tuple[Split, ...]
  targets: tuple[Split, ...]
  references: tuple[Split, ...]
  validations: tuple[Split, ...] = ()


def split_run(
  domain_set: DomainSet, run: Run, *, trial_seed: int = 0, holdout: float = 0.2
) -> RunSplits:
  """Divides the domains of a run as DomainBed does.

  Args:
    domain_set: the data.
    run: which domains.
    trial_seed: of all divisions.
    holdout: the share of the smaller parts.

  Raises:
    UserError: for a source that is too small to be divided.
  """

  def split(name: str, like: str | None = None) -> Split:
    env = domain_set.index(like or name)
    domain = domain_set[name]
    main, out = split_keys(
      len(domain), trial_seed=trial_seed, env=env, holdout=holdout
    )
    return Split(name, domain.select(main), domain.select(out))

  splits = RunSplits(
    sources=tuple(map(split, run.sources)),
    targets=tuple(map(split, run.targets)),
    references=tuple(map(split, domain_set.references)),
    validations=tuple(
      split(name, source)
      for name, source in domain_set.validations.items()
      if source in run.sources
    ),
  )
  for part in splits.sources:
    if not len(part.holdout):
      raise UserError(
        f"source domain {part.name!r} has {_images(part.main)}: "
        f"data.holdout={holdout} leaves none of them to select models by; "
        + (
          f"give at least {math.ceil(1 / holdout)}"
          if holdout
          else "choose a larger share, such as 0.2"
        )
      )
  small = [t for t in splits.targets if not len(t.holdout)]
  if small:
    log.warning(
      "too small for a held-out part, so the oracle does not see them: %s",
      ", ".join(f"{t.name!r} ({_images(t.main)})" for t in small),
    )
  return splits


def _images(domain: Domain) -> str:
  return f"{len(domain)} image{'s' if len(domain) != 1 else ''}"
