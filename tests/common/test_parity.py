"""Equality with PyTorch and transformers on random numbers (parity extra)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from common.optim import make_optimizer
from common.parallel import linear_scan

pytestmark = pytest.mark.parity


def test_adamw_with_clipping_and_warm_up_is_torchs():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  start = rng.normal(size=(5, 3)).astype(np.float32)
  gradients = 3 * rng.normal(size=(12, 5, 3)).astype(np.float32)
  config = ConfigDict(
    {
      "name": "adamw", "lr": 0.02, "schedule": "linear", "warmup_steps": 4,
      "final_ratio": 0.1, "b1": 0.9, "b2": 0.95, "weight_decay": 0.1,
      "clip_norm": 1.0,
    }
  )  # fmt: skip
  tx, schedule = make_optimizer(config, 12)
  params = {"kernel": jnp.asarray(start)}
  state = tx.init(params)

  weight = torch.nn.Parameter(torch.tensor(start))
  theirs = torch.optim.AdamW([weight], betas=(0.9, 0.95), weight_decay=0.1)
  for step, gradient in enumerate(gradients):
    updates, state = tx.update({"kernel": jnp.asarray(gradient)}, state, params)
    params = jax.tree.map(jnp.add, params, updates)

    theirs.param_groups[0]["lr"] = float(schedule(step))
    weight.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    theirs.step()
    np.testing.assert_allclose(
      params["kernel"], weight.detach().numpy(), rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan_and_its_gradients_are_torchs(reverse):
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(1)
  x, a = rng.normal(size=(2, 2, 17, 5)), rng.uniform(size=(2, 17, 5))
  x, weights = x[0].astype(np.float32), x[1].astype(np.float32)
  a = a.astype(np.float32)

  tx, ta = (torch.tensor(v, requires_grad=True) for v in (x, a))
  h, states = torch.zeros(2, 5), [None] * 17
  for t in reversed(range(17)) if reverse else range(17):
    h = ta[:, t] * h + tx[:, t]
    states[t] = h
  out = torch.stack(states, 1)
  (out * torch.tensor(weights)).sum().backward()

  def total(x, a):
    return jnp.sum(linear_scan(x, a, reverse=reverse)[0] * weights)

  ours = linear_scan(jnp.asarray(x), jnp.asarray(a), reverse=reverse)[0]
  dx, da = jax.grad(total, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(a))
  np.testing.assert_allclose(ours, out.detach().numpy(), atol=1e-5)
  np.testing.assert_allclose(dx, tx.grad.numpy(), atol=1e-5)
  np.testing.assert_allclose(da, ta.grad.numpy(), atol=2e-5)


def test_a_tokenizer_file_gives_the_ids_transformers_gives(tmp_path):
  transformers = pytest.importorskip("transformers")
  tokenizers = pytest.importorskip("tokenizers")
  from common.data.tokenizers import make_tokenizer

  text = "The import statement combines two operations: it searches, it binds."
  theirs = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
  theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  theirs.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<unk>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  theirs.train_from_iterator([text] * 4, trainer)
  path = tmp_path / "tokenizer.json"
  theirs.save(str(path))
  assert json.loads(path.read_text())["model"]["type"] == "BPE"
  fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
  ours = make_tokenizer(ConfigDict({"kind": "huggingface", "path": str(path)}))
  ids = ours.encode(text)
  assert ids.tolist() == fast(text, add_special_tokens=False)["input_ids"]
  assert ours.decode(ids).strip() == text
