"""What holds for every example, how controls act, and what is refused."""

import dataclasses

import numpy as np
import pytest

from birdie import corruption
from birdie.controls import CONTROLS, ObjectiveConfig
from birdie.objectives import OBJECTIVES, Example, NotEnough
from birdie.vocab import byte_vocabulary, extend
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError
from common.rngs import np_rng

VOCAB = byte_vocabulary()
S = VOCAB.sentinels
LETTERS = ByteTokenizer().encode("ABCDEFGHIJ")
DISTINCT = np.arange(1000, 3000, dtype=np.int32)
ROOM = 1 << 20
TEXTS = {
  "english": "The import statement combines two operations; it searches for "
  "the named module, then it binds the results of that search to a name in "
  "the local scope. The search operation is defined as a call to a function "
  "with the appropriate arguments. The value returned is used to bind it. ",
  "chinese": "模块是一个包含定义和语句的文件。文件名就是模块名加上后缀。"
  "在一个模块内部，模块名可以通过全局变量获得。"
  "模块可以包含可执行的语句以及函数定义。这些语句用于初始化模块。"
  "它们仅在模块第一次在导入语句中被遇到时执行。",
  "hindi": "मॉड्यूल एक फ़ाइल है जिसमें परिभाषाएँ और कथन होते हैं। "
  "फ़ाइल का नाम ही मॉड्यूल का नाम होता है। "
  "मॉड्यूल के भीतर उसका नाम एक चर में मिलता है। ",
  "dna": "".join("ACGT"[i] for i in np_rng(0, "dna").integers(0, 4, 600)),
}
TEXTS = {name: ByteTokenizer().encode(text) for name, text in TEXTS.items()}


def make(objective, tokens, rng=0, *, space=ROOM, **controls):
  """Runs an objective; its paradigm stands first if nothing is said."""
  settings = {
    "paradigm": VOCAB.paradigms[objective],
    "paradigm_append_prob": 0.0,
    "min_length": 1,
  }
  cfg = ObjectiveConfig(VOCAB, **(settings | controls))
  if isinstance(rng, int):
    rng = np_rng(rng, "test")
  return OBJECTIVES[objective](tokens, cfg, rng, space)


def size(example):
  return len(example.inputs) + len(example.labels)


def equal(a, b):
  return np.array_equal(a.inputs, b.inputs) and np.array_equal(
    a.labels, b.labels
  )


# -- round trips ---------------------------------------------------------------


def fragments(values):
  """Values cut before each sentinel."""
  return np.split(values, np.flatnonzero(np.isin(values, S)))


def fill_in(inputs, labels):
  """The text of an infilling example."""
  spans = {f[0]: f[1:] for f in fragments(labels) if len(f)}
  out = [spans.get(i, [i]) for i in inputs.tolist()]
  return np.concatenate(out)


def is_subsequence(values, text):
  rest = iter(text.tolist())
  return all(value in rest for value in values.tolist())


def check_next_token_prediction(inputs, labels, text):
  assert not len(inputs)
  np.testing.assert_array_equal(labels, text)


def check_prefix_language_modeling(inputs, labels, text):
  np.testing.assert_array_equal([*inputs, *labels], text)
  assert min(len(inputs), len(labels)) >= 4


def check_infilling(inputs, labels, text):
  np.testing.assert_array_equal(fill_in(inputs, labels), text)
  assert np.isin(inputs, S).sum() + 1 == np.isin(labels, S).sum()


def check_autoencoding(inputs, labels, text):
  np.testing.assert_array_equal(labels, text)
  kept = inputs[~np.isin(inputs, S)]
  assert 0 < len(kept) < len(text)
  assert is_subsequence(kept, text)


def check_autoencoding_with_deshuffling(inputs, labels, text):
  pieces = [f for f in fragments(inputs) if len(f)]
  # The text's first fragment has no sentinel: it hides behind some other one,
  # unless it comes first.
  pieces.sort(key=lambda f: f[0] if f[0] in S else -1)
  flat = np.concatenate(pieces)
  assert [i for i in flat.tolist() if i in S] == [*S[: np.isin(flat, S).sum()]]
  if inputs[0] not in S:
    candidates = [flat]
  else:
    ends = np.cumsum([len(f) for f in pieces])
    candidates = (
      np.concatenate([flat[end - k : end], flat[: end - k], flat[end:]])
      for end, f in zip(ends, pieces)
      for k in range(1, len(f))
    )
  assert any(is_subsequence(c[~np.isin(c, S)], text) for c in candidates)
  np.testing.assert_array_equal(labels, text)


def check_copying(inputs, labels, text):
  np.testing.assert_array_equal(inputs, text)
  np.testing.assert_array_equal(labels, text)


def check_deshuffling(inputs, labels, text):
  np.testing.assert_array_equal(np.sort(inputs), np.sort(text))
  np.testing.assert_array_equal(labels, text)


def occurrences(text, pattern):
  k = len(pattern)
  return [i for i in range(len(text) - k + 1) if text[i : i + k] == pattern]


def cut(values, at):
  """Lists of what stands between the ids `at`."""
  out = [[]]
  for value in values:
    if value in at:
      out.append([])
    else:
      out[-1].append(value)
  return out


def check_selective_copying(inputs, labels, text, longest=12):
  inputs, text = inputs.tolist(), text.tolist()
  context = inputs.index(VOCAB.context)
  if context == 0:
    asked, context = inputs[len(text) + 1 :], inputs[1 : len(text) + 1]
  else:
    asked, context = inputs[:context], inputs[context + 1 :]
  assert context == text
  _, *delimiters = cut(asked, (VOCAB.start, VOCAB.end))
  assert labels[-1] == VOCAB.done
  answers = cut(labels[:-1].tolist(), (VOCAB.sep,))
  assert len(delimiters) == 2 * len(answers)
  for start, end, span in zip(delimiters[::2], delimiters[1::2], answers):
    assert 4 <= len(span) <= longest
    assert 1 <= min(len(start), len(end)) <= max(len(start), len(end)) <= 8
    found = [
      text[i + len(start) : j]
      for i in occurrences(text, start)
      for j in occurrences(text, end)
      if 4 <= j - i - len(start) <= longest
    ]
    assert found == [span]


CHECKS = {name: globals()[f"check_{name}"] for name in OBJECTIVES}
USUAL = {
  "autoencoding": {"corruption_rate": 0.5},
  "autoencoding_with_deshuffling": {"corruption_rate": 0.5},
  "selective_copying": {"num_spans": 3, "max_span": 12},
}


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_round_trips(objective, language):
  text = TEXTS[language]
  text.setflags(write=False)
  controls = {"min_length": 150, "max_length": 220, **USUAL.get(objective, {})}
  for seed in range(8):
    example = make(objective, text, seed, **controls)
    assert isinstance(example, Example)
    assert 150 <= example.used <= 220
    assert example.inputs.dtype == example.labels.dtype == np.int32
    assert example.inputs[:1] == VOCAB.paradigms[objective]
    CHECKS[objective](example.inputs[1:], example.labels, text[: example.used])


def test_selective_copying_in_the_other_order():
  text = TEXTS["english"]
  example = make("selective_copying", text, order="context_query", max_span=12)
  assert example.inputs[1] == VOCAB.context
  check_selective_copying(example.inputs[1:], example.labels, text)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_integers_are_text(objective, dtype):
  text = TEXTS["english"]
  stored = make(objective, text.astype(dtype), 3)
  assert stored.inputs.dtype == stored.labels.dtype == np.int32
  assert equal(stored, make(objective, text, 3))


# -- randomness ----------------------------------------------------------------

RANDOM = sorted(set(OBJECTIVES) - {"next_token_prediction", "copying"})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_generator_alone_decides(objective):
  before = np.random.get_state()[1].copy()  # noqa: NPY002
  bucket = {"min_length": 100, "max_length": 200}
  first = make(objective, DISTINCT, 1, **bucket)
  assert equal(first, make(objective, DISTINCT, 1, **bucket))
  others = [make(objective, DISTINCT, seed, **bucket) for seed in range(2, 6)]
  assert not any(equal(first, other) for other in others)
  np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("objective", RANDOM)
def test_calls_with_one_generator_differ(objective):
  rng = np_rng(0, "test")
  first, second = (make(objective, DISTINCT[:300], rng) for _ in range(2))
  assert not equal(first, second)


def test_deshuffling_of_fragments_shuffles():
  orders = set()
  for seed in range(20):
    example = make("autoencoding_with_deshuffling", DISTINCT[:100], seed)
    found = [i for i in example.inputs.tolist() if i in S]
    assert sorted(found) == list(S[:5])
    orders.add(tuple(found))
    plain = make("autoencoding", DISTINCT[:100], seed)
    assert sorted(plain.inputs[1:]) == sorted(example.inputs[1:])
    assert [i for i in plain.inputs.tolist() if i in S] == list(S[:5])
  assert len(orders) > 15


# -- lengths -------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("paradigm", [(), (4,), (70, 71, 72)])
def test_needs_are_exact(objective, paradigm):
  controls = {"min_length": 30, "max_length": 60, "paradigm": paradigm}
  space = make(objective, DISTINCT, space=0, **controls)
  text = make(objective, DISTINCT[:0], **controls)
  assert space.what == "space"
  assert text == NotEnough(30, "text")
  for seed in range(5):
    at_least = make(
      objective, DISTINCT[:30], seed, space=space.needed, **controls
    )
    assert isinstance(at_least, Example)
    assert size(at_least) == space.needed
    below = make(objective, DISTINCT, seed, space=space.needed - 1, **controls)
    assert below == space
    assert make(objective, DISTINCT[:29], seed, **controls) == text


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lengths_fill_what_bucket_space_and_text_allow(objective):
  def lengths(count=80):
    bucket = {"min_length": 30, "max_length": 39, **fixed}
    made = [
      make(objective, DISTINCT[:tokens], seed, space=space, **bucket)
      for seed in range(count)
    ]
    assert all(size(example) <= space for example in made)
    return {example.used for example in made}

  if objective == "selective_copying":
    # Otherwise it asks for less where there is little.
    fixed = {"max_span": 4, "max_delimiter": 1}
  else:
    fixed = {}
  tokens, space = 500, ROOM
  assert lengths(150) == set(range(30, 40))
  tokens = 34
  assert lengths() == set(range(30, 35))
  least = make(objective, DISTINCT, space=0, min_length=34, **fixed)
  tokens, space = 500, least.needed
  assert lengths() == set(range(30, 35))


def test_without_a_top_an_example_takes_all_that_fits():
  assert make("copying", DISTINCT[:40], space=61).used == 30
  assert make("copying", DISTINCT[:40]).used == 40


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5, 0.85])
@pytest.mark.parametrize("span", [3.0, 8.0, 32.0])
@pytest.mark.parametrize("n", [2, 10, 128, 511, 2000])
def test_sizes_follow_from_the_counts(n, span, rate):
  settings = {"corruption_rate": rate, "mean_span": span}
  noise, spans = corruption.noise_counts(n, rate, span)
  spans = min(spans, 99)
  infilled = make("infilling", DISTINCT[:n], **settings)
  assert size(infilled) == n + 2 * spans + 2
  assert len(infilled.labels) == noise + spans + 1
  coded = make("autoencoding", DISTINCT[:n], **settings)
  assert size(coded) == 1 + (n - noise + spans) + n


# -- span corruption -----------------------------------------------------------


def test_sentinels_run_out_explicitly():
  assert corruption.noise_counts(1500, 0.5, 3.0) == (750, 250)
  example = make(
    "infilling", DISTINCT[:1500], corruption_rate=0.5, mean_span=3.0
  )
  found = [i for i in example.labels.tolist() if i in S]
  assert found == list(S)  # 99 spans, and the last ends the labels
  assert len(example.labels) == 750 + 100
  check_infilling(example.inputs[1:], example.labels, DISTINCT[:1500])


def test_rate_one_masks_everything():
  infilled = make("infilling", LETTERS, corruption_rate=1.0)
  np.testing.assert_array_equal(infilled.inputs, [6, S[0]])
  np.testing.assert_array_equal(infilled.labels, [S[0], *LETTERS, S[1]])
  for objective in ("autoencoding", "autoencoding_with_deshuffling"):
    coded = make(objective, LETTERS, corruption_rate=1.0)
    np.testing.assert_array_equal(coded.inputs[1:], S[:1])


# -- the other controls --------------------------------------------------------


@pytest.mark.parametrize(
  ("controls", "low", "high"),
  [
    ({}, 50, 96),  # 0.75 +- 0.25, with four labels at the least
    ({"jitter": 0.0}, 75, 75),
    ({"prefix_frac": 0.1, "jitter": 0.05}, 5, 15),
    ({"prefix_frac": 0.0, "jitter": 0.0, "min_side": 20}, 20, 20),
    ({"prefix_frac": 1.0, "jitter": 0.0, "min_side": 20}, 80, 80),
  ],
)
def test_prefix_share(controls, low, high):
  text, objective = LETTERS.repeat(10), "prefix_language_modeling"
  examples = [make(objective, text, seed, **controls) for seed in range(300)]
  splits = [len(example.inputs) - 1 for example in examples]
  assert min(splits) >= low
  assert max(splits) <= high
  assert max(splits) - min(splits) >= 0.9 * (high - low)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_deshuffling_moves_its_share(share):
  moved = [
    np.sum(
      make("deshuffling", DISTINCT[:99], i, shuffle_rate=share).inputs[1:]
      != DISTINCT[:99]
    )
    for i in range(50)
  ]
  eligible = int(share * 99)
  # A random permutation leaves one place as it is, on average.
  assert max(moved) <= eligible
  assert abs(np.mean(moved) - (eligible - 1)) < 0.7


@pytest.mark.parametrize("language", TEXTS)
def test_deshuffling_of_characters_keeps_them_whole(language):
  text = TEXTS[language]
  example = make("deshuffling", text, level="char")
  bytes_ = (example.inputs[1:] - 64).astype(np.uint8).tobytes()
  original = (text - 64).astype(np.uint8).tobytes().decode()
  assert sorted(bytes_.decode()) == sorted(original)
  assert bytes_.decode() != original


def test_characters_need_a_byte_vocabulary():
  with pytest.raises(UserError, match="level='char' must be 'token'"):
    ObjectiveConfig(extend(1000), level="char")


@pytest.mark.parametrize(
  "objective", sorted(set(OBJECTIVES) - {"next_token_prediction"})
)
def test_paradigm_before_or_behind(objective):
  paradigm = (33, 34)
  plain, before, behind = (
    make(objective, DISTINCT[:200], 0, **controls)
    for controls in (
      {"paradigm": ()},
      {"paradigm": paradigm, "paradigm_append_prob": 0.0},
      {"paradigm": paradigm, "paradigm_append_prob": 1.0},
    )
  )
  np.testing.assert_array_equal(before.inputs, [*paradigm, *plain.inputs])
  np.testing.assert_array_equal(behind.inputs, [*plain.inputs, *paradigm])


def test_half_of_the_paradigms_stand_behind_by_default():
  default = ObjectiveConfig(VOCAB).paradigm_append_prob
  behind = sum(
    make("copying", LETTERS, i, paradigm_append_prob=default).inputs[-1] == 10
    for i in range(400)
  )
  assert abs(behind - 200) < 50  # 5 standard deviations


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_selective_copying_draws_its_lengths(count):
  spans, delimiters = set(), set()
  for seed in range(200):
    example = make("selective_copying", DISTINCT, seed, num_spans=count)
    answers = cut(example.labels[:-1].tolist(), (VOCAB.sep,))
    assert len(answers) == count
    spans |= {len(a) for a in answers}
    context = example.inputs.tolist().index(VOCAB.context)
    asked = cut(example.inputs[2:context].tolist(), (VOCAB.start, VOCAB.end))
    delimiters |= {len(d) for d in asked}
    starts = sorted(a[0] for a in answers)
    ends = sorted(a[-1] for a in answers)
    assert all(a < b for a, b in zip(ends, starts[1:]))
  assert delimiters == set(range(1, 9))
  assert min(spans) == 4
  assert max(spans) == 32


def test_queries_come_in_any_order():
  firsts = set()
  for seed in range(30):
    example = make("selective_copying", DISTINCT, seed, num_spans=3)
    answers = cut(example.labels[:-1].tolist(), (VOCAB.sep,))
    firsts.add(tuple(np.argsort([a[0] for a in answers])))
  assert len(firsts) == 6


def test_ambiguous_text_is_refused():
  same = np.full(300, 64, np.int32)
  made = make("selective_copying", same)
  assert made == NotEnough(301, "text")


def test_repetitive_text_gets_longer_delimiters():
  made = [
    make("selective_copying", TEXTS["dna"], seed, num_spans=4)
    for seed in range(50)
  ]
  # With delimiters as they are drawn at first, 28 are refused.
  assert sum(isinstance(m, NotEnough) for m in made) <= 2


# -- refusals ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("controls", "message"),
  [
    ({"corruption_rate": 0.0}, r"corruption_rate=0.0 must be in \(0, 1\]"),
    ({"corruption_rate": 1.5}, r"corruption_rate=1.5 must be in \(0, 1\]"),
    ({"corruption_rate": float("nan")}, "corruption_rate=nan must be in"),
    ({"corruption_rate": "0.5"}, "corruption_rate='0.5' must be in"),
    ({"shuffle_rate": -0.5}, r"shuffle_rate=-0.5 must be in \(0, 1\]"),
    ({"jitter": 2}, r"jitter=2 must be in \[0, 1\]"),
    ({"mean_span": 0.5}, "mean_span=0.5 must be a number of at least 1"),
    ({"mean_span": None}, "mean_span=None must be a number"),
    ({"min_length": 0}, "min_length=0 must be an integer of at least 1"),
    ({"min_length": 2.5}, "min_length=2.5 must be an integer"),
    ({"num_spans": True}, "num_spans=True must be an integer"),
    ({"min_length": 9, "max_length": 8}, "max_length=8 must be at least min"),
    ({"min_span": 9, "max_span": 8}, "max_span=8 must be at least min_span=9"),
    ({"order": "random"}, "order='random' must be one of"),
    ({"sentinel_position": "middle"}, "sentinel_position='middle' must be"),
    ({"final_sentinel": "yes"}, "final_sentinel='yes' must be"),
  ],
)
def test_bad_controls_are_refused(controls, message):
  with pytest.raises(UserError, match=message):
    ObjectiveConfig(VOCAB, **controls)


def test_every_control_belongs_to_an_objective():
  fields = {field.name for field in dataclasses.fields(ObjectiveConfig)}
  assert CONTROLS.keys() == OBJECTIVES.keys()
  assert {c for names in CONTROLS.values() for c in names} == fields - {"vocab"}
