"""The VQA accuracy against the official evaluator's figures, and its rules one by one."""

from typing import Any

import pytest

from pipeline.benchmarks.vqa_accuracy import answer_accuracy, normalise, vqa_accuracy
from pipeline.data.sample import Question
from pipeline.errors import MetricError
from tests.excerpts import read_excerpt


@pytest.fixture(scope="module")
def excerpt() -> Any:
    return read_excerpt("vqa-v2")


@pytest.mark.parametrize("name", ["prior", "annotator1", "annotator1_decorated"])
def test_accuracy_equals_the_official_evaluator(excerpt: Any, name: str) -> None:
    asked = [
        Question(
            question_id=question_id,
            question="",
            answers=tuple(answers),
            question_type=question_type,
            answer_type=answer_type,
        )
        for question_id, question_type, answer_type, answers in excerpt["questions"]
    ]
    results = excerpt["results"][name]
    official = results["official"]

    scores = vqa_accuracy(
        [
            {"question_id": question.question_id, "answer": answer}
            for question, answer in zip(asked, results["answers"], strict=True)
        ],
        asked,
    )

    assert scores.overall == official["overall"]
    assert scores.per_answer_type == official["perAnswerType"]
    assert scores.per_question_type == official["perQuestionType"]
    assert list(scores.per_question.values()) == results["official_per_question"]
    assert len(asked) == 4000


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
