"""Read-ahead of a remote file: few large requests for many small reads in a row."""

import io
import threading

from pipeline import storage

_LEAST_BYTES = 16 * 1024  # fetched at once: a request takes as long as many times that
_FIRST_BYTES = 64 * 1024
_MOST_BYTES = 8 * 1024**2
_GAP_BYTES = 256 * 1024  # what is fetched and not wanted, rather than asked around


class ReadAhead:
    """One version of a file in an object store, by position.

    Who reads on, past small gaps, gets more fetched each time, up to 8 MiB; any other read
    fetches little more than itself. So requests are in proportion to the bytes that are read,
    however small the reads, and large parts that nobody reads are not fetched. Threads may
    share it.
    """

    def __init__(self, location: str) -> None:
        """Raises StorageError if the file is absent."""
        self.location = location
        self.size_bytes = storage.size_bytes(location)
        self._lock = threading.Lock()
        self._start = 0  # of what was fetched last
        self._fetched = b""
        self._end = 0  # of the last read
        self._ahead_bytes = 0

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Returns this range, or what there is of it; raises StorageError if it cannot be had."""
        with self._lock:
            size_bytes = min(size_bytes, self.size_bytes - offset)
            if size_bytes <= 0:
                return b""
            begin = offset - self._start
            if not 0 <= begin <= len(self._fetched) - size_bytes:
                self._fetch(offset, size_bytes)
                begin = 0
            self._end = offset + size_bytes
            return self._fetched[begin : begin + size_bytes]

    def _fetch(self, offset: int, size_bytes: int) -> None:
        goes_on = 0 <= offset - self._end <= _GAP_BYTES
        more = min(max(2 * self._ahead_bytes, _FIRST_BYTES), _MOST_BYTES)
        self._ahead_bytes = more if goes_on else 0
        wanted = max(size_bytes, self._ahead_bytes, _LEAST_BYTES)
        stop = min(offset + wanted, self.size_bytes)
        begin = offset - self._start
        kept = self._fetched[begin:] if begin >= 0 else b""
        here = offset + len(kept)
        self._fetched = kept + storage.read_range(self.location, here, stop - here)
        self._start = offset


class ReadAheadFile(io.RawIOBase):
    """A remote file as those expect it who read and seek."""

    def __init__(self, location: str) -> None:
        """Raises StorageError if the file is absent."""
        self._ranges = ReadAhead(location)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ranges.size_bytes}
        self._position = origin[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        size = self._ranges.size_bytes if size < 0 else size
        payload = self._ranges.read(self._position, size)
        self._position += len(payload)
        return payload
