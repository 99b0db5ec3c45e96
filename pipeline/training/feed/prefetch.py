"""Prefetching of batches in threads."""

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from types import TracebackType
from typing import Generic, Self, TypeVar

from pipeline.errors import TrainingError

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Runs a generator in a thread, up to `depth` items ahead of whoever takes them.

    An error of the generator is raised where the item was due. Leaving the block closes it.
    """

    def __init__(self, source: Generator[Item, None, None], depth: int) -> None:
        self._source = source
        self._ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def take(self) -> Item:
        """Returns the next item, waiting for it; raises TrainingError if there are no more."""
        item, error = self._ready.get()
        if error is not None:
            raise error
        assert item is not None
        return item

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leaving.set()
        while self._thread.is_alive():  # it may be waiting for room
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _fill(self) -> None:
        try:
            with closing(self._source):
                for item in self._source:
                    self._ready.put((item, None))
                    if self._leaving.is_set():
                        return
            self._ready.put((None, TrainingError("the data ended before the last step")))
        except BaseException as error:  # carried to the thread that takes, and raised there
            self._ready.put((None, error))
