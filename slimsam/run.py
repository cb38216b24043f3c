"""What the trainings of a run share: data, devices, and how it is judged."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from common import config as config_lib
from common.parallel import from_host, make_mesh, on_device, shardings
from common.places import check_holds_no_comparison
from slimsam import weights
from slimsam.data import rows_sharding, train_loader
from slimsam.encoder import DTYPES
from slimsam.evaluation import Evaluator
from slimsam.model import RULES, Sam
from slimsam.settings import SamSettings
from slimsam.sources import Remembered, Sample, Source, make_source

PyTree = Any
# (the image encoder's parameters, the model's sizes) -> scalars
Measure = Callable[[PyTree, SamSettings], dict[str, float]]

BEGUN = ("*/checkpoints/*", "*/keep.json", "targets/*")  # what a run leaves
MODEL = "model"  # a finished training's, in its folder
# Keys that may change when a run is resumed: batches and numbers stay the same,
# but for the order of sums on another mesh.
FREE = ("log", "checkpoint", "profile", "compile_cache", "data.workers",
        "data.threads", "data.prefetch", "data.memory", "mesh", "export",
        "data.source.max_pixels", "data.source.follow_links",
        "distill.cache_targets", "compare")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
  """A SAM.

  Attributes:
    params: NumPy.
    settings: its sizes.
  """

  params: PyTree
  settings: SamSettings

  @property
  def encoder(self) -> PyTree:
    """The image encoder's parameters."""
    return self.params["image_encoder"]

  def with_encoder(self, encoder: PyTree) -> PyTree:
    """All parameters, with another image encoder."""
    return {**self.params, "image_encoder": encoder}

  @classmethod
  def load(cls, path: Any) -> "Model":
    """Reads a model; see `slimsam.weights.load_model`."""
    return cls(*weights.load_model(path))


class First(Source):
  """The first samples of a source; 0: all."""

  def __init__(self, source: Source, limit: int):
    self._source, self._limit = source, limit
    self.labelled = source.labelled

  def __len__(self) -> int:
    return min(self._limit or len(self._source), len(self._source))

  @property
  def fingerprint(self) -> str:
    return f"{self._source.fingerprint}/{len(self)}"

  def read(self, i: int) -> Sample:
    return self._source[i]


class Run:
  """A run's folder, data and devices.

  Args:
    config: see `configs/slimsam.py`.
    folder: the run's; made if missing.

  Attributes:
    train, valid: images.
    mesh: devices.
    sharding: of batches.

  Raises:
    UserError: for data that is missing, a mesh that does not fit, and a folder
      that holds a run of another configuration.
  """

  def __init__(self, config: Any, folder: pathlib.Path):
    self.config, self.folder = config, folder
    self.mesh = make_mesh(config.mesh.to_dict())
    self.sharding = rows_sharding(self.mesh)
    self.train, self.valid = (
      Remembered(make_source(config.data.source, split), config.data.memory)
      for split in ("train", "valid")
    )
    check_holds_no_comparison(folder)
    if any(any(folder.glob(pattern)) for pattern in BEGUN):
      config_lib.check_resume(folder, config, free=FREE)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      config_lib.save_config(folder, config)

  @property
  def facts(self) -> dict[str, Any]:
    """What must not change while the run goes on."""
    return {
      "data_hash": self.train.fingerprint,
      "valid_hash": self.valid.fingerprint,
    }

  def loader(self, source: Source, example: Any, rows: int) -> Any:
    """Training batches; see `slimsam.data.train_loader`."""
    return train_loader(
      source,
      example,
      rows=rows,
      seed=self.config.seed,
      sharding=self.sharding,
      prefetch=self.config.data.prefetch,
      workers=self.config.data.workers,
      threads=self.config.data.threads,
    )

  def placed(self, tree: PyTree) -> PyTree:
    """NumPy parameters, where the mesh has them."""
    places = shardings(tree, self.mesh, RULES)
    like = jax.tree.map(
      lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
      tree,
      places,
    )
    return from_host(tree, like)

  def teacher(self, encoder: PyTree) -> PyTree:
    """NumPy parameters of an image encoder that is followed, where the mesh has
    them, in the dtype that it computes in.
    """
    return self.placed(as_teacher(encoder, self.config.distill.teacher_dtype))

  def evaluator(self, teacher: Model | None = None) -> Evaluator:
    """Judges masks of the validation images, also against a teacher's."""
    cfg = self.config.evaluation
    own = None if teacher is None else (teacher.params, Sam(teacher.settings))
    with alone():
      return Evaluator(
        self.valid,
        prompts=cfg.prompts,
        choices=cfg.choices,
        teacher=own,
        limit=cfg.images,
      )

  def measure(self, original: Model) -> Measure:
    """Judges image encoders: masks and `valid/mse`, the mean squared error of
    the image embedding against the original's.

    Every process does so alone, on a device of its own.
    """
    judge = self.evaluator(original)

    def measure(encoder: PyTree, settings: SamSettings) -> dict[str, float]:
      with alone():
        params = original.with_encoder(encoder)
        return judge(params, Sam(settings)).scalars()

    return measure


def as_teacher(encoder: PyTree, dtype: str) -> PyTree:
  """Parameters in the dtype that a teacher computes in, but for its norms.

  Args:
    encoder: arrays of any kind.
    dtype: one of `slimsam.encoder.DTYPES`.
  """

  def cast(path: Any, a: Any) -> Any:
    is_norm = any("norm" in str(part) for part in path)
    return a if is_norm else a.astype(DTYPES[dtype])

  return jax.tree_util.tree_map_with_path(cast, encoder)


def alone() -> Any:
  """A context in which jit runs on one device of this process."""
  return on_device(jax.local_devices()[0])
