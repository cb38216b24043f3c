"""The image encoder as an ONNX graph; see `slimsam.encoder`.

    images [b 3 size size] -> image_embeddings [b c g g]

Both are float32. An image is scaled, normalised and padded before, as
`slimsam.preprocess.preprocess` does; its channels come first here.

# b images, g patches along a side, s the side of what a patch attends over, n
# windows of all images, h heads, e width of a head, d width of the embedding
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from slimsam.attention import fitted
from slimsam.encoder import EPSILON
from slimsam.onnx_graph import Graph, Value
from slimsam.settings import EncoderSettings, SamSettings

PyTree = Any


def encoder_graph(params: PyTree, settings: SamSettings) -> Graph:
  """The graph, with the weights.

  Args:
    params: the model's.
    settings: its sizes.
  """
  cfg = settings.encoder
  graph = Graph(params["image_encoder"])
  size, grid = cfg.image_size, cfg.grid
  images = graph.input("images", ("batch", 3, size, size))
  x = graph.conv(images, "patch_embed", stride=cfg.patch)
  x = graph.op("Add", graph.channels_last(x), graph.weight("pos_embed"))
  for i in range(cfg.depth):
    x = _block(graph, x, i, cfg)
  x = _neck(graph, x, cfg)
  graph.output("image_embeddings", x, ("batch", cfg.out, grid, grid))
  return graph


def _block(graph: Graph, x: Value, i: int, cfg: EncoderSettings) -> Value:
  """A block, [b g g d] -> [b g g d]."""
  own = f"blocks/{i}"
  normed = graph.norm(x, f"{own}/norm1", EPSILON)
  mixed = _attend(graph, normed, i, cfg)
  x = graph.op("Add", x, graph.dense(mixed, f"{own}/attn/proj"))
  normed = graph.norm(x, f"{own}/norm2", EPSILON)
  hidden = graph.gelu(graph.dense(normed, f"{own}/mlp/lin1"))
  return graph.op("Add", x, graph.dense(hidden, f"{own}/mlp/lin2"))


def _attend(graph: Graph, x: Value, i: int, cfg: EncoderSettings) -> Value:
  """Attention of a block, [b g g d] -> [b g g he]."""
  own, grid, side = f"blocks/{i}/attn", cfg.grid, cfg.span(i)
  heads, head, width = cfg.heads, cfg.head_width(i), cfg.qkv_widths[i]
  qkv = graph.linear(x, f"{own}/qkv", 3 * width)
  windows = -(-grid // side)
  extra = windows * side - grid
  if extra:
    # Before the bias is added: what pads a window has it for queries, keys and
    # values.
    qkv = graph.op("Pad", qkv, [0, 0, 0, 0, 0, extra, extra, 0])
  qkv = graph.plus_bias(qkv, f"{own}/qkv")
  if not cfg.is_global(i):
    qkv = graph.reshape(qkv, 0, windows, side, windows, side, 3 * width)
    qkv = graph.transpose(qkv, 0, 1, 3, 2, 4, 5)
  qkv = graph.reshape(qkv, -1, side * side, 3, heads, head)
  qkv = graph.transpose(qkv, 2, 0, 3, 1, 4)
  q, k, v = (graph.op("Gather", qkv, j, axis=0) for j in range(3))
  mixed = _mixed(graph, q, k, v, own, side, head)
  mixed = graph.transpose(mixed, 0, 2, 1, 3)  # [n ss h e]
  if cfg.is_global(i):
    return graph.reshape(mixed, -1, grid, grid, width)
  mixed = graph.reshape(mixed, -1, windows, windows, side, side, width)
  mixed = graph.transpose(mixed, 0, 1, 3, 2, 4, 5)
  mixed = graph.reshape(mixed, 0, windows * side, windows * side, width)
  if extra:
    mixed = graph.op("Slice", mixed, [0, 0], [grid, grid], [1, 2])
  return mixed


def _mixed(
  graph: Graph, q: Value, k: Value, v: Value, own: str, side: int, head: int
) -> Value:
  """Values by the weights of their keys, with relative positions.

  Args:
    graph: to be added to.
    q: [n h ss e], as are k and v.
    k: keys.
    v: values.
    own: where the tables are.
    side: s.
    head: e.

  Returns:
    [n h ss e].
  """
  places = graph.reshape(q, 0, 0, side, side, head)
  by_row = graph.op(
    "MatMul", places, _by_distance(graph, f"{own}/rel_pos_h", side)
  )
  turned = graph.op(
    "MatMul",
    graph.transpose(places, 0, 1, 3, 2, 4),
    _by_distance(graph, f"{own}/rel_pos_w", side),
  )
  by_column = graph.transpose(turned, 0, 1, 3, 2, 4)
  scaled = graph.op("Mul", q, head**-0.5)
  logits = graph.op("MatMul", scaled, graph.transpose(k, 0, 1, 3, 2))
  logits = graph.reshape(logits, 0, 0, side * side, side, side)
  for term, dims in ((by_row, (side, 1)), (by_column, (1, side))):
    logits = graph.op(
      "Add", logits, graph.reshape(term, 0, 0, side * side, *dims)
    )
  logits = graph.reshape(logits, 0, 0, side * side, side * side)
  return graph.op("MatMul", graph.op("Softmax", logits, axis=-1), v)


def _by_distance(graph: Graph, table: str, side: int) -> Value:
  """A table as [query e key], by the distance of the two along an axis."""
  places = np.arange(side)
  distances = places[:, None] - places[None] + side - 1
  rows = graph.weight(table, lambda t: np.asarray(fitted(jnp.asarray(t), side)))
  return graph.transpose(graph.op("Gather", rows, distances, axis=0), 0, 2, 1)


def _neck(graph: Graph, x: Value, cfg: EncoderSettings) -> Value:
  """[b g g d] -> [b c g g]."""
  x = graph.linear(x, "neck/conv1", cfg.out)
  x = graph.channels_first(graph.norm(x, "neck/norm1", EPSILON))
  x = graph.channels_last(graph.conv(x, "neck/conv2", pad=1))
  return graph.channels_first(graph.norm(x, "neck/norm2", EPSILON))
