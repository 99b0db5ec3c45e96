"""Gzip unpacking within bounds: of files that somebody else packed.

A gzip of 6 MB can hold 6 GB of one character. What unpacks to more than `MAX_RATIO` times its size
is no text that people or programs wrote (VQA's annotations, which repeat themselves a lot, come to
18 times), unless it is small.
"""

import gzip
import io
import zlib
from typing import BinaryIO, cast

from pipeline.errors import SourceError

MAX_RATIO = 100
ANY_RATIO_BYTES = 1 << 26  # whose ratio does not matter
MAX_BYTES = 1 << 33  # 8 GiB, unpacked

_MAGIC = b"\x1f\x8b"
_STEP_BYTES = 1 << 20


def is_gzip(start: bytes) -> bool:
    """Whether a file that begins so is packed with gzip, whatever its name."""
    return start.startswith(_MAGIC)


def unpacked(payload: bytes, location: str) -> bytes:
    """Returns what a gzip file holds; raises SourceError if it is cut, damaged or a bomb."""
    with unpacking(io.BytesIO(payload), location) as file:
        return file.read()


def unpacking(file: BinaryIO, location: str) -> BinaryIO:
    """Returns the file's content, unpacked as it is read, which may raise what `unpacked` does."""
    return cast(BinaryIO, io.BufferedReader(_Unpacking(file, location), _STEP_BYTES))


class _Unpacking(io.RawIOBase):
    def __init__(self, file: BinaryIO, location: str) -> None:
        self._packed = file
        self._file = gzip.GzipFile(fileobj=file)
        self._location = location
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            found = self._file.read1(min(len(buffer), _STEP_BYTES))
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(
                f"{self._location}: cannot be unpacked as gzip: {error}; it was cut short or "
                "damaged on its way, so fetch it anew"
            ) from error
        self._num_bytes += len(found)
        most = max(ANY_RATIO_BYTES, MAX_RATIO * self._packed.tell())
        if self._num_bytes > min(most, MAX_BYTES):
            raise SourceError(
                f"{self._location}: unpacked to over {self._num_bytes} bytes from "
                f"{self._packed.tell()}: expected at most {MAX_RATIO} times as many, and "
                f"{MAX_BYTES} in all; if it is what it should be, unpack it yourself"
            )
        buffer[: len(found)] = found
        return len(found)
