"""Masks side by side: what several models find for one point of an image."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from common import plots
from slimsam import rle
from slimsam.evaluation import (
  PROMPTS_AT_ONCE,
  answer_prompts,
  encode_image,
)
from slimsam.masks import centre, iou
from slimsam.model import Sam
from slimsam.preprocess import preprocess, scale_points, upscale
from slimsam.sources import Sample

if TYPE_CHECKING:
  from matplotlib.axes import Axes

  from slimsam.run import Model

_TRUE, _FOUND, _POINT = plots.COLOURS[2], plots.COLOURS[0], plots.COLOURS[1]
_OPAQUE = 0.5  # how much a mask covers
_SIDE, _HEAD = 1.45, 0.35  # inches of a picture, and above the first row


class Question(NamedTuple):
  """An image and a point in it.

  Attributes:
    name: of the image.
    image: uint8 [h w 3].
    point: float32 [2], x and y in pixels.
    truth: bool [h w].
  """

  name: str
  image: np.ndarray
  point: np.ndarray
  truth: np.ndarray


def questions(samples: Iterable[Sample], count: int) -> list[Question]:
  """The first images that have masks; of each the largest one, by its point.

  Args:
    samples: images; the rest is not read.
    count: images at most.
  """
  made = []
  samples = iter(samples)
  while len(made) < count and (sample := next(samples, None)) is not None:
    if not sample.annotations:
      continue
    masks = [rle.decode(own.rle) for own in sample.annotations]
    largest = int(np.argmax([np.count_nonzero(mask) for mask in masks]))
    truth, point = masks[largest], sample.annotations[largest].point
    point = np.array(centre(truth) if point is None else point, np.float32)
    made.append(Question(sample.name, sample.image, point, truth))
  return made


def answers(model: "Model", asked: Sequence[Question]) -> list[np.ndarray]:
  """The one mask that a model finds for each point, bool [h w]."""
  sam, size = Sam(model.settings), model.settings.encoder.image_size
  made = []
  for one in asked:
    image, (h, w) = preprocess(one.image, size), one.image.shape[:2]
    embedding = encode_image(sam, model.params, jnp.asarray(image)[None])
    point = np.asarray(scale_points(one.point[None], (h, w), size))
    points = np.resize(point, (1, PROMPTS_AT_ONCE, 2))
    logits, _ = answer_prompts(sam, model.params, embedding, points)
    made.append(np.asarray(upscale(logits[0, 0, :1], size, (h, w)) > 0)[0])
  return made


def draw(
  asked: Sequence[Question], found: Mapping[str, Sequence[np.ndarray]]
) -> bytes:
  """A sheet: a row for each image, a column for each model.

  The first column has the image with its point, the second the true mask; the
  numbers are the IoU with it, in percent.

  Args:
    asked: at least one.
    found: by model, a mask for each image.

  Returns:
    A PNG.
  """
  titles = ("image", "truth", *found)
  with plots.sheet(_SIDE * len(titles), _SIDE * len(asked) + _HEAD) as figure:
    grid: Any = figure.subplots(len(asked), len(titles), squeeze=False)
    for axes in grid.flat:
      axes.axis("off")
    for axes, title in zip(grid[0], titles):
      axes.set_title(plots.plain(title), fontsize=8, loc="center")
    for row, one in enumerate(asked):
      _picture(grid[row, 0], one, one.image)
      _picture(grid[row, 1], one, painted(one.image, one.truth, _TRUE))
      for axes, masks in zip(grid[row, 2:], found.values()):
        mask = masks[row]
        _picture(axes, one, painted(one.image, mask, _FOUND))
        axes.text(
          0.04, 0.05, f"{100 * float(iou(mask, one.truth)):.0f}", fontsize=7,
          transform=axes.transAxes,
          bbox={"facecolor": "white", "linewidth": 0, "pad": 1},
        )  # fmt: skip
    return plots.png(figure)


def _picture(axes: "Axes", one: Question, image: np.ndarray) -> None:
  axes.imshow(image, interpolation="nearest")
  axes.plot(
    *one.point, marker="*", markersize=8, markerfacecolor=_POINT,
    markeredgecolor="white", markeredgewidth=0.6,
  )  # fmt: skip


def painted(image: np.ndarray, mask: np.ndarray, colour: str) -> np.ndarray:
  """An image under a mask whose border is opaque.

  Args:
    image: uint8 [h w 3].
    mask: bool [h w].
    colour: such as "#0072b2".

  Returns:
    uint8 [h w 3].
  """
  paint = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
  wide = np.pad(mask, 1)
  inner = mask & wide[:-2, 1:-1] & wide[2:, 1:-1]
  inner = inner & wide[1:-1, :-2] & wide[1:-1, 2:]
  cover = np.where(inner, _OPAQUE, mask.astype(float))[..., None]
  return np.rint(image * (1 - cover) + paint * cover).astype(np.uint8)
