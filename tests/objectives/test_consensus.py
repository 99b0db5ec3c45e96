"""What an answer is worth among people's."""

import pytest

from pipeline.objectives.consensus import consensus


@pytest.mark.parametrize(
    ("agreeing", "worth"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_ten_people_give_the_fields_soft_scores(agreeing: int, worth: float) -> None:
    given = ["a"] * agreeing + ["b"] * (10 - agreeing)
    assert consensus("a", given) == pytest.approx(worth)


def test_the_only_answer_is_worth_everything() -> None:
    assert consensus("a", ["a"]) == 1
    assert consensus("b", ["a"]) == 0
