"""Tasks' scores beside their baselines, by look-ups and by length."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from birdie.problems import Problem, Scores, Task, majority
from common.statistics import shares

BASELINES = ("guess", "majority", "context")
Answer = Callable[[Task, Sequence[Problem]], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Record:
  """One answered problem.

  Attributes:
    facts: of the problem.
    scores: of the answer, by metric.
    baselines: what each of `BASELINES` is expected to score; {} for none.
  """

  facts: Mapping[str, int]
  scores: Scores
  baselines: Mapping[str, Scores]


def evaluate(
  task: Task, answer: Answer, *, problems: int, seed: int
) -> list[Record]:
  """Answers problems and scores them.

  Args:
    task: makes and scores them.
    answer: `(task, problems) -> answers`, tokens.
    problems: how many.
    seed: of the problems.
  """
  made = task.problems(seed, problems)
  constant = majority(task, seed)
  records = []
  for problem, tokens in zip(made, answer(task, made), strict=True):
    often = task.frequent(problem)
    if constant is not None:
      often = task.score(constant, problem)
    baselines = (task.guess(problem), often, task.from_context(problem))
    records.append(
      Record(
        problem.facts,
        task.score(np.asarray(tokens), problem),
        dict(zip(BASELINES, baselines)),
      )
    )
  return records


def summary(
  records: Sequence[Record], metrics: Sequence[str]
) -> dict[str, Any]:
  """What a table's row says: means, intervals of 95 %, baselines' means.

  Args:
    records: at least one.
    metrics: their names.

  Returns:
    Plain data; None where there is no baseline.
  """
  row: dict[str, Any] = {
    "problems": len(records),
    "lookups": float(np.mean([r.facts["lookups"] for r in records])),
    "length": float(np.mean([r.facts["length"] for r in records])),
    "metrics": {},
  }
  for metric in metrics:
    found = shares([record.scores[metric] for record in records])
    one: dict[str, float | None] = {**dataclasses.asdict(found)}
    for name in BASELINES:
      values = [r.baselines[name].get(metric, np.nan) for r in records]
      mean = float(np.mean(values))
      one[name] = mean if np.isfinite(mean) else None
    row["metrics"][metric] = one
  return row


def page_data(
  records: Sequence[Record], settings: Sequence[Mapping[str, Any]], task: Task
) -> dict[str, Any]:
  """All rows of one task, plain data.

  Args:
    records: at least one.
    settings: that each record's task was made with, beside its defaults.
    task: any of the tasks.
  """
  metrics = task.metrics
  chosen = [tuple(one.items()) for one in settings]
  by_setting = {}
  for name in settings[0]:
    values = [_label(one[name]) for one in settings]
    if len(set(values)) > 1:
      by_setting[name] = _grouped(records, values, metrics)
  return {
    "metrics": list(metrics),
    "all": summary(records, metrics),
    "by_setting": by_setting,
    "by_lookups": by_lookups(records, metrics),
    "by_length": by_length(records, metrics, task.length_bucket),
    "cells": [
      {"settings": dict(cell)}
      | summary([r for r, c in zip(records, chosen) if c == cell], metrics)
      for cell in dict.fromkeys(chosen)
    ],
  }


def _label(value: Any) -> str:
  return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _grouped(
  records: Sequence[Record], labels: Sequence[str], metrics: Sequence[str]
) -> list[dict[str, Any]]:
  """A row for each label, in order of their first records."""
  return [
    {"label": label}
    | summary([r for r, own in zip(records, labels) if own == label], metrics)
    for label in dict.fromkeys(labels)
  ]


def by_lookups(
  records: Sequence[Record], metrics: Sequence[str]
) -> list[dict[str, Any]]:
  """A row for each number of look-ups, or each octave of many numbers."""
  counts = {record.facts["lookups"] for record in records}
  width = 0 if len(counts) > 12 else 1
  return _rows(records, metrics, "lookups", width)


def by_length(
  records: Sequence[Record], metrics: Sequence[str], width: int
) -> list[dict[str, Any]]:
  """A row for each bucket of prompts' lengths.

  Args:
    records: at least one.
    metrics: their names.
    width: of a bucket, around its multiples; octaves if 0.
  """
  return _rows(records, metrics, "length", width)


def _rows(records, metrics, fact: str, width: int) -> list[dict[str, Any]]:
  ordered = sorted(records, key=lambda record: record.facts[fact])
  labels = [_bucket(record.facts[fact], width) for record in ordered]
  return _grouped(ordered, labels, metrics)


def _bucket(value: int, width: int) -> str:
  """What the bucket of a value is called."""
  if width == 1:
    return str(value)
  if width:
    return f"about {max(round(value / width), 1) * width}"
  low = 1 << max(value.bit_length() - 1, 0)
  return f"{low}-{2 * low - 1}" if low > 1 else "1"
