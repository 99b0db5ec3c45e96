"""xxh3 digests of columns: those of `xxhash`, of one value after the other in a tight loop."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

Digests = npt.NDArray[np.uint64]

_HEX = np.frombuffer(b"".join(b"%02x" % value for value in range(256)), np.uint16)


def digests(values: pa.Array) -> Digests:
    """Returns the xxh3_64 of each string; there must be no null."""
    payloads = values.cast(pa.binary()).to_pylist()
    return np.fromiter(map(xxhash.xxh3_64_intdigest, payloads), np.uint64, len(payloads))


def in_hex(found: Digests) -> pa.Array:
    """Returns digests as strings of sixteen characters, as `xxh3_64_hexdigest` does."""
    characters = _HEX[found.astype(">u8").view(np.uint8)]
    offsets = np.arange(len(found) + 1, dtype=np.int32) * 16
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(characters)]
    return pa.Array.from_buffers(pa.string(), len(found), buffers)
