"""Open shard files: local ones in place, others through a bounded local cache."""

import contextlib
import fcntl
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import xxhash

from pipeline import storage
from pipeline.data.tars.foreign_tar import ForeignTar, Location
from pipeline.errors import ShardError, StorageError

MAX_OPEN_FILES = 256  # well under the usual limit of 1024 descriptors a process
CACHE_SIZE_BYTES = 64 * 1024**3
_LOCKS = ".locks"  # folder in the cache
_ABANDONED_SECONDS = 3600.0  # without a byte added, a copy in the making is a killed process's


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

    def digest(self, chunk_bytes: int) -> tuple[str, int]:
        """Returns the xxh3_128 of the whole file in hex, and its size in bytes."""
        digest, size_bytes = xxhash.xxh3_128(), 0
        try:
            while chunk := os.pread(self.descriptor, chunk_bytes, size_bytes):
                digest.update(chunk)
                size_bytes += len(chunk)
        except OSError as error:
            raise ShardError(f"cannot be read from byte {size_bytes} on ({error})") from error
        return digest.hexdigest(), size_bytes


class ShardFiles:
    """Opens shards for reading by many threads, and keeps the last `max_open` of them open.

    A shard in an object store is copied whole into `cache` when it is first opened, or fetched
    before. Beyond `cache_size_bytes` the copies used longest ago go; the newest always stays, and
    a file still open here stays readable. Processes of one machine may share the folder: each
    shard is copied by one of them, while the others wait for it. A tar of others is opened likewise
    as long as it is the one that was indexed.
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
        self._files: OrderedDict[Location, OpenFile] = OrderedDict()
        self._opening: dict[Location, threading.Lock] = {}
        self._fetched: dict[Location, int] = {}  # bytes of what was fetched and not opened yet

    def fetch(self, location: Location) -> None:
        """Copies a shard of an object store into the cache, where `open` will find it soon.

        Does nothing for a local shard, or while half of the cache waits to be opened: more would
        push out what is in use. Raises ShardError if the shard is not there.
        """
        if storage.is_local(str(location)):
            return
        with self._lock:
            waiting_bytes = sum(self._fetched.values())
            if location in self._files or location in self._fetched:
                return
            if waiting_bytes >= self._cache_size_bytes // 2:
                return
            self._fetched[location] = 0
        descriptor = self._open(location)
        size_bytes = os.fstat(descriptor).st_size
        os.close(descriptor)
        with self._lock:
            if location in self._fetched:
                self._fetched[location] = size_bytes

    def open(self, location: Location) -> OpenFile:
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
                self._fetched.pop(location, None)
                self._opening.pop(location, None)
                while len(self._files) > self._max_open:
                    self._files.popitem(last=False)
        return file

    def _open(self, location: Location) -> int:
        try:
            if storage.is_local(str(location)):
                return _open_local(location)
            return self._open_copy(location)
        except (FileNotFoundError, StorageError) as error:
            raise ShardError(
                f"{location}: the manifest lists this file, but it cannot be had ({error}); "
                "restore it, or ingest and extract again"
            ) from error
        except OSError as error:
            raise ShardError(f"{location}: cannot be opened ({error})") from error

    def _open_copy(self, location: Location) -> int:
        with self._locked(str(location)):
            path = self._copy(location)
            while True:
                try:
                    os.utime(path)  # the time of last use
                    descriptor = os.open(path, os.O_RDONLY)
                    break
                except FileNotFoundError:  # another process evicted it in between
                    path = self._copy(location)
        self._evict(keep=path)
        return descriptor

    def _copy(self, location: Location) -> Path:
        if isinstance(location, str):
            return storage.local_copy(location, self._cache)
        # A name that may come again with other bytes: each version has a place of its own.
        version = xxhash.xxh3_64_hexdigest(location.stamp.encode())
        path = storage.local_copy(location.location, self._cache / "versions" / version)
        try:
            location.check_stamp(storage.stamp(location.location))
        except ShardError:
            path.unlink()
            raise
        return path

    @contextlib.contextmanager
    def _locked(self, location: str) -> Iterator[None]:
        """Holds the lock of a shard against all threads and processes that share the cache.

        The system frees it when its holder dies.
        """
        folder = self._cache / _LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / xxhash.xxh3_64_hexdigest(location.encode())).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _evict(self, keep: Path) -> None:
        copies = []
        abandoned = time.time() - _ABANDONED_SECONDS
        for path in self._cache.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if not path.is_file() or path.parent.name == _LOCKS:
                    continue
                if path.suffix == ".partial" and status.st_mtime > abandoned:
                    continue  # another process's copy in the making
                copies.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in copies) - self._cache_size_bytes
        for _, size, path in sorted(copies):
            if excess > 0 and path != keep:
                path.unlink(missing_ok=True)
                excess -= size


def _open_local(location: Location) -> int:
    descriptor = os.open(storage.local_path(str(location)), os.O_RDONLY)
    if isinstance(location, ForeignTar):
        status = os.fstat(descriptor)
        try:
            location.check_stamp(f"{status.st_size}-{status.st_mtime_ns}")  # as storage.stamp
        except ShardError:
            os.close(descriptor)
            raise
    return descriptor
