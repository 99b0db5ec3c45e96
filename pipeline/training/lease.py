"""A run's folder to the one process that may write in it."""

import contextlib
import fcntl
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from pipeline import storage
from pipeline.errors import StorageError, TrainingError

LOCK = ".lock"

SECONDS_TO_WAIT = 60.0  # a killed driver's local cluster is gone after seven or so
SECONDS_BETWEEN_BEATS = 5.0
SECONDS_UNTIL_DEAD = 30.0  # without a beat

_NAME = re.compile(re.escape(LOCK) + r"-(\d{8})")
_RELEASED = b"released"

IsLost = Callable[[], bool]


@contextlib.contextmanager
def only_writer(folder: str) -> Iterator[IsLost]:
    """Keeps every other process out of a run's folder inside the block.

    Yields a function that tells whether the folder was lost to another process, as happens to one
    that an object store has not heard of for a while. Waits for another writer first: the workers
    of a killed driver live a few seconds longer than it does. Raises TrainingError if it stays.
    """
    if storage.is_local(folder):
        with _locked(folder):
            yield lambda: False  # the operating system takes it from this process only
    else:
        with _Lease(folder).held() as is_lost:
            yield is_lost


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Holds a lock that ends with this process, however it ends."""
    path = storage.local_path(folder)
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TrainingError(f"{folder}: another process is training here") from None
                time.sleep(0.2)
            except OSError as error:
                raise StorageError(f"{folder}: cannot be locked: {error}") from error
        yield
    finally:
        os.close(descriptor)


class _Lease:
    """A lock in an object store, which has no locks: an object that its owner keeps rewriting.

    Leases are numbered, and the newest is the one that counts. A process takes the folder by
    creating the next number, which an object store lets only one of them do, when the newest is
    released or has not changed for a while by this process's own clock. An owner that was given
    up sees a newer number at its next beat.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._owner = uuid.uuid4().hex
        self._number = 0
        self._lost = threading.Event()
        self._ended = threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[IsLost]:
        self._take()
        beating = threading.Thread(target=self._beat, name="beat-lease", daemon=True)
        beating.start()
        try:
            yield self._lost.is_set
        finally:
            self._ended.set()
            beating.join()
            if not self._lost.is_set():
                storage.write_bytes(self._location(self._number), _RELEASED)

    def _take(self) -> None:
        began = changed = time.monotonic()
        seen: tuple[int, bytes] | None = None
        while True:
            newest = self._newest()
            found = (newest, storage.read_bytes(self._location(newest)) if newest else _RELEASED)
            now = time.monotonic()
            if found != seen:
                seen, changed = found, now
            free = found[1] == _RELEASED or now - changed > SECONDS_UNTIL_DEAD
            if free and storage.create(self._location(newest + 1), self._owner.encode()):
                break
            if now - began > SECONDS_TO_WAIT:
                raise TrainingError(f"{self._folder}: another process is training here")
            time.sleep(min(1.0, SECONDS_BETWEEN_BEATS))
        self._number = newest + 1
        for number in self._numbers():  # of no more use; the newest stays, so numbers only rise
            if number < self._number:
                storage.remove(self._location(number))

    def _beat(self) -> None:
        beats, heard = 0, time.monotonic()
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            try:
                if self._newest() > self._number:
                    self._lost.set()
                    return
                beats += 1
                storage.write_bytes(self._location(self._number), f"{self._owner} {beats}".encode())
                heard = time.monotonic()
            except StorageError:  # the next beat may come through; others give us up as late
                if time.monotonic() - heard > SECONDS_UNTIL_DEAD:
                    self._lost.set()
                    return

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        names = (_NAME.fullmatch(name) for name in storage.list_names(self._folder))
        return [int(match[1]) for match in names if match]

    def _location(self, number: int) -> str:
        return storage.join(self._folder, f"{LOCK}-{number:08d}")
