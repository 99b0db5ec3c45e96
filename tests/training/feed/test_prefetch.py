import threading
from collections.abc import Generator

import pytest

from pipeline.errors import TrainingError
from pipeline.training.feed.prefetch import Prefetch


def numbers(count: int) -> Generator[int, None, None]:
    yield from range(count)


def test_items_come_in_order_and_then_an_error() -> None:
    with Prefetch(numbers(3), depth=2) as ahead:
        assert [ahead.take() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(TrainingError, match="data ended"):
            ahead.take()


def test_an_error_is_raised_where_its_item_was_due() -> None:
    def failing() -> Generator[int, None, None]:
        yield 7
        raise ValueError("shard 3 is gone")

    with Prefetch(failing(), depth=5) as ahead:
        assert ahead.take() == 7
        with pytest.raises(ValueError, match="shard 3"):
            ahead.take()


def test_no_more_than_the_depth_is_made_ahead() -> None:
    made = []
    reached = threading.Event()

    def counting() -> Generator[int, None, None]:
        for number in range(100):
            made.append(number)
            if number == 3:
                reached.set()
            yield number

    with Prefetch(counting(), depth=2) as ahead:
        ahead.take()
        assert reached.wait(5)
    assert len(made) <= 6


def test_leaving_early_ends_the_thread_and_closes_the_generator() -> None:
    closed = []

    def endless() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    before = threading.active_count()
    with Prefetch(endless(), depth=1) as ahead:
        ahead.take()
    assert threading.active_count() == before
    assert closed == [True]
