"""Configured models: published sizes, where they lie, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from birdie.models import (
  RULES,
  GatedSSM,
  Hawk,
  Transformer,
  init_params,
  make_model,
)
from common import tree
from common.errors import UserError
from common.optim import make_optimizer
from common.parallel import make_mesh, shardings
from common.state import TrainState
from configs.birdie import get_config

VOCAB = 32


# -- sizes ---------------------------------------------------------------------

EMBEDDING = 65_536_000  # 32,000 x 2048
NORM = 2048


def _paper_shapes(variant="paper", **options):
  cfg = get_config(variant).model
  cfg.update(options)
  return jax.eval_shape(
    lambda: init_params(make_model(cfg, 32_000), jax.random.key(0))
  )


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("variant", "options", "per_layer", "embeddings"),
  [
    ("paper", {}, 26_216_448, 1),
    ("paper", {"forget_bias": "none"}, 26_216_448, 1),
    ("paper", {"forget_bias": "learned"}, 26_216_448 + 2560, 1),
    ("paper", {"tie_embeddings": False}, 26_216_448, 2),
    ("paper", {"bidirectional": "none"}, 26_216_448, 1),
    ("paper", {"bidirectional": "all"}, 26_216_448, 1),
    ("paper,hawk", {}, 62_412_800, 1),
    ("hawk,paper", {"tie_embeddings": False}, 62_412_800, 2),
    ("paper,hawk,causal", {}, 62_412_800, 1),
    # Blocks: ten of 256 x 256 in place of 2560 x 2560, in both gates.
    ("paper,hawk", {"gate_blocks": 10}, 62_412_800 - 11_796_480, 1),
    ("paper,transformer", {}, 50_333_696, 1),
    ("transformer,paper", {"tie_embeddings": False}, 50_333_696, 2),
    # Two heads of keys and of values in place of sixteen.
    ("paper,transformer", {"kv_heads": 2}, 50_333_696 - 7_340_032, 1),
  ],
  ids=str,
)
def test_the_published_size(variant, options, per_layer, embeddings):
  params = _paper_shapes(variant, **options)
  layers = get_config(variant).model.layers
  assert _count(params["layers"]) == layers * per_layer
  expected = layers * per_layer + NORM + embeddings * EMBEDDING
  assert _count(params) == expected


@pytest.mark.parametrize(
  ("variant", "total"),
  [("paper", 1.324), ("paper,hawk", 1.314), ("paper,transformer", 1.274)],
)
def test_the_published_totals(variant, total):
  assert round(_count(_paper_shapes(variant)) / 1e9, 3) == total


@pytest.mark.parametrize(
  ("variant", "optimizer"),
  [
    ("paper", "adamw"),
    ("paper", "adafactor"),
    ("paper,hawk", "lion"),
    ("paper,transformer", "sgd"),
  ],
)
def test_the_rules_place_the_whole_state_of_the_paper_model(variant, optimizer):
  tx, _ = make_optimizer({"name": optimizer, "lr": 1e-3}, 10)
  options = {"tie_embeddings": False, "forget_bias": "learned"}
  # 5461, 8/3 of the width, is not even.
  params = _paper_shapes(variant, mlp_width=5632, **options)
  extra = {"controller": {"history": jnp.zeros((3, 5))}}
  state = jax.eval_shape(lambda p: TrainState.create(p, tx, extra), params)
  mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
  placed = shardings(state, mesh, RULES)
  assert placed.extra["controller"]["history"].spec == jax.P()
  assert placed.step.spec == jax.P()
  # All but the norms' scales and the convolutions is cut in four.
  held = jax.tree.map(
    lambda s, p: np.prod(s.shard_shape(p.shape)), placed.params, params
  )
  assert sum(jax.tree.leaves(held)) < 1.001 * _count(params) / 4
  moments = [
    leaf
    for leaf in jax.tree.leaves(
      placed.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
    )
    if isinstance(leaf, optax.ScaleByAdamState)
  ]
  assert len(moments) == (optimizer == "adamw")
  for moment in moments:
    assert moment.mu == moment.nu == placed.params


# -- configurations ------------------------------------------------------------


def test_make_model_reads_a_configuration():
  cfg = get_config("smoke").model
  cfg.dtype = "bfloat16"
  model = make_model(cfg, VOCAB)
  assert model == GatedSSM(
    VOCAB, width=32, state=32, layers=2, dtype=jnp.bfloat16
  )
  model = make_model(get_config("smoke,hawk").model, VOCAB)
  assert model == Hawk(VOCAB, width=32, state=32, mlp_width=85, layers=2)
  model = make_model(get_config("smoke,transformer").model, VOCAB)
  assert model == Transformer(
    VOCAB, width=32, heads=2, kv_heads=2, mlp_width=85, layers=2,
    bidirectional="all",
  )  # fmt: skip


@pytest.mark.parametrize("size", ["smoke", "small", "paper", "paper,phonebook"])
@pytest.mark.parametrize("name", ["hawk", "transformer"])
def test_variants_go_together_in_any_order(size, name):
  first, second = get_config(f"{size},{name}"), get_config(f"{name},{size}")
  assert first.to_dict() == second.to_dict()
  assert make_model(first.model, VOCAB) == make_model(second.model, VOCAB)
  assert first.data.batch_size % first.data.pack_rows == 0


@pytest.mark.parametrize("order", ["causal,transformer", "transformer,causal"])
def test_a_causal_transformer(order):
  assert get_config(order).model.bidirectional == "none"


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("gated_ssm", {"name": "gated_ssn"}, "gated_ssm"),
    ("gated_ssm", {"bidirectional": "half"}, "alternate"),
    ("gated_ssm", {"prefix_mode": "stric"}, "strict"),
    ("gated_ssm", {"forget_bias": "fix"}, "fixed"),
    ("gated_ssm", {"dtype": "float16"}, "bfloat16"),
    ("gated_ssm", {"param_dtype": "float64"}, "bfloat16"),
    ("gated_ssm", {"scan_impl": "seqential"}, "sequential"),
    ("gated_ssm", {"seq_axis": "time"}, "seq"),
    ("gated_ssm", {"remat": "all"}, "full"),
    ("gated_ssm", {"width": 0}, "at least 1"),
    ("gated_ssm", {"layers": -2}, "at least 1"),
    ("gated_ssm", {"state": 7}, "must be even"),
    ("gated_ssm", {"layers": 3}, "must be even"),
    ("hawk", {"reset_gamma": "zero"}, "keep"),
    ("hawk", {"gate_blocks": 3}, "even divisor"),
    ("hawk", {"mlp_width": -1}, "at least 0"),
    ("transformer", {"heads": 3}, "of an even size"),
    ("transformer", {"kv_heads": 4}, "must divide model.heads=2"),
    ("transformer", {"attention_impl": "einsun"}, "einsum"),
    ("transformer", {"rope_base": 1.0}, "greater than 1"),
  ],
  ids=str,
)
def test_a_wrong_configuration_is_refused(name, change, message):
  cfg = get_config(f"smoke,{name}" if name != "gated_ssm" else "smoke").model
  cfg.update(change)
  ((key, value),) = change.items()
  with pytest.raises(UserError, match=rf"model\.{key}={value!r}.*{message}"):
    make_model(cfg, VOCAB)


@pytest.mark.parametrize(
  ("variant", "decayed"),
  [
    ("paper", {"input", "drive", "output", "out"}),
    (
      "paper,hawk",
      {"side", "input", "out", "conv", "mlp/gate", "mlp/up", "mlp/down"},
    ),
    (
      "paper,transformer",
      {"query", "key", "value", "attention_out", "mlp/gate", "mlp/up",
       "mlp/down"},
    ),
  ],
)  # fmt: skip
def test_what_the_paper_spares_from_decay(variant, decayed):
  """Forget gates and the RG-LRU (A.8), norms and embeddings."""
  config = get_config(variant)
  shapes = _paper_shapes(variant)
  spared = tree.mask(shapes, config.optim.no_decay)
  names = jax.tree.leaves(tree.names(shapes))
  kept = {n for n, s in zip(names, jax.tree.leaves(spared)) if not s}
  short = {n.split("/", 2)[2].removesuffix("/kernel") for n in kept}
  assert short == decayed
