"""Masks of prompts in an image, as `segment_anything`'s predictor gives them.

    predictor = Predictor.load("sam_vit_b_01ec64.pth")
    predictor.set_image(image)
    masks, scores, logits = predictor.predict([[300, 200]], [1])

Letters in shapes: h w of the image, p prompts, n points of each, m masks of
each, s = 4g the side of the model's logits, k masks that are enlarged at once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.config import did_you_mean
from common.errors import UserError
from common.nn import Array
from slimsam.encoder import DTYPES, PLAIN, Compute
from slimsam.model import Masks, Sam
from slimsam.preprocess import (
  check_boxes,
  check_points,
  preprocess,
  resized_shape,
  scale_boxes,
  scale_points,
  upscaling,
)
from slimsam.settings import SamSettings

PyTree = Any
FORMATS = ("RGB", "BGR")
_PROMPTS = 64  # at once: the decoder takes about 20 MB for each
_PIXELS = 2**25  # of enlarged masks at once: 128 MB of float32
_STEP = 64  # sides of images are rounded up to it


class Frame(NamedTuple):
  """How mask logits become as large as an image.

  Sides are rounded up: images of nearly one size, and all crops of an image,
  share a program.

  Attributes:
    rows: float32 [h' s], zero from row h on.
    columns: float32 [w' s], zero from row w on.
    sides: int32 [2], h and w.
  """

  rows: Array
  columns: Array
  sides: Array


def make_frame(original: tuple[int, int], settings: SamSettings) -> Frame:
  """The frame of an image.

  Args:
    original: its height and width.
    settings: of the model that made the logits.
  """
  cfg = settings.encoder

  def matrix(side: int, resized: int) -> Array:
    made = upscaling(4 * cfg.grid, cfg.image_size, resized, side)
    return jnp.asarray(np.pad(made, ((0, -side % _STEP), (0, 0))))

  rows, columns = map(
    matrix, original, resized_shape(*original, cfg.image_size)
  )
  return Frame(rows, columns, jnp.asarray(original, jnp.int32))


def enlarge(logits: Array, frame: Frame) -> Array:
  """Logits in the size of the image, as by `slimsam.preprocess.upscale`.

  Args:
    logits: [k s s].
    frame: of the image.

  Returns:
    float32 [k h' w'], zero outside of the image.
  """
  highest = jax.lax.Precision.HIGHEST
  wide = jnp.einsum("kst,wt->ksw", logits, frame.columns, precision=highest)
  return jnp.einsum("ksw,hs->khw", wide, frame.rows, precision=highest)


def chunks(count: int, frame: Frame, size: int) -> list[np.ndarray]:
  """Indices of `count` masks, in parts that fit memory at full size.

  Args:
    count: how many.
    frame: of the image.
    size: of the parts, where memory allows it. All are equally long: the last
      is filled up with the last index.
  """
  pixels = len(frame.rows) * len(frame.columns)
  size = max(min(_PIXELS // pixels, size), 1)
  return [
    np.minimum(np.arange(start, start + size), count - 1)
    for start in range(0, count, size)
  ]


def _bucket(count: int) -> int:
  """The next power of two."""
  return 1 << max(count - 1, 0).bit_length()


class Predictor:
  """Answers prompts in one image after the other.

  Names, arguments and results are those of `segment_anything.SamPredictor`,
  with NumPy arrays throughout; `predict_batch` is further. An image is encoded
  once, whatever is asked of it. A program is compiled for each number of
  points, and for numbers of prompts rounded up to powers of two.

  Args:
    params: the model's; see `slimsam.weights.load_model`.
    settings: its sizes.
    compute: how it runs.
  """

  def __init__(
    self, params: PyTree, settings: SamSettings, compute: Compute = PLAIN
  ):
    self.settings = settings
    self._sam = Sam(settings, compute)
    self._params = jax.device_put(params)
    self.reset_image()

  @classmethod
  def load(cls, path: Any, dtype: str = "float32") -> "Predictor":
    """A predictor of a model on disk; see `slimsam.weights.load_model`.

    Raises:
      UserError: for what is no model, or an unknown dtype.
    """
    from slimsam.weights import load_model

    if dtype not in DTYPES:
      raise UserError(f"dtype={dtype!r}{did_you_mean(dtype, DTYPES)}")
    return cls(*load_model(path), Compute(dtype=DTYPES[dtype]))

  def reset_image(self) -> None:
    """Forgets the image."""
    self._features: Array | None = None
    self._frame: Frame | None = None
    self.original_size: tuple[int, int] | None = None

  @property
  def is_image_set(self) -> bool:
    """Whether there is an image to ask about."""
    return self._features is not None

  @property
  def features(self) -> Array:
    """The image's embedding on the device, [1 g g c]."""
    return self._set()[0]

  @property
  def frame(self) -> Frame:
    """How logits become as large as the image."""
    return self._set()[1]

  def get_image_embedding(self) -> np.ndarray:
    """The image's embedding, channels first as in `segment_anything`.

    Returns:
      float32 [1 c g g].
    """
    wide = np.asarray(self.features.astype(jnp.float32))
    return np.moveaxis(wide, -1, 1)

  def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
    """Encodes an image, which further prompts are about.

    Args:
      image: uint8 [h w 3].
      image_format: order of the colours: "RGB", or "BGR" as OpenCV reads.

    Raises:
      UserError: for another array or format.
    """
    self.reset_image()
    if image_format not in FORMATS:
      hint = did_you_mean(image_format, FORMATS)
      raise UserError(f"image_format={image_format!r}{hint}")
    image = np.asarray(image)
    if image_format == "BGR":
      image = image[..., ::-1]
    made = preprocess(image, self.settings.encoder.image_size)
    self._features = _encode(self._sam, self._params, made[None])
    self.original_size = image.shape[0], image.shape[1]
    self._frame = make_frame(self.original_size, self.settings)

  def predict(
    self,
    point_coords: Any = None,
    point_labels: Any = None,
    box: Any = None,
    mask_input: Any = None,
    multimask_output: bool = True,
    return_logits: bool = False,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of one prompt: points, a box, a mask, or several of these.

    Args:
      point_coords: [n 2], x and y in pixels of the image.
      point_labels: [n], 1 on the object, 0 beside it.
      box: [4], left, top, right, bottom in pixels.
      mask_input: [1 s s], logits of an earlier answer.
      multimask_output: several masks, for prompts that may mean several
        things, or the one.
      return_logits: masks as numbers, which are above 0 inside.

    Returns:
      Masks bool [m h w], or their logits float32; the quality that the model
      predicts for each, float32 [m]; and the model's own logits float32
      [m s s], which may be the next `mask_input`.

    Raises:
      UserError: before an image is set, without a prompt, or for a prompt
        that the image cannot have.
    """
    original = self._size()
    if point_coords is not None and point_labels is not None:
      # Here, so that messages count points without a prompt's number.
      points, labels = check_points(point_coords, point_labels, original)
      if points.ndim != 2:
        raise UserError(
          f"point_coords {list(points.shape)} must be [n 2]: predict_batch "
          "takes several prompts"
        )
      point_coords, point_labels = points[None], labels[None]
    if box is not None:
      box = check_boxes([box], original)
      if box.ndim != 2:
        raise UserError(
          f"box {list(box.shape[1:])} must be [4], left, top, right and "
          "bottom: predict_batch takes several boxes"
        )
    masks, scores, logits = self.predict_batch(
      point_coords, point_labels, box, mask_input, multimask_output,
      return_logits,
    )  # fmt: skip
    return masks[0], scores[0], logits[0]

  def predict_batch(
    self,
    points: Any = None,
    labels: Any = None,
    boxes: Any = None,
    masks: Any = None,
    multimask_output: bool = True,
    return_logits: bool = False,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of many prompts in the image.

    Args:
      points: [p n 2]; see `predict`. A prompt with fewer points than others
        cannot be filled up: a filler would change its masks. Ask apart.
      labels: [p n].
      boxes: [p 4].
      masks: [p s s].
      multimask_output: several masks for each.
      return_logits: masks as numbers.

    Returns:
      As `predict`: [p m h w], [p m] and [p m s s].

    Raises:
      UserError: as `predict`.
    """
    h, w = self._size()
    given = self._checked(points, labels, boxes, masks)
    count = len(next(iter(given.values())))
    side = 4 * self.settings.encoder.grid
    each = self.settings.decoder.num_masks if multimask_output else 1
    kind = np.float32 if return_logits else np.bool_
    found = np.empty((count, each, h, w), kind)
    scores = np.empty((count, each), np.float32)
    logits = np.empty((count, each, side, side), np.float32)
    for start in range(0, count, _PROMPTS):
      part = slice(start, start + _PROMPTS)
      own = {name: _filled(values[part]) for name, values in given.items()}
      made = self.decode(**own, multimask=multimask_output)
      used = len(scores[part])
      scores[part] = np.asarray(made.iou)[:used]
      logits[part] = np.asarray(made.logits)[:used]
      self._enlarge(made.logits, found[part])
    return found, scores, logits

  def decode(
    self,
    points: Any = None,
    labels: Any = None,
    boxes: Any = None,
    masks: Any = None,
    *,
    multimask: bool = True,
  ) -> Masks:
    """Masks of prompts at the model's size, which stay on the device.

    Args:
      points: [p n 2], in pixels of the image; none of this is checked.
      labels: [p n].
      boxes: [p 4].
      masks: [p s s].
      multimask: several masks for each.

    Returns:
      Logits float32 [p m s s] and scores [p m].
    """
    original, size = self._size(), self.settings.encoder.image_size
    if points is not None:
      points = scale_points(points, original, size)
    if boxes is not None:
      boxes = scale_boxes(boxes, original, size)
    return _decode(
      self._sam, self._params, self.features, points, labels, boxes, masks,
      multimask=multimask,
    )  # fmt: skip

  def _enlarge(self, logits: Array, out: np.ndarray) -> None:
    """Writes masks [p m s s] into [p m h w], of which p may be smaller."""
    flat = out.reshape(-1, *out.shape[2:])
    h, w = out.shape[2:]
    start = 0
    for index in chunks(len(flat), self.frame, _bucket(len(flat))):
      made = _enlarged(logits, index, self.frame, binary=out.dtype == bool)
      used = min(len(index), len(flat) - start)
      flat[start : start + used] = np.asarray(made)[:used, :h, :w]
      start += used

  def _set(self) -> tuple[Array, Frame]:
    if self._features is None or self._frame is None:
      raise UserError("no image is set: call set_image first")
    return self._features, self._frame

  def _size(self) -> tuple[int, int]:
    if self.original_size is None:
      raise UserError("no image is set: call set_image first")
    return self.original_size

  def _checked(
    self, points: Any, labels: Any, boxes: Any, masks: Any
  ) -> dict[str, np.ndarray]:
    """The prompts that are given, by name."""
    original, side = self._size(), 4 * self.settings.encoder.grid
    if (points is None) != (labels is None):
      raise UserError("points and labels go together: give both or neither")
    if points is None and boxes is None and masks is None:
      raise UserError(
        "there is no prompt: give points with labels, a box, or a mask"
      )
    given: dict[str, np.ndarray] = {}
    if points is not None:
      given["points"], given["labels"] = check_points(points, labels, original)
      _check_shape("points", given["points"], (None, None, 2), "[p n 2]")
    if boxes is not None:
      given["boxes"] = check_boxes(boxes, original)
      _check_shape("boxes", given["boxes"], (None, 4), "[p 4]")
    if masks is not None:
      given["masks"] = _check_masks(masks, side)
    counts = {name: len(values) for name, values in given.items()}
    if len(set(counts.values())) > 1:
      shown = ", ".join(f"{n} {name}" for name, n in counts.items())
      raise UserError(f"{shown}: give as many of each, one for each prompt")
    return given


def _check_masks(masks: Any, side: int) -> np.ndarray:
  masks = np.asarray(masks)
  form = f"[p {side} {side}]: logits of an earlier answer"
  if masks.dtype.kind not in "iuf":
    raise UserError(f"masks are {masks.dtype}, and must be {form}")
  _check_shape("masks", masks, (None, side, side), form)
  if not np.isfinite(masks).all():
    raise UserError("masks hold numbers that are not finite: mend them")
  return masks.astype(np.float32)


def _check_shape(
  name: str, array: np.ndarray, shape: tuple[int | None, ...], form: str
) -> None:
  if array.ndim != len(shape) or any(
    wanted not in (None, n) for n, wanted in zip(array.shape, shape)
  ):
    raise UserError(f"{name} {list(array.shape)} must be {form}")


def _filled(rows: np.ndarray) -> np.ndarray:
  """Rows, the last repeated until there are a power of two."""
  extra = _bucket(len(rows)) - len(rows)
  return np.concatenate([rows, np.repeat(rows[-1:], extra, axis=0)])


@functools.partial(jax.jit, static_argnums=0)
def _encode(sam: Sam, params: PyTree, images: Array) -> Array:
  made: Any = sam.apply({"params": params}, images, method=sam.encode)
  return made


@functools.partial(jax.jit, static_argnums=0, static_argnames="multimask")
def _decode(
  sam: Sam,
  params: PyTree,
  features: Array,
  points: Array | None,
  labels: Array | None,
  boxes: Array | None,
  masks: Array | None,
  *,
  multimask: bool,
) -> Masks:
  """Of one image, and without its axis."""
  prompts = (points, labels, boxes, masks)
  made: Any = sam.apply(
    {"params": params},
    features,
    *(None if one is None else one[None] for one in prompts),
    multimask=multimask,
    method=sam.decode,
  )
  return Masks(made.logits[0], made.iou[0])


@functools.partial(jax.jit, static_argnames="binary")
def _enlarged(
  logits: Array, index: Array, frame: Frame, *, binary: bool
) -> Array:
  """Some of the masks [p m s s], by their place among all: [k h' w']."""
  flat = logits.reshape(-1, *logits.shape[2:])
  full = enlarge(flat[index], frame)
  return full > 0 if binary else full
