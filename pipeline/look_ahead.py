"""Look-ahead: items made in threads before they are asked for.

An error is raised where its item was due. When the caller goes away, so do the threads.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Given = TypeVar("Given")
Made = TypeVar("Made")


def run_ahead(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """Yields the items, up to `depth` of which one thread has made beforehand.

    None is no item. When the caller goes away `items` is closed.
    """
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="look-ahead") as thread:
            ahead = deque(thread.submit(next, items, None) for _ in range(depth))
            try:
                while (item := ahead.popleft().result()) is not None:
                    ahead.append(thread.submit(next, items, None))
                    yield item
            finally:
                for unwanted in ahead:
                    unwanted.cancel()
    finally:
        items.close()


def map_ahead(
    make: Callable[[Given], Made],
    items: Iterable[Given],
    threads: int,
    depth: int,
    name: str = "look-ahead",
) -> Generator[Made, None, None]:
    """Yields what is made of each item in turn, while threads make that of the next `depth`.

    The items themselves are taken in the caller's thread. `name` begins that of each thread.
    """
    waiting = iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        ahead = deque(pool.submit(make, item) for item in islice(waiting, depth))
        while ahead:
            made = ahead.popleft().result()
            ahead.extend(pool.submit(make, item) for item in islice(waiting, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)
