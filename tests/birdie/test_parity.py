"""Hawk and the Transformer against transformers, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from birdie.models import Hawk, Transformer

pytestmark = pytest.mark.parity

# The root of the width is exact in bfloat16, in which transformers keeps it.
VOCAB, WIDTH, LAYERS, HIDDEN = 17, 16, 3, 20
ROWS, LENGTH = 2, 11


def randomize(torch, model, seed):
  """Numbers of order 1 over the square root of what is summed."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      size = p.shape[-1] if p.ndim > 1 else 4
      p.copy_(torch.randn(p.shape, generator=generator) / size**0.5)
      if name.endswith(("proj.bias", "linear_x.bias", "linear_y.bias")):
        p.zero_()  # ours has none
      if name.endswith("linear_out.bias"):
        p.zero_()


def numbers(tree):
  return {name: p.detach().numpy() for name, p in tree.named_parameters()}


def stacked(weights, pattern, shape):
  """[layers ...] of one parameter of every layer; torch keeps [out in]."""
  found = [weights[pattern.format(i)] for i in range(LAYERS)]
  return jnp.stack([jnp.asarray(w.T).reshape(shape) for w in found])


def mlp(weights, place):
  names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
  return {
    ours: {
      "kernel": stacked(
        weights,
        f"{place}.{theirs}.weight",
        (HIDDEN, WIDTH) if ours == "down" else (WIDTH, HIDDEN),
      )
    }
    for ours, theirs in names.items()
  }


def logits_of(model, params, *rows):
  def loss(params):
    logits = model.apply({"params": params}, *rows)
    return jnp.sum(jnp.sin(logits)), logits

  (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    params
  )
  return logits, gradients


def whole_rows():
  tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH))
  places = np.tile(np.arange(LENGTH), (ROWS, 1))
  return tokens, np.ones_like(tokens), places, np.zeros_like(tokens) > 0


@pytest.mark.parametrize("heads", [2, 4])
def test_hawk_is_recurrentgemma_without_attention(heads):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  state = 16
  config = transformers.RecurrentGemmaConfig(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS,
    intermediate_size=2 * HIDDEN, lru_width=state, num_attention_heads=heads,
    block_types=("recurrent",), conv1d_width=4, logits_soft_cap=30.0,
    pad_token_id=0,
  )  # fmt: skip
  theirs = transformers.RecurrentGemmaForCausalLM(config).eval()
  randomize(torch, theirs, seed=heads)
  w, half = numbers(theirs), (2, state // 2)
  at = "model.layers.{}.temporal_block"
  block = state // heads

  def gate(name):
    """Theirs keeps [in out], block by block."""

    def stack(end, shape):
      names = [
        f"{at.format(i)}.rg_lru.{name}_gate_{end}" for i in range(LAYERS)
      ]
      return jnp.stack([jnp.asarray(w[n]).reshape(shape) for n in names])

    kernel = stack("weight", (2, heads // 2, block, block))
    return {"kernel": kernel, "bias": stack("bias", half)}

  # Their convolution's last tap is the present, ours the first.
  taps = stacked(w, f"{at}.conv_1d.weight", (4, *half))[:, ::-1]
  layer = {
    "norm": {"scale": 1 + stacked(
      w, "model.layers.{}.temporal_pre_norm.weight", (WIDTH,))},
    "side": {"kernel": stacked(w, f"{at}.linear_y.weight", (WIDTH, *half))},
    "input": {"kernel": stacked(w, f"{at}.linear_x.weight", (WIDTH, *half))},
    "out": {"kernel": stacked(w, f"{at}.linear_out.weight", (*half, WIDTH))},
    "conv": {
      "kernel": taps, "bias": stacked(w, f"{at}.conv_1d.bias", half),
    },
    "lambda": stacked(w, f"{at}.rg_lru.recurrent_param", half),
    "input_gate": gate("input"),
    "recurrence_gate": gate("recurrent"),
    "mlp_norm": {"scale": 1 + stacked(
      w, "model.layers.{}.channel_pre_norm.weight", (WIDTH,))},
    "mlp": mlp(w, "model.layers.{}.mlp_block"),
  }  # fmt: skip
  params = {
    # Theirs multiplies embeddings by the root of the width; ours divides
    # logits by it.
    "embed": {"embedding": w["model.embed_tokens.weight"] * WIDTH**0.5},
    "norm": {"scale": 1 + w["model.final_norm.weight"]},
    "layers": {"causal": layer},
  }
  ours = Hawk(
    VOCAB, width=WIDTH, state=state, mlp_width=HIDDEN, layers=LAYERS,
    gate_blocks=heads, bidirectional="none", reset_gamma="one",
  )  # fmt: skip
  rows = whole_rows()
  found = theirs(
    input_ids=torch.tensor(rows[0]), use_cache=False
  ).logits.double()
  uncapped = 30 * torch.atanh(found / 30)
  uncapped.sin().sum().backward()
  logits, gradients = logits_of(ours, params, *rows)
  np.testing.assert_allclose(logits, uncapped.detach(), atol=2e-4, rtol=2e-4)
  slope = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
  np.testing.assert_allclose(
    gradients["layers"]["causal"]["lambda"],
    stacked(slope, f"{at}.rg_lru.recurrent_param", half),
    atol=2e-3,
    rtol=2e-3,
  )
  np.testing.assert_allclose(
    gradients["layers"]["causal"]["input"]["kernel"],
    stacked(slope, f"{at}.linear_x.weight", (WIDTH, *half)),
    atol=2e-3,
    rtol=2e-3,
  )


def packed_rows():
  """A prefix of 4 and a target of 3, a prefix of 2 and a target of 2."""
  tokens, _, _, _ = whole_rows()
  segments = np.tile(np.repeat([1, 2], [7, 4]), (ROWS, 1))
  places = np.tile(np.concatenate([np.arange(7), np.arange(4)]), (ROWS, 1))
  prefix = np.tile(np.repeat([1, 0, 1, 0], [4, 3, 2, 2]) > 0, (ROWS, 1))
  return tokens, segments, places, prefix


@pytest.mark.parametrize("make_rows", [whole_rows, packed_rows])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_transformer_is_llama_with_gelu(kv_heads, make_rows):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  heads = 2
  size = WIDTH // heads
  config = transformers.LlamaConfig(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS,
    intermediate_size=HIDDEN, num_attention_heads=heads,
    num_key_value_heads=kv_heads, hidden_act="gelu_pytorch_tanh",
    rms_norm_eps=1e-6, attn_implementation="eager",
    rope_parameters={"rope_theta": 250_000.0, "rope_type": "default"},
  )  # fmt: skip
  theirs = transformers.LlamaForCausalLM(config).eval()
  randomize(torch, theirs, seed=kv_heads)
  w, at = numbers(theirs), "model.layers.{}.self_attn"
  layer = {
    "norm": {"scale": stacked(
      w, "model.layers.{}.input_layernorm.weight", (WIDTH,))},
    "query": {"kernel": stacked(
      w, f"{at}.q_proj.weight", (WIDTH, heads, size))},
    "key": {"kernel": stacked(
      w, f"{at}.k_proj.weight", (WIDTH, kv_heads, size))},
    "value": {"kernel": stacked(
      w, f"{at}.v_proj.weight", (WIDTH, kv_heads, size))},
    "attention_out": {"kernel": stacked(
      w, f"{at}.o_proj.weight", (heads, size, WIDTH))},
    "mlp_norm": {"scale": stacked(
      w, "model.layers.{}.post_attention_layernorm.weight", (WIDTH,))},
    "mlp": mlp(w, "model.layers.{}.mlp"),
  }  # fmt: skip
  params = {
    "embed": {"embedding": w["model.embed_tokens.weight"]},
    "head": {"kernel": w["lm_head.weight"].T},
    "norm": {"scale": w["model.norm.weight"]},
    "layers": {"bidirectional": layer},
  }
  ours = Transformer(
    VOCAB, width=WIDTH, heads=heads, kv_heads=kv_heads, mlp_width=HIDDEN,
    layers=LAYERS, bidirectional="all", tie_embeddings=False,
  )  # fmt: skip
  rows = tokens, segments, places, prefix = make_rows()
  sees = places[:, :, None] >= places[:, None, :]
  sees |= prefix[:, :, None] & prefix[:, None, :]
  sees &= segments[:, :, None] == segments[:, None, :]
  mask = torch.where(torch.tensor(sees), 0.0, -torch.inf)[:, None]
  found = theirs(
    input_ids=torch.tensor(tokens), attention_mask=mask,
    position_ids=torch.tensor(places), use_cache=False,
  ).logits  # fmt: skip
  found.sin().sum().backward()
  logits, gradients = logits_of(ours, params, *rows)
  np.testing.assert_allclose(logits, found.detach(), atol=1e-4, rtol=1e-4)
  slope = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
  np.testing.assert_allclose(
    gradients["layers"]["bidirectional"]["query"]["kernel"],
    stacked(slope, f"{at}.q_proj.weight", (WIDTH, heads, size)),
    atol=1e-3,
    rtol=1e-3,
  )
