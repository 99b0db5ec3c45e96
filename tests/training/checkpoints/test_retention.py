import math
from collections.abc import Mapping, Sequence

import pytest

from pipeline.training.checkpoints.retention import Published, expired
from tests.training.stand_in import make_spec

HOUR = 3600.0


def removed(
    checkpoints: Sequence[Published],
    retention: Mapping[str, object] = {},
    evaluation: Mapping[str, object] = {},
) -> list[int]:
    evaluation = {"every_steps": 1, **evaluation}
    config = make_spec("run", evaluation=evaluation, checkpoints=retention).training
    return expired(checkpoints, config)


def plain(*steps: int) -> list[Published]:
    return [Published(step, written=step * HOUR, figure=None) for step in steps]


def test_the_last_few_are_kept_whatever_their_order() -> None:
    assert removed(plain(9, 3, 12, 6)) == [3, 6]
    assert removed(plain(3, 6)) == []


def test_those_at_multiples_are_kept() -> None:
    assert removed(plain(2, 4, 6, 8, 10), {"keep_every_steps": 4}) == [2, 6]


def test_the_first_and_one_each_so_many_hours_are_kept() -> None:
    assert removed(plain(1, 2, 3, 4, 5, 6, 7), {"keep_every_hours": 2.5}) == [2, 3, 5]


@pytest.mark.parametrize(("best_is", "expected"), [("lowest", [1, 4, 5]), ("highest", [2, 3, 4])])
def test_the_best_few_are_kept_and_those_not_evaluated_are_none(
    best_is: str, expected: list[int]
) -> None:
    figures = [0.4, 0.1, 0.3, math.nan, None, 0.5, None]
    if best_is == "highest":
        figures = [0.8, 0.3, 0.6, math.nan, 0.7, 0.5, None]
    checkpoints = [Published(step, 0.0, figure) for step, figure in enumerate(figures, start=1)]
    assert removed(checkpoints, {"keep_best": 2}, {"best_is": best_is}) == expected


def test_the_checkpoint_that_the_model_is_written_from_is_kept() -> None:
    checkpoints = [Published(step, 0.0, float(step)) for step in (1, 2, 3, 4)]
    assert removed(checkpoints, evaluation={"restore_best": True}) == [2]
