"""The VQA accuracy against the official evaluator's figures, and its rules one by one."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.vqa_accuracy import answer_accuracy, normalise, vqa_accuracy
from pipeline.data.sample import Question
from pipeline.errors import MetricError


@pytest.fixture(scope="module")
def questions(shared_data: Path) -> dict[int, Question]:
    with gzip.open(shared_data / "vqa_v2" / "v2_mscoco_train2014_annotations.json.gz") as file:
        annotations = json.load(file)["annotations"]
    return {
        one["question_id"]: Question(
            question_id=one["question_id"],
            question="",
            answers=tuple(answer["answer"] for answer in one["answers"]),
            question_type=one["question_type"],
            answer_type=one["answer_type"],
        )
        for one in annotations
    }


@pytest.mark.parametrize("name", ["prior", "annotator1", "annotator1_decorated"])
def test_accuracy_equals_the_official_evaluator(
    shared_data: Path, questions: dict[int, Question], name: str
) -> None:
    folder = shared_data / "vqa_v2" / "results"
    official = json.loads((folder / "official_accuracy.json").read_text())[name]
    results = json.loads((folder / official["results"]).read_text())
    per_question = json.loads(
        (folder / official["results"].replace("_results", "_evalQA")).read_text()
    )

    scores = vqa_accuracy(results, [questions[row["question_id"]] for row in results])

    assert scores.overall == official["accuracy"]["overall"]
    assert scores.per_answer_type == official["accuracy"]["perAnswerType"]
    assert scores.per_question_type == official["accuracy"]["perQuestionType"]
    assert {str(key): value for key, value in scores.per_question.items()} == per_question


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The red, white and blue.", "red white and blue"),
        ("red/white", "red white"),
        ("red/ white", "red white"),
        ("t-shirt", "t shirt"),
        ("100,978", "100978"),
        ("1.5", "1.5"),
        ("St. 5", "st 5"),
        ("Two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("an a the", ""),
        ("lets", "lets"),
    ],
)
def test_normalising_follows_the_published_rules(answer: str, normalised: str) -> None:
    assert normalise(answer) == normalised


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_an_answer_is_worth_a_third_for_each_other_person(agreeing: int, accuracy: float) -> None:
    given = ["cat"] * agreeing + ["dog"] * (10 - agreeing)
    assert answer_accuracy("cat", given) == pytest.approx(accuracy)


def test_unanimous_answers_are_compared_as_written() -> None:
    assert answer_accuracy("Two", ["two"] * 10) == 0
    assert answer_accuracy("two\n", ["two"] * 10) == 1
    assert answer_accuracy("Two", ["two"] * 9 + ["2"]) == 1


def test_the_only_answer_counts_as_everyone_agreeing() -> None:
    assert answer_accuracy("red", ["red"]) == 1
    assert answer_accuracy("blue", ["red"]) == 0


def test_results_may_come_in_any_order() -> None:
    asked = [Question(1, "", ("a cat", "cat")), Question("x", "", ("dog",))]
    rows: Any = [{"question_id": "x", "answer": "dog"}, {"question_id": 1, "answer": "cat"}]
    assert vqa_accuracy(rows, asked) == vqa_accuracy(rows[::-1], asked)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1, "answer": "a"}], "1 question_ids have no result: 2"),
        ([{"question_id": i, "answer": "a"} for i in (1, 2, 3)], "were not asked: 3"),
        ([{"question_id": i, "answer": "a"} for i in (1, 2, 2)], "question_id 2 comes twice"),
        ([{"question_id": i, "answer": 5} for i in (1, 2)], "row 0"),
        ([{"image_id": i, "answer": "a"} for i in (1, 2)], "row 0"),
    ],
)
def test_results_that_do_not_pair_with_the_questions_are_refused(
    rows: list[dict], message: str
) -> None:
    with pytest.raises(MetricError, match=message):
        vqa_accuracy(rows, [Question(1, "", ("a",)), Question(2, "", ("a",))])


def test_a_question_nobody_answered_is_refused() -> None:
    with pytest.raises(MetricError, match="question 1 has no answers"):
        vqa_accuracy([{"question_id": 1, "answer": "a"}], [Question(1, "", ())])


def test_no_questions_are_refused() -> None:
    with pytest.raises(MetricError, match="no question"):
        vqa_accuracy([], [])
