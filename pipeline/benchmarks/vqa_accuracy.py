"""The official VQA accuracy, against ten people's answers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.sample import Question
from pipeline.errors import MetricError
from pipeline.objectives.consensus import consensus

DIGITS = 2  # of a percentage, as the official evaluator prints it

_ARTICLES = frozenset(["a", "an", "the"])
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32  # the evaluator passes a regex flag where a count belongs, and takes out 32

_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
# A form that lacks one of its apostrophes gets it back.
_REPAIRED = {
    contraction[: mark.start()] + contraction[mark.end() :]: contraction
    for contraction in _CONTRACTIONS.split()
    for mark in re.finditer("'", contraction)
} | {"somebody'd": "somebodyd"}  # as the evaluator has it


@dataclass(frozen=True)
class VqaAccuracy:
    """Accuracies in percent, rounded to the two digits that the official evaluator prints."""

    overall: float
    per_answer_type: Mapping[str, float]
    per_question_type: Mapping[str, float]
    per_question: Mapping[int | str, float]


def vqa_accuracy(
    results: Sequence[Mapping[str, Any]], questions: Sequence[Question]
) -> VqaAccuracy:
    """Scores `{"question_id": ..., "answer": ...}` rows as GT-Vision-Lab/VQA does.

    Raises MetricError unless every question has exactly one result, in any order, and a human
    answer to compare it with.
    """
    answers = answers_by_id(results, questions)
    scores: list[float] = []
    by_answer_type: dict[str, list[float]] = {}
    by_question_type: dict[str, list[float]] = {}
    for question in questions:
        score = answer_accuracy(answers[question.question_id], question.answers)
        scores.append(score)
        by_answer_type.setdefault(question.answer_type, []).append(score)
        by_question_type.setdefault(question.question_type, []).append(score)
    return VqaAccuracy(
        overall=_percent(scores),
        per_answer_type={name: _percent(part) for name, part in by_answer_type.items()},
        per_question_type={name: _percent(part) for name, part in by_question_type.items()},
        per_question={
            question.question_id: _percent([score])
            for question, score in zip(questions, scores, strict=True)
        },
    )


def answer_accuracy(answer: str, given: Sequence[str]) -> float:
    """Returns the official accuracy, 0 to 1, of one answer against people's.

    All are normalised, but only where the people's are not all the same.
    """
    answer = _on_one_line(answer)
    given = [_on_one_line(one) for one in given]
    if len(set(given)) > 1:
        answer, given = normalise(answer), [normalise(one) for one in given]
    return consensus(answer, given)


def normalise(answer: str) -> str:
    """Returns an answer in the form that the evaluator compares (visualqa.org/evaluation).

    A mark next to a space anywhere in the answer disappears, others leave a space; in an answer
    with a comma between digits all disappear. Periods go unless a digit follows. Then, in lower
    case: number words to ten become digits, articles go, contractions get their apostrophe.
    """
    has_long_number = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if is_beside_space or has_long_number else " ")
    text = _PERIOD.sub("", text, count=MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def answers_by_id(
    results: Sequence[Mapping[str, Any]], questions: Sequence[Question]
) -> dict[int | str, str]:
    """Returns each question's answer, or raises MetricError naming the ids that do not pair."""
    answers: dict[int | str, str] = {}
    for row, result in enumerate(results):
        if not isinstance(result.get("answer"), str) or "question_id" not in result:
            raise MetricError(
                f"vqa results, row {row}: expected question_id and a string answer, found {result}"
            )
        if result["question_id"] in answers:
            raise MetricError(f"vqa results: question_id {result['question_id']} comes twice")
        answers[result["question_id"]] = result["answer"]
    if not questions:
        raise MetricError("vqa: there is no question to score")
    asked = {question.question_id for question in questions}
    if len(asked) < len(questions):
        raise MetricError("vqa references: a question_id comes twice")
    for fault, ids in (
        ("have no result", asked - answers.keys()),
        ("were not asked", answers.keys() - asked),
    ):
        if ids:
            some = ", ".join(str(one) for one in sorted(ids, key=str)[:5])
            raise MetricError(f"vqa results: {len(ids)} question_ids {fault}: {some}")
    for question in questions:
        if not question.answers:
            raise MetricError(f"vqa references: question {question.question_id} has no answers")
    return answers


def _percent(scores: Sequence[float]) -> float:
    return round(100 * sum(scores) / len(scores), DIGITS)


def _on_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
