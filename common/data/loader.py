"""Batches made ahead, in order, with one number as position.

Batch k is `fetch(k, arg_of(k))`. A loader makes it in a thread or in worker
processes while the accelerator computes, puts it on the devices and hands it
out. Where it stands is k, so another number of processes or workers continues
from the same number with the same batches.
"""

import collections
import dataclasses
import functools
import math
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import numpy as np

from common.data.workers import Workers, settle
from common.errors import UserError

Batch = Mapping[str, np.ndarray]


def _no_argument(k: int) -> None:
  del k


@dataclasses.dataclass(frozen=True)
class FetchPlan:
  """How batch k is made.

  Attributes:
    fetch: (k, arg) -> this process's rows of batch k, a dict of arrays. A pure
      function; with workers it has to be picklable and is sent once to each.
    arg_of: k -> arg, something small that may change during the run. Evaluated
      in the thread that calls `next`, when batch k is begun.
  """

  fetch: Callable[[int, Any], Batch]
  arg_of: Callable[[int], Any] = _no_argument


class Loader:
  """An iterator over batches 0, 1, 2, ..., without end.

  Nothing is begun before the first `next`. Between two calls of `next`, at most
  `prefetch + workers` batches from the next one on have been begun. It is meant
  for one consuming thread. Use it as a context manager, or close it; one that
  is forgotten closes itself at the program's end.

  Args:
    fetch: how a batch is made; a plain function (k, None) -> batch will do.
    start: the first batch.
    sharding: where arrays go, their rows along its first axis; it is cut to an
      array's rank. Batches stay NumPy arrays if None.
    prefetch: batches made ahead.
    workers: processes that make batches; 0: one thread.

  Raises:
    ValueError: for negative numbers.
  """

  def __init__(
    self,
    fetch: FetchPlan | Callable[[int, Any], Batch],
    *,
    start: int = 0,
    sharding: Any = None,
    prefetch: int = 2,
    workers: int = 0,
  ):
    if min(start, prefetch, workers) < 0:
      raise ValueError(
        f"start={start}, prefetch={prefetch}, workers={workers}: must be >= 0"
      )
    self._plan = fetch if isinstance(fetch, FetchPlan) else FetchPlan(fetch)
    self._next = start
    self._sharding = sharding
    self._ahead = prefetch + workers
    self._workers = workers
    self._pending: collections.deque[futures.Future] = collections.deque()
    self._crew: _Crew | None = None
    self._finalizer: weakref.finalize | None = None
    self._closed = False

  def __iter__(self) -> "Loader":
    return self

  def __next__(self) -> Any:
    """The next batch.

    Raises:
      Exception: what `fetch` raised for it, with a note that names the batch;
        the position stays.
    """
    if self._closed:
      raise RuntimeError("the loader is closed")
    # What is waited for does not count as made ahead.
    self._begin(self._ahead + 1)
    try:
      batch = self._pending[0].result()
    except Exception as error:
      error.add_note(f"while batch {self._next} was made")
      self._drop()
      raise
    self._pending.popleft()
    self._next += 1
    return batch

  def get_state(self) -> dict[str, int]:
    """The index of the batch that `next` returns next."""
    return {"step": self._next}

  def set_state(self, state: Mapping[str, int]) -> None:
    """Goes to a position that `get_state` returned."""
    self._drop()
    self._next = int(state["step"])

  def refresh(self) -> None:
    """Makes all batches that were not handed out again, with new arguments."""
    begun = bool(self._pending)
    self._drop()
    if begun:
      self._begin(self._ahead)

  def close(self) -> None:
    """Stops thread and workers after what they are at; may be called twice."""
    self._closed = True
    self._drop()
    if self._finalizer is not None:
      self._finalizer()

  def __enter__(self) -> "Loader":
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  def _begin(self, count: int) -> None:
    if self._crew is None:
      self._crew = _Crew(self._plan.fetch, self._sharding, self._workers)
      self._finalizer = weakref.finalize(self, self._crew.stop)
    while len(self._pending) < count:
      k = self._next + len(self._pending)
      self._pending.append(self._crew.submit(k, self._plan.arg_of(k)))

  def _drop(self) -> None:
    for pending in self._pending:
      pending.cancel()
    self._pending.clear()


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """Batches 0 to `count` - 1, to be iterated as often as needed.

  Attributes:
    fetch: makes them, as for `Loader`.
    count: how many.
    sharding: where they go; NumPy arrays if None.
    prefetch: batches made ahead.
    workers: processes that make batches; 0: one thread.
  """

  fetch: FetchPlan | Callable[[int, Any], Batch]
  count: int
  sharding: Any = None
  prefetch: int = 2
  workers: int = 0

  def __len__(self) -> int:
    return self.count

  def __iter__(self) -> Iterator[Any]:
    with Loader(
      self.fetch,
      sharding=self.sharding,
      prefetch=min(self.prefetch, max(self.count - 1, 0)),
      workers=self.workers,
    ) as loader:
      for _ in range(self.count):
        yield next(loader)


class _Crew:
  """One daemon thread, and worker processes behind it if asked for.

  The thread makes the batches, or waits for the workers' in the order of k,
  and puts them on the devices.
  """

  def __init__(self, fetch: Callable, sharding: Any, workers: int):
    self._fetch = fetch
    self._place = Placer(sharding)
    self._stopping = False
    self._workers = Workers(fetch, workers) if workers else None
    self._tasks: queue.SimpleQueue = queue.SimpleQueue()
    self._thread = threading.Thread(
      target=self._run, name="loader", daemon=True
    )
    self._thread.start()

  def submit(self, k: int, arg: Any) -> futures.Future:
    """Begins batch k; cancelling the result spares what is not begun."""
    result: futures.Future = futures.Future()
    if self._workers is None:
      make = functools.partial(self._fetch, k, arg)
    else:
      made = self._workers.submit(k, arg)
      result.add_done_callback(lambda r: r.cancelled() and made.cancel())
      make = made.result
    self._tasks.put((result, make))
    return result

  def stop(self) -> None:
    """Waits for what is being made and leaves the rest."""
    self._stopping = True
    self._tasks.put(None)
    if self._workers is not None:
      self._workers.stop()
    if self._thread is not threading.current_thread():
      self._thread.join()

  def _run(self) -> None:
    while (task := self._tasks.get()) is not None:
      result, make = task
      if self._stopping:
        result.cancel()
      settle(result, self._placed, make)
      # Nothing of a batch may stay alive while the thread waits.
      task = result = make = None

  def _placed(self, make: Callable[[], Batch]) -> Any:
    return self._place(make())


class Placer:
  """Puts this process's rows on its devices, as global arrays.

  Args:
    sharding: where, rows along the first axis; it is cut to an array's rank.
      Batches stay as they are if None.
  """

  def __init__(self, sharding: Any):
    self._sharding = sharding
    self._by_rank: dict[int, tuple[Any, int]] = {}

  def __call__(self, batch: Batch) -> Any:
    if self._sharding is None:
      return batch
    import jax

    arrays = {key: np.asarray(value) for key, value in batch.items()}
    if jax.process_count() == 1:  # all at once is faster
      shardings = {k: self._of_rank(a.ndim)[0] for k, a in arrays.items()}
      return jax.device_put(arrays, shardings)
    placed = {}
    for key, array in arrays.items():
      sharding, shares = self._of_rank(array.ndim)
      shape = (array.shape[0] * shares, *array.shape[1:])
      placed[key] = jax.make_array_from_process_local_data(
        sharding, array, shape
      )
    return placed

  def _of_rank(self, rank: int) -> tuple[Any, int]:
    """The sharding for arrays of this rank, and the shares of the rows."""
    import jax

    if rank not in self._by_rank:
      spec = jax.sharding.PartitionSpec(*self._sharding.spec[:rank])
      sharding = jax.sharding.NamedSharding(self._sharding.mesh, spec)
      # Not the number of processes: they share rows where other axes of the
      # mesh span them.
      self._by_rank[rank] = sharding, process_share(sharding)[1]
    return self._by_rank[rank]


def process_share(sharding: Any) -> tuple[int, int]:
  """Which share of a batch's rows this process brings.

  Args:
    sharding: a `NamedSharding` with rows along the first axis.

  Returns:
    (index, count): share `index` of `count` equal ones. (0, 1) for one
    process, and for processes that share all rows. On a mesh that follows the
    links of a TPU slice a share's rows need not lie side by side in the batch:
    they go where the process's devices are.

  Raises:
    UserError: for a mesh on which processes share some of their rows.
  """
  import jax

  axes = sharding.spec[0] if len(sharding.spec) else None
  if not axes:
    return 0, 1
  names = (axes,) if isinstance(axes, str) else axes
  parts = math.prod(sharding.mesh.shape[name] for name in names)
  rows = jax.sharding.NamedSharding(
    sharding.mesh, jax.sharding.PartitionSpec(axes)
  )
  held: dict[int, set[int]] = {}  # of one row a part, by process
  for device, index in rows.devices_indices_map((parts,)).items():
    part = index[0].indices(parts)[0]
    held.setdefault(device.process_index, set()).add(part)
  shares = sorted({tuple(sorted(own)) for own in held.values()})
  if len({len(share) for share in shares}) > 1 or parts != sum(
    len(share) for share in shares
  ):
    raise UserError(
      f"mesh {dict(sharding.mesh.shape)}: processes share some of their rows "
      f"along {'+'.join(names)}; choose other sizes of the axes"
    )
  mine = tuple(sorted(held[jax.process_index()]))
  return shares.index(mine), len(shares)


def row_shares(sharding: Any, axis: int = 0) -> tuple[int, int, int]:
  """How the rows of a batch divide, where they lie along an axis of it.

  Args:
    sharding: a `NamedSharding`, or None.
    axis: that of the rows.

  Returns:
    (index, count, shards): this process brings share `index` of `count`, and
    the devices divide the rows among `shards`. (0, 1, 1) without sharding.
  """
  if sharding is None:
    return 0, 1, 1
  import jax

  names = sharding.spec[axis] if axis < len(sharding.spec) else None
  rows = jax.sharding.NamedSharding(sharding.mesh, jax.P(names))
  axes = (names,) if isinstance(names, str) else names or ()
  shards = math.prod(sharding.mesh.shape[name] for name in axes)
  return *process_share(rows), shards
