"""Look-ahead: items made in a thread before they are asked for."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def run_ahead(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """Yields the items, up to `depth` of which a thread has made beforehand.

    An error is raised where its item was due. When the caller goes away, so does the thread, and
    `items` is closed.
    """
    try:
        with ThreadPoolExecutor(1) as thread:
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
