"""The folder of swap files that one process has to itself, while it lives."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ConfigError

_PREFIX = "sightline-swap-"


class SwapFolder:
    """A new folder under a path, removed by `close`, or when the process ends by itself.

    What processes that were killed have left under the path is removed by the next one: while a
    process lives, it holds a lock on its folder.
    """

    def __init__(self, parent: Path) -> None:
        with _alone_in(parent):
            for found in parent.glob(f"{_PREFIX}*"):
                _remove_if_left(found)
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        self._close = weakref.finalize(self, _remove, self.path, lock)

    def close(self) -> None:
        """Removes the folder; once more does nothing."""
        self._close()


def require_folder(path: Path, key: str) -> None:
    """Makes a folder if it is absent; raises ConfigError, naming `key`, if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be written: {error}") from error


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Inside, no other process makes a folder there: between making and locking, it looks left."""
    lock = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _remove_if_left(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # another user's, or gone by now
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # its process lives
        os.close(lock)
    else:
        _remove(folder, lock)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
