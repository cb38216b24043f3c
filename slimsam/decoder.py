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
      tokens = _attention(own["self_attn"], tokens, tokens, tokens)
    else:
      query = tokens + first
      tokens = tokens + _attention(own["self_attn"], query, query, tokens)
    tokens = normed(own, "norm1", tokens)
    tokens = tokens + _attention(
      own["token_to_image"], tokens + first, image + places, image
    )
    tokens = normed(own, "norm2", tokens)
    hidden = jax.nn.relu(dense(own["mlp"]["lin1"], tokens))
    tokens = normed(own, "norm3", tokens + dense(own["mlp"]["lin2"], hidden))
    image = image + _attention(
      own["image_to_token"], image + places, tokens + first, tokens
    )
    image = normed(own, "norm4", image)
  tokens = tokens + _attention(
    params["final_attn"], tokens + first, image + places, image
  )
  return normed(params, "norm_final", tokens, 1e-5), image


def _attention(params: Params, query: Array, key: Array, value: Array) -> Array:
  """[b p t c], [b p k c] -> [b p t c]; one side may have a p of 1."""

  def heads(name: str, x: Array) -> Array:
    own = params[name]
    made = jnp.einsum("bptc,che->bphte", x, own["kernel"])
    return made + own["bias"][None, None, :, None]

  q, k, v = heads("q", query), heads("k", key), heads("v", value)
  q = q * q.shape[-1] ** -0.5
  # A side that prompts have not changed serves all of them.
  asking, seen = "bphte", "bphke"
  if q.shape[1] == 1 and k.shape[1] != 1:
    asking, q = "bhte", q[:, 0]
  elif k.shape[1] == 1 and q.shape[1] != 1:
    seen, k, v = "bhke", k[:, 0], v[:, 0]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum(
    f"{asking},{seen}->bphtk", q, k, preferred_element_type=wide
  )
  weights = jax.nn.softmax(logits).astype(v.dtype)
  mixed = jnp.einsum(f"bphtk,{seen}->bphte", weights, v)
  out = params["out"]
  return plus(jnp.einsum("bphte,hec->bptc", mixed, out["kernel"]), out["bias"])


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
