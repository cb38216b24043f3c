"""Birdie's models in EleutherAI's harness, and what they answer there."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from birdie import decode
from birdie import lm_eval_adapter as adapter
from birdie.models import GatedSSM, init_params
from birdie.run import Run
from birdie.scoring import bucket_size, log_likelihoods, score
from birdie.vocab import byte_vocabulary
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError

VOCAB = byte_vocabulary()
(NTP,) = VOCAB.paradigms["next_token_prediction"]
(PLM,) = VOCAB.paradigms["prefix_language_modeling"]
encode = ByteTokenizer().encode


@pytest.fixture(scope="module")
def run():
  model = GatedSSM(VOCAB.size, width=8, state=8, layers=2)
  params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
  # Small rows have small logits: letters are what it says.
  letters = np.isin(np.arange(VOCAB.size), encode("abcdefghijklmnopqrstuvwxyz"))
  params["embed"]["embedding"] *= np.where(letters, 1, 0.1)[:, None]
  return Run(None, model, params, ByteTokenizer(), VOCAB, 0)


class Hook:
  """Keeps what the harness would put in its cache."""

  def __init__(self):
    self.kept = []

  def add_partial(self, what, arguments, answer):
    self.kept.append((what, arguments, answer))


@pytest.fixture
def lm(run):
  def make(**settings):
    made = adapter._Answers(run, **settings)
    made.cache_hook = Hook()
    return made

  return make


def requests(*arguments):
  return [types.SimpleNamespace(args=args) for args in arguments]


def by_steps(run, prompt, labels):
  """Log-likelihood of a continuation as generation sees it, token by token."""
  tokens, lengths = decode.pad_prompts([prompt], gen=VOCAB.gen)
  state = decode.prefill(run.model, run.params, tokens, lengths)
  total, greedy, token = 0.0, True, VOCAB.gen
  for label in labels:
    logits, state = decode.decode_step(
      run.model, run.params, state, np.array([token], np.int32)
    )
    chances = np.asarray(jax.nn.log_softmax(logits[0]))
    total, greedy = total + chances[label], greedy and chances.argmax() == label
    token = int(label)
  return total, bool(greedy)


# -- scores --------------------------------------------------------------------

PAIRS = [
  (encode("2 + 2 ="), encode(" 4")),
  (encode(""), encode("a")),
  (encode("x" * 70), encode("yz" * 9)),
]


def test_scores_are_generations(run):
  sums, lengths, greedy = score(
    run.model, run.params, *zip(*PAIRS), gen=VOCAB.gen, batch_size=2
  )
  expected = [by_steps(run, *pair) for pair in PAIRS]
  np.testing.assert_allclose(sums, [total for total, _ in expected], rtol=1e-4)
  assert lengths.tolist() == [2, 1, 18]
  assert greedy.tolist() == [is_greedy for _, is_greedy in expected]
  pair = log_likelihoods(
    run.model, run.params, *zip(*PAIRS), gen=VOCAB.gen, batch_size=2
  )
  np.testing.assert_array_equal(pair, (sums, lengths))


def test_what_is_generated_is_the_likeliest(run):
  prompt = encode("2 + 2 =")
  (made,) = decode.generate(
    run.model, run.params, [prompt], gen=VOCAB.gen, max_new_tokens=4
  )
  other = made.copy()
  other[2] = (other[2] + 1) % VOCAB.size
  _, _, greedy = score(
    run.model, run.params, [prompt] * 2, [made, other], gen=VOCAB.gen,
    batch_size=2,
  )  # fmt: skip
  assert greedy.tolist() == [True, False]


def test_few_sizes_serve_all_lengths():
  sizes = {bucket_size(length) for length in range(1, 8192)}
  assert len(sizes) == 40
  assert all(bucket_size(n) > n for n in range(1, 8192))


# -- requests as tokens --------------------------------------------------------


@pytest.mark.parametrize(
  ("context", "continuation", "prompt", "labels"),
  [
    ("2 + 2 =", " 4", [PLM, *encode("2 + 2 =")], encode(" 4")),
    # Spaces count with the continuation, as in the harness.
    ("2 + 2 = ", "4", [PLM, *encode("2 + 2 =")], encode(" 4")),
    ("", "4", [NTP], encode("4")),
    ("", "", [NTP], []),
  ],
)
def test_a_pair(run, context, continuation, prompt, labels):
  found = adapter.scored_pair(run, context, continuation)
  assert [part.tolist() for part in found] == [list(prompt), list(labels)]


def test_a_token_over_the_cut(run):
  class Pairs(ByteTokenizer):
    def encode(self, text):
      ids = {"ab": [0], "a": [1], "b": [2]}
      return np.array(ids[text], np.int32)

  odd = types.SimpleNamespace(tokenizer=Pairs(), vocab=VOCAB)
  prompt, labels = adapter.scored_pair(odd, "a", "b")
  assert (prompt.tolist(), labels.tolist()) == ([PLM, 1], [2])


def test_the_context_gives_way(run):
  prompt, labels = adapter.scored_pair(run, "abcdef", "xy", max_length=5)
  assert (prompt.tolist(), labels.tolist()) == (
    [PLM, *encode("ef")],
    encode("xy").tolist(),
  )
  prompt, labels = adapter.scored_pair(run, "abcdef", "uvwxyz", max_length=5)
  assert (prompt.tolist(), len(labels)) == ([PLM], 6)


@pytest.mark.parametrize(
  ("max_length", "expected"),
  [
    (0, [("", "abcdefg")]),
    (9, [("", "abcdefg")]),
    (4, [("", "abcd"), ("cd", "ef"), ("ef", "g")]),
    (1, [("", "a"), *zip("abcdef", "bcdefg")]),
  ],
)
def test_each_token_of_a_text_counts_once(run, max_length, expected):
  found = adapter.rolling_pairs(run, "abcdefg", max_length=max_length)
  assert [(p.tolist(), labels.tolist()) for p, labels in found] == [
    ([PLM if before else NTP, *encode(before)], encode(piece).tolist())
    for before, piece in expected
  ]


@pytest.mark.parametrize(
  ("settings", "most", "temperature"),
  [
    ({}, 256, 0.0),
    ({"until": ["\n"], "max_gen_toks": 9}, 9, 0.0),
    ({"do_sample": False, "temperature": 0.7}, 256, 0.0),
    ({"temperature": 0.7}, 256, 0.7),
    ({"do_sample": True}, 256, 1.0),
  ],
)
def test_settings_of_generation(settings, most, temperature):
  found, how = adapter.generation(settings)
  assert (found, how["temperature"]) == (most, temperature)


def test_settings_without_counterpart(one_line):
  line = one_line(adapter.generation, {"num_beams": 4})
  assert line.startswith("generation_kwargs: unknown key 'num_beams'")


# -- answers -------------------------------------------------------------------


def test_log_likelihoods(run, lm):
  asked = [("2 + 2 =", " 4"), ("", "a"), ("2 + 2 =", "")]
  made = lm(batch_size=2)
  found = made.loglikelihood(requests(*asked))
  for (total, greedy), args in zip(found[:2], asked):
    expected = by_steps(run, *adapter.scored_pair(run, *args))
    np.testing.assert_allclose(total, expected[0], rtol=1e-4)
    assert (type(total), greedy) == (float, expected[1])
  assert found[2] == (0.0, True)
  assert made.cache_hook.kept[0] == ("loglikelihood", asked[0], found[0])


def test_texts_are_sums_of_their_pieces(run, lm):
  texts = ["abcdefg", "", "hij"]
  found = lm(batch_size=2, max_length=4).loglikelihood_rolling(
    requests(*((text,) for text in texts))
  )
  expected = [
    sum(
      by_steps(run, *pair)[0]
      for pair in adapter.rolling_pairs(run, text, max_length=4)
    )
    for text in texts
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_generation_stops_and_keeps_the_order(run, lm):
  made = lm(batch_size=2)
  limit = {"max_gen_toks": 8}
  contexts = ["ab" * 40, "b", ""]
  whole = made.generate_until(requests(*((c, limit) for c in contexts)))
  alone = [made.generate_until(requests((c, limit)))[0] for c in contexts]
  assert whole == alone
  assert all(whole)
  stop = whole[1][2:4]
  asked = [("b", limit | {"until": stop}), ("", limit), ("b", limit)]
  cut, *rest = made.generate_until(requests(*asked))
  assert cut == whole[1][: whole[1].index(stop)]
  assert rest == [whole[2], whole[1]]


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"batch_size": 0}, "batch_size=0"),
    ({"max_length": -1}, "max_length=-1"),
  ],
)
def test_settings_that_are_refused(run, one_line, settings, message):
  assert message in one_line(adapter._Answers, run, **settings)


def test_without_the_harness(monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
  adapter._adapter.cache_clear()
  with pytest.raises(UserError, match=r"pip install .*\[evaluation\]"):
    adapter.register()


# -- in the harness ------------------------------------------------------------

CHOICES = """\
task: two_and_two
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
TEXTS = """\
task: some_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
ANSWERS = """\
task: some_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{reply}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # of the harness and what it imports
def test_the_harness_evaluates_a_run(run, lm, tmp_path, monkeypatch):
  """On a task of a local file, without a network."""
  lm_eval = pytest.importorskip("lm_eval")
  from lm_eval.tasks import TaskManager

  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  questions = ["2 + 2 =", "3 + 1 ="]
  limit = {"max_gen_toks": 4, "until": ["\n"]}
  replies = lm().generate_until(requests(*((q, limit) for q in questions)))
  lines = [
    {"question": q, "choices": [" 4", " 5"], "answer": 0, "reply": reply}
    for q, reply in zip(questions, (replies[0], "another"))
  ]
  file = tmp_path / "lines.json"
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  for name, text in (("a", CHOICES), ("b", TEXTS), ("c", ANSWERS)):
    (tmp_path / f"{name}.yaml").write_text(text.format(file=file))
  adapter._adapter.cache_clear()
  model = adapter.BirdieLM(run, batch_size=2)
  found = lm_eval.simple_evaluate(
    model,
    tasks=["two_and_two", "some_texts", "some_answers"],
    task_manager=TaskManager(
      include_path=str(tmp_path), include_defaults=False
    ),
    bootstrap_iters=0,
  )["results"]
  chances = [
    [by_steps(run, [PLM, *encode(q)], encode(c))[0] for c in (" 4", " 5")]
    for q in questions
  ]
  right = np.mean([four > five for four, five in chances])
  assert found["two_and_two"]["acc,none"] == right
  total = sum(by_steps(run, [NTP], encode(q))[0] for q in questions)
  np.testing.assert_allclose(
    found["some_texts"]["byte_perplexity,none"], np.exp(-total / 14), rtol=1e-4
  )
  assert found["some_answers"]["exact_match,none"] == 0.5
