"""Randomness as a function: key = fold(seed, name, step).

Nothing here has state, so nothing has to be saved: a resumed run draws what
the uninterrupted run would have drawn.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def name_hash(name: str) -> int:
  """A stable 31-bit hash of a stream's name (Python's `hash` is salted)."""
  digest = hashlib.blake2s(name.encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little") & 0x7FFF_FFFF


def fold_name(key: jax.Array, name: str) -> jax.Array:
  """Returns the key of the stream `name` under `key`."""
  return jax.random.fold_in(key, name_hash(name))


@dataclasses.dataclass(frozen=True)
class RngStreams:
  """Named streams of keys, one key a step.

  Attributes:
    seed: the run's seed.
    names: the streams' names, such as `("dropout", "noise")`.
  """

  seed: int
  names: Sequence[str] = ()

  def __call__(self, step: int | jax.Array) -> dict[str, jax.Array]:
    """Returns `{name: key}` for one step; `step` may be traced."""
    root = jax.random.key(self.seed)
    step = jnp.asarray(step, jnp.uint32)
    return {
      name: jax.random.fold_in(fold_name(root, name), step)
      for name in self.names
    }


def hash_bits(key: jax.Array, shape: Sequence[int], stream: int = 0):
  """Random bits from a hash, for masks.

  Each place's number is mixed with the key by MurmurHash3's finalizer, twice.
  It is no generator for science, but compiles and runs many times faster on a
  CPU than Threefry, and an array that is cut over devices is made where it is.

  Args:
    key: a key of two words, such as `jax.random.key` makes.
    shape: of the result, less than 2^32 numbers.
    stream: another number, other bits.

  Returns:
    Uint32 of that shape.
  """
  words = jax.random.key_data(key).astype(jnp.uint32)
  place = jnp.zeros(shape, jnp.uint32)
  for axis, size in enumerate(shape):
    own = jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis)
    place = place * jnp.uint32(size) + own
  bits = mix_bits(place ^ words[..., 0])
  step = jnp.uint32((stream * 0x9E3779B9) & 0xFFFF_FFFF)
  return mix_bits(bits + (words[..., 1] ^ step))


def mix_bits(x: jax.Array) -> jax.Array:
  """Spreads the bits of each uint32: the finalizer of MurmurHash3."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def np_rng(seed: int, name: str, *counters: int) -> np.random.Generator:
  """A host generator that is a pure function of its arguments.

  Args:
    seed: the run's seed.
    name: the stream's name.
    *counters: at most three non-negative integers, such as (batch, example).

  Returns:
    A `numpy` generator over Philox: the seed and the name make its key, the
    counters the high words of its counter, so streams never overlap.
  """
  if len(counters) > 3:
    raise ValueError(f"at most 3 counters, got {len(counters)}: {counters}")
  digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
  key = np.frombuffer(digest, np.uint64)
  counter = np.zeros(4, np.uint64)
  counter[1 : 1 + len(counters)] = counters
  return np.random.Generator(np.random.Philox(key=key, counter=counter))
