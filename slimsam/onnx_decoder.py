"""Prompt encoder and mask decoder as the ONNX graph that segment-anything
exports: its inputs, its outputs, their names and what they mean.

    image_embeddings [1 c g g]
    point_coords [1 n 2]           x and y, pixels of the padded image
    point_labels [1 n]             1, 0; 2 and 3: corners of a box; -1: no point
    mask_input [1 1 4g 4g]         logits, such as an earlier low_res_masks
    has_mask_input [1]             1, or 0 where the mask is to be ignored
    orig_im_size [2]               height and width of the original image
 -> masks [1 m height width]       logits, of the original image
    iou_predictions [1 m]
    low_res_masks [1 m 4g 4g]

All are float32. Where a prompt has no box, a point with label -1 is to be added
to it. All masks come, first that of prompts which are not ambiguous; or the
best one.

# n points, t tokens, g patches along a side, k places (g g), h heads, e width
# of a head, m masks

References:
  `segment_anything/utils/onnx.py` and `scripts/export_onnx_model.py` of Segment
  Anything's authors; `slimsam.prompts`, `slimsam.decoder`, `slimsam.preprocess`
"""

import math
from typing import Any

import numpy as np

from slimsam import prompts
from slimsam.decoder import CONV_EPSILON
from slimsam.onnx_graph import FLOAT, INT64, Graph, Input, Value
from slimsam.settings import SamSettings

# With 3 points or more a prompt is not ambiguous. A box is two, and one point
# is two with the one that is none.
_AMBIGUOUS = 2.5
_FAR = 1000.0  # more than predicted qualities differ
PyTree = Any


def decoder_graph(
  params: PyTree, settings: SamSettings, *, single_mask: bool = False
) -> Graph:
  """The graph, with the weights.

  Args:
    params: the model's.
    settings: its sizes.
    single_mask: one mask comes: of 3 points or more the first, else the best
      of the others by its predicted IoU.
  """
  cfg, masks = settings.encoder, settings.decoder.num_masks + 1
  grid, side = cfg.grid, 4 * cfg.grid
  graph = Graph({n: params[n] for n in ("prompt_encoder", "mask_decoder")})
  embeddings = graph.input("image_embeddings", (1, cfg.out, grid, grid))
  points = graph.input("point_coords", (1, "num_points", 2))
  labels = graph.input("point_labels", (1, "num_points"))
  mask = graph.input("mask_input", (1, 1, side, side))
  has_mask = graph.input("has_mask_input", (1,))
  original = graph.input("orig_im_size", (2,))

  own = (
    graph.weight(f"mask_decoder/{name}", lambda tokens: tokens[None])
    for name in ("iou_token", "mask_tokens")
  )
  sparse = _sparse(graph, points, labels, cfg.image_size)
  tokens = graph.op("Concat", *own, sparse, axis=1)
  image = graph.transpose(graph.reshape(embeddings, 0, 0, -1), 0, 2, 1)
  image = graph.op("Add", image, _dense(graph, mask, has_mask))
  places = _grid_positions(graph, grid)
  tokens, image = _transform(graph, settings, tokens, image, places)
  logits, iou = _answer(graph, settings, tokens, image)
  if single_mask:
    logits, iou = _best(graph, logits, iou, points, masks)
    masks = 1
  whole = _upscale(graph, logits, original, masks, cfg.image_size)
  graph.output("masks", whole, (1, masks, "height", "width"))
  graph.output("iou_predictions", iou, (1, masks))
  graph.output("low_res_masks", logits, (1, masks, side, side))
  return graph


def _sparse(graph: Graph, points: Value, labels: Value, size: int) -> Value:
  """Tokens of points, [1 n c]; see `slimsam.prompts.encode_labelled`."""
  moved = graph.op("Add", points, 0.5)
  places = _fourier(graph, graph.op("Div", moved, float(size)))
  index = graph.op("Cast", graph.op("Clip", labels, 0.0, 3.0), to=INT64)
  kinds = graph.weight("prompt_encoder/points")
  kinds = graph.op("Gather", kinds, index, axis=0)
  labels = graph.reshape(labels, 0, 0, 1)

  def has(label: int) -> Value:
    return graph.op("Equal", labels, float(label))

  made = graph.op("Add", places, kinds)
  made = graph.op("Where", has(prompts.IGNORED), 0.0, made)
  none = graph.weight("prompt_encoder/not_a_point")
  return graph.op("Where", has(prompts.NO_POINT), none, made)


def _dense(graph: Graph, mask: Value, has_mask: Value) -> Value:
  """The dense embedding of a mask, or of none: [1 k c] or [c]."""
  own, x = "prompt_encoder/masks", mask
  for i in ("1", "2"):
    x = graph.channels_last(graph.conv(x, f"{own}/conv{i}", stride=2))
    x = graph.gelu(graph.norm(x, f"{own}/norm{i}", prompts.EPSILON))
    x = x if i == "2" else graph.channels_first(x)
  x = graph.dense(x, f"{own}/conv3")
  (width,) = graph.shape_of(f"{own}/conv3/bias")
  return graph.op(
    "Where",
    graph.op("Greater", has_mask, 0.0),
    graph.reshape(x, 0, -1, width),
    graph.weight("prompt_encoder/no_mask"),
  )


def _grid_positions(graph: Graph, grid: int) -> Value:
  """Positions of the patches' centres, [1 k c]."""
  places = (np.arange(grid) + 0.5) / grid
  y, x = np.meshgrid(places, places, indexing="ij")
  unit = np.stack([x, y], axis=-1).reshape(1, -1, 2)
  return _fourier(graph, unit)


def _fourier(graph: Graph, unit: Input) -> Value:
  """[… 2] in parts of the image -> [… c]."""
  centred = graph.op("Sub", graph.op("Mul", unit, 2.0), 1.0)
  turns = graph.op("MatMul", centred, graph.weight("prompt_encoder/gaussian"))
  angles = graph.op("Mul", turns, 2 * math.pi)
  return graph.op(
    "Concat", graph.op("Sin", angles), graph.op("Cos", angles), axis=-1
  )


def _transform(
  graph: Graph,
  settings: SamSettings,
  tokens: Value,
  image: Value,
  places: Value,
) -> tuple[Value, Value]:
  """The two-way transformer, on tokens [1 t c] and image [1 k c]."""
  cfg = settings.decoder
  epsilon = 1e-6 if cfg.epsilon == "hf" else 1e-5
  first = tokens  # the tokens' own positions

  def add(a: Value, b: Value) -> Value:
    return graph.op("Add", a, b)

  for i in range(cfg.depth):
    own = f"mask_decoder/layers/{i}"
    if i == 0:
      tokens = _attention(graph, f"{own}/self_attn", tokens, tokens, tokens)
    else:
      query = add(tokens, first)
      mixed = _attention(graph, f"{own}/self_attn", query, query, tokens)
      tokens = add(tokens, mixed)
    tokens = graph.norm(tokens, f"{own}/norm1", epsilon)
    query, placed = add(tokens, first), add(image, places)
    mixed = _attention(graph, f"{own}/token_to_image", query, placed, image)
    tokens = graph.norm(add(tokens, mixed), f"{own}/norm2", epsilon)
    hidden = graph.op("Relu", graph.dense(tokens, f"{own}/mlp/lin1"))
    tokens = add(tokens, graph.dense(hidden, f"{own}/mlp/lin2"))
    tokens = graph.norm(tokens, f"{own}/norm3", epsilon)
    query = add(tokens, first)
    mixed = _attention(graph, f"{own}/image_to_token", placed, query, tokens)
    image = graph.norm(add(image, mixed), f"{own}/norm4", epsilon)
  query, placed = add(tokens, first), add(image, places)
  mixed = _attention(graph, "mask_decoder/final_attn", query, placed, image)
  tokens = graph.norm(add(tokens, mixed), "mask_decoder/norm_final", 1e-5)
  return tokens, image


def _attention(
  graph: Graph, own: str, query: Value, key: Value, value: Value
) -> Value:
  """[1 t c], [1 k c] -> [1 t c]."""
  heads, head = graph.shape_of(f"{own}/q/bias")

  def split(name: str, x: Value, *axes: int) -> Value:
    made = graph.reshape(graph.dense(x, f"{own}/{name}"), 0, 0, heads, head)
    return graph.transpose(made, *axes)

  q = graph.op("Mul", split("q", query, 0, 2, 1, 3), head**-0.5)
  k, v = split("k", key, 0, 2, 3, 1), split("v", value, 0, 2, 1, 3)
  weights = graph.op("Softmax", graph.op("MatMul", q, k), axis=-1)
  mixed = graph.transpose(graph.op("MatMul", weights, v), 0, 2, 1, 3)
  return graph.dense(graph.reshape(mixed, 0, 0, heads * head), f"{own}/out")


def _answer(
  graph: Graph, settings: SamSettings, tokens: Value, image: Value
) -> tuple[Value, Value]:
  """Logits [1 m 4g 4g], and predicted IoU [1 m]."""
  cfg, grid = settings.decoder, settings.encoder.grid
  width, masks = settings.encoder.out, cfg.num_masks + 1

  def mlp(token: int, name: str, depth: int) -> Value:
    x = graph.op("Gather", tokens, token, axis=1)
    for i in range(depth):
      x = graph.dense(x, f"mask_decoder/{name}/{i}")
      x = x if i == depth - 1 else graph.op("Relu", x)
    return x

  iou = mlp(0, "iou_head", cfg.iou_depth)
  weights = graph.op(
    "Concat", *(mlp(1 + i, f"hyper/{i}", 3) for i in range(masks)), axis=0
  )
  own = "mask_decoder/upscale"
  x = graph.reshape(graph.transpose(image, 0, 2, 1), 0, 0, grid, grid)
  x = graph.channels_last(graph.doubled(x, f"{own}/conv1"))
  x = graph.channels_first(graph.norm(x, f"{own}/norm", CONV_EPSILON))
  x = graph.gelu(graph.doubled(graph.gelu(x), f"{own}/conv2"))
  logits = graph.op("MatMul", weights, graph.reshape(x, width // 8, -1))
  return graph.reshape(logits, 1, masks, 4 * grid, 4 * grid), iou


def _best(
  graph: Graph, logits: Value, iou: Value, points: Value, masks: int
) -> tuple[Value, Value]:
  """The one mask: logits [1 1 4g 4g], and its predicted IoU [1 1]."""
  count = graph.op("Gather", graph.op("Shape", points), 1, axis=0)
  count = graph.op("Cast", count, to=FLOAT)
  away = [_FAR] + [0.0] * (masks - 1)
  moved = graph.op("Mul", graph.op("Sub", count, _AMBIGUOUS), away)
  best = graph.op("ArgMax", graph.op("Add", iou, moved), axis=1, keepdims=0)
  chosen, quality = (graph.op("Gather", x, best, axis=1) for x in (logits, iou))
  return chosen, quality


def _upscale(
  graph: Graph, logits: Value, original: Value, masks: int, size: int
) -> Value:
  """Logits [1 m h w] of the original; see `slimsam.preprocess.upscale`."""

  def resized(x: Value, sizes: Input) -> Value:
    return graph.op(
      "Resize", x, None, None, sizes,
      mode="linear", coordinate_transformation_mode="half_pixel",
    )  # fmt: skip

  square = resized(logits, [1, masks, size, size])
  whole = graph.op("Cast", original, to=INT64)
  filled = resized_shape(graph, whole, size)
  cropped = graph.op("Slice", square, [0, 0], filled, [2, 3])
  return resized(cropped, graph.op("Concat", [1, masks], whole, axis=0))


def resized_shape(graph: Graph, original: Value, size: int) -> Value:
  """Height and width of what the image fills of the model's square.

  Exact, so that it is `slimsam.preprocess.resized_shape` for Segment Anything's
  1024; for a square of, say, 1000, where float64 misses some halves, rarely one
  pixel more or less.

  Args:
    graph: to be added to.
    original: height and width of the image, int64 [2].
    size: of the square.

  Returns:
    int64 [2].
  """
  longest = graph.op("ReduceMax", original)
  # Each side times size / longest, rounded half up, in whole numbers.
  twice = graph.op("Add", graph.op("Mul", original, 2 * size), longest)
  filled = graph.op("Div", twice, graph.op("Mul", longest, 2))
  return graph.op("Max", filled, 1)
