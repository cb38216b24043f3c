"""Birdie's models in EleutherAI's evaluation harness, `lm_eval`.

    import birdie.lm_eval_adapter
    birdie.lm_eval_adapter.register()
    lm_eval.simple_evaluate("birdie", "run=runs/birdie", tasks=[…])

A request's context is a prefix, read in both directions and announced as in
prefix language modeling; its continuation is generated, or scored, behind GEN.
A text without context is announced as in next-token prediction. Nothing here
imports the harness before it is asked for.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from birdie.continuations import Stops, announced, continue_all, seed_of
from birdie.run import load_run
from birdie.scoring import score
from common.config import check_keys
from common.errors import UserError

NAME = "birdie"
Pair = tuple[np.ndarray, np.ndarray]
_INSTALL = "pip install -e '.[evaluation]'"
_NEW_TOKENS = 256  # where a task does not say
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_KNOWN = ("until", *_LENGTHS, "do_sample", "temperature", "top_k", "top_p")


def scored_pair(
  run: Any, context: str, continuation: str, *, max_length: int = 0
) -> Pair:
  """A request's prompt and continuation, as tokens.

  Text is tokenized as a whole and then cut, and spaces at the context's end
  count with the continuation, as in the harness.

  Args:
    run: a `birdie.run.Run`.
    context: may be empty.
    continuation: may be empty only where the context ends with spaces.
    max_length: tokens of both, of which the context gives way; 0: any number.
  """
  kept = context.rstrip()
  continuation = context[len(kept) :] + continuation
  encode = run.tokenizer.encode
  head = encode(kept)
  labels = encode(kept + continuation)[len(head) :]
  if continuation and not len(labels):  # a token goes over the cut
    labels = encode(continuation)
  prompt = announced(run, head, begins=not kept)
  return _shortened(prompt, max_length - len(labels), max_length), labels


def rolling_pairs(run: Any, text: str, *, max_length: int = 0) -> list[Pair]:
  """Prompts and continuations in which each token of a text counts once.

  Args:
    run: a `birdie.run.Run`.
    text: a document.
    max_length: the first piece is so long, if not 0, and later ones are halves
      of that, each with the half before it as its prompt.
  """
  tokens = run.tokenizer.encode(text)
  first = max_length or len(tokens)
  nothing = announced(run, tokens[:0], begins=True)
  pairs = [(nothing, tokens[:first])] if len(tokens) else []
  half = max(first // 2, 1)
  for start in range(first, len(tokens), half):
    before = announced(run, tokens[max(start - half, 0) : start], begins=False)
    pairs.append((before, tokens[start : start + half]))
  return pairs


def _shortened(prompt: np.ndarray, size: int, max_length: int) -> np.ndarray:
  """The announcement and the prompt's end."""
  if not max_length or len(prompt) <= size:
    return prompt
  keep = max(size - 1, 0)
  return np.concatenate([prompt[:1], prompt[len(prompt) - keep :]])


def generation(settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
  """A task's `generation_kwargs`: the most tokens, and how to draw them.

  Raises:
    UserError: for settings that have no counterpart here.
  """
  check_keys(settings, _KNOWN, what="generation_kwargs")
  lengths = [settings[name] for name in _LENGTHS if name in settings]
  temperature = float(settings.get("temperature", 0.0))
  sampled = settings.get("do_sample", temperature > 0)
  how = {
    "temperature": (temperature or 1.0) if sampled else 0.0,
    "top_k": int(settings.get("top_k", 0)) if sampled else 0,
    "top_p": float(settings.get("top_p", 1.0)) if sampled else 1.0,
  }
  return int(lengths[0]) if lengths else _NEW_TOKENS, how


def register() -> type:
  """Makes the model known to the harness as `birdie`; returns `BirdieLM`.

  Raises:
    UserError: where lm_eval is not installed.
  """
  return _adapter()


def __getattr__(name: str) -> Any:
  if name == "BirdieLM":
    return _adapter()
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _adapter() -> type:
  try:
    from lm_eval.api.model import LM  # type: ignore
    from lm_eval.api.registry import register_model  # type: ignore
  except ImportError as error:
    raise UserError(f"this needs lm_eval: {_INSTALL}") from error

  @register_model(NAME)
  class BirdieLM(_Answers, LM):
    """A run in the harness; see `_Answers`."""

    def __init__(self, run: Any, **settings: Any):
      LM.__init__(self)
      _Answers.__init__(self, run, **settings)

  return BirdieLM


class _Answers:
  """What the harness asks of a model.

  Args:
    run: a folder of a run or a model, or a `birdie.run.Run`.
    step: which checkpoint; the newest if None.
    batch_size: requests at a time; "auto" is 16.
    max_batch_size: the most of them.
    max_length: tokens of a request, the context gives way; 0: any number.
    seed: of draws.
    device: what the harness always says, of torch; jax has its own.
  """

  cache_hook: Any

  def __init__(
    self,
    run: Any,
    *,
    step: int | None = None,
    batch_size: int | str = 16,
    max_batch_size: int | None = None,
    max_length: int = 0,
    seed: int = 0,
    device: str | None = None,
  ):
    del device
    is_auto = str(batch_size).startswith("auto")
    size = 16 if is_auto else int(batch_size)
    self.batch_size = min(size, int(max_batch_size or size))
    if self.batch_size < 1 or int(max_length) < 0:
      raise UserError(
        f"batch_size={batch_size} and max_length={max_length} must be at least "
        "1 and 0"
      )
    self.run = load_run(run, step=step) if isinstance(run, str) else run
    self.max_length, self.seed = int(max_length), int(seed)

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Of each continuation the log-likelihood, and whether greedy decoding
    would give it.
    """
    pairs = [
      scored_pair(self.run, *r.args, max_length=self.max_length)
      for r in requests
    ]
    answers = [
      (total, bool(is_greedy)) for total, is_greedy in self._score(pairs)
    ]
    self._remember("loglikelihood", requests, answers)
    return answers

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """The log-likelihood of each text."""
    pieces = [
      rolling_pairs(self.run, r.args[0], max_length=self.max_length)
      for r in requests
    ]
    found = iter(self._score([pair for text in pieces for pair in text]))
    answers = [sum(next(found)[0] for _ in text) for text in pieces]
    self._remember("loglikelihood_rolling", requests, answers)
    return answers

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """The text that follows each context, up to a stop."""
    answers = [""] * len(requests)
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
    for members in groups.values():
      self._generate(requests, members, answers)
    self._remember("generate_until", requests, answers)
    return answers

  def _generate(self, requests, members: list[int], answers: list[str]):
    """Fills in the answers to requests of equal settings."""
    settings = requests[members[0]].args[1]
    most, how = generation(settings)
    until = settings.get("until") or []
    texts = [until] if isinstance(until, str) else until
    room = self.max_length - most
    prompts = {}
    for i in members:
      tokens = self.run.tokenizer.encode(requests[i].args[0])
      prompt = announced(self.run, tokens, begins=False)
      prompts[i] = _shortened(prompt, room, self.max_length)
    order = sorted(members, key=lambda i: len(prompts[i]))
    batches = continue_all(
      self.run,
      [prompts[i] for i in order],
      stops=Stops.of(self.run, filter(None, texts)),
      max_new_tokens=most,
      batch_size=self.batch_size,
      seed=seed_of(self.seed, members[0]),
      settings=how,
    )
    made = (answer for batch in batches for answer in batch)
    for i, answer in zip(order, made):
      answers[i] = answer.text

  def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """Of nothing, the log-likelihood is 0."""
    answers = [(0.0, True)] * len(pairs)
    there = [i for i, (_, labels) in enumerate(pairs) if len(labels)]
    if not there:
      return answers
    prompts, labels = zip(*(pairs[i] for i in there))
    sums, _, greedy = score(
      self.run.model,
      self.run.params,
      prompts,
      labels,
      gen=self.run.vocab.gen,
      batch_size=self.batch_size,
    )
    for i, total, is_greedy in zip(there, sums.tolist(), greedy.tolist()):
      answers[i] = (total, is_greedy)
    return answers

  def _remember(self, what: str, requests: Any, answers: Sequence[Any]):
    for request, answer in zip(requests, answers):
      self.cache_hook.add_partial(what, request.args, answer)
