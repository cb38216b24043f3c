"""One way through the experts, as a model of its own.

# l expert layers, k experts

A path names an expert for every expert layer, the encoder's first. With the
other experts left out, the model costs what a plain Transformer costs, and is
one: `export_dense` writes it down as that.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from common.parallel.experts import mean_expert
from thor.layers import Array
from thor.settings import PATTERNS, Settings

PyTree = Any


def take_path(
  params: PyTree, settings: Settings, path: Array
) -> tuple[PyTree, Settings]:
  """The model with one expert a layer.

  Args:
    params: of a model with experts.
    settings: its.
    path: int [l]; may be traced.

  Returns:
    Parameters and settings of a model with `experts=1`.
  """
  encoder, _ = settings.expert_layers
  parts = {"encoder": path[:encoder], "decoder": path[encoder:]}

  def take(stack: PyTree, side: str, places: np.ndarray) -> PyTree:
    chosen = parts[side][places]
    blocks = jnp.arange(len(places))
    return jax.tree.map(lambda leaf: leaf[blocks, chosen][:, None], stack)

  return _with_stacks(params, settings, take), _of_one(settings)


def mean_weights(params: PyTree, settings: Settings) -> tuple[PyTree, Settings]:
  """The model whose experts are the mean of the weights; see `take_path`."""

  def take(stack: PyTree, side: str, places: np.ndarray) -> PyTree:
    del side, places
    return jax.vmap(mean_expert)(stack)

  return _with_stacks(params, settings, take), _of_one(settings)


def keep_experts(
  params: PyTree, settings: Settings, kept: Sequence[int]
) -> tuple[PyTree, Settings]:
  """The model with some of its experts, the same in every layer.

  A model that was trained with draws needs no further training for that.

  Args:
    params: of a model with experts.
    settings: its.
    kept: which experts; the first of them is number 0 from then on.

  Raises:
    UserError: for none, the same twice, one that is not there, and gates, which
      know all of theirs.
  """
  wanted = list(kept)
  known = set(range(settings.experts))
  if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= known:
    raise UserError(
      f"kept={wanted}: name experts from 0 to {settings.experts - 1}, at least "
      "one and none twice"
    )
  if settings.gated:
    raise UserError("a model with gates needs all of its experts")
  index = np.array(wanted)

  def take(stack: PyTree, side: str, places: np.ndarray) -> PyTree:
    del side, places
    return jax.tree.map(lambda leaf: leaf[:, index], stack)

  made = _with_stacks(params, settings, take)
  return made, dataclasses.replace(settings, experts=len(wanted))


def _of_one(settings: Settings) -> Settings:
  return dataclasses.replace(settings, experts=1, gated=False)


def _with_stacks(
  params: PyTree,
  settings: Settings,
  take: Callable[[PyTree, str, np.ndarray], PyTree],
) -> PyTree:
  """Other experts: `take(stack, side, numbers of its layers)`."""
  made = dict(params)
  for side in ("encoder", "decoder"):
    layers = dict(params[side]["layers"])
    names = [name for name in layers if "experts" in layers[name]]
    for used, name in enumerate(sorted(names, key=_number)):
      stack = {part: layers[name]["experts"][part] for part in ("up", "down")}
      blocks = stack["up"]["kernel"].shape[0]
      places = np.arange(blocks) * len(names) + used
      layers[name] = {**layers[name], "experts": take(stack, side, places)}
    made[side] = {**params[side], "layers": layers}
  return made


def _number(name: str) -> int:
  return int(name.removeprefix("layer_"))


def layers_of(params: PyTree, side: str) -> list[dict]:
  """The parameters of each layer of "encoder" or "decoder", in order."""
  stacked = params[side]["layers"]
  blocks = jax.tree.leaves(stacked)[0].shape[0]
  return [
    jax.tree.map(operator.itemgetter(i), stacked[name])
    for i in range(blocks)
    for name in sorted(stacked, key=_number)
  ]


def from_layers(
  layers: Sequence[Mapping[str, Any]], settings: Settings
) -> dict:
  """The reverse of `layers_of`: `{"layer_0": …}`, with an axis of blocks."""
  pattern, blocks = settings.blocks(len(layers))
  period = len(pattern)
  return {
    f"layer_{i}": jax.tree.map(
      lambda *leaves: jnp.stack(leaves),
      *[layers[block * period + i] for block in range(blocks)],
    )
    for i in range(period)
  }


def export_dense(
  params: PyTree, settings: Settings, path: Sequence[int] | Array
) -> tuple[PyTree, Settings]:
  """One path as a plain Transformer.

  Args:
    params: of a model with experts.
    settings: its.
    path: [l], the expert of every expert layer, the encoder's first.

  Returns:
    Parameters without stacks of experts, and settings without a pattern.

  Raises:
    UserError: for a path of another length, or an expert that is not there.
  """
  places = np.asarray(path, np.int64)
  count = sum(settings.expert_layers)
  if places.shape != (count,):
    raise UserError(
      f"a path of {places.size} experts, but {count} layers have some: name "
      "one for each"
    )
  if count and not set(places.tolist()) <= set(range(settings.experts)):
    raise UserError(
      f"path={places.tolist()}: experts are numbered from 0 to "
      f"{settings.experts - 1}"
    )
  if settings.gated:
    raise UserError("a model with gates has no fixed path to export")
  params, settings = take_path(params, settings, jnp.asarray(places))
  plain = dataclasses.replace(settings, pattern=PATTERNS["none"])
  made = dict(params)
  for side in ("encoder", "decoder"):
    layers = [_plain(layer) for layer in layers_of(params, side)]
    made[side] = {**params[side], "layers": from_layers(layers, plain)}
  return made, plain


def _plain(layer: dict) -> dict:
  if "experts" not in layer:
    return layer
  layer = dict(layer)
  stack = layer.pop("experts")
  return layer | {"feed_forward": jax.tree.map(lambda leaf: leaf[0], stack)}
