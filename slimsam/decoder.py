"""The mask decoder, as functions of its parameters.

# b images, p prompts of each, t tokens, k places of the image embedding (g g),
# c its width, h heads, e width of a head, m masks

    iou_token [1 c], mask_tokens [m c]
    layers/I/{self_attn, norm1, token_to_image, norm2, mlp/{lin1, lin2}, norm3,
              image_to_token, norm4}; final_attn, norm_final
    upscale/{conv1 [2 2 c c/4], norm, conv2 [2 2 c/4 c/8]}
    hyper/M/{0, 1, 2}, iou_head/{0, 1, …}

An attention holds {q, k, v}/{kernel [c h e], bias [h e]} and
out/{kernel [h e c], bias [c]}. The image side has a p of 1 until prompts have
changed it: what depends on the image alone is computed once for all of them.
"""

from typing import Any

import einops
import jax
import jax.numpy as jnp

from common.nn import Array, Params, dense, norm, plus
from slimsam.encoder import computed
from slimsam.settings import DecoderSettings, SamSettings

CONV_EPSILON = 1e-6  # of the norm between the transposed convolutions


def decode(
  params: Params,
  settings: SamSettings,
  embeddings: Array,
  positions: Array,
  sparse: Array,
  dense_prompts: Array,
  *,
  multimask: bool | None = True,
  dtype: Any = jnp.float32,
) -> tuple[Array, Array]:
  """Masks of prompts.

  Args:
    params: the decoder's.
    settings: the model's.
    embeddings: [b g g c], of images.
    positions: [g g c]; see `slimsam.prompts.grid_positions`.
    sparse: [b p n c], the prompts' tokens.
    dense_prompts: [b p g g c]; either or both of b and p may be 1.
    multimask: the masks of an ambiguous prompt, else the one of a prompt that
      is not; None: that one, and then the others.
    dtype: of the computation.

  Returns:
    Logits float32 [b p m 4g 4g], and the IoU predicted for each mask, float32
    [b p m]; m is `num_masks`, or 1, or both together.
  """
  cfg = settings.decoder
  params = computed(params, dtype)
  own = jnp.concatenate([params["iou_token"], params["mask_tokens"]])
  own = jnp.broadcast_to(own, (*sparse.shape[:2], *own.shape))
  tokens = jnp.concatenate([own, sparse.astype(dtype)], axis=2)
  image = embeddings[:, None].astype(dtype) + dense_prompts.astype(dtype)
  grid = image.shape[2]
  image = einops.rearrange(image, "b p y x c -> b p (y x) c")
  places = einops.rearrange(positions.astype(dtype), "y x c -> (y x) c")
  tokens, image = _transform(params, cfg, tokens, image, places[None, None])
  first, end = {True: (1, None), False: (0, 1), None: (0, None)}[multimask]
  chosen = slice(first, end)
  iou = _mlp(params["iou_head"], tokens[:, :, 0], cfg.iou_depth)
  weights = jnp.stack(
    [
      _mlp(params["hyper"][str(i)], tokens[:, :, 1 + i], 3)
      for i in range(cfg.num_masks + 1)[chosen]
    ],
    axis=2,
  )
  image = jnp.broadcast_to(image, (*tokens.shape[:2], *image.shape[2:]))
  masks = _masks(params["upscale"], image, weights, grid)
  return masks, iou[..., chosen].astype(jnp.float32)


def _transform(
  params: Params, cfg: DecoderSettings, tokens: Array, image: Array, places: Any
) -> tuple[Array, Array]:
  """The two-way transformer."""
  first = tokens  # the tokens' own positions
  epsilon = 1e-6 if cfg.epsilon == "hf" else 1e-5

  def normed(own: Params, name: str, x: Array, epsilon: float = epsilon):
    return norm(own[name], x, epsilon=epsilon)

  for i in range(cfg.depth):
    own = params["layers"][str(i)]
    if i == 0:
      tokens = _self_attention(own["self_attn"], tokens, tokens, tokens)
    else:
      query = tokens + first
      tokens = tokens + _self_attention(own["self_attn"], query, query, tokens)
    tokens = normed(own, "norm1", tokens)
    tokens = tokens + _to_image(
      own["token_to_image"], tokens + first, image + places, image
    )
    tokens = normed(own, "norm2", tokens)
    hidden = jax.nn.relu(dense(own["mlp"]["lin1"], tokens))
    tokens = normed(own, "norm3", tokens + dense(own["mlp"]["lin2"], hidden))
    image = image + _to_tokens(
      own["image_to_token"], image + places, tokens + first, tokens
    )
    image = normed(own, "norm4", image)
  tokens = tokens + _to_image(
    params["final_attn"], tokens + first, image + places, image
  )
  return normed(params, "norm_final", tokens, 1e-5), image


def _self_attention(
  params: Params, query: Array, key: Array, value: Array
) -> Array:
  """Of tokens, [b p t c]."""
  q, k, v = (
    _heads(params[name], x)
    for name, x in (("q", query), ("k", key), ("v", value))
  )
  weights = jax.nn.softmax(_wide("bphte,bphse->bphts", _scaled(q), k))
  mixed = jnp.einsum("bphts,bphse->bphte", weights.astype(v.dtype), v)
  return _out(params["out"], mixed)


def _to_image(params: Params, query: Array, key: Array, value: Array) -> Array:
  """Tokens attend to the image: [b p t c], [b p k c] -> [b p t c].

  Where every prompt has an image of its own, the layers of keys and values are
  taken to the tokens, which are few: q·(W k) is (q W)·k. What a bias adds to
  all keys alike does not change the weights.
  """
  q = _scaled(_heads(params["q"], query))
  own_k, own_v = params["k"], params["v"]
  if _serves_all(key, query):
    k, v = _heads(own_k, key)[:, 0], _heads(own_v, value)[:, 0]
    weights = jax.nn.softmax(_wide("bphte,bhke->bphtk", q, k))
    mixed = jnp.einsum("bphtk,bhke->bphte", weights.astype(v.dtype), v)
    return _out(params["out"], mixed)
  q = jnp.einsum("bphte,che->bphtc", q, own_k["kernel"])
  weights = jax.nn.softmax(_wide("bphtc,bpkc->bphtk", q, key)).astype(
    value.dtype
  )
  mixed = jnp.einsum("bphtk,bpkc->bphtc", weights, value)
  mixed = jnp.einsum("bphtc,che->bphte", mixed, own_v["kernel"])
  return _out(params["out"], mixed + own_v["bias"][None, None, :, None])


def _to_tokens(params: Params, query: Array, key: Array, value: Array) -> Array:
  """The image attends to tokens: [b p k c], [b p t c] -> [b p k c].

  Here too the layers are taken to the tokens: that of the output always, that
  of the queries where every prompt has an image of its own.
  """
  k, v = (_heads(params[n], x) for n, x in (("k", key), ("v", value)))
  k = _scaled(k)
  own = params["q"]
  if _serves_all(query, key):
    q = _heads(own, query)[:, 0]
    logits = _wide("bhke,bphte->bpkht", q, k)
  else:
    always = _wide("he,bphte->bpht", own["bias"], k)[:, :, None]
    k = jnp.einsum("bphte,che->bphtc", k, own["kernel"])
    logits = _wide("bpkc,bphtc->bpkht", query, k) + always
  weights = jax.nn.softmax(logits).astype(v.dtype)
  out = params["out"]
  v = jnp.einsum("bphte,hec->bphtc", v, out["kernel"])
  return plus(jnp.einsum("bpkht,bphtc->bpkc", weights, v), out["bias"])


def _serves_all(image: Array, tokens: Array) -> bool:
  """Whether an image side that no prompt has changed serves all of them."""
  return image.shape[1] == 1 and tokens.shape[1] != 1


def _heads(params: Params, x: Array) -> Array:
  """[b p t c] -> [b p h t e]."""
  made = jnp.einsum("bptc,che->bphte", x, params["kernel"])
  return made + params["bias"][None, None, :, None]


def _scaled(x: Array) -> Array:
  return x * x.shape[-1] ** -0.5


def _wide(form: str, x: Array, y: Array) -> Array:
  """A product in float32 at least."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(form, x, y, preferred_element_type=wide)


def _out(params: Params, mixed: Array) -> Array:
  """[b p h t e] -> [b p t c]."""
  made = jnp.einsum("bphte,hec->bptc", mixed, params["kernel"])
  return plus(made, params["bias"])


def _mlp(params: Params, x: Array, depth: int) -> Array:
  for i in range(depth):
    x = dense(params[str(i)], x)
    x = jax.nn.relu(x) if i < depth - 1 else x
  return x


def _masks(params: Params, image: Array, weights: Array, grid: int) -> Array:
  """Logits: the image embedding at four times the grid, by each mask's vector.

  Args:
    params: of the transposed convolutions.
    image: [b p k c].
    weights: [b p m c/8].
    grid: g.

  Returns:
    float32 [b p m 4g 4g].
  """
  x = _doubled(params["conv1"], image)
  x = norm(params["norm"], x, epsilon=CONV_EPSILON)
  x = jax.nn.gelu(x, approximate=False)
  x = _doubled(params["conv2"], x)
  x = jax.nn.gelu(x, approximate=False)
  logits = jnp.einsum(
    "bpkijuvc,bpmc->bpmkijuv", x, weights,
    preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
  )  # fmt: skip
  return einops.rearrange(
    logits, "b p m (y x) i j u v -> b p m (y i u) (x j v)", y=grid
  )


def _doubled(params: Params, x: Array) -> Array:
  """A transposed convolution of 2x2 at stride 2, its four places as axes.

  [b p k … c] -> [b p k … 2 2 d]: nothing overlaps, so that places need not be
  put side by side before the masks are there.
  """
  return plus(
    jnp.einsum("...c,ijcd->...ijd", x, params["kernel"]), params["bias"]
  )
