"""Shard locations to open files: local ones in place, others through a bounded local cache."""

import contextlib
import os
import threading
from collections import OrderedDict
from pathlib import Path

from pipeline import storage
from pipeline.errors import ShardError, StorageError

MAX_OPEN_FILES = 256  # well under the usual limit of 1024 descriptors a process
CACHE_SIZE_BYTES = 64 * 1024**3


def default_cache() -> Path:
    """Returns the cache folder: the environment's SIGHTLINE_CACHE, else ~/.cache/sightline."""
    named = os.environ.get("SIGHTLINE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "sightline"


class OpenFile:
    """A descriptor for positioned reads, closed when nobody holds the object any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardFiles:
    """Opens shards for reading by many threads, and keeps the last `max_open` of them open.

    A shard in an object store is copied whole into `cache` when it is first opened. Beyond
    `cache_size_bytes` the copies opened longest ago go; the one in use always stays, and a file
    still open here stays readable. Processes of one machine may share the folder.
    """

    def __init__(
        self,
        cache: Path,
        cache_size_bytes: int = CACHE_SIZE_BYTES,
        max_open: int = MAX_OPEN_FILES,
    ) -> None:
        self._cache = cache
        self._cache_size_bytes = cache_size_bytes
        self._max_open = max_open
        self._lock = threading.Lock()
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._opening: dict[str, threading.Lock] = {}

    def open(self, location: str) -> OpenFile:
        """Returns the open shard; hold it while reading. Raises ShardError if it is not there."""
        with self._lock:
            if location in self._files:
                self._files.move_to_end(location)
                return self._files[location]
            opening = self._opening.setdefault(location, threading.Lock())
        with opening:  # threads that want the same shard wait for one copy, others go on
            with self._lock:
                if location in self._files:
                    return self._files[location]
            file = OpenFile(self._open(location))
            with self._lock:
                self._files[location] = file
                self._opening.pop(location, None)
                while len(self._files) > self._max_open:
                    self._files.popitem(last=False)
        return file

    def _open(self, location: str) -> int:
        try:
            if storage.is_local(location):
                return os.open(storage.local_path(location), os.O_RDONLY)
            return self._open_copy(location)
        except (FileNotFoundError, StorageError) as error:
            raise ShardError(
                f"{location}: the manifest lists this file, but it cannot be had ({error}); "
                "restore it, or ingest and extract again"
            ) from error
        except OSError as error:
            raise ShardError(f"{location}: cannot be opened ({error})") from error

    def _open_copy(self, location: str) -> int:
        while True:
            path = storage.local_copy(location, self._cache)
            try:
                os.utime(path)  # the time of last use
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # another process evicted it in between
            self._evict(keep=path)
            return descriptor

    def _evict(self, keep: Path) -> None:
        copies = []
        for path in self._cache.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    status = path.stat()
                    copies.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in copies) - self._cache_size_bytes
        for _, size, path in sorted(copies):
            if excess > 0 and path != keep:
                path.unlink(missing_ok=True)
                excess -= size
