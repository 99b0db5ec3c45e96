"""The members of somebody else's tar, by their headers alone.

Between the bytes of a tar and the samples that are made of them. Python's own reader takes a header
that it cannot read for the end of the tar, and so do most: what lies behind it is lost without a
word. Here every header's checksum must fit, and the two blocks of zeros that end a tar must have
been reached, with nothing but zeros behind them. Memory: one member.

Read are V7, USTAR, GNU (long names, sizes in base 256) and PAX.
"""

import io
import re
from collections.abc import Iterator, Mapping
from typing import IO, NamedTuple, NoReturn

from pipeline.data.tars.member_names import shown
from pipeline.errors import SourceError
from pipeline.reason import Reason

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MOST_EXTENDED_BYTES = 16 * 1024**2  # of a long name or PAX header, which is read into memory
_CHUNK_BYTES = 1024**2

_NUMBER = re.compile(rb" *([0-7]*)[ \0]*")
_PAX_LENGTH = re.compile(rb"([0-9]{1,8}) ")
_CHECKSUM = slice(148, 156)
_BLANK_CHECKSUM = 8 * ord(" ")

_LINKS = {b"1": "a hard link", b"2": "a symbolic link"}
_SPECIAL = {b"3": "a device", b"4": "a device", b"6": "a pipe"}
_DIRECTORY, _OLD_SPARSE, _OTHER_VOLUME = b"5", b"S", b"M"
_LONG_NAME, _LONG_LINK, _PAX, _GLOBAL_PAX = b"L", b"K", (b"x", b"X"), b"g"
_WITHOUT_DATA = (*_LINKS, *_SPECIAL, _DIRECTORY)
_VENDORS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # lists of folders, labels, access rights: no files

_ADVICE = "Fetch it again; or unpack what is there (`tar -xf` names what it skips) and pack it anew"

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "ZIP",
}


class TarMember(NamedTuple):
    """A file in a tar. Bytes of its name that are no UTF-8 are half surrogates.

    `fault` says why its bytes cannot be read at its place, as a reject's reason and a sentence.
    """

    name: str
    offset: int  # of its first byte in the tar
    size: int  # in bytes
    fault: tuple[Reason, str] | None = None


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes
    is_extended: bool  # of an old sparse file, whose list of pieces goes on behind the header


def list_tar(file: IO[bytes], location: str) -> Iterator[TarMember]:
    """Yields files, links and special files in their order; folders and metadata are passed over.

    Raises SourceError naming the tar, the byte and what was found there, if it is not a whole and
    plain tar.
    """
    return _Reader(file, location).members()


class _Reader:
    def __init__(self, file: IO[bytes], location: str) -> None:
        self._file = file
        self._location = location
        self._size_bytes = file.seek(0, io.SEEK_END)
        self._offset = 0  # of the next header

    def members(self) -> Iterator[TarMember]:
        extended: dict[str, bytes] = {}
        of_all: dict[str, bytes] = {}  # what a global header says of the members behind it
        while (block := self._read(self._offset, _BLOCK)) != _ZEROS:
            at = self._offset
            header = self._header(block)
            self._offset += _BLOCK
            kind = header.kind
            if kind in (_LONG_NAME, _LONG_LINK):
                long_name = self._extended(header).partition(b"\0")[0]
                extended["path" if kind == _LONG_NAME else "linkpath"] = long_name
                continue
            if kind in _PAX:
                extended |= self._pax(header)
                continue
            if kind == _GLOBAL_PAX:
                of_all |= self._pax(header)
                continue
            if kind == _OTHER_VOLUME:
                self._stop(at, "a file that began on another volume", "Join the volumes first")
            member = self._member(at, header, of_all | extended)
            extended = {}
            if member is not None:
                yield member
        if extended:
            self._stop(self._offset, "an extended header without its member before the end")
        self._require_end()

    def _member(self, at: int, header: _Header, extended: Mapping[str, bytes]) -> TarMember | None:
        """Returns a member and passes over its bytes; None if it is no file."""
        kind, size, fault = header.kind, header.size, None
        if "size" in extended:
            if not extended["size"].isdigit() or len(extended["size"]) > 20:
                self._stop(at, f"the size {extended['size'][:30]!r} in a PAX header")
            size = int(extended["size"])
        path = extended.get("path", header.name)
        sparse = any(name.startswith("GNU.sparse.") for name in extended)
        if sparse:
            path = extended.get("GNU.sparse.name", path)
        name = path.decode("utf-8", "surrogateescape")
        if kind == _OLD_SPARSE:
            sparse, is_extended = True, header.is_extended
            while is_extended:
                pieces = self._read(self._offset, _BLOCK)
                if len(pieces) < _BLOCK:
                    self._stop(at, "the end of the file in the list of a sparse file's pieces")
                is_extended = bool(pieces[504])
                self._offset += _BLOCK
        if kind == b"\0" and name.endswith("/"):
            kind = _DIRECTORY  # as V7 has them
        if kind in _WITHOUT_DATA:
            size = 0
        place = self._offset
        self._offset += size + -size % _BLOCK
        if place + size > self._size_bytes:
            self._stop(
                at,
                f"{shown(name)} of {size} bytes, of which the file has "
                f"{max(self._size_bytes - place, 0)}: it was cut short",
            )
        if kind == _DIRECTORY or (kind in _VENDORS and kind != _OLD_SPARSE):
            return None
        if kind in _LINKS or kind in _SPECIAL:
            what = (_LINKS | _SPECIAL)[kind]
            detail = f"{what}, whose bytes are not in it; pack with --dereference"
            fault = (Reason.SPECIAL_FILE, f"{detail} and --hard-dereference")
        elif sparse:
            fault = (
                Reason.SPARSE_MEMBER,
                "stored as a sparse file, in pieces; pack without --sparse",
            )
        return TarMember(name, place, size, fault)

    def _header(self, block: bytes) -> _Header:
        at = self._offset
        is_header = len(block) == _BLOCK and _checksum_fits(block)
        if at == 0 and not is_header:
            self._require_unpacked(block)
        if len(block) < _BLOCK:
            self._stop(
                at,
                f"the end of the file, {len(block)} bytes into a header, before the two blocks of "
                "zeros that end a tar: it was cut short, or is still being written",
            )
        size = _number(block[124:136])
        if size is None or not is_header:
            found = f"{block[:16]!r} where a member's header should be"
            self._stop(at, f"{found}: the tar is damaged")
        name = block[:100].partition(b"\0")[0]
        kind = block[156:157]
        if block[257:263] == b"ustar\0":
            prefix = block[345:500].partition(b"\0")[0]
            name = prefix + b"/" + name if prefix else name
        return _Header(name, size, kind, bool(block[482]))

    def _require_unpacked(self, block: bytes) -> None:
        for magic, packer in _PACKED.items():
            if block.startswith(magic):
                raise SourceError(
                    f"{self._location}: not a plain tar, but one packed by {packer}, which cannot "
                    "be read by position: unpack it first"
                )

    def _extended(self, header: _Header) -> bytes:
        if header.size > _MOST_EXTENDED_BYTES:
            self._stop(
                self._offset - _BLOCK,
                f"a name or extended header of {header.size} bytes; the most is "
                f"{_MOST_EXTENDED_BYTES}",
            )
        payload = self._read(self._offset, header.size)
        if len(payload) != header.size:
            self._stop(self._offset, "the end of the file within a name")
        self._offset += header.size + -header.size % _BLOCK
        return payload

    def _pax(self, header: _Header) -> dict[str, bytes]:
        """Returns the values of an extended header: records of `length key=value` and a newline."""
        at, found = self._offset, {}
        payload = self._extended(header)
        start = 0
        while start < len(payload) and payload[start]:
            length = _PAX_LENGTH.match(payload, start)
            end = start + int(length[1]) if length else 0
            record = payload[length.end() : end] if length else b""
            key, equals, value = record.partition(b"=")
            if not equals or not record.endswith(b"\n") or end > len(payload):
                self._stop(at, f"{payload[start : start + 16]!r} in a PAX header")
            found[key.decode("utf-8", "replace")] = value[:-1]
            start = end
        return found

    def _require_end(self) -> None:
        """Reads on from the first block of zeros: there must be another, and only zeros."""
        end = self._offset
        if self._size_bytes < end + 2 * _BLOCK:
            self._stop(
                end,
                "one block of zeros and the end of the file; two end a tar: it was cut short",
            )
        for start in range(end, self._size_bytes, _CHUNK_BYTES):
            chunk = self._read(start, _CHUNK_BYTES)
            if chunk.count(0) == len(chunk):
                continue
            first = start + next(i for i, byte in enumerate(chunk) if byte)
            block = self._read(first - first % _BLOCK, _BLOCK)
            found, advice = f"{self._read(first, 16)!r}", _ADVICE
            if len(block) == _BLOCK and _checksum_fits(block):
                found = "the header of another member"
                advice = (
                    "Several tars were put together, or a header was lost: "
                    "`tar --ignore-zeros -xf` unpacks them all, to be packed anew"
                )
            self._stop(first, f"{found} behind the zeros at byte {end} that end a tar", advice)

    def _read(self, offset: int, size_bytes: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size_bytes)

    def _stop(self, at: int, found: str, advice: str = _ADVICE) -> NoReturn:
        where = f"{self._location}: not a plain tar, or cut short: at byte {at}"
        raise SourceError(f"{where}, found {found}. {advice}")


def _number(field: bytes) -> int | None:
    """Returns what a header's field holds, in octal digits or in base 256; None if neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _NUMBER.match(field)
    if digits is None or (digits.end() < len(field) and 0 not in digits[0]):
        return None  # what stands behind a zero byte counts for nothing
    return int(digits[1] or b"0", 8)


def _checksum_fits(block: bytes) -> bool:
    """Whether a header's bytes have the sum that it states; old tars summed signed bytes."""
    stated = _number(block[_CHECKSUM])
    found = sum(block) - sum(block[_CHECKSUM]) + _BLANK_CHECKSUM
    if stated == found:
        return True
    others = block[: _CHECKSUM.start] + block[_CHECKSUM.stop :]
    return stated == found - 256 * sum(byte > 127 for byte in others)
