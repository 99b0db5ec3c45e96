import threading
from collections.abc import Generator, Iterator

import pytest

from pipeline.look_ahead import map_ahead, run_ahead


class Counted:
    """The numbers from 1 to 6, and which of them were made."""

    def __init__(self, fail_at: int = 0) -> None:
        self.made: list[int] = []
        self.is_closed = False
        self._fail_at = fail_at
        self._changed = threading.Condition()

    def items(self) -> Generator[int, None, None]:
        try:
            for number in range(1, 7):
                yield self.make(number)
        finally:
            self.is_closed = True

    def make(self, number: int) -> int:
        if number == self._fail_at:
            raise ValueError("broken")
        with self._changed:
            self.made.append(number)
            self._changed.notify_all()
        return number

    def wait_for(self, number: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: number in self.made, timeout=10)


@pytest.fixture(params=["run", "map"])
def is_mapped(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "map")


def ahead(counted: Counted, is_mapped: bool, depth: int) -> Generator[int, None, None]:
    if is_mapped:
        return map_ahead(counted.make, range(1, 7), threads=3, depth=depth)
    return run_ahead(counted.items(), depth)


def test_items_come_in_order_and_so_many_are_made_beforehand(is_mapped: bool) -> None:
    counted = Counted()
    items = ahead(counted, is_mapped, depth=2)
    assert next(items) == 1
    assert counted.wait_for(3)
    assert sorted(counted.made) == [1, 2, 3]
    assert list(items) == [2, 3, 4, 5, 6]


def test_an_error_is_raised_where_its_item_was_due(is_mapped: bool) -> None:
    before = threading.active_count()
    items = ahead(Counted(fail_at=3), is_mapped, depth=4)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(items)
    assert threading.active_count() == before


def test_leaving_early_ends_the_threads(is_mapped: bool) -> None:
    before = threading.active_count()
    counted = Counted()
    items = ahead(counted, is_mapped, depth=2)
    next(items)
    items.close()
    assert threading.active_count() == before
    assert len(counted.made) <= 3
    assert counted.is_closed or is_mapped


def test_one_look_ahead_after_another_is_closed_with_it() -> None:
    before = threading.active_count()
    counted = Counted()
    outer = run_ahead(run_ahead(counted.items(), depth=2), depth=2)
    next(outer)
    outer.close()
    assert counted.is_closed
    assert threading.active_count() == before


def test_items_are_taken_in_the_callers_thread_and_no_more_than_are_made() -> None:
    taken: list[tuple[int, int]] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            taken.append((number, threading.get_ident()))
            yield number

    items = map_ahead(lambda number: -number, numbers(), threads=2, depth=3)
    assert [next(items) for _ in range(2)] == [0, -1]
    assert taken == [(number, threading.get_ident()) for number in range(5)]
    items.close()


def test_threads_make_several_items_at_once() -> None:
    met = threading.Barrier(3, timeout=10)

    def make(number: int) -> int:
        met.wait()
        return number

    assert list(map_ahead(make, range(6), threads=3, depth=3)) == list(range(6))
