"""Layers that more than one project computes, as functions of their arrays.

Parameters are dicts: `kernel` and `bias`, or `scale` and `bias`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = Mapping[str, Any]


def plus(x: Array, bias: Array) -> Array:
  """Adds to the last axes of x."""
  return x + bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)


def dense(params: Params, x: Array) -> Array:
  """[... d] -> [... f]."""
  return plus(x @ params["kernel"], params["bias"])


def norm(params: Params, x: Array, *, epsilon: float = 1e-5) -> Array:
  """Layer normalization over the last axis, in float32."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
  scaled = centred * jax.lax.rsqrt(variance + epsilon)
  scale = params["scale"].reshape((1,) * (x.ndim - 1) + (-1,))
  return plus(scaled * scale, params["bias"]).astype(x.dtype)


def norm_init(width: int) -> dict[str, Array]:
  """The identity's scale and offset."""
  return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


class Uniform(NamedTuple):
  """An array to be drawn, uniform in (-bound, bound)."""

  shape: tuple[int, ...]
  bound: float


class Normal(NamedTuple):
  """An array to be drawn, normal with mean 0."""

  shape: tuple[int, ...]
  std: float = 1.0


def drawn(key: Array, tree: Any, *, at_once: bool = True) -> Any:
  """A tree with its `Uniform`s and `Normal`s drawn.

  Args:
    key: of the draws.
    tree: of `Uniform`s, `Normal`s and arrays.
    at_once: cut all of them from one draw: many small ones compile slowly.
      Not for arrays that no device should hold as a whole.
  """
  leaves, form = jax.tree.flatten(tree, is_leaf=_is_asked)
  asked = [leaf for leaf in leaves if _is_asked(leaf)]
  if at_once:
    ends = np.cumsum([math.prod(one.shape) for one in asked])
    flat = jax.random.uniform(key, (int(ends[-1]),), minval=-1, maxval=1)
    values = iter(jnp.split(flat, ends[:-1]))
  else:
    keys = jax.random.split(key, len(asked))
    values = iter(
      jax.random.uniform(own, one.shape, minval=-1, maxval=1)
      for own, one in zip(keys, asked)
    )
  made = [
    _scaled(next(values).reshape(leaf.shape), leaf) if _is_asked(leaf) else leaf
    for leaf in leaves
  ]
  return jax.tree.unflatten(form, made)


def _scaled(uniform: Array, asked: Uniform | Normal) -> Array:
  if isinstance(asked, Uniform):
    return uniform * asked.bound
  # The range holds -1, where the inverse is not finite.
  inside = jnp.maximum(uniform, jnp.nextafter(jnp.float32(-1), jnp.float32(0)))
  return jax.lax.erf_inv(inside) * (2**0.5 * asked.std)


def _is_asked(leaf: Any) -> bool:
  return isinstance(leaf, Uniform | Normal)
