"""The digest of bytes: xxh3_128, in hex."""

from collections.abc import Iterable
from pathlib import Path

import xxhash

_CHUNK_BYTES = 1 << 22


def digest_of(payload: bytes) -> str:
    """Returns the digest of bytes that are in memory."""
    found: str = xxhash.xxh3_128_hexdigest(payload)
    return found


def digest_of_parts(parts: Iterable[bytes]) -> str:
    """Returns the digest of bytes that come one part after the other."""
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def digest_of_file(path: Path) -> str:
    """Returns the digest of a file, a part of which is in memory at a time; raises OSError."""
    with path.open("rb") as file:
        return digest_of_parts(iter(lambda: file.read(_CHUNK_BYTES), b""))
