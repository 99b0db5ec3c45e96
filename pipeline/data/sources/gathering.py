"""Collection by key, whatever order things are found in.

A table has a row for each question and several files speak of one image; a sample has it all.
"""

import contextlib
import json
import os
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash

from pipeline.errors import StorageError


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")
        raise StorageError(
            f"{folder}: cannot be written ({error}); TMPDIR names another folder"
        ) from error


class Gathering:
    """JSON values put under keys, given back key by key from an unnamed scratch file.

    Memory is 24 bytes for each value, however large the values are.
    """

    def __enter__(self) -> Self:
        with _told():
            self._file = tempfile.TemporaryFile(prefix="sightline-")
        self._hashes = array("Q")
        self._ends = array("Q", [0])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # of what could not be written; it is not needed now
            self._file.close()

    def add(self, key: str, value: Any) -> None:
        """Puts a value under a key; raises StorageError if the scratch folder is full."""
        payload = json.dumps([key, value], separators=(",", ":")).encode()
        with _told():
            self._file.write(payload)
        self._hashes.append(xxhash.xxh3_64_intdigest(key.encode()))
        self._ends.append(self._ends[-1] + len(payload))

    def groups(self) -> Iterator[tuple[str, list[Any]]]:
        """Yields each key with its values in the order they were put, keys by their hashes.

        Raises StorageError if the scratch folder is full.
        """
        with _told():
            self._file.flush()
        hashes = np.frombuffer(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        stops = np.append(np.flatnonzero(np.diff(hashes[order])) + 1, len(order))
        start = 0
        for stop in stops if len(order) else ():
            values: defaultdict[str, list[Any]] = defaultdict(list)
            for index in order[start:stop]:
                key, value = self._read(int(index))
                values[key].append(value)
            yield from values.items()
            start = stop

    def in_order(self) -> Iterator[tuple[str, Any, bool]]:
        """Yields keys with values as they were put, and whether others are under the same key."""
        self._file.flush()
        _, group, sizes = np.unique(
            np.frombuffer(self._hashes, np.uint64), return_inverse=True, return_counts=True
        )
        repeated = sizes[group] > 1
        for index in range(len(self._hashes)):
            key, value = self._read(index)
            yield key, value, bool(repeated[index])

    def _read(self, index: int) -> tuple[str, Any]:
        offset, end = self._ends[index], self._ends[index + 1]
        key, value = json.loads(os.pread(self._file.fileno(), end - offset, offset))
        return key, value
