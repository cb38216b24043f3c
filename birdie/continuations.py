"""Text in, text out: prompts as tokens, continuations up to where they stop."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from birdie import decode

_BEFORE = 8  # of a prompt's last tokens, which decide how the next are spelt


def prompt_tokens(run: Any, text: str) -> np.ndarray:
  """A prompt as in prefix language modeling, int32 [n]; GEN follows it."""
  return announced(run, run.tokenizer.encode(text), begins=False)


def announced(run: Any, tokens: np.ndarray, *, begins: bool) -> np.ndarray:
  """Tokens behind those that announce what is to follow, int32.

  Args:
    run: a `birdie.run.Run`.
    tokens: of the prefix.
    begins: a text begins, as in next-token prediction; else it is continued,
      as in prefix language modeling.
  """
  name = "next_token_prediction" if begins else "prefix_language_modeling"
  parts = [run.vocab.paradigms[name], tokens]
  return np.concatenate(parts).astype(np.int32)


def text_after(
  tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]
) -> str:
  """What tokens say behind a prompt; a first space may depend on that."""
  before = list(prompt[-_BEFORE:])
  head, whole = (tokenizer.decode(ids) for ids in (before, [*before, *tokens]))
  if whole.startswith(head):
    return whole[len(head) :]
  return tokenizer.decode(tokens)


@dataclasses.dataclass(frozen=True)
class Stops:
  """Where continuations end; what ends one is no part of it.

  Attributes:
    ids: tokens.
    texts: none is empty.
  """

  ids: tuple[int, ...]
  texts: tuple[str, ...] = ()

  @classmethod
  def of(cls, run: Any, texts: Iterable[str] = ()) -> "Stops":
    """EOS and some texts; the token of a text that is one ends it sooner."""
    texts, ids = tuple(texts), [run.vocab.eos]
    for text in texts:
      tokens = run.tokenizer.encode(text).tolist()
      if len(tokens) == 1 and run.tokenizer.decode(tokens) == text:
        ids += tokens
    return cls(tuple(ids), texts)

  def find(self, text: str) -> int:
    """Where the text that is complete first begins; -1 if none is."""
    found = [(text.find(stop), len(stop)) for stop in self.texts]
    ends = [(i + size, i) for i, size in found if i >= 0]
    return min(ends)[1] if ends else -1

  def cut(self, text: str) -> str:
    """What comes before the text that is complete first."""
    end = self.find(text)
    return text if end < 0 else text[:end]

  def until(self, pieces: Iterable[str]) -> Iterator[str]:
    """Pieces up to a stop, as soon as no stop can begin in them."""
    held = ""
    for piece in pieces:
      held += piece
      if self.find(held) >= 0:
        break
      sure = len(held) - self._beginning(held)
      if sure:
        yield held[:sure]
      held = held[sure:]
    rest = self.cut(held)
    if rest:
      yield rest

  def _beginning(self, text: str) -> int:
    """How much of the text's end is the beginning of a stop."""
    longest = max(map(len, self.texts), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
      if any(stop.startswith(text[-size:]) for stop in self.texts):
        return size
    return 0


@dataclasses.dataclass(frozen=True)
class Continuation:
  """What follows a prompt.

  Attributes:
    text: up to a stop.
    tokens: how many were made.
  """

  text: str
  tokens: int


def continue_all(
  run: Any,
  prompts: Sequence[np.ndarray],
  *,
  stops: Stops,
  max_new_tokens: int,
  batch_size: int = 16,
  seed: int = 0,
  settings: Mapping[str, Any] | None = None,
) -> Iterator[list[Continuation]]:
  """Continues prompts in batches, in order.

  Args:
    run: a `birdie.run.Run`.
    prompts: int32 arrays of any lengths, such as `prompt_tokens` makes.
    stops: where continuations end.
    max_new_tokens: at most so many each.
    batch_size: how many are answered together; a last, smaller batch is filled
      up, so that no program is compiled for it.
    seed: of the draws; each batch has its own.
    settings: more of `birdie.decode.generate`.

  Yields:
    The continuations of a batch.
  """
  batch_size = max(min(batch_size, len(prompts)), 1)
  for start in range(0, len(prompts), batch_size):
    chosen = prompts[start : start + batch_size]
    made = decode.generate(
      run.model,
      run.params,
      [*chosen, *[chosen[0]] * (batch_size - len(chosen))],
      gen=run.vocab.gen,
      max_new_tokens=max_new_tokens,
      stop=stops.ids,
      seed=seed_of(seed, start // batch_size),
      **(settings or {}),
    )
    texts = (
      text_after(run.tokenizer, prompt.tolist(), row.tolist())
      for prompt, row in zip(chosen, made)
    )
    yield [
      Continuation(stops.cut(text), len(row)) for text, row in zip(texts, made)
    ]


def seed_of(seed: int, number: int) -> int:
  """A seed for one of several draws."""
  sequence = np.random.SeedSequence([seed, number])
  return int(sequence.generate_state(1)[0])


def capacity_of(prompts: Sequence[np.ndarray], max_new_tokens: int) -> int:
  """Tokens that states have room for while prompts are continued."""
  tokens, _ = decode.pad_prompts(prompts, gen=0)
  return tokens.shape[1] + max_new_tokens
