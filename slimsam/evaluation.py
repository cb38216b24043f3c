"""How well a model's masks agree with true ones, and with a teacher's.

# n prompts of an image, m masks of a prompt, h w of the image, s of the logits

The protocol is that of SlimSAM's code, mended: each prompt is one of an
annotation, masks are compared at the size of the image, with a threshold of 0,
and the mean over an image's annotations is averaged over images; but every
image is encoded once, two empty masks agree, and images without annotations are
not counted.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from common.nn import Array
from slimsam import rle
from slimsam.masks import centre
from slimsam.masks import iou as mask_iou
from slimsam.model import Sam
from slimsam.predict import Frame, enlarge, make_frame
from slimsam.preprocess import preprocess, scale_boxes, scale_points
from slimsam.sources import Sample, Source

PyTree = Any
# The annotation's point, the mask's pixel furthest from its border, its box.
PROMPTS = ("point", "center", "box")
# The mask of prompts that are not ambiguous; of the others the one that the
# model itself takes for the best, and the one that truly is.
CHOICES = ("single", "best", "oracle")
PROMPTS_AT_ONCE = 16
# Of some of an image's prompts: masks [n m h w], their predicted IoU [n m], and
# which prompts.
Answer = tuple[np.ndarray, np.ndarray, slice]


class Ious(NamedTuple):
  """How well masks agree.

  Attributes:
    images: of each image the IoU of each prompt, [n].
  """

  images: Sequence[np.ndarray]

  @property
  def mean(self) -> float:
    """Of images, in which each has the mean of its prompts."""
    return float(np.mean([own.mean() for own in self.images]))

  @property
  def mean_of_masks(self) -> float:
    """Of all prompts."""
    return float(np.mean(np.concatenate(self.images)))

  def interval(
    self, *, samples: int = 1000, seed: int = 0
  ) -> tuple[float, float]:
    """The 95 % bootstrap interval of `mean`, images resampled."""
    means = np.array([own.mean() for own in self.images])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(means), size=(samples, len(means)))
    low, high = np.quantile(means[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


class Judged(NamedTuple):
  """How well a model does.

  Attributes:
    ious: by `TRUTH/PROMPT/CHOICE`, such as `gt/point/single`.
    mse: the mean squared error of the image embedding against the teacher's;
      None without a teacher whose embedding has this shape.
  """

  ious: Mapping[str, Ious]
  mse: float | None

  def scalars(self) -> dict[str, float]:
    """Means over images, under `miou/` and `valid/mse`."""
    made = {f"miou/{name}": own.mean for name, own in self.ious.items()}
    return made if self.mse is None else made | {"valid/mse": self.mse}


@dataclasses.dataclass(frozen=True)
class Prompted:
  """The prompts of an image.

  Attributes:
    index: of the image in its source.
    size: height and width.
    codes: of the true masks; see `slimsam.rle`.
    points: by kind of prompt, float32 [n 2].
    boxes: float32 [n 4], x y x y.
  """

  index: int
  size: tuple[int, int]
  codes: tuple[Mapping[str, Any], ...]
  points: Mapping[str, np.ndarray]
  boxes: np.ndarray

  @classmethod
  def of(cls, index: int, sample: Sample) -> "Prompted":
    """The prompts of a sample's annotations; the centre for a missing point."""
    masks = [rle.decode(own.rle) for own in sample.annotations]
    centres = np.array([centre(mask) for mask in masks], np.float32)
    points = centres.copy()
    for i, own in enumerate(sample.annotations):
      if own.point is not None:
        points[i] = own.point
    boxes = np.array(
      [(x, y, x + w, y + h) for x, y, w, h in
       (own.bbox for own in sample.annotations)], np.float32,
    )  # fmt: skip
    return cls(
      index,
      sample.image.shape[:2],
      tuple(own.rle for own in sample.annotations),
      {"point": points, "center": centres},
      boxes,
    )


class _Teacher(NamedTuple):
  """What a teacher finds in an image.

  Attributes:
    embedding: [g g c].
    codes: of its `single` masks, by kind of prompt.
  """

  embedding: np.ndarray
  codes: Mapping[str, list[Any]]


class Evaluator:
  """Compares a model's masks with true ones, and with a teacher's.

  Images are read anew for each model; of a teacher their embeddings are kept,
  4 MB an image at 1024 pixels.

  Args:
    source: of images with masks.
    prompts: kinds of prompts, of `PROMPTS`.
    choices: which mask of a prompt, of `CHOICES`.
    teacher: (parameters, model): its `single` masks of the same prompts are
      a second truth.
    limit: images at most; 0: all.

  Raises:
    UserError: for unknown names, and for images without any mask.
  """

  def __init__(
    self,
    source: Source,
    *,
    prompts: Sequence[str] = PROMPTS,
    choices: Sequence[str] = CHOICES,
    teacher: tuple[PyTree, Sam] | None = None,
    limit: int = 0,
  ):
    for given, known, what in (
      (prompts, PROMPTS, "prompts"), (choices, CHOICES, "choices"),
    ):  # fmt: skip
      for name in given:
        if name not in known:
          raise UserError(f"{what}: {name!r}{did_you_mean(name, known)}")
      if len(set(given)) < len(given):
        raise UserError(f"{what}={tuple(given)}: name each of them once")
    self._prompts, self._choices = tuple(prompts), tuple(choices)
    self._source = source
    self._images = list(_prompted(source, limit))
    if not self._images:
      raise UserError(
        "none of the images has a mask, so that nothing can be judged: name "
        "others, in a run with data.source.valid, such as "
        "data.source.valid.kind='composite'"
      )
    self._teacher: list[_Teacher] | None = None
    if teacher is not None:
      self._teacher = [
        _Teacher(
          np.asarray(embedding[0]),
          {
            kind: [
              rle.encode(mask)
              for masks, _, _ in answers
              for mask in masks[:, 0]
            ]
            for kind, answers in by_kind
          },
        )
        for embedding, by_kind in self._answers(*teacher)
      ]

  @property
  def num_masks(self) -> int:
    """How many true masks there are."""
    return sum(len(own.codes) for own in self._images)

  def __call__(self, params: PyTree, sam: Sam) -> Judged:
    """Judges a model.

    Args:
      params: of the model.
      sam: the model.
    """
    found: dict[str, list[np.ndarray]] = {}
    errors = []
    for image, (embedding, by_kind) in enumerate(self._answers(params, sam)):
      teacher = None if self._teacher is None else self._teacher[image]
      if teacher is not None and teacher.embedding.shape == embedding.shape[1:]:
        errors.append(np.mean(np.square(embedding[0] - teacher.embedding)))
      for kind, answers in by_kind:
        truths: dict[str, Any] = {"gt": self._images[image].codes}
        # A teacher is compared with as it is used.
        if teacher is not None and "single" in self._choices:
          truths["teacher"] = teacher.codes[kind]
        for name, ious in self._agreement(kind, answers, truths).items():
          found.setdefault(name, []).append(ious)
    ious = {name: Ious(images) for name, images in found.items()}
    return Judged(ious, float(np.mean(errors)) if errors else None)

  def _agreement(
    self, kind: str, answers: Iterable[Answer], truths: Mapping[str, Any]
  ) -> dict[str, np.ndarray]:
    """IoU of an image's prompts [n], by `TRUTH/PROMPT/CHOICE`."""
    parts: dict[str, list[np.ndarray]] = {}
    for masks, predicted, place in answers:
      for truth, codes in truths.items():
        made = mask_iou(masks, _stack(codes[place])[:, None])
        for choice in self._choices if truth == "gt" else ("single",):
          name = f"{truth}/{kind}/{choice}"
          parts.setdefault(name, []).append(_chosen(choice, made, predicted))
    return {name: np.concatenate(ious) for name, ious in parts.items()}

  def _answers(
    self, params: PyTree, sam: Sam
  ) -> Iterator[tuple[Array, list[tuple[str, Iterator[Answer]]]]]:
    """Of each image its embedding [1 g g c], and answers by kind of prompt."""
    size = sam.settings.encoder.image_size
    for own in self._images:
      image = preprocess(self._source[own.index].image, size)
      embedding = encode_image(sam, params, jnp.asarray(image)[None])
      yield (
        embedding,
        [
          (kind, self._answer(params, sam, own, embedding, kind))
          for kind in self._prompts
        ],
      )

  def _answer(
    self, params: PyTree, sam: Sam, own: Prompted, embedding: Array, kind: str
  ) -> Iterator[Answer]:
    """Some prompts after the other: masks are as large as the image."""
    size = sam.settings.encoder.image_size
    if kind == "box":
      prompts = np.asarray(scale_boxes(own.boxes, own.size, size))
    else:
      prompts = np.asarray(scale_points(own.points[kind], own.size, size))
    frame, (h, w) = make_frame(own.size, sam.settings), own.size
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
      part = prompts[start : start + PROMPTS_AT_ONCE]
      full = np.resize(part, (PROMPTS_AT_ONCE, part.shape[1]))
      logits, iou = answer_prompts(sam, params, embedding, full[None])
      if self._choices == ("single",):
        logits = logits[:, :, :1]
      large = np.asarray(_enlarged(logits[0], frame))
      yield (
        large[: len(part), :, :h, :w],
        np.asarray(iou[0, : len(part)]),
        slice(start, start + len(part)),
      )


@functools.partial(jax.jit, static_argnums=0)
def encode_image(sam: Sam, params: PyTree, images: Array) -> Array:
  """[b size size 3] -> [b g g c]."""
  return sam.apply({"params": params}, images, method=sam.encode)  # type: ignore


@functools.partial(jax.jit, static_argnums=0)
def answer_prompts(
  sam: Sam, params: PyTree, embeddings: Array, prompts: Array
) -> tuple[Array, Array]:
  """All masks of prompts, the one of those that are not ambiguous first.

  Args:
    sam: the model.
    params: its.
    embeddings: [b g g c].
    prompts: points [b p 2] on objects, or boxes [b p 4]; pixels of the padded
      image.

  Returns:
    Logits [b p m s s], and the IoU that the model predicts, [b p m].
  """
  given: Any = {"boxes": prompts}
  if prompts.shape[-1] == 2:
    labels = jnp.ones((*prompts.shape[:2], 1), jnp.int32)
    given = {"points": prompts[:, :, None], "labels": labels}
  made: Any = sam.apply(
    {"params": params}, embeddings, **given, multimask=None, method=sam.decode
  )
  return made.logits, made.iou


@jax.jit
def _enlarged(logits: Array, frame: Frame) -> Array:
  """[p m s s] -> bool [p m h' w'], one program for nearly equal sizes."""
  large = enlarge(logits.reshape(-1, *logits.shape[2:]), frame) > 0
  return large.reshape(*logits.shape[:2], *large.shape[1:])


def _prompted(source: Source, limit: int) -> Iterator[Prompted]:
  for i in range(len(source)):
    if limit and i >= limit:
      return
    sample = source[i]
    if sample.annotations:
      yield Prompted.of(i, sample)


def _stack(codes: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """Masks [n h w] of codes."""
  return np.stack([rle.decode(code) for code in codes])


def _chosen(choice: str, ious: np.ndarray, predicted: np.ndarray) -> np.ndarray:
  """The IoU of one mask of each prompt, [n]."""
  if choice == "single":
    return ious[:, 0]
  if choice == "oracle":
    return ious[:, 1:].max(axis=1)
  best = predicted[:, 1:].argmax(axis=1)
  return ious[np.arange(len(ious)), 1 + best]
