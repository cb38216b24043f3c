"""SQuAD and story infilling: files, prompts, scores."""

import json

import numpy as np
import pytest

from birdie.task_files import read_squad, read_stories, score_text
from birdie.tasks import make_task
from birdie.vocab import byte_vocabulary
from common.data.tokenizers import ByteTokenizer
from common.errors import UserError

VOCAB = byte_vocabulary()
TOKENIZER = ByteTokenizer()


def make(name, path):
  return make_task(name, {"path": str(path)}, VOCAB, tokenizer=TOKENIZER)


def gold(*texts):
  return [{"text": text, "answer_start": 0} for text in texts]


def squad(*qas, context="The dog sat on the mat."):
  return {"data": [{"paragraphs": [{"context": context, "qas": [*qas]}]}]}


WHERE = {"question": "Where?", "answers": gold("the mat", "on the mat", "mat")}
NEVER = {"question": "Who?", "answers": [], "is_impossible": True}
ODD = {"question": "Why?", "answers": gold("so"), "is_impossible": True}
OLD = {"question": "What?", "answers": gold("The dog", "The dog")}


@pytest.fixture
def write(tmp_path):
  def call(content):
    path = tmp_path / "file.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)
    return path

  return call


# -- SQuAD ---------------------------------------------------------------------


def test_only_questions_with_answers_are_asked(write):
  found = read_squad(str(write(squad(WHERE, NEVER, ODD, OLD))))
  assert [(q.question, q.answers) for q in found] == [
    ("Where?", ("the mat", "on the mat", "mat")),
    ("What?", ("The dog",)),
  ]


def test_the_prompt_is_context_and_question(write):
  task = make("squad", write(squad(WHERE)))
  (problem,) = task.problems(0, 9)  # the file has no more
  text = "The dog sat on the mat.\n\nWhere?"
  assert TOKENIZER.decode(problem.inputs[1:]) == text
  assert TOKENIZER.decode(problem.labels[:-1]) == "the mat"
  assert problem.labels[-1] == task.stop == VOCAB.eos
  assert task.max_new_tokens([problem]) == 128
  assert task.guess(problem) == {}
  whole = task.from_context(problem)
  assert whole["contains_label"] == 1
  assert whole["exact_match"] == 0


@pytest.mark.parametrize(
  ("answer", "contains", "f1", "exact"),
  [
    ("the mat", 1, 1, 1),
    ("The Mat!", 0, 1, 1),  # only the label's own letters are contained
    ("a mat", 1, 1, 1),
    # "on mat" is in it: 2 words of 5 and of 2.
    ("it sat on the mat today", 1, 2 * 2 / (5 + 2), 0),
    ("mat mat", 1, 2 / 3, 0),
    ("dog", 0, 0, 0),
    ("", 0, 0, 0),
    ("the", 0, 0, 0),
  ],
)
def test_scores_take_the_best_answer(answer, contains, f1, exact):
  golds = ("the mat", "on the mat", "mat")
  expected = {"contains_label": contains, "f1": f1, "exact_match": exact}
  assert score_text(answer, golds) == pytest.approx(expected)


def test_the_majority_is_of_the_other_questions(write):
  other = {"question": "Which?", "answers": gold("the dog")}
  task = make("squad", write(squad(WHERE, OLD, other, OLD)))
  of = {p.texts[0]: task.frequent(p) for p in task.problems(0, 9)}
  # "The dog" is the answer of two, and the words of a third.
  assert of["the mat"]["f1"] == 0
  assert of["The dog"] == {"contains_label": 1, "f1": 1, "exact_match": 1}
  assert of["the dog"] == {"contains_label": 0, "f1": 1, "exact_match": 1}
  alone = make("squad", write(squad(WHERE)))
  assert alone.frequent(alone.problems(0, 1)[0]) == {}


def test_lengths_are_of_the_context(write):
  task = make("squad", write(squad(WHERE)))
  (problem,) = task.problems(0, 1)
  assert problem.facts["length"] == len("The dog sat on the mat.")


def test_problems_come_in_the_order_of_the_seed(write):
  asked = [WHERE | {"question": f"Q{i}?"} for i in range(30)]
  task = make("squad", write(squad(*asked)))

  def questions(seed, count):
    return [
      TOKENIZER.decode(p.inputs).split("\n\n")[1]
      for p in task.problems(seed, count)
    ]

  assert questions(0, 9) == questions(0, 30)[:9] != questions(1, 9)
  assert sorted(questions(0, 99)) == sorted(q["question"] for q in asked)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ('{"data": [\n {"x": }\n]}', "file.json, line 2: no JSON"),
    ({"data": {}}, "the file has no 'data' that is a list"),
    ([], "the file has no 'data'"),
    ({"data": [{}]}, r"data\[0\] has no 'paragraphs' that is a list"),
    (squad({"question": "a"}), r"paragraphs\[0\].qas\[0\] has no 'answers'"),
    (squad(WHERE, context=3), r"paragraphs\[0\] has no 'context' that is text"),
    (squad(NEVER), "no question has an answer"),
  ],
)
def test_files_that_are_no_squad(write, content, message):
  with pytest.raises(UserError, match=message) as error:
    make("squad", write(content)).problems(0, 1)
  assert "\n" not in str(error.value)


# -- story infilling -----------------------------------------------------------

STORY = {
  "events": ["He woke.", "(blank)", "He left."],
  "choices": ["He ate.", "He flew.", "It rained.", "No."],
  "answer": "C",
}


def lines(*stories):
  return "".join(json.dumps(story) + "\n" for story in stories)


def test_the_prompt_lists_events_and_choices_and_ends_in_the_question(write):
  task = make("story_infilling", write(lines(STORY)))
  (problem,) = task.problems(0, 4)
  prompt = TOKENIZER.decode(problem.inputs[1:])
  assert prompt.endswith("Which choice best fills in the missing entry?")
  assert "1. He woke.\n2. (blank)\n3. He left.\n" in prompt
  assert "(A) He ate.\n(B) He flew.\n(C) It rained.\n(D) No.\n" in prompt
  assert [TOKENIZER.decode(c) for c in problem.choices] == STORY["choices"]
  np.testing.assert_array_equal(problem.labels, problem.choices[2])
  scores = [task.score(c, problem)["accuracy"] for c in problem.choices]
  assert scores == [0, 0, 1, 0]
  assert task.guess(problem) == {"accuracy": 0.25}


@pytest.mark.parametrize("answer", [2, "C"])
def test_an_answer_is_a_number_or_a_letter(write, answer):
  (story,) = read_stories(str(write("\n" + lines(STORY | {"answer": answer}))))
  assert story.answer == 2


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"events": ["(blank)", "b"]}, "'events' must be 3 to 7 texts"),
    ({"events": ["a"] * 8}, "'events' must be 3 to 7 texts"),
    ({"events": ["a", "b", "c"]}, r"one of 'events' must be '\(blank\)'"),
    ({"events": ["(blank)"] * 3}, ".*and only one"),
    ({"choices": ["a", "b", "c"]}, "'choices' must be 4 texts"),
    ({"choices": ["a", "b", "c", ""]}, "'choices' must be 4 texts"),
    ({"choices": ["a", "b", "c", "a"]}, "two of 'choices' are the same"),
    ({"answer": 4}, "'answer' must be 0 to 3"),
    ({"answer": "AB"}, "'answer' must be 0 to 3"),
    ({"answer": True}, "'answer' must be 0 to 3"),
  ],
)
def test_a_wrong_line_is_named(write, wrong, message):
  path = write(lines(STORY, STORY | wrong))
  with pytest.raises(UserError, match=f"file.json, line 2: {message}") as error:
    make("story_infilling", path).problems(0, 1)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("[1]\n", "line 1: 'events' must be"),
    (lines(STORY) + "{\n", "line 2: no JSON"),
    ("\n", "no line holds a story"),
  ],
)
def test_files_that_hold_no_stories(write, content, message):
  with pytest.raises(UserError, match=message):
    make("story_infilling", write(content)).problems(0, 1)


def test_the_majority_of_stories_is_a_place(write):
  answers = (2, 0, 2)
  task = make(
    "story_infilling", write(lines(*(STORY | {"answer": a} for a in answers)))
  )
  found = [task.frequent(p)["accuracy"] for p in task.problems(0, 3)]
  assert sorted(found) == [0, 1, 1]


@pytest.mark.parametrize("name", ["squad", "story_infilling"])
def test_files_that_cannot_be_read(name, tmp_path):
  with pytest.raises(UserError, match=r"none\.json: No such file"):
    make(name, tmp_path / "none.json").problems(0, 1)
  (tmp_path / "bytes").write_bytes(b'{\n"\xff')
  with pytest.raises(UserError, match="bytes, line 2: not UTF-8"):
    make(name, tmp_path / "bytes").problems(0, 1)
  with pytest.raises(UserError, match=f"{name}: path='' must be a file"):
    make(name, "")
