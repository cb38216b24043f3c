import logging

import numpy as np
import pytest

from common.errors import UserError
from udim.domains import ArrayExamples, Domain, DomainSet
from udim.splits import Run, make_runs, seed_hash, split_keys, split_run


def domain_set(sizes, **settings):
  domains = []
  for name, size in sizes.items():
    images = np.arange(size, dtype=np.float32).reshape(-1, 1, 1, 1)
    domains.append(Domain(name, ArrayExamples(images, np.zeros(size, int))))
  return DomainSet(
    name="set", classes=("x",), domains=tuple(domains), **settings
  )


PACS = ("art", "cartoon", "photo", "sketch")
FOUR = domain_set(dict.fromkeys(PACS, 10))
CORRUPTED = domain_set(
  dict.fromkeys(("clean", "clean_test", "blur_1", "blur_2"), 10),
  sources=("clean",),
  references=("clean_test",),
)


def numbers(domain):
  return [int(example["image"].item()) for example in domain]


# DomainBed's own keys, printed by its `split_dataset`.
@pytest.mark.parametrize(
  ("env", "size", "seed", "first"),
  [
    (0, 2048, 894182419, [548, 677, 1997, 977, 1553]),
    (1, 2344, 1514274641, [1488, 562, 461, 570, 2092]),
  ],
)
def test_splits_are_domainbeds(env, size, seed, first):
  assert seed_hash(0, env) == seed
  main, out = split_keys(size, trial_seed=0, env=env)
  assert out[:5].tolist() == first
  assert len(out) == size // 5  # 409 of 2048
  assert sorted([*main, *out]) == list(range(size))
  # DomainBed shuffles a list: the order of both parts is that of a list.
  keys = list(range(size))
  np.random.RandomState(seed).shuffle(keys)
  assert [*out, *main] == keys


def test_splits_follow_trial_seed_and_position():
  made = {
    tuple(split_keys(100, trial_seed=t, env=e)[1])
    for t in range(3)
    for e in range(3)
  }
  assert len(made) == 9


@pytest.mark.parametrize(
  ("size", "holdout", "out"),
  [(10, 0.2, 2), (9, 0.2, 1), (4, 0.2, 0), (3, 0, 0)],
)
def test_the_held_out_share_is_rounded_down(size, holdout, out):
  main, held = split_keys(size, trial_seed=0, env=0, holdout=holdout)
  assert (len(main), len(held)) == (size - out, out)


@pytest.mark.parametrize("holdout", [-0.1, 1, 2.0])
def test_a_share_that_is_none_is_refused(holdout):
  with pytest.raises(UserError, match=r"data.holdout=.*in \[0, 1\)"):
    split_keys(10, trial_seed=0, env=0, holdout=holdout)


def test_leave_one_domain_out():
  assert make_runs(FOUR, "leave_one_out") == (
    Run("art", ("cartoon", "photo", "sketch"), ("art",)),
    Run("cartoon", ("art", "photo", "sketch"), ("cartoon",)),
    Run("photo", ("art", "cartoon", "sketch"), ("photo",)),
    Run("sketch", ("art", "cartoon", "photo"), ("sketch",)),
  )
  assert make_runs(FOUR, "leave_one_out", targets=("photo",)) == (
    Run("photo", ("art", "cartoon", "sketch"), ("photo",)),
  )
  # Fewer sources, the same targets.
  assert make_runs(
    FOUR, "leave_one_out", sources=("art", "photo"), targets=("photo", "sketch")
  ) == (
    Run("photo", ("art",), ("photo",)),
    Run("sketch", ("art", "photo"), ("sketch",)),
  )


def test_single_source():
  runs = make_runs(FOUR, "single_source")
  assert [run.sources for run in runs] == [(name,) for name in PACS]
  assert runs[1] == Run("cartoon", ("cartoon",), ("art", "photo", "sketch"))
  assert make_runs(FOUR, "single_source", sources=("art",)) == runs[:1]
  only = make_runs(FOUR, "single_source", targets=("art", "photo"))
  assert [run.targets for run in only] == [
    ("photo",), ("art", "photo"), ("art",), ("art", "photo"),
  ]  # fmt: skip


def test_clean_test_images_are_no_target():
  assert make_runs(CORRUPTED, "single_source") == (
    Run("clean", ("clean",), ("blur_1", "blur_2")),
  )


def test_a_chosen_run():
  assert make_runs(
    FOUR, "chosen", sources=("art", "photo"), targets=("sketch",)
  ) == (Run("art+photo", ("art", "photo"), ("sketch",)),)
  (run,) = make_runs(FOUR, "chosen", sources=("art", "photo"))
  assert run.targets == ("cartoon", "sketch")


@pytest.mark.parametrize(
  ("data", "protocol", "names", "message"),
  [
    (FOUR, "loo", {}, "protocol='loo': choose leave_one_out, single_source"),
    (FOUR, "chosen", {}, "leaves no domain to test on"),
    (FOUR, "chosen", {"sources": ("photos",)}, "'photos'.*mean 'photo'"),
    (FOUR, "single_source", {"targets": ("x",)}, "no domain 'x'"),
    (CORRUPTED, "leave_one_out", {}, "leaves no domain to train on.*clean"),
    (
      CORRUPTED,
      "single_source",
      {"sources": ("blur_1",)},
      "'blur_1' of 'set' is for testing: train on clean",
    ),
  ],
)
def test_protocols_that_do_not_fit_are_one_line(data, protocol, names, message):
  with pytest.raises(UserError, match=message) as caught:
    make_runs(data, protocol, **names)
  assert "\n" not in str(caught.value)


def test_a_run_is_split_by_the_domains_position():
  data = domain_set({"a": 30, "b": 20, "c": 25}, references=("b",))
  parts = split_run(data, Run("c", ("c",), ("a",)), trial_seed=3)
  assert [s.name for s in parts.sources] == ["c"]
  assert [t.name for t in parts.targets] == ["a"]
  assert [r.name for r in parts.references] == ["b"]
  for part, env, size in (
    (parts.sources[0], 2, 25),
    (parts.targets[0], 0, 30),
    (parts.references[0], 1, 20),
  ):
    main, out = split_keys(size, trial_seed=3, env=env)
    assert numbers(part.main) == main.tolist()
    assert numbers(part.holdout) == out.tolist()
    assert part.main.name == part.holdout.name == part.name


@pytest.mark.parametrize(
  ("size", "holdout", "message"),
  [
    (1, 0.2, "source domain 'a' has 1 image: .*give at least 5"),
    (4, 0.2, "has 4 images: data.holdout=0.2 leaves none.*give at least 5"),
    (9, 0.0, "has 9 images: .*choose a larger share, such as 0.2"),
  ],
)
def test_a_source_too_small_to_select_by_is_refused(size, holdout, message):
  data = domain_set({"a": size, "b": 10})
  with pytest.raises(UserError, match=message):
    split_run(data, Run("b", ("a",), ("b",)), holdout=holdout)


def test_a_target_of_one_image_is_reported_but_not_to_the_oracle(caplog):
  data = domain_set({"a": 10, "b": 1})
  with caplog.at_level(logging.WARNING):
    parts = split_run(data, Run("b", ("a",), ("b",)))
  assert (len(parts.targets[0].main), len(parts.targets[0].holdout)) == (1, 0)
  assert "the oracle does not see them: 'b' (1 image)" in caplog.text


def test_leave_one_out_with_fewer_sources():
  data = domain_set(dict.fromkeys(("0", "15", "30", "45", "60", "75"), 10))
  runs = {
    run.name: run.sources for run in make_runs(data, "leave_one_out", limit=2)
  }
  assert runs["0"] == ("15", "30")
  assert runs["30"] == ("45", "60")
  assert runs["75"] == ("0", "15")  # in a circle
  assert runs["60"] == ("0", "75")
  all_others = make_runs(data, "leave_one_out", limit=5)
  assert all_others == make_runs(data, "leave_one_out")
  with pytest.raises(UserError, match=r"sources_limit=6: there are 5"):
    make_runs(data, "leave_one_out", limit=6)
  with pytest.raises(UserError, match=r"sources_limit=1 has a meaning under"):
    make_runs(data, "single_source", limit=1)
