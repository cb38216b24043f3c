"""The retrieval evaluation of a run: phone books, answered by generation."""

from typing import Any

import jax
import jax.numpy as jnp

from birdie.answering import answer, mean_scores
from birdie.tasks import make_task
from common.config import did_you_mean
from common.errors import UserError
from common.parallel import on_device, to_host
from common.state import TrainState

BOOK_SEED = 1 << 20  # the same books for every run
TASKS = ("phone_book", "phone_book_compact")


class RetrievalEvaluation:
  """Greedy answers to phone books; use as `EvaluateHook`'s function.

  Every process answers all books, on one of its own devices: the numbers are
  the same everywhere, and nothing has to be gathered.

  Args:
    cfg: `config.retrieval`.
    model: a module of `birdie.models`.
    corpus: tokenizer and vocabulary.

  Raises:
    UserError: for another task, no books, or sizes that do not fit.
  """

  def __init__(self, cfg: Any, model: Any, corpus: Any):
    if cfg.task not in TASKS:
      raise UserError(
        f"retrieval.task={cfg.task!r}{did_you_mean(cfg.task, TASKS)}"
      )
    if cfg.books < 1:
      raise UserError(f"retrieval.books={cfg.books} must be at least 1")
    # One device holds the model here: no mesh axis for time.
    self._model = model.clone(seq_axis=None)
    self._batch = cfg.batch_size
    self._task = make_task(
      cfg.task,
      {"entries": cfg.entries, "lookups": cfg.lookups},
      corpus.vocab,
      tokenizer=corpus.tokenizer,
    )
    self._books = self._task.problems(BOOK_SEED, cfg.books)

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Returns `retrieval/...` scalars; `chance` is of a guessed digit."""
    params = to_host(state.params)
    with on_device(jax.local_devices()[0]):
      answers = answer(
        self._model,
        jax.tree.map(jnp.asarray, params),
        self._task,
        self._books,
        batch_size=self._batch,
      )
    scores = mean_scores(
      [self._task.score(*pair) for pair in zip(answers, self._books)]
    )
    scores["chance"] = self._task.guess(self._books[0])["digit_accuracy"]
    return {f"retrieval/{name}": value for name, value in scores.items()}
