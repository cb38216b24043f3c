"""The published sizes, which layers have experts, and what is refused."""

import pytest

from common.errors import UserError
from thor.model import num_params
from thor.routing import Routing
from thor.settings import PATTERNS, PRESETS, Settings, make_settings

TINY = {"width": 16, "hidden": 32, "heads": 2}


def made(model, vocab_size=20, **routing):
  return make_settings(model, Routing(**routing), vocab_size=vocab_size)


def published(preset, vocab_size, experts, **model):
  kind = "thor" if experts > 1 else "dense"
  return made({"preset": preset, **model}, vocab_size, kind=kind,
              experts=experts)  # fmt: skip


# preset, vocabulary, numbers of one expert, of the model without further ones.
SIZES = [
  ("iwslt_de_en", 10_000, 1_050_112, 36_663_296),
  ("base", 32_768, 2_099_712, 60_915_712),
  ("vaswani_wmt_en_de_big", 32_768, 8_393_728, 209_911_808),
]
# By experts, in the order of `SIZES`.
TABLE = {
  1: (36_663_296, 60_915_712, 209_911_808),
  2: (42_963_968, 73_513_984, 260_274_176),
  4: (55_565_312, 98_710_528, 360_998_912),
  8: (80_768_000, 149_103_616, 562_448_384),
  16: (131_173_376, 249_889_792, 965_347_328),
  64: (433_605_632, 854_606_848, 3_382_740_992),
}


@pytest.mark.parametrize("experts", TABLE)
@pytest.mark.parametrize("column", range(3))
def test_the_published_sizes(column, experts):
  preset, vocab_size, one, dense = SIZES[column]
  expected = TABLE[experts][column]
  assert expected == dense + 6 * (experts - 1) * one
  assert num_params(published(preset, vocab_size, experts)) == expected


def test_norms_before_the_layers_need_two_more():
  for preset, width in (("base", 512), ("wmt_en_de_big", 1024)):
    after, before = (
      num_params(published(preset, 1000, 2, pre_norm=pre_norm))
      for pre_norm in (False, True)
    )
    assert before - after == 2 * 2 * width


def test_a_gate_is_a_kernel_in_each_expert_layer():
  without, with_gate = (
    num_params(made(TINY, kind=kind, experts=4)) for kind in ("thor", "switch")
  )
  assert with_gate - without == 6 * 16 * 4


def test_an_offset_of_the_logits_is_a_number_a_word():
  without, with_bias = (
    num_params(made(TINY | {"logits_bias": flag})) for flag in (False, True)
  )
  assert with_bias - without == 20


def test_the_presets_are_fairseqs():
  found = {
    name: (cfg.width, cfg.hidden, cfg.heads, cfg.dropout, cfg.attention_dropout)
    for name in PRESETS
    for cfg in (published(name, 20, 2),)
  }
  assert found == {
    "iwslt_de_en": (512, 1024, 4, 0.1, 0.0),
    "base": (512, 2048, 8, 0.1, 0.0),
    "vaswani_wmt_en_de_big": (1024, 4096, 16, 0.3, 0.0),
    "wmt_en_de_big": (1024, 4096, 16, 0.3, 0.1),
    "vaswani_wmt_en_fr_big": (1024, 4096, 16, 0.1, 0.0),
  }
  for name in PRESETS:
    cfg = published(name, 20, 2)
    assert (cfg.encoder_layers, cfg.decoder_layers) == (6, 6)
    assert cfg.expert_layers == (3, 3)
    assert not cfg.pre_norm
    assert (cfg.activation, cfg.positions) == ("relu", "fairseq")


def test_given_values_replace_a_presets_and_none_does_not():
  cfg = made({"preset": "base", "dropout": 0.3, "heads": None})
  assert (cfg.dropout, cfg.heads, cfg.hidden) == (0.3, 8, 2048)


@pytest.mark.parametrize(
  ("layers", "depth", "expected"),
  [
    ("every_second", 6, [0, 2, 4]),
    ("every_second", 5, [0, 2, 4]),
    ("every_second", 1, [0]),
    ("all", 3, [0, 1, 2]),
    ("none", 3, []),
  ],
)
def test_which_layers_have_experts(layers, depth, expected):
  sizes = {"encoder_layers": depth, "decoder_layers": depth + 1}
  cfg = made(TINY | {"expert_layers": layers} | sizes)
  assert [i for i in range(depth) if cfg.expert_at(i)] == expected
  more = len(expected) + cfg.expert_at(depth)
  assert cfg.expert_layers == (len(expected), more)
  pattern, blocks = cfg.blocks(depth)
  # Blocks repeat; where the pattern does not divide all layers are one.
  assert [i for i, has in enumerate(pattern * blocks) if has] == expected
  assert blocks == (1 if depth % len(cfg.pattern) else depth // len(pattern))


def test_one_expert_is_a_plain_transformer():
  assert made(TINY, kind="thor", experts=1).pattern == PATTERNS["none"]


@pytest.mark.parametrize(
  ("routing", "expected"),
  [
    ({"kind": "thor"}, (False, False, 0.0)),
    ({"kind": "thor", "level": "token"}, (False, True, 0.0)),
    ({"kind": "thor", "level": "sentence"}, (False, True, 0.0)),
    ({"kind": "switch"}, (True, True, 1.25)),
    ({"kind": "switch", "capacity": 0.0}, (True, False, 0.0)),
    ({"kind": "random_switch"}, (False, True, 1.25)),
    ({"kind": "random_switch", "gate": True}, (True, True, 1.25)),
    ({"kind": "hash", "capacity": 0.0}, (False, False, 0.0)),
  ],
  ids=str,
)
def test_what_the_model_knows_of_its_routing(routing, expected):
  cfg = made(TINY, **routing)
  assert (cfg.gated, cfg.cut_experts, cfg.capacity) == expected
  assert cfg.jitter == (0.01 if cfg.gated else 0.0)
  assert cfg.expert_axis == "fsdp"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"preset": "bas"}, r"model\.preset='bas'.*base"),
    ({"dtype": "float16"}, r"model\.dtype='float16'.*bfloat16"),
    ({"expert_layers": "every_secnd"}, r"model\.expert_layers=.*every_second"),
    ({"activation": "relo"}, r"model\.activation='relo'.*relu"),
    ({"positions": "learned"}, r"model\.positions='learned'.*fairseq"),
    ({"width": 18, "heads": 4}, r"model\.width=18 is not divisible.*heads=4"),
    ({"width": 15, "heads": 3}, r"model\.width=15 must be even"),
    ({"heads": 0}, r"model\.heads=0 must be at least 1"),
    ({"decoder_layers": 0}, r"model\.decoder_layers=0 must be at least 1"),
    ({"dropout": 1.0}, r"model\.dropout=1\.0 must be from 0 and below 1"),
    ({"attention_dropout": -0.1}, r"model\.attention_dropout=-0\.1"),
    ({"activation_dropout": 2.0}, r"model\.activation_dropout=2\.0"),
  ],
  ids=str,
)
def test_a_wrong_model_is_refused_in_a_line(change, message):
  with pytest.raises(UserError, match=message) as error:
    made(TINY | change)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kind": "thorr"}, r"routing\.kind='thorr'.*thor"),
    ({"level": "batches"}, r"routing\.level='batches'.*batch"),
    ({"pair": "distint"}, r"routing\.pair='distint'.*distinct"),
    ({"table": "even"}, r"routing\.table='even'"),
    ({"axis": "model"}, r"routing\.axis='model'"),
    ({"experts": 0}, r"routing\.experts=0 must be at least 1"),
    ({"pair": "distinct", "experts": 1}, r"pair='distinct' needs two experts"),
    ({"kind": "dense"}, r"kind='dense' has one expert.*set it to 1"),
    ({"kind": "switch", "capacity": -1.0}, r"routing\.capacity=-1\.0"),
    ({"kind": "switch", "jitter": float("inf")}, r"routing\.jitter=inf"),
    ({"kind": "switch", "groups": 0}, r"groups=0 must be at least 1"),
  ],
  ids=str,
)
def test_a_wrong_routing_is_refused_in_a_line(change, message):
  with pytest.raises(UserError, match=message) as error:
    made(TINY, **change)
  assert "\n" not in str(error.value)


def test_an_empty_pattern_is_refused():
  with pytest.raises(UserError, match=r"model\.pattern is empty"):
    Settings(20, pattern=())
