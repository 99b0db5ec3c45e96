"""The shard writer: samples in tars that any WebDataset reader can open.

A shard is written once and never edited. The same samples in the same order give the same bytes,
and its name is the digest of those bytes, so that writing it again changes nothing.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline import storage
from pipeline.data.sample import Sample, check_key
from pipeline.errors import ShardError

_BLOCK = 512
_NAME_LENGTH = 100
_SIZE = slice(124, 135)
_MAX_SIZE_BYTES = 8 * 1024**3 - 1  # eleven octal digits
_SUFFIX = re.compile(r"[a-z0-9]+(\.[a-z0-9]+)*")  # readers turn suffixes to lower case
_END = bytes(2 * _BLOCK)
_ZEROS = bytes(_BLOCK)
_LARGE_BYTES = 16 * 1024
# Written at once: of a file that grows by megabytes Linux keeps fewer and larger pieces in memory,
# which halves the cost of writing samples of 60 KB.
_WRITE_BYTES = 1024 * 1024
_WRITE_PIECES = 1024  # the most that Linux takes

# A USTAR header is name, mode and owners, size, time, checksum, and the rest, in this order.
_MODE_AND_OWNERS = b"0000644\0" + b"0000000\0" * 2
_TIME = b"00000000000\0"
_TYPE_AND_REST = b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(247)
_FIXED_SUM = sum(_MODE_AND_OWNERS + _TIME + b" " * 8 + _TYPE_AND_REST)
_HEADER = b"%b" + _MODE_AND_OWNERS + b"%b\0" + _TIME + b"%06o\0 " + _TYPE_AND_REST


class Member(NamedTuple):
    """Where a part's payload lies in its shard, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """A published shard: its name without `.tar`, the digest of its bytes, and its size."""

    name: str
    digest: str
    size_bytes: int
    num_samples: int


class ShardWriter:
    """Writes one tar into a folder, where it appears under its name only when complete.

    Without a name the shard is named by the first 16 digits of its digest; a sidecar is given
    the name of the shard it belongs to. If the block is left by an exception, or without a
    sample, nothing appears. `shard` says what was published once the block has ended.

        with ShardWriter("s3://bucket/data/shards/train") as writer:
            members = writer.write(Sample("coco-41", {"jpg": image, "json": texts}))
        writer.shard.name
    """

    def __init__(self, folder: str, name: str | None = None) -> None:
        self.folder = folder
        self._name = name
        self._shard: Shard | None = None
        self._keys: set[str] = set()
        self._end = 0  # offset of the next sample
        self._digest = xxhash.xxh3_128()
        self._small = b""  # what lies between two large payloads is digested and written as one
        self._waiting: list[bytes] = []  # digested and not written yet
        self._waiting_bytes = 0
        self._closing = contextlib.ExitStack()

    @property
    def shard(self) -> Shard:
        """What was published; raises ShardError if nothing was."""
        if self._shard is None:
            raise ShardError(f"{self.folder}: no shard was published: none was finished")
        return self._shard

    @property
    def num_samples(self) -> int:
        """The samples written so far."""
        return len(self._keys)

    def __enter__(self) -> Self:
        # Durable: the manifest must never outlive, in a power cut, the bytes it points into.
        draft = storage.draft(self.folder, durable=True)
        self._draft = self._closing.enter_context(draft)
        self._file = self._closing.enter_context(self._draft.path.open("wb", buffering=0))
        return self

    def write(self, sample: Sample) -> dict[str, Member]:
        """Appends a sample and returns where each of its parts lies.

        Raises ShardError if its key is unfit or was written before, it has no parts, or a
        part's name is unfit or its payload over 8 GiB.
        """
        key = sample.key
        check_key(key)
        if key in self._keys:
            raise ShardError(f"{self.folder}: key {key!r} is in this shard already")
        if not sample.parts:
            raise ShardError(f"{self.folder}: sample {key!r} has no parts")
        pieces: list[bytes] = []
        small, end = self._small, self._end
        members = {}
        for suffix, payload in sorted(sample.parts.items()):
            size_bytes = len(payload)
            padding = -size_bytes % _BLOCK
            small += _header(key, suffix, size_bytes)
            if size_bytes < _LARGE_BYTES:
                small += payload
            else:
                pieces += (small, payload)
                small = b""
            small += _ZEROS[:padding]
            members[suffix] = Member(end + _BLOCK, size_bytes)
            end += _BLOCK + size_bytes + padding
        if len(small) >= _LARGE_BYTES:
            pieces.append(small)
            small = b""
        self._small, self._end = small, end
        self._append(pieces)
        self._keys.add(key)
        return members

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if failure is not None or not self._keys:
            self._closing.__exit__(kind, failure, traceback)
            return
        with self._closing:
            self._append([self._small + _END])
            self._write_waiting()
            digest = self._digest.hexdigest()
            name = self._name or digest[:16]
            self._draft.name = f"{name}.tar"
        self._shard = Shard(name, digest, self._end + len(_END), len(self._keys))

    def _append(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self._digest.update(piece)
            self._waiting_bytes += len(piece)
        self._waiting += pieces
        if self._waiting_bytes >= _WRITE_BYTES or len(self._waiting) >= _WRITE_PIECES // 2:
            self._write_waiting()

    def _write_waiting(self) -> None:
        written = os.writev(self._file.fileno(), self._waiting[:_WRITE_PIECES])
        if written < self._waiting_bytes:  # an almost full disk, or too much at once
            rest = memoryview(b"".join(self._waiting))[written:]
            while rest:
                rest = rest[self._file.write(rest) :]
        self._waiting, self._waiting_bytes = [], 0


def stored_bytes(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the bytes that payloads of these sizes take in a shard, with header and padding."""
    return _BLOCK + (sizes + _BLOCK - 1) // _BLOCK * _BLOCK


def read_member(descriptor: int, name: str, offset: int, size_bytes: int) -> bytes:
    """Returns the payload at `offset` of an open shard, after a look at the header before it.

    Raises ShardError if the header is not that of a member of this name and size, or the
    payload is cut short.
    """
    try:
        found = os.pread(descriptor, _BLOCK + size_bytes, max(offset - _BLOCK, 0))
    except OSError as error:
        raise ShardError(f"{name} cannot be read ({error})") from error
    header, payload = found[:_BLOCK], found[_BLOCK:]
    key, _, suffix = name.partition(".")
    if header != _header(key, suffix, size_bytes):
        there = header[:_NAME_LENGTH].rstrip(b"\0")
        raise ShardError(
            f"expected the header of {name} with {size_bytes} bytes before offset {offset}, "
            f"found one of {there!r}"
        )
    if len(payload) != size_bytes:
        raise ShardError(
            f"{name}: expected {size_bytes} bytes at offset {offset}, found {len(payload)}; "
            "the file was cut short"
        )
    return payload


def list_members(descriptor: int) -> Iterator[tuple[str, Member]]:
    """Yields name and place of every member of an open shard that we wrote.

    Raises ShardError if something else stands where a header should, or the shard does not end
    with the last of them.
    """
    offset = 0
    while (header := os.pread(descriptor, _BLOCK, offset)) != bytes(_BLOCK):
        try:
            name = header[:_NAME_LENGTH].rstrip(b"\0").decode()
            size_bytes = int(header[_SIZE], 8)
            key, _, suffix = name.partition(".")
            whole = header == _header(key, suffix, size_bytes)
        except (ValueError, ShardError):
            whole = False
        if not whole:
            raise ShardError(f"found no header of a member at offset {offset}")
        yield name, Member(offset + _BLOCK, size_bytes)
        offset += _BLOCK + size_bytes + -size_bytes % _BLOCK
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes != offset + len(_END):
        raise ShardError(
            f"found zeros at offset {offset}, as at the end, and {size_bytes - offset} bytes from "
            f"there on; expected {len(_END)}"
        )


def shard_location(url: str, split: str, name: str) -> str:
    """Returns where a dataset keeps a shard."""
    return storage.join(url, "shards", split, f"{name}.tar")


def sidecar_location(url: str, extractor: str, name: str) -> str:
    """Returns where a dataset keeps the features of a shard."""
    return storage.join(url, "features", extractor, f"{name}.tar")


def _header(key: str, suffix: str, size_bytes: int) -> bytes:
    """Returns a USTAR header. By hand: tarfile's costs five times the rest of a write."""
    name = f"{key}.{suffix}".encode()
    if not _is_suffix(suffix):
        raise ShardError(
            f"sample {key!r}: part {suffix!r}: expected lower-case letters and digits, "
            "with single dots between them"
        )
    if len(name) > _NAME_LENGTH:
        raise ShardError(f"sample {key!r}: member name {name.decode()!r} is over 100 characters")
    if size_bytes > _MAX_SIZE_BYTES:
        raise ShardError(
            f"sample {key!r}: part {suffix!r} has {size_bytes} bytes; the most is 8 GiB"
        )
    size = b"%011o" % size_bytes
    checksum = _FIXED_SUM + sum(name) + sum(size)
    return _HEADER % (name.ljust(_NAME_LENGTH, b"\0"), size, checksum)


@functools.lru_cache(maxsize=64)
def _is_suffix(suffix: str) -> bool:
    return _SUFFIX.fullmatch(suffix) is not None
