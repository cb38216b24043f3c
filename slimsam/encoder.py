"""The image encoder, as functions of its parameters.

# b images, y x rows and columns of patches, d width D, h heads, e width of a
# head, f hidden width F, c width of the image embedding

    patch_embed/{kernel [patch patch 3 d], bias}, pos_embed [1 g g d]
    blocks/I/{norm1, attn/{qkv/{kernel [d 3 h e], bias [3 h e]},
              proj/{kernel [h e d], bias}, rel_pos_h, rel_pos_w [2s-1 e]},
              norm2, mlp/{lin1, lin2}}
    neck/{conv1 [d c], norm1, conv2 [3 3 c c], norm2}

Every block may have widths of its own, so that blocks are not scanned.
"""

import dataclasses
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp

from common.nn import Array, Params, dense, norm, plus
from common.parallel import constrain
from slimsam.attention import How, attend
from slimsam.settings import EncoderSettings

EPSILON = 1e-6  # of all norms
ROWS = ("data", "fsdp")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a model runs; its parameters do not depend on it.

  Attributes:
    dtype: of the computation; parameters, norms and softmax are float32.
    remat: recompute a block in the backward pass.
    how: attention.
  """

  dtype: Any = jnp.float32
  remat: bool = False
  how: How = dataclasses.field(default_factory=How)


PLAIN = Compute()


class Features(NamedTuple):
  """What a block computes on its way.

  Attributes:
    qkv: [b y x 3 h e].
    hidden: [b y x f], after the activation.
    attended: [b y x d], the embedding between attention and MLP.
  """

  qkv: Array
  hidden: Array
  attended: Array


def encode(
  params: Params,
  images: Array,
  settings: EncoderSettings,
  compute: Compute = PLAIN,
) -> Array:
  """Image embeddings.

  Args:
    params: the encoder's.
    images: float [b size size 3], see `slimsam.preprocess`.
    settings: its sizes.
    compute: how it runs.

  Returns:
    [b g g c] in the dtype of the computation.
  """
  x = embedded(params, images, settings, compute)

  def run(own: Params, x: Array, i: int) -> Array:
    return block(own, x, i, settings, compute)[0]

  if compute.remat:
    run = jax.checkpoint(run, static_argnums=2)
  for i in range(settings.depth):
    x = run(params["blocks"][str(i)], x, i)
  return neck(params["neck"], x, compute)


def embedded(
  params: Params, images: Array, settings: EncoderSettings, compute: Compute
) -> Array:
  """Patches and their places, [b g g d]."""
  patches = einops.rearrange(
    jnp.asarray(images, compute.dtype), "b (y p) (x q) c -> b y x (p q c)",
    p=settings.patch, q=settings.patch,
  )  # fmt: skip
  own = computed(params["patch_embed"], compute.dtype)
  kernel = own["kernel"].reshape(-1, settings.width)
  x = plus(patches @ kernel, own["bias"])
  return constrain(x + params["pos_embed"].astype(x.dtype), ROWS)


def block(
  params: Params,
  x: Array,
  index: int,
  settings: EncoderSettings,
  compute: Compute,
) -> tuple[Array, Features]:
  """A block: [b g g d] -> [b g g d], and what it computes on its way."""
  params = computed(params, compute.dtype)
  attn, mlp = params["attn"], params["mlp"]
  normed = norm(params["norm1"], x, epsilon=EPSILON)
  qkv = plus(
    jnp.einsum("byxd,dthe->byxthe", normed, attn["qkv"]["kernel"]),
    attn["qkv"]["bias"],
  )
  window = 0 if settings.is_global(index) else settings.window
  mixed = attend(
    qkv,
    (attn["rel_pos_h"], attn["rel_pos_w"]),
    attn["qkv"]["bias"],
    window,
    compute.how,
  )
  out = jnp.einsum("byxhe,hed->byxd", mixed, attn["proj"]["kernel"])
  attended = x + plus(out, attn["proj"]["bias"])
  normed = norm(params["norm2"], attended, epsilon=EPSILON)
  hidden = jax.nn.gelu(dense(mlp["lin1"], normed), approximate=False)
  out = constrain(attended + dense(mlp["lin2"], hidden), ROWS)
  return out, Features(qkv, hidden, attended)


def neck(params: Params, x: Array, compute: Compute) -> Array:
  """[b g g d] -> [b g g c]."""
  params = computed(params, compute.dtype)
  x = x @ params["conv1"]["kernel"]
  x = norm(params["norm1"], x, epsilon=EPSILON)
  x = jax.lax.conv_general_dilated(
    x, params["conv2"]["kernel"], (1, 1), "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip
  return norm(params["norm2"], x, epsilon=EPSILON)


def computed(params: Params, dtype: Any) -> Any:
  """Parameters as products take them; norms keep their own dtype."""

  def cast(path: Any, leaf: Array) -> Array:
    kept = any("norm" in str(part) for part in path)
    return leaf if kept else jnp.asarray(leaf, dtype)

  return jax.tree_util.tree_map_with_path(cast, dict(params))
