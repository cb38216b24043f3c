"""The tasks by name; see `birdie.problems` for what a task is."""

from collections.abc import Mapping
from typing import Any

from birdie.problems import Task, settings_of
from birdie.task_files import Squad, StoryInfilling
from birdie.task_phone_book import CompactPhoneBook, PhoneBook
from birdie.task_synthetic import (
  AssociativeRecall,
  Induction,
  MambaSelectiveCopying,
  RandomCopying,
  SelectiveCopying,
)
from birdie.vocab import Vocabulary
from common.config import check_keys, did_you_mean
from common.errors import UserError

TASKS: dict[str, type[Task]] = {
  task.name: task
  for task in (
    PhoneBook,
    CompactPhoneBook,
    AssociativeRecall,
    SelectiveCopying,
    MambaSelectiveCopying,
    RandomCopying,
    Induction,
    StoryInfilling,
    Squad,
  )
}


def make_task(
  name: str,
  settings: Mapping[str, Any],
  vocab: Vocabulary,
  *,
  tokenizer: Any = None,
  **others: Any,
) -> Task:
  """A task by its name.

  Args:
    name: a key of `TASKS`.
    settings: see the task's attributes; sizes may be a number or the least and
      the most.
    vocab: special tokens.
    tokenizer: for tasks of text; see `common.data.tokenizers`.
    **others: fields that are no settings, such as a text to cut from.

  Raises:
    UserError: for an unknown name, key or value: nothing is ignored.
  """
  if name not in TASKS:
    raise UserError(f"task {name!r} is unknown{did_you_mean(name, TASKS)}")
  task = TASKS[name]
  check_keys(settings, settings_of(task), what=name)
  if tokenizer is not None:
    others |= {"encode": tokenizer.encode, "decode": tokenizer.decode}
  return task(vocab=vocab, **settings, **others)
