"""A bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

log = logging.getLogger(__name__)


class ProgressBar:
  """Shows steps done, rate, loss and time left.

  On a terminal it is a bar on standard error, in process 0 only. Each update
  is also a log line: that goes to files, and to standard error where that is
  no terminal. Other log lines appear above the bar.

  Args:
    total: the run's number of steps.
    name: what the bar is called.
    loss_key: which scalar to show.
    quiet: no bar.
  """

  def __init__(
    self,
    total: int,
    *,
    name: str = "",
    loss_key: str = "train/loss",
    quiet: bool = False,
  ):
    self._quiet = quiet
    self._total = total
    self._name = name
    self._loss_key = loss_key
    self._bar: Any = None
    self._filtered: list[logging.Handler] = []
    self._since: tuple[float, int] | None = None

  def start(self, step: int) -> None:
    """Call before the first step; `step` is where the run starts from."""
    self._since = (time.monotonic(), step)
    if self._quiet or jax.process_index() != 0:
      return
    if self._bar is None and sys.stderr.isatty():
      from tqdm import tqdm

      self._bar = tqdm(
        total=self._total,
        initial=step,
        desc=self._name,
        unit="step",
        dynamic_ncols=True,
      )
      for handler in logging.getLogger().handlers:
        if getattr(handler, "stream", None) is sys.stderr:
          handler.addFilter(self._make_room)
          self._filtered.append(handler)

  def _make_room(self, record: logging.LogRecord) -> bool:
    """Filters a terminal's log lines: wipes the bar for those to be shown."""
    if record.name == __name__:
      return False
    self._bar.clear()
    return True

  def update(self, step: int, scalars: Mapping[str, float]) -> None:
    """Shows the state after `step`."""
    if self._since is None:
      self.start(0)
    loss = scalars.get(self._loss_key)
    shown = "" if loss is None else f"loss {loss:.4f}"
    if self._bar is not None:
      self._bar.set_postfix_str(shown, refresh=False)
      self._bar.update(step - self._bar.n)
    parts = [f"step {step} of {self._total}", shown, self._rate(step)]
    log.info("%s", "  ".join(filter(None, parts)))

  def _rate(self, step: int) -> str:
    assert self._since is not None
    start, first = self._since
    seconds = time.monotonic() - start
    if step <= first or seconds <= 0:
      return ""
    rate = (step - first) / seconds
    minutes, rest = divmod(round((self._total - step) / rate), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{rate:.2f} steps/s  {hours}:{minutes:02d}:{rest:02d} left"

  def close(self) -> None:
    """Leaves the bar as it is."""
    for handler in self._filtered:
      handler.removeFilter(self._make_room)
    self._filtered.clear()
    if self._bar is not None:
      self._bar.close()
      self._bar = None

  def __enter__(self) -> "ProgressBar":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
