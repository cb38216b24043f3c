"""The retrieval evaluation of a run: phone books, answered by generation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from birdie import decode, tasks
from common.parallel import on_device, to_host
from common.state import TrainState

BOOK_SEED = 1 << 20  # the same books for every run


class RetrievalEvaluation:
  """Greedy answers to phone books; use as `EvaluateHook`'s function.

  Every process answers all books, on one of its own devices: the numbers are
  the same everywhere, and nothing has to be gathered.

  Args:
    cfg: `config.retrieval`.
    model: a module of `birdie.models`.
    corpus: tokenizer and vocabulary.
  """

  def __init__(self, cfg: Any, model: Any, corpus: Any):
    # One device holds the model here: no mesh axis for time.
    self._model = model.clone(seq_axis=None)
    self._batch = cfg.batch_size
    self._corpus = corpus
    self._books = tasks.PhoneBooks(
      corpus.tokenizer,
      books=cfg.books,
      entries=cfg.entries,
      lookups=cfg.lookups,
      seed=BOOK_SEED,
      paradigm=corpus.vocab.paradigms["prefix_language_modeling"],
    )

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Returns `retrieval/...` scalars."""
    vocab = self._corpus.vocab
    params = to_host(state.params)
    with on_device(jax.local_devices()[0]):
      answer = functools.partial(
        self._generate,
        jax.tree.map(jnp.asarray, params),
        gen=vocab.gen,
        stop=vocab.eos,
      )
      scores = self._books.evaluate(answer)
    return {f"retrieval/{name}": value for name, value in scores.items()}

  def _generate(self, params, prompts, max_new_tokens, **settings):
    answers = []
    for start in range(0, len(prompts), self._batch):
      answers += decode.generate(
        self._model,
        params,
        prompts[start : start + self._batch],
        max_new_tokens=max_new_tokens,
        **settings,
      )
    return answers
