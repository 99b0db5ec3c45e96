"""The request to stop: a file in a phase's folder, by which any process asks its ranks to leave."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from pipeline import storage

STOP = ".stop"

SECONDS_BETWEEN_POLLS = 5.0  # of an object store; on a disk, every step
_RESIZING = b"resizing"  # in a request that its maker takes back


def request_stop(folder: str) -> None:
    """Asks a run, from any process, to write a checkpoint after the step it is in and leave."""
    storage.write_bytes(storage.join(folder, STOP), b"")


def clear_stop(folder: str) -> None:
    """Takes such a request back."""
    storage.remove(storage.join(folder, STOP))


class StopRequest:
    """The request to stop a phase, as rank 0 polls it after every step."""

    def __init__(self, folder: str) -> None:
        self._location = storage.join(folder, STOP)
        self._next_poll = 0.0

    def is_requested(self) -> bool:
        """Whether there is one; False too if it was polled a moment ago in an object store."""
        now = time.monotonic()
        if now < self._next_poll:
            return False
        if not storage.is_local(self._location):
            self._next_poll = now + SECONDS_BETWEEN_POLLS
        return storage.exists(self._location)


@contextlib.contextmanager
def asked_to_leave(folders: Sequence[str]) -> Iterator[None]:
    """Has ranks write a checkpoint and return, inside the block; what others ask stays asked."""
    requests = [storage.join(folder, STOP) for folder in folders]
    for request in requests:
        if not storage.exists(request):
            storage.write_bytes(request, _RESIZING)
    try:
        yield
    finally:
        for request in requests:
            if storage.exists(request) and storage.read_bytes(request) == _RESIZING:
                storage.remove(request)


@contextlib.contextmanager
def stopping_on_signals(folders: Sequence[str]) -> Iterator[None]:
    """Turns SIGTERM, or a first Ctrl-C, into a request to stop; a second Ctrl-C interrupts.

    Only a main thread can; in others signals are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        for folder in folders:
            request_stop(folder)

    for folder in folders:  # a request that an earlier command did not live to carry out
        clear_stop(folder)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for folder in folders:
            clear_stop(folder)
