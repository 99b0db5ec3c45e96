import threading
import time
from collections.abc import Generator

import pytest

from pipeline.look_ahead import run_ahead


def counting(made: list[int], closed: list[bool], fail_at: int = -1) -> Generator[int, None, None]:
    try:
        for number in range(1, 7):
            if number == fail_at:
                raise ValueError("broken")
            made.append(number)
            yield number
    finally:
        closed.append(True)


def test_items_come_in_order_and_are_made_beforehand() -> None:
    made: list[int] = []
    items = run_ahead(counting(made, []), depth=2)
    assert next(items) == 1
    time.sleep(0.2)
    assert made == [1, 2, 3]
    assert list(items) == [2, 3, 4, 5, 6]


def test_error_is_raised_where_its_item_was_due() -> None:
    closed: list[bool] = []
    items = run_ahead(counting([], closed, fail_at=3), depth=4)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(items)
    assert closed == [True]


def test_leaving_early_closes_the_items_and_ends_the_threads() -> None:
    before = threading.active_count()
    closed: list[bool] = []
    inner = run_ahead(counting([], closed), depth=2)
    outer = run_ahead(inner, depth=2)
    next(outer)
    outer.close()
    assert closed == [True]
    assert threading.active_count() == before
