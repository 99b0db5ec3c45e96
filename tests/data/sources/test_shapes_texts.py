import random
import re
from collections import Counter, defaultdict

import pytest

from pipeline.data.sample import Question, Texts
from pipeline.data.sources.shapes_scene import (
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    SplitName,
    Thing,
    sample_scene,
)
from pipeline.data.sources.shapes_texts import texts_of

EXAMPLE = Scene(
    things=(
        Thing("star", "red", "large", column=0, row=1, offset=(0, 0), shade=1),
        Thing("ring", "blue", "small", column=1, row=0, offset=(0, 0), shade=1),
        Thing("ring", "blue", "large", column=2, row=2, offset=(0, 0), shade=1),
    ),
    counted_shape="ring",
    counted_color="blue",
    counted_size="small",
    background=(230, 230, 230),
)


def say(scene: Scene, seed: int = 0) -> Texts:
    return texts_of(scene, "shapes-7", random.Random(seed))


def all_texts(split: SplitName, number: int = 2000) -> list[Texts]:
    return [say(sample_scene(0, split, index), index) for index in range(number)]


def answers_of_the_example() -> dict[str, str]:
    questions = [question for seed in range(300) for question in say(EXAMPLE, seed).questions]
    return {question.question: question.answers[0] for question in questions}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What color is the star?", "red"),
        ("What shape is the red object?", "star"),
        ("Is the star large or small?", "large"),
        ("How many rings are there?", "2"),
        ("How many blue objects are there?", "2"),
        ("How many small objects are there?", "1"),
        ("How many objects are there?", "3"),
        ("What color is the object at the middle left?", "red"),
        ("What shape is the object at the top middle?", "ring"),
        ("Is there an object at the center?", "no"),
        ("Is there a star?", "yes"),
        ("Is there a green object?", "no"),
        ("Is there a blue star?", "no"),
        ("Is there a blue ring?", "yes"),
        ("Are there more rings than stars?", "yes"),
        ("Are there more stars than rings?", "no"),
        ("What color is the object above the star?", "blue"),
        ("What shape is the object below the red object?", "ring"),
        ("What color is the leftmost object?", "red"),
        ("What shape is the lowest object?", "ring"),
    ],
)
def test_answers_agree_with_the_scene(question: str, answer: str) -> None:
    assert answers_of_the_example()[question] == answer


def test_an_ambiguous_question_is_not_asked() -> None:
    asked = answers_of_the_example()
    assert "What color is the ring?" not in asked  # there are two
    assert "What color is the object right of the star?" not in asked  # two again


def test_captions_name_what_is_there_from_left_to_right() -> None:
    first, *_ = say(EXAMPLE).captions
    assert first == "A red star and two blue rings."


def test_captions_differ_in_words_and_say_nothing_that_is_not_there() -> None:
    for index in range(300):
        scene = sample_scene(0, "train", index)
        captions = say(scene, index).captions
        assert len(set(captions)) == len(captions) == 5
        seen = {thing.shape for thing in scene.things} | {thing.color for thing in scene.things}
        for caption in captions:
            words = {word.rstrip("s") for word in re.findall("[a-z]+", caption.lower())}
            singular = {value.rstrip("s"): value for value in SHAPES + COLORS}
            singular["crosse"] = "cross"
            assert {singular[word] for word in words if word in singular} <= seen


def test_texts_fit_into_short_sequences() -> None:
    for texts in all_texts("train", 500):
        said = [*texts.captions, *(question.question for question in texts.questions)]
        assert max(len(re.findall(r"\w+|[^\w\s]", sentence)) for sentence in said) <= 22


def test_ten_equal_answers_are_stored_as_vqa_does() -> None:
    for question in say(EXAMPLE).questions:
        assert len(question.answers) == 10
        assert len(set(question.answers)) == 1


def test_every_sort_of_question_is_asked_and_typed() -> None:
    questions = [question for texts in all_texts("train", 200) for question in texts.questions]
    assert {question.question_type for question in questions} == {
        "attribute",
        "count",
        "existence",
        "comparison",
        "spatial",
    }
    for question in questions:
        answer = question.answers[0]
        expected = {"yes": "yes/no", "no": "yes/no"}.get(
            answer, "number" if answer.isdigit() else "other"
        )
        assert question.answer_type == expected


def test_question_ids_are_unique() -> None:
    ids = [question.question_id for question in say(EXAMPLE).questions]
    assert len(set(ids)) == len(ids)


def template(question: Question) -> str:
    """Returns the question with its shapes, colors and sizes blanked."""
    words = question.question
    for blank, values in (("SHAPE", SHAPES), ("COLOR", COLORS), ("SIZE", SIZES)):
        words = re.sub(rf"\b({'|'.join(values)})(e?s)?\b", blank, words)
    return words


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_words_of_a_question_do_not_tell_its_answer(split: SplitName) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for texts in all_texts(split, 3000):
        for question in texts.questions:
            answers[template(question)][question.answers[0]] += 1
    assert len(answers) > 25
    for words, counts in answers.items():
        total = counts.total()
        # four standard deviations of the most frequent of equally likely answers
        slack = 4 * (1 / len(counts) / total) ** 0.5
        assert max(counts.values()) / total < 1 / len(counts) + slack, (words, counts)


def test_always_giving_the_most_frequent_answer_is_near_chance() -> None:
    """What a reader of the words alone can reach: the blind twin's ceiling."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for texts in all_texts("train", 4000):
        for question in texts.questions:
            seen[question.question][question.answers[0]] += 1
    most_frequent = {words: answers.most_common(1)[0][0] for words, answers in seen.items()}
    right = [
        most_frequent.get(question.question) == question.answers[0]
        for texts in all_texts("validation", 1000)
        for question in texts.questions
    ]
    assert 0.33 < sum(right) / len(right) < 0.38


def test_dialogs_refer_back_and_agree_with_the_scene() -> None:
    turns = [
        (turn.question, turn.answer)
        for seed in range(200)
        for turn in say(EXAMPLE, seed).dialogs[0].rounds
    ]
    assert ("What is above it?", "a blue ring") in turns
    assert ("What is left of it?", "nothing") in turns
    assert ("What is right of it?", "two blue rings") in turns
    assert ("Is that one large or small?", "large") in turns
    for texts in all_texts("train", 200):
        (dialog,) = texts.dialogs
        assert 7 <= len(dialog.rounds) <= 8
        assert sum(" it?" in turn.question for turn in dialog.rounds) >= 2


def test_a_dialogs_questions_have_even_odds() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for texts in all_texts("train", 3000):
        for turn in texts.dialogs[0].rounds:
            if turn.answer in ("yes", "no", *SIZES):
                answers[turn.question][turn.answer] += 1
    for counts in answers.values():
        assert counts.total() > 300
        assert max(counts.values()) / counts.total() < 0.58
