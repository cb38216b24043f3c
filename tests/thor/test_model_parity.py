"""Our layers are torch's, before and after their norms (parity extra)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thor.model import init_layer, layer, masks_of
from thor.settings import Settings

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")

# float32, values of order 1.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WIDTH, HIDDEN, HEADS, PAD = 24, 40, 3, 1
NORMS = {"attention_norm": "norm1", "feed_forward_norm": "norm2"}
CROSS_NORMS = {
  "attention_norm": "norm1",
  "cross_attention_norm": "norm2",
  "feed_forward_norm": "norm3",
}
ATTENTIONS = {"attention": "self_attn", "cross_attention": "multihead_attn"}


def make_settings(pre_norm, activation):
  return Settings(
    10, width=WIDTH, hidden=HIDDEN, heads=HEADS, pattern=(False,),
    pre_norm=pre_norm, activation=activation, dropout=0.0,
  )  # fmt: skip


def drawn(settings, *, cross):
  """A layer's parameters, all of them drawn anew, NumPy."""
  like = jax.eval_shape(
    lambda key: init_layer(settings, key, has_experts=False, cross=cross),
    jax.random.key(0),
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), like
  )


def torch_layer(params, *, cross, pre_norm, activation):
  kinds = torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer
  made = kinds[cross](
    WIDTH, HEADS, HIDDEN, 0.0, activation, batch_first=True, norm_first=pre_norm
  )
  state = {}
  for ours, theirs in ATTENTIONS.items():
    if ours not in params:
      continue
    qkv = [params[ours][part] for part in ("query", "key", "value")]
    weights = [part["kernel"].reshape(WIDTH, WIDTH).T for part in qkv]
    state[f"{theirs}.in_proj_weight"] = np.concatenate(weights)
    biases = [part["bias"].reshape(WIDTH) for part in qkv]
    state[f"{theirs}.in_proj_bias"] = np.concatenate(biases)
    out = params[ours]["out"]
    state[f"{theirs}.out_proj.weight"] = out["kernel"].reshape(WIDTH, WIDTH).T
    state[f"{theirs}.out_proj.bias"] = out["bias"]
  for ours, theirs in {"up": "linear1", "down": "linear2"}.items():
    part = params["feed_forward"][ours]
    state[f"{theirs}.weight"] = part["kernel"].T
    state[f"{theirs}.bias"] = part["bias"]
  for ours, theirs in (CROSS_NORMS if cross else NORMS).items():
    state[f"{theirs}.weight"] = params[ours]["scale"]
    state[f"{theirs}.bias"] = params[ours]["bias"]
  made.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
  return made.train()  # eval may take another, fused path


def vectors(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


SOURCE = np.array([[5, 4, 3, 2, 6], [5, 4, 2, PAD, PAD]])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_an_encoder_layer_is_torchs(pre_norm, activation):
  settings = make_settings(pre_norm, activation)
  params = drawn(settings, cross=False)
  x = vectors(1, *SOURCE.shape, WIDTH)
  masks = masks_of(settings, jnp.asarray(SOURCE), None)
  ours, _ = jax.jit(layer, static_argnums=0)(settings, params, x, masks)
  theirs = torch_layer(
    params, cross=False, pre_norm=pre_norm, activation=activation
  )
  padding = torch.tensor(SOURCE == PAD)
  expected = theirs(torch.tensor(x), src_key_padding_mask=padding)
  real = SOURCE != PAD
  np.testing.assert_allclose(
    np.asarray(ours)[real], expected.detach().numpy()[real], **CLOSE
  )


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_decoder_layer_is_torchs(pre_norm, activation):
  settings = make_settings(pre_norm, activation)
  params = drawn(settings, cross=True)
  target = np.array([[2, 3, 4, 7], [2, 6, 8, 9]])
  x, memory = vectors(1, 2, 4, WIDTH), vectors(2, *SOURCE.shape, WIDTH)
  masks = masks_of(settings, jnp.asarray(target), jnp.asarray(SOURCE))
  run = jax.jit(layer, static_argnums=0)
  ours, _ = run(settings, params, x, masks, memory=memory)
  theirs = torch_layer(
    params, cross=True, pre_norm=pre_norm, activation=activation
  )
  expected = theirs(
    torch.tensor(x),
    torch.tensor(memory),
    tgt_mask=torch.triu(torch.ones(4, 4, dtype=torch.bool), 1),
    memory_key_padding_mask=torch.tensor(SOURCE == PAD),
  )
  np.testing.assert_allclose(ours, expected.detach().numpy(), **CLOSE)
