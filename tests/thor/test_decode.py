"""The search is fairseq's, the draws are the model's."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from common.errors import UserError
from common.parallel import batch_sharding, make_mesh
from thor.decode import Search, beam_search, sample, score
from thor.decode_search import top_k
from thor.dispatch import Dispatch, prepare
from thor.evaluation import next_log_probs
from thor.model import init_params
from thor.settings import Settings

BOS, PAD, EOS, VOCAB, ROOM = 0, 1, 2, 7, 5
# Sums in another order, in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SOURCE = np.array(
  [[3, 4, 5, 6, EOS], [5, 3, EOS, PAD, PAD], [6, EOS, PAD, PAD, PAD]], np.int32
)


@functools.cache
def model(seed=0, mode="dense", vocab=VOCAB, end=0.0):
  """A random model, which ends sooner or later by `end`."""
  experts = {"pattern": (False,)}
  if mode != "dense":
    experts = {"pattern": (True,), "experts": 3}
  settings = Settings(
    vocab, width=16, hidden=12, heads=2, encoder_layers=1, decoder_layers=1,
    logits_bias=True, **experts,
  )  # fmt: skip
  rng = np.random.default_rng(seed)
  make = functools.partial(init_params, settings)
  shapes = jax.eval_shape(make, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32),
    shapes,
  )
  bias = rng.normal(0, 0.4, vocab).astype(np.float32)
  bias[EOS] += end
  return prepare(
    {**params, "logits_bias": jnp.asarray(bias)}, settings, Dispatch(mode)
  )


_next = jax.jit(next_log_probs)


def log_probs_after(prepared, source, prefixes):
  """Of the token after each prefix, by teacher forcing, [n v]."""
  rows = np.full((8, ROOM + 1), PAD, np.int32)
  for row, prefix in zip(rows, prefixes, strict=False):
    row[: len(prefix) + 1] = [EOS, *prefix]
  made = _next(prepared, np.repeat(source[None], 8, axis=0), rows)
  return np.array([np.asarray(made)[i, len(p)] for i, p in enumerate(prefixes)])


def penalty_of(search, length):
  if search.penalty == "gnmt":
    return ((5 + length) / 6) ** search.length_penalty
  return length**search.length_penalty


def fairseq_search(prepared, source, search, prefix=()):
  """Its loop for one sentence, hypothesis by hypothesis."""
  beam = search.beam
  live, finished = [(0.0, [])], []
  most = search.max_length(int(np.sum(source != PAD)))
  for step in range(most + 1):
    rows = log_probs_after(prepared, source, [tokens for _, tokens in live])
    rows[:, PAD] = -np.inf
    forced = prefix[step] if step < len(prefix) else PAD
    if step == most:
      rows[:, np.arange(rows.shape[1]) != EOS] = -np.inf
    elif forced != PAD:
      rows[:, np.arange(rows.shape[1]) != forced] = -np.inf
    elif step < search.min_length:
      rows[:, EOS] = -np.inf
    ways = [
      (total + rows[i, token], i, token)
      for i, (total, _) in enumerate(live)
      for token in range(rows.shape[1])
      if rows[i, token] > -np.inf
    ]
    ways = sorted(ways, reverse=True)[: 2 * beam]
    for total, i, token in ways[:beam]:
      if token != EOS:
        continue
      own = (total / penalty_of(search, step + 1), [*live[i][1], EOS])
      if len(finished) < beam:
        finished.append(own)
      elif not search.early_stop:
        finished = sorted([*finished, own], reverse=True)[:beam]
    live = [(t, [*live[i][1], token]) for t, i, token in ways if token != EOS]
    live = live[:beam]
    if not live:
      break
    if len(finished) == beam:
      if search.early_stop:
        break
      bound = live[0][0] / penalty_of(search, most + 1)
      if min(finished)[0] >= bound:
        break
  return sorted(finished, reverse=True)[: search.n_best]


def hypotheses(made, row):
  """(score, tokens) as `fairseq_search` has them; checks what is padding."""
  found = []
  for tokens, value, length in zip(
    np.asarray(made.tokens[row]), made.scores[row], made.lengths[row]
  ):
    assert np.all(tokens[length:] == PAD)
    if length:
      found.append((float(value), tokens[:length].tolist()))
  return found


def check_against_fairseq(prepared, source, search, prefix=None):
  made = beam_search(prepared, source, search, prefix=prefix)
  for i, row in enumerate(source):
    own = () if prefix is None else prefix[i].tolist()
    expected = fairseq_search(prepared, row, search, own)
    found = hypotheses(made, i)
    assert [t for _, t in found] == [t for _, t in expected]
    np.testing.assert_allclose(
      [s for s, _ in found], [s for s, _ in expected], **CLOSE
    )
    assert len({tuple(tokens) for _, tokens in found}) == len(found)
    assert [s for s, _ in found] == sorted([s for s, _ in found], reverse=True)


SEARCHES = [
  Search(beam=1, max_ratio=0.5, max_extra=2),
  Search(beam=4, n_best=4, max_ratio=0.5, max_extra=2),
  Search(
    beam=4, n_best=4, max_ratio=0.5, max_extra=2, early_stop=False,
    length_penalty=2.0,
  ),
  Search(
    beam=3, n_best=2, max_ratio=0.5, max_extra=2, penalty="gnmt",
    length_penalty=0.6, min_length=0,
  ),
]  # fmt: skip


@pytest.mark.parametrize("search", SEARCHES)
def test_the_search_is_fairseqs(search):
  for seed in range(4):
    check_against_fairseq(model(seed, end=seed / 2), SOURCE, search)


def test_stopping_early_and_late_differ():
  early = Search(beam=4, n_best=4, max_ratio=0.5, max_extra=2)
  late = SEARCHES[2]
  same = [
    np.array_equal(
      beam_search(model(seed, end=1.0), SOURCE, early).tokens,
      beam_search(model(seed, end=1.0), SOURCE, late).tokens,
    )
    for seed in range(4)
  ]
  assert not all(same)


def test_a_beam_of_one_takes_the_likeliest_token_each_time():
  made = beam_search(model(), SOURCE, SEARCHES[0])
  for i, source in enumerate(SOURCE):
    tokens, most = [], SEARCHES[0].max_length(int(np.sum(source != PAD)))
    while tokens[-1:] != [EOS] and len(tokens) < most:
      row = log_probs_after(model(), source, [tokens])[0]
      row[PAD] = -np.inf
      row[EOS] = row[EOS] if tokens else -np.inf
      tokens.append(int(np.argmax(row)))
    tokens += [] if tokens[-1] == EOS else [EOS]
    assert hypotheses(made, i)[0][1] == tokens


# -- against all there is ------------------------------------------------------

SMALL = 6
EVERY = [
  [*tokens, EOS]
  for length in (1, 2)
  for tokens in itertools.product([BOS, 3, 4, 5], repeat=length)
]


@functools.cache
def every_log_prob(seed):
  target = np.full((len(EVERY), 3), PAD, np.int32)
  for row, tokens in zip(target, EVERY):
    row[: len(tokens)] = tokens
  source = np.repeat(SOURCE[1:2] % SMALL, len(EVERY), axis=0)
  each = score(model(seed, vocab=SMALL), source, target)
  return np.asarray(each).sum(axis=-1)


def best_of_all(seed, search):
  scores = every_log_prob(seed) / [penalty_of(search, len(t)) for t in EVERY]
  order = np.argsort(-scores)[: search.n_best]
  return [(float(scores[i]), EVERY[i]) for i in order]


def full(**more):
  return Search(beam=len(EVERY), n_best=5, max_ratio=0, max_extra=2, **more)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("penalty", ["fairseq", "gnmt"])
def test_a_beam_with_room_for_all_finds_the_best_of_all(penalty, early_stop):
  search = full(penalty=penalty, early_stop=early_stop)
  for seed in range(3):
    prepared = model(seed, vocab=SMALL)
    made = beam_search(prepared, SOURCE[1:2] % SMALL, search)
    found, expected = hypotheses(made, 0), best_of_all(seed, search)
    assert [t for _, t in found] == [t for _, t in expected]
    np.testing.assert_allclose(
      [s for s, _ in found], [s for s, _ in expected], **CLOSE
    )


def test_the_likeliest_need_not_be_the_best_for_its_length():
  raw, normalized = full(length_penalty=0.0), full(penalty="fairseq")
  seed = next(
    s for s in range(20)
    if best_of_all(s, raw)[0][1] != best_of_all(s, normalized)[0][1]
  )  # fmt: skip
  for search in (raw, normalized):
    made = beam_search(model(seed, vocab=SMALL), SOURCE[1:2] % SMALL, search)
    assert hypotheses(made, 0)[0][1] == best_of_all(seed, search)[0][1]
    np.testing.assert_allclose(
      made.log_probs[0, 0], every_log_prob(seed)[
        EVERY.index(hypotheses(made, 0)[0][1])
      ], **CLOSE
    )  # fmt: skip


# -- what a sentence is translated with ----------------------------------------


def test_a_sentence_translates_alone_and_longer_padded_as_in_a_batch():
  prepared, search = model(mode="dispatch_token"), SEARCHES[1]
  batch = np.full((8, 5), PAD, np.int32)  # a shape that compiles once
  batch[:3] = SOURCE
  together = beam_search(prepared, batch, search)
  for i, row in enumerate(SOURCE):
    padded = np.full((1, 9), PAD, np.int32)
    padded[0, :5] = row
    alone = beam_search(prepared, padded, search)
    assert [t for _, t in hypotheses(alone, 0)] == [
      t for _, t in hypotheses(together, i)
    ]
    np.testing.assert_allclose(alone.scores[0], together.scores[i], **CLOSE)


@pytest.mark.parametrize(
  ("mode", "draws"), [("dispatch_token", False), ("dense", True)]
)
def test_devices_translate_their_rows(mode, draws):
  prepared = model(mode=mode)
  rng = np.random.default_rng(0)
  source = np.full((8, 5), PAD, np.int32)  # the last row is empty
  source[:7, :4] = rng.integers(3, VOCAB, (7, 4))
  source[:7, 4] = EOS
  mesh = make_mesh({"data": 2, "fsdp": 4})
  cut = jax.device_put(source, batch_sharding(mesh))
  run = functools.partial(beam_search, search=SEARCHES[1])
  if draws:
    run = functools.partial(sample, search=SEARCHES[1], seed=3, n=2)
  here, there = run(prepared, source), run(prepared, cut)
  np.testing.assert_array_equal(here.tokens, there.tokens)
  np.testing.assert_allclose(here.scores, there.scores, **CLOSE)
  assert there.tokens.sharding.spec[0] == ("data", "fsdp")


def test_empty_rows_end_at_once():
  empty = np.full_like(SOURCE, PAD)
  mixed = np.concatenate([SOURCE[:1], empty[1:]])
  more = np.concatenate([mixed, empty, empty[:2]])  # a shape that is compiled
  for made in (
    beam_search(model(), mixed, SEARCHES[1]),
    sample(model(), more, SEARCHES[1], seed=0, n=2),
  ):
    assert np.all(np.asarray(made.tokens)[1:] == PAD)
    assert np.all(np.asarray(made.lengths)[1:] == 0)
    assert not np.any(np.isnan(made.scores))
    assert np.all(np.asarray(made.lengths)[0] > 0)
  none = beam_search(model(), empty, SEARCHES[1])
  assert np.all(np.asarray(none.scores) == -np.inf)
  assert np.all(np.asarray(score(model(), empty, empty)) == 0)


def test_what_will_not_end_ends_at_its_greatest_length():
  made = beam_search(model(end=-50.0), SOURCE, SEARCHES[1])
  for i, source in enumerate(SOURCE):
    most = SEARCHES[1].max_length(int(np.sum(source != PAD)))
    for _, tokens in hypotheses(made, i):
      assert len(tokens) == most + 1
      assert tokens.index(EOS) == most
      assert PAD not in tokens


def test_forced_tokens_come_first():
  prefix = np.array([[4, 6], [PAD, 3], [5, EOS]], np.int32)
  for seed in range(3):
    check_against_fairseq(model(seed), SOURCE, SEARCHES[1], prefix)


@pytest.mark.parametrize(("size", "k"), [(40, 3), (2048, 4), (3001, 3)])
def test_the_best_of_a_long_row_are_those_of_jax(size, k):
  x = np.random.default_rng(0).permutation(6 * size).reshape(2, 3, size)
  x = jnp.asarray(x, jnp.float32)
  made, expected = jax.jit(top_k, static_argnums=1)(x, k), jax.lax.top_k(x, k)
  np.testing.assert_array_equal(made[0], expected[0])
  np.testing.assert_array_equal(made[1], expected[1])


# -- draws ---------------------------------------------------------------------

ONE = Search(max_ratio=0, max_extra=1)


def drawn(seed=0, n=4000, source=SOURCE, **more):
  return sample(model(), source, ONE, seed=seed, n=n, **more)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax_at_a_temperature(temperature):
  made = drawn(temperature=temperature)
  for i, source in enumerate(SOURCE):
    logits = log_probs_after(model(), source, [[]])[0].astype(np.float64)
    logits[[PAD, EOS]] = -np.inf
    probs = np.exp(logits / temperature)
    probs /= probs.sum()
    counts = np.bincount(np.asarray(made.tokens)[i, :, 0], minlength=VOCAB)
    kept = probs > 0
    assert counts[~kept].sum() == 0
    test = scipy.stats.chisquare(counts[kept], 4000 * probs[kept])
    assert test.pvalue > 1e-3
  np.testing.assert_allclose(
    np.sum(score(model(), SOURCE, np.asarray(made.tokens)[:, 0]), axis=-1),
    made.log_probs[:, 0],
    **CLOSE,
  )


def test_draws_follow_from_the_seed_and_the_sentence_alone():
  made, again = drawn(), drawn(source=SOURCE[[2, 0, 1]])
  np.testing.assert_array_equal(made.tokens, again.tokens[np.array([1, 2, 0])])
  assert not np.array_equal(made.tokens, drawn(seed=1).tokens)


@pytest.mark.parametrize("more", [{"top_k": 2}, {"top_p": 0.6}])
def test_draws_are_among_the_likeliest(more):
  made = drawn(**more)
  for i, source in enumerate(SOURCE):
    logits = log_probs_after(model(), source, [[]])[0].astype(np.float64)
    logits[[PAD, EOS]] = -np.inf
    probs = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-probs)
    count = more.get("top_k")
    if count is None:
      count = 1 + int(np.sum(np.cumsum(probs[order]) < more["top_p"]))
    found = np.unique(np.asarray(made.tokens)[i, :, 0])
    assert set(found.tolist()) == set(order[:count].tolist())


@pytest.mark.parametrize(
  ("run", "text"),
  [
    (lambda: Search(beam=0), "beam=0 must be at least 1"),
    (lambda: Search(beam=2, n_best=3), "n_best=3 is more than beam=2"),
    (lambda: Search(penalty="gmnt"), "penalty='gmnt'; did you mean 'gnmt'"),
    (lambda: Search(length_penalty=float("nan")), "length_penalty=nan"),
    (lambda: Search(max_ratio=-1), "max_ratio=-1 must be"),
    (lambda: Search(max_ratio=0, max_extra=0), "no room"),
    (lambda: drawn(temperature=0.0), "temperature=0.0 must be"),
    (lambda: drawn(top_k=-1), "top_k=-1 must be"),
    (lambda: drawn(top_p=0), r"top_p=0 must be in"),
    (lambda: drawn(n=0), "n=0 must be"),
    (
      lambda: beam_search(model(), SOURCE, prefix=np.zeros((2, 1), np.int32)),
      r"prefix of shape \[2, 1\] for 3 sentences",
    ),
  ],
)
def test_settings_without_a_meaning_are_refused(run, text):
  with pytest.raises(UserError, match=text):
    run()
