"""Generation from what a model keeps of its prefix.

The prefix is read once, in both directions. All that a recurrent model keeps of
it is each layer's forward state, [n] floats a sequence (and Hawk the last three
inputs of its convolution), whatever the prefix's length; the reverse half keeps
nothing, for behind the prefix its gate is closed. A Transformer keeps keys and
values of every token. Then one token at a time, beginning with GEN (paper,
section 3.1).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
BUCKET = 64  # prompt lengths are padded to multiples, so that few compile


@flax.struct.dataclass
class DecodeState:
  """What a sequence has read so far.

  Attributes:
    layers: see `LanguageModel.empty_state`.
    position: int32 [b], tokens read.
  """

  layers: PyTree
  position: jax.Array


def empty_state(model: Any, batch: int, capacity: int = 0) -> DecodeState:
  """The state before any token; `capacity` as in `prefill`."""
  return DecodeState(
    model.empty_state(batch, capacity), jnp.zeros(batch, jnp.int32)
  )


def state_bytes(model: Any, capacity: int) -> int:
  """Bytes that a sequence's state takes, with room for `capacity` tokens."""
  shapes = jax.eval_shape(lambda: model.empty_state(1, capacity))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def _unsharded(model: Any) -> Any:
  # A run may have cut time over a mesh axis; one step cannot be cut.
  return model.clone(seq_axis=None)


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacity")
def prefill(
  model: Any,
  params: PyTree,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  capacity: int = 0,
) -> DecodeState:
  """Reads prefixes of unequal lengths.

  With `prefix_mode="paper"` a prefix's last token sees the one behind it, so
  the padding must be GEN and there must be some behind every prefix, as
  `pad_prompts` makes it. With "strict" the padding may be anything.

  Args:
    model: a module of `birdie.models`.
    params: its parameters.
    tokens: int32 [b p], padded on the right.
    lengths: int32 [b], 0 for an empty prefix.
    capacity: tokens that will be read in all, prefix and GEN too. A Transformer
      keeps no more; the others need not know.

  Returns:
    The state before GEN.
  """
  batch, length = tokens.shape
  places = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
  real = places < lengths[:, None]
  _, layers = _unsharded(model).apply(
    {"params": params},
    tokens,
    real.astype(jnp.int32),
    places,
    real,
    decode_state=empty_state(model, batch, max(capacity, length)).layers,
  )
  return DecodeState(layers, lengths)


@functools.partial(jax.jit, static_argnums=0)
def decode_step(
  model: Any, params: PyTree, state: DecodeState, token: jax.Array
) -> tuple[jax.Array, DecodeState]:
  """Reads one token a sequence.

  Args:
    model: a module of `birdie.models`.
    params: its parameters.
    state: what was read before.
    token: int32 [b].

  Returns:
    Logits float32 [b v] of the token that follows, and the new state. Where a
    Transformer has no more room (`capacity` of `prefill`) the logits are NaN.
  """
  ones = jnp.ones((token.shape[0], 1), jnp.int32)
  logits, layers = _unsharded(model).apply(
    {"params": params},
    token[:, None],
    ones,
    state.position[:, None],
    ones == 0,
    decode_state=state.layers,
  )
  logits = logits[:, 0]
  room = model.room(state.layers)
  if room is not None:
    logits = jnp.where(state.position[:, None] < room, logits, jnp.nan)
  return logits, DecodeState(layers, state.position + 1)


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def sample(
  logits: jax.Array,
  key: jax.Array,
  *,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> jax.Array:
  """Draws the next tokens.

  Args:
    logits: [b v].
    key: of the draw.
    temperature: 0 takes the best token.
    top_k: only among the k best; 0 is all.
    top_p: only among the fewest that together have this probability.

  Returns:
    int32 [b].
  """
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # The best stays 0, however low the temperature.
  best = jnp.max(logits, axis=-1, keepdims=True)
  logits = (logits - best) / temperature
  if 0 < top_k < logits.shape[-1]:
    kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    # Those before which less than top_p has been gathered.
    count = jnp.sum(jnp.cumsum(probs, -1) - probs < top_p, -1, keepdims=True)
    least = jnp.take_along_axis(ordered, jnp.maximum(count, 1) - 1, axis=-1)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@functools.partial(
  jax.jit,
  static_argnames=("model", "max_new_tokens", "temperature", "top_k", "top_p"),
)
def _generate(
  model, params, tokens, lengths, gen, stop, key, *,
  max_new_tokens, temperature, top_k, top_p,
):  # fmt: skip
  """[b max_new_tokens] int32 and how many of them count, [b]."""
  batch = tokens.shape[0]
  capacity = tokens.shape[1] + max_new_tokens
  state = prefill(model, params, tokens, lengths, capacity=capacity)
  out = jnp.zeros((batch, max_new_tokens), jnp.int32)

  def going(carry):
    i, _, _, _, done, _ = carry
    return (i < max_new_tokens) & ~jnp.all(done)

  def body(carry):
    i, state, token, out, done, counts = carry
    logits, state = decode_step(model, params, state, token)
    token = sample(
      logits,
      jax.random.fold_in(key, i),
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
    )
    out = out.at[:, i].set(jnp.where(done, 0, token))
    done = done | jnp.isin(token, stop)
    counts = counts + ~done
    return i + 1, state, token, out, done, counts

  start = (
    0,
    state,
    jnp.full(batch, gen, jnp.int32),
    out,
    jnp.zeros(batch, bool),
    jnp.zeros(batch, jnp.int32),
  )
  _, _, _, out, _, counts = jax.lax.while_loop(going, body, start)
  return out, counts


def generate(
  model: Any,
  params: PyTree,
  prompts: Sequence[np.ndarray],
  *,
  gen: int,
  max_new_tokens: int,
  stop: int | Sequence[int] = (),
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
) -> list[np.ndarray]:
  """Continues prompts, all in one compiled program.

  Args:
    model: a module of `birdie.models`.
    params: its parameters.
    prompts: int arrays, of any lengths, empty ones too.
    gen: the token that begins generation.
    max_new_tokens: at most this many each.
    stop: tokens that end a continuation and are not part of it.
    temperature: see `sample`.
    top_k: see `sample`.
    top_p: see `sample`.
    seed: of the draws.

  Returns:
    int32 arrays.
  """
  tokens, lengths = pad_prompts(prompts, gen=gen)
  out, counts = _generate(
    model,
    params,
    tokens,
    lengths,
    gen,
    np.atleast_1d(np.asarray(stop, np.int32)),
    jax.random.key(seed),
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
  )
  return [row[:n] for row, n in zip(np.asarray(out), np.asarray(counts))]


def stream(
  model: Any,
  params: PyTree,
  prompt: np.ndarray,
  *,
  gen: int,
  max_new_tokens: int,
  stop: int | Sequence[int] = (),
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
) -> Iterator[int]:
  """As `generate` for one prompt, token by token as they come."""
  tokens, lengths = pad_prompts([prompt], gen=gen)
  capacity = tokens.shape[1] + max_new_tokens
  state = prefill(model, params, tokens, lengths, capacity=capacity)
  stops = set(np.atleast_1d(stop).tolist())
  token, key = jnp.full(1, gen, jnp.int32), jax.random.key(seed)
  for i in range(max_new_tokens):
    logits, state = decode_step(model, params, state, token)
    token = sample(
      logits,
      jax.random.fold_in(key, i),
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
    )
    value = int(token[0])
    if value in stops:
      return
    yield value


def pad_prompts(
  prompts: Sequence[np.ndarray], *, gen: int
) -> tuple[np.ndarray, np.ndarray]:
  """Makes one array of prompts.

  Args:
    prompts: int arrays, of any lengths, empty ones too.
    gen: the token that begins generation; it follows every prompt.

  Returns:
    int32 [b p], p a multiple of `BUCKET`, and the prompts' lengths, int32 [b].
  """
  lengths = np.array([len(p) for p in prompts], np.int32)
  size = (int(lengths.max(initial=0)) // BUCKET + 1) * BUCKET
  tokens = np.full((len(prompts), size), gen, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  return tokens, lengths
