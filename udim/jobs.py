"""The runs of a comparison, as configurations of trainings."""

import dataclasses
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from common.config import did_you_mean, to_json
from common.errors import UserError
from common.flags import override
from udim.algorithms import NAMES, SWAD, split_name
from udim.domains import DomainSet, load_domains
from udim.objectives import NEEDS_DOMAINS
from udim.search import draw_settings
from udim.splits import Run
from udim.train import protocol_runs

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
  """One run to be done.

  Attributes:
    label: what it stands under in the table.
    config: the training's.
    settings: what the label and the draw changed.
  """

  label: str
  run: str
  seed: int
  draw: int
  config: Any
  settings: dict[str, Any]

  @property
  def folder(self) -> str:
    """Where it lies in the comparison's folder."""
    names = "/".join(_slug(name) for name in (self.label, self.run))
    draw = f"-draw{self.draw}" if self.draw else ""
    return f"runs/{names}/seed{self.seed}{draw}"


def _slug(name: str) -> str:
  return re.sub(r"[^\w.+-]+", "_", name)


def check_compare(config: Any) -> None:
  """Refuses comparisons of nothing."""
  for key, value, least in (
    ("compare.seeds", config.compare.seeds, 1),
    ("compare.first_seed", config.compare.first_seed, 0),
    ("compare.landscape_images", config.compare.landscape_images, 1),
    ("search.draws", config.search.draws, 1),
    ("search.tuning_seeds", config.search.tuning_seeds, 0),
  ):
    if value < least:
      raise UserError(f"{key}={value} must be at least {least}")
  reported = set(seeds_of(config.compare.first_seed, config.compare.seeds))
  tuning = seeds_of(config.search.first_tuning_seed,
                    config.search.tuning_seeds)  # fmt: skip
  if reported & set(tuning):
    raise UserError(
      f"search.first_tuning_seed={config.search.first_tuning_seed}: tuning "
      f"would use the reported seed {min(reported & set(tuning))}; choose "
      "another beginning"
    )
  labels = split_labels(config.compare.algorithms)
  for label in labels:
    base_of(config, label)
  for label in split_labels(config.compare.references):
    base_of(config, label)


def split_labels(text: str) -> list[str]:
  """`erm, sam` -> ["erm", "sam"].

  Raises:
    UserError: for none, or the same twice.
  """
  labels = [label.strip() for label in text.split(",") if label.strip()]
  if not labels:
    raise UserError("compare.algorithms is empty: name at least one")
  twice = [label for label in labels if labels.count(label) > 1]
  if twice:
    raise UserError(f"compare.algorithms names {twice[0]!r} twice")
  return labels


def seeds_of(first: int, count: int) -> list[int]:
  """`count` seeds from `first`."""
  return list(range(first, first + count))


def overrides_of(config: Any, label: str) -> list[tuple[str, str]]:
  """What a label sets, as (key, value) of the command line.

  Raises:
    UserError: for a label that is neither an algorithm nor a variant.
  """
  variants = config.compare.variants
  if label in variants:
    pairs = [entry.partition("=") for entry in variants[label]]
    return [(key, value) for key, _, value in pairs]
  if label.removesuffix(SWAD) not in NAMES:
    known = [*NAMES, *variants]
    raise UserError(
      f"compare.algorithms: {label!r}{did_you_mean(label, known)}"
    )
  return [("algorithm", label)]


def base_of(config: Any, label: str) -> str:
  """The algorithm that a label's settings belong to, without `+swad`."""
  keys = dict(overrides_of(config, label))
  return split_name(keys.get("algorithm", config.algorithm))[0]


def tuned_algorithms(config: Any, labels: Iterable[str]) -> list[str]:
  """The algorithms whose settings the labels take, if these can be drawn."""
  names = dict.fromkeys(base_of(config, label) for label in labels)
  return [name for name in names if draw_settings(config, name, 1)]


def chosen_draws(config: Any) -> dict[str, int]:
  """The draws that another comparison has chosen.

  Args:
    config: `search.chosen`, the path of its `chosen.json`.

  Returns:
    Algorithm -> draw.

  Raises:
    UserError: when the file cannot be read, or its draws are not those of
      this configuration's ranges and seed.
  """
  path = config.search.chosen
  try:
    with open(path) as file:
      page = json.load(file)
    draws = {name: int(one["chosen"]) for name, one in page.items()}
    settings = {
      name: next(
        d["settings"] for d in one["draws"] if d["draw"] == draws[name]
      )
      for name, one in page.items()
    }
  except OSError as error:
    raise UserError(f"search.chosen={path!r}: {error.strerror}") from None
  except (ValueError, KeyError, TypeError, StopIteration) as error:
    raise UserError(
      f"search.chosen={path!r} is no chosen.json of a comparison: {error!r}"
    ) from None
  for name, draw in draws.items():
    ours = draw_settings(config, name, draw)
    if {k: v for k, v in settings[name].items() if k in ours} != ours:
      raise UserError(
        f"search.chosen={path!r}: draw {draw} of {name!r} is another one here; "
        "use the same search.seed, search.shared and search.spaces"
      )
  return draws


def make_jobs(
  config: Any,
  labels: Sequence[str],
  seeds: Sequence[int],
  draws: Sequence[int] | dict[str, int],
) -> list[Job]:
  """All runs, seed by seed.

  Args:
    config: the comparison's.
    labels: of the table.
    seeds: of the runs: of weights and batches, of the splits, and of data that
      is made from a seed.
    draws: of the random search; or the draw of each algorithm, 0 for those
      that are not there.
  """
  jobs, left_out = [], set()
  for seed in seeds:
    for label in labels:
      base = base_of(config, label)
      if isinstance(draws, dict):
        own = [draws.get(base, 0)]
      else:
        own = draws if draw_settings(config, base, 1) else [0]
      for draw in own:
        settings = draw_settings(config, base, draw)
        trained = job_config(config, label, seed, settings)
        settings |= dict(overrides_of(config, label))
        for run, one in runs_of(trained):
          if base in NEEDS_DOMAINS and len(run.sources) < 2:
            left_out.add(label)
            continue
          jobs.append(Job(label, run.name, seed, draw, one, settings))
  for label in sorted(left_out):
    log.warning(
      "%s compares source domains: left out where there is one", label
    )
  return jobs


def job_config(config: Any, label: str, seed: int, settings: dict) -> Any:
  """The configuration of one training, as one would give it to `udim.main`."""
  config = config.copy_and_resolve_references()
  for key, value in settings.items():
    config = override(config, key, [f"--config.{key}={value!r}"])
  for key, value in overrides_of(config, label):
    config = override(config, key, [f"--config.{key}={value}"])
  with config.unlocked():
    config.mode, config.seed, config.trial_seed = "train", seed, seed
    if config.data.source.kind.startswith("digits"):
      config.data.source.seed = seed
  return config


def runs_of(config: Any) -> Iterator[tuple[Run, Any]]:
  """The runs of the configuration's protocol, a configuration each."""
  for run in protocol_runs(config, load_shared(config.data.source)):
    one = config.copy_and_resolve_references()
    one.run = run.name
    yield run, one


_loaded: dict[str, DomainSet] = {}


def load_shared(source: Any) -> DomainSet:
  """The data set, kept for the next run if it is the same."""
  key = to_json(source)
  if key not in _loaded:
    _loaded.clear()
    _loaded[key] = load_domains(source)
  return _loaded[key]
