"""The original's image embeddings, computed once and kept for all stages.

    targets/targets.json                      what they are of
    targets/00000-of-00020.array_record       in the order of the images

Students are compared with them in every epoch. With them on disk, 2 MB an image
at 1024 pixels in bfloat16, the original runs only where its features count.
"""

import hashlib
import itertools
import logging
import math
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from common import files
from common.errors import UserError
from common.parallel import to_host, wait_for_all
from common.tree import names
from slimsam.data import Targets, image_batches
from slimsam.encoder import DTYPES, Compute, encode
from slimsam.run import First, Model, Run

log = logging.getLogger(__name__)
FOLDER, FILE = "targets", "targets.json"
FILE_BYTES = 2**30  # of a file of embeddings, about


def kept_targets(run: Run, original: Model) -> Targets:
  """The original's embeddings of the images that slim.

  They are computed on the mesh by all processes where the run's folder has
  none. A folder of them is whole: it gets its name at the end.

  Args:
    run: whose folder keeps them.
    original: what students are compared with.

  Raises:
    UserError: for embeddings of other images or by another teacher, for a file
      that is damaged, and for a disk that has no place for them.
  """
  source = First(run.train, run.config.data.images)
  facts = _facts(source, original, run.config.distill.teacher_dtype)
  folder = run.folder / FOLDER
  if not folder.exists():
    _compute(run, source, original, folder, facts)
  _check(folder, facts)
  targets = _targets(folder, facts)
  targets.check()
  return targets


def _facts(source: First, original: Model, dtype: str) -> dict[str, Any]:
  """What the embeddings are, as `targets.json` says it."""
  cfg = original.settings.encoder
  shape = [cfg.grid, cfg.grid, cfg.out]
  return {
    "data": source.fingerprint,
    "teacher": fingerprint(original),
    "dtype": dtype,
    "shape": shape,
    "count": len(source),
    "per_file": max(FILE_BYTES // _bytes(shape, dtype), 1),
  }


def _bytes(shape: Sequence[int], dtype: str) -> int:
  return math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize


def fingerprint(model: Model) -> str:
  """A hash of an image encoder: its sizes and its parameters."""
  sizes = repr(model.settings.encoder).encode()
  digest = hashlib.blake2b(sizes, digest_size=16)
  paths = jax.tree.leaves(names(model.encoder))
  for path, leaf in zip(paths, jax.tree.leaves(model.encoder), strict=True):
    digest.update(f"{path};{leaf.shape};".encode())
    digest.update(np.ascontiguousarray(leaf, np.float32).data)
  return digest.hexdigest()


def _targets(folder: pathlib.Path, facts: dict[str, Any]) -> Targets:
  count, per_file = facts["count"], facts["per_file"]
  total = -(-count // per_file)
  return Targets(
    tuple(
      str(folder / f"{i:05}-of-{total:05}.array_record") for i in range(total)
    ),
    per_file,
    count,
    tuple(facts["shape"]),
    facts["dtype"],
    _remedy(folder),
  )


def _remedy(folder: pathlib.Path) -> str:
  return f"delete {folder} to have it made anew"


def _check(folder: pathlib.Path, facts: dict[str, Any]) -> None:
  """Refuses embeddings that are not those of this run."""
  file = folder / FILE
  try:
    found = files.read_json(file)
  except UserError as error:
    raise UserError(f"{error}; {_remedy(folder)}") from None
  for name, value in facts.items():
    if found.get(name) != value:
      raise UserError(
        f"{file}: {name} is {found.get(name)!r}, but this run's is {value!r}: "
        f"{_remedy(folder)}"
      )


def _compute(
  run: Run,
  source: First,
  original: Model,
  folder: pathlib.Path,
  facts: dict[str, Any],
) -> None:
  """Every process computes, the first one writes."""
  new = folder.with_name(f"{folder.name}.new")
  _check_room(run.folder, facts)
  made = _embeddings(run, source, original)
  if jax.process_index() > 0:
    for _ in made:
      pass
  else:
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    _write(new, _targets(new, facts), made)
    files.write_json(new / FILE, facts)
    new.replace(folder)
  wait_for_all("targets written")


def _write(
  folder: pathlib.Path, targets: Targets, embeddings: Iterable[np.ndarray]
) -> None:
  from array_record.python.array_record_module import ArrayRecordWriter

  rows, total = enumerate(embeddings, 1), len(targets)
  for file in targets.files:
    # Compressing takes ten times as long and saves a fifth.
    writer = ArrayRecordWriter(file, "group_size:1,uncompressed")
    for done, row in itertools.islice(rows, targets.per_file):
      writer.write(row.tobytes())
      if 10 * done // total > 10 * (done - 1) // total:
        log.info("%s: %d of %d embeddings", folder.name, done, total)
    writer.close()


def _check_room(folder: pathlib.Path, facts: dict[str, Any]) -> None:
  """Refuses on every process what a disk has no place for."""
  needed = facts["count"] * _bytes(facts["shape"], facts["dtype"])
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise UserError(
      f"{folder}: distill.cache_targets needs {needed / 1e9:.1f} GB, and "
      f"{free / 1e9:.1f} GB are free: make room or set it to False"
    )
  log.info("%s: the teacher's embeddings, %.3g GB", folder, needed / 1e9)


def _embeddings(
  run: Run, source: First, original: Model
) -> Iterator[np.ndarray]:
  """Of each image, [g g c]; on every process all of them."""
  cfg, data = original.settings.encoder, run.config.data
  dtype = DTYPES[run.config.distill.teacher_dtype]
  params, left = run.teacher(original.encoder), len(source)

  @jax.jit
  def embed(params: Any, images: Any) -> Any:
    return encode(params, images, cfg, Compute(dtype))

  for batch in image_batches(
    source, cfg.image_size, rows=data.rows, sharding=run.sharding,
    threads=data.threads,
  ):  # fmt: skip
    with jax.set_mesh(run.mesh):
      made = embed(params, batch["images"])
    yield from to_host(made)[:left]
    left -= data.rows
