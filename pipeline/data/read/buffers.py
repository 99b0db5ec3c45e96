"""A pool of memory that positioned reads fill, taken back when a batch is forgotten."""

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Numpy's own memory begins 16 bytes into a page, where copies into it take a sixth longer.
_PAGE_BYTES = 4096
MAX_FREE_BLOCKS = 16  # per size: more than a loader reads ahead, so that none is freed in between


class BufferPool:
    """Makes uninitialised arrays out of memory that earlier ones have left.

    Touching fresh pages costs as much as reading features into them. An array's memory returns
    by itself once the array, its views and the tensors that share it are gone; what is still
    held is never written again. Threads may share a pool.
    """

    def __init__(self) -> None:
        self._free: dict[int, deque[npt.NDArray[np.uint8]]] = {}

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Returns an array of this shape with arbitrary content."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape))
        size_bytes = count * dtype.itemsize
        free = self._free.setdefault(size_bytes, deque(maxlen=MAX_FREE_BLOCKS))
        try:
            block = free.pop()
        except IndexError:
            room = np.empty(size_bytes + _PAGE_BYTES, np.uint8)
            first = -room.ctypes.data % _PAGE_BYTES
            block = room[first : first + size_bytes]
        # Views keep `lease` alive rather than the block: numpy follows bases only through arrays,
        # and that of `lease` is a memoryview.
        lease = np.frombuffer(block.data, dtype, count)
        weakref.finalize(lease, free.append, block).atexit = False
        return lease.reshape(shape)
