"""Variants, durations, exact JSON, and what may change on resume."""

import math
import os
import subprocess
import sys

import pytest
from ml_collections import ConfigDict, config_dict

from common import config as config_lib
from common.errors import UserError


def make_config(**changes):
  config = ConfigDict(
    {
      "seed": 0,
      "optim": {"lr": 1e-3, "betas": (0.9, 0.95), "name": "adamw"},
      "log": {"every": 10},
      "note": None,
    }
  )
  config.update_from_flattened_dict(changes)
  return config


def smoke(config):
  config.seed = 1
  config.optim.lr = 1.0


def fast(config):
  config.optim.lr *= 2


def typo(config):
  config.optim.lrr = 1.0


VARIANTS = {"smoke": smoke, "fast": fast, "typo": typo}


@pytest.mark.parametrize(
  ("variant", "seed", "lr"),
  [
    (None, 0, 1e-3),
    ("", 0, 1e-3),
    ("smoke", 1, 1.0),
    ("smoke,fast", 1, 2.0),
    ("fast, smoke", 1, 1.0),
  ],
)
def test_variants_apply_from_left_to_right(variant, seed, lr):
  config = config_lib.apply_variants(make_config(), variant, VARIANTS)
  assert (config.seed, config.optim.lr) == (seed, lr)
  assert config.is_locked


def test_a_run_of_another_method_is_refused(tmp_path):
  config = make_config()
  config_lib.check_kind(tmp_path, config)
  config_lib.save_config(tmp_path, config)
  config_lib.check_kind(tmp_path, config)
  more = ConfigDict({**config, "newer": 1})
  config_lib.check_kind(tmp_path, more)  # a version that knows more
  other = ConfigDict({"seed": 0, "prune": 1})
  with pytest.raises(UserError, match=r"another method .*no 'prune'.*workdir"):
    config_lib.check_kind(tmp_path, other)


def test_many_changes_are_counted(tmp_path):
  config_lib.save_config(tmp_path, ConfigDict({f"k{i}": 0 for i in range(30)}))
  changed = ConfigDict({f"k{i}": 1 for i in range(30)})
  with pytest.raises(UserError, match=r"k0: 0 -> 1; .*; and 22 more"):
    config_lib.check_resume(tmp_path, changed)


@pytest.mark.parametrize(
  ("variant", "hint"),
  [("smok", "did you mean 'smoke'"), ("zzz", "known: smoke, fast, typo")],
)
def test_an_unknown_variant_names_the_known(variant, hint):
  with pytest.raises(UserError, match=f"variant '{variant}'; {hint}"):
    config_lib.apply_variants(make_config(), f"fast,{variant}", VARIANTS)


def test_a_variant_cannot_invent_a_key():
  with pytest.raises(AttributeError, match="lrr"):
    config_lib.apply_variants(make_config(), "typo", VARIANTS)


@pytest.mark.parametrize(
  ("name", "hint"),
  [
    ("optim.lrr", "; did you mean 'optim.lr'?"),
    ("lr", "; did you mean 'optim.lr'?"),
    ("nothing.alike", "; known: seed, optim.lr, optim.name"),
  ],
)
def test_did_you_mean(name, hint):
  assert (
    config_lib.did_you_mean(name, ["seed", "optim.lr", "optim.name"]) == hint
  )


def test_did_you_mean_keeps_silent_rather_than_list_everything():
  assert config_lib.did_you_mean("zz", [f"key{i}" for i in range(99)]) == ""


def test_check_keys():
  config_lib.check_keys(["a"], ["a", "b"], what="entry")
  with pytest.raises(UserError, match="entry 3: unknown key 'wieght'; did you"):
    config_lib.check_keys(["wieght"], ["weight"], what="entry 3")


SIZES = {
  "batch_size": 32,
  "data_size": 1000,
  "tokens_per_step": 4096,
  "total_steps": 500,
}


@pytest.mark.parametrize(
  ("config", "expected"),
  [
    ({"warmup_steps": 7}, 7),
    ({"warmup_steps": 0}, 0),
    ({"warmup_epochs": 2.5}, 78),  # 2.5 * 1000 / 32 = 78.1
    ({"warmup_examples": 320}, 10),
    ({"warmup_tokens": 1e6}, 244),  # 244.1
    ({"warmup_percent": 10}, 50),
    ({"warmup_percent": 0}, 0),
    ({"warmup_examples": 1}, 1),  # positive, so at least one step
    ({"warmup_steps": None, "warmup_epochs": 1}, 31),
  ],
)
def test_durations_become_steps(config, expected):
  assert config_lib.steps("warmup", ConfigDict(config), **SIZES) == expected


def test_a_duration_may_have_a_default():
  assert config_lib.steps("warmup", {"total_steps": 3}, default=5) == 5


@pytest.mark.parametrize(
  ("config", "sizes", "message"),
  [
    ({}, SIZES, "none is set; set exactly one of warmup_steps, warmup_epochs"),
    (
      {"warmup_steps": 1, "warmup_percent": 1},
      SIZES,
      "warmup_steps and warmup_percent are set",
    ),
    ({"warmup_epochs": 1}, {"batch_size": 4}, "epochs have no length here"),
    ({"warmup_steps": -1}, {}, "warmup_steps=-1 must be"),
    ({"warmup_steps": math.inf}, {}, "warmup_steps=inf must be"),
    ({"warmup_steps": True}, {}, "warmup_steps=True must be"),
    ({"warmup_steps": "9"}, {}, "warmup_steps='9' must be"),
    ({"warmup_percent": 101}, SIZES, "at most 100"),
  ],
)
def test_bad_durations(config, sizes, message):
  with pytest.raises(UserError, match=message):
    config_lib.steps("warmup", config, **sizes)


def test_json_is_exact():
  config = ConfigDict(
    {
      "tuple": (1, (2.5, "x"), ()),
      "list": [1, (2,)],
      "floats": (0.1 + 0.2, 1e-45, math.inf, -math.inf),
      "int": 2**63,
      "whole": 1.0,
      "none": None,
      "bool": True,
      "text": "π\n\"'",
      "empty": {},
      "nested": {"deep": {"key": (1,)}},
    }
  )
  text = config_lib.to_json(config)
  again = config_lib.from_json(text)
  assert again.to_dict() == config.to_dict()
  assert type(again.whole) is float
  assert isinstance(again.nested.deep, ConfigDict)
  assert type(again.list[1]) is tuple
  assert config_lib.to_json(again) == text
  assert "Infinity" not in text
  nan = config_lib.from_json(config_lib.to_json({"x": math.nan})).x
  assert math.isnan(nan)


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ({1, 2}, r"config\.optim\.x\[0\] is a set"),
    (len, r"is a builtin_function_or_method"),
    ({"__tuple__": 1}, "__tuple__"),
    ({3: 4}, "key 3"),
  ],
)
def test_json_refuses_what_is_not_data(value, message):
  with pytest.raises(UserError, match=message):
    config_lib.to_json({"optim": {"x": (value,)}})


def test_placeholders_resolve():
  config = ConfigDict({"a": config_dict.placeholder(int)})
  config.b = config.get_ref("a")
  config.a = 3
  assert config_lib.from_json(config_lib.to_json(config)).b == 3


def test_diff_names_keys_with_both_values():
  new = make_config(**{"optim.betas": (0.9, 0.99), "seed": 5})
  del new["note"]
  new.extra = "x"
  assert config_lib.diff(make_config(), new) == [
    "extra: (absent) -> 'x'",
    "note: None -> (absent)",
    "optim.betas: (0.9, 0.95) -> (0.9, 0.99)",
    "seed: 0 -> 5",
  ]
  assert config_lib.diff(make_config(), make_config()) == []


@pytest.mark.parametrize(
  ("old", "new"), [(1, 1.0), (True, 1), ((1,), [1]), (None, "None"), ({}, ())]
)
def test_diff_sees_types(old, new):
  assert config_lib.diff({"x": old}, {"x": new}) == [f"x: {old!r} -> {new!r}"]
  assert config_lib.diff({"x": old}, {"x": old}) == []


def test_a_new_folder_and_the_same_config_pass(tmp_path):
  config_lib.check_resume(tmp_path / "new", make_config())
  config_lib.save_config(tmp_path, make_config())
  config_lib.check_resume(tmp_path, make_config())
  assert config_lib.load_config(tmp_path).to_dict() == make_config().to_dict()
  assert os.listdir(tmp_path) == ["config.json"]


def test_a_changed_config_is_refused_unless_free(tmp_path):
  config_lib.save_config(tmp_path, make_config())
  changed = make_config(**{"optim.lr": 1.0, "log.every": 5, "seed": 3})
  with pytest.raises(UserError) as info:
    config_lib.check_resume(tmp_path, changed, free=("log",))
  message = str(info.value)
  assert "optim.lr: 0.001 -> 1.0; seed: 0 -> 3" in message
  assert "log.every" not in message
  assert str(tmp_path) in message
  assert "choose another --workdir" in message
  config_lib.check_resume(tmp_path, changed, free=("log", "optim.lr", "seed"))
  with pytest.raises(UserError, match=r"log\.every"):  # no prefix of a name
    config_lib.check_resume(tmp_path, changed, free=("lo", "optim", "seed"))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_a_damaged_config_is_named(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match=r"config\.json is damaged"):
    config_lib.check_resume(tmp_path, make_config())


def test_loading_from_a_folder_without_a_run(tmp_path):
  with pytest.raises(UserError, match=r"no run in .* no config\.json"):
    config_lib.load_config(tmp_path)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("run/model.safetensors", r"give its folder, '.*run'"),
    ("notes.txt", "is a file: give a run's folder"),
  ],
)
def test_a_file_is_no_folder_of_a_run(tmp_path, name, message):
  run = tmp_path / "run"
  run.mkdir()
  config_lib.save_config(run, make_config())
  (tmp_path / name).write_text("")
  with pytest.raises(UserError, match=message):
    config_lib.load_config(tmp_path / name)


def test_saving_never_shows_half_a_file(tmp_path, monkeypatch):
  config_lib.save_config(tmp_path, make_config())

  def fail(config):
    raise OSError("disk")

  monkeypatch.setattr(config_lib, "to_json", fail)
  with pytest.raises(OSError, match="disk"):
    config_lib.save_config(tmp_path, make_config(seed=9))
  monkeypatch.undo()
  # A kill between the write and the rename leaves only the new file's draft.
  (tmp_path / "config.json.new").write_text('{"seed":')
  assert config_lib.load_config(tmp_path).seed == 0
  config_lib.save_config(tmp_path, make_config(seed=9))
  assert config_lib.load_config(tmp_path).seed == 9
  assert os.listdir(tmp_path) == ["config.json"]


def test_a_config_file_imports_nothing_heavy():
  code = (
    "import sys, common.config;"
    "print({'jax', 'numpy', 'etils', 'flax'} & set(sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "set()"


def test_pages_show_many_settings_of_systems_as_one():
  systems = {f"s{i}": (f"seed={i}",) for i in range(6)}
  config = ConfigDict(
    {"seed": 0, "compare": {"settings": systems, "seeds": 3}, "free": {},
     "betas": (0.9, 0.95), "few": {"a": ("x",)}}
  )  # fmt: skip
  assert config_lib.folded(config, place="x.py") == {
    "seed": "0", "compare.settings": "6 entries, see x.py",
    "compare.seeds": "3", "free": repr(ConfigDict({})),
    "betas": "(0.9, 0.95)", "few.a": "('x',)",
  }  # fmt: skip
