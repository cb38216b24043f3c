"""The variants of configs/thor.py: published settings, shapes on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.flags import override
from common.optim import make_optimizer
from configs.thor import VARIANTS, get_config
from thor.compare import make_jobs
from thor.model import num_params
from thor.routing import Routing
from thor.train import check, make_setup, make_step


def test_the_published_script():
  """run_iwslt14_de_en.sh: 2 experts, alpha 5, 4096 tokens times 8."""
  config = get_config("iwslt14")
  assert (config.routing.kind, config.routing.experts) == ("thor", 2)
  assert (config.routing.level, config.routing.pair) == ("batch", "independent")
  assert (config.objective.alpha, config.objective.passes) == (5.0, 2)
  assert config.objective.label_smoothing == 0.1
  assert (config.data.token_budget, config.accum) == (32_768, 8)
  assert (config.optim.b1, config.optim.b2) == (0.9, 0.98)
  assert (config.optim.weight_decay, config.optim.no_decay) == (1e-4, ())
  assert config.optim.clip_norm == 0
  settings = make_setup(config, vocab_size=10_000).settings
  assert (settings.width, settings.hidden, settings.heads) == (512, 1024, 4)
  assert (settings.dropout, settings.attention_dropout) == (0.3, 0.0)
  assert not settings.pre_norm
  assert num_params(settings) == 42_963_968


@pytest.mark.parametrize(
  ("updates", "lr"),
  [(0, 0.0), (1, 2.5e-7), (2000, 5e-4), (4000, 1e-3), (16_000, 5e-4),
   (100_000, 2e-4)],
)  # fmt: skip
def test_the_published_schedule(updates, lr):
  config = get_config("iwslt14")
  _, schedule = make_optimizer(config.optim, 200_000)
  # The warm-up is the peak less what is missing: float32 rounds the peak.
  np.testing.assert_allclose(
    float(schedule(updates)), lr, rtol=1e-6, atol=1e-10
  )


def test_a_parameter_without_gradient_decays_by_lr_times_decay():
  config = get_config("iwslt14")
  config.optim.update({"schedule": "constant", "warmup_steps": 0})
  tx, _ = make_optimizer(config.optim, 10)
  params = {"embedding": jnp.full(3, 2.0), "bias": jnp.full(2, 2.0)}
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  # fairseq decays biases, norms and embeddings as well.
  for update in jax.tree.leaves(updates):
    np.testing.assert_allclose(2 + update, 2 * (1 - 1e-3 * 1e-4), rtol=1e-7)


def test_the_big_models():
  config = get_config("wmt16_en_de_big")
  settings = make_setup(config, vocab_size=32_768).settings
  assert num_params(settings) == 260_274_176
  assert (config.optim.lr, config.optim.warmup_steps) == (1e-3, 4000)
  assert (config.optim.weight_decay, settings.dropout) == (0.0, 0.3)
  assert config.translation.length_penalty == 0.6
  config = get_config("multilingual_big")
  settings = make_setup(config, vocab_size=32_768).settings
  assert num_params(settings) == 3_382_740_992


@pytest.mark.parametrize(
  ("name", "mesh", "vocab_size"),
  [
    ("iwslt14", {"data": 2, "fsdp": 4}, 10_000),
    ("wmt16_en_de_big", {"data": 2, "fsdp": 2, "model": 2}, 32_768),
    ("multilingual_big", {"fsdp": 8}, 32_768),
  ],
)
def test_published_shapes_fit_meshes(name, mesh, vocab_size):
  """The whole step, traced and lowered without an array."""
  config = get_config(name)
  config.mesh.update({"data": 1, "fsdp": 1, "model": 1} | mesh)
  setup = make_setup(config, vocab_size=vocab_size)
  rows = config.data.token_budget // 64
  tokens = jax.ShapeDtypeStruct((rows, 64), jnp.int32, sharding=setup.sharding)
  batch = {"source": tokens, "target": tokens}
  with jax.set_mesh(setup.mesh):
    lowered = make_step(config, setup).lower(setup.abstract, batch)
  state, _ = lowered.out_info
  assert state.params["embedding"].shape == (vocab_size, setup.settings.width)
  if mesh.get("fsdp", 1) > 1:
    for side in ("encoder", "decoder"):
      stack = setup.abstract.params[side]["layers"]["layer_0"]["experts"]
      spec = stack["up"]["kernel"].sharding.spec
      assert spec == jax.P(None, None, None, "fsdp")


@pytest.mark.parametrize("name", ["", *VARIANTS, "smoke,switch", "small,hash"])
def test_every_variant_is_complete(name):
  config = get_config(name)
  # Its data are somebody's; all else is refused before they are read.
  check(config)


def test_every_system_of_the_comparison_is_one():
  config = get_config("small").lock()
  jobs = make_jobs(config)
  by_name = {job.system: job.config for job in jobs if job.seed == 0}
  assert len(by_name) == len(config.compare.settings)
  for made in by_name.values():
    check(made)
  kinds = {name: made.routing.kind for name, made in by_name.items()}
  assert kinds["dense"] == kinds["dense_2x"] == kinds["r_drop"] == "dense"
  assert by_name["dense_2x"].num_steps == 2 * by_name["dense"].num_steps
  wide, experts = [
    num_params(make_setup(by_name[name], vocab_size=1500).settings)
    for name in ("dense_wide", "thor")
  ]
  assert abs(wide / experts - 1) < 0.01
  assert by_name["r_drop"].objective.passes == 2
  assert by_name["r_drop"].objective.alpha == by_name["thor"].objective.alpha
  assert by_name["thor_alpha0"].objective.alpha == 0
  assert by_name["switch"].objective.passes == 1
  for kind in ("switch", "random_switch", "hash"):
    assert by_name[kind].routing.experts == by_name["thor"].routing.experts


def test_a_seed_is_all_that_differs_between_seeds():
  config = get_config("small").lock()
  first, second = [
    job.config for job in make_jobs(config) if job.system == "thor"
  ][:2]
  assert (first.seed, second.seed) == (0, 1)
  assert override(first, "seed", ["--config.seed=1"]) == second


def test_settings_of_a_system_are_keys():
  config = get_config("small")
  config.compare.settings.dense = ("num_stps=3",)
  with pytest.raises(UserError, match=r"no key 'num_stps'.*num_steps"):
    make_jobs(config.lock())


def test_routing_knows_every_key():
  assert Routing(**get_config().routing.to_dict()).kind == "thor"
