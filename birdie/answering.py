"""A model's answers to problems, and what they are worth."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from birdie import decode
from birdie.problems import Problem, Scores, Task
from birdie.scoring import bucket_size, log_likelihoods

PyTree = Any
_NEW_TOKENS = 16  # limits are rounded up to multiples, so that few compile


def answer(
  model: Any,
  params: PyTree,
  task: Task,
  problems: Sequence[Problem],
  *,
  batch_size: int,
) -> list[np.ndarray]:
  """The model's answers: generated greedily, or the likeliest choices.

  Args:
    model: a module of `birdie.models`.
    params: its parameters.
    task: made the problems.
    problems: of any lengths, longer than those of training too.
    batch_size: how many are answered together.

  Returns:
    int32 arrays, without the token that ends an answer.
  """
  if problems and problems[0].choices:
    return _choose(model, params, task, problems, batch_size)
  return _generate(model, params, task, problems, batch_size)


def _generate(model, params, task, problems, batch_size) -> list[np.ndarray]:
  """Problems of one padded size together; a filler sets the size."""
  by_size: dict[int, list[int]] = {}
  for i, problem in enumerate(problems):
    by_size.setdefault(bucket_size(len(problem.inputs)), []).append(i)
  limit = task.max_new_tokens(problems)
  answers = [np.zeros(0, np.int32)] * len(problems)
  for size, members in sorted(by_size.items()):
    filler = np.full(size - 1, task.vocab.gen, np.int32)
    for start in range(0, len(members), batch_size):
      chosen = members[start : start + batch_size]
      prompts = [problems[i].inputs for i in chosen]
      prompts += [filler] * (batch_size + 1 - len(prompts))
      made = decode.generate(
        model,
        params,
        prompts,
        gen=task.vocab.gen,
        max_new_tokens=-(-limit // _NEW_TOKENS) * _NEW_TOKENS,
        stop=task.stop,
      )
      for i, tokens in zip(chosen, made):
        answers[i] = tokens[:limit]
  return answers


def _choose(model, params, task, problems, batch_size) -> list[np.ndarray]:
  """The choice with the highest log-likelihood a token."""
  pairs = [(p.inputs, choice) for p in problems for choice in p.choices]
  sums, lengths = log_likelihoods(
    model,
    params,
    *zip(*pairs),
    gen=task.vocab.gen,
    batch_size=batch_size,
  )
  means = iter((sums / lengths).tolist())
  return [
    max(problem.choices, key=lambda _: next(means)) for problem in problems
  ]


def mean_scores(scores: Sequence[Mapping[str, float]]) -> Scores:
  """The mean of each metric; {} where any has none."""
  names = scores[0] if scores and all(scores) else ()
  return {name: float(np.mean([s[name] for s in scores])) for name in names}
